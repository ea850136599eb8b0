"""A module through `torch.export`; submodules that it refuses stand in as one operation each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuropil.interpret.diagrams.axes import DiagramError


@dataclass(frozen=True)
class Exported:
    """An exported program, and what is needed to read and to run it."""

    program: Any
    inputs: tuple[Tensor, ...]
    weights: Mapping[str, Tensor]
    trained: frozenset[str]
    opaque: Mapping[str, str]
    calls: Mapping[str, Callable[..., Any]]
    run: Callable[[nn.Module], Any]


_SHAPES: dict[str, list[tuple[torch.Size, torch.dtype]]] = {}  # of the outputs of each module that is opaque now


@torch.library.custom_op("neuropil::opaque", mutates_args=(), schema="(Tensor[] xs, str name) -> Tensor[]")
def _opaque(xs: list[Tensor], name: str) -> list[Tensor]:
    return [xs[0].new_zeros(shape, dtype=dtype) for shape, dtype in _SHAPES[name]]


@_opaque.register_fake
def _(xs: list[Tensor], name: str) -> list[Tensor]:
    return [xs[0].new_empty(shape, dtype=dtype) for shape, dtype in _SHAPES[name]]


@dataclass
class _Call:
    """One call of a submodule, as it was seen."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


def exported(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exported:
    """The module exported on these arguments."""
    inputs = tuple(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
    _check_runs(module, args, kwargs)
    opaque: dict[str, str] = {}
    calls: dict[str, Callable[..., Any]] = {}
    try:
        program = _try(module, args, kwargs)
    except Exception:  # of any kind: it is the model's code that runs
        seen = _observed(module, args, kwargs)
        _find(module, "", seen, opaque, calls)
        if "" in opaque:
            program = None
        else:
            with _standing_in(module, seen, opaque):
                program = _try(module, args, kwargs)
    weights = dict(module.state_dict(keep_vars=True))
    weights |= dict(module.named_buffers(remove_duplicate=False))
    if program is not None:
        weights |= {k: v for k, v in program.constants.items() if isinstance(v, Tensor)}
    trained = frozenset(k for k, p in module.named_parameters(remove_duplicate=False) if p.requires_grad)
    return Exported(program, inputs, weights, trained, opaque, calls, lambda m: m(*args, **kwargs))


def _check_runs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    try:
        with torch.no_grad():
            out = module(*args, **kwargs)
    except Exception as error:
        raise DiagramError(f"{name} does not run on this example: {type(error).__name__}: {error}") from error
    if not any(isinstance(x, Tensor) for x in pytree.tree_leaves(out)):
        raise DiagramError(f"{name} gives {type(out).__name__} without a tensor in it; nothing can be drawn")


def _try(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return torch.export.export(module, args, kwargs=kwargs, strict=False)


def _observed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, _Call]:
    """The first call of every submodule in a run."""
    seen: dict[str, _Call] = {}

    def hook(path: str) -> Callable[..., None]:
        def note(_: nn.Module, a: tuple[Any, ...], k: dict[str, Any], out: Any) -> None:
            seen.setdefault(path, _Call(a, k, out))

        return note

    handles = [m.register_forward_hook(hook(path), with_kwargs=True) for path, m in module.named_modules()]
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _find(
    module: nn.Module,
    path: str,
    seen: Mapping[str, _Call],
    opaque: dict[str, str],
    calls: dict[str, Callable[..., Any]],
) -> None:
    """The smallest modules that must be opaque so that this one, which cannot be exported, can."""
    whole = module.get_submodule(path)
    for name, child in whole.named_children():
        here = f"{path}.{name}" if path else name
        inner = [here] if here in seen else [p for p in _beneath(child, here) if p in seen]
        for place in inner:
            try:
                _export_part(module, place, seen, opaque)
            except Exception:
                _find(module, place, seen, opaque, calls)
    try:
        _export_part(module, path, seen, opaque)
    except Exception as still:
        for name in [p for p in opaque if path == "" or p.startswith(f"{path}.")]:
            del opaque[name]
        opaque[path] = _reason(still)
        calls[path] = _caller(module.get_submodule(path), seen[path])


def _beneath(child: nn.Module, here: str) -> list[str]:
    """The members of a list of modules, which itself is never called."""
    return [f"{here}.{name}" for name, _ in child.named_children()]


def _export_part(module: nn.Module, path: str, seen: Mapping[str, _Call], opaque: Mapping[str, str]) -> None:
    call = seen[path]
    with _standing_in(module, seen, opaque):
        _try(module.get_submodule(path), call.args, call.kwargs)


def _reason(error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first if len(first) < 160 else first[:157] + "..."


def _caller(part: nn.Module, call: _Call) -> Callable[..., Any]:
    """The module as a function of its tensors alone, all else as it was seen."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

    def run(*tensors: Tensor) -> Any:
        whole = list(leaves)
        for place, x in zip(places, tensors, strict=True):
            whole[place] = x
        args, kwargs = pytree.tree_unflatten(whole, spec)
        found = tuple(x for x in pytree.tree_leaves(part(*args, **kwargs)) if isinstance(x, Tensor))
        return found if len(found) > 1 else found[0]

    return run


@contextmanager
def _standing_in(
    module: nn.Module, seen: Mapping[str, _Call], names: Sequence[str] | Mapping[str, str]
) -> Iterator[None]:
    """While it lasts, these submodules are one operation each; their own `forward` comes back after."""
    parts = {name: module.get_submodule(name) for name in names if name}
    try:
        for name, part in parts.items():
            part.forward = _stand_in(name, seen[name])
        yield
    finally:
        for part in parts.values():
            part.__dict__.pop("forward", None)


def _stand_in(name: str, call: _Call) -> Callable[..., Any]:
    leaves, spec = pytree.tree_flatten(call.out)
    _SHAPES[name] = [(x.shape, x.dtype) for x in leaves if isinstance(x, Tensor)]

    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        found = iter(torch.ops.neuropil.opaque(tensors, name))
        return pytree.tree_unflatten([next(found) if isinstance(x, Tensor) else x for x in leaves], spec)

    return forward
