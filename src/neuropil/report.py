"""What a reproduction measured: rows, a verdict, and the rule that led from the one to the other.

A `Measurement` is one number from one seed. `aggregate` joins the seeds into `Row`s, and a `Report` puts them
beside what the paper says. Reports are kept as JSON and printed as tables.

>>> runs = [[Measurement("magnitude", "accuracy", 0.80)], [Measurement("magnitude", "accuracy", 0.84)]]
>>> aggregate(runs)[0].text
'0.820 ± 0.028'

The spread is the sample standard deviation over seeds (divisor n - 1): how far one run lies from the next,
not how well the mean is known. One seed has no spread.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast, get_args

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from neuropil.errors import NeuropilError

FORMAT = "neuropil.report"
VERSION = 1

Verdict = Literal["holds", "partly", "does not hold"]
VERDICTS: tuple[str, ...] = get_args(Verdict)
Scale = Literal["smoke", "default", "paper"]
SCALES: tuple[str, ...] = get_args(Scale)

SPREAD_NOTE = "mean ± sample standard deviation over seeds"

# The packages whose version can change a measured number.
_MEASURED_WITH = ("neuropil", "torch", "numpy", "transformers", "scikit-learn")


class ReportError(NeuropilError):
    """A file that is no report, is of a later format, or contradicts itself."""

    exit_code = 12


@dataclass(frozen=True)
class Measurement:
    """One number of one seed: `metric` of the variant or baseline called `name`."""

    name: str
    metric: str
    value: float
    unit: str = ""
    higher_is_better: bool | None = True
    baseline: bool = False


@dataclass(frozen=True)
class Row:
    """One metric of one variant, over all seeds.

    `values` has one entry a seed, in the seeds' order, so that variants can be compared seed by seed. Runs
    that ended in NaN or infinity count in `failed` and not in `mean` and `spread`; `mean` is NaN if all
    failed.
    `higher_is_better` is None for a metric that has no better end (a rate that should match a theory, say).
    """

    name: str
    metric: str
    mean: float
    spread: float | None
    seeds: int
    unit: str = ""
    higher_is_better: bool | None = True
    baseline: bool = False
    failed: int = 0
    values: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        metric: str,
        values: Sequence[float],
        unit: str = "",
        higher_is_better: bool | None = True,
        baseline: bool = False,
    ) -> Row:
        """The row of these values, one a seed.

        >>> Row.of("no rewind", "accuracy", [0.5, float("nan")]).text
        '0.5 (1 of 2 failed)'
        """
        values = tuple(float(value) for value in values)
        if not values:
            raise ValueError(f"Row {name!r}, metric {metric!r}: no values; give one a seed.")
        finite = [value for value in values if math.isfinite(value)]
        mean = statistics.fmean(finite) if finite else math.nan
        spread = statistics.stdev(finite) if len(finite) > 1 else None
        failed = len(values) - len(finite)
        return cls(name, metric, mean, spread, len(values), unit, higher_is_better, baseline, failed, values)

    @property
    def text(self) -> str:
        """The row's number as it is printed: mean, spread, unit, and how many runs failed.

        >>> Row.of("GraNet", "accuracy", [91.2, 91.4, 90.9], unit="%").text
        '91.17 ± 0.25 %'
        """
        parts = ["all failed"] if math.isnan(self.mean) else [_number(self.mean, self.spread)]
        if self.unit and not math.isnan(self.mean):
            parts.append(self.unit)
        if self.failed and not math.isnan(self.mean):
            parts.append(f"({self.failed} of {self.seeds} failed)")
        return " ".join(parts)


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error: infinite for one seed, both NaN if any seed failed.

    >>> mean_and_error([1.0, 2.0, 3.0])
    (2.0, 0.5773502691896258)
    """
    values = list(values)
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.fmean(values), error


def paired(a: Iterable[float], b: Iterable[float]) -> tuple[float, float]:
    """`mean_and_error` of `a` less `b`, seed by seed."""
    return mean_and_error(x - y for x, y in zip(a, b, strict=True))


