"""Improving equilibrium propagation without weight symmetry (Laborieux & Zenke 2023, arXiv:2309.02214).

Two parts. (A) In double precision, on clothes of Fashion-MNIST: how far the gradient of equilibrium propagation is
from backpropagation's, against the size and the number of the nudges, with symmetric and with unrelated
backward weights. (B) A network with two hidden layers is trained on Fashion-MNIST by backpropagation, by
equilibrium propagation from symmetric weights and from unrelated ones, and by the latter with Jacobian
homeostasis; measured are how well its responses agree with the exact errors, and its test accuracy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from neuropil.data import fashion_mnist
from neuropil.errors import ModelError
from neuropil.learn.eqprop import (
    EquilibriumNetwork,
    NotSettled,
    bp_grad,
    ep_grad,
    error_alignment,
    mlp,
    rbp_grad,
    residual,
    rotate,
    weight_angle,
)
from neuropil.report import Measurement, Report, Row, Scale, find
from neuropil.reproduce.harness import Meter, runner

CLAIM = (
    "With holomorphic nudges the gradient of equilibrium propagation is exact at a finite nudge if the weights are "
    "symmetric. Without symmetry a bias remains that no choice of nudges removes; Jacobian homeostasis aligns the "
    "responses with backpropagation's errors again and raises the accuracy."
)
RULE = (
    "Four tests, each in every seed. (1) With symmetric weights, six nudges of radius 0.02 leave less than a tenth of "
    "the relative gradient error of one nudge; with unrelated weights they leave more than 0.1, at radius 0.5 too. (2) "
    "The cosine between response and exact error is lower in both hidden layers after training from unrelated weights "
    "than from symmetric ones. (3) Homeostasis raises that cosine in both hidden layers. (4) Homeostasis raises the "
    "test accuracy. Holds if all four pass, partly if only (4) fails, else does not hold."
)
PAPER_SAYS = (
    "a finite nudge does no harm to complex-differentiable networks: a Cauchy integral gives the exact derivative",
    "weight asymmetry leaves a residual bias by poor alignment with backpropagation's errors, and low task performance",
    "Fashion-MNIST, 784-256-256-10, unrelated weights: homeostasis (weight 1) for 60,000 updates; figure 4 a-d",
    "the homeostatic objective dramatically improves the ability to solve ImageNet 32 x 32",
)
DEVIATIONS = (
    "2,000 updates instead of 60,000, with learning rates up to ten times as high (at scale paper: the paper's)",
    "64 units a hidden layer instead of 256, and 10,000 images instead of 60,000, to fit the time",
    "steps of size 0.5 instead of 1, so that the free phase settles where the full step oscillates",
    "the learning rate is chosen for each arm from one grid, on images outside training and test, with another seed",
    "the responses are derivatives at nudge zero (the paper's N=0), as in the paper's figure 4",
)
NOTES = (
    "Grid: learning rate 3e-4, 1e-3 or 3e-3, for homeostasis also its weight 0.1 or 1 (10 at 1e-3 alone); one seed, "
    "100, judged on training images 50,000 to 55,000. The best weight is the paper's, 1.",
    "Part A is measured at random weights, where with symmetric ones some images lie near a border between two fixed "
    "points. There a nudge of radius 0.1 or 0.5 can cross the border, beyond which no number of nudges is exact. This "
    "was seen with seeds 100 to 102 before the run, and is why test (1) takes the radius 0.02.",
    "2,000 updates are a thirtieth of the paper's: the order of the arms at the end of the paper's training is not "
    "tested here.",
    "Tests (2) to (4) pass in every seed. Test (1) fails in seed 0 alone: there even the radius 0.02 crosses such a "
    "border, and the errors grow with the nudges instead of falling; in the other two seeds six nudges leave less than "
    "a thousandth of one nudge's error.",
)
SEEDS: dict[Scale, tuple[int, ...]] = {"smoke": (0,), "default": (0, 1, 2), "paper": (0, 1, 2, 3, 4)}
# T1, T2: free and nudged steps in training; settle: steps of each phase in part A. A learning rate of 0: see TUNED.
SETTINGS: dict[Scale, dict[str, Any]] = {
    "smoke": {"hidden": 32, "train": 500, "test": 500, "updates": 20, "lr": 0.0, "T1": 40, "T2": 20, "step": 0.5}
    | {"settle": 300},
    "default": {"hidden": 64, "train": 10_000, "test": 3000, "updates": 2000, "lr": 0.0, "T1": 60, "T2": 20}
    | {"step": 0.5, "settle": 2000},
    "paper": {"hidden": 256, "train": 60_000, "test": 10_000, "updates": 60_000, "lr": 1e-4, "T1": 150, "T2": 20}
    | {"step": 1.0, "settle": 2000},
}
BATCH = 50
NUDGES = (1, 2, 4, 6)
RADII = (0.02, 0.1, 0.5)
ALPHAS = {"symmetric": 0.0, "unrelated": 90.0}

BP, SYMMETRIC, UNRELATED, HOMEO = (
    "backpropagation",
    "EP, symmetric start",
    "EP, unrelated",
    "EP, unrelated, homeostasis",
)
ARMS: dict[str, tuple[float, float]] = {
    BP: (90.0, 0.0),
    SYMMETRIC: (0.0, 0.0),
    UNRELATED: (90.0, 0.0),
    HOMEO: (90.0, 1.0),
}
TUNED = {BP: 1e-3, SYMMETRIC: 3e-4, UNRELATED: 3e-4, HOMEO: 1e-3}  # the best learning rates of the grid in NOTES
LAYERS = ("l1", "l2")
ACCURACY = "test accuracy"
ANGLE = "angle between forward and backward weights"
RESIDUAL = "residual force of the free phase"


def cosine(layer: str) -> str:
    return f"cosine of response and exact error, {layer}"


def nudged(n_nudges: int, start: str) -> str:
    return f"{n_nudges} nudge{'s' if n_nudges > 1 else ''}, {start} weights"


def gradient_error(radius: float) -> str:
    return f"relative gradient error, radius {radius}"


def measure(scale: Scale, seed: int, progress: Meter) -> list[Measurement]:
    settings = SETTINGS[scale]
    images = fashion_mnist()
    train = images.train_x.flatten(1)[: settings["train"]], images.train_y[: settings["train"]]
    test = images.test_x.flatten(1)[: settings["test"]], images.test_y[: settings["test"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotSettled)  # the residual is among the measurements
        out = [
            entry
            for arm in progress.track(ARMS, "training", 0.0, 0.95)
            for entry in arm_rows(arm, settings, seed, train, test)
        ]
        progress(0.95, "nudges")
        return out + bias(seed, train, settings["settle"])


# --- A: the two biases ---------------------------------------------------------------------------


def bias(seed: int, data: tuple[Tensor, Tensor], steps: int) -> list[Measurement]:
    """Relative error of the gradient, without the readout's, by nudges and by start."""
    pick = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))[:16]
    x, y = data[0][pick].double(), data[1][pick]
    out = []
    for start, alpha in ALPHAS.items():
        torch.manual_seed(seed)
        network = mlp(784, (32, 32), 10, step_size=0.5).double()
        rotate(network, alpha)
        rbp_grad(network, x, y, T1=steps, T2=steps)
        exact = taken(network)
        for n_nudges in NUDGES:
            for radius in RADII:
                ep_grad(network, x, y, beta=radius, n_nudges=n_nudges, T1=steps, T2=steps)
                error = float((taken(network) - exact).norm() / exact.norm())
                name = nudged(n_nudges, start)
                out.append(Measurement(name, gradient_error(radius), error, "", False, n_nudges == 1))
    return out


