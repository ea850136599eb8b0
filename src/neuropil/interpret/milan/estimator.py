"""The estimator: regions and sentences in, descriptions of regions out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from neuropil.errors import ModelError
from neuropil.interpret.milan.captioner import Captioner
from neuropil.interpret.milan.encoder import RegionEncoder
from neuropil.interpret.milan.exemplars import ExemplarSet
from neuropil.interpret.milan.language import PAD, LanguageModel, Vocabulary, bleu
from neuropil.interpret.milan.search import Found, search
from neuropil.training import Run, fit

Regions = Any  # an ExemplarSet, a pair (pictures, masks), or vectors [units, k, features]


@dataclass(frozen=True)
class Description:
    """A sentence, its score log p(d|E) - lam log p(d), and the two log-probabilities; empty for a dead unit."""

    text: str
    score: float
    given: float
    prior: float


class MILAN(BaseEstimator):
    """Describes the units of a vision network in sentences; see `neuropil.interpret.milan`.

    Parameters
    ----------
    encoder: a `RegionEncoder`; None where regions are given as vectors `[units, k, features]`.
    lam: the prior's share of the score. beam, length: of the search. strategy, mi: see `search`.
    embedding, hidden, dropout: of captioner and language model.
    lr, batch_size, epochs: of the captioner (AdamW). lm_batch_size, lm_epochs: of the language model.
    patience: epochs without a better BLEU of greedy sentences of held-out units (captioner) or a lower loss of their
        sentences (language model) after which training ends; the best weights are kept. Of equal BLEU, as of sentences
        under four words that have none, the likelier counts as better.
    hold_out: the share of units held out for this.
    standardise: bring features to one scale before the captioner, which then learns faster (the paper does not).
    random_state: decides the split, the weights and the order of training.
    """

    def __init__(
        self,
        encoder: RegionEncoder | None = None,
        *,
        lam: float = 0.2,
        beam: int = 50,
        length: int = 15,
        strategy: str = "rerank",
        mi: bool = False,
        embedding: int = 128,
        hidden: int = 512,
        dropout: float = 0.5,
        lr: float = 1e-3,
        batch_size: int = 64,
        epochs: int = 1000,
        lm_batch_size: int = 128,
        lm_epochs: int = 100,
        patience: int = 4,
        hold_out: float = 0.1,
        standardise: bool = False,
        random_state: int = 0,
    ) -> None:
        self.encoder = encoder
        self.lam = lam
        self.beam = beam
        self.length = length
        self.strategy = strategy
        self.mi = mi
        self.embedding = embedding
        self.hidden = hidden
        self.dropout = dropout
        self.lr = lr
        self.batch_size = batch_size
        self.epochs = epochs
        self.lm_batch_size = lm_batch_size
        self.lm_epochs = lm_epochs
        self.patience = patience
        self.hold_out = hold_out
        self.standardise = standardise
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False  # a unit is a set of vectors, and its target a sentence
        tags.input_tags.three_d_array = True
        tags.target_tags.required = True
        return tags

    def fit(self, X: Regions, y: Sequence[str] | Sequence[Sequence[str]]) -> MILAN:
        """Learn from regions and what people say of them: one sentence or several a unit."""
        keys, said = self.vectors(X), sentences(y)
        if len(keys) != len(said):
            raise ValueError(f"{len(keys)} units and sentences of {len(said)}; expected as many")
        if len(keys) < 2:
            raise ValueError("one unit alone: at least two are needed, one of them to hold out")
        order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(self.random_state)).tolist()
        held = max(1, round(self.hold_out * len(keys)))
        test, train = sorted(order[:held]), sorted(order[held:])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random_state)
            self.vocabulary_ = Vocabulary.of(sentence for unit in train for sentence in said[unit])
            self.captioner_ = Captioner(self.vocabulary_, keys.shape[2], self.embedding, self.hidden, self.dropout)
            self.lm_ = LanguageModel(self.vocabulary_, self.embedding, self.hidden, 2, self.dropout)
        if self.standardise:
            self.captioner_.standardise(keys[train])
        self.bleu_ = self._fit_captioner(keys, said, train, test)
        self.lm_loss_ = self._fit_lm(said, train, test)
        return self

    def vectors(self, X: Regions) -> Float[Tensor, "units k features"]:
        """The regions as vectors, through the encoder unless they are vectors already."""
        if isinstance(X, ExemplarSet | tuple):
            if self.encoder is None:
                raise ValueError("pictures need an encoder: MILAN(encoder=RegionEncoder(net, layers)), or give vectors")
            return self.encoder.encode(X)
        keys = torch.as_tensor(X if isinstance(X, Tensor) else np.asarray(X)).float()
        if keys.dim() != 3:
            raise ValueError(f"vectors {list(keys.shape)}; expected [units, exemplars, features]")
        return keys

    def _fit_captioner(self, keys: Tensor, said: list[list[str]], train: list[int], test: list[int]) -> float:
        unit = torch.tensor([u for u in train for _ in said[u]])
        captions = self.vocabulary_.encode([s for u in train for s in said[u]], self.length)
        net = self.captioner_

        def loss(model: nn.Module, batch: Any) -> Tensor:
            rows, words = batch
            return net.loss(keys[rows], words[:, : longest(words)])

        rows = torch.tensor([u for u in test for _ in said[u]])
        held = self.vocabulary_.encode([s for u in test for s in said[u]], self.length)

        @torch.no_grad()
        def quality() -> tuple[float, float]:
            """BLEU, and where that is the same (none, for very short sentences) the likelihood."""
            found = search(net, keys[test], strategy="greedy", length=self.length, lam=0.0)
            value = bleu(self.vocabulary_.decode(found.tokens[:, 0]), [said[u] for u in test])
            net.eval()
            likely = float(net.score(keys[rows], held).mean())
            net.train()
            return value, likely

        return self._train(net, (unit, captions), loss, quality, self.batch_size, self.epochs)[0]

    def _fit_lm(self, said: list[list[str]], train: list[int], test: list[int]) -> float:
        captions, held = (
            self.vocabulary_.encode([s for u in part for s in said[u]], self.length) for part in (train, test)
        )
        net = self.lm_

        def mean_loss(words: Tensor) -> Tensor:
            return -net.score(words).sum() / (words[:, 1:] != PAD).sum()

        def loss(model: nn.Module, batch: Any) -> Tensor:
            return mean_loss(batch[0][:, : longest(batch[0])])

        @torch.no_grad()
        def quality() -> tuple[float, float]:
            net.eval()
            value = -float(mean_loss(held))
            net.train()
            return value, 0.0

        return -self._train(net, (captions,), loss, quality, self.lm_batch_size, self.lm_epochs)[0]

    def _train(
        self,
        net: nn.Module,
        data: tuple[Tensor, ...],
        loss: Callable[[nn.Module, Any], Tensor],
        quality: Callable[[], tuple[float, float]],
        batch_size: int,
        epochs: int,
    ) -> tuple[float, float]:
        """Train until the quality has not risen for `patience` epochs; the best weights stay."""
        best, since, kept = (-math.inf, -math.inf), 0, {}
        batches = -(-len(data[0]) // batch_size)

        def watch(run: Run) -> bool:
            nonlocal best, since, kept
            if run.step % batches:
                return False
            now = quality()
            since += 1
            if now > best:
                best, since, kept = now, 0, {name: p.clone() for name, p in net.state_dict().items()}
            return since >= self.patience

        optimizer = torch.optim.AdamW(net.parameters(), lr=self.lr)
        fit(net, data, loss, optimizer, epochs=epochs, batch_size=batch_size, callbacks=[watch],
            seed=self.random_state, progress=False)  # fmt: skip
        net.load_state_dict(kept)
        net.eval()
        return best

    def search(self, X: Regions, **changes: Any) -> Found:
        """All sentences that the search found, with their scores; `changes` are settings of `search`."""
        check_is_fitted(self)
        settings = {name: getattr(self, name) for name in ("lam", "beam", "length", "strategy", "mi")} | changes
        if settings["strategy"] == "sample":
            settings.setdefault("generator", torch.Generator().manual_seed(self.random_state))
        keys = self.vectors(X)
        parts = [search(self.captioner_, part, self.lm_, **settings) for part in keys.split(32)]
        return Found(*(torch.cat([getattr(p, f) for p in parts]) for f in ("tokens", "score", "given", "prior")))

    def describe(self, X: Regions, **changes: Any) -> list[Description]:
        """A description a unit. Dead units of an `ExemplarSet` get an empty one: there is nothing to describe."""
        found = self.search(X, **changes)
        dead = X.dead.tolist() if isinstance(X, ExemplarSet) else [False] * len(found.tokens)
        texts = self.vocabulary_.decode(found.tokens[:, 0])
        numbers = torch.stack([found.score[:, 0], found.given[:, 0], found.prior[:, 0]], 1).tolist()
        nothing = Description("", math.nan, math.nan, math.nan)
        return [nothing if d else Description(t, *n) for t, n, d in zip(texts, numbers, dead, strict=True)]

    def predict(self, X: Regions) -> np.ndarray:
        """The descriptions as numbers: the places of their words in `vocabulary_`, `[units, length]`."""
        return self.search(X).tokens[:, 0].numpy()

    def score(self, X: Regions, y: Sequence[str] | Sequence[Sequence[str]]) -> float:
        """Corpus BLEU of the descriptions against what people say, in percent."""
        return bleu([d.text for d in self.describe(X)], sentences(y))

    def save(self, folder: str | Path) -> Path:
        """Into a folder: settings, vocabulary and weights; the encoder's network is the caller's to keep."""
        from safetensors.torch import save_file

        check_is_fitted(self)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in self.get_params(deep=False).items() if name != "encoder"}
        about = {
            "settings": settings, "words": self.vocabulary_.words[4:], "features": self.captioner_.features,
            "encoder": None if self.encoder is None else self.encoder.settings,
            "bleu": self.bleu_, "lm_loss": self.lm_loss_,
        }  # fmt: skip
        for name, net in (("captioner", self.captioner_), ("lm", self.lm_)):
            save_file(dict(net.state_dict()), folder / f"{name}.safetensors")
        (folder / "milan.json").write_text(json.dumps(about, indent=1))
        return folder

    @classmethod
    def load(cls, folder: str | Path, encoder: RegionEncoder | nn.Module | None = None) -> MILAN:
        """What `save` wrote; a plain network gets the encoder it was saved with around it.

        Raises ModelError where the folder holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            about = json.loads((folder / "milan.json").read_text())
            if encoder is not None and not isinstance(encoder, RegionEncoder):
                encoder = RegionEncoder(encoder, **about["encoder"])
            made = cls(encoder, **about["settings"])
            made.vocabulary_ = Vocabulary(about["words"])
            made.captioner_ = Captioner(made.vocabulary_, about["features"], made.embedding, made.hidden, made.dropout)
            made.lm_ = LanguageModel(made.vocabulary_, made.embedding, made.hidden, 2, made.dropout)
            for name, net in (("captioner", made.captioner_), ("lm", made.lm_)):
                net.load_state_dict(load_file(folder / f"{name}.safetensors"))
                net.eval()
            made.bleu_, made.lm_loss_ = about["bleu"], about["lm_loss"]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{folder} holds no captioner ({error}); write one with MILAN.save") from error
        return made


def sentences(y: Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    """A list of sentences a unit."""
    said = [[str(unit)] if isinstance(unit, str) else [str(s) for s in unit] for unit in y]
    empty = [place for place, unit in enumerate(said) if not unit]
    if empty:
        raise ValueError(f"no sentence for the units {empty[:5]}; leave these units out")
    return said


def longest(captions: Tensor) -> int:
    """The columns that some caption uses."""
    return int((captions != PAD).sum(1).max())
