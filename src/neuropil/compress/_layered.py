"""The precisions of the three-layer prior: closed-form updates of q(rho) and of the evidence for the support.

All take `square` = E[w^2] = mean^2 + variance of the weights, and the shapes and rates of the two Gamma priors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Weights = Float[Tensor, "*_"]


@dataclass(frozen=True)
class Gammas:
    """Gamma(a, b) of the precision of a weight that is there, Gamma(a_bar, b_bar) of one that is not (rates)."""

    a: float
    b: float
    a_bar: float
    b_bar: float


def marginal(square: Weights, a: float, b: float) -> Weights:
    """Log of the integral of N(w; 0, 1/rho) Gamma(rho; a, b) over rho at w^2 = `square`: Student's t."""
    constant = math.lgamma(a + 0.5) - math.lgamma(a) + a * math.log(b) - 0.5 * math.log(2 * math.pi)
    return constant - (a + 0.5) * torch.log(b + square / 2)


def joint_evidence(square: Weights, g: Gammas) -> Weights:
    """Log-odds for "there" with the precision integrated out: q(rho, s) as one factor."""
    return marginal(square, g.a, g.b) - marginal(square, g.a_bar, g.b_bar)


def joint_precision(square: Weights, support: Weights, g: Gammas) -> Weights:
    """E[rho] of q(rho, s) where `support` = q(s = 1)."""
    there = (g.a + 0.5) / (g.b + square / 2)
    gone = (g.a_bar + 0.5) / (g.b_bar + square / 2)
    return support * there + (1 - support) * gone


def gamma_posterior(square: Weights, support: Weights, g: Gammas) -> tuple[Weights, Weights]:
    """Shape and rate of q(rho) in the factorised q(rho) q(s)."""
    shape = support * g.a + (1 - support) * g.a_bar + 0.5
    rate = support * g.b + (1 - support) * g.b_bar + square / 2
    return shape, rate


def factorised_evidence(shape: Weights, rate: Weights, g: Gammas) -> Weights:
    """Log-odds for "there" from E[ln rho] and E[rho] of q(rho) = Gamma(shape, rate)."""
    mean, log_mean = shape / rate, torch.digamma(shape) - torch.log(rate)

    def expected(a: float, b: float) -> Tensor:
        return a * math.log(b) - math.lgamma(a) + (a - 1) * log_mean - b * mean

    return expected(g.a, g.b) - expected(g.a_bar, g.b_bar)
