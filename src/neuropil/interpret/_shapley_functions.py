"""What Shapley values are taken of: a model, a torch module or any function, as one from rows to numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.tree import BaseDecisionTree
from torch import nn

from neuropil.errors import MissingExtra

ROWS_AT_ONCE = 65_536
FORESTS = (RandomForestClassifier, RandomForestRegressor, ExtraTreesClassifier, ExtraTreesRegressor)

Function = Callable[[Float[np.ndarray, "r m"]], Float[np.ndarray, "r k"]]


def as_function(f: Any, row: Float[np.ndarray, "1 m"]) -> tuple[Function, bool]:
    """f as rows -> `[r, k]` in float64, and whether it gives `[r]`, asked of one row."""
    if isinstance(f, nn.Module):
        call: Callable[[np.ndarray], Any] = _of_module(f)
    elif is_tree(f):
        call = lambda rows: tree_output(f, rows)  # noqa: E731
    elif callable(f):
        call = f
    else:
        raise ValueError(
            f"{type(f).__name__} is no function of rows; give one, such as model.decision_function or "
            "lambda rows: model.predict_proba(rows)[:, 1]"
        )

    def function(rows: np.ndarray) -> np.ndarray:
        found = np.asarray(call(rows), dtype=np.float64)
        if found.ndim not in (1, 2) or len(found) != len(rows):
            raise ValueError(f"f gives {found.shape} for {len(rows)} rows; expected [{len(rows)}] or [{len(rows)}, k]")
        return found.reshape(len(rows), -1)

    return function, np.ndim(call(row)) == 1


def _of_module(module: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))

    def call(rows: np.ndarray) -> np.ndarray:
        modes = {part: part.training for part in module.modules()}
        module.eval()
        try:
            with torch.no_grad():
                out = module(torch.as_tensor(rows).to(like.device, like.dtype))
        finally:
            for part, mode in modes.items():
                part.training = mode
        return out.double().cpu().numpy()

    return call


def in_batches(f: Function, rows: np.ndarray) -> Float[np.ndarray, "r k"]:
    return np.concatenate([f(rows[i : i + ROWS_AT_ONCE]) for i in range(0, len(rows), ROWS_AT_ONCE)])


def tree_output(model: Any, X: np.ndarray) -> np.ndarray:
    """What TreeSHAP explains: XGBoost's margin, else the probability (of the second of two classes), else f."""
    if is_xgboost(model):
        return np.asarray(model.predict(X, output_margin=True), dtype=np.float64)
    if not hasattr(model, "predict_proba"):
        return np.asarray(model.predict(X), dtype=np.float64)
    found = model.predict_proba(X)
    return found[:, 1] if found.shape[1] == 2 else found


def is_xgboost(model: Any) -> bool:
    return type(model).__module__.startswith("xgboost.") and hasattr(model, "get_booster")


def is_tree(model: Any) -> bool:
    """Whether the model is one that TreeSHAP takes here: a tree or forest of scikit-learn, or XGBoost."""
    return is_xgboost(model) or isinstance(model, (BaseDecisionTree, *FORESTS))


def is_linear(model: Any) -> bool:
    return hasattr(model, "coef_") and hasattr(model, "intercept_") and not hasattr(model, "support_vectors_")


def require(name: str) -> Any:
    """The optional library of this name; MissingExtra names the extra that brings it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(f'{name} is needed here; install it with: pip install "neuropil[shapley]"') from error