def taken(network: EquilibriumNetwork) -> Tensor:
    """The gradient of all but the readout as one vector; `.grad` is cleared."""
    parts = [
        p.grad.flatten() for n, p in network.named_parameters() if not n.startswith("readout") and p.grad is not None
    ]
    network.zero_grad()
    return torch.cat(parts)


# --- B: training ---------------------------------------------------------------------------------


def arm_rows(
    arm: str, settings: dict[str, Any], seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> list[Measurement]:
    """Train one arm and measure it. All arms of a seed start from the same weights and see the same batches."""
    try:
        found = judged(trained(arm, settings, seed, train), settings, test)
    except ModelError:  # it diverged, and is counted as a failure
        found = dict.fromkeys((*map(cosine, LAYERS), ACCURACY, ANGLE, RESIDUAL), math.nan)
    better: dict[str, bool | None] = {ANGLE: None, RESIDUAL: False}
    units = {ACCURACY: "%", ANGLE: "degrees"}
    return [
        Measurement(arm, metric, value, units.get(metric, ""), better.get(metric, True), arm != HOMEO)
        for metric, value in found.items()
    ]


def judged(network: EquilibriumNetwork, settings: dict[str, Any], test: tuple[Tensor, Tensor]) -> dict[str, float]:
    x, y = test
    right = network.predict(x, 150).argmax(1) == y
    few = x[:200], y[:200]
    with torch.no_grad():
        left = residual(network, network(few[0], settings["T1"]), few[0]).mean()
    aligned = error_alignment(network, *few, T1=300, T2=100)
    return {
        **{cosine(layer): aligned[layer] for layer in LAYERS},
        ACCURACY: 100 * float(right.float().mean()),
        ANGLE: weight_angle(network),
        RESIDUAL: float(left),
    }


def trained(arm: str, settings: dict[str, Any], seed: int, train: tuple[Tensor, Tensor]) -> EquilibriumNetwork:
    alpha, homeostasis = ARMS[arm]
    torch.manual_seed(seed)
    network = mlp(784, (settings["hidden"],) * 2, 10, step_size=settings["step"])
    rotate(network, alpha)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings["lr"] or TUNED[arm], weight_decay=0.0)
    order, probes = (torch.Generator().manual_seed(seed) for _ in range(2))
    times = {"T1": settings["T1"], "T2": settings["T2"]}
    for _ in range(settings["updates"]):
        pick = torch.randint(len(train[0]), (BATCH,), generator=order)
        x, y = train[0][pick], train[1][pick]
        optimizer.zero_grad()
        if arm == BP:
            bp_grad(network, x, y, **times)
        else:
            ep_grad(network, x, y, homeostasis=homeostasis, generator=probes, **times)
        optimizer.step()
    return network


