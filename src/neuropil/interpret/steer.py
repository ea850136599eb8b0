r"""Find the neuron of a concept, turn it up or down, and watch the concept's probability.

    from neuropil import load
    from neuropil.interpret import steer
    model = load("smollm2")
    steer.find(model, "dog").to_pylist()[0]                  # the neuron whose weights point at it most
    steer.sweep(model, "29:808", "dog", ["My favourite animal is the"], values=[-30, 0, 30]).change

`sweep` clamps the output of the up-projection (`where="up"`, as the paper does) or the activation itself
(`where="hidden"`) and gives the change of $\log p(token)$ at the end of each prompt against the unclamped
model. Which way a clamp works follows from the gate and the down-projection, not from the sign with which
the up-projection points at the token: `find` therefore lists all three cosines and ranks by

    "triple"    |cos_up * cos_down| among neurons whose gate points at the concept (the default)
    "abs_up"    |cos_up|
    "up"        cos_up, the plain reading of the paper
    "z"         |cos_up| in standard deviations of the row's cosines, hubs left out

and `sign` is the direction in which to clamp for *more* of the concept, sign(cos_down).

Source: Harry J. Davies, 2025, arXiv:2501.02688. The paper's clamp values are not known; give your own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from neuropil.errors import NeuropilError
from neuropil.interpret.concepts import Concepts
from neuropil.interpret.decode import Decoder
from neuropil.interpret.rows import Moments
from neuropil.models import Model
from neuropil.neurons import Neuron, Site, clamp

RULES = ("triple", "abs_up", "up", "z")
ROLES = ("up", "gate", "down")


def token_of(model: Model, word: str) -> int:
    """The one token of a word, with a leading space if there is one so, else without.

    Raises NeuropilError, showing the split, for a word of several tokens.
    """
    for text in (" " + word.strip(), word.strip()):
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1:
            return int(ids[0])
    pieces = " + ".join(repr(model.tokenizer.decode([i])) for i in ids)
    raise NeuropilError(
        f"{word!r} is {len(ids)} tokens to this model ({pieces}); name a word of one token, or decode one"
    )


def cosines(
    model: Model, tokens: Sequence[int], layers: Sequence[int] | None = None
) -> dict[str, Float[np.ndarray, "neurons tokens"]]:
    """Cosine of every neuron's up, gate and down weights with each token's row of the head, in one pass.

    Of all `layers`, or of some. NaN where a site has no such weight. Also "z": the up-projection's cosines,
    centred and divided by the row's standard deviation over the vocabulary.
    """
    decoder = Decoder(model, probability=False)
    keys = torch.nn.functional.normalize(decoder.cosines.keys.double(), dim=1)
    near, over_keys = keys[list(tokens)], Moments(keys)
    found: dict[str, list[Tensor]] = {role: [] for role in (*ROLES, "z")}
    for site in _chosen(decoder, layers):
        for role in ROLES:
            rows = decoder.rows(site, role)
            if rows is None:
                found[role].append(torch.full((site.width, len(near)), torch.nan, dtype=torch.float64))
                continue
            unit = torch.nn.functional.normalize(rows.double(), dim=1)
            found[role].append(unit @ near.T)
            if role == "up":
                mean, std = over_keys(unit)
                found["z"].append((found[role][-1] - mean[:, None]) / std[:, None])
    return {role: torch.cat(parts).float().numpy() for role, parts in found.items() if parts}


def score(triple: Mapping[str, np.ndarray], rule: str, hub: np.ndarray | None = None) -> np.ndarray:
    """How well each neuron fits by a rule; -inf where the rule rules it out."""
    if rule not in RULES:
        raise ValueError(f"rule {rule!r}; expected one of {', '.join(RULES)}")
    up = triple["up"]
    if rule == "up":
        return up
    if rule == "abs_up":
        return np.abs(up)
    if rule == "z":
        return np.where(False if hub is None else hub[:, None], -np.inf, np.abs(triple["z"]))
    gate = triple["gate"]
    fits = np.isnan(gate) | (gate > 0)  # an ungated layer has no gate to be shut
    return np.where(fits & ~np.isnan(triple["down"]), np.abs(up * triple["down"]), -np.inf)


def find(model: Model, word: str, *, rule: str = "triple", limit: int = 20) -> pa.Table:
    """The neurons whose weights point at a word, best first: score, the triple, the sign to clamp with."""
    triple = cosines(model, [token_of(model, word)])
    marks = score(triple, rule)[:, 0]
    order = np.argsort(-marks, kind="stable")[:limit]
    names = addresses(model)
    columns: dict[str, Any] = {"neuron": [names[i] for i in order], "score": marks[order]}
    columns |= {f"cos_{role}": triple[role][order, 0] for role in ROLES}
    columns["sign"] = np.where(triple["down"][order, 0] < 0, -1, 1).astype(np.int8)
    return pa.table(columns)


def addresses(model: Model, layers: Sequence[int] | None = None) -> list[str]:
    """Every neuron's short address, in the order of `cosines`."""
    sites = _chosen(Decoder(model, probability=False), layers)
    return [f"{site.number}:{i}" for site in sites for i in range(site.width)]


