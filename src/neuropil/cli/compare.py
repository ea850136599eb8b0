"""`neuropil compare`: methods for one purpose on the same models, in one table."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from neuropil.cli import output
from neuropil.cli.app import AsJson, command, interruptible
from neuropil.cli.output import Column
from neuropil.cli.papers import PANEL


class What(StrEnum):
    """What is compared."""

    compress = "compress"


class Scale(StrEnum):
    """How much is run: seconds, or an hour on two cores."""

    smoke = "smoke"
    default = "default"


@command(
    "compare",
    PANEL,
    "neuropil compare compress                         every method on every model; goes on where it was stopped",
    "neuropil compare compress --model smollm2 --arm 'uniform 4,uniform 3'",
    "neuropil compare compress --scale smoke --json",
)
def compare(
    what: Annotated[What, typer.Argument(help="What is compared.")] = What.compress,
    model: Annotated[
        list[str] | None, typer.Option(help="Only this model: resnet, swin or smollm2.", show_default="all")
    ] = None,
    arm: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Only these methods, separated by commas; names with commas by semicolons.",
            show_default="all",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=20, help="How many seeds.")] = 3,
    scale: Annotated[Scale, typer.Option(help="How much is run.")] = Scale.default,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the page goes.", show_default="docs, if all was run")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what is already there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare every method of compression on the same three models: quality, bytes, speed and memory."""
    from neuropil.compare import ARMS, SUBJECTS, lines, run, write

    names = None if arm is None else [n.strip() for n in arm.split(";" if ";" in arm else ",") if n.strip()]
    known = [one.name for one in ARMS]
    if names is not None and (unknown := [name for name in names if name not in known]):
        raise typer.BadParameter(f"got {unknown[0]!r}; there are {'; '.join(known)}.", param_hint="--arm")
    subjects = tuple(model) if model else SUBJECTS
    if unknown := [name for name in subjects if name not in SUBJECTS]:
        raise typer.BadParameter(f"got {unknown[0]!r}; there are {', '.join(SUBJECTS)}.", param_hint="--model")
    outcomes = []
    with interruptible(lambda: "Stopped; every finished method is kept. The same command goes on from there."):
        for outcome in run(subjects, names, tuple(range(seeds)), scale.value, fresh):
            outcomes.append(outcome)
            output.note(f"{outcome.subject}, {outcome.arm}, seed {outcome.seed}: {outcome.quality:.2f}")
    found = lines(outcomes)
    if (folder := out or _docs(model, names)) is not None:
        write(outcomes, scale.value, folder)
        output.note(f"written: {folder / 'compare-compress.md'}")
    if as_json:
        output.as_json([asdict(line) for line in found])
        return
    columns = [
        Column("model"),
        Column("method"),
        *(Column(h, "right") for h in ("quality", "of float32", "speed")),
        Column(""),
    ]
    rows = [
        [
            line.subject,
            line.arm,
            f"{line.quality:.2f}",
            f"{line.share:.3f}",
            f"{line.speed:.2f}",
            "★" if line.pareto else "",
        ]
        for line in found
    ]
    output.listing(columns, rows)


def _docs(model: list[str] | None, names: list[str] | None) -> Path | None:
    """docs of the source tree, if the whole comparison was run."""
    from neuropil.papers import results_folder

    folder = results_folder()
    return None if model or names or folder is None else folder.parent
