"""Selective activation for de-sparsifying pruned networks (Liu et al. 2022, arXiv:2212.06145).

A perceptron with rectifiers learns Fashion-MNIST, loses a fifth of its weights, goes back to its first values and
learns again, twenty times, by global magnitude and by LAMP, each with and without a tenth of the budget spent on
selective activation. Three controls spend the same tenth otherwise: on random negative weights, on the smallest
negative weights, and on the weights of either sign that moved least.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from neuropil import data
from neuropil.compress._activating_base import without_lowest
from neuropil.compress.activating import ActivateWhilePruning
from neuropil.compress.dead_neurons import dead_neuron_rate
from neuropil.report import Measurement, Report, Row, Scale, find, mean_and_error
from neuropil.reproduce.harness import Meter, runner

CLAIM = (
    "Spending a small part of each pruning step on negative weights that hardly moved wakes silent neurons and raises "
    "the accuracy of existing pruning methods at high sparsity."
)
RULE = (
    "Over all cycles that train a network with a tenth of its weights or fewer, and over the two base methods (global "
    "magnitude, LAMP): (1) the dynamic dead-neuron rate with selective activation less that without, (2) test accuracy "
    "with less that without; means, paired over seeds. Holds if (1) is negative and (2) positive by more than twice "
    "their standard errors. Does not hold if (1) is not negative or (2) not positive. Partly otherwise."
)
PAPER_SAYS = (
    "CIFAR-10/100, ResNet, VGG, DenseNet, MobileNet: 3 to 4 % more accuracy than the same pruning method alone",
    "ImageNet, and a vision transformer: 2 to 3 % more",
    "the dynamic dead-neuron rate falls as more is pruned (curves)",
)
DEVIATIONS = (
    "a perceptron 784-128-64-10 on 10,000 images of Fashion-MNIST, four epochs a cycle and twenty cycles, instead of "
    "ResNet-20 and larger on CIFAR with 50 epochs and 25 cycles",
    "one retraining a cycle (AP-Lite), from the first values; accuracy is that of the last epoch, not the best on the "
    "test images",
)
NOTES = (
    "The learning rate (0.2 of 0.05, 0.1, 0.2 and 0.3) is the best for magnitude pruning alone below a tenth of the "
    "weights, on training images 50,000 to 55,000, and the same for all arms; p = 20 % and q = 2 % are the authors'.",
    "Where accuracy gains little although neurons wake, the likely reason is that little was lost: this perceptron is "
    "about as accurate with a hundredth of its weights as dense, which leaves no damage for woken neurons to mend; the "
    "paper claims its gains for deeper networks at high sparsity.",
    "The control that takes the weights of either sign that moved least tells what the restriction to negative "
    "weights adds: compare its rows with those of activation.",
)
SEEDS: dict[Scale, tuple[int, ...]] = {"smoke": (0,), "default": (0, 1, 2, 3, 4), "paper": (0, 1, 2, 3, 4)}
SETTINGS: dict[Scale, dict[str, Any]] = {
    "smoke": {"data": "digits", "images": 1408, "epochs": 8, "cycles": 11},
    "default": {"data": "fashion-mnist", "images": 10_000, "epochs": 4, "cycles": 20},
    "paper": {"data": "fashion-mnist", "images": 60_000, "epochs": 50, "cycles": 25},
}
BATCH, RATE, P, Q = 128, 0.2, 0.2, 0.02
LOW = 0.1  # the rule looks at networks with this share of their weights or fewer
MAGNITUDE, LAMP = "magnitude", "LAMP"
WITH = " + activation"
CONTROLS = ("random negative", "smallest negative", "least moved")
ARMS = (MAGNITUDE, LAMP, MAGNITUDE + WITH, LAMP + WITH, *(f"{MAGNITUDE} + {control}" for control in CONTROLS))

Split = tuple[Tensor, Tensor]


class Control(ActivateWhilePruning):
    """The same schedule, with activation's share of the budget spent by another rule."""

    rule = CONTROLS[0]

    def _wake(self, count: int) -> int:
        weights = [slot.weight.detach() for slot in self._slots]
        generator = torch.Generator().manual_seed(1000 * self.seed + self.t)
        if self.rule == "least moved":
            scores = [(weight - start).abs() for weight, start in zip(weights, self._starts, strict=True)]
        elif self.rule == "smallest negative":
            scores = [weight.abs() for weight in weights]
        else:
            scores = [torch.rand(weight.shape, generator=generator) for weight in weights]
        if self.rule != "least moved":
            scores = [s.masked_fill(weight >= 0, math.inf) for s, weight in zip(scores, weights, strict=True)]
        negative = sum(int((weight < 0).sum()) for weight in weights)
        count = count if self.rule == "least moved" else min(count, negative)
        self._set(without_lowest(scores, [slot.mask for slot in self._slots], count))
        self._apply()
        return count


