"""Shapley values against their definition, shap and closed forms; aspects, selection and the whole workflow."""

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import shap
import torch
import xgboost
from scipy.stats import spearmanr, ttest_1samp
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.feature_selection import SequentialFeatureSelector
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import get_scorer, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import NearestCentroid
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from neuropil.errors import MissingExtra
from neuropil.interpret import _shapley_functions as functions_module
from neuropil.interpret import _shapley_values as values_module
from neuropil.interpret._shapley_importance import directions
from neuropil.interpret._shapley_models import ColumnModel, cross_validated
from neuropil.interpret._shapley_scores import classification_scores, regression_scores
from neuropil.interpret._shapley_select import strongest
from neuropil.interpret._shapley_table import other_units
from neuropil.interpret.shapley import (
    CohortError,
    ShapleyWorkflow,
    aspects,
    corrected_t_test,
    delong,
    forward_selection,
    importance_agreement,
    mcnemar,
    permutation_importance,
    shapley,
)

SMALL = {"selector": None, "search": 0, "cv": 2, "inner_cv": 2, "background": 10, "explain_rows": 10}
ACCURACY = get_scorer("accuracy")


def specimen(seed: int = 0) -> tuple[ShapleyWorkflow, np.ndarray, np.ndarray]:
    """The two readable models on the first 150 tumours."""
    X, y = load_breast_cancer(return_X_y=True)
    return ShapleyWorkflow(["tree", "logistic"], random_state=seed, **SMALL), X[:150, :8], y[:150]


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def curved(x: np.ndarray) -> np.ndarray:
    """Interactions of every order among the first columns; the last column plays no part."""
    return np.tanh(x[:, :-1].sum(1)) + x[:, 0] * x[:, 1] * x[:, 2]


def by_definition(f: Any, x: np.ndarray, background: np.ndarray) -> np.ndarray:
    """The sum over coalitions, term by term."""
    m = len(x)

    def v(coalition: tuple[int, ...]) -> float:
        rows = background.copy()
        rows[:, list(coalition)] = x[list(coalition)]
        return float(f(rows).mean())

    phi = np.zeros(m)
    for i in range(m):
        others = [j for j in range(m) if j != i]
        for size in range(m):
            weight = math.factorial(size) * math.factorial(m - size - 1) / math.factorial(m)
            for s in itertools.combinations(others, size):
                phi[i] += weight * (v((*s, i)) - v(s))
    return phi


# --- Shapley values ------------------------------------------------------------------------------------------------


def test_enumeration_is_the_definition() -> None:
    X, background = draw(0, 3, 5), draw(1, 7, 5)
    found = shapley(curved, X, background, method="exact")
    np.testing.assert_allclose(found.values, [by_definition(curved, x, background) for x in X], atol=1e-12)


@pytest.mark.parametrize(("method", "limit"), [("exact", 1e-10), ("kernel", 1e-6), ("permutation", 1e-10)])
@pytest.mark.parametrize("estimand", ["interventional", "gaussian"])
def test_values_add_up_to_the_output(method: str, limit: float, estimand: str) -> None:
    if (method, estimand) == ("permutation", "gaussian"):
        pytest.skip("refused, see below")
    X, background = draw(0, 4, 7), draw(1, 20, 7)
    found = shapley(curved, X, background, method=method, estimand=estimand, budget=40)
    np.testing.assert_allclose(found.values.sum(1), curved(X) - found.base, atol=limit)
    assert found.gap < limit
    if estimand == "interventional":
        assert found.base == pytest.approx(curved(background).mean(), abs=1e-12)


@pytest.mark.parametrize("method", ["exact", "kernel", "permutation"])
def test_an_unused_column_gets_nothing(method: str) -> None:
    found = shapley(curved, draw(0, 4, 6), draw(1, 9, 6), method=method)
    assert np.abs(found.values[:, -1]).max() < 1e-12
    assert np.abs(found.values[:, :-1]).min() > 1e-6


@pytest.mark.parametrize("method", ["exact", "kernel"])
def test_columns_used_alike_get_alike(method: str) -> None:
    X, background = draw(0, 4, 5), draw(1, 9, 5)
    X[:, 1], background[:, 1] = X[:, 0], background[:, 0]
    values = shapley(lambda x: np.sin(x[:, 0] + x[:, 1]) * x[:, 2] + x[:, 3], X, background, method=method).values
    np.testing.assert_allclose(values[:, 0], values[:, 1], atol=1e-12)


@pytest.mark.parametrize("method", ["exact", "kernel", "permutation"])
def test_values_are_linear_in_the_function(method: str) -> None:
    X, background = draw(0, 3, 6), draw(1, 9, 6)

    def other(x: np.ndarray) -> np.ndarray:
        return np.cos(x).prod(1)

    both = shapley(lambda x: 2 * curved(x) - 3 * other(x), X, background, method=method).values
    parts = [shapley(f, X, background, method=method).values for f in (curved, other)]
    np.testing.assert_allclose(both, 2 * parts[0] - 3 * parts[1], atol=1e-10)


@pytest.mark.parametrize("method", ["exact", "kernel", "permutation"])
def test_a_linear_function_has_its_closed_form(method: str) -> None:
    w, X, background = draw(2, 6), draw(0, 4, 6), draw(1, 9, 6)
    found = shapley(lambda x: x @ w + 0.3, X, background, method=method)
    np.testing.assert_allclose(found.values, w * (X - background.mean(0)), atol=1e-10)


