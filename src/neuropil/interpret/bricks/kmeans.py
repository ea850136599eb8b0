"""k-means with clusters of equal size: every cluster gets as many points as every other, give or take one.

    min  Σ_i ‖x_i - c_{l(i)}‖²      such that  |{i: l(i) = e}| = n_e

Points are dealt to centres as applicants to schools: each asks its nearest centre first; a centre that is asked by
more than it can take keeps those that would lose most by going on to their next choice; who is refused asks the next.
All points ask at once, so that a round is a few sorts. The result does not depend on the order of the points.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.cluster import kmeans_plusplus
from torch import Tensor


def capacities(points: int, clusters: int) -> Int[Tensor, " clusters"]:
    """Sizes that differ by at most one, the larger first. Raises ValueError for more clusters than points, or none.

    >>> capacities(10, 3)
    tensor([4, 3, 3])
    """
    if not 1 <= clusters <= points:
        raise ValueError(f"{clusters} bricks of {points} neurons: expected 1 to {points}")
    each, more = divmod(points, clusters)
    return torch.tensor([each + (e < more) for e in range(clusters)])


def deal(cost: Float[Tensor, "points clusters"], sizes: Int[Tensor, " clusters"]) -> Int[Tensor, " points"]:
    """Give every point a cluster of small cost, cluster e getting exactly `sizes[e]` of them."""
    points, clusters = cost.shape
    order = cost.argsort(dim=1, stable=True)
    ranked = cost.gather(1, order)
    # What a point would lose by going on from its k-th choice to the next; the last choice is the dearest to lose.
    loss = torch.cat([ranked.diff(dim=1), torch.full((points, 1), torch.inf, dtype=cost.dtype)], 1)
    choice = torch.zeros(points, dtype=torch.long)
    while True:
        asked = order.gather(1, choice[:, None])[:, 0]
        refused = _beyond(asked, loss.gather(1, choice[:, None])[:, 0], sizes)
        if not bool(refused.any()):
            return asked
        choice += refused
        # Beyond the last choice nobody is sent: with as many places as points, a point is never refused everywhere.
        assert int(choice.max()) < clusters


def _beyond(asked: Tensor, worth: Tensor, sizes: Tensor) -> Tensor:
    """Which points are not among the `sizes[e]` of greatest worth that asked for e."""
    by_worth = worth.argsort(descending=True, stable=True)
    order = by_worth[asked[by_worth].argsort(stable=True)]
    group = asked[order]
    counts = torch.bincount(asked, minlength=len(sizes))
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(asked)) - first[group]
    refused = torch.zeros(len(asked), dtype=torch.bool)
    refused[order] = rank >= sizes[group]
    return refused


def balanced_kmeans(
    x: Float[Tensor, "points d"], clusters: int, *, seed: int = 0, starts: int = 4, rounds: int = 30
) -> Int[Tensor, " points"]:
    """The labels of the best of some starts by k-means++, each improved until nothing gets better.

    >>> x = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [9.0]])
    >>> labels = balanced_kmeans(x, 2)
    >>> labels[0] == labels[1] == labels[2] != labels[3] == labels[4] == labels[5]
    tensor(True)
    """
    sizes = capacities(len(x), clusters)
    x = x.double()
    squares = x.square().sum(1)
    random = np.random.RandomState(seed)
    best, labels = torch.inf, torch.zeros(len(x), dtype=torch.long)
    for _ in range(starts):
        centres = _first_centres(x, clusters, random)
        found, cost = labels, torch.inf
        for _ in range(rounds):
            distance = squares[:, None] - 2 * x @ centres.T + centres.square().sum(1)
            dealt = deal(distance, sizes)
            now = float(distance.gather(1, dealt[:, None]).sum())
            if not now < cost - 1e-12 * abs(cost if cost < torch.inf else 1.0):
                break
            found, cost = dealt, now
            centres = group_means(x, found, clusters)
        cost = inertia(x, found, clusters)
        if cost < best:
            best, labels = cost, found
    return labels


def _first_centres(x: Tensor, clusters: int, random: np.random.RandomState) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of points that coincide, which may be any number here
        return torch.from_numpy(kmeans_plusplus(x.numpy(), clusters, random_state=random)[0])


def group_means(x: Float[Tensor, "points d"], labels: Int[Tensor, " points"], groups: int) -> Float[Tensor, "groups d"]:
    """The mean of each group's rows; zero for an empty one."""
    sums = torch.zeros(groups, x.shape[1], dtype=x.dtype).index_add_(0, labels, x)
    return sums / torch.bincount(labels, minlength=groups).clamp_min(1)[:, None]


def inertia(x: Float[Tensor, "points d"], labels: Int[Tensor, " points"], clusters: int) -> float:
    """Sum of squared distances to the means of the clusters."""
    return float((x - group_means(x, labels, clusters)[labels]).square().sum())


def evened(labels: Int[Tensor, " points"], sizes: Int[Tensor, " clusters"], seed: int = 0) -> Int[Tensor, " points"]:
    """Labels of exactly these sizes: points drawn at random move from groups too large to groups too small."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    spare = torch.zeros(len(labels), dtype=torch.bool)
    spare[order] = _beyond(labels[order], torch.zeros(len(labels)), sizes)
    wanting = sizes - torch.bincount(labels[~spare], minlength=len(sizes))
    moved = labels.clone()
    moved[order[spare[order]]] = torch.repeat_interleave(torch.arange(len(sizes)), wanting)
    return moved
