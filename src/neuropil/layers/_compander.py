"""The parametrisation of `neuropil.layers.compander`: one weight tensor as a bounded odd function of a variable."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from neuropil.layers._compander_curves import curve

MARGIN = 1e-6  # share of the bound that an assigned weight keeps from it


class WeightCompander(nn.Module):
    """The parametrisation w = a f(v / b) of one weight tensor, for `torch.nn.utils.parametrize`.

    >>> from torch.nn.utils import parametrize
    >>> layer = nn.Linear(4, 3)
    >>> _ = parametrize.register_parametrization(layer, "weight", WeightCompander(slope=2.0))
    >>> layer.parametrizations.weight[0].slope.round(decimals=4)
    tensor(2.)

    Parameters
    ----------
    kind: "arctan", "tanh", "softsign" or "mu-law".
    a, b: the function's scales; left out, a comes from `bound_std` and b from `slope`.
    slope: of the function at 0, at the beginning. Below 1 it only compresses: a warning says so.
    bound_std: the bound on |w|, in standard deviations about zero of the weights that the tensor has at first.
    learnable: train a and b, as their logarithms, so that they stay positive.
    per: "layer", or "channel": a pair for each entry of the first dimension.
    min_slope: keeps the slope from falling below this while a and b are trained.
    start: "function" begins at v with Psi(v) = w; "value" at v = w, which multiplies small weights by the slope.
    limit: weights beyond this share of the bound begin there (the inverse is infinite at the bound); counted in
        `clamped`. Weights assigned later are taken up to the bound itself.
    beyond: "clamp", or "raise" a ValueError instead where a weight exceeds that share.
    mu: of the mu-law.

    Raises ValueError for settings out of range, for weights that are not floating-point numbers, and for weights that
    are all 0 where a is to come from them.
    """

    log_a: Tensor
    log_b: Tensor

    def __init__(
        self,
        kind: str = "arctan",
        a: float | None = None,
        b: float | None = None,
        *,
        slope: float = 1.5,
        bound_std: float = 3.0,
        learnable: bool = False,
        per: str = "layer",
        min_slope: float | None = None,
        start: str = "function",
        limit: float = 0.95,
        beyond: str = "clamp",
        mu: float = 255.0,
    ) -> None:
        super().__init__()
        positive = {"a": a, "b": b, "slope": slope, "bound_std": bound_std, "min_slope": min_slope}
        for name, value in positive.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value}: expected a positive number")
        if not 0 < limit < 1:
            raise ValueError(f"limit={limit}: expected a share of the bound between 0 and 1")
        _check_choice("per", per, ("layer", "channel"))
        _check_choice("start", start, ("function", "value"))
        _check_choice("beyond", beyond, ("clamp", "raise"))
        self.kind, self.curve = kind, curve(kind, mu)
        self.given, self.wanted_slope, self.bound_std = (a, b), slope, bound_std
        self.learnable, self.per, self.min_slope = learnable, per, min_slope
        self.start, self.limit, self.beyond = start, limit, beyond
        self.clamped = 0  # weights moved to within the bound, by the last assignment
        self.calibrated = self.placed = self.shared = False
        self._set(*self._scales(torch.ones(()) * math.nan))
        first_slope = slope if b is None else (math.inf if a is None else a / b * self.curve.gain)
        if first_slope < 1:
            warnings.warn("a slope below 1 at zero only compresses: no weight is pushed away from zero", stacklevel=2)

    def forward(self, v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The weights of the variable v."""
        return self.a.to(v.dtype) * self.curve.value(v / self.b.to(v.dtype))

    def right_inverse(self, weight: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The variable of these weights. The first ones it is given set a and b."""
        if not weight.is_floating_point():
            raise ValueError(f"weights of {weight.dtype} cannot be companded; expected floating-point numbers")
        if not self.calibrated:
            self.calibrate(weight)
        first, self.placed = not self.placed, True
        if first and self.start == "value":
            return weight
        return self.inverse(weight, self.log_a, self.log_b, self.limit if first else 1 - MARGIN)

    def derivative(self, v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Psi'(v): by its square, the learning rate of the weight differs from that of v."""
        a, b = self.a.to(v.dtype), self.b.to(v.dtype)
        return a / b * self.curve.derivative(v / b)

    def calibrate(self, weight: Float[Tensor, "*shape"]) -> None:
        """Set a and b for these weights, from what was given and from their deviation about zero."""
        self._set(*self._scales(weight.detach()))
        self.calibrated = True

    @torch.no_grad()
    def inverse(
        self, weight: Float[Tensor, "*shape"], log_a: Tensor, log_b: Tensor, limit: float
    ) -> Float[Tensor, "*shape"]:
        """v for these scales; weights beyond the share `limit` of the bound are moved to it, and counted."""
        a, b = log_a.exp().to(weight.dtype), self._guarded(log_a, log_b).to(weight.dtype)
        y, most = weight / a, limit * self.curve.reach
        self.clamped = int((y.abs() > most).sum()) if math.isfinite(most) else 0
        if self.clamped and self.beyond == "raise":
            raise ValueError(
                f"{self.clamped} of {weight.numel()} weights exceed {limit:g} of the bound; raise bound_std or a, or "
                "let beyond='clamp' move them there"
            )
        return b * self.curve.inverse(y.clamp(-most, most))

    @property
    def a(self) -> Tensor:
        """The scale of the weights."""
        return self.log_a.exp()

    @property
    def b(self) -> Tensor:
        """The scale of the variable, kept small enough for `min_slope`."""
        return self._guarded(self.log_a, self.log_b)

    @property
    def bound(self) -> Tensor:
        """What no weight exceeds in magnitude; infinite for the mu-law."""
        return self.a.detach() * self.curve.reach

    @property
    def slope(self) -> Tensor:
        """The function's slope at zero."""
        return (self.a / self.b).detach() * self.curve.gain

    def extra_repr(self) -> str:
        return f"{self.kind}, per={self.per}, learnable={self.learnable}"

    def _guarded(self, log_a: Tensor, log_b: Tensor) -> Tensor:
        if self.min_slope is None:
            return log_b.exp()
        return torch.minimum(log_b, log_a + math.log(self.curve.gain / self.min_slope)).exp()

    def _scales(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """log a and log b for these weights."""
        a, b = self.given
        per_channel = self.per == "channel" and weight.ndim > 0
        over = tuple(range(1, weight.ndim)) if per_channel else tuple(range(weight.ndim))
        deviation = weight.square().mean(over, keepdim=per_channel).sqrt() if over else weight.abs()
        if a is None and bool((deviation == 0).any()):
            raise ValueError("the weights are all 0, of a tensor or of a channel, and set no bound: give a and b")
        reach = self.curve.reach if math.isfinite(self.curve.reach) else 1.0
        scale = self.bound_std / reach * deviation if a is None else torch.full_like(deviation, a)
        log_a = scale.log()
        log_b = log_a + math.log(self.curve.gain / self.wanted_slope) if b is None else torch.full_like(log_a, b).log()
        return log_a, log_b

    def _set(self, log_a: Tensor, log_b: Tensor) -> None:
        for name, value in (("log_a", log_a), ("log_b", log_b)):
            if self.learnable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(choices)}")
