r"""Training with weights of two and three levels.

| | levels | gradient |
| --- | --- | --- |
| `BinaryWeight("none")` | sign(w) (BinaryConnect, also stochastic) | where \|w\| <= 1; `clip_masters` after a step |
| `BinaryWeight("mean")` | mean\|w\| sign(w) for each channel (XNOR-Net) | through the sign and the mean |
| `LossAwareBinary` | the scale weighted by the curvature that Adam has gathered (LAB) | straight-through |
| `TTQ` | -a_n, 0, a_p with a learned scale for each side | of the scales, and scaled by them |
| `Quantizer(2, "ternary", dynamic=True)` | -a, 0, a (TWN) | straight-through |

>>> from neuropil.compress.quantize import qat_prepare
>>> model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))
>>> made = qat_prepare(model, BinaryWeight("mean"), skip=["1"]).model
>>> made[0].weight[0].abs().unique().numel()
1

Sources: Courbariaux, Bengio and David 2015, arXiv:1511.00363 (BinaryConnect); Rastegari, Ordonez, Redmon and Farhadi
2016, arXiv:1603.05279 (XNOR-Net); Hou, Yao and Kwok 2017, arXiv:1611.01600 (LAB); Zhu, Han, Mao and Dally 2017,
arXiv:1612.01064 (TTQ).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuropil.compress.quantize.grids import Levels
from neuropil.compress.quantize.learned import Learned
from neuropil.compress.quantize.noise import stochastic_signs
from neuropil.compress.quantize.quantizer import FakeQuantizer, packing_of, straight_through
from neuropil.compress.quantize.sign_gradients import sign
from neuropil.compress.quantize.tiles import (
    Granularity,
    QuantizationError,
    check_finite,
    from_tiles,
    tiling,
    to_tiles,
    working,
)
from neuropil.packed import Packing


def _two_levels(alpha: Tensor) -> Levels:
    return Levels(alpha, alpha.new_tensor([[[-1.0, 1.0]]]), alpha.new_zeros(1, 1, 1))


class BinaryWeight(FakeQuantizer):
    """Signs of weights, as they are ("none": BinaryConnect) or times the mean magnitude ("mean": XNOR-Net).

    `stochastic` draws signs by the hard sigmoid in training; in eval mode and when packed they are plain. `gradient`
    is one of `sign_gradients`; with "mean" the gradient flows through the mean as well.
    """

    def __init__(
        self,
        scale: str = "none",
        granularity: Granularity = "channel",
        stochastic: bool = False,
        gradient: str = "clipped",
    ) -> None:
        super().__init__()
        if scale not in ("none", "mean"):
            raise QuantizationError(f'scale={scale!r}: expected "none" or "mean"')
        if stochastic and gradient != "clipped":
            raise QuantizationError(f"gradient={gradient!r}: stochastic signs have the clipped gradient only")
        sign(torch.zeros(1), gradient)
        self.scale, self.granularity, self.stochastic, self.gradient = scale, granularity, stochastic, gradient

    def settings(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("scale", "granularity", "stochastic", "gradient")}

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        signs = stochastic_signs(w) if self.stochastic and self.training else sign(w, self.gradient)
        if self.scale == "none":
            return signs
        tiles = tiling(w.shape, self.granularity, self.axis, self.splits)
        alpha = to_tiles(w, tiles).abs().mean(-1)
        return from_tiles(to_tiles(signs, tiles) * alpha[..., None], tiles, w.shape)

    def pack(self, w: Float[Tensor, "*shape"]) -> Packing:
        check_finite(w, "the weight")
        tiles = tiling(w.shape, self.granularity if self.scale == "mean" else "tensor", self.axis, self.splits)
        tiled = to_tiles(working(w), tiles)
        alpha = tiled.abs().mean(-1) if self.scale == "mean" else tiled.new_ones(1, 1)
        grid = _two_levels(alpha)
        return packing_of(grid, from_tiles(grid.codes(tiled), tiles, w.shape))


def masters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The float weights behind a model's parametrized ones, by the name of the layer."""
    found = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            chain: Any = module.parametrizations
            original = chain["weight"].original
            if isinstance(original, nn.Parameter):
                found[name] = original
    return found


@torch.no_grad()
def clip_masters(model: nn.Module, limit: float = 1.0) -> None:
    """Clip the float weights behind parametrized ones to [-limit, limit], in place: after each step (BinaryConnect)."""
    for weight in masters(model).values():
        weight.clamp_(-limit, limit)


def loss_aware_binary(
    w: Float[Tensor, "r g n"], curvature: Float[Tensor, "r g n"]
) -> tuple[Float[Tensor, "r g"], Float[Tensor, "r g n"]]:
    """The scale and signs that minimise sum of d (w - alpha b)^2: alpha = sum d|w| / sum d, b = sign(w).

    >>> alpha, _ = loss_aware_binary(torch.tensor([[[1.0, -4.0]]]), torch.tensor([[[2.0, 1.0]]]))
    >>> alpha.item()
    2.0
    """
    alpha = (curvature * w.abs()).sum(-1) / curvature.sum(-1).clamp_min(torch.finfo(w.dtype).tiny)
    return alpha, sign(w)


