r"""A norm that works with a batch of one, in any layer and at every step of a recurrent network.

Layer normalization takes the summed inputs $a$ of the $H$ units of a layer, for one example (and one time), and
normalises them by their own mean and deviation, so that no example depends on the others in its batch, training
and evaluation are the same, and a recurrent network may run for any number of steps:

$$\mu = \frac1H \sum_i a_i, \qquad \sigma = \sqrt{\tfrac1H \sum_i (a_i - \mu)^2}, \qquad
h = f\!\left(\frac{g}{\sigma} \odot (a - \mu) + b\right).$$

`LayerNormLSTM`, `LayerNormGRU` and `LayerNormRNN` are called like `torch.nn.LSTM`, `GRU` and `RNN` (layers, directions,
`batch_first`, dropout, initial states, packed sequences); `LayerNormLSTMCell` and its kin are one step of them.

>>> lstm = LayerNormLSTM(28, 64, num_layers=2, batch_first=True)
>>> output, (h, c) = lstm(torch.randn(8, 50, 28))
>>> output.shape, h.shape
(torch.Size([8, 50, 64]), torch.Size([2, 8, 64]))

The statistics are new at every step, and one gain and bias is shared over time. The input's part of a step does not
depend on the state and is computed for all times at once; what remains is a loop in Python, one step a time, which
`torch.compile` takes whole (`fullgraph=True`; it unrolls the loop, so compiling takes as long as the sequence is long).
With layer normalization, multiplying all the weights of a matrix by one number or adding one vector to the weights of
all units changes nothing; `invariance_report` shows this for any layer, `fisher_metric` what it does to the geometry.

Left open by the paper, and chosen here:

- $\epsilon$ is in none of its equations. `eps_mode="var"`, $\sqrt{\sigma^2 + \epsilon}$, is the authors' Theano code
  and torch; `"std"`, $\sigma + \epsilon$, is their Lua code.
- Initial values: the authors' code has orthogonal recurrent weights for each gate, gains 1 and all biases 0, as here.
  The scale of the input weights is not in it; here they are normal with deviation $1/\sqrt{inputs}$. The function does
  not depend on that scale, the speed of learning does.
- The GRU's state follows the paper's equation; the code turns the sign of its update gate (`update="code"`), and
  adds a bias to the input's part before its norm, which is not in the equation and is left out here.
- The LSTM's b stands beside the biases of the norms, as in the paper's equation; the code adds it once more before
  the norm of the input's part.
- "draw" (normed reading only) is the Lua code's network; its forget gate has no initial bias of -4, which that code
  names and does not use. "separate-gates", a norm for each gate, is what some libraries call an LN-LSTM.

Source: Jimmy Lei Ba, Jamie Ryan Kiros, Geoffrey E. Hinton, "Layer Normalization", 2016, arXiv:1607.06450. Of
`torch.nn.LSTM`'s arguments `proj_size` is not there: the paper has no projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from neuropil.layers._layer_norm_cells import (
    LayerNormGRUCell,
    LayerNormLSTMCell,
    LayerNormRNNCell,
    State,
)
from neuropil.layers._layer_norm_core import LayerNorm, LayerNormLinear, add_layer_norm, layer_norm
from neuropil.layers._layer_norm_theory import fisher_metric, invariance_report

__all__ = [
    "LayerNorm",
    "LayerNormGRU",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "LayerNormLinear",
    "LayerNormRNN",
    "LayerNormRNNCell",
    "add_layer_norm",
    "fisher_metric",
    "invariance_report",
    "layer_norm",
    "scan",
]


def scan(
    cell: Any,
    input: Float[Tensor, "t n d"],
    state: State,
    mask: Bool[Tensor, "t n"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "t n h"], State]:
    """Run a cell over a sequence: the states h of all times, and the last state.

    `cell` has `project` (called once, for all times) and `step`. Where `mask` is False the state stays as it
    was. With `reverse` time runs from the end to the beginning.
    """
    projected = cell.project(input).unbind(0)
    masks = None if mask is None else mask.unsqueeze(-1).unbind(0)
    times = range(len(projected))
    out = list(projected)
    for t in reversed(times) if reverse else times:
        new = cell.step(projected[t], state)
        state = new if masks is None else tuple(torch.where(masks[t], a, b) for a, b in zip(new, state, strict=True))
        out[t] = state[0]
    return torch.stack(out), state


class _Sequence(nn.Module):
    """What the three networks share: layers, directions, and the ways in which a sequence may be given."""

    def __init__(
        self,
        make_cell: Callable[[int], nn.Module],
        input_size: int,
        hidden_size: int,
        num_layers: int,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}; expected 1 or more")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout}; expected a probability")
        if dropout and num_layers == 1:
            raise ValueError(f"dropout is {dropout}, but it acts between layers and num_layers is 1")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        self.directions = 2 if bidirectional else 1
        sizes = [input_size] + [hidden_size * self.directions] * (num_layers - 1)
        self.cells = nn.ModuleList(make_cell(size) for size in sizes for _ in range(self.directions))

    def reset_parameters(self) -> None:
        for cell in self.cells:
            cell.reset_parameters()  # type: ignore[operator]

    def _run(self, input: Tensor | PackedSequence, given: State | None, mask: Tensor | None) -> tuple[Any, State]:
        """The output in the form of the input, and the last states of all cells."""
        if not isinstance(input, PackedSequence):
            return self._padded(input, given, mask, self.batch_first)
        if mask is not None:
            raise ValueError("a packed sequence and a mask were given; a packed sequence has its lengths in it")
        padded, lengths = pad_packed_sequence(input)
        mask = torch.arange(len(padded), device=padded.device)[:, None] < lengths.to(padded.device)
        out, state = self._padded(padded, given, mask, False)
        return pack_padded_sequence(out, lengths, enforce_sorted=input.sorted_indices is None), state

    def _padded(
        self, input: Tensor, given: State | None, mask: Tensor | None, batch_first: bool
    ) -> tuple[Tensor, State]:
        _check(self, input, mask, batch_first)
        time = -2 if batch_first else 0
        x = input.movedim(time, 0)
        many = x.shape[1:-1]  # any number of batch dimensions, none among them
        flat = _merged(x, many)
        masks = None if mask is None else _merged(mask.movedim(-1 if batch_first else 0, 0), many)
        out, last = self._layers(flat, self._states(flat, many, given), masks)
        return _parted(out, many).movedim(0, time), tuple(_parted(part, many) for part in last)

    def _states(self, flat: Tensor, many: torch.Size, given: State | None) -> State:
        cells, parts = len(self.cells), self.cells[0].states
        if given is None:
            return tuple(flat.new_zeros(cells, flat.shape[1], self.hidden_size) for _ in range(int(parts)))  # type: ignore[arg-type]
        expected = (cells, *many, self.hidden_size)
        for part in given:
            if tuple(part.shape) != expected:
                raise ValueError(f"initial state of shape {tuple(part.shape)}; expected {expected} for this input")
        return tuple(_merged(part, many) for part in given)

    def _layers(self, x: Tensor, states: State, mask: Tensor | None) -> tuple[Tensor, State]:
        last: list[State] = []
        for layer in range(self.num_layers):
            outs = []
            for direction in range(self.directions):
                number = layer * self.directions + direction
                start = tuple(part[number] for part in states)
                out, end = scan(self.cells[number], x, start, mask, reverse=direction == 1)
                outs.append(out)
                last.append(end)
            x = torch.cat(outs, -1) if len(outs) > 1 else outs[0]
            if self.dropout and layer < self.num_layers - 1:
                x = nn.functional.dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))


def _check(network: _Sequence, input: Tensor, mask: Tensor | None, batch_first: bool) -> None:
    form = "[..., time, input]" if batch_first else "[time, ..., input]"
    if input.dim() < 2 or input.shape[-1] != network.input_size:
        raise ValueError(f"input of shape {tuple(input.shape)}; expected {form} with {network.input_size} inputs")
    if input.shape[-2 if batch_first else 0] == 0:
        raise ValueError(f"input of shape {tuple(input.shape)}; expected one time or more in {form}")
    if not input.is_floating_point():
        raise TypeError(f"input of dtype {input.dtype}; expected floating point: pass x.float()")
    if mask is not None and mask.shape != input.shape[:-1]:
        raise ValueError(f"mask of shape {tuple(mask.shape)}; expected {tuple(input.shape[:-1])}, as the input")


def _merged(x: Tensor, many: torch.Size) -> Tensor:
    """The batch dimensions `many`, which come second, as one."""
    return x.flatten(1, len(many)) if many else x.unsqueeze(1)


def _parted(x: Tensor, many: torch.Size) -> Tensor:
    """The one batch dimension, which comes second, as `many` again."""
    return x.unflatten(1, many) if many else x.squeeze(1)


class LayerNormRNN(_Sequence):
    """A plain recurrent network of `LayerNormRNNCell`s, called like `torch.nn.RNN`; see `LayerNormLSTM`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        eps: float = 1e-5,
        eps_mode: str = "var",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        def cell(size: int) -> nn.Module:
            return LayerNormRNNCell(size, hidden_size, bias, nonlinearity, eps, eps_mode, device, dtype)

        super().__init__(cell, input_size, hidden_size, num_layers, batch_first, dropout, bidirectional)

    def forward(
        self,
        input: Num[Tensor, "*shape"] | PackedSequence,
        hx: Float[Tensor, "cells *batch h"] | None = None,
        mask: Bool[Tensor, "*steps"] | None = None,
    ) -> tuple[Float[Tensor, "*out"] | PackedSequence, Float[Tensor, "cells *batch h"]]:
        """All outputs and the last states; see `LayerNormLSTM.forward`."""
        out, state = self._run(input, None if hx is None else (hx,), mask)
        return out, state[0]


