r"""Many quantile regressors in, one better one out: ordered, calibrated, with weights that may depend on the input.

Base models predict quantiles $G \in R^{n \times p \times m}$ (samples, models, levels $\tau_1 < ... < \tau_m$). The
aggregate is one of
$$q_\tau(x) = \sum_j w_j\,G_j(\tau), \qquad \sum_j w_j^{\tau}\,G_j(\tau), \qquad
\sum_{j,\nu} w_j^{\tau,\nu}\,G_j(\nu)$$
(*coarse*, *medium*, *fine*), with weights on the simplex for each output level, either *global* (one set) or *local*
(a perceptron of $x$). They minimise the pinball loss $\psi_\tau(u) = \max(\tau u, (\tau - 1) u)$, $u = y - q$, of
predictions that base models make outside their own training folds, plus
$$\lambda\,\frac{1}{m(m-1)/2} \sum_{i>j} (q_j - q_i + \delta_{ij})_+$$
against crossing. What still crosses is put in order by sorting, isotonic projection or a min-max sweep, after training
or within it, and intervals can be calibrated by conformal prediction.

>>> from sklearn.datasets import load_diabetes
>>> from sklearn.linear_model import QuantileRegressor
>>> from sklearn.ensemble import HistGradientBoostingRegressor
>>> X, y = load_diabetes(return_X_y=True)
>>> trees = HistGradientBoostingRegressor(loss="quantile", max_iter=20)
>>> aggregate = QuantileAggregator([QuantileRegressor(alpha=0), trees], levels=[0.1, 0.5, 0.9], weights="medium",
...                                local=False, search=1, n_folds=3, max_steps=300, random_state=0)
>>> quantiles = aggregate.fit(X[:300], y[:300]).predict(X[300:])
>>> quantiles.shape, bool((quantiles[:, 1:] >= quantiles[:, :-1]).all())
((142, 3), True)
>>> aggregate.predict_interval(X[300:], alpha=0.2).shape
(142, 2)
>>> float(wis(y[300:], quantiles, aggregate.levels_).mean()) < 60
True

Forecasts made elsewhere, with no model at hand, go in by `fit_from_predictions`. Scores (`pinball`, `interval_score`,
`wis`, `crps`, `coverage_error`, `calibration_error`), the three `isotonize` operators, `crossing_penalty`, `cqr` and
`cv_plus` can be used alone.

*Sorting and isotonic projection never raise the pinball loss summed over the levels, whatever y is; the min-max
sweep can* (the tests hold a counter-example), though its predictions are ordered as well.

Source: Rasool Fakoor, Taesup Kim, Jonas Mueller, Alexander J. Smola, Ryan J. Tibshirani, "Flexible Model Aggregation
for Quantile Regression", JMLR 24, 2023, arXiv:2103.00083. Defaults are those of the authors' published scripts: local
fine weights, one margin for all pairs, sorting at prediction, five folds, twenty random draws of the settings, Adam
with AMSGrad, evaluation every 100 steps with patience 500. Deviations: 19 levels by default (the paper: 99,
`levels=np.arange(1, 100) / 100`); sorting at prediction is exact, not soft; the weights of the best validation step are
kept instead of training again for as many steps, which with the same seed gives the same; global weights are learned
from the same protocol. What could not be read of the paper is the detail of its CV+. Here it is nested, so that the
model that scores a fold has seen nothing of it: base models are also fitted without each pair of folds
(K(K-1)/2 fits more), and the weights without fold k learn from those; the settings found once on all folds, and
standardisation, are shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d, validate_data

from neuropil.measure._quantile_base import (
    DEFAULT_LEVELS,
    QuantileNetwork,
    as_quantile_model,
    default_models,
    paper_models,
)
from neuropil.measure._quantile_conformal import check_enough, conformity_scores, cqr, cv_plus
from neuropil.measure._quantile_learn import MARGINS, Learned, Part, Settings, combine, draws, learn, ordered
from neuropil.measure._quantile_members import Left, Members
from neuropil.measure._quantile_order import ORDERS, crossing_penalty, isotonize, margins
from neuropil.measure._quantile_scores import (
    calibration_error,
    check_levels,
    coverage,
    coverage_error,
    crossing_rate,
    crps,
    interval_score,
    pinball,
    wis,
)
from neuropil.measure._quantile_weights import RESOLUTIONS, AggregationWeights

__all__ = [
    "AggregationWeights",
    "QuantileAggregator",
    "QuantileNetwork",
    "as_quantile_model",
    "calibration_error",
    "conformity_scores",
    "coverage",
    "coverage_error",
    "cqr",
    "crossing_penalty",
    "crossing_rate",
    "crps",
    "cv_plus",
    "default_models",
    "interval_score",
    "isotonize",
    "margins",
    "paper_models",
    "pinball",
    "wis",
]

Forecast = Callable[[Left, Int[np.ndarray, " k"]], Float[np.ndarray, "k p m"]]


class QuantileAggregator(BaseEstimator):
    """Weighted ensemble of quantile regressors ("deep quantile aggregation" by default).

    Parameters
    ----------
    base_models: regressors, `(name, regressor)` or `(name, regressor, grid)`; a grid is searched on the validation
        rows. See `as_quantile_model` for what is accepted. None: `default_models()`.
    levels: increasing, in (0, 1); None: 0.05, 0.10, ..., 0.95.
    weights: "coarse", "medium" or "fine".
    local: weights computed from the input, or one set for all inputs.
    normalize: softmax weights; False: free linear ones, which start at 0 where they are global.
    isotonic: None, "sort", "pava" (isotonic projection), "sweep" (min-max sweep) or "soft-sort" (soft in training,
        exact at prediction), applied to every prediction.
    isotonic_training: also train through it.
    soft_strength: regularisation of "soft-sort".
    crossing_penalty: lambda; 0 for none.
    margin: delta of the penalty in standard deviations of y, or "adaptive" (gaps between the quantiles of residuals of
        the median base forecast, times `margin_scale`), or "levels" (gaps between 0.01 tau, times `margin_scale`).
    conformal: None, "cqr" (split; holds out `calibration_fraction` of the rows) or "cv+" (nested folds).
    n_folds: folds for the out-of-fold predictions that weights learn from.
    search: random draws from the grids, of each base model and of the weights' settings; 0: everything as given.
    hidden, layers, dropout, lr, weight_decay, huber, batch_size, max_steps: of the training of weights; where
        `search` > 0 the draws replace those that have a grid. batch_size None: 2 ** (3 + floor(log10 n)).
    validation_fraction: rows held out for choosing settings and stopping.
    device: where weights are trained and used.
    random_state: base models whose own is None get a seed drawn from it.

    Fitted: `levels_`, `model_names_`, `settings_` (of the weights), `validation_loss_`, `steps_`, `network_`.
    """

    def __init__(
        self,
        base_models: Any = None,
        *,
        levels: Any = None,
        weights: Any = "fine",
        local: Any = True,
        normalize: Any = True,
        isotonic: Any = "sort",
        isotonic_training: Any = False,
        soft_strength: Any = 0.1,
        crossing_penalty: Any = 1.0,
        margin: Any = 0.005,
        margin_scale: Any = 0.01,
        conformal: Any = None,
        n_folds: Any = 5,
        search: Any = 20,
        hidden: Any = 64,
        layers: Any = 2,
        dropout: Any = 0.0,
        lr: Any = 1e-3,
        weight_decay: Any = 1e-7,
        huber: Any = 0.0,
        batch_size: Any = None,
        max_steps: Any = 10_000,
        validation_fraction: Any = 0.2,
        calibration_fraction: Any = 0.2,
        device: Any = "cpu",
        random_state: Any = None,
    ) -> None:
        # Any: a scikit-learn estimator takes whatever it is given here, and checks it in fit.
        self.base_models, self.levels, self.weights, self.local = base_models, levels, weights, local
        self.normalize, self.isotonic, self.isotonic_training = normalize, isotonic, isotonic_training
        self.soft_strength, self.crossing_penalty, self.margin = soft_strength, crossing_penalty, margin
        self.margin_scale, self.conformal, self.n_folds, self.search = margin_scale, conformal, n_folds, search
        self.hidden, self.layers, self.dropout, self.lr, self.weight_decay = hidden, layers, dropout, lr, weight_decay
        self.huber, self.batch_size, self.max_steps = huber, batch_size, max_steps
        self.validation_fraction, self.calibration_fraction = validation_fraction, calibration_fraction
        self.device, self.random_state = device, random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags

    # --- fitting ---------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any) -> QuantileAggregator:
        """Fit base models and weights on inputs `X` `[n, d]` and targets `y` `[n]`.

        Raises ValueError for bad settings, for too few rows, and where a base model's predictions are not finite.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        rng = self._check()
        train, validation, calibration, fold = self._split(len(X), rng)
        X, y = self._standardise(X, y, train)
        models = default_models() if self.base_models is None else self.base_models
        self._members: Members | None
        self._members = members = Members(models, self.levels_, _seed(rng))
        self.model_names_ = [name for name, _, _ in members.entries]
        members.tune(X[train], y[train], X[validation], y[validation], self.search)

        def forecast(left: Left, rows: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k p m"]:
            members.fit(left, X[train], y[train], fold)
            return members.forecast(left, X[rows])

        self._learn(forecast, X, y, (train, validation, calibration, fold), _seed(rng))
        members.fitted = {left: fits for left, fits in members.fitted.items() if left in self._learned}
        return self

    def fit_from_predictions(self, forecasts: Any, X: Any, y: Any) -> QuantileAggregator:
        """Fit weights alone, on forecasts `[n, p, m]` by models that did not see these rows.

        NaN stands for a model that gave no forecast; the others share its weight. X may be None where weights are
        global. Predict with `predict_from_predictions`.
        """
        y = column_or_1d(y, warn=True, dtype=np.float64)
        rng = self._check()
        forecasts, X = self._given(forecasts, X, len(y), reset=True)
        if not np.isfinite(y).all():
            raise ValueError("y holds NaN or infinity; leave such rows out")
        parts = self._split(len(y), rng)
        X, y = self._standardise(X, y, parts[0])
        forecasts = (forecasts - self.y_mean_) / self.y_scale_
        self._members = None
        self.model_names_ = [str(j) for j in range(forecasts.shape[1])]
        self._learn(lambda left, rows: forecasts[rows], X, y, parts, _seed(rng))
        return self

    def _check(self) -> np.random.RandomState:
        if self.weights not in RESOLUTIONS:
            raise ValueError(f"weights {self.weights!r}; expected one of {', '.join(map(repr, RESOLUTIONS))}")
        if self.isotonic is not None and self.isotonic not in ORDERS:
            raise ValueError(f"isotonic {self.isotonic!r}; expected None or one of {', '.join(map(repr, ORDERS))}")
        if self.isotonic_training and self.isotonic is None:
            raise ValueError("isotonic_training=True with isotonic=None: name the operator to train through")
        if self.conformal not in (None, "cqr", "cv+"):
            raise ValueError(f"conformal {self.conformal!r}; expected None, 'cqr' or 'cv+'")
        if isinstance(self.margin, str) and self.margin not in MARGINS:
            raise ValueError(f"margin {self.margin!r}; expected a number, 'adaptive' or 'levels'")
        if self.crossing_penalty < 0 or self.huber < 0 or self.search < 0:
            raise ValueError("crossing_penalty, huber and search must not be negative")
        if self.n_folds < 2 or self.max_steps < 1:
            raise ValueError(f"n_folds={self.n_folds}, max_steps={self.max_steps}; expected at least 2 and 1")
        levels = DEFAULT_LEVELS if self.levels is None else self.levels
        self.levels_ = check_levels(levels, symmetric=self.conformal is not None)
        return check_random_state(self.random_state)

    def _split(self, n: int, rng: np.random.RandomState) -> tuple[Any, Any, Any, Any]:
        """Rows for training, validation and calibration, and the fold of each training row."""
        order = rng.permutation(n)
        held = max(1, round(self.validation_fraction * n))
        spare = round(self.calibration_fraction * n) if self.conformal == "cqr" else 0
        train = order[held + spare :]
        if len(train) < self.n_folds:
            raise ValueError(
                f"n_samples={n} leaves {len(train)} rows for training in {self.n_folds} folds after {held} for "
                f"validation and {spare} for calibration; give more rows or fewer folds"
            )
        if self.conformal is not None:
            check_enough(spare if self.conformal == "cqr" else len(train), self.levels_)
        fold = np.arange(len(train)) * self.n_folds // len(train)
        return train, order[:held], order[held : held + spare], fold

    def _standardise(self, X: np.ndarray, y: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.x_mean_, scale = X[train].mean(0), X[train].std(0)
        self.x_scale_ = np.where(scale > 0, scale, 1.0)
        self.y_mean_, self.y_scale_ = float(y[train].mean()), float(y[train].std()) or 1.0
        return self._inputs(X), (y - self.y_mean_) / self.y_scale_

    def _inputs(self, X: np.ndarray) -> np.ndarray:
        return (X - self.x_mean_) / self.x_scale_

    def _learn(self, forecast: Forecast, X: np.ndarray, y: np.ndarray, parts: Any, seed: int) -> None:
        """Search the settings of the weights; then score calibration points, for CV+ by weights without their fold."""
        train, validation, calibration, fold = parts

        def out_of_fold(left: Left) -> Part:
            rows = train[~np.isin(fold, left)]
            of = fold[~np.isin(fold, left)]
            folds = [k for k in range(self.n_folds) if k not in left]
            return Part(
                np.concatenate([forecast(tuple(sorted((*left, k))), rows[of == k]) for k in folds]), X[rows], y[rows]
            )

        def held_out(left: Left, rows: np.ndarray) -> Part:
            return Part(forecast(left, rows), X[rows], y[rows])

        def conformity(left: Left, rows: np.ndarray) -> np.ndarray:
            return conformity_scores(y[rows], combine(self._learned[left], forecast(left, rows), X[rows]))

        given = Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})
        ours, check = out_of_fold(()), held_out((), validation)
        tries = [learn(s, ours, check, self.levels_, seed) for s in draws(given, self.search, seed)]
        best = min(tries, key=lambda found: found.loss)
        self._learned: dict[Left, Learned] = {(): best}
        self.settings_, self.validation_loss_, self.steps_ = best.settings, best.loss, best.steps
        self.network_ = best.network
        self._fold, self._conformal = fold, self.conformal
        if self.conformal == "cqr":
            self._conformity = conformity((), calibration)
        if self.conformal == "cv+":
            for k in range(self.n_folds):
                part, check = out_of_fold((k,)), held_out((k,), validation)
                self._learned[(k,)] = learn(best.settings, part, check, self.levels_, seed)
            self._conformity = np.concatenate([conformity((k,), train[fold == k]) for k in range(self.n_folds)])

    # --- predicting ------------------------------------------------------------------------------

    def predict(self, X: Any) -> Float[np.ndarray, "n m"]:
        """Quantiles at `levels_` for each row of `X`."""
        check_is_fitted(self)
        members = self._members
        if members is None:
            raise ValueError("fitted from predictions, without base models; use predict_from_predictions(forecasts, X)")
        X = self._inputs(validate_data(self, X, reset=False, dtype=np.float64))
        return self._quantiles(lambda left: members.forecast(left, X), X)

    def predict_from_predictions(self, forecasts: Any, X: Any = None) -> Float[np.ndarray, "n m"]:
        """Quantiles from base forecasts `[n, p, m]` (NaN: missing); X may be None where weights are global."""
        check_is_fitted(self)
        forecasts, X = self._given(forecasts, X, None, reset=False)
        forecasts = (forecasts - self.y_mean_) / self.y_scale_
        return self._quantiles(lambda left: forecasts, self._inputs(X))

    def _quantiles(self, forecast: Callable[[Left], np.ndarray], X: np.ndarray) -> np.ndarray:
        q = combine(self._learned[()], forecast(()), X)
        if self._conformal == "cqr":
            q = cqr(self._conformity, q, self.levels_)
        if self._conformal == "cv+":
            folds = [combine(self._learned[left], forecast(left), X) for left in self._learned if left]
            q = cv_plus(self._conformity, self._fold, q, np.stack(folds), self.levels_)
        if self._conformal is not None:
            q = ordered(torch.as_tensor(q), self.settings_.isotonic).numpy()
        return q * self.y_scale_ + self.y_mean_

    def predict_interval(self, X: Any, alpha: float) -> Float[np.ndarray, "n 2"]:
        """Lower and upper end of the interval with nominal coverage 1 - alpha; alpha / 2 must be one of the levels."""
        check_is_fitted(self)
        ends = [np.flatnonzero(np.isclose(self.levels_, t)) for t in (alpha / 2, 1 - alpha / 2)]
        if not all(len(end) for end in ends):
            usable = [
                round(2 * float(t), 10) for t in self.levels_ if t < 0.5 and np.isclose(self.levels_, 1 - t).any()
            ]
            raise ValueError(f"alpha={alpha}: alpha / 2 and 1 - alpha / 2 must both be levels; possible are {usable}")
        return self.predict(X)[:, [ends[0][0], ends[1][0]]]

    def weights_(self, X: Any = None) -> Float[np.ndarray, "n ..."]:
        """Weights at each row of X, `[n, p]` (coarse), `[n, p, m]` (medium: model, level) or `[n, p, m, m]` (fine:
        model, its level, level of the output); the first axis is 1 where weights are global, and X may be None then."""
        check_is_fitted(self)
        if X is None and self.settings_.local:
            raise ValueError("weights are local: give the rows X at which to show them")
        x = self._inputs(np.zeros((1, len(self.x_mean_))) if X is None else check_array(X, dtype=np.float64))
        with torch.no_grad():
            found = self.network_.weights(torch.as_tensor(x, device=self.settings_.device)).cpu().numpy()
        p, m = len(self.model_names_), len(self.levels_)
        shape = {"coarse": (p,), "medium": (p, m), "fine": (p, m, m)}[self.settings_.weights]
        return found.reshape(len(found), *shape)

    def score(self, X: Any, y: Any) -> float:
        """Minus the mean pinball loss over samples and levels: higher is better."""
        return -float(pinball(np.asarray(y, dtype=np.float64), self.predict(X), self.levels_).mean())

    def _given(self, forecasts: Any, X: Any, n: int | None, reset: bool) -> tuple[np.ndarray, np.ndarray]:
        """Forecasts and inputs as arrays, checked against one another and the levels."""
        forecasts = np.asarray(forecasts, dtype=np.float64)
        models = None if reset else len(self.model_names_)
        expected = (f"n={n}" if n is not None else "n", f"p={models}" if models else "p", f"m={len(self.levels_)}")
        if forecasts.ndim != 3 or any(
            want not in (None, have) for have, want in zip(forecasts.shape, (n, models, len(self.levels_)), strict=True)
        ):
            raise ValueError(f"forecasts of shape {forecasts.shape}; expected [{', '.join(expected)}]")
        missing = np.isnan(forecasts)
        if np.isinf(forecasts).any():
            raise ValueError("forecasts hold infinity; use NaN for a missing forecast")
        if missing.any() and not self.normalize:
            raise ValueError("forecasts are missing (NaN) and normalize=False: only normalised weights can be shared")
        alone = missing.all((1, 2)) if self.weights == "fine" else missing.all(1).any(1)
        if alone.any():
            raise ValueError(f"row {int(alone.argmax())} has a level that no model forecasts; leave the row out")
        if X is None:
            if self.local:
                raise ValueError("local weights need X; give it, or use local=False")
            return forecasts, np.zeros((len(forecasts), 0))
        X = validate_data(self, X, reset=reset, dtype=np.float64)
        if len(X) != len(forecasts):
            raise ValueError(f"X has {len(X)} rows and forecasts {len(forecasts)}; expected as many")
        return forecasts, X


def _seed(rng: np.random.RandomState) -> int:
    return int(rng.randint(2**31))
