"""Layer Normalization (Ba, Kiros and Hinton 2016, arXiv:1607.06450).

(A) Language models of characters: an LSTM, an LSTM under layer norm, and one under recurrent batch norm with
statistics for every time, all from the same initial weights, eight sequences a batch. How many updates does each
need to reach the best validation loss of the plain one; how do they do at times beyond those they were trained on;
how evenly does the gradient reach back. (B) Fashion-MNIST with the pixels as a flat vector, two hidden layers without
a norm, with batch, weight and layer norm, 128 and 4 images a batch, and a single one. Every network is trained at every
learning rate, and the rate is chosen for each by its validation loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from neuropil.data import fashion_mnist, text
from neuropil.report import Measurement, Report, Row, Scale
from neuropil.reproduce._layer_normalization_networks import SYMBOLS, Characters, dense, network
from neuropil.reproduce.harness import Meter, runner

CLAIM = (
    "Normalising a layer's summed inputs within each example instead of over the batch speeds up training, of "
    "recurrent networks above all, and is robust to small batches."
)
RULE = (
    "Three tests. (1) Each at its best learning rate, the layer-normed LSTM reaches the plain LSTM's lowest "
    "validation loss in less than 80 % of the updates that the plain one needs for it (mean over seeds), and in "
    "fewer updates in every seed. (2) At 4 images a batch the layer-normed network's test loss is below the "
    "batch-normed one's in every seed. (3) At 128 images a batch its test loss is below that of the network without "
    "a norm in every seed. Holds if all three pass; does not hold if the mean of (1) is not below 100 %, or the "
    "mean test loss in (2) is not below batch norm's; else partly."
)
PAPER_SAYS = (
    "order-embeddings on MSCOCO (GRU): the best validation model after 60 % of the baseline's time",
    "attentive reader (LSTM): trains faster, and to a better validation error, than recurrent batch norm",
    "permutation-invariant MNIST, 784-1000-1000-10: robust to the batch size; batch norm degrades at 4",
)
DEVIATIONS = (
    "characters of American prose (Brown corpus) and one layer of 128 units instead of the paper's tasks, which "
    "need days: the order of the methods is tested, not the paper's figures",
    "Fashion-MNIST instead of MNIST, hidden layers of 256 units instead of 1000, and a few thousand updates: on "
    "one CPU core the paper's width and epochs take hours",
    "batch norm on the hidden layers only, as the other norms; its running statistics average over about 100 "
    "batches at 4 images a batch instead of 10, to its advantage",
    "at recurrent batch norm's later times, which it has no statistics for, those of the last one are used",
)
SEEDS: dict[Scale, tuple[int, ...]] = {"smoke": (0,), "default": (0, 1, 2), "paper": (0, 1, 2, 3, 4)}
SETTINGS: dict[Scale, dict[str, Any]] = {
    "smoke": {
        "networks": ("LSTM", "LN-LSTM", "BN-LSTM"),
        "recurrent": {"units": 16, "times": 8, "updates": 20, "every": 5, "rates": (3e-3, 1e-2)},
        **{"width": 32, "updates": {128: 8, 4: 20}, "rates": (3e-3,)},
    },
    "default": {
        "networks": ("LSTM", "LN-LSTM", "BN-LSTM"),
        "recurrent": {"units": 128, "times": 32, "updates": 400, "every": 10, "rates": (3e-4, 1e-3, 3e-3, 1e-2)},
        **{"width": 256, "updates": {128: 150, 4: 1000}, "rates": (3e-4, 1e-3, 3e-3)},
    },
    "paper": {
        "networks": ("LSTM", "LN-LSTM", "BN-LSTM", "GRU", "LN-GRU"),
        "recurrent": {"units": 400, "times": 500, "updates": 50_000, "every": 500, "rates": (1e-4, 3e-4, 1e-3, 3e-3)},
        **{"width": 1000, "updates": {128: 25_800, 4: 825_000}, "rates": (1e-4, 3e-4, 1e-3, 3e-3)},
    },
}
NOTES = (
    "the norm's gain in speed shows at rates below the best; each at its best, the plain and the layer-normed LSTM "
    "train alike here. Likely reasons: from orthogonal weights, over a few dozen times and with one layer, the "
    "plain network has little trouble that a norm could mend, where the paper's networks ran at the rates of the "
    "baselines, over longer sequences",
)
OURS = ("LN-LSTM", "LN-GRU", "layer norm")
BATCH = 8  # sequences, as in the paper's experiment on handwriting
WINDOWS = 128  # validation and test sequences
POINTS = 8  # of a curve in the report
LOSS, UPDATES = "validation loss", "updates to the plain network's best validation loss"
SHARE = "share of the plain network's updates"
SAME_RATE = "share of the plain network's updates, both at one rate"
BEYOND, WITHIN = "test loss at times beyond the training's", "test loss at times of the training's"
SPREAD = "spread over time of the gradient's size"


def measure(scale: Scale, seed: int, progress: Meter) -> list[Measurement]:
    return [*recurrent(SETTINGS[scale], seed, progress), *feed_forward(SETTINGS[scale], seed, progress)]


# --- A: recurrent networks -----------------------------------------------------------------------


@dataclass
class Trained:
    """One network after training at one rate: its validation losses, the updates they were taken at, itself."""

    rate: float
    network: nn.Module
    updates: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min((loss for loss in self.losses if np.isfinite(loss)), default=float("inf"))

    def reaches(self, level: float) -> float:
        """The first update at which the validation loss was at or below the level; infinite if none was."""
        return next(
            (float(u) for u, loss in zip(self.updates, self.losses, strict=True) if loss <= level), float("inf")
        )


@lru_cache(maxsize=1)
def _text() -> tuple[Tensor, Tensor]:
    """The training and the other documents as symbols."""
    texts = text("brown")
    train, rest = ("\n".join(part) for part in (texts.train, texts.test))
    characters, counts = np.unique(np.array(list(train)), return_counts=True)
    kept = characters[np.argsort(-counts, kind="stable")[:SYMBOLS]]
    place = {c: i for i, c in enumerate(kept.tolist())}
    ids = [torch.tensor([place.get(c, SYMBOLS) for c in part], dtype=torch.int64) for part in (train, rest)]
    return ids[0], ids[1]


def _held_out(times: int) -> tuple[Tensor, Tensor]:
    """Sequences to validate and to test on, `[windows, 2 times + 1]`, from both halves of the other documents."""
    ids = _text()[1]
    starts = torch.linspace(0, len(ids) // 2 - 2 * times - 2, WINDOWS).long()
    return tuple(ids[(starts + half)[:, None] + torch.arange(2 * times + 1)] for half in (0, len(ids) // 2))  # type: ignore[return-value]


def _windows(times: int, updates: int, seed: int) -> Iterator[Tensor]:
    """Training batches `[8, times + 1]`, the same for every network of a seed."""
    ids = _text()[0]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        starts = torch.randint(len(ids) - times - 1, (BATCH,), generator=generator)
        yield ids[starts[:, None] + torch.arange(times + 1)]


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss in nats of each time, `[times]`."""
    return F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none").mean(0)


