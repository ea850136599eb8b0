"""Whole models: weights packed after training, activations rounded, quantization-aware training begun and ended."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuropil.changes import Changes
from neuropil.compress.quantize.quantizer import FakeQuantizer, Quantizer
from neuropil.compress.quantize.tiles import LAYERS, QuantizationError, check_finite
from neuropil.compress.reconstruction import run
from neuropil.evaluate import evaluating
from neuropil.packed import Packing, is_packed, pack, packed

_GROUPS = {"granularity": ("group", 32), "observer": "mse", "scale_dtype": "float16"}
RECIPES: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "scheme": "symmetric", "granularity": "channel"},
    "int4": {"bits": 4, "scheme": "symmetric", "granularity": "channel", "observer": "mse"},
    "int4-group": {"bits": 4, "scheme": "offset", **_GROUPS},
    "int3-group": {"bits": 3, "scheme": "affine", **_GROUPS},
    "int2-group": {"bits": 2, "scheme": "affine", **_GROUPS},
    "codebook4": {"bits": 4, "scheme": "codebook", "granularity": "channel", "scale_dtype": "float16"},
    "apot4": {"bits": 4, "scheme": "apot", "granularity": "channel"},
    "pow2-4": {"bits": 4, "scheme": "pow2", "granularity": "channel"},
    "ternary": {"bits": 2, "scheme": "ternary", "granularity": "channel"},
    "binary": {"bits": 1, "scheme": "binary", "granularity": "channel"},
}

Weights = str | FakeQuantizer | Mapping[str, Any]
INPUT = "input_quantizer"  # the submodule that rounds what a layer reads


def quantizer_for(recipe: Weights, name: str, module: nn.Module) -> FakeQuantizer | None:
    """The quantizer that a recipe has for the weight of one layer; None where a mapping leaves it out.

    A recipe is a name of `RECIPES`, a quantizer, settings of `Quantizer`, or a mapping from layer names (with * and
    ?) to such; of several patterns that fit, the first counts.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise QuantizationError(f"no recipe is called {recipe!r}; there are {', '.join(RECIPES)}")
        recipe = RECIPES[recipe]
    if isinstance(recipe, Mapping):
        if "bits" not in recipe:
            found = next((value for pattern, value in recipe.items() if fnmatchcase(name, pattern)), None)
            return None if found is None else quantizer_for(found, name, module)
        recipe = Quantizer(**recipe)
    assert isinstance(recipe, FakeQuantizer)
    made = recipe.for_layer(module)
    if isinstance(made, Quantizer):
        made.name = f"{name}.weight" if name else "weight"
    return made


def layers(model: nn.Module, skip: Iterable[str] = ()) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers whose weights can be quantized, by name, and why each other module with a matrix cannot.

    `skip` holds names, or patterns with * and ?. Tied layers are skipped together.
    Raises QuantizationError, naming it, where a layer is compressed already, a weight holds NaN or infinity or is made
    by a hook.
    """
    patterns = tuple(skip)
    found: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    skipped: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_packed(module):
            raise QuantizationError(f"{name or 'the model'} is compressed already; give the model as it was before")
        if parametrize.is_parametrized(module, "weight") and isinstance(module, LAYERS):
            left[name] = "its weight is parametrized; bake that in first (torch.nn.utils.parametrize)"
        elif not isinstance(module, LAYERS):
            shapes = {key: p.ndim for key, p in module._parameters.items() if p is not None}
            large = [key for key, dims in shapes.items() if dims > 1]
            if large and not isinstance(module, parametrize.ParametrizationList | FakeQuantizer):
                left[name] = f"{type(module).__name__} is no layer that can be quantized ({', '.join(large)})"
        elif "weight" not in module._parameters:
            raise QuantizationError(
                f"{name}.weight is made by a hook (pruned or normalised by torch), so the model cannot be copied; make "
                "it a parameter first (torch.nn.utils.prune.remove, torch.nn.utils.remove_weight_norm)"
            )
        elif isinstance(module.weight, nn.parameter.UninitializedParameter):
            left[name] = "its weight has no shape yet; run the model once"
        elif not weight_of(module).numel():
            left[name] = "its weight is empty"
        elif any(fnmatchcase(name, pattern) for pattern in patterns):
            left[name] = "skipped as asked"
            skipped[id(module.weight)] = name
        else:
            found[name] = module
    for name in [name for name, module in found.items() if id(module.weight) in skipped]:
        left[name] = f"tied to {skipped[id(found.pop(name).weight)]}, which is skipped"
    for name, module in found.items():
        check_finite(weight_of(module), f"{name}.weight" if name else "weight")
    return found, left


def weight_of(module: nn.Module) -> Tensor:
    """A layer's weight, without its history."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def pack_layers(model: nn.Module, make: Callable[[str, nn.Module], Packing | str], skip: Iterable[str] = ()) -> Changes:
    """A copy of the model in which the weight of each layer is what `make(name, layer)` gives: a packing, or a reason.

    Tied layers are asked for once and share the packing. What is no layer (see `layers`) is named in `left`.
    """
    found, left = layers(model, skip)
    packings: dict[str, Packing] = {}
    done: dict[int, str] = {}
    for name, module in found.items():
        first = done.setdefault(id(module.weight), name)
        if first != name:
            if first in left:
                left[name] = f"tied to {first}: {left[first]}"
            continue
        made = make(name, module)
        if isinstance(made, str):
            left[name] = made
        else:
            packings[name] = made
    changed = tuple(name for name in found if name not in left)
    made_model = _shallow_weights(model, {id(found[name].weight) for name in packings})
    if "" in packings:
        return Changes(packed(made_model, packings[""]), changed, left)
    pack(made_model, packings)
    return Changes(made_model, changed, left)


