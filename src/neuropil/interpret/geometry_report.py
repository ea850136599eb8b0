r"""The geometry of recorded activations: a row for each way to split the conditions in two.

Activations may come from a layer (`neuropil.interpret.representation`) or from a microscope: trials x neurons, each
trial with the condition it was taken in. Conditions may have unequal numbers of trials, and some that the design
asks for may be missing.

>>> rng = np.random.default_rng(0)
>>> stimulus, context = (rng.integers(2, size=200) for _ in range(2))
>>> trials = np.stack([3 * stimulus, 2 * context, stimulus * context], 1) + 0.1 * rng.standard_normal((200, 3))
>>> found = geometry_report(trials, {"stimulus": stimulus, "context": context})
>>> found.table.select(["dichotomy", "parallelism", "ccgp", "decodability"]).to_pylist()[0]["dichotomy"]
'stimulus'
>>> found.conditions, found.trials.sum().item()
(('0, 0', '0, 1', '1, 0', '1, 1'), 200)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neuropil.interpret.geometry_metrics import (
    ccgp,
    decodability,
    dichotomies,
    kernel,
    kernel_alignment,
    kernel_parallelism,
    matrix,
    number_of_dichotomies,
    participation_ratio,
)

ALL = 35  # as many dichotomies as 8 conditions have are all measured; of more conditions, so many are drawn
MEASURES = ("parallelism", "ccgp", "decodability")
NULLS = ("rotate", "shuffle")


class MissingConditions(UserWarning):
    """Conditions that the design has and the recording has not, or not often enough."""


@dataclass(frozen=True, eq=False)
class GeometryReport:
    """What `geometry_report` found.

    table        a row a dichotomy: `dichotomy` (its name, or the conditions on one side), `named`, `parallelism`,
                 `ccgp`, `decodability`, and p-values `p_...` where shuffles were asked for
    conditions   their names, in the order of `trials` and of the dichotomies
    trials       [n] how many trials each has
    participation_ratio          directions that the condition means spread over
    shattering_dimensionality    mean decodability of the balanced dichotomies that were measured
    input_alignment, target_alignment   of the condition means with the inputs and with the named variables, NaN
                 where there are none; `p_input_alignment`, `p_target_alignment` likewise without shuffles
    missing      conditions of the design that were left out
    """

    table: pa.Table
    conditions: tuple[str, ...]
    trials: Int[np.ndarray, " n"]
    participation_ratio: float
    shattering_dimensionality: float
    input_alignment: float
    target_alignment: float
    p_input_alignment: float
    p_target_alignment: float
    missing: tuple[str, ...]


def geometry_report(
    activations: Any,
    conditions: Any,
    *,
    named: Mapping[str, Any] | None = None,
    inputs: Any = None,
    most: int = ALL,
    min_trials: int = 1,
    resamples: int = 10,
    shuffles: int = 0,
    null: str = "rotate",
    unbiased: bool = False,
    classifier: Any = None,
    seed: int = 0,
) -> GeometryReport:
    """Measure how the conditions lie in the activations.

    activations  [trials, ...] array or tensor; all axes but the first are features
    conditions   what each trial was taken in: [trials] of numbers or words, or a table, name -> [trials], whose
                 combinations are the conditions. Its variables with two values are dichotomies with a name
    named        more dichotomies by name: [trials] of two values, the same for all trials of a condition
    inputs       [trials, ...] what was shown, for the input alignment (its condition means)
    most         dichotomies measured where there are more; drawn at random. Named ones always are
    min_trials   conditions with fewer are left out
    resamples    where conditions differ in trials, CCGP and decodability are averages over so many draws of as many
                 trials from each as the smallest has
    shuffles     for p-values. Decodability is compared with shuffled conditions of trials. Parallelism and CCGP are
                 compared by `null`: "rotate" turns the trials of each condition about the mean of all, each by a
                 random rotation of its own, which keeps how far apart conditions are and leaves their arrangement to
                 chance; "shuffle" as for decodability. Alignments are compared with shuffled conditions
    unbiased     leave noise that conditions do not share out of the alignments (see `kernel_alignment`)
    classifier   any linear one of scikit-learn's; a linear support vector machine if there is none

    A p-value is (1 + shuffles at least as high) / (1 + shuffles). Most of the time is in classifiers: for each
    dichotomy, each draw and each shuffle, 5 for decodability and for CCGP as many as the conditions can be split in
    (4 for four conditions, 36 for eight, 100 at most).

    Raises ValueError for activations that are not finite, conditions of another length, fewer than 4 conditions, and
    named variables that are not of two values or differ within a condition. Warns of missing conditions.
    """
    if null not in NULLS:
        raise ValueError(f"null {null!r}; expected one of {', '.join(NULLS)}")
    z = matrix(activations)
    table = _table(conditions, len(z))
    names, numbers, missing = _conditions(table, min_trials)
    kept = numbers >= 0
    z, numbers = z[kept], numbers[kept]
    if len(names) < 4:
        raise ValueError(f"{len(names)} conditions with {min_trials} trials or more; expected 4 or more")
    if missing:
        said = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        warnings.warn(f"{len(missing)} conditions of the design left out: {said}", MissingConditions, 2)
    own = {name: _side(name, values[kept], numbers) for name, values in table.items() if _binary(values[kept])}
    own |= {name: _side(name, _column(v, len(kept), name)[kept], numbers) for name, v in (named or {}).items()}
    own = {name: side for name, side in own.items() if 0 < side.sum() < len(side)}
    sides, labels = _sides(own, names, most, seed)
    measure = _Measure(z, numbers, sides, resamples, classifier, seed)
    found = measure.all()
    values: dict[str, Any] = {"dichotomy": labels, "named": [i < len(own) for i in range(len(sides))], **found}
    rng = np.random.default_rng(seed)
    if shuffles:
        values |= {f"p_{name}": p for name, p in measure.p_values(found, shuffles, null, rng).items()}
    K = kernel(measure.means)
    shown = None if inputs is None else kernel(_means(matrix(inputs, "inputs")[kept], numbers))
    targets = None if not own else kernel(np.where(np.stack(list(own.values()), 1), 1.0, -1.0))
    (a, p_a), (b, p_b) = (_aligned(K, other, unbiased, shuffles, rng) for other in (shown, targets))
    balanced = np.abs(2 * sides.sum(1) - sides.shape[1]) <= 1
    return GeometryReport(
        table=pa.table(values),
        conditions=names,
        trials=np.bincount(numbers),
        participation_ratio=participation_ratio(measure.means),
        shattering_dimensionality=float(found["decodability"][balanced].mean()) if balanced.any() else math.nan,
        input_alignment=a,
        target_alignment=b,
        p_input_alignment=p_a,
        p_target_alignment=p_b,
        missing=missing,
    )


# ------------------------------------------------------------------------------------------------- conditions


def _column(values: Any, trials: int, name: str) -> np.ndarray:
    column = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if column.shape != (trials,):
        raise ValueError(f"{name} of shape {column.shape} for {trials} trials; expected one value for each")
    if column.dtype.kind == "f" and np.isnan(column).any():
        raise ValueError(f"{name}: {int(np.isnan(column).sum())} trials without a value (NaN); leave them out")
    return column


def _table(conditions: Any, trials: int) -> dict[str, np.ndarray]:
    if not isinstance(conditions, Mapping):
        conditions = {"condition": conditions}
    if not conditions:
        raise ValueError("no conditions; give one value for each trial, or a table of them")
    return {str(name): _column(values, trials, str(name)) for name, values in conditions.items()}


def _conditions(table: dict[str, np.ndarray], least: int) -> tuple[tuple[str, ...], np.ndarray, tuple[str, ...]]:
    """Names, the number of each trial's condition (-1 where it is left out), and what the full design lacks."""
    levels = [np.unique(values) for values in table.values()]
    codes = [np.searchsorted(level, values) for level, values in zip(levels, table.values(), strict=True)]
    shape = tuple(map(len, levels))
    flat = np.ravel_multi_index(tuple(codes), shape)
    counts = np.bincount(flat, minlength=math.prod(shape))
    there = np.flatnonzero(counts >= max(least, 1))
    place = np.full(len(counts), -1)
    place[there] = np.arange(len(there))

    def name(at: int) -> str:
        return ", ".join(str(level[i]) for level, i in zip(levels, np.unravel_index(at, shape), strict=True))

    missing = np.flatnonzero(counts < max(least, 1))
    return tuple(map(name, there.tolist())), place[flat], tuple(map(name, missing.tolist()))


