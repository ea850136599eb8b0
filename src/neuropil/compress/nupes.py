r"""Weights in few bits on a power grid: levels dense where weights are, no data needed, products still in integers.

Weights crowd around 0, a uniform grid does not. Of all spacings, powers alone keep products: $(xy)^a = x^a y^a$. With
$b$ bits, $L = 2^{b-1} - 1$ and $m = \max |w|$ of a tensor or of each channel, a weight is kept as

$$ k = \mathrm{round}\!\left(\mathrm{sign}(w) \, L \, (|w| / m)^a\right), \qquad
   \hat w = m \, \mathrm{sign}(k) \, (|k| / L)^{1/a} $$

$a = 1$ is the uniform grid, smaller exponents are finer near 0. `nupes_quantize` finds the exponent

- without data (PowerQuant), by Nelder-Mead: $a^* = \arg\min_a \sum_l \lVert W_l - \hat W_l(a) \rVert_2$, one for all
  layers (`exponent="global"`) or one a layer (`"layer"`); or takes the one it is given, as 0.5;
- with calibration batches (NUPES), by gradient, together with the codes: each layer's (or block's) output is kept,
  $\min E \lVert f(x, W) - f(\hat x, \hat W) \rVert^2$. Codes are real numbers: what the exponent gives, plus a shift
  that may lead over the whole grid (AdaRound's go up or down only). A soft rounding hardens them to integers.

>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
>>> power = nupes_quantize(model, bits=4, per="tensor")
>>> print(power)
changed 4 modules
>>> uniform = nupes_quantize(model, bits=4, per="tensor", exponent=1.0)
>>> [round(layer.exponent, 1) for layer in power.layers.values()], [layer.bits for layer in power.layers.values()]
([1.0, 1.0, 1.0, 1.0], [8, 4, 4, 8])

(torch fills layers with evenly spread numbers, so the uniform grid suits them. It does not suit trained ones.)

>>> with torch.no_grad():
...     for layer in model:
...         _ = layer.weight.copy_(torch.distributions.Laplace(0.0, 0.1).sample((64, 64)))
>>> of = lambda a: nupes_quantize(model, bits=4, per="tensor", exponent=a).layers["1"].error
>>> of("global") < 0.7 * of(1.0)
True
>>> data = [torch.randn(256, 64)]
>>> learned = nupes_quantize(model, bits=3, calibration=data, steps=100)
>>> layer = learned.layers["1"]
>>> layer.output_error < layer.start_error  # of the output, after learning and before
True

The weights are kept as `neuropil.packed.Lookup`: codes, one table of levels, a scale a tile. With `activations=8`, what
layers read is rounded on the grid of the same exponent; for $a = 1/2$, `to_integers` then gives layers that compute in
integers: $p_j = k_{w,j} k_{x,j}$, $y = s_w s_x \sum_j \mathrm{sign}(p_j) \, p_j^2$, with one scale at the end.

>>> both = nupes_quantize(model, bits=4, exponent=0.5, activations=8, calibration=data, learn="nothing").model
>>> exact = to_integers(both)
>>> exact.changed, torch.allclose(exact.model(data[0]), both(data[0]), atol=1e-4)
(('0', '1', '2', '3'), True)

What could not be read of the papers is this module's own choice: the soft rounding
$\lfloor u \rfloor + \frac12 + \tanh((u - \lfloor u \rfloor - \frac12) / T) / (2 \tanh(1 / 2T))$, $T: 1 \to 0.05$; the
pull $\lambda \cdot \mathrm{mean}(1 - |2 \,\mathrm{frac}(u) - 1|^\beta)$ towards integers, $\beta: 20 \to 2$; values
between two levels on the straight line that joins them, so that codes at 0 can move; $a$ in $(0.2, 1.5)$ by a sigmoid,
its gradient clipped to 1, with a learning rate of its own; errors in units of those of plain rounding, so that one
$\lambda$ serves all layers; the search's start at the best of 15 exponents, since the error at 8 bits ripples;
`clip="mse"`. Sums over inputs are taken after the inverse power, which is exact. A grid of two bits has the levels
-m, 0 and m whatever the exponent: there the exponent only says which weights become 0.

Sources: Yvinec, Dapogny and Bailly, "NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search", IEEE
TPAMI 2025, arXiv:2308.05600; Yvinec, Dapogny, Cord and Bailly, "PowerQuant: Automorphism Search for Non-Uniform
Quantization", ICLR 2023, arXiv:2301.09858.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from neuropil.changes import Changes
from neuropil.compress._nupes_inputs import PowerInput, add_inputs, observing, ranges_of_norms
from neuropil.compress._nupes_integers import PowerConv2d, PowerLinear, to_integers
from neuropil.compress._nupes_learn import FreeCodes, Learned, Learning, Unit, learn_unit, put
from neuropil.compress._nupes_power import PowerCodes, check_exponent, decode, encode, lookup, power_quantize, top_code
from neuropil.compress._nupes_search import Spread, best_size, find_exponent
from neuropil.compress.quantize.graph import read_by_relu
from neuropil.compress.quantize.models import layers, pack_layers, run_batches, weight_of
from neuropil.compress.quantize.tiles import (
    QuantizationError,
    Tiling,
    channels_of,
    from_tiles,
    tiling,
    to_tiles,
    working,
)
from neuropil.compress.reconstruction import output_error, reached, walk
from neuropil.packed import Packing

__all__ = [
    "PowerChanges",
    "PowerCodes",
    "PowerConv2d",
    "PowerInput",
    "PowerLayer",
    "PowerLinear",
    "add_inputs",
    "nupes_quantize",
    "power_quantize",
    "to_integers",
]
LEARN = ("nothing", "weights", "weights+exponent")


@dataclass(frozen=True)
class PowerLayer:
    """What was done to one weight. Errors of outputs are mean squares, as shares of that of the output itself."""

    bits: int
    exponent: float
    error: float  # |W - Ŵ| / |W|
    start_error: float | None = None  # of the output on the calibration, before learning
    output_error: float | None = None  # and after it
    moved: tuple[int, int] | None = None  # codes that differ from plain rounding, and by two levels or more


@dataclass(frozen=True)
class PowerChanges(Changes):
    """What was changed, and for each layer its exponent and errors."""

    layers: Mapping[str, PowerLayer] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class _Plan:
    """How one weight is to be rounded."""

    bits: int
    tiles: Tiling
    weight: Tensor  # [r, g, n]
    size: Tensor  # [r, g, 1]
    exponent: float = 1.0

    @property
    def top(self) -> int:
        return top_code(self.bits)


def nupes_quantize(
    model: nn.Module,
    bits: int = 4,
    *,
    exponent: str | float = "global",
    per: str = "channel",
    clip: str = "max",
    calibration: Iterable[Any] | None = None,
    learn: str | None = None,
    activations: int | None = None,
    ends: int | None = 8,
    skip: Iterable[str] = (),
    blocks: Sequence[str] = (),
    steps: int = 1000,
    batch: int = 32,
    lr: float = 3e-2,
    exponent_lr: float = 3e-3,
    strength: float = 0.1,
    rounding: str = "soft",
    seed: int = 0,
) -> PowerChanges:
    """A copy of the model with its weights packed on power grids; the model itself is left as it is.

    Parameters
    ----------
    bits: of weights, 2 to 8.
    exponent: "global" or "layer" searches it without data; a number sets it. Learning starts from there.
    per: what shares a scale: "tensor" or "channel".
    clip: "max" scales by the largest weight, as in the papers; "mse" by that or less, whichever has the least error.
    calibration: batches (tensors, tuples of arguments, dicts of them), no labels: to learn from, and for ranges.
    learn: "nothing", "weights", "weights+exponent" (which is what a calibration is used for if nothing is said).
    activations: bits of what layers read; None leaves it. Their ranges are those of the calibration; without one, six
        deviations of the batch norm before a layer, else each batch's own.
    ends: bits of the first and last layer of models with three or more, and of what these read, if more than the
        others'; None treats all alike.
    skip: names of layers to leave, or patterns with * and ?.
    blocks: modules whose outputs are kept instead of those of the layers in them.
    steps, batch, lr, exponent_lr, strength, seed: of the learning of each layer or block, by Adam; `strength` is the
        lambda of the pull towards integers.
    rounding: "soft", or "straight-through" for hard rounding with the gradient let through; that one never settles, and
        wants a learning rate about a hundred times lower.

    Embeddings, tied weights and layers that never run are rounded without being learned. Where learning does not lower
    a layer's error on the calibration, plain rounding stays.

    Raises QuantizationError for settings that make no sense, weights with NaN (named), and a model that is packed
    already; ReconstructionError for an empty calibration.
    """
    learn = learn or ("nothing" if calibration is None else "weights+exponent")
    _check(bits, exponent, per, clip, learn, rounding, calibration, (activations, ends))
    batches = None if calibration is None else list(calibration)
    patterns = tuple(skip)
    found, _ = layers(model, patterns)
    owners = _owners(found)
    plans = _with_exponents(_plans(found, owners, bits, ends, per), exponent, clip == "mse")
    reads = _input_bits(found, owners, plans, bits, activations)
    results: dict[str, Learned] = {}
    ranges: dict[str, dict[str, Tensor]] = {}
    if batches is not None and learn != "nothing":
        how = Learning(learn == "weights+exponent", steps, batch, lr, exponent_lr, strength, rounding, seed)
        results, ranges = _learned(model, found, owners, plans, reads, batches, blocks, how)

    def make(name: str, module: nn.Module) -> Packing:
        codes, a = _codes(plans[name], results.get(name))
        plan = plans[name]
        return lookup(from_tiles(codes, plan.tiles, weight_of(module).shape), plan.size[..., 0], a, plan.bits)

    made = pack_layers(model, make, patterns)
    exponents = {name: _codes(plans[owner], results.get(owner))[1] for name, owner in owners.items()}
    added = add_inputs(made.model, reads, exponents)
    for name, state in ranges.items():
        added[name].load_state_dict(state)
    _find_ranges(made.model, model, {n: each for n, each in added.items() if n not in ranges}, batches)
    report = {name: _told(plan, results.get(name)) for name, plan in plans.items()}
    return PowerChanges(made.model, made.changed, made.left, report)


def _check(
    bits: int,
    exponent: str | float,
    per: str,
    clip: str,
    learn: str,
    rounding: str,
    calibration: Iterable[Any] | None,
    others: tuple[int | None, ...],
) -> None:
    for each in (bits, *(b for b in others if b is not None)):
        top_code(each)
    if not isinstance(exponent, str):
        check_exponent(exponent)
    for what, given, expected in (
        ("exponent", exponent, ("global", "layer")),
        ("per", per, ("tensor", "channel")),
        ("clip", clip, ("max", "mse")),
        ("learn", learn, LEARN),
        ("rounding", rounding, ("soft", "straight-through")),
    ):
        if isinstance(given, str) and given not in expected:
            raise QuantizationError(f"{what}={given!r}: expected one of {', '.join(expected)}")
    if learn != "nothing" and calibration is None:
        raise QuantizationError(f"learn={learn!r} needs calibration batches (calibration=...)")


# ------------------------------------------------------------------------------------------- without data


def _owners(found: Mapping[str, nn.Module]) -> dict[str, str]:
    """The first name of the weight of each layer: tied layers have it in common."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(module.weight), name) for name, module in found.items()}


