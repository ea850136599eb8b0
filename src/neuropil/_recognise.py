"""How `find_sites` recognises layers of neurons: by what a forward pass does, not by names.

A layer of neurons is a linear map whose outputs go, each by itself, through a nonlinearity (perhaps times the output
of a second map) and are then read by another linear map. `_trace` follows a pass without computing it; this module
picks the layers out of what it saw. A model is probed whole first; parts that did not run then (experts that got no
token, towers that need another input, everything if the model refuses the probe) are probed one module at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from neuropil._inputs import TOKENS, fan_in, float_inputs, model_inputs
from neuropil._reader import Reader
from neuropil._trace import Trace, trace
from neuropil.neurons import Site, Tap, Weight


def recognise(model: nn.Module) -> list[Site]:
    """All sites of the model, in the order of its parameters."""
    names = {n: i for i, (n, _) in enumerate(model.named_parameters())}
    adapters = _adapters(model)
    found: dict[tuple[Any, ...], Site] = {}
    ran: set[str] = set()
    for seen in _whole(model, adapters):
        ran |= {name for name in seen.ran if name}
        sites = Reader(model, "", seen).sites()
        found |= {_key(site): site for site in sites}
        if _complete(sites):
            break
    _parts(model, adapters, ran, found)
    ordered = sorted(found.values(), key=lambda s: (names.get(_up(s).name, 0), _up(s).expert or 0, _up(s).start))
    return _numbered(model, ordered)


def _up(site: Site) -> Weight:
    return site.reads["up"]


def _key(site: Site) -> tuple[Any, ...]:
    w = _up(site)
    return (w.name, w.expert, w.start, w.step)


def _complete(sites: list[Site]) -> bool:
    """Whether nothing about the sites needs a probe that sees values."""
    return all(s.formula is None or s.formula.complete for s in sites)


def _adapters(model: nn.Module) -> set[str]:
    """Parameters of low-rank adapters: what lies in a wrapper beside its `base_layer`."""
    names = set()
    for name, module in model.named_modules():
        if "base_layer" in dict(module.named_children()):
            dot = name + "." if name else ""
            names |= {dot + n for n, _ in module.named_parameters() if not n.startswith("base_layer.")}
    return names


# -- probes of the whole model


def _whole(model: nn.Module, adapters: set[str]) -> Iterator[Trace]:
    small = sum(p.numel() for p in model.parameters()) < 200_000_000
    for device in ("meta", "cpu") if small else ("meta",):
        for inputs in model_inputs(model, device):
            try:
                yield trace(model, inputs, device, adapters)
            except Exception:
                continue


# -- probes of parts


def _parts(model: nn.Module, adapters: set[str], ran: set[str], found: dict[tuple[Any, ...], Site]) -> None:
    """Probe, innermost first, the modules that no probe has run."""
    known: dict[Any, tuple[list[Site], set[str]]] = {}
    covered = {w.name for s in found.values() for w in (*s.reads.values(), s.write) if w is not None}
    for name, module in reversed(list(model.named_modules())):
        if name in ran or isinstance(module, nn.ModuleList | nn.ModuleDict) or not name:
            continue
        dot = name + "."
        matrices = [n for n, p in module.named_parameters() if p.dim() >= 2 and dot + n not in covered]
        if len(matrices) < 2 or _holds_found_blocks(module, name, covered):
            continue
        key = (
            type(module),
            repr(module.__dict__.get("layer_idx", "")) and "",
            tuple((n, tuple(p.shape)) for n, p in module.named_parameters()),
        )
        if key not in known:
            local = {a.removeprefix(dot) for a in adapters if a.startswith(dot)}
            known[key] = _probe_part(module, local)
        for site in known[key][0]:
            moved = _moved(site, name)
            found.setdefault(_key(moved), moved)
            covered |= {w.name for w in (*moved.reads.values(), moved.write) if w is not None}


def _holds_found_blocks(module: nn.Module, name: str, covered: set[str]) -> bool:
    """Whether the module is a stack whose every block already has its neurons."""
    for child_name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) > 0:
            dots = [".".join(filter(None, (name, child_name, str(i)))) + "." for i in range(len(child))]
            if all(any(c.startswith(dot) for c in covered) for dot in dots):
                return True
    return False


def _probe_part(module: nn.Module, adapters: set[str]) -> tuple[list[Site], set[str]]:
    first = next((m for m in module.modules() if fan_in(m) and any(True for _ in m.parameters(recurse=False))), None)
    widths = [fan_in(first)] if first is not None else []
    widths += [p.shape[-1] for p in module.parameters() if p.dim() >= 2][:3]
    widths += [p.shape[-2] for p in module.parameters() if p.dim() >= 2][:2]
    for device in ("meta", "cpu"):
        tried = set()
        candidates = list(float_inputs(first, device)) if first is not None else []
        candidates += [torch.zeros(1, TOKENS, d, device=device) for d in widths]
        for x in candidates:
            if tuple(x.shape) in tried:
                continue
            tried.add(tuple(x.shape))
            try:
                seen = trace(module, (x,), device, adapters)
            except Exception:
                continue
            sites = Reader(module, "", seen).sites()
            if sites:
                return sites, seen.ran
            break
    return [], set()


def _moved(site: Site, name: str) -> Site:
    """A site found in a part, with the names it has in the model."""

    def under(inner: str) -> str:
        return f"{name}.{inner}" if inner else name

    def weight(w: Weight) -> Weight:
        return replace(w, name=under(w.name), bias=under(w.bias) if w.bias else None)

    def tap(t: Tap) -> Tap:
        return replace(
            t, module=under(t.module), parameter=t.parameter and under(t.parameter), bias=t.bias and under(t.bias)
        )

    return replace(
        site,
        name=under(site.name),
        reads={r: weight(w) for r, w in site.reads.items()},
        write=weight(site.write) if site.write else None,
        tap=tap(site.tap),
        taps={r: tap(t) for r, t in site.taps.items()},
        formula=site.formula.moved(name) if site.formula else None,
    )


# -- names and numbers


def _numbered(model: nn.Module, sites: list[Site]) -> list[Site]:
    seen: dict[str, int] = {}
    for s in sites:
        seen[s.name] = seen.get(s.name, 0) + 1
    blocks: dict[str, int] = {}
    used: set[str] = set()
    numbered = []
    for number, site in enumerate(sites):
        name = site.name
        if not name or seen[name] > 1:
            name = _up(site).name.rpartition(".")[0] or _up(site).name
            name = name.removesuffix(".base_layer")
        while name in used:
            name = f"{name}'"
        used.add(name)
        block = _block(model, _up(site).name)
        layer = blocks.setdefault(block if block is not None else f"#{number}", len(blocks))
        kind = "expert" if re.search(r"experts?\.\d+(\.|$)", name) else site.kind
        numbered.append(replace(site, name=name, number=number, layer=layer, kind=kind))
    return numbered


def _block(model: nn.Module, weight: str) -> str | None:
    """The innermost element of a ModuleList (experts aside) that holds the weight."""
    module: nn.Module = model
    path: list[str] = []
    block = None
    for part in weight.split(".")[:-1]:
        listed = isinstance(module, nn.ModuleList) and not (path and "expert" in path[-1])
        module = getattr(module, part)
        path.append(part)
        if listed:
            block = ".".join(path)
    return block
