"""Compression through jointly learnable codebooks and mappings (Yvinec, Dapogny and Bailly 2024, arXiv:2309.17361).

A convolutional network learns Fashion-MNIST and is then stored in two and in three bits a weight, without labels: by
rounding to a uniform grid, by one k-means codebook a layer, by codebooks (or scales) for groups of neurons, by learning
the codebooks, and by learning codebooks and indices together, with the plain gradient of a softmax and with the
gradients that favour near codewords. Beside it, how much grouping alone gains on matrices of a language model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from neuropil import data
from neuropil.compress import learn_codebooks, quantize_model
from neuropil.evaluate import accuracy
from neuropil.models import load
from neuropil.packed import Lookup, packed_modules
from neuropil.report import Measurement, Report, Row, Scale, find, paired
from neuropil.reproduce.figures import BASELINE, OURS
from neuropil.reproduce.harness import Meter, runner

CLAIM = (
    "Codebooks for groups of neurons, learned together with the indices by a gradient that favours near codewords, "
    "keep what a network computes in two or three bits a weight better than one codebook, than learned codebooks "
    "alone, and than the plain gradient of the indices."
)
RULE = (
    "Three gains, each the fall of the logarithm of the error of the logits on test images (their squared error over "
    "the variance of the logits), mean over 2 and 3 bits, paired over seeds: (1) k-means codebooks for groups (mean "
    "over 2, 4 and 8 groups) against one k-means codebook; (2) codebooks and indices learned with the proximal "
    "gradient (phi = 1 / (d + 0.1)) against codebooks learned alone, 8 groups each; (3) the proximal against the plain "
    "gradient, the same otherwise. Holds if each mean exceeds twice its standard error; does not hold if any mean is "
    "zero or less; partly otherwise. A run that fails is no gain."
)
PAPER_SAYS = (
    "Llama 7B in 2 GB, that is about 2.3 bits a weight (6.7 times smaller than in half precision)",
    "figure 1: the plain gradient of the mapping weighs codewords more the farther away they are; the proposed one "
    "less",
    "several codebooks a layer at no cost for the mapping, by re-ordering neurons; no table of the paper could be read",
)
DEVIATIONS = (
    "a small convolutional network on Fashion-MNIST instead of Llama 7B and ResNet-50: about 155,000 weights, batch "
    "norms, trained on 20,000 images for 6 epochs",
    "512 images to calibrate on and 300 steps a layer",
    "phi, the grouping and the optimizer are not known from the paper; see the method's documentation. Three choices "
    "of phi and the form with latent weights are shown",
    "of the language model only the error of matrices is measured, not its perplexity; its weights had been rounded to "
    "4 bits by the package that they come from",
)
NOTES = (
    "The learning rate of each way to learn indices is 0.003 or 0.01 (0.01 or 0.03 from indices alone), whichever has "
    "the lower error at 2 bits on training images 50,000 to 52,000, mean over networks of seeds 100 and 101. On the "
    "first of them 0.001 and 0.03 were worse where tried, and for the plain gradient a softmax four times as sharp, "
    "and forward passes that take its mean.",
    "Scores of codewords begin with the distance to them, which keeps far codewords behind whatever the gradient. The "
    "two arms from indices alone begin without (all codewords but that of k-means alike), outside the rule.",
    "Likely reason why the plain gradient is hardly worse by the rule: that beginning is proximal by itself, and both "
    "gradients move indices to neighbours only. From indices alone the plain gradient moves most of them beyond a "
    "neighbour and ends at a higher error, as the paper has it, and the proximal one does not.",
    "Grouping is not always a gain: groups are of rows alike in the distribution of weights, and the least error of "
    "the weights is not the least error of what they compute.",
    "Moves of indices are counted against those of k-means, in all layers, in places of the codebook.",
)
SEEDS: dict[Scale, tuple[int, ...]] = {"smoke": (0,), "default": (0, 1, 2), "paper": (0, 1, 2, 3, 4)}
SETTINGS: dict[Scale, dict[str, Any]] = {
    "smoke": {"data": "digits", "images": 1200, "epochs": 15, "steps": 40, "calibration": 128, "language": False},
    "default": {
        "data": "fashion-mnist", "images": 20_000, "epochs": 6, "steps": 300, "calibration": 512, "language": True,
    },
    "paper": {
        "data": "fashion-mnist", "images": 50_000, "epochs": 30, "steps": 10_000, "calibration": 1024, "language": True,
    },
}  # fmt: skip
BITS = (2, 3)
UNIFORM, CHANNEL = "uniform, one scale", "uniform, a scale a channel"
ONE = "k-means, one codebook"
BOOKS = {g: f"k-means, {g} codebooks" for g in (2, 4, 8)}
SCALES = "k-means, 8 scales"
ALONE, PLAIN = "codebooks learned", "both, plain gradient"
INVERSE, EXPONENTIAL, NEIGHBOURS = "both, 1 / (d + 0.1)", "both, exp(-2 d)", "both, neighbours only"
LATENT = "both, latent weights"
PLAIN_INDEX, INVERSE_INDEX = "plain, from indices alone", "1 / (d + 0.1), from indices alone"
LEARNED: dict[str, dict[str, Any]] = {
    ALONE: {"learn": "codebooks"},
    PLAIN: {"gradient": "plain", "lr": 0.01},
    INVERSE: {"phi": "inverse", "lr": 0.003},
    EXPONENTIAL: {"phi": "exponential", "lr": 0.01},
    NEIGHBOURS: {"phi": "neighbours", "lr": 0.003},
    LATENT: {"form": "latent", "lr": 0.01},
    PLAIN_INDEX: {"gradient": "plain", "start": "index", "lr": 0.03},
    INVERSE_INDEX: {"phi": "inverse", "start": "index", "lr": 0.03},
}
ARMS = (UNIFORM, CHANNEL, ONE, *BOOKS.values(), SCALES, *LEARNED)
BASELINES = (UNIFORM, CHANNEL, ONE, ALONE, PLAIN, PLAIN_INDEX)
WHOLE = "not compressed"
GROUPS = 8
MATRICES = {"q_proj of layer 15": "layers.15.self_attn.q_proj", "up_proj of layer 5": "layers.5.mlp.up_proj"}


def error_at(bits: int) -> str:
    return f"error of the logits, {bits} bits"


def accuracy_at(bits: int) -> str:
    return f"test accuracy, {bits} bits"


def size_at(bits: int) -> str:
    return f"stored bits a weight, {bits} bits"


def far_at(bits: int) -> str:
    return f"indices that moved by more than one, of those that moved, {bits} bits"


def measure(scale: Scale, seed: int, progress: Meter) -> list[Measurement]:
    settings = SETTINGS[scale]
    images = data.image_set(settings["data"])
    count = settings["images"]
    model = trained(images.train_x[:count], images.train_y[:count], settings["epochs"], seed)
    progress(0.2, "compressing")
    calibration = list(images.train_x[count : count + settings["calibration"]].split(128))
    test, labels = images.test_x, images.test_y
    rows = [Measurement(WHOLE, accuracy_at(BITS[0]), 100 * accuracy(model, test, labels), "%", True, True)]
    whole = answers(model, test)
    for bits in BITS:
        start = codes(learn_codebooks(model, bits, GROUPS, seed=seed).model)
        for name in progress.track(
            list(ARMS), f"{bits} bits", 0.2 + 0.4 * BITS.index(bits), 0.6 + 0.4 * BITS.index(bits)
        ):
            made = compressed(model, name, bits, calibration, settings["steps"], seed)
            found = {
                error_at(bits): float((answers(made, test) - whole).square().mean() / whole.var()),
                accuracy_at(bits): 100 * accuracy(made, test, labels),
                size_at(bits): stored(made),
            }
            if name in LEARNED and name != ALONE:
                moved = (codes(made) - start).abs()
                found[far_at(bits)] = 100 * float((moved > 1).sum() / (moved > 0).sum().clamp_min(1))
            rows += [
                Measurement(name, metric, value, unit(metric), better(metric), name in BASELINES)
                for metric, value in found.items()
            ]
    return rows + (matrices() if settings["language"] else [])


def unit(metric: str) -> str:
    return "%" if metric.startswith(("test accuracy", "indices")) else ""


def better(metric: str) -> bool | None:
    """Whether more is better; None where neither is."""
    return None if metric.startswith("indices") else metric.startswith("test accuracy")


def network(side: int) -> nn.Sequential:
    """Three strided convolutions with batch norms, and two linear layers."""
    left = math.ceil(math.ceil(math.ceil(side / 2) / 2) / 2)

    def convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()

    return nn.Sequential(
        *(*convolution(1, 16), *convolution(16, 32), *convolution(32, 64), nn.Flatten()),
        *(nn.Linear(64 * left**2, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def trained(x: Tensor, y: Tensor, epochs: int, seed: int, batch: int = 128) -> nn.Module:
    torch.manual_seed(seed)
    model = network(x.shape[-1])
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for at in torch.randperm(len(x)).split(batch)[: len(x) // batch]:
            optimizer.zero_grad()
            cross_entropy(model(x[at]), y[at]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def compressed(model: nn.Module, name: str, bits: int, calibration: list[Tensor], steps: int, seed: int) -> nn.Module:
    if name in (UNIFORM, CHANNEL):
        granularity = "tensor" if name == UNIFORM else "channel"
        settings = {"bits": bits, "granularity": granularity, "observer": "mse", "scale_dtype": "float16"}
        return quantize_model(model, settings).model
    if name in LEARNED:
        return learn_codebooks(
            model, bits, GROUPS, calibration=calibration, steps=steps, seed=seed, **LEARNED[name]
        ).model
    if name == SCALES:
        return learn_codebooks(model, bits, GROUPS, mode="scales", seed=seed).model
    groups = {ONE: 1, **{arm: g for g, arm in BOOKS.items()}}[name]
    return learn_codebooks(model, bits, groups, seed=seed).model


@torch.no_grad()
def answers(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(1000)])


def codes(model: nn.Module) -> Tensor:
    """The indices of all layers, one after another."""
    kept = [packing for _, _, packing in packed_modules(model)]
    return torch.cat([packing.integers().flatten().int() for packing in kept if isinstance(packing, Lookup)])


def stored(model: nn.Module) -> float:
    """Bits a weight, codebooks, scales and groups included."""
    kept = [packing for _, _, packing in packed_modules(model)]
    return sum(p.bits * p.shape.numel() for p in kept) / sum(p.shape.numel() for p in kept)


def matrices() -> list[Measurement]:
    """How far k-means with so many codebooks is off on matrices of SmolLM2, without learning."""
    model: Any = load("smollm2").module()
    out = []
    for label, name in MATRICES.items():
        layer = model.get_submodule(f"model.{name}")
        for groups in (1, 4, 8, 16):
            made = learn_codebooks(nn.Sequential(layer), 2, groups).model.get_submodule("0").weight
            error = float(((made - layer.weight).norm() / layer.weight.norm()).detach())
            arm = ONE if groups == 1 else f"k-means, {groups} codebooks"
            out.append(Measurement(arm, f"error of the weights, {label}, 2 bits", error, "", False, groups == 1))
    return out


# ----------------------------------------------------------------------------------------------- verdict and figure


def gains(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """The three of the rule: mean and standard error over seeds."""

    def logs(name: str) -> list[float]:
        values = [find(rows, name, error_at(bits)).values for bits in BITS]
        return [statistics.fmean(_log(v) for v in seed) for seed in zip(*values, strict=True)]

    groups = [statistics.fmean(seed) for seed in zip(*(logs(name) for name in BOOKS.values()), strict=True)]
    return {
        "groups over one codebook": paired(logs(ONE), groups),
        "both over codebooks alone": paired(logs(ALONE), logs(INVERSE)),
        "proximal over plain gradient": paired(logs(PLAIN), logs(INVERSE)),
    }


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def verdict(rows: Sequence[Row]) -> str:
    """The rule above, as code; a pure function of the rows."""
    found = gains(rows).values()
    if not all(mean > 0 for mean, _ in found):
        return "does not hold"
    return "holds" if all(mean > 2 * error for mean, error in found) else "partly"


def figure(report: Report) -> Figure:
    """Left and middle: accuracy and error of each way. Right: the gains of the rule."""
    out = Figure(figsize=(15, 5.2), layout="constrained")
    left, middle, right = out.subplots(1, 3, width_ratios=(1, 1, 0.9))
    for panel, metric in ((left, accuracy_at), (middle, error_at)):
        _arms(panel, report, metric)
    whole = report.row(WHOLE, accuracy_at(BITS[0])).mean
    left.axvline(whole, color="#333", linewidth=0.8, linestyle="--")
    left.text(whole, -0.9, "not compressed ", ha="right", va="bottom", fontsize="small")
    left.set(xlabel="test accuracy (%)", title="Accuracy")
    middle.set(xlabel="squared error of the logits / their variance", xscale="log", title="Error")
    middle.set_yticklabels([])
    left.legend(loc="lower left", fontsize="small")
    found = gains(report.rows)
    names = list(found)[::-1]
    bars = [2 * found[n][1] if math.isfinite(found[n][1]) else 0 for n in names]
    right.errorbar([found[n][0] for n in names], range(len(names)), xerr=bars, fmt="o", color=OURS, capsize=3)
    right.axvline(0, color="#333", linewidth=0.8)
    right.set_yticks(range(len(names)), [n.replace(" over ", "\nover ") for n in names])
    right.set(xlabel="fall of log error, ± 2 standard errors", title="Gains of the rule", ylim=(-0.5, 2.5))
    out.suptitle(f"{report.slug}: {report.verdict}", fontsize="medium")
    return out


def _arms(panel: Axes, report: Report, metric: Any) -> None:
    for bits, marker, shift in ((2, "o", -0.12), (3, "D", 0.12)):
        rows = [report.row(name, metric(bits)) for name in reversed(ARMS)]
        for height, row in enumerate(rows):
            colour = BASELINE if row.baseline else OURS
            spread = row.spread or 0.0
            panel.errorbar(
                row.mean, height + shift, xerr=spread, fmt=marker, color=colour, capsize=2, markersize=5,
                markerfacecolor=colour if bits == 2 else "white",
            )  # fmt: skip
        panel.plot(
            [], [], marker, color=OURS, markerfacecolor=OURS if bits == 2 else "white", label=f"{bits} bits a weight"
        )
    panel.set_yticks(range(len(ARMS)), list(reversed(ARMS)))
    panel.set_ylim(-1, len(ARMS) - 0.5)
    panel.grid(axis="x", alpha=0.3)


run = runner(__name__)
