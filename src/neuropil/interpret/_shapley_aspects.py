"""Correlated columns merged into aspects, and what each merge is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from scipy.stats import rankdata


@dataclass(frozen=True)
class Aspects:
    """`groups` of column indices, in the order of their first columns; `merges` is scipy's linkage over all columns,
    with 1 - |r| as height."""

    groups: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    correlation: Float[np.ndarray, "m m"]
    merges: Float[np.ndarray, "k 4"]
    h: float

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of each group's columns, joined."""
        return tuple(" + ".join(self.names[i] for i in group) for group in self.groups)

    def within(self, columns: Sequence[int]) -> dict[str, list[int]]:
        """The aspects restricted to these columns, as positions in `columns`; aspects without any are left out."""
        place = {column: position for position, column in enumerate(columns)}
        kept = [[place[i] for i in group if i in place] for group in self.groups]
        return {" + ".join(self.names[columns[i]] for i in group): group for group in kept if group}

    def tree(self, columns: Sequence[int]) -> Float[np.ndarray, "k 4"]:
        """The linkage of these columns alone."""
        return _linked(self.correlation[np.ix_(columns, columns)])

    def at_merges(self, columns: Sequence[int]) -> list[tuple[float, list[int]]]:
        """For each merge of these columns, from the strongest correlation down, |r| of the least correlated pair and
        the positions in `columns`."""
        clusters = {i: [i] for i in range(len(columns))}
        out = []
        for step, (a, b, height, _) in enumerate(self.tree(columns)):
            merged = sorted(clusters[int(a)] + clusters[int(b)])
            clusters[len(columns) + step] = merged
            out.append((1 - float(height), merged))
        return out


def aspects(X: Any, h: float | int = 0.7, names: Sequence[str] | None = None, nominal: Sequence[int] = ()) -> Aspects:
    """Columns of `X` `[n, m]` clustered by complete linkage of 1 - |Spearman r|, so that in a group every |r| >= h.

    >>> x = np.random.default_rng(0).normal(size=(50, 2))
    >>> aspects(np.column_stack([x, -np.exp(x[:, 0])]), names=("left", "age", "right")).labels
    ('left + right', 'age')

    NaN leaves a row out of the pairs it stands in. Constant columns, and the `nominal` ones, whose codes have no order,
    correlate with nothing. Raises ValueError for fewer than two rows and for names that are not one a column.
    """
    X = np.asarray(X, dtype=np.float64)
    if X.ndim != 2 or len(X) < 2 or (names is not None and len(names) != X.shape[1]):
        raise ValueError(f"X of shape {X.shape}, names {names}; expected at least two rows and a name a column")
    r = spearman(X)
    for i in nominal:
        r[i, :], r[:, i], r[i, i] = 0.0, 0.0, 1.0
    m, merges = X.shape[1], _linked(r)
    cluster = fcluster(merges, 1 - h + 1e-9, "distance") if m > 1 else np.ones(1, dtype=int)
    groups: dict[int, list[int]] = {}
    for column, label in enumerate(cluster):
        groups.setdefault(int(label), []).append(column)
    columns = tuple(map(str, range(m))) if names is None else tuple(map(str, names))
    return Aspects(tuple(map(tuple, groups.values())), columns, r, merges, float(h))


def _linked(r: np.ndarray) -> np.ndarray:
    if len(r) < 2:
        return np.empty((0, 4))
    distance = np.clip(1 - np.abs(r), 0, 1)
    np.fill_diagonal(distance, 0)
    return linkage(squareform(distance, checks=False), "complete")


def spearman(X: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "m m"]:
    """Rank correlations of columns, each over the rows where both are known; 0 where one is constant there."""
    seen = ~np.isnan(X)
    if seen.all():
        return _pearson(rankdata(X, axis=0))
    whole = seen.all(0)
    r = np.eye(X.shape[1])
    r[np.ix_(whole, whole)] = _pearson(rankdata(X[:, whole], axis=0))
    for i in np.flatnonzero(~whole):
        for j in range(X.shape[1]):
            if j < i or whole[j]:
                both = seen[:, i] & seen[:, j]
                if both.sum() > 1:
                    r[i, j] = r[j, i] = _pearson(rankdata(X[both][:, [i, j]], axis=0))[0, 1]
    return r


def _pearson(X: np.ndarray) -> np.ndarray:
    centred = X - X.mean(0)
    length = np.sqrt((centred**2).sum(0))
    unit = np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)
    r = np.clip(unit.T @ unit, -1, 1)
    np.fill_diagonal(r, 1)
    return r
