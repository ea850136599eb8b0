"""The sentence that says most of these exemplars: search over p(d | E) and p(d).

    score(d) = log p(d | E) - lam * log p(d)

The prior's share `lam` = 0.2 (the paper's) makes it a weighted pointwise mutual information; 1 is the plain one, 0
captioning. "rerank" collects the `beam` likeliest sentences and takes the best of them by the score; with `mi=True`
the prior is taken off at every word instead, inside "beam", "greedy" or "sample".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuropil.interpret.milan.captioner import Captioner
from neuropil.interpret.milan.language import PAD, START, STOP, LanguageModel, live

STRATEGIES = ("rerank", "beam", "greedy", "sample")
State = tuple[Tensor, ...]
Step = Callable[[Tensor, State], tuple[Tensor, State]]


@dataclass(frozen=True)
class Found:
    """Sentences of each of n units, best first: tokens without the start, their scores, and the two parts of them."""

    tokens: Int[Tensor, "n beams length"]
    score: Float[Tensor, "n beams"]
    given: Float[Tensor, "n beams"]
    prior: Float[Tensor, "n beams"]

    def at(self, lam: float) -> Found:
        """The same sentences, reranked with another share of the prior."""
        return _sorted(Found(self.tokens, self.given - lam * self.prior, self.given, self.prior))


def beam_search(
    step: Step, state: State, *, beam: int, length: int
) -> tuple[Int[Tensor, "n beams length"], Float[Tensor, "n beams"]]:
    """The `beam` best sequences of at most `length` tokens, best first, and their scores (sums over the steps).

    `step(tokens [n, b], state) -> (scores [n, b, words], state)`; the tensors of a state begin with `[n, b]`. Where
    there are fewer sequences than `beam`, the rest score minus infinity. A beam of one is the greedy search.
    """
    n = state[0].shape[0]
    words = torch.full((n, 1), START)
    scores = state[0].new_zeros(n, 1)
    done = torch.zeros(n, 1, dtype=torch.bool)
    out = torch.zeros(n, 1, 0, dtype=torch.int64)
    for _ in range(length):
        each, state = step(words, state)
        each = _only_padding_after_stop(each, done)
        total = (scores[:, :, None] + each).flatten(1)
        if total.shape[1] < beam:
            total = torch.cat([total, total.new_full((n, beam - total.shape[1]), -torch.inf)], 1)
        scores, place = total.topk(beam, dim=1)
        place = place.clamp_max(each[0].numel() - 1)  # of those that are none
        parent, words = place // each.shape[2], place % each.shape[2]
        row = torch.arange(n)[:, None]
        state = tuple(part[row, parent] for part in state)
        out = torch.cat([out[row, parent], words[:, :, None]], 2)
        done = done[row, parent] | (words == STOP)
        if done[scores.isfinite()].all():
            break
    missing = length - out.shape[2]
    return torch.cat([out, out.new_full((n, beam, missing), PAD)], 2), scores


def _only_padding_after_stop(each: Tensor, done: Tensor) -> Tensor:
    """A finished sentence goes on as padding, at no cost; an unfinished one never starts again nor pads."""
    each = each.clone()
    each[:, :, [START, PAD]] = -torch.inf
    ended = torch.full_like(each[0, 0], -torch.inf)
    ended[PAD] = 0.0
    return torch.where(done[:, :, None], ended, each)


def sample(
    step: Step, state: State, *, draws: int, length: int, generator: torch.Generator | None = None
) -> tuple[Int[Tensor, "n draws length"], Float[Tensor, "n draws"]]:
    """Sequences drawn word by word with probabilities softmax(scores), and the sums of their scores."""
    n = state[0].shape[0]
    state = tuple(part.expand(n, draws, *part.shape[2:]) for part in state)
    words = torch.full((n, draws), START)
    scores = state[0].new_zeros(n, draws)
    done = torch.zeros(n, draws, dtype=torch.bool)
    out = []
    for _ in range(length):
        each, state = step(words, state)
        each = _only_padding_after_stop(each, done)
        drawn = each.softmax(2).flatten(0, 1)
        words = torch.multinomial(drawn, 1, generator=generator).unflatten(0, (n, draws))[..., 0]
        scores = scores + each.gather(2, words[:, :, None])[..., 0]
        done = done | (words == STOP)
        out.append(words)
    return torch.stack(out, 2), scores


def mutual_information(look: Step, prior: Step, lam: float, parts: int) -> Step:
    """Steps scored log p(w | E, before) - lam log p(w | before); the first `parts` tensors of a state are look's."""

    def step(words: Tensor, state: State) -> tuple[Tensor, State]:
        given, mine = look(words, state[:parts])
        if lam == 0.0:
            return given, (*mine, *state[parts:])
        alone, others = prior(words, state[parts:])
        return given - lam * alone, (*mine, *others)

    return step


