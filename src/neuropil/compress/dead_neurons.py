"""How many hidden neurons are silent: for some inputs (dynamic), or because all their weights are gone (static).

For an input, a rectified unit is dead if its output is zero. It is *statically* dead if besides all weights by which
it reads are zero, so that no input can wake it, and *dynamically* dead otherwise. The dead-neuron rate is the mean
over inputs of the share of units that are dead, so dynamic + static = all that are dead.

>>> import torch
>>> model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 1))
>>> with torch.no_grad():
...     _ = model[0].weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0], [1.0, -2.0]]))
>>> rates = dead_neuron_rate(model, [torch.tensor([[1.0, 1.0], [3.0, 1.0]])])
>>> rates.layers["0"]
DeadRate(dynamic=0.375, static=0.25, units=4)

Source: the measure of Liu, Ghosh, Tan and Motani, TMLR 2023, arXiv:2212.06145.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from neuropil.errors import ModelError
from neuropil.evaluate import evaluating

READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
RECTIFIERS: set[Any] = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6}
SMOOTH: set[Any] = {F.gelu, F.silu, F.mish, F.elu, F.leaky_relu, F.softplus}
_SOURCE = "_neuropil_source"  # an attribute of a layer's answer: the layer


@dataclass(frozen=True)
class DeadRate:
    """Shares of a layer's units that are dead, mean over inputs, and how many units it has."""

    dynamic: float
    static: float
    units: int

    @property
    def total(self) -> float:
        return self.dynamic + self.static


@dataclass(frozen=True)
class DeadRates:
    """The rates of each layer, and of all units together."""

    layers: dict[str, DeadRate]

    @property
    def units(self) -> int:
        return sum(rate.units for rate in self.layers.values())

    @property
    def dynamic(self) -> float:
        return sum(rate.dynamic * rate.units for rate in self.layers.values()) / self.units

    @property
    def static(self) -> float:
        return sum(rate.static * rate.units for rate in self.layers.values()) / self.units

    @property
    def total(self) -> float:
        return self.dynamic + self.static


@torch.no_grad()
def dead_neuron_rate(
    model: nn.Module, batches: Iterable[Any], *, per: str = "position", threshold: float = 0.0
) -> DeadRates:
    """The dead-neuron rates of every rectified layer, over batches of inputs.

    A batch is a tensor, a pair whose first part is the input (as a loader of labelled examples gives it), or a mapping
    of arguments. Rectifiers are found as they run, whether modules or functions, and named after the linear
    map or convolution that feeds them, through a batch norm or not; after the module that calls them where nothing
    feeds them alone (a sum of branches), where no unit counts as static.

    per        "position": each position of a feature map, token or row is a unit. "channel": a channel is one unit,
               dead where all its positions are (for tokens and rows as "position").
    threshold  outputs up to this size count as silent. Above 0 units of GELU, SiLU and the like, which are never
               exactly zero, are counted too.

    The model's answers, gradients and modes are left as they were; how inputs are batched does not matter.
    Raises ValueError for no batches, an unknown `per` and a negative threshold; ModelError where no rectifier runs.
    """
    if per not in ("position", "channel"):
        raise ValueError(f"per={per!r}: expected 'position' or 'channel'")
    if threshold < 0:
        raise ValueError(f"threshold={threshold}: expected 0 or more")
    meter = _Meter(per, threshold)
    inputs = 0
    with evaluating(model), _named(model, meter):
        for batch in batches:
            meter.begin()
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch[0] if isinstance(batch, tuple | list) else batch)
            inputs += 1
    if not inputs:
        raise ValueError("there are no batches to measure on; give at least one")
    if not meter.counts:
        raise ModelError(
            "no rectifier ran, so no neuron can be dead; for GELU and the like give the size of output that counts as "
            "silent: threshold=0.01, say"
        )
    return DeadRates({name: count.rate() for name, count in meter.counts.items()})


@dataclass
class _Count:
    units: int = 0  # of one input
    seen: int = 0  # units x inputs
    dynamic: int = 0
    static: int = 0

    def rate(self) -> DeadRate:
        return DeadRate(self.dynamic / self.seen, self.static / self.seen, self.units)


@dataclass
class _Meter:
    """Counts dead units of every rectifier that runs; `stack` holds the names of the modules that are running."""

    per: str
    threshold: float
    counts: dict[str, _Count] = field(default_factory=dict)
    stack: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)

    def begin(self) -> None:
        self.calls.clear()
        self.stack.clear()

    def see(self, source: tuple[str, nn.Module] | None, out: Tensor) -> None:
        """The output of a rectifier, and the layer that fed it."""
        name = source[0] if source else (self.stack[-1] if self.stack else "")
        self.calls[name] = self.calls.get(name, 0) + 1
        name = name if self.calls[name] == 1 else f"{name}#{self.calls[name]}"
        dead = out.abs() <= self.threshold
        weight: Any = source[1].weight if source else None
        dims = weight.dim() if weight is not None else 4 if out.dim() == 4 else 2
        axis = 1 - dims  # of channels: the last of rows and tokens, followed by space in feature maps
        if self.per == "channel":
            dead = dead.movedim(axis, 1).flatten(2).all(2) if axis < -1 else dead
        count = self.counts.setdefault(name, _Count())
        count.units = dead[0].numel()
        count.seen += dead.numel()
        static = 0
        if weight is not None:
            emptied = ~weight.detach().flatten(1).any(1)
            along = 1 if self.per == "channel" and axis < -1 else axis
            static = int(dead.movedim(along, -1)[..., emptied].sum())
        count.static += static
        count.dynamic += int(dead.sum()) - static


class _Rectifiers(TorchFunctionMode):
    """Shows the meter what every rectifier answers."""

    def __init__(self, meter: _Meter) -> None:
        super().__init__()
        self.meter = meter
        self.kinds = RECTIFIERS | SMOOTH if meter.threshold > 0 else RECTIFIERS

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.kinds:
            return func(*args, **(kwargs or {}))
        source = getattr(args[0] if args else (kwargs or {}).get("input"), _SOURCE, None)
        out = func(*args, **(kwargs or {}))
        self.meter.see(source, out)
        return out


def _named(model: nn.Module, meter: _Meter) -> ExitStack:
    """While it lasts, answers of layers carry their layer, and the meter knows which module is running."""
    undo = ExitStack()
    for name, module in model.named_modules():
        undo.callback(module.register_forward_pre_hook(_enter(name, meter)).remove)
        undo.callback(module.register_forward_hook(_leave(name, module, meter)).remove)
    undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)  # it goes round the rectifiers of torch's own transformer
    undo.enter_context(_Rectifiers(meter))
    return undo


def _enter(name: str, meter: _Meter) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any) -> None:
        meter.stack.append(name)

    return hook


def _leave(name: str, module: nn.Module, meter: _Meter) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        meter.stack.pop()
        if isinstance(module, READERS):
            setattr(out, _SOURCE, (name, module))
        elif isinstance(module, NORMS) and args and hasattr(args[0], _SOURCE):
            setattr(out, _SOURCE, getattr(args[0], _SOURCE))

    return hook
