"""The linear layer with Bone adapters around it, and how a base layer's weight is read. See `neuropil.learn.bone`."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from neuropil.learn._bone_block import BoneBlock


class Merge(NamedTuple):
    """An adapter that is in the base's weight."""

    name: str
    turn: int  # counts the model's mergings, so that the last can be told in all layers
    kept: nn.Parameter | None  # the weight before, where it is kept


class BoneLinear(nn.Module):
    """A frozen linear layer (`torch.nn.Linear` or transformers' `Conv1D`) and its adapters, by name.

    base     the layer; its weight is changed by merging alone
    blocks   the adapters, name -> `BoneBlock`
    active   the name of the adapter in use; None for none
    merges   the adapters now in the base's weight, in the order of their merging

    `weight` (in the layout of the base) and `bias` are those of the adapted layer, for code that reads them instead of
    calling the layer, as `torch.nn.MultiheadAttention` does with its output projection.

    Raises TypeError for any other kind of layer.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear | Conv1D):
            raise TypeError(f"BoneLinear({type(base).__name__}): expected a torch.nn.Linear or a transformers Conv1D")
        self.base = base
        self.transposed = isinstance(base, Conv1D)
        self.out_features, self.in_features = sizes_of(base)
        self.blocks = nn.ModuleDict()
        self.active: str | None = None
        self.merges: list[Merge] = []
        self.recompute = False

    def use(self, name: str | None) -> None:
        """Use the adapter of this name, or none, and make it the only trainable one."""
        self.active = name
        for other, block in self.blocks.items():
            block.requires_grad_(other == name)

    @property
    def block(self) -> BoneBlock | None:
        """The adapter that acts now: the active one unless it is merged."""
        if self.active is None or self.active in [merge.name for merge in self.merges]:
            return None
        return cast(BoneBlock, self.blocks[self.active])

    @property
    def weight(self) -> Float[Tensor, "rows columns"]:
        block, weight = self.block, dense_weight(self.base)
        if block is not None:
            weight = block.change(weight).to(weight.dtype)
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> Float[Tensor, " out"] | None:
        return cast(Any, self.base).bias

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        block = self.block
        if block is None:
            return self.base(x)
        if not block.forms_weight:
            return block.around(self.base, x)
        if self.recompute and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._with_weight, x, use_reentrant=False))
        return self._with_weight(x)

    def _with_weight(self, x: Tensor) -> Tensor:
        weight = self.weight
        return functional.linear(x, weight.T if self.transposed else weight, self.bias)

    def merge(self, turn: int = 1, keep: bool = False) -> None:
        """Write the active adapter into the base's weight; `keep` the weight there was. See `merge_bone`."""
        if self.active is None or self.block is None:
            raise ValueError(f"no adapter to merge: the active one is {self.active!r}, merged are {self.merges}")
        old = cast(Any, self.base).weight
        self._set_weight(self.weight.detach(), old.requires_grad)
        # A quantised weight cannot be computed back from a dense one.
        self.merges.append(Merge(self.active, turn, old if keep or is_quantised(old) else None))

    def unmerge(self) -> None:
        """Take the adapter merged last out of the base's weight and make it the active one. See `unmerge_bone`."""
        if not self.merges:
            raise ValueError("no adapter to unmerge: none is merged")
        name, _, kept = self.merges.pop()
        weight = cast(Any, self.base).weight
        if kept is None:
            plain = cast(BoneBlock, self.blocks[name]).undo(dense_weight(self.base)).to(weight.dtype).detach()
            self._set_weight(plain.T if self.transposed else plain, weight.requires_grad)
        elif (kept.device, kept.dtype) == (weight.device, weight.dtype):
            self.base.weight = kept  # the very parameter, so that ties hold again
        else:  # the model was moved in between
            self._set_weight(kept.detach().to(weight.device, weight.dtype), kept.requires_grad)
        self.use(name)

    def _set_weight(self, weight: Tensor, requires_grad: bool) -> None:
        # A new parameter and no writing in place: another layer may share the old one.
        self.base.weight = nn.Parameter(weight.contiguous(), requires_grad=requires_grad)


def dense_weight(base: nn.Module) -> Float[Tensor, "out in"]:
    """The weight by which `base` multiplies, dequantised if need be. TypeError where it does more than that."""
    layer = cast(Any, base)
    plain = type(base).forward in (nn.Linear.forward, Conv1D.forward)
    weight = layer.weight if plain and not parametrize.is_parametrized(base, "weight") else None
    if weight is not None and is_quantised(weight):
        weight = weight.dequantize()
    if weight is not None and isinstance(base, Conv1D):
        weight = weight.T
    if weight is None or tuple(weight.shape) != sizes_of(base) or not weight.is_floating_point():
        raise TypeError(
            f"{type(base).__name__} holds no plain weight of {sizes_of(base)} to form W' from; dequantise the layer, "
            "remove its parametrization, or use a variant that needs no weight (row, free, miss, mini) without merging"
        )
    return weight


def sizes_of(base: nn.Module) -> tuple[int, int]:
    layer = cast(Any, base)
    return (layer.nf, layer.nx) if isinstance(base, Conv1D) else (layer.out_features, layer.in_features)


def is_quantised(weight: Tensor) -> bool:
    """Whether it is a tensor of a class with its own way to be dequantised, as torchao's."""
    return type(weight).dequantize is not Tensor.dequantize
