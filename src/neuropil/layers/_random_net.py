"""Networks of one hidden layer with weights drawn once and kept; the output layer is fitted in closed form."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from neuropil.layers._ridge_functions import activation_named
from neuropil.layers.ridgelet import GaussianDerivative, admissible_order

WEIGHTS = ("uniform", "normal", "log-uniform", "ridgelet")
BIASES = ("uniform", "normal", "data")
DECADES = 3.0  # of |a| below lam that "log-uniform" covers
CANDIDATES = 50  # for each neuron that "ridgelet" draws
CHUNK = 4_000_000


class RankDeficient(UserWarning):
    """Fewer directions among the features than there could be; more neurons of this kind add little."""


class UnscaledInputs(UserWarning):
    """Inputs far from unit scale, for which a range of weights says little."""


class RandomFeatures(nn.Module):
    r"""The frozen hidden layer $x \mapsto \sigma(a_j \cdot x - b_j)$: [..., m] to [..., d].

    weight [d, m] and bias [d] are buffers: they are saved and moved with the module, and take no gradient.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, weight: Float[np.ndarray, "d m"], bias: Float[np.ndarray, " d"], activation: str = "sigmoid"
    ) -> None:
        super().__init__()
        activation_named(activation)
        self.activation = activation
        self.register_buffer("weight", torch.from_numpy(weight))
        self.register_buffer("bias", torch.from_numpy(bias))

    def forward(self, x: Float[Tensor, "*n m"]) -> Float[Tensor, "*n d"]:
        return activation_named(self.activation).function(x @ self.weight.T - self.bias)

    def extra_repr(self) -> str:
        d, m = self.weight.shape
        return f"{m}, {d}, activation={self.activation}"


def draw_features(
    x: Float[np.ndarray, "n m"],
    n_neurons: int,
    lam: float,
    *,
    lam_b: float | None = None,
    weight_dist: str = "uniform",
    bias_dist: str = "uniform",
    activation: str = "sigmoid",
    y: Float[np.ndarray, n * q] | None = None,
    seed: int = 0,
) -> RandomFeatures:
    """Draw the hidden layer. With one seed, fewer neurons are the first of more (not so for "ridgelet").

    x is looked at for its number of columns, by bias_dist "data", and with y by weight_dist "ridgelet".
    """
    if weight_dist not in WEIGHTS:
        raise ValueError(f"weight_dist {weight_dist!r}; expected one of {', '.join(WEIGHTS)}")
    if bias_dist not in BIASES:
        raise ValueError(f"bias_dist {bias_dist!r}; expected one of {', '.join(BIASES)}")
    if n_neurons < 1:
        raise ValueError(f"n_neurons {n_neurons}; expected 1 or more")
    lam_b = lam if lam_b is None else lam_b
    if not (lam > 0 and lam_b > 0 and math.isfinite(lam) and math.isfinite(lam_b)):
        raise ValueError(f"lam {lam}, lam_b {lam_b}; expected finite numbers above 0")
    for_weights, for_biases = np.random.default_rng(seed).spawn(2)
    if weight_dist == "ridgelet":
        if y is None:
            raise ValueError('weight_dist "ridgelet" needs the targets y')
        return RandomFeatures(*_by_importance(x, y, n_neurons, lam, activation, for_weights), activation)
    a = _weights(weight_dist, n_neurons, x.shape[1], lam, for_weights)
    if bias_dist == "normal":
        b = lam_b * for_biases.standard_normal(n_neurons)
    else:
        unit = for_biases.uniform(size=n_neurons)
        low, high = _reach(x, a) if bias_dist == "data" else (-lam_b, lam_b)
        b = low + (high - low) * unit
    return RandomFeatures(a, b, activation)


def _weights(kind: str, d: int, m: int, lam: float, rng: np.random.Generator) -> np.ndarray:
    if kind == "uniform":
        return rng.uniform(-lam, lam, (d, m))
    if kind == "normal":
        return lam * rng.standard_normal((d, m))
    lengths, directions = rng.spawn(2)
    a = directions.standard_normal((d, m))
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    return a * lam * 10 ** (-DECADES * lengths.uniform(size=(d, 1)))