class LossAwareBinary(FakeQuantizer):
    """Binary weights whose scale minimises the loss's second-order model, not the distance (LAB).

    The diagonal curvature is the square root of Adam's second moment: call `watch(model, optimizer)` (in this module)
    after each step. Until then it is 1, and the scale that of XNOR-Net. The gradient is straight-through.
    """

    curvature: Tensor

    def __init__(self, granularity: Granularity = "channel") -> None:
        super().__init__()
        self.granularity = granularity
        self.register_buffer("curvature", torch.ones(()))

    def settings(self) -> dict[str, Any]:
        return {"granularity": self.granularity}

    def _grid(self, w: Tensor) -> tuple[Levels, Tensor, Any]:
        tiles = tiling(w.shape, self.granularity, self.axis, self.splits)
        tiled = to_tiles(working(w), tiles)
        alpha, _ = loss_aware_binary(tiled, to_tiles(self.curvature.to(tiled).expand(w.shape), tiles))
        return _two_levels(alpha), tiled, tiles

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        grid, tiled, tiles = self._grid(w)
        return straight_through(w, from_tiles(grid.values(grid.codes(tiled)), tiles, w.shape).to(w.dtype))

    def pack(self, w: Float[Tensor, "*shape"]) -> Packing:
        check_finite(w, "the weight")
        grid, tiled, tiles = self._grid(w)
        return packing_of(grid, from_tiles(grid.codes(tiled), tiles, w.shape))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        given = state_dict.get(prefix + "curvature")
        if given is not None:
            self.curvature = torch.empty_like(given)
        super()._load_from_state_dict(state_dict, prefix, *args)


def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Give each `LossAwareBinary` of a model the curvature that Adam has gathered; to how many.

    Raises QuantizationError where the optimizer keeps no second moment.
    """
    given = 0
    for name, weight in masters(model).items():
        chain: Any = model.get_submodule(name).parametrizations
        for step in chain["weight"]:
            if isinstance(step, LossAwareBinary):
                moment = optimizer.state.get(weight, {}).get("exp_avg_sq")
                if moment is None:
                    raise QuantizationError(
                        f"the optimizer keeps no second moment of {name}.weight: use Adam, after its first step"
                    )
                step.curvature = moment.sqrt() + 1e-8
                given += 1
    return given


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, delta: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        up, down = w > delta, w < -delta
        ctx.save_for_backward(up, down, positive, negative)
        zero = w.new_zeros(())
        return torch.where(up, positive, torch.where(down, -negative, zero))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        up, down, positive, negative = ctx.saved_tensors
        one = gradient.new_ones(())
        to_w = gradient * torch.where(up, positive, torch.where(down, negative, one))
        return to_w, None, (gradient * up).sum(-1, keepdim=True), -(gradient * down).sum(-1, keepdim=True)


class TTQ(Learned):
    """Trained ternary weights: -a_n, 0 and a_p, with a learned scale for each side of each tile.

    A weight is 0 within t max|w| (t = 0.05). The gradient of a scale is the sum of those of its weights (with the
    sign of the side); a weight's own is multiplied by the scale of its side, and passes as it is in the middle.
    The scales begin at the means of their sides.
    """

    learned = ("positive", "negative")
    positive: Tensor
    negative: Tensor

    def __init__(self, threshold: float = 0.05, granularity: Granularity = "tensor") -> None:
        super().__init__()
        if not 0 <= threshold < 1:
            raise QuantizationError(f"threshold={threshold}: a share of max|w|, from 0 to less than 1")
        self.threshold, self.granularity = threshold, granularity

    def settings(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "granularity": self.granularity}

    def _delta(self, tiles: Tensor) -> Tensor:
        return self.threshold * tiles.detach().abs().amax(-1, keepdim=True)

    def start(self, tiles: Float[Tensor, "r g n"]) -> None:
        delta = self._delta(tiles)
        for name, side in (("positive", tiles > delta), ("negative", tiles < -delta)):
            self._set(name, (tiles.abs() * side).sum(-1) / side.sum(-1).clamp_min(1))

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        tiles = self.begin(x)
        tiled = to_tiles(x, tiles).to(self.positive.dtype)
        out: Tensor = _Ternary.apply(tiled, self._delta(tiled), self.positive[..., None], self.negative[..., None])
        return from_tiles(out, tiles, x.shape).to(x.dtype)

    def pack(self, w: Float[Tensor, "*shape"]) -> Packing:
        tiles = self.begin(w)
        check_finite(w, "the weight")
        tiled = to_tiles(working(w), tiles)
        delta = self._delta(tiled)
        codes = 1 + (tiled > delta).int() - (tiled < -delta).int()
        a_n, a_p = -self.negative.detach(), self.positive.detach()
        level = torch.stack([a_n, torch.zeros_like(a_n), a_p], -1)
        unused = level.new_zeros(1, 1, 2)  # the codes are given: no thresholds are needed
        return packing_of(Levels(torch.ones_like(a_n), level, unused), from_tiles(codes, tiles, w.shape))
