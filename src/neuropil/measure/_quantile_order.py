r"""Quantiles that do not cross: three projections onto ordered rows, and a penalty that keeps rows apart.

All of them work on tensors `[n, m]`, row by row, and pass gradients. For every $y$, sorting and the isotonic
projection never raise the pinball loss summed over levels; the sweep can.

>>> q = torch.tensor([[1.0, 3.0, 2.0, 2.0, 4.0]])
>>> [isotonize(q, how).tolist()[0] for how in ("sort", "sweep")]
[[1.0, 2.0, 2.0, 3.0, 4.0], [1.0, 2.0, 2.0, 2.0, 4.0]]
>>> [round(v, 4) for v in isotonize(q, "pava").tolist()[0]]
[1.0, 2.3333, 2.3333, 2.3333, 4.0]
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Order = Literal["sort", "pava", "sweep", "soft-sort"]
ORDERS = ("sort", "pava", "sweep", "soft-sort")
Rows = Float[Tensor, "n m"]


def isotonize(q: Rows, how: str = "sort", strength: float = 0.1) -> Rows:
    """Rows of `q` in increasing order.

    "sort"       sorted values; the gradient follows the permutation
    "pava"       nearest increasing row in least squares; the gradient is averaged over each pooled block
    "sweep"      from the median outwards, running maximum upwards and running minimum downwards
    "soft-sort"  sorting with a quadratic regulariser of the given `strength`; equals "sort" where neighbouring
                 sorted values lie less than 1 / strength apart, and pulls wider gaps in

    Raises ValueError for another name.
    """
    if how == "sort":
        return q.sort(dim=1).values
    if how == "pava":
        return pava(q)
    if how == "sweep":
        return sweep(q)
    if how == "soft-sort":
        return soft_sort(q, strength)
    raise ValueError(f"isotonic {how!r}; expected one of {', '.join(map(repr, ORDERS))}")


def pava(q: Rows) -> Rows:
    """Isotonic regression of each row, all rows at once: neighbouring blocks in the wrong order are pooled until
    none is left, and every value becomes the mean of its block."""
    block = torch.arange(q.shape[1], device=q.device).expand(q.shape)
    exact = q.detach().double()
    while True:
        level = _block_means(exact, block)
        # Within a block all means are one and the same float, so only boundaries of blocks can be out of order.
        wrong = level[:, :-1] > level[:, 1:]
        if not wrong.any():
            return _block_means(q, block)
        start = (block[:, 1:] != block[:, :-1]) & ~wrong
        block = torch.cat([torch.zeros_like(block[:, :1]), start.long().cumsum(1)], 1)


def _block_means(q: Tensor, block: Tensor) -> Tensor:
    total = torch.zeros_like(q).scatter_add(1, block, q)
    count = torch.zeros_like(q).scatter_add(1, block, torch.ones_like(q))
    return (total / count.clamp_min(1)).gather(1, block)


def sweep(q: Rows) -> Rows:
    """Running minimum below the middle column, running maximum above it; the middle column stays."""
    middle = q.shape[1] // 2
    below = q[:, : middle + 1].flip(1).cummin(1).values.flip(1)
    above = q[:, middle:].cummax(1).values
    return torch.cat([below[:, :-1], above], 1)


def soft_sort(q: Rows, strength: float) -> Rows:
    r"""Projection of $(1, ..., m) / strength$ onto the permutations of each row (Blondel et al. 2020), increasing."""
    if strength <= 0:
        raise ValueError(f"soft_strength is {strength}; expected a number above 0")
    ranks = torch.arange(1, q.shape[1] + 1, dtype=q.dtype, device=q.device) / strength
    return ranks - pava(ranks - q.sort(dim=1).values)


def crossing_penalty(q: Rows, margin: Float[Tensor, "m m"] | float = 0.0) -> Float[Tensor, ""]:
    r"""$\frac{1}{n\,m(m-1)/2} \sum_{b}\sum_{i>j} (q_{bj} - q_{bi} + \delta_{ij})_+$ over all pairs of levels.

    `margin` is $\delta$: one number, or a matrix whose entry `[i, j]` is the least gap between levels i > j.
    """
    m = q.shape[1]
    if m == 1:
        return q.sum() * 0
    above, below = torch.tril_indices(m, m, -1, device=q.device)
    delta = margin[above, below] if isinstance(margin, Tensor) else margin
    return torch.relu(q[:, below] - q[:, above] + delta).mean()


def margins(spread: Float[Tensor, " m"], scale: float) -> Float[Tensor, "m m"]:
    r"""$\delta_{ij} = s\,(M_i - M_j)_+$ from one value M for each level."""
    return scale * torch.relu(spread[:, None] - spread[None, :])
