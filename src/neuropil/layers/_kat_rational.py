"""Rational activations shared by groups of channels, with a backward pass written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from neuropil.layers._kat_fit import Init, as_function, check_form, coefficients, gain

SHARES = ("numerator", "denominator", "none")
BLOCK = 2**16  # entries worked on at a time on a CPU


def _sign(x: Tensor) -> Tensor:
    """+1 at 0, as in the authors' kernels: torch.sign(0) = 0 would hold a coefficient at 0 for ever."""
    return 2 * (x >= 0).to(x.dtype) - 1  # torch.where is several times slower on a CPU


def _horner(coefficients: list[Tensor], x: Tensor) -> Tensor:
    """The polynomial of these coefficients, lowest power first; in one buffer where nobody will differentiate it."""
    if len(coefficients) == 1:
        return coefficients[0].expand_as(x)
    out = torch.addcmul(coefficients[-2], coefficients[-1], x)
    for c in coefficients[-3::-1]:
        out = torch.addcmul(c, out, x, out=None if torch.is_grad_enabled() else out)
    return out


def _below(x: Tensor, b: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of Q(x) = 1 + |sum c_j u^j|: u, the c_j, Q, and by whose sign dQ/dx follows the sum's slope in u."""
    if form == "A":
        u, c = x.abs(), b.abs()
        return u, c, _horner([torch.ones_like(b[0]), *c.unbind()], u), x
    inner = _horner([torch.zeros_like(b[0]), *b.unbind()], x)
    return x, b, inner.abs() + 1, inner


def _slope(coefficients: Tensor, first: int) -> list[Tensor]:
    """Coefficients of the derivative of a polynomial whose given ones begin with the power `first`."""
    return [(power + first) * c for power, c in enumerate(coefficients.unbind()) if power + first > 0]


class _Rational(torch.autograd.Function):
    """F = P / Q on `x [..., d]` with coefficients `a [m + 1, d]`, `b [n, d]`.

    Only the inputs are kept for the backward pass, which computes P and Q again: the memory of a GELU, where the
    graph of the plain formula keeps some twenty tensors of the size of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, form: str) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.form = form
        return _joined([_horner(list(a.unbind()), part) / _below(part, b, form)[2] for part in _blocks(x)], x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, a, b = ctx.saved_tensors
        pairs = zip(_blocks(x), _blocks(grads[0]), strict=True)
        dx, da, db = zip(*[_gradients(part, grad, a, b, ctx.form) for part, grad in pairs], strict=True)
        return _joined(dx, x), torch.stack(da).sum(0), torch.stack(db).sum(0), None


def _gradients(x: Tensor, grad: Tensor, a: Tensor, b: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by x, a and b, where `grad` is that by F."""
    u, c, q, signed = _below(x, b, form)
    sign = _sign(signed)
    by_p = grad / q  # dF/dP = 1 / Q
    by_q = -by_p * _horner(list(a.unbind()), x) / q  # dF/dQ = -P / Q^2
    dx = torch.addcmul(by_p * _horner(_slope(a, 0), x), by_q * sign, _horner(_slope(c, 1), u))
    da = _moments(by_p, x, len(a))
    if form == "A":
        return dx, da, _moments(by_q * u, u, len(b)) * _sign(b)
    return dx, da, _moments(by_q * sign * u, u, len(b))


def _blocks(x: Tensor) -> Sequence[Tensor]:
    """Rows of x that a CPU's cache holds through some forty operations; elsewhere, and to differentiate again, all."""
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return (rows,)
    return rows.split(max(1, BLOCK // x.shape[-1]))


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts))).view(like.shape)


def _moments(weight: Tensor, u: Tensor, count: int) -> Tensor:
    """Sums of weight, weight u, weight u^2, ... over all but the last dimension, `[count, d]`."""
    sums = [weight.sum_to_size(u.shape[-1:])]
    for _ in range(count - 1):
        weight = torch.mul(weight, u, out=None if torch.is_grad_enabled() else weight)
        sums.append(weight.sum_to_size(u.shape[-1:]))
    return torch.stack(sums)


