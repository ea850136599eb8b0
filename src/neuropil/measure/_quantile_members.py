"""The base models of an aggregate: tuned once, then fitted on the training rows without any folds asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.base import clone
from sklearn.model_selection import ParameterGrid, ParameterSampler

from neuropil.measure._quantile_base import as_quantile_model
from neuropil.measure._quantile_scores import pinball

Features = Float[np.ndarray, "n d"]
Values = Float[np.ndarray, " n"]
Left = tuple[int, ...]  # the folds left out, in order


def named(models: Sequence[Any]) -> list[tuple[str, Any, Mapping[str, Sequence[Any]]]]:
    """Entries `(name, model, grid)` from models, `(name, model)` or `(name, model, grid)`, each name once."""
    entries: list[tuple[str, Any, Mapping[str, Sequence[Any]]]] = []
    for model in models:
        given = model if isinstance(model, tuple) else (type(model).__name__, model)
        if len(given) not in (2, 3) or not isinstance(given[0], str):
            raise ValueError(f"base model {model!r}; give a regressor, (name, regressor) or (name, regressor, grid)")
        name, count = given[0], sum(given[0] == n or n.startswith(f"{given[0]} #") for n, _, _ in entries)
        entries.append((f"{name} #{count + 1}" if count else name, given[1], given[2] if len(given) == 3 else {}))
    if not entries:
        raise ValueError("base_models is empty; give at least one regressor, or None for the default ones")
    return entries


class Members:
    """Base models for given levels. After `tune`, `forecast` fits what it lacks and keeps it in `fitted`."""

    def __init__(self, models: Sequence[Any], levels: np.ndarray, random_state: int) -> None:
        self.entries, self.levels, self.random_state = named(models), levels, random_state
        self.params: list[dict[str, Any]] = [{} for _ in self.entries]
        self.fitted: dict[Left, list[Any]] = {}

    def tune(
        self, X: Features, y: Values, X_val: Float[np.ndarray, "k d"], y_val: Float[np.ndarray, " k"], search: int
    ) -> None:
        """Of `search` random draws from each grid, keep the one with the least pinball loss on the validation rows.

        The winners stay as the models fitted on all training rows. A network's number of steps is kept with its
        settings, so that later fits train as long.
        """
        winners = []
        for place, (_, _, grid) in enumerate(self.entries):
            count = min(search, len(ParameterGrid(grid)))
            tries: list[dict[str, Any]] = [{}]
            if grid and count:
                tries = list(ParameterSampler(grid, count, random_state=self.random_state))
            fits = [self._build(place, params).fit(X, y) for params in tries]
            losses = [0.0] * len(fits)
            if len(fits) > 1:
                losses = [float(pinball(y_val, self._ask(place, fit, X_val), self.levels).mean()) for fit in fits]
            best = int(np.argmin(losses))
            self.params[place] = tries[best] | ({"steps": fits[best].steps_} if hasattr(fits[best], "steps_") else {})
            winners.append(fits[best])
        self.fitted[()] = winners

    def fit(self, left: Left, X: Features, y: Values, fold: Int[np.ndarray, " n"]) -> None:
        """Fit all models without the folds `left`, unless they are there."""
        if left not in self.fitted:
            rows = ~np.isin(fold, left)
            built = (self._build(place, params) for place, params in enumerate(self.params))
            self.fitted[left] = [model.fit(X[rows], y[rows]) for model in built]

    def forecast(self, left: Left, X: Features) -> Float[np.ndarray, "n p m"]:
        """Predictions of the models fitted without the folds `left`."""
        return np.stack([self._ask(place, model, X) for place, model in enumerate(self.fitted[left])], axis=1)

    def _build(self, place: int, params: Mapping[str, Any]) -> Any:
        model = clone(self.entries[place][1]).set_params(**params)
        unseeded = [k for k, v in model.get_params().items() if k.split("__")[-1] == "random_state" and v is None]
        return as_quantile_model(model.set_params(**dict.fromkeys(unseeded, self.random_state)), self.levels)

    def _ask(self, place: int, model: Any, X: Features) -> Float[np.ndarray, "n m"]:
        found = np.asarray(model.predict(X), dtype=np.float64)
        if found.shape != (len(X), len(self.levels)) or not np.isfinite(found).all():
            raise ValueError(
                f"base model {self.entries[place][0]!r} gave predictions of shape {found.shape}, "
                f"finite: {bool(np.isfinite(found).all())}; expected finite ones of shape {(len(X), len(self.levels))}"
            )
        return found
