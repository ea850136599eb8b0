"""Data-independent module-aware pruning for hierarchical vision transformers (He and Zhou 2024, arXiv:2404.13648).

A small Swin transformer learns Fashion-MNIST. It is pruned in one shot to several sparsities by DIMAP, by magnitude
(globally and in each layer), by LAMP and at random, and tested as it is; at the lowest and the highest sparsity it is
also trained on with its masks kept.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad

from neuropil import data
from neuropil.compress.dimap import dimap_masks
from neuropil.compress.masks import hold_masks
from neuropil.compress.operations import count_operations
from neuropil.report import Measurement, Report, Row, Scale, find, paired
from neuropil.reproduce.harness import Meter, runner

CLAIM = (
    "Ranking each weight by its share of the energy within its functional module, from weights alone, halves a Swin "
    "transformer's weights and operations at almost no loss, and better than magnitude does."
)
RULE = (
    "Two parts, means over seeds. (1) With half of the weights pruned and after training on, DIMAP's accuracy lies at "
    "most 0.5 points (top-1) and 0.2 points (top-5) below that of the dense network trained on as long. (2) Without "
    "training on, accuracy averaged over the sparsities from 70 % up: DIMAP less the best of global magnitude, uniform "
    "magnitude and LAMP, paired over seeds, exceeds twice its standard error. Holds if both do. Does not hold if (1) "
    "fails, or if DIMAP is below both LAMP and global magnitude at two or more sparsities without training on. Partly "
    "otherwise."
)
PAPER_SAYS = (
    "ImageNet, Swin-B: 52.5 % of FLOPs and 52.7 % of parameters less, top-5 accuracy 0.07 % lower",
    "ImageNet, Swin-S: 33.2 % of both less, top-5 accuracy 0.8 % higher (relative) than that of the dense model",
)
DEVIATIONS = (
    "a Swin of 0.57 million weights in three stages (widths 32, 64, 128; patches of 4, windows of 2) on Fashion-MNIST "
    "padded to 32 x 32, instead of Swin-T, -S and -B on ImageNet",
    "trained on for one epoch instead of the paper's full schedule; top-5 accuracy is of ten classes",
    "the rule uses modules pooled over the whole network; the paper leaves open whether they are pooled so, by stage "
    "or by block, and those are shown beside",
)
SEEDS: dict[Scale, tuple[int, ...]] = {"smoke": (0,), "default": (0, 1, 2), "paper": (0, 1, 2, 3, 4)}
SETTINGS: dict[Scale, dict[str, Any]] = {
    "smoke": {"data": "digits", "images": 1408, "tested": 360, "epochs": 6, "width": 16, "depths": [1, 1, 1]},
    "default": {
        "data": "fashion-mnist",
        "images": 8000,
        "tested": 4000,
        "epochs": 6,
        "width": 32,
        "depths": [2, 2, 2],
    },
    "paper": {
        "data": "fashion-mnist",
        "images": 60_000,
        "tested": 10_000,
        "epochs": 60,
        "width": 32,
        "depths": [2, 2, 6],
    },
}
BATCH, RATE, MORE_RATE = 128, 1e-3, 1e-3
SPARSITIES = (50, 70, 85, 90)
RANDOM, UNIFORM, GLOBAL, LAMP = "random", "uniform magnitude", "global magnitude", "LAMP"
OURS, BY_STAGE, BY_BLOCK = "DIMAP", "DIMAP by stage", "DIMAP by block"
METHODS = (RANDOM, UNIFORM, GLOBAL, LAMP, BY_BLOCK, BY_STAGE, OURS)
TRAINED = {50: (GLOBAL, LAMP, OURS), 90: (UNIFORM, GLOBAL, LAMP, OURS)}
DENSE = "dense"
NOTES = (
    "Learning rates from a grid (1, 2 and 4 thousandths for training, 0.3, 1 and 2 for training on), by what is best "
    "for the dense network on training images 50,000 to 52,000; the same for all methods.",
    "All methods prune the same layers. LAMP is DIMAP's score with each layer as a module, global magnitude the score "
    "with the whole network as one.",
    "Where DIMAP stays below LAMP the likely reason is that the rule compares at equal weights. Modules within a "
    "layer, block or stage keep a larger share of the early stages, whose weights are few but applied at many "
    "positions: they save fewer operations (see the rows of multiply-adds). DIMAP over the whole network saves as "
    "large a share of operations as of weights, which is also what the paper reports.",
)

Split = tuple[Tensor, Tensor]


def shot(sparsity: int) -> str:
    """The metric of a network pruned and not trained on."""
    return f"top-1, {sparsity} % pruned"


def after(sparsity: int, top: int = 1) -> str:
    """The metric of a network pruned and trained on."""
    return f"top-{top}, {sparsity} % pruned and trained on"


def measure(scale: Scale, seed: int, progress: Meter) -> list[Measurement]:
    settings = SETTINGS[scale]
    train, test = splits(settings)
    progress(0.0, "training")
    torch.manual_seed(seed)
    dense = swin(settings)
    fit(dense, train, settings["epochs"], RATE, seed)
    masks = {(name, s): made_masks(name, dense, s / 100, seed) for s in SPARSITIES for name in METHODS}
    rows = []
    for (name, s), found in progress.track(list(masks.items()), "pruning", 0.4, 0.6):
        rows.append(_row(name, shot(s), tops(pruned(dense, found), test)[0]))
    jobs = [(name, s) for s, names in TRAINED.items() for name in names]
    for name, s in progress.track([(DENSE, 50), *jobs], "training on", 0.6, 1.0):
        model = copy.deepcopy(dense) if name == DENSE else pruned(dense, masks[name, s])
        fit(model, train, 1, MORE_RATE, seed + 1000)
        first, fifth = tops(model, test)
        rows += [_row(name, after(s), first), _row(name, after(s, 5), fifth)]
    rows += [Measurement(DENSE, "top-1, as trained", tops(dense, test)[0], "%", True, True)]
    for name in (UNIFORM, GLOBAL, LAMP, BY_BLOCK, BY_STAGE, OURS):
        rows += _kept(name, masks[name, 90])
        saved = count_operations(pruned(dense, masks[name, 50]), test[0][:1]).saved
        rows.append(_row(name, "multiply-adds saved, 50 % pruned", 100 * saved))
    return rows


def _row(name: str, metric: str, value: float) -> Measurement:
    return Measurement(name, metric, value, "%", True, name not in (OURS, BY_STAGE, BY_BLOCK))


def _kept(name: str, masks: dict[str, Tensor]) -> list[Measurement]:
    """The share of each stage's weights that is left."""
    baseline = name not in (OURS, BY_STAGE, BY_BLOCK)
    rows = []
    for stage in range(3):
        parts = [mask.flatten() for full, mask in masks.items() if f".layers.{stage}.blocks." in full]
        share = 100 * float(torch.cat(parts).float().mean())
        rows.append(Measurement(name, f"kept in stage {stage + 1}, 90 % pruned", share, "%", None, baseline))
    return rows


