r"""The multi-power law, a successor of the annealing law with seven numbers, as a peer to compare with.

$$L(s) = L_0 + A S_1(s)^{-\alpha} - B \sum_{k \le s} (\eta_{k-1} - \eta_k)
\left(1 - (1 + C \eta_k^{-\gamma} (S_1(s) - S_1(k-1)))^{-\beta}\right)$$

Source: K. Luo et al., "A multi-power law for loss curve prediction across learning rate schedules", 2025. Here it is
fitted as the annealing law is: Huber loss of log residuals, from several starts, the best end kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import OptimizeResult, least_squares

from neuropil.measure.annealing_law import AnnealingLaw
from neuropil.measure.loss_curves import Curve, warmup_length
from neuropil.measure.lr_schedules import Rates
from neuropil.measure.power_law import DELTA

STARTS = tuple(itertools.product((0.3, 1.0), (0.3, 3.0), (0.2, 0.6)))  # beta, speed, gamma
FLOOR = 1e-6  # of a loss: a bad trial has a logarithm too
# Bounds of the coefficients' logarithms, so that all powers are finite: L0, A, alpha, B, C, beta, gamma.
HIGHEST = np.array([30.0, 30.0, 2.0, 30.0, 30.0, 2.0, 2.0])


class Terms(NamedTuple):
    """What the law reads of a schedule: S1 at the steps; of every change of the rate, its size, rate and area since."""

    area: Float[np.ndarray, " n"]
    change: Float[np.ndarray, " k"]
    rate: Float[np.ndarray, " k"]
    since: Float[np.ndarray, "n k"]


class MultiPowerLaw:
    """Fitted, when made, to the points of `curves` that `law` was fitted to, starting from that law."""

    def __init__(self, law: AnnealingLaw, curves: Sequence[Curve]) -> None:
        self.top = max(curve.max_lr for curve in curves)
        terms = [self._terms(curve.schedule, law.kept_steps(curve)) for curve in curves]
        seen = np.log(law.points(curves)[1])
        ends = [self._descend(start, terms, seen) for start in self._starts(law)]
        self.theta = min(ends, key=lambda end: end.cost).x

    def predict(self, schedule: Rates, steps: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Losses at these steps of a schedule."""
        return _value(self.theta, self._terms(schedule, steps))[0]

    def _starts(self, law: AnnealingLaw) -> list[Float[np.ndarray, " 7"]]:
        c = law.coefficients_
        lasting = c["C"] / (1 - law.lambda_) + 1e-3  # what a drop of one gains in the end, by the annealing law
        out = []
        for beta, speed, gamma in STARTS:
            # At speed 1 a drop has gained the better part of it after 1 / (1 - lambda) steps at the highest rate.
            C = speed * (1 - law.lambda_) * self.top ** (gamma - 1)
            out.append(np.log([c["L0"] + 1e-3, c["A"], c["alpha"] + 1e-3, lasting, C, beta, gamma]))
        return out

    @staticmethod
    def _descend(
        start: Float[np.ndarray, " 7"], terms: Sequence[Terms], seen: Float[np.ndarray, " n"]
    ) -> OptimizeResult:
        def residuals(theta: np.ndarray) -> np.ndarray:
            return np.log(np.concatenate([_value(theta, each)[0] for each in terms]).clip(FLOOR)) - seen

        def slopes(theta: np.ndarray) -> np.ndarray:
            found = [_value(theta, each) for each in terms]
            return np.concatenate([slope / loss.clip(FLOOR)[:, None] for loss, slope in found])

        return least_squares(
            residuals,
            start,
            jac=slopes,
            bounds=(-30.0, HIGHEST),
            x_scale="jac",
            loss="huber",
            f_scale=DELTA,
            max_nfev=300,
        )

    def _terms(self, schedule: Rates, steps: Int[np.ndarray, " n"]) -> Terms:
        flat, top = schedule.copy(), warmup_length(schedule)
        flat[:top] = schedule[top]
        area, change = np.cumsum(flat), -np.diff(flat)
        changed = np.flatnonzero(change) + 1
        since = np.where(changed <= steps[:, None], area[steps][:, None] - area[changed - 1], 0.0)
        rate = np.maximum(flat[changed], self.top / 1000)  # the power of a rate of 0 is infinite
        return Terms(area[steps], change[changed - 1], rate, since)


def _value(theta: Float[np.ndarray, " 7"], terms: Terms) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n 7"]]:
    """Losses, and their derivatives by the logarithms `theta` of the coefficients (so that all are above 0)."""
    L0, A, alpha, B, C, beta, gamma = np.exp(theta)
    power = A * terms.area**-alpha
    pull = C * terms.rate**-gamma * terms.since
    left = (1 + pull) ** -beta
    growth = beta * pull * left / (1 + pull)  # of what was gained, by the logarithm of C
    gained = (1 - left) @ terms.change
    by_beta = (left * np.log1p(pull)) @ terms.change
    by_gamma = growth @ (terms.change * -np.log(terms.rate))
    loss = L0 + power - B * gained
    slopes = [np.full_like(loss, L0), power, -alpha * power * np.log(terms.area), -B * gained]
    slopes += [-B * (growth @ terms.change), -B * beta * by_beta, -B * gamma * by_gamma]
    return loss, np.stack(slopes, axis=1)