def _chosen(decoder: Decoder, layers: Sequence[int] | None) -> list[Site]:
    return [site for site in decoder.sites if layers is None or site.layer in layers]


def one_each(clamps: Sequence[Mapping[str, float]]) -> dict[str, Float[Tensor, " rows"]]:
    """Clamps for a batch in which every row has its own: row b is held as `clamps[b]` says, and no other row.

    >>> one_each([{"0:1": 2.0}, {}, {"0:1": -2.0, "1:5": 1.0}])
    {'0:1': tensor([ 2., nan, -2.]), '1:5': tensor([nan, nan, 1.])}
    """
    held: dict[str, Tensor] = {}
    for row, wanted in enumerate(clamps):
        for neuron, value in wanted.items():
            held.setdefault(str(neuron), torch.full((len(clamps),), torch.nan))[row] = value
    return held


@torch.no_grad()
def log_probabilities(
    model: Model, prompt: str, clamps: Sequence[Mapping[str, float]], *, where: str = "up"
) -> Float[Tensor, "rows V"]:
    """log p(next token) after `prompt`, a row for every set of clamps, all in one batch."""
    net = model.module()
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"].repeat(len(clamps), 1)
    with clamp(net, one_each(clamps), where=where):
        logits = net(input_ids=ids, logits_to_keep=1, use_cache=False).logits
    return logits[:, -1].float().log_softmax(-1)


@dataclass(frozen=True)
class Sweep:
    """What clamping one neuron does to one concept."""

    neuron: str
    values: list[float]
    tokens: list[int]
    change: Float[Tensor, "values prompts"]  # of log p(concept), nats; the concept's tokens taken together
    unclamped: Float[Tensor, " prompts"]  # log p(concept)
    divergence: Float[Tensor, "values prompts"]  # KL(unclamped || clamped) over the other tokens, nats


def sweep(
    model: Model,
    neuron: Neuron | str,
    concept: str | Sequence[int],
    prompts: Sequence[str],
    values: Sequence[float],
    *,
    where: str = "up",
) -> Sweep:
    """Clamp one neuron to each of `values` and measure the concept's log-probability after each prompt.

    `concept` is a word (all its spellings count together) or token ids. Raises UnknownNeuron, or
    NeuropilError for a word that no token spells.
    """
    name = str(Neuron.parse(neuron, model.sites))
    tokens = list(concept) if not isinstance(concept, str) else Concepts(model.tokens()).ids(concept)
    if not tokens:
        raise NeuropilError(f"no single token of this model spells {concept!r}; give token ids instead")
    change, base, apart = [], [], []
    for prompt in prompts:
        logs = log_probabilities(model, prompt, [{}, *({name: float(v)} for v in values)], where=where)
        word = logs[:, tokens].logsumexp(1)
        change.append(word[1:] - word[0])
        base.append(word[0])
        apart.append(divergence(logs, tokens))
    return Sweep(
        name,
        [float(v) for v in values],
        tokens,
        torch.stack(change, 1),
        torch.stack(base),
        torch.stack(apart, 1),
    )


def divergence(logs: Float[Tensor, "rows V"], without: Sequence[int]) -> Float[Tensor, " others"]:
    """KL(row 0 || row b) of the distributions over the tokens other than `without`, for every row b > 0."""
    rest = logs.clone()
    rest[:, list(without)] = -torch.inf
    rest = rest.log_softmax(1)
    p = rest[0].exp()
    return torch.where(p > 0, p * (rest[0] - rest[1:]), 0.0).sum(1)
