"""The functions that `neuropil.layers.compander` bends weights with, at scale 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softsign


@dataclass(frozen=True)
class Curve:
    """An odd increasing function f, its inverse and its derivative; `reach` is its bound, `gain` its slope at 0."""

    value: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    reach: float = 1.0
    gain: float = 1.0


def curve(kind: str, mu: float) -> Curve:
    """The curve of this name. Raises ValueError for others, and for a mu that is not positive."""
    if kind == "mu-law":
        if not (math.isfinite(mu) and mu > 0):
            raise ValueError(f"mu={mu}: expected a positive number")
        return MuLaw(mu).curve
    if kind not in CURVES:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join([*CURVES, 'mu-law'])}")
    return CURVES[kind]


def _softsign_inverse(y: Tensor) -> Tensor:
    return y / (1 - y.abs())


def _arctan_derivative(x: Tensor) -> Tensor:
    return 1 / (1 + x.square())


def _tanh_derivative(x: Tensor) -> Tensor:
    return 1 - x.tanh().square()


def _softsign_derivative(x: Tensor) -> Tensor:
    return 1 / (1 + x.abs()).square()


CURVES = {
    "arctan": Curve(torch.atan, torch.tan, _arctan_derivative, reach=math.pi / 2),
    "tanh": Curve(torch.tanh, torch.atanh, _tanh_derivative),
    "softsign": Curve(softsign, _softsign_inverse, _softsign_derivative),
}


@dataclass(frozen=True)
class MuLaw:
    """sgn(x) ln(1 + mu |x|) / ln(1 + mu): 1 at x = 1, and without a bound."""

    mu: float

    @property
    def curve(self) -> Curve:
        whole = math.log1p(self.mu)
        return Curve(self.value, self.inverse, self.derivative, reach=math.inf, gain=self.mu / whole)

    def value(self, x: Tensor) -> Tensor:
        # At 0 torch gives |x| the slope 0, which would hold a weight there for ever. Of these two halves the first has
        # the slope 1 at 0 (clamp) and the second 0 (relu).
        halves = (self.mu * x.clamp(min=0)).log1p() - (self.mu * torch.relu(-x)).log1p()
        return halves / math.log1p(self.mu)

    def inverse(self, y: Tensor) -> Tensor:
        return y.sign() * (y.abs() * math.log1p(self.mu)).expm1() / self.mu

    def derivative(self, x: Tensor) -> Tensor:
        return self.mu / math.log1p(self.mu) / (1 + self.mu * x.abs())