def splits(settings: dict[str, Any]) -> tuple[Split, Split]:
    """The first so many training and test images, 32 x 32, of mean 0 and deviation 1."""
    images = data.image_set(settings["data"])
    count, tested = settings["images"], settings["tested"]

    def shaped(x: Tensor) -> Tensor:
        grown = interpolate(x, size=32) if x.shape[-1] == 8 else pad(x, (2, 2, 2, 2))
        return (grown - images.train_x.mean()) / images.train_x.std()

    return (shaped(images.train_x[:count]), images.train_y[:count]), (
        shaped(images.test_x[:tested]),
        images.test_y[:tested],
    )


class Logits(nn.Module):
    """A classifier of transformers that answers with its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def swin(settings: dict[str, Any]) -> nn.Module:
    """A Swin of three stages with new weights."""
    from transformers import SwinConfig, SwinForImageClassification

    size: dict[str, Any] = {"image_size": 32, "patch_size": 4, "num_channels": 1, "window_size": 2, "num_labels": 10}
    size |= {"embed_dim": settings["width"], "depths": settings["depths"], "num_heads": [2, 4, 8]}
    config = SwinConfig(**size)
    return Logits(SwinForImageClassification(config))


def fit(model: nn.Module, data: Split, epochs: int, rate: float, seed: int) -> None:
    """AdamW, the learning rate up over a twentieth of the steps and down along a cosine; ends in eval mode."""
    steps = epochs * (len(data[0]) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of stochastic depth
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data[0]), generator=generator)
        for batch in order.split(BATCH)[: len(order) // BATCH]:
            optimizer.zero_grad()
            cross_entropy(model(data[0][batch]), data[1][batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def tops(model: nn.Module, data: Split) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent."""
    logits = torch.cat([model(x) for x in data[0].split(500)])
    right = logits.topk(5, dim=1).indices == data[1][:, None]
    return 100 * float(right[:, 0].float().mean()), 100 * float(right.any(1).float().mean())


def made_masks(name: str, model: nn.Module, ratio: float, seed: int) -> dict[str, Tensor]:
    """The masks of a method; all of them prune the same layers."""
    if name in (LAMP, BY_BLOCK, BY_STAGE, OURS):
        granularity = {LAMP: "layer", BY_BLOCK: "block", BY_STAGE: "stage", OURS: "kind"}[name]
        return dimap_masks(model, ratio, granularity=granularity)
    weights = {full: model.get_parameter(full).detach() for full in dimap_masks(model, 0.0, granularity="layer")}
    if name == GLOBAL:
        return dimap_masks(model, ratio, modules={".*": "all"})
    generator = torch.Generator().manual_seed(seed)
    scores = {n: w.abs() if name == UNIFORM else torch.rand(w.shape, generator=generator) for n, w in weights.items()}
    return {n: _highest(score, ratio) for n, score in scores.items()}


