r"""Rounding up or down as the layer's output asks, rather than to the nearest: AdaRound, BRECQ, AdaQuant.

AdaRound learns for each weight whether it is rounded up, $\tilde w = s\,\mathrm{clip}(\lfloor w / s \rfloor + h(v))$
with $h(v) = \mathrm{clip}(1.2\,\sigma(v) - 0.1, 0, 1)$, from a few unlabelled batches:

$$ \min_v \lVert f(W x) - f(\tilde W \hat x) \rVert^2 + \lambda \sum (1 - |2 h(v) - 1|^\beta), \quad \beta: 20 \to 2 $$

BRECQ does so for the output of a whole block (`blocks=`), with errors weighted by the gradient of a loss if one is
given; AdaQuant moves weights, scales and biases instead, with straight-through gradients.

>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
>>> data = [torch.randn(128, 16) @ torch.randn(16, 16)]
>>> settings = {"bits": 3, "granularity": "channel"}
>>> from neuropil.compress.quantize import quantize_model
>>> nearest = quantize_model(model, settings).model
>>> learned = learn_rounding(model, settings, data, steps=300, lr=1e-2).model
>>> error = lambda m: (m(data[0]) - model(data[0])).square().mean().item()
>>> error(learned) < error(nearest)
True

Sources: Nagel et al. 2020, arXiv:2004.10568 (AdaRound); Li et al. 2021, arXiv:2102.05426 (BRECQ); Hubara et al. 2020,
arXiv:2006.10518 (AdaQuant).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuropil.changes import Changes
from neuropil.compress.quantize.graph import read_by_relu
from neuropil.compress.quantize.grids import Uniform
from neuropil.compress.quantize.models import Weights, bake, layers, quantizer_for, weight_of
from neuropil.compress.quantize.quantizer import FakeQuantizer, Quantizer, packing_of, straight_through
from neuropil.compress.quantize.tiles import QuantizationError, Tiling, from_tiles, to_tiles, working
from neuropil.compress.reconstruction import Call, Seen, first, mean_error, minimise, output_error, reached, walk
from neuropil.compress.reconstruction import run as run_batch
from neuropil.evaluate import evaluating
from neuropil.packed import Packing

HIGH, LOW = 1.1, -0.1  # how far the sigmoid is stretched before it is cut to [0, 1]
WARM_UP = 0.2  # the share of the steps before rounding is urged


class Rounding(FakeQuantizer):
    """The weight of one layer on its grid, each number rounded up by what is learned; `hard` once it is settled."""

    def __init__(self, grid: Uniform, tiles: Tiling, weight: Float[Tensor, "*shape"]) -> None:
        super().__init__()
        self.grid, self.tiles, self.hard = grid, tiles, False
        at = grid.positions(to_tiles(working(weight), tiles))
        share = at - at.floor()
        self.v = nn.Parameter(-((HIGH - LOW) / (share - LOW) - 1).log())  # up() is the fraction itself
        self._nearest = self.v.detach().clone()

    def up(self) -> Float[Tensor, "r g n"]:
        """How far each number is rounded up, 0 to 1."""
        if self.hard:
            return (self.v >= 0).to(self.v.dtype)
        return (torch.sigmoid(self.v) * (HIGH - LOW) + LOW).clamp(0, 1)

    def penalty(self, beta: float) -> Float[Tensor, ""]:
        """How far the numbers are from being rounded at all."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()

    def learned(self) -> list[nn.Parameter]:
        return [self.v]

    def keep_nearest(self) -> None:
        """Forget what was learned: round to the nearest."""
        self.v.data = self._nearest.clone()

    def codes(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "r g n"]:
        floor = self.grid.positions(to_tiles(w, self.tiles)).floor()
        return (floor + self.up()).clamp(self.grid.low, self.grid.high)

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        made = (self.codes(w.detach()) - self.grid.zero[..., None]) * self.grid.scale[..., None]
        return from_tiles(made, self.tiles, w.shape).to(w.dtype)

    def pack(self, w: Float[Tensor, "*shape"]) -> Packing:
        return packing_of(self.grid, from_tiles(self.codes(w).int(), self.tiles, w.shape))


