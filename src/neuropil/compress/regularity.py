r"""How regular is a sparse model? Runs of weights, the bits of their index, empty rows, columns and blocks.

Two matrices of the same sparsity cost differently: an index of runs needs a number for each run, a kernel works on
whole blocks, a row without weights needs nothing at all. `regularity` counts these over the linear maps and
convolutions of a model, each weight seen as rows of what a neuron reads.

>>> import torch
>>> from torch import nn
>>> net = nn.Sequential(nn.Linear(16, 3, bias=False))
>>> with torch.no_grad():
...     _ = net[0].weight.copy_(torch.tensor([8 * [0.0] + 8 * [1.0], 8 * [0.0, 1.0], 16 * [0.0]]))
>>> found = regularity(net)
>>> found.nonzero, found.runs, found.run, found.empty_rows, found.empty_blocks
(16, 9, 1.7777777777777777, 1, 3)
>>> found.index_bits  # run-length coded; a bit map takes 48
41

`index_bits` codes each row as alternating lengths of runs of zeros (the first is one longer, as a row may begin with a
weight) and of weights, in Elias's gamma code: $2 \lfloor \log_2 n \rfloor + 1$ bits for a length $n$. `blocks` are
eight neighbours of a row, as a vector unit loads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from neuropil.compress.sparse import pack_sparse, prunable
from neuropil.packed import nbytes

BLOCK = 8


@dataclass(frozen=True)
class Regularity:
    """What the pattern of a model's weights is like: counts over all rows of its layers."""

    weights: int
    nonzero: int
    runs: int
    index_bits: int
    rows: int
    empty_rows: int
    columns: int
    empty_columns: int
    blocks: int
    empty_blocks: int

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return 1 - self.nonzero / self.weights

    @property
    def run(self) -> float:
        """The mean length of a run of weights; NaN where there are none."""
        return self.nonzero / self.runs if self.runs else float("nan")

    def __add__(self, other: Regularity) -> Regularity:
        return Regularity(*(mine + theirs for mine, theirs in zip(self._counts, other._counts, strict=True)))

    @property
    def _counts(self) -> tuple[int, ...]:
        return tuple(vars(self).values())


def regularity(model: nn.Module, skip: tuple[str, ...] = ()) -> Regularity:
    """The pattern of all linear maps and convolutions together. Raises ValueError where there are none."""
    layers = regularity_by_layer(model, skip)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear map or convolution whose pattern could be measured")
    first, *rest = layers.values()
    return sum(rest, start=first)


def regularity_by_layer(model: nn.Module, skip: tuple[str, ...] = ()) -> dict[str, Regularity]:
    """The pattern of each linear map and convolution, by name."""
    found, _ = prunable(model, skip)
    out = {}
    for name, module in found.items():
        assert isinstance(module.weight, Tensor)
        mask = module.weight.detach() != 0
        transposed = type(module).__name__ == "Conv1D" or isinstance(module, nn.modules.conv._ConvTransposeNd)
        out[name] = pattern((mask.transpose(0, 1) if transposed else mask).flatten(1))
    return out


def packed_bytes(model: nn.Module) -> int:
    """What the model takes as `pack_sparse` keeps it."""
    return nbytes(pack_sparse(model).model)


def pattern(mask: Bool[Tensor, "rows columns"]) -> Regularity:
    """The pattern of one matrix, True where a weight is."""
    rows, columns = mask.shape
    edge = torch.zeros(rows, 1, dtype=torch.int8, device=mask.device)
    changes = torch.cat([edge, mask.to(torch.int8), edge], dim=1).diff(dim=1)
    row, begin = (changes == 1).nonzero().unbind(1)
    end = (changes == -1).nonzero()[:, 1]
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    previous = torch.where(first, torch.zeros_like(end), end.roll(1))
    blocks = nn.functional.pad(mask, (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK)).any(2)
    ended = torch.zeros(rows, dtype=torch.long, device=mask.device).scatter_reduce(0, row, end, "amax")
    tail = columns - ended + (ended == 0).long()  # a row that does not end with a weight closes with a run of zeros
    return Regularity(
        weights=mask.numel(),
        nonzero=int(mask.sum()),
        runs=len(row),
        index_bits=_gamma_bits(begin - previous + first) + _gamma_bits(end - begin) + _gamma_bits(tail[tail > 0]),
        rows=rows,
        empty_rows=int((~mask.any(1)).sum()),
        columns=columns,
        empty_columns=int((~mask.any(0)).sum()),
        blocks=blocks.numel(),
        empty_blocks=int((~blocks).sum()),
    )


def _gamma_bits(lengths: Tensor) -> int:
    """Bits of these lengths in Elias's gamma code."""
    return int((2 * torch.frexp(lengths.double()).exponent - 1).sum())
