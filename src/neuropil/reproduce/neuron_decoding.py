"""Decoding specialised feature neurons in LLMs with the final projection layer (Davies 2025, arXiv:2501.02688).

On SmolLM2-135M-Instruct, in five steps: (A) how many neurons decode to a token better than random
directions do, layer by layer; (B) whether the tokens of one neuron belong together, judged by an
independent sentence model; (C) whether clamping a neuron that a rule picks for a concept moves the
concept's probability, beside random neurons of the same layers that write vectors as long, and beside a
neuron picked by its activations instead of its weights; (D) the share of neurons that keep
their top token after fine-tuning; (E) what a clamped animal neuron does to a chat.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from neuropil.interpret import Decoder, compare, steer
from neuropil.models import Model, load
from neuropil.neurons import Site, capture, clamp
from neuropil.report import Measurement, Report, Row, Scale
from neuropil.reproduce.harness import Meter, runner
from neuropil.topk import InnerProductIndex

CLAIM = (
    "Pushing MLP weights through the output head, with no data, names the concept that a neuron stands for: "
    "clamping the neuron moves the probability of that concept, and most neurons keep their token after "
    "instruction tuning."
)
RULE = (
    "Four tests. (1) In each of the last two layers more than five times as many up-projections lie above the "
    "99th percentile of random directions as chance allows (2 %), and fewer than twice chance do so when the "
    "dimensions of every row are shuffled. (2) The tokens of the most specialised neurons are told from those "
    "of random rows by an independent sentence model with an AUC above 0.7. (3) Over five neutral prompts and "
    "five about the concept, neurons picked by the triple rule gain more log-probability than random neurons of "
    "the same layers that write vectors of the same length, by more than twice the standard error over concepts, "
    "in every seed. (4) More than 75 % of up-projections keep their top token after fine-tuning. Holds if all "
    "four pass, does not hold if (1) or (3) fails, else partly."
)
PAPER_SAYS = (
    "Llama 3.1 8B: neurons for single concepts ('dog', 'California') exist; clamping them moves the probability "
    "of the concept",
    "over 75 % (75.4 %) of up-projections keep their top token from Llama 3.1 8B to its Instruct version",
    "all 458,752 up-projections of Llama 3.1 8B are decoded in under 15 minutes",
)
DEVIATIONS = (
    "SmolLM2-135M-Instruct (weights rounded to 4 bits by its package) instead of Llama 3.1 8B",
    "no base checkpoint can be had offline: instead of base against Instruct, the Instruct model is compared with "
    "itself after a short fine-tuning of all parameters on English prose, far less training than the paper's",
    "clamp values are ours (+30 and -30): the paper's are not known",
    "as controls: shuffled weights, random neurons, the sign of cos_up instead of cos_down, and the neuron whose "
    "activation stands out most on the very prompts about the concept",
)
NOTES = (
    "an earlier form of test (3), on two prompts that name the concept and no neutral ones, was run first (seeds 0, "
    "1, 2) and failed: after such a prompt the concept is nearly certain and has no room to gain, as the rows of the "
    "prompts about the concept show. The present form, with both sorts of prompts, was then fixed, and run once, on "
    "other seeds and with more prompts",
)
SEEDS: dict[Scale, tuple[int, ...]] = {"smoke": (0,), "default": (3, 4, 5), "paper": (3, 4, 5, 6, 7)}
SETTINGS: dict[Scale, dict[str, Any]] = {
    "smoke": {"layers": (0, 28, 29), "null": 300, "neurons": 40, "concepts": 6, "steps": 1, "tokens": 8, "prompts": 2},
    "default": {"layers": None, "null": 2000, "neurons": 200, "concepts": 30, "steps": 15, "tokens": 24},
    "paper": {"layers": None, "null": 2000, "neurons": 200, "concepts": 100, "steps": 200, "tokens": 60},
}

VALUE = 30.0
NEUTRALLY, ON_TOPIC, ALL = "neutral prompts", "prompts about the concept", "all prompts"
RANDOM, ACTIVE = "random neuron", "activations, no weights"
NEAR = 32  # neurons of the layer with the nearest length of the writing vector, from which the random one is drawn
# A hundred common nouns, fixed before anything was run; each is one token with a leading space.
CONCEPTS = """
dog cat horse bird fish cow bear snake tree flower grass leaf apple bread milk cheese meat rice coffee tea
wine water river ocean lake rain snow wind fire sun moon star sky earth stone gold silver iron glass wood
paper book letter word story poem song music piano guitar dance paint photo film game ball team school
student teacher doctor nurse lawyer soldier king queen priest church prayer war peace army law court police
prison money bank market price tax farm field garden house door window kitchen bed table chair car train
ship plane road bridge computer phone math science history
""".split()
NEUTRAL = (
    "The word is",
    "I was thinking about the",
    "Yesterday they talked about the",
    "My friend likes the",
    "In the end it was about the",
)
ABOUT = (
    "We talked about the {0} for hours. Everyone asked about the",
    "A {0} is a {0}. I have always liked the",
    "He wrote a letter about the {0}. At the end he thanked her for the",
    "There was a {0} in the picture. We could not take our eyes off the",
    "Nothing here is worth as much as the {0}, and so they asked for the",
)
ANIMAL_NEURON = "29:808"  # reads, gates and writes dog, cat and pet
QUESTION = "What is your favourite animal?"


def measure(scale: Scale, seed: int, progress: Meter) -> list[Measurement]:
    settings = SETTINGS[scale]
    model = _model()
    generator = torch.Generator().manual_seed(seed)
    steps: list[tuple[str, Any]] = [("clamping", causality), ("decoding", above_null), ("coherence", coherence)]
    steps += [("fine-tuning", stability), ("chat", chat)]
    out: list[Measurement] = []
    for done, (note, step) in enumerate(steps):
        progress(done / len(steps), note)
        out += step(model, settings, generator)
    return out


@lru_cache(maxsize=1)
def _model() -> Model:
    return load("smollm2")


def sites(model: Model, layers: Sequence[int] | None) -> list[Site]:
    return [s for s in model.sites if layers is None or s.layer in layers]


# --- A: more than chance -------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _index(model: Model) -> InnerProductIndex:
    return Decoder(model, probability=False).cosines


@lru_cache(maxsize=256)
def _ends(model: Model, number: int, role: str) -> Tensor:
    """Largest and smallest cosine of each weight row of a site with any token, `[width, 2]`."""
    return _extremes(_index(model), model.rows(model.sites[number], role))


def _extremes(index: InnerProductIndex, rows: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(rows, dim=1)
    found = index.search(unit, 1, both=True)
    assert found.negative_scores is not None
    return torch.cat([found.scores, found.negative_scores], 1)


def above_null(model: Model, settings: dict[str, Any], generator: torch.Generator) -> list[Measurement]:
    index = _index(model)
    null = _extremes(index, torch.randn(settings["null"], index.keys.shape[1], generator=generator))[:, 0]
    bar = float(null.quantile(0.99))
    out = []
    for role in ("up", "gate", "down"):
        for site in sites(model, settings["layers"]):
            ends = _ends(model, site.number, role)
            out.append(_share(f"{role}, layer {site.layer}", ends, bar, baseline=False))
    last = model.sites[-1]
    rows = model.rows(last, "up")
    picked = rows[torch.randperm(last.width, generator=generator)[: settings["null"]]]
    order = torch.stack([torch.randperm(rows.shape[1], generator=generator) for _ in picked])
    shuffled = picked.gather(1, order)
    turn = torch.linalg.qr(torch.randn(rows.shape[1], rows.shape[1], generator=generator)).Q
    out.append(_share("up, last layer, dimensions shuffled", _extremes(index, shuffled), bar, baseline=True))
    out.append(_share("up, last layer, rotated at random", _extremes(index, picked @ turn), bar, baseline=True))
    return out


def _share(name: str, ends: Tensor, bar: float, baseline: bool) -> Measurement:
    share = ((ends[:, 0] > bar) | (ends[:, 1] < -bar)).float().mean()
    return Measurement(name, "rows above the null's 99th percentile", 100 * float(share), "%", True, baseline)


# --- B: tokens that belong together --------------------------------------------------------------


def coherence(model: Model, settings: dict[str, Any], generator: torch.Generator) -> list[Measurement]:
    """AUC with which the mean cosine of five tokens' meanings tells neurons from random rows and token lists."""
    from neuropil.meaning import embed

    index, texts = _index(model), model.tokens()
    chosen = sites(model, settings["layers"])
    ends = torch.cat([_ends(model, s.number, "up") for s in chosen])
    hub = _hubs(ends)
    places = [(s, i) for s in chosen for i in range(s.width)]
    strength = torch.where(hub, 0.0, ends.abs().amax(1))
    # Half of the strongest neurons, drawn anew for every seed.
    pool = strength.topk(2 * settings["neurons"]).indices
    best = pool[torch.randperm(len(pool), generator=generator)[: settings["neurons"]]]
    lists = _token_lists(index, torch.stack([model.rows(places[i][0], "up")[places[i][1]] for i in best.tolist()]))
    noise = _token_lists(index, torch.randn(settings["neurons"], index.keys.shape[1], generator=generator))
    mixed = lists.flatten()[torch.randperm(lists.numel(), generator=generator)].view_as(lists)
    marks = {}
    for name, tokens in (("neurons", lists), ("noise", noise), ("mixed", mixed)):
        vectors = torch.as_tensor(embed([texts[t] or " " for t in tokens.flatten().tolist()]))
        vectors = vectors.view(*tokens.shape, -1)
        close = vectors @ vectors.transpose(1, 2)
        marks[name] = ((close.sum((1, 2)) - 5) / 20).numpy()
    return [
        Measurement("against random rows", "AUC of token coherence", _auc(marks["neurons"], marks["noise"])),
        Measurement("against the same tokens mixed", "AUC of token coherence", _auc(marks["neurons"], marks["mixed"])),
    ]


