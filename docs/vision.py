"""Write docs/vision.md and its figures from two atlases of vision models: what the columns say when joined.

neuropil atlas examples/fashion.py:network --out FASHION
neuropil describe examples/fashion.py:network --atlas FASHION
neuropil atlas efficientnet-lite0 --out EFFICIENTNET
neuropil describe efficientnet-lite0 --atlas EFFICIENTNET
python docs/vision.py FASHION EFFICIENTNET
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy.stats import spearmanr

from neuropil import Atlas
from neuropil.data.probes import stored
from neuropil.explorer import pictures

HERE = Path(__file__).parent
SHOWN = 5  # exemplars of a neuron in a figure
LAYERS = """
SELECT site, any_value(module) AS module, count(*) AS neurons, count(*) FILTER (dead) AS dead,
    100 * avg(sparsity) AS sparsity, count(ablation) AS silenced, avg(ablation) AS mean, max(ablation) AS most
FROM neurons GROUP BY site ORDER BY site"""
SILENCED = "SELECT site, selectivity, ablation, ablation_estimate FROM neurons WHERE NOT dead AND ablation IS NOT NULL"
NEEDED = """
SELECT * FROM neurons WHERE NOT dead AND len(exemplar_images) >= 5 AND threshold < activation_max
QUALIFY row_number() OVER (PARTITION BY site ORDER BY ablation DESC NULLS LAST) <= ? ORDER BY site, ablation DESC"""
SAID = """
SELECT description, count(*) AS n FROM neurons WHERE NOT dead AND description <> ''
GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 6"""


def main(fashion: str, efficientnet: str) -> None:
    (HERE / "images").mkdir(exist_ok=True)
    with Atlas.open(fashion) as atlas:
        own = atlas.query(LAYERS).to_pylist()
        ranks = {site: correlations(atlas, site) for site in range(len(own))}
        scatter(atlas, own).savefig(HERE / "images" / "vision-selectivity.png", dpi=130, metadata={"Software": None})
        exemplars(atlas, 2).savefig(HERE / "images" / "vision-fashion.png", dpi=110, metadata={"Software": None})
        count = len(stored(Path(fashion)) or ())
    parts = bricks(fashion)
    pruned(parts).savefig(HERE / "images" / "vision-bricks.png", dpi=110, metadata={"Software": None})
    own_rise, other_rise = rises(parts["rise"])
    own_control, other_control = rises(parts["rise_of_others_as_active"])
    with Atlas.open(efficientnet) as atlas:
        deep = atlas.query(LAYERS).to_pylist()
        said = atlas.query(SAID).to_pylist()
        distinct = atlas.query("SELECT count(DISTINCT description) AS n FROM neurons WHERE NOT dead").to_pylist()[0][
            "n"
        ]
        depth(deep).savefig(HERE / "images" / "vision-depth.png", dpi=130, metadata={"Software": None})
        exemplars(atlas, 1, every=4).savefig(HERE / "images" / "vision-deep.png", dpi=80, metadata={"Software": None})
        photos, most = len(stored(Path(efficientnet)) or ()), max(row["silenced"] for row in deep)
    both = [f"{pair[0]:+.2f}" for pair in ranks.values()]
    text = f"""# The neurons of vision models

Written by `python docs/vision.py FASHION EFFICIENTNET` from two atlases; no number here is typed. The columns are
explained in [atlas.md](atlas.md).

## A network of your own

[examples/fashion.py](../examples/fashion.py) is a small convolutional network that learns Fashion-MNIST in a minute.
Any file with a `torch.nn.Module` is given to the commands in the same way, as FILE.py:NAME:

```
neuropil atlas examples/fashion.py:network --out atlases/fashion         # {count:,} test images are shown to it
neuropil describe examples/fashion.py:network --atlas atlases/fashion    # adds a sentence a neuron
neuropil explore atlases/fashion
```

Every neuron is silenced in turn. What the network then loses, layer by layer, with the rank correlation of the loss
with two things that are cheaper to know: how selective the neuron is for one class, and the estimate by one gradient.