def _reach(x: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and largest a.x over the data, for each a."""
    low, high = np.full(len(a), np.inf), np.full(len(a), -np.inf)
    for part in np.array_split(x, max(1, x.shape[0] * len(a) // CHUNK)):
        z = part @ a.T
        low, high = np.minimum(low, z.min(0)), np.maximum(high, z.max(0))
    return low, high


def _by_importance(
    x: np.ndarray, y: np.ndarray, d: int, lam: float, activation: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Of many log-uniform candidates, d without replacement, in proportion to |R f| at each over its density."""
    m = x.shape[1]
    count = CANDIDATES * d
    a = _weights("log-uniform", count, m, lam, rng)
    low, high = _reach(x, a)
    b = low + (high - low) * rng.uniform(size=count)
    psi = GaussianDerivative(admissible_order(activation, m))
    values = y.reshape(len(y), -1) - y.mean(0)
    transform = np.empty(count)
    step = max(1, CHUNK // len(x))
    for start in range(0, count, step):
        z = a[start : start + step] @ x.T - b[start : start + step, None]
        transform[start : start + step] = np.linalg.norm(psi(z) @ values, axis=1)
    importance = transform * (high - low) * np.linalg.norm(a, axis=1) ** m
    if np.count_nonzero(importance) < d:
        importance = np.full(count, 1.0)  # a constant target: nothing to go by
    picked = rng.choice(count, d, replace=False, p=importance / importance.sum())
    return a[picked], b[picked]


def solve(
    features: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n q"], ridge: float, rcond: float
) -> tuple[Float[np.ndarray, "d q"], int]:
    """Least squares with a ridge penalty, without the singular values below rcond of the largest: weights and rank."""
    left, singular, right = np.linalg.svd(features, full_matrices=False)
    kept = singular > rcond * singular[0]
    s = singular[kept]
    factors = s / (s * s + ridge)
    return right[kept].T @ (factors[:, None] * (left[:, kept].T @ y)), int(kept.sum())


class _RandomFeatureNet(BaseEstimator):
    """What the regressor and the classifier share."""

    def __init__(
        self,
        n_neurons: Any = 200,
        lam: Any = 1.0,
        *,
        lam_b: Any = None,
        weight_dist: Any = "uniform",
        bias_dist: Any = "uniform",
        activation: Any = "sigmoid",
        ridge: Any = 0.0,
        rcond: Any = 1e-12,
        random_state: Any = None,
    ) -> None:
        # Any: scikit-learn's convention is that settings are checked in fit.
        self.n_neurons = n_neurons
        self.lam = lam
        self.lam_b = lam_b
        self.weight_dist = weight_dist
        self.bias_dist = bias_dist
        self.activation = activation
        self.ridge = ridge
        self.rcond = rcond
        self.random_state = random_state

    def _solve(self, X: np.ndarray, targets: np.ndarray) -> None:
        if not self.ridge >= 0 or not 0 <= self.rcond < 1:
            raise ValueError(f"ridge {self.ridge}, rcond {self.rcond}; expected ridge >= 0 and 0 <= rcond < 1")
        warn_if_unscaled(X)
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        self.features_ = draw_features(
            X,
            self.n_neurons,
            float(self.lam),
            lam_b=None if self.lam_b is None else float(self.lam_b),
            weight_dist=self.weight_dist,
            bias_dist=self.bias_dist,
            activation=self.activation,
            y=targets,
            seed=seed,
        )
        hidden = self.features_(torch.from_numpy(X)).numpy()
        self.coef_, self.rank_ = solve(hidden, targets, float(self.ridge), float(self.rcond))
        self.coef_norm_ = float(np.abs(self.coef_).sum(0).max())
        if self.rank_ < min(hidden.shape):
            warnings.warn(
                f"{self.n_neurons} neurons on {len(X)} samples have the rank of {self.rank_} to a precision of "
                f"{self.rcond:g}: the features are nearly dependent, and their weights large ({self.coef_norm_:.1e}); "
                f"a larger lam or a ridge helps",
                RankDeficient,
                stacklevel=3,
            )

    def _values(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return self.features_(torch.from_numpy(X)).numpy() @ self.coef_

    def network(self) -> nn.Sequential:
        """The fitted network as a torch module in float64, hidden layer frozen: see, clamp or train it on."""
        check_is_fitted(self)
        d, outputs = self.coef_.shape
        linear = nn.Linear(d, outputs, bias=False, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(self.coef_.T))
        return nn.Sequential(self.features_, linear)


class RandomFeatureRegressor(RegressorMixin, _RandomFeatureNet):
    r"""Least squares on a frozen random hidden layer (a random vector functional link, or extreme learning machine).

    $g(x) = \sum_j c_j \sigma(a_j \cdot x - b_j)$, with (a, b) drawn once and c the minimum of $|Hc - y|^2 +
    ridge\,|c|^2$, in float64. One output or several.

    n_neurons       d
    lam             the range: weights are drawn from [-lam, lam]^m ("uniform"), with deviation lam ("normal"), with
                    length log-uniform from lam / 1000 to lam ("log-uniform"), or in proportion to the target's
                    ridgelet transform, of length up to lam ("ridgelet", which draws biases too and looks at y)
    lam_b           the range of biases; lam by default
    bias_dist       "uniform" in [-lam_b, lam_b], "normal", or "data": uniform over the range of a.x on the data
    activation      "sigmoid", "tanh", "gaussian" exp(-z^2/2), "relu", "cos"
    ridge, rcond    penalty, and the smallest singular value kept, as a share of the largest

    `fit` sets `features_` (a `RandomFeatures`), `coef_` [d, outputs], `rank_`, and `coef_norm_`, the largest sum
    of |coefficients| of an output. It warns `RankDeficient` and `UnscaledInputs`.

    >>> x = np.linspace(-1, 1, 200)[:, None]
    >>> y = np.sin(2 * np.pi * x[:, 0])
    >>> with warnings.catch_warnings(action="ignore"):
    ...     RandomFeatureRegressor(100, lam=10.0, random_state=0).fit(x, y).score(x, y) > 0.999999
    True
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> RandomFeatureRegressor:
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=2)
        y = np.asarray(y, dtype=np.float64)
        self._single_ = y.ndim == 1
        self._solve(X, y.reshape(len(y), -1))
        return self

    def predict(self, X: Any) -> np.ndarray:
        values = self._values(X)
        return values[:, 0] if self._single_ else values


class RandomFeatureClassifier(ClassifierMixin, _RandomFeatureNet):
    """`RandomFeatureRegressor` on targets of 1 for the class and -1 for each other; the largest output wins."""

    def fit(self, X: Any, y: Any) -> RandomFeatureClassifier:
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, ensure_min_samples=2)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"only one class in y: {self.classes_[0]!r}; expected 2 or more")
        self._solve(X, 2.0 * np.eye(len(self.classes_))[codes] - 1)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """[n, classes], or [n] for two classes: above 0 for the second."""
        values = self._values(X)
        return values if len(self.classes_) > 2 else values[:, 1] - values[:, 0]

    def predict(self, X: Any) -> np.ndarray:
        scores = self.decision_function(X)
        picked = scores.argmax(1) if scores.ndim == 2 else (scores > 0).astype(int)
        return self.classes_[picked]


def warn_if_unscaled(x: Float[np.ndarray, "n m"]) -> None:
    """Warn where a column's largest absolute value is below 0.1 or above 10 (columns of zeros aside)."""
    largest = np.abs(x).max(0)
    odd = (largest > 10) | ((largest < 0.1) & (largest > 0))
    if odd.any():
        column = int(np.flatnonzero(odd)[0])
        warnings.warn(
            f"{int(odd.sum())} of {x.shape[1]} columns are not scaled (column {column} reaches "
            f"{largest[column]:.3g}); a range of weights means little there: pass inputs through "
            f"sklearn.preprocessing.StandardScaler first",
            UnscaledInputs,
            stacklevel=4,
        )
