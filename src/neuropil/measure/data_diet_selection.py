"""Choosing by score: what to keep, what to distrust; and the label noise with which that is tried out.

>>> import torch
>>> scores = torch.tensor([0.1, 0.9, 0.5, 0.3])
>>> keep(scores, 2).tolist(), keep(scores, 0.5, offset=0).tolist(), suspects(scores, 1).tolist()
([1, 2], [0, 3], [1])
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["keep", "permute_labels", "suspects"]


def keep(
    scores: Float[Tensor, " n"],
    count: int | float,
    *,
    offset: int | float | None = None,
    labels: Int[Tensor, " n"] | None = None,
    floor: float = 1.0,
) -> Int[Tensor, " k"]:
    """The places of the examples to keep, ascending; by default the `count` with the largest score.

    count    how many, or as a float their share of all
    offset   the paper's window: sort ascending, leave out the first `offset` (a number, or as a float a share) and
             keep the next `count`; so 0 keeps the easiest, and n - count, the default, the hardest
    labels   with these, every class keeps `floor` times the share it would have by chance (rounded down), as far as
             examples below the window's upper end suffice; `floor=1` prunes each class alike, 0 ignores classes

    Equal scores are in the order of the data set. Raises ValueError for NaN scores, for a window that does not fit
    and for a floor outside 0..1.
    """
    n = len(scores)
    k = _number(count, n, "count")
    begin = n - k if offset is None else _number(offset, n, "offset")
    if k < 1 or begin + k > n:
        raise ValueError(f"cannot keep {k} of {n} examples from place {begin} on; lower count or offset")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor is {floor}; expected 0 (classes ignored) to 1 (each class pruned alike)")
    ranked = _ascending(scores)[: begin + k].flip(0)  # what is above the window is out of question
    if labels is not None:
        quota = (floor * k * labels.unique(return_counts=True)[1].double() / n + 1e-9).long()
        group = labels.unique(return_inverse=True)[1][ranked]
        ranked = ranked[torch.argsort((_rank_within(group) >= quota[group]).long(), stable=True)]
    return ranked[:k].sort().values


def suspects(scores: Float[Tensor, " n"], count: int | float) -> Int[Tensor, " k"]:
    """The places of the `count` (or, as a float, share of) highest scores, highest first: where wrong labels gather."""
    return _ascending(scores).flip(0)[: _number(count, len(scores), "count")]


def permute_labels(
    labels: Int[Tensor, " n"], fraction: float, seed: int = 0
) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
    """The paper's label noise: permute the labels of a random `fraction` among themselves; and which examples differ.

    Some of the chosen keep their label by chance.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}; expected 0 to 1")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: int(fraction * len(labels))]
    noisy = labels.clone()
    noisy[chosen.sort().values] = labels[chosen]
    return noisy, noisy != labels


def _ascending(scores: Tensor) -> Tensor:
    if bool(scores.isnan().any()):
        raise ValueError(f"{int(scores.isnan().sum())} of {len(scores)} scores are NaN; expected numbers or infinity")
    return torch.argsort(scores, stable=True)


def _number(value: int | float, n: int, name: str) -> int:
    """A count, given itself or as a share of n."""
    if isinstance(value, float):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; as a float it is a share, expected 0 to 1")
        return round(value * n)
    if not 0 <= value <= n:
        raise ValueError(f"{name} is {value}; expected 0 to {n}, the number of examples")
    return value


def _rank_within(group: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
    """Of each entry, how many of its group stand before it."""
    order = torch.argsort(group, stable=True)
    sizes = torch.bincount(group)
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group)) - (sizes.cumsum(0) - sizes)[group[order]]
    return rank
