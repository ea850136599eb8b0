"""Whether prototypes explain, in numbers: do they look like data, do data lie near them, do they keep their word?

The paper shows pictures with and without its terms R1 and R2. These are measures of what the pictures show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

SAMPLE = 500  # held-out rows that are decoded, and rows whose codes are compared pair by pair


@dataclass(frozen=True)
class PrototypeQuality:
    """`realism`, `coverage` and `closest_pair` are squared distances as shares of another; see each."""

    misfit: float  # squared distance of a decoded prototype to the training row most like it, mean; NaN undecoded
    realism: float  # misfit as a multiple of the same for reconstructions of held-out rows: 1 is as good as those
    coverage: float  # from held-out codes to the nearest prototype, by the mean between two codes: 0 on prototypes
    remoteness: float  # from prototypes to the nearest training code, by the same: 0 on codes
    closest_pair: float  # between the two nearest prototypes, by the same: 0 for a duplicate
    classes: int  # how many classes the prototypes stand for
    agreement: float  # share of decoded prototypes whose class is that of the training row most like them


def prototype_quality(classifier: Any, X: Any, y: Any, X_held_out: Any, *, seed: int = 0) -> PrototypeQuality:
    """Measure a fitted `PrototypeClassifier` against its training rows `X`, `y` and rows it has not seen.

    >>> from sklearn.datasets import load_iris
    >>> from neuropil.interpret import PrototypeClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> flowers = PrototypeClassifier(4, epochs=60, batch_size=25, random_state=0).fit(X[::2], y[::2])
    >>> found = prototype_quality(flowers, X[::2], y[::2], X[1::2])
    >>> found.coverage >= 0, 0 <= found.agreement <= 1
    (True, True)
    """
    rng = np.random.default_rng(seed)
    rows = np.asarray(X, dtype=np.float32).reshape(len(X), -1)
    held = np.asarray(X_held_out, dtype=np.float32)
    prototypes = classifier.prototypes_
    codes, others = classifier.encode(X), classifier.encode(held)
    spread = _mean_between(others[rng.permutation(len(others))[:SAMPLE]])
    decoded = classifier.decode_prototypes()
    misfit, realism, agreement = math.nan, math.nan, math.nan
    if decoded is not None:
        distance, row = nearest(decoded.reshape(len(decoded), -1), rows)
        again = classifier.reconstruct(held[rng.permutation(len(held))[:SAMPLE]])
        misfit = float(distance.mean())
        realism = _share(misfit, float(nearest(again.reshape(len(again), -1), rows)[0].mean()))
        agreement = float((np.asarray(y)[row] == classifier.prototype_classes_).mean())
    return PrototypeQuality(
        misfit=misfit,
        realism=realism,
        coverage=_share(float(nearest(others, prototypes)[0].mean()), spread),
        remoteness=_share(float(nearest(prototypes, codes)[0].mean()), spread),
        closest_pair=_share(_closest(prototypes), spread),
        classes=len(np.unique(classifier.prototype_classes_)),
        agreement=agreement,
    )


def nearest(
    queries: Float[np.ndarray, "n p"], rows: Float[np.ndarray, "r p"]
) -> tuple[Float[np.ndarray, " n"], np.ndarray]:
    """Squared distance to the nearest row, and which it is."""
    q, r = torch.from_numpy(queries), torch.from_numpy(rows)
    which = torch.cat([torch.cdist(part, r).argmin(1) for part in q.split(200)])
    exact: Tensor = (q - r[which]).square().sum(1)  # cdist loses digits where two are close
    return exact.numpy(), which.numpy()


def _share(part: float, whole: float) -> float:
    """part / whole; infinite or NaN where codes have fallen together or reconstructions are the data themselves."""
    if whole:
        return part / whole
    return math.inf if part > 0 else math.nan


def _mean_between(codes: Float[np.ndarray, "n q"]) -> float:
    """Mean squared distance of two different rows: 2 n / (n - 1) times the variance."""
    return float(2 * len(codes) / (len(codes) - 1) * codes.var(0, dtype=np.float64).sum())


def _closest(prototypes: Float[np.ndarray, "m q"]) -> float:
    if len(prototypes) < 2:
        return math.nan
    return float(torch.pdist(torch.from_numpy(prototypes)).square().min())
