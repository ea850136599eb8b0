"""A survey of quantization methods (Gholami et al. 2021, arXiv:2103.13630): its advice, item by item.

A small convolutional network with batch norms learns Fashion-MNIST and is quantized by each class of method. Ten
statements that follow from the survey are checked as paired differences of test accuracy. SmolLM2's weights are
rounded to three and two bits beside.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from neuropil import data
from neuropil.compress.quantize import (
    LSQ,
    Quantizer,
    absorb_bias,
    bake,
    bit_allocation,
    calibrate,
    convert_integer,
    correct_bias_from,
    curvature,
    distil_data,
    distillation,
    equalise,
    fold,
    layers,
    learn_rounding,
    qat_prepare,
    quantize_model,
    recipe,
    round_inputs,
    sensitivity,
    size_costs,
)
from neuropil.compress.quantize.graph import inputs, outputs, pairs, scale_inputs, scale_outputs
from neuropil.evaluate import accuracy, perplexity, windows
from neuropil.packed import nbytes
from neuropil.report import Measurement, Report, Row, Scale, find, paired
from neuropil.reproduce.harness import Meter, runner
from neuropil.training import fit, supervised

CLAIM = (
    "Weights and activations in four bits or fewer can shrink footprint and latency up to sixteen times, and four to "
    "eight times is often realised; what is lost depends on granularity, clipping and training."
)
RULE = (
    "Ten statements about test accuracy of one network, differences paired over seeds: (a) 8 bits lose at most half a "
    "point: weights by tensor, by channel, with activations, and in the integer-only network; (b) at 4 bits groups of "
    "16 weights are better than channels, channels than tensors; (c) at 4 bits activations clipped by squared error or "
    "at the 99.9th percentile are better than at their extremes; (d) so are asymmetric than symmetric ones; (e) at 3 "
    "and at 2 bits quantization-aware training beats AdaRound, AdaRound the nearest; (f) with channels made uneven by "
    "10^U(-1,1), equalisation and bias correction help at 8 bits by tensor; (g) calibration of 4-bit activations on "
    "data made from batch norms ends within one point of that on real data; (h) HAWQ-V2 with an integer program beats "
    "3 bits for all layers at equal size; (i) distillation adds at 2 bits; (j) ternary weights beat binary ones. A "
    "statement is confirmed if the mean of each of its differences is above zero (for a and g: within the margin). "
    "Holds if all ten are confirmed, does not hold if fewer than six are, partly otherwise."
)
PAPER_SAYS = (
    "four bits or less: footprint and latency up to 16 times smaller; 4 to 8 times is often realised",
    "finer granularity, clipping, retraining and mixed precision each win back accuracy (cited results, no new ones)",
)
DEVIATIONS = (
    "the survey reports others' results on ImageNet; here a convolutional network of 98,000 weights learns "
    "Fashion-MNIST, and AdaRound takes 400 steps a layer at a learning rate of 0.03 instead of 10,000 at 0.001",
    "latency is not judged: it depends on kernels; sizes are counted from the packed bytes",
    "all layers are rounded, the first and the last too",
)
NOTES = (
    "Chosen on training images 50,000 to 55,000 with seed 100: learning rates 0.0003, 0.001 or 0.003 of each training "
    "with rounding, 0.01 or 0.03 of AdaRound; the range of weights rounded to the nearest (least squared error at 3 "
    "bits, the extremes at 2) and by AdaRound (least squared error).",
    "(b) Rounding to 4 bits costs this network half a point at most, and seeds differ by as much. Likely besides: the "
    "symmetric grid clips the largest positive weight of each tile to 14/15 of itself, which shrinks groups of 16 more "
    "than whole channels (Gaussian weights by 0.3 against 0.03 %); an affine grid does not.",
    "(i) The teacher is no better than 88.7 %, and training with labels alone comes within half a point of it at 2 "
    "bits: little is left for it to teach.",
    "At 3 bits least squared error was the better range for weights with seed 100, the extremes are with seeds 0 and 1;"
    " AdaRound, training and HAWQ-V2 are on average better than either.",
    "SmolLM2's packaged weights had been rounded to 4 bits in groups of 32 before: only 3 and 2 bits say something. "
    "Its rows are outside the rule.",
)
SEEDS: dict[Scale, tuple[int, ...]] = {"smoke": (0,), "default": (0, 1, 2), "paper": (0, 1, 2, 3, 4)}
SETTINGS: dict[Scale, dict[str, Any]] = {
    "smoke": {"data": "digits", "images": 1280, "test": 360, "epochs": 4, "more": 1, "steps": 20, "windows": 0},
    "default": {
        **{"data": "fashion-mnist", "images": 12_800, "test": 5000, "epochs": 4, "more": 2, "steps": 400},
        "windows": 2,
    },
    "paper": {
        **{"data": "fashion-mnist", "images": 60_000, "test": 10_000, "epochs": 20, "more": 5, "steps": 10_000},
        "windows": 20,
    },
}
BATCH = 64
RATE, TUNE_RATE, BINARY_RATE, ROUND_RATE = 3e-3, 1e-3, 3e-3, 3e-2
ACCURACY, SIZE, SECONDS, PERPLEXITY = "test accuracy", "size of weights", "time to quantize", "SmolLM2 perplexity"
FLOAT = "float"

# Each statement: pairs (better, worse) of variants; with a margin: "worse" may be that much better.
STATEMENTS: dict[str, tuple[tuple[tuple[str, str], ...], float | None]] = {
    "a: 8 bits are lossless": (
        tuple((n, FLOAT) for n in ("8 bits, tensor", "8 bits, channel", "8 bits, activations too", "integer only")),
        0.5,
    ),
    "b: finer granularity": (
        (("4 bits, group of 16", "4 bits, channel"), ("4 bits, channel", "4 bits, tensor")),
        None,
    ),
    "c: clipping": (
        (("activations 4 bits, mse", "activations 4 bits"), ("activations 4 bits, 99.9 %", "activations 4 bits")),
        None,
    ),
    "d: asymmetric activations": ((("activations 4 bits", "activations 4 bits, symmetric"),), None),
    "e: training > AdaRound > nearest": (
        (
            *(("3 bits, trained", "3 bits, AdaRound"), ("3 bits, AdaRound", "3 bits, nearest")),
            *(("2 bits, trained", "2 bits, AdaRound"), ("2 bits, AdaRound", "2 bits, nearest")),
        ),
        None,
    ),
    "f: equalisation, correction": ((("uneven, 8 bits, equalised", "uneven, 8 bits"),), None),
    "g: made-up data calibrate": ((("calibrated on made-up data", "calibrated on real data"),), 1.0),
    "h: HAWQ-V2 > equal bits": ((("HAWQ-V2 at the size of 3 bits", "3 bits, nearest"),), None),
    "i: distillation": ((("2 bits, distilled", "2 bits, trained"),), None),
    "j: ternary > binary": ((("ternary, trained", "binary, trained"),), None),
}

Split = tuple[Tensor, Tensor]


def network(side: int = 28) -> nn.Sequential:
    """Three convolutions with batch norms and two linear layers."""
    last = side // 8
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * last * last, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def splits(settings: dict[str, Any]) -> tuple[Split, Split]:
    images = data.image_set(settings["data"])
    count, tests = settings["images"], settings["test"]
    return (images.train_x[:count], images.train_y[:count]), (images.test_x[:tests], images.test_y[:tests])


def train(model: nn.Module, data: Split, epochs: int, rate: float, seed: int, loss: Any = None) -> nn.Module:
    """Adam with a rate that falls to zero along a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    steps = epochs * math.ceil(len(data[0]) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = loss or supervised(cross_entropy)
    settings: dict[str, Any] = {"epochs": epochs, "batch_size": BATCH, "seed": seed, "progress": False}
    fit(model.train(), data, loss, optimizer, scheduler=schedule, **settings)
    return model.eval()


def weights_only(model: nn.Module) -> int:
    """Bytes of the weights of layers, packed or not; biases are not counted."""
    total = 0
    for module in model.modules():
        packing = getattr(module, "packing", None)
        if packing is not None:
            total += nbytes(packing)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            total += module.weight.nbytes
    return total


class Bench:
    """One trained network, and what each method makes of it."""

    def __init__(self, settings: dict[str, Any], seed: int, progress: Meter) -> None:
        self.settings, self.seed, self.progress = settings, seed, progress
        self.train, self.test = splits(settings)
        torch.manual_seed(seed)
        side = self.train[0].shape[-1]
        self.raw = train(network(side), self.train, settings["epochs"], RATE, seed)
        changes, self.statistics = fold(self.raw)
        self.plain = changes.model
        self.calibration = list(self.train[0][:512].split(128))
        self.rows: list[Measurement] = []
        self._keep(FLOAT, self.plain, 0.0)

    def add(self, name: str, make: Callable[[], nn.Module]) -> None:
        """Make a variant and measure it."""
        self.progress(0.3 + 0.6 * len(self.rows) / 100, name)
        start = time.perf_counter()
        model = make()
        self._keep(name, model, time.perf_counter() - start)

    def _keep(self, name: str, model: nn.Module, seconds: float) -> None:
        baseline = name == FLOAT or name in {worse for found, _ in STATEMENTS.values() for _, worse in found}
        value = 100 * accuracy(model, *self.test)
        self.rows.append(Measurement(name, ACCURACY, value, "%", True, baseline))
        if not name.startswith(("activations", "calibrated", "integer", "8 bits, act")):
            self.rows.append(Measurement(name, SIZE, weights_only(model) / 1024, "KiB", False, baseline))
        if name != FLOAT:
            self.rows.append(Measurement(name, SECONDS, seconds, "s", False, baseline))

    # --- after training ------------------------------------------------------------------------

    def weights(self, *args: Any, **settings: Any) -> nn.Module:
        return quantize_model(self.plain, Quantizer(*args, **settings)).model

    def packed(self, model: nn.Module, how: Any) -> nn.Module:
        return quantize_model(model, how).model

    def learned(self, how: dict[str, Any]) -> nn.Module:
        steps = self.settings["steps"]
        return learn_rounding(self.plain, how, self.calibration, steps=steps, lr=ROUND_RATE).model

    def activations(self, settings: dict[str, Any], data: Sequence[Tensor] | None = None) -> nn.Module:
        """The float network with what its layers read rounded."""
        model = copy.deepcopy(self.plain)
        round_inputs(model, settings, layers(model)[0])
        calibrate(model, self.calibration if data is None else data)
        return model

    def rounded(self) -> None:
        both: dict[str, Any] = {"activations": {"bits": 8, "scheme": "affine"}, "calibration": self.calibration}
        self.add("8 bits, tensor", partial(self.weights, 8))
        self.add("8 bits, channel", partial(self.weights, 8, granularity="channel"))
        self.add("8 bits, activations too", lambda: quantize_model(self.plain, "int8", **both).model)
        self.add("integer only", lambda: convert_integer(self.plain, self.calibration).model)
        for bits in (4, 3, 2):
            self.add(f"{bits} bits, tensor", partial(self.weights, bits))
            self.add(f"{bits} bits, channel", partial(self.weights, bits, granularity="channel"))
            group = {"bits": bits, "granularity": ("group", 16)}
            # the first layer has 9 weights a channel: one group
            grouped: dict[str, Any] = {"0": {"bits": bits, "granularity": "channel"}, "*": group}
            self.add(f"{bits} bits, group of 16", partial(self.packed, self.plain, grouped))

    def clipped(self) -> None:
        four: dict[str, Any] = {"bits": 4, "scheme": "affine"}
        kinds: dict[str, dict[str, Any]] = {
            "activations 4 bits": {},
            "activations 4 bits, symmetric": {"scheme": "symmetric"},
            "activations 4 bits, mse": {"observer": "mse"},
            "activations 4 bits, 99.9 %": {"observer": "percentile", "percentile": 99.9},
            "activations 4 bits, ACIQ": {"observer": "aciq"},
        }
        for name, more in kinds.items():
            self.add(name, partial(self.activations, {**four, **more}))

    def made_up(self) -> None:
        shape = self.train[0].shape[1:]
        like = (float(self.train[0].mean()), float(self.train[0].std()))
        steps = min(500, 5 * self.settings["steps"])
        made = distil_data(self.raw, shape, 128, steps=steps, input_statistics=like, limits=(0.0, 1.0), seed=self.seed)
        noise = torch.rand(made.shape, generator=torch.Generator().manual_seed(self.seed))
        four: dict[str, Any] = {"bits": 4, "scheme": "affine", "observer": "mse"}
        for name, batch in {"real data": self.calibration[0], "made-up data": made, "noise": noise}.items():
            self.add(f"calibrated on {name}", partial(self.activations, four, [batch]))

    def uneven(self) -> None:
        """Channels scaled so that the function stays the same and the ranges become uneven."""
        model, known = copy.deepcopy(self.plain), dict(self.statistics)
        generator = torch.Generator().manual_seed(self.seed)
        for pair in pairs(model):
            first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
            factor = 10 ** (2 * torch.rand(outputs(first), generator=generator) - 1)
            scale_outputs(first, factor)
            scale_inputs(second, (1 / factor).repeat_interleave(inputs(second) // outputs(first)))
            if pair.first in known:
                known[pair.first] = known[pair.first][0] * factor, known[pair.first][1] * factor

        def mended() -> nn.Module:
            even = equalise(model, statistics=known).model
            even = absorb_bias(even, known).model
            return correct_bias_from(quantize_model(even, Quantizer(8)).model, even, known).model

        self.add("uneven, 8 bits", lambda: quantize_model(model, Quantizer(8)).model)
        self.add("uneven, 8 bits, equalised", mended)

    def few_bits(self) -> None:
        for bits in (3, 2):
            how: dict[str, Any] = {"bits": bits, "granularity": "channel", "observer": "mse"}
            plain = {**how, "observer": "mse" if bits == 3 else "minmax"}
            self.add(f"{bits} bits, nearest", partial(self.packed, self.plain, plain))
            self.add(f"{bits} bits, AdaRound", partial(self.learned, how))
            self.add(f"{bits} bits, trained", partial(self.trained, LSQ(bits, granularity="channel")))

    def mixed(self) -> None:
        def chosen() -> nn.Module:
            batches = [(x, self.train[1][128 * k : 128 * (k + 1)]) for k, x in enumerate(self.calibration)]
            traces = curvature(self.plain, supervised(cross_entropy), batches, probes=10)
            costs = size_costs(self.plain)
            budget = sum(row[3] for row in costs.values())
            bits = bit_allocation(sensitivity(self.plain, curvature=traces), costs, budget)
            return quantize_model(self.plain, recipe(bits)).model

        self.add("HAWQ-V2 at the size of 3 bits", chosen)

    # --- with training -------------------------------------------------------------------------

    def trained(self, quantizer: Any, loss: Any = None, rate: float = TUNE_RATE) -> nn.Module:
        model = qat_prepare(self.plain, quantizer).model
        return bake(train(model, self.train, self.settings["more"], rate, self.seed, loss)).model

    def retrained(self) -> None:
        taught = distillation(self.plain, weight=0.5, temperature=4.0)
        self.add("2 bits, distilled", partial(self.trained, LSQ(2, granularity="channel"), taught))
        self.add("ternary, trained", partial(self.trained, Quantizer(2, "ternary", "channel", dynamic=True)))
        self.add(
            "binary, trained", partial(self.trained, Quantizer(1, "binary", "channel", dynamic=True), rate=BINARY_RATE)
        )


def measure(scale: Scale, seed: int, progress: Meter) -> list[Measurement]:
    settings = SETTINGS[scale]
    progress(0.0, "training")
    bench = Bench(settings, seed, progress)
    for part in (
        bench.rounded,
        bench.clipped,
        bench.made_up,
        bench.uneven,
        bench.few_bits,
        bench.mixed,
        bench.retrained,
    ):
        part()
    return bench.rows + (language(settings["windows"], seed, progress) if settings["windows"] else [])


@torch.no_grad()
def language(count: int, seed: int, progress: Meter) -> list[Measurement]:
    """SmolLM2 with the weights of its blocks rounded, on windows of Brown text that the seed draws."""
    from neuropil.models import load

    loaded = load("smollm2")
    model = loaded.module()
    documents = data.text("brown").test
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))[:count]
    tests = [windows([documents[int(k)]], loaded.tokenizer, 256, 1)[0] for k in order]
    rows = [Measurement("as packaged", PERPLEXITY, perplexity(model, tests).value, "", False, True)]
    for bits in (3, 2):
        for name, granularity in (("channel", "channel"), ("group of 32", ("group", 32))):
            progress(0.95, f"SmolLM2, {bits} bits, {name}")
            how: dict[str, Any] = {"bits": bits, "scheme": "affine", "granularity": granularity}
            small = quantize_model(model, how, skip=["lm_head", "model.embed_tokens"]).model
            value = perplexity(small, tests).value
            rows.append(Measurement(f"{bits} bits, {name}", PERPLEXITY, value, "", False, name == "channel"))
    return rows


# --- verdict and figure --------------------------------------------------------------------------


def difference(rows: Sequence[Row], better: str, worse: str) -> tuple[float, float]:
    """Mean of the paired differences of accuracy, and its standard error (infinite for one seed; NaN: a run failed)."""
    return paired(find(rows, better, ACCURACY).values, find(rows, worse, ACCURACY).values)


def confirmed(rows: Sequence[Row]) -> dict[str, bool]:
    """Each statement: whether all its differences are as it says."""
    out = {}
    for statement, (compared, margin) in STATEMENTS.items():
        found = [difference(rows, better, worse)[0] for better, worse in compared]
        out[statement] = all(d > 0 if margin is None else d >= -margin for d in found)
    return out


def verdict(rows: Sequence[Row]) -> str:
    """The rule above, as code."""
    count = sum(confirmed(rows).values())
    return "holds" if count == len(STATEMENTS) else "does not hold" if count < 6 else "partly"


def figure(report: Report) -> Figure:
    """Left: the differences of each statement. Right: accuracy against the size of the weights."""
    ours, grey, red = "#0b6e99", "#8a8f98", "#b8442e"
    out = Figure(figsize=(13, 7), layout="constrained")
    left, right = out.subplots(1, 2, width_ratios=(1.25, 1))
    right_ = confirmed(report.rows)
    lines = [(s, b, w, m) for s, (found, m) in STATEMENTS.items() for b, w in found][::-1]
    for height, (_, better, worse, margin) in enumerate(lines):
        mean, error = difference(report.rows, better, worse)
        colour = ours if (mean > 0 if margin is None else mean >= -margin) else red
        bar = 2 * error if math.isfinite(error) else 0
        left.errorbar(mean, height, xerr=bar, fmt="o", color=colour, capsize=3)
        if margin is not None:
            left.plot([-margin], [height], "|", color="#333", markersize=12)
    left.set_yticks(range(len(lines)), [f"{s[0]}: {b} − {w}" for s, b, w, _ in lines], fontsize="small")
    left.axvline(0, color="#333", linewidth=0.8)
    left.set_xscale("symlog", linthresh=1.0)
    left.set_xticks([-1, -0.5, 0, 0.5, 1, 3, 10, 30], ["-1", "-0.5", "0", "0.5", "1", "3", "10", "30"])
    left.minorticks_off()
    left.set(
        xlabel="points of accuracy (± 2 standard errors; linear within ±1, logarithmic beyond; | is the margin)",
        title=f"{sum(right_.values())} of {len(right_)} statements confirmed",
    )
    groups = {
        "tensor": (grey, "s", [f"{b} bits, tensor" for b in (8, 4, 3, 2)]),
        "channel": (grey, "o", [f"{b} bits, channel" for b in (8, 4, 3, 2)]),
        "group of 16": (grey, "^", [f"{b} bits, group of 16" for b in (4, 3, 2)]),
        "channel, least squared error": ("#c9a6d6", "o", ["3 bits, nearest"]),
        "AdaRound": ("#d08c2f", "D", ["3 bits, AdaRound", "2 bits, AdaRound"]),
        "trained (LSQ)": (ours, "o", ["3 bits, trained", "2 bits, trained"]),
        "trained, ternary and binary": ("#57a773", "v", ["ternary, trained", "binary, trained"]),
        "HAWQ-V2": (red, "*", ["HAWQ-V2 at the size of 3 bits"]),
    }
    for label, (colour, marker, names) in groups.items():
        sizes = [report.row(n, SIZE).mean for n in names]
        values = [report.row(n, ACCURACY) for n in names]
        right.errorbar(
            sizes,
            [v.mean for v in values],
            yerr=[v.spread or 0 for v in values],
            marker=marker,
            color=colour,
            label=label,
        )
    plain = report.row(FLOAT, ACCURACY).mean
    right.axhline(plain, color="#333", linewidth=0.8, linestyle=":")
    right.annotate(
        f"float, {report.row(FLOAT, SIZE).mean:.0f} KiB",
        (1, plain),
        xycoords=("axes fraction", "data"),
        va="bottom",
        ha="right",
    )
    lowest = report.row("2 bits, tensor", ACCURACY)
    if lowest.mean < 60:
        right.set_ylim(bottom=60)
        where = (report.row("2 bits, tensor", SIZE).mean, 61)
        right.annotate(f"2 bits, tensor: {lowest.mean:.0f} %", where, color=grey, fontsize="small", rotation=90)
    right.set_xscale("log", base=2)
    right.set_xticks([16, 32, 64])
    right.xaxis.set_major_formatter("{x:g}")
    right.set(xlabel="size of the packed weights (KiB)", ylabel="test accuracy (%)", title="What the bytes buy")
    right.legend(frameon=False, fontsize="small")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    out.suptitle(f"quantization survey on {report.settings['data']}: {report.verdict}", fontsize="medium")
    return out


run = runner(__name__)
