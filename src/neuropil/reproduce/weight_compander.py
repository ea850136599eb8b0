"""Weight compander (Cakaj, Mehnert, Yang 2023, arXiv:2306.16993).

A perceptron and a small convolutional network with batch normalisation overfit 1,000 images of Fashion-MNIST: plain,
with the weight compander (fixed and learned), and with what could explain its effect: a higher learning rate of the
weights without any function, the bound without the slope, a function that pushes towards zero instead of away from it,
dropout.
Every method has its own learning rate and weight decay from one grid.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from neuropil import data
from neuropil.layers.compander import KINDS, compand, fold, parameter_groups, weight_report
from neuropil.report import Measurement, Report, Row, Scale, find, paired
from neuropil.reproduce.harness import Meter, runner

CLAIM = (
    "Writing every weight as a bounded odd function of a free variable, steep at zero, spreads small weights and "
    "compresses large ones, and generalises better on top of the usual regularisers."
)
RULE = (
    "For a perceptron and a convolutional network, each method with its best learning rate and weight decay, test "
    "accuracy of the fixed compander (slope 1.5, bound 3 deviations) paired over seeds, less that of (1) the plain "
    "network and (2) the plain network whose weight matrices have the learning rate times the slope squared; and (3) "
    "its share of weights near zero, and their largest magnitude in deviations, less the plain network's. Holds if on "
    "both networks (1) and (2) exceed twice their standard error and both parts of (3) lie below zero by as much; does "
    "not hold if the mean of (1) or of (2) over the two networks is zero or less; partly otherwise."
)
PAPER_SAYS = (
    "used beside standard regularisers it improves the performance of neural networks (abstract; no figures)",
)
DEVIATIONS = (
    "only the abstract of the paper could be read: the function (arctan), its scales, their learning and the networks "
    "are this library's choice, and no figure of the paper is compared",
    "a perceptron 784-256-256-10 and a convolutional network of 8, 16 and 32 channels on 1,000 images",
)
NOTES = (
    "Grid: learning rate 0.01, 0.03 or 0.1 for the perceptron (0.03, 0.1 or 0.3 with powerpropagation, which likes it "
    "higher), 0.1 to 0.8 for the convolutional network (0.05 to 0.4 with learned scales, which like it lower), x "
    "weight decay 0, 0.0005, 0.002 or 0.008 (not the last at 0.8); mean of seeds 100 and 101, judged on training "
    "images 50,000 to 55,000. The plain network without decay has the best rate of the same grid.",
    "Part of the change of the histograms is there before training: the bound clips the normal distribution that "
    "weights begin with.",
    "Likely reason for the missing gain: the slope acts as a higher learning rate, which a tuned plain network can "
    "have without it; and near its bound the function is flat, so that weights that have come there hardly move again, "
    "while those clipped at the same bound can.",
    "For the compander on the perceptron the grid's largest decay was best. It acts on v and holds most weights small, "
    "which raises their share near zero; at slope 2 and bound 2, where no decay was best, that share falls as claimed. "
    "The best choices for the perceptron differ by less than two seeds do.",
    "Learned scales have the full learning rate and no decay, as the paper's own rule is not known: they can raise the "
    "bound, and the likelihood of the test images suffers.",
)
SEEDS: dict[Scale, tuple[int, ...]] = {"smoke": (0,), "default": (0, 1, 2, 3, 4), "paper": (0, 1, 2, 3, 4)}
SETTINGS: dict[Scale, dict[str, Any]] = {
    "smoke": {
        "data": "digits",
        "images": 300,
        "width": 32,
        "channels": 4,
        "epochs": {"perceptron": 15, "convolutional": 4},
    },
    "default": {
        "data": "fashion-mnist",
        "images": 1000,
        "width": 256,
        "channels": 8,
        "epochs": {"perceptron": 60, "convolutional": 30},
    },
    "paper": {
        "data": "fashion-mnist",
        "images": 5000,
        "width": 512,
        "channels": 32,
        "epochs": {"perceptron": 60, "convolutional": 60},
    },
}
BATCH = 64
SLOPE, BOUND = 1.5, 3.0
POWER, DROP = 1.5, 0.2
PLAIN, FREE, RATE = "plain", "plain, no weight decay", "plain, learning rate × slope²"
CLIPPED, POWERED, DROPPED = "bound without slope", "powerpropagation", "dropout"
FIXED, STRONG, LEARNED = "compander", "compander, slope 2, bound 2", "compander, learned"
METHODS: dict[str, tuple[str, ...]] = {
    "perceptron": (PLAIN, FREE, RATE, CLIPPED, POWERED, DROPPED, FIXED, STRONG, LEARNED),
    "convolutional": (PLAIN, RATE, CLIPPED, FIXED, LEARNED),
}
# (learning rate, weight decay): the best of the grid in NOTES.
TUNED: dict[str, dict[str, tuple[float, float]]] = {
    "perceptron": {
        PLAIN: (0.03, 0.002),
        FREE: (0.03, 0.0),
        RATE: (0.01, 0.0),
        CLIPPED: (0.03, 0.0005),
        POWERED: (0.1, 0.0005),
        DROPPED: (0.03, 0.0),
        FIXED: (0.03, 0.008),
        STRONG: (0.1, 0.0),
        LEARNED: (0.01, 0.0005),
    },
    "convolutional": {
        PLAIN: (0.8, 0.002),
        RATE: (0.8, 0.0005),
        CLIPPED: (0.8, 0.0),
        FIXED: (0.8, 0.0005),
        LEARNED: (0.1, 0.008),
    },
}
ACCURACY, LOSS, NEAR, PEAK, KURTOSIS, HALVED = (
    "test accuracy",
    "test negative log-likelihood",
    "weights near zero",
    "largest weight",
    "kurtosis of the weights",
    "test accuracy without the smaller half",
)

Split = tuple[Tensor, Tensor]


class Powerprop(nn.Module):
    """w = v |v|^(p - 1), Schwarz et al. 2021: flat at zero, so that small weights stay small."""

    def forward(self, v: Tensor) -> Tensor:
        return v.sign() * v.abs().pow(POWER)  # as v |v|^(p - 1), whose gradient is NaN at 0

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.sign() * weight.abs().pow(1 / POWER)


@dataclass(frozen=True)
class Clip:
    """Holds weights within what they were bounded by at first, in deviations."""

    bounds: tuple[tuple[nn.Parameter, float], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Clip:
        return cls(tuple((w, BOUND * float(w.detach().square().mean().sqrt())) for w in matrices(model)))

    @torch.no_grad()
    def __call__(self) -> None:
        for weight, bound in self.bounds:
            weight.clamp_(-bound, bound)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the linear and convolutional layers, or the variables behind them."""
    return [p for p in model.parameters() if p.ndim > 1]