def _highest(score: Tensor, ratio: float) -> Tensor:
    """The mask of one layer without this share of its lowest scores."""
    mask = torch.ones(score.numel(), dtype=torch.bool)
    mask[score.flatten().argsort()[: math.floor(ratio * score.numel() + 1e-6)]] = False
    return mask.reshape(score.shape)


def pruned(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    made = copy.deepcopy(model)
    hold_masks(made, masks)
    return made


# --- verdict and figure --------------------------------------------------------------------------


def averaged(rows: Sequence[Row], name: str) -> list[float]:
    """Accuracy without training on, of each seed: mean over the sparsities from 70 % up."""
    values = [find(rows, name, shot(s)).values for s in SPARSITIES if s >= 70]
    return [statistics.fmean(seed) for seed in zip(*values, strict=True)]


def advantage(rows: Sequence[Row]) -> tuple[str, float, float]:
    """The best baseline, by how much DIMAP exceeds it, the standard error: infinite for one seed, NaN if one failed."""
    best = max((UNIFORM, GLOBAL, LAMP), key=lambda name: statistics.fmean(averaged(rows, name)))
    return best, *paired(averaged(rows, OURS), averaged(rows, best))


def lost(rows: Sequence[Row], top: int) -> float:
    """Points that DIMAP loses to the dense network at 50 %, both trained on."""
    return find(rows, DENSE, after(50, top)).mean - find(rows, OURS, after(50, top)).mean


def verdict(rows: Sequence[Row]) -> str:
    """The rule above, as code; a pure function of the rows."""
    kept = lost(rows, 1) <= 0.5 and lost(rows, 5) <= 0.2
    below = sum(
        all(find(rows, OURS, shot(s)).mean < find(rows, other, shot(s)).mean for other in (LAMP, GLOBAL))
        for s in SPARSITIES
    )
    if not kept or below >= 2:
        return "does not hold"
    _, mean, error = advantage(rows)
    return "holds" if mean > 2 * error else "partly"


def figure(report: Report) -> Figure:
    """Accuracy against sparsity without training on; accuracy after training on; what is left in each stage."""
    colours = {OURS: "#0b6e99", BY_STAGE: "#5fa8c4", BY_BLOCK: "#a5cfdf", LAMP: "#d08c2f", GLOBAL: "#333333"}
    colours |= {UNIFORM: "#8a8f98", RANDOM: "#c9ccd1", DENSE: "#000000"}
    out = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = out.subplots(1, 3, width_ratios=(1.2, 1, 1))
    dense = report.row(DENSE, "top-1, as trained").mean
    left.axhline(dense, color="#000", linewidth=0.8, linestyle=":", label=DENSE)
    for number, name in enumerate(METHODS[::-1]):
        rows = [report.row(name, shot(s)) for s in SPARSITIES]
        spread = [row.spread or 0 for row in rows]
        places = [s + 0.3 * (number - 3) for s in SPARSITIES]  # so that the spreads do not hide one another
        left.errorbar(places, [r.mean for r in rows], yerr=spread, fmt="o-", color=colours[name], label=name)
    left.set(xlabel="weights pruned (%)", ylabel="top-1 accuracy (%)", title="One shot, not trained on")
    left.set_xticks(SPARSITIES)
    out.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False, fontsize="small")
    shown = [(DENSE, 50), *((n, 50) for n in TRAINED[50]), *((n, 90) for n in TRAINED[90])][::-1]
    for height, (name, s) in enumerate(shown):
        row = report.row(name, after(s))
        middle.errorbar(row.mean, height, xerr=row.spread or 0, fmt="o", color=colours[name], capsize=3)
    labels = [f"{name}" if name == DENSE else f"{name}, {s} %" for name, s in shown]
    middle.set_yticks(range(len(shown)), labels)
    middle.set(xlabel="top-1 accuracy (%)", title="Pruned and trained on for an epoch")
    names = (UNIFORM, GLOBAL, LAMP, BY_BLOCK, BY_STAGE, OURS)
    for number, name in enumerate(names):
        rows = [report.row(name, f"kept in stage {stage}, 90 % pruned") for stage in (1, 2, 3)]
        places = [stage + 0.13 * (number - 2.5) for stage in (1, 2, 3)]
        right.bar(places, [r.mean for r in rows], 0.12, color=colours[name], label=name)
    right.set_xticks((1, 2, 3), ["stage 1", "stage 2", "stage 3"])
    right.set(ylabel="weights kept (%)", title="Where they stay when 90 % go")
    for panel in (left, middle, right):
        panel.spines[["top", "right"]].set_visible(False)
    out.suptitle(f"dimap on {report.settings['data']}: {report.verdict}", fontsize="medium")
    return out


run = runner(__name__)
