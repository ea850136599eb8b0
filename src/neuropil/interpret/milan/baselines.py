"""Labels instead of sentences: NetDissect and Compositional Explanations, on concepts whose regions are known.

    IoU(u, c) = |U and C| / |U or C|        U: where unit u exceeds its threshold, C: where concept c is

NetDissect (Bau et al. 2017) gives the concept with the largest IoU; Compositional Explanations (Mu and Andreas 2020)
the formula of up to three concepts with and, or, and-not, found by beam search.

>>> concepts = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 1, 0, 0], [0, 0, 1, 1, 0]]).bool()
>>> units = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 1, 1, 0]]).bool()
>>> [label.text for label in netdissect(units, concepts, ["red", "round", "small"])]
['round', 'small']
>>> [label.text for label in compositional(units, concepts, ["red", "round", "small"])]
['(round and red)', 'small']
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from neuropil.interpret.milan.exemplars import batched, inputs_of
from neuropil.interpret.milan.layer import Reshape, as_maps, seen_layer
from neuropil.neurons import Site


@dataclass(frozen=True)
class Label:
    """A formula over concepts, its IoU with the unit's regions, and the concepts in it that are not negated."""

    text: str
    iou: float
    concepts: tuple[str, ...]


def unit_masks(
    model: nn.Module,
    images: Any,
    layer: str | Site,
    threshold: Float[Tensor, " units"],
    side: int,
    *,
    units: Sequence[int] | Tensor | None = None,
    batch_size: int = 32,
    reshape: Reshape | None = None,
) -> Bool[Tensor, "units n side side"]:
    """Where the units of a layer exceed their thresholds, on all images of a probe, on a grid of `side` x `side`."""
    name = layer.name if isinstance(layer, Site) else layer
    last = isinstance(layer, Site) and layer.tap.axis == -1
    chosen = torch.arange(len(threshold)) if units is None else torch.as_tensor(units)
    training = [module for module in model.modules() if module.training]
    found = []
    try:
        model.eval()
        with torch.no_grad(), seen_layer(model, layer) as seen:
            for batch in batched(images, batch_size):
                seen.clear()
                [x] = inputs_of(model, batch)
                model(x)
                maps, _ = as_maps(seen[0], len(x), last, reshape, name)
                maps = maps.cpu()
                maps = interpolate(maps[:, chosen], (side, side), mode="bilinear", align_corners=False)
                found.append((maps > threshold[:, None, None]).transpose(0, 1))
    finally:
        for module in training:
            module.training = True
    return torch.cat(found, 1)


def iou(
    units: Bool[Tensor, "units places"], concepts: Bool[Tensor, "concepts places"]
) -> Float[Tensor, "units concepts"]:
    """Intersection over union of every unit's regions with every concept's; zero where both are empty."""
    both = units.float() @ concepts.float().T
    either = units.sum(1).float()[:, None] + concepts.sum(1).float() - both
    return both / either.clamp_min(1)


def netdissect(
    units: Bool[Tensor, "units places"], concepts: Bool[Tensor, "concepts cells"], names: Sequence[str]
) -> list[Label]:
    """The concept that fits each unit best."""
    _check(units, concepts, names)
    best = iou(units, concepts).max(1)
    return [Label(names[c], v, (names[c],)) for c, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def compositional(
    units: Bool[Tensor, "units places"],
    concepts: Bool[Tensor, "concepts cells"],
    names: Sequence[str],
    *,
    length: int = 3,
    beam: int = 5,
) -> list[Label]:
    """The formula of at most `length` concepts that fits each unit best, of those a beam search meets."""
    _check(units, concepts, names)
    if length < 1 or beam < 1:
        raise ValueError(f"length={length}, beam={beam}; expected 1 or more")
    c = concepts.float()
    return [_formula(unit.float(), c, names, length, beam) for unit in units]


def _formula(u: Tensor, c: Tensor, names: Sequence[str], length: int, beam: int) -> Label:
    """Formulas grow by one concept at a time; the counts of all extensions come from two matrix products."""
    size, wide = u.sum(), c.sum(1)
    meets = c @ u  # |U and C|
    values = meets / (size + wide - meets).clamp_min(1)
    top = values.topk(min(beam, len(names)))
    best = [Label(names[i], v, (names[i],)) for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    masks = c[top.indices]
    for _ in range(length - 1):
        inside = (masks * u) @ c.T  # |U and F and C|
        common = masks @ c.T  # |F and C|
        f, uf = masks.sum(1, keepdim=True), (masks @ u)[:, None]
        hits = torch.stack([inside, uf + meets - inside, uf - inside])  # and, or, and-not
        areas = torch.stack([common, f + wide - common, f - common])
        values = hits / (size + areas - hits).clamp_min(1)
        top = values.flatten().topk(min(beam, values.numel()))
        grown, grown_masks = list(best), list(masks)
        for place, value in zip(top.indices.tolist(), top.values.tolist(), strict=True):
            how, row, concept = place // values[0].numel(), place // len(names) % len(masks), place % len(names)
            grown.append(_joined(best[row], names[concept], how, value))
            grown_masks.append(_mask(masks[row], c[concept], how))
        order = sorted(range(len(grown)), key=lambda i: -grown[i].iou)[:beam]  # of equals the shorter first
        best, masks = [grown[i] for i in order], torch.stack([grown_masks[i] for i in order])
    return best[0]


def _joined(formula: Label, name: str, how: int, value: float) -> Label:
    word = ("and", "or", "and not")[how]
    named = formula.concepts if how == 2 else (*formula.concepts, name)
    return Label(f"({formula.text} {word} {name})", value, named)


def _mask(formula: Tensor, concept: Tensor, how: int) -> Tensor:
    return (formula * concept, torch.maximum(formula, concept), formula * (1 - concept))[how]


def _check(units: Tensor, concepts: Tensor, names: Sequence[str]) -> None:
    if len(names) != len(concepts) or not len(names):
        raise ValueError(f"{len(names)} names for {len(concepts)} concepts; give one each, and at least one")
    if units.shape[1] != concepts.shape[1]:
        raise ValueError(f"units over {units.shape[1]} places, concepts over {concepts.shape[1]}; use one grid")