def test_linear_models_are_explained_on_their_margin() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    X = (X[:, :6] - X[:, :6].mean(0)) / X[:, :6].std(0)
    model = LogisticRegression().fit(X, y)
    found = shapley(model, X[:5], X[:40])
    assert found.method == "linear"
    np.testing.assert_allclose(found.values, model.coef_[0] * (X[:5] - X[:40].mean(0)), atol=1e-10)
    np.testing.assert_allclose(found.outputs, model.decision_function(X[:5]), atol=1e-12)
    by_enumeration = shapley(model.decision_function, X[:5], X[:40], method="exact")
    np.testing.assert_allclose(found.values, by_enumeration.values, atol=1e-10)
    several = LogisticRegression().fit(*load_wine(return_X_y=True))
    rows = load_wine().data[:4]
    assert shapley(several, rows, rows).values.shape == (4, 13, 3)


def test_kernel_shap_with_every_coalition_is_enumeration() -> None:
    X, background = draw(0, 3, 8), draw(1, 10, 8)
    exact = shapley(curved, X, background, method="exact").values
    np.testing.assert_allclose(shapley(curved, X, background, method="kernel", budget=254).values, exact, atol=1e-8)
    few = shapley(curved, X, background, method="kernel", budget=100).values
    assert 1e-8 < np.abs(few - exact).max() < 0.1


def test_kernel_shap_is_shaps() -> None:
    X, background = draw(0, 2, 6), draw(1, 10, 6)
    theirs = shap.KernelExplainer(curved, background).shap_values(X, nsamples=1000, silent=True)
    np.testing.assert_allclose(shapley(curved, X, background, method="kernel").values, theirs, atol=1e-6)


def test_one_column_gets_everything() -> None:
    X, background = draw(0, 3, 1), draw(1, 5, 1)
    for method in ("exact", "kernel", "permutation"):
        found = shapley(lambda x: x[:, 0] ** 3, X, background, method=method).values
        np.testing.assert_allclose(found[:, 0], X[:, 0] ** 3 - (background**3).mean(), atol=1e-12)


@pytest.mark.parametrize("method", ["exact", "kernel", "permutation"])
def test_and_shares_xor_cancels(method: str) -> None:
    one, zeros = np.ones((1, 2)), np.zeros((1, 2))
    both = shapley(lambda x: x[:, 0] * x[:, 1], one, zeros, method=method)
    np.testing.assert_allclose(both.values, [[0.5, 0.5]], atol=1e-12)
    either = shapley(lambda x: x[:, 0] + x[:, 1] - 2 * x[:, 0] * x[:, 1], one, zeros, method=method)
    np.testing.assert_allclose(either.values, [[0, 0]], atol=1e-12)


def test_sampling_is_unbiased() -> None:
    X, background = draw(0, 2, 6), draw(1, 12, 6)
    exact = shapley(curved, X, background, method="exact").values
    few = shapley(curved, X, background, method="permutation").values
    many = shapley(curved, X, background, method="permutation", budget=12 * 400).values
    assert np.abs(many - exact).max() < 0.01
    assert np.abs(many - exact).max() < np.abs(few - exact).max()


