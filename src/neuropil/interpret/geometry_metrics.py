r"""Numbers that say how conditions lie in a space of activations.

All take *items x features*, as NumPy arrays or torch tensors, and count in float64.

    alignment       A(Z, X) = <HKH, HLH> / (||HKH|| ||HLH||),   K = Z Z^T,  L = X X^T,  H = I - 11^T/n
    participation   (sum lambda)^2 / sum lambda^2 of HKH: how many directions are used
    parallelism     mean cosine between the vectors that lead from one side of a dichotomy to the other, under the
                    best pairing of conditions
    ccgp            accuracy of a linear classifier of a dichotomy on conditions that it was not trained on
    decodability    its accuracy on trials that it was not trained on

>>> square = np.array([[0.0, 0], [0, 1], [1, 0], [1, 1]])
>>> first, second, xor = dichotomies(4)
>>> round(parallelism(square, first), 6), round(parallelism(square, xor), 6)
(1.0, -1.0)
>>> participation_ratio(square)
2.0

The linear classifier is scikit-learn's `LinearSVC`, on activations centred and divided by one number (the root mean
square of what it is trained on), so that the unit of the activations does not matter.

Sources: linear CKA is Kornblith and others 2019 (arXiv:1905.00414), its unbiased form uses the estimator of Song and
others 2012; parallelism, CCGP and shattering dimensionality are Bernardi and others 2020 (Cell 183).
"""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC
from torch import Tensor

PAIRINGS = 720  # up to so many pairings of conditions are all tried
ENUMERATED = 20_000  # up to so many dichotomies are listed before some are drawn
ZERO = 1e-12  # a centred kernel below this share of the kernel is rounding
FOLDS = 5


class DegenerateGeometry(UserWarning):
    """Activations that do not differ between conditions: the number asked for does not exist, and is NaN."""


def matrix(values: Any, name: str = "activations") -> Float[np.ndarray, "n d"]:
    """`values` as items x features in float64. Raises ValueError for fewer than two axes, no features, or NaN."""
    found = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if found.ndim < 2 or not found.size:
        raise ValueError(f"{name} of shape {found.shape}; expected items x features, at least one of each")
    found = found.reshape(len(found), -1)
    bad = ~np.isfinite(found)
    if bad.any():
        row = int(np.argmax(bad.any(1)))
        raise ValueError(f"{name}: {int(bad.sum())} values are not finite, the first in row {row}; leave such rows out")
    return found


def kernel(values: Any) -> Float[np.ndarray, "n n"]:
    """Z Z^T: the inner products of items."""
    z = matrix(values)
    return z @ z.T


