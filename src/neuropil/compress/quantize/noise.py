r"""Chance in rounding: unbiased rounding, stochastic signs, and noise that trains a model for what is to come.

`Quantizer(rounding="stochastic")` rounds to one of the two neighbouring levels with the probability that makes the
mean exact. `stochastic_signs` is +1 with probability $(1 + \mathrm{clip}(w, -1, 1)) / 2$ (BinaryConnect).
`QuantNoise` rounds only a random share of a weight's blocks at each forward pass of training; the rest passes
unharmed, with an exact gradient.

>>> from torch.nn.utils import parametrize
>>> from neuropil.compress.quantize import Quantizer
>>> layer = nn.Linear(64, 64)
>>> noise = QuantNoise(Quantizer(2, dynamic=True), share=0.25)
>>> _ = parametrize.register_parametrization(layer, "weight", noise)
>>> original = layer.parametrizations.weight.original
>>> bool((layer.weight == original).float().mean() > 0.6), bool((layer.eval().weight == original).any())
(True, False)

Sources: Courbariaux, Bengio and David 2015, arXiv:1511.00363; Fan et al. 2020, arXiv:2004.07320 (Quant-Noise).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.compress.quantize.quantizer import FakeQuantizer, straight_through
from neuropil.compress.quantize.tiles import QuantizationError
from neuropil.packed import Packing


def stochastic_signs(w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """+1 with the probability of the hard sigmoid, else -1; the gradient passes where |w| <= 1.

    >>> _ = torch.manual_seed(0)
    >>> round(stochastic_signs(torch.full((100000,), 0.5)).mean().item(), 2)
    0.5
    """
    chance = (1 + w.detach().clamp(-1, 1)) / 2
    signs = torch.where(torch.rand_like(chance) < chance, 1.0, -1.0).to(w.dtype)
    return straight_through(w, signs, w.detach().abs() <= 1)


class QuantNoise(FakeQuantizer):
    """Rounds a random `share` of a weight's blocks of `block` neighbours in training, all of them in eval mode.

    Raises QuantizationError for a share outside (0, 1] and a block that does not divide the weight.
    """

    def __init__(self, quantizer: FakeQuantizer, share: float = 0.1, block: int = 1) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise QuantizationError(f"share={share}: expected more than 0 and at most 1")
        self.quantizer, self.share, self.block = quantizer, share, block

    def settings(self) -> dict[str, Any]:
        return {"quantizer": self.quantizer, "share": self.share, "block": self.block}

    def for_layer(self, module: nn.Module) -> QuantNoise:
        return QuantNoise(self.quantizer.for_layer(module), self.share, self.block)

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if not self.training:
            rounded: Tensor = self.quantizer(w)
            return rounded
        if self.block < 1 or w.numel() % self.block:
            raise QuantizationError(f"blocks of {self.block} do not divide a weight of shape {list(w.shape)}")
        hit = torch.rand(w.numel() // self.block, 1, device=w.device) < self.share
        return torch.where(hit.expand(-1, self.block).reshape(w.shape), self.quantizer(w), w)

    def pack(self, w: Float[Tensor, "*shape"]) -> Packing:
        return self.quantizer.pack(w)
