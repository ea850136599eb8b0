"""Structured Bayesian compression by Turbo-VBI (Xia, Tsang and Lau 2023, arXiv:2302.10483).

A multilayer perceptron, trained on Fashion-MNIST, is pruned by Turbo-VBI under a prior of independent weights, of
chains along what each neuron reads, and of chains both ways; by sparse and by group variational dropout, and by
magnitude. All are cut to the same number of weights and trained on for as long; compared are accuracy and how regular
the pattern is. Beside it, what the two priors find of the support of sparse linear regressions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from neuropil import data
from neuropil.compress.regularity import regularity
from neuropil.compress.sparse import prune_magnitude
from neuropil.compress.support import BernoulliPrior, HMMPrior, Prior
from neuropil.compress.turbo_vbi import TurboVBI
from neuropil.compress.variational_dropout import VariationalDropout
from neuropil.report import Measurement, Report, Row, Scale, find, paired
from neuropil.reproduce import _turbo_vbi_regression as regression
from neuropil.reproduce.figures import BASELINE, OURS
from neuropil.reproduce.harness import Meter, runner

CLAIM = (
    "A Bayesian prior whose on/off pattern follows Markov chains prunes weights into clusters, giving more regular "
    "sparsity with better compression and accuracy than a prior that treats weights independently."
)
RULE = (
    "Chains along each neuron's inputs less independent weights, both by Turbo-VBI and cut to 10 % of the weights, "
    "paired over seeds. Regular: the mean run of weights rises, and the bits of a run-length index fall, each by more "
    "than twice the standard error of the difference. Accurate: test accuracy rises by more than twice its standard "
    "error. Support: F1 of the regressions' support rises by more than twice its standard error. Holds if all three; "
    "does not hold if the mean run does not rise, the index does not shrink, or accuracy is more than 1 point lower; "
    "partly otherwise."
)
PAPER_SAYS = (
    "more regular structure of the pruned network, with better compression rate and inference accuracy than the "
    "baselines (abstract; its tables could not be read)",
)
DEVIATIONS = (
    "a perceptron 784-300-100-10 on 10,000 images of Fashion-MNIST; the paper's networks, data sets and settings could "
    "not be read",
    "the divergence from the prior is divided by ten times the number of images for independent and chained weights "
    "and for sparse variational dropout (a cold posterior, tuned for each): at full weight and so few images all of "
    "them give up more than two points of accuracy",
    "all are cut to the same number of weights, by their own scores, and trained on with those weights alone; the "
    "posterior's own density is reported beside",
)
NOTES = (
    "Grid, on 6,000 training images and judged on training images 50,000 to 54,000, one seed: weight of the divergence "
    "1, 1/3, 1/10 (also 1/100 for groups), density of the prior 0.001, 0.01, 0.03, 0.05, mean run 3, 4, 8 for chains "
    "one way and 1.15 to 4 for both ways, log-variance at the start -9, -10, -12. The share of 10 % was chosen there "
    "too, as near the posterior's own; 5 % is reported beside.",
    "Magnitude pruning is done at the start, so that its weights are trained on for as long as the others' posteriors "
    "and fine-tuning together.",
    "Chains both ways must be weak: each weight has four neighbours, and at the runs that chains one way have nearly "
    "all weights stay.",
    "Group variational dropout prunes whole inputs of a layer, too coarse for 10 % of these weights; of the last "
    "group, which is kept in part, the first weights stay.",
    "Likely reason that accuracy does not rise: a chain keeps the neighbours of a weight that is needed, and the "
    "inputs of a hidden layer have no order that would make them needed too. The price grows with sparsity (5 %). The "
    "gain is in the pattern alone: counted with 32-bit values, half as many independent weights of about the same "
    "accuracy take less room than clustered ones.",
)
SEEDS: dict[Scale, tuple[int, ...]] = {"smoke": (0,), "default": (0, 1, 2), "paper": (0, 1, 2, 3, 4)}
SETTINGS: dict[Scale, dict[str, Any]] = {
    "smoke": {"data": "digits", "images": 1408, "first": 8, "epochs": 16, "more": 2, "problems": 4},
    "default": {"data": "fashion-mnist", "images": 10_000, "first": 6, "epochs": 8, "more": 2, "problems": 20},
    "paper": {"data": "fashion-mnist", "images": 60_000, "first": 5, "epochs": 15, "more": 3, "problems": 20},
}
BATCH, EVERY, RATE, VARIANCE_RATE = 128, 40, 1e-3, 1e-2
DENSITIES = (0.1, 0.05)
SHOWN = 8.0  # points of accuracy below the network before pruning that the figure shows
MAGNITUDE, VD, GROUP = "magnitude", "sparse variational dropout", "group variational dropout"
INDEPENDENT, CHAINS, GRID = "Turbo-VBI, independent", "Turbo-VBI, chains", "Turbo-VBI, chains both ways"
VARIANTS = (MAGNITUDE, GROUP, VD, INDEPENDENT, CHAINS, GRID)
OWN = (CHAINS, GRID)
# The best of the grid in NOTES: how many times the number of images the divergence is divided by, and the priors.
COLD = {VD: 10, GROUP: 1, INDEPENDENT: 10, CHAINS: 10, GRID: 10}
PRIORS: dict[str, Prior] = {
    INDEPENDENT: BernoulliPrior(0.05),
    CHAINS: HMMPrior.of(0.05, run=3.0),
    GRID: HMMPrior.of(0.03, run=1.3, axis="both"),
}
F1, NMSE = "F1 of a regression's support", "error of a regression's weights"
DENSE, NATURAL = "dense", "density of the posterior itself"

Split = tuple[Tensor, Tensor]
Bayesian = TurboVBI | VariationalDropout


def accuracy_at(density: float) -> str:
    return f"test accuracy at {100 * density:.0f} % of the weights"


def run_at(density: float) -> str:
    return f"mean run of weights at {100 * density:.0f} %"


def index_at(density: float) -> str:
    return f"run-length index at {100 * density:.0f} %"


def blocks_at(density: float) -> str:
    return f"empty blocks of 8 at {100 * density:.0f} %"


def measure(scale: Scale, seed: int, progress: Meter) -> list[Measurement]:
    settings = SETTINGS[scale]
    train, test = splits(settings)
    start = network(train[0].shape[1], seed)
    learn(start, train, settings["first"], 1000 * seed)
    rows = [Measurement(DENSE, "test accuracy before pruning", accuracy(start, test), "%", True, True)]
    for name in progress.track(VARIANTS, "pruning", 0.05, 0.95):
        rows += _variant(name, start, train, test, settings, seed)
    return rows + _regressions(settings["problems"], seed)


def _variant(
    name: str, start: nn.Module, train: Split, test: Split, settings: dict[str, Any], seed: int
) -> list[Measurement]:
    baseline, first = name not in OWN, 1000 * seed + 100
    model, schedule = copy.deepcopy(start), None
    if name != MAGNITUDE:
        schedule = scheduled(name, model, len(train[0]), settings["epochs"], seed)
        learn(model, train, settings["epochs"], first, schedule)
    rows = []
    if isinstance(schedule, TurboVBI):
        rows.append(Measurement(name, NATURAL, 100 * schedule.density, "%", None, baseline))
    for density in DENSITIES:
        epochs = settings["more"]
        if schedule is None:
            pruned, epochs = prune_magnitude(model, 1 - density).model, epochs + settings["epochs"]
        else:
            pruned = schedule.prune(density).model
        learn(pruned, train, epochs, first + 500, masks=nonzero(pruned))
        found = regularity(pruned)
        rows += [
            Measurement(name, accuracy_at(density), accuracy(pruned, test), "%", True, baseline),
            Measurement(name, run_at(density), found.run, "weights", True, baseline),
            Measurement(name, index_at(density), found.index_bits / found.nonzero, "bits a weight", False, baseline),
            Measurement(name, blocks_at(density), 100 * found.empty_blocks / found.blocks, "%", True, baseline),
        ]
    return rows


def _regressions(count: int, seed: int) -> list[Measurement]:
    x, w, y = regression.problems(count, torch.Generator().manual_seed(seed))
    rows = []
    for name, prior in ((CHAINS, regression.TRUTH), (INDEPENDENT, BernoulliPrior(0.2)), ("all weights there", None)):
        mean, support = regression.solved(x, y, prior)
        scored = float(regression.f1(support > 0.5, w != 0).mean())
        rows.append(Measurement(name, F1, scored, "", True, name != CHAINS))
        rows.append(Measurement(name, NMSE, float(regression.error(mean, w).mean()), "", False, name != CHAINS))
    return rows


def splits(settings: dict[str, Any]) -> tuple[Split, Split]:
    """The first so many training images and all test images, as rows of pixels."""
    images = data.image_set(settings["data"])
    count = settings["images"]
    return (images.train_x[:count].flatten(1), images.train_y[:count]), (images.test_x.flatten(1), images.test_y)


def network(inputs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def scheduled(name: str, model: nn.Module, images: int, epochs: int, seed: int) -> Bayesian:
    """The Bayesian training of this name, put on the model: a third of it is warm-up, half is without messages."""
    steps, size = epochs * (images // BATCH), COLD[name] * images
    if name in PRIORS:
        return TurboVBI(
            model,
            PRIORS[name],
            data_size=size,
            every=EVERY,
            warmup=steps // 3,
            alone=steps // 2,
            log_variance=-12.0,
            seed=seed,
        )
    return VariationalDropout(
        model, data_size=size, group="in" if name == GROUP else None, warmup=steps // 3, seed=seed
    )


def learn(
    model: nn.Module,
    data: Split,
    epochs: int,
    seed: int,
    schedule: Bayesian | None = None,
    masks: dict[str, Tensor] | None = None,
) -> None:
    """Train in place by Adam; variances have a rate of their own, weights outside the masks stay zero."""
    named = dict(model.named_parameters())
    variances = [p for name, p in named.items() if name.endswith("log_variance")]
    others = [p for name, p in named.items() if not name.endswith("log_variance")]
    optimizer = torch.optim.Adam([{"params": others}], lr=RATE)
    if variances:
        optimizer.add_param_group({"params": variances, "lr": VARIANCE_RATE})
    held = [(named[name].data, mask) for name, mask in (masks or {}).items()]
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed + epoch))
        for batch in order.split(BATCH)[: len(order) // BATCH]:
            optimizer.zero_grad()
            loss = cross_entropy(model(data[0][batch]), data[1][batch])
            if schedule is not None:
                loss = loss + schedule.kl()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            for weight, mask in held:
                weight.mul_(mask)
    model.eval()


def nonzero(model: nn.Module) -> dict[str, Tensor]:
    """Where each weight matrix is not zero."""
    return {name: p.detach() != 0 for name, p in model.named_parameters() if p.dim() > 1}


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    return 100 * float((model(data[0]).argmax(1) == data[1]).float().mean())


# --- verdict and figure --------------------------------------------------------------------------


def difference(rows: Sequence[Row], metric: str) -> tuple[float, float]:
    """Chains less independent: mean over seeds and its standard error (infinite for one seed; NaN if any failed)."""
    return paired(find(rows, CHAINS, metric).values, find(rows, INDEPENDENT, metric).values)


def verdict(rows: Sequence[Row]) -> str:
    """The rule above, as code; a pure function of the rows. A run that failed (NaN) fails its difference."""
    longer, shorter, better, support = (
        difference(rows, metric) for metric in (run_at(0.1), index_at(0.1), accuracy_at(0.1), F1)
    )
    regular = longer[0] > 2 * longer[1] and -shorter[0] > 2 * shorter[1]
    if not (longer[0] > 0 and shorter[0] < 0 and better[0] >= -1):
        return "does not hold"
    return "holds" if regular and better[0] > 2 * better[1] and support[0] > 2 * support[1] else "partly"


def figure(report: Report) -> Figure:
    """Accuracy, mean run and bits of the index, of every method at both densities."""
    out = Figure(figsize=(13, 4.4), layout="constrained")
    left, middle, right = out.subplots(1, 3, width_ratios=(1.25, 1, 1))
    dense = report.row(DENSE, "test accuracy before pruning").mean
    _dots(left, report, accuracy_at, "test accuracy (%)", dense - SHOWN)
    left.axvline(dense, color="#333", linewidth=0.8, linestyle="--")
    left.set_title("dashed: the network before pruning", fontsize="medium")
    _dots(middle, report, run_at, "mean run of weights along a neuron's inputs")
    _dots(right, report, index_at, "run-length index (bits a weight)")
    for panel in (middle, right):
        panel.set_yticklabels([])
    middle.set_title("longer is more regular", fontsize="medium")
    right.set_title("less is smaller", fontsize="medium")
    handles = [
        Line2D(
            [], [], marker=marker, linestyle="", color="#333", markerfacecolor=face, label=f"{100 * d:.0f} % of weights"
        )
        for d, (marker, face) in zip(DENSITIES, (("o", "#333"), ("s", "white")), strict=True)
    ]
    out.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    out.suptitle(f"turbo-vbi on {report.settings['data']}: {report.verdict}", fontsize="medium")
    return out


def _dots(panel: Axes, report: Report, metric: Callable[[float], str], label: str, floor: float = -math.inf) -> None:
    """A dot a method and density; values below the floor stand at it as numbers."""
    names = VARIANTS[::-1]
    for density, marker, shift in ((DENSITIES[0], "o", 0.15), (DENSITIES[1], "s", -0.15)):
        for height, name in enumerate(names):
            row = report.row(name, metric(density))
            colour = BASELINE if row.baseline else OURS
            if row.mean < floor:
                text = f"\u2190 {row.mean:.1f} ({100 * density:.0f} % of weights)"
                panel.text(floor, height + shift, text, color=colour, va="center", fontsize="small")
                continue
            face = "white" if marker == "s" else colour
            panel.errorbar(
                row.mean,
                height + shift,
                xerr=row.spread or 0,
                fmt=marker,
                capsize=3,
                color=colour,
                markerfacecolor=face,
            )
    if math.isfinite(floor):
        panel.set_xlim(left=floor - 0.3)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(-0.5, len(names) - 0.5)
    panel.set_xlabel(label)
    panel.grid(axis="x", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


run = runner(__name__)