def centred(K: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """H K H: the kernel of features whose means are 0."""
    rows = K.mean(0)
    return K - rows - rows[:, None] + rows.mean()


def kernel_alignment(K: Float[np.ndarray, "n n"], L: Float[np.ndarray, "n n"], unbiased: bool = False) -> float:
    """Centred alignment of two kernels of features (positive semidefinite), in [0, 1].

    `unbiased` leaves the diagonals out (Song and others 2012), so that independent noise in the items does not count
    as alignment; it needs four items and may be below 0. A kernel without differences gives NaN and a warning.
    """
    if K.shape != L.shape:
        raise ValueError(f"kernels of {len(K)} and {len(L)} items; expected the same items in both")
    a, b = (_off_diagonal(K), _off_diagonal(L)) if unbiased else (centred(K), centred(L))
    sizes = [np.linalg.norm(part) for part in (a, b)]
    if any(size <= ZERO * np.linalg.norm(whole) for size, whole in zip(sizes, (K, L), strict=True)):
        warnings.warn("all items are the same in one of the kernels; the alignment is NaN", DegenerateGeometry, 2)
        return math.nan
    found = float((a * b).sum() / (sizes[0] * sizes[1]))
    return found if unbiased else min(max(found, 0.0), 1.0)  # beyond them is rounding


def _off_diagonal(K: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """The U-centred kernel: diagonal 0, and every row sums to 0."""
    n = len(K)
    if n < 4:
        raise ValueError(f"{n} items; the unbiased alignment needs 4 or more")
    bare = K - np.diag(np.diag(K))
    rows = bare.sum(0)
    out = bare - (rows + rows[:, None]) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(out, 0.0)
    return out


def alignment(Z: Any, X: Any, unbiased: bool = False) -> float:
    """Linear CKA of two sets of features of the same items; with labels, columns of ±1, the target alignment.

    >>> round(alignment([[0.0, 1], [1, 0], [1, 1]], [[0.0, 2], [2, 0], [2, 2]]), 6)
    1.0
    """
    z, x = matrix(Z), matrix(X, "features")
    if len(z) != len(x):
        raise ValueError(f"{len(z)} items and {len(x)} items; expected the same items in both")
    return kernel_alignment(z @ z.T, x @ x.T, unbiased)


def participation_ratio(Z: Any) -> float:
    """How many directions the items spread over: from 1 (a line) to the number of features, or of items less 1."""
    K = kernel(Z)
    c = centred(K)
    if np.linalg.norm(c) <= ZERO * np.linalg.norm(K):
        warnings.warn("all items are the same; the participation ratio is NaN", DegenerateGeometry, 2)
        return math.nan
    return float(np.trace(c) ** 2 / (c * c).sum())


# ------------------------------------------------------------------------------------------------- dichotomies


def number_of_dichotomies(n: int) -> int:
    """Balanced ways to split n conditions in two: 3, 35, 6435 for n = 4, 8, 16; sides differ by one for odd n."""
    return math.comb(n, n // 2) // (1 if n % 2 else 2)


def dichotomies(n: int, most: int | None = None, seed: int = 0) -> Bool[np.ndarray, "k n"]:
    """All balanced dichotomies of n conditions, True on one side; or `most` of them, drawn without repetition.

    >>> dichotomies(4).astype(int)
    array([[1, 1, 0, 0],
           [1, 0, 1, 0],
           [1, 0, 0, 1]])
    """
    if n < 2:
        raise ValueError(f"{n} conditions; a dichotomy needs 2 or more")
    count = number_of_dichotomies(n)
    if count > ENUMERATED and (most is None or most > count // 2):
        raise ValueError(f"{n} conditions have {count:,} balanced dichotomies; give most=, as 200, to draw some")
    rng = np.random.default_rng(seed)
    if count <= ENUMERATED:
        found = _all_dichotomies(n)
        return found if most is None or most >= count else found[np.sort(rng.choice(count, most, replace=False))]
    drawn: dict[bytes, np.ndarray] = {}
    while len(drawn) < (most or 0):
        side = np.zeros(n, dtype=bool)
        side[rng.permutation(n)[: n // 2]] = True
        side = ~side if n % 2 == 0 and not side[0] else side
        drawn.setdefault(side.tobytes(), side)
    return np.stack(list(drawn.values()))


def _all_dichotomies(n: int) -> Bool[np.ndarray, "k n"]:
    """For even n the first condition is always on the True side, so that no dichotomy is listed twice."""
    fixed = 1 - n % 2
    members = np.array(list(itertools.combinations(range(fixed, n), n // 2 - fixed)), dtype=int)
    out = np.zeros((len(members), n), dtype=bool)
    out[:, :fixed] = True
    out[np.arange(len(members))[:, None], members] = True
    return out


def check_dichotomy(dichotomy: Any, n: int) -> Bool[np.ndarray, " n"]:
    """`dichotomy` as booleans. Raises ValueError if it is not of n conditions or leaves a side empty."""
    side = np.asarray(dichotomy)
    if side.shape != (n,) or not set(np.unique(side).tolist()) <= {0, 1}:
        raise ValueError(f"a dichotomy of shape {side.shape}; expected {n} booleans, one for each condition")
    if side.all() or not side.any():
        raise ValueError("a dichotomy with all conditions on one side; expected some on each")
    return side.astype(bool)


# ------------------------------------------------------------------------------------------------- parallelism


def parallelism(means: Any, dichotomy: Any) -> float:
    """Parallelism score of a dichotomy: 1 where one translation leads from each condition to its partner.

    means       [n, d] one row a condition
    dichotomy   [n] booleans

    The pairing is the one with the highest score where there are up to 720, else the one with the shortest coding
    vectors (Hungarian assignment), whose score may be lower. Sides of unequal size leave conditions unpaired. NaN
    and a warning where every pairing joins equal conditions. Raises ValueError for fewer than 4 conditions.
    """
    return kernel_parallelism(kernel(means), dichotomy)


def kernel_parallelism(K: Float[np.ndarray, "n n"], dichotomy: Any) -> float:
    """`parallelism` from the inner products of the condition means alone."""
    side = check_dichotomy(dichotomy, len(K))
    few, many = sorted((np.flatnonzero(side), np.flatnonzero(~side)), key=len)
    if len(few) < 2:
        raise ValueError(
            f"{len(few)} condition on one side of {len(K)}; parallelism compares 2 pairs or more: 4 conditions"
        )
    K = centred(K)
    if math.perm(len(many), len(few)) <= PAIRINGS:
        partners = np.array(list(itertools.permutations(many, len(few))))
    else:
        size = np.diag(K)
        distances = size[few][:, None] + size[many] - 2 * K[np.ix_(few, many)]
        partners = many[linear_sum_assignment(distances)[1]][None]
    scores = _mean_cosines(K, np.broadcast_to(few, partners.shape), partners)
    if np.isnan(scores).all():
        warnings.warn("conditions on the two sides are the same; parallelism is NaN", DegenerateGeometry, 2)
        return math.nan
    return float(np.nanmax(scores))


def _mean_cosines(
    K: Float[np.ndarray, "n n"], p: Int[np.ndarray, "pairings m"], q: Int[np.ndarray, "pairings m"]
) -> Float[np.ndarray, " pairings"]:
    """Mean cosine between the m coding vectors z_p - z_q of each pairing; NaN where one is of length 0."""
    m = p.shape[1]
    inner = sum(sign * K[a[:, :, None], b[:, None, :]] for sign, a, b in ((1, p, p), (-1, p, q), (-1, q, p), (1, q, q)))
    assert isinstance(inner, np.ndarray)
    square = np.einsum("pii->pi", inner)
    square = np.where(square > ZERO * max(float(np.trace(K)), 1e-300), square, np.nan)
    length = np.sqrt(square)
    cosines = inner / (length[:, :, None] * length[:, None, :])
    return np.clip((cosines.sum((1, 2)) - m) / (m * (m - 1)), -1, 1)


# ------------------------------------------------------------------------------------------------- classifiers


def default_classifier() -> LinearSVC:
    """The linear support vector machine that is used unless another is given."""
    return LinearSVC(dual="auto", max_iter=20_000, random_state=0)


def accuracies(
    classifier: Any,
    train: tuple[Float[np.ndarray, "a d"], Int[np.ndarray, " a"]],
    test: tuple[Float[np.ndarray, "b d"], Int[np.ndarray, " b"]],
    side: Bool[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """Share of right answers for each condition that is tested, NaN for the others. Parts are (trials, conditions)."""
    centre = train[0].mean(0)
    size = float(np.sqrt(np.mean((train[0] - centre) ** 2))) or 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = clone(classifier).fit((train[0] - centre) / size, side[train[1]])
    right = fitted.predict((test[0] - centre) / size) == side[test[1]]
    out = np.full(len(side), np.nan)
    for condition in np.unique(test[1]):
        out[condition] = right[test[1] == condition].mean()
    return out


def trial_conditions(Z: Any, conditions: Any) -> tuple[Float[np.ndarray, "t d"], Int[np.ndarray, " t"], int]:
    """Trials, the number of each one's condition, and how many conditions there are (0 to n - 1, all of them there)."""
    z, numbers = matrix(Z), np.asarray(conditions)
    if numbers.shape != (len(z),) or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"conditions of shape {numbers.shape} for {len(z)} trials; expected one whole number for each")
    n = int(numbers.max()) + 1
    if numbers.min() < 0 or len(np.unique(numbers)) != n:
        raise ValueError(f"conditions numbered {np.unique(numbers).tolist()}; expected 0 to n - 1 without gaps")
    return z, numbers.astype(np.int64), n


def ccgp_splits(
    dichotomy: Bool[np.ndarray, " n"], most: int | None = None, seed: int = 0
) -> Bool[np.ndarray, "splits n"]:
    """Which conditions to train on: half of each side, in all ways (4 for 2 + 2, 36 for 4 + 4), or `most` drawn."""
    sides = [np.flatnonzero(dichotomy), np.flatnonzero(~dichotomy)]
    if min(map(len, sides)) < 2:
        raise ValueError("CCGP holds out a condition on each side: expected 2 or more there, 4 in all")
    count = math.prod(math.comb(len(s), len(s) // 2) for s in sides)
    rng = np.random.default_rng(seed)
    out: dict[bytes, np.ndarray] = {}
    if most is None or most >= count:
        ways = itertools.product(*(itertools.combinations(s, len(s) // 2) for s in sides))
        for way in ways:
            chosen = np.isin(np.arange(len(dichotomy)), np.concatenate(way))
            out[chosen.tobytes()] = chosen
        return np.stack(list(out.values()))
    while len(out) < most:
        drawn = [rng.permutation(s)[: len(s) // 2] for s in sides]
        chosen = np.isin(np.arange(len(dichotomy)), np.concatenate(drawn))
        out.setdefault(chosen.tobytes(), chosen)
    return np.stack(list(out.values()))


def ccgp_scores(
    Z: Any, conditions: Any, dichotomy: Any, *, classifier: Any = None, most: int | None = 100, seed: int = 0
) -> Float[np.ndarray, " splits"]:
    """The accuracy of every split of the conditions (see `ccgp`), each condition counting alike."""
    z, numbers, n = trial_conditions(Z, conditions)
    side = check_dichotomy(dichotomy, n)
    model = default_classifier() if classifier is None else classifier
    scores = []
    for chosen in ccgp_splits(side, most, seed):
        inside = chosen[numbers]
        parts = (z[inside], numbers[inside]), (z[~inside], numbers[~inside])
        scores.append(np.nanmean(accuracies(model, *parts, side)))
    return np.array(scores)


def ccgp(Z: Any, conditions: Any, dichotomy: Any, **settings: Any) -> float:
    """Cross-condition generalisation: mean accuracy on held-out conditions. Chance is 0.5, and it may lie below.

    Z           [trials, d] activations; condition means, one a condition, will do
    conditions  [trials] whole numbers from 0
    dichotomy   [n] booleans

    Settings: `classifier` (any of scikit-learn's), `most` splits of the conditions, `seed`. Raises ValueError for
    fewer than 2 conditions on a side.

    >>> rectangle = np.array([[0.0, 0], [0, 1], [2, 0], [2, 1]])
    >>> [ccgp(rectangle, range(4), side) for side in dichotomies(4)]
    [1.0, 0.5, 0.0]
    """
    return float(ccgp_scores(Z, conditions, dichotomy, **settings).mean())


def decodability(
    Z: Any,
    conditions: Any,
    dichotomy: Any,
    *,
    test: tuple[Any, Any] | None = None,
    classifier: Any = None,
    seed: int = 0,
) -> float:
    """Accuracy of a linear classifier of a dichotomy, each condition counting alike.

    Tested on `test`, a pair (trials, conditions), if there is one; else by cross-validation over trials of every
    condition; else, where a condition has one trial only, on the trials it was trained on (is it separable?).
    """
    z, numbers, n = trial_conditions(Z, conditions)
    side = check_dichotomy(dichotomy, n)
    model = default_classifier() if classifier is None else classifier
    if test is not None:
        other, its, _ = trial_conditions(*test)
        return float(np.nanmean(accuracies(model, (z, numbers), (other, its), side)))
    fewest = int(np.bincount(numbers).min())
    if fewest < 2:
        return float(np.nanmean(accuracies(model, (z, numbers), (z, numbers), side)))
    fold = _folds(numbers, min(FOLDS, fewest), seed)
    scores = [
        accuracies(model, (z[fold != k], numbers[fold != k]), (z[fold == k], numbers[fold == k]), side)
        for k in range(int(fold.max()) + 1)
    ]
    return float(np.nanmean(np.array(scores)))


def _folds(numbers: Int[np.ndarray, " t"], folds: int, seed: int) -> Int[np.ndarray, " t"]:
    """A fold for each trial; every condition spreads evenly over the folds."""
    rng = np.random.default_rng(seed)
    out = np.empty(len(numbers), dtype=np.int64)
    for condition in np.unique(numbers):
        own = np.flatnonzero(numbers == condition)
        out[own] = rng.permutation(len(own)) % folds
    return out


def shattering_dimensionality(Z: Any, conditions: Any, *, most: int | None = None, **settings: Any) -> float:
    """Mean `decodability` over all balanced dichotomies, or `most` of them; settings are those of `decodability`."""
    n = trial_conditions(Z, conditions)[2]
    sides = dichotomies(n, most, settings.get("seed", 0))
    return float(np.mean([decodability(Z, conditions, side, **settings) for side in sides]))
