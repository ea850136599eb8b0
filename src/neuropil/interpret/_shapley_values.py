"""Shapley values of any function of a row: exact, weighted least squares, sampled, of trees, of linear models.

Each of the first two is a set of coalitions and a matrix: values of coalitions in, Shapley values out. Only the value
of a coalition depends on the function and on the estimand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from neuropil.interpret._shapley_functions import (
    ROWS_AT_ONCE,
    Function,
    as_function,
    in_batches,
    is_linear,
    is_tree,
    is_xgboost,
    require,
    tree_output,
)

EXACT_PLAYERS = 12
METHODS = ("auto", "exact", "kernel", "permutation", "tree", "linear")
ESTIMANDS = ("interventional", "gaussian")

Groups = Mapping[str, Sequence[int]] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class ShapleyValues:
    """Contributions `values` `[n, players]` (`[n, players, k]` where the function has k outputs) to `outputs` `[n]`.

    `base` is the value of knowing nothing, so that `base + values.sum(1)` is `outputs`; `gap` is the largest error in
    that, which only floating point and float32 trees leave above 0.
    """

    values: np.ndarray
    base: np.ndarray
    outputs: np.ndarray
    players: tuple[str, ...]
    method: str
    estimand: str

    @property
    def gap(self) -> float:
        return float(np.abs(self.base + self.values.sum(1) - self.outputs).max(initial=0.0))

    @property
    def importance(self) -> np.ndarray:
        """Mean |value| over rows, `[players]` or `[players, k]`."""
        return np.abs(self.values).mean(0)


def shapley(
    f: Any,
    X: Any,
    background: Any,
    *,
    groups: Groups | None = None,
    method: str = "auto",
    estimand: str = "interventional",
    budget: int | None = None,
    names: Sequence[str] | None = None,
    random_state: int = 0,
) -> ShapleyValues:
    r"""What each column of each row of `X` `[n, m]` adds to f, against the rows of `background` `[b, m]`.

    $$\phi_i = \sum_{S \not\ni i} \frac{|S|!\,(M-|S|-1)!}{M!}\,[v(S \cup i) - v(S)], \qquad
    v(S) = E_{z \sim background}\, f(x_S, z_{\bar S})$$

    >>> both = shapley(lambda x: x[:, 0] * x[:, 1], np.ones((1, 2)), np.zeros((1, 2)))
    >>> both.values, both.method
    (array([[0.5, 0.5]]), 'exact')

    Parameters
    ----------
    f: a function of rows `[r, m]` that gives `[r]` or `[r, k]`; a torch module, which is called in evaluation mode and
        left as it was; or a fitted tree, forest, XGBoost or linear model of scikit-learn's convention. Of classifiers
        XGBoost and linear models are explained on the scale of log-odds, trees and forests as probabilities; of two
        classes the second.
    groups: players that hold several columns, toggled together; they must cover every column once.
    method: "exact" (up to 12 players), "kernel" (KernelSHAP: weighted least squares under the efficiency constraint,
        exact where `budget` allows all coalitions), "permutation" (each background row with an order of its own and
        its reverse: unbiased, efficient without a constraint), "tree" (shap's interventional TreeSHAP), "linear"
        (closed form) or "auto": the model's own form where it has one, else exact, else permutation.
    estimand: "interventional", or "gaussian": v(S) = E f(x_S, Z) with Z drawn given x_S from the normal distribution
        of the background, which keeps correlated columns on their manifold ("exact" and "kernel" only).
    budget: coalitions a row: "kernel" 2 m + 2048, "permutation" 2 m (one order a background row) if None.

    Raises ValueError for input that is not a table of finite numbers where f needs them, unknown settings and groups
    that do not cover the columns once; MissingExtra where "tree" needs shap.
    """
    X, background = _tables(X, background)
    members, players = _players(groups, names, X.shape[1])
    method = _method(f, method, estimand, groups, len(members))
    if method == "linear":
        return _linear(f, X, background, members, players)
    if method == "tree":
        return _tree(f, X, background, players)
    function, flat = as_function(f, X[:1])
    rng = np.random.default_rng(random_state)
    outputs = in_batches(function, X)
    if method == "permutation":
        orders = max(1, (budget or 0) // (2 * len(members)))
        values = np.stack([_walks(function, x, background, members, orders, rng) for x in X])
        base = in_batches(function, background).mean(0)
    else:
        masks, weights = exact_design(len(members)) if method == "exact" else kernel_design(len(members), budget, rng)
        of_columns = masks[:, _owners(members, X.shape[1])]
        value = _interventional if estimand == "interventional" else _gaussian
        v = value(function, X, background, of_columns, rng)
        values, base = np.einsum("pc,nck->npk", weights, v), v[0, 0]
    if flat:
        values, base, outputs = values[..., 0], base[0], outputs[:, 0]
    return ShapleyValues(values, np.asarray(base), outputs, players, method, estimand)


# --- designs: coalitions, and the matrix that turns their values into Shapley values ----------------------------


def exact_design(players: int) -> tuple[Bool[np.ndarray, "c p"], Float[np.ndarray, "p c"]]:
    """All 2^p coalitions (the first empty, the last whole) and the weights of the definition."""
    masks = np.array(list(itertools.product([False, True], repeat=players))).reshape(-1, players)
    size = masks.sum(1)
    fact = [math.factorial(k) for k in range(players + 1)]
    joins = np.array([fact[s - 1] * fact[players - s] / fact[players] if s else 0.0 for s in size])
    leaves = np.array([fact[s] * fact[players - s - 1] / fact[players] if s < players else 0.0 for s in size])
    return masks, np.where(masks, joins[:, None], -leaves[:, None]).T


def kernel_design(
    players: int, budget: int | None, rng: np.random.Generator
) -> tuple[Bool[np.ndarray, "c p"], Float[np.ndarray, "p c"]]:
    """Coalitions within `budget` (the first empty, the last whole) and the solution of their weighted least squares.

    Whole sizes are taken from the outside in, for as long as they fit; what is left of the budget goes to coalitions
    drawn from the other sizes, each with its complement. Raises ValueError for a budget below 2 p.
    """
    budget = 2 * players + 2048 if budget is None else budget
    ends = np.zeros((2, players), dtype=bool)
    ends[1] = True
    if players == 1:
        return ends, np.array([[-1.0, 1.0]])
    if budget < 2 * players:
        raise ValueError(f"budget={budget}; {players} players need at least {2 * players} coalitions")
    masks, weights = _coalitions(players, budget, rng)
    z = masks.astype(np.float64)
    gram = np.linalg.inv((z.T * weights) @ z)
    solved = gram @ (z.T * weights)
    share = gram.sum(1) / gram.sum()
    inner = solved - np.outer(share, solved.sum(0))
    matrix = np.column_stack([-inner.sum(1) - share, inner, share])
    return np.concatenate([ends[:1], masks, ends[1:]]), matrix


def _coalitions(
    players: int, budget: int, rng: np.random.Generator
) -> tuple[Bool[np.ndarray, "c p"], Float[np.ndarray, " c"]]:
    masks: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    sizes = list(range(1, players // 2 + 1))  # with their complements
    used = 0
    while sizes:
        size = sizes[0]
        pair = {size, players - size}
        count = len(pair) * math.comb(players, size)
        if used + count > budget:
            break
        chosen = np.array(list(itertools.combinations(range(players), size)))
        half = np.zeros((len(chosen), players), dtype=bool)
        np.put_along_axis(half, chosen, True, axis=1)
        masks += [half, ~half][: len(pair)]
        weights.append(np.full(count, (players - 1) / (size * (players - size)) / math.comb(players, size)))
        used += count
        del sizes[0]
    draws = (budget - used) // 2
    if sizes and draws:
        mass = np.array([len({s, players - s}) * (players - 1) / (s * (players - s)) for s in sizes])
        drawn = rng.choice(sizes, size=draws, p=mass / mass.sum())
        half = rng.random((draws, players)).argsort(1).argsort(1) < drawn[:, None]
        both, times = np.unique(np.concatenate([half, ~half]), axis=0, return_counts=True)
        masks.append(both)
        weights.append(times * mass.sum() / (2 * draws))
    return np.concatenate(masks), np.concatenate(weights)


# --- the value of coalitions --------------------------------------------------------------------------------------


def _interventional(
    f: Function, X: np.ndarray, background: np.ndarray, masks: np.ndarray, rng: np.random.Generator
) -> Float[np.ndarray, "n c k"]:
    """Mean of f over the background, its columns in the coalition replaced by the row's."""
    step = max(1, ROWS_AT_ONCE // len(background))
    out = []
    for x in X:
        parts = []
        for start in range(0, len(masks), step):
            mask = masks[start : start + step, None]
            rows = np.where(mask, x, background).reshape(-1, X.shape[1])
            parts.append(f(rows).reshape(mask.shape[0], len(background), -1).mean(1))
        out.append(np.concatenate(parts))
    return np.stack(out)


def _gaussian(
    f: Function, X: np.ndarray, background: np.ndarray, masks: np.ndarray, rng: np.random.Generator
) -> Float[np.ndarray, "n c k"]:
    """Mean of f over as many normal draws as the background has rows, given the columns of the coalition."""
    mean, m = background.mean(0), X.shape[1]
    covariance = np.atleast_2d(np.cov(background, rowvar=False)) if len(background) > 1 else np.zeros((m, m))
    noise = rng.standard_normal(background.shape)
    noise -= noise.mean(0)  # so that linear functions come out exactly
    out = []
    for known in masks:
        hidden = ~known
        rows = np.repeat(X[:, None], len(background), axis=1)
        slope = covariance[np.ix_(hidden, known)] @ np.linalg.pinv(covariance[np.ix_(known, known)], hermitian=True)
        left = covariance[np.ix_(hidden, hidden)] - slope @ covariance[np.ix_(known, hidden)]
        scale, axes = np.linalg.eigh((left + left.T) / 2)
        spread = noise[:, hidden] @ (axes * np.sqrt(np.clip(scale, 0, None))).T
        rows[:, :, hidden] = (mean[hidden] + (X - mean)[:, known] @ slope.T)[:, None] + spread
        out.append(in_batches(f, rows.reshape(-1, m)).reshape(len(X), len(background), -1).mean(1))
    return np.stack(out, axis=1)


def _walks(
    f: Function,
    x: np.ndarray,
    background: np.ndarray,
    members: list[np.ndarray],
    orders: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "p k"]:
    """Mean gain of each player when background rows become x, player by player, in random orders and their reverse."""
    players, m = len(members), len(x)
    owners = _owners(members, m)
    background = np.repeat(background, orders, axis=0)
    total: Any = 0.0
    step = max(1, ROWS_AT_ONCE // (players + 1))
    for start in range(0, len(background), step):
        z = background[start : start + step]
        place = rng.random((len(z), players)).argsort(1)  # when each player joins
        for joins in (place, players - 1 - place):
            known = joins[:, None, owners] < np.arange(players + 1)[:, None]
            path = f(np.where(known, x, z[:, None]).reshape(-1, m)).reshape(len(z), players + 1, -1)
            gains = np.take_along_axis(np.diff(path, axis=1), joins[..., None], axis=1)
            total = total + gains.sum(0)
    return total / (2 * len(background))


# --- models with a form of their own ------------------------------------------------------------------------------


def _linear(
    f: Any, X: np.ndarray, background: np.ndarray, members: list[np.ndarray], players: tuple[str, ...]
) -> ShapleyValues:
    """w_i (x_i - mean of the background), which is the definition for a linear function."""
    w = np.atleast_2d(np.asarray(f.coef_, dtype=np.float64))
    b = np.atleast_1d(np.asarray(f.intercept_, dtype=np.float64))
    each = (X - background.mean(0))[:, :, None] * w.T
    values = np.stack([each[:, group].sum(1) for group in members], axis=1)
    base, outputs = background.mean(0) @ w.T + b, X @ w.T + b
    if len(w) == 1:
        values, base, outputs = values[..., 0], base[0], outputs[:, 0]
    return ShapleyValues(values, np.asarray(base), outputs, players, "linear", "interventional")


def _tree(f: Any, X: np.ndarray, background: np.ndarray, players: tuple[str, ...]) -> ShapleyValues:
    """Interventional TreeSHAP. Rows are rounded to float32 first, as the models themselves do."""
    shap = require("shap")
    X, background = (rows.astype(np.float32).astype(np.float64) for rows in (X, background))
    model, tables = (f, [X, background]) if is_xgboost(f) else _ranked(f, [X, background])
    explainer = shap.TreeExplainer(model, data=tables[1], feature_perturbation="interventional", model_output="raw")
    values = np.asarray(explainer.shap_values(tables[0], check_additivity=False), dtype=np.float64)
    outputs = tree_output(f, X)
    # Not the explainer's expected value: with several classes it leaves out XGBoost's base score of each.
    base = np.asarray(tree_output(f, background).mean(0))
    values = values.reshape(*X.shape, *outputs.shape[1:])
    return ShapleyValues(values, base, outputs, players, "tree", "interventional")


def _ranked(model: Any, tables: list[np.ndarray]) -> tuple[Any, list[np.ndarray]]:
    """A tree or forest of scikit-learn for shap, and tables for it, with whole numbers for thresholds and values.

    A value becomes the number of the column's thresholds below it, a threshold its place among them, so that every
    comparison comes out as before. On the numbers themselves shap (0.51) errs where a value of the background touches a
    threshold: by 0.3 on diabetes, whatever float type it is given.
    """
    fitted = [tree.tree_ for tree in np.ravel(getattr(model, "estimators_", model))]
    cuts = {
        j: np.unique(np.concatenate([tree.threshold[tree.feature == j] for tree in fitted]))
        for j in range(tables[0].shape[1])
    }
    trees = []
    for tree in fitted:
        values = tree.value[:, 0]
        if hasattr(model, "classes_"):
            values = values / values.sum(1, keepdims=True)
            values = values[:, 1:] if values.shape[1] == 2 else values
        inner = tree.feature >= 0
        thresholds = np.zeros(len(inner))
        for j, places in cuts.items():
            here = tree.feature == j
            thresholds[here] = np.searchsorted(places, tree.threshold[here])
        trees.append(
            {
                "children_left": tree.children_left,
                "children_right": tree.children_right,
                "children_default": tree.children_left,
                "features": np.where(inner, tree.feature, 0),
                "thresholds": thresholds,
                "values": values / len(fitted),
                "node_sample_weight": tree.weighted_n_node_samples.copy(),  # shap writes into it
            }
        )
    ranks = [
        np.column_stack([np.searchsorted(cuts[j], rows[:, j]) for j in cuts]).astype(np.float64) for rows in tables
    ]
    return {"trees": trees}, ranks


# --- what is given ------------------------------------------------------------------------------------------------


def _tables(X: Any, background: Any) -> tuple[np.ndarray, np.ndarray]:
    try:
        X, background = (np.asarray(rows, dtype=np.float64) for rows in (X, background))
    except (TypeError, ValueError) as error:
        raise ValueError(f"shapley takes tables of numbers ({error}); code categories as numbers first") from None
    if X.ndim != 2 or background.ndim != 2 or X.shape[1] != background.shape[1] or not len(X) or not len(background):
        raise ValueError(
            f"X {X.shape} and background {background.shape}; expected [n, m] and [b, m] with at least a row each"
        )
    return X, background


def _players(groups: Groups | None, names: Sequence[str] | None, m: int) -> tuple[list[np.ndarray], tuple[str, ...]]:
    columns = tuple(map(str, range(m))) if names is None else tuple(map(str, names))
    if len(columns) != m:
        raise ValueError(f"{len(columns)} names for {m} columns")
    if groups is None:
        return [np.array([i]) for i in range(m)], columns
    named = groups if isinstance(groups, Mapping) else {" + ".join(columns[i] for i in g): g for g in groups}
    members = [np.asarray(group, dtype=int) for group in named.values()]
    if sorted(np.concatenate([*members, np.empty(0, int)]).tolist()) != list(range(m)) or not all(map(len, members)):
        raise ValueError(f"groups {[g.tolist() for g in members]}; expected each of the columns 0 to {m - 1} once")
    return members, tuple(named)


def _owners(members: list[np.ndarray], m: int) -> Int[np.ndarray, " m"]:
    owners = np.empty(m, dtype=int)
    for player, group in enumerate(members):
        owners[group] = player
    return owners


def _method(f: Any, method: str, estimand: str, groups: Groups | None, players: int) -> str:
    if method not in METHODS or estimand not in ESTIMANDS:
        raise ValueError(
            f"method={method!r}, estimand={estimand!r}; expected one of {', '.join(METHODS)} and one of "
            f"{', '.join(ESTIMANDS)}"
        )
    if method == "auto":
        own = {"tree": is_tree(f) and groups is None, "linear": is_linear(f)}
        fitting = [name for name, fits in own.items() if fits and estimand == "interventional"]
        sampled = "permutation" if estimand == "interventional" else "kernel"
        method = (fitting or ["exact" if players <= EXACT_PLAYERS else sampled])[0]
    if method == "exact" and players > EXACT_PLAYERS:
        raise ValueError(f"method='exact' with {players} players; at most {EXACT_PLAYERS}, 'kernel' takes more")
    if estimand == "gaussian" and method not in ("exact", "kernel"):
        raise ValueError(f"method={method!r} has no Gaussian form; use 'exact' or 'kernel'")
    if (method == "tree" and (groups is not None or not is_tree(f))) or (method == "linear" and not is_linear(f)):
        raise ValueError(f"method={method!r} does not fit {type(f).__name__}{' with groups' if groups else ''}")
    return method
