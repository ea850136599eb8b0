"""How the pruner that selective activation is added to ranks weights, and the activating choice itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from neuropil.compress._dimap_modules import energy_shares
from neuropil.compress._granet_slots import Slot
from neuropil.errors import ModelError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Scorer = Callable[[nn.Module], Mapping[str, Tensor]]
Base = str | Scorer | type[torch_prune.BasePruningMethod]
Masks = list[Bool[Tensor, "*_"]]


def count_of(rate: float, total: int) -> int:
    """`rate` of `total`, rounded down, but not for the last bit of a float."""
    return int(rate * total + 1e-6)


def without_lowest(scores: Sequence[Tensor], masks: Masks, count: int) -> Masks:
    """Of all live weights take away the `count` of lowest score; of equal scores the first."""
    alive = torch.cat([mask.flatten().cpu() for mask in masks])
    order = torch.cat([score.detach().flatten().cpu() for score in scores])[alive].argsort(stable=True)
    return _take(masks, alive.nonzero().flatten()[order[:count]])


def without_still_negatives(
    weights: Sequence[Tensor],
    starts: Sequence[Tensor],
    masks: Masks,
    count: int,
    signs: Sequence[Tensor | None],
) -> tuple[Masks, int]:
    """Of the live negative weights take away the `count` that moved least since `starts`; how many that were."""
    movement, candidates = [], []
    for weight, start, mask, sign in zip(weights, starts, masks, signs, strict=True):
        felt = weight.detach() if sign is None else weight.detach() * sign
        movement.append((weight.detach() - start).abs().flatten().cpu())
        candidates.append(((felt < 0) & mask).flatten().cpu())
    places = torch.cat(candidates).nonzero().flatten()
    order = torch.cat(movement)[places].argsort(stable=True)[:count]
    return _take(masks, places[order]), len(order)


def _take(masks: Masks, places: Tensor) -> Masks:
    gone = torch.zeros(sum(mask.numel() for mask in masks), dtype=torch.bool)
    gone[places] = True
    parts = gone.split([mask.numel() for mask in masks])
    return [mask & ~part.reshape(mask.shape).to(mask.device) for mask, part in zip(masks, parts, strict=True)]


def base_masks(base: Any, model: nn.Module, slots: Sequence[Slot], count: int) -> Masks:
    """The masks of these weights after the base method has taken away `count` of the live ones."""
    masks = [slot.mask for slot in slots]
    weights = [slot.weight.detach() for slot in slots]
    if isinstance(base, type):
        return _by_torch(base, weights, masks, count)
    if base == "magnitude":
        scores: Sequence[Tensor] = [weight.abs() for weight in weights]
    elif base == "lamp":  # each layer's masked weights are zero, so its live ones alone make its energy
        scores = [energy_shares([weight])[0] for weight in weights]
    else:
        scores = _scored(base(model), slots)
    return without_lowest(scores, masks, count)


def _by_torch(method: type, weights: Sequence[Tensor], masks: Masks, count: int) -> Masks:
    """By an unstructured method of `torch.nn.utils.prune`, over all tensors together."""
    if not count:
        return [mask.clone() for mask in masks]
    before = torch.cat([mask.flatten() for mask in masks])
    pool = torch.cat([weight.flatten() for weight in weights])
    # Its own count is of live weights: it is shown those alone.
    kept = method(count).compute_mask(pool[before], torch.ones_like(pool[before])) != 0
    after = before.clone()
    after[before] = kept
    parts = after.split([mask.numel() for mask in masks])
    return [part.reshape(mask.shape) for part, mask in zip(parts, masks, strict=True)]


def _scored(given: Mapping[str, Tensor], slots: Sequence[Slot]) -> list[Tensor]:
    for slot in slots:
        score = given.get(slot.name)
        if score is None or score.shape != slot.weight.shape:
            what = "none" if score is None else f"one of shape {tuple(score.shape)}"
            raise ModelError(
                f"the base method must give a score of shape {tuple(slot.weight.shape)} for {slot.name}, and gave "
                f"{what}; it is called with the model and returns parameter name -> tensor, the lowest go"
            )
        if bool(torch.isnan(score).any()):
            raise ModelError(f"the base method's score of {slot.name} holds NaN")
    return [given[slot.name] for slot in slots]


def following_norms(model: nn.Module, slots: Sequence[Slot]) -> list[nn.Module | None]:
    """For each weight the batch norm that comes right after its layer in the same container, if one does."""
    after: dict[int, nn.Module] = {}
    for parent in model.modules():
        children = list(parent.children())
        for layer, norm in itertools.pairwise(children):
            if isinstance(norm, NORMS) and norm.affine and _channels(layer) == norm.num_features:
                after[id(layer)] = norm
    return [after.get(id(slot.module)) for slot in slots]


def _channels(layer: Any) -> int | None:
    return getattr(layer, "out_channels", getattr(layer, "out_features", None))


def sign_of(norm: nn.Module | None, weight: Float[Tensor, "*_"], transposed: bool) -> Tensor | None:
    """The sign by which a batch norm passes each output channel on, shaped to multiply the weight."""
    if norm is None:
        return None
    assert isinstance(norm.weight, Tensor)
    shape = [1] * weight.dim()
    shape[1 if transposed else 0] = -1
    return norm.weight.detach().sign().reshape(shape)
