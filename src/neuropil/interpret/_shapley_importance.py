"""Importances of columns by other means than Shapley values, and how far two lists of importances agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import kendalltau, rankdata

STRENGTHS = ((0.3, "weak"), (0.7, "moderate"), (np.inf, "strong"))


def permutation_importance(
    score: Callable[[Any, Any], float],
    X: Float[np.ndarray, "n m"],
    y: Any,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    repeats: int = 10,
    random_state: int = 0,
) -> Float[np.ndarray, "p r"]:
    """The drop of `score(X, y)` when the columns of a group (default: each column) are shuffled together, `repeats`
    times.

    >>> X = np.array([[0.0, 5.0], [1.0, 5.0]] * 10)
    >>> drops = permutation_importance(lambda X, y: float((X[:, 0] == y).mean()), X, X[:, 0])
    >>> drops.shape, bool(drops[0].mean() > 0.3), drops[1].tolist() == [0.0] * 10
    ((2, 10), True, True)

    Raises ValueError for repeats below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}; expected at least 1")
    rng = np.random.default_rng(random_state)
    orders = [rng.permutation(len(X)) for _ in range(repeats)]
    players = [[i] for i in range(X.shape[1])] if groups is None else groups
    whole = score(X, y)
    drops = np.empty((len(players), repeats))
    for p, columns in enumerate(players):
        for r, order in enumerate(orders):
            shuffled = X.copy()
            shuffled[:, columns] = X[order][:, columns]
            drops[p, r] = whole - score(shuffled, y)
    return drops


@dataclass(frozen=True)
class Agreement:
    """How two lists of importances go together; intervals are 95% of a bootstrap over columns. NaN where there are
    fewer than three columns or a list is constant."""

    pearson: float
    pearson_low: float
    pearson_high: float
    spearman: float
    spearman_low: float
    spearman_high: float
    kendall: float
    top_overlap: float
    strength: str
    columns: int


def importance_agreement(a: Any, b: Any, *, top: int = 5, resamples: int = 1000, random_state: int = 0) -> Agreement:
    """Pearson, Spearman and Kendall correlation of two importances of the same columns, and the share of the `top` of
    one that is in the top of the other.

    >>> found = importance_agreement([5, 3, 2, 1, 0.5], [50, 20, 30, 4, 1], top=2)
    >>> round(found.spearman, 2), found.strength, found.top_overlap
    (0.9, 'strong', 0.5)

    The strength is that of Spearman's r: weak below 0.3, moderate to 0.7, strong above. Raises ValueError for lists of
    different length.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"importances of shape {a.shape} and {b.shape}; expected two lists of one length")
    rng = np.random.default_rng(random_state)
    known = bool(np.isfinite([a, b]).all()) and len(a) >= 3
    draws = rng.integers(len(a), size=(resamples, len(a))) if known else np.empty((0, len(a)), int)
    pearson = _interval(a, b, draws, known)
    spearman = _interval(a, b, draws, known, ranked=True)
    k = min(top, max(1, len(a) // 2))
    overlap = len(set(np.argsort(-a, kind="stable")[:k]) & set(np.argsort(-b, kind="stable")[:k])) / max(k, 1)
    r = spearman[0]
    return Agreement(
        *pearson,
        *spearman,
        kendall=float(kendalltau(a, b).statistic) if known else np.nan,
        top_overlap=overlap if known else np.nan,
        strength="unknown" if np.isnan(r) else next(word for limit, word in STRENGTHS if abs(r) <= limit),
        columns=len(a),
    )


def _interval(
    a: np.ndarray, b: np.ndarray, draws: np.ndarray, known: bool, ranked: bool = False
) -> tuple[float, float, float]:
    if not known:
        return np.nan, np.nan, np.nan
    rows_a, rows_b = np.vstack([a, a[draws]]), np.vstack([b, b[draws]])
    if ranked:
        rows_a, rows_b = rankdata(rows_a, axis=1), rankdata(rows_b, axis=1)
    r = correlation(rows_a, rows_b)
    fine = r[1:][np.isfinite(r[1:])]
    low, high = np.quantile(fine, [0.025, 0.975]) if len(fine) and np.isfinite(r[0]) else (np.nan, np.nan)
    return float(r[0]), float(low), float(high)


def correlation(a: Float[np.ndarray, "r n"], b: Float[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
    """Pearson's r of each row of a with that of b; NaN where one is constant."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    length = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), length, out=np.full(len(a), np.nan), where=length > 1e-300)


def directions(values: Float[np.ndarray, "n m"], X: Float[np.ndarray, "n m"]) -> Float[np.ndarray, " m"]:
    """Spearman's r between each column and its Shapley values: its sign says where large values push. NaN where either
    is constant."""
    out = np.full(X.shape[1], np.nan)
    for j in range(X.shape[1]):
        seen = ~np.isnan(X[:, j])
        if seen.sum() > 2:
            ranks = (rankdata(column[seen])[None] for column in (X[:, j], values[:, j]))
            out[j] = correlation(*ranks)[0]
    return out