def rational(
    x: Float[Tensor, "*batch d"], a: Float[Tensor, "ga m"], b: Float[Tensor, "gb n"], denominator: str = "A"
) -> Float[Tensor, "*batch d"]:
    """P(x) / Q(x) with the coefficients of each contiguous group of channels in a row of `a` and of `b`.

    One row stands for all channels. Half precision is computed in float32 and given back as it came.

    >>> one = rational(torch.tensor([-1.0, 2.0]), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0]]))
    >>> one  # x / (1 + |x|)
    tensor([-0.5000,  0.6667])
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # A column for each channel: contiguous coefficients keep the loops over a tensor vectorised.
    each = [rows.to(wide).t().repeat_interleave(x.shape[-1] // len(rows), 1) for rows in (a, b)]
    out: Tensor = _Rational.apply(x.to(wide), *each, denominator)
    return out.to(x.dtype)


class GroupRational(nn.Module):
    r"""A learnable activation: one rational function F(x) = P(x) / Q(x) for each of `groups` groups of channels.

    num_channels   size of the dimension `channel_dim` of the input; a multiple of `groups`
    groups         contiguous groups of equal size, 8 in the paper
    init           a name ("identity", "swish", "gelu", "relu", "tanh", "sigmoid", "geglu", "swishglu"), any function
                   of a tensor (fitted on [-3, 3]), or coefficients (a, b), lowest power first
    order          degrees of P and Q
    denominator    "A": $Q = 1 + \sum |b_j| |x|^j$; "B": $Q = 1 + |\sum b_j x^j|$
    share          what all groups have in common: "numerator" (the authors' code), "denominator" (their text), "none"
    channel_dim    -1, or 1 for feature maps [batch, channels, height, width]

    `weight_numerator` and `weight_denominator` hold a row a group (one row where shared), named and shaped as in the
    authors' checkpoints. Raises ValueError where an argument or an input does not fit.

    >>> act = GroupRational(16, groups=4)
    >>> act(torch.randn(2, 5, 16)).shape, sum(p.numel() for p in act.parameters())
    (torch.Size([2, 5, 16]), 22)
    """

    def __init__(
        self,
        num_channels: int,
        groups: int = 8,
        init: Init = "swish",
        order: tuple[int, int] = (5, 4),
        denominator: str = "A",
        share: str = "numerator",
        channel_dim: int = -1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_form(order, denominator)
        if groups < 1 or num_channels < 1 or num_channels % groups:
            raise ValueError(f"{num_channels} channels in {groups} groups; expected groups of equal size")
        if share not in SHARES:
            raise ValueError(f"share is {share!r}; expected one of {', '.join(SHARES)}")
        self.num_channels, self.groups, self.order = num_channels, groups, order
        self.denominator, self.share, self.channel_dim = denominator, share, channel_dim
        self.init = init if isinstance(init, str) else "given"  # a function could not be saved with the module
        self._start = coefficients(init, order, denominator)
        rows = (1 if share == "numerator" else groups, 1 if share == "denominator" else groups)
        self.weight_numerator = nn.Parameter(torch.empty(rows[0], order[0] + 1, device=device, dtype=dtype))
        self.weight_denominator = nn.Parameter(torch.empty(rows[1], order[1], device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All groups to the coefficients of `init`."""
        with torch.no_grad():
            for weight, start in zip((self.weight_numerator, self.weight_denominator), self._start, strict=True):
                weight.copy_(torch.tensor(start, dtype=torch.float64).expand_as(weight))

    def gain(self) -> float:
        """The gain of `init` (see `gain`): weights of variance gain / fan_in after it keep the variance."""
        return gain(as_function(*self._start, self.denominator))

    def forward(self, x: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if not x.is_floating_point():
            raise ValueError(f"input of dtype {x.dtype}; a rational activation needs floating point: pass x.float()")
        if not -x.dim() <= self.channel_dim < x.dim() or x.shape[self.channel_dim] != self.num_channels:
            raise ValueError(
                f"input of shape {tuple(x.shape)}; expected {self.num_channels} channels "
                f"in dimension {self.channel_dim}"
            )
        last = x.movedim(self.channel_dim, -1)
        out = rational(last, self.weight_numerator, self.weight_denominator, self.denominator)
        return out.movedim(-1, self.channel_dim)

    def extra_repr(self) -> str:
        return (
            f"{self.num_channels}, groups={self.groups}, init={self.init!r}, order={self.order}, "
            f"denominator={self.denominator!r}, share={self.share!r}"
        )
