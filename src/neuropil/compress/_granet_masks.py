"""Masks of sparse training: who is kept, who goes, who comes back, and how many weights each tensor begins with.

Every count is exact, whatever ties there are among the scores: `torch.topk` picks positions, no threshold does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

NEVER = -1.0  # a score below every magnitude


def kept_count(density: float, total: int) -> int:
    """How many of `total` weights make this density: rounded down, but not for the last bit of a float.

    >>> kept_count(1 - 0.9, 1000), int((1 - 0.9) * 1000)
    (100, 99)
    """
    return int(density * total + 1e-6)


def erk(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    r"""Densities of tensors of these shapes by the Erdős-Rényi-kernel rule, which give `density` together.

    $d_l = \epsilon \sum_i n_i / \prod_i n_i$ with the tensor's dimensions $n_i$, so small tensors stay denser.
    Tensors over 1 become dense, and $\epsilon$ is solved again for the rest.

    >>> [round(d, 3) for d in erk([(300, 784), (100, 300), (10, 100)], 0.1)]
    [0.08, 0.23, 1.0]
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    budget, free = density * sum(sizes), set(range(len(sizes)))
    epsilon = 0.0
    while free:
        epsilon = budget / sum(raw[i] * sizes[i] for i in free)
        full = {i for i in free if epsilon * raw[i] > 1}
        if not full:
            break
        budget -= sum(sizes[i] for i in full)
        free -= full
    return [epsilon * raw[i] if i in free else 1.0 for i in range(len(sizes))]


def split_count(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers near `shares` that add up to `total`: all rounded down, the largest remainders up.

    >>> split_count(10, [2.5, 3.4, 4.1])
    [3, 3, 4]
    """
    counts = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def random_mask(shape: Sequence[int], count: int, generator: torch.Generator) -> Bool[Tensor, "*_"]:
    """`count` positions of a tensor of this shape, each set of them as likely as any other."""
    mask = torch.zeros(math.prod(shape), dtype=torch.bool)
    mask[torch.randperm(len(mask), generator=generator)[:count]] = True
    return mask.reshape(tuple(shape))


def largest(scores: Shaped[Tensor, "*shape"], count: int) -> Bool[Tensor, "*shape"]:
    """The mask of the `count` largest scores."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().topk(count, sorted=False).indices] = True
    return mask.reshape(scores.shape)


def prune(
    weights: Sequence[Shaped[Tensor, "*_"]], masks: Sequence[Bool[Tensor, "*_"]], count: int
) -> list[Bool[Tensor, "*_"]]:
    """Of the live weights of all tensors together keep the `count` largest (all, if there are fewer)."""
    live = sum(int(mask.sum()) for mask in masks)
    if count >= live:
        return [mask.clone() for mask in masks]
    home = weights[0].device
    scores = [w.detach().abs().masked_fill(~m, NEVER).flatten().to(home) for w, m in zip(weights, masks, strict=True)]
    kept = largest(torch.cat(scores), count).split([w.numel() for w in weights])
    return [k.reshape(w.shape).to(w.device) for k, w in zip(kept, weights, strict=True)]


def regenerate(
    weight: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], score: Shaped[Tensor, "*shape"], rate: float
) -> tuple[Bool[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
    """Remove the `rate` of the live weights that are smallest, grow as many where `score` is largest: (kept, grown).

    Positions freed a moment before may be grown again.
    """
    live = int(mask.sum())
    removed = math.ceil(rate * live)
    kept = largest(weight.detach().abs().masked_fill(~mask, NEVER), live - removed)
    return kept, largest(score.abs().masked_fill(kept, NEVER), removed)
