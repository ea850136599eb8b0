"""What layers read, rounded on the power grid of their weights: the ranges from data, from batch norms, or dynamic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.nn import functional as F

from neuropil.compress._nupes_power import level_of, position, top_code
from neuropil.compress.quantize.folding import known
from neuropil.compress.quantize.graph import NORMS, RELUS, traced
from neuropil.compress.quantize.models import INPUT, round_inputs
from neuropil.compress.quantize.quantizer import FakeQuantizer, straight_through
from neuropil.compress.quantize.tiles import QuantizationError, check_finite

DEVIATIONS = 6.0  # a batch norm's answers are taken to lie within so many deviations of their mean
_KEEP = {"MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d", "MaxPool1d", "AvgPool1d", "Flatten"} | {
    *("Dropout", "Dropout1d", "Dropout2d", "Identity", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"),
    *("boolean_dispatch", "max_pool1d", "avg_pool1d", "flatten", "dropout", "contiguous", "view", "reshape"),
}


class PowerInput(FakeQuantizer):
    """Rounds activations to sign(x) m (k / top)^(1/a), k from 0 (where none is negative) or from -top.

    The range [low, high] is kept in the state dictionary; NaN stands for a range found anew from every batch.
    `observing` makes it watch instead of round.
    """

    low: Tensor
    high: Tensor
    exponent: Tensor

    def __init__(self, bits: int = 8, exponent: float = 0.5) -> None:
        super().__init__()
        self.bits, self.observing = bits, False
        top_code(bits)
        for name, value in (("low", torch.nan), ("high", torch.nan), ("exponent", exponent)):
            self.register_buffer(name, torch.tensor(value))

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "exponent": float(self.exponent.detach())}

    @torch.no_grad()
    def observe(self, x: Float[Tensor, "*shape"]) -> None:
        """Widen the range to what is seen. Raises QuantizationError for NaN and infinity."""
        check_finite(x, "what a layer reads in the calibration")
        self.low = torch.fmin(self.low, x.amin().to(self.low.dtype))
        self.high = torch.fmax(self.high, x.amax().to(self.high.dtype))

    def grid(self, x: Float[Tensor, "*shape"]) -> tuple[Tensor, Tensor]:
        """The size of the top code, and the top code."""
        seen = torch.isfinite(self.high)
        low = torch.where(seen, self.low, x.detach().amin().to(self.low.dtype))
        high = torch.where(seen, self.high, x.detach().amax().to(self.high.dtype))
        signed = low < 0
        top = torch.where(signed, float(top_code(self.bits)), float(top_code(self.bits, signed=False)))
        return torch.maximum(-low, high).to(x.dtype), top.to(x.dtype)

    def codes(self, x: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Tensor, Tensor]:
        """Integer codes, the size of the top code, and the top code."""
        size, top = self.grid(x)
        x = torch.where(self.low >= 0, x.clamp(min=0), x)  # an unsigned grid has nothing below 0
        at = position(x, size, self.exponent.to(x.dtype), top)
        return straight_through(at, at.detach().round()), size, top

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.observing:
            self.observe(x)
            return x
        k, size, top = self.codes(x)
        return k.sign() * level_of(k.abs(), self.exponent.to(x.dtype), top) * size

    def extra_repr(self) -> str:
        return f"{self.bits} bits, exponent {float(self.exponent.detach()):.3f}"


def add_inputs(model: nn.Module, bits: Mapping[str, int], exponents: Mapping[str, float]) -> dict[str, PowerInput]:
    """Give the layers named in `bits`, in place, a `PowerInput`, so that a saved model can be loaded into one."""
    made = {}
    for name in bits:
        round_inputs(model, PowerInput(bits[name], exponents[name]), [name])
        added = model.get_submodule(name).get_submodule(INPUT)
        assert isinstance(added, PowerInput)
        made[name] = added
    return made


@contextmanager
def observing(inputs: Mapping[str, PowerInput]) -> Iterator[None]:
    """While the model runs inside, ranges are widened to what is seen, and nothing is rounded.

    Raises QuantizationError, at the end, for inputs that nothing came to.
    """
    for each in inputs.values():
        each.observing = True
    try:
        yield
    finally:
        for each in inputs.values():
            each.observing = False
    if unseen := [name for name, each in inputs.items() if not bool(torch.isfinite(each.high))]:
        raise QuantizationError(f"the calibration never reached {', '.join(unseen)}: give data that do, or skip them")


def ranges_of_norms(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[float, float]]:
    """`(low, high)` of what layers read where that is a batch norm's answer, through ReLU, pooling and flattening.

    A norm answers with mean beta and deviation |gamma| in each channel; six deviations about it are kept. Layers that
    read anything else, and models that torch.fx cannot follow, have no range here.
    """
    wanted, found = set(names), {}
    try:
        graph = traced(model)
    except QuantizationError:
        return {}
    for node in graph.nodes:
        if node.op == "call_module" and node.target in wanted:
            norm, relu = _source(model, node.args[0] if node.args else None)
            if norm is not None:
                mean, deviation = known(norm)
                low = float((mean - DEVIATIONS * deviation).min())
                high = float((mean + DEVIATIONS * deviation).max())
                found[str(node.target)] = (0.0 if relu else low, max(high, 0.0) if relu else high)
    return found


def _source(model: nn.Module, node: Any) -> tuple[Any, bool]:
    """The batch norm that a node's numbers come from, and whether a ReLU lies between."""
    relu = False
    while isinstance(node, fx.Node):
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, NORMS):
            return module, relu
        if isinstance(module, nn.ReLU) or node.target in RELUS:
            relu = True
        elif (type(module).__name__ if module is not None else _name(node.target)) not in _KEEP:
            break
        node = node.args[0] if node.args else None
    return None, relu


def _name(target: Any) -> str:
    return target if isinstance(target, str) else "max_pool2d" if target is F.max_pool2d else target.__name__
