"""Base models for aggregation: any regressor that can predict quantiles, and the paper's three networks.

`as_quantile_model` gives one interface, `fit(X, y)` and `predict(X) -> [n, m]`, to four kinds of estimators:

* those with a parameter `levels` (the networks here, or the reader's own): predict all levels at once
* those whose `predict` takes `quantiles` (quantile-forest)
* those with a parameter `quantile` (scikit-learn's QuantileRegressor, HistGradientBoostingRegressor): one fit a level
* those with `loss="quantile"` or `objective="quantile"` and a parameter `alpha` (scikit-learn's
  GradientBoostingRegressor, LightGBM): one fit a level

>>> from sklearn.linear_model import QuantileRegressor
>>> X = np.arange(10.0)[:, None]
>>> model = as_quantile_model(QuantileRegressor(alpha=0.0), [0.25, 0.5])
>>> model.fit(X, X[:, 0]).predict(X[:3]).round(6).tolist()
[[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import norm
from sklearn.base import BaseEstimator, clone
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import QuantileRegressor
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from neuropil.errors import MissingExtra
from neuropil.measure._quantile_scores import pinball
from neuropil.measure._quantile_weights import perceptron, train

Features = Float[np.ndarray, "n d"]
Quantiles = Float[np.ndarray, "n m"]
DEFAULT_LEVELS = np.arange(1, 20) / 20  # 0.05, 0.10, ..., 0.95

NETWORK_GRID: dict[str, list[Any]] = {"hidden": [64, 128], "layers": [2, 3], "dropout": [0.0, 0.05, 0.1]}
_LOSS_GRID: dict[str, list[Any]] = {"huber": [0.0, 0.01], "lr": [1e-3, 3e-4], "weight_decay": [1e-5, 1e-7]}
_LEAVES: dict[str, list[Any]] = {"min_samples_split": [8, 16, 64], "min_samples_leaf": [8, 16, 64]}
_BOOSTING: dict[str, list[Any]] = {
    "num_leaves": [10, 50, 100],
    "min_child_samples": [3, 9, 15],
    "min_child_weight": [0.01, 0.1, 1.0],
    "colsample_bytree": [0.4, 0.6],
    "reg_alpha": [0.1, 1.0, 5.0],
    "reg_lambda": [0.1, 1.0, 5.0],
}


class PerLevel(BaseEstimator):
    """One clone of `estimator` for each level, its `parameter` set to the level."""

    def __init__(self, estimator: Any, parameter: str, levels: Any) -> None:
        self.estimator, self.parameter, self.levels = estimator, parameter, levels

    def fit(self, X: Features, y: Any) -> PerLevel:
        self.models_ = [clone(self.estimator).set_params(**{self.parameter: float(t)}).fit(X, y) for t in self.levels]
        return self

    def predict(self, X: Features) -> Quantiles:
        return np.column_stack([model.predict(X) for model in self.models_])


class AskedLevels(BaseEstimator):
    """One fit of `estimator`, whose `predict` is asked for all levels."""

    def __init__(self, estimator: Any, levels: Any) -> None:
        self.estimator, self.levels = estimator, levels

    def fit(self, X: Features, y: Any) -> AskedLevels:
        self.model_ = clone(self.estimator).fit(X, y)
        return self

    def predict(self, X: Features) -> Quantiles:
        found = self.model_.predict(X, quantiles=[float(t) for t in self.levels])
        return np.asarray(found, dtype=np.float64).reshape(len(X), len(self.levels))


def as_quantile_model(model: Any, levels: Any) -> Any:
    """An unfitted estimator that predicts all `levels`; `model` is cloned. TypeError where that cannot be done."""
    if not hasattr(model, "get_params") or not hasattr(model, "predict"):
        raise TypeError(f"base model {model!r} is no scikit-learn estimator (get_params, fit, predict)")
    own = model.get_params(deep=False)
    kind = own.get("loss", own.get("objective"))
    if "levels" in own:
        return clone(model).set_params(levels=levels)
    if "quantiles" in inspect.signature(model.predict).parameters:
        return AskedLevels(model, levels)
    if "quantile" in own and kind in (None, "quantile"):
        return PerLevel(model, "quantile", levels)
    if kind == "quantile" and ("alpha" in own or "objective" in own):
        return PerLevel(model, "alpha", levels)  # LightGBM takes alpha without listing it
    raise TypeError(
        f"base model {type(model).__name__} predicts no quantiles as it is: expected a parameter `levels`, a `predict` "
        'that takes `quantiles`, or loss="quantile" (objective="quantile" for LightGBM)'
    )


class QuantileNetwork(BaseEstimator):
    """The paper's neural quantile regressors.

    kind          "joint" (MQR: one output a level), "single" (SQR: the level, less 0.5, is an input; trained on levels
                  drawn uniformly) or "gaussian" (CGN: mean and variance by likelihood, quantiles of the normal law)
    steps         optimizer steps; None: found on a fifth of the rows (evaluated every 100 steps, patience 500), then
                  trained from scratch on all rows for that many. `steps_` says how many it was.
    Others as in `QuantileAggregator`. X and y should be standardised.
    """

    def __init__(
        self,
        kind: Any = "joint",
        levels: Any = None,
        hidden: Any = 64,
        layers: Any = 3,
        dropout: Any = 0.0,
        huber: Any = 0.0,
        lr: Any = 1e-3,
        weight_decay: Any = 1e-7,
        batch_size: Any = None,
        steps: Any = None,
        max_steps: Any = 10_000,
        random_state: Any = None,
    ) -> None:
        # Any: a scikit-learn estimator takes whatever it is given here, and checks it in fit.
        self.kind, self.levels, self.hidden, self.layers, self.dropout = kind, levels, hidden, layers, dropout
        self.huber, self.lr, self.weight_decay, self.batch_size = huber, lr, weight_decay, batch_size
        self.steps, self.max_steps, self.random_state = steps, max_steps, random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags

    def fit(self, X: Any, y: Any) -> QuantileNetwork:
        """Train on `X` `[n, d]` and `y` `[n]`."""
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        if self.kind not in ("joint", "single", "gaussian"):
            raise ValueError(f"kind {self.kind!r}; expected 'joint', 'single' or 'gaussian'")
        self.levels_ = DEFAULT_LEVELS if self.levels is None else np.asarray(self.levels, dtype=np.float64)
        seed = int(check_random_state(self.random_state).randint(2**31))
        x, target = torch.tensor(X, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
        steps, held = self.steps, len(x) // 5
        if steps is None and held > 0:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
            steps = self._train(x[order[held:]], target[order[held:]], seed, x[order[:held]], target[order[:held]])
        self.steps_ = steps or self.max_steps
        self._train(x, target, seed)
        return self

    def _train(self, x: Tensor, y: Tensor, seed: int, x_held: Tensor | None = None, y_held: Any = None) -> int:
        outputs = {"joint": len(self.levels_), "single": 1, "gaussian": 2}[self.kind]
        taus = torch.as_tensor(self.levels_, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        validate = None if x_held is None else lambda: float(pinball(y_held, self._quantiles(x_held), taus).mean())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = x.shape[1] + (self.kind == "single")
            self.network_ = perceptron(width, outputs, self.hidden, self.layers, self.dropout)
            _, done = train(
                self.network_,
                lambda batch: self._loss(x[batch], y[batch], taus, generator),
                len(x),
                generator=generator,
                validate=validate,
                steps=self.max_steps if validate is not None else self.steps_,
                lr=self.lr,
                weight_decay=self.weight_decay,
                batch_size=self.batch_size,
            )
        return done

    def _loss(self, x: Tensor, y: Tensor, taus: Tensor, generator: torch.Generator) -> Tensor:
        if self.kind == "joint":
            return pinball(y, self.network_(x), taus, self.huber).mean()
        if self.kind == "single":
            drawn = torch.rand(len(x), 1, generator=generator).clamp(0.001, 0.999)
            return pinball(y, self.network_(torch.cat([x, drawn - 0.5], 1)), drawn, self.huber).mean()
        mean, variance = self._moments(x)
        return ((y - mean) ** 2 / variance + variance.log()).mean() / 2

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.network_(x).unbind(1)
        return mean, nn.functional.softplus(raw) + 1e-6

    def _quantiles(self, x: Tensor) -> Tensor:
        taus = torch.as_tensor(self.levels_, dtype=x.dtype)
        if self.kind == "joint":
            return self.network_(x)
        if self.kind == "single":
            pairs = torch.cat([x.repeat_interleave(len(taus), 0), taus.repeat(len(x))[:, None] - 0.5], 1)
            return self.network_(pairs).view(len(x), len(taus))
        mean, variance = self._moments(x)
        normal = torch.as_tensor(norm.ppf(self.levels_), dtype=x.dtype)
        return mean[:, None] + variance.sqrt()[:, None] * normal

    def predict(self, X: Any) -> Quantiles:
        """Quantiles `[n, m]`; those of "joint" and "single" can cross."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        single = next(self.network_.parameters()).dtype
        with torch.no_grad():  # in float64, so that a row's answer does not depend on the rows beside it
            found = self.network_.double()
            try:
                return self._quantiles(torch.tensor(X)).numpy()
            finally:
                found.to(single)


