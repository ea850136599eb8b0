"""The MLPs of a model whose neurons can be left out while it runs, and the leaving out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from neuropil.errors import ModelError
from neuropil.neurons import Site, find_sites
from neuropil.packed import is_packed

Cores = Mapping[str, Int[Tensor, " kept"]]
Layers = slice | Sequence[int] | None
ACTIVE = "_neuropil_narrowed"
FIRST, LAST = 6 / 32, 27 / 32  # the authors leave the first 6 and the last 5 of 32 layers dense
_SIZES = {"Linear": ("out_features", "in_features"), "Conv1D": ("nf", "nx")}


@dataclass(frozen=True)
class Slot:
    """One site, its reading modules by role, and the module that reads its activation."""

    site: Site
    reads: Mapping[str, nn.Module]
    write: nn.Module

    @property
    def device(self) -> torch.device:
        weight = self.write.weight
        assert isinstance(weight, Tensor)
        return weight.device


def find_slots(model: nn.Module, layers: Layers = None) -> tuple[list[Slot], dict[str, str]]:
    """The chosen sites whose neurons can be left out, and for each other module with a matrix why it stays whole.

    Raises ModelError where none can, ValueError for a layer that is not there, for a packed model and for one whose
    neurons are being left out already.
    """
    if getattr(model, ACTIVE, False):
        raise ValueError("this model is inside a block of CoreInfer or only; leave that first")
    if any(is_packed(module) for module in model.modules()):
        raise ValueError("the model's weights are packed; unpack it first (neuropil.packed.unpack)")
    sites = find_sites(model)
    chosen = set(_chosen(len(sites), layers))
    slots: list[Slot] = []
    reasons: dict[str, str] = {}
    for site in sites:
        reason = "a layer that was to stay whole" if site.number not in chosen else _obstacle(model, site)
        if reason:
            reasons |= dict.fromkeys(_modules(site), reason)
        else:
            slots.append(_slot(model, site))
    if not slots:
        raise ModelError(f"no layer can leave neurons out: {sorted(set(reasons.values()))}")
    touched = {name for slot in slots for name in _modules(slot.site)}
    matrices = (
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() > 1 and name not in touched
    )
    return slots, {name: reasons.get(name, "it belongs to no layer of neurons") for name in matrices}


def _chosen(count: int, layers: Layers) -> list[int]:
    if layers is None:
        start = round(FIRST * count)
        return list(range(start, max(start + 1, round(LAST * count))))
    numbers = list(range(count))[layers] if isinstance(layers, slice) else [int(n) for n in layers]
    if not numbers or min(numbers) < 0 or max(numbers) >= count:
        raise ValueError(f"layers={layers}: expected some of the layers 0 to {count - 1}")
    return numbers


def _modules(site: Site) -> list[str]:
    weights = [*site.reads.values(), *([site.write] if site.write is not None else [])]
    return list(dict.fromkeys(weight.name.rpartition(".")[0] for weight in weights))


def _obstacle(model: nn.Module, site: Site) -> str:
    """Why this site's neurons cannot be left out, "" if they can."""
    weights = list(site.reads.values())
    if site.write is None or site.tap.parameter or site.tap.side != "input":
        return "no single linear map reads its activation"
    if site.kind not in ("dense", "gated") or any(w.expert is not None or w.block != 1 for w in (*weights, site.write)):
        return f"a site of kind {site.kind!r}; only dense and gated layers are handled"
    for name in _modules(site):
        module = model.get_submodule(name)
        if type(module).__name__ not in _SIZES or name.endswith("base_layer"):
            return f"{name} is a {type(module).__name__} or wrapped, not a plain linear map"
    for name in {w.name for w in weights}:
        fused = sum(w.name == name for w in weights)
        if model.get_parameter(name).shape[weights[0].axis] != fused * site.width:
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
    same = torch.allclose(site.formula(whole, tensor)[:, :half], site.formula(silenced, tensor)[:, :half])
    if not same:
        return "a normalisation over its neurons needs them all"
    if any(site.width in x.shape for x in asked):
        return "its nonlinearity has a parameter for each neuron"
    return ""


def named_tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name."""
    owner, _, leaf = name.rpartition(".")
    value = getattr(model.get_submodule(owner), leaf)
    assert isinstance(value, Tensor)
    return value


def _slot(model: nn.Module, site: Site) -> Slot:
    def owner(name: str) -> nn.Module:
        return model.get_submodule(name.rpartition(".")[0])

    assert site.write is not None
    return Slot(site, {role: owner(w.name) for role, w in site.reads.items()}, owner(site.write.name))


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Mark the model as one whose neurons are being left out. Raises ValueError where it is already."""
    if getattr(model, ACTIVE, False):
        raise ValueError("this model is inside a block of CoreInfer or only; leave that first")
    setattr(model, ACTIVE, True)
    try:
        yield
    finally:
        delattr(model, ACTIVE)


@dataclass(frozen=True)
class _State:
    """A module's parameters and the sizes it believes in."""

    module: Any
    parameters: Mapping[str, nn.Parameter | None]
    sizes: Mapping[str, int]

    def put(self) -> None:
        self.module._parameters.update(self.parameters)
        self.module.__dict__.update(self.sizes)


class Narrowing:
    """Swaps the weights of the slots' modules for those of some neurons, and back."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        self.slots = list(slots)
        modules = {id(m): m for slot in self.slots for m in (*slot.reads.values(), slot.write)}
        self._dense = {key: _State(m, dict(m._parameters), _sizes(m)) for key, m in modules.items()}

    def widen(self) -> None:
        """The dense model, its own parameters."""
        for state in self._dense.values():
            state.put()

    def narrow(self, cores: Cores) -> None:
        """Only these neurons of each named site; sites that are not named stay as they are.

        The small matrices are gathered here, once, so that a token costs what their size says.
        """
        for slot in self.slots:
            if slot.site.name in cores:
                for state in self._narrowed(slot, cores[slot.site.name].to(slot.device)):
                    state.put()

    def dense(self, module: nn.Module, name: str) -> nn.Parameter | None:
        """A module's own parameter, whatever stands in its place now."""
        return self._dense[id(module)].parameters[name]

    def _narrowed(self, slot: Slot, kept: Tensor) -> Iterable[_State]:
        site = slot.site
        for module in {id(m): m for m in slot.reads.values()}.values():
            weights = [w for role, w in site.reads.items() if slot.reads[role] is module]
            places = torch.cat([w.start + w.step * kept for w in weights]).sort().values
            yield self._taken(module, weights[0].axis, places, biased=True)
        assert site.write is not None
        yield self._taken(slot.write, site.write.axis, kept, biased=False)

    @torch.no_grad()
    def _taken(self, module: nn.Module, axis: int, places: Tensor, biased: bool) -> _State:
        dense = self._dense[id(module)]
        weight, bias = dense.parameters["weight"], dense.parameters.get("bias")
        assert weight is not None
        made: dict[str, nn.Parameter | None] = {
            "weight": nn.Parameter(weight.index_select(axis, places), requires_grad=weight.requires_grad)
        }
        if biased and bias is not None:
            made["bias"] = nn.Parameter(bias.index_select(0, places), requires_grad=bias.requires_grad)
        names = _SIZES[type(module).__name__]
        changed = names[0 if biased else 1]
        return _State(module, {**dense.parameters, **made}, {**dense.sizes, changed: len(places)})


def _sizes(module: nn.Module) -> dict[str, int]:
    return {name: getattr(module, name) for name in _SIZES[type(module).__name__] if hasattr(module, name)}
