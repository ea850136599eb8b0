r"""How good a set of predicted quantiles is: pinball loss, interval score, WIS, CRPS, coverage, calibration.

With $u = y - q$ the pinball loss of level $\tau$ is $\psi_\tau(u) = \max(\tau u, (\tau - 1) u)$; its mean over
samples is least at the $\tau$-quantile. All functions take plain NumPy arrays; `pinball` takes tensors too and has
gradients.

>>> levels = np.array([0.25, 0.5, 0.75])
>>> forecast = np.array([[-1.0, 0.0, 1.0]])
>>> pinball(np.array([2.0]), forecast, levels)
array([[0.75, 1. , 0.75]])
>>> float(wis(np.array([2.0]), forecast, levels)[0])
1.6666666666666667
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Quantiles = Float[np.ndarray, "n m"]
Values = Float[np.ndarray, " n"]


def check_levels(levels: Any, symmetric: bool = False) -> np.ndarray:
    """Levels as an increasing float64 array inside (0, 1); symmetric around 1/2 if asked. ValueError otherwise."""
    taus = np.asarray(levels, dtype=np.float64)
    if taus.ndim != 1 or taus.size == 0 or not ((taus > 0) & (taus < 1)).all():
        raise ValueError(f"levels {levels!r}: give a list of numbers strictly between 0 and 1")
    if not (np.diff(taus) > 0).all():
        raise ValueError(f"levels {taus.tolist()}: give them in increasing order, each once")
    if symmetric and not np.allclose(taus + taus[::-1], 1.0, atol=1e-9):
        raise ValueError(f"levels {taus.tolist()} are not symmetric around 0.5; intervals need tau and 1 - tau both")
    return taus


def pinball(y: Any, q: Any, levels: Any, huber: float = 0.0) -> Any:
    r"""Pinball loss of every sample and level, `[n, m]`, for targets `y` `[n]` and quantiles `q` `[n, m]`.

    With `huber` $a > 0$ the kink is rounded: $h_a(u) / a$ with $h_a = u^2 / 2$ for $|u| < a$, else
    $a (|u| - a / 2)$, times $\tau$ where $u \ge 0$ and $1 - \tau$ elsewhere. Arrays give arrays, tensors tensors.
    """
    u = y[:, None] - q
    if huber < 0:
        raise ValueError(f"huber is {huber}; expected 0 (plain pinball loss) or more")
    if huber == 0:
        # (tau - 1/2) u + |u| / 2 is the maximum of tau u and (tau - 1) u, in NumPy and torch alike.
        return (levels - 0.5) * u + 0.5 * abs(u)
    where = torch.where if isinstance(u, Tensor) else np.where
    size = abs(u)
    rounded = where(size < huber, 0.5 * u * u / huber, size - 0.5 * huber)
    return rounded * (levels + where(u >= 0, 0.0, 1.0) * (1 - 2 * levels))


def interval_score(y: Values, lower: Values, upper: Values, alpha: float) -> Values:
    r"""$(u - l) + \frac{2}{\alpha} (l - y)_+ + \frac{2}{\alpha} (y - u)_+$ of the interval with nominal coverage
    $1 - \alpha$."""
    return (upper - lower) + 2 / alpha * (np.maximum(lower - y, 0) + np.maximum(y - upper, 0))


def wis(y: Values, q: Quantiles, levels: Any) -> Values:
    r"""Weighted interval score of every sample; levels must be symmetric around 1/2.

    $\frac{2}{m} (\sum_{pairs} \frac{\alpha}{2} IS_\alpha + \frac12 |y - median|)$: twice the mean pinball loss.
    """
    return 2 * pinball(y, q, check_levels(levels, symmetric=True)).mean(1)


def crps(y: Values, q: Quantiles, levels: Any) -> Values:
    r"""Continuous ranked probability score $2 \int_0^1 \psi_\tau d\tau$, as a sum over the levels.

    Each level stands for the part of [0, 1] nearest to it, so levels need not be evenly spaced.
    """
    taus = check_levels(levels)
    edges = np.concatenate([[0.0], (taus[1:] + taus[:-1]) / 2, [1.0]])
    return 2 * pinball(y, q, taus) @ np.diff(edges)


def coverage(y: Values, q: Quantiles, levels: Any) -> Float[np.ndarray, " pairs"]:
    """Share of targets inside each symmetric interval, widest first."""
    pairs = len(check_levels(levels, symmetric=True)) // 2
    inside = (y[:, None] >= q[:, :pairs]) & (y[:, None] <= q[:, ::-1][:, :pairs])
    return inside.mean(0)


def coverage_error(y: Values, q: Quantiles, levels: Any) -> float:
    r"""Mean over symmetric pairs of |coverage - (1 - alpha)|."""
    taus = check_levels(levels, symmetric=True)
    nominal = 1 - 2 * taus[: len(taus) // 2]
    return float(np.abs(coverage(y, q, taus) - nominal).mean())


def calibration_error(y: Values, q: Quantiles, levels: Any) -> float:
    r"""Mean over levels of $|P(y \le q_\tau) - \tau|$."""
    taus = check_levels(levels)
    return float(np.abs((y[:, None] <= q).mean(0) - taus).mean())


def crossing_rate(q: Quantiles) -> float:
    """Share of samples whose quantiles are out of order anywhere."""
    return float((np.diff(q, axis=1) < 0).any(1).mean())