MODELS = {
    "forest": RandomForestClassifier(12, max_depth=4, random_state=0),
    "tree": DecisionTreeClassifier(max_depth=4, random_state=0),
    "regression forest": RandomForestRegressor(12, max_depth=4, random_state=0),
    "xgboost": xgboost.XGBClassifier(n_estimators=12, max_depth=3, n_jobs=1),
    "xgboost regression": xgboost.XGBRegressor(n_estimators=12, max_depth=3, n_jobs=1),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("classes", [2, 3])
def test_tree_shap_is_enumeration_and_shaps(name: str, classes: int) -> None:
    X = draw(0, 200, 5).astype(np.float32).astype(np.float64)
    y = (curved(X) > 0).astype(int) + (X[:, 3] > 1 if classes == 3 else 0)
    model = MODELS[name].fit(X, y)
    rows, background = X[:6], X[50:70]
    before = model.feature_importances_.copy(), model.predict(X)
    found = shapley(model, rows, background)
    np.testing.assert_array_equal(model.feature_importances_, before[0], "explaining changed the model")
    np.testing.assert_array_equal(model.predict(X), before[1])
    assert found.method == "tree"
    exact = shapley(lambda x: functions_module.tree_output(model, x), rows, background, method="exact")
    np.testing.assert_allclose(found.values, exact.values, atol=1e-6)
    np.testing.assert_allclose(found.base, exact.base, atol=1e-6)
    assert found.gap < 1e-5
    explainer = shap.TreeExplainer(model, background, feature_perturbation="interventional")
    theirs = explainer.shap_values(rows, check_additivity=False)
    one_of_two = classes == 2 and "xgboost" not in name and "regression" not in name
    np.testing.assert_allclose(found.values, theirs[..., 1] if one_of_two else theirs, atol=1e-6)


def test_tree_shap_holds_where_values_touch_thresholds() -> None:
    """Training rows of a table with ties, on which shap's own sums are wrong."""
    X, y = load_diabetes(return_X_y=True)
    X = X[:, [2, 3, 7, 8, 9]]
    forest = RandomForestRegressor(20, min_samples_leaf=2, random_state=0).fit(X[:200], y[:200])
    found = shapley(forest, X[20:26], X[:10])
    np.testing.assert_allclose(found.outputs, forest.predict(X[20:26]), atol=1e-9)
    exact = shapley(forest.predict, X[20:26], X[:10], method="exact")
    np.testing.assert_allclose(found.values, exact.values, atol=1e-4)


def test_groups_are_players() -> None:
    X, background = draw(0, 3, 4), draw(1, 8, 4)
    single = shapley(curved, X, background)
    alone = shapley(curved, X, background, groups=[[0], [1], [2], [3]])
    np.testing.assert_array_equal(single.values, alone.values)
    whole = shapley(curved, X, background, groups={"all": [0, 1, 2, 3]})
    assert whole.players == ("all",)
    np.testing.assert_allclose(whole.values[:, 0], curved(X) - curved(background).mean(), atol=1e-12)

    def additive(x: np.ndarray) -> np.ndarray:
        return np.sin(x).sum(1)

    for method in ("exact", "kernel", "permutation"):
        together = shapley(additive, X, background, groups=[[0, 2], [1, 3]], method=method).values
        of_each = shapley(additive, X, background, method="exact").values
        np.testing.assert_allclose(together, of_each[:, [0, 1]] + of_each[:, [2, 3]], atol=1e-10)


def test_an_interaction_is_split_across_groups_and_not_inside_one() -> None:
    one, zeros = np.ones((1, 3)), np.zeros((1, 3))

    def both(x: np.ndarray) -> np.ndarray:
        return x[:, 0] * x[:, 1] + x[:, 2]

    np.testing.assert_allclose(shapley(both, one, zeros, groups=[[0, 1], [2]]).values, [[1, 1]], atol=1e-12)
    np.testing.assert_allclose(shapley(both, one, zeros, groups=[[0, 2], [1]]).values, [[1.5, 0.5]], atol=1e-12)


def test_the_gaussian_estimand_of_a_linear_function() -> None:
    """v(S) is linear in what is known, so that Shapley values follow from conditional means alone."""
    background = draw(1, 4000, 3) @ draw(3, 3, 3)
    w, x = np.array([1.0, -2.0, 0.5]), draw(0, 1, 3)
    mean, covariance = background.mean(0), np.cov(background, rowvar=False)

    def v(known: tuple[int, ...]) -> float:
        k = list(known)
        guess = mean + covariance[:, k] @ np.linalg.solve(covariance[np.ix_(k, k)], (x[0] - mean)[k]) if k else mean
        return float(guess @ w)

    wanted = np.zeros(3)
    for order in itertools.permutations(range(3)):
        for step in range(3):
            wanted[order[step]] += (v(order[: step + 1]) - v(order[:step])) / 6
    for method in ("exact", "kernel"):
        found = shapley(lambda rows: rows @ w, x, background, estimand="gaussian", method=method)
        np.testing.assert_allclose(found.values[0], wanted, atol=1e-9)
    copied = np.column_stack([background[:, 0], background[:, 0]])  # a copy that f does not read shares the credit
    shared = shapley(lambda rows: rows[:, 0], copied[:1], copied, estimand="gaussian").values[0]
    np.testing.assert_allclose(shared, (copied[0, 0] - mean[0]) / 2, atol=1e-9)


def test_a_torch_module_is_called_in_evaluation_mode_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)).train()
    net[1].eval()
    modes = [part.training for part in net.modules()]
    X, background = draw(0, 2, 4), draw(1, 6, 4)
    found = shapley(net, X, background)
    assert found.values.shape == (2, 4, 3)
    assert found.importance.shape == (4, 3)
    assert found.gap < 1e-6
    assert [part.training for part in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters())
    one = shapley(lambda x: net.eval()(torch.as_tensor(x).float())[:, 1].detach(), X, background)
    np.testing.assert_allclose(found.values[..., 1], one.values, atol=1e-6)


def test_large_tables_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    X, background = draw(0, 3, 6), draw(1, 9, 6)
    for method in ("exact", "kernel", "permutation"):
        whole = shapley(curved, X, background, method=method, budget=62).values
        for module in (values_module, functions_module):
            monkeypatch.setattr(module, "ROWS_AT_ONCE", 20)
        rng_matters = method == "permutation"  # parts draw their orders in turn
        parts = shapley(curved, X, background, method=method, budget=62).values
        monkeypatch.undo()
        np.testing.assert_allclose(parts, whole, atol=1.0 if rng_matters else 1e-12)
        np.testing.assert_allclose(parts.sum(1), whole.sum(1), atol=1e-10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "gradient"}, "expected one of auto, exact"),
        ({"estimand": "causal"}, "interventional, gaussian"),
        ({"groups": [[0], [0, 1]]}, "each of the columns 0 to 3 once"),
        ({"names": ["a"]}, "1 names for 4 columns"),
        ({"method": "kernel", "budget": 3}, "need at least 8"),
        ({"method": "permutation", "estimand": "gaussian"}, "no Gaussian form"),
        ({"method": "tree"}, "does not fit"),
        ({"background": np.zeros((0, 4))}, "at least a row"),
        ({"background": np.zeros((3, 2))}, r"expected \[n, m\]"),
        ({"X": np.array([["a"] * 4])}, "code categories"),
        ({"f": Ridge()}, "no function of rows"),
        ({"f": lambda x: x[:2]}, r"expected \[\d+\]"),
    ],
)
def test_what_cannot_be_explained_is_refused(given: dict[str, Any], message: str) -> None:
    call = {"f": curved, "X": np.ones((2, 4)), "background": np.zeros((3, 4)), **given}
    with pytest.raises(ValueError, match=message):
        shapley(call.pop("f"), call.pop("X"), call.pop("background"), **call)


