"""The exponent of least error, without data (PowerQuant), and scales smaller than the largest number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

from neuropil.compress._nupes_power import decode, encode

BINS = 1 << 14
CHUNK = 1 << 20  # weights looked at at a time
LOW, HIGH = 0.1, 1.5  # where exponents are looked for
CLIPS = np.geomspace(1.0, 0.1, 17)


@dataclass(frozen=True)
class Spread:
    """How a weight's numbers are spread over [0, 1] of their scales: enough to know the error of any exponent.

    `sums[i]` holds the sums of s^2, s^2 u and s^2 u^2 over the numbers u = |w| / s below (i / BINS)^2. A grid's squared
    error follows from the sums at its thresholds (interpolated within a bin), so a search looks at the weights once.
    """

    sums: np.ndarray
    top: int

    @classmethod
    def of(cls, w: Float[Tensor, "*shape"], size: Tensor, top: int) -> Spread:
        """Of a weight and the scales of its numbers, which broadcast."""
        moments = torch.zeros(BINS, 3, dtype=torch.float64)
        sizes = size.expand_as(w).flatten().split(CHUNK)
        for part, s in zip(w.flatten().split(CHUNK), sizes, strict=True):
            u = (part.abs() / s.clamp_min(torch.finfo(w.dtype).tiny)).clamp(max=1).double()
            place = (u.sqrt() * BINS).long().clamp(max=BINS - 1)
            weight = s.double().square()
            moments += torch.stack([torch.bincount(place, weight * u**power, BINS) for power in range(3)], 1)
        return cls(torch.cat([torch.zeros(1, 3, dtype=torch.float64), moments.cumsum(0)]).numpy(), top)

    def error(self, a: float, clip: bool = False) -> float:
        """The Euclidean norm of what rounding with exponent a changes; with `clip`, that of the best common clip."""
        clips = CLIPS[:, None] if clip else np.ones((1, 1))
        level = clips * (np.arange(self.top + 1) / self.top) ** (1 / a)
        edge = clips * ((np.arange(self.top) + 0.5) / self.top) ** (1 / a)
        place = np.sqrt(edge) * BINS
        low = place.astype(int).clip(max=BINS - 1)
        below = self.sums[low] + (place - low)[..., None] * (self.sums[low + 1] - self.sums[low])
        ends = np.broadcast_to(self.sums[-1], (len(clips), 1, 3))
        cells = np.diff(below, axis=1, prepend=0.0, append=ends)
        squared = (cells[..., 2] - 2 * level * cells[..., 1] + level**2 * cells[..., 0]).sum(1)
        return float(np.sqrt(max(0.0, squared.min())))


def find_exponent(spreads: Sequence[Spread], clip: bool = False) -> float:
    """The exponent with the least sum of the layers' errors, by Nelder-Mead from the best of a coarse row.

    At 4 bits and fewer the error has one minimum; at 8 it ripples, which the coarse row steps over.
    """

    def error(a: float) -> float:
        return sum(spread.error(float(a), clip) for spread in spreads)

    start = min(np.linspace(LOW, HIGH, 15), key=error)
    found = minimize(
        lambda x: error(float(x[0])),
        [start],
        method="Nelder-Mead",
        bounds=[(LOW, HIGH)],
        options={"initial_simplex": [[start], [start + 0.05 if start + 0.05 < HIGH else start - 0.05]], "xatol": 1e-4},
    )
    return float(found.x[0])


def best_size(w: Float[Tensor, "r g n"], size: Float[Tensor, "r g 1"], a: float, top: int) -> Float[Tensor, "r g 1"]:
    """The scale of each tile, the largest number or less, with the least squared error at this exponent."""
    best, least = size, torch.full_like(size, torch.inf)
    for factors in (torch.as_tensor(CLIPS), torch.linspace(0.93, 1.07, 9)):
        start = best
        for factor in factors.tolist():
            at = torch.minimum(start * factor, size)
            error = (decode(encode(w, at, a, top), at, a, top) - w).square().sum(-1, keepdim=True)
            better = error < least
            best, least = torch.where(better, at, best), torch.where(better, error, least)
    return best