def _plans(
    found: Mapping[str, nn.Module], owners: Mapping[str, str], bits: int, ends: int | None, per: str
) -> dict[str, _Plan]:
    """The tiles, scales and bits of each weight, under the first of its names."""
    names = list(owners)
    outer = {owners[names[0]], owners[names[-1]]} if ends is not None and len(names) > 2 else set()
    plans = {}
    for name in dict.fromkeys(owners.values()):
        weight = working(weight_of(found[name]))
        tiles = tiling(weight.shape, per, *channels_of(found[name]))
        tiled = to_tiles(weight, tiles)
        own = max(bits, ends or bits) if name in outer else bits
        plans[name] = _Plan(own, tiles, tiled, tiled.abs().amax(-1, keepdim=True))
    return plans


def _input_bits(
    found: Mapping[str, nn.Module],
    owners: Mapping[str, str],
    plans: Mapping[str, _Plan],
    bits: int,
    activations: int | None,
) -> dict[str, int]:
    """The bits of what each layer reads: as many as the weight of an end has, if those are more."""
    if activations is None:
        return {}
    numbers = [name for name, module in found.items() if not isinstance(module, nn.Embedding)]
    own = {name: plans[owners[name]].bits for name in numbers}
    return {name: max(activations, own[name]) if own[name] != bits else activations for name in numbers}


