"""Whole numbers as bytes: how the codes of packed weights are stored."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor, nn

from neuropil.errors import ModelError


class PackingError(ModelError, ValueError):
    """Codes, scales or tables that do not fit the weight they are to stand for."""


def code_bits(levels: int) -> float:
    """Bits that a code of so many levels takes: five ternary codes share a byte, eight codes of three bits share three.

    >>> [code_bits(levels) for levels in (2, 3, 4, 8, 16, 256, 1000)]
    [1.0, 1.6, 2.0, 3.0, 4.0, 8.0, 10.0]
    """
    bits = float(max(1, math.ceil(math.log2(levels))))
    return min(8 / _a_byte(levels), bits) if levels <= 256 else bits


def _a_byte(levels: int) -> int:
    """How many codes of so many levels one byte can hold as digits."""
    digits = 1
    while levels ** (digits + 1) <= 256:
        digits += 1
    return digits


def pack_codes(codes: Integer[Tensor, "*shape"], levels: int) -> UInt8[Tensor, " bytes"]:
    """Codes in `[0, levels)` as bytes, in order; `unpack_codes` gives them back.

    Raises PackingError for codes outside the range or levels outside 2..65536.

    >>> stored = pack_codes(torch.tensor([2, 0, 1, 1, 2, 2]), levels=3)
    >>> stored.tolist(), unpack_codes(stored, 6, levels=3).tolist()
    ([200, 2], [2, 0, 1, 1, 2, 2])
    """
    if not 2 <= levels <= 1 << 16:
        raise PackingError(f"{levels} levels: codes have 2 to 65536 levels (1 to 16 bits)")
    flat = codes.flatten().long()
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= levels):
        raise PackingError(f"codes from {int(flat.min())} to {int(flat.max())}: expected 0 to {levels - 1}")
    if levels <= 256 and 8 / _a_byte(levels) <= (bits := max(1, math.ceil(math.log2(levels)))):
        digits = _a_byte(levels)
        padded = nn.functional.pad(flat, (0, -len(flat) % digits)).reshape(-1, digits)
        return (padded * levels ** torch.arange(digits, device=flat.device)).sum(1).to(torch.uint8)
    bits = math.ceil(math.log2(levels))
    words = nn.functional.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8)
    each = torch.stack([(words >> bit) & 1 for bit in range(bits)], dim=-1).reshape(-1, 8)  # [8 bits of a byte]
    return (each << torch.arange(8, device=flat.device)).sum(1).to(torch.uint8)


def unpack_codes(stored: UInt8[Tensor, " bytes"], count: int, levels: int) -> Integer[Tensor, " count"]:
    """The first `count` codes in `stored`, as uint8 (int32 above 256 levels)."""
    if levels <= 256 and 8 / _a_byte(levels) <= max(1, math.ceil(math.log2(levels))):
        return _digits(levels).to(stored.device)[stored.int()].reshape(-1)[:count]
    bits = math.ceil(math.log2(levels))
    each = (stored[:, None] >> torch.arange(8, dtype=torch.uint8, device=stored.device)) & 1
    each = each.reshape(-1, bits)
    kind = torch.uint8 if levels <= 256 else torch.int32
    weights = 2 ** torch.arange(bits, dtype=torch.int32, device=stored.device)
    return (each.int() * weights).sum(1, dtype=torch.int32)[:count].to(kind)


@lru_cache
def _digits(levels: int) -> Tensor:
    """`[256, digits]`: the digits of every byte in base `levels`, the lowest first."""
    byte = torch.arange(256)[:, None]
    return (byte // levels ** torch.arange(_a_byte(levels)) % levels).to(torch.uint8)
