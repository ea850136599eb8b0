r"""The circuit diagram of any module: what one run of it computes, as boxes within the modules that compute them.

>>> import torch
>>> from torch import nn
>>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
>>> circuit = circuit_diagram(net, torch.zeros(2, 8))
>>> print(circuit.diagram)
batch=2 d8=8 -> batch=2 d3=3
>>> circuit.cost().matmul  # 2 * 2 * (8 * 16 + 16 * 3)
704
>>> torch.equal(circuit.torch()(torch.ones(2, 8)), net(torch.ones(2, 8)))
True

The module is exported by `torch.export` (nothing of it is changed), so every operation is there with its shapes,
and the module it was called in. A submodule that cannot be exported, because its path depends on the data, say, is
one opaque box, and a warning names it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuropil._inputs import model_inputs
from neuropil.errors import ModelError
from neuropil.interpret.diagrams._export import Exported, exported
from neuropil.interpret.diagrams._graph import emit
from neuropil.interpret.diagrams.axes import Array, DiagramError
from neuropil.interpret.diagrams.core import Diagram, join
from neuropil.interpret.diagrams.cost import Cost
from neuropil.interpret.diagrams.run import Compiled

if TYPE_CHECKING:
    from neuropil.models import Model


@dataclass(frozen=True)
class Circuit:
    """A module's diagram, with the module's own weights.

    `theory` and `simulated` are the same numbers, once read off the diagram and once counted while the module runs:
    operations in products, trained numbers, and the size of what each module gives.
    """

    diagram: Diagram
    name: str
    opaque: Mapping[str, str]  # modules drawn as one box, and why
    model: nn.Module = field(repr=False)
    example: tuple[Tensor, ...] = field(repr=False)
    _export: Exported = field(repr=False)

    def svg(self, *, hide: Sequence[str] = ("batch",), **options: Any) -> str:
        """The drawing, without the axes in `hide` and those of size 1 that have no name.

        For the other options see `neuropil.interpret.diagrams.svg.svg`.
        """
        return hidden(self.diagram, hide).svg(title=options.pop("title", f"{self.name}: circuit diagram"), **options)

    def describe(self, **options: Any) -> str:
        return self.diagram.describe(**options)

    def mermaid(self, *, hide: Sequence[str] = ("batch",), **options: Any) -> str:
        return hidden(self.diagram, hide).mermaid(**options)

    def tikz(self, *, hide: Sequence[str] = ("batch",), **options: Any) -> str:
        return hidden(self.diagram, hide).tikz(**options)

    def cost(self) -> Cost:
        return self.diagram.cost()

    def backward(self) -> Diagram:
        return self.diagram.backward()

    def torch(self) -> Compiled:
        """The diagram as a module that runs on the weights of the model it was traced from."""
        return Compiled(self.diagram, self._export.weights, modules=self._export.calls)

    @cached_property
    def modules(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """For each module that is a block: the shapes that it gives."""
        return {path: tuple(a.shape for a in op.cod) for path, op in named_blocks(self.diagram) if len(op.cod) == 1}

    @property
    def theory(self) -> np.ndarray:
        found = self.cost()
        return np.array([found.matmul, found.parameters, *(_numbers(s[0]) for s in self.modules.values())])

    @cached_property
    def simulated(self) -> np.ndarray:
        from torch.utils.flop_counter import FlopCounterMode

        seen: dict[str, list[tuple[int, ...]]] = {}
        counter = FlopCounterMode(display=False)
        with _evaluating(self.model), _watched(self.model, seen), torch.no_grad(), counter:
            self._export.run(self.model)
        trained = {id(p): p.numel() for p in self.model.parameters() if p.requires_grad}
        sizes = []
        for path, (shape,) in self.modules.items():
            given = seen.get(path.partition("@")[0], [()])  # of several, the one that is read on
            sizes.append(_numbers(shape if shape in given else given[0]))
        return np.array([counter.get_total_flops(), sum(trained.values()), *sizes])


def circuit_diagram(
    model: nn.Module | Model | str,
    example: Any = None,
    *,
    names: Sequence[str | Sequence[str]] | None = None,
) -> Circuit:
    """The circuit diagram of a model.

    Parameters
    ----------
    model: any module, a `neuropil.models.Model`, or what `neuropil.models.load` takes ("smollm2", a path, a hub name).
    example: what to run it on: a tensor, a tuple of them, or a dictionary of arguments; made up if None.
    names: names for the axes of each tensor of the example, as "batch seq"; inferred if None.

    Raises DiagramError where the model gives no tensor or the example does not fit, `ModelError` where no example is
    given and none can be made up. Warns for each module that becomes an opaque box. The model runs in
    evaluation mode, and is left as it was.
    """
    module, name = _module(model)
    args, kwargs = _arguments(module, example)
    with _evaluating(module):
        export = exported(module, args, kwargs)
    for path, why in export.opaque.items():
        warnings.warn(
            f"{path or name} ({type(module.get_submodule(path)).__name__}) is drawn as one opaque box: {why}",
            stacklevel=2,
        )
    diagram = emit(export, names)
    return Circuit(diagram, name, export.opaque, module, export.inputs, export)


def _module(model: Any) -> tuple[nn.Module, str]:
    if isinstance(model, nn.Module):
        return model, type(model).__name__
    if isinstance(model, str):
        from neuropil.models import load

        model = load(model)
    return model.module(), str(model.name)


def _arguments(module: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example is None:
        return _made_up(module)
    if isinstance(example, Mapping):
        return (), dict(example)
    args = example if isinstance(example, tuple) else (example,)
    extra = {"use_cache": False} if _caches(module) else {}
    return args, extra


def _caches(module: nn.Module) -> bool:
    """Whether it would return its cache besides, which no diagram shows."""
    config = getattr(module, "config", None)
    return bool(getattr(config, "use_cache", False))


def _made_up(module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    for given in model_inputs(module, str(device)):
        args, kwargs = ((), dict(given)) if isinstance(given, dict) else (given, {})
        if isinstance(given, dict) and not _caches(module):
            kwargs.pop("use_cache", None)
        try:
            with _evaluating(module), torch.no_grad():
                module(*args, **kwargs)
        except Exception:  # whatever a model does with what it does not take
            continue
        return args, kwargs
    raise ModelError(f"{type(module).__name__}: no input could be made up for it; give an example")


@contextmanager
def _evaluating(module: nn.Module) -> Any:
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def _watched(module: nn.Module, seen: dict[str, list[tuple[int, ...]]]) -> Any:
    """Writes down the shapes that each module gives."""

    def hook(path: str) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, out: Any) -> None:
            shapes = [tuple(x.shape) for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
            if shapes:
                seen.setdefault(path, shapes)

        return note

    handles = [m.register_forward_hook(hook(path)) for path, m in module.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def named_blocks(diagram: Diagram) -> list[tuple[str, Any]]:
    """Every block with its dotted name."""
    return [(join(path, op.name), op) for path, op in diagram.walk() if op.kind == "block" and not op.option("group")]


def hidden(diagram: Diagram, names: Sequence[str]) -> Diagram:
    """The diagram without the axes of these names, and of size 1 without a name of their own, for drawing."""

    def shown(a: Array) -> Array:
        return a.without([n for n in a.names if n in names or re.fullmatch(r"[a-z]1(_\d+)?", n)])

    return diagram._changed(shown, lambda size: size)


def _numbers(shape: Sequence[Any]) -> int:
    return int(np.prod(shape, dtype=np.int64))


__all__ = ["Circuit", "DiagramError", "circuit_diagram", "hidden"]
