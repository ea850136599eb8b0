"""Take a concept out of a language model by turning round the few weights that stand for it.

TARS, targeted angular reversal of weights, in four steps:

1. *Approximate concept vector.* A prompt that describes the concept and asks for its name is run; the hidden
   state that the output head reads at the last position is $v_0$.
2. *Refinement.* Noise is added again and again, and what raises the probability that the head gives the
   concept's token is kept, at constant length: $v \\leftarrow \\arg\\max_i p(t \\mid c_i)$ over candidates
   $c_i \\propto v + \\epsilon_i$, where $p(\\cdot \\mid c) = softmax(W_U c + b)$.
3. *Search.* The cosine of $v$ with every feed-forward weight vector that lies in the residual stream.
4. *Reversal.* The most similar vectors $u$ become $-\\lVert u\\rVert\\, v / \\lVert v\\rVert$.

    from neuropil import load
    from neuropil.interpret.targeting import applied, target
    model = load("smollm2")
    found = target(model, "dog")
    with applied(model.module(), found.edits) as edited:
        ...                                             # as before once the block ends, to the bit

Reversing what *reads* a concept does not always silence it: where a neuron suppresses the token it detects
(see the sign trap in `neuropil.interpret.decode`), the reversed neuron promotes it. Measure what edits do.

Source: Harry J. Davies, Giorgos Iacovides, Danilo P. Mandic, "Targeted Angular Reversal of Weights (TARS) for
Knowledge Removal in Large Language Models", 2024, arXiv:2412.10257. Only its abstract could be read. What it
leaves open was chosen here: the wording of the default prompt; the vector is taken after the final norm,
where the head reads; the mean of such states over a few neutral prompts is subtracted from it, for in small
models most of a hidden state is common to all text, and reversing what reads that breaks the model
(`center=False` does not subtract); noise of a tenth of the vector's length, 64 candidates a round, the best
kept if it is better, at most 50 rounds, ended at probability 0.99; reading rows (up, gate) and writing columns
(down) are searched alike, norm gains not folded in; the 30 of the highest cosine are edited, each keeping its
length.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.errors import ModelError
from neuropil.models.model import Head, Model
from neuropil.neurons import Neuron, Site, Weight

__all__ = ["Edit", "TargetingResult", "applied", "apply", "revert", "target"]

Role = Literal["up", "gate", "down"]
ROLES: tuple[Role, ...] = ("up", "gate", "down")

PROMPT = "Everything in this text is about {concept}. What is it about? The answer, in one word, is"
# Beginnings of texts of different kinds; what their hidden states have in common is no concept's.
NEUTRAL = (
    "The weather in the morning was",
    "He wrote a letter to",
    "The company reported that its",
    "Once upon a time there was",
    "import numpy as",
    "The results of the study show that",
    "She said that she would",
    "In the year 1900 the population of",
)


@dataclass(frozen=True, eq=False)
class Edit:
    """One weight vector that is replaced: that of `role` of `neuron`, from `before` to `after`, `[d]`."""

    neuron: Neuron
    role: Role
    cosine: float
    weight: Weight = field(repr=False)
    width: int = field(repr=False)
    before: Float[Tensor, " d"] = field(repr=False)
    after: Float[Tensor, " d"] = field(repr=False)


@dataclass(frozen=True, eq=False)
class TargetingResult:
    """What `target` found.

    `token` is the token the concept was refined to (`text` as the vocabulary spells it), `vector` `[d]` the
    targeting vector, `probability` what the head gives the token from it, `start` what it gave it before the
    refinement, `rounds` how many rounds of noise were spent, `edits` the replacements, most similar first.
    """

    concept: str
    token: int
    text: str
    vector: Float[Tensor, " d"] = field(repr=False)
    start: float
    probability: float
    rounds: int
    edits: tuple[Edit, ...] = field(repr=False)


def target(
    model: Model,
    concept: str | int,
    *,
    description: str | None = None,
    edits: int = 30,
    roles: Sequence[Role] = ROLES,
    center: bool = True,
    noise: float = 0.1,
    candidates: int = 64,
    rounds: int = 50,
    goal: float = 0.99,
    seed: int = 0,
) -> TargetingResult:
    """Find the weight vectors to turn round so that `model` loses `concept`; nothing is changed.

    `apply`, `applied` and `revert` make the edits and undo them.

    Parameters
    ----------
    concept: a word, of which the first token (with a leading space) is targeted, or a token id.
    description: the prompt whose last hidden state starts the search; by default one that names the concept.
    edits: how many weight vectors to replace.
    roles: which weights are searched.
    center: whether the mean hidden state of neutral prompts is subtracted first.
    noise: length of a perturbation over the vector's.
    candidates, rounds: perturbations tried at a time, and how many times at most.
    goal: the probability of the concept's token at which the refinement ends.

    Raises `ModelError` for a model without a language-model head or tokenizer, `ValueError` for a concept
    without tokens, a token id outside the vocabulary, roles no site has, or settings that are not positive.
    """
    if min(edits, candidates) < 1 or rounds < 0 or noise <= 0:
        raise ValueError(
            f"edits={edits}, candidates={candidates}, rounds={rounds}, noise={noise}: expected at least one "
            "edit and one candidate, no negative number of rounds and a positive noise"
        )
    head = model.head()
    token, text = _token(model, concept, len(head.weight))
    named = concept.strip() if isinstance(concept, str) else text.strip()
    start = _hidden_states(model, description or PROMPT.format(concept=named))[-1]
    if center:
        # The first position is left out: it sees no text and its state is unlike all others.
        start = start - torch.cat([_hidden_states(model, prompt)[1:] for prompt in NEUTRAL]).mean(0)
    vector, before, after, spent = _refine(head, start, token, noise, candidates, rounds, goal, seed)
    found = _most_similar(model, vector, roles, edits)
    return TargetingResult(str(concept), token, text, vector, before, after, spent, found)


def apply(module: nn.Module, edits: Sequence[Edit], inplace: bool = False) -> nn.Module:
    """A copy of `module` with the edits made, or `module` itself if `inplace`.

    Raises `ModelError`, having changed nothing, where a weight is not as it was when the edits were found.
    """
    edited = module if inplace else copy.deepcopy(module)
    _write(edited, [(edit, edit.before, edit.after) for edit in edits])
    return edited


def revert(module: nn.Module, edits: Sequence[Edit]) -> nn.Module:
    """Undo `apply(..., inplace=True)` to the bit; `ModelError` where a weight has been changed since."""
    _write(module, [(edit, edit.after, edit.before) for edit in edits])
    return module


@contextmanager
def applied(module: nn.Module, edits: Sequence[Edit]) -> Iterator[nn.Module]:
    """The edits made in `module` for the length of a block; undone to the bit after it, come what may."""
    apply(module, edits, inplace=True)
    try:
        yield module
    finally:
        revert(module, edits)


def _token(model: Model, concept: str | int, vocabulary: int) -> tuple[int, str]:
    if isinstance(concept, str):
        if model.tokenizer is None:
            raise ModelError(f"{model.name}: no tokenizer came with the model; give the concept as a token id")
        ids = model.tokenizer.encode(f" {concept.strip()}", add_special_tokens=False)
        if not concept.strip() or not ids:
            raise ValueError(f"concept {concept!r}: the tokenizer finds no token in it; give a word or a token id")
        concept = int(ids[0])
    if not 0 <= concept < vocabulary:
        raise ValueError(f"concept {concept}: the vocabulary has the tokens 0 to {vocabulary - 1}")
    return concept, model.tokens()[concept]


@torch.inference_mode()
def _hidden_states(model: Model, prompt: str) -> Float[Tensor, "positions d"]:
    """What the output head reads at each of the prompt's positions."""
    if model.tokenizer is None:
        raise ModelError(f"{model.name}: no tokenizer came with the model; give one: load(module, tokenizer=...)")
    module = model.module()
    seen: list[Tensor] = []
    hook = module.get_output_embeddings().register_forward_pre_hook(  # type: ignore[operator]
        lambda _, inputs: seen.append(inputs[0][0].float().cpu())
    )
    try:
        ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
        module(input_ids=ids.to(next(module.parameters()).device), use_cache=False)
    finally:
        hook.remove()
    return seen[-1].clone()


