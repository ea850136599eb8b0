"""One step of the recurrent networks that layer normalization was made for.

Each cell splits its step in two: `project(x)` is all that depends on the input alone, and can be had for every
time at once; `step(projected, state)` is the rest. `forward` does both, with the signature of torch's cells.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from neuropil.layers._layer_norm_core import LayerNorm, layer_norm

State = tuple[Tensor, ...]


class LayerNormRNNCell(nn.Module):
    """$a_t = W_{hh} h_{t-1} + W_{xh} x_t$, $h_t = f(LN(a_t))$: one norm over the sum of both terms.

    `nonlinearity` is "tanh" or "relu". With `bias=False` the norm has a gain only.
    """

    states = 1
    input_size: int
    hidden_size: int
    weight_ih: nn.Parameter
    weight_hh: nn.Parameter

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        eps: float = 1e-5,
        eps_mode: str = "var",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f'nonlinearity is {nonlinearity!r}; expected "tanh" or "relu"')
        self.nonlinearity = nonlinearity
        _weights(self, 1, input_size, hidden_size, device, dtype)
        self.norm = LayerNorm(hidden_size, eps, bias=bias, eps_mode=eps_mode, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset(self)

    def project(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch h"]:
        return F.linear(x, self.weight_ih)

    def step(self, projected: Tensor, state: State) -> State:
        a = self.norm(F.linear(state[0], self.weight_hh) + projected)
        return (torch.tanh(a) if self.nonlinearity == "tanh" else torch.relu(a),)

    def forward(
        self, input: Num[Tensor, "*batch d"], hx: Float[Tensor, "*batch h"] | None = None
    ) -> Float[Tensor, "*batch h"]:
        state = _checked(self, input, None if hx is None else (hx,))
        return self.step(self.project(input), state)[0]

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"


class LayerNormGRUCell(nn.Module):
    """$(z, r) = LN(W_h h_{t-1}) + LN(W_x x_t)$, $\\hat h = \\tanh(LN(W x_t) + \\sigma(r) LN(U h_{t-1}))$,
    $h_t = (1 - \\sigma(z)) h_{t-1} + \\sigma(z) \\hat h$, each norm with a gain and a bias of its own.

    `update="paper"` is that equation; `"code"` is the released code's and `torch.nn.GRU`'s,
    $h_t = \\sigma(z) h_{t-1} + (1 - \\sigma(z)) \\hat h$, the same network with z's sign turned. The weights are
    stacked as in `torch.nn.GRUCell`: rows of r, z, candidate. With `bias=False` the norms have gains only.
    """

    states = 1
    input_size: int
    hidden_size: int
    weight_ih: nn.Parameter
    weight_hh: nn.Parameter

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        update: str = "paper",
        eps: float = 1e-5,
        eps_mode: str = "var",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if update not in ("paper", "code"):
            raise ValueError(f'update is {update!r}; expected "paper" or "code"')
        self.update = update
        _weights(self, 3, input_size, hidden_size, device, dtype)
        options: dict[str, Any] = {"eps": eps, "bias": bias, "eps_mode": eps_mode, "device": device, "dtype": dtype}
        self.norm_ih = LayerNorm(2 * hidden_size, **options)
        self.norm_hh = LayerNorm(2 * hidden_size, **options)
        self.norm_candidate_ih = LayerNorm(hidden_size, **options)
        self.norm_candidate_hh = LayerNorm(hidden_size, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset(self)

    def project(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch g"]:
        gates, candidate = self._split(F.linear(x, self.weight_ih))
        return torch.cat([self.norm_ih(gates), self.norm_candidate_ih(candidate)], -1)

    def step(self, projected: Tensor, state: State) -> State:
        (h,) = state
        gates, candidate = self._split(projected)
        gates_h, candidate_h = self._split(F.linear(h, self.weight_hh))
        r, z = torch.sigmoid(gates + self.norm_hh(gates_h)).chunk(2, -1)
        new = torch.tanh(candidate + r * self.norm_candidate_hh(candidate_h))
        return (torch.lerp(h, new, z) if self.update == "paper" else torch.lerp(new, h, z),)

    def _split(self, a: Tensor) -> tuple[Tensor, ...]:
        return a.split([2 * self.hidden_size, self.hidden_size], -1)

    def forward(
        self, input: Num[Tensor, "*batch d"], hx: Float[Tensor, "*batch h"] | None = None
    ) -> Float[Tensor, "*batch h"]:
        state = _checked(self, input, None if hx is None else (hx,))
        return self.step(self.project(input), state)[0]

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, update={self.update!r}"


class LayerNormLSTMCell(nn.Module):
    """$(i, f, g, o) = LN(W_h h_{t-1}) + LN(W_x x_t) + b$, $c_t = \\sigma(f) c_{t-1} + \\sigma(i) \\tanh(g)$,
    $h_t = \\sigma(o) \\tanh(LN(c_t))$: the cell is read through a norm, and is not normalised itself.

    variant     "paper": the two norms go over all 4H summed inputs jointly;
                "separate-gates": over the H summed inputs of each gate;
                "draw": plain gates, $W_h h_{t-1} + W_x x_t + b$, and only the reading normalised

    The weights are stacked as in `torch.nn.LSTMCell`: rows of i, f, g, o. b adds to the biases of the norms, as
    in the paper's equation; with `bias=False` there is no b, and the norms have gains only.
    """

    states = 2
    input_size: int
    hidden_size: int
    weight_ih: nn.Parameter
    weight_hh: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        variant: str = "paper",
        eps: float = 1e-5,
        eps_mode: str = "var",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if variant not in ("paper", "draw", "separate-gates"):
            raise ValueError(f'variant is {variant!r}; expected "paper", "draw" or "separate-gates"')
        self.variant = variant
        _weights(self, 4, input_size, hidden_size, device, dtype)
        options: dict[str, Any] = {"eps": eps, "bias": bias, "eps_mode": eps_mode, "device": device, "dtype": dtype}
        self.norm_ih: nn.Module = _gates_norm(variant, hidden_size, options)
        self.norm_hh: nn.Module = _gates_norm(variant, hidden_size, options)
        self.norm_cell: nn.Module = LayerNorm(hidden_size, **options)
        b = nn.Parameter(torch.empty(4 * hidden_size, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", b)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset(self)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def project(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch g"]:
        a = self.norm_ih(F.linear(x, self.weight_ih))
        return a if self.bias is None else a + self.bias

    def step(self, projected: Tensor, state: State) -> State:
        h, c = state
        gates = projected + self.norm_hh(F.linear(h, self.weight_hh))
        both, g, o = gates.split([2 * self.hidden_size, self.hidden_size, self.hidden_size], -1)
        i, f = torch.sigmoid(both).chunk(2, -1)
        c = torch.addcmul(f * c, i, torch.tanh(g))
        return torch.sigmoid(o) * torch.tanh(self.norm_cell(c)), c

    def forward(
        self,
        input: Num[Tensor, "*batch d"],
        hx: tuple[Float[Tensor, "*batch h"], Float[Tensor, "*batch h"]] | None = None,
    ) -> tuple[Float[Tensor, "*batch h"], Float[Tensor, "*batch h"]]:
        h, c = self.step(self.project(input), _checked(self, input, hx))
        return h, c

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, variant={self.variant!r}"


class _GatesNorm(LayerNorm):
    """A norm over each of four equal parts of the last dimension, with the gain and bias of the whole."""

    def forward(self, x: Num[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        parts = x.unflatten(-1, (4, -1))
        y = layer_norm(parts, parts.shape[-1:], None, None, self.eps, self.eps_mode).flatten(-2)
        assert self.weight is not None
        return y * self.weight if self.bias is None else torch.addcmul(self.bias, y, self.weight)


def _gates_norm(variant: str, hidden_size: int, options: dict[str, Any]) -> nn.Module:
    if variant == "draw":
        return nn.Identity()
    return (LayerNorm if variant == "paper" else _GatesNorm)(4 * hidden_size, **options)


def _weights(cell: Any, gates: int, inputs: int, hidden: int, device: Any, dtype: torch.dtype | None) -> None:
    """Give a cell its two matrices, not yet filled."""
    if inputs < 1 or hidden < 1:
        raise ValueError(f"input_size is {inputs} and hidden_size {hidden}; expected 1 or more of each")
    cell.input_size, cell.hidden_size = inputs, hidden
    cell.weight_ih = nn.Parameter(torch.empty(gates * hidden, inputs, device=device, dtype=dtype))
    cell.weight_hh = nn.Parameter(torch.empty(gates * hidden, hidden, device=device, dtype=dtype))


def _reset(cell: Any) -> None:
    """Recurrent weights orthogonal gate by gate, input weights normal with deviation 1/sqrt(inputs), norms anew."""
    nn.init.normal_(cell.weight_ih, std=1 / sqrt(cell.input_size))
    for gate in cell.weight_hh.detach().split(cell.hidden_size):
        nn.init.orthogonal_(gate)
    for norm in cell.children():
        if isinstance(norm, LayerNorm):
            norm.reset_parameters()


def _checked(cell: Any, input: Tensor, state: State | None) -> State:
    """The state, zeros if there is none. Raises ValueError or TypeError for what the cell cannot take."""
    if input.dim() < 1 or input.shape[-1] != cell.input_size:
        raise ValueError(f"input of shape {tuple(input.shape)}; expected {cell.input_size} in its last dimension")
    if not input.is_floating_point():
        raise TypeError(f"input of dtype {input.dtype}; expected floating point: pass x.float()")
    expected = (*input.shape[:-1], cell.hidden_size)
    if state is None:
        return tuple(input.new_zeros(expected) for _ in range(cell.states))
    for part in state:
        if tuple(part.shape) != expected:
            raise ValueError(f"state of shape {tuple(part.shape)}; expected {expected} for this input")
    return state
