r"""Weights and activations in few bits: each class of method that the survey names, as a small function to compose.

>>> import torch
>>> from torch import nn
>>> from torch.nn.utils import parametrize
>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
>>> x = torch.randn(8, 64)

After training, with real bytes (`neuropil.packed`):

>>> from neuropil.packed import nbytes
>>> changes = quantize_model(model, Quantizer(4, "affine", ("group", 32)))
>>> nbytes(model), nbytes(changes.model)
(19240, 3848)

As a parametrization, for training with rounded weights:

>>> layer = nn.Linear(64, 64)
>>> _ = parametrize.register_parametrization(layer, "weight", Quantizer(2, granularity="channel", observer="mse"))
>>> layer.weight[0].unique().numel()
4

After training, for less loss: `fold` batch norms, `equalise` channels, `split_outliers`, `learn_rounding` (AdaRound,
BRECQ, AdaQuant), `correct_bias`; without data `dfq` and `distil_data`. Bits for each layer: `sensitivity`, `curvature`,
`bit_allocation`. In training: `qat_prepare`, `fold_qat`, `distillation`. In integers alone: `convert_integer`,
`integer_functions`. What became of each layer: `report`. `list_methods()` has them all by the survey's numbers.

A uniform grid of b bits rounds $r$ to $S (q - z)$, $q = \mathrm{clip}(\mathrm{round}(r / S) + z)$; the survey writes
$Z = -z$. Coarse grids are told apart by what shares a scale (a tensor, a channel, a group of weights), by the range
that is covered (`observer`), and by the levels (`scheme`). `list_methods()` leads from the survey's items to what does
each of them; the main ones:

| to | use |
| --- | --- |
| pack the weights of a model | `quantize_model`, `product_quantize`, `hessian_quantize`, `deep_compress` |
| round activations too | `quantize_model(..., activations=..., calibration=...)`, `calibrate` |
| train with rounded weights, then pack | `qat_prepare` with `Quantizer(dynamic=True)`, `LSQ`, `TTQ`, ..., and `bake` |
| see what each layer lost | `layer_losses` |

What the survey leaves open: a symmetric scheme of one bit is the sign times the mean magnitude, whatever the observer,
since min/max would put both levels at the extremes. The straight-through gradient passes within half a step of the
outermost levels, which is the whole range of a min/max grid. The range that is searched by mean squared error shrinks
both ends alike. Entropy, as in TensorRT, looks at 2048 bins of |r| in steps of 8 bins.

Source: Gholami, Kim, Dong, Yao, Mahoney and Keutzer, "A Survey of Quantization Methods for Efficient Neural Network
Inference", 2021, arXiv:2103.13630.
"""