def _binary(values: np.ndarray) -> bool:
    return len(np.unique(values)) == 2


def _side(name: str, values: np.ndarray, numbers: np.ndarray) -> Bool[np.ndarray, " n"]:
    """A variable of trials as a dichotomy of conditions: True where it has the larger of its two values."""
    levels = np.unique(values)
    if len(levels) != 2:
        raise ValueError(f"{name} has {len(levels)} values; a dichotomy has two")
    high = values == levels[1]
    share = np.bincount(numbers, weights=high) / np.bincount(numbers)
    if ((share > 0) & (share < 1)).any():
        raise ValueError(f"{name} differs between trials of one condition; add it to the conditions")
    return share > 0.5


def _sides(
    own: dict[str, np.ndarray], names: Sequence[str], most: int, seed: int
) -> tuple[Bool[np.ndarray, "k n"], list[str]]:
    """The named dichotomies, then the balanced ones that are not among them."""
    n = len(names)
    count = number_of_dichotomies(n)
    drawn = dichotomies(n, None if count <= most else most, seed)
    known = {side.tobytes() for side in own.values()} | {(~side).tobytes() for side in own.values()}
    others = [side for side in drawn if side.tobytes() not in known]
    labels = [*own, *(" | ".join(names[i] for i in np.flatnonzero(side).tolist()) for side in others)]
    return np.stack([*own.values(), *others]), labels