def _trained(name: str, rate: float, settings: dict[str, Any], seed: int) -> Trained:
    times = settings["times"]
    valid = _held_out(times)[0][:, : times + 1]
    model = network(name, settings["units"], times, seed)
    optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
    out = Trained(rate, model)
    for update, batch in enumerate(_windows(times, settings["updates"], seed), 1):
        optimizer.zero_grad()
        _loss(model, batch).mean().backward()
        optimizer.step()
        if update % settings["every"] == 0:
            model.eval()
            with torch.no_grad():
                out.losses.append(float(_loss(model, valid).mean()))
            out.updates.append(update)
            model.train()
    return out


def recurrent(settings: dict[str, Any], seed: int, progress: Meter) -> list[Measurement]:
    names, sizes = settings["networks"], settings["recurrent"]
    jobs = [(name, rate) for name in names for rate in sizes["rates"]]
    runs: dict[str, list[Trained]] = {name: [] for name in names}
    for name, rate in progress.track(jobs, "recurrent networks", 0.0, 0.6):
        runs[name].append(_trained(name, rate, sizes, seed))
    out: list[Measurement] = []
    for name in names:
        plain = name.rpartition("-")[2]
        level = min(run.best for run in runs[plain])
        needed = {each: min(run.reaches(level) for run in runs[each]) for each in (name, plain)}
        base = name not in OURS
        best = min(runs[name], key=lambda run: run.best)
        out.append(Measurement(name, UPDATES, needed[name], "updates", False, base))
        out.append(Measurement(name, SHARE, 100 * needed[name] / needed[plain], "%", False, base))
        out += _after(name, best, sizes["times"])
        out += _curve(name, best)
        if name != plain:
            out += _at_each_rate(name, runs[name], runs[plain])
    return out