# --- verdict and figure --------------------------------------------------------------------------


def verdict(rows: Sequence[Row]) -> str:
    """The rule above, as code; a pure function of the rows."""

    def above(high: str, low: str, metric: str) -> bool:
        pairs = zip(find(rows, high, metric).values, find(rows, low, metric).values, strict=True)
        return all(a > b for a, b in pairs)

    def errors(n_nudges: int, start: str, radius: float) -> tuple[float, ...]:
        return find(rows, nudged(n_nudges, start), gradient_error(radius)).values

    exact = all(a < b / 10 for a, b in zip(errors(6, "symmetric", 0.02), errors(1, "symmetric", 0.02), strict=True))
    stays = all(e > 0.1 for radius in (0.02, 0.5) for e in errors(6, "unrelated", radius))
    hurts = all(above(SYMMETRIC, UNRELATED, cosine(layer)) for layer in LAYERS)
    mends = all(above(HOMEO, UNRELATED, cosine(layer)) for layer in LAYERS)
    if not (exact and stays and hurts and mends):
        return "does not hold"
    return "holds" if above(HOMEO, UNRELATED, ACCURACY) else "partly"


COLOURS = {BP: "#8a8f98", SYMMETRIC: "#5b8c3e", UNRELATED: "#d9822b", HOMEO: "#0b6e99"}
SHADES = dict(zip(NUDGES, ("#cbb8e6", "#9d7fd0", "#6a42a3", "#35155d"), strict=True))


def figure(report: Report) -> Figure:
    """Left: gradient error by nudge. Middle: agreement with the exact errors by layer. Right: accuracy."""
    out = Figure(figsize=(13, 4.4), layout="constrained")
    left, middle, right = out.subplots(1, 3, width_ratios=(1.1, 1.1, 0.8))
    _draw_errors(left, report)
    for i, arm in enumerate(ARMS):
        rows = [report.row(arm, cosine(layer)) for layer in LAYERS]
        _bars(middle, np.arange(len(LAYERS)) + (i - 1.5) * 0.2, rows, 0.19, arm)
        row = report.row(arm, ACCURACY)
        _bars(right, [i], [row], 0.7, arm)
        right.text(i, row.mean + (row.spread or 0) + 2, f"{row.mean:.1f}", ha="center")
    middle.set_xticks(range(len(LAYERS)), [f"hidden layer {layer[1:]}" for layer in LAYERS])
    middle.axhline(0, color="#333", linewidth=0.8)
    middle.set(ylabel="cosine of response and exact error", title="Agreement with backpropagation's errors")
    out.legend(*middle.get_legend_handles_labels(), frameon=False, ncols=4, loc="outside lower center")
    right.set_xticks([])
    right.set(ylabel="test accuracy (%)", title=f"After {report.settings['updates']:,} updates", ylim=(0, 100))
    for panel in (left, middle, right):
        panel.spines[["top", "right"]].set_visible(False)
    out.suptitle(f"equilibrium-propagation on Fashion-MNIST: {report.verdict}", fontsize="medium")
    return out


def _bars(panel: Any, place: Any, rows: Sequence[Row], width: float, arm: str) -> None:
    means, spreads = [r.mean for r in rows], [r.spread or 0 for r in rows]
    panel.bar(place, means, width, color=COLOURS[arm], label=arm)
    panel.errorbar(place, means, spreads, fmt="none", color="#333", capsize=3)


def _draw_errors(panel: Any, report: Report) -> None:
    """Medians, and bars from the least to the greatest of the seeds: the axis is logarithmic."""
    for start, style in (("unrelated", "s--"), ("symmetric", "o-")):
        for n_nudges in NUDGES:
            values = np.array([report.row(nudged(n_nudges, start), gradient_error(r)).values for r in RADII]).T
            middle = np.median(values, 0)
            reach = np.stack([middle - values.min(0), values.max(0) - middle])
            label = nudged(n_nudges, start) if start == "symmetric" else None
            panel.errorbar(RADII, middle, reach, fmt=style, color=SHADES[n_nudges], capsize=3, label=label)
    panel.plot([], [], "s--", color="#888", label="the same, unrelated weights")
    panel.set(xscale="log", yscale="log", xlabel="radius of the nudges (median and range of seeds)")
    panel.set(ylabel="relative error of the gradient", title="Finite nudges against asymmetry")
    panel.set_xticks(RADII, [str(radius) for radius in RADII], minor=False)
    panel.set_xticks([], minor=True)
    panel.legend(frameon=False, fontsize="small", loc="lower right")


run = runner(__name__)
