"""A smaller model of some bricks, and what each brick adds."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuropil.changes import Changes
from neuropil.interpret.bricks.partition import Partition
from neuropil.neurons import activation, find_sites
from neuropil.slots import SIZES, Slot, find_slots, named_tensor, owners, places


def wanted_slots(model: nn.Module, names: Container[str]) -> tuple[list[Slot], dict[str, str]]:
    """The slots among the named sites, and for every other module with a matrix why it stays whole."""
    return find_slots(model, lambda site: "" if site.name in names else "none of its bricks was chosen")


# --- a smaller model ------------------------------------------------------------------------------------------


def extract(model: nn.Module, parts: Partition, bricks: Mapping[str, Sequence[int] | Tensor]) -> Changes:
    """A copy with these bricks alone at each named site, in really smaller matrices; other sites stay whole.

    With no brick a site gives the bias of its output (not a Conv1D of transformers: ValueError). What the copy computes
    is what the model does with the other neurons at zero. Raises KeyError for a site without bricks, ValueError for a
    brick that is not there.

    >>> from neuropil.interpret.bricks import partition_bricks
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> extract(net, partition_bricks(net, 3, method="blocks"), {"0": [0, 2]}).model[0]
    Linear(in_features=4, out_features=4, bias=True)
    """
    return keep_neurons(model, parts.neurons(bricks))


def keep_neurons(model: nn.Module, neurons: Mapping[str, Int[Tensor, " kept"]]) -> Changes:
    """A copy with these neurons alone at each named site; see `extract`."""
    made = copy.deepcopy(model)
    slots, left = wanted_slots(made, neurons)
    for slot in slots:
        kept = neurons[slot.site.name]
        for module, weights in slot.readers:
            _narrow(module, weights[0].axis, places(weights, kept).sort().values, reads=True)
        _narrow(slot.write, slot.write_weight.axis, kept, reads=False)
    return Changes(made, tuple(dict.fromkeys(name for slot in slots for name in owners(slot.site))), left)


@torch.no_grad()
def _narrow(module: Any, axis: int, kept: Tensor, reads: bool) -> None:
    """Only these rows (of a module that reads, with its bias) or columns, in place."""
    if not len(kept) and type(module).__name__ == "Conv1D":
        raise ValueError("a Conv1D of transformers cannot be without neurons; keep one brick, or leave the site out")
    kept = kept.to(module.weight.device)
    module.weight = nn.Parameter(module.weight.index_select(axis, kept), module.weight.requires_grad)
    if reads and getattr(module, "bias", None) is not None:
        module.bias = nn.Parameter(module.bias.index_select(0, kept), module.bias.requires_grad)
    setattr(module, SIZES[type(module).__name__][0 if reads else 1], len(kept))


# --- what each brick adds -----------------------------------------------------------------------------------------


def brick_outputs(
    model: nn.Module, parts: Partition, site: str, x: Float[Tensor, "*places d"]
) -> Float[Tensor, "bricks *places out"]:
    """What each brick of a site adds to its output for inputs x; with the output's bias, their sum is the layer.

    >>> from neuropil.interpret.bricks import partition_bricks
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    >>> x = torch.randn(5, 4, dtype=torch.float64)
    >>> each = brick_outputs(net, partition_bricks(net, 3, method="random"), "0", x)
    >>> torch.allclose(each.sum(0) + net[2].bias, net(x))
    True
    """
    slot = slot_of(model, site)
    h = activation(slot.site, dict.fromkeys(slot.site.reads, x), lambda name: named_tensor(model, name))
    columns = slot.write_weight.rows(named_tensor(model, slot.write_weight.name), slot.site.width)
    return torch.stack([(h * mask.to(h)) @ columns for mask in parts.members(site)])


def slot_of(model: nn.Module, site: str) -> Slot:
    """The slot of a site. Raises KeyError for an unknown name, ValueError, with the reason, where it is none."""
    sites = {each.name: each for each in find_sites(model)}
    if site not in sites:
        raise KeyError(f"no site is called {site!r}; there are {', '.join(list(sites)[:5])} …")
    slots, left = wanted_slots(model, [site])
    if not slots:
        raise ValueError(f"site {site!r} cannot be taken apart: {left[owners(sites[site])[0]]}")
    return slots[0]
