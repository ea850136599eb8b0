r"""Levels that are not evenly spaced: by rule (powers of two and their sums), or fitted (Lloyd-Max, k-means).

Every function takes tiles `[r, g, n]` and gives `Levels`; all but the weighted ones are schemes of `Quantizer`:

>>> from neuropil.compress.quantize import Quantizer
>>> w = torch.tensor([[0.9, -0.26, 0.01, 0.5]])
>>> Quantizer(3, "pow2")(w)
tensor([[ 1.0000, -0.2500,  0.0000,  0.5000]])

Lloyd-Max and k-means are one thing in one dimension: thresholds half-way between levels, levels at the mean of what
lies between thresholds. Sorted prefix sums make a round cost K searches instead of n comparisons. It begins at
three places (levels evenly spaced, at quantiles, and by the cube root of the density, which is optimal
for many levels) and keeps the best of the three for each tile; where there are no more than K different
numbers, they are the levels.

Sources: Miyashita, Lee and Murmann 2016, arXiv:1603.01025 (powers of two); Li, Dong and Wang 2020, arXiv:1909.13144
(APoT); Lloyd 1982; Choi, El-Khamy and Lee 2017, arXiv:1612.01543 (Hessian-weighted k-means).
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from neuropil.compress.quantize.grids import Levels, nearest
from neuropil.compress.quantize.tiles import QuantizationError

ROUNDS = 200


def pow2(x: Float[Tensor, "r g n"], bits: int) -> Levels:
    """0 and +-2^e for the 2^(b-1) - 1 exponents e up to round(log2 max|x|), rounded in the exponent.

    The thresholds between powers are at 2^(e + 1/2). What is less than half of the least power is 0 (the survey
    leaves that open).
    """
    if bits < 2:
        raise QuantizationError('scheme="pow2" needs 2 bits or more: a sign and an exponent')
    size = x.abs().amax(-1)
    top = torch.where(size > 0, size, torch.ones_like(size)).log2().round().exp2()
    powers = torch.arange(2 - 2 ** (bits - 1), 1, device=x.device, dtype=x.dtype).exp2()
    least = powers[:1] / 2
    threshold = torch.cat([least, powers[:-1] * 2**0.5])
    level = torch.cat([-powers.flip(0), powers.new_zeros(1), powers])
    return Levels(top, level[None, None], torch.cat([-threshold.flip(0), threshold])[None, None])


def apot_levels(bits: int) -> list[float]:
    """The magnitudes of additive powers of two in `bits` bits, the largest 1: sums of one power (or 0) of each set.

    Two bits choose 0 or one of a set's three powers; with an odd number of bits a last set has one. The sets share
    out 1/2, 1/4, ... in turn, as in the authors' code.

    >>> [round(10 * x) for x in apot_levels(3)]  # tenths
    [0, 1, 2, 3, 4, 6, 8, 10]
    """
    full, single = divmod(bits, 2)
    sets: list[list[float]] = [[0.0] for _ in range(full + single)]
    exponent = itertools.count(1)
    for turn in range(3):
        if single and turn == 2:
            sets[full].append(2.0 ** -next(exponent))
        for one in sets[:full]:
            one.append(2.0 ** -next(exponent))
    sums = sorted({sum(choice) for choice in itertools.product(*sets)})
    return [value / sums[-1] for value in sums]


def apot(x: Float[Tensor, "r g n"], bits: int) -> Levels:
    """Additive powers of two of both signs, scaled for each tile to the least squared error."""
    if bits < 2:
        raise QuantizationError('scheme="apot" needs 2 bits or more: a sign and one magnitude')
    positive = x.new_tensor(apot_levels(bits - 1)[1:])
    level = torch.cat([-positive.flip(0), positive.new_zeros(1), positive])[None, None]
    return scaled(x, level)


def scaled(x: Float[Tensor, "r g n"], level: Float[Tensor, "1 1 K"]) -> Levels:
    """Levels of a fixed shape, times the scale of each tile with the least squared error (searched)."""
    size = x.abs().amax(-1)
    best = torch.where(size > 0, size, torch.ones_like(size))
    least = _error(x, nearest(level, best))
    for factors in (torch.logspace(0.15, -1.5, 24), torch.linspace(0.9, 1.1, 9)):
        start = best.clone()
        for factor in factors.to(x):
            error = _error(x, nearest(level, start * factor))
            better = error < least
            best, least = torch.where(better, start * factor, best), torch.where(better, error, least)
    return nearest(level, best)


def _error(x: Tensor, levels: Levels) -> Tensor:
    return (levels.values(levels.codes(x)) - x).square().mean(-1)


# ------------------------------------------------------------------------------------------------- fitted levels


def lloyd_max(x: Float[Tensor, "r g n"], bits: int) -> Levels:
    """The 2^b levels of least squared error for the numbers of each tile (a local optimum, of three starts)."""
    return kmeans(x, 2**bits)


def kmeans(x: Float[Tensor, "r g n"], count: int, importance: Float[Tensor, "r g n"] | None = None) -> Levels:
    """`count` levels for each tile that minimise sum of h (x - level)^2, with h the `importance` (1 without).

    Raises QuantizationError for an importance that is negative or not finite.

    >>> x, h = torch.tensor([[[0.0, 1.0, 4.0]]]), torch.tensor([[[1.0, 3.0, 1.0]]])
    >>> kmeans(x, 2, h).level.tolist()
    [[[0.75, 4.0]]]
    """
    if importance is not None and not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise QuantizationError("the importance of numbers must be finite and not negative")
    shape = x.shape[:2]
    flat, order = x.flatten(0, 1).double().sort(-1)
    h = torch.ones_like(flat) if importance is None else importance.flatten(0, 1).double().gather(-1, order)
    tiny = h.sum(-1, keepdim=True).clamp_min(1e-300) * 1e-12  # numbers of no importance still say where the range is
    h = h + tiny / flat.shape[-1]
    sums = _Prefix(flat, h)
    tried = [sums.settle(start) for start in _starts(flat, count)]
    losses = torch.stack([sums.loss(level) for level in tried])
    best = torch.stack(tried)[losses.argmin(0), torch.arange(len(flat), device=x.device)]
    few = _distinct(flat, count)
    level = torch.where(few.isfinite().all(-1, keepdim=True), few, best).to(x.dtype)
    return nearest(level.reshape(*shape, count))


class _Prefix:
    """Sums of h, h x and h x^2 up to each of the sorted numbers: those of a cluster are differences."""

    def __init__(self, x: Tensor, h: Tensor) -> None:
        def up_to(y: Tensor) -> Tensor:
            return torch.nn.functional.pad(y.cumsum(-1), (1, 0))

        self.x, self.h, self.hx, self.hxx = x, up_to(h), up_to(h * x), up_to(h * x * x)

    def _clusters(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        threshold = (level[:, 1:] + level[:, :-1]) / 2
        ends = torch.searchsorted(self.x, threshold.contiguous())
        n = self.x.shape[-1]
        ends = torch.nn.functional.pad(torch.nn.functional.pad(ends, (0, 1), value=n), (1, 0))
        h, hx, hxx = (sums.gather(-1, ends).diff(dim=-1) for sums in (self.h, self.hx, self.hxx))
        return h, hx, hxx

    def settle(self, level: Tensor) -> Tensor:
        """Lloyd's rounds until nothing moves. A level of an empty cluster stays where it is."""
        for _ in range(ROUNDS):
            h, hx, _ = self._clusters(level)
            moved = torch.where(h > 0, hx / h.clamp_min(1e-300), level).sort(-1).values
            if bool(((moved - level).abs() <= 1e-9 * moved.abs().amax(-1, keepdim=True)).all()):
                return moved
            level = moved
        return level

    def loss(self, level: Tensor) -> Tensor:
        h, hx, hxx = self._clusters(level)
        return (hxx - 2 * level * hx + level**2 * h).sum(-1)