def _shallow_weights(model: nn.Module, replaced: set[int]) -> nn.Module:
    """A deep copy, but for the weights that are about to be replaced: those are not copied first."""
    memo = {id(p): p for p in model.parameters() if id(p) in replaced}
    return copy.deepcopy(model, memo)


def quantize_model(
    model: nn.Module,
    weights: Weights = "int8",
    *,
    activations: FakeQuantizer | Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    skip: Iterable[str] = (),
) -> Changes:
    """A copy of the model with its weights packed; with `activations`, what its layers read is rounded as well.

    Parameters
    ----------
    weights: a recipe (see `quantizer_for`): `"int8"`, `Quantizer(4, granularity="channel")`, `{"head": {"bits": 8},
        "*": {"bits": 3}}`; a layer that a mapping does not name is left. 32 bits leave a layer as it is.
    activations: settings of the quantizer of each layer's input. Static ones need `calibration`.
    calibration: batches that show the ranges of activations: tensors, tuples of arguments or dicts of them.
    skip: names or patterns of layers to leave.

    Raises QuantizationError where weights hold NaN (named), a group size does not fit a layer, the calibration is
    empty, or the model is packed already.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> print(quantize_model(model, {"bits": 4, "granularity": ("group", 32)}, skip=["2"]))
    changed 1 module; left 2 as it was (skipped as asked)
    """

    def make(name: str, module: nn.Module) -> Packing | str:
        quantizer = quantizer_for(weights, name, module)
        if quantizer is None:
            return "no pattern of the recipe names it"
        if getattr(quantizer, "bits", 0) == 32:
            return "32 bits: left as it is"
        with torch.no_grad():
            return _naming(name, lambda: quantizer.pack(weight_of(module)))

    changes = pack_layers(model, make, skip)
    if activations is not None:
        names = [n for n in changes.changed if not isinstance(changes.model.get_submodule(n), nn.Embedding)]
        round_inputs(changes.model, activations, names)
        if _static(_input_quantizer(activations)):
            calibrate(changes.model, calibration if calibration is not None else ())
    return changes


def _naming(name: str, make: Callable[[], Packing]) -> Packing:
    """Errors of one layer say which."""
    try:
        return make()
    except QuantizationError as error:
        if name and name in str(error):
            raise
        raise QuantizationError(f"{name or 'the model'}: {error}") from error


# ---------------------------------------------------------------------------------------------- activations


def _input_quantizer(activations: FakeQuantizer | Mapping[str, Any]) -> FakeQuantizer:
    made = activations if isinstance(activations, FakeQuantizer) else Quantizer(**activations)
    return type(made)(**made.settings())


def _static(quantizer: FakeQuantizer) -> bool:
    """Whether its range must be found by a calibration."""
    return isinstance(quantizer, Quantizer) and not quantizer.dynamic and quantizer.bits != 32


