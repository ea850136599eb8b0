"""Layer normalization of any shape, as a function, a module, a linear layer, and a converter of models."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from math import prod, sqrt
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from neuropil.changes import Changes

Where = Callable[[str, nn.Module], bool]


def standardise(
    x: Float[Tensor, "*shape"], axes: int, eps: float = 1e-5, eps_mode: str = "var"
) -> Float[Tensor, "*shape"]:
    """$(x - \\mu) / \\sigma$ over the last `axes` dimensions, with the divisor H; half precision is summed in float32.

    >>> standardise(torch.tensor([[1.0, 3.0]]), 1, eps=0.0)
    tensor([[-1.,  1.]])
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    over = tuple(range(-axes, 0))
    centred = wide - wide.mean(over, keepdim=True)
    if eps_mode == "var":
        sigma = (centred.square().mean(over, keepdim=True) + eps).sqrt()
    else:
        # A norm, and not the root of a mean: its derivative is defined (0) where all entries are equal.
        count = prod(x.shape[-axes:])
        sigma = torch.linalg.vector_norm(centred, dim=over, keepdim=True) / sqrt(count) + eps
    return (centred / sigma).to(x.dtype)


def layer_norm(
    x: Num[Tensor, "*shape"],
    normalized_shape: Sequence[int],
    weight: Float[Tensor, "*units"] | None = None,
    bias: Float[Tensor, "*units"] | None = None,
    eps: float = 1e-5,
    eps_mode: str = "var",
) -> Float[Tensor, "*shape"]:
    """$g\\,(x - \\mu) / \\sigma + b$ over the trailing dimensions `normalized_shape`.

    `eps_mode="var"` divides by $\\sqrt{var + eps}$ and is torch's own kernel; `"std"` divides by $std + eps$.
    Raises ValueError where `x` does not end in `normalized_shape`, TypeError where it is not floating point.
    """
    shape = tuple(normalized_shape)
    if tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"input of shape {tuple(x.shape)}; expected its last dimensions to be {shape}")
    if not x.is_floating_point():
        raise TypeError(f"input of dtype {x.dtype}; layer normalization needs floating point: pass x.float()")
    if eps_mode == "var":
        return F.layer_norm(x, shape, weight, bias, eps)
    y = standardise(x, len(shape), eps, eps_mode)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


class LayerNorm(nn.Module):
    """$h = \\frac{g}{\\sigma} (a - \\mu) + b$ for each example alone; the same in training and in evaluation.

    `normalized_shape`, `elementwise_affine`, `bias` and the names in the state dict are those of
    `torch.nn.LayerNorm`, so that state dicts go both ways. `weight` is the gain g (initially 1), `bias` is b
    (initially 0), each as long as the layer has units.

    eps_mode    "var": divide by $\\sqrt{var + eps}$, as torch and the authors' Theano code do; "std": by
                $std + eps$, as their Lua code does

    Warns (UserWarning) where there is but one unit: its output would be b, whatever the input.

    >>> LayerNorm(2, eps=0.0)(torch.tensor([[1.0, 5.0], [7.0, 7.5]]))
    tensor([[-1.,  1.],
            [-1.,  1.]], grad_fn=<NativeLayerNormBackward0>)
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        eps_mode: str = "var",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if not shape or min(shape) < 1:
            raise ValueError(f"normalized_shape is {normalized_shape}; expected one or more sizes of at least 1")
        if eps_mode not in ("var", "std"):
            raise ValueError(f'eps_mode is {eps_mode!r}; expected "var" or "std"')
        if eps < 0:
            raise ValueError(f"eps is {eps}; expected 0 or more")
        if prod(shape) < 2:
            warnings.warn(f"a layer norm over {shape} has one unit: its output is its bias", stacklevel=2)
        self.normalized_shape, self.eps, self.eps_mode = shape, eps, eps_mode
        for name, present in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            value = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if present else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain 1 (the paper found it clearly better than the 0.1 that recurrent batch norm needs), bias 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Num[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, self.eps_mode)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, eps_mode={self.eps_mode!r}"


class LayerNormLinear(nn.Linear):
    """$h = f(LN(W x))$: the norm after the weights and before the nonlinearity, where its invariances live.

    `bias=True` adds the linear map's own bias before the norm; the paper needs none, for b follows it.
    `nonlinearity` is f (none by default); `weight` and `norm` hold the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        nonlinearity: Callable[[Tensor], Tensor] | None = None,
        eps: float = 1e-5,
        eps_mode: str = "var",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.nonlinearity = nonlinearity
        self.norm = LayerNorm(out_features, eps, eps_mode=eps_mode, device=device, dtype=dtype)

    def forward(self, x: Num[Tensor, "*batch d"]) -> Float[Tensor, "*batch h"]:
        if not x.is_floating_point():
            raise TypeError(f"input of dtype {x.dtype}; expected floating point: pass x.float()")
        h = self.norm(super().forward(x))
        return h if self.nonlinearity is None else self.nonlinearity(h)


def add_layer_norm(model: nn.Module, where: Where | None = None, eps: float = 1e-5) -> Changes:
    """A copy of `model` whose linear layers are normalised: each becomes a `LayerNormLinear` with its weights.

    By default every `nn.Linear` but the last one registered, taken for the output layer: the scale of its
    logits carries the model's confidence, and the paper leaves it alone. `where(name, module)` chooses others.

    What is left as it was is named in the result with the reason: layers of one unit, subclasses of `nn.Linear`
    (whose owner may read the weight and never call the layer, as multi-head attention does), and the layers that
    torch's fused transformer encoder reads.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> print(add_layer_norm(model))
    changed 1 module; left 2 as it was (the last linear layer, taken for the output; name it in `where` to change it)
    """
    model = deepcopy(model)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    last = linears[-1][1] if linears else None
    changed: list[str] = []
    left: dict[str, str] = {}
    for name, linear in linears:
        reason = _unfit(model, name, linear)
        if where is None and linear is last:
            reason = "the last linear layer, taken for the output; name it in `where` to change it"
        elif where is not None and not where(name, linear):
            reason = "not chosen by `where`"
        if reason:
            left[name] = reason
            continue
        normed = _normed(linear, eps)
        if not name:
            model = normed
        for place in [n for n, m in model.named_modules(remove_duplicate=False) if m is linear]:
            model.set_submodule(place, normed)
        changed.append(name)
    return Changes(model, tuple(changed), left)


def _unfit(model: nn.Module, name: str, linear: nn.Linear) -> str:
    """Why this layer cannot be replaced by one that is called in its stead; empty if it can."""
    if isinstance(linear, LayerNormLinear):
        return "already normalised"
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__}, not a plain nn.Linear"
    if linear.out_features < 2:
        return "one unit: its output would be its bias"
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
        return "torch's fused encoder layer reads its weight and does not call it"
    return ""


def _normed(linear: nn.Linear, eps: float) -> LayerNormLinear:
    weight = linear.weight
    normed = LayerNormLinear(
        linear.in_features, linear.out_features, linear.bias is not None, eps=eps, device="meta", dtype=weight.dtype
    )
    normed.weight, normed.bias = weight, linear.bias
    normed.norm = LayerNorm(linear.out_features, eps, device=weight.device, dtype=weight.dtype)
    return normed.train(linear.training)
