r"""What does each neuron stand for? Push its weights through the output head.

A transformer's MLP computes $h = \sigma(W_{gate} x) \odot (W_{up} x)$ and writes $y = W_{down} h$ into
the residual stream. Rows of $W_{up}$ and $W_{gate}$ (what a neuron *reads*) and columns of $W_{down}$
(what it *writes*) live in the same space as the rows of the output head $W_U \in R^{V \times d}$, so
for a weight vector $u$ the scores $s = W_U u$ say for which tokens it stands: no data, no training.

    from neuropil import load
    from neuropil.interpret import decode
    table = decode(load("smollm2"))                     # a row a neuron, as pyarrow.Table
    table.filter(...).select(["layer", "index", "label", "up_tokens"])

Scores: ``"dot"`` is the paper's $s_t$; ``"softmax"`` is $p = softmax(s / T)$; ``"cosine"`` is
$s_t / (\lVert u\rVert \lVert w_t\rVert)$, comparable between neurons and the default of the table, because
weight rows are short and the raw softmax is nearly flat; ``"z"`` is $(s_t - mean_V s) / std_V s$.

*The sign trap.* A neuron that detects a token need not promote it: with the gate open, clamping the
up-projection to $v$ moves the logit of $t$ by about
$$\sigma(gate)\,(v - up)\,\langle W_U[t], W_{down}[:, n]\rangle,$$
whatever the sign of $\langle u, W_U[t]\rangle$. So the three cosines (`cos_up`, `cos_gate`, `cos_down`) are
always given together, both sides of each weight are decoded, and `neuropil.interpret.causal` measures
the effect itself. *Hub neurons*, aligned with more than 1 % of the vocabulary at once, are flagged, and every
score stands beside its percentile among random directions: a label is given only above the 95th.

Top tokens are exact (equal to float64 arithmetic up to ties): see `neuropil.topk`. Memory: one site's
weights and the output head (twice, when normalised), whatever the size of the model.

Source: Harry J. Davies, "Decoding specialised feature neurons in LLMs with the final projection
layer", 2025, arXiv:2501.02688. Deviations: the paper decodes up-projections by dot product; here gate
and down are decoded too, and the table ranks by cosine (`score="dot"` gives the paper's ranking). How
the paper normalises probabilities, and whether it folds norm gains, is not stated in what could be
read of it: `up_probability` is the plain softmax, and `fold_norm` is off unless asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

from neuropil.errors import NoNeurons
from neuropil.interpret.concepts import Concepts
from neuropil.interpret.rows import Decoded, as_score, check_score, decode_rows, inverse_norms
from neuropil.models import Model
from neuropil.neurons import Site
from neuropil.topk import InnerProductIndex

__all__ = ["Decoder", "decode", "decode_rows"]

ROLES = ("up", "gate", "down")
NULL_ROWS = 2000
HUB_SHARE = 0.01  # of the vocabulary
NAMED = 95.0  # percentile of the null below which a neuron gets no label
SPECIALISED = 99.0


class Decoder:
    """The method, set up once for a model and called a site at a time (the atlas does so).

    Parameters
    ----------
    which: the weights to decode, any of "up", "gate", "down".
    top_k: tokens kept on each side of each weight.
    score: "cosine" (default) or "dot", "softmax", "z"; decides the ranking and the listed scores.
        Null percentile, specialisation and the triple are cosines in any case.
    fold_norm: fold the gain of the norm before the MLP into up and gate, and of the final norm into down.
    center: subtract the mean embedding from the head (changes cosines, not the dot-product ranking).
    probability: also compute the softmax probability of the best token of "up" (one float32 product more).
    screen: see `neuropil.topk`.

    Raises `ModelError` where the model has no output head or weights are not finite, `NoNeurons` where
    no site reads or writes the space of the head.
    """

    def __init__(
        self,
        model: Model,
        *,
        which: Sequence[str] = ROLES,
        top_k: int = 10,
        score: str = "cosine",
        fold_norm: bool = False,
        center: bool = False,
        probability: bool = True,
        screen: str = "auto",
    ) -> None:
        unknown = [w for w in which if w not in ROLES]
        if unknown or not which:
            raise ValueError(f"weights {list(which)}; expected some of {', '.join(ROLES)}")
        check_score(score)
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; expected 1 or more")
        self.model, self.which, self.top_k, self.score = model, tuple(which), top_k, score
        self.fold_norm, self.center, self.probability = fold_norm, center, probability
        head = model.head()
        self.gain = head.gain
        weight = head.weight.float()
        if center:
            weight = weight - weight.mean(0)
        self.scale = inverse_norms(weight)
        self.cosines = InnerProductIndex(weight, self.scale, screen=screen)
        self._screen = screen
        self._dim = weight.shape[1]
        self.sites = [s for s in model.sites if self.roles(s)]
        if not self.sites:
            raise NoNeurons(f"no MLP of {model.name} reads or writes the {self._dim} dimensions of its output head")

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the values in the table (the screen does not)."""
        return {
            "method": "neuron-decoding",
            "which": list(self.which),
            "top_k": self.top_k,
            "score": self.score,
            "fold_norm": self.fold_norm,
            "center": self.center,
            "probability": self.probability,
        }

    def roles(self, site: Site) -> list[str]:
        """Those of `which` that this site has and that live in the space of the head."""
        return [w for w in self.which if w in site.roles and _fan(self.model, site, w) == self._dim]

    @cached_property
    def dots(self) -> InnerProductIndex:
        """The index without normalisation, for scores other than the cosine."""
        return InnerProductIndex(self.cosines.keys, screen=self._screen)

    def index(self, score: str) -> InnerProductIndex:
        """The index whose ranking is that of `score` (all but the cosine rank as the dot product)."""
        return self.cosines if score == "cosine" else self.dots

    @cached_property
    def concepts(self) -> Concepts:
        return Concepts(self.model.tokens()[: len(self.cosines)])

    @cached_property
    def null(self) -> Float[np.ndarray, " n"]:
        """Largest |cosine| to any token of random Gaussian directions, sorted (fixed seed)."""
        rows = torch.randn(NULL_ROWS, self.cosines.keys.shape[1], generator=torch.Generator().manual_seed(2501))
        found = self.cosines.search(rows / rows.norm(dim=1, keepdim=True), 1, both=True)
        assert found.negative_scores is not None
        return torch.maximum(found.scores[:, 0], -found.negative_scores[:, 0]).sort().values.numpy()

    def percentile(self, cosine: Float[np.ndarray, " n"], draws: int = 1) -> Float[np.ndarray, " n"]:
        """Share of random directions (best of `draws`) whose best token scores lower, in percent."""
        share = np.searchsorted(self.null, cosine) / len(self.null)
        return (100 * share**draws).astype(np.float32)

    def rows(self, site: Site, role: str) -> Float[Tensor, "width d"] | None:
        """The weight vectors of a site's neurons, folded if asked; None where the site has no such weight."""
        if role not in self.roles(site):
            return None
        rows = self.model.rows(site, role)
        if self.fold_norm:
            gain = self.gain if role == "down" else self.model.gain(site)
            rows = rows if gain is None else rows * gain
        return rows

    def columns(self, site: Site) -> dict[str, Any]:
        """All columns of one site, one entry a neuron (the schema is in docs/atlas.md)."""
        weights = {w: rows for w in self.which if (rows := self.rows(site, w)) is not None}
        if not weights:
            raise NoNeurons(f"site {site.name} holds none of {', '.join(self.which)}")
        best: dict[str, Decoded] = {}
        out: dict[str, Any] = {}
        for role in self.which:
            if role in weights:
                best[role], columns = self._weight(role, weights[role])
            else:
                columns = self._absent(role, site.width)
            out |= columns
        return self._label(weights, best, out) | out

    def _weight(self, role: str, rows: Tensor) -> tuple[Decoded, dict[str, Any]]:
        norm = rows.double().norm(dim=1, keepdim=True)
        found = self.cosines.search(rows, self.top_k, both=True)
        cosines = as_score(found, rows, self.cosines, "cosine", 1.0)
        listed = cosines
        if self.score != "cosine":
            dots = self.dots.search(rows, self.top_k, both=True)
            listed = as_score(dots, rows, self.dots, self.score, 1.0)
        assert cosines.negative_scores is not None
        assert listed.negative_tokens is not None
        strongest = torch.maximum(cosines.scores[:, 0], -cosines.negative_scores[:, 0]).numpy()
        side = np.where(cosines.scores[:, 0] >= -cosines.negative_scores[:, 0], 1, -1)
        top = torch.where(torch.from_numpy(side) > 0, listed.tokens[:, 0], listed.negative_tokens[:, 0])
        percentile = self.percentile(strongest)
        columns: dict[str, Any] = {
            f"{role}_label": self._names(top, percentile >= NAMED),
            **self._lists(role, listed.tokens, listed.scores),
            **self._lists(f"{role}_neg", listed.negative_tokens, listed.negative_scores),
            f"{role}_norm": norm.squeeze(1).float().numpy(),
            f"{role}_null": percentile,
            f"{role}_hub_tokens": self._hub_tokens(rows, norm.squeeze(1), cosines, side),
        }
        if role == "up" and self.probability:
            columns["up_probability"] = self.cosines.largest_softmax(rows).numpy()
        return listed if self.score != "cosine" else cosines, columns

    def _absent(self, role: str, width: int) -> dict[str, Any]:
        """An ungated site in a table with gates: the columns are there, and empty."""
        empty: dict[str, Any] = {f"{role}_label": pa.nulls(width, pa.string())}
        for prefix in (role, f"{role}_neg"):
            empty[f"{prefix}_tokens"] = pa.nulls(width, pa.list_(pa.string()))
            empty[f"{prefix}_token_ids"] = pa.nulls(width, pa.list_(pa.int32()))
            empty[f"{prefix}_scores"] = pa.nulls(width, pa.list_(pa.float32()))
        empty |= {f"{role}_{c}": pa.nulls(width, pa.float32()) for c in ("norm", "null")}
        empty[f"{role}_hub_tokens"] = pa.nulls(width, pa.int32())
        if role == "up" and self.probability:
            empty["up_probability"] = pa.nulls(width, pa.float32())
        return empty

    def _hub_tokens(self, rows: Tensor, norm: Tensor, found: Decoded, side: np.ndarray) -> np.ndarray:
        """Tokens on the stronger side above the null's 99th percentile and above half the peak.

        The second bar keeps apart a neuron that is strongly aligned with one word and so, a little, with
        all its kin (*money*: 520 tokens above the null, 20 above half its peak) from one aligned with a
        good part of the vocabulary at once. Counted among the listed tokens; over the whole vocabulary
        only where the whole list exceeds the bar.
        """
        assert found.negative_scores is not None
        sign = torch.from_numpy(side).to(torch.float32)[:, None]
        listed = torch.where(sign > 0, found.scores, -found.negative_scores)
        bar = (listed[:, :1] / 2).clamp_min(float(np.quantile(self.null, 0.99)))
        count = (listed > bar).sum(1)
        full = (count == listed.shape[1]).nonzero().flatten()
        if len(full):
            bars = (bar.squeeze(1) * norm)[full].float()
            count[full] = self.cosines.count_above(rows[full] * sign[full], bars)
        return count.to(torch.int32).numpy()

    def _label(
        self, weights: Mapping[str, Tensor], best: Mapping[str, Decoded], columns: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The neuron's one label: the best token of its most specialised weight, on the stronger side."""
        roles = list(best)
        peaks = np.stack([_peaks(self.cosines, self.scale, weights[r], best[r]) for r in roles])
        signed = np.take_along_axis(peaks, np.abs(peaks).argmax(0)[None], 0)[0]
        role = np.abs(peaks).argmax(0)
        sign = np.where(signed >= 0, 1, -1).astype(np.int8)
        pick = torch.from_numpy(role * 2 + (sign < 0))
        lists = torch.stack([t for r in roles for t in (best[r].tokens, best[r].negative_tokens) if t is not None])
        listed = lists[pick, torch.arange(len(pick))]
        token = listed[:, 0]
        same = self.concepts.group[listed] == self.concepts.group[token][:, None]
        percentile = self.percentile(np.abs(signed), draws=len(roles))
        hub_tokens = np.stack([np.asarray(columns[f"{r}_hub_tokens"]) for r in roles])
        hub = np.take_along_axis(hub_tokens, role[None], 0)[0] > HUB_SHARE * len(self.cosines)
        triple = {
            f"cos_{r}": self._cosine(weights[r], token) if r in weights else pa.nulls(len(token), pa.float32())
            for r in ROLES
            if r in self.which
        }
        return {
            "label": self._names(token, percentile >= NAMED),
            "label_token": token.to(torch.int32).numpy(),
            "label_tokens": _ragged(listed, same),
            "label_from": pa.array(np.array(roles, dtype=object)[role], pa.string()),
            "label_sign": sign,
            **triple,
            "specialisation": (np.abs(signed) / np.quantile(self.null, 0.99)).astype(np.float32),
            "null_percentile": percentile,
            "coherence": same.float().mean(1).numpy(),
            "hub": hub,
            "specialised": (percentile >= SPECIALISED) & ~hub,
        }

    def _cosine(self, rows: Tensor, token: Tensor) -> np.ndarray:
        near = self.cosines.keys[token].double()
        dot = (rows.double() * near).sum(1) * self.scale[token].double()
        return (dot / rows.double().norm(dim=1).clamp_min(1e-300)).float().numpy()

    def _names(self, tokens: Tensor, named: np.ndarray) -> pa.Array:
        words = [self.concepts.label(t) if n else "" for t, n in zip(tokens.tolist(), named, strict=True)]
        return pa.array(words, pa.string())

    @cached_property
    def _vocabulary(self) -> pa.Array:
        return pa.array(self.concepts.tokens, pa.string())

    def _lists(self, prefix: str, tokens: Tensor, scores: Tensor | None) -> dict[str, Any]:
        assert scores is not None
        offsets = np.arange(0, tokens.numel() + 1, tokens.shape[1], dtype=np.int32)
        ids = pa.array(tokens.flatten().to(torch.int32).numpy())
        values = {
            "tokens": self._vocabulary.take(ids),
            "token_ids": ids,
            "scores": pa.array(scores.flatten().float().numpy()),
        }
        return {f"{prefix}_{n}": pa.ListArray.from_arrays(offsets, v) for n, v in values.items()}


def decode(model: Model, *, layers: Iterable[int] | None = None, progress: bool = True, **settings: Any) -> pa.Table:
    """Decode every neuron of a model (or of some layers): a row a neuron. Settings are `Decoder`'s."""
    decoder = Decoder(model, **settings)
    wanted = None if layers is None else set(layers)
    sites = [s for s in decoder.sites if wanted is None or s.layer in wanted]
    if not sites:
        known = sorted({s.layer for s in decoder.sites})
        raise IndexError(f"no layer of {sorted(wanted or ())} is there; this model has {known[0]} to {known[-1]}")
    tables = []
    for site in track(sites, "decoding", disable=not progress):
        place = {
            "neuron": [f"{site.number}:{i}" for i in range(site.width)],
            "site": np.full(site.width, site.number, np.int32),
            "layer": np.full(site.width, site.layer, np.int32),
            "index": np.arange(site.width, dtype=np.int32),
        }
        tables.append(pa.table(place | decoder.columns(site)))
    return pa.concat_tables(tables)


def _fan(model: Model, site: Site, role: str) -> int | None:
    """Length of the vectors of a weight, known without reading it; None for filters."""
    weight = site.weight(role)
    shape = list(model.skeleton.get_parameter(weight.name).shape)
    if weight.expert is not None:
        del shape[0]
    return shape[1 - weight.axis] if len(shape) == 2 and weight.block == 1 else None


def _peaks(index: InnerProductIndex, scale: Tensor, rows: Tensor, found: Decoded) -> np.ndarray:
    """The cosine of the best token on the stronger side, signed."""
    assert found.negative_tokens is not None
    norm = rows.double().norm(dim=1).clamp_min(1e-300)
    ends = [
        (rows.double() * index.keys[tokens].double()).sum(1) * scale[tokens].double() / norm
        for tokens in (found.tokens[:, 0], found.negative_tokens[:, 0])
    ]
    return torch.where(ends[0] >= -ends[1], ends[0], ends[1]).numpy()


def _ragged(listed: Tensor, keep: Tensor) -> pa.Array:
    """The kept entries of every row as a list column."""
    offsets = np.concatenate([[0], keep.sum(1).cumsum(0).numpy()]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(listed[keep].to(torch.int32).numpy()))
