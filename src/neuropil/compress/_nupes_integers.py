"""Layers with exponent 1/2 in integers: products of squared codes, summed exactly, and one scale at the end."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from neuropil.changes import Changes
from neuropil.compress._nupes_inputs import PowerInput
from neuropil.compress._nupes_power import levels
from neuropil.compress.quantize.models import INPUT
from neuropil.compress.quantize.tiles import QuantizationError
from neuropil.packed import Lookup, packed_modules


def squared(k: Integer[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
    """k |k|: the level of a code, in units of the least one."""
    return k * k.abs()


def integer_matmul(x: Integer[Tensor, "... n fan"], w: Integer[Tensor, "... fan m"], bound: int) -> Tensor:
    """The exact product; sums of at most `bound` are kept in 32 bits where they fit, else in 64."""
    if x.ndim == 2 and max(int(x.abs().amax()), int(w.abs().amax())) <= 127 and bound < 1 << 31:
        return torch._int_mm(x.to(torch.int8).contiguous(), w.to(torch.int8).contiguous())
    kind = torch.int32 if bound < 1 << 31 else torch.int64
    return torch.matmul(x.to(kind), w.to(kind))


class _PowerLayer(nn.Module):
    """What both layers share: packed codes of the weight, the input's quantizer, the scale of the sums."""

    bias: Tensor | None

    def __init__(self, layer: Any, inputs: PowerInput) -> None:
        super().__init__()
        self.packing, self.inputs = layer.packing, inputs
        self.register_parameter("bias", layer.bias)
        self.top = (self.packing.table.shape[2] - 1) // 2

    def weight_codes(self) -> Integer[Tensor, "out fan"]:
        """The signed codes of the weight, as a matrix."""
        return self.packing.integers().int() - self.top

    def _bound(self, top: Tensor, fan: int) -> int:
        """What no sum of `fan` products exceeds."""
        return self.top**2 * int(top) ** 2 * fan

    def _scale(self, size: Tensor, top: Tensor) -> Float[Tensor, " out"]:
        rows = self.packing.shape[0]
        return (self.packing.scale[:, 0] / self.top**2).expand(rows) * (size / top.square())


class PowerLinear(_PowerLayer):
    """A linear map with an integer matrix product: y = s_w s_x sum_j sign(p_j) p_j^2 + b with p_j = k_w k_x."""

    def forward(self, x: Float[Tensor, "*batch fan"]) -> Float[Tensor, "*batch out"]:
        k, size, top = self.inputs.codes(x)
        flat = squared(k.detach().int()).flatten(0, -2)
        sums = integer_matmul(flat, squared(self.weight_codes()).T, self._bound(top, x.shape[-1]))
        out = sums.to(x.dtype).reshape(*x.shape[:-1], -1) * self._scale(size, top)
        return out if self.bias is None else out + self.bias


class PowerConv2d(_PowerLayer):
    """A convolution with integer products and sums."""

    def __init__(self, layer: nn.Conv2d, inputs: PowerInput) -> None:
        super().__init__(layer, inputs)
        self.groups, self.kernel = layer.groups, layer.kernel_size
        self.how: dict[str, Any] = {"stride": layer.stride, "dilation": layer.dilation, "padding": layer.padding}

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n out h2 w2"]:
        k, size, top = self.inputs.codes(x)
        k = k.detach()
        patches = F.unfold(k * k.abs(), self.kernel, **self.how)  # small integers: exact in floats
        n, places = patches.shape[0], patches.shape[-1]
        patches = patches.reshape(n, self.groups, -1, places).int()
        weight = squared(self.weight_codes()).reshape(self.groups, -1, patches.shape[2])
        bound = self._bound(top, patches.shape[2])
        if self.groups == 1:
            flat = patches[:, 0].transpose(1, 2).flatten(0, 1)
            sums = integer_matmul(flat, weight[0].T, bound).reshape(n, places, -1).transpose(1, 2)
        else:
            sums = integer_matmul(weight[None], patches, bound).flatten(1, 2)
        (s1, s2), (d1, d2), (p1, p2) = self.how["stride"], self.how["dilation"], self.how["padding"]
        high = (x.shape[2] + 2 * p1 - d1 * (self.kernel[0] - 1) - 1) // s1 + 1
        wide = (x.shape[3] + 2 * p2 - d2 * (self.kernel[1] - 1) - 1) // s2 + 1
        out = sums.to(x.dtype).reshape(n, -1, high, wide) * self._scale(size, top)[:, None, None]
        return out if self.bias is None else out + self.bias[:, None, None]


def to_integers(model: nn.Module) -> Changes:
    """A copy in which quantized layers of exponent 1/2 compute in integers; it answers as before, up to float rounding.

    The model is one of `nupes_quantize(..., exponent=0.5, activations=...)`. Layers of another exponent, without
    rounded inputs, or of a kind that has no integer path here are left. Weights stay packed. To keep it on disk, save
    the model it is made from (`models.save_packed`) and make it again.
    Raises QuantizationError where the model has no packed layer.
    """
    made = copy.deepcopy(model)
    changed, left = [], {}
    named = list(packed_modules(made))
    if not named:
        raise QuantizationError("no weight of this model is packed: quantize it first (nupes_quantize)")
    for name, module, packing in named:
        inputs = module._modules.get(INPUT)
        if why := _unfit(module, packing, inputs):
            left[name] = why
            continue
        assert isinstance(inputs, PowerInput)
        layer = PowerLinear(module, inputs) if isinstance(module, nn.Linear) else PowerConv2d(module, inputs)  # type: ignore[arg-type]
        layer.train(module.training)
        parent, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(parent), leaf, layer)
        changed.append(name)
    return Changes(made, tuple(changed), left)


def _unfit(module: nn.Module, packing: nn.Module, inputs: nn.Module | None) -> str:
    """Why a layer cannot compute in integers; nothing where it can."""
    if not isinstance(inputs, PowerInput):
        return "its inputs are not rounded to a power grid"
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return f"{type(module).__name__} has no integer path; Linear and Conv2d have"
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return "it is padded by a rule, not by a number of zeros"
    half = levels(0.5, (packing.table.shape[2] - 1) // 2) if isinstance(packing, Lookup) else None
    if half is None or float(inputs.exponent) != 0.5:
        return "its exponent is not 0.5"
    table = packing.table.flatten()[len(half) - 1 :].double() if isinstance(packing, Lookup) else half
    return "" if torch.allclose(table, half, rtol=1e-6, atol=0) else "its exponent is not 0.5"
