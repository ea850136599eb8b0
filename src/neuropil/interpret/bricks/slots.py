"""The layers whose neurons can really be left out, and a smaller model without them.

A *slot* is a site whose neurons lie as rows of plain linear maps and as columns of another, and whose nonlinearity
treats each neuron by itself. Others (experts, convolutions, wrapped or packed weights, a norm over the neurons) are
named with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuropil.changes import Changes
from neuropil.interpret.bricks.partition import Partition
from neuropil.neurons import Site, Weight, activation, find_sites

_SIZES = {"Linear": ("out_features", "in_features"), "Conv1D": ("nf", "nx")}


@dataclass(frozen=True)
class Slot:
    """A site, the modules that read by role (fused ones stand for several roles), and the one that writes."""

    site: Site
    reads: Mapping[str, nn.Module]
    write: nn.Module
    write_weight: Weight

    @property
    def readers(self) -> list[tuple[nn.Module, list[Weight]]]:
        """Each reading module once, with the weights it holds."""
        modules = {id(module): module for module in self.reads.values()}
        return [
            (module, [w for role, w in self.site.reads.items() if self.reads[role] is module])
            for module in modules.values()
        ]


def find_slots(model: nn.Module, names: Sequence[str] | None = None) -> tuple[list[Slot], dict[str, str]]:
    """The slots among the named sites (by default all), and for every other module with a matrix why it stays whole."""
    slots: list[Slot] = []
    left: dict[str, str] = {}
    for site in find_sites(model):
        reason = "none of its bricks was chosen" if names is not None and site.name not in names else ""
        reason = reason or _obstacle(model, site)
        if reason:
            left |= dict.fromkeys(_owners(site), reason)
            continue
        assert site.write is not None
        reads = {role: _owner(model, weight) for role, weight in site.reads.items()}
        slots.append(Slot(site, reads, _owner(model, site.write), site.write))
    touched = {name for slot in slots for name in _owners(slot.site)}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1 and name not in touched:
            left.setdefault(name, "it belongs to no layer of neurons")
    # In a chain of layers a matrix that one site writes by is what the next one reads by.
    return slots, {name: reason for name, reason in left.items() if name not in touched}


def _owner(model: nn.Module, weight: Weight) -> nn.Module:
    return model.get_submodule(weight.name.rpartition(".")[0])


def _owners(site: Site) -> list[str]:
    weights = [*site.reads.values(), *([site.write] if site.write is not None else [])]
    return list(dict.fromkeys(weight.name.rpartition(".")[0] for weight in weights))


def _obstacle(model: nn.Module, site: Site) -> str:
    """Why neurons cannot be left out of this site; "" where they can."""
    if site.kind not in ("dense", "gated") or site.write is None or site.tap.parameter or site.tap.side != "input":
        return f"a layer of kind {site.kind!r}: only plain dense and gated layers can leave neurons out"
    weights = [*site.reads.values(), site.write]
    for weight in weights:
        module: Any = _owner(model, weight)
        fused = sum(other.name == weight.name for other in weights)
        if type(module).__name__ not in _SIZES or not isinstance(module._parameters.get("weight"), nn.Parameter):
            return "a wrapped, packed or parametrised weight, not a plain linear map"
        if module.weight.shape[weight.axis] != fused * site.width or weight.block != 1:
            return "its neurons share a parameter with something else"
    return "" if _apart(model, site) else "its nonlinearity does not treat each neuron by itself"


def _apart(model: nn.Module, site: Site) -> bool:
    """Whether a neuron's activation depends on its own projections alone, tried out on half of the neurons."""
    if site.formula is None or not site.formula.complete:
        return False
    own: list[Tensor] = []

    def tensor(name: str) -> Tensor:
        own.append(tensor_of(model, name).detach().float().cpu())
        return own[-1]

    half = site.width // 2
    generator = torch.Generator().manual_seed(0)
    whole = {role: torch.randn(3, site.width, generator=generator) for role in site.reads}
    part = {role: torch.cat([x[:, :half], torch.zeros(3, site.width - half)], 1) for role, x in whole.items()}
    same = torch.allclose(site.formula(whole, tensor)[:, :half], site.formula(part, tensor)[:, :half])
    return same and not any(site.width in parameter.shape for parameter in own)


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name."""
    owner, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(owner), leaf)
    assert isinstance(found, Tensor)
    return found


def places(weights: Sequence[Weight], neurons: Int[Tensor, " kept"]) -> Int[Tensor, " places"]:
    """Where neurons lie along the axis of a parameter that holds one or several of their weights."""
    return torch.cat([weight.start + weight.step * neurons for weight in weights])


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
    slots, left = find_slots(made, list(neurons))
    for slot in slots:
        kept = neurons[slot.site.name]
        for module, weights in slot.readers:
            _narrow(module, weights[0].axis, places(weights, kept).sort().values, reads=True)
        _narrow(slot.write, slot.write_weight.axis, kept, reads=False)
    return Changes(made, tuple(dict.fromkeys(name for slot in slots for name in _owners(slot.site))), left)


@torch.no_grad()
def _narrow(module: Any, axis: int, kept: Tensor, reads: bool) -> None:
    """Only these rows (of a module that reads, with its bias) or columns, in place."""
    if not len(kept) and type(module).__name__ == "Conv1D":
        raise ValueError("a Conv1D of transformers cannot be without neurons; keep one brick, or leave the site out")
    kept = kept.to(module.weight.device)
    module.weight = nn.Parameter(module.weight.index_select(axis, kept), module.weight.requires_grad)
    if reads and getattr(module, "bias", None) is not None:
        module.bias = nn.Parameter(module.bias.index_select(0, kept), module.bias.requires_grad)
    setattr(module, _SIZES[type(module).__name__][0 if reads else 1], len(kept))


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
    h = activation(slot.site, dict.fromkeys(slot.site.reads, x), lambda name: tensor_of(model, name))
    columns = slot.write_weight.rows(tensor_of(model, slot.write_weight.name), slot.site.width)
    return torch.stack([(h * mask.to(h)) @ columns for mask in parts.members(site)])


def slot_of(model: nn.Module, site: str) -> Slot:
    """The slot of a site. Raises KeyError for an unknown name, ValueError, with the reason, where it is none."""
    sites = {each.name: each for each in find_sites(model)}
    if site not in sites:
        raise KeyError(f"no site is called {site!r}; there are {', '.join(list(sites)[:5])} …")
    slots, left = find_slots(model, [site])
    if not slots:
        raise ValueError(f"site {site!r} cannot be taken apart: {left[_owners(sites[site])[0]]}")
    return slots[0]