def _with_exponents(plans: dict[str, _Plan], exponent: str | float, clip: bool) -> dict[str, _Plan]:
    """The plans with their exponents and, where they are clipped, smaller scales."""
    if isinstance(exponent, str):
        spreads = {name: Spread.of(plan.weight, plan.size, plan.top) for name, plan in plans.items()}
        shared = find_exponent(list(spreads.values()), clip) if exponent == "global" and spreads else None
        chosen = {name: shared or find_exponent([spread], clip) for name, spread in spreads.items()}
    else:
        chosen = dict.fromkeys(plans, float(exponent))
    made = {name: replace(plan, exponent=chosen[name]) for name, plan in plans.items()}
    if not clip:
        return made
    return {n: replace(p, size=best_size(p.weight, p.size, p.exponent, p.top)) for n, p in made.items()}


def _codes(plan: _Plan, learned: Learned | None) -> tuple[Tensor, float]:
    if learned is not None:
        return learned.codes, learned.exponent
    return encode(plan.weight, plan.size, plan.exponent, plan.top), plan.exponent


def _told(plan: _Plan, learned: Learned | None) -> PowerLayer:
    codes, a = _codes(plan, learned)
    error = (decode(codes, plan.size, a, plan.top) - plan.weight).norm() / plan.weight.norm().clamp_min(1e-30)
    said = (learned.before, learned.after, learned.moved) if learned is not None else (None, None, None)
    return PowerLayer(plan.bits, a, float(error), *said)


