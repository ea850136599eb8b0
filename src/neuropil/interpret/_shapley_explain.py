"""The explaining half of the workflow: Shapley values of all models on all cohorts, and what they agree with."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from sklearn.metrics import get_scorer

from neuropil.interpret._shapley_functions import require
from neuropil.interpret._shapley_importance import directions, importance_agreement, permutation_importance
from neuropil.interpret._shapley_train import Trained
from neuropil.interpret._shapley_values import ShapleyValues

if TYPE_CHECKING:
    from neuropil.interpret.shapley import ShapleyWorkflow

TRAINING = "training"


@dataclass(frozen=True)
class Explanation:
    """Shapley values of a model's columns, and of its aspects (`groups` of positions in `columns`), on `rows` of a
    cohort; `outputs` are the classes, or one name where there is one output."""

    shapley: ShapleyValues
    aspects: ShapleyValues
    groups: dict[str, list[int]]
    rows: Float[np.ndarray, "n m"]
    columns: tuple[str, ...]
    outputs: tuple[str, ...]
    scale: str


def explain(workflow: ShapleyWorkflow, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """All tables and explanations, by the attribute of the workflow that holds them."""
    pandas = require("pandas")
    rng = np.random.default_rng(workflow._seed)
    background = drawn(workflow._codes, workflow.background, rng)
    cohorts = workflow.cohorts_ or {TRAINING: (workflow._codes, workflow._targets)}
    explanations: dict[tuple[str, str], Explanation] = {}
    columns: list[dict[str, Any]] = []
    merged: list[dict[str, Any]] = []
    agreement: list[dict[str, Any]] = []
    steps = len(cohorts) * len(workflow.fitted_)
    for cohort, (X, y) in cohorts.items():
        rows = drawn(X, workflow.explain_rows, rng)
        for name, trained in workflow.fitted_.items():
            progress("explanation", len(explanations), steps)
            found = explanation(workflow, trained, rows, background)
            explanations[name, cohort] = found
            drops = permuted(workflow, trained, X, y)
            table = importances(found, trained.model.natural_importance(), drops)
            columns += [{"model": name, "cohort": cohort, **row} for row in table]
            merged += [{"model": name, "cohort": cohort, **row} for row in aspect_importances(found)]
            agreement += [{"model": name, "cohort": cohort, **row} for row in agreements(found, table)]
    progress("explanation", steps, steps)
    return {
        "explanations_": explanations,
        "importances_": pandas.DataFrame(columns),
        "aspect_importances_": pandas.DataFrame(merged),
        "agreement_": pandas.DataFrame(agreement),
        "ranks_": pandas.DataFrame(
            rank_agreement(workflow, explanations), columns=["model", "cohort", "other", "other_cohort", *RANKS]
        ),
        "merges_": pandas.DataFrame(
            [{"cohort": cohort, **row} for cohort, (X, y) in cohorts.items() for row in merges(workflow, X, y)],
            columns=["cohort", "correlation", "columns", "importance"],
        ),
    }


def drawn(X: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `count` rows, in their order."""
    return X[np.sort(rng.permutation(len(X))[:count])]


def explanation(workflow: ShapleyWorkflow, trained: Trained, rows: np.ndarray, background: np.ndarray) -> Explanation:
    names = tuple(workflow.encoder_.columns_[i] for i in trained.columns)
    settings: dict[str, Any] = {
        "output": workflow.output,
        "estimand": workflow.estimand,
        "random_state": workflow._seed,
        "names": names,
    }
    groups = workflow.aspects_.within(trained.columns)
    single = trained.explain(rows, background, **settings)
    apart = all(len(group) == 1 for group in groups.values())
    together = single if apart else trained.explain(rows, background, groups=groups, **settings)
    many = workflow.task == "classification" and len(workflow.classes_) > 2
    outputs = tuple(map(str, workflow.classes_)) if many else (_target(workflow),)
    scale = trained.model.scale if workflow.output == "margin" or workflow.task == "regression" else "probability"
    return Explanation(single, together, groups, rows[:, list(trained.columns)], names, outputs, scale)


def _target(workflow: ShapleyWorkflow) -> str:
    return "prediction" if workflow.task == "regression" else str(workflow.classes_[1])


