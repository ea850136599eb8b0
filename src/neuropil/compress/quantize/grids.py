r"""What numbers are rounded to: uniform grids, and levels of any spacing.

A uniform grid has levels $S (q - z)$ for integer codes $q$ from `low` to `high`. $z$ is the zero point in torch's
sign (the survey's $Z$ is $-z$). `Levels` has level $s X_i$ for numbers with $\Delta_i \le r / s < \Delta_{i+1}$.

>>> grid = uniform("affine", 2, torch.tensor([[-1.0]]), torch.tensor([[2.0]]))
>>> grid.codes(torch.tensor([[[-1.0, 0.0, 0.4, 5.0]]])).tolist(), grid.values(torch.arange(4).reshape(1, 1, 4)).tolist()
([[[0, 1, 1, 3]]], [[[-1.0, 0.0, 1.0, 2.0]]])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from neuropil.compress.quantize.tiles import QuantizationError

UNIFORM = ("affine", "offset", "symmetric", "restricted", "unsigned", "midrise")


@dataclass(frozen=True)
class Uniform:
    """Codes from `low` to `high` on a grid of step `scale`, with one scale and zero point a tile."""

    scale: Float[Tensor, "r g"]
    zero: Float[Tensor, "r g"]
    low: int
    high: int

    @property
    def levels(self) -> int:
        return self.high - self.low + 1

    def positions(self, x: Float[Tensor, "r g n"]) -> Float[Tensor, "r g n"]:
        """Where numbers lie among the codes, before they are rounded and clipped. Differentiable."""
        return x / self.scale[..., None] + self.zero[..., None]

    def codes(self, x: Float[Tensor, "r g n"], rounding: str = "nearest") -> Integer[Tensor, "r g n"]:
        """The codes: the nearest ("nearest"), or one of the two neighbours by chance ("stochastic")."""
        at = self.positions(x)
        at = stochastic_round(at) if rounding == "stochastic" else at.round()
        return at.clamp(self.low, self.high).int()

    def values(self, codes: Integer[Tensor, "r g n"]) -> Float[Tensor, "r g n"]:
        """The levels of codes."""
        return (codes - self.zero[..., None]) * self.scale[..., None]

    def inside(self, x: Float[Tensor, "r g n"]) -> Tensor:
        """Which numbers lie within half a step of a level, all of the grid's range: there a gradient passes."""
        at = self.positions(x)
        return (at >= self.low - 0.5) & (at <= self.high + 0.5)


@dataclass(frozen=True)
class Levels:
    """Any levels, in order, and the thresholds between them, both in units of `scale`.

    Those of shape `[1, 1, K]` are shared by all tiles. A level may be there more than once (where fewer are
    needed); its repeats are then never used.
    """

    scale: Float[Tensor, "r g"]
    level: Float[Tensor, "lr lg K"]
    threshold: Float[Tensor, "tr tg T"]

    @property
    def levels(self) -> int:
        return self.level.shape[-1]

    def codes(self, x: Float[Tensor, "r g n"], rounding: str = "nearest") -> Integer[Tensor, "r g n"]:
        """The index of the level; `rounding="stochastic"` takes one of the two neighbouring levels by chance."""
        x = x / self.scale[..., None]
        if rounding == "stochastic":
            level = self.level.to(x.dtype).expand(*x.shape[:2], -1).contiguous()
            above = torch.searchsorted(level, x.contiguous(), right=True).clamp(1, self.levels - 1)
            below, top = level.gather(2, above - 1), level.gather(2, above)
            share = ((x - below) / (top - below).clamp_min(torch.finfo(x.dtype).tiny)).clamp(0, 1)
            return (above - 1 + (torch.rand_like(x) < share).long()).int()
        if self.threshold.shape[:2] == (1, 1):
            return torch.bucketize(x, self.threshold.flatten(), right=True).int()
        threshold = self.threshold.expand(*x.shape[:2], -1).contiguous()
        return torch.searchsorted(threshold, x.contiguous(), right=True).int()

    def values(self, codes: Integer[Tensor, "r g n"]) -> Float[Tensor, "r g n"]:
        """The levels of codes."""
        if self.level.shape[:2] == (1, 1):
            return self.level.flatten()[codes.long()] * self.scale[..., None]
        level = self.level.expand(*codes.shape[:2], -1)
        return level.gather(2, codes.long()) * self.scale[..., None]


