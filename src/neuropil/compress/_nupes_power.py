"""The power grid: levels spaced by a power, codes on them, and the gradients of both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from neuropil.compress.quantize.tiles import QuantizationError, check_finite, working
from neuropil.packed import Lookup

TINY = 1e-8  # smaller shares of the largest number have no gradient of their own: u^a ln u is steep there


def check_exponent(a: float) -> None:
    """Raise QuantizationError unless a is a finite number above 0."""
    if not (math.isfinite(a) and a > 0):
        raise QuantizationError(f"exponent={a}: expected a number above 0 (1 is a uniform grid, 0.5 is typical)")


def top_code(bits: int, signed: bool = True) -> int:
    """The largest code: 2^(b-1) - 1 of either sign, or 2^b - 1. Raises QuantizationError outside 2 to 8 bits."""
    if not 2 <= bits <= 8:
        raise QuantizationError(f"bits={bits}: a power grid has 2 to 8 bits")
    return 2 ** (bits - 1) - 1 if signed else 2**bits - 1


def levels(a: float, top: int) -> Float[Tensor, " levels"]:
    """The levels (k / top)^(1/a) of the codes 0 to top, in double precision: 0 and 1 are exact.

    >>> (levels(0.5, 7) * 49).round(decimals=9).tolist()
    [0.0, 1.0, 4.0, 9.0, 16.0, 25.0, 36.0, 49.0]
    """
    return (torch.arange(top + 1, dtype=torch.float64) / top).pow(1 / a)


def level_of(
    k: Float[Tensor, "*shape"], a: Float[Tensor, ""] | float, top: Float[Tensor, ""] | int
) -> Float[Tensor, "*shape"]:
    """(k / top)^(1/a) for codes k from 0 up, also between integers. Differentiable in k and a.

    The gradients are v / (a k) and -v ln(k / top) / a^2; at k = 0, where the first is 0 and the second undefined,
    the slope of the first step, top^(-1/a), and 0.
    """
    top = torch.as_tensor(top, dtype=k.dtype)
    inside = k > 0
    power = ((torch.where(inside, k, top) / top).log() / a).exp()
    return torch.where(inside, power, k * (-top.log() / a).exp())


def between(k: Float[Tensor, "*shape"], a: Float[Tensor, ""] | float, top: int) -> Float[Tensor, "*shape"]:
    """Signed codes as values, on straight lines from level to level: the slope is nowhere 0, not even at code 0."""
    size = k.abs()
    below = size.detach().floor().clamp(max=top - 1)
    low = level_of(below, a, top)
    return k.sign() * (low + (size - below) * (level_of(below + 1, a, top) - low))


def position(
    x: Float[Tensor, "*shape"],
    size: Tensor,
    a: Float[Tensor, ""] | float,
    top: Float[Tensor, ""] | int,
) -> Float[Tensor, "*shape"]:
    """Where numbers lie among the codes: sign(x) top (|x| / size)^a, clipped to +-top. `size` broadcasts.

    Differentiable in a: dividing by the largest number first keeps ln u at most 0, and u = 0 has gradient 0.
    """
    u = (x.abs() / size.clamp_min(torch.finfo(x.dtype).tiny)).clamp(max=1)
    power = torch.where(u > 0, (u.clamp_min(TINY).log() * a).exp(), 0.0) if isinstance(a, Tensor) else u.pow(a)
    return x.sign() * (power * top)


@dataclass(frozen=True)
class PowerCodes:
    """A tensor on a power grid: integer codes from -top to top, the size of the top one, and the exponent."""

    codes: Integer[Tensor, "*shape"]
    scale: Tensor  # the largest |w| of what shares it; broadcasts against the codes
    exponent: float
    bits: int

    def values(self) -> Tensor:
        """scale · sign(k) (|k| / top)^(1/a)."""
        return decode(self.codes, self.scale, self.exponent, top_code(self.bits))


def decode(codes: Integer[Tensor, "*shape"], size: Tensor, a: float, top: int) -> Tensor:
    """Codes as values, by a table of levels."""
    return codes.sign() * levels(a, top).to(size.dtype)[codes.abs().long()] * size


def encode(x: Float[Tensor, "*shape"], size: Tensor, a: float, top: int) -> Integer[Tensor, "*shape"]:
    """The codes of numbers: rounded to the nearest after the power, as PowerQuant does."""
    return position(x, size, a, top).round().to(torch.int16)


def largest(x: Float[Tensor, "*shape"], axis: int | None = None) -> Tensor:
    """The largest |x|, of all numbers or of each slice along an axis; it broadcasts against x."""
    if axis is None:
        return x.abs().amax()
    if not -x.ndim <= axis < x.ndim:
        raise QuantizationError(f"axis={axis} of a tensor of shape {list(x.shape)}: expected less than {x.ndim}")
    return x.abs().amax([d for d in range(x.ndim) if d != axis % x.ndim], keepdim=True)


def power_quantize(
    w: Float[Tensor, "*shape"], bits: int = 4, a: float | None = None, axis: int | None = None
) -> PowerCodes:
    """A tensor's codes on a power grid; without `a`, that of least error. `axis`: a scale for each slice along it.

    Raises QuantizationError for bits outside 2..8, a <= 0, an empty tensor, and NaN or infinity.

    >>> coded = power_quantize(torch.tensor([-1.0, 0.0, 0.1, 0.5]), bits=4, a=0.5)
    >>> coded.codes.tolist(), round(coded.values()[3].item() * 49, 4)  # sqrt(0.5) lies at 4.95 of 7
    ([-7, 0, 2, 5], 25.0)
    """
    from neuropil.compress._nupes_search import Spread, find_exponent

    top = top_code(bits)
    check_finite(w, "the tensor")
    if not w.numel():
        raise QuantizationError(f"a tensor of shape {list(w.shape)} has nothing to quantize")
    w = working(w)
    size = largest(w, axis)
    if a is None:
        a = find_exponent([Spread.of(w, size, top)])
    check_exponent(a)
    return PowerCodes(encode(w, size, a, top), size, a, bits)


def lookup(codes: Integer[Tensor, "*shape"], size: Float[Tensor, "r g"], a: float, bits: int) -> Lookup:
    """Signed codes, in the weight's shape, as a packing: one table of levels, a scale a tile."""
    top = top_code(bits)
    half = levels(a, top).to(size.dtype)
    table = torch.cat([-half.flip(0)[:-1], half])
    return Lookup.of(codes.int() + top, table[None, None, :, None], codes.shape, size)