def measure(scale: Scale, seed: int, progress: Meter) -> list[Measurement]:
    settings = SETTINGS[scale]
    train, test = splits(settings)
    rows: dict[str, list[Measurement]] = {}
    for name in progress.track(ARMS, "pruning"):
        baseline = WITH not in name
        rows[name] = []
        for cycle, (accuracy, dynamic, static) in enumerate(course(name, train, test, settings, seed)):
            left = kept(cycle)
            rows[name] += [
                Measurement(name, f"accuracy, {left}", accuracy, "%", True, baseline),
                Measurement(name, f"dynamic dead rate, {left}", dynamic, "%", None, baseline),
                Measurement(name, f"static dead rate, {left}", static, "%", None, baseline),
            ]
    found = [m for measurements in rows.values() for m in measurements]
    last = kept(settings["cycles"])  # the sparsest first: the headline
    return sorted(found, key=lambda m: not m.metric.endswith(last))


def kept(cycle: int) -> str:
    """How much is left in the training after so many prunings.

    >>> kept(0), kept(10)
    ('100.0 % left', '10.7 % left')
    """
    return f"{100 * (1 - P) ** cycle:.1f} % left"


def splits(settings: dict[str, Any]) -> tuple[Split, Split]:
    """The first so many training images and all test images, as rows of pixels."""
    images = data.image_set(settings["data"])
    count = settings["images"]
    return (images.train_x[:count].flatten(1), images.train_y[:count]), (images.test_x.flatten(1), images.test_y)


def course(
    name: str, train: Split, test: Split, settings: dict[str, Any], seed: int, rate: float = RATE
) -> list[tuple[float, float, float]]:
    """Accuracy, dynamic and static dead-neuron rate in percent at the end of every training, the dense one first."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(train[0].shape[1], 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    every = settings["epochs"] * (len(train[0]) // BATCH)
    found: list[tuple[float, float, float]] = []

    def look(model: nn.Module) -> None:
        rates = dead_neuron_rate(model, [test[0][:2000]])
        found.append((accuracy(model, test), 100 * rates.dynamic, 100 * rates.static))

    pruning = scheduled(name, model, optimizer, every, settings["cycles"], look, seed)
    steps = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: learning_rate(t % every / every))
    generator = torch.Generator().manual_seed(seed)
    for _ in range((settings["cycles"] + 1) * settings["epochs"]):
        order = torch.randperm(len(train[0]), generator=generator)
        for batch in order.split(BATCH)[: len(order) // BATCH]:
            optimizer.zero_grad()
            cross_entropy(model(train[0][batch]), train[1][batch]).backward()
            optimizer.step()
            pruning.step()
            steps.step()
    look(model)
    return found


def learning_rate(done: float) -> float:
    """The share of the full learning rate when so much of a cycle is done: up over a tenth, down along a cosine."""
    return done / 0.1 if done < 0.1 else (1 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2


def scheduled(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    every: int,
    cycles: int,
    look: Callable[[nn.Module], Any],
    seed: int,
) -> ActivateWhilePruning:
    """The schedule of this arm."""
    base, _, extra = name.partition(" + ")
    kind = Control if extra in CONTROLS else ActivateWhilePruning
    settings: dict[str, Any] = {"base": base.lower(), "rate": P, "ap_rate": Q if extra else 0.0, "seed": seed}
    made = kind(model, optimizer, every=every, cycles=cycles, cycle_end=look, **settings)
    if isinstance(made, Control):
        made.rule = extra
    return made


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    return 100 * float((model(data[0]).argmax(1) == data[1]).float().mean())


# --- verdict and figure --------------------------------------------------------------------------


def low(rows: Sequence[Row]) -> list[str]:
    """The ends of the metrics' names that the rule looks at."""
    ends = dict.fromkeys(row.metric.partition(", ")[2] for row in rows)
    return [end for end in ends if float(end.split()[0]) <= 100 * LOW]


