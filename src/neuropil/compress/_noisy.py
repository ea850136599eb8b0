"""Weights that are Gaussian distributions: what a Bayesian training wraps, how it is taken off again."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuropil.changes import Changes
from neuropil.compress.sparse import prunable
from neuropil.errors import ModelError


class Gaussian(nn.Module):
    """A parametrization: the mean in evaluation, `mean + noise * deviation` with fresh noise in training."""

    def __init__(self, mean: Tensor, log_variance: float, noise: torch.Generator) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.full_like(mean, log_variance))
        self.noise = noise

    def forward(self, mean: Tensor) -> Tensor:
        if not self.training:
            return mean
        return torch.addcmul(mean, drawn(mean, self.noise), (0.5 * self.log_variance).exp())

    def mean(self, mean: Tensor) -> Tensor:
        """The weight without its noise."""
        return mean


def drawn(like: Tensor, noise: torch.Generator) -> Tensor:
    """Standard normal numbers of this shape."""
    return torch.randn(like.shape, generator=noise, dtype=like.dtype, device=noise.device).to(like.device)


@dataclass(frozen=True)
class Layer:
    """A wrapped module. Its weight is seen with the neurons first: `[neurons, inputs, *kernel]`."""

    name: str
    module: nn.Module
    transposed: bool

    @property
    def original(self) -> nn.Parameter:
        """The trained means."""
        if not parametrize.is_parametrized(self.module, "weight"):
            raise ModelError(f"the distribution of {self.name}.weight is gone; wrap the model anew to go on")
        held = self.module.parametrizations["weight"].original  # type: ignore[union-attr, index]
        assert isinstance(held, nn.Parameter)
        return held

    @property
    def gaussian(self) -> Gaussian:
        held = self.module.parametrizations["weight"][0]  # type: ignore[index]
        assert isinstance(held, Gaussian)
        return held

    def seen(self, weight: Shaped[Tensor, "*any"]) -> Shaped[Tensor, "neurons inputs *kernel"]:
        """A tensor of the weight's shape with the neurons first; it is its own inverse."""
        return weight.transpose(0, 1) if self.transposed else weight


def wrap(
    model: nn.Module, skip: Sequence[str], make: Callable[[Tensor, bool], Gaussian]
) -> tuple[list[Layer], dict[str, str]]:
    """Put `make(weight, transposed)` on every linear map and convolution of the model, in place; why others are left.

    Raises ModelError where none is found.
    """
    found, left = prunable(model, skip)
    holders: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            first = holders.setdefault(id(weight), name)
            if first != name and module is not model.get_submodule(first):
                for shared in (first, name):
                    if found.pop(shared, None) is not None:
                        left[shared] = "its weight is shared with another module"
    layers: list[Layer] = []
    for name, module in found.items():
        if any(layer.module is module for layer in layers):
            continue  # one module under two names
        transposed = type(module).__name__ == "Conv1D" or isinstance(module, nn.modules.conv._ConvTransposeNd)
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if transposed and getattr(module, "groups", 1) > 1:
            left[name] = "a transposed convolution in groups has no matrix of neurons by inputs"
            continue
        if parametrize.is_parametrized(module):
            left[name] = "another of its parameters is parametrized; bake that in first"
            continue
        if not weight.requires_grad:
            left[name] = "it is frozen (requires_grad is False)"
            continue
        layers.append(Layer(name, module, transposed))
    for full, parameter in model.named_parameters():
        owner, _, name = full.rpartition(".")
        if (
            parameter.dim() > 1
            and "parametrizations" not in full
            and owner not in left
            and (name != "weight" or owner not in found)
        ):
            left[owner] = f"its parameter {name} is no linear map's or convolution's weight"
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no linear map or convolution to train so: {left or 'none at all'}"
        )
    for layer in layers:
        assert isinstance(layer.module.weight, Tensor)
        made = make(layer.module.weight, layer.transposed).train(layer.module.training)
        parametrize.register_parametrization(layer.module, "weight", made)
    return layers, left


def kept(scores: Mapping[str, Tensor], threshold: float, density: float | None) -> dict[str, Bool[Tensor, "*_"]]:
    """Which weights stay: those above the threshold, or of all layers together the share with the highest scores.

    The share is exact (rounded to a whole weight). Raises ValueError for a share outside (0, 1].
    """
    if density is None:
        return {name: score > threshold for name, score in scores.items()}
    if not 0 < density <= 1:
        raise ValueError(f"prune(density={density}): expected the share of weights to keep, in (0, 1]")
    flat = torch.cat([score.flatten() for score in scores.values()])
    mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    mask[flat.argsort(descending=True, stable=True)[: round(density * len(flat))]] = True
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def bake(model: nn.Module, layers: Sequence[Layer], masks: Mapping[str, Tensor], left: dict[str, str]) -> Changes:
    """A plain copy of the model: means for weights, zeros outside the masks, no parametrizations."""
    made = copy.deepcopy(model)
    for layer in layers:
        module, mask = made.get_submodule(layer.name), layer.seen(masks[layer.name])
        twin = Layer(layer.name, module, layer.transposed)
        with torch.no_grad():
            weight = (twin.gaussian.mean(twin.original) * mask).detach().clone()
        _plain(module, weight)
        if not bool(mask.any()):
            warnings.warn(f"{layer.name} has lost all its weights; weaken the prior or keep more", stacklevel=3)
    return Changes(made, tuple(layer.name for layer in layers), dict(left))


def _plain(module: nn.Module, weight: Tensor) -> None:
    """Take the parametrization off a copied module. torch's own removal would change the class that copies share."""
    rest, plain = dict(module._parameters), parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    module.__class__ = plain
    module._parameters.clear()
    module._parameters.update({"weight": nn.Parameter(weight), **rest})


def ramp(step: int, warmup: int) -> float:
    """An S from 0 to 1 over the warm-up."""
    done = min(step / warmup, 1.0) if warmup else 1.0
    return done * done * (3 - 2 * done)


def check_training(data_size: int, warmup: int, log_variance: float) -> None:
    """Raise ValueError for settings that every such training shares and that make no sense."""
    if data_size < 1:
        raise ValueError(f"data_size={data_size}: expected the number of training examples, which weighs the prior")
    if warmup < 0:
        raise ValueError(f"warmup={warmup}: expected a number of steps, 0 or more")
    if not math.isfinite(log_variance):
        raise ValueError(f"log_variance={log_variance}: expected a finite number, such as -9")
