"""A fitted `PrototypeClassifier` as a file of numbers and names: nothing in it is run when it is read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuropil.errors import MissingAsset, ModelError
from neuropil.models.assets import written_whole

FORMAT = "neuropil prototypes 1"
ARRAYS = ("nearest_", "nearest_distances_", "cases_")
GIVEN = ("encoder", "decoder", "augment")  # settings that may be code


def saved(classifier: Any, path: Path) -> Path:
    """Write it, whole or not at all."""
    settings = {name: _plain(name, value) for name, value in classifier.get_params(deep=False).items()}
    state: dict[str, Any] = {
        "format": FORMAT,
        "settings": {name: value for name, value in settings.items() if value is not ...},
        "given": [name for name, value in settings.items() if value is ...],
        "classes": _names(classifier.classes_),
        "input_shape": list(classifier.input_shape_),
        "features": int(classifier.n_features_in_),
        "names": list(map(str, getattr(classifier, "feature_names_in_", []))),
        "losses": list(classifier.losses_),
        "network": classifier.network_.state_dict(),
    }
    if hasattr(classifier, "cases_"):
        state |= {name: torch.from_numpy(getattr(classifier, name)) for name in ARRAYS}
        state["nearest_labels_"] = _names(classifier.nearest_labels_.ravel())
    with written_whole(path) as whole:
        torch.save(state, whole)
    return path


def loaded(cls: Any, path: Path, modules: dict[str, Any]) -> Any:
    """Read it; `modules` are the settings that a file cannot hold."""
    state = _read(path)
    _check_given(path, state["given"], modules)
    out = cls(**state["settings"], **modules)
    out.classes_, out.input_shape_ = _labels(state["classes"]), tuple(state["input_shape"])
    out.n_features_in_, out.losses_ = state["features"], state["losses"]
    if state["names"]:
        out.feature_names_in_ = np.array(state["names"], dtype=object)
    with torch.random.fork_rng(devices=[]):
        out._build(torch.zeros(1, *out.input_shape_))
    try:
        out.network_.load_state_dict(state["network"])
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the encoder and decoder: {error}") from error
    out.network_.eval()
    if "cases_" in state:
        for name in ARRAYS:
            setattr(out, name, state[name].numpy())
        out.nearest_labels_ = _labels(state["nearest_labels_"]).reshape(out.nearest_.shape)
    return out


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingAsset(f"{path} is not there; name a file that PrototypeClassifier.save has written")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise ModelError(f"{path} is no file of PrototypeClassifier.save ({error})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ModelError(f"{path} is no file of PrototypeClassifier.save: expected format {FORMAT!r}")
    return state


def _check_given(path: Path, wanted: list[str], modules: dict[str, Any]) -> None:
    if set(wanted) != set(modules):
        raise ValueError(
            f"{path} was fitted with {', '.join(wanted) or 'no module'} of its maker's own, and {sorted(modules)} "
            "was given; give the same ones to load(path, ...), untrained ones will do"
        )


def _plain(name: str, value: Any) -> Any:
    """The setting as plain values; `...` for one that is code, None for a generator or a path, which stay behind."""
    if name in GIVEN and not (value is None or isinstance(value, str)):
        return ...
    if name == "checkpoint" or isinstance(value, np.random.RandomState | np.random.Generator):
        return None
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {_plain("", k): _plain("", v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_plain("", v) for v in value)
    return value


def _names(labels: np.ndarray) -> dict[str, Any]:
    return {"dtype": labels.dtype.str, "values": labels.tolist()}


def _labels(names: dict[str, Any] | Tensor) -> np.ndarray:
    assert isinstance(names, dict)
    return np.array(names["values"], dtype=np.dtype(names["dtype"]))
