"""What descriptions are for: analyse a network, audit it, edit it.

*Analyse*: take units out in the order of some property of their descriptions and watch the accuracy.
*Audit*: look for units that are described by certain words, in this network and in others.
*Edit*: find units that are described by the words of a spurious feature, and take out those without which the
network does best on validation data.

Units are taken out by a mask on their feature maps while a context is open; the network itself is never changed.

>>> net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
>>> x = torch.ones(1, 1, 4, 4)
>>> with ablate(net, {"1": [0, 1, 2]}):
...     torch.equal(net(x)[0], net[3].bias)
True
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuropil._taps import tapped
from neuropil.interpret.milan.exemplars import batched
from neuropil.interpret.milan.language import tokens
from neuropil.interpret.milan.layer import check_layer
from neuropil.neurons import Site

Unit = tuple[str, int]
Units = Mapping[Any, Sequence[int]]  # by the name of a layer, or by Site
SPURIOUS = ("word", "text", "letter")
SHARES = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2)


@contextmanager
def ablate(model: nn.Module, units: Units) -> Iterator[nn.Module]:
    """The network without some units: their feature maps are multiplied by zero, in a copy, while the context is open.

    Units of a named module are counted along the channels of its output (the last axis of tokens), those of a Site as
    it counts. Raises UnknownLayer, or ValueError for a unit that a layer does not have.
    """
    with ExitStack() as stack:
        for layer, chosen in units.items():
            check_layer(model, layer)
            if not len(chosen):
                continue
            if isinstance(layer, Site):
                tap = layer.tap
                stack.enter_context(tapped(model, [(tap, layer.width, _masker(layer.name, chosen, tap.axis))]))
            else:
                handle = model.get_submodule(layer).register_forward_hook(_hook(layer, chosen))
                stack.callback(handle.remove)
        yield model


def _masker(name: str, chosen: Sequence[int], axis: int | None) -> Callable[[Tensor], Tensor]:
    def act(h: Tensor) -> Tensor:
        along = axis if axis is not None else (2 if h.dim() == 3 else 1)
        width = h.shape[along]
        if not 0 <= min(chosen) <= max(chosen) < width:
            raise ValueError(f"units {sorted(chosen)} of layer {name!r}: it has units 0 to {width - 1}")
        keep = torch.ones(width, dtype=h.dtype, device=h.device)
        keep[torch.as_tensor(list(chosen), device=h.device)] = 0
        return h * keep.reshape([-1 if d == along % h.dim() else 1 for d in range(h.dim())])

    return act


def _hook(name: str, chosen: Sequence[int]) -> Callable[..., Any]:
    act = _masker(name, chosen, None)

    def after(_: nn.Module, __: Any, out: Any) -> Any:
        return (act(out[0]), *out[1:]) if isinstance(out, tuple) else act(out)

    return after


def accuracy(model: nn.Module, data: Any, batch_size: int = 256) -> float:
    """The share of images that are classified right; `data` is `(images, labels)` or a data set of such pairs."""
    training = [module for module in model.modules() if module.training]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    right = count = 0
    model.eval()
    try:
        with torch.no_grad():
            for x, y in batched(data, batch_size):
                right += int((model(x.to(device)).argmax(1).cpu() == y).sum())
                count += len(y)
    finally:
        for module in training:
            module.training = True
    if not count:
        raise ValueError("no image to measure accuracy on; give at least one")
    return right / count


# --- analyse ---------------------------------------------------------------------------------------------------------


def count_words(words: Iterable[str]) -> Callable[[str], float]:
    """How many of a description's words are among these; a word given counts with what it begins ("letter"-s)."""
    known = tuple(word.lower() for word in words)
    return lambda text: float(sum(token.startswith(known) for token in tokens(text)))


def count_tags(tag: str, tagger: Callable[[str], Sequence[str]]) -> Callable[[str], float]:
    """How many words have a part of speech (NOUN, VERB, ADP, ADJ) by the user's tagger: a sentence to its tags."""
    return lambda text: float(sum(found == tag for found in tagger(text)))


def length(text: str) -> float:
    """The number of words."""
    return float(len(tokens(text)))


def word_difference(embed: Callable[[str], Tensor | None]) -> Callable[[str], float]:
    """The largest squared distance between the vectors of two words of a description (words without one are left)."""

    def value(text: str) -> float:
        vectors = [v for v in map(embed, tokens(text)) if v is not None]
        return float(torch.cdist(torch.stack(vectors), torch.stack(vectors)).square().max()) if vectors else 0.0

    return value


def word_similarity(word: str, embed: Callable[[str], Tensor | None]) -> Callable[[str], float]:
    """The cosine of a word (that of a class, say) with the mean vector of a description."""
    target = embed(word)
    if target is None:
        raise ValueError(f"there is no vector for {word!r}; choose another word")

    def value(text: str) -> float:
        vectors = [v for v in map(embed, tokens(text)) if v is not None]
        return float(torch.cosine_similarity(torch.stack(vectors).mean(0), target, dim=0)) if vectors else 0.0

    return value


@dataclass(frozen=True)
class Deletion:
    """Accuracy after the first so many units of an order are out; `random` holds that of other orders."""

    counts: list[int]
    accuracy: list[float]
    random: list[list[float]]