def test_thirteen_players_are_too_many_to_enumerate() -> None:
    with pytest.raises(ValueError, match="at most 12"):
        shapley(curved, np.ones((1, 13)), np.zeros((2, 13)), method="exact")
    assert shapley(curved, np.ones((1, 13)), np.zeros((2, 13))).method == "permutation"
    assert shapley(curved, np.ones((1, 13)), draw(0, 9, 13), estimand="gaussian", budget=60).method == "kernel"


@pytest.mark.parametrize("name", ["shap", "xgboost", "pandas"])
def test_a_missing_library_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    X, y = draw(0, 20, 2), [0, 1] * 10
    tree = DecisionTreeClassifier().fit(X, y)
    use = (lambda: shapley(tree, X, X)) if name == "shap" else ShapleyWorkflow(["xgboost"], **SMALL).fit
    with pytest.raises(MissingExtra, match=rf"{name} is needed here.*neuropil\[shapley\]"):
        use(*(() if name == "shap" else (X, y)))


# --- aspects -------------------------------------------------------------------------------------------------------


def test_every_pair_of_an_aspect_is_correlated_enough() -> None:
    X, _ = load_breast_cancer(return_X_y=True)
    for h in (0.5, 0.7, 0.9):
        found = aspects(X, h)
        r = np.abs(spearmanr(X).statistic)
        np.testing.assert_allclose(np.abs(found.correlation), r, atol=1e-12)
        assert sorted(itertools.chain(*found.groups)) == list(range(30))
        assert any(len(group) > 1 for group in found.groups)
        for group in found.groups:
            assert r[np.ix_(group, group)].min() >= h - 1e-8
    assert aspects(X, 1.01).groups == tuple((i,) for i in range(30))
    assert aspects(X, 0).groups == (tuple(range(30)),)


def test_aspects_know_nothing_of_scale_sign_or_order() -> None:
    X, _ = load_breast_cancer(return_X_y=True)
    X = X[:, :10]
    wanted = {frozenset(group) for group in aspects(X, 0.7).groups}
    changed = X.copy()
    changed[:, ::2] = -np.exp(changed[:, ::2] / changed[:, ::2].max(0))
    assert {frozenset(group) for group in aspects(changed, 0.7).groups} == wanted
    order = np.random.default_rng(0).permutation(10)
    mixed = aspects(X[:, order], 0.7)
    assert {frozenset(order[list(group)].tolist()) for group in mixed.groups} == wanted


def test_gaps_constants_and_nominal_columns() -> None:
    X = draw(0, 200, 3)
    X = np.column_stack([X, X[:, 0] * 3, np.ones(200), X[:, 0]])
    X[::7, 3], X[::5, 1] = np.nan, np.nan
    found = aspects(X, 0.7, nominal=[5])
    assert set(found.groups) == {(0, 3), (1,), (2,), (4,), (5,)}
    seen = ~np.isnan(X[:, 1]) & ~np.isnan(X[:, 3])
    assert found.correlation[1, 3] == pytest.approx(spearmanr(X[seen, 1], X[seen, 3]).statistic)
    assert found.correlation[0, 4] == 0
    assert aspects(X[:, :1]).groups == ((0,),)
    with pytest.raises(ValueError, match="at least two rows"):
        aspects(X[:1])


def test_a_copied_column_shares_importance_and_its_aspect_has_it_all() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    X = X[:, [20, 21, 24]].astype(np.float32).astype(np.float64)
    copied = np.column_stack([X, X[:, 0]])
    rows = X[::12]

    def importance(table: np.ndarray, groups: Any = None) -> np.ndarray:
        forest = RandomForestClassifier(200, min_samples_leaf=5, max_features=1.0, random_state=0).fit(table, y)
        return shapley(forest, table[::12], table[:30], groups=groups).importance

    single = importance(X)
    found = aspects(copied, 1.0)
    assert found.groups == ((0, 3), (1,), (2,))
    split = importance(copied)
    merged = importance(copied, found.groups)
    assert len(rows) > 40
    assert max(split[0], split[3]) < 0.8 * single[0]
    assert merged[0] == pytest.approx(single[0], abs=0.02)


def test_merges_end_with_all_columns_and_fall_in_correlation() -> None:
    X, _ = load_breast_cancer(return_X_y=True)
    found = aspects(X, 0.7)
    merges = found.at_merges([3, 0, 2, 7])
    assert merges[-1][1] == [0, 1, 2, 3]
    assert merges[0][1] == [0, 2] or merges[0][1] == [1, 2] or merges[0][1] == [0, 1]
    heights = [r for r, _ in merges]
    assert heights == sorted(heights, reverse=True)
    assert found.within([0, 2]) == {f"{found.names[0]} + {found.names[2]}": [0, 1]}


# --- importances ---------------------------------------------------------------------------------------------------