def _find_ranges(
    made: nn.Module, plain: nn.Module, inputs: Mapping[str, PowerInput], batches: Sequence[Any] | None
) -> None:
    """Ranges of activations, in place: of the batches, else of batch norms, else (as they are made) of each input."""
    if batches is not None and inputs:
        with observing(inputs):
            run_batches(made, batches)
    elif inputs:
        for name, (low, high) in ranges_of_norms(plain, inputs).items():
            inputs[name].low, inputs[name].high = torch.tensor(low), torch.tensor(high)


# ---------------------------------------------------------------------------------------------- with data


def _learned(
    model: nn.Module,
    found: Mapping[str, nn.Module],
    owners: Mapping[str, str],
    plans: Mapping[str, _Plan],
    reads: Mapping[str, int],
    batches: list[Any],
    blocks: Sequence[str],
    how: Learning,
) -> tuple[dict[str, Learned], dict[str, dict[str, Tensor]]]:
    """What came of each layer that could be learned, and what its input's quantizer then holds."""
    work = copy.deepcopy(model)
    for name, plan in plans.items():
        weight: Any = work.get_submodule(name).weight
        codes, a = _codes(plan, None)
        weight.data.copy_(from_tiles(decode(codes, plan.size, a, plan.top), plan.tiles, weight.shape))
    tied = {owner for name, owner in owners.items() if name != owner}
    can = [name for name in plans if name not in tied and not isinstance(found[name], nn.Embedding)]
    units = _units(model, can, blocks, batches)
    relus = read_by_relu(model, can)
    results: dict[str, Learned] = {}
    ranges: dict[str, dict[str, Tensor]] = {}
    for seen in walk(model, units, batches, inputs_from=work):
        names = units[seen.name]
        free = {n: FreeCodes(plans[n].weight, plans[n].size, plans[n].exponent, plans[n].top, how.soft) for n in names}
        unit = Unit(seen.name, free, {n: plans[n].tiles for n in names}, seen.name in relus)
        if reads:
            unit.inputs = add_inputs(work, {n: reads[n] for n in names}, {n: plans[n].exponent for n in names})
            with observing(unit.inputs):
                output_error(work.get_submodule(seen.name), seen)
        made = learn_unit(work, unit, seen, how)
        put(work, unit, made)
        results |= made
        ranges |= {n: {k: v.detach().clone() for k, v in each.state_dict().items()} for n, each in unit.inputs.items()}
    return results, ranges


def _units(model: nn.Module, can: Sequence[str], blocks: Sequence[str], batches: list[Any]) -> dict[str, list[str]]:
    """What is kept: the outputs of blocks with the layers in them, and of the layers outside; those that run."""
    ran = reached(model, can, batches)
    units: dict[str, list[str]] = {}
    for name in can:
        if name in ran:
            own = next((b for b in blocks if name == b or name.startswith(f"{b}.")), name)
            units.setdefault(own, []).append(name)
    if idle := [block for block in blocks if block not in units]:
        raise QuantizationError(f"block {idle[0]!r} holds no layer that can be learned; see model.named_modules()")
    return units
