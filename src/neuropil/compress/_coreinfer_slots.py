"""The MLPs of a model whose neurons can be left out while it runs, and the leaving out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from neuropil.errors import ModelError
from neuropil.neurons import find_sites
from neuropil.packed import is_packed
from neuropil.slots import SIZES, Slot, places
from neuropil.slots import find_slots as slots_of

Cores = Mapping[str, Int[Tensor, " kept"]]
Layers = slice | Sequence[int] | None
ACTIVE = "_neuropil_narrowed"
FIRST, LAST = 6 / 32, 27 / 32  # the authors leave the first 6 and the last 5 of 32 layers dense


def find_slots(model: nn.Module, layers: Layers = None) -> tuple[list[Slot], dict[str, str]]:
    """The chosen sites whose neurons can be left out, and for each other module with a matrix why it stays whole.

    Raises ModelError where none can, ValueError for a layer that is not there, for a packed model and for one whose
    neurons are being left out already.
    """
    if getattr(model, ACTIVE, False):
        raise ValueError("this model is inside a block of CoreInfer or only; leave that first")
    if any(is_packed(module) for module in model.modules()):
        raise ValueError("the model's weights are packed; unpack it first (neuropil.packed.unpack)")
    chosen = set(_chosen(len(find_sites(model)), layers))
    slots, left = slots_of(model, lambda site: "" if site.number in chosen else "a layer that was to stay whole")
    if not slots:
        raise ModelError(f"no layer can leave neurons out: {sorted(set(left.values()))}")
    return slots, left


def _chosen(count: int, layers: Layers) -> list[int]:
    if layers is None:
        start = round(FIRST * count)
        return list(range(start, max(start + 1, round(LAST * count))))
    numbers = list(range(count))[layers] if isinstance(layers, slice) else [int(n) for n in layers]
    if not numbers or min(numbers) < 0 or max(numbers) >= count:
        raise ValueError(f"layers={layers}: expected some of the layers 0 to {count - 1}")
    return numbers


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Mark the model as one whose neurons are being left out. Raises ValueError where it is already."""
    if getattr(model, ACTIVE, False):
        raise ValueError("this model is inside a block of CoreInfer or only; leave that first")
    setattr(model, ACTIVE, True)
    try:
        yield
    finally:
        delattr(model, ACTIVE)


@dataclass(frozen=True)
class _State:
    """A module's parameters and the sizes it believes in."""

    module: Any
    parameters: Mapping[str, nn.Parameter | None]
    sizes: Mapping[str, int]

    def put(self) -> None:
        self.module._parameters.update(self.parameters)
        self.module.__dict__.update(self.sizes)


class Narrowing:
    """Swaps the weights of the slots' modules for those of some neurons, and back."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        self.slots = list(slots)
        modules = {id(m): m for slot in self.slots for m in (*slot.reads.values(), slot.write)}
        self._dense = {key: _State(m, dict(m._parameters), _sizes(m)) for key, m in modules.items()}

    def widen(self) -> None:
        """The dense model, its own parameters."""
        for state in self._dense.values():
            state.put()

    def narrow(self, cores: Cores) -> None:
        """Only these neurons of each named site; sites that are not named stay as they are.

        The small matrices are gathered here, once, so that a token costs what their size says.
        """
        for slot in self.slots:
            if slot.site.name in cores:
                for state in self._narrowed(slot, cores[slot.site.name].to(slot.device)):
                    state.put()

    def dense(self, module: nn.Module, name: str) -> nn.Parameter | None:
        """A module's own parameter, whatever stands in its place now."""
        return self._dense[id(module)].parameters[name]

    def _narrowed(self, slot: Slot, kept: Tensor) -> Iterable[_State]:
        for module, weights in slot.readers:
            yield self._taken(module, weights[0].axis, places(weights, kept).sort().values, biased=True)
        yield self._taken(slot.write, slot.write_weight.axis, kept, biased=False)

    @torch.no_grad()
    def _taken(self, module: nn.Module, axis: int, at: Tensor, biased: bool) -> _State:
        dense = self._dense[id(module)]
        weight, bias = dense.parameters["weight"], dense.parameters.get("bias")
        assert weight is not None
        made: dict[str, nn.Parameter | None] = {
            "weight": nn.Parameter(weight.index_select(axis, at), requires_grad=weight.requires_grad)
        }
        if biased and bias is not None:
            made["bias"] = nn.Parameter(bias.index_select(0, at), requires_grad=bias.requires_grad)
        names = SIZES[type(module).__name__]
        changed = names[0 if biased else 1]
        return _State(module, {**dense.parameters, **made}, {**dense.sizes, changed: len(at)})


def _sizes(module: nn.Module) -> dict[str, int]:
    return {name: getattr(module, name) for name in SIZES[type(module).__name__] if hasattr(module, name)}
