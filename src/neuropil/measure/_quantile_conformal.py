r"""Conformal calibration of quantiles, for each symmetric pair of levels $(\tau, 1 - \tau)$, $\alpha = 2 \tau$.

A calibration point scores $E_i = \max(q_{lo}(x_i) - y_i,\; y_i - q_{hi}(x_i))$: how far it lies outside its interval,
negative inside. Split CQR widens every interval by the $\lceil (1-\alpha)(n+1) \rceil$-th smallest score (a negative
one narrows it); for exchangeable data the interval then covers with probability at least $1 - \alpha$ whatever the
model. CV+ needs no points of its own: each training point is scored by the model that did not see its fold. Pairs are
shifted independently of one another and may cross afterwards; the median stays.

>>> rng = np.random.default_rng(0)
>>> y, flat = rng.normal(size=2000), np.zeros((2000, 2))  # a model that knows nothing
>>> interval = cqr(conformity_scores(y[:1000], flat[:1000]), flat[1000:], np.array([0.1, 0.9]))
>>> round(float(((y[1000:] >= interval[:, 0]) & (y[1000:] <= interval[:, 1])).mean()), 1)
0.8
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int

Levels = Float[np.ndarray, " m"]


def conformity_scores(y: Float[np.ndarray, " n"], q: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n pairs"]:
    """Conformity score of every sample for every symmetric pair of columns, widest pair first."""
    pairs = q.shape[1] // 2
    return np.maximum(q[:, :pairs] - y[:, None], y[:, None] - q[:, ::-1][:, :pairs])


def check_enough(n: int, levels: Levels) -> None:
    """ValueError where `n` points are too few for the outermost pair: (1 - alpha)(n + 1) must not exceed n."""
    lowest = float(levels[0])
    if len(levels) > 1 and _rank(n, lowest) > n:
        need = math.ceil((1 - 2 * lowest) / (2 * lowest) - 1e-9)
        raise ValueError(
            f"{n} points cannot calibrate the levels {lowest:g} and {1 - lowest:g}, which takes {need}; give more "
            "data, a larger calibration_fraction, or levels further inside"
        )


def _rank(n: int, tau: float) -> int:
    # 1e-9: (1 - 2 * 0.05) * 20 is a hair above 18 in floating point.
    return math.ceil((1 - 2 * tau) * (n + 1) - 1e-9)


def cqr(
    calibration: Float[np.ndarray, "k pairs"], q: Float[np.ndarray, "n m"], levels: Levels
) -> Float[np.ndarray, "n m"]:
    """Split CQR: `q` with each pair moved apart by the rank of its `calibration` scores."""
    check_enough(len(calibration), levels)
    out = q.copy()
    for pair in range(calibration.shape[1]):
        rank = _rank(len(calibration), float(levels[pair])) - 1
        shift = np.partition(calibration[:, pair], rank)[rank]
        out[:, pair] -= shift
        out[:, -1 - pair] += shift
    return out


def cv_plus(
    calibration: Float[np.ndarray, "k pairs"],
    fold: Int[np.ndarray, " k"],
    q: Float[np.ndarray, "n m"],
    q_folds: Float[np.ndarray, "folds n m"],
    levels: Levels,
) -> Float[np.ndarray, "n m"]:
    """CV+: `q` with each pair replaced by order statistics over the training points.

    calibration   score of each training point by the model fitted without its fold
    fold          the fold of each training point
    q, q_folds    predictions at the new points, by the model of all folds (its median is kept) and by the models
                  without each fold

    The lower end is the floor(alpha (k + 1))-th smallest of $q_{lo}^{-fold(i)}(x) - E_i$, the upper one the
    ceil((1 - alpha)(k + 1))-th smallest of $q_{hi}^{-fold(i)}(x) + E_i$.
    """
    check_enough(len(calibration), levels)
    out, k = q.copy(), len(calibration)
    for pair in range(calibration.shape[1]):
        rank = _rank(k, float(levels[pair])) - 1
        low = q_folds[fold, :, pair] - calibration[:, pair, None]
        high = q_folds[fold, :, -1 - pair] + calibration[:, pair, None]
        # floor(alpha (k + 1)) = k + 1 - ceil((1 - alpha)(k + 1)): the same rank, counted from the other end.
        out[:, pair] = np.partition(low, k - 1 - rank, axis=0)[k - 1 - rank]
        out[:, -1 - pair] = np.partition(high, rank, axis=0)[rank]
    return out
