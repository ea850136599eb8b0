"""Any rows through any unembedding: scores, exact best tokens, moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuropil.topk import InnerProductIndex, TopK

SCORES = ("dot", "softmax", "cosine", "z")


@dataclass(frozen=True)
class Decoded:
    """The tokens of each row, best first; `negative_*` from the other side, most negative first."""

    scores: Float[Tensor, "n k"]
    tokens: Int[Tensor, "n k"]
    negative_scores: Float[Tensor, "n k"] | None = None
    negative_tokens: Int[Tensor, "n k"] | None = None


def decode_rows(
    rows: Float[Tensor, "n d"],
    unembedding: Float[Tensor, "V d"],
    *,
    score: str = "dot",
    side: Literal["positive", "both"] = "both",
    top_k: int = 10,
    temperature: float = 1.0,
    screen: str = "auto",
) -> Decoded:
    """Decode any rows through any unembedding (a language model's head, a CLIP text head, item vectors).

    >>> head = torch.eye(5)
    >>> decode_rows(torch.tensor([[0.0, 3.0, -2.0, 1.0, 0.0]]), head, top_k=2).tokens.tolist()
    [[1, 3]]

    Raises `ValueError` for an unknown score or rows of another dimension than the unembedding's, and
    `ModelError` for weights that are not finite.
    """
    check_score(score)
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    scale = inverse_norms(unembedding) if score == "cosine" else None
    index = InnerProductIndex(unembedding, scale, screen=screen)
    found = index.search(rows, top_k, both=side == "both")
    return as_score(found, rows, index, score, temperature)


def check_score(score: str) -> None:
    if score not in SCORES:
        raise ValueError(f"score is {score!r}; expected 'dot', 'softmax', 'cosine' or 'z'")


def as_score(found: TopK, rows: Tensor, index: InnerProductIndex, score: str, temperature: float) -> Decoded:
    """Turn dot products into the score asked for; none of them changes a row's ranking."""
    shift: Tensor | float = 0.0
    size: Tensor | float = 1.0
    if score == "cosine":
        size = rows.double().norm(dim=1, keepdim=True).clamp_min(1e-300)
    elif score == "z":
        mean, std = Moments(index.keys)(rows)
        shift, size = mean[:, None], std[:, None].clamp_min(1e-300)
    elif score == "softmax":
        shift, size = temperature * index.logsumexp(rows / temperature)[:, None].double(), temperature

    def turn(s: Tensor | None) -> Tensor | None:
        if s is None:
            return None
        turned = (s - shift) / size
        return (turned.exp() if score == "softmax" else turned).float()

    positive = turn(found.scores)
    assert positive is not None
    return Decoded(positive, found.tokens, turn(found.negative_scores), found.negative_tokens)


class Moments:
    """Mean and standard deviation of rows' scores over all keys, without forming the scores.

    mean = <u, mean(W)> and var = u^T Cov(W) u: a d x d matrix, made once, serves every row.
    """

    def __init__(self, keys: Float[Tensor, "V d"]) -> None:
        self.mean = keys.double().mean(0)
        centred = (tile.double() - self.mean for tile in keys.split(8192))
        empty = torch.zeros(len(self.mean), len(self.mean), dtype=torch.float64)
        self.covariance = sum((tile.T @ tile for tile in centred), empty) / len(keys)

    def __call__(self, rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        u = rows.double()
        return u @ self.mean, ((u @ self.covariance) * u).sum(1).clamp_min(0).sqrt()


def inverse_norms(weight: Float[Tensor, "V d"]) -> Float[Tensor, " V"]:
    """1 / norm of every row; a row of zeros (an unused token) scores 0 with everything."""
    norms = torch.cat([t.double().norm(dim=1) for t in weight.split(8192)])
    return torch.where(norms > 0, 1 / norms.clamp_min(1e-300), 0.0)
