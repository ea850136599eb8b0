"""What codebooks and indices take, and products with them that add inputs up before they multiply."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.compress.quantize.tiles import QuantizationError
from neuropil.packed import Lookup, nbytes, packed_modules


def codebook_bits(rows: int, fan: int, bits: int, groups: int, *, element: int = 16, ordered: bool = True) -> int:
    """Bits that a layer takes: indices, codebooks, and the sizes of groups (or, not `ordered`, each row's group).

    >>> codebook_bits(4096, 4096, bits=2, groups=8) - 4096 * 4096 * 2
    608
    """
    where = groups * math.ceil(math.log2(rows)) if ordered else rows * math.ceil(math.log2(groups))
    return rows * fan * bits + groups * 2**bits * element + (where if groups > 1 else 0)


@dataclass(frozen=True)
class SizeReport:
    """Weights of the packed layers, the bytes they take and those they took; `layers` has the first two of each."""

    weights: int
    nbytes: int
    dense: int
    layers: dict[str, tuple[int, int]] = field(repr=False)

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.nbytes / self.weights

    @property
    def ratio(self) -> float:
        """How many times smaller."""
        return self.dense / self.nbytes

    def __str__(self) -> str:
        return (
            f"{self.weights} weights in {self.bits:.2f} bits each ({self.nbytes} bytes), {self.ratio:.1f} times "
            "smaller than they were"
        )


def size_report(model: nn.Module) -> SizeReport:
    """What the packed layers of a model take; tied layers are counted once. ValueError where none is packed."""
    found, dense = {}, 0
    seen: set[int] = set()
    for name, packed, packing in packed_modules(model):
        module: Any = packed
        if id(packing) not in seen:
            seen.add(id(packing))
            found[name] = (packing.shape.numel(), nbytes(packing))
            dense += packing.shape.numel() * module._dtype.itemsize
    if not found:
        raise QuantizationError("no layer of the model is packed: give the model that learn_codebooks made")
    return SizeReport(sum(n for n, _ in found.values()), sum(b for _, b in found.values()), dense, found)


def partial_sums(packing: Lookup, x: Float[Tensor, "*batch fan"]) -> Float[Tensor, "*batch rows"]:
    """`x @ weight.T` by sums of inputs: those that share a codeword are added up before they are multiplied.

    >>> packing = Lookup.of(torch.tensor([[0, 1, 1]]), torch.tensor([2.0, 10.0])[None, None, :, None], (1, 3))
    >>> partial_sums(packing, torch.tensor([1.0, 2.0, 3.0]))
    tensor([52.])
    """
    codes, (blocks, g, count, d) = packing.integers(), packing.table.shape
    if g != 1 or d != 1:
        raise QuantizationError(f"a table of shape {list(packing.table.shape)}: expected [groups, 1, K, 1]")
    book = packing.table.to(x.dtype)[packing.block(blocks), 0, :, 0]  # [rows, K]
    if packing.scale is not None:
        book = book * packing.scale.to(x.dtype)[packing.block(packing.scale.shape[0])]
    sums = [x @ (codes == k).to(x.dtype).T * book[:, k] for k in range(count)]
    return torch.stack(sums).sum(0)
