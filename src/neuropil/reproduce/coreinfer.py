"""CoreInfer: semantics-inspired adaptive sparse activation (Wang et al. 2024, arXiv:2410.18311).

SmolLM2 reads the beginning of a document with all its neurons and goes on with a few: those the beginning used most,
those of a document on another subject, those a corpus uses most, those of the most similar cluster, random ones, or, as
the bound, each token's own largest. The same with a small ReLU model, in which many neurons are truly silent.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from neuropil import models
from neuropil.compress._coreinfer_usage import Usage, jaccard, share_of
from neuropil.compress.core_clusters import CoreClusters
from neuropil.compress.coreinfer import CoreInfer, only
from neuropil.data import text
from neuropil.evaluate import surprise
from neuropil.neurons import Site, capture, find_sites
from neuropil.report import Measurement, Report, Row, Scale, find, paired
from neuropil.reproduce._coreinfer_texts import documents, drawn, letter_model, letters
from neuropil.reproduce.harness import Meter, runner

CLAIM = (
    "Keeping, for a whole answer, only the MLP neurons that the prompt used most speeds up decoding many times over "
    "with negligible loss and without any predictor network."
)
RULE = (
    "On SmolLM2 at 0.4 of the neurons, by the rise of the mean surprise over the dense model's: three differences, "
    "paired over seeds: the prompt's own core neurons less (1) random ones, (2) one static set for all texts, the "
    "most used over other documents, (3) the core neurons of a document on another subject. Holds if each is below "
    "zero by more than twice its standard error, the own set's rise is at most 0.1 nats, and decoding is at least 1.3 "
    "times as fast as dense (by the processor's time in one thread, which other work on the machine disturbs little). "
    "Does not hold if the mean of (1) or (2) is zero or more. Partly otherwise."
)
PAPER_SAYS = (
    "OPT-6.7B on a TITAN Xp (12 GB): decodes 10.33 times as fast as transformers, 2.72 times as fast as PowerInfer",
    "no or negligible loss at a kept share of about 0.4 on XSum, SQuAD, TruthfulQA, TriviaQA and WMT16, for OPT and "
    "Llama",
    "core neurons change less and less as a text grows, and are alike for texts of like meaning",
)
DEVIATIONS = (
    "SmolLM2-135M (SiLU, weights rounded to 4 bits in its package) on a CPU instead of OPT-6.7B to 30B and Llama on "
    "GPUs; layers 2 to 28 of 30 are sparse",
    "quality is the surprise of the document's own next 128 tokens, not the score of a task",
    "token-wise core neurons by absolute value; the authors' rule, by sign, is shown beside it, outside the rule",
    "the ReLU model is a small one of letters, trained here",
)
NOTES = (
    "The paper's speed comes for the larger part from a model that does not fit into the GPU's memory; here, with the "
    "weights in memory, the MLP weights that are not read bound the gain at about 1.5.",
    "The own set beats a static one, and another subject's far more: the sets do tell subjects apart, also by their "
    "overlap. But no fixed set comes near the per-token bound in this SiLU model, whose activations are small and "
    "many instead of few: which neurons matter changes from token to token.",
    "In the small ReLU model all fixed sets cost little, and the own one no less than random ones at 0.4: it is "
    "trained for minutes and leans little on its MLPs, and a prompt of 96 letters tells little. It shows that zeros "
    "cost nothing (the bound), not that prompts choose better.",
    "The per-token bound takes each token's largest activations, which no method knows without computing them.",
)
SEEDS: dict[Scale, tuple[int, ...]] = {"smoke": (0,), "default": (0, 1, 2), "paper": (0, 1, 2, 3, 4)}
SETTINGS: dict[Scale, dict[str, Any]] = {
    "smoke": {
        "model": "smollm2", "layers": (2, 29), "topics": ("python", "manual"), "each": 1, "others": 2, "prompt": 48,
        "rest": 16, "keep": (0.4,), "letters": "manual", "steps": 10, "tokens": 3,
    },
    "default": {
        "model": "smollm2", "layers": (2, 29), "each": 1, "others": 2, "prompt": 256, "rest": 128,
        "topics": ("python", "bible", "news", "government", "learned", "romance", "hobbies"),
        "keep": (0.4, 0.6, 0.8), "letters": "brown", "steps": 250, "tokens": 10,
    },
    "paper": {
        "model": "facebook/opt-6.7b", "layers": (6, 27), "each": 8, "others": 20, "prompt": 512, "rest": 256,
        "topics": ("python", "bible", "news", "government", "learned", "romance", "hobbies"),
        "keep": (0.2, 0.4, 0.6, 0.8), "letters": "brown", "steps": 20_000, "tokens": 64,
    },
}  # fmt: skip
OWN, SIGNED, OTHER = "own core", "own core by sign (authors' rule)", "core of another subject"
STATIC, SIMILAR, RANDOM, ORACLE = (
    "static, most used",
    "similar cluster's core",
    "random",
    "each token's largest (bound)",
)
ARMS = (OWN, SIGNED, SIMILAR, OTHER, STATIC, RANDOM, ORACLE)
OURS = (OWN, SIGNED, SIMILAR)
UNIT = "nats a token"
RATE = "decoding rate, times dense, keep {}"
OVERLAP = "overlap of core neurons (Jaccard), keep 0.4"
LENGTH = 192  # letters that the ReLU model sees

Sets = dict[str, Tensor]


def rise(keep: float, relu: bool = False) -> str:
    """The metric's name."""
    return f"rise of surprise{' in a ReLU model' if relu else ''}, keep {keep}"


