"""Matrix products with packed weights that never make the weight dense: torch's own int8 and int4 kernels on the CPU.

They take bfloat16 inputs and need no gradient; `linear` answers None where they do not apply, and the caller makes
the weight dense. Eight-bit codes are read where they lie. Codes of up to four bits are laid out anew for the kernel
the first time, half a byte a weight, and kept beside the stored ones for as long as the packing lives.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from neuropil.packings import Affine, Packing

_laid_out: weakref.WeakKeyDictionary[Packing, tuple[Tensor, int, Tensor]] = weakref.WeakKeyDictionary()
GROUPS = (256, 128, 64, 32)  # inputs a scale, as the int4 kernel knows them
_ops: Any = torch.ops.aten


def linear(packing: Packing, x: Tensor) -> Tensor | None:
    """`x @ weight.T` by a kernel for packed weights, or None where there is none for these.

    >>> codes = torch.randint(0, 256, (64, 32))
    >>> eight = Affine.of(codes, 256, torch.rand(64, 1), 128.0)
    >>> x = torch.ones(2, 32, dtype=torch.bfloat16)
    >>> linear(eight, x).shape
    torch.Size([2, 64])
    >>> linear(eight, x.float()) is None  # the kernels take bfloat16
    True
    """
    if (
        not isinstance(packing, Affine)
        or x.dtype != torch.bfloat16
        or x.device.type != "cpu"
        or len(packing.shape) != 2
    ):
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return None
    flat = x.reshape(-1, x.shape[-1])
    found = _eight(packing, flat) if packing.codes.dtype == torch.int8 else _four(packing, flat)
    return None if found is None else found.reshape(*x.shape[:-1], packing.shape[0])


def _eight(packing: Affine, x: Tensor) -> Tensor | None:
    rows, fan = packing.shape
    if packing.scale.shape != (rows, 1) or packing.zero.shape != (1, 1):
        return None
    if fan % 16:  # the kernel reads beyond the end of such rows
        return None
    scale = packing.scale.flatten().to(x.dtype)
    out = _ops._weight_int8pack_mm(x, packing.codes.reshape(rows, fan), scale)
    shift = packing.offset - float(packing.zero)
    return out if shift == 0 else out + shift * x.sum(-1, keepdim=True) * scale


def _four(packing: Affine, x: Tensor) -> Tensor | None:
    rows, fan = packing.shape
    r, g = packing.scale.shape
    group = next((size for size in GROUPS if (fan // g) % size == 0), None)
    if packing.constants["levels"] > 16 or group is None or r not in (1, rows) or rows % 16:
        return None
    if packing not in _laid_out:
        _laid_out[packing] = _lay_out(packing, group)
    codes, group, scales = _laid_out[packing]
    return _ops._weight_int4pack_mm_for_cpu(x, codes, group, scales)


def _lay_out(packing: Affine, group: int) -> tuple[Tensor, int, Tensor]:
    """The kernel computes `(code - 8) * scale + offset`, both bfloat16, a pair for each group of inputs."""
    rows, fan = packing.shape
    codes = _ops._convert_weight_to_int4pack_for_cpu(packing.integers().int().contiguous(), 1)
    pair = torch.stack([packing.scale, packing.scale * (8 - packing.zero)], dim=-1)  # [r, g, 2]
    wide = pair.repeat_interleave(fan // group // packing.scale.shape[1], dim=1).expand(rows, fan // group, 2)
    return codes, group, wide.transpose(0, 1).to(torch.bfloat16).contiguous()
