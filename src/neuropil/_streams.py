"""What is told of the tensors and operations of a forward pass that is followed (`neuropil._trace`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Stream:
    """One linear map's outputs inside an activation."""

    op: int  # number of the weight operation it stems from
    index: Tensor  # same shape as the activation: which output of the map each entry is
    nonlinear: bool = False
    gate: bool = False
    bends: int = 0  # nonlinear operations passed, clipping aside


@dataclass
class Value:
    """What is known of one tensor of the forward pass."""

    streams: list[Stream] = field(default_factory=list)
    foreign: bool = False  # also depends on something that is no linear map's output (the residual, attention)
    scale: bool = False  # one number for many neurons (the root mean square of a norm)
    node: int = -1
    parameter: str = ""  # the one parameter it was made of, if it has no streams


@dataclass
class View:
    """Which part of which parameter a linear map used: geometry of a strided view."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass
class WeightOp:
    """A linear map as it was applied: its weight, what it read, and in which module."""

    kind: str  # "linear" | "conv"
    weight: View
    weight_first: bool
    read: Value
    module: str
    out_features: int
    rank: int  # of the activation
    settings: tuple[Any, ...] = ()  # of a convolution
    groups: int = 1
    to_nonlinear: bool = False
    activation: list[str] = field(default_factory=list)
    padding: tuple[int, ...] = ()  # by which the module pads its input before a convolution
    late_bias: bool = False  # its bias is added by a step of its own
    weight_node: int = -1  # of a weight that was computed from its parameter (standardised, cast)

    @property
    def biases(self) -> tuple[str, str]:
        """What a bias of this map may be called."""
        return self.weight.name.removesuffix("weight") + "bias", self.weight.name + "_bias"


@dataclass
class Step:
    """One operation of the nonlinearity, kept so that it can be replayed on recomputed projections."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rank: int = -1  # of a normalised tensor: a batch norm of [tokens, neurons] has the neurons second


@dataclass(frozen=True)
class Ref:
    """In a step's arguments: the output of another node, a constant, or a parameter."""

    node: int


@dataclass(frozen=True)
class Unknown:
    """A constant whose value the probe did not see (on the meta device)."""


@dataclass(frozen=True)
class Parameter:
    name: str
    shape: tuple[int, ...] = ()  # that it was read in, where it is not its own


def flat(tree: Any) -> list[Any]:
    if isinstance(tree, list | tuple):
        return [leaf for branch in tree for leaf in flat(branch)]
    if isinstance(tree, dict):
        return flat(list(tree.values()))
    return [tree]


def copied(streams: list[Stream]) -> list[Stream]:
    return [Stream(s.op, s.index, s.nonlinear, s.gate, s.bends) for s in streams]


def widened(index: Tensor, padding: list[int]) -> Tensor | None:
    """The numbers of the outputs after padding in places alone: the border of a feature map is that map's as well."""
    for k, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        dim = index.dim() - 1 - k
        if before == after == 0:
            continue
        if before < 0 or after < 0 or not constant(index, dim):
            return None
        size = list(index.shape)
        size[dim] += before + after
        index = index.narrow(dim, 0, 1).expand(size)
    return index


def constant(index: Tensor, dim: int) -> bool:
    return torch.equal(index.amin(dim), index.amax(dim))


def same(a: list[Stream], b: list[Stream]) -> bool:
    return len(a) == len(b) and all(x.op == y.op and torch.equal(x.index, y.index) for x, y in zip(a, b, strict=True))
