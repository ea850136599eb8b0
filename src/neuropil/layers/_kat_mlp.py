"""The GR-KAN layer, and the transformer's MLP of two of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from neuropil.layers._kat_fit import Init
from neuropil.layers._kat_rational import GroupRational

WEIGHT_INITS = ("paper", "released", "torch")


def initialise(linear: nn.Module, alpha: float, how: str) -> None:
    """Weights and bias (0) of a linear map or 1 x 1 convolution that reads an activation of gain `alpha`.

    "paper": N(0, alpha / fan_in); "released": N(0, 0.02) cut at 2; "torch": as torch has them.
    """
    if how not in WEIGHT_INITS:
        raise ValueError(f"weight_init is {how!r}; expected one of {', '.join(WEIGHT_INITS)}")
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor)
    if how == "torch":
        nn.Linear.reset_parameters(linear)  # type: ignore[arg-type]
        return
    if how == "paper":
        nn.init.normal_(weight, std=(alpha / weight[0].numel()) ** 0.5)
    else:
        nn.init.trunc_normal_(weight, std=0.02)
    if isinstance(bias, Tensor):
        nn.init.zeros_(bias)


class GRKAN(nn.Module):
    """A group-rational KAN layer: y = W F(x) + b, with F one rational function for each group of input channels.

    Takes the place of an activation and the `torch.nn.Linear` after it; `weight` and `bias` are named as there.

    in_features, out_features, bias    as in `torch.nn.Linear`; `groups` must divide in_features
    groups, init, order, denominator, share    of the activation `act`, see `GroupRational`
    weight_init    "paper" keeps the variance; "released" and "torch" (torch's own) see the module's text

    >>> layer = GRKAN(32, 10)
    >>> sum(p.numel() for p in layer.parameters()) == 32 * 10 + 10 + 6 + 4 * 8
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        groups: int = 8,
        init: Init = "swish",
        order: tuple[int, int] = (5, 4),
        denominator: str = "A",
        share: str = "numerator",
        weight_init: str = "paper",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"{in_features} inputs and {out_features} outputs; expected at least one of each")
        self.in_features, self.out_features, self.weight_init = in_features, out_features, weight_init
        self.act = GroupRational(in_features, groups, init, order, denominator, share, device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @classmethod
    def around(cls, linear: nn.Linear, init: Init = "identity", **options: Any) -> GRKAN:
        """A layer that holds the parameters of `linear` themselves, behind a rational that begins as `init`."""
        weight = linear.weight
        made = cls(
            linear.in_features, linear.out_features, linear.bias is not None, init=init, device="meta", **options
        )
        made.act = made.act.to_empty(device=weight.device).to(weight.dtype)
        made.act.reset_parameters()
        made.weight, made.bias = cast(nn.Parameter, weight), cast("nn.Parameter | None", linear.bias)
        return made.train(linear.training)

    def reset_parameters(self) -> None:
        """The activation to its `init`, weights and bias as `weight_init` says."""
        self.act.reset_parameters()
        initialise(self, self.act.gain() if self.weight_init == "paper" else 1.0, self.weight_init)

    def forward(self, x: Shaped[Tensor, "*batch d"]) -> Float[Tensor, "*batch o"]:
        """Raises ValueError for input that is not floating point or has another number of channels."""
        return F.linear(self.act(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class GRKANMlp(nn.Module):
    """A transformer's MLP as two GR-KAN layers: y = fc2(drop(act2(fc1(drop(act1(x)))))), activations first.

    The arguments are those of timm's `Mlp`, so that it may stand as `mlp_layer` in its blocks: in_features,
    hidden_features and out_features (each as in_features by default; transformers take four times as many hidden),
    bias, drop (one or a pair each), use_conv (1 x 1 convolutions on [batch, channels, height, width]).

    act_init       what act1 and act2 begin as, see `GroupRational`: identity and swish in the paper
    act_layer      makes a module that act2 is fitted to instead
    norm_layer     None; the paper's MLP has no norm
    groups, denominator, share, weight_init    see `GRKAN`

    >>> GRKANMlp(32, 128)(torch.randn(2, 9, 32)).shape
    torch.Size([2, 9, 32])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        norm_layer: Any = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        use_conv: bool = False,
        *,
        act_init: tuple[Init, Init] = ("identity", "swish"),
        groups: int = 8,
        denominator: str = "A",
        share: str = "numerator",
        weight_init: str = "paper",
    ) -> None:
        super().__init__()
        if norm_layer is not None:
            raise ValueError("norm_layer was given; the paper's MLP has no norm: leave it out")
        hidden, out = hidden_features or in_features, out_features or in_features
        biases = bias if isinstance(bias, tuple) else (bias, bias)
        drops = drop if isinstance(drop, tuple) else (drop, drop)
        first, second = act_init[0], act_init[1] if act_layer is None else act_layer()
        options: dict[str, Any] = {"denominator": denominator, "share": share, "channel_dim": 1 if use_conv else -1}
        self.weight_init = weight_init
        self.act1 = GroupRational(in_features, groups, first, **options)
        self.drop1 = nn.Dropout(drops[0])
        self.fc1 = _linear(in_features, hidden, biases[0], use_conv)
        self.act2 = GroupRational(hidden, groups, second, **options)
        self.drop2 = nn.Dropout(drops[1])
        self.fc2 = _linear(hidden, out, biases[1], use_conv)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Activations to their `act_init`, weights and biases as `weight_init` says."""
        for act, linear in ((self.act1, self.fc1), (self.act2, self.fc2)):
            act.reset_parameters()
            initialise(linear, act.gain(), self.weight_init)

    def forward(self, x: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*out"]:
        x = self.fc1(self.drop1(self.act1(x)))
        return self.fc2(self.drop2(self.act2(x)))


def _linear(inputs: int, outputs: int, bias: bool, conv: bool) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1, bias=bias) if conv else nn.Linear(inputs, outputs, bias)