def _at_each_rate(name: str, runs: Sequence[Trained], plain: Sequence[Trained]) -> list[Measurement]:
    """Updates to the plain network's lowest loss at a rate, by a network trained at the same rate."""
    return [
        Measurement(
            f"{name} at rate {run.rate:g}",
            SAME_RATE,
            100 * run.reaches(base.best) / base.reaches(base.best),
            "%",
            False,
            name not in OURS,
        )
        for run, base in zip(runs, plain, strict=True)
    ]


def _curve(name: str, run: Trained) -> list[Measurement]:
    count = len(run.losses)
    chosen = (np.linspace(0, count, min(POINTS, count) + 1)[1:].round().astype(int) - 1).tolist()
    base = name not in OURS
    return [
        Measurement(f"{name} after {run.updates[i]} updates", LOSS, run.losses[i], "nats a character", False, base)
        for i in chosen
    ]


def _after(name: str, run: Trained, times: int) -> list[Measurement]:
    """What the network, at its best rate, does on test sequences of twice the length it was trained on."""
    model, base = run.network.eval(), name not in OURS
    assert isinstance(model, Characters)
    test = _held_out(times)[1]
    with torch.no_grad():
        loss = _loss(model, test)
    x = model.embedding(test[:, :times]).detach().requires_grad_()
    F.cross_entropy(model.embedded(x)[:, -1], test[:, times]).backward()
    assert x.grad is not None
    size = x.grad.norm(dim=2).clamp_min(1e-30).log10().mean(0)  # of each time
    return [
        Measurement(name, WITHIN, float(loss[:times].mean()), "nats a character", False, base),
        Measurement(name, BEYOND, float(loss[times:].mean()), "nats a character", False, base),
        Measurement(name, SPREAD, float(size.std()), "decades", None, base),
        Measurement(name, "learning rate of the lowest validation loss", run.rate, "", None, base),
    ]


# --- B: feed-forward networks and the batch ------------------------------------------------------

NORMS = ("no norm", "batch norm", "weight norm", "layer norm")
HELD_OUT = 2000  # images to validate and as many to test on


def _dense_losses(norm: str, width: int, batch: int, updates: int, rate: float, seed: int) -> tuple[float, float]:
    """Validation and test loss, each the mean over ten evaluations in the last quarter of training."""
    data = fashion_mnist()
    model = dense(norm, width, batch, seed)
    optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
    generator = torch.Generator().manual_seed(seed)
    places = {int(u) for u in np.linspace(0.75 * updates, updates, 10)}
    held_out = [(data.test_x[part], data.test_y[part]) for part in (slice(HELD_OUT), slice(HELD_OUT, 2 * HELD_OUT))]
    losses = []
    for update in range(1, updates + 1):
        some = torch.randint(len(data.train_y), (batch,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_x[some]), data.train_y[some]).backward()
        optimizer.step()
        if update in places:
            model.eval()
            with torch.no_grad():
                losses.append([float(F.cross_entropy(model(x), y)) for x, y in held_out])
            model.train()
    valid, test = np.mean(losses, axis=0)
    return float(valid), float(test)


def feed_forward(settings: dict[str, Any], seed: int, progress: Meter) -> list[Measurement]:
    jobs = [(norm, batch, settings["updates"][batch]) for batch in settings["updates"] for norm in NORMS]
    jobs += [(norm, 1, settings["updates"][4]) for norm in ("batch norm", "layer norm")]
    out = []
    for norm, batch, updates in progress.track(jobs, "feed-forward networks", 0.6, 1.0):
        try:
            losses = [_dense_losses(norm, settings["width"], batch, updates, r, seed) for r in settings["rates"]]
            loss = min(losses, key=lambda pair: pair[0] if np.isfinite(pair[0]) else np.inf)[1]
        except ValueError as error:  # batch norm has no variance of a single image
            if "more than 1 value" not in str(error):
                raise
            loss = float("nan")
        metric = f"test loss, {batch} image{'s' if batch > 1 else ''} a batch"
        out.append(Measurement(norm, metric, loss, "nats", False, norm not in OURS))
    return out


# --- verdict and figure --------------------------------------------------------------------------


