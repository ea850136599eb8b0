r"""One-dimensional k-means that is optimal, and rows of a matrix grouped by how their weights are distributed.

The best K levels for sorted numbers are found by dynamic programming over where a cluster begins,

    D_k(j) = min_i  D_{k-1}(i) + sum of squares of x_i .. x_{j-1} about their mean

in which the best i never falls as j grows (Wu 1991), so that each of the K rounds costs n log n.

>>> levels(np.array([0.0, 0.1, 0.9, 1.0, 5.0]), 3)
array([0.05, 0.95, 5. ])

Source: Wang and Song, "Ckmeans.1d.dp", The R Journal 3(2), 2011.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Integer
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor

BUDGET = 1 << 19  # different numbers times levels up to which the result is optimal
FEATURES = ("quantiles", "std", "max")
QUANTILES = 32


def levels(x: NDArray[np.floating], count: int) -> NDArray[np.float64]:
    """The `count` levels, in order, with the least sum of squared distances from numbers to their nearest.

    Fewer where there are fewer different numbers: these are then the levels. Optimal for up to 2^19 / count different
    numbers (but never fewer than 4096); more are first put into so many bins of equally many numbers, and the
    levels that are optimal for the bins' means settle on the numbers themselves (Lloyd).
    """
    found, often = np.unique(np.asarray(x, dtype=np.float64), return_counts=True)
    if len(found) <= count:
        return found
    most = max(4096, BUDGET // count)
    if len(found) <= most:
        return _optimal(found, often.astype(np.float64), count)
    edges = np.linspace(0, len(found), most + 1).astype(np.int64)[:-1]
    weight = np.add.reduceat(often.astype(np.float64), edges)
    mean = np.add.reduceat(found * often, edges) / weight
    return settled(found, often.astype(np.float64), _optimal(mean, weight, count))


def _optimal(x: NDArray[np.float64], weight: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Means of the optimal clusters of sorted numbers, `count` of them."""
    n, centre = len(x), float(np.average(x, weights=weight))
    cost = _Cost(x - centre, weight)
    everything = np.arange(n + 1)
    best = cost(np.zeros_like(everything), everything)  # one cluster
    begins = []
    for _ in range(count - 2):
        best, begin = _round(best, cost, n)
        begins.append(begin)
    cuts = [n]
    if count > 1:
        cuts.append(int((best + cost(everything, np.full_like(everything, n))).argmin()))
    for begin in reversed(begins):
        cuts.append(int(begin[cuts[-1]]))
    cuts = sorted({0, *cuts})
    return np.array([np.average(x[a:b], weights=weight[a:b]) for a, b in pairwise(cuts)])


class _Cost:
    """Sum of squares about their mean of the numbers from place i up to j, which is not among them."""

    def __init__(self, x: NDArray[np.float64], weight: NDArray[np.float64]) -> None:
        self.h, self.hx, self.hxx = (np.concatenate([[0.0], np.cumsum(weight * x**power)]) for power in range(3))

    def __call__(self, i: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.float64]:
        h, hx = self.h[j] - self.h[i], self.hx[j] - self.hx[i]
        return np.maximum(self.hxx[j] - self.hxx[i] - hx**2 / np.where(h > 0, h, 1), 0)


def _round(best: NDArray[np.float64], cost: _Cost, n: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """One more cluster: for every end j the least cost and where the last cluster begins.

    The middle place is solved first, then the quarters, whose beginnings lie between those of their neighbours.
    """
    least, begin = np.empty(n + 1), np.zeros(n + 1, dtype=np.int64)
    stride = 1 << (n + 1).bit_length()
    while stride > 1:
        stride //= 2
        j = np.arange(stride - 1, n + 1, 2 * stride)
        low = np.where(j >= stride, begin[np.maximum(j - stride, 0)], 0)
        high = np.where(j + stride <= n, begin[np.minimum(j + stride, n)], n)
        high = np.maximum(np.minimum(high, j), low)
        length = high - low + 1
        first = np.concatenate([[0], np.cumsum(length)[:-1]])
        i = np.arange(int(length.sum())) - np.repeat(first - low, length)
        value = best[i] + cost(i, np.repeat(j, length))
        least[j] = np.minimum.reduceat(value, first)
        at = np.flatnonzero(value == np.repeat(least[j], length))
        begin[j] = i[at[np.searchsorted(at, first)]]
    return least, begin


def settled(x: NDArray[np.float64], weight: NDArray[np.float64], level: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lloyd's rounds on sorted numbers until no level moves; one that no number is nearest to stays."""
    h, hx = (np.concatenate([[0.0], np.cumsum(y)]) for y in (weight, weight * x))
    for _ in range(1000):
        ends = np.concatenate([[0], np.searchsorted(x, (level[1:] + level[:-1]) / 2), [len(x)]])
        mass = np.diff(h[ends])
        moved = np.where(mass > 0, np.diff(hx[ends]) / np.where(mass > 0, mass, 1), level)
        if np.allclose(moved, level, rtol=0, atol=1e-12 * np.abs(level).max()):
            return moved
        level = moved
    return level


# ------------------------------------------------------------------------------------------------ groups of rows


def describe(rows: Float[Tensor, "rows fan"], feature: str) -> Float[Tensor, "rows features"]:
    """What rows are compared by: quantiles of their weights (in order), their deviation, or their largest magnitude."""
    if feature == "std":
        return rows.std(1, correction=0)[:, None]
    if feature == "max":
        return rows.abs().amax(1)[:, None]
    ordered, fan = rows.sort(1).values, rows.shape[1]
    middle = (torch.arange(QUANTILES, device=rows.device) + 0.5) / QUANTILES * fan
    return ordered[:, middle.long().clamp(max=fan - 1)]


def group(
    features: Float[Tensor, "rows features"], count: int, *, balanced: bool = False, head: int = 0, seed: int = 0
) -> Integer[Tensor, " rows"]:
    """The group of each row, 0 to at most `count` - 1, by k-means; groups are in the order of their spread.

    `balanced` makes all groups of one size (to within one row). With a `head` size, every run of so many rows has as
    many rows of each group as every other, so that rows can be put in order within it.
    """
    points = features.detach().double().cpu().numpy()
    count = min(count, len(np.unique(points, axis=0)))
    if count == 1:
        return torch.zeros(len(points), dtype=torch.int64)
    if points.shape[1] == 1:
        centre = levels(points[:, 0], count)[:, None]
    else:
        centre = KMeans(count, n_init=4, random_state=seed).fit(points).cluster_centers_
    spread = centre[:, 0] if points.shape[1] == 1 else centre.var(1)
    centre = centre[spread.argsort(kind="stable")]
    distance = np.square(points[:, None, :] - centre).sum(2)
    owner = distance.argmin(1)
    if balanced or head:
        size = head or len(points)
        share = np.bincount(owner, minlength=count) if not balanced else np.full(count, len(points))
        places = np.repeat(np.arange(count), _rounded(share, size))
        for start in range(0, len(points), size):
            row, column = linear_sum_assignment(distance[start : start + size][:, places])
            owner[start + row] = places[column]
    return torch.from_numpy(np.unique(owner, return_inverse=True)[1].astype(np.int64))


def _rounded(share: Sequence[int] | NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Whole numbers in proportion to `share` that add up to `total`: the largest remainders are rounded up."""
    exact = np.asarray(share) * total / np.sum(share)
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: total - whole.sum()]] += 1
    return whole