Entry = tuple[str, Any, Mapping[str, Sequence[Any]]]


def default_models() -> list[Entry]:
    """Linear quantile regression, boosted trees and the three networks, with the grids they are tuned over.

    scikit-learn and torch alone; see `paper_models` for the paper's own six.
    """
    boosted = HistGradientBoostingRegressor(loss="quantile", max_iter=50)
    return [
        ("linear", QuantileRegressor(alpha=0.0), {}),
        ("boosting", boosted, {"max_leaf_nodes": [10, 50, 100], "min_samples_leaf": [8, 16, 64]}),
        *_networks(),
    ]


def paper_models() -> list[Entry]:
    """The paper's six base models with their grids: CGN, SQR, MQR, quantile forest, quantile extra trees, LightGBM.

    Raises `MissingExtra` without lightgbm and quantile-forest.
    """
    try:
        from lightgbm import LGBMRegressor
        from quantile_forest import ExtraTreesQuantileRegressor, RandomForestQuantileRegressor
    except ImportError as error:
        raise MissingExtra(f"{error.name} is not installed; pip install 'neuropil[quantile]'") from error
    boosted = LGBMRegressor(objective="quantile", n_estimators=50, verbosity=-1, n_jobs=1, deterministic=True)
    return [
        *_networks(),
        ("forest", RandomForestQuantileRegressor(n_estimators=50), _LEAVES),
        ("extra trees", ExtraTreesQuantileRegressor(n_estimators=50), _LEAVES),
        ("lightgbm", boosted, _BOOSTING),
    ]


def _networks() -> list[Entry]:
    gaussian = ("gaussian network", QuantileNetwork("gaussian"), NETWORK_GRID)
    rest = [(f"{kind} network", QuantileNetwork(kind), NETWORK_GRID | _LOSS_GRID) for kind in ("single", "joint")]
    return [gaussian, *rest]
