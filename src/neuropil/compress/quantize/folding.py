r"""Batch norm folded into the layer before it: after training, and in quantization-aware training.

A layer with weight W and bias b, and a batch norm with $\gamma, \beta$ and running $\mu, \sigma^2$ answer together what
one layer answers with

$$ W' = \frac{\gamma W}{\sqrt{\sigma^2 + \varepsilon}} \qquad
   b' = \beta + \frac{\gamma (b - \mu)}{\sqrt{\sigma^2 + \varepsilon}} $$

>>> model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
>>> x = torch.randn(2, 1, 8, 8)
>>> changes, statistics = fold(model)
>>> print(changes)
changed 1 module
>>> torch.allclose(changes.model(x), model(x), atol=1e-6)
True

In training the weight that is rounded must be the folded one, or what is trained is not what is deployed:
`fold_qat` does that. It normalises by the statistics of the batch until `freeze`, then by the running ones, as the
deployed layer will.

Sources: Jacob et al. 2018, arXiv:1712.05877; Krishnamoorthi 2018, arXiv:1806.08342 (the delayed freeze).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from neuropil.changes import Changes
from neuropil.compress.quantize.graph import normalised
from neuropil.compress.quantize.models import INPUT, Weights, bake, qat_prepare, quantizer_for, round_inputs
from neuropil.compress.quantize.quantizer import FakeQuantizer
from neuropil.compress.quantize.tiles import TRANSPOSED, QuantizationError

# layer name -> (mean, deviation) of each of its outputs over the training data, as the batch norm knew them
Statistics = dict[str, tuple[Tensor, Tensor]]


def fold(model: nn.Module, pairs: Sequence[tuple[str, str]] | None = None) -> tuple[Changes, Statistics]:
    """A copy with every batch norm that follows a layer folded into it, and what the norms knew of the outputs.

    `pairs` names layers and their norms where torch.fx cannot follow the model. The copy is in eval mode; a folded
    norm is an `nn.Identity`. Norms that no single layer feeds are named in `left`.
    """
    made = copy.deepcopy(model).eval()
    done, statistics = [], Statistics()
    for name, norm_name in normalised(made, pairs):
        layer, norm = made.get_submodule(name), made.get_submodule(norm_name)
        if getattr(norm, "running_mean", None) is None:
            continue
        statistics[name] = known(norm)
        made.set_submodule(name, _folded(layer, norm))
        made.set_submodule(norm_name, nn.Identity())
        done.append(name)
    norms = (nn.modules.batchnorm._BatchNorm,)
    left = {n: "no layer alone feeds this norm" for n, m in made.named_modules() if isinstance(m, norms)}
    return Changes(made, tuple(done), left), statistics


def _folded(layer: Any, norm: Any) -> nn.Module:
    if isinstance(layer, nn.Linear):
        made: nn.Module = fuse_linear_bn_eval(layer, norm)
    else:
        made = fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, TRANSPOSED))
    return made.requires_grad_(layer.weight.requires_grad)  # torch leaves a bias that was not there untrained


def known(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and deviation of what a batch norm answers over the training data: its beta and the size of its gamma."""
    weight, bias, mean = norm.weight, norm.bias, norm.running_mean
    assert isinstance(mean, Tensor)
    gamma = weight.detach() if isinstance(weight, Tensor) else torch.ones_like(mean)
    beta = bias.detach() if isinstance(bias, Tensor) else torch.zeros_like(mean)
    return beta.clone(), gamma.abs().clone()


# ------------------------------------------------------------------------------------------------- in training