def _means(z: Float[np.ndarray, "t d"], numbers: Int[np.ndarray, " t"]) -> Float[np.ndarray, "n d"]:
    return np.stack([z[numbers == condition].mean(0) for condition in range(int(numbers.max()) + 1)])


# ------------------------------------------------------------------------------------------------- measuring


class _Measure:
    """All dichotomies of one recording, and of its shuffled versions."""

    def __init__(
        self,
        z: Float[np.ndarray, "t d"],
        numbers: Int[np.ndarray, " t"],
        sides: Bool[np.ndarray, "k n"],
        resamples: int,
        classifier: Any,
        seed: int,
    ) -> None:
        self.z, self.numbers, self.sides, self.classifier, self.seed = z, numbers, sides, classifier, seed
        self.means = _means(z, numbers)
        counts = np.bincount(numbers)
        rng = np.random.default_rng(seed)
        equal = bool((counts == counts.min()).all())
        self.draws = [np.arange(len(z))] if equal else [self._draw(int(counts.min()), rng) for _ in range(resamples)]

    def _draw(self, many: int, rng: np.random.Generator) -> Int[np.ndarray, " m"]:
        """As many trials of every condition."""
        return np.concatenate(
            [rng.permutation(np.flatnonzero(self.numbers == c))[:many] for c in range(len(self.means))]
        )

    def all(self) -> dict[str, Float[np.ndarray, " k"]]:
        found = [self._one(self.z, self.numbers, draw) for draw in self.draws]
        out = {name: np.mean([one[name] for one in found], axis=0) for name in found[0]}
        return {"parallelism": self._parallelism(self.z, self.numbers), **out}

    def _parallelism(self, z: np.ndarray, numbers: np.ndarray) -> Float[np.ndarray, " k"]:
        K = kernel(_means(z, numbers))
        return np.array([kernel_parallelism(K, s) if _pairs(s) else math.nan for s in self.sides])

    def _one(
        self, z: np.ndarray, numbers: np.ndarray, draw: np.ndarray, which: Sequence[str] = ("ccgp", "decodability")
    ) -> dict[str, Float[np.ndarray, " k"]]:
        settings = {"classifier": self.classifier, "seed": self.seed}
        part, its = z[draw], numbers[draw]
        out = {}
        if "ccgp" in which:
            out["ccgp"] = np.array([ccgp(part, its, s, **settings) if _pairs(s) else math.nan for s in self.sides])
        if "decodability" in which:
            out["decodability"] = np.array([decodability(part, its, s, **settings) for s in self.sides])
        return out

    def p_values(
        self, found: dict[str, np.ndarray], shuffles: int, null: str, rng: np.random.Generator
    ) -> dict[str, Float[np.ndarray, " k"]]:
        """The share of shuffled recordings that are at least as high, for each measure and dichotomy."""
        above = {name: np.ones(len(self.sides)) for name in MEASURES}
        turn = _Rotation(self.z, self.numbers)
        for _ in range(shuffles):
            draw = self.draws[int(rng.integers(len(self.draws)))]
            mixed = rng.permutation(self.numbers)
            # A draw has as many trials of each condition only under the true conditions, so the labels of the drawn
            # trials are mixed among themselves.
            inside = self.numbers.copy()
            inside[draw] = rng.permutation(self.numbers[draw])
            chance = self._one(self.z, inside, draw, ("decodability",))
            if null == "rotate":
                z = turn.draw(rng)
                chance |= self._one(z, self.numbers, draw, ("ccgp",))
                chance["parallelism"] = self._parallelism(z, self.numbers)
            else:
                chance |= self._one(self.z, inside, draw, ("ccgp",))
                chance["parallelism"] = self._parallelism(self.z, mixed)
            for name in MEASURES:
                above[name] += chance[name] >= found[name] - 1e-12
        return {name: np.where(np.isnan(found[name]), np.nan, count / (shuffles + 1)) for name, count in above.items()}