def measure(scale: Scale, seed: int, progress: Meter) -> list[Measurement]:
    settings = SETTINGS[scale]
    loaded = models.load(settings["model"])
    net: Any = loaded.module()
    with torch.no_grad():
        rows = _language_model(net, loaded.tokenizer, settings, seed, progress)
        rows += _rates(net, loaded.tokenizer, settings)
    progress(0.7, "training a ReLU model of letters")
    return rows + _letter_model(settings, seed)


# --- the language model ----------------------------------------------------------------------------


def _language_model(
    net: Any, tokenizer: Any, settings: dict[str, Any], seed: int, progress: Meter
) -> list[Measurement]:
    generator = torch.Generator().manual_seed(seed)
    each, others, length = settings["each"], settings["others"], settings["prompt"] + settings["rest"]
    texts = {topic: drawn(topic, each + others, generator) for topic in settings["topics"]}

    def ids(source: str, length: int) -> Tensor:
        found: Tensor = tokenizer(source[: 12 * length], return_tensors="pt")["input_ids"][:, :length]
        return found

    judged = [(topic, ids(source, length)) for topic, found in texts.items() for source in found[:each]]
    seen = [(topic, ids(source, settings["prompt"])) for topic, found in texts.items() for source in found[each:]]
    chosen = slice(*settings["layers"])
    clusters = CoreClusters.fit(net, [x for _, x in seen], k=min(4, len(seen)), layers=chosen)
    sites = find_sites(net)[chosen]
    study = _Study(net, sites, settings["prompt"], generator)
    for topic, x in progress.track(seen, "reading other texts", 0.05, 0.2):
        study.learn(topic, x)
    study.clusters = clusters
    rows = study.compare(judged, settings["keep"], progress)
    return rows + study.overlaps(judged)


