"""Tokens of one word, joined: " Dog", "dogs" and "dog" are the concept *dog*.

A vocabulary spells a word many ways (with and without the leading space, in capitals, inflected).
`Concepts` gives every token the number of its word, so that labels can be told apart by meaning
rather than by spelling, with array arithmetic only.

    >>> c = Concepts([" dog", "dogs", "DOG", " cat", "!", ""])
    >>> c.group[:3].unique().numel(), c.label(0), c.label(3)
    (1, 'dog', 'cat')
"""

from __future__ import annotations

from collections.abc import Sequence

import snowballstemmer
import torch
from jaxtyping import Int
from torch import Tensor

_stemmer = snowballstemmer.stemmer("english")


def stem(text: str) -> str:
    """The word that a token spells: stripped, case-folded, without inflection.

    >>> stem(" Dogs"), stem("running"), stem(" 42"), stem("!")
    ('dog', 'run', '42', '!')
    """
    word = text.strip().casefold()
    return _stemmer.stemWord(word) if word.isalpha() else word


class Concepts:
    """The words behind a vocabulary.

    `group[t]` is the number of token `t`'s word; tokens that are blank keep a group of their own.
    """

    group: Int[Tensor, " V"]

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = list(tokens)
        numbers: dict[str, int] = {}
        words = [stem(t) or f"\0{i}" for i, t in enumerate(self.tokens)]
        self.group = torch.tensor([numbers.setdefault(w, len(numbers)) for w in words], dtype=torch.int64)
        self._numbers = numbers

    def label(self, token: int) -> str:
        """How a token's word is written for a reader: the token itself without blanks."""
        return self.tokens[token].strip()

    def ids(self, word: str) -> list[int]:
        """All tokens that spell `word` in any case, spacing or inflection.

        >>> Concepts([" dog", "dogs", "cat"]).ids("Dog")
        [0, 1]
        """
        number = self._numbers.get(stem(word))
        return [] if number is None else (self.group == number).nonzero().flatten().tolist()
