r"""How many bits for which layer: sensitivities, costs, and the choice between them.

>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
>>> harm = sensitivity(model, bits=(2, 4, 8))
>>> bits = bit_allocation(harm, size_costs(model, (2, 4, 8)), budget=1100)  # bytes
>>> bits
{'0': 4, '2': 8}
>>> from neuropil.compress.quantize import quantize_model
>>> print(quantize_model(model, recipe(bits)))
changed 2 modules

`sensitivity` says what each layer's rounding alone costs: squared error, rise of a loss, or (HAWQ-V2) mean trace of
the Hessian times squared error. `bit_allocation` minimises their sum under a budget: an integer program (HAWQ-V3),
all combinations, or greedily. `bit_search` asks only for the score of whole assignments: all, evolution, or REINFORCE
(HAQ, much simplified). `BitBranches` learns the choice by gradient (DNAS).

Sources: Dong et al. 2020, arXiv:1911.03852; Yao et al. 2021, arXiv:2011.10680; Wang et al. 2019, arXiv:1811.08886
(HAQ); Wu et al. 2018, arXiv:1812.00090 (DNAS).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuropil.compress.quantize.models import layers, quantizer_for, weight_of
from neuropil.compress.quantize.tiles import QuantizationError
from neuropil.evaluate import evaluating
from neuropil.packed import Packing, nbytes

Table = Mapping[str, Mapping[int, Any]]  # layer -> bits -> how much
BITS = (2, 3, 4, 6, 8)
SETTINGS: dict[str, Any] = {"scheme": "symmetric", "granularity": "channel", "observer": "mse"}


def recipe(bits: Mapping[str, int], settings: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """The recipe for `quantize_model` and `qat_prepare` that gives each layer its bits."""
    given = SETTINGS if settings is None else settings
    return {name: {**given, "bits": b} for name, b in bits.items()}


# ---------------------------------------------------------------------------------------------- sensitivities


def sensitivity(
    model: nn.Module,
    bits: Sequence[int] = BITS,
    *,
    loss: Callable[[nn.Module], Tensor | float] | None = None,
    curvature: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    skip: Iterable[str] = (),
) -> dict[str, dict[int, float]]:
    """What it costs to round each layer alone to so many bits.

    Without more, the squared error $\\lVert Q(w) - w \\rVert^2$. With `curvature` (see there: mean traces or top
    eigenvalues of layers), that error times the layer's curvature, never negative. With `loss(model)`, how much higher
    the loss is than that of the plain model: one evaluation for each layer and number of bits.
    Tied layers count once, under the first name.
    """
    if loss is not None and curvature is not None:
        raise QuantizationError("give loss or curvature, not both")
    found, _ = layers(model, skip)
    given = SETTINGS if settings is None else settings
    table: dict[str, dict[int, float]] = {}
    work = copy.deepcopy(model) if loss is not None else model
    seen: set[int] = set()
    with torch.no_grad(), evaluating(work):
        plain = float(loss(work)) if loss is not None else 0.0
        for name, module in found.items():
            if id(module.weight) in seen:
                continue
            seen.add(id(module.weight))
            weight, table[name] = weight_of(module), {}
            for b in bits:
                quantizer = quantizer_for({**given, "bits": b}, name, module)
                assert quantizer is not None
                rounded = quantizer(weight)
                if loss is None:
                    size = float((rounded - weight).double().square().sum())
                    table[name][b] = size * (max(0.0, curvature[name]) if curvature is not None else 1.0)
                else:
                    table[name][b] = _with_weight(work.get_submodule(name), rounded, lambda: loss(work)) - plain
    return table


def _with_weight(module: nn.Module, weight: Tensor, value: Callable[[], Tensor | float]) -> float:
    kept = module.weight.data
    assert isinstance(kept, Tensor)
    module.weight.data = weight
    try:
        return float(value())
    finally:
        module.weight.data = kept


# -------------------------------------------------------------------------------------------------------- costs


def size_costs(
    model: nn.Module, bits: Sequence[int] = BITS, *, settings: Mapping[str, Any] | None = None, skip: Iterable[str] = ()
) -> dict[str, dict[int, float]]:
    """Bytes of each layer's packed weight, scales and all."""
    found, _ = layers(model, skip)
    given = SETTINGS if settings is None else settings
    table: dict[str, dict[int, float]] = {}
    seen: set[int] = set()
    for name, module in found.items():
        if id(module.weight) not in seen:
            seen.add(id(module.weight))
            table[name] = {b: float(nbytes(_pack({**given, "bits": b}, name, module))) for b in bits}
    return table


def _pack(settings: Mapping[str, Any], name: str, module: nn.Module) -> Packing:
    quantizer = quantizer_for({**settings, "observer": "minmax"}, name, module)  # the size is that of any range
    assert quantizer is not None
    with torch.no_grad():
        return quantizer.pack(weight_of(module))


