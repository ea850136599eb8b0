r"""Fitting power laws of a loss curve: Huber loss of log residuals, many starts, a bootstrap for the certainty.

The family fitted here is
$$L(s_1, s_2, N) = L_0 + A\,s_1^{-\alpha} - C\,s_2 + B\,N^{-\beta}, \qquad L_0, A, \alpha, C, B, \beta \ge 0,$$
of which `neuropil.measure.annealing_law.AnnealingLaw` is one member and `ChinchillaLaw` ($C = 0$) another.

>>> steps = np.array([[100.0], [200.0], [400.0], [800.0], [1600.0], [3200.0]])
>>> law = ChinchillaLaw().fit(steps, 2.0 + 30.0 * steps[:, 0] ** -0.5)
>>> {name: round(value, 3) for name, value in law.coefficients_.items()}
{'L0': 2.0, 'A': 30.0, 'alpha': 0.5}

Each residual is $r = \log L_{seen} - \log L$, its loss $r^2/2$ up to $\delta = 10^{-3}$ and linear beyond, summed over
all points. L-BFGS-B runs from 54 starts (a grid over $L_0, A, C, \alpha$); the best end is polished by
`scipy.optimize.least_squares` on the same sum.

Two things differ from the annealing paper's script, neither of which moves the minimum. Gradients are exact, not
differences. And the fit is done in units in which the largest $s_1$ is 4 and the smallest loss 2.83, as in the
script's own example, so that its grid of starts suits every learning rate and every loss: multiplying all rates, or
all losses, by a number multiplies the coefficients accordingly.

Certainty: residuals of the fit are drawn anew in blocks of neighbouring points (moving blocks of length $\sqrt n$,
because errors along a curve are alike), put on the fitted curve, and the law is fitted again. The standard deviation
given with a prediction joins the spread of those fits with the scatter of single points. It knows nothing of errors of
the law itself.

Source: J. Hoffmann et al., "Training compute-optimal large language models", 2022, arXiv:2203.15556 (the law of model
size and data, and the loss); the starts and bounds are those of the annealing law, arXiv:2408.11029.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import least_squares, minimize
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from neuropil.errors import Extrapolation

NAMES = ("L0", "A", "alpha", "C", "B", "beta")
DELTA = 1e-3
REACH = 3.0  # how many times the largest fitted s1 is still no extrapolation
AREA_UNIT, LOSS_UNIT = 4.0, 2.83
GRID = {"L0": np.linspace(0.1, 2.1, 2), "A": np.linspace(1, 22, 3), "alpha": np.linspace(0, 0.8, 3)}
GRID_C = np.linspace(1, 22, 3)
START_SIZE = ((0.5, 0.4),)  # B in loss units at the (geometric) mean size, and beta
FLOOR = 1e-6  # below it the logarithm goes on as a straight line, so that a bad start still has a gradient

Theta = Float[np.ndarray, " 6"]  # in the order of NAMES
Columns = Float[np.ndarray, "n columns"]


@dataclass(frozen=True)
class PowerLawFit:
    """A fitted law: coefficients in the order of `NAMES` (0 where one is not part of it), and its certainty."""

    theta: Theta
    samples: Float[np.ndarray, "draws 6"]
    scatter: float  # standard deviation of the log residuals
    objective: float  # sum of the Huber losses
    low: Float[np.ndarray, " columns"]
    high: Float[np.ndarray, " columns"]

    def std(self, X: Columns) -> Float[np.ndarray, " n"]:
        """Standard deviation of an observed loss at each row."""
        if not len(self.samples):
            raise ValueError("no bootstrap was drawn (n_bootstrap=0), so there is no standard deviation to return")
        spread = np.std([value(theta, X) for theta in self.samples], axis=0)
        return np.hypot(spread, self.scatter * value(self.theta, X))

    def warn_outside(self, X: Columns) -> None:
        """Warns `Extrapolation` where a row lies outside what was fitted."""
        width = self.high[1] - self.low[1]
        outside = (X[:, 0] < self.low[0]) | (X[:, 0] > REACH * self.high[0])
        outside |= (X[:, 1] < self.low[1] - width) | (X[:, 1] > self.high[1] + width)
        if X.shape[1] == 3:
            outside |= (X[:, 2] < self.low[2] / REACH) | (X[:, 2] > REACH * self.high[2])
        if outside.any():
            row = int(np.flatnonzero(outside)[0])
            asked = ", ".join(f"{entry:.4g}" for entry in X[row])
            seen = ", ".join(f"{a:.4g} to {b:.4g}" for a, b in zip(self.low, self.high, strict=True))
            warnings.warn(
                f"{outside.sum()} of {len(X)} places lie outside the fitted range, the first at ({asked}); fitted "
                f"were ({seen}). The law may be wrong there, by more than its standard deviation says.",
                Extrapolation,
                stacklevel=4,
            )


def value(theta: Theta, X: Columns) -> Float[np.ndarray, " n"]:
    """The law at rows of X, which has the columns s1, s2 and, for the model-size term, N."""
    L0, A, alpha, C, B, beta = theta
    out = L0 + A * X[:, 0] ** -alpha - C * X[:, 1]
    return out + B * X[:, 2] ** -beta if X.shape[1] == 3 else out


def jacobian(theta: Theta, X: Columns) -> Float[np.ndarray, "n 6"]:
    """Derivatives of `value` by each coefficient."""
    _, A, alpha, _, B, beta = theta
    out = np.zeros((len(X), len(NAMES)))
    power = X[:, 0] ** -alpha
    out[:, 0] = 1.0
    out[:, 1] = power
    out[:, 2] = -A * power * np.log(X[:, 0])
    out[:, 3] = -X[:, 1]
    if X.shape[1] == 3:
        out[:, 4] = X[:, 2] ** -beta
        out[:, 5] = -B * out[:, 4] * np.log(X[:, 2])
    return out


def huber(residuals: Float[np.ndarray, " n"]) -> float:
    """The sum of the Huber losses."""
    size = np.abs(residuals)
    return float(np.where(size <= DELTA, 0.5 * size**2, DELTA * size - 0.5 * DELTA**2).sum())


@np.errstate(over="ignore", invalid="ignore")  # a trial step may go far; it is then taken back
def fit_power_law(
    X: Columns, y: Float[np.ndarray, " n"], annealing: bool = True, n_bootstrap: int = 100, seed: int | None = 0
) -> PowerLawFit:
    """Fit the law to losses `y` at rows of X (s1, s2 and maybe N), both `checked`; without `annealing`, C stays 0."""
    units = np.array([X[:, 0].max() / AREA_UNIT] * 2 + [_mean_size(X)] * (X.shape[1] - 2))
    loss_unit = y.min() / LOSS_UNIT
    scaled, log_y = X / units, np.log(y / loss_unit)
    free = np.array([True, True, True, annealing, X.shape[1] == 3, X.shape[1] == 3])
    best = min((_descend(start, scaled, log_y, free) for start in _starts(free)), key=lambda end: end[1])
    theta = _polish(best[0], scaled, log_y, free)
    # Least squares follows the same sum from where L-BFGS-B stopped, but is not bound to end lower on a flat floor.
    theta = min(theta, best[0], key=lambda t: huber(_residuals(t, scaled, log_y)))
    residuals = _residuals(theta, scaled, log_y)
    samples = [
        _polish(theta, scaled, log_y - residuals + drawn, free) for drawn in _blocks(residuals, n_bootstrap, seed)
    ]
    return PowerLawFit(
        theta=_back(theta, units, loss_unit),
        samples=np.array([_back(one, units, loss_unit) for one in samples]).reshape(-1, len(NAMES)),
        scatter=float(np.std(residuals)),
        objective=huber(residuals),
        low=X.min(0),
        high=X.max(0),
    )


def checked(X: Columns, y: Any = None) -> tuple[Columns, Float[np.ndarray, " n"]]:
    """X and y as float64 if they can be fitted; ValueError, naming the row, if not."""
    X = np.asarray(X, dtype=np.float64)
    y = np.ones(len(X)) if y is None else np.asarray(y, dtype=np.float64)
    if len(X) != len(y):
        raise ValueError(f"X has {len(X)} rows and y {len(y)} losses; expected as many of both")
    for name, entries, good, wanted in (
        ("X", X, np.isfinite(X).all(1), "finite numbers"),
        ("X", X, X[:, 0] > 0, "a first column above 0"),
        ("X", X, X[:, -1] > 0 if X.shape[1] == 3 else np.ones(len(X), bool), "model sizes above 0"),
        ("y", y, np.isfinite(y) & (y > 0), "finite losses above 0"),
    ):
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise ValueError(f"{name}[{row}] is {entries[row]}; expected {wanted}")
    return X, y


def check_fittable(X: Columns, fewest: int) -> None:
    """ValueError where there are too few points or model sizes to fit the law to."""
    if len(X) < fewest:
        raise ValueError(f"{len(X)} points; this law needs {fewest} or more")
    if X.shape[1] == 3 and len(np.unique(X[:, 2])) < 3:
        raise ValueError(f"{len(np.unique(X[:, 2]))} model sizes; the term B N^-beta needs curves of 3 or more")


class ChinchillaLaw(RegressorMixin, BaseEstimator):
    r"""The law without annealing, $L = L_0 + A\,s^{-\alpha}\;(+\,B\,N^{-\beta})$, for end points or constant rates.

    `X` has one column, steps or tokens (or the forward area $S_1$: the annealing law with $C = 0$), and maybe a
    second, the number of parameters. Fitted attributes: `coefficients_` and `coefficients_std_` (by name),
    `objective_` (sum of Huber losses). Parameters: see `neuropil.measure.annealing_law.AnnealingLaw`.
    """

    def __init__(self, n_bootstrap: int = 100, random_state: int | None = 0) -> None:
        self.n_bootstrap, self.random_state = n_bootstrap, random_state

    def fit(self, X: Any, y: Any) -> ChinchillaLaw:
        """Fit to losses `y` `[n]` at rows of X `[n, 1 or 2]`. Raises ValueError for a loss or place not above 0."""
        columns, y = checked(self._columns(X), y)
        check_fittable(columns, fewest=3)
        self.fit_ = fit_power_law(columns, y, False, self.n_bootstrap, self.random_state)
        self.n_features_in_ = columns.shape[1] - 1
        self.objective_ = self.fit_.objective
        self.coefficients_, self.coefficients_std_ = by_name(self.fit_, columns.shape[1] == 3, annealing=False)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Losses `[n]` at rows of X, and their standard deviations `[n]` if asked.

        Warns `Extrapolation` for steps below the fitted ones or beyond 3 times the most.
        """
        check_is_fitted(self)
        columns, _ = checked(self._columns(X))
        if columns.shape[1] - 1 != self.n_features_in_:
            raise ValueError(f"X has {columns.shape[1] - 1} columns; the law was fitted to {self.n_features_in_}")
        self.fit_.warn_outside(columns)
        mean = value(self.fit_.theta, columns)
        return (mean, self.fit_.std(columns)) if return_std else mean

    @staticmethod
    def _columns(X: Any) -> Columns:
        X = np.asarray(X, dtype=np.float64)
        if X.ndim != 2 or X.shape[1] not in (1, 2):
            raise ValueError(f"X has shape {X.shape}; expected columns: steps (or tokens), and maybe parameters")
        return np.insert(X, 1, 0.0, axis=1)