def _starts(x: Tensor, count: int) -> list[Tensor]:
    """Levels to begin with for sorted numbers: evenly spaced, at quantiles, and by the cube root of the density."""
    n, middle = x.shape[-1], (torch.arange(count, device=x.device, dtype=x.dtype) + 0.5) / count
    low, high = x[:, :1], x[:, -1:]
    even = low + (high - low) * middle
    quantile = x[:, (middle * n).long().clamp(max=n - 1)]
    edges = low + (high - low) * torch.linspace(0, 1, 257, device=x.device, dtype=x.dtype)
    counts = torch.searchsorted(x, edges.contiguous(), right=True).diff(dim=-1).clamp_min(0).to(x.dtype)
    mass = torch.nn.functional.pad((counts.pow(1 / 3)).cumsum(-1), (1, 0))
    mass = mass / mass[:, -1:].clamp_min(1e-300)
    at = torch.searchsorted(mass, middle.expand(len(x), -1).contiguous()).clamp(1, 256)
    before, after = mass.gather(-1, at - 1), mass.gather(-1, at)
    share = ((middle - before) / (after - before).clamp_min(1e-300)).clamp(0, 1)
    return [even, quantile, edges.gather(-1, at - 1) + share * (edges.gather(-1, at) - edges.gather(-1, at - 1))]


def _distinct(x: Tensor, count: int) -> Tensor:
    """The different numbers of each sorted row, the last repeated; NaN for rows that have more than `count`."""
    new = torch.nn.functional.pad((x.diff(dim=-1) > 0).long(), (1, 0)).cumsum(-1)
    many = new[:, -1:] >= count
    out = x[:, -1:].expand(-1, count).clone().scatter(-1, new.clamp(max=count - 1), x)
    return torch.where(many, torch.nan, out)