def _round_input(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The first argument, by place or by name, is what a layer reads."""
    quantizer = module.get_submodule(INPUT)
    if args:
        return (quantizer(args[0]), *args[1:]), named
    first = next(iter(named))
    return args, {**named, first: quantizer(named[first])}


def round_inputs(model: nn.Module, activations: FakeQuantizer | Mapping[str, Any], names: Iterable[str]) -> None:
    """Give the named layers, in place, a quantizer of what they read, as the submodule `input_quantizer`."""
    for name in names:
        module = model.get_submodule(name)
        if INPUT in module._modules:
            continue
        made = _input_quantizer(activations)
        if isinstance(made, Quantizer):
            made.name = f"the input of {name}"
        module.add_module(INPUT, made)
        module.register_forward_pre_hook(_round_input, with_kwargs=True)


def input_quantizers(model: nn.Module) -> Iterator[tuple[str, FakeQuantizer]]:
    """The quantizers of activations, by the name of the layer that reads them."""
    for name, module in model.named_modules():
        made = module._modules.get(INPUT)
        if isinstance(made, FakeQuantizer):
            yield name, made


def calibrate(model: nn.Module, data: Iterable[Any]) -> int:
    """Run batches through the model to find the ranges of its activations, in place; how many there were.

    A batch is a tensor, a tuple or list of arguments, or a mapping of keyword arguments. While it calibrates, the
    activations are not rounded. The model runs in eval mode and is put back into the mode it was in.
    Raises QuantizationError where there is no batch, and where a layer was never reached.
    """
    found = {name: q for name, q in input_quantizers(model) if isinstance(q, Quantizer) and _static(q)}
    for q in found.values():
        q.observing = True
    try:
        count = run_batches(model, data)
    finally:
        for q in found.values():
            q.observing = False
    unseen = [name for name, q in found.items() if not q.calibrated]
    if unseen:
        raise QuantizationError(
            f"the calibration never reached {', '.join(unseen)}: give data that do, skip them (attention of torch.nn "
            "does not call its output layer as a module), or use dynamic=True"
        )
    for q in found.values():
        q.freeze()
    return count


def run_batches(model: nn.Module, data: Iterable[Any]) -> int:
    """Run batches through the model, in eval mode and without gradients; how many. QuantizationError where none is."""
    count = 0
    with evaluating(model), torch.no_grad():
        for batch in data:
            run(model, batch)
            count += 1
    if not count:
        raise QuantizationError("the calibration is empty: give at least one batch")
    return count


# ------------------------------------------------------------------------------------------------- training


def qat_prepare(
    model: nn.Module,
    weights: Weights,
    *,
    activations: FakeQuantizer | Mapping[str, Any] | None = None,
    skip: Iterable[str] = (),
) -> Changes:
    """A copy for quantization-aware training: weights are parametrized by quantizers, their float masters are trained.

    Give `dynamic=True` to let the grid follow the weights; without, it stays where the weights were at first. Learned
    quantizers (`LSQ`, ...) go in the same way. `bake` ends the training. Tied weights share one quantizer.
    """
    made_model = copy.deepcopy(model)
    found, left = layers(made_model, skip)
    keys = {name: id(module.weight) for name, module in found.items()}
    shared: dict[int, FakeQuantizer | None] = {}
    for name, module in found.items():
        key = keys[name]
        if key not in shared:
            shared[key] = quantizer_for(weights, name, module)
        quantizer = shared[key]
        if quantizer is None:
            left[name] = "no pattern of the recipe names it"
        elif getattr(quantizer, "bits", 0) == 32:
            left[name] = "32 bits: left as it is"
        elif not parametrize.is_parametrized(module, "weight"):  # a module may have two names
            _own_class(module)
            parametrize.register_parametrization(module, "weight", quantizer)
    changed = tuple(name for name in found if name not in left)
    if activations is not None:
        names = [n for n in changed if not isinstance(found[n], nn.Embedding)]
        round_inputs(made_model, activations, names)
    return Changes(made_model, changed, left)


def _own_class(module: nn.Module) -> None:
    """Torch keeps a parametrization's property in a class that copies share: give this copy one of its own."""
    if parametrize.is_parametrized(module):
        cls = type(module)
        held = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(cls.__name__, cls.__bases__, held)


def bake(model: nn.Module) -> Changes:
    """A copy of a model trained with `qat_prepare`, its weights packed: the same outputs, and the bytes of the bits.

    What activations are rounded to stays. A weight whose parametrization cannot pack is baked in as plain numbers
    and named in `left`.
    """
    made = copy.deepcopy(model)
    packings: dict[str, Packing] = {}
    left: dict[str, str] = {}
    tied: dict[int, str] = {}
    names: list[str] = []
    for name, module in list(made.named_modules()):
        if not parametrize.is_parametrized(module, "weight"):
            continue
        chain = module.parametrizations["weight"]
        original, last = chain.original, chain[-1]
        names.append(name)
        first = tied.setdefault(id(original), name)
        if first != name:
            if first in packings:
                packings[name] = packings[first]
        elif isinstance(last, FakeQuantizer):
            with torch.no_grad():
                before = original
                for step in list(chain)[:-1]:
                    before = step(before)
                packings[name] = last.pack(before)
        if name not in packings:
            left[name] = f"{type(last).__name__} has no packing: its weight is kept in plain numbers"
    for name in names:
        _own_class(made.get_submodule(name))
        parametrize.remove_parametrizations(made.get_submodule(name), "weight", leave_parametrized=True)
    pack(made, packings)
    return Changes(made, tuple(packings), left)
