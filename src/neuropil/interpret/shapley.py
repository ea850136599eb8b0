r"""From any table to models that are compared, tested on foreign cohorts and explained, by one fixed recipe.

Columns are chosen by forward selection; three black boxes (XGBoost, random forest, SVM) and two readable models
(decision tree, logistic regression) are tuned and compared by nested cross-validation, then judged on external cohorts.
Each is explained by Shapley values,

$$\phi_i(x) = \sum_{S \not\ni i} \frac{|S|!\,(M-|S|-1)!}{M!}\,[v(S \cup i) - v(S)], \qquad
v(S) = E_{z \sim background}\, f(x_S, z_{\bar S}),$$

correlated columns are merged into *aspects* that count as one player, and the explanation is checked against
the models' own importances and against permutation importance by rank correlation.

>>> from sklearn.datasets import load_breast_cancer
>>> X, y = load_breast_cancer(return_X_y=True, as_frame=True)
>>> here, there = X["mean texture"] < 20, X["mean texture"] >= 20
>>> workflow = ShapleyWorkflow(models=["forest", "logistic"], selector_model="logistic", prescreen=8, max_features=4,
...                            search=0, cv=3, inner_cv=3, background=20, explain_rows=30)
>>> workflow = workflow.fit(X[here], y[here]).evaluate({"coarse texture": (X[there], y[there])}).explain()
>>> bool(workflow.evaluation_["balanced_accuracy"].min() > 0.8)
True
>>> sorted(workflow.agreement_["against"].unique())
['natural', 'permutation']

`workflow.report("out/")` writes every table as CSV, the figures and a page; `neuropil shapley train.csv --target dx
--external aibl.csv` does all of it from files. Each step can be used alone: `shapley` (any function or torch module),
`aspects`, `forward_selection`, `permutation_importance`, `importance_agreement`, `corrected_t_test`, `mcnemar`,
`delong`.

Scores here are of rows that no choice has seen: filling of gaps, scaling, selection and tuning are repeated within each
training part. A selection made once on all rows and then cross-validated would flatter itself (on 500 columns of noise
by 25 points and more; the tests show it).

The paper's methods section could not be read. Its abstract fixes: the five models, forward selection, external
cohorts, Shapley values, the consolidation of correlated features, the comparison with natural and permutation
importances, p < .05. Chosen here: selection by balanced accuracy, 10 outer and 5 inner folds, random search, equal
weight of classes, Platt's calibration of the SVM, the corrected resampled t-test between models, McNemar's and DeLong's
test on a cohort, complete linkage of 1 - |Spearman r| cut at 0.7, the interventional estimand, 100 random training rows
as background (an unbiased sample, in which categories stay categories; k-means centres are neither), XGBoost, the
SVM and logistic regression explained on their margins and trees and forests as probabilities (`output="probability"`:
all as probabilities). Categories of three or more levels take part in no aspect: their codes have no order.

Source: Louise Bloch and Christoph M. Friedrich (for ADNI), "Machine Learning Workflow to Explain Black-box Models for
Early Alzheimer's Disease Classification Evaluated for Multiple Datasets", SN Computer Science 2022, arXiv:2205.05907.
Values: Lundberg and Lee 2017 (KernelSHAP, arXiv:1705.07874), Strumbelj and Kononenko 2014 (sampling), Lundberg et al.
2020 (TreeSHAP, arXiv:1905.04610); aspects: Pekala, Woznica and Biecek 2021 (triplot, arXiv:2104.03403).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.metrics import get_scorer
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_array,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from neuropil.interpret._shapley_aspects import Aspects, aspects
from neuropil.interpret._shapley_functions import require
from neuropil.interpret._shapley_importance import (
    Agreement,
    importance_agreement,
    permutation_importance,
)
from neuropil.interpret._shapley_models import (
    BLACK_BOXES,
    MODELS,
    REGRESSORS,
    ColumnModel,
)
from neuropil.interpret._shapley_scores import (
    classification_scores,
    corrected_t_test,
    delong,
    mcnemar,
    regression_scores,
)
from neuropil.interpret._shapley_select import SelectionPath, forward_selection
from neuropil.interpret._shapley_table import CohortError, TableEncoder, as_frame, other_units
from neuropil.interpret._shapley_train import Trained, Trainer
from neuropil.interpret._shapley_values import ESTIMANDS, ShapleyValues, shapley

__all__ = [
    "BLACK_BOXES",
    "MODELS",
    "Agreement",
    "Aspects",
    "CohortError",
    "ColumnModel",
    "SelectionPath",
    "ShapleyValues",
    "ShapleyWorkflow",
    "Trained",
    "aspects",
    "corrected_t_test",
    "delong",
    "forward_selection",
    "importance_agreement",
    "mcnemar",
    "permutation_importance",
    "shapley",
]

Progress = Callable[[str, int, int], None]
OUTPUTS = ("margin", "probability")
# What evaluate and explain add.
LATER = (
    "evaluation_", "tests_", "explanations_", "importances_", "aspect_importances_", "agreement_", "ranks_", "merges_",
)  # fmt: skip


def _silent(what: str, done: int, of: int) -> None:
    """The progress of which nothing is said."""


class ShapleyWorkflow(BaseEstimator):
    """The workflow as a scikit-learn estimator; `predict` is that of the model with the best nested score.

    Parameters
    ----------
    models: "all", names out of "xgboost", "forest", "svm", "tree", "logistic" ("ridge" for regression), or a
        dictionary of names and scikit-learn estimators of your own.
    task: "classification" or "regression".
    selector: "forward", or None for all columns.
    selector_model: the model that selects: each for itself (None), or one name for all, which is faster.
    prescreen: only this many columns, those with the largest F statistic of one column, stand for selection.
    max_features, tol: selection ends at this many columns, or when none raises the score by more than `tol`.
    search: random draws of each model's settings beside its own; 0 for none.
    scorer: any of scikit-learn's, by name or as a function; None: balanced accuracy, or R^2 for regression.
    balanced: classes weigh equally in training; probabilities are then those of equally frequent classes.
    cv, inner_cv, repeats: outer and inner folds, and how often the outer ones are drawn. Fewer where a class or the
        subjects are fewer.
    h: columns with |Spearman r| >= h throughout are one aspect.
    output: "margin" (log-odds or decision function where there is one, else probability) or "probability".
    estimand: "interventional" or "gaussian" (see `shapley`).
    background, explain_rows: training rows, and rows of each cohort, that Shapley values use.
    permutations: repeats of the permutation importance.

    Fitted: `fitted_` (name -> `Trained`), `best_`, `classes_`, `aspects_`, and tables: `scores_` (every outer fold),
    `comparisons_` (p of each pair of models), `selection_` (path), `selected_` (share of outer folds that chose a
    column). `evaluate` adds `evaluation_` and `tests_`; `explain` adds `explanations_`, `importances_`,
    `aspect_importances_`, `agreement_`, `ranks_` and `merges_`.
    """

    def __init__(
        self,
        models: Any = "all",
        *,
        task: Any = "classification",
        selector: Any = "forward",
        selector_model: Any = None,
        prescreen: Any = None,
        max_features: Any = None,
        tol: Any = 1e-3,
        search: Any = 10,
        scorer: Any = None,
        balanced: Any = True,
        cv: Any = 10,
        inner_cv: Any = 5,
        repeats: Any = 1,
        h: Any = 0.7,
        output: Any = "margin",
        estimand: Any = "interventional",
        background: Any = 100,
        explain_rows: Any = 100,
        permutations: Any = 10,
        random_state: Any = 0,
    ) -> None:
        # Any: a scikit-learn estimator takes whatever it is given here, and checks it in fit.
        self.models, self.task, self.selector, self.selector_model = models, task, selector, selector_model
        self.prescreen, self.max_features, self.tol, self.search = prescreen, max_features, tol, search
        self.scorer, self.balanced, self.cv, self.inner_cv, self.repeats = scorer, balanced, cv, inner_cv, repeats
        self.h, self.output, self.estimand, self.background = h, output, estimand, background
        self.explain_rows, self.permutations, self.random_state = explain_rows, permutations, random_state

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, RegressorTags

        tags = super().__sklearn_tags__()
        tags.estimator_type = "regressor" if self.task == "regression" else "classifier"
        tags.classifier_tags = None if self.task == "regression" else ClassifierTags()
        tags.regressor_tags = RegressorTags() if self.task == "regression" else None
        tags.target_tags.required = True
        tags.input_tags.allow_nan = True
        return tags

    # --- fitting ------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, groups: Any = None, progress: Progress | None = None) -> ShapleyWorkflow:
        """Nested cross-validation of every model, then each fitted on all rows of `X` `[n, m]`, an array or DataFrame.

        Rows of one of `groups` (visits of one subject) are never in two parts. `progress` is called with what is being
        done, how many of its steps are, and of how many. Raises ValueError for bad settings and
        targets, MissingExtra where pandas or XGBoost is not installed.
        """
        specs = self._check()
        frame = as_frame(X)
        validate_data(self, X, y, skip_check_array=True)
        self.encoder_ = TableEncoder().fit(frame)
        self._codes = self.encoder_.transform(frame)
        self._targets = self._coded_targets(y)
        check_consistent_length(self._codes, self._targets, groups)
        subjects = None if groups is None else np.unique(column_or_1d(groups), return_inverse=True)[1]
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self._trainer = self._make_trainer(specs, subjects)
        self.fitted_ = self._nested(progress or _silent)
        self.aspects_ = aspects(
            self._codes, self.h, self.encoder_.columns_, np.flatnonzero(self.encoder_.nominal_).tolist()
        )
        mean = self.scores_.groupby("model", sort=False)[self._metric].mean()
        self.best_ = str(mean.idxmax()) if mean.notna().any() else next(iter(specs))
        self.selection_ = self._paths()
        self.cohorts_: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in LATER:  # of an earlier fit
            self.__dict__.pop(name, None)
        return self

    def _check(self) -> dict[str, Any]:
        if self.task not in ("classification", "regression"):
            raise ValueError(f"task {self.task!r}; expected 'classification' or 'regression'")
        if self.selector not in ("forward", None):
            raise ValueError(f"selector {self.selector!r}; expected 'forward' or None")
        if self.output not in OUTPUTS or self.estimand not in ESTIMANDS:
            raise ValueError(
                f"output {self.output!r}, estimand {self.estimand!r}; expected one of {OUTPUTS} and of {ESTIMANDS}"
            )
        least = {"cv": 2, "inner_cv": 2, "repeats": 1, "search": 0, "background": 1, "explain_rows": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least {smallest}")
        known = REGRESSORS if self.task == "regression" else MODELS
        if isinstance(self.models, Mapping):
            specs = dict(self.models)
        else:
            names = known if isinstance(self.models, str) and self.models == "all" else self.models
            specs = dict.fromkeys([names] if isinstance(names, str) else names)
        proxies = [] if self.selector_model is None else [self.selector_model]
        odd = [name for name in [*(n for n, made in specs.items() if made is None), *proxies] if name not in known]
        if odd or not specs:
            raise ValueError(f"models {odd or self.models}; expected names out of {', '.join(known)}, or estimators")
        return specs

    def _coded_targets(self, y: Any) -> np.ndarray:
        y = column_or_1d(check_array(y, ensure_2d=False, dtype=None, input_name="y"), warn=True)
        if self.task == "regression":
            return y.astype(np.float64)
        check_classification_targets(y)
        self._labels = LabelEncoder().fit(y)
        self.classes_ = self._labels.classes_
        if len(self.classes_) < 2:
            raise ValueError(f"one class, {self.classes_.tolist()}; a classifier needs at least two")
        return self._labels.transform(y)

    def _make_trainer(self, specs: dict[str, Any], subjects: np.ndarray | None) -> Trainer:
        return Trainer(
            self._codes,
            self._targets,
            subjects,
            self.encoder_.nominal_,
            len(self.classes_) if self.task == "classification" else 0,
            specs,
            get_scorer(self._scoring),
            select=self.selector is not None,
            selector_model=self.selector_model,
            prescreen=self.prescreen,
            max_features=self.max_features,
            tol=self.tol,
            search=self.search,
            balanced=self.balanced,
            inner_cv=self.inner_cv,
        )

    def _nested(self, progress: Progress) -> dict[str, Trained]:
        """The tables of nested cross-validation, and every model fitted on all rows."""
        pandas, specs = require("pandas"), self._trainer.specs
        everything = np.arange(len(self._codes))
        rows: list[dict[str, Any]] = []
        chosen = {name: np.zeros(self._codes.shape[1]) for name in specs}
        for repeat in range(self.repeats):
            splits = self._trainer.splits(everything, self.cv, (self._seed + repeat) % 2**31)
            steps = self.repeats * len(splits) + 1
            for fold, (train, test) in enumerate(splits):
                progress("selection, tuning and comparison", repeat * len(splits) + fold, steps)
                fitted = self._trainer.train(train, (self._seed + repeat * self.cv + fold) % 2**31)
                for name, trained in fitted.items():
                    chosen[name][list(trained.columns)] += 1
                    scores = self._scores(trained, self._codes[test], self._targets[test])
                    share = len(test) / len(everything)
                    rows.append({"model": name, "repeat": repeat, "fold": fold, "test_share": share, **scores})
        self.scores_ = pandas.DataFrame(rows)
        runs = len(rows) / len(specs)
        self.selected_ = pandas.DataFrame(
            {name: counts / runs for name, counts in chosen.items()}, index=list(self.encoder_.columns_)
        )
        self.comparisons_ = pandas.DataFrame(
            [self._compared(a, b) for a, b in itertools.combinations(specs, 2)],
            columns=["model", "other", "difference", "p"],
        )
        progress("selection, tuning and comparison", steps - 1, steps)
        fitted = self._trainer.train(everything, self._seed)
        progress("selection, tuning and comparison", steps, steps)
        return fitted

    def _compared(self, a: str, b: str) -> dict[str, Any]:
        one, other = (self.scores_[self.scores_["model"] == name] for name in (a, b))
        d = one[self._metric].to_numpy() - other[self._metric].to_numpy()
        p = corrected_t_test(d, float(one["test_share"].mean()))
        return {"model": a, "other": b, "difference": float(d.mean()), "p": p}

    @property
    def _scoring(self) -> Any:
        return self.scorer or ("r2" if self.task == "regression" else "balanced_accuracy")

    @property
    def _metric(self) -> str:
        return self._scoring if isinstance(self._scoring, str) else getattr(self._scoring, "__name__", "score")

    def _scores(self, trained: Trained, X: np.ndarray, y: np.ndarray) -> dict[str, Any]:
        X, model = X[:, list(trained.columns)], trained.model
        if self.task == "regression":
            scores = regression_scores(y, model.predict(X))
        else:
            scores = classification_scores(y, model.predict(X), model.predict_proba(X), len(self.classes_))
            scores["note"] = scores["note"] and f"no rows of class {self._absent(y)}"
        if self._metric not in scores:
            scores = {self._metric: float(get_scorer(self._scoring)(model, X, y)), **scores}
        return scores

    def _absent(self, y: np.ndarray) -> str:
        return ", ".join(str(label) for code, label in enumerate(self.classes_) if code not in y)

    def _paths(self) -> Any:
        rows = [
            {"model": name, "step": step + 1, "column": self.encoder_.columns_[column], "score": score}
            for name, trained in self.fitted_.items()
            if trained.path
            for step, (column, score) in enumerate(zip(trained.path.columns, trained.path.scores, strict=True))
        ]
        return require("pandas").DataFrame(rows, columns=["model", "step", "column", "score"])

    # --- use ----------------------------------------------------------------------------------------------------

    def _read(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        frame = as_frame(X)
        validate_data(self, X, reset=False, skip_check_array=True)
        if not hasattr(X, "columns"):
            frame.columns = list(self.encoder_.columns_)
        return self.encoder_.transform(frame)

    def predict(self, X: Any) -> np.ndarray:
        """Classes, or values, `[n]`, by the best model."""
        codes = self._read(X)
        best = self.fitted_[self.best_]
        found = best.model.predict(codes[:, list(best.columns)])
        return found.astype(np.float64) if self.task == "regression" else self.classes_[found]

    @available_if(lambda self: self.task == "classification")
    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities `[n, classes]` by the best model."""
        codes = self._read(X)
        best = self.fitted_[self.best_]
        return best.model.predict_proba(codes[:, list(best.columns)])

    def score(self, X: Any, y: Any) -> float:
        """The best model's score by `scorer`."""
        return float(get_scorer(self._scoring)(self, X, y))

    def evaluate(self, cohorts: Mapping[str, tuple[Any, Any]], check_units: bool = True) -> ShapleyWorkflow:
        """Judge every model on cohorts that had no part in fitting, `{name: (X, y)}`; more calls add more.

        Columns are found by name; others than those of the training table are ignored. Raises CohortError for missing
        columns, for those that seem to be in other units (unless `check_units` is False), and for unknown classes.
        """
        check_is_fitted(self)
        added = {name: self._cohort(name, X, y, check_units) for name, (X, y) in cohorts.items()}
        self.cohorts_ = {**self.cohorts_, **added}
        pandas = require("pandas")
        self.evaluation_ = pandas.DataFrame(
            [
                {"cohort": cohort, "model": name, "rows": len(y), **self._scores(trained, X, y)}
                for cohort, (X, y) in self.cohorts_.items()
                for name, trained in self.fitted_.items()
            ]
        )
        pairs = list(itertools.combinations(self.fitted_, 2)) if self.task == "classification" else []
        self.tests_ = pandas.DataFrame(
            [self._tested(cohort, a, b) for cohort in self.cohorts_ for a, b in pairs],
            columns=["cohort", "model", "other", "mcnemar_p", "delong_p"],
        )
        return self

    def _cohort(self, name: str, X: Any, y: Any, check_units: bool) -> tuple[np.ndarray, np.ndarray]:
        frame = as_frame(X)
        if not hasattr(X, "columns") and frame.shape[1] == len(self.encoder_.columns_):
            frame.columns = list(self.encoder_.columns_)
        try:
            codes = self.encoder_.transform(frame)
        except CohortError as error:
            raise CohortError(f"cohort {name!r}: {error}") from None
        odd = other_units(self.encoder_.columns_, self._codes, codes) if check_units else []
        if odd:
            raise CohortError(
                f"cohort {name!r} seems to be in other units: {', '.join(odd)}; convert it, or pass check_units=False"
            )
        y = column_or_1d(y)
        check_consistent_length(codes, y)
        if self.task == "regression":
            return codes, y.astype(np.float64)
        unknown = sorted(set(y.tolist()) - set(self.classes_.tolist()), key=str)
        if unknown:
            raise CohortError(f"cohort {name!r}: classes {unknown} were not in training ({self.classes_.tolist()})")
        return codes, self._labels.transform(y)

    def _tested(self, cohort: str, a: str, b: str) -> dict[str, Any]:
        X, y = self.cohorts_[cohort]
        inputs = [(self.fitted_[name].model, X[:, list(self.fitted_[name].columns)]) for name in (a, b)]
        labels = [model.predict(rows) for model, rows in inputs]
        binary = len(self.classes_) == 2
        p = delong(y, *(model.probability(rows) for model, rows in inputs)) if binary else float("nan")
        return {"cohort": cohort, "model": a, "other": b, "mcnemar_p": mcnemar(y, *labels), "delong_p": p}

    def explain(self, progress: Progress | None = None) -> ShapleyWorkflow:
        """Shapley values of every model on the cohorts that were evaluated (on training rows if there are none), of
        columns and of aspects, beside other importances, with their agreement."""
        check_is_fitted(self)
        from neuropil.interpret._shapley_explain import explain

        for name, table in explain(self, progress or _silent).items():
            setattr(self, name, table)
        return self

    def report(self, folder: Any, expected: Mapping[str, int] | None = None) -> Path:
        """Write all tables (CSV), figures (PNG) and `index.html` into a folder; returns the page.

        `expected` says of some columns whether large values should raise (1) or lower (-1) what is predicted; the page
        then has a table of plausibility. Evaluates nothing: call `evaluate` and `explain` first.
        """
        check_is_fitted(self)
        from neuropil.interpret._shapley_report import write

        return write(self, Path(folder), dict(expected or {}))
