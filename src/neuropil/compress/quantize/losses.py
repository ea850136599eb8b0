"""What each layer lost: the error of its weights, and the bits it takes now.

>>> from neuropil.compress.quantize import quantize_model
>>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
>>> losses = layer_losses(model, quantize_model(model, "int4").model)
>>> [name for name in losses], round(losses["0"].bits, 1)
(['0', '2'], 4.5)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from neuropil.compress.quantize.models import weight_of
from neuropil.compress.quantize.tiles import QuantizationError
from neuropil.packed import packed_modules


@dataclass(frozen=True)
class LayerLoss:
    """Of one layer: the squared error of its weights by their square, and stored bits a weight, scales included."""

    relative: float
    bits: float
    weights: int

    @property
    def decibels(self) -> float:
        """The signal-to-noise ratio: 6 more for each bit that is used well; infinite where nothing was lost."""
        return math.inf if self.relative == 0 else -10 * math.log10(self.relative)


def layer_losses(model: nn.Module, compressed: nn.Module) -> dict[str, LayerLoss]:
    """The loss of each packed layer of `compressed`, a copy of `model`, by name; the worst are those to give more bits.

    Raises QuantizationError where a layer of the one is not in the other.
    """
    found: dict[str, LayerLoss] = {}
    for name, _, packing in packed_modules(compressed):
        try:
            weight = weight_of(model.get_submodule(name)).double()
        except AttributeError as error:
            raise QuantizationError(f"{name} is packed, and is no layer of the model as it was") from error
        away = (packing.dense().detach().double() - weight).square().sum()
        found[name] = LayerLoss(float(away / weight.square().sum().clamp_min(1e-300)), packing.bits, weight.numel())
    return found
