"""Every way to make a model smaller after training, under one name each: what `neuropil compress` offers.

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
>>> print(compress(model, "uniform", bits=4, group=32))
changed 2 modules
>>> compress(model, "uniform", sparsity=0.5)
Traceback (most recent call last):
    ...
ValueError: uniform takes bits, group; it takes no sparsity
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from neuropil.changes import Changes
from neuropil.compress.coreinfer import core_neurons, restrict
from neuropil.compress.dimap import dimap_prune
from neuropil.compress.jlcm import learn_codebooks
from neuropil.compress.nupes import nupes_quantize
from neuropil.compress.quantize import learn_rounding, quantize_model
from neuropil.compress.quantize.models import layers, weight_of
from neuropil.compress.sparse import pack_sparse, prune_magnitude
from neuropil.compress.structured import prune_neurons
from neuropil.packed import is_packed

STEPS = 300  # of learning, a layer
SPARSITY = 0.5  # where none is given
GROUPS = 8  # of rows that share a codebook


@dataclass(frozen=True)
class Settings:
    """What a recipe may be given; None where it is left to the recipe."""

    bits: int | None = None
    group: int | None = None  # weights that share a scale (see `_grouped`); None for one scale a channel
    sparsity: float | None = None
    calibration: Sequence[Any] | None = None  # batches the model takes
    example: Any = None  # one input
    skip: tuple[str, ...] = ()
    progress: bool = False


@dataclass(frozen=True)
class Recipe:
    """A way to make a model smaller: which settings it takes, whether it needs data, and the paper it is of."""

    what: str
    takes: tuple[str, ...]
    apply: Callable[[nn.Module, Settings], Changes]
    slug: str | None = None
    data: str = "none"  # "needed", "used" where it is given, or "none"


def _granularity(settings: Settings) -> Any:
    return ("group", settings.group) if settings.group else "channel"


def _grouped(model: nn.Module, fine: dict[str, Any], group: int | None) -> dict[str, Any]:
    """These settings for every layer; of a convolution, groups of as many whole kernels as come to at most `group`.

    (One kernel at least.) Kernels of all sizes and numbers stand in one network, so no group divides them all.
    """
    own: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False) if group and group > 0 else ():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            kernel, kernels = math.prod(module.kernel_size), module.in_channels // module.groups
            fitting = [n for n in range(1, kernels + 1) if kernels % n == 0 and n * kernel <= int(group or 0)]
            own[name] = {**fine, "granularity": ("group", kernel * max(fitting, default=1))}
    return {**own, "*": fine}


def _uniform(model: nn.Module, settings: Settings) -> Changes:
    bits = 8 if settings.bits is None else settings.bits
    fine: dict[str, Any] = {"bits": bits, "granularity": _granularity(settings)}
    if settings.group:
        # In half precision: two numbers for 32 weights would else take half as much as 4-bit codes do. With fewer than
        # 16 levels, an exact 0 among them is worth more than exact ends (measured on SmolLM2).
        fine |= {"scheme": "offset" if bits > 3 else "affine", "scale_dtype": "float16"}
    else:
        fine |= {"scheme": "symmetric"}
    fine |= {"observer": "mse"} if bits < 8 else {}
    return quantize_model(model, _grouped(model, fine, settings.group), skip=settings.skip)


def _ternary(model: nn.Module, settings: Settings) -> Changes:
    fine = {"bits": 2, "scheme": "ternary", "granularity": _granularity(settings)}
    return quantize_model(model, _grouped(model, fine, settings.group), skip=settings.skip)


def _binary(model: nn.Module, settings: Settings) -> Changes:
    fine = {"bits": 1, "scheme": "binary", "granularity": _granularity(settings)}
    return quantize_model(model, _grouped(model, fine, settings.group), skip=settings.skip)


def _nupes(model: nn.Module, settings: Settings) -> Changes:
    return nupes_quantize(model, 4 if settings.bits is None else settings.bits, ends=None, skip=settings.skip)


def _jlcm(model: nn.Module, settings: Settings) -> Changes:
    found, _ = layers(model, settings.skip)  # a head of few classes has fewer rows than others have groups
    few = {name: rows for name, module in found.items() if 0 < (rows := weight_of(module).shape[0]) < GROUPS}
    bits = 3 if settings.bits is None else settings.bits
    return learn_codebooks(model, bits, {**few, "*": GROUPS}, skip=settings.skip)


def _adaround(model: nn.Module, settings: Settings) -> Changes:
    bits = 4 if settings.bits is None else settings.bits
    fine = {"bits": bits, "scheme": "symmetric", "granularity": _granularity(settings), "observer": "mse"}
    recipe, data = _grouped(model, fine, settings.group), settings.calibration or ()
    return learn_rounding(model, recipe, data, steps=STEPS, skip=settings.skip, progress=settings.progress)


def _packed_zeros(pruned: Changes) -> Changes:
    """Pruned weights as bit maps; what was pruned and has too few zeros to be smaller so stays, and is said to."""
    packed = pack_sparse(pruned.model)
    return Changes(packed.model, packed.changed, {**packed.left, **pruned.left})


def _magnitude(model: nn.Module, settings: Settings) -> Changes:
    return _packed_zeros(prune_magnitude(model, _sparsity(settings), skip=settings.skip))


def _dimap(model: nn.Module, settings: Settings) -> Changes:
    return _packed_zeros(dimap_prune(model, _sparsity(settings), skip=settings.skip))


def _neurons(model: nn.Module, settings: Settings) -> Changes:
    if settings.example is None:
        raise ValueError("neurons: taking neurons out needs one input of the model (example=...)")
    return prune_neurons(model, _sparsity(settings), settings.example, data=settings.calibration, skip=settings.skip)


def _core(model: nn.Module, settings: Settings) -> Changes:
    batch = joined(settings.calibration or ())
    return restrict(model, core_neurons(model, batch, keep=1 - _sparsity(settings)))


def joined(batches: Sequence[Any]) -> Any:
    """Windows of text of one length (shorter ones are left out) or images of one size as one batch.

    Of anything else the first batch.
    """
    if all(isinstance(batch, Tensor) and batch.dim() > 1 for batch in batches):
        largest = max(tuple(batch.shape[1:]) for batch in batches)
        return torch.cat([batch for batch in batches if batch.shape[1:] == largest])
    return batches[0]


def _sparsity(settings: Settings) -> float:
    return SPARSITY if settings.sparsity is None else settings.sparsity


RECIPES: dict[str, Recipe] = {
    "uniform": Recipe("integers on a uniform grid", ("bits", "group"), _uniform, "quantization-survey"),
    "ternary": Recipe("-1, 0 and 1 times a scale", ("group",), _ternary, "quantization-survey"),
    "binary": Recipe("-1 and 1 times a scale", ("group",), _binary, "quantization-survey"),
    "nupes": Recipe("integers on a power grid, its exponent searched", ("bits",), _nupes, "nupes"),
    "jlcm": Recipe("codebooks of groups of neurons", ("bits",), _jlcm, "jlcm"),
    "adaround": Recipe(
        "a uniform grid, up or down learned from data",
        ("bits", "group"),
        _adaround,
        "quantization-survey",
        data="needed",
    ),
    "magnitude": Recipe("the smallest weights zero, kept as a bit map", ("sparsity",), _magnitude),
    "dimap": Recipe("the least of each module's energy zero, kept as a bit map", ("sparsity",), _dimap, "dimap"),
    "neurons": Recipe("the weakest neurons taken out, tensors smaller", ("sparsity",), _neurons, data="used"),
    "core": Recipe(
        "the neurons that the data uses least often taken out", ("sparsity",), _core, "coreinfer", data="needed"
    ),
}


def compress(
    model: nn.Module,
    method: str,
    *,
    bits: int | None = None,
    group: int | None = None,
    sparsity: float | None = None,
    calibration: Iterable[Any] | None = None,
    example: Any = None,
    skip: Sequence[str] = (),
    progress: bool = False,
) -> Changes:
    """A smaller copy of the model by one of `RECIPES`; the model itself is left as it is.

    What a recipe does not take it refuses; what it is not given it has a default for. `progress` shows a bar on stderr
    where layers are learned from data. Save the result with `neuropil.models.save_packed`.

    Raises ValueError for an unknown method, a setting that the method does not take or that makes no sense, missing
    calibration data, NaN in weights, and a model that is compressed already.
    """
    if method not in RECIPES:
        raise ValueError(f"no method is called {method!r}; there are {', '.join(RECIPES)}")
    recipe = RECIPES[method]
    batches = None if calibration is None else list(calibration)
    settings = Settings(bits, group, sparsity, batches, example, tuple(skip), progress)
    given = [f.name for f in fields(Settings)[:3] if getattr(settings, f.name) is not None]
    if foreign := [name for name in given if name not in recipe.takes]:
        takes = ", ".join(recipe.takes) or "no settings"
        raise ValueError(f"{method} takes {takes}; it takes no {' and no '.join(foreign)}")
    if recipe.data == "needed" and not batches:
        raise ValueError(f"{method} needs calibration data: give at least one batch")
    if any(is_packed(module) for module in model.modules()):
        raise ValueError("the model is compressed already; give it as it was before")
    return recipe.apply(model, settings)