def permuted(workflow: ShapleyWorkflow, trained: Trained, X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Drops of the score `[columns, repeats]` when a column of the cohort is shuffled."""
    scorer, model = get_scorer(workflow._scoring), trained.model
    return permutation_importance(
        lambda rows, truth: float(scorer(model, rows, truth)),
        X[:, list(trained.columns)],
        y,
        repeats=workflow.permutations,
        random_state=workflow._seed,
    )


def importances(found: Explanation, natural: np.ndarray, drops: np.ndarray) -> list[dict[str, Any]]:
    """A row for each output and column: mean |Shapley|, direction, natural and permutation importance."""
    out = []
    for k, output in enumerate(found.outputs):
        values = _of_output(found.shapley.values, k)
        size, towards = np.abs(values).mean(0), directions(values, found.rows)
        out += [
            {
                "output": output,
                "column": column,
                "shapley": float(size[j]),
                "direction": float(towards[j]),
                "natural": float(natural[j]),
                "permutation": float(drops[j].mean()),
                "permutation_sd": float(drops[j].std()),
            }
            for j, column in enumerate(found.columns)
        ]
    return out


def aspect_importances(found: Explanation) -> list[dict[str, Any]]:
    """A row for each output and aspect: as one player, and as the sum of its members' values."""
    out = []
    for k, output in enumerate(found.outputs):
        single, together = _of_output(found.shapley.values, k), _of_output(found.aspects.values, k)
        for p, (aspect, members) in enumerate(found.groups.items()):
            out.append(
                {
                    "output": output,
                    "aspect": aspect,
                    "columns": len(members),
                    "group": float(np.abs(together[:, p]).mean()),
                    "sum": float(np.abs(single[:, members].sum(1)).mean()),
                }
            )
    return out


def _of_output(values: np.ndarray, k: int) -> np.ndarray:
    return values if values.ndim == 2 else values[..., k]


def agreements(found: Explanation, table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean |Shapley| (over outputs too) against natural and permutation importance."""
    m = len(found.columns)
    size = np.array([row["shapley"] for row in table]).reshape(-1, m).mean(0)
    out = []
    for against in ("natural", "permutation"):
        other = np.array([row[against] for row in table[:m]])
        out.append({"against": against, **asdict(importance_agreement(size, other))})
    return out


RANKS = ("kendall", "spearman", "top_overlap", "columns")


def rank_agreement(workflow: ShapleyWorkflow, explanations: dict[tuple[str, str], Explanation]) -> list[dict[str, Any]]:
    """Of each two (model, cohort): how the mean |Shapley| of the columns that either reads go together."""
    names = workflow.encoder_.columns_
    lists = {}
    for key, found in explanations.items():
        size = found.shapley.importance
        of = dict(zip(found.columns, size if size.ndim == 1 else size.mean(1), strict=True))
        lists[key] = np.array([of.get(name, 0.0) for name in names])
    out = []
    for one, other in itertools.combinations(lists, 2):
        used = (lists[one] > 0) | (lists[other] > 0)
        agreed = asdict(importance_agreement(lists[one][used], lists[other][used], resamples=0))
        row = {"model": one[0], "cohort": one[1], "other": other[0], "other_cohort": other[1]}
        out.append({**row, **{name: agreed[name] for name in RANKS}})
    return out


def merges(workflow: ShapleyWorkflow, X: np.ndarray, y: np.ndarray) -> list[dict[str, Any]]:
    """The triplot's third panel for the best model: the drop of the score when the columns of each merge of the
    dendrogram of what it reads are shuffled together."""
    best = workflow.fitted_[workflow.best_]
    scorer = get_scorer(workflow._scoring)
    steps = workflow.aspects_.at_merges(best.columns)
    drops = permutation_importance(
        lambda rows, truth: float(scorer(best.model, rows, truth)),
        X[:, list(best.columns)],
        y,
        groups=[members for _, members in steps],
        repeats=workflow.permutations,
        random_state=workflow._seed,
    )
    names = [workflow.encoder_.columns_[i] for i in best.columns]
    return [
        {"correlation": r, "columns": " + ".join(names[i] for i in members), "importance": float(drop.mean())}
        for (r, members), drop in zip(steps, drops, strict=True)
    ]