def averaged(rows: Sequence[Row], name: str, metric: str) -> list[float]:
    """A metric of an arm, of each seed: mean over the sparse trainings."""
    values = [find(rows, name, f"{metric}, {end}").values for end in low(rows)]
    return [statistics.fmean(seed) for seed in zip(*values, strict=True)]


def difference(
    rows: Sequence[Row], metric: str, extra: str = WITH, bases: Sequence[str] = (MAGNITUDE, LAMP)
) -> list[float]:
    """Of each seed: the metric with activation (or a control) less that without, mean over the base methods."""
    pairs = [zip(averaged(rows, base + extra, metric), averaged(rows, base, metric), strict=True) for base in bases]
    return [statistics.fmean(seed) for seed in zip(*([a - b for a, b in pair] for pair in pairs), strict=True)]


def verdict(rows: Sequence[Row]) -> str:
    """The rule above, as code; a pure function of the rows."""
    woken, woken_error = mean_and_error(difference(rows, "dynamic dead rate"))
    gained, gained_error = mean_and_error(difference(rows, "accuracy"))
    if not (woken < 0 and gained > 0):
        return "does not hold"
    return "holds" if woken < -2 * woken_error and gained > 2 * gained_error else "partly"


def figure(report: Report) -> Figure:
    """Accuracy and dynamic dead-neuron rate against what is left; the differences to the base method."""
    colours = {MAGNITUDE: "#333333", LAMP: "#d08c2f", MAGNITUDE + WITH: "#0b6e99", LAMP + WITH: "#5fb0d0"}
    out = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = out.subplots(1, 3)
    ends = sorted({row.metric.partition(", ")[2] for row in report.rows}, key=lambda end: -float(end.split()[0]))
    shares = [float(end.split()[0]) for end in ends]
    for panel, metric in ((left, "accuracy"), (middle, "dynamic dead rate")):
        for name, colour in colours.items():
            rows = [report.row(name, f"{metric}, {end}") for end in ends]
            means, spreads = [row.mean for row in rows], [row.spread or 0 for row in rows]
            style = "o-" if WITH in name else "s--"
            panel.errorbar(shares, means, yerr=spreads, fmt=style, color=colour, label=name, markersize=3, linewidth=1)
        panel.set_xscale("log")
        panel.invert_xaxis()
        panel.axvspan(100 * LOW, min(shares) * 0.9, color="#0b6e99", alpha=0.06, linewidth=0)
        ticks = [t for t in (100, 50, 20, 10, 5, 2, 1) if t >= min(shares)]
        panel.set_xticks(ticks, [str(t) for t in ticks])
        panel.minorticks_off()
    left.set(xlabel="weights left (%)", ylabel="test accuracy (%)", title="Accuracy (shaded: where the rule looks)")
    out.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    middle.set(xlabel="weights left (%)", ylabel="dynamic dead-neuron rate (%)", title="Silent neurons")
    bars: list[tuple[str, list[float], str]] = [
        ("activation,\nmagnitude", difference(report.rows, "accuracy", bases=(MAGNITUDE,)), "#0b6e99"),
        ("activation,\nLAMP", difference(report.rows, "accuracy", bases=(LAMP,)), "#5fb0d0"),
    ]
    for control in CONTROLS:
        found = difference(report.rows, "accuracy", f" + {control}", (MAGNITUDE,))
        bars.append((f"{control},\nmagnitude", found, "#8a8f98"))
    for height, (_, values, colour) in enumerate(bars[::-1]):
        mean, error = mean_and_error(values)
        right.errorbar(mean, height, xerr=2 * error if math.isfinite(error) else 0, fmt="o", color=colour, capsize=3)
    right.set_yticks(range(len(bars)), [label for label, _, _ in bars[::-1]])
    right.set_ylim(-0.5, len(bars) - 0.5)
    right.axvline(0, color="#333", linewidth=0.8)
    right.set(
        xlabel="points of accuracy, ± 2 standard errors", title=f"Gain over the base, {100 * LOW:.0f} % left or fewer"
    )
    for panel in (left, middle, right):
        panel.spines[["top", "right"]].set_visible(False)
    out.suptitle(f"activating-while-pruning on {report.settings['data']}: {report.verdict}", fontsize="medium")
    return out


run = runner(__name__)