@torch.no_grad()
def search(
    captioner: Captioner,
    keys: Float[Tensor, "n k features"],
    lm: LanguageModel | None = None,
    *,
    lam: float = 0.2,
    beam: int = 50,
    length: int = 15,
    strategy: str = "rerank",
    mi: bool = False,
    generator: torch.Generator | None = None,
) -> Found:
    """Descriptions of n units from the vectors of their exemplars.

    Without a language model the prior is left out (lam = 0). Raises ValueError for another strategy, sizes below 1,
    or a language model over another vocabulary.
    """
    _check(captioner, lm, lam, beam, length, strategy, mi)
    modes = captioner.training, lm.training if lm is not None else False
    captioner.eval()
    if lm is not None:
        lm.eval()
    try:
        state, look = captioner.start(keys), captioner.looker(keys)
        step: Step = look.step
        first = state
        if mi and lm is not None:
            step = mutual_information(look.step, lm.step, lam, len(state))
            first = (*state, *lm.start(len(keys)))
        if strategy == "sample":
            found, scores = sample(step, first, draws=beam, length=length, generator=generator)
        else:
            found, scores = beam_search(step, first, beam=1 if strategy == "greedy" else beam, length=length)
        none = ~scores.isfinite()  # fewer sentences than beams
        given = forced(look.step, state, found).masked_fill(none, -torch.inf)
        prior = forced(lm.step, lm.start(len(keys)), found) if lm is not None else torch.zeros_like(given)
        score = given - lam * prior if lam else given
        result = Found(found, score, given, prior)
        return _sorted(result) if strategy == "sample" or (lam and (mi or strategy == "rerank")) else result
    finally:
        captioner.train(modes[0])
        if lm is not None:
            lm.train(modes[1])


def _check(
    captioner: Captioner, lm: LanguageModel | None, lam: float, beam: int, length: int, strategy: str, mi: bool
) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; expected one of {', '.join(STRATEGIES)}")
    if beam < 1 or length < 1:
        raise ValueError(f"beam={beam}, length={length}; expected 1 or more")
    if lam < 0:
        raise ValueError(f"lam is {lam}; expected 0 (captioning) or more, such as 0.2")
    if mi and strategy == "rerank":
        raise ValueError('mi=True takes the prior off at every word; give strategy="beam", "greedy" or "sample"')
    if lm is not None and lm.vocabulary != captioner.vocabulary:
        raise ValueError(
            f"the language model knows {len(lm.vocabulary)} words, the captioner {len(captioner.vocabulary)}, and they "
            "are not the same; train both on one Vocabulary"
        )


@torch.no_grad()
def forced(step: Step, state: State, found: Int[Tensor, "n beams length"]) -> Float[Tensor, "n beams"]:
    """The summed scores of given sentences under `step`; what comes after the first stop is ignored."""
    n, beams, length = found.shape
    state = tuple(part.expand(n, beams, *part.shape[2:]) for part in state)
    inside = live(found)
    words = torch.full((n, beams), START)
    total = state[0].new_zeros(n, beams)
    for t in range(length):
        each, state = step(words, state)
        words = found[:, :, t]
        total = total + torch.where(inside[:, :, t], each.gather(2, words[:, :, None])[..., 0], 0.0)
    return total


def _sorted(found: Found) -> Found:
    order = found.score.argsort(dim=1, descending=True, stable=True)
    row = torch.arange(len(order))[:, None]
    return Found(*(part[row, order] for part in (found.tokens, found.score, found.given, found.prior)))
