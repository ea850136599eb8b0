"""`neuropil coverage`: on which architectures of transformers the neurons are found, tried on every one."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from neuropil.cli import output
from neuropil.cli.app import AsJson, command, interruptible
from neuropil.cli.output import Column
from neuropil.errors import NeuropilError

if TYPE_CHECKING:
    from neuropil.coverage import Coverage

VERDICTS = {"pass": "green", "fail": "red", "out of scope": "yellow"}


class Task(StrEnum):
    """The mappings of transformers' AutoModel classes that are tried."""

    causal_lm = "causal-lm"
    masked_lm = "masked-lm"
    image_classification = "image-classification"


@command(
    "coverage",
    "Models",
    "neuropil coverage                                 every model type; takes minutes",
    "neuropil coverage --only llama,gpt2,mixtral       some of them",
    "neuropil coverage --task causal-lm --json",
)
def coverage(
    only: Annotated[
        str | None,
        typer.Option(metavar="TYPES", help="Model types, separated by commas.", show_default="all"),
    ] = None,
    task: Annotated[list[Task] | None, typer.Option(help="The tasks tried.", show_default="all")] = None,
    write: Annotated[
        Path | None,
        typer.Option(metavar="DIR", file_okay=False, help="Write coverage.md and coverage.json there."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Try on which architectures of transformers neurons are found, seen and clamped rightly.

    Each model type is built at a tiny configuration. The exit code is 1 if any fails.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from neuropil.coverage import MAPPINGS, model_types, run

    tasks = tuple(one.value for one in task) if task else tuple(MAPPINGS)
    types = [name.strip() for name in only.split(",") if name.strip()] if only is not None else None
    known = {name for one in tasks for name in model_types(one)}
    if types is not None and (not types or set(types) - known):
        missing = ", ".join(sorted(set(types) - known)) or "nothing"
        raise typer.BadParameter(f"transformers has no {missing} for {', '.join(tasks)}.", param_hint="--only")
    with interruptible(lambda: "Stopped; a coverage run is not kept. --only TYPES tries some."):
        found = run(tasks, types, progress=output.errors().is_terminal)
    if write is not None:
        write.mkdir(parents=True, exist_ok=True)
        (write / "coverage.md").write_text(found.markdown(), encoding="utf-8")
        (write / "coverage.json").write_text(found.to_json() + "\n", encoding="utf-8")
    output.as_json(json.loads(found.to_json())) if as_json else _shown(found, everything=types is not None)
    if failed := found.count("fail"):
        raise NeuropilError(f"{output.plural(failed, 'model type')} failed.")


def _shown(found: Coverage, everything: bool) -> None:
    """The model types that do not pass (all, if some were asked for), and the counts."""
    rows = [row for row in found.rows if everything or row.verdict != "pass"]
    if rows:
        columns = [Column("model type", style="bold cyan"), Column("task"), Column("verdict")]
        output.listing(
            [*columns, Column("sites", "right"), Column("kind or reason", give=True)],
            [
                [
                    row.model_type,
                    row.mapping,
                    Text(row.verdict, VERDICTS.get(row.verdict, "")),
                    str(row.sites),
                    output.clean(row.reason or row.kinds),
                ]
                for row in rows
            ],
        )
        output.say()
    tasks = [*dict.fromkeys(row.mapping for row in found.rows)]
    counts = [[task, *(f"{found.count(verdict, task):,}" for verdict in VERDICTS)] for task in tasks]
    counts.append(["all", *(f"{found.count(verdict):,}" for verdict in VERDICTS)])
    output.listing([Column("task"), *(Column(verdict, "right") for verdict in VERDICTS)], counts)
    output.hint(f"transformers {found.transformers}")
