r"""Attention whose query and key weights are rounded once, as their product in each head (arXiv:2302.02210).

$$\text{logits}_h = \hat x\; Q\!\left(W_{QK}^h\, \hat x^T\right) / \sqrt{d}, \qquad W_{QK}^h = q(W_Q^{hT} W_K^h)$$

The parameters stay $W_Q$ and $W_K$; the model in use keeps heads x C x C codes in the place of 2 x C x C.

With a bias, $(W_Q x_i + b_Q)^T (W_K x_j + b_K) = x_i^T W_{QK} x_j + (W_K^T b_Q)^T x_j$ + what is the same for all $j$,
which softmax does not see. The vector $W_K^T b_Q$ of each head is a parameter, `key_bias`.

>>> attention = nn.MultiheadAttention(16, 4, batch_first=True)
>>> x = torch.randn(2, 5, 16)
>>> plain = QKRAttention.of(attention, w_bits=32, a_bits=32)  # nothing is rounded: the same attention
>>> torch.allclose(plain(x, x, x)[0], attention(x, x, x)[0], atol=1e-6)
True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from neuropil.compress.ofq import LsqActivation, StatsQuantizer
from neuropil.compress.quantize.tiles import QuantizationError

KNOWN = "ViTAttention, DeiTAttention, SwinAttention, nn.MultiheadAttention and timm's Attention"


@dataclass
class Parts:
    """What self-attention is made of, wherever it comes from."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_bias: Tensor | None
    value_bias: Tensor | None
    output: nn.Linear
    heads: int
    dropout: float
    kind: str  # how it is called: "transformers", "torch" or "timm"
    bias: nn.Module | None = None
    batch_first: bool = True


def parts_of(module: nn.Module) -> Parts | str | None:
    """The parts of a module of self-attention; why it has none that QKR can use; None where it is no attention."""
    if isinstance(module, nn.MultiheadAttention):
        return _torch_parts(module)
    linear = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    if "Attention" not in type(module).__name__ or len(linear) < 2:
        return None
    kind: Any = module
    found: Parts
    if type(module).__name__ in ("ViTAttention", "DeiTAttention", "SwinAttention") and "q_proj" in linear:
        q, k, v = (linear[f"{which}_proj"] for which in "qkv")
        found = Parts(
            q.weight, k.weight, v.weight, q.bias, v.bias, linear["o_proj"], kind.num_attention_heads,
            kind.attention_dropout, "transformers", getattr(module, "relative_position_bias", None),
        )  # fmt: skip
    elif {"qkv", "proj"} <= linear.keys() and hasattr(module, "num_heads"):
        norms = [
            n for n in ("q_norm", "k_norm", "norm") if not isinstance(getattr(module, n, None), nn.Identity | None)
        ]
        if any(True for _ in module.parameters(recurse=False)):
            return f"{type(module).__name__} has parameters of its own beside its layers: QKR knows {KNOWN}"
        if norms:
            return f"{norms[0]} stands between query and key: their weights are rounded one by one"
        q_weight, k_weight, v_weight = linear["qkv"].weight.chunk(3)
        q_bias, v_bias = _outer(linear["qkv"].bias)
        drop = getattr(getattr(module, "attn_drop", None), "p", 0.0)
        found = Parts(q_weight, k_weight, v_weight, q_bias, v_bias, linear["proj"], kind.num_heads, drop, "timm")
    else:
        return f"{type(module).__name__}: query and key are rounded one by one; QKR knows {KNOWN}"
    return _checked(found, module)


def _torch_parts(module: nn.MultiheadAttention) -> Parts | str:
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        return "keys or values of other sizes, or added ones: query and key cannot be multiplied beforehand"
    q_weight, k_weight, v_weight = module.in_proj_weight.chunk(3)
    q_bias, v_bias = _outer(module.in_proj_bias)
    found = Parts(
        q_weight, k_weight, v_weight, q_bias, v_bias, module.out_proj, module.num_heads, module.dropout, "torch",
        batch_first=bool(module.batch_first),
    )  # fmt: skip
    return _checked(found, module)


