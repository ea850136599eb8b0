"""Forward selection of columns, with its path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.feature_selection import f_classif, f_regression

from neuropil.interpret._shapley_models import Scorer, Splits, cross_validated


@dataclass(frozen=True)
class SelectionPath:
    """Columns in the order they were added, and the cross-validated score after each."""

    columns: tuple[int, ...]
    scores: tuple[float, ...]


def forward_selection(
    model: Any,
    X: Float[np.ndarray, "n m"],
    y: Any,
    splits: Splits,
    scorer: Scorer,
    *,
    tol: float | int = 1e-3,
    max_features: int | None = None,
    candidates: Sequence[int] | None = None,
) -> SelectionPath:
    """Columns added one at a time, each the one that raises the cross-validated score most; ends when no column raises
    it by `tol`.

    `model` is an estimator, or a function from a list of columns to one. Of equal columns the first is taken; the
    first column is taken whatever its score. Raises ValueError where there is no candidate.
    """
    candidates = list(range(X.shape[1]) if candidates is None else candidates)
    if not candidates or (max_features is not None and max_features < 1):
        raise ValueError(f"max_features={max_features}, {len(candidates)} candidates; expected at least 1 of each")
    make: Callable[[list[int]], Any] = model if not hasattr(model, "fit") else lambda columns: model
    chosen: list[int] = []
    scores: list[float] = []
    while candidates and len(chosen) < (max_features or X.shape[1]):
        found = [cross_validated(make([*chosen, c]), X[:, [*chosen, c]], y, splits, scorer) for c in candidates]
        best = int(np.argmax(np.nan_to_num(found, nan=-np.inf)))
        if scores and not found[best] - scores[-1] > tol:
            break
        scores.append(found[best])
        chosen.append(candidates.pop(best))
    return SelectionPath(tuple(chosen), tuple(scores))


def strongest(X: Float[np.ndarray, "n m"], y: Any, count: int | None, regression: bool) -> list[int]:
    """The `count` columns with the largest F statistic of one column, in their order; all if None."""
    if count is None or count >= X.shape[1]:
        return list(range(X.shape[1]))
    middle = np.array([np.median(c[~np.isnan(c)]) if (~np.isnan(c)).any() else 0.0 for c in X.T])
    filled = np.where(np.isnan(X), middle, X)
    varied = np.ptp(filled, axis=0) > 0
    f = np.zeros(X.shape[1])
    if varied.any():
        f[varied] = (f_regression if regression else f_classif)(filled[:, varied], y)[0]
    return sorted(np.argsort(-np.nan_to_num(f, nan=0.0, posinf=np.inf), kind="stable")[:count].tolist())