class _Rotation:
    """Trials of each condition, turned about the mean of all by a uniformly random rotation of their own.

    A rotation of q trials is decided by where it takes the at most q directions that they span, so random
    orthonormal vectors for these are enough, whatever the number of neurons.
    """

    def __init__(self, z: Float[np.ndarray, "t d"], numbers: Int[np.ndarray, " t"]) -> None:
        self.centre, self.shape = _means(z, numbers).mean(0), z.shape
        self.parts = []
        for condition in range(int(numbers.max()) + 1):
            own = np.flatnonzero(numbers == condition)
            left, size, _ = np.linalg.svd(z[own] - self.centre, full_matrices=False)
            self.parts.append((own, left * size))

    def draw(self, rng: np.random.Generator) -> Float[np.ndarray, "t d"]:
        out = np.empty(self.shape)
        for own, inside in self.parts:
            q, r = np.linalg.qr(rng.standard_normal((self.shape[1], inside.shape[1])))
            out[own] = self.centre + inside @ (q * np.sign(np.diag(r))).T
        return out


def _pairs(side: np.ndarray) -> bool:
    return bool(2 <= side.sum() <= len(side) - 2)


def _aligned(
    K: Float[np.ndarray, "n n"],
    other: Float[np.ndarray, "n n"] | None,
    unbiased: bool,
    shuffles: int,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """The alignment of two kernels of conditions, and its p-value among shuffled conditions."""
    if other is None:
        return math.nan, math.nan
    found = kernel_alignment(K, other, unbiased)
    if not shuffles or math.isnan(found):
        return found, math.nan
    orders = (rng.permutation(len(K)) for _ in range(shuffles))
    above = sum(kernel_alignment(K[np.ix_(o, o)], other, unbiased) >= found - 1e-12 for o in orders)
    return found, (1 + above) / (shuffles + 1)
