"""Loss curves: what was measured in a training run, and the learning-rate schedule that it was measured under.

>>> curve = Curve(steps=[100, 200], losses=[3.2, 2.9], schedule=[1e-3] * 201)
>>> curve.total_steps, curve.max_lr, curve.warmup_steps
(200, 0.001, 0)

`read_curve` reads one from a CSV file, as training scripts, TensorBoard and Weights & Biases export them.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from neuropil.errors import NeuropilError
from neuropil.measure.lr_schedules import Rates, endless, rates

# Names of columns, in order of preference; case does not matter.
STEP = ("step", "steps", "global_step", "_step", "iteration", "iter")
RATE = ("lr", "learning_rate", "train/lr", "train/learning_rate")
LOSS = ("loss", "val_loss", "valid_loss", "eval_loss", "eval/loss", "val/loss", "train_loss", "train/loss", "value")


class CurveError(NeuropilError, ValueError):
    """A file that holds no loss curve; the message says what is missing and where."""


@dataclass
class Curve:
    """Losses measured at `steps` of a run under `schedule`.

    steps, losses   the points, in any order; steps are whole numbers from 0, losses above 0
    schedule        the rate at every step from 0 to the last: an array, or a function or torch scheduler, which
                    need `total_steps` (see `neuropil.measure.lr_schedules.rates`)
    name            what errors and listings call it
    n_params        the number of parameters of the model, for the law's model-size term

    Raises ValueError, naming the point, for lengths that differ, a step outside the schedule, and a loss that is not
    finite or not above 0.
    """

    steps: Any
    losses: Any
    schedule: Any
    name: str = "curve"
    n_params: float | None = None
    total_steps: int | None = None

    def __post_init__(self) -> None:
        self.schedule: Rates = rates(self.schedule, self.total_steps)
        self.total_steps = len(self.schedule) - 1
        self.steps = whole_steps(self.steps, self.total_steps, self.name)
        self.losses: Float[np.ndarray, " n"] = np.array(self.losses, dtype=np.float64)
        if self.losses.shape != self.steps.shape:
            raise ValueError(f"{self.name}: {len(self.steps)} steps and losses of shape {self.losses.shape}")
        bad = np.flatnonzero(~(np.isfinite(self.losses) & (self.losses > 0)))
        if len(bad):
            raise ValueError(f"{self.name}: losses[{bad[0]}] is {self.losses[bad[0]]}; expected a number above 0")

    @property
    def max_lr(self) -> float:
        """The highest rate of the schedule."""
        return float(self.schedule.max())

    @property
    def warmup_steps(self) -> int:
        """How many steps the rate rises before it first stops rising."""
        return warmup_length(self.schedule)


def warmup_length(schedule: Rates) -> int:
    """The steps of the leading rise of a schedule: the index at which the rate, once above 0, first stops rising.

    >>> warmup_length(np.array([0.0, 0.5, 1.0, 1.0, 0.2, 0.9])), warmup_length(np.array([1.0, 0.5]))
    (2, 0)
    """
    flat = np.flatnonzero((np.diff(schedule) <= 0) & (schedule[:-1] > 0))
    return int(flat[0]) if len(flat) else len(schedule) - 1


def whole_steps(steps: Any, last: int, name: str) -> Int[np.ndarray, " n"]:
    """The steps as whole numbers; ValueError, naming the first that is none or lies outside 0 to `last`."""
    given = np.asarray(steps, dtype=np.float64)
    if given.ndim != 1:
        raise ValueError(f"{name}: steps of shape {given.shape}; expected one dimension")
    bad = np.flatnonzero(~((given == np.round(given)) & (given >= 0) & (given <= last)))
    if len(bad):
        raise ValueError(f"{name}: steps[{bad[0]}] is {given[bad[0]]:g}; expected a whole number from 0 to {last}")
    return given.astype(np.int64)


def read_curve(path: str | Path, schedule: Any = None, n_params: float | None = None) -> Curve:
    """Read a curve from a CSV file with a head: columns of steps and losses, and of rates unless `schedule` is given.

    A schedule is an array, a function or a torch scheduler; the last two are read up to the last logged step.
    Columns go by the names in `STEP`, `LOSS` and `RATE`. Rates between two logged steps are interpolated, a warm-up
    that began before the first is drawn from 0. A row whose loss is empty is a measurement of something else and
    gives its rate alone. Raises `CurveError` (a ValueError) for a column or a number that is not there, with its line.
    """
    path = Path(path)
    steps, losses = _logged(path, LOSS)
    if schedule is None:
        schedule = read_rates(path, int(steps.max()))
    end = int(steps.max()) if endless(schedule) else None
    try:
        return Curve(steps, losses, schedule, name=path.name, n_params=n_params, total_steps=end)
    except ValueError as error:
        raise CurveError(str(error)) from None


def read_rates(path: str | Path, total_steps: int = 0) -> Rates:
    """The rate at every step from 0 to the last logged one (or `total_steps`, if later) of a CSV file, as above."""
    path = Path(path)
    at, rate = _logged(path, RATE)
    if len(rate) < 2:
        raise CurveError(f"{path} has one learning rate; expected one at least at both ends")
    order = np.argsort(at, kind="stable")
    at, rate = at[order], rate[order]
    if at[0] > 0 and rate[1] > rate[0]:
        at, rate = np.insert(at, 0, 0.0), np.insert(rate, 0, 0.0)
    try:
        return rates(np.interp(np.arange(max(total_steps, int(at[-1])) + 1), at, rate))
    except ValueError as error:
        raise CurveError(f"{path}: {error}") from None


def has_rates(path: str | Path) -> bool:
    """Whether a CSV file has a column of learning rates."""
    with _opened(Path(path)) as table:
        return _column(list(table.fieldnames or []), RATE) is not None


def _logged(path: Path, names: tuple[str, ...]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Steps and entries of the column that goes by one of these names, where it is not empty."""
    with _opened(path) as table:
        heads = list(table.fieldnames or [])
        step, wanted = (_column(heads, each) for each in (STEP, names))
        if step is None or wanted is None:
            lacking = " or ".join(STEP if step is None else names)
            raise CurveError(f"{path} has the columns {', '.join(heads) or 'none'}; expected one called {lacking}")
        found = [
            (_number(path, table.line_num, row, step), _number(path, table.line_num, row, wanted))
            for row in table
            if (row[wanted] or "").strip()
        ]
    if not found:
        raise CurveError(f"{path} has nothing in its column {wanted!r}")
    steps, entries = np.array(found).T
    return steps, entries


@contextmanager
def _opened(path: Path) -> Iterator[csv.DictReader[str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            yield csv.DictReader(file)
        except (UnicodeDecodeError, csv.Error) as error:
            raise CurveError(f"{path} is not CSV text ({error})") from None


def _column(heads: list[str], names: tuple[str, ...]) -> str | None:
    lower = {head.strip().lower(): head for head in reversed(heads)}
    return next((lower[name] for name in names if name in lower), None)


def _number(path: Path, line: int, row: dict[str, str], column: str) -> float:
    text = row[column] or ""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise CurveError(f"{path}, line {line}: {column} is {text!r}; expected a number")
    return found
