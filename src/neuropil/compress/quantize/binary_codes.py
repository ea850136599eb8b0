r"""Weights as sums of scaled signs: $w \approx \sum_i \alpha_i b_i$ with $b_i = \pm 1$ (binary codes).

* "greedy": each $b_i$ and $\alpha_i$ is the best sign and scale of what is left (the residual codes of HORQ).
* "alternating": from there, least squares for the $\alpha$ given the signs, then for each number the best
  combination of signs given the $\alpha$; never worse from round to round (LQ-Nets, on the weights).
* "abc": $b_i = \mathrm{sign}(w - \bar w + u_i\, \mathrm{std}(w))$ with $u_i$ evenly from -1 to 1, and least squares for
  the $\alpha$ (ABC-Net).

>>> w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
>>> codes = BinaryCodes(2, granularity="channel")
>>> codes(w).shape, codes.pack(w).bits  # two sign planes, two scales a row, the two signs
(torch.Size([4, 64]), 3.5)

Sources: Zhang, Yang, Ye and Hua 2018, arXiv:1807.10029 (LQ-Nets); Guo, Yao, Zhao and Chen 2017, arXiv:1706.02021
(network sketching); Lin, Zhao and Pan 2017, arXiv:1711.11294 (ABC-Net); Li, Ni, Zhang, Yang and Gao 2017,
arXiv:1708.08687 (HORQ).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from neuropil.compress.quantize.codes import METHODS
from neuropil.compress.quantize.quantizer import FakeQuantizer, straight_through
from neuropil.compress.quantize.tiles import (
    Granularity,
    QuantizationError,
    check_finite,
    from_tiles,
    tiling,
    to_tiles,
    working,
)
from neuropil.packed import Lookup, Packing, Residual


class BinaryCodes(FakeQuantizer):
    """Rounds a weight to a sum of `bits` scaled sign tensors, found anew from every weight it is given.

    The gradient is straight-through. `pack` keeps a sign plane and the scales for each base.
    Raises QuantizationError for an unknown method, and for bits outside 1 to 8.
    """

    def __init__(self, bits: int = 2, method: str = "alternating", granularity: Granularity = "channel") -> None:
        super().__init__()
        if method not in METHODS:
            raise QuantizationError(f"method={method!r}: expected one of {', '.join(METHODS)}")
        if not 1 <= bits <= 8:
            raise QuantizationError(f"bits={bits}: a sum of binary codes has 1 to 8 of them")
        self.bits, self.method, self.granularity = bits, method, granularity

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "method": self.method, "granularity": self.granularity}

    def bases(self, w: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "r g bases"], Int8[Tensor, "r g bases n"]]:
        """The scales and signs of a weight's tiles."""
        check_finite(w, "the weight")
        return METHODS[self.method](
            to_tiles(working(w), tiling(w.shape, self.granularity, self.axis, self.splits)), self.bits
        )

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        alpha, signs = self.bases(w)
        tiles = tiling(w.shape, self.granularity, self.axis, self.splits)
        total = torch.zeros_like(alpha[..., :1])
        for i in range(self.bits):  # in the order of the packing, so that both are equal to the bit
            total = total + alpha[..., i, None] * signs[..., i, :]
        return straight_through(w, from_tiles(total, tiles, w.shape).to(w.dtype))

    def pack(self, w: Float[Tensor, "*shape"]) -> Packing:
        alpha, signs = self.bases(w)
        tiles = tiling(w.shape, self.granularity, self.axis, self.splits)
        table = alpha.new_tensor([-1.0, 1.0]).reshape(1, 1, 2, 1)
        planes = (from_tiles((signs[..., i, :] > 0).int(), tiles, w.shape) for i in range(self.bits))
        return Residual.of([Lookup.of(p, table, w.shape, alpha[..., i]) for i, p in enumerate(planes)])

    def extra_repr(self) -> str:
        return f"{self.bits} bases, {self.method}, {self.granularity}"