from neuropil.compress.quantize.binary import TTQ, BinaryWeight, LossAwareBinary, clip_masters
from neuropil.compress.quantize.binary_codes import BinaryCodes
from neuropil.compress.quantize.correction import correct_bias, correct_bias_from
from neuropil.compress.quantize.deep import MaskedQuantizer, deep_compress
from neuropil.compress.quantize.equalise import absorb_bias, equalise, split_outliers
from neuropil.compress.quantize.folding import bake_folded, fold, fold_qat
from neuropil.compress.quantize.gradients import (
    GumbelQuantizer,
    ProxQuant,
    SoftQuantizer,
    grid_distance,
    sine_penalty,
    soft_round,
)
from neuropil.compress.quantize.grids import Levels, Uniform, stochastic_round, uniform
from neuropil.compress.quantize.hessian import curvature, hessian_traces, top_eigenvalues
from neuropil.compress.quantize.importance import fisher_diagonal, hessian_quantize
from neuropil.compress.quantize.integer import convert_integer
from neuropil.compress.quantize.integer_math import (
    IntegerGELU,
    IntegerLayerNorm,
    IntegerSoftmax,
    i_exp,
    i_gelu,
    i_layernorm,
    i_softmax,
    i_sqrt,
    integer_functions,
)
from neuropil.compress.quantize.learned import LSQ, PACT, QIL, LearnedLevels, LSQPlus
from neuropil.compress.quantize.losses import LayerLoss, layer_losses
from neuropil.compress.quantize.low_precision import LowPrecision
from neuropil.compress.quantize.methods import Method, list_methods
from neuropil.compress.quantize.mixed import (
    bit_allocation,
    bops_costs,
    operations,
    recipe,
    roofline_costs,
    sensitivity,
    size_costs,
)
from neuropil.compress.quantize.models import (
    RECIPES,
    bake,
    calibrate,
    layers,
    pack_layers,
    qat_prepare,
    quantize_model,
    quantizer_for,
    round_inputs,
    run_batches,
)
from neuropil.compress.quantize.noise import QuantNoise, stochastic_signs
from neuropil.compress.quantize.nonuniform import kmeans
from neuropil.compress.quantize.observers import Observer
from neuropil.compress.quantize.quantizer import FakeQuantizer, Quantizer, packing_of, straight_through
from neuropil.compress.quantize.ranges import aciq_clip, omse
from neuropil.compress.quantize.reports import QuantizationReport, report
from neuropil.compress.quantize.rescaling import dyadic, requantize
from neuropil.compress.quantize.rounding import learn_rounding
from neuropil.compress.quantize.search import BitBranches, bit_search
from neuropil.compress.quantize.sign_gradients import ABCActivation, RPReLU, Sign, sign
from neuropil.compress.quantize.teacher import distillation, soft_loss
from neuropil.compress.quantize.tiles import QuantizationError, channels_of, from_tiles, tiling, to_tiles
from neuropil.compress.quantize.vectors import ProductQuantizer, finetune_codebooks, product_quantize
from neuropil.compress.quantize.xnor import XNORConv2d, XNORLinear
from neuropil.compress.quantize.zero_shot import dfq, distil_data, train_without_data

__all__ = [
    "LSQ",
    "PACT",
    "QIL",
    "RECIPES",
    "TTQ",
    "ABCActivation",
    "BinaryCodes",
    "BinaryWeight",
    "BitBranches",
    "FakeQuantizer",
    "GumbelQuantizer",
    "IntegerGELU",
    "IntegerLayerNorm",
    "IntegerSoftmax",
    "LSQPlus",
    "LayerLoss",
    "LearnedLevels",
    "Levels",
    "LossAwareBinary",
    "LowPrecision",
    "MaskedQuantizer",
    "Method",
    "Observer",
    "ProductQuantizer",
    "ProxQuant",
    "QuantNoise",
    "QuantizationError",
    "QuantizationReport",
    "Quantizer",
    "RPReLU",
    "Sign",
    "SoftQuantizer",
    "Uniform",
    "XNORConv2d",
    "XNORLinear",
    "absorb_bias",
    "aciq_clip",
    "bake",
    "bake_folded",
    "bit_allocation",
    "bit_search",
    "bops_costs",
    "calibrate",
    "channels_of",
    "clip_masters",
    "convert_integer",
    "correct_bias",
    "correct_bias_from",
    "curvature",
    "deep_compress",
    "dfq",
    "distil_data",
    "distillation",
    "dyadic",
    "equalise",
    "finetune_codebooks",
    "fisher_diagonal",
    "fold",
    "fold_qat",
    "from_tiles",
    "grid_distance",
    "hessian_quantize",
    "hessian_traces",
    "i_exp",
    "i_gelu",
    "i_layernorm",
    "i_softmax",
    "i_sqrt",
    "integer_functions",
    "kmeans",
    "layer_losses",
    "layers",
    "learn_rounding",
    "list_methods",
    "omse",
    "operations",
    "pack_layers",
    "packing_of",
    "product_quantize",
    "qat_prepare",
    "quantize_model",
    "quantizer_for",
    "recipe",
    "report",
    "requantize",
    "roofline_costs",
    "round_inputs",
    "run_batches",
    "sensitivity",
    "sign",
    "sine_penalty",
    "size_costs",
    "soft_loss",
    "soft_round",
    "split_outliers",
    "stochastic_round",
    "stochastic_signs",
    "straight_through",
    "tiling",
    "to_tiles",
    "top_eigenvalues",
    "train_without_data",
    "uniform",
]
