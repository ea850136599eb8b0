r"""Training whose weights never leave a coarse grid: stochastic rounding after each step of the optimizer.

An update smaller than half a step of the grid is lost when rounded to nearest; rounded by chance it is kept on average.

>>> model = nn.Sequential(nn.Linear(8, 4))
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> coarse = LowPrecision(model, "bfloat16")
>>> model(torch.randn(2, 8)).sum().backward()
>>> optimizer.step(); coarse.step()
>>> bool((model[0].weight == model[0].weight.bfloat16()).all())
True

For float16 with a scaled loss, use `torch.amp.GradScaler` and `torch.autocast`, which do that well.

Source: Gupta, Agrawal, Gopalakrishnan and Narayanan 2015, arXiv:1502.02551.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.compress.quantize.models import layers
from neuropil.compress.quantize.quantizer import Quantizer
from neuropil.compress.quantize.tiles import QuantizationError, channels_of


def stochastic_bfloat16(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """One of the two bfloat16 numbers about each float32, by chance, so that the mean is right. Kept in float32.

    >>> _ = torch.manual_seed(0)
    >>> x = torch.full((100000,), 1 + 2**-10)  # an eighth of the way from 1 to the next bfloat16
    >>> round((stochastic_bfloat16(x).mean().item() - 1) * 2**10, 1)
    1.0
    """
    bits = x.detach().float().contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, device=x.device, dtype=torch.int32)
    moved = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(torch.isfinite(x), moved, x.float()).to(x.dtype)


class LowPrecision:
    """Keeps a model's weights on a coarse grid: call `step` after each step of the optimizer. Changes it in place.

    grid: "bfloat16", or settings of `Quantizer` (`{"bits": 8, "granularity": "channel"}`), whose range follows the
        weights. rounding: "stochastic", or "nearest" to compare. Biases and norms stay as they are.
    """

    def __init__(self, model: nn.Module, grid: str | Mapping[str, Any], rounding: str = "stochastic") -> None:
        if isinstance(grid, str) and grid != "bfloat16":
            raise QuantizationError(f'grid={grid!r}: expected "bfloat16" or settings of Quantizer')
        if rounding not in ("stochastic", "nearest"):
            raise QuantizationError(f'rounding={rounding!r}: expected "stochastic" or "nearest"')
        found, self.left = layers(model)
        self.grid, self.rounding = grid, rounding
        self.modules = {id(module.weight): module for module in found.values()}
        self.step()

    @torch.no_grad()
    def step(self) -> None:
        """Round every weight."""
        for module in self.modules.values():
            weight = module.weight
            assert isinstance(weight, Tensor)
            weight.copy_(self._round(weight, module))

    def _round(self, w: Tensor, module: nn.Module) -> Tensor:
        if isinstance(self.grid, str):
            return stochastic_bfloat16(w) if self.rounding == "stochastic" else w.bfloat16().to(w.dtype)
        quantizer = Quantizer(**{**self.grid, "dynamic": True, "rounding": self.rounding})
        quantizer.axis, quantizer.splits = channels_of(module)
        rounded: Tensor = quantizer(w)
        return rounded