class Moved(FakeQuantizer):
    """AdaQuant: rounds w + v s to the nearest of a grid whose scale s is learned as well."""

    hard = False

    def __init__(self, grid: Uniform, tiles: Tiling, weight: Float[Tensor, "*shape"]) -> None:
        super().__init__()
        self.start, self.tiles = grid, tiles
        self.v = nn.Parameter(torch.zeros_like(to_tiles(working(weight), tiles)))
        self.stretch = nn.Parameter(torch.ones_like(grid.scale))

    def learned(self) -> list[nn.Parameter]:
        return [self.v, self.stretch]

    def keep_nearest(self) -> None:
        self.v.data.zero_()
        self.stretch.data.fill_(1)

    def penalty(self, beta: float) -> Float[Tensor, ""]:
        return self.v.new_zeros(())

    def _at(self, w: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.start.scale * self.stretch
        at = to_tiles(w, self.tiles) / scale[..., None] + self.v + self.start.zero[..., None]
        at = at.clamp(self.start.low, self.start.high)
        return straight_through(at, at.detach().round()), scale

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        codes, scale = self._at(w.detach())
        made = (codes - self.start.zero[..., None]) * scale[..., None]
        return from_tiles(made, self.tiles, w.shape).to(w.dtype)

    def pack(self, w: Float[Tensor, "*shape"]) -> Packing:
        codes, scale = self._at(w)
        grid = Uniform(scale.detach(), self.start.zero, self.start.low, self.start.high)
        return packing_of(grid, from_tiles(codes.detach().int(), self.tiles, w.shape))


METHODS: dict[str, type[Rounding] | type[Moved]] = {"adaround": Rounding, "adaquant": Moved}


def learn_rounding(
    model: nn.Module,
    weights: Weights,
    batches: Iterable[Any],
    *,
    method: str = "adaround",
    blocks: Sequence[str] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    steps: int = 10_000,
    batch: int = 32,
    lr: float = 1e-3,
    strength: float = 0.01,
    rounded_inputs: bool = True,
    skip: Iterable[str] = (),
    seed: int = 0,
    progress: bool = False,
) -> Changes:
    """A copy of the model, its weights packed, each rounded so that the outputs of its layer stay what they were.

    Parameters
    ----------
    weights: a recipe as in `quantize_model`, of uniform schemes.
    batches: calibration batches: tensors, tuples of arguments or dicts of them. No labels.
    method: "adaround" (up or down), or "adaquant" (weights, scales and biases move).
    blocks: modules whose outputs are kept instead of those of their layers (BRECQ). Layers outside every block are
        gone through one by one, together with the blocks, in the order in which they run.
    loss: of the model's answer; if given, a block's errors are weighted by its gradient there (BRECQ's Fisher matrix).
    steps, batch, lr, strength: of each layer or block; the defaults are AdaRound's. `strength` is its lambda.
    rounded_inputs: whether a layer learns on what the rounded layers before it give (else on the plain inputs).
    progress: whether to show on stderr how many layers or blocks are done.

    A layer of its own whose output a ReLU alone reads is judged after that ReLU. Where what was learned is worse on the
    batches than rounding to the nearest, the latter is kept. Embeddings are rounded to the nearest; tied weights and
    layers that never run are left.
    Raises QuantizationError for schemes that are not uniform, ReconstructionError for empty calibration.
    """
    if method not in METHODS:
        raise QuantizationError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    batches = list(batches)
    work = copy.deepcopy(model)
    todo, left = _layers(work, weights, skip)
    units = _units(todo, blocks or ())
    relus = read_by_relu(model, [name for name in units if name in todo])
    ran = reached(model, list(units), batches)
    for name in [name for name in units if name not in ran]:
        for layer in units.pop(name):
            left[layer] = "it did not run on the first batch"
    walked = walk(model, list(units), batches, inputs_from=work if rounded_inputs else None)
    for seen in _shown(walked, len(units), progress):
        block, made = work.get_submodule(seen.name), {}
        for name in units[seen.name]:
            made[name] = _parametrized(work.get_submodule(name), *todo[name], METHODS[method])
        if loss is not None:
            weighted, run = _weighted(model, block, seen, batches, loss)
        else:
            weighted, run = seen, block
        error = _after_relu if seen.name in relus else mean_error
        extra = _biases(work, units[seen.name]) if method == "adaquant" else []
        _learn(made.values(), extra, run, weighted, error, steps, batch, lr, strength, seed)
    baked = bake(work)
    return Changes(baked.model, baked.changed, {**left, **baked.left})


def _shown(walked: Iterable[Seen], total: int, progress: bool) -> Iterable[Seen]:
    """The same, with a bar of how far it is."""
    from rich.console import Console
    from rich.progress import track

    return track(walked, "rounding", total, console=Console(stderr=True), disable=not progress)


def _layers(
    work: nn.Module, weights: Weights, skip: Iterable[str]
) -> tuple[dict[str, tuple[Uniform, Tiling]], dict[str, str]]:
    """The grid and tiles of each layer to be learned; embeddings are rounded at once."""
    found, left = layers(work, skip)
    times: dict[int, int] = {}
    for module in found.values():
        times[id(module.weight)] = times.get(id(module.weight), 0) + 1
    todo = {}
    for name, module in found.items():
        quantizer = quantizer_for(weights, name, module)
        if times[id(module.weight)] > 1:
            left[name] = "its weight is tied"
        elif quantizer is None or getattr(quantizer, "bits", 0) == 32:
            left[name] = "no pattern of the recipe names it" if quantizer is None else "32 bits: left as it is"
        elif isinstance(module, nn.Embedding):
            parametrize.register_parametrization(module, "weight", quantizer)
        else:
            weight = weight_of(module)
            grid = quantizer.grid_for(weight) if isinstance(quantizer, Quantizer) else None
            if not isinstance(quantizer, Quantizer) or not isinstance(grid, Uniform):
                raise QuantizationError(f"{name}: {quantizer} has no uniform grid on which to round up or down")
            todo[name] = (grid, quantizer.tiles(weight))
    return todo, left


def _units(todo: dict[str, Any], blocks: Sequence[str]) -> dict[str, list[str]]:
    """What is reconstructed: blocks with the layers in them, and layers in no block."""
    units: dict[str, list[str]] = {block: [] for block in blocks}
    for name in todo:
        block = next((b for b in blocks if name == b or name.startswith(f"{b}.")), name)
        units.setdefault(block, []).append(name)
    if empty := [block for block, inside in units.items() if not inside]:
        raise QuantizationError(f"block {empty[0]!r} holds no layer to be rounded; see model.named_modules()")
    return units


def _after_relu(made: Tensor, wanted: Tensor) -> Tensor:
    return mean_error(made.relu(), wanted.relu())


def _parametrized(module: nn.Module, grid: Uniform, tiles: Tiling, kind: type[Rounding] | type[Moved]) -> Any:
    made = kind(grid, tiles, weight_of(module))
    parametrize.register_parametrization(module, "weight", made)
    return made


def _biases(work: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    found = [work.get_submodule(name)._parameters.get("bias") for name in names]
    biases = [bias for bias in found if bias is not None]
    for bias in biases:
        bias.requires_grad_()
    return biases


def _learn(
    roundings: Iterable[Any],
    extra: list[nn.Parameter],
    run: Callable[..., Any],
    seen: Seen,
    error: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    batch: int,
    lr: float,
    strength: float,
    seed: int,
) -> None:
    """Learn the roundings of one layer or block, settle them, and keep the nearest where it was better."""
    roundings = list(roundings)
    before = [p.detach().clone() for p in extra]
    for each in roundings:
        each.hard = True
    least = output_error(run, seen, error)
    for each in roundings:
        each.hard = False
    warm = int(WARM_UP * steps)

    def penalty(step: int) -> Tensor:
        if step < warm:
            return seen.calls[0].output.new_zeros(())
        beta = 20 - 18 * (step - warm) / max(1, steps - warm)
        return strength * torch.stack([each.penalty(beta) for each in roundings]).sum()

    learned = [p for each in roundings for p in each.learned()] + extra
    minimise(run, learned, seen, steps=steps, batch=batch, lr=lr, loss=error, penalty=penalty, seed=seed)
    for each in roundings:
        each.hard = True
        each.requires_grad_(False)
    if output_error(run, seen, error) > least:
        for each in roundings:
            each.keep_nearest()
        for p, old in zip(extra, before, strict=True):
            p.data.copy_(old)


def _weighted(
    model: nn.Module, block: nn.Module, seen: Seen, batches: Sequence[Any], loss: Callable[[Any], Tensor]
) -> tuple[Seen, Callable[..., Tensor]]:
    """The same calls with answers multiplied by the size of the loss's gradient there, and a block that does so too."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        answer = first(out)
        found.append(answer)

    handle = model.get_submodule(seen.name).register_forward_hook(hook)
    sizes: list[Tensor] = []
    try:
        with evaluating(model), torch.enable_grad():
            for x in batches:
                found.clear()
                value = loss(run_batch(model, x))
                gradients = torch.autograd.grad(value, found)
                sizes += [g.detach().abs() * g.shape[0] for g in gradients]
    finally:
        handle.remove()
    mean = torch.cat([g.flatten() for g in sizes]).square().mean().sqrt().clamp_min(1e-30)
    calls = []
    for call, size in zip(seen.calls, sizes, strict=True):
        weight = size / mean
        calls.append(Call((weight, *call.args), call.kwargs, call.output * weight))

    def run(weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return first(block(*args, **kwargs)) * weight

    return Seen(seen.name, calls), run
