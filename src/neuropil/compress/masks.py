"""Pruned weights that stay pruned while the rest is trained.

`hold_masks` puts a mask into a model as a parametrization, `W = W_original * mask`: pruned weights are zero in every
forward pass, get no gradient, and the mask is saved, copied and moved with the model. `bake_masks` ends it.

>>> import torch
>>> model = nn.Sequential(nn.Linear(2, 1))
>>> hold_masks(model, {"0.weight": torch.tensor([[True, False]])})
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
>>> for _ in range(3):
...     optimizer.zero_grad()
...     model(torch.ones(1, 2)).square().sum().backward()
...     optimizer.step()
>>> bake_masks(model)
>>> model[0].weight[0, 1].item()
0.0
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuropil.errors import ModelError


class Mask(nn.Module):
    """The parametrization: a weight where the mask is True, zero elsewhere."""

    def __init__(self, mask: Bool[Tensor, "*shape"]) -> None:
        super().__init__()
        self.register_buffer("mask", mask.clone())

    def forward(self, weight: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        assert isinstance(self.mask, Tensor)
        return weight * self.mask


def owners(model: nn.Module, parameter: str) -> list[tuple[str, nn.Module, str]]:
    """Every module that holds this parameter (several where it is shared): its name, itself, its name for it."""
    wanted = model.get_parameter(parameter)
    return [
        (name, module, short)
        for name, module in model.named_modules()
        for short, held in module._parameters.items()
        if held is wanted
    ]


def hold_masks(model: nn.Module, masks: Mapping[str, Bool[Tensor, "*_"]]) -> None:
    """Mask these parameters (name -> True where a weight is kept) of the model, in place, until `bake_masks`.

    A parameter that several modules share is masked in each. Raises ModelError for a mask of another shape.
    """
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        if weight.shape != mask.shape:
            raise ModelError(f"the mask of {name} has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
        with torch.no_grad():
            weight.mul_(mask.to(weight.device))
        for _, module, short in owners(model, name):
            parametrize.register_parametrization(module, short, Mask(mask.to(weight.device)), unsafe=True)


def bake_masks(model: nn.Module) -> None:
    """Take all masks of `hold_masks` off the model, in place; the zeros stay and may be trained again."""
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        for short, chain in list(module.parametrizations.items()):  # type: ignore[union-attr, operator]
            if len(chain) == 1 and isinstance(chain[0], Mask):
                parametrize.remove_parametrizations(module, short, leave_parametrized=True)