def test_permutation_importance_of_unused_and_of_only_columns() -> None:
    y = np.repeat([0, 1], 100)
    X = np.column_stack([y, draw(0, 200)])

    def score(rows: np.ndarray, truth: np.ndarray) -> float:
        return float(((rows[:, 0] > 0.5) == truth).mean())

    drops = permutation_importance(score, X, y, repeats=50)
    assert (drops[1] == 0).all()
    assert drops[0].mean() == pytest.approx(1 - 0.5, abs=0.05)
    together = permutation_importance(score, X, y, groups=[[0, 1]], repeats=50)
    np.testing.assert_array_equal(together[0], drops[0])
    with pytest.raises(ValueError, match="at least 1"):
        permutation_importance(score, X, y, repeats=0)


def test_agreement_of_importances() -> None:
    a = draw(0, 12) ** 2
    same = importance_agreement(a, 2 * a)
    assert same.pearson == pytest.approx(1)
    assert (same.spearman, same.kendall) == pytest.approx((1, 1))
    assert (same.strength, same.top_overlap) == ("strong", 1.0)
    b = a + draw(1, 12)
    found = importance_agreement(a, b)
    assert found.spearman == pytest.approx(spearmanr(a, b).statistic)
    assert found.pearson == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert found.spearman_low < found.spearman < found.spearman_high
    assert importance_agreement(a, b) == found
    for nothing in ([1.0, 2.0], [1.0, 1.0, 1.0], [1.0, np.nan, 2.0]):
        unknown = importance_agreement(nothing, nothing)
        assert math.isnan(unknown.spearman)
        assert unknown.strength == "unknown"
    with pytest.raises(ValueError, match="one length"):
        importance_agreement(a, a[:3])


def test_directions_say_where_large_values_push() -> None:
    X = draw(0, 60, 3)
    values = np.column_stack([2 * X[:, 0], -X[:, 1], np.zeros(60)])
    X[5, 0] = np.nan
    found = directions(values, X)
    np.testing.assert_allclose(found[:2], [1, -1], atol=1e-12)
    assert np.isnan(found[2])


def test_natural_importances_are_the_models_own() -> None:
    X = np.column_stack([draw(0, 300, 3), np.random.default_rng(1).integers(3, size=300)])
    y = (X[:, 0] + (X[:, 3] == 2) > 0.3).astype(int)
    nominal = np.array([False, False, False, True])
    linear = ColumnModel(LogisticRegression(), nominal).fit(X, y)
    assert linear.derive(X).shape == (300, 6)
    own = np.abs(linear.model_.coef_[0])
    np.testing.assert_allclose(linear.natural_importance(), [*own[:3], own[3:].sum()])
    forest = ColumnModel(RandomForestClassifier(10, random_state=0), nominal).fit(X, y)
    np.testing.assert_array_equal(forest.natural_importance(), forest.model_.feature_importances_)
    machine = ColumnModel(SVC(), nominal).fit(X, y)
    assert np.isnan(machine.natural_importance()).all()


# --- selection -----------------------------------------------------------------------------------------------------


