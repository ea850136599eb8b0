"""Attention of many one-token rows over one prefix that all of them share.

Torch's attention gives slightly different sums on one thread and on two. `shared_prefix_attention` does
not, and makes one matrix product with the prefix for all rows instead of one small product a row and head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["SharedPrefixAttention", "prefix_cache", "shared_prefix_attention"]


def prefix_cache(config: Any) -> Any:
    """A key-value cache that is filled once and, after `frozen = True`, only read, by a batch of any size."""
    from transformers.cache_utils import DynamicCache

    class PrefixCache(DynamicCache):
        frozen = False
        joined: tuple[Tensor, ...] = ()

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if not self.frozen:
                return super().update(key_states, value_states, layer_idx, *args, **kwargs)
            held: Any = self.layers[layer_idx]
            shape = (key_states.shape[0], -1, -1, -1)
            keys = torch.cat([held.keys.expand(shape), key_states], dim=2)
            values = torch.cat([held.values.expand(shape), value_states], dim=2)
            # The parts, for SharedPrefixAttention; only the last layer's, so that nothing piles up.
            self.joined = (keys, values, held.keys, held.values, key_states, value_states)
            return keys, values

    return PrefixCache(config=config)


class SharedPrefixAttention(TorchFunctionMode):
    """While active, torch's attention over keys that `cache` has just joined is computed from their parts.

    All other calls (other keys, a mask, dropout, several queries) go to torch untouched.
    """

    def __init__(self, cache: Any) -> None:
        super().__init__()
        self.cache = cache

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and len(args) == 3:
            query, key, value = args
            joined = self.cache.joined
            plain = kwargs.get("attn_mask") is None and not kwargs.get("dropout_p") and query.shape[2] == 1
            if plain and not kwargs.get("is_causal") and joined and joined[0] is key and joined[1] is value:
                _, _, before, before_values, own, own_values = joined
                return shared_prefix_attention(query, before, before_values, own, own_values, kwargs.get("scale"))
        return func(*args, **kwargs)


def shared_prefix_attention(
    query: Float[Tensor, "rows heads 1 d"],
    prefix_keys: Float[Tensor, "1 groups prefix d"],
    prefix_values: Float[Tensor, "1 groups prefix e"],
    keys: Float[Tensor, "rows groups 1 d"],
    values: Float[Tensor, "rows groups 1 e"],
    scale: float | None = None,
) -> Float[Tensor, "rows heads 1 e"]:
    """softmax(q K^T * scale) V with K = [prefix keys; own key]: one query a row, heads in groups that share keys.

    >>> q, k, v = torch.randn(5, 4, 1, 8), torch.randn(5, 2, 1, 8), torch.randn(5, 2, 1, 8)
    >>> K, V = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    >>> join = lambda a, b: torch.cat([a.expand(5, -1, -1, -1), b], 2)
    >>> full = torch.nn.functional.scaled_dot_product_attention(q, join(K, k), join(V, v), enable_gqa=True)
    >>> torch.allclose(shared_prefix_attention(q, K, V, k, v), full, atol=1e-5)
    True
    """
    rows, heads, _, d = query.shape
    groups, prefix = prefix_keys.shape[1:3]
    q = query.reshape(rows, groups, heads // groups, d) * (d**-0.5 if scale is None else scale)
    q = q.transpose(0, 1)  # [groups, rows, heads of the group, d]
    stacked = (groups, rows * (heads // groups), -1)
    before = torch.bmm(q.reshape(stacked), prefix_keys[0].transpose(1, 2)).view(*q.shape[:3], prefix)
    own = (q * keys.transpose(0, 1)).sum(-1, keepdim=True)
    weight = torch.cat([before, own], -1).softmax(-1)
    mixed = torch.bmm(weight[..., :prefix].reshape(stacked), prefix_values[0])
    mixed = mixed.view(*q.shape[:3], -1) + weight[..., prefix:] * values.transpose(0, 1)
    return mixed.transpose(0, 1).reshape(rows, heads, 1, -1)