def by_name(fit: PowerLawFit, sizes: bool, annealing: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Coefficients and their bootstrap standard deviations (NaN without a bootstrap) that belong to the law."""
    used = [True, True, True, annealing, sizes, sizes]
    spread = fit.samples.std(0) if len(fit.samples) else np.full(len(NAMES), np.nan)
    keep = [i for i, yes in enumerate(used) if yes]
    return {NAMES[i]: float(fit.theta[i]) for i in keep}, {NAMES[i]: float(spread[i]) for i in keep}


def _mean_size(X: Columns) -> float:
    return float(np.exp(np.log(X[:, 2]).mean())) if X.shape[1] == 3 else 1.0


def _back(theta: Theta, units: Float[np.ndarray, " columns"], loss_unit: float) -> Theta:
    """Coefficients in the user's units."""
    L0, A, alpha, C, B, beta = theta
    size = units[2] if len(units) == 3 else 1.0
    L0, A, C, B = loss_unit * np.array([L0, A * units[0] ** alpha, C / units[1], B * size**beta])
    return np.array([L0, A, alpha, C, B, beta])


def _starts(free: Bool[np.ndarray, " 6"]) -> list[Theta]:
    sizes = START_SIZE if free[4] else ((0.0, 0.0),)
    slopes = GRID_C if free[3] else (0.0,)
    grid = itertools.product(GRID["L0"], GRID["A"], GRID["alpha"], slopes, sizes)
    return [np.array([L0, A, alpha, C, *size]) for L0, A, alpha, C, size in grid]


def _residuals(theta: Theta, X: Columns, log_y: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    predicted = value(theta, X)
    safe = np.maximum(predicted, FLOOR)
    return log_y - np.log(safe) + (safe - predicted) / FLOOR


def _slopes(theta: Theta, X: Columns, free: Bool[np.ndarray, " 6"]) -> Float[np.ndarray, "n free"]:
    return -jacobian(theta, X)[:, free] / np.maximum(value(theta, X), FLOOR)[:, None]


def _descend(
    start: Theta, X: Columns, log_y: Float[np.ndarray, " n"], free: Bool[np.ndarray, " 6"]
) -> tuple[Theta, float]:
    """L-BFGS-B with the script's tolerances, on the sum in units of DELTA^2 (they are absolute near 0)."""
    theta = start.copy()

    def loss(part: np.ndarray) -> tuple[float, np.ndarray]:
        theta[free] = part
        residuals = _residuals(theta, X, log_y)
        pull = np.clip(residuals / DELTA, -1, 1) / DELTA
        return huber(residuals) / DELTA**2, pull @ _slopes(theta, X, free)

    bounds, options = [(0, None)] * int(free.sum()), {"maxiter": 100_000, "ftol": 1e-9, "gtol": 1e-6}
    end = minimize(loss, start[free], jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    theta[free] = end.x
    return theta, float(end.fun) if np.isfinite(end.fun) else np.inf


def _polish(start: Theta, X: Columns, log_y: Float[np.ndarray, " n"], free: Bool[np.ndarray, " 6"]) -> Theta:
    theta = start.copy()

    def at(part: np.ndarray) -> Theta:
        theta[free] = part
        return theta

    end = least_squares(
        lambda part: _residuals(at(part), X, log_y),
        start[free],
        jac=lambda part: _slopes(at(part), X, free),
        bounds=(0, np.inf),
        x_scale="jac",
        loss="huber",
        f_scale=DELTA,
        ftol=1e-13,
        xtol=1e-13,
        gtol=1e-15,
        max_nfev=200,
    )
    return at(end.x).copy()


def _blocks(residuals: Float[np.ndarray, " n"], draws: int, seed: int | None) -> Float[np.ndarray, "draws n"]:
    """Centred residuals drawn anew in moving blocks."""
    n = len(residuals)
    length = max(1, round(n**0.5))
    generator = np.random.default_rng(seed)
    starts = generator.integers(n - length + 1, size=(draws, -(-n // length)))
    places = (starts[..., None] + np.arange(length)).reshape(draws, length * starts.shape[1])[:, :n]
    return (residuals - residuals.mean())[places]
