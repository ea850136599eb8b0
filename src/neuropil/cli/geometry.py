"""`neuropil geometry`: how the conditions of an experiment lie in recorded activations."""

from __future__ import annotations

import csv
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuropil.cli import output
from neuropil.cli.app import AsJson, command
from neuropil.cli.output import Column
from neuropil.errors import NeuropilError

if TYPE_CHECKING:
    from neuropil.interpret.geometry_report import GeometryReport

FILE = {"exists": True, "dir_okay": False}
MEASURES = ("parallelism", "ccgp", "decodability")


class Null(StrEnum):
    """What parallelism and CCGP are compared with for p-values."""

    rotate = "rotate"
    shuffle = "shuffle"


@command(
    "geometry",
    "The atlas",
    "neuropil geometry acts.npz labels.csv                         every combination of the labels is a condition",
    "neuropil geometry acts.npz labels.csv --condition stimulus    only this column makes conditions",
    "neuropil geometry acts.npz labels.csv --shuffles 200          with p-values",
    "neuropil geometry acts.npz labels.csv --array h --inputs x    two arrays of the file",
)
def geometry(
    activations: Annotated[
        Path,
        typer.Argument(metavar="ACTIVATIONS", help="An .npy or .npz file: trials x neurons (or more axes).", **FILE),
    ],
    labels: Annotated[
        Path, typer.Argument(metavar="LABELS", help="A CSV file with a header and a line for each trial.", **FILE)
    ],
    condition: Annotated[
        list[str] | None,
        typer.Option(
            help="A column that makes conditions; once for each. The other columns of two values are dichotomies.",
            show_default="all columns",
        ),
    ] = None,
    array: Annotated[
        str | None,
        typer.Option(help="The array of the .npz file that holds the activations.", show_default="the only one"),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            help="The array of the .npz file that holds what was shown, for the input alignment.", show_default=False
        ),
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Dichotomies that are drawn where there are more.")] = 35,
    min_trials: Annotated[int, typer.Option(min=1, help="Conditions with fewer trials are left out.")] = 1,
    resamples: Annotated[int, typer.Option(min=1, help="Draws of equally many trials of each condition.")] = 10,
    shuffles: Annotated[int, typer.Option(min=0, help="Shuffles for p-values; 0 for none.")] = 0,
    null: Annotated[Null, typer.Option(help="What parallelism and CCGP are compared with.")] = Null.rotate,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure the geometry of activations: parallelism, cross-condition generalisation and decodability.

    Each line is a way to split the conditions in two. Parallelism is 1 where one direction codes for it whatever else
    differs; CCGP is a linear classifier's accuracy on conditions it was not trained on, chance is 0.5.
    """
    table = _labels(labels)
    unknown = [name for name in condition or [] if name not in table]
    if unknown:
        raise typer.BadParameter(
            f"{labels} has no column {unknown[0]!r}; it has {', '.join(table)}.", param_hint="--condition"
        )
    arrays = _arrays(activations)
    z = _array(arrays, array, activations, "--array", inputs)
    shown = None if inputs is None else _array(arrays, inputs, activations, "--inputs", None)
    own = {name: table[name] for name in condition or table}
    others = {n: v for n, v in table.items() if n not in own and len(set(v.tolist())) == 2}
    from neuropil.interpret.geometry_report import geometry_report

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = geometry_report(
                z,
                own,
                named=others,
                inputs=shown,
                most=most,
                min_trials=min_trials,
                resamples=resamples,
                shuffles=shuffles,
                null=null.value,
                seed=seed,
            )
        except ValueError as error:
            raise NeuropilError(f"{activations} with {labels}: {error}") from None
    for message in dict.fromkeys(str(one.message) for one in said):
        output.note(message, style="yellow")
    if as_json:
        return output.as_json(_facts(found))
    _shown(found)


def _labels(path: Path) -> dict[str, Any]:
    """The columns of the file, as numbers where all are."""
    import numpy as np

    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            lines = list(csv.reader(file))
        except (csv.Error, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"{path} is no CSV file ({error}).", param_hint="LABELS") from None
    if len(lines) < 2:
        raise typer.BadParameter(f"{path} has no lines below its header.", param_hint="LABELS")
    header, rows = lines[0], [line for line in lines[1:] if line]
    for number, line in enumerate(rows, start=2):
        if len(line) != len(header) or "" in line:
            raise typer.BadParameter(
                f"line {number} of {path} has {sum(map(bool, line))} values for {len(header)} columns; leave out "
                "trials without a label, in both files.",
                param_hint="LABELS",
            )
    out: dict[str, Any] = {}
    for place, name in enumerate(header):
        column = [line[place] for line in rows]
        try:
            numbers = np.array([float(value) for value in column])
            whole = bool((numbers == numbers.round()).all())
            out[name] = numbers.astype(int) if whole else numbers
        except (ValueError, OverflowError):
            out[name] = np.array(column)
    return out


def _arrays(path: Path) -> dict[str, Any]:
    import numpy as np

    try:
        found = np.load(path, allow_pickle=False)
        return {"": found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except (ValueError, OSError, EOFError) as error:
        raise typer.BadParameter(
            f"{path} is no .npy or .npz file of numbers ({error}).", param_hint="ACTIVATIONS"
        ) from None


def _array(arrays: dict[str, Any], name: str | None, path: Path, option: str, other: str | None) -> Any:
    """The array of this name, or the only one that is left."""
    left = [key for key in arrays if key != other]
    if name is None and len(left) == 1:
        return arrays[left[0]]
    if name not in arrays:
        there = ", ".join(key or "one array without a name" for key in arrays)
        raise typer.BadParameter(f"{path} has {there}; name one of them.", param_hint=option)
    return arrays[name]


def _facts(found: GeometryReport) -> dict[str, Any]:
    named = ("participation_ratio", "shattering_dimensionality", "input_alignment", "target_alignment")
    facts: dict[str, Any] = {name: getattr(found, name) for name in named}
    if "p_ccgp" in found.table.column_names:
        facts |= {name: getattr(found, name) for name in ("p_input_alignment", "p_target_alignment")}
    return {
        **facts,
        "conditions": dict(zip(found.conditions, found.trials.tolist(), strict=True)),
        "missing": found.missing,
        "dichotomies": found.table.to_pylist(),
    }


def _shown(found: GeometryReport) -> None:
    with_p = "p_ccgp" in found.table.column_names
    columns = [Column("dichotomy", style="bold cyan", give=True)]
    for name in MEASURES:
        columns += [Column(name, "right"), *([Column("p", "right")] if with_p else [])]
    rows = sorted(found.table.to_pylist(), key=lambda row: (not row["named"], -(row["parallelism"] or -2)))
    lines = []
    for row in rows:
        line = [output.clean(row["dichotomy"])]
        for name in MEASURES:
            line += [output.number(row[name]), *([output.number(row[f"p_{name}"], 3)] if with_p else [])]
        lines.append(line)
    output.listing(columns, lines)
    output.say()
    output.pairs(
        {
            "conditions": f"{len(found.conditions)}, {found.trials.min()} to {found.trials.max()} trials each",
            "participation ratio": output.number(found.participation_ratio),
            "shattering dimensionality": output.number(found.shattering_dimensionality),
            **_alignment("input alignment", found.input_alignment, found.p_input_alignment),
            **_alignment("target alignment", found.target_alignment, found.p_target_alignment),
        }
    )


def _alignment(name: str, value: float, p: float) -> dict[str, str]:
    """Nothing where there is none."""
    if value != value:
        return {}
    return {name: output.number(value) + (f" (p {output.number(p, 3)})" if p == p else "")}
