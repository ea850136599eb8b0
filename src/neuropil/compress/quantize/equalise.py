r"""Weights made even before they are rounded, without changing what the network computes.

*Cross-layer equalisation*: where a ReLU lies between two layers, channel i of the first can be divided by $s_i$ and
the second's column i multiplied by it. With $s_i = \sqrt{r^1_i r^2_i} / r^2_i$ both ranges become $\sqrt{r^1_i r^2_i}$.
*High-bias absorption* moves the part of an activation that is always there, $c = \max(0, \beta - 3\gamma)$, into the
next bias. *Outlier channel splitting* halves the channel with the largest weight and doubles its input.

>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
>>> _ = model[0].weight.data.mul_(10 ** torch.linspace(-1, 1, 8)[:, None])
>>> changes = equalise(model)
>>> x = torch.randn(5, 4)
>>> torch.allclose(changes.model(x), model(x), atol=1e-5)
True
>>> spread = lambda w: (w.abs().amax(1).max() / w.abs().amax(1).min()).item()
>>> spread(model[0].weight) > 50, spread(changes.model[0].weight) < 12
(True, True)

Sources: Nagel et al. 2019, arXiv:1906.04721 (equalisation, absorption); Zhao et al. 2019, arXiv:1901.09504 (splitting).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.changes import Changes
from neuropil.compress.quantize.folding import Statistics
from neuropil.compress.quantize.graph import Pair, by_input, inputs, outputs, pairs, scale_inputs, scale_outputs
from neuropil.compress.quantize.models import layers, weight_of
from neuropil.compress.quantize.tiles import QuantizationError


def equalise(
    model: nn.Module,
    pairs_of_layers: Sequence[tuple[str, str]] | None = None,
    *,
    statistics: Statistics | None = None,
    rounds: int = 20,
) -> Changes:
    """A copy with the ranges of consecutive layers made equal, channel by channel; the same function.

    Chains of more than two layers are gone through until no scale moves by more than a thousandth, at most `rounds`
    times. Fold batch norms first (`fold`): they hide the pairs; the `statistics` that `fold` gives are scaled along,
    in place. Pairs are found by torch.fx, or named. Layers in no pair are named in `left`.
    """
    made = copy.deepcopy(model)
    found = pairs(made, pairs_of_layers)
    for _ in range(rounds):
        moved = max((_equalise(made, pair, statistics) for pair in found), default=0.0)
        if moved < 1e-3:
            break
    changed = dict.fromkeys(name for pair in found for name in (pair.first, pair.second))
    left = {n: "it is in no pair of layers with a ReLU between" for n in layers(made)[0] if n not in changed}
    return Changes(made, tuple(changed), left)


def _equalise(model: nn.Module, pair: Pair, statistics: Statistics | None) -> float:
    """Equalise one pair, and say by how much the scales differed from 1 (in logarithms)."""
    first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
    repeats = inputs(second) // outputs(first)  # of a flattened image, in a row
    ours = weight_of(first).flatten(1).abs().amax(1)
    theirs = by_input(second).reshape(outputs(first), -1).abs().amax(1)
    alive = (ours > 0) & (theirs > 0)
    scale = torch.where(alive, (ours / theirs.clamp_min(1e-30)).sqrt(), torch.ones_like(ours))
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))
    scale_outputs(first, 1 / scale)
    scale_inputs(second, scale.repeat_interleave(repeats))
    if statistics is not None and pair.first in statistics:
        mean, deviation = statistics[pair.first]
        statistics[pair.first] = mean / scale, deviation / scale
    return float(scale.log().abs().max())


def absorb_bias(
    model: nn.Module, statistics: Statistics, pairs_of_layers: Sequence[tuple[str, str]] | None = None
) -> Changes:
    """A copy in which what activations never fall below is in the next layer's bias.

    That is $c = \\max(0, \\beta - 3\\gamma)$. `statistics` are those that `fold` gives; they are moved along, in place.
    The function stays the same for activations above c (all but 0.13 % of a Gaussian) and, in convolutions with zero
    padding, away from the border: the paper's approximation. A second layer without a bias gets one.
    """
    made = copy.deepcopy(model)
    changed, left = [], {}
    for pair in pairs(made, pairs_of_layers):
        first, second = made.get_submodule(pair.first), made.get_submodule(pair.second)
        if not pair.relu or pair.first not in statistics or not isinstance(first.bias, nn.Parameter):
            left[pair.first] = "no ReLU, no bias or no statistics of what it answers"
            continue
        mean, deviation = statistics[pair.first]
        floor = (mean - 3 * deviation).clamp_min(0)
        first.bias.data -= floor
        statistics[pair.first] = mean - floor, deviation
        _shift(second, floor.repeat_interleave(inputs(second) // outputs(first)))
        changed.append(pair.first)
    return Changes(made, tuple(changed), left)


@torch.no_grad()
def _shift(layer: nn.Module, floor: Float[Tensor, " inputs"]) -> None:
    """Add to a layer's bias what it makes of a constant input."""
    weight = weight_of(layer)
    groups = getattr(layer, "groups", 1)
    sums = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    grouped = sums.reshape(groups, -1, sums.shape[1]) @ floor.reshape(groups, -1, 1)
    more = grouped.flatten()
    bias = layer.bias
    layer.bias = nn.Parameter(more + (bias.detach() if isinstance(bias, Tensor) else 0))


