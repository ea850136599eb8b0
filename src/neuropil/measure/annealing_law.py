r"""Predict the loss curve of any learning-rate schedule from one or two training runs, and choose one before training.

Four numbers describe a model, its data, batch and optimizer:
$$L(s) = L_0 + A\,S_1(s)^{-\alpha} - C\,S_2(s), \qquad S_1(s) = \sum_{i \le s} \eta_i, \qquad
S_2(s) = \sum_{i \le s} m_i, \quad m_i = \lambda m_{i-1} + (\eta_{i-1} - \eta_i),\ m_0 = 0.$$
$S_1$, the *forward area*, is how far the run has come; $S_2$, the *annealing area*, what it gained by lowering the rate
$\eta$. A drop of $\delta$ at step $k$ adds $\delta (1 - \lambda^{s-k+1})/(1 - \lambda)$ to $S_2(s)$: it pays off within
some $1/(1-\lambda)$ steps. A rise takes away as much.

>>> from neuropil.measure.lr_schedules import constant, cosine, wsd
>>> seen = {"cosine": cosine(600, max_lr=1e-3), "constant": constant(600, max_lr=1e-3)}
>>> steps = range(50, 601, 50)
>>> def loss(rates):                                                # stands for a training run
...     S1, S2 = areas(rates, 0.99)[50::50].T
...     return 2.6 + 0.43 * S1**-0.55 - 1.0 * S2
>>> law = AnnealingLaw(lambda_=0.99).fit_curves([Curve(steps, loss(rates), rates) for rates in seen.values()])
>>> {name: round(value, 3) for name, value in law.coefficients_.items()}
{'L0': 2.6, 'A': 0.43, 'alpha': 0.55, 'C': 1.0}
>>> unseen = wsd(600, max_lr=1e-3, decay=0.1)
>>> law.predict_curve(unseen, [300, 600]).round(3), loss(unseen)[[5, 11]].round(3)
(array([3.432, 3.16 ]), array([3.432, 3.16 ]))

Two runs that differ in how they anneal (a cosine and a constant one, say) are best; one with annealing is enough. A
constant rate alone cannot tell $C$: `fit` warns, and `predict` refuses schedules that anneal. The fit, the meaning of
its standard deviations and the model-size term $+ B\,N^{-\beta}$ (which needs three sizes) stand in
`neuropil.measure.power_law`.

*The law's own edge.* $C S_2$ is linear, so the best schedule within given bounds has a closed form: constant at the
top, then a single drop to the bottom (`best_schedule`). A real run gains less from so late and sharp a drop than the
law says; use it to see what the law prefers, and `predict_curve` to choose among schedules that you would train.

Conventions. Entry $i$ of a schedule is the rate of step $i$, from step 0. The warm-up (the leading rise) counts as if
at its top rate and never as annealing; with ``warmup="actual"``, $S_1$ takes the real rates. $\lambda$ is not fitted
with the rest: 0.999 suits runs of tens of thousands of steps, `choose_lambda` compares others by the fitted curves.

Source: H. Tissue, V. Wang, L. Wang, "Scaling law with learning rate annealing", 2024, arXiv:2408.11029. Chosen here,
because the paper leaves it open or could not be read: the form of the model-size term, with $C$ shared by all sizes;
the warm-up being found from the schedule; leaving the first 5 % of steps out of the fit; and the uncertainty.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.signal import lfilter
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from neuropil.measure.loss_curves import Curve, read_curve, warmup_length, whole_steps
from neuropil.measure.lr_schedules import Rates, constant, endless, rates
from neuropil.measure.power_law import by_name, check_fittable, checked, fit_power_law, value

__all__ = ["AnnealingLaw", "Curve", "areas", "best_schedule", "choose_lambda", "read_curve"]

LAMBDAS = (0.98, 0.99, 0.995, 0.999)
FEWEST = 5

Losses = Float[np.ndarray, " n"]


def areas(schedule: Any, lambda_: float = 0.999, warmup: str = "max") -> Float[np.ndarray, "steps 2"]:
    """Forward area $S_1$ and annealing area $S_2$ at every step of a schedule (an array of rates, from step 0).

    >>> areas([1.0, 1.0, 0.5, 0.5], lambda_=0.5)
    array([[1.  , 0.  ],
           [2.  , 0.  ],
           [2.5 , 0.5 ],
           [3.  , 0.75]])
    """
    if not 0 <= lambda_ <= 1:
        raise ValueError(f"lambda_ is {lambda_}; expected 0 to 1")
    if warmup not in ("max", "actual"):
        raise ValueError(f"warmup is {warmup!r}; expected 'max' or 'actual'")
    actual = rates(schedule)
    flat = actual.copy()
    top = warmup_length(actual)
    flat[:top] = actual[top]
    momentum = lfilter([1.0], [1.0, -lambda_], -np.diff(flat, prepend=flat[0]))
    forward = np.cumsum(flat if warmup == "max" else actual)
    return np.stack([forward, np.cumsum(momentum)], axis=1)


class AnnealingLaw(RegressorMixin, BaseEstimator):
    r"""$L = L_0 + A S_1^{-\alpha} - C S_2$, fitted to curves (`fit_curves`) or to areas and losses (`fit`).

    Parameters
    ----------
    lambda_: how long a drop of the rate goes on paying off, about 1 / (1 - lambda_) steps.
    warmup: "max" counts the warm-up as if at its top rate, "actual" as it was.
    skip: share of each curve's steps, from the first, left out of `fit_curves`, as is its warm-up: no part of the law.
    n_bootstrap: fits to resampled residuals, for the standard deviations; 0 for none.
    random_state: seed of the bootstrap.

    Attributes, once fitted: `coefficients_` ("L0", "A", "alpha", "C"; with model sizes "B", "beta") and their
    bootstrap standard deviations `coefficients_std_`; `objective_`, the sum of the Huber losses; `identified_`, whether
    the fitted curves anneal at all (C is NaN if not).
    """

    def __init__(
        self,
        lambda_: float = 0.999,
        warmup: str = "max",
        skip: float = 0.05,
        n_bootstrap: int = 100,
        random_state: int | None = 0,
    ) -> None:
        self.lambda_, self.warmup, self.skip = lambda_, warmup, skip
        self.n_bootstrap, self.random_state = n_bootstrap, random_state

    def fit(self, X: Any, y: Any) -> AnnealingLaw:
        """Fit to losses `y` `[n]` at rows of X `[n, 2 or 3]`: S1, S2 (`areas`), and maybe the number of parameters.

        Warns where no row anneals. Raises ValueError for fewer than 5 rows, fewer than 3 model sizes, or a row (which
        it names) with a loss or an S1 that is not above 0.
        """
        X, y = checked(self._shaped(X), y)
        check_fittable(X, FEWEST)
        self.identified_ = bool(np.abs(X[:, 1]).max() > 1e-9 * X[:, 0].max())
        if not self.identified_:
            warnings.warn(
                "the rate never falls in what was fitted, so C cannot be told from it; add a curve with annealing",
                stacklevel=2,
            )
        self.fit_ = fit_power_law(X, y, self.identified_, self.n_bootstrap, self.random_state)
        self.n_features_in_ = X.shape[1]
        self.objective_ = self.fit_.objective
        self.coefficients_, self.coefficients_std_ = by_name(self.fit_, X.shape[1] == 3, annealing=True)
        if not self.identified_:
            self.coefficients_["C"] = self.coefficients_std_["C"] = np.nan
        return self

    def fit_curves(self, curves: Iterable[Curve]) -> AnnealingLaw:
        """Fit to whole loss curves. With `n_params` on each of them the law gets its model-size term."""
        X, y = self.points(curves)
        return self.fit(X, y)

    def points(self, curves: Iterable[Curve]) -> tuple[Float[np.ndarray, "n columns"], Losses]:
        """The X and y of `fit`, from curves: every point after the warm-up and the share `skip` of the steps."""
        curves = list(curves)
        if not curves:
            raise ValueError("no curves; give one or more")
        if not 0 <= self.skip < 1:
            raise ValueError(f"skip is {self.skip}; expected a share of the steps, from 0 to below 1")
        unsized = [curve.name for curve in curves if curve.n_params is None]
        if unsized and len(unsized) < len(curves):
            raise ValueError(f"{', '.join(unsized)} without n_params beside curves with it; give it for all or none")
        parts = []
        for curve in curves:
            kept = np.isin(curve.steps, self.kept_steps(curve))
            parts.append((self._rows(curve.schedule, curve.steps[kept], curve.n_params), curve.losses[kept]))
        return np.concatenate([X for X, _ in parts]), np.concatenate([y for _, y in parts])

    def kept_steps(self, curve: Curve) -> Int[np.ndarray, " n"]:
        """The measured steps of a curve that `fit_curves` uses, in the order of the rows of `points`."""
        return curve.steps[curve.steps >= max(self.skip * (len(curve.schedule) - 1), curve.warmup_steps)]

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Losses `[n]` at rows of X (as in `fit`); if asked, also standard deviations `[n]` of a measured loss.

        Warns `neuropil.errors.Extrapolation` for S1 below the smallest fitted or above 3 times the largest, S2 outside
        the fitted range by more than its width, and sizes beyond 3 times the range. Raises ValueError where a row
        anneals and C was not identified.
        """
        check_is_fitted(self)
        X, _ = checked(self._shaped(X))
        if X.shape[1] != self.n_features_in_:
            raise ValueError(f"X has {X.shape[1]} columns; the law was fitted to {self.n_features_in_}")
        if not self.identified_ and X[:, 1].any():
            raise ValueError(
                "the law was fitted to constant rates alone, so what annealing gains is not known; fit it to a curve "
                "with annealing too"
            )
        self.fit_.warn_outside(X)
        mean = value(self.fit_.theta, X)
        return (mean, self.fit_.std(X)) if return_std else mean

    def predict_curve(
        self, schedule: Any, steps: Sequence[int] | Any, return_std: bool = False, n_params: float | None = None
    ) -> Any:
        """`predict` at these steps of a schedule: an array of rates, a function of the step, or a torch scheduler."""
        check_is_fitted(self)
        schedule = rates(schedule, int(np.max(steps)) if endless(schedule) else None)
        steps = whole_steps(steps, len(schedule) - 1, "predict")
        return self.predict(self._rows(schedule, steps, n_params), return_std)

    def __str__(self) -> str:
        if not hasattr(self, "coefficients_"):
            return repr(self)
        c = self.coefficients_
        size = f" + {c['B']:.4g} N^-{c['beta']:.4g}" if "B" in c else ""
        annealing = f"{c['C']:.4g} S2" if self.identified_ else "C S2 (C unknown)"
        return f"L = {c['L0']:.4g} + {c['A']:.4g} S1^-{c['alpha']:.4g}{size} - {annealing}"

    def _rows(self, schedule: Rates, steps: np.ndarray, n_params: float | None) -> Float[np.ndarray, "n columns"]:
        found = areas(schedule, self.lambda_, self.warmup)[steps]
        return found if n_params is None else np.insert(found, 2, n_params, axis=1)

    @staticmethod
    def _shaped(X: Any) -> Float[np.ndarray, "n columns"]:
        X = np.asarray(X, dtype=np.float64)
        if X.ndim != 2 or X.shape[1] not in (2, 3):
            raise ValueError(f"X has shape {X.shape}; expected columns S1, S2 (see `areas`), and maybe parameters")
        return X


