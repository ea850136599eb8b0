"""Which neurons the tokens of a text use most: token-wise core neurons, and how often each neuron is one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neuropil.errors import ModelError

SCORES = ("abs", "signed")
_ROUNDING = 1e-9  # so that 0.29 of 100 is 29


def share_of(share: float, number: float | int) -> int:
    """`int(share * number)`, as if shares were exact decimals."""
    return int(share * number + _ROUNDING)


def token_core(h: Float[Tensor, "tokens width"], alpha: float, score: str = "abs") -> Bool[Tensor, "tokens width"]:
    """The token-wise core neurons: of each token's neurons with a positive score, the largest `limit`.

    `limit` is alpha times the mean number of positive scores a token (at least 1), one for all tokens; of equal scores
    the lower index comes first.

    >>> token_core(torch.tensor([[3.0, 1.0, -4.0, 1.0, 0.0]]), alpha=0.7, score="signed")
    tensor([[ True,  True, False, False, False]])
    """
    value = _value(h, score)
    positive = value > 0
    limit = min(max(1, share_of(alpha, float(positive.sum()) / max(1, len(value)))), value.shape[1])
    threshold = value.topk(limit, dim=1).values[:, -1:]
    above, tied = value > threshold, value == threshold
    return (above | (tied & (tied.cumsum(1) <= limit - above.sum(1, keepdim=True)))) & positive


def _value(h: Tensor, score: str) -> Tensor:
    if not bool(torch.isfinite(h).all()):
        raise ModelError("activations are NaN or infinite: the model's weights are damaged")
    return h.abs() if score == "abs" else h


@dataclass
class Usage:
    """How often each neuron of one site was a token's core neuron, and the sum of its scores there."""

    counts: Float[Tensor, " width"]
    sizes: Float[Tensor, " width"]
    tokens: int = 0

    @classmethod
    def none(cls, width: int, device: torch.device | None = None) -> Usage:
        counts = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(counts, counts.clone())

    def add(self, h: Float[Tensor, "tokens width"], alpha: float, score: str) -> None:
        core = token_core(h, alpha, score)
        self.counts += core.sum(0)
        self.sizes += (_value(h, score).double() * core).sum(0)
        self.tokens += len(h)

    def fade(self) -> None:
        """Let what was seen so far count half."""
        self.counts /= 2
        self.sizes /= 2

    def ranking(self) -> Int[Tensor, " used"]:
        """Neurons that were ever core: the most frequent first, of those the larger, then the lower index."""
        by_size = self.sizes.argsort(descending=True, stable=True)
        order = by_size[self.counts[by_size].argsort(descending=True, stable=True)]
        return order[: int((self.counts > 0).sum())]

    def core(self, keep: float) -> Int[Tensor, " kept"]:
        """The sentence-wise core neurons, in ascending order: the first `keep` of all neurons in the ranking.

        Fewer where fewer were ever used; all neurons for `keep=1`.
        """
        width = len(self.counts)
        if keep == 1:
            return torch.arange(width, device=self.counts.device)
        return self.ranking()[: share_of(keep, width)].sort().values


def jaccard(a: Int[Tensor, " a"], b: Int[Tensor, " b"]) -> float:
    """Size of the intersection over size of the union of two sets of neurons.

    >>> jaccard(torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]))
    0.5
    """
    both = int(torch.isin(a, b).sum())
    return both / max(1, len(a) + len(b) - both)
