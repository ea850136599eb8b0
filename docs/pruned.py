"""Write docs/pruned.md and its figure from an atlas: which specialised neurons a pruner would remove.

python docs/pruned.py atlases/smollm2

The atlas needs the columns of these commands:

    neuropil compress smollm2 -m neurons --sparsity 0.3 --no-evaluate --atlas ATLAS
    neuropil compress smollm2 -m core --sparsity 0.6 --no-evaluate --atlas ATLAS
    neuropil compress smollm2 -m magnitude --sparsity 0.5 --no-evaluate --atlas ATLAS
    neuropil compress smollm2 -m dimap --sparsity 0.5 --no-evaluate --atlas ATLAS
    neuropil compress smollm2 -m uniform --bits 3 --no-evaluate --atlas ATLAS
    neuropil compress smollm2 -m nupes --bits 3 --no-evaluate --atlas ATLAS
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from neuropil import Atlas

HERE = Path(__file__).parent
GROUPS = (
    ("all neurons", "true"),
    ("specialised", "specialised"),
    ("specialised and causally confirmed", "specialised AND confirmed"),
    ("confirmed, promotes its label", "specialised AND confirmed AND verdict = 'promotes'"),
    ("confirmed, suppresses its label", "specialised AND confirmed AND verdict = 'suppresses'"),
    ("hub neurons", "hub"),
)
# What is asked of each group: heading, SQL, unit.
MEASURES = (
    ("removed as one of the weakest 30 % of its layer", "100 * avg(neurons03_removed::INT)", "%"),
    ("in the core set of a text (40 % kept)", "100 * avg(core06_share)", "%"),
    ("weights left by magnitude, half pruned", "100 * avg(magnitude05_kept)", "%"),
    ("weights left by DIMAP, half pruned", "100 * avg(dimap05_kept)", "%"),
    ("error of 3 uniform bits", "100 * avg(uniform3_error)", "%"),
    ("error of 3 bits on a power grid", "100 * avg(nupes3_error)", "%"),
)


def main(path: str) -> None:
    with Atlas.open(path) as atlas:
        wanted = [
            "neurons03_removed",
            "core06_share",
            "magnitude05_kept",
            "dimap05_kept",
            "uniform3_error",
            "nupes3_error",
        ]
        if missing := [name for name in wanted if name not in atlas.columns]:
            raise SystemExit(f"{path} lacks {', '.join(missing)}; run the commands in the head of {__file__}")
        asked = ", ".join(f"{sql} AS m{i}" for i, (_, sql, _) in enumerate(MEASURES))
        rows = [
            (name, atlas.query(f"SELECT count(*) AS n, {asked} FROM neurons WHERE {where}").to_pylist()[0])
            for name, where in GROUPS
        ]
        lost = atlas.query(
            "SELECT neuron, label, effect, neurons03_score AS score FROM neurons "
            "WHERE specialised AND confirmed AND neurons03_removed ORDER BY abs(effect) DESC LIMIT 12"
        ).to_pylist()
        layers = atlas.query(
            "SELECT layer, 100 * avg(neurons03_removed::INT) FILTER (specialised) AS specialised, "
            "100 * avg(neurons03_removed::INT) FILTER (specialised AND confirmed) AS confirmed, "
            "count(*) FILTER (specialised) AS n, "
            "count(*) FILTER (specialised AND confirmed) AS n_confirmed FROM neurons GROUP BY 1 ORDER BY 1"
        ).to_pylist()
        model = atlas.manifest["model"]["name"]
    (HERE / "images").mkdir(exist_ok=True)
    figure(rows, layers).savefig(HERE / "images" / "pruned.png", dpi=130, metadata={"Software": None})
    heads = " | ".join(head for head, _, _ in MEASURES)
    lines = [f"| | neurons | {heads} |", f"| --- | ---: |{' ---: |' * len(MEASURES)}"]
    for name, row in rows:
        values = " | ".join(f"{row[f'm{i}']:.1f} %" for i in range(len(MEASURES)))
        lines.append(f"| {name} | {row['n']:,} | {values} |")
    table = "\n".join(lines)
    listed = "\n".join(f"| {r['neuron']} | {r['label']!r} | {r['effect']:+.2f} | {r['score']:.3f} |" for r in lost)
    (HERE / "pruned.md").write_text(
        f"""# Which specialised neurons would a pruner remove?

Written by `python docs/pruned.py ATLAS` from the atlas of {model}; no number here is typed. The columns come from
`neuropil compress {model} --method METHOD ... --atlas ATLAS`, so any of these questions can be asked in SQL:

```
neuropil query ATLAS "SELECT neuron, label, effect FROM neurons WHERE specialised AND neurons03_removed"
```

{table}

The first column is by the size of what a neuron adds to the output on real text (`neuropil.compress.neuron_scores`),
30 % of every layer; the second the share of 16 texts in whose core set (CoreInfer) the neuron is; the errors are
relative, of all weights by which the neuron reads and writes.

{said(dict(rows))}

![Shares removed by group and by layer](images/pruned.png)

## Confirmed specialised neurons that the pruner would take out

The dozen with the largest measured effect on their own label (in nats):

| neuron | label | effect | score |
| --- | --- | ---: | ---: |
{listed}
""",
        encoding="utf-8",
    )


def said(rows: dict[str, dict[str, float]]) -> str:
    """What the table says, in words that follow from its numbers."""

    def how(name: str, measure: str) -> str:
        ratio = rows[name][measure] / rows["all neurons"][measure]
        return "about as often as" if abs(ratio - 1) < 0.1 else "more often than" if ratio > 1 else "less often than"

    return (
        f"What a neuron adds to the output says little of what it stands for: specialised neurons are removed "
        f"{how('specialised', 'm0')} neurons in general, confirmed ones "
        f"{how('specialised and causally confirmed', 'm0')} they, hub neurons {how('hub neurons', 'm0')} any. "
        "A pruner that should keep what the atlas has found has to be told so "
        "(`... WHERE NOT (specialised AND confirmed)`)."
    )


def figure(rows: list[tuple[str, dict[str, float]]], layers: list[dict[str, float]]) -> Figure:
    out = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = out.subplots(1, 2)
    names = [name for name, _ in rows]
    left.barh(np.arange(len(rows)), [row["m0"] for _, row in rows], color="#0b6e99")
    left.axvline(rows[0][1]["m0"], color="#999", lw=1)
    left.set_yticks(np.arange(len(rows)), names)
    left.invert_yaxis()
    left.set_xlabel("removed as one of the weakest 30 % of a layer (%)")
    for share, count, style, colour, label in (
        ("specialised", "n", "o-", "#0b6e99", "specialised"),
        ("confirmed", "n_confirmed", "s--", "#d9822b", "and causally confirmed"),
    ):
        enough = [row for row in layers if row[count] >= 10]
        right.plot([r["layer"] for r in enough], [r[share] for r in enough], style, color=colour, label=label)
    right.axhline(30, color="#999", lw=1, label="all neurons")
    right.set_xlabel("layer (where there are ten such neurons or more)")
    right.set_ylabel("removed (%)")
    right.set_ylim(0)
    right.legend(frameon=False, loc="lower right")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    return out


if __name__ == "__main__":
    main(sys.argv[1])
