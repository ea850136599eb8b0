"""p(d | E): a decoder that looks at the exemplars of a unit while it writes (Show, Attend and Tell).

    h_0 = tanh(W_h mean_j v_j)          c_0 = tanh(W_c mean_j v_j)
    a = softmax_j(w . tanh(W_q h + W_k v_j))        context = sigmoid(W_g h) * sum_j a_j v_j
    h, c = LSTM([embedding; context], (h, c))       p = softmax(W_o dropout(h))

over the vectors v_j of the exemplars (`encoder`). Mean and attention are functions of a set: their order says nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from neuropil.interpret.milan.language import PAD, Vocabulary, live, sequence_score


class Captioner(nn.Module):
    """Writes descriptions of sets of vectors `keys` `[n, k, features]`; the paper's sizes by default.

    `standardise` brings the features to mean 0 and spread 1 over given vectors first; the paper does not.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, vocabulary: Vocabulary, features: int, embedding: int = 128, hidden: int = 512, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.vocabulary, self.features = vocabulary, features
        attention = min(512, features)
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.embed = nn.Embedding(len(vocabulary), embedding, padding_idx=PAD)
        self.first_h, self.first_c = nn.Linear(features, hidden), nn.Linear(features, hidden)
        self.query = nn.Linear(hidden, attention)
        self.key = nn.Linear(features, attention)
        self.weigh = nn.Linear(attention, 1)
        self.gate = nn.Linear(hidden, features)
        self.cell = nn.LSTMCell(embedding + features, hidden)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, len(vocabulary))

    def standardise(self, keys: Float[Tensor, "n k features"]) -> None:
        self.shift.copy_(keys.mean((0, 1)))
        self.scale.copy_(keys.std((0, 1)).clamp_min(1e-6))

    def start(self, keys: Float[Tensor, "n k features"]) -> tuple[Tensor, ...]:
        """The state before the first word: h and c, then what attention needs, one beam a row."""
        if keys.shape[2] != self.features:
            raise ValueError(f"vectors of {keys.shape[2]} features; this captioner was made for {self.features}")
        mean = (keys.mean(1) - self.shift) / self.scale
        return self.first_h(mean).tanh()[:, None], self.first_c(mean).tanh()[:, None]

    def looker(self, keys: Float[Tensor, "n k features"]) -> Looker:
        return Looker(self, keys)

    def forward(
        self, keys: Float[Tensor, "n k features"], captions: Int[Tensor, "n length"]
    ) -> tuple[Float[Tensor, "n shorter words"], Float[Tensor, "n shorter k"]]:
        """log p of each token after the first, given those before it, and what was looked at."""
        look, state = self.looker(keys), self.start(keys)
        hidden, attention = [], []
        for t in range(captions.shape[1] - 1):
            h, c, a = look.advance(captions[:, t : t + 1], state)
            state = (h, c)
            hidden.append(h[:, 0])
            attention.append(a[:, 0])
        log_p = log_softmax(self.out(self.drop(torch.stack(hidden, 1))), -1)
        return log_p, torch.stack(attention, 1)

    def score(self, keys: Float[Tensor, "n k features"], captions: Int[Tensor, "n length"]) -> Float[Tensor, " n"]:
        """log p(d | E) of whole captions, which begin with the start token."""
        return sequence_score(self(keys, captions)[0], captions)

    def loss(self, keys: Float[Tensor, "n k features"], captions: Int[Tensor, "n length"]) -> Float[Tensor, ""]:
        """Likelihood of the words, and attention that over a caption comes to every exemplar about once."""
        log_p, attention = self(keys, captions)
        targets = captions[:, 1:]
        inside = live(targets)
        likely = -(log_p.gather(2, targets[:, :, None])[:, :, 0] * inside).sum() / inside.sum()
        spread = (1 - (attention * inside[:, :, None]).sum(1)).square().mean()
        return likely + spread


class Looker:
    """A captioner before given exemplars, whose keys are projected once; steps `[n, beams]` tokens at a time."""

    def __init__(self, captioner: Captioner, keys: Float[Tensor, "n k features"]) -> None:
        self.net, self.keys = captioner, (keys - captioner.shift) / captioner.scale
        self.projected = captioner.key(self.keys)[:, None]

    def advance(self, words: Int[Tensor, "n beams"], state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        net, (h, c) = self.net, state
        n, beams = words.shape
        scores = net.weigh((net.query(h)[:, :, None] + self.projected).tanh())[..., 0]  # [n, beams, k]
        attention = scores.softmax(2)
        context = (attention @ self.keys) * net.gate(h).sigmoid()
        into = torch.cat([net.embed(words), context], 2)
        h, c = net.cell(into.flatten(0, 1), (h.flatten(0, 1), c.flatten(0, 1)))
        return h.unflatten(0, (n, beams)), c.unflatten(0, (n, beams)), attention

    def step(
        self, words: Int[Tensor, "n beams"], state: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "n beams words"], tuple[Tensor, ...]]:
        h, c, _ = self.advance(words, state)
        return log_softmax(self.net.out(self.net.drop(h)), -1), (h, c)
