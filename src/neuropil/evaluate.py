"""How good a model is, how near another one it is, and how fast: perplexity, accuracy, likeness of answers, rates.

>>> logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]))
>>> round(float(torch.exp(surprise(logits, torch.tensor([0, 2])).mean())), 4)  # geometric mean of 2 and 4
2.8284
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuropil.errors import ModelError


def surprise(logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """`-log p(target)` in nats, in single precision whatever the model's."""
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


@dataclass(frozen=True)
class Perplexity:
    """`exp(nll)`, where `nll` is the mean surprise in nats over `tokens` predicted tokens; `each` is one a window."""

    nll: float
    tokens: int
    each: tuple[float, ...]

    @property
    def value(self) -> float:
        return math.exp(min(self.nll, 700.0))


def windows(
    texts: Sequence[str], tokenizer: Any, length: int = 512, limit: int | None = None
) -> list[Int[Tensor, "1 _"]]:
    """Texts cut into windows of `length` tokens that do not overlap and do not cross from one text to the next.

    Each window begins with the tokenizer's beginning-of-text token where the tokenizer has one that it puts there
    itself, so that no token is predicted from nothing. Ends shorter than a quarter of a window are left out.

    Raises ValueError where no window comes out.
    """
    found: list[Tensor] = []
    start = _beginning(tokenizer)
    step = length - len(start)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [start + ids[at : at + step] for at in range(0, len(ids), step)]
        found += [torch.tensor([piece]) for piece in pieces if len(piece) >= max(2, length // 4)]
        if limit is not None and len(found) >= limit:
            return found[:limit]
    if not found:
        raise ValueError(f"{len(texts)} texts gave no window of {length} tokens; give longer texts or a shorter length")
    return found


def _beginning(tokenizer: Any) -> list[int]:
    with_special = tokenizer("a")["input_ids"]
    first = getattr(tokenizer, "bos_token_id", None)
    return [first] if first is not None and with_special and with_special[0] == first else []


@torch.no_grad()
def perplexity(model: nn.Module, batches: Sequence[Int[Tensor, "1 _"]]) -> Perplexity:
    """Perplexity of a causal language model over windows (see `windows`), every token but each window's first.

    The mean is over tokens, not over windows. The model answers in its own precision, in eval mode, and is left
    as it was. Raises ModelError where it answers with NaN.
    """
    total, tokens, each = 0.0, 0, []
    with evaluating(model):
        for ids in batches:
            logits = model(ids).logits
            found = surprise(logits[0, :-1], ids[0, 1:]).double()
            if not bool(torch.isfinite(found).all()):
                raise ModelError("the model answers with NaN or infinity: its weights are damaged")
            total, tokens = total + float(found.sum()), tokens + len(found)
            each.append(float(found.mean()))
    return Perplexity(total / tokens, tokens, tuple(each))


@torch.no_grad()
def accuracy(
    model: nn.Module, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"], batch_size: int = 256
) -> float:
    """Share of images whose largest logit is that of their label; transformers' outputs are understood too."""
    right = 0
    with evaluating(model):
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            out = model(x)
            right += int((getattr(out, "logits", out).argmax(-1) == y).sum())
    return right / len(labels)


def scores(out: Any) -> Float[Tensor, "n classes"] | None:
    """The scores of classes in what a model gave, transformers' outputs understood; None where it gave none."""
    found = getattr(out, "logits", out)
    found = found[0] if isinstance(found, tuple) else found
    return found if isinstance(found, Tensor) and found.dim() == 2 and found.shape[1] > 1 else None


@dataclass(frozen=True)
class Likeness:
    """How near the answers of a changed model are to the original's, on the same images.

    error       ‖changed - original‖ / ‖original‖ over all answers (scores of classes, or features)
    cosine      of the two answers to an image, mean over images
    agreement   share of images whose top class is the same; None of models that give no scores of classes, as `kl`
    kl          KL(original ‖ changed) of the probabilities of the classes in nats, mean over images
    accuracy    of the original and of the changed model; None where there are no labels for the model's classes
    """

    images: int
    error: float
    cosine: float
    agreement: float | None = None
    kl: float | None = None
    accuracy: tuple[float, float] | None = None


@torch.no_grad()
def likeness(
    original: nn.Module,
    changed: nn.Module,
    batches: Iterable[Float[Tensor, "_ ..."]],  # each of its own size
    labels: Int[Tensor, " images"] | None = None,
    classes: int | None = None,
) -> Likeness:
    """Both models' answers compared, image by image; see `Likeness`. Both are left as they were.

    `labels` of all images together are of `classes` classes: where the model has another number of them, what its
    outputs stand for is not known and no accuracy is told.

    Raises ModelError where a model answers with NaN or the answers differ in shape, ValueError without images.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> found = likeness(net, net, [torch.rand(5, 1, 2, 2)])
    >>> found.agreement, found.kl, found.error, found.accuracy
    (1.0, 0.0, 0.0, None)
    """
    rows: list[Tensor] = []  # of each image: squared error, squared length, cosine, and of classes: same top, KL
    tops: list[Tensor] = []
    with evaluating(original), evaluating(changed):
        for x in batches:
            outs = original(x), changed(x)
            old, new = (_answer(out).flatten(1).double().cpu() for out in outs)
            if old.shape != new.shape:
                raise ModelError(
                    f"the changed model answers {list(new.shape)} where the original does {list(old.shape)}"
                )
            if not bool(torch.isfinite(old).all() and torch.isfinite(new).all()):
                raise ModelError("the model answers with NaN or infinity: its weights are damaged")
            told = [(new - old).square().sum(1), old.square().sum(1), nn.functional.cosine_similarity(old, new)]
            if scores(outs[0]) is not None:
                p, q = old.log_softmax(1), new.log_softmax(1)
                kl = (p.exp() * (p - q)).sum(1).clamp(min=0)  # below 0 only by rounding
                tops.append(torch.stack([p.argmax(1), q.argmax(1)]))
                told += [(tops[-1][0] == tops[-1][1]).double(), kl]
            rows.append(torch.stack(told, 1))
            width = old.shape[1]
    if not rows:
        raise ValueError("likeness(batches=...): there is no image; give at least one batch")
    table = torch.cat(rows)
    wrong, length, cosine, *rest = (float(value) for value in table.mean(0))
    error = math.sqrt(wrong / length) if length else math.inf if wrong else 0.0
    if not rest:
        return Likeness(len(table), error, cosine)
    accuracy = None
    if labels is not None and width == classes:
        first, second = ((top == labels.cpu()).double().mean().item() for top in torch.cat(tops, 1))
        accuracy = first, second
    return Likeness(len(table), error, cosine, rest[0], rest[1], accuracy)


def _answer(out: Any) -> Float[Tensor, "n ..."]:
    """The scores of classes, or the first tensor of what a model gave."""
    found = getattr(out, "logits", out)
    while not isinstance(found, Tensor):
        found = next(iter(found.values())) if isinstance(found, Mapping) else found[0]
    return found


@torch.no_grad()
def generation_rate(model: Any, ids: Int[Tensor, "1 _"], tokens: int = 32, repeats: int = 3) -> float:
    """Tokens a second that greedy generation gives after the prompt is read; the best of some repeats.

    The prompt's own pass is not counted. The best is the least disturbed by whatever else the machine does.
    """
    best = 0.0
    with evaluating(model):
        for _ in range(repeats):
            out = model(ids, use_cache=True)
            cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            for _ in range(tokens):
                out = model(last, past_key_values=cache, use_cache=True)
                last = out.logits[:, -1:].argmax(-1)
            best = max(best, tokens / (time.perf_counter() - started))
    return best


@torch.no_grad()
def image_rate(model: nn.Module, images: Float[Tensor, "n ..."], repeats: int = 5) -> float:
    """Images a second in one batch; the best of some repeats, after one that is not counted."""
    best = 0.0
    with evaluating(model):
        model(images)
        for _ in range(repeats):
            started = time.perf_counter()
            model(images)
            best = max(best, len(images) / (time.perf_counter() - started))
    return best


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, each module back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