class FoldedNorm(nn.Module):
    """A layer and its batch norm, trained with the folded weight rounded; `freeze()` fixes the statistics.

    Before that the batch's statistics normalise (the running ones are updated by it), through the rounded folded
    weight undone: $\\mathrm{BN}(Q(\\gamma W / \\sigma) x \\cdot \\sigma / \\gamma + b)$. After `delay` training steps
    it freezes itself; None leaves that to the caller.
    """

    steps: Tensor
    frozen: Tensor

    def __init__(self, layer: nn.Module, norm: nn.Module, quantizer: nn.Module, delay: int | None = None) -> None:
        super().__init__()
        self.layer, self.norm, self.quantizer, self.delay = layer, norm, quantizer, delay
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("frozen", torch.tensor(False))

    def freeze(self) -> None:
        """Normalise by the running statistics from now on, in training too."""
        self.frozen = torch.ones_like(self.frozen)

    def _factor(self) -> Tensor:
        norm: Any = self.norm
        deviation = (norm.running_var + norm.eps).sqrt()
        return torch.ones_like(deviation) / deviation if norm.weight is None else norm.weight / deviation

    def folded(self) -> tuple[Tensor, Tensor]:
        """The folded weight, not rounded, and the folded bias."""
        layer, norm, factor = self.layer, self.norm, self._factor()
        weight, bias, beta, mean = layer.weight, layer.bias, norm.bias, norm.running_mean
        assert isinstance(weight, Tensor)
        assert isinstance(mean, Tensor)
        shift = (bias if isinstance(bias, Tensor) else torch.zeros_like(mean)) - mean
        folded_bias = shift * factor + (beta if isinstance(beta, Tensor) else 0)
        return weight * factor.reshape(-1, *[1] * (weight.ndim - 1)), folded_bias

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.folded()
        rounded = self.quantizer(weight)
        if self.training:
            self.steps += 1
            if self.delay is not None and int(self.steps) > self.delay:
                self.freeze()
        if not self.training or bool(self.frozen):
            return _call(self.layer, x, rounded, bias)
        # a channel that the norm has turned off (gamma 0) cannot be undone: it answers beta either way
        factor = self._factor()
        factor = torch.where(factor.abs() < 1e-12, torch.ones_like(factor), factor)
        out = _call(self.layer, x, rounded, None)
        shape = [1, -1, *[1] * (out.ndim - 2)]
        own = self.layer.bias
        out = out / factor.reshape(shape) + (own.reshape(shape) if isinstance(own, Tensor) else 0)
        normal: Tensor = self.norm(out)
        return normal


def _call(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's answer with another weight and bias."""
    out: Tensor
    if isinstance(layer, nn.Linear):
        out = nn.functional.linear(x, weight, bias)
    else:
        out = layer._conv_forward(x, weight, bias)  # pads as the layer does
    return out


def fold_qat(
    model: nn.Module,
    weights: Weights,
    *,
    delay: int | None = None,
    pairs: Sequence[tuple[str, str]] | None = None,
    activations: Any = None,
    skip: Iterable[str] = (),
) -> Changes:
    """A copy for quantization-aware training in which layers with batch norms round their folded weights.

    Layers without a norm are prepared by `qat_prepare`. `bake_folded` ends the training. Transposed convolutions
    keep their norm. The grid of a quantizer without `dynamic` stays where the first folded weight put it; learned
    quantizers (`LSQ`) move theirs.
    """
    made = copy.deepcopy(model)
    skip = tuple(skip)
    norms: dict[str, str] = {}
    for name, norm in normalised(made, pairs):
        layer = made.get_submodule(name)
        if not isinstance(layer, TRANSPOSED) and not any(fnmatchcase(name, pattern) for pattern in skip):
            norms[name] = norm
    done = []
    for name, norm_name in norms.items():
        layer = made.get_submodule(name)
        quantizer = quantizer_for(weights, name, layer)
        if quantizer is None or getattr(quantizer, "bits", 0) == 32:
            continue
        made.set_submodule(name, FoldedNorm(layer, made.get_submodule(norm_name), quantizer, delay))
        made.set_submodule(norm_name, nn.Identity())
        done.append(name)
    inside = [f"{name}.layer" for name in done]
    changes = qat_prepare(made, weights, activations=activations, skip=[*skip, *inside])
    left = {name: why for name, why in changes.left.items() if name not in inside}
    if activations is not None:
        round_inputs(changes.model, activations, done)
    return Changes(changes.model, (*done, *changes.changed), left)


def bake_folded(model: nn.Module) -> Changes:
    """A copy of a model trained with `fold_qat`: plain layers with packed folded weights, and no norms."""
    made = copy.deepcopy(model).eval()
    for name, module in list(made.named_modules()):
        if not isinstance(module, FoldedNorm):
            continue
        layer: Any = copy.deepcopy(module.layer)
        if not isinstance(module.quantizer, FakeQuantizer):
            raise QuantizationError(f"{name}: {type(module.quantizer).__name__} has no packing")
        with torch.no_grad():
            weight, bias = module.folded()
        layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        parametrize.register_parametrization(layer, "weight", module.quantizer)
        rounding = module._modules.get(INPUT)
        if isinstance(rounding, FakeQuantizer):
            round_inputs(nn.ModuleDict({"layer": layer}), rounding, ["layer"])
            layer.add_module(INPUT, rounding)
        made.set_submodule(name, layer)
    return bake(made)