def folds(y: np.ndarray, count: int = 3, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(StratifiedKFold(count, shuffle=True, random_state=seed).split(y, y))


def test_forward_selection_is_scikit_learns() -> None:
    X, y = load_wine(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    model, splits = LogisticRegression(max_iter=500), folds(y)
    found = forward_selection(model, X, y, splits, ACCURACY, max_features=4, tol=-np.inf)
    alone = [cross_validated(model, X[:, [j]], y, splits, ACCURACY) for j in range(13)]
    assert found.columns[0] == int(np.argmax(alone))
    assert found.scores[0] == max(alone)
    theirs = SequentialFeatureSelector(model, n_features_to_select=4, cv=splits, scoring="accuracy").fit(X, y)
    assert sorted(found.columns) == np.flatnonzero(theirs.get_support()).tolist()
    stopped = forward_selection(model, X, y, splits, ACCURACY, tol=0.01)
    gains = np.diff(stopped.scores)
    assert (gains > 0.01).all()
    automatic = SequentialFeatureSelector(model, n_features_to_select="auto", tol=0.01, cv=splits, scoring="accuracy")
    assert sorted(stopped.columns) == np.flatnonzero(automatic.fit(X, y).get_support()).tolist()
    with pytest.raises(ValueError, match="at least 1"):
        forward_selection(model, X, y, splits, ACCURACY, candidates=[])


def test_selection_outside_cross_validation_flatters_itself_and_nested_does_not() -> None:
    """Pure noise, 100 rows of 500 columns: what is chosen on all rows seems to tell the classes apart."""
    nested, leaked = [], []
    for seed in range(3):
        X, y = draw(seed, 100, 500), np.repeat([0, 1], 50)
        kept = strongest(X, y, 20, False)
        leaked.append(cross_validated(LogisticRegression(), X[:, kept], y, folds(y, 5), ACCURACY))
        workflow = ShapleyWorkflow(
            ["logistic"], prescreen=10, max_features=2, search=0, cv=5, inner_cv=3, random_state=seed, scorer="accuracy"
        )
        nested.append(workflow.fit(X, y).scores_["accuracy"].mean())
    assert np.mean(leaked) > 0.75
    assert np.mean(nested) == pytest.approx(0.5, abs=0.07)


def test_test_rows_have_no_say_in_what_is_trained() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    X, y = X[:200, :10], y[:200]
    settings = {**SMALL, "selector": "forward", "max_features": 2}
    trainer = ShapleyWorkflow(["logistic"], **settings).fit(X, y)._trainer
    train, test = trainer.splits(np.arange(200), 2, 0)[0]

    def trained(rows: np.ndarray, labels: np.ndarray) -> tuple[Any, np.ndarray]:
        found = replace(trainer, codes=rows, targets=labels).train(train, 0)["logistic"]
        return found.path, found.model.model_.coef_

    wild_x, wild_y = X.copy(), y.copy()
    wild_x[test] = np.random.default_rng(0).permutation(X[test]) * 100
    wild_y[test] = 1 - y[test]
    (path, weights), (other_path, other_weights) = trained(X, y), trained(wild_x, wild_y)
    assert path == other_path
    np.testing.assert_array_equal(weights, other_weights)


# --- scores and tests ----------------------------------------------------------------------------------------------


def test_scores_of_two_classes() -> None:
    truth, called = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 0])
    probability = np.array([0.1, 0.2, 0.7, 0.9, 0.4])
    found = classification_scores(truth, called, np.column_stack([1 - probability, probability]), 2)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert (found["sensitivity"], found["specificity"]) == pytest.approx((1 / 2, 2 / 3))
    assert found["balanced_accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["f1"] == pytest.approx(0.5)
    assert found["auc"] == pytest.approx(roc_auc_score(truth, probability))


def test_what_an_absent_class_leaves_undefined_is_nan_with_a_reason() -> None:
    found = classification_scores([0, 0], [0, 1], np.full((2, 2), 0.5), 2)
    assert math.isnan(found["auc"])
    assert math.isnan(found["sensitivity"])
    assert math.isnan(found["balanced_accuracy"])
    assert (found["accuracy"], found["specificity"]) == (0.5, 0.5)
    assert found["note"] == "no rows of class 1"
    assert regression_scores([1.0, 1.0], [0.0, 1.0])["note"] == "the target is constant"
    assert math.isnan(regression_scores([1.0, 1.0], [0.0, 1.0])["r2"])


def test_the_corrected_t_test_without_overlap_is_the_t_test() -> None:
    d = draw(0, 10) + 0.4
    assert corrected_t_test(d, 0.0) == pytest.approx(ttest_1samp(d, 0).pvalue)
    assert corrected_t_test(d, 0.2) > corrected_t_test(d, 0.0)
    assert math.isnan(corrected_t_test([0.1], 0.1))
    assert corrected_t_test([0.0, 0.0], 0.1) == 1


def test_delong_and_mcnemar() -> None:
    y = np.repeat([0, 1], [60, 40])
    a, b = draw(0, 100) + y, draw(1, 100) + 0.2 * y
    above = lambda s: (s[y == 1][:, None] > s[y == 0]).astype(float)  # noqa: E731 - pair by pair
    gain = above(a) - above(b)
    variance = gain.mean(1).var(ddof=1) / 40 + gain.mean(0).var(ddof=1) / 60
    z = abs(gain.mean()) / np.sqrt(variance)
    assert delong(y, a, b) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-9)
    assert delong(y, a, a) == 1
    assert math.isnan(delong(np.ones(3), [1, 2, 3], [3, 2, 1]))
    assert mcnemar([1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]) == 1
    assert mcnemar([1] * 6, [1] * 6, [0] * 6) == pytest.approx(2 / 2**6)


# --- the workflow --------------------------------------------------------------------------------------------------


