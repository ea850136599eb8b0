r"""The best clip of a bell-shaped tensor by formula (ACIQ), or by search for each kernel (OMSE).

Clipping at $\alpha$ and rounding to b bits costs, for numbers of a density symmetric about 0,

$$ 2 \int_\alpha^\infty (x - \alpha)^2 f(x)\,dx + \frac{\alpha^2}{3 \cdot 4^b} $$

and the clip with least cost is a constant times the scale of the density: b bits of a Laplace density (mean size
$\beta$) and of a Gaussian one (deviation $\sigma$) are clipped at

>>> [round(aciq_factor(bits, "laplace"), 2) for bits in (2, 3, 4)]
[2.83, 3.9, 5.03]
>>> [round(aciq_factor(bits, "gauss"), 2) for bits in (2, 3, 4)]
[1.71, 2.15, 2.56]

Numbers that are not negative (what a ReLU gives) have one half of the density on twice as many levels: the factor of
one more bit. `Quantizer(..., observer="aciq")` takes the likelier of the two densities for each tile; OMSE, which
minimises the measured error of each kernel, is `Quantizer(..., granularity="channel", observer="mse")`, and `omse` is
short for it.

Source: Banner, Nahshan and Soudry 2019, arXiv:1810.05723 (ACIQ); Choukroun et al. 2019, arXiv:1902.06822 (OMSE).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from neuropil.compress.quantize.tiles import QuantizationError, check_bits

DENSITIES = ("gauss", "laplace")


@lru_cache
def aciq_factor(bits: int, density: str) -> float:
    """The best clip in units of the deviation ("gauss") or of the mean size ("laplace"): where the cost is flat.

    Raises QuantizationError for another density, and for bits outside 1..16.
    """
    check_bits(bits)
    if density not in DENSITIES or bits == 32:
        raise QuantizationError(f"bits={bits}, density={density!r}: expected 1 to 16, and one of {DENSITIES}")
    noise = 2 / (3 * 4**bits)

    def slope(a: float) -> float:
        if density == "laplace":
            return a * noise - 2 * math.exp(-a)
        tail, top = math.erfc(a / math.sqrt(2)), math.sqrt(2 / math.pi) * math.exp(-a * a / 2)
        return a * noise + 2 * (a * tail - top)

    return float(brentq(slope, 1e-3, 40.0))


def aciq_clip(x: Float[Tensor, "r g n"], bits: int, one_sided: bool = False) -> Float[Tensor, "r g"]:
    """The clip of each tile, by the density that makes the tile likelier; `one_sided` where no number is negative.

    Zeros of one-sided numbers are left out: they are what the ReLU cut off.
    """
    there = (x != 0) if one_sided else torch.ones_like(x, dtype=torch.bool)
    count = there.sum(-1).clamp_min(1)
    centre = torch.zeros_like(x[..., 0]) if one_sided else x.mean(-1)
    away = (x - centre[..., None]) * there
    size, deviation = away.abs().sum(-1) / count, (away.square().sum(-1) / count).sqrt()
    gauss = deviation.log() + 0.5 * math.log(2 * math.pi * math.e) < (2 * size).log() + 1
    levels = bits + 1 if one_sided else bits
    return torch.where(gauss, aciq_factor(levels, "gauss") * deviation, aciq_factor(levels, "laplace") * size)


def aciq_range(
    x: Float[Tensor, "r g n"], low: Float[Tensor, "r g"], high: Float[Tensor, "r g"], scheme: str, bits: int
) -> tuple[Float[Tensor, "r g"], Float[Tensor, "r g"]]:
    """The range of each tile: the clip about its mean (about 0 for symmetric schemes), never beyond what was seen."""
    one_sided = bool((low >= 0).all())
    clip = aciq_clip(x, bits, one_sided)
    centre = x.mean(-1) if scheme in ("affine", "offset") and not one_sided else torch.zeros_like(clip)
    return torch.maximum(low, centre - clip), torch.minimum(high, centre + clip)


def omse(bits: int, scheme: str = "symmetric") -> dict[str, object]:
    """Settings of `Quantizer` with the least squared error for each kernel.

    >>> from neuropil.compress.quantize import Quantizer
    >>> w = torch.randn(4, 64)
    >>> error = lambda q: (q(w) - w).square().mean()
    >>> bool(error(Quantizer(**omse(3))) <= error(Quantizer(3, granularity="channel")))
    True
    """
    return {"bits": bits, "scheme": scheme, "granularity": "channel", "observer": "mse"}