@torch.inference_mode()
def _refine(
    head: Head,
    start: Float[Tensor, " d"],
    token: int,
    noise: float,
    candidates: int,
    rounds: int,
    goal: float,
    seed: int,
) -> tuple[Float[Tensor, " d"], float, float, int]:
    """Climb by noise; returns the vector, the token's probability before and after, and the rounds spent."""
    generator = torch.Generator().manual_seed(seed)
    length = start.norm()
    vector, spent = start, 0
    first = best = _log_probability(head, start[None], token)[0]
    while best.exp() < goal and spent < rounds:
        spent += 1
        steps = torch.randn(candidates, len(start), generator=generator)
        steps *= noise * length / steps.norm(dim=1, keepdim=True)
        tried = torch.nn.functional.normalize(vector + steps, dim=1) * length
        scores = _log_probability(head, tried, token)
        if scores.max() > best:
            best, vector = scores.max(), tried[scores.argmax()]
    return vector.clone(), float(first.exp()), float(best.exp()), spent


def _log_probability(head: Head, vectors: Float[Tensor, "n d"], token: int) -> Float[Tensor, " n"]:
    logits = vectors @ head.weight.T
    return (logits if head.bias is None else logits + head.bias).log_softmax(dim=1)[:, token]


def _most_similar(model: Model, vector: Float[Tensor, " d"], roles: Sequence[Role], count: int) -> tuple[Edit, ...]:
    """The `count` vectors of the highest cosine with `vector`; one weight of one site in memory at a time."""
    unit = torch.nn.functional.normalize(vector, dim=0)
    best: list[tuple[float, int, int, Role]] = []
    kept: dict[tuple[int, int, Role], tuple[Site, Tensor]] = {}
    searched = [(site, role) for site in model.sites for role in roles if role in site.roles]
    if not searched:
        raise ValueError(f"{model.name}: no site has weights {' or '.join(roles)}; expected up, gate or down")
    for site, role in searched:
        rows = model.rows(site, role)
        if rows.shape[1] != len(unit):
            continue  # lies in another space than the residual stream
        cosines = torch.nn.functional.cosine_similarity(rows, unit[None], dim=1)
        for value, index in zip(*(part.tolist() for part in cosines.topk(min(count, site.width))), strict=True):
            heapq.heappush(best, (value, -site.number, -index, role))
            kept[site.number, index, role] = site, rows[index].clone()
            if len(best) > count:
                _, number, dropped, which = heapq.heappop(best)
                del kept[-number, -dropped, which]
    return tuple(
        _edit(*kept[-number, -index, role], -index, role, value, unit)
        for value, number, index, role in sorted(best, reverse=True)
    )


