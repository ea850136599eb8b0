r"""Multiplying an integer by a real number with integers alone: $x \approx m / 2^c$.

>>> m, c = dyadic(torch.tensor([0.3]))
>>> requantize(torch.tensor([100, -100, 5]), m, c)
tensor([ 30, -30,   2])

Sources: Jacob et al. 2018, arXiv:1712.05877; Yao et al. 2021, arXiv:2011.10680 (HAWQ-V3).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from neuropil.compress.quantize.tiles import QuantizationError


def dyadic(x: Float[Tensor, "*shape"], bits: int = 31) -> tuple[Integer[Tensor, "*shape"], Integer[Tensor, "*shape"]]:
    """Integers m of at most `bits` bits and c with $|m / 2^c - x| \\le 2^{-(c+1)}$; exactly 0 for 0.

    Raises QuantizationError for numbers that are negative, not finite, or so large that c would be negative.
    """
    if not bool((torch.isfinite(x) & (x >= 0)).all()) or bool((x >= 2.0 ** (bits - 1)).any()):
        raise QuantizationError(f"scales from {float(x.min())} to {float(x.max())}: expected 0 to 2^{bits - 1}")
    exponent = torch.frexp(x.double()).exponent  # x = fraction 2^exponent, 0.5 <= fraction < 1
    shift = (bits - exponent).clamp(max=62)  # far below what 31 bits can be multiplied to one by
    m = (x.double() * 2.0 ** shift.double()).round().long()
    full = m >= 2**bits  # rounded up to one bit more
    return torch.where(full, m >> 1, m), torch.where(full, shift - 1, shift).long()


def requantize(
    acc: Integer[Tensor, "*shape"], m: Integer[Tensor, "*scales"], c: Integer[Tensor, "*scales"]
) -> Integer[Tensor, "*shape"]:
    """`acc * m / 2^c` rounded to the nearest integer (halves up), by a multiplication, an addition and a shift."""
    product = acc.long() * m
    half = torch.where(c > 0, torch.ones_like(c) << (c - 1).clamp_min(0), torch.zeros_like(c))
    return (product + half) >> c
