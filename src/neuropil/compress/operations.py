"""How many multiply-adds a model takes for an input, and how many are left where the products with zeros are not made.

    kept = dense - Σ_layers (zero weights of the layer) · (positions at which the layer is applied)

Dense operations are counted by `torch.utils.flop_counter`, with the products of attention, which have no weights.

>>> import torch
>>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
>>> with torch.no_grad():
...     _ = model[0].weight[0].zero_()
>>> count_operations(model, torch.randn(5, 4))
Operations(dense=90, kept=70)
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from neuropil.compress.reconstruction import run
from neuropil.compress.sparse import LAYERS
from neuropil.compress.structured import Example
from neuropil.evaluate import evaluating

CONVOLUTIONS = tuple(kind for kind in LAYERS if kind is not nn.Linear)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Operations:
    """Multiply-adds of one forward pass: all of them, and those whose weight is not zero."""

    dense: int
    kept: int

    @property
    def saved(self) -> float:
        """The share that is saved."""
        return 1 - self.kept / self.dense if self.dense else 0.0


@torch.no_grad()
def count_operations(model: nn.Module, example: Example) -> Operations:
    """Multiply-adds of `model` for one input (a tensor, a tuple of arguments, or a mapping of them).

    Savings are counted in Linear, convolution and attention (`nn.MultiheadAttention`, transformers' `Conv1D`) layers.
    The model is left as it was.
    """
    spared: list[int] = []

    def layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        seen = args[0] if isinstance(module, TRANSPOSED) else out  # a transposed one is applied at each input
        # Channels are the last axis of a linear map's answer; a convolution has its spatial axes after them.
        axis = 1 - module.weight.dim() if isinstance(module, CONVOLUTIONS) else -1
        spared.append(int((module.weight == 0).sum()) * (seen.numel() // seen.shape[axis]))

    def attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        spared.append(
            _attention_spared(module, [*args, *(kwargs[k] for k in ("query", "key", "value") if k in kwargs)])
        )

    with ExitStack() as undo:
        undo.enter_context(evaluating(model))
        undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # it goes round the layers, where nothing would be counted
        undo.enter_context(sdpa_kernel(SDPBackend.MATH))
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                undo.callback(module.register_forward_hook(attention, with_kwargs=True).remove)
            elif isinstance(module, LAYERS) or type(module).__name__ == "Conv1D":
                undo.callback(module.register_forward_hook(layer, with_kwargs=True).remove)
        counter = undo.enter_context(FlopCounterMode(display=False))
        run(model, example)
    dense = counter.get_total_flops() // 2
    return Operations(dense, dense - sum(spared))


def _attention_spared(module: nn.MultiheadAttention, inputs: list[Tensor]) -> int:
    """Products with zeros of an attention's four maps; its output has the positions of its queries."""
    query, key, value = inputs[:3]
    positions = [x.numel() // x.shape[-1] for x in (query, key, value)]
    if module.in_proj_weight is not None:
        maps = list(module.in_proj_weight.chunk(3))
    else:
        maps = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    maps.append(module.out_proj.weight)
    zeros = [int((weight == 0).sum()) for weight in maps]
    return sum(z * n for z, n in zip(zeros, [*positions, positions[0]], strict=True))
