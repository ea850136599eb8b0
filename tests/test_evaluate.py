"""Perplexity, accuracy and rates: against closed forms, and on the real model."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from neuropil import data, evaluate, models
from neuropil.errors import ModelError


class Bigram(nn.Module):
    """A language model that knows how often each token follows each."""

    def __init__(self, chances: torch.Tensor) -> None:
        super().__init__()
        self.chances = nn.Parameter(chances)

    def forward(self, ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.chances.log()[ids])


def test_perplexity_is_that_of_the_chances() -> None:
    chances = torch.tensor([[0.5, 0.5, 0.0 + 1e-9], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])
    model = Bigram(chances / chances.sum(1, keepdim=True)).train()
    found = evaluate.perplexity(model, [torch.tensor([[0, 1, 2, 2]]), torch.tensor([[1, 1]])])
    wanted = -(math.log(0.5) + math.log(0.25) + math.log(0.8) + math.log(0.5)) / 4
    assert found.nll == pytest.approx(wanted, abs=1e-6)
    assert found.tokens == 4
    assert found.value == pytest.approx(math.exp(wanted), rel=1e-6)
    assert len(found.each) == 2
    assert model.training


def test_nan_is_named() -> None:
    with pytest.raises(ModelError, match="NaN"):
        evaluate.perplexity(Bigram(torch.full((3, 3), math.nan)), [torch.tensor([[0, 1]])])


def test_windows_hold_every_token_once() -> None:
    model = models.load("smollm2")
    text = data.text("brown").test[0]
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    found = evaluate.windows([text], model.tokenizer, length=64)
    assert all(window.shape[1] <= 64 for window in found)
    held = torch.cat([window[0] for window in found]).tolist()
    assert held == ids[: len(held)]
    assert len(ids) - len(held) < 16
    with pytest.raises(ValueError, match="no window"):
        evaluate.windows(["short"], model.tokenizer, length=64)


def test_the_real_model_reads_real_text() -> None:
    """A wrong tokenizer, shift or norm would give a perplexity in the hundreds."""
    model = models.load("smollm2")
    found = evaluate.perplexity(
        model.module(), evaluate.windows(data.text("brown").test, model.tokenizer, 256, limit=6)
    )
    shuffled = [
        w[:, torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(0))]
        for w in evaluate.windows(data.text("brown").test, model.tokenizer, 256, limit=2)
    ]
    assert found.value < 60
    assert evaluate.perplexity(model.module(), shuffled).value > 10 * found.value


def fixed(rows: list[list[float]]) -> nn.Module:
    """A model that gives to an image of one pixel, which is the image's number, the scores of that row."""
    net = nn.Embedding.from_pretrained(torch.tensor(rows))
    return nn.Sequential(Number(), net)


class Number(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten().long()


def test_likeness_is_the_closed_form() -> None:
    third = 1 / 3
    before = fixed([[0.0, math.log(2)], [0.0, math.log(2)], [math.log(2), 0.0]]).train()
    after = fixed([[0.0, math.log(2)], [math.log(2), 0.0], [0.0, 0.0]])
    batches = list(torch.arange(3.0).view(3, 1, 1, 1).split(2))
    found = evaluate.likeness(before, after, batches, torch.tensor([1, 1, 0]), classes=2)
    assert found.images == 3
    assert found.agreement == pytest.approx(2 / 3)  # of the third, the first of two equal scores is the top
    # the second image's probabilities change places, the third's become even
    swapped = third * math.log(third / (2 * third)) + 2 * third * math.log(2 * third / third)
    evened = third * math.log(2 * third) + 2 * third * math.log(4 * third)
    assert found.kl == pytest.approx((swapped + evened) / 3, abs=1e-6)
    assert found.error == pytest.approx(1.0)  # squared errors 0, 2 a and a, of lengths a, a and a
    assert found.cosine == pytest.approx(1 / 3, abs=1e-6)
    assert found.accuracy == pytest.approx((1.0, 2 / 3))
    assert before.training
    same = evaluate.likeness(before, before, batches, torch.tensor([1, 1, 0]), classes=2)
    assert (same.agreement, same.kl, same.error, same.accuracy) == (1.0, 0.0, 0.0, (1.0, 1.0))


def test_accuracy_is_not_guessed_and_features_are_no_classes() -> None:
    net = fixed([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    images = torch.arange(2.0).view(2, 1, 1, 1)
    assert evaluate.likeness(net, net, [images], torch.tensor([0, 1]), classes=2).accuracy is None
    maps = nn.Conv2d(1, 2, 1, bias=False)
    twice = nn.Conv2d(1, 2, 1, bias=False)
    twice.weight.data = 2 * maps.weight.data
    found = evaluate.likeness(maps, twice, [torch.rand(3, 1, 4, 4)])
    assert (found.agreement, found.kl, found.accuracy) == (None, None, None)
    assert found.error == pytest.approx(1.0)
    assert found.cosine == pytest.approx(1.0)


def test_likeness_says_what_cannot_be_compared() -> None:
    one, other = fixed([[0.0, 1.0]]), fixed([[0.0, 1.0, 2.0]])
    image = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ModelError, match=r"\[1, 3\] where the original does \[1, 2\]"):
        evaluate.likeness(one, other, [image])
    with pytest.raises(ModelError, match="NaN"):
        evaluate.likeness(one, fixed([[0.0, math.nan]]), [image])
    with pytest.raises(ValueError, match="no image"):
        evaluate.likeness(one, one, [])


def test_accuracy_and_rates() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]))  # type: ignore[operator]
    images = torch.eye(4).reshape(4, 1, 2, 2)
    assert evaluate.accuracy(model, images, torch.tensor([0, 1, 0, 1]), batch_size=3) == 0.75
    assert evaluate.image_rate(model, images) > 0
    smollm2 = models.load("smollm2")
    assert evaluate.generation_rate(smollm2.module(), torch.tensor([[1, 2, 3]]), tokens=2, repeats=1) > 0
