r"""The mean error of rounded weights taken out of the bias.

Rounding shifts each output's mean by $E[\tilde W x] - E[W x] = (\tilde W - W) E[x]$. Subtracted from the bias, it is
gone. $E[x]$ comes from data (`correct_bias`) or from what batch norms know, without any (`correct_bias_from`).

>>> from neuropil.compress.quantize import quantize_model
>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
>>> data = [torch.randn(64, 16) + 1]
>>> rough = quantize_model(model, {"bits": 3, "granularity": "tensor"}).model
>>> mended = correct_bias(rough, model, data).model
>>> shift = lambda m: (m(data[0]) - model(data[0])).mean(0).abs().max().item()
>>> shift(mended) < 1e-5 < shift(rough)
True

Sources: Nagel et al. 2019, arXiv:1906.04721; Finkelstein, Almog and Grobman 2019, arXiv:1906.03193.
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
from neuropil.compress.quantize.equalise import _shift
from neuropil.compress.quantize.folding import Statistics
from neuropil.compress.quantize.graph import inputs, outputs, pairs
from neuropil.compress.quantize.models import weight_of
from neuropil.compress.quantize.tiles import LAYERS, QuantizationError
from neuropil.compress.reconstruction import walk
from neuropil.packed import packed_modules


def correct_bias(
    quantized: nn.Module, plain: nn.Module, batches: Iterable[Any], *, add: bool = False, skip: Iterable[str] = ()
) -> Changes:
    """A copy of the quantized model whose layers answer, on average over the batches, what the plain ones do.

    Layers are corrected in the order in which they run, each for what the corrected ones before it give: the mean
    error of every corrected layer's output on these batches becomes 0. Layers without a bias are left; `add=True`
    gives them one (a file saved from it then needs a model with biases to be loaded into).
    Raises QuantizationError where the model has no packed layer.
    """
    made = copy.deepcopy(quantized)
    named = {name: module for name, module, _ in packed_modules(made)}
    if not named:
        raise QuantizationError("no weight of this model is packed: quantize it first (quantize_model)")
    left: dict[str, str] = {}
    todo = []
    skip = set(skip)
    for name, module in named.items():
        if name in skip:
            left[name] = "skipped as asked"
        elif isinstance(module, nn.Embedding):
            left[name] = "an Embedding has no bias"
        elif module._parameters.get("bias") is None and not add:
            left[name] = "it has no bias; add=True gives it one"
        else:
            todo.append(name)
    for seen in walk(plain, todo, batches, inputs_from=made):
        layer: Any = made.get_submodule(seen.name)
        axis = _axis(layer)
        total, rows = 0.0, 0
        with torch.no_grad():
            for call in seen.calls:
                error = (layer(*call.args, **call.kwargs) - call.output).movedim(axis, -1).flatten(0, -2).double()
                total, rows = total + error.sum(0), rows + len(error)
        _lower_bias(layer, total / rows)  # type: ignore[arg-type]
    return Changes(made, tuple(todo), left)


def _axis(layer: nn.Module) -> int:
    """Where a layer's output channels lie in what it answers."""
    dims = weight_of(layer).ndim
    return -1 if dims == 2 else 1 - dims


def _lower_bias(layer: nn.Module, shift: Tensor) -> None:
    weight = weight_of(layer)
    bias = layer._parameters.get("bias")
    own = torch.zeros(len(shift), dtype=weight.dtype, device=weight.device) if bias is None else bias.detach()
    layer.bias = nn.Parameter((own.double() - shift).to(own.dtype))


def correct_bias_from(
    quantized: nn.Module,
    plain: nn.Module,
    statistics: Statistics,
    pairs_of_layers: Sequence[tuple[str, str]] | None = None,
) -> Changes:
    """The same without data: inputs are ReLUs of Gaussians whose mean and deviation `fold` read from the norms.

    `plain` is the model that was quantized, with its norms folded (and equalised, with `statistics` equalised along).
    Layers that do not read the ReLU (or nothing) of a layer with statistics are left.
    """
    made = copy.deepcopy(quantized)
    modules = dict(made.named_modules())
    changed = []
    for pair in pairs(plain, pairs_of_layers):
        layer = modules.get(pair.second)
        if not isinstance(layer, LAYERS) or pair.first not in statistics:
            continue
        mean, deviation = statistics[pair.first]
        expected = relu_mean(mean, deviation) if pair.relu else mean
        before = plain.get_submodule(pair.second)
        error: Any = copy.copy(before)
        error._parameters = {"weight": nn.Parameter(weight_of(layer) - weight_of(before)), "bias": None}
        _shift(error, expected.repeat_interleave(inputs(before) // outputs(plain.get_submodule(pair.first))))
        _lower_bias(layer, error.bias.detach().double())
        changed.append(pair.second)
    left = {n: "nothing is known of what it reads" for n, _, _ in packed_modules(made) if n not in changed}
    return Changes(made, tuple(changed), left)


def relu_mean(mean: Float[Tensor, " n"], deviation: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """$E[\\max(0, x)]$ of a Gaussian: $\\sigma \\varphi(\\mu / \\sigma) + \\mu \\Phi(\\mu / \\sigma)$.

    >>> relu_mean(torch.tensor([0.0, -50.0, 50.0]), torch.ones(3))
    tensor([ 0.3989,  0.0000, 50.0000])
    """
    z = mean / deviation.clamp_min(1e-12)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return deviation * density + mean * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
