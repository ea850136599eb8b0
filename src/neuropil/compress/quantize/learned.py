r"""Quantizers that are trained: steps (LSQ), offsets (LSQ+), clips (PACT), intervals (QIL), levels.

| | what is learned | for |
| --- | --- | --- |
| `LSQ` | the step $s$, gradient scaled by $1 / \sqrt{N Q_p}$ | weights, activations |
| `LSQPlus` | the step and an offset | activations that are not about 0 |
| `PACT` | the clip $\alpha$ of activations that are not negative | activations |
| `QIL` | the interval in which weights are told apart, and a power | weights |
| `LearnedLevels` | each level, begun by k-means | weights |

>>> from neuropil.compress.quantize import bake, qat_prepare
>>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
>>> made = qat_prepare(model, LSQ(3, granularity="channel"), activations=LSQ(4, signed=False)).model
>>> sum(isinstance(m, LSQ) for m in made.modules())
4
>>> x = torch.randn(8, 16)
>>> torch.equal(made(x), bake(made).model(x))
True

Sources: Esser et al. 2020, arXiv:1902.08153 (LSQ); Bhalgat et al. 2020, arXiv:2004.09576 (LSQ+); Choi et al. 2018,
arXiv:1805.06085 (PACT); Jung et al. 2019, arXiv:1808.05779 (QIL).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.compress.quantize.grids import Grid, Levels, Uniform, code_range, nearest
from neuropil.compress.quantize.nonuniform import kmeans
from neuropil.compress.quantize.quantizer import FakeQuantizer, packing_of, straight_through
from neuropil.compress.quantize.tiles import (
    Granularity,
    QuantizationError,
    Tiling,
    check_bits,
    check_finite,
    from_tiles,
    tiling,
    to_tiles,
    working,
)
from neuropil.packed import Packing


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.factor, None


def scale_gradient(x: Float[Tensor, "*shape"], factor: float) -> Float[Tensor, "*shape"]:
    """x, to the bit, with its gradient times `factor`."""
    scaled: Tensor = _ScaledGradient.apply(x, factor)
    return scaled


class Learned(FakeQuantizer):
    """A quantizer with parameters that begin by the first tensor it is given (`start`).

    A parameter keeps its identity when it takes its first values, so an optimizer made before then trains it.
    """

    ready: Tensor
    learned: tuple[str, ...] = ("scale",)
    granularity: Granularity = "tensor"

    def __init__(self) -> None:
        super().__init__()
        for name in self.learned:
            self.register_parameter(name, nn.Parameter(torch.ones(1, 1)))
        self.register_buffer("ready", torch.tensor(False))

    def start(self, tiles: Float[Tensor, "r g n"]) -> None:
        """Set the parameters for these numbers."""
        raise NotImplementedError

    def grid(self) -> Grid:
        """What numbers are rounded to now."""
        raise NotImplementedError

    def _set(self, name: str, value: Tensor) -> None:
        parameter = getattr(self, name)
        parameter.data = value.detach().to(parameter.dtype).clone()

    def tiles(self, x: Tensor) -> Tiling:
        return tiling(x.shape, self.granularity, self.axis, self.splits)

    def begin(self, x: Tensor) -> Tiling:
        """The tiles of a tensor; the first tensor sets the parameters."""
        tiles = self.tiles(x)
        if not bool(self.ready):
            check_finite(x, "the tensor")
            self.start(to_tiles(working(x), tiles))
            self.ready.fill_(True)
        return tiles

    def pack(self, w: Float[Tensor, "*shape"]) -> Packing:
        tiles = self.begin(w)
        check_finite(w, "the weight")
        grid = self.grid()
        return packing_of(grid, from_tiles(grid.codes(to_tiles(working(w), tiles)), tiles, w.shape))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name in self.learned:
            given = state_dict.get(prefix + name)
            if given is not None:
                self._set(name, given)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _positive(scale: Tensor) -> Tensor:
    """A step that training has driven to 0 or below stays a step."""
    return scale.abs().clamp_min(1e-8)


class LSQ(Learned):
    """Rounds to s * clip(round(x / s)) with a learned step s.

    ds is round(x/s) - x/s inside the range and the end code outside it, times 1 / sqrt(N Qp) with N the numbers that
    share the step; dx passes inside the range. s begins at 2 mean|x| / sqrt(Qp). Codes are -2^(b-1) to 2^(b-1) - 1,
    or 0 to 2^b - 1 where not `signed`. One signed bit would have the codes -1 and 0: it is refused.
    """

    scale: Tensor

    def __init__(self, bits: int = 4, signed: bool = True, granularity: Granularity = "tensor", axis: int = 0) -> None:
        super().__init__()
        check_bits(bits)
        if bits == 32 or (signed and bits < 2):
            raise QuantizationError(f"bits={bits}: a learned step needs 1 to 16 bits, 2 to 16 of signed numbers")
        self.bits, self.signed, self.granularity, self.axis = bits, signed, granularity, axis
        self.low, self.high = code_range("symmetric" if signed else "unsigned", bits)

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "signed": self.signed, "granularity": self.granularity, "axis": self.axis}

    def start(self, tiles: Float[Tensor, "r g n"]) -> None:
        scale = 2 * tiles.abs().mean(-1) / self.high**0.5
        self._set("scale", torch.where(scale > 0, scale, torch.ones_like(scale)))

    def grid(self) -> Uniform:
        scale = _positive(self.scale.detach())
        return Uniform(scale, torch.zeros_like(scale), self.low, self.high)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        tiles = self.begin(x)
        tiled = to_tiles(x, tiles).to(self.scale.dtype)
        s = scale_gradient(_positive(self.scale), (tiled.shape[-1] * self.high) ** -0.5)[..., None]
        at = (tiled / s).clamp(self.low, self.high)
        return from_tiles(straight_through(at, at.detach().round()) * s, tiles, x.shape).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {'signed' if self.signed else 'unsigned'}, {self.granularity}"


class LSQPlus(LSQ):
    """LSQ with a learned offset: s * clip(round((x - beta) / s)) + beta.

    Begins by the range of the first tensor. The gradient of the offset is 1 outside the range and 0 inside.
    """

    learned = ("scale", "offset")
    offset: Tensor

    def __init__(self, bits: int = 4, granularity: Granularity = "tensor", axis: int = 0) -> None:
        super().__init__(bits, False, granularity, axis)

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "granularity": self.granularity, "axis": self.axis}

    def start(self, tiles: Float[Tensor, "r g n"]) -> None:
        low, high = tiles.amin(-1), tiles.amax(-1)
        scale = (high - low) / (self.high - self.low)
        self._set("scale", torch.where(scale > 0, scale, torch.ones_like(scale)))
        self._set("offset", low)

    def grid(self) -> Uniform:
        scale = _positive(self.scale.detach())
        return Uniform(scale, -self.offset.detach() / scale, self.low, self.high)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        tiles = self.begin(x)
        tiled = to_tiles(x, tiles).to(self.scale.dtype)
        factor = (tiled.shape[-1] * self.high) ** -0.5
        s = scale_gradient(_positive(self.scale), factor)[..., None]
        offset = scale_gradient(self.offset, factor)[..., None]
        at = (tiled / s - offset / s).clamp(self.low, self.high)
        # (code + beta / s) s rather than code s + beta: the packing's own order of operations
        out = (straight_through(at, at.detach().round()) - (-offset / s)) * s
        return from_tiles(out, tiles, x.shape).to(x.dtype)


class PACT(Learned):
    """Clips activations to [0, alpha] and rounds them to 2^b levels there, with a learned alpha.

    d alpha is the sum of the gradients where x >= alpha; dx passes where 0 < x < alpha. Add `decay()` to the loss.
    `alpha` begins at `clip` (the authors' code has 10; LSQ's way of starting does not apply).
    """

    learned = ("alpha",)
    alpha: Tensor

    def __init__(self, bits: int = 4, clip: float = 10.0) -> None:
        super().__init__()
        check_bits(bits)
        if bits == 32 or clip <= 0:
            raise QuantizationError(f"bits={bits}, clip={clip}: expected 1 to 16, and more than 0")
        self.bits, self.clip = bits, clip
        self.alpha.data.fill_(clip)
        self.ready.fill_(True)

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "clip": self.clip}

    def grid(self) -> Uniform:
        scale = _positive(self.alpha.detach()) / (2**self.bits - 1)
        return Uniform(scale, torch.zeros_like(scale), 0, 2**self.bits - 1)

    def decay(self, strength: float = 1e-4) -> Float[Tensor, ""]:
        """The L2 penalty that keeps alpha small."""
        return strength * self.alpha.square().sum()

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        clipped = torch.where(x.detach() >= self.alpha.detach(), _positive(self.alpha).to(x.dtype), x.clamp_min(0))
        grid, tiles = self.grid(), self.tiles(x)
        codes = grid.codes(to_tiles(working(clipped), tiles))
        return straight_through(clipped, from_tiles(grid.values(codes), tiles, x.shape).to(x.dtype))


class QIL(Learned):
    """Prunes weights below a learned interval, clips those above it and rounds what lies in it, after a power.

    |w| below c - d is 0, above c + d is 1, between ((|w| - c + d) / 2d)^gamma; that is rounded to 2^(b-1) - 1 steps.
    The paper's outputs lie in [-1, 1] and rely on normalisation; here they are multiplied by c + d, so that a model
    can be entered without retraining it from the start. The interval begins as [0, max|w|].
    """

    learned = ("centre", "distance", "gamma")
    centre: Tensor
    distance: Tensor
    gamma: Tensor

    def __init__(self, bits: int = 4, granularity: Granularity = "tensor", power: bool = False) -> None:
        super().__init__()
        check_bits(bits)
        if bits in (1, 32):
            raise QuantizationError(f"bits={bits}: an interval needs 2 to 16 bits")
        self.bits, self.granularity, self.power = bits, granularity, power
        self.steps = 2 ** (bits - 1) - 1
        self.gamma.requires_grad_(power)

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "granularity": self.granularity, "power": self.power}

    def start(self, tiles: Float[Tensor, "r g n"]) -> None:
        half = tiles.abs().amax(-1) / 2
        half = torch.where(half > 0, half, torch.full_like(half, 0.5))
        self._set("centre", half)
        self._set("distance", half)
        self._set("gamma", torch.ones_like(half))

    def _transformed(self, tiled: Tensor) -> Tensor:
        d = _positive(self.distance)[..., None]
        share = ((tiled.abs() - self.centre[..., None] + d) / (2 * d)).clamp(0, 1)
        if self.power:
            share = torch.where(share > 0, share.clamp_min(1e-8).pow(self.gamma.clamp_min(1e-3)[..., None]), share)
        return tiled.sign() * share * self.steps

    def _scale(self) -> Tensor:
        return _positive(self.centre + _positive(self.distance)) / self.steps

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        tiles = self.begin(x)
        at = self._transformed(to_tiles(x, tiles).to(self.centre.dtype))
        out = straight_through(at, at.detach().round()) * self._scale()[..., None]
        return from_tiles(out, tiles, x.shape).to(x.dtype)

    def pack(self, w: Float[Tensor, "*shape"]) -> Packing:
        tiles = self.begin(w)
        check_finite(w, "the weight")
        scale = self._scale().detach()
        codes = self._transformed(to_tiles(working(w), tiles).to(scale.dtype)).detach().round().int()
        grid = Uniform(scale, torch.zeros_like(scale), -self.steps, self.steps)
        return packing_of(grid, from_tiles(codes, tiles, w.shape))


class LearnedLevels(Learned):
    """Rounds to the nearest of 2^b levels, each of which is learned: its gradient is the sum over the numbers on it.

    The levels begin at the k-means of the first tensor; the gradient of the numbers is straight-through.
    """

    learned = ("level",)
    level: Tensor

    def __init__(self, bits: int = 2, granularity: Granularity = "channel") -> None:
        super().__init__()
        check_bits(bits)
        if bits > 8:
            raise QuantizationError(f"bits={bits}: levels are learned one by one, for 1 to 8 bits")
        self.bits, self.granularity = bits, granularity

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "granularity": self.granularity}

    def start(self, tiles: Float[Tensor, "r g n"]) -> None:
        self._set("level", kmeans(tiles, 2**self.bits).level)

    def grid(self) -> Levels:
        return nearest(self.level.detach())

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        tiles = self.begin(x)
        tiled = to_tiles(x, tiles).to(self.level.dtype)
        level = self.level.sort(-1).values
        codes = nearest(level.detach()).codes(tiled.detach()).long()
        out = level.expand(*tiled.shape[:2], -1).gather(2, codes)
        out = out + straight_through(tiled, torch.zeros_like(tiled))
        return from_tiles(out, tiles, x.shape).to(x.dtype)