class LayerNormGRU(_Sequence):
    """A network of `LayerNormGRUCell`s, called like `torch.nn.GRU`; see `LayerNormLSTM`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        update: str = "paper",
        eps: float = 1e-5,
        eps_mode: str = "var",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        def cell(size: int) -> nn.Module:
            return LayerNormGRUCell(size, hidden_size, bias, update, eps, eps_mode, device, dtype)

        super().__init__(cell, input_size, hidden_size, num_layers, batch_first, dropout, bidirectional)

    def forward(
        self,
        input: Num[Tensor, "*shape"] | PackedSequence,
        hx: Float[Tensor, "cells *batch h"] | None = None,
        mask: Bool[Tensor, "*steps"] | None = None,
    ) -> tuple[Float[Tensor, "*out"] | PackedSequence, Float[Tensor, "cells *batch h"]]:
        """All outputs and the last states; see `LayerNormLSTM.forward`."""
        out, state = self._run(input, None if hx is None else (hx,), mask)
        return out, state[0]


class LayerNormLSTM(_Sequence):
    """A network of `LayerNormLSTMCell`s, called like `torch.nn.LSTM`.

    input_size      features of the input at each time
    hidden_size     H, units of each cell
    num_layers      each layer above the first reads the outputs of the one below
    bias            with False the norms have gains only, and there is no b
    batch_first     sequences come as [..., time, input] instead of [time, ..., input]; there may be any number
                    of batch dimensions, or none
    dropout         probability with which outputs between layers are dropped in training
    bidirectional   a second cell a layer reads the sequence backwards; outputs are joined
    variant         "paper", "draw" or "separate-gates": see `LayerNormLSTMCell`
    eps, eps_mode   see `LayerNorm`

    The cells are in `cells`, layer by layer, forwards before backwards.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        variant: str = "paper",
        eps: float = 1e-5,
        eps_mode: str = "var",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        def cell(size: int) -> nn.Module:
            return LayerNormLSTMCell(size, hidden_size, bias, variant, eps, eps_mode, device, dtype)

        super().__init__(cell, input_size, hidden_size, num_layers, batch_first, dropout, bidirectional)

    def forward(
        self,
        input: Num[Tensor, "*shape"] | PackedSequence,
        hx: tuple[Float[Tensor, "cells *batch h"], Float[Tensor, "cells *batch h"]] | None = None,
        mask: Bool[Tensor, "*steps"] | None = None,
    ) -> tuple[
        Float[Tensor, "*out"] | PackedSequence, tuple[Float[Tensor, "cells *batch h"], Float[Tensor, "cells *batch h"]]
    ]:
        """The outputs of the last layer at all times, and the last states (h, c) of all cells.

        hx      initial states, zeros by default
        mask    as the input without its last dimension: where it is False the state stays as it was, so that
                padded sequences end as the unpadded ones do. A packed sequence brings its own.

        Raises ValueError for sizes that do not fit, TypeError for input that is not floating point.
        """
        out, (h, c) = self._run(input, hx, mask)
        return out, (h, c)
