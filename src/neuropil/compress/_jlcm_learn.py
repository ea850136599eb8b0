"""Codebooks and mappings learned layer by layer (or block by block) on what the plain model answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuropil.compress._jlcm_mapping import CodebookWeight, SharedAdam
from neuropil.compress._jlcm_solve import by_outputs
from neuropil.compress.quantize.models import weight_of
from neuropil.compress.quantize.tiles import QuantizationError, working
from neuropil.compress.reconstruction import Seen, minimise, output_error, reached, run, walk
from neuropil.evaluate import evaluating

LARGEST_SCORES = 1 << 24  # numbers of scores beyond which the latent form is taken


@dataclass(frozen=True)
class How:
    """The settings of the learning; see `learn_codebooks`. `gradient` is "plain" or a phi."""

    gradient: str
    form: str
    learn: str
    soft: bool
    start: str
    sharpness: float
    steps: int
    batch: int
    lr: float
    book_lr: float
    seed: int


def learn_layers(
    plain: nn.Module,
    work: nn.Module,
    made: Mapping[str, CodebookWeight],
    batches: Sequence[Any],
    blocks: Sequence[str],
    how: How,
) -> None:
    """Learn the codebooks and mappings of layers or blocks one after another, in the order in which they run."""
    names = [name for name in made if _alone(work, name) and not isinstance(work.get_submodule(name), nn.Embedding)]
    units: dict[str, list[str]] = {block: [] for block in blocks}
    for name in names:
        units.setdefault(next((b for b in blocks if name.startswith(f"{b}.")), name), []).append(name)
    if empty := [block for block, inside in units.items() if not inside]:
        raise QuantizationError(f"block {empty[0]!r} holds no layer to be learned; see model.named_modules()")
    ran = reached(plain, list(units), batches)
    for seen in walk(plain, [unit for unit in units if unit in ran], batches, inputs_from=work):
        inside, unit = {name: made[name] for name in units[seen.name]}, work.get_submodule(seen.name)
        with evaluating(unit):
            if list(inside) == [seen.name]:
                _learn_layer(plain.get_submodule(seen.name), unit, inside[seen.name], seen, how)
            else:
                _learn_block(plain, unit, inside, seen, how)


def _alone(work: nn.Module, name: str) -> bool:
    """Whether no other layer shares its weight."""
    own = work.get_submodule(name).parametrizations["weight"][0]  # type: ignore[index]
    return sum(own is m for _, m in work.named_modules(remove_duplicate=False) if isinstance(m, CodebookWeight)) == 1


def _learn_layer(plain: nn.Module, layer: nn.Module, made: CodebookWeight, seen: Seen, how: How) -> None:
    """One layer: solve its codebooks, learn both, solve again; keep the best on the calibration."""
    best = _Best([made], layer, seen)
    by_outputs(plain, made, seen)
    best.look()
    if how.learn == "codebooks":
        return best.keep()
    best.keep()
    _begin(plain, made, how)
    _descend([made], layer, seen, how)
    best.look()
    by_outputs(plain, made, seen)
    best.look()
    return best.keep()


def _learn_block(
    plain: nn.Module, block: nn.Module, inside: Mapping[str, CodebookWeight], seen: Seen, how: How
) -> None:
    """A block: learn what is in it together, then the codebooks alone; keep the best on the calibration."""
    best = _Best(list(inside.values()), block, seen)
    if how.learn == "both":
        for name, made in inside.items():
            _begin(plain.get_submodule(name), made, how)
        _descend(best.made, block, seen, how)
        best.look()
    _descend(best.made, block, seen, how)
    best.look()
    best.keep()


def _begin(plain: nn.Module, made: CodebookWeight, how: How) -> None:
    w = working(weight_of(plain)).flatten(1)
    form = how.form
    if form == "auto":
        large = w.numel() * made.book.shape[1] > LARGEST_SCORES
        form = "latent" if large and how.gradient != "plain" else "scores"
    made.begin(w, how.gradient, form, how.soft, how.start, how.sharpness)


def _descend(made: Sequence[CodebookWeight], layer: nn.Module, seen: Seen, how: How) -> None:
    groups = [group for each in made for group in each.learned(how.lr, how.book_lr)]

    def optimizer(parameters: Any, lr: float) -> SharedAdam:
        return SharedAdam(parameters, lr, how.steps)

    minimise(layer, groups, seen, steps=how.steps, batch=how.batch, optimizer=optimizer, seed=how.seed)
    for each in made:
        each.settle()


class _Best:
    """The state of settled weights with the least error so far."""

    def __init__(self, made: list[CodebookWeight], layer: nn.Module, seen: Seen) -> None:
        self.made, self.layer, self.seen = made, layer, seen
        self.least, self.states = math.inf, [each.state() for each in made]
        self.look()

    def look(self) -> None:
        error = output_error(self.layer, self.seen)
        if error < self.least:
            self.least, self.states = error, [each.state() for each in self.made]

    def keep(self) -> None:
        for each, state in zip(self.made, self.states, strict=True):
            each.restore(state)


def tune(
    work: nn.Module,
    made: Mapping[str, CodebookWeight],
    batches: Sequence[Any],
    loss: Callable[[Any], Tensor],
    steps: int,
    book_lr: float,
) -> None:
    """Tune the codebooks of all layers together on a loss of the model's answer."""
    groups = [group for each in made.values() for group in each.learned(0.0, book_lr)]
    optimizer = SharedAdam(groups, book_lr, steps)
    learned = [p for group in groups for p in group["params"]]
    with evaluating(work):
        for step in range(steps):
            value = loss(run(work, batches[step % len(batches)]))
            if not bool(torch.isfinite(value.detach())):
                raise QuantizationError(f"the loss is {value.item()} at step {step}; lower book_lr")
            for p, g in zip(learned, torch.autograd.grad(value, learned, allow_unused=True), strict=True):
                p.grad = g
            optimizer.step()
    for each in made.values():
        each.settle()
