r"""Which range a grid covers: what was seen (min/max), or less, so that what is left is finer.

| observer | range |
| --- | --- |
| "minmax" | all that was seen |
| "moving" | moving average over batches of their minimum and maximum |
| "percentile" | the central `percentile` per cent of the numbers; 100 is min/max |
| "aciq" | the clip that is best for a Gaussian or a Laplace density of the same scale (see `ranges`) |
| "mse" | min/max shrunk by the factor with least mean squared error; never more than that of min/max |
| "entropy" | \|x\| clipped where the histogram's Kullback-Leibler divergence from its quantized self is least |

>>> observer = Observer("percentile", percentile=80.0)
>>> observer.observe(torch.arange(101.0).reshape(1, 1, 101))
>>> low, high = observer.range("affine", 8)
>>> low.item(), high.item()
(10.0, 90.0)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from neuropil.compress.quantize.grids import uniform
from neuropil.compress.quantize.ranges import aciq_range
from neuropil.compress.quantize.tiles import QuantizationError

OBSERVERS = ("minmax", "moving", "percentile", "mse", "aciq", "entropy")
BINS = 2048
CHUNK = 1 << 22  # numbers looked at at a time


class Observer:
    """Gathers what is seen of tiles `[r, g, n]`; at most `keep` numbers of each are remembered, drawn evenly.

    `momentum` is that of "moving". Raises QuantizationError for an unknown kind and a percentile outside (0, 100].
    """

    def __init__(
        self, kind: str = "minmax", percentile: float = 99.9, momentum: float = 0.9, keep: int = 1 << 18
    ) -> None:
        if kind not in OBSERVERS:
            raise QuantizationError(f"observer {kind!r}: expected one of {', '.join(OBSERVERS)}")
        if not 0 < percentile <= 100:
            raise QuantizationError(f"percentile={percentile}: expected more than 0 and at most 100")
        self.kind, self.percentile, self.momentum, self.keep = kind, percentile, momentum, keep
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.values: Tensor | None = None
        self._keys, self._batches = torch.empty(0), 0

    def observe(self, x: Float[Tensor, "r g n"], remember: bool = True) -> None:
        """Take in one tensor, or one batch of many."""
        if x.shape[-1] == 0:
            return
        low, high = x.amin(-1), x.amax(-1)
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        elif self.kind == "moving":
            self.low = self.momentum * self.low + (1 - self.momentum) * low
            self.high = self.momentum * self.high + (1 - self.momentum) * high
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        if remember:
            self._remember(x)

    def _remember(self, x: Tensor) -> None:
        """A sample of all that was seen, even over batches: those with the highest of random keys stay."""
        if self.values is None:
            self.values = x
            return
        self._batches += 1
        generator = torch.Generator().manual_seed(self._batches)
        if not len(self._keys):
            self._keys = torch.rand(self.values.shape[-1], generator=generator)
        self._keys = torch.cat([self._keys, torch.rand(x.shape[-1], generator=generator)])
        self.values = torch.cat([self.values, x], -1)
        if len(self._keys) > self.keep:
            self._keys, best = self._keys.topk(self.keep)
            self.values = self.values[..., best.to(x.device)]

    def range(self, scheme: str, bits: int) -> tuple[Float[Tensor, "r g"], Float[Tensor, "r g"]]:
        """The lowest and highest number that a uniform grid of this scheme is to cover, for each tile.

        Raises QuantizationError where nothing was observed.
        """
        if self.low is None or self.high is None:
            raise QuantizationError("nothing was observed: calibrate with at least one batch")
        if self.kind in ("minmax", "moving") or self.values is None:
            return self.low, self.high
        if self.kind == "percentile":
            return _percentile(self.values, self.low, self.high, self.percentile)
        if self.kind == "mse":
            return _least_error(self.values, self.low, self.high, scheme, bits)
        if self.kind == "aciq":
            return aciq_range(self.values, self.low, self.high, scheme, bits)
        clip = _entropy_clip(self.values, 2**bits if scheme == "unsigned" else 2 ** (bits - 1))
        return torch.maximum(self.low, -clip), torch.minimum(self.high, clip)


def _percentile(x: Tensor, low: Tensor, high: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    if percentile == 100:
        return low, high
    n, tail = x.shape[-1], (100 - percentile) / 200
    return _quantile(x, tail * (n - 1)), _quantile(x, (1 - tail) * (n - 1))


def _quantile(x: Tensor, place: float) -> Tensor:
    """The number at a place in the order, between two of them in proportion (torch.quantile stops at 16M numbers)."""
    below = int(place)
    first = x.kthvalue(below + 1, dim=-1).values
    if below + 1 == x.shape[-1]:
        return first
    return first + (place - below) * (x.kthvalue(below + 2, dim=-1).values - first)


def grid_error(x: Float[Tensor, "r g n"], scheme: str, bits: int, low: Tensor, high: Tensor) -> Float[Tensor, "r g"]:
    """The mean squared error of each tile on the grid over [low, high]."""
    step = max(1, CHUNK // max(1, x.shape[1] * x.shape[2]))
    errors = []
    for part, lo, hi in zip(x.split(step), low.split(step), high.split(step), strict=True):
        grid = uniform(scheme, bits, lo, hi)
        errors.append((grid.values(grid.codes(part)) - part).square().mean(-1))
    return torch.cat(errors)


def _least_error(x: Tensor, low: Tensor, high: Tensor, scheme: str, bits: int) -> tuple[Tensor, Tensor]:
    """Shrink factors in two rounds: a coarse geometric row from 1 down to 1/100, then a fine one about the best.

    Ranges shrink towards 0, which is a level of theirs, or towards their middle where 0 need be none.
    """
    middle = (low + high) / 2 if scheme == "offset" else torch.zeros_like(low)
    best = torch.ones_like(low)
    least = grid_error(x, scheme, bits, low, high)
    for factors in (torch.logspace(0, -2, 24)[1:], torch.linspace(0.84, 1.19, 15)):
        start = best.clone()
        for factor in factors.to(x):
            # the first round looks at absolute factors (start is 1), the second about each tile's own best
            at = (start * factor).clamp(max=1)
            error = grid_error(x, scheme, bits, middle.lerp(low, at), middle.lerp(high, at))
            better = error < least
            best, least = torch.where(better, at, best), torch.where(better, error, least)
    return middle.lerp(low, best), middle.lerp(high, best)


def _entropy_clip(x: Tensor, levels: int) -> Tensor:
    """TensorRT's choice: of clips at the upper edges of bins, in steps of 8, that with the least divergence."""
    shape, size = x.shape[:2], x.abs().flatten(0, 1)
    top = size.amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    counts = torch.zeros(len(size), BINS, dtype=torch.float64, device=x.device)
    place = (size / top * BINS).long().clamp(max=BINS - 1)
    counts.scatter_add_(1, place, torch.ones_like(size, dtype=torch.float64))
    counts[:, 0] = torch.minimum(counts[:, 0], counts[:, 1])  # exact zeros say nothing of the range
    if levels >= BINS:
        return top.reshape(shape)
    best = torch.full_like(counts[:, 0], torch.inf)
    clip = torch.full_like(counts[:, 0], float(BINS))
    for last in sorted({*range(levels, BINS, 8), BINS}):
        found = _divergence(counts, last, levels)
        better = found < best
        best, clip = torch.where(better, found, best), torch.where(better, float(last), clip)
    return (clip[:, None].to(x.dtype) * top / BINS).reshape(shape)


def _divergence(counts: Tensor, last: int, levels: int) -> Tensor:
    """KL(P || Q): P the first bins with all beyond added to the last of them, Q their mean over each level's bins."""
    inner = counts[:, :last]
    p = inner.clone()
    p[:, -1] += counts[:, last:].sum(-1)
    level = torch.arange(last, device=counts.device) * levels // last
    sums = counts.new_zeros(len(counts), levels).index_add_(1, level, inner)
    filled = counts.new_zeros(len(counts), levels).index_add_(1, level, (inner > 0).to(counts.dtype))
    q = torch.where(inner > 0, (sums / filled.clamp_min(1))[:, level], 0.0)
    p, q = (_smooth(d) for d in (p, q))
    return (p * (p / q).log()).sum(-1)


def _smooth(d: Tensor, eps: float = 1e-4) -> Tensor:
    return (1 - eps) * d / d.sum(-1, keepdim=True).clamp_min(1e-12) + eps / d.shape[-1]
