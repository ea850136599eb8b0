"""Which weights a sparse training masks, and where their masks live."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from neuropil.errors import ModelError

Filter = Callable[[str, nn.Module], bool]
MASK = "weight_mask"  # the name that torch.nn.utils.prune uses too
KINDS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass(frozen=True)
class Slot:
    """A masked weight: where it lives, and the name of its parameter."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def mask(self) -> Bool[Tensor, "*_"]:
        """The mask, a buffer beside the weight, so that it moves and is saved with the model."""
        mask = getattr(self.module, MASK, None)
        if not isinstance(mask, Tensor):
            raise ModelError(f"the mask of {self.name} is gone (removed?); make a new schedule to go on")
        return mask


def find_slots(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    where: Filter,
    kinds: tuple[type[nn.Module], ...],
    masked: bool = False,
) -> list[Slot]:
    """The weights to mask, each once, in the model's order; those that have a mask only if `masked`."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    slots: list[Slot] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, kinds) or not where(name, module):
            continue
        full = f"{name}.weight" if name else "weight"
        if parametrize.is_parametrized(module, "weight") or not isinstance(module.weight, nn.Parameter):
            raise ModelError(f"{full} is parametrised or pruned by torch; bake it in first, or exclude it by `where`")
        if isinstance(module.weight, nn.parameter.UninitializedParameter):
            raise ModelError(f"{full} has no shape yet; run the model once before making the schedule")
        if hasattr(module, MASK) and not masked:
            raise ModelError(f"{full} is masked already; call remove() on its schedule first")
        if id(module.weight) in seen:
            continue
        if id(module.weight) not in trained or not module.weight.requires_grad:
            raise ModelError(f"{full} is not trained by this optimizer; exclude it by `where`")
        seen.add(id(module.weight))
        slots.append(Slot(full, module))
    if not slots:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ModelError(f"nothing to mask in {type(model).__name__}: `where` lets through no module of {names}")
    return slots


def state_of(optimizer: torch.optim.Optimizer, weight: Tensor) -> list[Tensor]:
    """What the optimizer remembers of a weight entry by entry: its momentum, its moments."""
    state = optimizer.state.get(weight, {})
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == weight.shape]


@torch.no_grad()
def zero_masked(slots: Sequence[Slot], optimizer: torch.optim.Optimizer) -> None:
    """Zero what is masked: weights, and what the optimizer remembers of them."""
    for slot in slots:
        for tensor in (slot.weight, *state_of(optimizer, slot.weight)):
            tensor.mul_(slot.mask)


def check_same(slots: Sequence[Slot], masks: Mapping[str, Tensor]) -> None:
    """Raises ValueError where the masks of a state are not of these weights."""
    mine = {slot.name: tuple(slot.mask.shape) for slot in slots}
    given = {name: tuple(mask.shape) for name, mask in masks.items()}
    if mine != given:
        odd = sorted({name for name in mine | given if mine.get(name) != given.get(name)})
        raise ValueError(f"the state is of a schedule over other weights: {', '.join(odd)} differ; use the same model")


def take_off(slots: Sequence[Slot]) -> dict[str, Bool[Tensor, "*_"]]:
    """Take the masks off the model; the zeros stay. Gives the masks."""
    masks = {slot.name: slot.mask for slot in slots}  # says so where one is gone already
    for slot in slots:
        delattr(slot.module, MASK)
    return masks


def hand_over(slots: Sequence[Slot]) -> None:
    """Hand the masks over to `torch.nn.utils.prune` (`weight_orig` and `weight_mask`)."""
    masks = take_off(slots)
    for slot in slots:
        torch_prune.custom_from_mask(slot.module, "weight", masks[slot.name])
