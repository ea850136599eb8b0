r"""Vision transformers trained in 2 to 4 bits, with weights that do not flip back and forth between two levels.

A weight near a threshold that a learned scale keeps moving flips at every step, and its flips disturb the others. Here

* `StatsQuantizer` takes the scale from the weights, $s = 2\, \overline{|w|}$ of each row, with no gradient through it:

$$w_q = s\, \frac{k + 1/2}{n}, \quad k = \mathrm{clip}(\mathrm{round}(n w / s - 1/2), -n, n - 1), \quad n = 2^{b-1}$$

* `QKRAttention` rounds the product $W_Q^T W_K$ of each head once, in the place of its two factors;
* `CGA` trains on, at the end, only the weights that lie within a small distance of a threshold;
* `OscillationTracker` counts.

>>> from transformers import ViTConfig, ViTForImageClassification
>>> from neuropil.compress import ofq_bake, ofq_quantize
>>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8,
...                    patch_size=4, num_channels=1)
>>> changes = ofq_quantize(ViTForImageClassification(config), w_bits=2, a_bits=2)
>>> sorted(changes.changed)[-2:]
['vit.layers.0.mlp.fc1', 'vit.layers.0.mlp.fc2']
>>> model = changes.model  # train it, then
>>> x = torch.randn(2, 1, 8, 8)
>>> torch.equal(model.eval()(x).logits, ofq_bake(model).model(x).logits)
True

As a parametrization of any weight:

>>> layer = nn.Linear(64, 4)
>>> _ = nn.utils.parametrize.register_parametrization(layer, "weight", StatsQuantizer(2).for_layer(layer))
>>> size = layer.parametrizations.weight.original.abs().mean(1, keepdim=True)
>>> (layer.weight / size).detach().mul(100).round().div(100).unique()
tensor([-1.5000, -0.5000,  0.5000,  1.5000])

Where this differs from the authors' code: one bit has two levels (there the rounding of halves gives a third); a row of
zeros stays zero (there it becomes NaN); scales of activations are for the tensor by default, so that any number of
tokens goes in (there for each of a fixed number of tokens: `tokens=`); parameters are made at once, not by the first
batch; CGA also acts on the products of queries and keys (there it has no effect on them). Biases of queries are kept in
full precision, which leaves the attention as it was (there they are dropped); those of keys change no attention.

Source: S.-Y. Liu, Z. Liu and Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023,
arXiv:2302.02210.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from neuropil.compress.quantize.grids import Uniform, code_range
from neuropil.compress.quantize.learned import scale_gradient
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

EDGE = 1 - 1e-6  # the upper end of w / s


class StatsQuantizer(FakeQuantizer):
    """Rounds weights to 2^b levels about 0, none of them 0, of a scale twice the mean magnitude of their row.

    The scale is found anew from every weight. The gradient is straight-through everywhere, also where weights are
    clipped; with `boundary` (set by `CGA`), only that near to a threshold. A row is one output of a layer (see
    `for_layer`), of convolutions as well; other granularities are those of `Quantizer`. 32 bits change nothing.

    Raises QuantizationError for bits outside 1 to 16 and 32.
    """

    def __init__(self, bits: int = 2, granularity: Granularity = "channel") -> None:
        super().__init__()
        check_bits(bits)
        self.bits, self.granularity = bits, granularity
        self.side = 2 ** (bits - 1)
        self.boundary: float | None = None

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "granularity": self.granularity}

    def tiles(self, w: Tensor) -> Tiling:
        return tiling(w.shape, self.granularity, self.axis, self.splits)

    def grid(self, w: Float[Tensor, "*shape"]) -> Uniform:
        """The levels for this weight: those of a row of zeros are all 0."""
        step = 2 * to_tiles(working(w), self.tiles(w)).abs().mean(-1) / self.side
        return Uniform(step, torch.full_like(step, -0.5), -self.side, self.side - 1)

    def positions(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """n clip(w / s, -1, 1) - 1/2: where weights lie among the codes, before they are rounded."""
        tiles = self.tiles(w)
        return from_tiles(self._positions(to_tiles(working(w), tiles), self.grid(w).scale), tiles, w.shape)

    def _positions(self, tiled: Tensor, step: Tensor) -> Tensor:
        ratio = tiled / torch.where(step > 0, step * self.side, 1.0)[..., None]
        return ratio.clamp(-1, EDGE) * self.side - 0.5

    def codes(self, w: Float[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """The codes, from -n to n - 1."""
        return self._codes(self.positions(w))

    def _codes(self, positions: Tensor) -> Tensor:
        return positions.round().clamp(-self.side, self.side - 1).int()

    def near(self, w: Float[Tensor, "*shape"], boundary: float) -> Bool[Tensor, "*shape"]:
        """Which weights lie within `boundary`, in steps between levels, of a threshold. Clipped ones are 1 away."""
        at = self.positions(w) - 0.5
        return (at - at.round().clamp(-self.side, self.side - 2)).abs() <= boundary

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.bits == 32:
            return w
        tiles, grid = self.tiles(w), self.grid(w)
        rounded = grid.values(self._codes(self._positions(to_tiles(working(w), tiles), grid.scale)))
        mask = None if self.boundary is None else self.near(w, self.boundary)
        return straight_through(w, from_tiles(rounded, tiles, w.shape).to(w.dtype), mask)

    def pack(self, w: Float[Tensor, "*shape"]) -> Packing:
        check_finite(w, "the weight")
        if self.bits == 32:
            raise QuantizationError("32 bits leave a weight as it is; there is nothing to pack")
        return packing_of(self.grid(w), self.codes(w))

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {self.granularity}"


class LsqActivation(FakeQuantizer):
    """Rounds activations with a learned step, between two learned shifts: x + b1, LSQ, + b2.

    The step begins at 2 mean|x| / sqrt(Qp) of the first batch, twice that where not `signed`; its gradient is scaled by
    1 / sqrt(Qp N), N the numbers that share it. One step serves all numbers; or `tokens` of them one for each position
    along the last dimension but one (and only that many fit), or `channels` one for each of the last.

    Parameters
    ----------
    bits: 1 to 16 (2 of signed numbers), or 32, which changes nothing.
    signed: codes -2^(b-1) to 2^(b-1) - 1, else 0 to 2^b - 1 (after GELU and softmax).
    features: size of the last dimension, each of which has shifts of its own; 0 for no shifts.
    """

    ready: Tensor

    def __init__(
        self, bits: int = 2, signed: bool = True, features: int = 0, tokens: int = 0, channels: int = 0
    ) -> None:
        super().__init__()
        check_bits(bits)
        if signed and bits < 2:
            raise QuantizationError(
                f"bits={bits}: signed activations need 2 bits or more; 1 bit has the codes -1 and 0"
            )
        if tokens and channels:
            raise QuantizationError(f"tokens={tokens}, channels={channels}: give one of them")
        self.bits, self.signed, self.features, self.tokens, self.channels = bits, signed, features, tokens, channels
        self.low, self.high = code_range("symmetric" if signed else "unsigned", bits)
        shape = (tokens, 1) if tokens else (channels or 1,)
        self.scale = nn.Parameter(torch.ones(shape))
        self.before = nn.Parameter(torch.zeros(features)) if features else None
        self.after = nn.Parameter(torch.zeros(features)) if features else None
        self.register_buffer("ready", torch.tensor(bits == 32))

    def settings(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("bits", "signed", "features", "tokens", "channels")}

    def _check(self, x: Tensor) -> None:
        fits = (self.tokens and x.dim() > 1 and x.shape[-2] != self.tokens) or (
            self.channels and x.shape[-1] != self.channels
        )
        if fits:
            raise QuantizationError(
                f"activations of shape {list(x.shape)} for {self.scale.numel()} steps, one for each of "
                f"{self.tokens or self.channels} {'tokens' if self.tokens else 'channels'}; for sequences of any "
                "length leave tokens=0"
            )

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        check_finite(x, "the activations")
        shared = x.detach().abs().reshape(-1, *x.shape[x.dim() - self.scale.dim() :]).to(self.scale.dtype)
        dims = [0] + [i + 1 for i, size in enumerate(self.scale.shape) if size == 1]
        mean = shared.mean(dims, keepdim=True)[0]
        scale = (2 if self.signed else 4) * mean / self.high**0.5
        self.scale.copy_(torch.where(scale > 0, scale, 1.0))
        self.ready.fill_(True)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.bits == 32:
            return x
        self._check(x)
        if self.before is not None:
            x = x + self.before
        if not bool(self.ready):
            self._start(x)
        factor = (self.high * x.numel() / self.scale.numel()) ** -0.5
        s = scale_gradient(self.scale.clamp_min(1e-5), factor)
        at = (x / s).clamp(self.low, self.high)
        out = straight_through(at, at.detach().round()) * s
        return out if self.after is None else out + self.after

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {'signed' if self.signed else 'unsigned'}"


def distillation_loss(
    logits: Float[Tensor, "n classes"],
    labels: Int[Tensor, " n"],
    teacher: Float[Tensor, "n classes"],
    token_logits: Float[Tensor, "n classes"] | None = None,
    label_smoothing: float = 0.1,
) -> Float[Tensor, ""]:
    """Cross entropy to the labels plus that to the full-precision teacher's probabilities.

    `token_logits` are those of a distillation token, where a DeiT has one: they follow the teacher then.
    """
    student = logits if token_logits is None else token_logits
    soft = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()
    return soft + cross_entropy(logits, labels, label_smoothing=label_smoothing)
