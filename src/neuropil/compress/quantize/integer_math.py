r"""Exponentials, GELU, square roots, softmax and layer norm computed with integers (I-BERT).

A number is an integer q times a scale S. A polynomial $a (x + b)^2 + c$ of it is again one:
$q' = (q + \lfloor b / S \rfloor)^2 + \lfloor c / (a S^2) \rfloor$ with scale $a S^2$. The exponential of $x \le 0$
halves as often as ln 2 goes into $-x$ and takes the polynomial $0.3585 (p + 1.353)^2 + 0.344$ of the rest.

>>> q, scale = i_exp(torch.tensor([0, -10000, -30000]), 1e-4)
>>> (q * scale).round(decimals=2)
tensor([1.0000, 0.3700, 0.0500])
>>> i_sqrt(torch.tensor([0, 15, 16, 10**12]))
tensor([      0,       3,       4, 1000000])

Scales are constants, known before any input is: only integers are added, multiplied, shifted and compared.

Source: Kim, Gholami, Yao, Mahoney and Keutzer 2021, arXiv:2101.01321.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from neuropil.compress.quantize.quantizer import Quantizer
from neuropil.compress.quantize.tiles import QuantizationError

EXP = (0.3585, 1.353, 0.344)
ERF = (-0.2888, -1.769, 1.0)

Integers = Integer[Tensor, "*shape"]


def i_polynomial(q: Integers, scale: float, a: float, b: float, c: float) -> tuple[Integers, float]:
    """$a (x + b)^2 + c$ of x = q * scale, as integers and their scale (which has the sign of a)."""
    shift, constant = math.floor(b / scale), math.floor(c / (a * scale * scale))
    return (q.long() + shift) ** 2 + constant, a * scale * scale


def i_exp(q: Integers, scale: float) -> tuple[Integers, float]:
    """exp of numbers that are not positive. Raises QuantizationError for positive ones, and scales above ln 2."""
    if bool((q > 0).any()) or not 0 < scale <= math.log(2):
        raise QuantizationError("i_exp takes numbers up to 0, with a scale of at most ln 2: subtract the maximum first")
    ln2 = math.floor(math.log(2) / scale)
    halvings = (-q.long()) // ln2
    powers, made = i_polynomial(q.long() + halvings * ln2, scale, *EXP)
    return powers >> halvings.clamp(max=62), made


def i_erf(q: Integers, scale: float) -> tuple[Integers, float]:
    """The polynomial that I-BERT fits to erf: $\\mathrm{sign}(x) (-0.2888 (\\min(|x|, 1.769) - 1.769)^2 + 1)$."""
    _, b, _ = ERF
    size = q.long().abs().clamp(max=math.floor(-b / scale))
    value, made = i_polynomial(size, scale, *ERF)
    return value * q.sign(), made


def i_gelu(q: Integers, scale: float) -> tuple[Integers, float]:
    """GELU: $x (1 + \\mathrm{erf}(x / \\sqrt 2)) / 2$."""
    value, made = i_erf(q, scale / math.sqrt(2))
    one = math.floor(1 / made)
    return q.long() * (value + one), scale * made / 2


def i_sqrt(n: Integers) -> Integers:
    """The floor of the square root, by Newton's steps from above. Raises QuantizationError for negative numbers."""
    if bool((n < 0).any()):
        raise QuantizationError(f"i_sqrt of {int(n.min())}: expected integers of at least 0")
    n = n.long()
    positive = n.clamp_min(1)
    bits = torch.frexp(positive.double()).exponent.long()  # 2^bits > n
    x = torch.ones_like(n) << ((bits + 1) // 2).clamp(max=32)
    while True:
        better = (x + positive // x) >> 1
        if not bool((better < x).any()):
            return torch.where(n > 0, x, 0)
        x = torch.minimum(x, better)


def i_softmax(q: Integer[Tensor, "*batch n"], scale: float, bits: int = 8) -> tuple[Integer[Tensor, "*batch n"], float]:
    """Softmax along the last dimension, in `bits` bits and a scale of $2^{-bits}$."""
    powers, _ = i_exp(q - q.amax(-1, keepdim=True), scale)
    # 30 bits are enough for both, and their product with 2^bits fits in 64
    excess = torch.frexp(powers.amax().double()).exponent - 30
    powers = powers >> excess.clamp_min(0).long()
    return ((powers << bits) // powers.sum(-1, keepdim=True)).clamp(max=2**bits - 1), 2.0**-bits


def i_layernorm(q: Integer[Tensor, "*batch n"], bits: int = 10) -> tuple[Integer[Tensor, "*batch n"], float]:
    """What a layer norm makes of the last dimension before its weight and bias, with a scale of $2^{-bits}$.

    The scale of what goes in does not matter, nor does an epsilon: a row of equal numbers gives 0. Rows of small
    codes are lifted first, so that the integer square root is exact enough.
    """
    n = q.shape[-1]
    wide = q.long() << 10
    away = wide - torch.div(wide.sum(-1, keepdim=True), n, rounding_mode="floor")
    deviation = i_sqrt((away * away).sum(-1, keepdim=True) // n).clamp_min(1)
    return torch.div(away << bits, deviation, rounding_mode="floor"), 2.0**-bits


# ------------------------------------------------------------------------------------------------------- modules


class _OnCodes(nn.Module):
    """Rounds what it reads to codes, computes on those, and scales the answer."""

    def __init__(self, bits: int, dynamic: bool) -> None:
        super().__init__()
        self.input_grid = Quantizer(bits, "symmetric", dynamic=dynamic)

    def codes(self, x: Float[Tensor, "*shape"]) -> tuple[Integers, float]:
        grid = self.input_grid.grid_for(x)
        scale = float(grid.scale.flatten()[0])
        return grid.codes(x.detach().reshape(1, 1, -1)).reshape(x.shape).long(), scale


class IntegerGELU(_OnCodes):
    """GELU on codes of `bits` bits. Its range is that of the first input, or of each one if `dynamic`."""

    def __init__(self, bits: int = 8, dynamic: bool = True) -> None:
        super().__init__(bits, dynamic)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        q, scale = i_gelu(*self.codes(x))
        return (q * scale).to(x.dtype)


class IntegerSoftmax(_OnCodes):
    """Softmax over the last dimension, on codes of `bits` bits (16 by default: scores are what exp sharpens)."""

    def __init__(self, bits: int = 16, dynamic: bool = True) -> None:
        super().__init__(bits, dynamic)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        q, scale = i_softmax(*self.codes(x), bits=16)
        return (q * scale).to(x.dtype)


class IntegerLayerNorm(_OnCodes):
    """A layer norm of one dimension on codes of `bits` bits, with the weight and bias of the norm it is made of."""

    def __init__(self, norm: nn.LayerNorm, bits: int = 16, dynamic: bool = True) -> None:
        super().__init__(bits, dynamic)
        if len(norm.normalized_shape) != 1:
            raise QuantizationError(f"a norm over {norm.normalized_shape}: expected one over the last dimension")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        q, scale = i_layernorm(self.codes(x)[0])
        made = (q * scale).to(x.dtype)
        made = made if self.weight is None else made * self.weight
        return made if self.bias is None else made + self.bias


def integer_functions(model: nn.Module) -> dict[str, str]:
    """Put integer versions in the place of GELU, softmax and layer norm modules, in place: name -> what it became.

    Softmax inside an attention's own code is no module and stays. Inference only: no gradient passes.
    """
    done = {}
    for name, module in list(model.named_modules()):
        made = _integer(module)
        if made is not None and name:
            model.set_submodule(name, made)
            done[name] = type(made).__name__
    return done


def _integer(module: Any) -> nn.Module | None:
    if type(module).__name__ in ("GELU", "GELUActivation", "NewGELUActivation"):
        return IntegerGELU()
    if isinstance(module, nn.Softmax) and module.dim == -1:
        return IntegerSoftmax()
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return IntegerLayerNorm(module)
    return None