def _edit(site: Site, row: Tensor, index: int, role: Role, cosine: float, unit: Tensor) -> Edit:
    neuron = Neuron(site.number, index, site.name)
    return Edit(neuron, role, cosine, site.weight(role), site.width, row, -row.norm() * unit)


@torch.no_grad()
def _write(module: nn.Module, changes: Sequence[tuple[Edit, Tensor, Tensor]]) -> None:
    """Replace rows by rows; looks at all of them first, so that a refusal leaves the module as it was."""
    places = [(_row(module, edit), old, new, edit) for edit, old, new in changes]
    for place, old, _, edit in places:
        if not torch.equal(place, old.to(place)):
            raise ModelError(
                f"the {edit.role} weights of neuron {edit.neuron} are not what they were when the edit was "
                "found; apply edits once, to the model they were found in, and revert before another change"
            )
    for place, _, new, _ in places:
        place.copy_(new)


def _row(module: nn.Module, edit: Edit) -> Tensor:
    """A view of the weight vector inside the module's parameter."""
    parameter = dict(module.named_parameters(remove_duplicate=False)).get(edit.weight.name)
    if parameter is None:
        raise ModelError(f"{type(module).__name__} has no parameter {edit.weight.name!r}; it is another model's edit")
    rows = edit.weight.rows(parameter.data, edit.width)
    if rows.untyped_storage().data_ptr() != parameter.data.untyped_storage().data_ptr():
        raise ModelError(f"{edit.weight.name}: its rows cannot be edited in place (they are not a view)")
    return rows[edit.neuron.index]
