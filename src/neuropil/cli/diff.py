"""`neuropil diff`: what fine-tuning, quantization or anything else did to the neurons of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuropil.cli import output
from neuropil.cli.app import AsJson, command
from neuropil.cli.atlas import PANEL
from neuropil.cli.output import Column

if TYPE_CHECKING:
    from neuropil.atlas import Diff


@command(
    "diff",
    PANEL,
    "neuropil diff atlases/base atlases/tuned",
    "neuropil diff atlases/base atlases/tuned --json | jq .same.up",
)
def diff(
    first: Annotated[Path, typer.Argument(metavar="ATLAS_A", help="An atlas, say of the pretrained model.")],
    second: Annotated[Path, typer.Argument(metavar="ATLAS_B", help="Another, say of the fine-tuned one.")],
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="Changed neurons listed.")] = 15,
    as_json: AsJson = False,
) -> None:
    """Compare two atlases: the share of neurons that keep their top token, and those whose label changed."""
    from neuropil import atlas

    with atlas.Atlas.open(first) as one, atlas.Atlas.open(second) as other:
        found = atlas.diff(one, other)
    if as_json:
        facts = found.to_json()
        facts |= {"changed_neurons": len(facts["changed"]), "changed": facts["changed"][:limit]}
        return output.as_json({"a": str(first), "b": str(second), **facts})
    _layers(found)
    _changed(found, limit)


def _layers(found: Diff) -> None:
    """A row a site: the share of neurons with the same top token, and how much the lists overlap."""
    weights = [weight for weight in found.same if not weight.endswith("_neg")]
    heads = [Column("layer"), Column("neurons", "right")]
    for weight in weights:
        heads += [Column(f"{weight}: same top", "right"), Column("overlap", "right")]
    by_site: dict[int, dict[str, dict[str, Any]]] = {}
    for row in found.by_site.to_pylist():
        by_site.setdefault(row["site"], {})[row["weight"]] = row
    lines = []
    for parts in by_site.values():
        some = next(iter(parts.values()))
        scores = [(parts.get(w, {}).get("same"), parts.get(w, {}).get("jaccard")) for w in weights]
        lines.append([str(some["layer"]), f"{some['neurons']:,}", *_cells(scores)])
    total = [(found.same[weight], found.jaccard[weight]) for weight in weights]
    lines.append(["all", f"{found.neurons:,}", *_cells(total)])
    output.listing(heads, lines)
    output.hint("overlap: mean Jaccard index of the tokens kept")


def _cells(scores: list[tuple[Any, Any]]) -> list[str]:
    return [
        text
        for same, overlap in scores
        for text in (output.number(None if same is None else 100 * same, 1) + " %", output.number(overlap))
    ]


def _changed(found: Diff, limit: int) -> None:
    rows = found.changed.slice(0, limit).to_pylist()
    output.say()
    if not found.changed.num_rows:
        return output.say("No neuron changed its label.")
    count = output.plural(found.changed.num_rows, "neuron")
    output.say(f"{count} of {found.neurons:,} changed their label" + ("; the most specialised:" if rows else "."))
    if not rows:
        return
    heads = [Column("neuron", style="bold cyan"), Column("before"), Column("after")]
    special = "specialisation_before" in rows[0]
    heads += [Column("special", "right"), Column("then", "right")] if special else []
    lines = []
    for row in rows:
        line = [row["neuron"], output.clean(row["before"] or "–"), output.clean(row["after"] or "–")]
        if special:
            line += [output.number(row["specialisation_before"]), output.number(row["specialisation_after"])]
        lines.append(line)
    output.listing(heads, lines)