def aggregate(runs: Iterable[Iterable[Measurement]]) -> list[Row]:
    """Join the measurements of several seeds into rows, in the order of the first seed.

    Every seed must measure the same things and describe them alike; a variant that broke down reports NaN
    rather than nothing. Raises ValueError otherwise.
    """
    seeds = [list(run) for run in runs]
    if not seeds or not seeds[0]:
        raise ValueError("Nothing to aggregate: no seed, or a first seed without measurements.")
    tables = [_by_key(run, number) for number, run in enumerate(seeds)]
    for number, table in enumerate(tables[1:], start=1):
        _check_same(tables[0], table, number)
    return [
        Row.of(
            first.name,
            first.metric,
            [table[key].value for table in tables],
            first.unit,
            first.higher_is_better,
            first.baseline,
        )
        for key, first in tables[0].items()
    ]


def find(rows: Iterable[Row], name: str, metric: str) -> Row:
    """The row of this variant and metric; raises LookupError with the names there are.

    >>> find([Row.of("ours", "loss", [1.0])], "ours", "loss").mean
    1.0
    """
    rows = list(rows)
    for row in rows:
        if (row.name, row.metric) == (name, metric):
            return row
    known = ", ".join(f"{row.name!r}/{row.metric!r}" for row in rows)
    raise LookupError(f"No row {name!r}/{metric!r}. There are: {known or 'none'}.")


