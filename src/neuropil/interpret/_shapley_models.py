"""The five models of the workflow on a matrix with missing values: two readable ones and three black boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import loguniform
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import ParameterSampler
from sklearn.svm import SVC, SVR
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from sklearn.utils import get_tags
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.validation import has_fit_parameter

from neuropil.interpret._shapley_functions import is_linear, is_tree, is_xgboost, require

MODELS = ("xgboost", "forest", "svm", "tree", "logistic")
REGRESSORS = ("xgboost", "forest", "svm", "tree", "ridge")
BLACK_BOXES = ("xgboost", "forest", "svm")

# What the random search draws from; names are those of the models below.
SPACES: dict[str, dict[str, Any]] = {
    "xgboost": {
        "max_depth": [1, 2, 3, 4, 6],
        "learning_rate": loguniform(0.02, 0.3),
        "n_estimators": [50, 100, 200],
        "min_child_weight": [1, 3, 5],
        "subsample": [0.7, 1.0],
    },
    "forest": {"max_features": ["sqrt", 0.3, 0.6], "min_samples_leaf": [1, 2, 5, 10]},
    "svm": {"C": loguniform(0.1, 100), "gamma": loguniform(1e-3, 1)},
    "tree": {"max_depth": [2, 3, 4, 6, None], "min_samples_leaf": [1, 5, 10, 20]},
    "logistic": {"C": loguniform(1e-3, 1e2)},
    "ridge": {"alpha": loguniform(1e-2, 1e3)},
}


class PlattSVC(ClassifierMixin, BaseEstimator):
    """A support vector machine with an RBF kernel whose margin becomes a probability by Platt's sigmoid, fitted on
    margins of rows outside the training folds."""

    def __init__(self, C: float | int = 1.0, gamma: Any = "scale", folds: int = 3) -> None:
        self.C, self.gamma, self.folds = C, gamma, folds

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> PlattSVC:
        smallest = int(np.unique(y, return_counts=True)[1].min())
        if smallest < 2:
            raise ValueError("a class of 1 sample; calibrating the SVM needs at least 2 of each")
        machine = SVC(C=self.C, gamma=self.gamma)
        calibrated = CalibratedClassifierCV(machine, method="sigmoid", cv=min(self.folds, smallest), ensemble=False)
        self.calibrated_ = calibrated.fit(X, y, sample_weight=sample_weight)
        self.classes_ = calibrated.classes_
        return self

    def predict(self, X: Any) -> np.ndarray:
        return self.calibrated_.predict(X)

    def predict_proba(self, X: Any) -> np.ndarray:
        return self.calibrated_.predict_proba(X)

    def decision_function(self, X: Any) -> np.ndarray:
        return self.calibrated_.calibrated_classifiers_[0].estimator.decision_function(X)


def base_model(name: str, regression: bool, random_state: int) -> Any:
    """An unfitted model of this name."""
    if name == "xgboost":
        xgboost = require("xgboost")
        kind = xgboost.XGBRegressor if regression else xgboost.XGBClassifier
        return kind(n_estimators=100, max_depth=3, learning_rate=0.1, n_jobs=1, random_state=random_state)
    if name == "forest":
        kind = RandomForestRegressor if regression else RandomForestClassifier
        return kind(n_estimators=100, min_samples_leaf=2, random_state=random_state)
    if name == "tree":
        kind = DecisionTreeRegressor if regression else DecisionTreeClassifier
        return kind(min_samples_leaf=5, random_state=random_state)
    if name == "svm":
        return SVR() if regression else PlattSVC()
    return Ridge() if regression else LogisticRegression(max_iter=2000)


class ColumnModel(BaseEstimator):
    """A model behind a preparation that acts on each column alone: medians (modes of categories) for what is missing,
    and, unless the model is a tree, unit variance and a 0/1 column a category.

    Because no derived column mixes two columns, Shapley values of derived columns add up to those of columns for
    linear models, and are those of columns for trees.
    """

    def __init__(self, model: Any = None, nominal: Any = None, balanced: bool = True) -> None:
        self.model, self.nominal, self.balanced = model, nominal, balanced

    def __sklearn_tags__(self) -> Any:
        return deepcopy(get_tags(self.model))

    def fit(self, X: Float[np.ndarray, "n m"], y: Any) -> ColumnModel:
        self._learn(X)
        weights = {}
        weighs = self.balanced and self.__sklearn_tags__().estimator_type == "classifier"
        if weighs and has_fit_parameter(self.model, "sample_weight"):
            weights = {"sample_weight": compute_sample_weight("balanced", y)}
        self.model_ = clone(self.model).fit(self.derive(X), y, **weights)
        if hasattr(self.model_, "classes_"):
            self.classes_ = self.model_.classes_
        return self

    def _learn(self, X: np.ndarray) -> None:
        m = X.shape[1]
        self.nominal_: Bool[np.ndarray, " m"] = (
            np.zeros(m, bool) if self.nominal is None else np.asarray(self.nominal, dtype=bool)
        )
        self.fill_ = np.array([_middle(column, bool(mode)) for column, mode in zip(X.T, self.nominal_, strict=True)])
        filled = self.filled(X)
        self.whole_ = is_tree(self.model)
        scale = filled.std(0)
        self.mean_, self.scale_ = filled.mean(0), np.where(scale > 1e-12 * np.abs(filled).max(0), scale, 1.0)
        codes = [np.unique(filled[:, j]) if self.nominal_[j] else None for j in range(m)]
        self.codes_ = [None] * m if self.whole_ else codes
        widths = [1 if kinds is None else len(kinds) for kinds in self.codes_]
        self.owner_: Int[np.ndarray, " d"] = np.repeat(np.arange(m), widths)

    def filled(self, X: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n m"]:
        """X with what is missing replaced."""
        return np.where(np.isnan(X), self.fill_, X)

    def derive(self, X: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n d"]:
        """What the model itself sees."""
        X = self.filled(X)
        if self.whole_:
            return X
        scaled = (X - self.mean_) / self.scale_
        if not self.nominal_.any():
            return scaled
        parts = [
            scaled[:, [j]] if kinds is None else (X[:, [j]] == kinds).astype(float)
            for j, kinds in enumerate(self.codes_)
        ]
        return np.concatenate(parts, axis=1)

    def predict(self, X: Float[np.ndarray, "n m"]) -> np.ndarray:
        return np.asarray(self.model_.predict(self.derive(X)))

    def predict_proba(self, X: Float[np.ndarray, "n m"]) -> np.ndarray:
        return np.asarray(self.model_.predict_proba(self.derive(X)), dtype=np.float64)

    def margin(self, X: Float[np.ndarray, "n m"]) -> np.ndarray:
        """Log-odds (XGBoost, linear), decision function (SVM), else probability; of two classes the second."""
        derived = self.derive(X)
        if is_xgboost(self.model_):
            return np.asarray(self.model_.predict(derived, output_margin=True), dtype=np.float64)
        if hasattr(self.model_, "decision_function"):
            return np.asarray(self.model_.decision_function(derived), dtype=np.float64)
        return self.probability(X)

    def probability(self, X: Float[np.ndarray, "n m"]) -> np.ndarray:
        """Probability `[n]` of the second of two classes, `[n, k]` of more, or the prediction of a regressor."""
        if not hasattr(self.model_, "predict_proba"):
            return self.predict(X).astype(np.float64)
        found = self.predict_proba(X)
        return found[:, 1] if found.shape[1] == 2 else found

    @property
    def scale(self) -> str:
        """The scale `margin` is on."""
        if not hasattr(self.model_, "predict_proba"):
            return "prediction"
        if is_xgboost(self.model_) or is_linear(self.model_):
            return "log-odds"
        return "decision function" if hasattr(self.model_, "decision_function") else "probability"

    def natural_importance(self) -> Float[np.ndarray, " m"]:
        """Of each column: fall of impurity (tree, forest), mean gain of a split (XGBoost), |standardised coefficient|
        summed over its categories and averaged over classes (linear), NaN for other models."""
        if hasattr(self.model_, "feature_importances_"):
            return np.asarray(self.model_.feature_importances_, dtype=np.float64)
        if is_linear(self.model_):
            derived = np.abs(np.atleast_2d(self.model_.coef_)).mean(0)
            return np.bincount(self.owner_, weights=derived, minlength=len(self.nominal_))
        return np.full(len(self.nominal_), np.nan)


def _middle(column: np.ndarray, mode: bool) -> float:
    seen = column[~np.isnan(column)]
    if not len(seen):
        return 0.0
    if not mode:
        return float(np.median(seen))
    kinds, times = np.unique(seen, return_counts=True)
    return float(kinds[times.argmax()])


Scorer = Callable[[Any, Any, Any], float]
Splits = Sequence[tuple[np.ndarray, np.ndarray]]


def cross_validated(model: Any, X: np.ndarray, y: np.ndarray, splits: Splits, scorer: Scorer) -> float:
    """Mean score over splits, each of a clone fitted on its training rows alone."""
    return float(np.mean([scorer(clone(model).fit(X[a], y[a]), X[b], y[b]) for a, b in splits]))


def tuned(
    model: ColumnModel,
    space: dict[str, Any],
    draws: int,
    X: np.ndarray,
    y: np.ndarray,
    splits: Splits,
    scorer: Scorer,
    random_state: int,
) -> ColumnModel:
    """The model fitted with the best of its own settings and `draws` random ones, by cross-validation."""
    candidates = [model]
    if draws and space:
        sampler = ParameterSampler(space, min(draws, _size(space)), random_state=random_state)
        settings = ({f"model__{name}": value for name, value in drawn.items()} for drawn in sampler)
        candidates.extend(clone(model).set_params(**drawn) for drawn in settings)
    if len(candidates) > 1:
        scores = [cross_validated(candidate, X, y, splits, scorer) for candidate in candidates]
        model = candidates[int(np.argmax(np.nan_to_num(scores, nan=-np.inf)))]
    return clone(model).fit(X, y)


def _size(space: dict[str, Any]) -> int:
    if not all(isinstance(values, list) for values in space.values()):
        return 2**31 - 1
    return int(np.prod([len(values) for values in space.values()]))