def _hubs(ends: Tensor) -> Tensor:
    """Rows strongly aligned with tokens on both sides at once point along the mean of all tokens."""
    return (ends[:, 0] > 0.3) & (ends[:, 1] < -0.3)


def _token_lists(index: InnerProductIndex, rows: Tensor) -> Tensor:
    found = index.search(torch.nn.functional.normalize(rows, dim=1), 5, both=True)
    assert found.negative_scores is not None
    assert found.negative_tokens is not None
    stronger = found.scores[:, :1] >= -found.negative_scores[:, :1]
    return torch.where(stronger, found.tokens, found.negative_tokens)


def _auc(positive: np.ndarray, negative: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    truth = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    return float(roc_auc_score(truth, np.r_[positive, negative]))


# --- C: clamping ---------------------------------------------------------------------------------

RULES = {"triple rule": "triple", "|cos_up|": "abs_up", "cos_up": "up", "z without hubs": "z"}


@lru_cache(maxsize=1)
def _triples(model: Model, layers: tuple[int, ...] | None) -> dict[str, np.ndarray]:
    return steer.cosines(model, [steer.token_of(model, word) for word in CONCEPTS], layers)


def causality(model: Model, settings: dict[str, Any], generator: torch.Generator) -> list[Measurement]:
    """Change of log p(concept) when the picked neuron is clamped for more of it, and for less."""
    layers = settings["layers"]
    triples, names = _triples(model, layers), steer.addresses(model, layers)
    hubs = torch.cat([_hubs(_ends(model, s.number, "up")) for s in sites(model, layers)]).numpy()
    words = torch.randperm(len(CONCEPTS), generator=generator)[: settings["concepts"]].tolist()
    tokens = [steer.token_of(model, CONCEPTS[w]) for w in words]
    picks = {name: steer.score(triples, rule, hubs)[:, words].argmax(0) for name, rule in RULES.items()}
    picks[RANDOM] = _matched(sites(model, layers), model, picks["triple rule"], generator)
    picks[ACTIVE] = np.abs(_standing_out(model, layers, settings.get("prompts"))[:, words]).argmax(0)
    signs = {name: np.sign(triples["down"][pick, words]) for name, pick in picks.items()}
    picks["|cos_up|, sign of cos_up"] = picks["|cos_up|"]
    signs["|cos_up|, sign of cos_up"] = np.sign(triples["up"][picks["|cos_up|"], words])
    gains: dict[tuple[str, str], list[np.ndarray]] = {}
    for topic, prompts in ((NEUTRALLY, NEUTRAL), (ON_TOPIC, ABOUT)):
        for prompt in prompts[: settings.get("prompts")]:
            for name, change in _changes(model, prompt, words, tokens, picks, signs, names).items():
                gains.setdefault((name, topic), []).append(change)
                gains.setdefault((name, ALL), []).append(change)
    order = sorted(gains, key=lambda key: (ALL, NEUTRALLY, ON_TOPIC).index(key[1]))  # the headline comes first
    return [entry for key in order for entry in _gain_rows(*key, np.stack(gains[key]))]


def _matched(chosen: Sequence[Site], model: Model, places: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """For each neuron, by its place in the sites, a random one of its layer with about the same |W_down|."""
    norms = torch.cat([model.rows(s, "down").norm(dim=1) for s in chosen]).numpy()
    width, out = chosen[0].width, []
    for place in places:
        layer = place // width * width
        apart = np.abs(norms[layer : layer + width] - norms[place])
        near = np.argsort(apart, kind="stable")[1 : NEAR + 1]
        out.append(layer + near[int(torch.randint(len(near), (1,), generator=generator))])
    return np.array(out)


@lru_cache(maxsize=1)
def _standing_out(model: Model, layers: tuple[int, ...] | None, prompts: int | None) -> np.ndarray:
    """How far each neuron's activation on prompts about a concept stands out among the concepts, `[neurons, words]`.

    At the last token, in standard deviations over the concepts, the mean over the prompts.
    """
    chosen, marks = sites(model, layers), []
    for prompt in ABOUT[:prompts]:
        texts = [prompt.format(word) for word in CONCEPTS]  # one token a concept, so all are of one length
        with torch.no_grad(), capture(model.module(), chosen) as seen:
            model.module()(**model.tokenizer(texts, return_tensors="pt"), use_cache=False)
        h = torch.cat([seen[s.name][:, -1] for s in chosen], 1).T
        marks.append((h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True).clamp_min(1e-6))
    return torch.stack(marks).mean(0).numpy()


def _changes(
    model: Model,
    prompt: str,
    words: Sequence[int],
    tokens: Sequence[int],
    picks: dict[str, np.ndarray],
    signs: dict[str, np.ndarray],
    names: list[str],
) -> dict[str, np.ndarray]:
    """For every rule `[concepts, 3]`: change of log p(concept) clamped for more and for less, collateral KL."""
    out = {name: np.zeros((len(words), 3)) for name in picks}
    fixed = "{0}" not in prompt
    for start in range(0, len(words), len(words) if fixed else 1):
        some = range(start, len(words) if fixed else start + 1)
        held: list[dict[str, float]] = [{}]
        for name, pick in picks.items():
            for c in some:
                value = VALUE * float(signs[name][c] or 1.0)
                held += [{names[pick[c]]: value}, {names[pick[c]]: -value}]
        logs = steer.log_probabilities(model, prompt.format(CONCEPTS[words[start]]), held)
        place = 1
        for name in picks:
            for c in some:
                pair = torch.stack([logs[0], logs[place], logs[place + 1]])
                more, less = (pair[1:, tokens[c]] - pair[0, tokens[c]]).tolist()
                out[name][c] = more, less, float(steer.divergence(pair, [tokens[c]])[0])
                place += 2
    return out


def _gain_rows(name: str, topic: str, changes: np.ndarray) -> list[Measurement]:
    mean = changes.mean(0)  # over prompts: [concepts, 3]
    error = mean[:, 0].std(ddof=1) / np.sqrt(len(mean))
    base = name in (RANDOM, ACTIVE) or "sign of" in name
    return [
        Measurement(name, f"change of log p, clamped for more, {topic}", float(mean[:, 0].mean()), "nats", True, base),
        Measurement(name, f"standard error over concepts, {topic}", float(error), "nats", None, base),
        Measurement(name, f"change of log p, clamped for less, {topic}", float(mean[:, 1].mean()), "nats", False, base),
        Measurement(name, f"KL of all other tokens, {topic}", float(mean[:, 2].mean()), "nats", False, base),
    ]


# --- D: after fine-tuning ------------------------------------------------------------------------


def stability(model: Model, settings: dict[str, Any], generator: torch.Generator) -> list[Measurement]:
    """Share of up-projections with the same top token after fine-tuning on prose; and in a shuffled layer."""
    tuned = load(_tuned(model, settings["steps"], generator), tokenizer=model.tokenizer)
    layers = settings["layers"] or range(0, len(model.sites), 3)
    kept = compare(model, tuned, layers=layers)
    out = [
        Measurement("after fine-tuning", "up-projections with the same top token", 100 * kept.agreement, "%"),
        Measurement("after fine-tuning", "mean cosine of the rows", float(kept.row_cosine.mean()), "", None),
    ]
    index = InnerProductIndex(model.head().weight)
    top = index.search(model.rows(model.sites[-1], "up"), 1).tokens[:, 0]
    mixed = top[torch.randperm(len(top), generator=generator)]
    chance = 100 * float((top == mixed).float().mean())
    return [
        *out,
        Measurement("neurons shuffled", "up-projections with the same top token", chance, "%", True, True),
    ]


def _tuned(model: Model, steps: int, generator: torch.Generator) -> torch.nn.Module:
    """A copy, fine-tuned: AdamW at 5e-5 on all parameters, 4 x 96 tokens of prose a step."""
    from copy import deepcopy

    from neuropil.data import text

    net = deepcopy(model.module()).train()
    ids = torch.tensor(model.tokenizer("\n\n".join(text("brown").train[:40]))["input_ids"])
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-5)
    for _ in range(steps):
        starts = torch.randint(len(ids) - 96, (4,), generator=generator)
        batch = torch.stack([ids[s : s + 96] for s in starts.tolist()])
        loss = net(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.eval()


# --- E: a chat -----------------------------------------------------------------------------------


def chat(model: Model, settings: dict[str, Any], generator: torch.Generator) -> list[Measurement]:
    """Dog and cat words in greedy answers, the animal neuron clamped, beside ten random neurons of its layer."""
    tokenizer, net = model.tokenizer, model.module()
    site = model.sites[-1]
    values = (0.0, 10.0, VALUE, 60.0)
    others = [f"{site.number}:{i}" for i in torch.randint(site.width, (10,), generator=generator).tolist()]
    held = [{}, *({ANIMAL_NEURON: v} for v in values[1:]), *({n: VALUE} for n in others)]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = {k: v.repeat(len(held), 1) for k, v in ids.items()}
    generate: Any = net.generate
    with torch.no_grad(), clamp(net, steer.one_each(held), where="up"):
        answers = generate(**ids, max_new_tokens=settings["tokens"], do_sample=False)
    texts = tokenizer.batch_decode(answers[:, ids["input_ids"].shape[1] :])
    counts = [sum(t.lower().count(w) for w in ("dog", "cat")) for t in texts]
    metric = "dog and cat words in a chat answer"
    out = [
        Measurement(f"clamped to {v:g}" if v else "not clamped", metric, float(c), "", True, not v)
        for v, c in zip(values, counts, strict=False)
    ]
    mean = float(np.mean(counts[len(values) :]))
    return [*out, Measurement(f"random neurons clamped to {VALUE:g}", metric, mean, "", True, True)]


# --- verdict and figure --------------------------------------------------------------------------


def verdict(rows: Sequence[Row]) -> str:
    """The rule above, as code; a pure function of the rows."""
    table = {(r.name, r.metric): r for r in rows}
    above = "rows above the null's 99th percentile"
    layers = sorted(int(n.rsplit(" ", 1)[1]) for n, m in table if m == above and n.startswith("up, layer"))
    shuffled = table["up, last layer, dimensions shuffled", above].mean
    beyond = all(table[f"up, layer {n}", above].mean > 10 for n in layers[-2:] if n > 0) and shuffled < 4
    coherent = table["against random rows", "AUC of token coherence"].mean > 0.7
    gain = [table[n, f"change of log p, clamped for more, {ALL}"].values for n in ("triple rule", RANDOM)]
    error = [table[n, f"standard error over concepts, {ALL}"].values for n in ("triple rule", RANDOM)]
    causal = all(a - b > 2 * float(np.hypot(ea, eb)) for a, b, ea, eb in zip(*gain, *error, strict=True))
    stable = table["after fine-tuning", "up-projections with the same top token"].mean > 75
    if not beyond or not causal:
        return "does not hold"
    return "holds" if coherent and stable else "partly"


def figure(report: Report) -> Figure:
    """Left: neurons above chance by layer. Middle: what clamping does. Right: the chat."""
    out = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = out.subplots(1, 3, width_ratios=(1.0, 1.2, 0.7))
    above = "rows above the null's 99th percentile"
    for role, colour in (("up", "#0b6e99"), ("gate", "#d9822b"), ("down", "#5b8c3e")):
        points = [(int(r.name.rsplit(" ", 1)[1]), r) for r in report.rows if r.name.startswith(f"{role}, layer")]
        points.sort(key=lambda p: p[0])
        left.plot([n for n, _ in points], [r.mean for _, r in points], ".-", color=colour, label=role)
    left.axhline(2, color="#8a8f98", linestyle="--", linewidth=1, label="chance")
    left.set(xlabel="layer", ylabel=f"{above} (%)", title="Neurons that decode better than chance")
    left.legend(frameon=False)
    names = [*RULES, "|cos_up|, sign of cos_up", ACTIVE, RANDOM]
    for offset, way, colour in ((0.18, "more", "#0b6e99"), (-0.18, "less", "#d9822b")):
        rows = [report.row(n, f"change of log p, clamped for {way}, {ALL}") for n in names]
        heights = np.arange(len(names))[::-1] + offset
        middle.barh(heights, [r.mean for r in rows], 0.34, color=colour, label=f"clamped for {way}")
        middle.errorbar([r.mean for r in rows], heights, xerr=[r.spread or 0 for r in rows], fmt="none", color="#333")
    middle.set_yticks(np.arange(len(names))[::-1], names)
    middle.axvline(0, color="#333", linewidth=0.8)
    middle.set(xlabel=f"change of log p(concept), nats, {ALL}", title=f"What a clamp to ±{VALUE:g} does")
    middle.legend(frameon=False, fontsize="small", loc="lower left")
    rows = [r for r in report.rows if r.metric == "dog and cat words in a chat answer"]
    colours = ["#8a8f98" if r.baseline else "#0b6e99" for r in rows]
    right.barh(range(len(rows)), [r.mean for r in rows], color=colours)
    right.set_yticks(range(len(rows)), [r.name for r in rows])
    right.invert_yaxis()
    right.set(xlabel="dog and cat words", title="“What is your favourite animal?”")
    for panel in (left, middle, right):
        panel.spines[["top", "right"]].set_visible(False)
    out.suptitle(f"neuron-decoding on SmolLM2-135M: {report.verdict}", fontsize="medium")
    return out


run = runner(__name__)
