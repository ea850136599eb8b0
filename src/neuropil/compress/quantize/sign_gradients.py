r"""Signs of activations, and the gradients that binary networks are trained with.

| gradient of sign(x) | |
| --- | --- |
| "clipped" | 1 where \|x\| <= 1 (BinaryNet) |
| "approx" | 2 - 2 \|x\| where \|x\| <= 1, the derivative of a piecewise parabola (Bi-Real Net) |
| "swish" | the derivative of 2 s (1 + b x (1 - s)) - 1, s = sigmoid(b x), b = 5 (BNN+) |
| "tanh" | that of k tanh(t x), k = max(1/t, 1), with t set from 0.1 to 10 in training (IR-Net) |

>>> x = torch.tensor([-0.5, 0.0, 2.0], requires_grad=True)
>>> sign(x, "approx").sum().backward()
>>> sign(x).tolist(), x.grad.tolist()
([-1.0, 1.0, 1.0], [1.0, 2.0, 0.0])

sign(0) is +1. `Sign` is the layer; its `shift` is the learned threshold for each channel of ReActNet, `RPReLU` that
network's activation.

Sources: Hubara et al. 2016, arXiv:1602.02830 (BinaryNet); Liu et al. 2018, arXiv:1808.00278 (Bi-Real Net); Darabi et
al. 2018, arXiv:1812.11800 (BNN+); Qin et al. 2020, arXiv:1909.10788 (IR-Net); Liu et al. 2020, arXiv:2003.03488
(ReActNet).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.compress.quantize.tiles import QuantizationError

SWISH = 5.0
COOL, HOT = 0.1, 10.0  # the first and the last sharpness of IR-Net's tanh


def _clipped(x: Tensor, sharpness: float) -> Tensor:
    return (x.abs() <= 1).to(x.dtype)


def _approx(x: Tensor, sharpness: float) -> Tensor:
    return (2 - 2 * x.abs()).clamp_min(0)


def _swish(x: Tensor, sharpness: float) -> Tensor:
    s = (SWISH * x).sigmoid()
    return 2 * SWISH * s * (1 - s) * (2 + SWISH * x * (1 - 2 * s))


def _tanh(x: Tensor, sharpness: float) -> Tensor:
    return max(1 / sharpness, 1.0) * sharpness * (1 - (sharpness * x).tanh().square())


GRADIENTS = {"clipped": _clipped, "approx": _approx, "swish": _swish, "tanh": _tanh}


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: str, sharpness: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rule, ctx.sharpness = GRADIENTS[gradient], sharpness
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradient * ctx.rule(x, ctx.sharpness), None, None


def sign(x: Float[Tensor, "*shape"], gradient: str = "clipped", sharpness: float = 1.0) -> Float[Tensor, "*shape"]:
    """+1 or -1, with one of the gradients above. Raises QuantizationError for an unknown one."""
    if gradient not in GRADIENTS:
        raise QuantizationError(f"gradient={gradient!r}: expected one of {', '.join(GRADIENTS)}")
    signs: Tensor = _Sign.apply(x, gradient, sharpness)
    return signs


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """One value a channel, to be broadcast over x."""
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


class Sign(nn.Module):
    """The sign of activations as a layer. With `shift` channels, sign(x - threshold) with a learned threshold each.

    `anneal(done)` sets the sharpness of "tanh" for the share of training that is done, from 0.1 to 10.
    """

    def __init__(self, gradient: str = "clipped", shift: int = 0, axis: int = 1) -> None:
        super().__init__()
        if gradient not in GRADIENTS:
            raise QuantizationError(f"gradient={gradient!r}: expected one of {', '.join(GRADIENTS)}")
        self.gradient, self.axis, self.sharpness = gradient, axis, COOL
        self.threshold = nn.Parameter(torch.zeros(shift)) if shift else None

    def anneal(self, done: float) -> None:
        self.sharpness = COOL * (HOT / COOL) ** min(max(done, 0.0), 1.0)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.threshold is not None:
            x = x - _along(self.threshold, x, self.axis)
        return sign(x, self.gradient, self.sharpness)

    def extra_repr(self) -> str:
        return self.gradient


class RPReLU(nn.Module):
    """ReActNet's activation: a PReLU whose origin is moved, before and after, by a learned amount for each channel."""

    def __init__(self, channels: int, axis: int = 1, slope: float = 0.25) -> None:
        super().__init__()
        self.axis = axis
        self.before, self.after = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), slope))

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        before, after, slope = (_along(p, x, self.axis) for p in (self.before, self.after, self.slope))
        moved = x - before
        return torch.where(moved > 0, moved, slope * moved) + after


class ABCActivation(nn.Module):
    """Activations as a sum of binary bases (ABC-Net): sum of beta_n sign(clip(x + v_n, 0, 1) - 1/2), all learned.

    The gradient passes each base where 0 <= x + v_n <= 1. The shifts begin evenly from 1 to 0, the scales at 1 / bases.
    """

    def __init__(self, bases: int = 3) -> None:
        super().__init__()
        if bases < 1:
            raise QuantizationError(f"bases={bases}: expected 1 or more")
        self.shift = nn.Parameter(torch.linspace(1, 0, bases) if bases > 1 else torch.full((1,), 0.5))
        self.scale = nn.Parameter(torch.full((bases,), 1 / bases))

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        at = 2 * (x[..., None] + self.shift) - 1  # 0 to 1 becomes -1 to 1, where the clipped gradient passes
        return (sign(at) * self.scale).sum(-1)


def residual_signs(x: Float[Tensor, "*batch n"], order: int = 2) -> Float[Tensor, "*batch n"]:
    """HORQ's input: for each vector, the sum of `order` scaled signs, each of what the ones before it leave.

    >>> residual_signs(torch.tensor([[1.0, -3.0]]), 2)
    tensor([[ 1., -3.]])
    """
    out, left = torch.zeros_like(x), x
    for _ in range(order):
        base = left.abs().mean(-1, keepdim=True) * sign(left)
        out, left = out + base, left - base
    return out