def choose_lambda(curves: Iterable[Curve], candidates: Sequence[float] = LAMBDAS, **settings: Any) -> AnnealingLaw:
    """The law, of those with these `lambda_`, that fits the curves best (`settings` as for `AnnealingLaw`)."""
    curves = list(curves)
    if len(candidates) == 1:
        return AnnealingLaw(candidates[0], **settings).fit_curves(curves)
    trials = [AnnealingLaw(lambda_, **{**settings, "n_bootstrap": 0}).fit_curves(curves) for lambda_ in candidates]
    best = min(trials, key=lambda law: law.objective_).lambda_
    return AnnealingLaw(best, **settings).fit_curves(curves)


def best_schedule(
    law: AnnealingLaw,
    total_steps: int,
    max_lr: float,
    min_lr: float = 0.0,
    warmup_steps: int = 0,
) -> Rates:
    r"""The schedule of the least final loss that the law predicts, of all within the two rates after the warm-up.

    The final loss is convex in the rates, with slope $-\alpha A S_1^{-\alpha-1} + C \lambda^{T-i}$ by $\eta_i$, which
    grows with $i$: so the best rates are `max_lr` up to some step and `min_lr` from there (but for that one step, which
    may lie between and is given one of the two). Every such step is tried. See the module on why a real run may
    prefer a gentler decay.
    """
    check_is_fitted(law)
    if not law.identified_:
        raise ValueError("the law was fitted to constant rates alone, so it prefers no schedule; add annealing")
    if not 0 <= min_lr < max_lr:
        raise ValueError(f"rates from {max_lr} to {min_lr}; expected min_lr from 0 to below max_lr")
    out = constant(total_steps, max_lr, warmup_steps)
    end = areas(out, law.lambda_, law.warmup)[-1, 0]
    lasting = np.arange(total_steps - warmup_steps + 1)  # steps at min_lr, none to all but the first after the warm-up
    gained = np.concatenate([[0.0], np.cumsum(law.lambda_ ** np.arange(len(lasting) - 1))])
    drop = max_lr - min_lr
    X = np.stack([end - drop * lasting, drop * gained], axis=1)
    theta = law.fit_.theta
    least = int(np.argmin(value(theta, X)))
    out[len(out) - least :] = min_lr
    return out