def analyse(
    model: nn.Module,
    data: Any,
    descriptions: Mapping[Unit, str],
    value: Callable[[str], float],
    *,
    shares: Sequence[float] = SHARES,
    orders: int = 5,
    seed: int = 0,
) -> Deletion:
    """Take out the units with the highest `value` of their descriptions first (0 to 20 % in steps of 2 %).

    Beside it, `orders` random orders (the paper: 5). `descriptions` maps (layer, unit) to a sentence. A depth of
    dependency parse, as in the paper, is a `value` made with the user's parser.
    """
    draw = random.Random(seed)
    units = sorted(descriptions)
    mixed = draw.sample(units, len(units))  # equal values in no order
    ranked = sorted(mixed, key=lambda unit: value(descriptions[unit]), reverse=True)
    counts = [round(share * len(units)) for share in shares]
    others = [draw.sample(units, len(units)) for _ in range(orders)]
    curve = [deleted(model, data, ranked[:count]) for count in counts]
    return Deletion(counts, curve, [[deleted(model, data, order[:count]) for count in counts] for order in others])


def deleted(model: nn.Module, data: Any, units: Iterable[Unit]) -> float:
    """Accuracy without these units."""
    with ablate(model, by_layer(units)):
        return accuracy(model, data)


def by_layer(units: Iterable[Unit]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for layer, unit in units:
        found.setdefault(layer, []).append(unit)
    return found


def histogram(descriptions: Mapping[Unit, str], value: Callable[[str], float]) -> dict[str, list[float]]:
    """A property of the descriptions, layer by layer."""
    found: dict[str, list[float]] = {}
    for (layer, _), text in descriptions.items():
        found.setdefault(layer, []).append(value(text))
    return found


# --- audit -----------------------------------------------------------------------------------------------------------


def speaks_of(text: str, words: Sequence[str]) -> bool:
    """Whether a description contains one of the words, as the paper looks for them: anywhere, in any case.

    >>> speaks_of("Printed letters", ["word", "text", "letter"])
    True
    """
    return re.search("|".join(map(re.escape, words)), text, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Audit:
    """For each network: how many units there are, and which of them are described by the words."""

    words: tuple[str, ...]
    units: dict[str, int]
    found: dict[str, list[Unit]]

    @property
    def share(self) -> dict[str, float]:
        return {name: len(self.found[name]) / self.units[name] for name in self.units}


def audit(described: Mapping[str, Mapping[Unit, str]], words: Sequence[str]) -> Audit:
    """Which units of which networks are described by some words (the paper: faces, in networks that saw none)."""
    if not words:
        raise ValueError("words is empty; name what to look for")
    found = {
        name: [unit for unit, text in sorted(texts.items()) if speaks_of(text, words)]
        for name, texts in described.items()
    }
    return Audit(tuple(words), {name: len(texts) for name, texts in described.items()}, found)


# --- edit ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """The order in which units go, and accuracy on validation and test data after each; entry 0 is the whole model."""

    candidates: list[Unit]
    order: list[Unit]
    validation: list[float]
    test: list[float]
    random: list[list[float]]

    @property
    def chosen(self) -> int:
        """How many units to take out, by validation accuracy alone."""
        return max(range(len(self.validation)), key=self.validation.__getitem__)


def edit_spurious(
    model: nn.Module,
    validation: Any,
    test: Any,
    descriptions: Mapping[Unit, str],
    words: Sequence[str] | None = SPURIOUS,
    *,
    most: int = 50,
    orders: int = 5,
    seed: int = 0,
) -> Edit:
    """Take out units that are described by a spurious feature, those first without which validation goes best.

    Every candidate is scored by validation accuracy with it alone taken out; then 0 to `most` units go in decreasing
    order of the score. `words=None` makes all units candidates ("sort-all"); `random` holds the test accuracy of
    `orders` random orders of all units, as many. To keep an edit, run the model inside
    `ablate(model, by_layer(edit.order[:edit.chosen]))`, and see `finetune_last`.
    """
    units = sorted(descriptions)
    candidates = [u for u in units if words is None or speaks_of(descriptions[u], words)]
    scores = {unit: deleted(model, validation, [unit]) for unit in candidates}
    order = sorted(candidates, key=lambda unit: scores[unit], reverse=True)[:most]
    steps = range(len(order) + 1)
    draw = random.Random(seed)
    others = [draw.sample(units, len(units))[: len(order)] for _ in range(orders)]
    return Edit(
        candidates,
        order,
        [deleted(model, validation, order[:count]) for count in steps],
        [deleted(model, test, order[:count]) for count in steps],
        [[deleted(model, test, other[:count]) for count in steps] for other in others],
    )


def finetune_last(
    model: nn.Module, data: tuple[Tensor, ...], units: Units, last: str, *, epochs: int = 5, lr: float = 1e-4
) -> nn.Module:
    """A copy of the model whose last layer is trained on with the units taken out (they stay to be ablated)."""
    from neuropil.training import fit, supervised

    edited = copy.deepcopy(model)
    check_layer(edited, last)
    for name, parameter in edited.named_parameters():
        parameter.requires_grad_(name.startswith(f"{last}."))
    chosen = [p for p in edited.parameters() if p.requires_grad]
    frozen = _Frozen(edited)
    with ablate(edited, units):
        fit(frozen, data, supervised(nn.functional.cross_entropy), torch.optim.Adam(chosen, lr=lr), epochs=epochs,
            batch_size=128, progress=False)  # fmt: skip
    return edited.requires_grad_(True).eval()


class _Frozen(nn.Module):
    """A model that stays in evaluation mode while it is trained: norms keep their statistics."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> _Frozen:
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)
