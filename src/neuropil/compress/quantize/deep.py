r"""Deep Compression: prune, let the weights that are left share few values, and code those by how often they occur.

>>> model = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
>>> changes, report = deep_compress(model, sparsity=0.9, bits=4)
>>> report.ratio > 25, 0.8 < report.bits / report.weights < 1.2  # bits a weight; they were 32
(True, True)

The positions of the weights that are left are coded as gaps; one too long for its bits is bridged by filler zeros.
Codes and gaps are Huffman-coded. `DeepReport` counts all of that, the codebooks and Huffman tables with it; the packed
model keeps a code of b bits for every weight, zeros too, since a Huffman stream has to be undone before it can be used.

The paper prunes and retrains before it shares: prune by a schedule (`GraNet`), give `sparsity=0`, and the zeros that
are there stay. It gives all 2^b values to the weights that are left; here one of them is the zero, so that codes
have b bits. After sharing, `finetune_codebooks` trains the values. `MaskedQuantizer` prunes and rounds in one
training instead.

Source: Han, Mao and Dally 2016, arXiv:1510.00149.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from neuropil.changes import Changes
from neuropil.compress.quantize.huffman import huffman_bits
from neuropil.compress.quantize.models import pack_layers, weight_of
from neuropil.compress.quantize.nonuniform import kmeans
from neuropil.compress.quantize.quantizer import FakeQuantizer
from neuropil.compress.quantize.tiles import QuantizationError, working
from neuropil.packed import Lookup, Packing

GAP_BITS = {True: 5, False: 8}  # for matrices, and for convolutions: the paper's


@dataclass(frozen=True)
class LayerBits:
    """What one layer takes, in bits, after each stage. `huffman` counts codes, gaps, codebook and the code lengths."""

    weights: int
    kept: int
    dense: int
    pruned: int
    shared: int
    huffman: int


@dataclass(frozen=True)
class DeepReport:
    """The bits of all compressed layers."""

    layers: dict[str, LayerBits]

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers.values())

    @property
    def bits(self) -> int:
        """After all stages."""
        return sum(layer.huffman for layer in self.layers.values())

    @property
    def ratio(self) -> float:
        """How many times smaller than the weights as they were."""
        return sum(layer.dense for layer in self.layers.values()) / max(1, self.bits)

    def __str__(self) -> str:
        rows = [
            f"{name}: {100 * b.kept / b.weights:.1f}% kept; bits a weight: {b.dense / b.weights:.0f} as it was, "
            f"{b.pruned / b.weights:.2f} pruned, {b.shared / b.weights:.2f} shared, {b.huffman / b.weights:.2f} coded"
            for name, b in self.layers.items()
        ]
        return "\n".join([*rows, f"{self.ratio:.1f} times smaller"])


def magnitude_mask(w: Float[Tensor, "*shape"], sparsity: float) -> Tensor:
    """True for the weights of largest magnitude: all but the share `sparsity`, and none that is 0."""
    kept = w.numel() - int(sparsity * w.numel())
    mask = torch.zeros(w.numel(), dtype=torch.bool, device=w.device)
    mask[w.detach().abs().flatten().topk(kept).indices] = True
    return mask.reshape(w.shape) & (w.detach() != 0)


def gaps(codes: Integer[Tensor, " n"], bits: int) -> tuple[Integer[Tensor, " stored"], Integer[Tensor, " stored"]]:
    """The codes that are not 0, and how many zeros precede each; longer runs are bridged by stored zeros.

    >>> gaps(torch.tensor([0, 5, 0, 0, 0, 0, 0, 7]), bits=2)  # at most 3 zeros before a stored code
    (tensor([5, 0, 7]), tensor([1, 3, 1]))
    """
    longest = 2**bits - 1
    place = codes.nonzero().flatten()
    run = place.diff(prepend=place.new_tensor([-1])) - 1
    fillers = run // (longest + 1)
    end = (fillers + 1).cumsum(0) - 1  # where each code stands in the stored stream
    stored = codes.new_zeros(int(end[-1]) + 1 if len(end) else 0)
    gap = torch.full_like(stored, longest)
    stored[end] = codes[place]
    gap[end] = (run - fillers * (longest + 1)).to(gap.dtype)
    return stored, gap


def shared_weight(w: Float[Tensor, "*shape"], sparsity: float, bits: int) -> Lookup:
    """The pruned weight with 2^b - 1 shared values (k-means of what is left) and 0, which is code 0."""
    w = working(w)
    mask = magnitude_mask(w, sparsity)
    left = w[mask]
    if not left.numel():
        raise QuantizationError(f"a sparsity of {sparsity} leaves no weight; lower it")
    levels = kmeans(left[None, None], 2**bits - 1)
    codes = torch.zeros(w.shape, dtype=torch.int32, device=w.device)
    codes[mask] = levels.codes(left[None, None])[0, 0] + 1
    table = torch.cat([levels.level.new_zeros(1), levels.level.flatten()])
    return Lookup.of(codes, table[None, None, :, None], w.shape)


def count_bits(packing: Lookup, element: int = 32) -> LayerBits:
    """The bits of a pruned and shared weight at each stage; weights were of `element` bits."""
    codes = packing.integers().flatten().long()
    levels = packing.table.shape[2]
    b, span = max(1, (levels - 1).bit_length()), GAP_BITS[len(packing.shape) == 2]
    stored, gap = gaps(codes, span)
    book = levels * element
    tables = 5 * levels + 5 * 2**span  # the lengths of the codes, of at most 31 bits each
    coded = huffman_bits(stored) + huffman_bits(gap) + book + tables
    n = len(stored)
    return LayerBits(
        len(codes), int((codes > 0).sum()), element * len(codes), n * (element + span), n * (b + span) + book, coded
    )


def deep_compress(
    model: nn.Module, sparsity: float = 0.9, bits: int = 4, *, skip: Iterable[str] = ()
) -> tuple[Changes, DeepReport]:
    """A copy of the model pruned by magnitude, layer by layer, and shared; and the bits it takes when coded.

    Raises QuantizationError for a sparsity outside [0, 1) and bits outside 1 to 8.
    """
    if not 0 <= sparsity < 1 or not 1 <= bits <= 8:
        raise QuantizationError(f"sparsity={sparsity}, bits={bits}: expected 0 to less than 1, and 1 to 8")
    counted: dict[str, LayerBits] = {}

    def make(name: str, module: nn.Module) -> Packing:
        weight = weight_of(module)
        made = shared_weight(weight, sparsity, bits)
        counted[name] = count_bits(made, 8 * weight.element_size())
        return made

    return pack_layers(model, make, skip), DeepReport(counted)


class MaskedQuantizer(FakeQuantizer):
    """Pruning and rounding at once: the smallest weights are 0, the others go through `quantizer` (which must keep 0).

    The mask is found anew at each forward pass; the gradient passes to all weights, so that one can come back.
    """

    def __init__(self, quantizer: FakeQuantizer, sparsity: float = 0.5) -> None:
        super().__init__()
        if not 0 <= sparsity < 1:
            raise QuantizationError(f"sparsity={sparsity}: expected 0 to less than 1")
        self.quantizer, self.sparsity = quantizer, sparsity

    def settings(self) -> dict[str, Any]:
        return {"quantizer": self.quantizer, "sparsity": self.sparsity}

    def for_layer(self, module: nn.Module) -> MaskedQuantizer:
        return MaskedQuantizer(self.quantizer.for_layer(module), self.sparsity)

    def _masked(self, w: Tensor) -> Tensor:
        return w - (w * ~magnitude_mask(w, self.sparsity)).detach()  # zeros, with the gradient of all

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        rounded: Tensor = self.quantizer(self._masked(w))
        return rounded

    def pack(self, w: Float[Tensor, "*shape"]) -> Packing:
        return self.quantizer.pack(self._masked(w))