def network(kind: str, settings: dict[str, Any], shape: Sequence[int], drop: float) -> nn.Sequential:
    """One of the two networks, He-initialised."""
    n, c = settings["width"], settings["channels"]
    if kind == "perceptron":
        model = nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(math.prod(shape), n), nn.ReLU(), nn.Dropout(drop)),
            *(nn.Linear(n, n), nn.ReLU(), nn.Dropout(drop)),
            nn.Linear(n, 10),
        )
    else:
        model = nn.Sequential(
            *(nn.Conv2d(1, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(c, 2 * c, 3, padding=1, bias=False), nn.BatchNorm2d(2 * c), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(2 * c, 4 * c, 3, padding=1, bias=False), nn.BatchNorm2d(4 * c), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * c, 10)),
        )
    for weight in matrices(model):
        nn.init.kaiming_normal_(weight)
    return model


def prepared(
    method: str, model: nn.Module, rate: float, decay: float
) -> tuple[torch.optim.Optimizer, Callable[[], Any]]:
    """The optimizer of a method, and what it does after each step; puts its parametrisation on the model."""
    after: Callable[[], Any] = lambda: None  # noqa: E731
    if method in (FIXED, LEARNED):
        compand(model, slope=SLOPE, bound_std=BOUND, learnable=method == LEARNED)
    elif method == STRONG:
        compand(model, slope=2.0, bound_std=2.0)
    elif method == POWERED:
        for module in [m for m in model.modules() if isinstance(m, KINDS)]:
            parametrize.register_parametrization(module, "weight", Powerprop())
    elif method == CLIPPED:
        after = Clip.of(model)
    groups = parameter_groups(model, weight_decay=decay)
    if method == RATE:
        fast = matrices(model)
        slow = [p for p in model.parameters() if all(p is not w for w in fast)]
        groups = [{"params": slow, "weight_decay": decay}]
        # Decay acts as without the factor: the slope squared is on the gradient of the loss alone.
        groups += [{"params": fast, "lr": rate * SLOPE**2, "weight_decay": decay / SLOPE**2}]
    return torch.optim.SGD(groups, lr=rate, momentum=0.9), after


def trained(
    kind: str, method: str, data: Split, settings: dict[str, Any], seed: int, choice: tuple[float, float] | None = None
) -> nn.Module:
    """A network of this kind trained by one of the methods and folded."""
    torch.manual_seed(seed)
    rate, decay = choice or TUNED[kind][method]
    model = network(kind, settings, data[0].shape[1:], DROP if method == DROPPED else 0.0)
    optimizer, after = prepared(method, model, rate, decay)
    batches = -(-len(data[0]) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings["epochs"][kind] * batches)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings["epochs"][kind]):
        for batch in torch.randperm(len(data[0]), generator=generator).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(data[0][batch]), data[1][batch]).backward()
            optimizer.step()
            after()
            schedule.step()
    fold(model)
    for module in [m for m in model.modules() if parametrize.is_parametrized(m)]:
        parametrize.remove_parametrizations(module, "weight")
    return model.eval()


@torch.no_grad()
def judged(model: nn.Module, data: Split) -> tuple[float, float]:
    """Accuracy in per cent, and the mean negative log-likelihood (NaN for a network that diverged)."""
    logits = torch.cat([model(part) for part in data[0].split(1000)])
    loss = float(cross_entropy(logits, data[1]))
    right = float((logits.argmax(1) == data[1]).double().mean())
    return (100 * right, loss) if math.isfinite(loss) else (math.nan, math.nan)