class _Study:
    """One model, the sets of neurons of each arm, and what each costs."""

    def __init__(self, net: Any, sites: Sequence[Site], prompt: int, generator: torch.Generator) -> None:
        self.net, self.sites, self.prompt, self.generator = net, sites, prompt, generator
        self.pooled = {site.name: Usage.none(site.width) for site in sites}
        self.by_topic: dict[str, dict[str, Usage]] = {}
        self.clusters: CoreClusters | None = None

    def used(self, x: Tensor, score: str = "abs") -> tuple[dict[str, Usage], Any, Tensor, dict[str, Tensor]]:
        """How a prompt uses the neurons; its cache, the logits after it, and the activations."""
        with capture(self.net, self.sites) as seen:
            out = self.net(x, use_cache=True)
        h = {name: value.reshape(-1, value.shape[-1]) for name, value in seen.items()}
        return _usage(h, score), out.past_key_values, out.logits[0, -1:], h

    def learn(self, topic: str, x: Tensor) -> None:
        """Add a document to the static sets."""
        usage = self.used(x)[0]
        self.by_topic.setdefault(topic, usage)
        for name, one in usage.items():
            self.pooled[name].counts += one.counts
            self.pooled[name].sizes += one.sizes

    def compare(
        self, judged: list[tuple[str, Tensor]], keeps: Sequence[float], progress: Meter, relu: bool = False
    ) -> list[Measurement]:
        """The rise of the mean surprise of what follows each text's prompt, for each arm and share."""
        read = [self.used(x[:, : self.prompt]) for _, x in judged]
        dense: list[float] = []
        costs: dict[tuple[str, float], list[float]] = {}
        for number, (_, x) in progress.track(list(enumerate(judged)), "going on with few neurons", 0.2, 0.6):
            usage, cache, last, h = read[number]
            away = read[(number + len(judged) // 2) % len(judged)][0]
            base = self.surprise(x, cache, last)
            dense.append(base)
            for keep in keeps:
                for arm, sets in self.arms(usage, away, h, keep).items():
                    with only(self.net, sets) if sets else per_token(self.net, self.sites, keep):
                        costs.setdefault((arm, keep), []).append(self.surprise(x, cache, last) - base)
        rows = [
            Measurement(arm, rise(keep, relu), statistics.fmean(found), UNIT, False, arm not in OURS)
            for (arm, keep), found in costs.items()
        ]
        where = " in a ReLU model" if relu else ""
        return [*rows, Measurement("dense", f"surprise{where}", statistics.fmean(dense), UNIT, False, True)]

    def arms(
        self, usage: dict[str, Usage], away: dict[str, Usage], h: dict[str, Tensor], keep: float
    ) -> dict[str, Sets]:
        """The neurons of each arm by site; none for the bound, which has no fixed ones."""
        signed = _usage(h, "signed")
        sets = {
            OWN: {name: one.core(keep) for name, one in usage.items()},
            SIGNED: {name: one.core(keep) for name, one in signed.items()},
            OTHER: {name: one.core(keep) for name, one in away.items()},
            STATIC: {name: one.core(keep) for name, one in self.pooled.items()},
            RANDOM: {s.name: self._random(s.width, keep) for s in self.sites},
            ORACLE: {},
        }
        if self.clusters is not None:
            probe = Usage.none(h[self.clusters.probe].shape[1])
            probe.add(h[self.clusters.probe], self.clusters.alpha, self.clusters.score)
            group = self.clusters.predict(probe)
            sets[SIMILAR] = {s.name: self.clusters.core(group, s.name, keep) for s in self.sites}
        return sets

    def _random(self, width: int, keep: float) -> Tensor:
        return torch.randperm(width, generator=self.generator)[: share_of(keep, width)].sort().values

    def surprise(self, x: Tensor, cache: Any, last: Tensor) -> float:
        """Mean surprise of what follows the prompt, whose cache stays as it is."""
        rest = x[:, self.prompt :]
        logits = self.net(rest[:, :-1], past_key_values=copy.deepcopy(cache), use_cache=True).logits[0]
        return float(surprise(torch.cat([last, logits]), rest[0]).mean())

    def overlaps(self, judged: list[tuple[str, Tensor]]) -> list[Measurement]:
        """Likeness of the sets of a prompt's two halves, of two texts on one subject, and of two subjects."""
        half = self.prompt // 2
        found: dict[str, list[float]] = {"two halves of a prompt": [], "same subject": [], "another subject": []}
        usages = []
        for topic, x in judged:
            usage, _, _, h = self.used(x[:, : self.prompt])
            halves = [
                _usage({name: a[part] for name, a in h.items()}, "abs") for part in (slice(half), slice(half, None))
            ]
            found["two halves of a prompt"].append(_overlap(*halves))
            if topic in self.by_topic:
                found["same subject"].append(_overlap(usage, self.by_topic[topic]))
            usages.append(usage)
        shift = len(judged) // 2
        found["another subject"] = [_overlap(u, usages[(i + shift) % len(usages)]) for i, u in enumerate(usages)]
        return [
            Measurement(name, OVERLAP, statistics.fmean(values), "", None, name == "another subject")
            for name, values in found.items()
        ]


def _usage(h: dict[str, Tensor], score: str) -> dict[str, Usage]:
    usages = {name: Usage.none(value.shape[1]) for name, value in h.items()}
    for name, value in h.items():
        usages[name].add(value, 0.2, score)
    return usages


def _overlap(a: dict[str, Usage], b: dict[str, Usage]) -> float:
    return statistics.fmean(jaccard(a[name].core(0.4), b[name].core(0.4)) for name in a)


@contextmanager
def per_token(net: nn.Module, sites: Sequence[Site], keep: float) -> Iterator[None]:
    """Of each token's activations all but the largest share are zero."""

    def largest(count: int, _: nn.Module, args: Any) -> Any:
        size = args[0].abs()
        threshold = size.topk(count, dim=-1).values[..., -1:]
        return (args[0] * (size >= threshold),)

    with ExitStack() as stack:
        for site in sites:
            act = partial(largest, share_of(keep, site.width))
            stack.callback(net.get_submodule(site.tap.module).register_forward_pre_hook(act).remove)
        yield


def _rates(net: Any, tokenizer: Any, settings: dict[str, Any]) -> list[Measurement]:
    """Median processor time of a greedy step in one thread, dense and sparse in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source = documents(settings["topics"][0])[0]
    x = tokenizer(source[: 12 * settings["prompt"]], return_tensors="pt")["input_ids"][:, : settings["prompt"]]
    seconds: dict[float, list[float]] = {}
    for _ in range(3):
        for keep in (1.0, *settings["keep"]):
            sparse = CoreInfer(net, keep, layers=slice(*settings["layers"]))
            way: AbstractContextManager[Any] = nullcontext() if keep == 1 else sparse
            with way:
                seconds.setdefault(keep, []).extend(_steps(net, x, settings["tokens"]))
    torch.set_num_threads(threads)
    dense = statistics.median(seconds[1.0])
    return [
        Measurement(OWN, RATE.format(keep), dense / statistics.median(seconds[keep]), "", True)
        for keep in settings["keep"]
    ]


def _steps(net: Any, x: Tensor, tokens: int) -> list[float]:
    out = net(x, use_cache=True)
    cache, last, seconds = out.past_key_values, out.logits[:, -1:].argmax(-1), []
    for _ in range(tokens):
        start = time.process_time()
        out = net(last, past_key_values=cache, use_cache=True)
        last = out.logits[:, -1:].argmax(-1)
        seconds.append(time.process_time() - start)
    return seconds


# --- the ReLU model ----------------------------------------------------------------------------------


def _letter_model(settings: dict[str, Any], seed: int) -> list[Measurement]:
    """The same arms, without clusters, in a model whose silent neurons are exactly zero."""
    known = settings["letters"] == "brown"
    everything = list(text("brown").documents) if known else documents("manual")
    train = [source for number, source in enumerate(everything, 1) if number % 10]
    test = everything[9::10] if known else everything[9:13]
    net = letter_model(train, settings["steps"], LENGTH, seed)
    study = _Study(net, find_sites(net), LENGTH // 2, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for source in train[: 4 * len(test) : 4]:
            study.learn("", letters(source[1000 : 1000 + LENGTH // 2])[None])
        judged = [("", letters(source[500 : 500 + LENGTH])[None]) for source in test if len(source) >= 500 + LENGTH]
        rows = study.compare(judged, settings["keep"], Meter(), relu=True)
        firing = [(h > 0).float().mean() for _, x in judged for h in study.used(x)[3].values()]
    share = 100 * float(torch.stack(firing).mean())
    return [*rows, Measurement("dense", "neurons that fire in a ReLU model", share, "%", None, True)]


# --- verdict and figure --------------------------------------------------------------------------------


def difference(rows: Sequence[Row], other: str) -> tuple[float, float]:
    """Rise of the own set less that of another at 0.4: mean over seeds, and standard error (infinite for one seed)."""
    ours, theirs = (find(rows, name, rise(0.4)).values for name in (OWN, other))
    return paired(ours, theirs)


def verdict(rows: Sequence[Row]) -> str:
    """The rule above, as code; a pure function of the rows."""
    random, static, other = (difference(rows, name) for name in (RANDOM, STATIC, OTHER))
    if not (random[0] < 0 and static[0] < 0):
        return "does not hold"
    clear = all(mean < -2 * error for mean, error in (random, static, other))
    lossless = find(rows, OWN, rise(0.4)).mean <= 0.1
    fast = find(rows, OWN, RATE.format(0.4)).mean >= 1.3
    return "holds" if clear and lossless and fast else "partly"


COLOURS = {
    OWN: "#0b6e99", SIGNED: "#7cb5cc", SIMILAR: "#2a9d8f", OTHER: "#c06c2b", STATIC: "#6d597a", RANDOM: "#8a8f98",
    ORACLE: "#333333",
}  # fmt: skip


def figure(report: Report) -> Figure:
    """Left and middle: the rise of surprise against the share kept. Right: how alike core sets are."""
    out = Figure(figsize=(14, 4.8), layout="constrained")
    left, middle, right = out.subplots(1, 3, width_ratios=(1.2, 1.2, 0.8))
    for panel, relu, title in ((left, False, "SmolLM2 (SiLU)"), (middle, True, "small ReLU model of letters")):
        _curves(panel, report, relu)
        panel.set_title(title)
    out.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize="small", frameon=False)
    rows = [row for row in report.rows if row.metric == OVERLAP][::-1]
    right.errorbar(
        [r.mean for r in rows],
        range(len(rows)),
        xerr=[r.spread or 0 for r in rows],
        fmt="o",
        color="#0b6e99",
        capsize=3,
    )
    right.set_yticks(range(len(rows)), [row.name.replace(" of ", "\nof ") for row in rows])
    right.axvline(0.4 / 1.6, color="#8a8f98", linewidth=0.8, linestyle="--")
    right.text(0.4 / 1.6, len(rows) - 0.6, " random sets", color="#8a8f98", fontsize="small", va="top")
    right.set(xlabel="Jaccard of core sets", xlim=(0.2, 1), ylim=(-0.6, len(rows) - 0.4), title="SmolLM2, keep 0.4")
    return out


def _curves(panel: Any, report: Report, relu: bool) -> None:
    keeps = report.settings["keep"]
    for arm in ARMS:
        if relu and arm == SIGNED:  # the same as the own core where no activation is negative
            continue
        rows = [row for keep in keeps for row in report.rows if row.name == arm and row.metric == rise(keep, relu)]
        if rows:
            style = "--" if arm == ORACLE else "-"
            panel.errorbar(
                keeps, [r.mean for r in rows], yerr=[r.spread or 0 for r in rows], marker="o", linestyle=style,
                color=COLOURS[arm], label=arm, capsize=2, markersize=4,
            )  # fmt: skip
    panel.axhline(0, color="#333", linewidth=0.8)
    panel.set_ylim(bottom=-0.03 * panel.get_ylim()[1])
    panel.set(xlabel="share of the neurons that is kept", ylabel="rise of surprise over dense (nats a token)")
    panel.set_xticks(list(keeps))
    panel.grid(alpha=0.3)


run = runner(__name__)
