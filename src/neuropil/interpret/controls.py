"""Random tokens to compare a label's tokens with: as common, as long, and of another word.

A token's number stands for how common it is (byte-pair merges are made in order of frequency), the norm of
its row of the output head for how far any change of the hidden state moves it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["MatchedTokens"]

DRAWS = 12  # candidates a control is chosen from: the closest in norm wins
WINDOW = 0.05  # candidates' numbers differ from the label token's by at most this share of the vocabulary
LEAST = 250  # ... or by this many numbers, if that is more


class MatchedTokens:
    """Draws control tokens from a vocabulary.

    `norms` are the norms of the head's rows, `texts` the tokens' texts (None if unknown). A control never
    shares the first three letters (case and blanks aside) with a token of the label, which keeps
    inflections and spellings out.

        >>> m = MatchedTokens(torch.ones(10_000), [f"{i:05d}" for i in range(10_000)])
        >>> c = m.draw(torch.tensor([[5000, 5100]]), torch.tensor([2]), k=4, seed=0)
        >>> c.shape, bool(((c - 5050).abs() <= 550).all()), bool((c // 100 != 50).all())
        (torch.Size([1, 4]), True, True)
    """

    def __init__(self, norms: Float[Tensor, " V"], texts: Sequence[str] | None = None) -> None:
        self.norms = norms
        if texts is None:
            self.word = torch.arange(len(norms))
        else:
            codes: dict[str, int] = {}
            stems = [text.strip().casefold()[:3] or f"\0{i}" for i, text in enumerate(texts[: len(norms)])]
            self.word = torch.tensor([codes.setdefault(s, len(codes)) for s in stems])

    def draw(self, labels: Int[Tensor, "n l"], counts: Int[Tensor, " n"], k: int, seed: int) -> Int[Tensor, "n k"]:
        """`k` controls a row, control `j` matched to the label's token `j mod count`; `labels` is padded
        beyond `counts`. The same seed gives the same tokens, whatever other seeds were used before."""
        n, vocabulary = len(labels), len(self.norms)
        generator = torch.Generator().manual_seed(seed)
        slot = torch.arange(k)[None, :] % counts.clamp(min=1)[:, None]
        target = labels.gather(1, slot)
        reach = max(LEAST, round(WINDOW * vocabulary))
        low = (target - reach).clamp(0, max(vocabulary - 2 * reach - 1, 0))
        width = min(2 * reach + 1, vocabulary)
        drawn = low[..., None] + torch.randint(width, (n, k, DRAWS), generator=generator)
        distance = (self.norms[drawn] / self.norms[target][..., None]).log().abs()
        padded = torch.arange(labels.shape[1])[None, :] >= counts[:, None]
        own = self.word[labels].masked_fill(padded, -1)
        for column in own.unbind(1):
            distance[self.word[drawn] == column[:, None, None]] = torch.inf
        chosen = torch.full((n, k), -1)
        for j in range(k):  # one after another, so that no token is its row's control twice
            again = (drawn[:, j, :, None] == chosen[:, None, :j]).any(-1)
            nearest = distance[:, j].masked_fill(again, torch.inf).argmin(-1, keepdim=True)
            chosen[:, j] = drawn[:, j].gather(1, nearest)[:, 0]
        return chosen
