"""The survey's methods by number, and what does each of them here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_PACKAGE = "neuropil.compress.quantize"

# number: (name, "module.callable" of this package for each part of it, a note)
_ROWS: dict[int, tuple[str, tuple[str, ...], str]] = {
    1: ("uniform affine quantizer", ("grids.uniform", "quantizer.Quantizer"), 'scheme="affine"'),
    2: ("symmetric", ("grids.uniform",), 'scheme="symmetric" or "restricted"'),
    3: ("asymmetric", ("grids.uniform",), 'scheme="affine"'),
    4: ("static calibration", ("observers.Observer", "models.calibrate"), "five observers"),
    5: ("dynamic", ("quantizer.Quantizer",), "dynamic=True"),
    6: ("granularity", ("tiles.tiling",), 'granularity="tensor", "channel", ("channels", n), ("group", g)'),
    7: ("non-uniform, general", ("grids.Levels",), ""),
    8: ("rule-based: powers of two", ("nonuniform.pow2", "nonuniform.apot"), 'scheme="pow2" or "apot"'),
    9: ("binary codes", ("binary_codes.BinaryCodes", "codes.greedy_codes", "codes.alternating_codes"), ""),
    10: ("optimisation-based", ("nonuniform.lloyd_max", "learned.LearnedLevels"), 'scheme="codebook"'),
    11: ("clustering", ("nonuniform.kmeans", "importance.hessian_quantize"), ""),
    12: ("stochastic", ("grids.stochastic_round", "noise.stochastic_signs", "noise.QuantNoise"), ""),
    13: ("training with a straight-through gradient", ("models.qat_prepare", "models.bake"), ""),
    14: (
        "other gradient rules",
        (
            "gradients.SoftQuantizer",
            "gradients.GumbelQuantizer",
            "gradients.ProxQuant",
            "gradients.grid_distance",
            "gradients.sine_penalty",
        ),
        'and Quantizer(gradient="clipped" or "identity")',
    ),
    15: ("learned quantizers", ("learned.PACT", "learned.LSQ", "learned.LSQPlus", "learned.QIL"), ""),
    16: ("range choice after training", ("ranges.aciq_clip", "ranges.omse"), 'observer="aciq"; "mse" by channel'),
    17: (
        "bias correction",
        ("correction.correct_bias", "correction.correct_bias_from"),
        "from data, or from batch norms",
    ),
    18: ("equalisation", ("equalise.equalise", "equalise.absorb_bias"), ""),
    19: ("outlier channel splitting", ("equalise.split_outliers",), ""),
    20: ("learned rounding", ("rounding.learn_rounding",), 'method="adaround" or "adaquant"; blocks= for BRECQ'),
    21: ("without data or training", ("zero_shot.dfq", "zero_shot.distil_data"), ""),
    22: ("without data, with training", ("zero_shot.train_without_data",), ""),
    23: ("simulated and integer-only", ("integer.convert_integer", "models.quantize_model"), ""),
    24: ("dyadic requantization", ("rescaling.dyadic", "rescaling.requantize"), ""),
    25: ("folding of batch norm", ("folding.fold", "folding.fold_qat", "folding.bake_folded"), ""),
    26: (
        "integer non-linearities",
        (
            "integer_math.i_gelu",
            "integer_math.i_exp",
            "integer_math.i_sqrt",
            "integer_math.integer_functions",
        ),
        "",
    ),
    27: ("mixed precision by search", ("mixed.bit_allocation", "search.bit_search", "search.BitBranches"), ""),
    28: ("mixed precision by curvature", ("hessian.curvature", "mixed.sensitivity", "mixed.bit_allocation"), ""),
    29: ("costs of hardware", ("mixed.size_costs", "mixed.bops_costs", "mixed.roofline_costs"), ""),
    30: ("training with distillation", ("teacher.distillation",), ""),
    31: ("binary weights", ("binary.BinaryWeight", "binary.clip_masters", "xnor.XNORLinear", "xnor.XNORConv2d"), ""),
    32: ("binary activations", ("sign_gradients.Sign", "xnor.xnor_matmul"), ""),
    33: ("ternary", ("signs.ternary", "binary.TTQ"), 'scheme="ternary"'),
    34: (
        "less error at the extreme",
        (
            "binary_codes.BinaryCodes",
            "sign_gradients.ABCActivation",
            "sign_gradients.residual_signs",
            "binary.LossAwareBinary",
        ),
        "",
    ),
    35: ("better gradients of signs", ("sign_gradients.sign", "sign_gradients.Sign", "sign_gradients.RPReLU"), ""),
    36: (
        "vector quantization",
        ("vectors.ProductQuantizer", "vectors.product_quantize", "vectors.finetune_codebooks"),
        "",
    ),
    37: ("Deep Compression", ("deep.deep_compress",), ""),
    38: ("pruning with quantization", ("deep.MaskedQuantizer", "deep.deep_compress"), ""),
    39: ("knowledge distillation", ("teacher.distillation",), "of any student, with labels or without"),
    40: ("efficient architectures, their search", (), "out of scope: a model's design, not its numbers"),
    41: ("hardware co-design", (), "out of scope: no processor is designed here"),
    42: ("training in low precision", ("low_precision.LowPrecision", "low_precision.stochastic_bfloat16"), ""),
}


@dataclass(frozen=True)
class Method:
    """One item of the survey: its name, what does it here (nothing where it is out of scope), and a note."""

    number: int
    name: str
    calls: tuple[Callable[..., Any], ...]
    note: str


def list_methods() -> dict[int, Method]:
    """All items of the survey by number.

    >>> list_methods()[8].name, [call.__name__ for call in list_methods()[8].calls]
    ('rule-based: powers of two', ['pow2', 'apot'])
    """
    return {
        number: Method(number, name, tuple(_find(path) for path in paths), note)
        for number, (name, paths, note) in _ROWS.items()
    }


def _find(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    found: Callable[..., Any] = getattr(import_module(f"{_PACKAGE}.{module}"), name)
    return found