@torch.no_grad()
def halved(model: nn.Module) -> nn.Module:
    """A copy without the smaller half of each weight matrix."""
    model = copy.deepcopy(model)
    for weight in matrices(model):
        weight.view(-1)[weight.abs().flatten().argsort()[: weight.numel() // 2]] = 0
    return model


def splits(settings: dict[str, Any]) -> tuple[Split, Split]:
    """The first so many training images and all test images."""
    images, count = data.image_set(settings["data"]), settings["images"]
    return (images.train_x[:count], images.train_y[:count]), (images.test_x, images.test_y)


def measure(scale: Scale, seed: int, progress: Meter) -> list[Measurement]:
    settings = SETTINGS[scale]
    train, test = splits(settings)
    every = [(kind, method) for kind, methods in METHODS.items() for method in methods]
    rows = []
    for kind, method in progress.track(every, "training"):
        model = trained(kind, method, train, settings, seed)
        accuracy, loss = judged(model, test)
        inner = [s for s in weight_report(model) if not s.name.startswith(LAST[kind])]
        spread = [
            statistics.fmean(values) for values in zip(*((s.near_zero, s.peak, s.kurtosis) for s in inner), strict=True)
        ]
        ours = method in (FIXED, STRONG, LEARNED)
        found: list[tuple[str, float, str, bool | None]] = [
            (ACCURACY, accuracy, "%", True),
            (LOSS, loss, "nats", False),
            (NEAR, 100 * spread[0], "%", None),
            (PEAK, spread[1], "deviations", None),
            (KURTOSIS, spread[2], "", None),
            (HALVED, judged(halved(model), test)[0], "%", True),
        ]
        for metric, value, unit, better in found:
            rows.append(Measurement(method, f"{kind}: {metric}", value, unit, better, not ours))
    return rows


LAST = {"perceptron": "7.", "convolutional": "13."}  # the output layer, too small for a histogram
TITLES = {"perceptron": "Perceptron (dotted: plain)", "convolutional": "Convolutional network (dotted: plain)"}


# --- verdict and figure --------------------------------------------------------------------------


def difference(rows: Sequence[Row], kind: str, metric: str, other: str) -> tuple[float, float]:
    """Compander less `other`: mean over seeds and its standard error (infinite for one seed; NaN if any failed)."""
    ours, theirs = (find(rows, name, f"{kind}: {metric}").values for name in (FIXED, other))
    return paired(ours, theirs)


def verdict(rows: Sequence[Row]) -> str:
    """The rule above, as code; a pure function of the rows. A run that failed (NaN) fails its difference."""
    gains = {other: [difference(rows, kind, ACCURACY, other) for kind in METHODS] for other in (PLAIN, RATE)}
    if not all(statistics.fmean(mean for mean, _ in found) > 0 for found in gains.values()):
        return "does not hold"
    spread = [difference(rows, kind, metric, PLAIN) for kind in METHODS for metric in (NEAR, PEAK)]
    clear = all(mean > 2 * error for found in gains.values() for mean, error in found)
    return "holds" if clear and all(mean < -2 * error for mean, error in spread) else "partly"


def figure(report: Report) -> Figure:
    """A row of panels a network: accuracy, likelihood and two measures of the weights' spread, for each method."""
    out = Figure(figsize=(13, 6.5), layout="constrained")
    panels = out.subplots(2, 4, height_ratios=[len(names) for names in METHODS.values()])
    for line, (kind, methods) in zip(panels, METHODS.items(), strict=True):
        for panel, metric in zip(line, (ACCURACY, LOSS, NEAR, PEAK), strict=True):
            _panel(panel, [report.row(name, f"{kind}: {metric}") for name in methods[::-1]])
            panel.set_xlabel(f"{metric} ({report.row(PLAIN, f'{kind}: {metric}').unit})")
            if panel is not line[0]:
                panel.set_yticklabels([])
        line[0].set_title(TITLES[kind], loc="left", fontsize="medium")
    images = report.settings["images"]
    out.suptitle(
        f"weight-compander, {images:,} images of {report.settings['data']}: {report.verdict}", fontsize="medium"
    )
    return out


def _panel(panel: Axes, rows: list[Row]) -> None:
    ours, grey = "#0b6e99", "#8a8f98"
    for height, row in enumerate(rows):
        colour = grey if row.baseline else ours
        panel.errorbar(row.mean, height, xerr=row.spread or 0, fmt="o", color=colour, capsize=3)
        panel.plot(row.values, [height + 0.25] * len(row.values), ".", color=colour, alpha=0.4)
    panel.axvline(rows[-1].mean, color=grey, linewidth=0.8, linestyle=":")  # the plain network
    panel.set_yticks(range(len(rows)), [row.name for row in rows])
    panel.set_ylim(-0.6, len(rows) - 0.4)
    panel.spines[["top", "right"]].set_visible(False)


run = runner(__name__)
