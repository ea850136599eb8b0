"""Words: a tokeniser, a vocabulary, the language model p(d) of descriptions, BLEU and ROUGE.

The tokeniser lower-cases and keeps every word and every sign (the paper's is spaCy's, with the same choices):

>>> tokens("Blue stripes, and red-and-white ones.")
['blue', 'stripes', ',', 'and', 'red', '-', 'and', '-', 'white', 'ones', '.']
>>> words = Vocabulary.of(["a red ball", "a blue ball"])
>>> words.encode(["a red cat"], length=5).tolist()  # start, a, red, unknown, stop, padding
[[0, 4, 7, 3, 1, 2]]
>>> words.decode(words.encode(["a blue ball"], length=5))
['a blue ball']
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import log_softmax

START, STOP, PAD, UNKNOWN = 0, 1, 2, 3
SPECIAL = ("<start>", "<stop>", "<pad>", "<unk>")

_TOKEN = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]|_")


def tokens(sentence: str) -> list[str]:
    return _TOKEN.findall(sentence.lower())


class Vocabulary:
    """The words of the descriptions, after four special tokens."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = (*SPECIAL, *words)
        self.places = {word: place for place, word in enumerate(self.words)}
        if len(self.places) != len(self.words):
            raise ValueError("a word is in the vocabulary twice; give each once, and none of the special tokens")

    @classmethod
    def of(cls, sentences: Iterable[str], least: int = 1) -> Vocabulary:
        """All words that occur `least` times or more, in alphabetical order."""
        counts = Counter(token for sentence in sentences for token in tokens(sentence))
        return cls(sorted(word for word, count in counts.items() if count >= least))

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)

    def encode(self, sentences: Sequence[str], length: int) -> Int[Tensor, "sentences length_1"]:
        """A row a sentence: start, at most `length` tokens (stop the last of them where it fits), padding."""
        out = torch.full((len(sentences), length + 1), PAD)
        out[:, 0] = START
        for row, sentence in enumerate(sentences):
            ids = [*(self.places.get(token, UNKNOWN) for token in tokens(sentence)), STOP][:length]
            out[row, 1 : len(ids) + 1] = torch.tensor(ids)
        return out

    def decode(self, ids: Int[Tensor, "sentences length"]) -> list[str]:
        """Sentences up to the first stop; start and padding are skipped, signs close up to their words."""
        found = []
        for row in ids.tolist():
            row = row[: row.index(STOP)] if STOP in row else row
            text = " ".join(self.words[i] for i in row if i not in (START, PAD))
            text = re.sub(r" ([,.;:!?)])", r"\1", text)
            found.append(re.sub(r" ?- ?", "-", text))
        return found


def live(targets: Int[Tensor, "*batch length"]) -> Tensor:
    """Which tokens count: all up to and with the first stop."""
    stopped = (targets == STOP).cumsum(-1) - (targets == STOP).int()
    return (stopped == 0) & (targets != PAD)


class LanguageModel(nn.Module):
    """p(d): an LSTM of two layers over the words of descriptions alone.

    Parameters as in the paper: embedding 128, hidden 512, dropout 0.5. `step` and `start` make it searchable (see
    `search`): tokens `[n, beams]`, states `[n, beams, ...]`.
    """

    def __init__(
        self, vocabulary: Vocabulary, embedding: int = 128, hidden: int = 512, layers: int = 2, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.embed = nn.Embedding(len(vocabulary), embedding, padding_idx=PAD)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, len(vocabulary))

    def forward(self, captions: Int[Tensor, "n length"]) -> Float[Tensor, "n shorter words"]:
        """log p of each token after the first, given those before it."""
        h, _ = self.lstm(self.embed(captions[:, :-1]))
        return log_softmax(self.out(self.drop(h)), -1)

    def score(self, captions: Int[Tensor, "n length"]) -> Float[Tensor, " n"]:
        """log p(d) of whole captions, which begin with the start token; what comes after the first stop is ignored."""
        return sequence_score(self(captions), captions)

    def start(self, n: int) -> tuple[Tensor, ...]:
        zero = self.out.weight.new_zeros(n, 1, self.lstm.num_layers, self.lstm.hidden_size)
        return zero, zero

    def step(
        self, words: Int[Tensor, "n beams"], state: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "n beams words"], tuple[Tensor, ...]]:
        n, beams = words.shape
        h, c = (part.flatten(0, 1).transpose(0, 1).contiguous() for part in state)
        out, (h, c) = self.lstm(self.embed(words.flatten())[:, None], (h, c))
        log_p = log_softmax(self.out(self.drop(out[:, 0])), -1)
        return log_p.unflatten(0, (n, beams)), tuple(x.transpose(0, 1).unflatten(0, (n, beams)) for x in (h, c))


def sequence_score(log_p: Float[Tensor, "n steps words"], captions: Int[Tensor, "n length"]) -> Float[Tensor, " n"]:
    targets = captions[:, 1:]
    each = log_p.gather(2, targets[:, :, None])[:, :, 0]
    return (each * live(targets)).sum(1)


def bleu(found: Sequence[str], references: Sequence[Sequence[str]], order: int = 4) -> float:
    """Corpus BLEU in percent of our tokens, with several references a sentence and sacrebleu's smoothing ("exp").

    >>> bleu(["a red ball above a square"], [["a red ball above a square", "a ball"]])
    100.0
    """
    right, total = [0] * order, [0] * order
    long = close = 0
    for sentence, those in zip(found, references, strict=True):
        words, lists = tokens(sentence), [tokens(r) for r in those]
        long += len(words)
        close += min((len(r) for r in lists), key=lambda size: (abs(size - len(words)), size))
        for n in range(1, order + 1):
            mine = _grams(words, n)
            most: Counter[tuple[str, ...]] = Counter()
            for r in lists:
                most |= _grams(r, n)
            right[n - 1] += (mine & most).total()
            total[n - 1] += mine.total()
    if not total[-1] or not right[0]:
        return 0.0
    halved, logs = 1.0, 0.0
    for hits, count in zip(right, total, strict=True):
        if not hits:
            halved *= 2
        logs += math.log(hits / count if hits else 1 / (halved * count))
    penalty = min(0.0, 1 - close / long)
    return min(100.0, 100 * math.exp(logs / order + penalty))


def rouge_l(found: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean ROUGE-L in percent: F1 of the longest common subsequence of words, with the reference it fits best.

    >>> round(rouge_l(["a red ball"], [["one red and round ball", "boxes"]]), 6)  # "red ball": 2 of 3 and of 5
    50.0
    """
    scores = []
    for sentence, those in zip(found, references, strict=True):
        words, lists = tokens(sentence), [tokens(r) for r in those]
        scores.append(max(2 * _common(words, r) / max(1, len(words) + len(r)) for r in lists))
    return 100 * sum(scores) / len(scores)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for place, other in enumerate(b):
            row.append(before[place] + 1 if word == other else max(before[place + 1], row[-1]))
    return row[-1]


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))
