"""`Quantizer`: one module that rounds weights (as a parametrization) or activations to a few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor, nn

from neuropil.compress.quantize.grids import UNIFORM, Grid, Levels, Uniform, code_range, stored, uniform
from neuropil.compress.quantize.observers import Observer
from neuropil.compress.quantize.schemes import LEVELS, fit_levels
from neuropil.compress.quantize.tiles import (
    Granularity,
    QuantizationError,
    Tiling,
    channels_of,
    check_bits,
    check_finite,
    from_tiles,
    tiling,
    to_tiles,
    working,
)
from neuropil.packed import Affine, Lookup, Packing


class _StraightThrough(torch.autograd.Function):
    """Forward the rounded numbers, exactly; backward the gradient where `mask` is (everywhere without one)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return gradient if mask is None else gradient * mask, None, None


def straight_through(
    x: Float[Tensor, "*shape"], rounded: Float[Tensor, "*shape"], mask: Tensor | None = None
) -> Float[Tensor, "*shape"]:
    """`rounded` to the bit, with the gradient of `x` where `mask` is true.

    >>> x = torch.tensor([0.4, 2.0], requires_grad=True)
    >>> straight_through(x, x.detach().round().clamp(max=1), x < 1).sum().backward()
    >>> x.grad
    tensor([1., 0.])
    """
    made: Tensor = _StraightThrough.apply(x, rounded, mask)
    return made


class FakeQuantizer(nn.Module):
    """What all quantizers of weights share: where a layer's channels lie, and a copy for each layer.

    A subclass has `forward(w) -> w` of the same shape, `settings()`, with which another of it can be made, and
    `pack(w) -> Packing`, what stands for `forward(w)` on disk.
    """

    axis: int = 0
    splits: int = 1

    def settings(self) -> dict[str, Any]:
        """The arguments with which it was made."""
        raise NotImplementedError

    def pack(self, w: Tensor) -> Packing:
        """The packing whose `dense()` is `forward(w)`."""
        raise NotImplementedError

    def for_layer(self, module: nn.Module) -> FakeQuantizer:
        """A new one of the same settings, which has seen nothing yet, for the weight of this layer."""
        made = type(self)(**self.settings())
        made.axis, made.splits = channels_of(module)
        return made