# --------------------------------------------------------------------------------------------- splitting outliers


class Widened(nn.Module):
    """A layer whose inputs `source` are given to it more than once: `layer(x[:, source])`.

    `source` lists which input each of the wider layer's inputs is. The features lie along dimension 1 of
    convolutions and along the last of a linear layer.
    """

    source: Tensor

    def __init__(self, layer: nn.Module, source: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("source", source)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.index_select(-1 if isinstance(self.layer, nn.Linear) else 1, self.source))
        return out


def split_outliers(model: nn.Module, share: float = 0.02, *, skip: Iterable[str] = ()) -> Changes:
    """A copy in which the input channels with the largest weights are split in two of half the weight; same function.

    `share` of a layer's inputs, rounded up, are added, one by one: each time the input with the largest |w| is
    halved. Layers are wrapped in `Widened`, which duplicates what they read, so that any model will do (the paper
    duplicates the outputs of the layer before, which is the same where there is one). Grouped convolutions and
    embeddings are left.
    Raises QuantizationError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise QuantizationError(f"share={share}: expected more than 0 and at most 1")
    made = copy.deepcopy(model)
    found, left = layers(made, skip)
    counts: dict[int, int] = {}
    for module in found.values():
        counts[id(module.weight)] = counts.get(id(module.weight), 0) + 1
    changed = []
    for name, module in found.items():
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or getattr(module, "groups", 1) > 1:
            left[name] = f"a {type(module).__name__} cannot be split" + (
                " where it has groups" * hasattr(module, "groups")
            )
        elif counts[id(module.weight)] > 1 or not name:
            left[name] = "its weight is tied" if name else "the model is itself the layer: put it in a Sequential"
        else:
            made.set_submodule(name, split(module, math.ceil(share * inputs(module))))
            changed.append(name)
    return Changes(made, tuple(changed), left)


@torch.no_grad()
def split(layer: Any, count: int) -> Widened:
    """The layer with `count` more inputs: each time the input with the largest |w| is halved and doubled."""
    weight = weight_of(layer)
    source = torch.arange(weight.shape[1], device=weight.device)
    size = weight.transpose(0, 1).flatten(1).abs().amax(1)
    halves = torch.ones_like(size)  # the share that each copy has of the weight
    for _ in range(count):
        worst = int((size * halves).argmax())
        halves[worst] /= 2
        source = torch.cat([source, source[worst : worst + 1]])
        size, halves = torch.cat([size, size[worst : worst + 1]]), torch.cat([halves, halves[worst : worst + 1]])
    wide = copy.copy(layer)
    wide._parameters = dict(layer._parameters)
    shaped = halves.to(weight.dtype).reshape(1, -1, *[1] * (weight.ndim - 2))
    wide.weight = nn.Parameter(weight.index_select(1, source) * shaped)
    setattr(wide, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(source))
    return Widened(wide, source)
