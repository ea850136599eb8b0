"""The networks compared in the reproduction of layer normalization: with the norm, and its baselines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from neuropil.layers.layer_norm import LayerNorm, LayerNormGRU, LayerNormLSTM

EMBEDDING = 32
SYMBOLS = 60  # the most frequent characters; all others are one more symbol


class Characters(nn.Module):
    """A language model of characters: embedding, recurrent layer, output layer. The output is not normalised."""

    def __init__(self, layer: nn.Module, units: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS + 1, EMBEDDING)
        self.layer = layer
        self.out = nn.Linear(units, SYMBOLS + 1)

    def embedded(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0])

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedded(self.embedding(ids))


class RecurrentBatchNorm(nn.Module):
    """Batch norm with statistics for every time, and gain and bias shared over time; the gain begins at 0.1."""

    def __init__(self, features: int, times: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((features,), 0.1))
        self.bias = nn.Parameter(torch.zeros(features))
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(times, features))
        self.register_buffer("variance", torch.ones(times, features))

    def forward(self, x: Tensor, time: int) -> Tensor:
        time = min(time, len(self.mean) - 1)
        return F.batch_norm(x, self.mean[time], self.variance[time], self.weight, self.bias, self.training)


class BatchNormLSTM(nn.Module):
    """The LSTM of `LayerNormLSTM` with its three norms taken over the batch, at every time for itself."""

    def __init__(self, inputs: int, units: int, times: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * units, inputs))
        self.weight_hh = nn.Parameter(torch.empty(4 * units, units))
        self.bias = nn.Parameter(torch.zeros(4 * units))
        self.norms = nn.ModuleList(RecurrentBatchNorm(n, times) for n in (4 * units, 4 * units, units))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        by_input, by_state, by_cell = self.norms
        h = c = x.new_zeros(len(x), self.weight_hh.shape[1])
        outs = []
        for time, a in enumerate(F.linear(x, self.weight_ih).unbind(1)):
            gates = by_input(a, time) + by_state(F.linear(h, self.weight_hh), time) + self.bias
            i, f, g, o = gates.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * by_cell(c, time).tanh()
            outs.append(h)
        return torch.stack(outs, 1), None


def _layer(name: str, units: int, times: int) -> nn.Module:
    if name == "BN-LSTM":
        return BatchNormLSTM(EMBEDDING, units, times)
    if name == "LN-GRU":  # with the gate of torch's GRU, its baseline
        return LayerNormGRU(EMBEDDING, units, batch_first=True, update="code")
    kind: Any = {"LSTM": nn.LSTM, "GRU": nn.GRU, "LN-LSTM": LayerNormLSTM}[name]
    return kind(EMBEDDING, units, batch_first=True)


def network(name: str, units: int, times: int, seed: int) -> Characters:
    """One of the networks; for one seed all have the same initial weights, and no bias but zero."""
    torch.manual_seed(seed)
    model = Characters(nn.Identity(), units)
    first = LayerNormLSTM(EMBEDDING, units) if name.endswith("LSTM") else LayerNormGRU(EMBEDDING, units)
    model.layer = _layer(name, units, times)
    start = {key: value for key, value in first.cells[0].named_parameters() if key.startswith("weight_")}
    with torch.no_grad():
        for key, value in model.layer.named_parameters():
            matrix = next((start[k] for k in start if k in key), None)
            if matrix is not None:
                value.copy_(matrix)
            elif isinstance(model.layer, nn.RNNBase):
                value.zero_()
    return model


def dense(norm: str, width: int, batch: int, seed: int) -> nn.Sequential:
    """Two hidden layers under a norm, ReLU, and a plain output layer."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (784, width):
        linear = nn.Linear(inputs, width, bias=norm in ("no norm", "weight norm"))
        layers.append(weight_norm(linear) if norm == "weight norm" else linear)
        if norm == "batch norm":
            layers.append(nn.BatchNorm1d(width, momentum=0.1 if batch > 8 else 0.01))
        if norm == "layer norm":
            layers.append(LayerNorm(width))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(width, 10))
