"""Weights kept in the bits they need, and modules that compute with them.

A *packing* stands for a weight tensor: `Affine` (integer codes on a uniform grid), `Lookup` (codes into tables of
levels or of short vectors), `Sparse` (a bit map and the values it marks), `Residual` (a sum of packings). `pack` puts
packings in the place of a model's weights; such a module still has a `weight`, made anew whenever it is read, so
everything that works on the plain model works on the packed one. `models.save_packed` and `models.load` keep
packed models on disk, byte for byte what `nbytes` says.

>>> model = nn.Sequential(nn.Linear(64, 8))
>>> codes = torch.arange(8 * 64).reshape(8, 64) % 16
>>> packing = Affine.of(codes, levels=16, scale=torch.full((8, 2), 0.1), zero=torch.full((8, 2), 8.0))
>>> pack(model, {"0": packing})
>>> model[0].weight[0, :3]
tensor([-0.8000, -0.7000, -0.6000])
>>> nbytes(packing), 8 * 64 * 4  # 4 bits a weight, and two numbers for each of the 16 groups
(384, 2048)

A weight of any shape is seen as a matrix `[rows, fan]`: the first dimension, and all others. Scales, zeros and
tables have two leading dimensions `[r, g]` and serve tiles of `rows / r` by `fan / g` weights: `[1, 1]` is one for
the whole tensor, `[rows, 1]` one a channel, `[rows, fan / 32]` one for each 32 weights of a channel.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuropil import packed_kernels
from neuropil.packed_codes import PackingError, code_bits, pack_codes, unpack_codes
from neuropil.packings import Affine, Lookup, Packing, Residual, Sparse, empty, nbytes

__all__ = [
    "Affine",
    "Lookup",
    "Packing",
    "PackingError",
    "Residual",
    "Sparse",
    "code_bits",
    "empty",
    "is_packed",
    "nbytes",
    "pack",
    "pack_codes",
    "packed",
    "packed_modules",
    "plain_twin",
    "unpack",
    "unpack_codes",
]


class _Packed:
    """Mixed into a module's class: its `weight` is that of its packing, made when it is read."""

    packing: Packing
    _dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        if next(self.packing.buffers()).is_meta:  # sizes that are kept in tensors cannot be read there
            return torch.empty(self.packing.shape, dtype=self._dtype, device="meta")
        return self.packing.dense().to(self._dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        probe = fn(torch.empty(0, dtype=self._dtype))  # where .to(dtype) would have taken the weight
        self._dtype = probe.dtype if probe.is_floating_point() else self._dtype
        packing = self._modules.pop("packing")  # type: ignore[attr-defined]
        try:
            super()._apply(fn, recurse)  # type: ignore[misc]
        finally:
            self._modules["packing"] = packing  # type: ignore[attr-defined]
        if probe.device != next(packing.buffers()).device:
            packing.to(probe.device)
        return self


class _PackedLinear(_Packed):
    """A linear map that uses the kernels for packed weights where they apply."""

    def forward(self, input: Tensor) -> Tensor:
        out = packed_kernels.linear(self.packing, input)
        if out is None:
            return super().forward(input)  # type: ignore[misc]
        bias: Tensor | None = self.bias  # type: ignore[attr-defined]
        return out if bias is None else out + bias


class _PackedEmbedding(_Packed):
    """An embedding that makes only the rows dense that are asked for."""

    def forward(self, input: Tensor) -> Tensor:
        if self.max_norm is not None:  # type: ignore[attr-defined]
            return super().forward(input)  # type: ignore[misc]
        found = self.packing.rows(input.flatten()).to(self._dtype)
        return found.reshape(*input.shape, -1)


@lru_cache
def _packed_class(cls: Any) -> Any:
    special: dict[Any, type] = {nn.Linear.forward: _PackedLinear, nn.Embedding.forward: _PackedEmbedding}
    mixin = special.get(getattr(cls, "forward", None), _Packed)
    return type(f"Packed{cls.__name__}", (mixin, cls), {"__module__": cls.__module__})


def packed(module: nn.Module, packing: Packing) -> nn.Module:
    """A module of the same kind (still an `nn.Linear`, say) whose weight is in `packing`.

    The bias and all else are shared with `module`, which is left as it is. Raises PackingError where the shapes
    differ or there is no weight.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise PackingError(f"{type(module).__name__} has no weight to pack")
    if weight.shape != packing.shape:
        raise PackingError(f"a packing of shape {list(packing.shape)} for a weight of shape {list(weight.shape)}")
    kind: Any = type(module)
    if parametrize.is_parametrized(module):
        kind = kind.__bases__[0]  # the class that torch derived the parametrised one from
    made = _remade(module, kind if isinstance(module, _Packed) else _packed_class(kind))
    made._modules["packing"] = packing
    made._dtype = weight.dtype
    return made


def _remade(module: nn.Module, cls: Any) -> Any:
    """The module as one of another class, with the same attributes and bias, and neither weight nor packing."""
    made: Any = cls.__new__(cls)
    nn.Module.__init__(made)
    own = ("_parameters", "_modules", "_buffers")
    made.__dict__.update({name: value for name, value in vars(module).items() if name not in own})
    made._buffers.update(module._buffers)
    made._parameters.update({name: value for name, value in module._parameters.items() if name != "weight"})
    inside = ("parametrizations", "packing")
    made._modules.update({name: child for name, child in module._modules.items() if name not in inside})
    return made


def pack(model: nn.Module, packings: Mapping[str, Packing]) -> None:
    """Put packings in the place of weights, in place: module name -> packing. Tied weights follow.

    A module tied to a packed one (an output head that is the embedding) shares the packing.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    for name, packing in packings.items():
        module = model.get_submodule(name)
        weight = module._parameters.get("weight")
        for other in owners.get(id(weight), [name]) if weight is not None else [name]:
            _put(model, other, packed(model.get_submodule(other), packing))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    if not name:
        raise PackingError("the model is itself the layer: put it in a Sequential first")
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def packed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Packing]]:
    """Every packed module of a model, with its name and packing."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _Packed):
            yield name, module, module.packing  # type: ignore[misc]


def is_packed(module: nn.Module) -> bool:
    return isinstance(module, _Packed)


def unpack(model: nn.Module) -> None:
    """Give every packed module a plain weight again, in place: larger, and as fast as the plain model."""
    weights: dict[int, nn.Parameter] = {}
    for name, packed_module, packing in list(packed_modules(model)):
        module: Any = packed_module
        if id(packing) not in weights:
            weights[id(packing)] = nn.Parameter(module.weight.detach())
        made = _remade(module, next(base for base in type(module).__mro__[1:] if not issubclass(base, _Packed)))
        made._parameters = {"weight": weights[id(packing)], **made._parameters}
        _put(model, name, made)


def plain_twin(model: nn.Module) -> nn.Module:
    """A copy on the meta device with plain weights: the shapes of the model before it was packed, and no values."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        bare = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
    twin = copy.deepcopy(model, memo)
    unpack(twin)
    return twin