class Quantizer(FakeQuantizer):
    """Rounds a tensor to `bits` bits and lets the gradient through; see `neuropil.compress.quantize` for examples.

    Its grid is found from what `observe` was shown, or, if nothing was, from the first tensor it is called with, and
    stays; with `dynamic` it is found anew from every tensor. It is in the `state_dict`.

    Parameters
    ----------
    bits: 1 to 16; 32 gives back the very tensor it is given. A symmetric scheme of one bit is "binary".
    scheme: uniform: "affine", "offset", "symmetric" (full range), "restricted", "unsigned", "midrise" (see
        `grids.uniform`); of levels: those of `schemes.LEVELS` ("binary", "ternary", "pow2", "apot", "codebook", ...).
    granularity: "tensor", "channel", ("channels", n), ("group", g), or "token" (dynamic only).
    observer: "minmax", "moving", "percentile", "mse", "aciq", "entropy"; of the uniform schemes (others fit
        their levels).
    rounding: "nearest" or "stochastic" (torch's global generator).
    gradient: "clipped", the straight-through gradient of numbers within half a step of the grid only (as
        `torch.fake_quantize_per_tensor_affine` has it), or "identity", as it always is for levels.
    dynamic: whether every tensor has a grid of its own.
    percentile, momentum: of the observers of these names.
    scale_dtype: of scales, zero points and levels: "float32", or "float16" or "bfloat16", which take half the bytes and
        hold grids of up to 8 bits. Numbers are rounded to what the stored scale gives.
    axis: of activations, the dimension of channels (1 in convolutions, -1 of features); of weights, see `for_layer`.

    Raises QuantizationError for settings out of range, for tensors with NaN or infinity (named `name`), for groups that
    do not divide a tensor, and for a tensor that the grid found before does not fit.
    """

    scale: Tensor | None
    zero: Tensor | None
    level: Tensor | None
    threshold: Tensor | None

    def __init__(
        self,
        bits: int = 8,
        scheme: str = "symmetric",
        granularity: Granularity = "tensor",
        *,
        observer: str = "minmax",
        rounding: str = "nearest",
        gradient: str = "clipped",
        dynamic: bool = False,
        percentile: float = 99.9,
        momentum: float = 0.9,
        scale_dtype: str = "float32",
        axis: int = 0,
        name: str = "the tensor",
    ) -> None:
        super().__init__()
        check_bits(bits)
        scheme = "binary" if bits == 1 and scheme in ("symmetric", "midrise") else scheme
        _among("scheme", scheme, (*UNIFORM, *LEVELS))
        _among("rounding", rounding, ("nearest", "stochastic"))
        _among("gradient", gradient, ("clipped", "identity"))
        _among("scale_dtype", scale_dtype, ("float32", "float16", "bfloat16"))
        if scale_dtype != "float32" and bits > 8:
            raise QuantizationError(f'scale_dtype="{scale_dtype}" cannot hold codes of {bits} bits: 8 at most')
        if granularity == "token" and not dynamic:
            raise QuantizationError('granularity="token" needs dynamic=True: tokens come and go, so do their ranges')
        if scheme == "restricted" and bits < 2:
            raise QuantizationError('scheme="restricted" needs 2 bits or more; for one bit give scheme="binary"')
        self.bits, self.scheme, self.granularity, self.observer = bits, scheme, granularity, observer
        self.rounding, self.gradient, self.dynamic = rounding, gradient, dynamic
        self.percentile, self.momentum, self.scale_dtype = percentile, momentum, scale_dtype
        self.axis, self.name = axis, name
        self.observing = False
        self._seen: Observer | None = None
        self._new_observer()  # says what is wrong with the settings
        for buffer in ("scale", "zero", "level", "threshold"):
            self.register_buffer(buffer, None)

    def settings(self) -> dict[str, Any]:
        names = ("bits", "scheme", "granularity", "observer", "rounding", "gradient", "dynamic")
        return {n: getattr(self, n) for n in (*names, "percentile", "momentum", "scale_dtype", "axis", "name")}

    # --- ranges ----------------------------------------------------------------------------------

    def tiles(self, x: Tensor) -> Tiling:
        """How a tensor is cut into what shares a scale."""
        return tiling(x.shape, self.granularity, self.axis, self.splits)

    def observe(self, x: Shaped[Tensor, "*shape"]) -> None:
        """Take a tensor (one batch of several) into the calibration; the grid is found at the next use."""
        check_finite(x, self.name)
        self._seen = self._seen or self._new_observer()
        keep = self.scheme in LEVELS or self.observer in ("percentile", "mse", "aciq", "entropy")
        self._seen.observe(to_tiles(working(x), self.tiles(x)), remember=keep)
        self.scale = self.zero = self.level = self.threshold = None

    def _new_observer(self) -> Observer:
        return Observer(self.observer, self.percentile, self.momentum)

    @property
    def calibrated(self) -> bool:
        """Whether it has a grid, or has seen what makes one."""
        return self.scale is not None or self._seen is not None

    def freeze(self) -> None:
        """Find the grid from what was observed, and forget that. Raises QuantizationError where nothing was."""
        if self._seen is None:
            if self.scale is None:
                raise QuantizationError(f"{self.name}: nothing was observed; calibrate with at least one batch")
            return
        self.grid = self._fit(self._seen)

    def _fit(self, seen: Observer) -> Grid:
        if self.scheme in LEVELS:
            if seen.values is None:
                raise QuantizationError(f"{self.name}: nothing was observed; calibrate with at least one batch")
            grid: Grid = fit_levels(self.scheme, seen.values, self.bits)
        else:
            grid = uniform(self.scheme, self.bits, *seen.range(self.scheme, self.bits))
        return grid if self.scale_dtype == "float32" else stored(grid, getattr(torch, self.scale_dtype))

    @property
    def grid(self) -> Grid:
        """What numbers are rounded to. It can be set. Raises QuantizationError where nothing was observed yet."""
        if self.scale is None:
            self.freeze()
        assert isinstance(self.scale, Tensor)
        if self.level is not None:
            assert isinstance(self.threshold, Tensor)
            return Levels(self.scale, self.level, self.threshold)
        assert isinstance(self.zero, Tensor)
        return Uniform(self.scale, self.zero, *code_range(self.scheme, self.bits))

    @grid.setter
    def grid(self, grid: Grid) -> None:
        if isinstance(grid, Uniform) and (grid.low, grid.high) != code_range(self.scheme, self.bits):
            raise QuantizationError(
                f"{self.name}: a grid with codes {grid.low} to {grid.high}; {self.bits} bits {self.scheme} have "
                f"{code_range(self.scheme, self.bits)}"
            )
        self.scale, self._seen = grid.scale, None
        self.zero = self.level = self.threshold = None
        if isinstance(grid, Uniform):
            self.zero = grid.zero
        else:
            self.level, self.threshold = grid.level, grid.threshold

    def grid_for(self, x: Tensor) -> Grid:
        """The grid that `forward(x)` will use: found before, or from x."""
        if self.dynamic:
            seen = self._new_observer()
            seen.observe(to_tiles(working(x), self.tiles(x)))
            return self._fit(seen)
        if self.scale is None and self._seen is None:
            self.observe(x)
        return self.grid

    # --- rounding --------------------------------------------------------------------------------

    def _rounded(self, x: Tensor) -> tuple[Grid, Tiling, Tensor, Tensor]:
        check_finite(x, self.name)
        grid, tiles = self.grid_for(x), self.tiles(x)
        if tuple(grid.scale.shape) != tiles.scales:
            raise QuantizationError(
                f"{self.name} of shape {list(x.shape)} has {list(tiles.scales)} tiles; the grid was found for "
                f"{list(grid.scale.shape)}. Use another Quantizer for another tensor, or dynamic=True"
            )
        tiled = to_tiles(working(x), tiles)
        return grid, tiles, tiled, grid.codes(tiled, self.rounding)

    def codes(self, x: Shaped[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """The integer codes of a tensor (of a uniform grid, or indices of levels)."""
        if self.bits == 32:
            raise QuantizationError(f"{self.name}: 32 bits leave numbers as they are; they have no codes")
        _, tiles, _, codes = self._rounded(x)
        return from_tiles(codes, tiles, x.shape)

    def forward(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        if self.bits == 32:
            return x
        if self.observing:
            self.observe(x)
            return x
        grid, tiles, tiled, codes = self._rounded(x)
        rounded = from_tiles(grid.values(codes), tiles, x.shape).to(x.dtype)
        clips = self.gradient == "clipped" and isinstance(grid, Uniform) and x.requires_grad
        mask = from_tiles(grid.inside(tiled), tiles, x.shape) if clips and isinstance(grid, Uniform) else None
        return straight_through(x, rounded, mask)

    def right_inverse(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The weight itself: what lies on the grid is its own original."""
        return w

    def pack(self, w: Shaped[Tensor, "*shape"]) -> Packing:
        """The weight in the bits it needs."""
        if self.bits == 32:
            raise QuantizationError(f"{self.name}: 32 bits leave a weight as it is; there is nothing to pack")
        grid, tiles, _, codes = self._rounded(w)
        return packing_of(grid, from_tiles(codes, tiles, w.shape))

    # --- keeping ---------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name in ("scale", "zero", "level", "threshold"):
            given, mine = state_dict.get(prefix + name), getattr(self, name)
            if given is None:
                setattr(self, name, None)
            elif mine is None or mine.shape != given.shape:
                setattr(self, name, torch.empty_like(given, device=None if mine is None else mine.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {self.scheme}, {self.granularity}, {'dynamic' if self.dynamic else self.observer}"


def packing_of(grid: Grid, codes: Integer[Tensor, "*shape"]) -> Packing:
    """Codes of a grid, in a weight's shape, as a packing. A single zero point is kept once.

    >>> grid = uniform("symmetric", 4, torch.tensor([[-1.0]]), torch.tensor([[1.0]]))
    >>> packing_of(grid, torch.tensor([[-8, 7]])).dense()
    tensor([[-1.0667,  0.9333]])
    """
    if isinstance(grid, Levels):
        level = grid.level if grid.levels > 1 else torch.cat([grid.level, grid.level], -1)
        ones = bool((grid.scale == 1).all())
        return Lookup.of(codes, level[..., None], codes.shape, None if ones else grid.scale)
    zero = grid.zero - grid.low
    alike = bool((zero == zero.flatten()[0]).all())
    return Affine.of(codes - grid.low, grid.levels, grid.scale, float(zero.flatten()[0]) if alike else zero)


def _among(what: str, given: str, expected: tuple[str, ...]) -> None:
    if given not in expected:
        raise QuantizationError(f"{what}={given!r}: expected one of {', '.join(expected)}")
