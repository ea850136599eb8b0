"""`neuropil diff`: what fine-tuning, quantization or anything else did to the neurons of a model.

Two atlases of the same shape are joined neuron by neuron. The share of neurons that keep their top token is
the measure of Davies (arXiv 2501.02688): more than 75% of Llama 3.1 8B's survive its instruct tuning.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuropil.cli import output
from neuropil.cli.app import AsJson, command
from neuropil.cli.atlas import PANEL, ROLES
from neuropil.cli.output import Column
from neuropil.errors import AtlasError

if TYPE_CHECKING:
    import pyarrow as pa

    from neuropil.atlas import Atlas


@command(
    "diff",
    PANEL,
    "neuropil diff atlases/base atlases/tuned",
    "neuropil diff atlases/base atlases/tuned --json | jq .weights.up.same_top",
)
def diff(
    first: Annotated[Path, typer.Argument(metavar="ATLAS_A", help="An atlas, say of the pretrained model.")],
    second: Annotated[Path, typer.Argument(metavar="ATLAS_B", help="Another, say of the fine-tuned one.")],
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="Changed neurons listed.")] = 15,
    as_json: AsJson = False,
) -> None:
    """Compare two atlases: the share of neurons that keep their top token, and those whose label changed."""
    from neuropil.atlas import Atlas

    with Atlas.open(first) as one, Atlas.open(second) as other:
        found = compare(one, other)
    if as_json:
        found["changed"] = found["changed"][:limit]
        return output.as_json({"a": str(first), "b": str(second), **found})
    roles = list(found["weights"])
    heads = [Column("layer"), Column("neurons", "right")]
    for role in roles:
        heads += [Column(f"{role}: same top", "right"), Column("overlap", "right")]
    total = {"layer": "all", "neurons": found["neurons"], "weights": found["weights"]}
    rows = []
    for part in [*found["layers"], total]:
        row = [str(part["layer"]), f"{part['neurons']:,}"]
        for role in roles:
            score = part["weights"][role]
            row += [f"{100 * score['same_top']:.1f}%", output.number(score["jaccard"])]
        rows.append(row)
    output.listing(heads, rows)
    output.hint("overlap: mean Jaccard index of the kept tokens.")
    _changed(found["changed"], limit)


def _changed(changed: list[dict[str, Any]], limit: int) -> None:
    output.say()
    if not changed:
        return output.say("No specialised neuron changed its label.")
    count = output.plural(len(changed), "specialised neuron")
    output.say(f"{count} changed their label; the most specialised:", style="bold")
    heads = [Column("neuron", style="bold cyan"), Column("before"), Column("after")]
    output.listing(
        [*heads, Column("special", "right")],
        [
            [
                row["neuron"],
                output.clean(row["before"] or "–"),
                output.clean(row["after"] or "–"),
                output.number(row["specialisation"]),
            ]
            for row in changed[:limit]
        ],
    )


def compare(one: Atlas, other: Atlas) -> dict[str, Any]:
    """Joins two atlases neuron by neuron.

    For each decoded weight, by layer and for all: `same_top`, the share of neurons with the same best token,
    and `jaccard`, the mean of |A ∩ B| / |A ∪ B| over the two lists of kept tokens.

    Raises:
        AtlasError: the atlases are of models of different shape, or have no decoded weight in common.
    """
    roles = [r for r in ROLES if f"{r}_tokens" in one.columns and f"{r}_tokens" in other.columns]
    if not roles:
        raise AtlasError("these atlases share no decoded weight; build both with the same --weights.")
    labels = all("label" in atlas.columns for atlas in (one, other))
    chosen = ["neuron", "layer", *(f"{role}_tokens" for role in roles)]
    chosen += ["label", "specialised", "specialisation"] if labels else []
    sql = f"SELECT {', '.join(chosen)} FROM neurons ORDER BY site, index"
    a, b = one.query(sql), other.query(sql)
    if a.column("neuron") != b.column("neuron"):
        raise AtlasError(
            f"the atlases cannot be joined: one has {a.num_rows:,} neurons, the other {b.num_rows:,}, and"
            " their addresses differ. A diff needs two models of the same shape."
        )
    layers = a.column("layer").to_pylist()
    scores = {role: _scores(a, b, role) for role in roles}
    by_layer: dict[int, list[int]] = {}
    for row, layer in enumerate(layers):
        by_layer.setdefault(layer, []).append(row)
    return {
        "neurons": a.num_rows,
        "weights": {role: _mean(scores[role], range(a.num_rows)) for role in roles},
        "layers": [
            {
                "layer": layer,
                "neurons": len(rows),
                "weights": {role: _mean(scores[role], rows) for role in roles},
            }
            for layer, rows in sorted(by_layer.items())
        ],
        "changed": _relabelled(a, b) if labels else [],
    }


def _scores(a: pa.Table, b: pa.Table, role: str) -> list[tuple[bool, float] | None]:
    """For each neuron: whether the top token is the same, and the Jaccard index; None if one is missing."""
    pairs = zip(a.column(f"{role}_tokens").to_pylist(), b.column(f"{role}_tokens").to_pylist(), strict=True)
    scores: list[tuple[bool, float] | None] = []
    for x, y in pairs:
        if not x or not y:
            scores.append(None)
            continue
        both = len(set(x) & set(y))
        scores.append((x[0] == y[0], both / (len(set(x) | set(y)))))
    return scores


def _mean(scores: list[tuple[bool, float] | None], rows: Any) -> dict[str, float]:
    kept = [score for row in rows if (score := scores[row]) is not None]
    if not kept:
        return {"same_top": float("nan"), "jaccard": float("nan")}
    return {
        "same_top": sum(same for same, _ in kept) / len(kept),
        "jaccard": sum(overlap for _, overlap in kept) / len(kept),
    }


def _relabelled(a: pa.Table, b: pa.Table) -> list[dict[str, Any]]:
    """The neurons specialised in the first atlas that have another label in the second, the best first."""
    columns = ("neuron", "label", "specialised", "specialisation")
    before = zip(*(a.column(name).to_pylist() for name in columns), strict=True)
    changed = [
        {"neuron": neuron, "before": label, "after": now, "specialisation": how}
        for (neuron, label, special, how), now in zip(before, b.column("label").to_pylist(), strict=True)
        if special and (label or "") != (now or "")
    ]
    return sorted(changed, key=lambda row: -(row["specialisation"] or 0))
