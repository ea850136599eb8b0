r"""Binary weights times binary inputs: XNOR-Net's layers, and the product by XOR and a count of bits.

$x \cdot w \approx (K \odot \alpha) (\mathrm{sign}(x) \cdot \mathrm{sign}(w))$, where $\alpha$ is the mean magnitude of
a filter's weights and $K$ that of the inputs under it. The product of two sign vectors of length $n$ is $n$ minus twice
the number of places where they differ; 64 signs share a word.

>>> a, b = torch.randn(3, 100), torch.randn(5, 100)
>>> torch.equal(xnor_matmul(pack_signs(a), pack_signs(b), 100).float(), sign(a) @ sign(b).T)
True

The product is exact and takes 1/32 of the memory; in PyTorch's own operations it is no faster than floating-point
multiplication on most machines, since these have no instruction that counts bits.

Source: Rastegari, Ordonez, Redmon and Farhadi 2016, arXiv:1603.05279.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn
from torch.nn import functional

from neuropil.compress.quantize.sign_gradients import sign
from neuropil.compress.quantize.tiles import QuantizationError

WORD = 64
CHUNK = 1 << 20  # words compared at a time


def pack_signs(x: Float[Tensor, "*rows n"]) -> Int64[Tensor, "*rows words"]:
    """A bit a number, 1 where it is negative; the last word is filled with 0."""
    bits = (x < 0).to(torch.int64)
    bits = functional.pad(bits, (0, -bits.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    return (bits << torch.arange(WORD, device=x.device)).sum(-1)


def popcount(words: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """How many bits of each word are 1.

    >>> popcount(torch.tensor([0, 5, -1])).tolist()
    [0, 2, 64]
    """
    x = words - ((words >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    return (x + (x >> 32)) & 0x7F


def xnor_matmul(a: Int64[Tensor, "m words"], b: Int64[Tensor, "k words"], n: int) -> Int32[Tensor, "m k"]:
    """The products of rows of `n` signs, packed by `pack_signs`: exact integers."""
    step = max(1, CHUNK // max(1, b.numel()))
    parts = [n - 2 * popcount(part[:, None] ^ b).sum(-1) for part in a.split(step)]
    return torch.cat(parts).int()


class XNORLinear(nn.Linear):
    """A linear layer of binary weights and binary inputs; `scaled_inputs` multiplies by the mean magnitude of each.

    In training the product is one of floating-point signs, with the gradient that is asked for; in eval mode, with
    `packed_product`, it is the count of bits. Both give the same numbers, but for the rounding of the last sum.
    """

    def __init__(
        self, inputs: int, outputs: int, bias: bool = True, gradient: str = "clipped", scaled_inputs: bool = True
    ) -> None:
        super().__init__(inputs, outputs, bias)
        self.gradient, self.scaled_inputs, self.packed_product = gradient, scaled_inputs, False

    def forward(self, input: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        alpha = self.weight.abs().mean(1)
        if self.packed_product and not self.training:
            flat = pack_signs(input.flatten(0, -2))
            counts = xnor_matmul(flat, pack_signs(self.weight), self.in_features)
            out = counts.to(input.dtype).reshape(*input.shape[:-1], -1)
        else:
            out = functional.linear(sign(input, self.gradient), sign(self.weight))
        out = out * alpha
        if self.scaled_inputs:
            out = out * input.abs().mean(-1, keepdim=True)
        return out if self.bias is None else out + self.bias


class XNORConv2d(nn.Conv2d):
    """A convolution of binary weights and binary inputs, times K: the box-filtered mean magnitude of the input.

    Padding is with +1, so that the input has two levels everywhere. Takes no groups and only zero padding
    (whose zeros become that +1). `packed_product` as in `XNORLinear`. Raises QuantizationError otherwise.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        gradient: str = "clipped",
        scaled_inputs: bool = True,
    ) -> None:
        super().__init__(inputs, outputs, kernel_size, stride, padding, bias=bias)
        self.gradient, self.scaled_inputs, self.packed_product = gradient, scaled_inputs, False

    def forward(self, input: Float[Tensor, "batch channels high wide"]) -> Float[Tensor, "batch out high2 wide2"]:
        side = self.padding[0]
        if isinstance(side, str):
            raise QuantizationError(f"padding={self.padding!r}: expected a number")
        around = functional.pad(input, (side,) * 4)
        k, stride = self.kernel_size[0], self.stride[0]
        high, wide = ((size - k) // stride + 1 for size in around.shape[2:])
        if self.packed_product and not self.training:
            columns = functional.unfold(around, k, stride=stride).mT.flatten(0, 1)
            counts = xnor_matmul(pack_signs(columns), pack_signs(self.weight.flatten(1)), columns.shape[-1])
            out = counts.to(input.dtype).reshape(len(input), high * wide, -1).mT.reshape(len(input), -1, high, wide)
        else:
            out = functional.conv2d(sign(around, self.gradient), sign(self.weight), stride=stride)
        out = out * self.weight.abs().mean((1, 2, 3))[:, None, None]
        if self.scaled_inputs:
            magnitude = around.abs().mean(1, keepdim=True)
            out = out * functional.avg_pool2d(magnitude, k, stride)
        return out if self.bias is None else out + self.bias[:, None, None]
