r"""Codebooks that spend their levels where the loss feels it: k-means weighted by the diagonal of the Hessian.

>>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
>>> x, y = torch.randn(32, 8), torch.randint(3, (32,))
>>> h = fisher_diagonal(model, nn.functional.cross_entropy, [(x, y)])
>>> print(hessian_quantize(model, h, bits=3))
changed 2 modules

The diagonal is the mean squared gradient over batches (the empirical Fisher matrix of batches): cheap, never negative,
and near the Hessian's diagonal where the model fits its data. Any other importance of the weights' shapes can be given.

Source: Choi, El-Khamy and Lee 2017, arXiv:1612.01543.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from neuropil.changes import Changes
from neuropil.compress.quantize.models import pack_layers, weight_of
from neuropil.compress.quantize.nonuniform import kmeans
from neuropil.compress.quantize.quantizer import packing_of
from neuropil.compress.quantize.tiles import (
    Granularity,
    QuantizationError,
    channels_of,
    check_bits,
    from_tiles,
    tiling,
    to_tiles,
    working,
)
from neuropil.packed import Packing


def fisher_diagonal(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The mean squared gradient of the loss by each parameter's name, over batches `(x, y)`.

    The smaller the batches, the nearer it is to the Fisher matrix. The model's own gradients are not touched.
    Raises QuantizationError where there is no batch.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    count = 0
    for x, y in batches:
        found = torch.autograd.grad(loss(model(x), y), list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, found, strict=True):
            if gradient is not None:
                total[name] += gradient.square()
        count += 1
    if not count:
        raise QuantizationError("no batch was given: the importance needs at least one")
    return {name: value / count for name, value in total.items()}


def hessian_quantize(
    model: nn.Module,
    importance: Mapping[str, Tensor],
    bits: int = 4,
    granularity: Granularity = "tensor",
    *,
    skip: Iterable[str] = (),
) -> Changes:
    """A copy of the model whose weights share 2^b values a tile, by k-means weighted by the importance of each weight.

    `importance` is by the name of the weight, as `fisher_diagonal` gives it; a layer that is not there is left.
    """
    check_bits(bits)

    def make(name: str, module: nn.Module) -> Packing | str:
        key, weight = f"{name}.weight" if name else "weight", weight_of(module)
        if key not in importance:
            return f"no importance is given for {key}"
        h = importance[key]
        if h.shape != weight.shape:
            raise QuantizationError(f"the importance of {key} has shape {list(h.shape)}, not {list(weight.shape)}")
        tiles = tiling(weight.shape, granularity, *channels_of(module))
        tiled = to_tiles(working(weight), tiles)
        levels = kmeans(tiled, 2**bits, to_tiles(working(h), tiles))
        return packing_of(levels, from_tiles(levels.codes(tiled), tiles, weight.shape))

    return pack_layers(model, make, skip)