@dataclass(frozen=True)
class Report:
    """The outcome of one reproduction.

    `rule` is the sentence, written before the run, by which the rows give the verdict. `paper_says` quotes
    the paper's figures with their setting. `deviations` says in what the run differs from the paper's.
    """

    slug: str
    title: str
    claim: str
    rule: str
    verdict: Verdict
    rows: tuple[Row, ...]
    paper_says: tuple[str, ...]
    seeds: tuple[int, ...]
    scale: Scale
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            expected = ", ".join(VERDICTS)
            raise ReportError(f"{self.slug}: verdict {self.verdict!r}; expected one of {expected}.")
        if self.scale not in SCALES:
            raise ReportError(f"{self.slug}: scale {self.scale!r}; expected one of {', '.join(SCALES)}.")

    def row(self, name: str, metric: str) -> Row:
        """The row of this variant and metric."""
        return find(self.rows, name, metric)

    @property
    def metrics(self) -> list[str]:
        """The metrics measured, in the rows' order."""
        return list(dict.fromkeys(row.metric for row in self.rows))

    def to_json(self) -> str:
        """The report as JSON text: keys sorted, so that equal reports are equal files.

        JSON has no NaN or infinity; they are written as the strings "NaN", "Infinity" and "-Infinity", and an
        absent spread as null, so none of them can be taken for a number or for one another.
        """
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        text = json.dumps(encode(data), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        return text + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote. Raises `ReportError` for anything else."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ReportError(f"Not a report: not JSON ({error}).") from None
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ReportError(f'Not a report: JSON without "format": "{FORMAT}".')
        version = data.pop("version", None)
        if version != VERSION:
            raise ReportError(f"Report of format version {version}; this neuropil reads version {VERSION}.")
        return _report(data)

    def save(self, path: Path | str) -> Path:
        """Write the JSON to `path` under a temporary name, then rename it: no reader sees half a file."""
        return write_atomically(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, path: Path | str) -> Report:
        """Read a report file; `ReportError` names the file."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ReportError(f"No report at {path}.") from None
        except (ReportError, UnicodeDecodeError) as error:
            raise ReportError(f"{path}: {error}") from None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield Text(f"{self.title}  ({self.slug})", style="bold")
        yield Text(f"Claim  {self.claim}")
        yield Text(f"Rule   {self.rule}")
        if self.paper_says:
            yield Panel("\n".join(f"• {escape(said)}" for said in self.paper_says), title="The paper says")
        yield from (self._table(metric) for metric in self.metrics)
        style = {"holds": "bold green", "partly": "bold yellow", "does not hold": "bold red"}[self.verdict]
        yield Text.assemble("Verdict  ", (self.verdict, style))
        yield from (Text(f"Note: {note}") for note in self.notes)
        yield from (Text(f"Unlike the paper: {deviation}") for deviation in self.deviations)
        count = f"{len(self.seeds)} seed{'s' if len(self.seeds) != 1 else ''}"
        yield Text(f"{SPREAD_NOTE}; {count}, scale {self.scale}, {self.seconds:.0f} s", style="dim")

    def _table(self, metric: str) -> Table:
        rows = [row for row in self.rows if row.metric == metric]
        better = {True: ", higher is better", False: ", lower is better", None: ""}[rows[0].higher_is_better]
        table = Table(title=f"Measured: {escape(metric)}{better}", title_justify="left", expand=False)
        table.add_column("variant")
        table.add_column("measured", justify="right")
        for row in rows:
            name = escape(row.name) + (" [dim](baseline)[/dim]" if row.baseline else "")
            table.add_row(name, escape(row.text))
        return table


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a measured number."""
    found = {"python": platform.python_version()}
    for name in _MEASURED_WITH:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_atomically(path: Path, data: bytes) -> Path:
    """Write bytes beside `path` under a temporary name and rename; makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _number(mean: float, spread: float | None) -> str:
    """Mean and spread with as many decimals as two significant digits of the spread need."""
    if spread is None or spread == 0:
        text = f"{mean:.4g}"
        return text if spread is None else f"{text} ± 0"
    decimals = max(0, 1 - math.floor(math.log10(spread)))
    if decimals > 6:
        return f"{mean:.6g} ± {spread:.2g}"
    return f"{mean:.{decimals}f} ± {spread:.{decimals}f}"


def _by_key(run: list[Measurement], number: int) -> dict[tuple[str, str], Measurement]:
    table = {(entry.name, entry.metric): entry for entry in run}
    if len(table) != len(run):
        keys = [(entry.name, entry.metric) for entry in run]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"Seed number {number} measures {twice[0]!r}/{twice[1]!r} twice.")
    return table


def _check_same(
    first: dict[tuple[str, str], Measurement], other: dict[tuple[str, str], Measurement], number: int
) -> None:
    odd = set(first) ^ set(other)
    if odd:
        name, metric = min(odd)
        raise ValueError(
            f"Seed number {number} and the first one disagree on whether {name!r}/{metric!r} is measured; "
            f"a variant that breaks down must report NaN."
        )
    for key, entry in first.items():
        same = ("unit", "higher_is_better", "baseline")
        if any(getattr(entry, name) != getattr(other[key], name) for name in same):
            row = f"{key[0]!r}/{key[1]!r}"
            raise ValueError(f"Seed number {number} describes {row} otherwise than the first.")


def encode(value: Any) -> Any:
    """The value with every float that JSON cannot hold as a string, tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {str(key): encode(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [encode(entry) for entry in value]
    return value


def decode_number(value: Any) -> float:
    """The float that `encode` wrote; `ReportError` for anything else."""
    if isinstance(value, bool) or (isinstance(value, str) and value not in {"NaN", "Infinity", "-Infinity"}):
        raise ReportError(f"Not a report: {value!r} where a number belongs.")
    return float(value)


def _report(data: dict[str, Any]) -> Report:
    known = {entry.name for entry in fields(Report)}
    if set(data) != known:
        odd = ", ".join(sorted(set(data) ^ known))
        raise ReportError(f"Not a report: missing or unknown {odd}.")
    try:
        data["rows"] = tuple(_row(entry) for entry in data["rows"])
        data["seconds"] = decode_number(data["seconds"])
        for name in ("paper_says", "seeds", "notes", "deviations"):
            data[name] = tuple(data[name])
        return Report(**data)
    except (TypeError, ValueError, KeyError) as error:
        raise ReportError(f"Not a report: {error}") from None


def _row(entry: dict[str, Any]) -> Row:
    spread = entry["spread"]
    return Row(
        **{
            **entry,
            "mean": decode_number(entry["mean"]),
            "spread": None if spread is None else decode_number(spread),
            "values": tuple(decode_number(value) for value in cast(list[Any], entry["values"])),
        }
    )
