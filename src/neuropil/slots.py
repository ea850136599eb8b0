"""The layers whose neurons can really be left out of a model.

A *slot* is a site whose neurons lie as rows of plain linear maps and as columns of another, and whose nonlinearity
treats each neuron by itself. Others (experts, convolutions, wrapped or packed weights, a norm over the neurons) are
named with the reason.

>>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
>>> slots, left = find_slots(net)
>>> [slot.site.name for slot in slots], left
(['0'], {})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from neuropil.neurons import Site, Weight, find_sites

SIZES = {"Linear": ("out_features", "in_features"), "Conv1D": ("nf", "nx")}  # what the plain linear maps call theirs


@dataclass(frozen=True)
class Slot:
    """A site, the modules that read by role (fused ones stand for several roles), and the one that writes."""

    site: Site
    reads: Mapping[str, nn.Module]
    write: nn.Module

    @property
    def write_weight(self) -> Weight:
        assert self.site.write is not None
        return self.site.write

    @property
    def device(self) -> torch.device:
        weight = self.write.weight
        assert isinstance(weight, Tensor)
        return weight.device

    @property
    def readers(self) -> list[tuple[nn.Module, list[Weight]]]:
        """Each reading module once, with the weights it holds."""
        modules = {id(module): module for module in self.reads.values()}
        return [
            (module, [w for role, w in self.site.reads.items() if self.reads[role] is module])
            for module in modules.values()
        ]


def find_slots(
    model: nn.Module, unwanted: Callable[[Site], str] = lambda site: ""
) -> tuple[list[Slot], dict[str, str]]:
    """The slots of a model, and for every other module with a matrix why it stays whole.

    `unwanted(site)` is the reason for which a site is not asked for, "" for one that is.
    """
    slots: list[Slot] = []
    left: dict[str, str] = {}
    for site in find_sites(model):
        if reason := unwanted(site) or _obstacle(model, site):
            left |= dict.fromkeys(owners(site), reason)
            continue
        assert site.write is not None
        reads = {role: _owner(model, weight) for role, weight in site.reads.items()}
        slots.append(Slot(site, reads, _owner(model, site.write)))
    touched = {name for slot in slots for name in owners(slot.site)}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1 and name not in touched:
            left.setdefault(name, "it belongs to no layer of neurons")
    # In a chain of layers a matrix that one site writes by is what the next one reads by.
    return slots, {name: reason for name, reason in left.items() if name not in touched}


def owners(site: Site) -> list[str]:
    """The names of the modules by which a site reads and writes, each once."""
    weights = [*site.reads.values(), *([site.write] if site.write is not None else [])]
    return list(dict.fromkeys(weight.name.rpartition(".")[0] for weight in weights))


def _owner(model: nn.Module, weight: Weight) -> nn.Module:
    return model.get_submodule(weight.name.rpartition(".")[0])


def _obstacle(model: nn.Module, site: Site) -> str:
    """Why neurons cannot be left out of this site; "" where they can."""
    if site.write is None or site.tap.parameter or site.tap.side != "input":
        return "no single linear map reads its activation"
    weights = [*site.reads.values(), site.write]
    if site.kind not in ("dense", "gated") or any(w.expert is not None or w.block != 1 for w in weights):
        return f"a site of kind {site.kind!r}; only dense and gated layers are handled"
    for name in owners(site):
        module = model.get_submodule(name)
        plain = type(module).__name__ in SIZES and isinstance(module._parameters.get("weight"), nn.Parameter)
        if not plain or name.endswith("base_layer"):
            return f"{name} is a {type(module).__name__} or wrapped, not a plain linear map"
    for weight in weights:
        fused = sum(other.name == weight.name for other in weights)
        if model.get_parameter(weight.name).shape[weight.axis] != fused * site.width:
            return "its neurons share one parameter with something else"
    return _coupled(model, site)


def _coupled(model: nn.Module, site: Site) -> str:
    """Whether a neuron's activation needs other neurons (a norm over them) or a parameter of its own, tried out."""
    if site.formula is None or not site.formula.complete:
        return "how its activation follows from its projections is not known"
    asked: list[Tensor] = []

    def tensor(name: str) -> Tensor:
        asked.append(named_tensor(model, name).detach().to("cpu", torch.float32))
        return asked[-1]

    generator = torch.Generator().manual_seed(0)
    whole = {role: torch.randn(3, site.width, generator=generator) for role in site.reads}
    half = site.width // 2
    silenced = {role: torch.cat([x[:, :half], torch.zeros(3, site.width - half)], 1) for role, x in whole.items()}
    if not torch.allclose(site.formula(whole, tensor)[:, :half], site.formula(silenced, tensor)[:, :half]):
        return "a normalisation over its neurons needs them all"
    if any(site.width in x.shape for x in asked):
        return "its nonlinearity has a parameter for each neuron"
    return ""


def named_tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name."""
    owner, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(owner), leaf)
    assert isinstance(found, Tensor)
    return found


def places(weights: Sequence[Weight], neurons: Int[Tensor, " kept"]) -> Int[Tensor, " places"]:
    """Where neurons lie along the axis of a parameter that holds one or several of their weights."""
    return torch.cat([weight.start + weight.step * neurons for weight in weights])
