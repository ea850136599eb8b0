"""The two observations that CoreInfer rests on, looked at on any model and any texts.

`stability_curve`: as a text grows token by token, its core neurons change less and less. `semantic_similarity_report`:
texts of like meaning have like core neurons.

>>> import torch
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> _ = torch.manual_seed(0)
>>> config = LlamaConfig(hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
...                      vocab_size=100)
>>> curve = stability_curve(LlamaForCausalLM(config).eval(), torch.arange(40)[None], every=10)
>>> curve.tokens.tolist(), curve.to_whole[:, -1].tolist()
([10, 20, 30, 40], [1.0, 1.0])

Source: see `neuropil.compress.coreinfer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuropil import meaning
from neuropil.compress._coreinfer_slots import Layers, find_slots
from neuropil.compress._coreinfer_usage import Usage, jaccard
from neuropil.compress.core_clusters import Inputs, read_inputs
from neuropil.compress.coreinfer import core_neurons
from neuropil.evaluate import evaluating


@dataclass(frozen=True)
class StabilityCurve:
    """Likeness (Jaccard) of the core neurons of a text's beginnings, one row a layer, one column a length.

    to_whole: with those of the whole text; to_previous: with those of the beginning one step shorter (NaN at first).
    """

    layers: tuple[str, ...]
    tokens: Int[Tensor, " lengths"]
    to_whole: Float[Tensor, "layers lengths"]
    to_previous: Float[Tensor, "layers lengths"]


@torch.no_grad()
def stability_curve(
    model: nn.Module,
    inputs: Inputs,
    *,
    every: int = 8,
    keep: float = 0.4,
    alpha: float = 0.2,
    score: str = "abs",
    layers: Layers = None,
    tokenizer: Any = None,
) -> StabilityCurve:
    """Core neurons of one text's first `every`, 2 `every`, ... tokens, against those of the whole.

    A causal model reads a beginning as it reads it within the whole, so one pass is enough.
    Raises ValueError for more than one row, and for a text shorter than `every`.
    """
    arguments, _ = read_inputs(inputs, tokenizer)
    ids = arguments if isinstance(arguments, Tensor) else arguments["input_ids"]
    if len(ids) != 1 or not 1 <= every <= ids.shape[1]:
        raise ValueError(f"token ids {tuple(ids.shape)}, every={every}: expected one row of at least that many tokens")
    slots, _ = find_slots(model, layers)
    seen: dict[str, Tensor] = {}
    hooks = [
        s.write.register_forward_pre_hook(
            lambda _, args, name=s.site.name: seen.__setitem__(name, args[0].flatten(0, -2))
        )
        for s in slots
    ]
    try:
        with evaluating(model):
            model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    ends = [*range(every, ids.shape[1], every), ids.shape[1]]
    sets = [[_core(seen[s.site.name][:end], keep, alpha, score) for end in ends] for s in slots]
    whole = torch.tensor([[jaccard(core, row[-1]) for core in row] for row in sets])
    previous = torch.tensor([[float("nan"), *map(jaccard, row[1:], row[:-1])] for row in sets])
    return StabilityCurve(tuple(s.site.name for s in slots), torch.tensor(ends), whole, previous)


def _core(h: Tensor, keep: float, alpha: float, score: str) -> Tensor:
    usage = Usage.none(h.shape[1], h.device)
    usage.add(h, alpha, score)
    return usage.core(keep)


@dataclass(frozen=True)
class SimilarityReport:
    """Likeness of core neurons against likeness of meaning, over all pairs of texts, one entry a layer.

    overlap: Jaccard of each pair's core neurons; spearman, pearson: its correlation with `meaning` over pairs.
    within, between: mean overlap of pairs with the same topic and with different ones (None without topics).
    """

    layers: tuple[str, ...]
    overlap: Float[Tensor, "layers texts texts"]
    meaning: Float[Tensor, "texts texts"]
    spearman: Float[Tensor, " layers"]
    pearson: Float[Tensor, " layers"]
    within: Float[Tensor, " layers"] | None = None
    between: Float[Tensor, " layers"] | None = None


def semantic_similarity_report(
    model: nn.Module,
    texts: Sequence[Inputs],
    *,
    similarity: Float[Tensor, "texts texts"] | None = None,
    topics: Sequence[str] | None = None,
    keep: float = 0.4,
    alpha: float = 0.2,
    score: str = "abs",
    layers: Layers = None,
    tokenizer: Any = None,
) -> SimilarityReport:
    """Do texts of like meaning use like neurons?

    `similarity` is how like each pair's meaning is (people's judgements, say); without it the cosine of the
    sentence encoder of `neuropil.meaning`, for which `texts` must be texts. Raises ValueError for fewer than three
    texts, sizes that do not fit and token ids without `similarity`; MissingExtra where the encoder is not installed.
    """
    count = len(texts)
    if count < 3 or (topics is not None and len(topics) != count):
        raise ValueError(
            f"{count} texts, {None if topics is None else len(topics)} topics: expected 3 or more, a topic each"
        )
    if similarity is None:
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("the meaning of token ids is not known: give similarity=, or texts with their tokenizer")
        vectors = meaning.embed([text for text in texts if isinstance(text, str)])
        similarity = torch.from_numpy(vectors @ vectors.T)
    if similarity.shape != (count, count):
        raise ValueError(f"similarity of shape {tuple(similarity.shape)} for {count} texts")
    sets = [
        core_neurons(model, text, keep=keep, alpha=alpha, score=score, layers=layers, tokenizer=tokenizer)
        for text in texts
    ]
    widths = {slot.site.name: slot.site.width for slot in find_slots(model, layers)[0]}
    overlap = torch.stack([_overlaps([cores[name] for cores in sets], width) for name, width in widths.items()])
    pairs = torch.triu_indices(count, count, 1)
    found, wanted = overlap[:, pairs[0], pairs[1]].numpy(), similarity[pairs[0], pairs[1]].numpy()
    spearman, pearson = zip(*(_correlations(row, wanted) for row in found), strict=True)
    within = between = None
    if topics is not None:
        same = torch.tensor([topics[i] == topics[j] for i, j in pairs.T.tolist()])
        within, between = (overlap[:, pairs[0], pairs[1]][:, which].mean(1) for which in (same, ~same))
    return SimilarityReport(
        tuple(widths), overlap, similarity, torch.tensor(spearman), torch.tensor(pearson), within, between
    )


def _overlaps(sets: Sequence[Tensor], width: int) -> Tensor:
    """Jaccard of all pairs."""
    held = torch.zeros(len(sets), width)
    for row, kept in zip(held, sets, strict=True):
        row[kept.cpu()] = 1
    both = held @ held.T
    sizes = held.sum(1)
    return both / (sizes[:, None] + sizes - both).clamp(min=1)


def _correlations(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    from scipy import stats

    return float(stats.spearmanr(a, b).statistic), float(stats.pearsonr(a, b).statistic)