def verdict(rows: Sequence[Row]) -> str:
    """The rule above, as code; a pure function of the rows."""
    table = {(row.name, row.metric): row for row in rows}
    share = np.array(table["LN-LSTM", SHARE].values)
    small = {norm: np.array(table[norm, "test loss, 4 images a batch"].values) for norm in ("layer norm", "batch norm")}
    large = {norm: np.array(table[norm, "test loss, 128 images a batch"].values) for norm in ("layer norm", "no norm")}
    if not share.mean() < 100 or not small["layer norm"].mean() < small["batch norm"].mean():
        return "does not hold"
    faster = share.mean() < 80 and bool((share < 100).all())
    robust = bool((small["layer norm"] < small["batch norm"]).all())
    better = bool((large["layer norm"] < large["no norm"]).all())
    return "holds" if faster and robust and better else "partly"


COLOURS = {"LSTM": "#8a8f98", "BN-LSTM": "#d9822b", "LN-LSTM": "#0b6e99", "GRU": "#b0a070", "LN-GRU": "#5b8c3e"}


def figure(report: Report) -> Figure:
    """Left: validation loss against updates. Middle: updates needed. Right: the feed-forward networks."""
    out = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = out.subplots(1, 3, width_ratios=(1.2, 0.8, 1))
    names = [row.name for row in report.rows if row.metric == SHARE]
    for name in names:
        points = [row for row in report.rows if row.metric == LOSS and row.name.startswith(f"{name} after ")]
        updates = [int(row.name.split()[-2]) for row in points]
        means, spreads = [row.mean for row in points], [row.spread or 0 for row in points]
        left.errorbar(updates, means, spreads, fmt="o-", markersize=3, capsize=3, color=COLOURS[name], label=name)
    left.set(xlabel="updates", ylabel=f"{LOSS} (nats a character)", title="Language models of characters, batch of 8")
    left.legend(frameon=False)
    _shares(middle, report, names)
    styles = {"no norm": ("#8a8f98", "s"), "batch norm": ("#d9822b", "v"), "weight norm": ("#5b8c3e", "^")}
    styles["layer norm"] = ("#0b6e99", "o")
    for offset, (norm, (colour, marker)) in enumerate(styles.items()):
        for place, metric in enumerate(["128 images", "4 images", "1 image"]):
            found = [r for r in report.rows if (r.name, r.metric) == (norm, f"test loss, {metric} a batch")]
            if not found:
                continue
            row = found[0]
            x, label = place + 0.15 * (offset - 1.5), norm if place == 0 else None
            right.errorbar(x, row.mean, row.spread or 0, fmt=marker, color=colour, capsize=3, label=label)
            if not np.isfinite(row.mean):
                right.text(x, 0.6, "batch norm: none", rotation=90, color=colour, ha="center")
    right.set_xticks(range(3), ["128", "4", "1"])
    right.set_xlim(-0.5, 2.5)
    right.set(xlabel="images a batch", ylabel="test loss (nats)", title="Fashion-MNIST, two hidden layers")
    right.legend(frameon=False)
    for panel in (left, middle, right):
        panel.spines[["top", "right"]].set_visible(False)
    out.suptitle(f"layer-normalization: {report.verdict}", fontsize="medium")
    return out


def _shares(panel: Axes, report: Report, names: Sequence[str]) -> None:
    """Updates needed: a dot a seed, at each rate and, to the right of them, at the best one; crosses: never reached."""
    rates = list(dict.fromkeys(r.name.split()[-1] for r in report.rows if r.metric == SAME_RATE))
    normed = [name for name in names if "-" in name]
    top = 1.15 * max(
        100.0, *(v for r in report.rows if r.metric in (SHARE, SAME_RATE) for v in r.values if np.isfinite(v))
    )
    for offset, name in enumerate(normed):
        rows = [report.row(f"{name} at rate {rate}", SAME_RATE) for rate in rates] + [report.row(name, SHARE)]
        for place, row in enumerate(rows):
            x = place + 0.2 * (offset - (len(normed) - 1) / 2)
            for seed, value in enumerate(row.values):
                marker, y = ("o", value) if np.isfinite(value) else ("x", top)
                panel.plot(x + 0.05 * (seed - 1), y, marker, color=COLOURS[name], markersize=5)
    panel.axhline(100, color="#333", linewidth=0.8, linestyle="--")
    panel.set_xticks(range(len(rates) + 1), [*rates, "best\nof each"])
    panel.set(
        xlabel="learning rate",
        ylabel="updates (% of the plain LSTM's)",
        title="To its best loss (dot: a seed; ×: never)",
    )
    panel.set_ylim(0, 1.05 * top)


run = runner(__name__)
