r"""Two and three levels: signs times a scale (XNOR-Net), and ternary weights (TWN).

Binary: $\alpha = \overline{|w|}$ and $b = \mathrm{sign}(w)$ are the least-squares optimum; sign(0) is +1.
Ternary: 0 within $\Delta = 0.7\, \overline{|w|}$, elsewhere $\pm\alpha$ with $\alpha$ the mean of $|w| > \Delta$.

Sources: Rastegari et al. 2016, arXiv:1603.05279; Li, Zhang and Liu 2016, arXiv:1605.04711.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from neuropil.compress.quantize.grids import Levels

TERNARY_SHARE = 0.7  # of the mean magnitude: the threshold for normal and for uniform weights, nearly


def binary(x: Float[Tensor, "r g n"], bits: int = 1) -> Levels:
    """Signs times the mean magnitude of each tile. An empty tile keeps its two levels, both 0.

    >>> grid = binary(torch.tensor([[[1.0, -3.0]]]))
    >>> grid.values(grid.codes(torch.tensor([[[0.0, -1.0]]]))).tolist()
    [[[2.0, -2.0]]]
    """
    alpha = x.abs().mean(-1)
    return Levels(alpha, x.new_tensor([[[-1.0, 1.0]]]), x.new_zeros(1, 1, 1))


def ternary(x: Float[Tensor, "r g n"], bits: int = 2) -> Levels:
    """-alpha, 0 and alpha: the thresholds at 0.7 of the mean magnitude of each tile."""
    size = x.abs()
    delta = TERNARY_SHARE * size.mean(-1, keepdim=True)
    large = size > delta
    alpha = (size * large).sum(-1) / large.sum(-1).clamp_min(1)
    at = delta / torch.where(alpha > 0, alpha, torch.ones_like(alpha))[..., None]
    # a number at -delta is not larger than it: the lower threshold lies just above
    return Levels(alpha, x.new_tensor([[[-1.0, 0.0, 1.0]]]), torch.cat([-at, at], -1))