Grid = Uniform | Levels


def stored(grid: Grid, dtype: torch.dtype) -> Grid:
    """The grid with its scales and levels rounded to `dtype`, in which it then computes its values.

    Thresholds, which are not stored, stay. A scale too small for the dtype is its least normal number.
    """
    least, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    scale = torch.where(grid.scale > 0, grid.scale.clamp(least, most), grid.scale).to(dtype)
    if isinstance(grid, Uniform):
        return Uniform(scale, grid.zero.to(dtype), grid.low, grid.high)
    return Levels(scale, grid.level.to(dtype), grid.threshold)


def stochastic_round(x: Float[Tensor, "*shape"], generator: torch.Generator | None = None) -> Float[Tensor, "*shape"]:
    """`floor(x)` with probability `ceil(x) - x`, else `ceil(x)`: unbiased.

    >>> _ = torch.manual_seed(0)
    >>> round(stochastic_round(torch.full((100000,), 0.3)).mean().item(), 2)
    0.3
    """
    floor = x.floor()
    draw = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return floor + (draw < x - floor).to(x.dtype)


def code_range(scheme: str, bits: int) -> tuple[int, int]:
    """The lowest and the highest code of a uniform scheme."""
    if scheme in ("affine", "offset", "unsigned"):
        return 0, 2**bits - 1
    half = 2 ** (bits - 1)
    return (1 - half, half - 1) if scheme == "restricted" else (-half, half - 1)


def uniform(scheme: str, bits: int, low: Float[Tensor, "r g"], high: Float[Tensor, "r g"]) -> Uniform:
    """The grid of a scheme for numbers from `low` to `high`. A range of nothing but 0 has step 1.

    "affine": 2^b levels over [min(low, 0), max(high, 0)], one of them exactly 0.
    "offset": 2^b levels over [low, high], ends included, the zero point real (GGUF's Q4_1): 0 need be no level.
    "symmetric": step 2 m / (2^b - 1) with m = max(|low|, |high|), codes -2^(b-1) to 2^(b-1) - 1 (the full range).
    "restricted": step m / (2^(b-1) - 1), codes of both signs alike.
    "unsigned": step high / (2^b - 1), codes from 0, for numbers that are not negative.
    "midrise": 2^b levels symmetric about 0, none of them 0: half-integers times 2 m / (2^b - 1).
    """
    first, last = code_range(scheme, bits)
    if scheme == "offset":
        scale = _steps((high - low) / (last - first))
        return Uniform(scale, first - low / scale, first, last)
    low, high = low.clamp(max=0), high.clamp(min=0)
    size = torch.maximum(-low, high)
    if scheme == "affine":
        scale = _steps((high - low) / (last - first))
        zero = (first - (low / scale).round()).clamp(first, last)
        return Uniform(scale, zero, first, last)
    if scheme == "unsigned":
        scale = _steps(high / last)
    elif scheme == "restricted":
        if bits < 2:
            raise QuantizationError('scheme="restricted" needs 2 bits or more: with one, only the code 0 is left')
        scale = _steps(size / last)
    elif scheme in ("symmetric", "midrise"):
        scale = _steps(2 * size / (last - first))
    else:
        raise QuantizationError(f"scheme {scheme!r} is not uniform; those are {', '.join(UNIFORM)}")
    return Uniform(scale, torch.full_like(scale, -0.5 if scheme == "midrise" else 0.0), first, last)


def _steps(scale: Tensor) -> Tensor:
    return torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)


def nearest(level: Float[Tensor, "r g K"], scale: Float[Tensor, "r2 g2"] | None = None) -> Levels:
    """Levels in order, with thresholds half-way between neighbours."""
    level = level.sort(-1).values
    ones = level.new_ones(level.shape[:2]) if scale is None else scale
    return Levels(ones, level, (level[..., 1:] + level[..., :-1]) / 2)