def mixed_table(n: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Numbers with gaps, words, an ordered category, truth values, a constant and a column twice."""
    rng = np.random.default_rng(seed)
    size, group = rng.normal(10, 2, n), rng.choice(["a", "b", "c"], n)
    frame = pd.DataFrame(
        {
            "size": size,
            "again": size,
            "group": group,
            "grade": pd.Categorical(rng.choice(["low", "mid", "top"], n), ["low", "mid", "top"], ordered=True),
            "flag": rng.random(n) < 0.5,
            "same": 1.0,
        }
    )
    y = np.where(size - 10 + 3 * (group == "c") + rng.normal(0, 0.5, n) > 0.5, "ill", "well")
    frame.loc[::9, "size"] = np.nan
    frame.loc[::11, "group"] = None
    return frame, y


@pytest.fixture(scope="module")
def fitted() -> ShapleyWorkflow:
    X, y = mixed_table(160, 0)
    workflow = ShapleyWorkflow(selector_model="logistic", search=1, cv=2, inner_cv=2, background=10, explain_rows=12)
    return workflow.fit(X, y).evaluate({"second": mixed_table(80, 1)}).explain()


def test_the_whole_workflow_on_mixed_types_with_gaps(fitted: ShapleyWorkflow) -> None:
    assert fitted.classes_.tolist() == ["ill", "well"]
    assert len(fitted.scores_) == 5 * 2
    assert set(fitted.selection_["column"]) >= {"size", "group"} or set(fitted.selection_["column"]) >= {
        "again",
        "group",
    }
    assert fitted.evaluation_["balanced_accuracy"].min() > 0.7
    assert fitted.aspects_.labels[0] == "size + again"
    second = mixed_table(80, 1)
    assert set(fitted.predict(second[0])) <= {"ill", "well"}
    proba = fitted.predict_proba(second[0])
    np.testing.assert_allclose(proba.sum(1), 1, atol=1e-6)
    assert fitted.score(*second) == pytest.approx(
        fitted.evaluation_.set_index("model").loc[fitted.best_, "balanced_accuracy"]
    )
    assert {"mcnemar_p", "delong_p"} <= set(fitted.tests_)


def test_every_explanation_adds_up_and_names_its_scale(fitted: ShapleyWorkflow) -> None:
    scales = {model: found.scale for (model, _), found in fitted.explanations_.items()}
    assert scales == {
        "xgboost": "log-odds", "forest": "probability", "svm": "decision function", "tree": "probability",
        "logistic": "log-odds",
    }  # fmt: skip
    for (name, cohort), found in fitted.explanations_.items():
        trained = fitted.fitted_[name]
        assert cohort == "second"
        assert found.shapley.gap < 1e-5
        assert found.aspects.gap < 1e-5
        np.testing.assert_allclose(found.shapley.outputs, trained.model.margin(found.rows), atol=1e-5)


def test_each_models_fast_form_is_the_enumeration(fitted: ShapleyWorkflow) -> None:
    rows, background = fitted._codes[:5], fitted._codes[60:72]
    for name, trained in fitted.fitted_.items():
        columns = list(trained.columns)
        names = tuple(map(str, columns))
        found = trained.explain(rows, background, names=names)
        filled = trained.model.filled(rows[:, columns]), trained.model.filled(background[:, columns])
        exact = shapley(trained.model.margin, *filled, method="exact")
        np.testing.assert_allclose(found.values, exact.values, atol=1e-5, err_msg=name)
        likely = trained.explain(rows, background, names=names, output="probability")
        np.testing.assert_allclose(likely.outputs, trained.model.probability(rows[:, columns]), atol=1e-6)


def test_the_same_seed_gives_the_same_report(fitted: ShapleyWorkflow, tmp_path: Path) -> None:
    X, y = mixed_table(160, 0)
    again = ShapleyWorkflow(**fitted.get_params()).fit(X, y).evaluate({"second": mixed_table(80, 1)}).explain()
    for name in ("scores_", "evaluation_", "importances_", "aspect_importances_", "agreement_", "merges_"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(fitted, name))
    chosen = set(fitted.selection_["column"]) & {"size", "again"}
    page = fitted.report(tmp_path / "a", expected=dict.fromkeys(chosen, -1))
    again.report(tmp_path / "b", expected=dict.fromkeys(chosen, -1))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert {"index.html", "importances.csv", "plausibility.csv", "agreement.png", "triplot.png"} <= set(files)
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    text = page.read_text()
    assert "scale log-odds" in text
    assert all(f'src="{name}"' in text for name in files if name.endswith(".png"))
    table = pd.read_csv(tmp_path / "a" / "plausibility.csv")
    assert set(table["plausible"]) == {"yes"}  # the larger, the less likely "well"
    with pytest.raises(ValueError, match="unknown columns"):
        fitted.report(tmp_path / "c", expected={"height": 1})


def test_visits_of_one_subject_are_never_in_two_parts() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    X, y = np.repeat(X[:60, :4], 3, 0), np.repeat(y[:60], 3)
    subjects = np.repeat([f"s{i}" for i in range(60)], 3)
    workflow = ShapleyWorkflow(["tree"], **{**SMALL, "cv": 4}).fit(X, y, subjects)
    parts = workflow._trainer.splits(np.arange(180), 4, 0)
    assert len(parts) == 4
    for train, test in parts:
        assert not set(subjects[train]) & set(subjects[test])
    inner = workflow._trainer.splits(parts[0][0], 3, 0)
    for train, test in inner:
        assert not set(subjects[parts[0][0]][train]) & set(subjects[parts[0][0]][test])


def test_cohorts_that_do_not_fit_are_refused_with_a_list(fitted: ShapleyWorkflow) -> None:
    X, y = mixed_table(80, 2)
    with pytest.raises(CohortError, match=r"cohort 'x': columns missing: \['group', 'flag'\]"):
        fitted.evaluate({"x": (X.drop(columns=["group", "flag"]), y)})
    with pytest.raises(CohortError, match=r"other units: size \(median [\d.]+, here \S+\)"):
        fitted.evaluate({"x": (X.assign(size=X["size"] * 1000), y)})
    with pytest.raises(CohortError, match=r"classes \['dead'\] were not in training"):
        fitted.evaluate({"x": (X, np.where(y == "ill", "dead", y))})
    with pytest.raises(CohortError, match="held numbers when"):
        fitted.evaluate({"x": (X.assign(size="tall"), y)})
    assert "x" not in fitted.cohorts_
    more = X.assign(extra=1)[["extra", *X.columns[::-1]]]  # more columns, in another order
    ill = y == "ill"
    loaded = ShapleyWorkflow(["logistic"], **SMALL).fit(*mixed_table(80, 0))
    loaded.evaluate({"plain": (X, y), "turned": (more, y), "ill only": (X[ill], y[ill])})
    table = loaded.evaluation_.set_index("cohort")
    assert table.loc["plain", "auc"] == table.loc["turned", "auc"]
    assert math.isnan(table.loc["ill only", "auc"])
    assert table.loc["ill only", "note"] == "no rows of class well"
    moved = loaded.evaluate({"moved": (X.assign(size=X["size"] * 1000), y)}, check_units=False)
    assert "moved" in moved.cohorts_


def test_units_and_not_shifts_are_suspect() -> None:
    glucose = np.abs(draw(0, 100, 1)) * 30 + 70
    assert not other_units(("glucose",), glucose, glucose + 25)
    assert other_units(("glucose",), glucose, glucose / 18)
    fever = draw(1, 100, 1) + 37
    assert other_units(("fever",), fever, fever * 1.8 + 32)
    assert not other_units(("z",), draw(0, 50, 1), draw(1, 50, 1) + 2)
    assert not other_units(("constant",), np.ones((5, 1)), np.full((5, 1), 9.0))


def test_three_classes_are_explained_one_by_one() -> None:
    X, y = load_wine(return_X_y=True, as_frame=True)
    workflow = ShapleyWorkflow(["xgboost", "svm", "logistic"], **SMALL, prescreen=4)
    workflow.fit(X, np.array(["red", "rose", "white"])[y]).explain()
    assert set(workflow.importances_["output"]) == {"red", "rose", "white"}
    assert set(workflow.importances_["cohort"]) == {"training"}
    for found in workflow.explanations_.values():
        assert found.shapley.values.shape == (10, 4, 3)
        assert found.shapley.gap < 1e-5
    assert workflow.scores_["auc"].min() > 0.8
    assert workflow.predict_proba(X).shape == (178, 3)


def test_regression() -> None:
    X, y = load_diabetes(return_X_y=True, as_frame=True)
    workflow = ShapleyWorkflow(["xgboost", "forest", "svm", "tree", "ridge"], task="regression", **SMALL, prescreen=5)
    workflow.fit(X[:200], y[:200]).evaluate({"rest": (X[200:], y[200:])}).explain()
    assert {"r2", "rmse", "mae", "spearman"} <= set(workflow.evaluation_)
    assert workflow.evaluation_.set_index("model").loc["ridge", "r2"] > 0.3
    for found in workflow.explanations_.values():  # XGBoost adds its trees in float32
        assert found.shapley.gap < 1e-5 * np.abs(found.shapley.outputs).max()
        assert found.scale == "prediction"
    assert not hasattr(workflow, "predict_proba")
    assert workflow.tests_.empty


def test_models_of_ones_own() -> None:
    class Nearest(ClassifierMixin, BaseEstimator):
        """A classifier that takes no weights of rows."""

        def fit(self, X: np.ndarray, y: np.ndarray) -> "Nearest":
            self.centres = NearestCentroid().fit(X, y)
            self.classes_ = self.centres.classes_
            return self

        def predict_proba(self, X: np.ndarray) -> np.ndarray:
            first = (self.centres.predict(X) == self.classes_[0]).astype(float)
            return np.column_stack([first, 1 - first])

        def predict(self, X: np.ndarray) -> np.ndarray:
            return self.centres.predict(X)

    X, y = load_breast_cancer(return_X_y=True)
    workflow = ShapleyWorkflow({"nearest": Nearest(), "logistic": None}, **SMALL).fit(X[:120, :5], y[:120]).explain()
    assert set(workflow.agreement_["model"]) == {"nearest", "logistic"}
    natural = workflow.agreement_.set_index(["model", "against"])
    assert natural.loc[("nearest", "natural"), "strength"] == "unknown"


def test_wide_and_collinear_tables() -> None:
    X, y = draw(0, 40, 200), np.repeat([0, 1], 20)
    X[:, 7] += 3 * y
    X[:, 8] = X[:, 7]
    settings = {**SMALL, "selector": "forward", "selector_model": "logistic", "prescreen": 10, "max_features": 3}
    workflow = ShapleyWorkflow(["logistic", "forest"], **settings)
    workflow.fit(X, y).explain()
    assert {"x7", "x8"} & set(workflow.selection_["column"])
    assert ("x7 + x8") in workflow.aspects_.labels


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "survival"}, "'classification' or 'regression'"),
        ({"selector": "backward"}, "'forward' or None"),
        ({"models": ["mlp"]}, "expected names out of xgboost"),
        ({"models": []}, "expected names out of"),
        ({"selector_model": "lasso"}, "lasso"),
        ({"output": "odds"}, "margin"),
        ({"cv": 1}, "cv=1; expected at least 2"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapleyWorkflow(**{"models": ["tree"], **SMALL, **given}).fit(draw(0, 20, 2), [0, 1] * 10)


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        (pd.DataFrame([[1, 2], [3, 4]], columns=["a", "a"]), ValueError, "stand twice"),
        (pd.DataFrame({"when": pd.to_datetime(["2020-01-01", "2021-01-01"])}), ValueError, "holds dates"),
        (pd.DataFrame({"what": [{"a": 1}, "b"]}), TypeError, "string or a number"),
        (pd.DataFrame({"x": [np.inf, 1.0]}), ValueError, "infinity"),
        (pd.DataFrame({"x": [1.0, 2.0]}), ValueError, "a class of 1 sample"),
    ],
)
def test_tables_that_cannot_be_read_are_refused(frame: pd.DataFrame, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ShapleyWorkflow(["tree"], **SMALL).fit(frame, [0, 1])


def test_progress_is_told_step_by_step() -> None:
    workflow, X, y = specimen()
    told: list[tuple[str, int, int]] = []
    workflow.fit(X, y, progress=lambda *step: told.append(step))
    assert [done for _, done, _ in told] == [0, 1, 2, 3]
    assert {of for _, _, of in told} == {3}  # two folds, and all rows
    told.clear()
    workflow.explain(progress=lambda *step: told.append(step))
    assert told == [("explanation", done, 2) for done in range(3)]


def test_importing_the_family_does_not_import_scikit_learn() -> None:
    """The atlas's start is not to pay for it; the names are there all the same."""
    import neuropil.interpret

    assert neuropil.interpret.ShapleyWorkflow is ShapleyWorkflow
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = neuropil.interpret.nothing
