"""Selection, tuning and fitting of every model on some rows, none of which sees another row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

from neuropil.interpret._shapley_functions import is_linear, is_tree
from neuropil.interpret._shapley_models import SPACES, ColumnModel, Scorer, Splits, base_model, tuned
from neuropil.interpret._shapley_select import SelectionPath, forward_selection, strongest
from neuropil.interpret._shapley_values import ShapleyValues, shapley


@dataclass(frozen=True)
class Trained:
    """A fitted model, the columns it reads (in table order), and how they were found (None without selection)."""

    name: str
    columns: tuple[int, ...]
    model: ColumnModel
    path: SelectionPath | None

    def explain(
        self,
        X: Float[np.ndarray, "n m"],
        background: Float[np.ndarray, "b m"],
        *,
        names: tuple[str, ...],
        groups: Mapping[str, list[int]] | None = None,
        output: str = "margin",
        estimand: str = "interventional",
        random_state: int = 0,
    ) -> ShapleyValues:
        """Shapley values of the columns the model reads, or of groups of them, by the fastest way that is exact."""
        columns, model = list(self.columns), self.model
        X, background = model.filled(X[:, columns]), model.filled(background[:, columns])
        settings: dict[str, Any] = {"estimand": estimand, "random_state": random_state}
        own = model.model_
        same = output == "margin" or model.scale == "probability"
        if estimand == "interventional" and same and is_tree(own) and groups is None:
            return shapley(own, model.derive(X), model.derive(background), names=names, **settings)
        if estimand == "interventional" and same and is_linear(own):
            players = {name: [i] for i, name in enumerate(names)} if groups is None else groups
            derived = {name: np.flatnonzero(np.isin(model.owner_, of)).tolist() for name, of in players.items()}
            return shapley(own, model.derive(X), model.derive(background), groups=derived, **settings)
        f = model.margin if output == "margin" else model.probability
        return shapley(f, X, background, names=names, groups=groups, **settings)


@dataclass(frozen=True)
class Trainer:
    """The training table as numbers, and how models are made from its rows. `specs` gives a model of one's own, or
    None for the one of that name; `classes` is 0 for regression."""

    codes: Float[np.ndarray, "n m"]
    targets: np.ndarray
    groups: Int[np.ndarray, " n"] | None
    nominal: Bool[np.ndarray, " m"]
    classes: int
    specs: dict[str, Any]
    scorer: Scorer
    select: bool
    selector_model: str | None
    prescreen: int | None
    max_features: int | None
    tol: float | int
    search: int
    balanced: bool
    inner_cv: int

    def splits(self, rows: Int[np.ndarray, " r"], folds: int, seed: int) -> Splits:
        """Folds of these rows as positions in them; stratified by class, whole by group. Fewer folds where a class or
        the groups are fewer; raises ValueError where there are not two of each."""
        y, groups = self.targets[rows], None if self.groups is None else self.groups[rows]
        fewest = len(rows) if groups is None else len(np.unique(groups))
        if self.classes:
            least = int(np.bincount(y, minlength=self.classes).min())
            if least < 2:
                raise ValueError(
                    f"a class of {least} sample{'' if least == 1 else 's'} among the {len(rows)} rows to be split; "
                    "each needs at least 2: give more rows, fewer folds, or leave the class out"
                )
            fewest = min(fewest, least)
        if fewest < 2:
            raise ValueError(f"n_samples={len(rows)} in {fewest} group: too few to be split in two")
        if groups is None:
            kind = StratifiedKFold if self.classes else KFold
        else:
            kind = StratifiedGroupKFold if self.classes else GroupKFold
        splitter = kind(min(folds, fewest), shuffle=True, random_state=seed)
        return list(splitter.split(np.zeros((len(rows), 1)), y, groups))

    def train(self, rows: Int[np.ndarray, " r"], seed: int) -> dict[str, Trained]:
        """Every model selected, tuned and fitted on these rows alone."""
        X, y = self.codes[rows], self.targets[rows]
        splits = self.splits(rows, self.inner_cv, seed) if self.select or self.search else []
        candidates = strongest(X, y, self.prescreen, not self.classes)

        def select(name: str) -> SelectionPath:
            settings: dict[str, Any] = {"tol": self.tol, "max_features": self.max_features, "candidates": candidates}
            return forward_selection(partial(self.model, name, seed), X, y, splits, self.scorer, **settings)

        shared = select(self.selector_model) if self.select and self.selector_model else None
        out = {}
        for name, own in self.specs.items():
            path = shared or (select(name) if self.select else None)
            columns = sorted(path.columns) if path else candidates
            space = SPACES.get(name, {}) if own is None else {}
            model = self.model(name, seed, columns)
            model = tuned(model, space, self.search, X[:, columns], y, splits, self.scorer, seed)
            out[name] = Trained(name, tuple(columns), model, path)
        return out

    def model(self, name: str, seed: int, columns: list[int]) -> ColumnModel:
        """An unfitted model of these columns."""
        own = self.specs.get(name)
        model = base_model(name, not self.classes, seed) if own is None else own
        return ColumnModel(model, self.nominal[columns], self.balanced)