def _outer(bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Of the biases of query, key and value in one, the first and the last."""
    if bias is None:
        return None, None
    first, _, last = bias.chunk(3)
    return first, last


def _checked(found: Parts, module: nn.Module) -> Parts | str:
    rows, heads = len(found.query), found.heads
    if found.key.shape != found.query.shape or rows % heads or len(found.value) % heads:
        return (
            f"{type(module).__name__}: query {list(found.query.shape)} and key {list(found.key.shape)} in {heads} "
            "heads; QKR needs equal shapes that the heads divide"
        )
    if found.output.in_features != len(found.value):
        return f"{type(module).__name__}: an output that reads {found.output.in_features}, {len(found.value)} values"
    return found


class QueryKey(nn.Module):
    """The linear map from an input to one vector for each head, of weight q(W_Q^T W_K), rows of all heads stacked."""

    def __init__(self, query: Tensor, key: Tensor, heads: int, quantizer: StatsQuantizer) -> None:
        super().__init__()
        self.heads, self.quantizer = heads, quantizer
        self.query = nn.Parameter(query.detach().clone())
        self.key = nn.Parameter(key.detach().clone())

    def product(self) -> Float[Tensor, "rows width"]:
        """W_Q^T W_K of each head, `[heads * C, C]`."""
        query, key = (w.reshape(self.heads, -1, w.shape[1]) for w in (self.query, self.key))
        return (query.mT @ key).reshape(-1, key.shape[-1])

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch rows"]:
        return functional.linear(x, self.quantizer(self.product()))

    def merged(self) -> nn.Linear:
        """A linear layer with the product for its latent weight: for use and for packing."""
        product = self.product().detach()
        made = nn.Linear(product.shape[1], product.shape[0], bias=False)
        made.weight = nn.Parameter(product)
        if self.quantizer.bits != 32:
            parametrize.register_parametrization(made, "weight", self.quantizer.for_layer(made))
        return made.train(self.training)


class QKRAttention(nn.Module):
    """Self-attention with one rounded product for query and key, called as the module that it takes the place of.

    Made by `of`. What is rounded: the input, shared by query, key and value; the product and what it makes of the
    input; the values; the probabilities; the input and the weight of the output. With transformers' models,
    `output_attentions` finds none of these; `forward` gives the probabilities second.
    """

    def __init__(self, parts: Parts, w_bits: int = 2, a_bits: int = 2, tokens: int = 0) -> None:
        super().__init__()
        width = parts.query.shape[1]
        self.heads, self.dropout, self.kind = parts.heads, parts.dropout, parts.kind
        self.scaling = (len(parts.query) // parts.heads) ** -0.5
        self.batch_first = parts.batch_first
        self.in_proj_bias, self._qkv_same_embed_dim = None, True  # torch's encoder layers look here: no short cut
        self.query_key: nn.Module = QueryKey(parts.query, parts.key, parts.heads, StatsQuantizer(w_bits))
        self.key_bias = None
        if parts.query_bias is not None:
            key = parts.key.detach().reshape(parts.heads, -1, width)
            bias = parts.query_bias.detach().reshape(parts.heads, -1)
            self.key_bias = nn.Parameter(torch.einsum("hdc,hd->hc", key, bias))
        self.value = _linear(parts.value, parts.value_bias, w_bits)
        self.output = _linear(parts.output.weight, parts.output.bias, w_bits)
        self.relative_position_bias = parts.bias
        inside = len(parts.value)
        self.round_input = LsqActivation(a_bits, features=width, tokens=tokens)
        self.round_keys = LsqActivation(a_bits, features=parts.heads * width, tokens=tokens)
        self.round_values = LsqActivation(a_bits, features=inside, channels=inside)
        self.round_shares = LsqActivation(a_bits, signed=False, tokens=tokens)
        self.round_output = LsqActivation(a_bits, features=inside, tokens=tokens)

    @classmethod
    def of(cls, module: nn.Module, w_bits: int = 2, a_bits: int = 2, tokens: int = 0) -> QKRAttention:
        """From a module of self-attention, whose weights are copied. QuantizationError where QKR does not apply."""
        parts = parts_of(module)
        if not isinstance(parts, Parts):
            raise QuantizationError(parts or f"{type(module).__name__} is no attention; QKR knows {KNOWN}")
        return cls(parts, w_bits, a_bits, tokens).to(parts.query.device, parts.query.dtype).train(module.training)

    def logits(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch heads tokens tokens"]:
        """Scaled products of queries and keys, up to what is the same for all keys, of an input that is rounded."""
        keys = self.round_keys(self.query_key(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        logits = x[:, None] @ keys.mT
        if self.key_bias is not None:
            logits = logits + (x @ self.key_bias.T).mT[:, :, None]
        return logits * self.scaling

    def attend(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output and the probabilities `[batch, heads, tokens, tokens]`; the mask is added to the logits."""
        x = self.round_input(x)
        logits = self.logits(x)
        if mask is not None:
            logits = logits + mask if mask.dtype != torch.bool else logits.masked_fill(~mask, -torch.inf)
        shares = self.round_shares(functional.dropout(logits.softmax(-1), self.dropout, self.training))
        values = self.round_values(self.value(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        inside = (shares @ values).transpose(1, 2).flatten(2)
        return self.output(self.round_output(inside)), shares

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module it replaces: transformers' (states, mask), torch's (query, key, value, ...), timm's (x)."""
        call: Callable[..., Any] = getattr(self, f"_{self.kind}")
        return call(*args, **kwargs)

    def _transformers(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        mask = attention_mask
        if mask is not None and mask.dim() == 3:  # Swin's, one for each window of an image
            mask = mask[:, None].repeat(len(hidden_states) // len(mask), 1, 1, 1)
        if self.relative_position_bias is not None:
            near = self.relative_position_bias()
            mask = near if mask is None else near + mask
        return self.attend(hidden_states, mask)

    def _timm(self, x: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        return self.attend(x, attn_mask)[0]

    def _torch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if key is not query or value is not query:
            raise QuantizationError("query, key and value must be one tensor: QKR is for self-attention")
        batched = query.dim() == 3
        x = query if batched else query[None]
        x = x if self.batch_first or not batched else x.transpose(0, 1)
        mask = _added(attn_mask, x)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (len(x), self.heads))
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, x)
            assert padding is not None
            padding = padding.reshape(len(x), 1, 1, -1)
            mask = padding if mask is None else mask + padding
        out, shares = self.attend(x, mask)
        out = out if self.batch_first or not batched else out.transpose(0, 1)
        shares = shares.mean(1) if average_attn_weights else shares
        if not batched:
            out, shares = out[0], shares[0]
        return out, shares if need_weights else None


def _added(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Torch's masks, true where nothing is read, as numbers to be added."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(mask, -torch.inf)


def _linear(weight: Tensor, bias: Tensor | None, bits: int) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    if bits != 32:
        parametrize.register_parametrization(made, "weight", StatsQuantizer(bits).for_layer(made))
    return made