def operations(model: nn.Module, *example: Tensor) -> dict[str, int]:
    """Multiplications (with an addition each) of each layer on an example, divided by its batch size."""
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: Any, out: Any) -> None:
            weight = weight_of(module)
            if not isinstance(module, nn.Embedding):  # it only looks up
                outputs = args[0] if type(module).__name__.startswith("ConvTranspose") else out
                per = weight[0].numel() if weight.ndim > 2 or isinstance(module, nn.Linear) else weight.shape[0]
                counts[name] = counts.get(name, 0) + outputs.numel() * per // len(args[0])

        return count

    handles = [module.register_forward_hook(hook(name)) for name, module in layers(model)[0].items()]
    try:
        with torch.no_grad(), evaluating(model):
            model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def bops_costs(
    macs: Mapping[str, int], bits: Sequence[int] = BITS, activation_bits: int | None = None
) -> dict[str, Any]:
    """Bit operations: multiplications times bits of weights times bits of activations (as many, if not given)."""
    return {name: {b: float(count * b * (activation_bits or b)) for b in bits} for name, count in macs.items()}


def roofline_costs(
    macs: Mapping[str, int], sizes: Table, *, speed: Mapping[int, Any], bandwidth: float | int
) -> dict[str, dict[int, Any]]:
    """Seconds of each layer by a roofline: the longer of computing and of reading the weights.

    `speed` is multiplications a second at each number of bits, `bandwidth` bytes a second, both of your machine. A
    measured table of latency or energy can be given to `bit_allocation` in this one's place.
    """
    missing = sorted({b for row in sizes.values() for b in row} - set(speed))
    if missing:
        raise QuantizationError(f"no speed is given for {missing} bits")
    return {n: {b: max(macs.get(n, 0) / speed[b], s / bandwidth) for b, s in row.items()} for n, row in sizes.items()}


# -------------------------------------------------------------------------------------------------------- choice


def bit_allocation(
    harm: Table, costs: Table | Sequence[Table], budget: float | int | Sequence[float | int], method: str = "ilp"
) -> dict[str, int]:
    """The bits of each layer with the least total harm whose total cost is within the budget.

    `harm` as `sensitivity` gives it; `costs` a table of bytes, bit operations, seconds or joules, or several tables
    with a budget each. method: "ilp" (exact), "exhaustive" (exact, at most a million combinations), "greedy" (from
    the most bits down, each time the step that harms least for what it saves).
    Raises QuantizationError where no choice is within the budget.
    """
    tables = [costs] if isinstance(costs, Mapping) else list(costs)
    budgets = [budget] if isinstance(budget, int | float) else list(budget)
    for table in tables:
        lacking = [n for n in harm if n not in table or set(harm[n]) - set(table[n])]
        if lacking:
            raise QuantizationError(f"the costs lack {lacking[0]!r}, or some of its bits {sorted(harm[lacking[0]])}")
    for table, limit in zip(tables, budgets, strict=True):
        least = sum(min(table[n][b] for b in harm[n]) for n in harm)
        if least > limit:
            raise QuantizationError(f"a budget of {limit:g} is below the least possible cost, {least:g}")
    if method not in _CHOOSE:
        raise QuantizationError(f"method={method!r}: expected one of {', '.join(_CHOOSE)}")
    return _CHOOSE[method](harm, tables, budgets)


def _ilp(harm: Table, tables: Sequence[Table], budgets: Sequence[float | int]) -> dict[str, int]:
    from scipy.optimize import Bounds, LinearConstraint, milp

    choices = [(n, b) for n in harm for b in harm[n]]
    one_each = np.array([[float(n == m) for n, _ in choices] for m in harm])
    rows = np.array([[table[n][b] / limit for n, b in choices] for table, limit in zip(tables, budgets, strict=True)])
    value = np.array([harm[n][b] for n, b in choices])
    value = value / max(float(np.abs(value).max()), 1e-300)  # tolerances of the solver are absolute
    found = milp(
        value,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(rows, -np.inf, 1)],
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise QuantizationError(f"no choice of bits is within the budgets ({found.message})")
    return {n: b for (n, b), chosen in zip(choices, found.x, strict=True) if chosen > 0.5}


def _all(names: Mapping[str, Iterable[int]]) -> Iterable[dict[str, int]]:
    options = [sorted(bits) for bits in names.values()]
    count = int(np.prod([float(len(o)) for o in options]))
    if count > 1_000_000:
        raise QuantizationError(f"{count} combinations are too many to try: use another method")
    return (dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*options))


def _cost(table: Table, bits: Mapping[str, int]) -> float:
    return sum(table[n][b] for n, b in bits.items())


def _exhaustive(harm: Table, tables: Sequence[Table], budgets: Sequence[float | int]) -> dict[str, int]:
    within = (c for c in _all(harm) if all(_cost(t, c) <= limit for t, limit in zip(tables, budgets, strict=True)))
    best = min(within, key=lambda c: _cost(harm, c), default=None)
    if best is None:
        raise QuantizationError("no choice of bits is within the budgets")
    return best


def _greedy(harm: Table, tables: Sequence[Table], budgets: Sequence[float | int]) -> dict[str, int]:
    bits = {n: max(row) for n, row in harm.items()}
    while over := [t for t, limit in zip(tables, budgets, strict=True) if _cost(t, bits) > limit]:
        steps = []
        for n, b in bits.items():
            for lower in (x for x in harm[n] if x < b):
                saved = sum(t[n][b] - t[n][lower] for t in over)
                if saved > 0:
                    steps.append(((harm[n][lower] - harm[n][b]) / saved, n, lower))
        if not steps:
            raise QuantizationError("no choice of bits that greedy steps reach is within the budgets")
        _, name, lower = min(steps)
        bits[name] = lower
    return bits


_CHOOSE = {"ilp": _ilp, "exhaustive": _exhaustive, "greedy": _greedy}
