"""Write docs/causal.md and its figure from an atlas: which labels are causally confirmed, and where.

python docs/causal.py atlases/smollm2
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from neuropil import Atlas

HERE = Path(__file__).parent
COUNTS = """
    count(*) AS neurons,
    100 * avg(confirmed::INT) AS confirmed,
    100 * avg((verdict = 'promotes')::INT) AS promotes,
    100 * avg((verdict = 'suppresses')::INT) AS suppresses,
    100 * avg(shuffled_confirmed::INT) AS shuffled
"""
BAND = """CASE WHEN specialisation < 0.8 THEN 'below 0.8' WHEN specialisation < 1 THEN '0.8 to 1'
    WHEN specialisation < 1.25 THEN '1 to 1.25' WHEN specialisation < 1.5 THEN '1.25 to 1.5'
    WHEN specialisation < 2 THEN '1.5 to 2' ELSE '2 and above' END"""
# Read: the sign with which up and gate together point at the label's token; write: that of down.
SIGNS = """CASE WHEN cos_up * cos_down < 0 THEN 'reads and writes it with opposite signs'
    ELSE 'reads and writes it with the same sign' END"""


def table(rows: list[dict[str, object]], first: str) -> str:
    lines = [
        f"| {first} | neurons | confirmed | promotes | suppresses | confirmed with a shuffled label |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        shares = " | ".join(f"{row[k]:.1f} %" for k in ("confirmed", "promotes", "suppresses", "shuffled"))
        lines.append(f"| {row['name']} | {row['neurons']:,} | {shares} |")
    return "\n".join(lines)


def figure(layers: list[dict[str, object]], bands: list[dict[str, object]]) -> Figure:
    out = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = out.subplots(1, 2, sharey=True)
    for panel, rows, label in ((left, layers, "layer"), (right, bands, "specialisation (1 = beyond chance)")):
        x = np.arange(len(rows))
        up, down = (np.array([r[k] for r in rows], float) for k in ("promotes", "suppresses"))
        panel.bar(x, up, color="#0b6e99", label="promotes its label")
        panel.bar(x, down, bottom=up, color="#d9822b", label="suppresses its label")
        panel.plot(x, [r["shuffled"] for r in rows], "k_", markersize=8, label="with a shuffled label")
        step = 5 if panel is left and len(rows) > 15 else 1
        names = [r["name"] for r in rows[::step]]
        panel.set_xticks(x[::step], names, fontsize="small", rotation=0 if panel is left else 20)
        panel.set_xlabel(label)
        panel.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("neurons (%)")
    left.legend(frameon=False)
    return out


def main(path: str) -> None:
    with Atlas.open(path) as atlas:

        def ask(by: str, order: str) -> list[dict[str, object]]:
            return atlas.query(f"SELECT {by} AS name, {COUNTS} FROM neurons GROUP BY 1 ORDER BY {order}").to_pylist()

        layers, bands = ask("layer", "1"), ask(BAND, "min(specialisation)")
        whole, signs = ask("'all neurons'", "1"), ask(f"CASE WHEN specialised THEN {SIGNS} END", "1")
        special = ask("CASE WHEN specialised THEN 'specialised' ELSE 'not specialised' END", "1 DESC")
        agree = atlas.query(
            "SELECT 100 * avg((sign(effect) = sign(cos_down))::INT) AS same FROM neurons WHERE confirmed"
        ).to_pylist()[0]["same"]
        model, settings = atlas.manifest["model"]["name"], atlas.manifest["groups"]["causal"]["settings"]
    (HERE / "images").mkdir(exist_ok=True)
    figure(layers, bands).savefig(HERE / "images" / "causal.png", dpi=130, metadata={"Software": None})
    signs = [row for row in signs if row["name"]]
    (HERE / "causal.md").write_text(
        f"""# Are the labels true?

Written by `python docs/causal.py ATLAS` from the atlas of {model}; no number here is typed.

Every neuron was clamped up and down on {settings["n_prompts"]} prompts, and the change of its label's tokens laid
beside that of matched random tokens. A label is confirmed when the change is told from chance (the rule, fixed
before the run, is in the docstring of `neuropil.interpret.causal`). The last column says how many neurons are
confirmed when they are given the label of another neuron of their layer: the rate of false confirmations.

{table(whole + special, "")}

![Share of confirmed labels by layer and by specialisation](images/causal.png)

"No effect" does not say that a neuron does nothing: far below the head its effect on its own label is small beside
the spread of its effects on other tokens, since it acts through the neurons above it.

Of the confirmed neurons, {agree:.1f} % move their label in the direction in which their down-projection points.

## By specialisation

Specialisation is the label's cosine over the 99th percentile of the same for random directions.

{table(bands, "specialisation")}

## Specialised neurons, by the signs of their weights

{table(signs, "")}

## By layer

{table(layers, "layer")}
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(sys.argv[1])
