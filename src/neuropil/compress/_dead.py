"""Neurons that pruning has cut off, taken out without a change of the outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuropil.changes import Changes
from neuropil.compress.reconstruction import run
from neuropil.compress.structured import Example, remove_neurons
from neuropil.errors import NoNeurons
from neuropil.evaluate import evaluating
from neuropil.neurons import Site, capture, find_sites


def without_dead_neurons(changes: Changes, example: Example) -> Changes:
    """`changes` with the neurons gone that read nothing (all weights into them are zero) or that nobody reads.

    A neuron that reads nothing has a constant output; the constant is added to the bias of the layer that reads it.
    Where that cannot be done exactly (no bias, zero padding around it, an output that is not constant) the neuron
    stays, and `left` says so. Each site keeps at least one neuron.
    """
    model = changes.model
    left = dict(changes.left)
    try:
        sites = [site for site in find_sites(model) if site.write is not None]
    except NoNeurons:
        return changes
    with evaluating(model):
        with torch.no_grad(), capture(model, sites) as seen:
            run(model, example)
        gone = {site.name: _gone(model, site, seen[site.name], left) for site in sites}
        removed = remove_neurons(model, {name: each for name, each in gone.items() if each}, example)
    kept = {name: why for name, why in removed.left.items() if name not in changes.changed and name not in left}
    for module in removed.model.modules():
        module.training = model.training
    return Changes(removed.model, changes.changed, left | kept)


@torch.no_grad()
def _gone(model: nn.Module, site: Site, h: Tensor, left: dict[str, str]) -> list[int]:
    """The site's neurons that can be taken out; constants are moved into the bias of the reader."""
    assert site.write is not None
    columns = site.write.rows(model.get_parameter(site.write.name), site.width)
    unread = ~columns.any(1)
    deaf = torch.zeros_like(unread)
    for role, weight in site.reads.items():
        del role
        deaf |= ~weight.rows(model.get_parameter(weight.name), site.width).any(1)
    values = h.movedim(site.tap.axis, 0).flatten(1)[: site.width]
    constant = values[:, 0] * (values == values[:, :1]).all(1)
    silent = (values == 0).all(1)
    speaking = deaf & ~unread & ~silent
    if bool(speaking.any()):
        speaking &= (values == values[:, :1]).all(1)
        if not _fold(model, site, columns, constant * speaking):
            left[site.name] = f"{int(speaking.sum())} neurons read nothing, and their constant has no bias to go to"
            speaking = torch.zeros_like(speaking)
    gone = unread | (deaf & silent) | speaking
    return gone.nonzero().flatten()[: site.width - 1].tolist()


def _fold(model: nn.Module, site: Site, columns: Tensor, constant: Tensor) -> bool:
    """Add what these constants give to the bias of the layer that reads them; False where it has none for it."""
    assert site.write is not None
    reader = model.get_submodule(site.write.name.rpartition(".")[0])
    bias = getattr(reader, "bias", None)
    if not isinstance(bias, Tensor):
        return False
    if isinstance(reader, nn.Linear):
        each = columns.unflatten(1, (-1, len(bias))).sum(1)
    elif isinstance(reader, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not any(_padding(reader)) and reader.groups == 1:
        each = columns.unflatten(1, (len(bias), -1)).sum(2)
    else:
        return False
    bias += constant @ each
    return True


def _padding(conv: nn.Module) -> tuple[int, ...]:
    padding = conv.padding
    return padding if isinstance(padding, tuple) else (1,)  # "same" pads, "valid" may be left out for simplicity