{table(own, ranks)}

Does selectivity tell whether a neuron is needed? Its rank correlation with the loss is {both[0]} in the first layer and
{both[-1]} in the last (Morcos et al. 2018 found none, arXiv:1803.06959).

![Selectivity against what is lost without the neuron](images/vision-selectivity.png)

Two neurons of each layer, those without which most is lost, with the images that drive them most; the region that
drives them is bright.

![Images and regions of eight neurons](images/vision-fashion.png)

## Which neurons serve a class?

```
neuropil bricks examples/fashion.py:network --atlas atlases/fashion
```

finds the neurons that tell each class best, takes {parts["share"]:.0%} of each layer out (held at their mean), and
measures on other images what each class then loses: {own_rise:+.2f} nats for the class itself and {other_rise:+.2f} for
the others, means over classes. As many other neurons that are as active: {own_control:+.2f} and {other_control:+.2f}.

![Rise of each class's loss without the neurons of each class](images/vision-bricks.png)

Questions of this kind are SQL:

```
neuropil query atlases/fashion "SELECT neuron, preferred_class, selectivity, ablation, description
  FROM neurons WHERE NOT dead ORDER BY ablation DESC LIMIT 10"
neuropil query atlases/fashion "SELECT brick_function, count(*), avg(ablation) FROM neurons GROUP BY 1"
```

## EfficientNet-Lite0

The ImageNet network that travels with PyPI, shown {photos} crops of photographs.

![Images and regions of neurons at several depths](images/vision-deep.png)

Deeper filters are silent at more places of an image, and a single one is missed less. (Of each layer the {most} neurons
with the largest estimates were silenced; where nothing else is at hand, class means the one that the model prefers.)

![Sparsity, and loss without a neuron, by layer](images/vision-depth.png)

`neuropil describe` says of each what its regions look like. Its captioner learned from generated scenes of coloured,
textured shapes and letters, for no captions of photographs travel with a package; of photographs it can only say which
of these they remind it of ({distinct:,} different sentences). The most frequent:

| sentence | neurons |
| --- | ---: |
{chr(10).join(f"| {row['description']} | {row['n']:,} |" for row in said)}

With regions and sentences of your own, `MILAN(...).fit` learns the words you want, and `neuropil describe --captioner`
takes it.
"""
    (HERE / "vision.md").write_text(text, encoding="utf-8")


def bricks(fashion: str) -> dict:
    """What `neuropil bricks` says of the network; the atlas gets its columns."""
    command = ["-m", "neuropil", "bricks", "examples/fashion.py:network", "--atlas", str(Path(fashion).resolve())]
    done = subprocess.run(
        [sys.executable, *command, "--json"], cwd=HERE.parent, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def rises(matrix: dict[str, dict[str, float]]) -> tuple[float, float]:
    """The mean rise of a class's loss without its own neurons, and of the others' without them."""
    own = [rises[name] for name, rises in matrix.items()]
    others = [rise for name, rises in matrix.items() for other, rise in rises.items() if other != name]
    return float(np.mean(own)), float(np.mean(others))


def pruned(facts: dict) -> Figure:
    """Rows: whose neurons are taken out; columns: whose loss rises."""
    names = list(facts["rise"])
    both = [facts["rise"], facts["rise_of_others_as_active"]]
    values = [np.array([[matrix[a][b] for b in names] for a in names]) for matrix in both]
    most = max(float(np.abs(each).max()) for each in values)
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, each, title in zip(panels, values, ("the class's neurons", "others as active"), strict=True):
        shown = panel.imshow(each, cmap="RdBu_r", vmin=-most, vmax=most)
        panel.set_xticks(range(len(names)), names, rotation=45, ha="right")
        panel.set_yticks(range(len(names)), names)
        panel.set(title=f"without {title}", xlabel="loss of")
    panels[0].set_ylabel("without the neurons of")
    figure.colorbar(shown, ax=panels, label="rise of the loss (nats)", shrink=0.8)
    return figure


def correlations(atlas: Atlas, site: int) -> tuple[float, float]:
    """Rank correlations, within a layer, of the loss without a neuron with its selectivity and with its estimate."""
    rows = atlas.query(f"{SILENCED} AND site = ?", [site]).to_pydict()
    return tuple(spearmanr(rows[name], rows["ablation"]).statistic for name in ("selectivity", "ablation_estimate"))


def table(layers: list[dict], ranks: dict[int, tuple[float, float]] | None = None) -> str:
    heads = ["layer", "neurons", "dead", "places without activation", "silenced", "mean loss, nats", "largest loss"]
    heads += ["rank correlation with selectivity", "with the estimate"] if ranks else []
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for row in layers:
        cells = [f"`{row['module']}`", f"{row['neurons']:,}", f"{row['dead']:,}", f"{row['sparsity']:.0f} %"]
        cells += [f"{row['silenced']:,}", f"{row['mean']:+.4f}", f"{row['most']:+.3f}"]
        cells += [f"{rank:+.2f}" for rank in ranks[row["site"]]] if ranks else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def depth(layers: list[dict]) -> Figure:
    """Layer by layer: places without activation, dead neurons, and what is lost without one."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    sites = np.array([row["site"] for row in layers])
    wide = np.array(["depthwise" in row["module"] for row in layers])
    for kind, mark, name in ((~wide, "o", "full and 1 x 1 convolutions"), (wide, "^", "depthwise convolutions")):
        sparsity, mean, most = (np.array([row[k] for row in layers], dtype=float) for k in ("sparsity", "mean", "most"))
        line = left.plot(sites[kind], sparsity[kind], mark, label=name)[0]
        right.plot(sites[kind], mean[kind], mark, color=line.get_color(), label=name)
        right.plot(sites[kind], most[kind], mark, color=line.get_color(), mfc="none", alpha=0.6)
    left.set(xlabel="layer", ylabel="places without activation (%)", ylim=(0, 100))
    left.legend(frameon=False, fontsize="small", loc="lower right")
    right.set_yscale("symlog", linthresh=0.01)
    right.axhline(0, color="0.6", lw=0.8)
    right.set(xlabel="layer", ylabel="loss without a neuron (nats)\nfilled: mean, hollow: largest")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def scatter(atlas: Atlas, layers: list[dict]) -> Figure:
    rows = atlas.query(SILENCED).to_pydict()
    site, selectivity, loss = (np.array(rows[name]) for name in ("site", "selectivity", "ablation"))
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for row, mark in zip(layers, "osD^v", strict=False):
        own = site == row["site"]
        axes.plot(selectivity[own], loss[own], mark, ms=5, alpha=0.75, label=row["module"])
    axes.axhline(0, color="0.6", lw=0.8)
    axes.set_yscale("symlog", linthresh=0.003)
    axes.set_ylim(1.5 * min(loss.min(), -0.003), 2 * loss.max())
    axes.set(xlabel="selectivity (0: all classes alike, 1: one class alone)", ylabel="loss without the neuron (nats)")
    axes.legend(title="layer", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def exemplars(atlas: Atlas, each: int, every: int = 1) -> Figure:
    """The images of some neurons, dimmed outside the region: a row a neuron."""
    probe = stored(atlas.path)
    assert probe is not None
    rows = [row for row in atlas.query(NEEDED, [each]).to_pylist() if row["site"] % every == 0]
    figure = Figure(figsize=(1.25 * SHOWN + 3.4, 1.3 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), SHOWN, squeeze=False)
    for line, row in zip(panels, rows, strict=True):
        for panel, image, mask in zip(line, row["exemplar_images"], row["exemplar_masks"], strict=False):
            panel.imshow(imread(io.BytesIO(pictures.lit(probe["png"][image].as_py(), mask))), cmap="gray")
            panel.set_xticks([])
            panel.set_yticks([])
        name = f"{row['neuron']}  {row['module']}"
        name += f"\nprefers {row['preferred_class']}" if row.get("preferred_class") else ""
        name += f"\n“{row['description']}”" if row.get("description") else ""
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
    return figure


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
