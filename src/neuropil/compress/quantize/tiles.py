"""Which numbers of a tensor share a scale: its tiles, and the errors that go with them.

A tensor is cut into tiles `[r, high, g, wide]` exactly as `neuropil.packed` cuts a weight's matrix, so that a scale
`[r, g]` found here is one that `Affine` and `Lookup` can keep.

>>> tiling((64, 32, 3, 3), "channel")  # 64 tiles, each of one row of 288
Tiling(r=64, high=1, g=1, wide=288)
>>> tiling((64, 128), ("group", 32)).scales
(64, 4)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from neuropil.errors import ModelError

Granularity = str | tuple[str, int]


class QuantizationError(ModelError, ValueError):
    """A tensor, a layer or a setting that cannot be quantized; the message names it."""


class Tiling(NamedTuple):
    """A tensor seen as `r` by `g` tiles of `high` by `wide` numbers."""

    r: int
    high: int
    g: int
    wide: int

    @property
    def scales(self) -> tuple[int, int]:
        """The shape of what there is one of per tile."""
        return self.r, self.g


def tiling(shape: Sequence[int], granularity: Granularity, axis: int = 0, splits: int = 1) -> Tiling:
    """Tiles of a tensor: its channels lie along `axis` (0 or 1; -1 for the features of activations).

    "tensor" is one tile; "channel" one a channel; ("channels", n) one for n neighbouring channels; ("group", g) one
    for g weights of one channel; "token" one for each vector along the last dimension. `splits` is the number of
    convolution groups where axis is 1 (a transposed convolution has a channel of its own in each).

    Raises QuantizationError where a group is larger than what it divides, or does not divide it.
    """
    kind, size = (granularity, 0) if isinstance(granularity, str) else granularity
    if kind == "tensor":
        return Tiling(1, shape[0] if shape else 1, 1, prod(shape[1:]))
    if kind == "token":
        return Tiling(prod(shape[:-1]), 1, 1, shape[-1] if shape else 1)
    if axis == -1:
        rows, channels, inner = prod(shape[:-1]), shape[-1], 1
    elif axis == 1:
        rows, channels, inner = shape[0], shape[1], prod(shape[2:])
    else:
        rows, channels, inner = 1, shape[0] if shape else 1, prod(shape[1:])
    if kind in ("channel", "channels"):
        size = size if kind == "channels" else 1
        _divides(size, channels, f"{channels} channels", shape)
        if axis == 0:
            return Tiling(channels // size, size, 1, inner)
        return Tiling(splits, rows // splits, channels // size, size * inner)
    if kind == "group" and axis == 0:
        _divides(size, inner, f"{inner} weights a channel", shape)
        return Tiling(channels, 1, inner // size, size)
    if kind == "group":  # some inputs of one output: whole kernels of them
        fan = rows // splits * inner
        _divides(size, fan, f"{fan} weights a channel", shape)
        if size % inner or (rows // splits) % (size // inner):
            raise QuantizationError(
                f"groups of {size} weights in a weight of shape {list(shape)}: there, a group is made of whole kernels "
                f"of {inner}; choose a multiple of {inner} that divides {fan}"
            )
        return Tiling(rows // (size // inner), size // inner, channels, inner)
    raise QuantizationError(
        f'granularity {granularity!r}: expected "tensor", "channel", "token", ("channels", n) or ("group", g)'
    )


def _divides(size: int, whole: int, what: str, shape: Sequence[int]) -> None:
    if size < 1 or size > whole or whole % size:
        trouble = "larger than the" if size > whole else "not a divisor of the"
        near = [n for n in (16, 32, 64, 128) if whole % n == 0] or [whole]
        raise QuantizationError(
            f"a group size of {size} is {trouble} {what} of a tensor of shape {list(shape)}; "
            f"choose one that divides, such as {', '.join(map(str, near))}"
        )


def to_tiles(x: Shaped[Tensor, "*shape"], tiles: Tiling) -> Shaped[Tensor, "r g n"]:
    """The tensor with the numbers of each tile along the last dimension."""
    return x.reshape(tiles).transpose(1, 2).reshape(tiles.r, tiles.g, tiles.high * tiles.wide)


def from_tiles(x: Shaped[Tensor, "r g n"], tiles: Tiling, shape: Sequence[int]) -> Shaped[Tensor, "*shape"]:
    """Back from `to_tiles`."""
    return x.reshape(tiles.r, tiles.g, tiles.high, tiles.wide).transpose(1, 2).reshape(*shape)


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Embedding, Conv1D)


def channels_of(module: nn.Module) -> tuple[int, int]:
    """`(axis, splits)`: the dimension of a layer's weight along which its outputs lie, and its convolution groups.

    >>> channels_of(nn.Linear(3, 2)), channels_of(nn.ConvTranspose1d(4, 6, 3, groups=2))
    ((0, 1), (1, 2))
    """
    if isinstance(module, TRANSPOSED):
        return 1, module.groups
    return (1, 1) if isinstance(module, Conv1D) else (0, 1)


def check_finite(x: Tensor, name: str) -> None:
    """Raise QuantizationError, naming the tensor, where it holds NaN or infinity or is not of real numbers."""
    if not x.is_floating_point():
        raise QuantizationError(f"{name} holds {str(x.dtype).removeprefix('torch.')}: only real numbers are quantized")
    if x.is_meta:
        raise QuantizationError(f"{name} is on the meta device and has no numbers: load the model first")
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise QuantizationError(f"{name} holds NaN or infinity in {bad} of {x.numel()} places; mend the model first")


def check_bits(bits: int) -> None:
    """Raise QuantizationError unless bits are 1 to 16, or 32 (which leaves everything as it is)."""
    if not (1 <= bits <= 16 or bits == 32):
        raise QuantizationError(f"bits={bits}: expected 1 to 16, or 32 to leave numbers as they are")


def working(x: Tensor) -> Tensor:
    """Detached, and in at least single precision: half precision cannot hold its own rounding errors."""
    x = x.detach()
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
