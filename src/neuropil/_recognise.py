"""How `find_sites` recognises layers of neurons: by what a forward pass does, not by names.

A layer of neurons is a linear map whose outputs go, each by itself, through a nonlinearity (perhaps times the output
of a second map) and are then read by another linear map. `_trace` follows a pass without computing it; this module
picks the layers out of what it saw. A model is probed whole first; parts that did not run then (experts that got no
token, towers that need another input, everything if the model refuses the probe) are probed one module at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from neuropil._trace import Formula, Stream, Trace, WeightOp, trace
from neuropil.neurons import Site, Tap, Weight

_TOKENS = 3


@dataclass
class _Found:
    """A layer of neurons before it is numbered."""

    site: Site
    order: tuple[int, int]


def recognise(model: nn.Module) -> list[Site]:
    """All sites of the model, in the order of its parameters."""
    names = {n: i for i, (n, _) in enumerate(model.named_parameters())}
    adapters = _adapters(model)
    found: dict[tuple[Any, ...], Site] = {}
    ran: set[str] = set()
    for seen in _whole(model, adapters):
        ran |= {name for name in seen.ran if name}
        for site in _Reader(model, "", seen).sites():
            found.setdefault(_key(site), site)
        if found or seen.ops:
            break
    _parts(model, adapters, ran, found)
    ordered = sorted(found.values(), key=lambda s: (names.get(_up(s).name, 0), _up(s).expert or 0, _up(s).start))
    return _numbered(model, ordered)


def _up(site: Site) -> Weight:
    return site.reads["up"]


def _key(site: Site) -> tuple[Any, ...]:
    w = _up(site)
    return (w.name, w.expert, w.start, w.step)


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
        for inputs in _inputs(model, device):
            try:
                yield trace(model, inputs, device, adapters)
            except Exception:  # noqa: BLE001, S112 - a model that refuses the probe is probed in parts
                continue


def _inputs(model: nn.Module, device: str) -> Iterator[dict[str, Any] | tuple[Any, ...]]:
    """Inputs a model may take, likeliest first."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is not None and main is not None:
        yield from _named_inputs(model, config, main, device)
        return
    first = next((m for m in model.modules() if isinstance(m, nn.Embedding) or _fan_in(m)), None)
    if isinstance(first, nn.Embedding):
        yield (torch.zeros(1, _TOKENS, dtype=torch.long, device=device),)
    elif first is not None:
        yield from ((x,) for x in _float_inputs(first, device))


def _named_inputs(model: nn.Module, config: Any, main: str, device: str) -> Iterator[dict[str, Any]]:
    ids = torch.ones(1, _TOKENS, dtype=torch.long, device=device)
    vision = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or getattr(vision, "image_size", None) or 224
    high, wide = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    pixels = torch.zeros(1, getattr(config, "num_channels", None) or 3, high, wide, device=device)
    inputs: dict[str, Any] = {"pixel_values": pixels} if main == "pixel_values" else {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    yield {**inputs, "use_cache": False} if main == "input_ids" else inputs
    yield inputs
    if main == "pixel_values":
        for side in (32, 64, 224):
            yield {"pixel_values": torch.zeros(1, pixels.shape[1], side, side, device=device)}


def _fan_in(module: nn.Module) -> int:
    for name in ("in_features", "in_channels", "nx"):
        fan = getattr(module, name, 0)
        if isinstance(fan, int) and fan:
            return fan
    weight = getattr(module, "weight", None)
    return weight.shape[-1] if isinstance(weight, Tensor) and weight.dim() == 2 else 0


def _float_inputs(first: nn.Module, device: str) -> Iterator[Tensor]:
    fan = _fan_in(first)
    if isinstance(first, nn.Conv2d):
        for side in (32, 28, 8, 64, 224, 16, 96, 128, 256, 299, 20, 24, 12, 10, 48):
            yield torch.zeros(1, fan, side, side, device=device)
    elif isinstance(first, nn.Conv1d):
        for length in (32, 64, 128, 256, 16):
            yield torch.zeros(1, fan, length, device=device)
    elif isinstance(first, nn.Conv3d):
        yield torch.zeros(1, fan, 8, 16, 16, device=device)
    else:
        yield torch.zeros(1, _TOKENS, fan, device=device)
        yield torch.zeros(_TOKENS, fan, device=device)


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
        key = (type(module), repr(module.__dict__.get("layer_idx", "")) and "", tuple((n, tuple(p.shape)) for n, p in module.named_parameters()))
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
    first = next((m for m in module.modules() if _fan_in(m) and any(True for _ in m.parameters(recurse=False))), None)
    widths = [_fan_in(first)] if first is not None else []
    widths += [p.shape[-1] for p in module.parameters() if p.dim() >= 2][:3]
    widths += [p.shape[-2] for p in module.parameters() if p.dim() >= 2][:2]
    for device in ("meta", "cpu"):
        tried = set()
        candidates = list(_float_inputs(first, device)) if first is not None else []
        candidates += [torch.zeros(1, _TOKENS, d, device=device) for d in widths]
        for x in candidates:
            if tuple(x.shape) in tried:
                continue
            tried.add(tuple(x.shape))
            try:
                seen = trace(module, (x,), device, adapters)
            except Exception:  # noqa: BLE001, S112 - a part that needs more than one input is left to its parent
                continue
            sites = _Reader(module, "", seen).sites()
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
        return replace(t, module=under(t.module), parameter=under(t.parameter) if t.parameter else "")

    return replace(
        site,
        name=under(site.name),
        reads={r: weight(w) for r, w in site.reads.items()},
        write=weight(site.write) if site.write else None,
        tap=tap(site.tap),
        taps={r: tap(t) for r, t in site.taps.items()},
        formula=site.formula.moved(name) if site.formula else None,
    )


# -- from a trace to sites


@dataclass(frozen=True)
class _Run:
    """Entries `start, start + step, ...`: the outputs of a map that are a site's neurons."""

    start: int
    step: int
    width: int
    block: int = 1


def _run(stream: Stream, axis: int) -> _Run | None:
    index = stream.index.movedim(axis, 0).flatten(1)
    row = index[:, 0]
    if index.shape[1] > 1 and not torch.equal(row, index[:, -1]):
        return None
    values, counts = torch.unique_consecutive(row, return_counts=True)
    if int(counts.min()) != int(counts.max()) or values.numel() < 1:
        return None
    steps = values.diff()
    step = int(steps[0]) if steps.numel() else 1
    if step < 1 or (steps != step).any():
        return None
    return _Run(int(values[0]), step, values.numel(), int(counts[0]))


class _Reader:
    """Picks the sites out of the trace of one module."""

    def __init__(self, module: nn.Module, prefix: str, seen: Trace) -> None:
        self.module = module
        self.seen = seen
        self.parameters = dict(module.named_parameters())
        self.tensors = {**self.parameters, **dict(module.named_buffers())}

    def sites(self) -> list[Site]:
        readers: dict[tuple[Any, ...], list[tuple[WeightOp, dict[str, tuple[WeightOp, _Run]]]]] = {}
        for op in self.seen.ops:
            roles = self.roles(op)
            if roles:
                key = tuple((r, o.weight.name, o.weight.offset, run) for r, (o, run) in sorted(roles.items()))
                readers.setdefault(key, []).append((op, roles))
        sites: list[Site] = []
        for group in readers.values():
            writes = {op.weight.name for op, _ in group}
            sites += self.build(group[0][0], group[0][1], alone=len(writes) == 1)
        sites += self.filters(sites)
        return sites

    def roles(self, op: WeightOp) -> dict[str, tuple[WeightOp, _Run]]:
        """The maps whose outputs this map reads, if it reads a layer of neurons."""
        value = op.read
        streams = value.streams
        if value.foreign or value.scale or not 1 <= len(streams) <= 2 or not all(s.nonlinear for s in streams):
            return {}
        gates = [s for s in streams if s.gate]
        if len(streams) == 2 and len(gates) != 1:
            return {}
        axis = (1 if op.rank > 2 else 0) if op.kind == "conv" else (-2 if op.weight_first else -1)
        named = {"up": next((s for s in streams if not s.gate), streams[0])}
        if gates and len(streams) == 2:
            named["gate"] = gates[0]
        runs = {role: (self.seen.ops[s.op], _run(s, axis)) for role, s in named.items()}
        if any(run is None for _, run in runs.values()):
            return {}
        result = {role: (o, run) for role, (o, run) in runs.items() if run is not None}
        if len({(run.width, run.block) for _, run in result.values()}) != 1 or result["up"][1].width < 2:
            return {}
        return result if all(o.weight.name in self.parameters for o, _ in result.values()) else {}

    def build(self, op: WeightOp, roles: dict[str, tuple[WeightOp, _Run]], alone: bool) -> list[Site]:
        reads = {r: self.reading(o, run) for r, (o, run) in roles.items()}
        width, block = roles["up"][1].width, roles["up"][1].block
        write = self.writing(op, block) if alone and op.groups == 1 else None
        weights = [w for w in (*reads.values(), write) if w is not None]
        if any(w is None for w in reads.values()):
            return []
        taps = {r: self.tap_out(o, run) for r, (o, run) in roles.items()}
        tap = self.tap_in(op, roles, alone, block)
        kind = "conv" if roles["up"][0].kind == "conv" else ("gated" if "gate" in reads else "dense")
        formula = Formula.of(self.seen, op.read.node, {r: (self.seen.ops.index(o), run.start, run.step, run.width)
                                                       for r, (o, run) in roles.items()})  # fmt: skip
        site = Site(
            name=self.place(roles["up"][0], op),
            number=0,
            layer=0,
            width=width,
            kind=kind,
            reads={r: w for r, w in reads.items() if w is not None},
            write=write,
            tap=tap,
            taps=taps,
            activation=_activation([o for o, _ in roles.values()]),
            formula=formula,
        )
        return self.experts(site, [o for o, _ in roles.values()] + [op]) if weights else [site]

    def filters(self, sites: list[Site]) -> list[Site]:
        """Convolutions that reach a nonlinearity but are not read by one map alone (residual blocks)."""
        taken = {_up(s).name for s in sites} | {w.name for s in sites for w in s.reads.values()}
        extra = []
        for k, op in enumerate(self.seen.ops):
            if op.kind != "conv" or not op.to_nonlinear or op.weight.name in taken or op.weight.name not in self.parameters:
                continue
            taken.add(op.weight.name)
            run = _Run(0, 1, op.out_features)
            reading = self.reading(op, run)
            if reading is None:
                continue
            out = self.tap_out(op, run)
            node = self.seen.op_nodes[k]
            formula = Formula.of(self.seen, node, {"up": (k, 0, 1, run.width)})
            extra.append(Site(op.module, 0, 0, run.width, "conv", {"up": reading}, None, out, {"up": out},
                              _activation([op]), formula))  # fmt: skip
        return extra

    # weights

    def reading(self, op: WeightOp, run: _Run) -> Weight | None:
        where = self.axis(op, inside=False)
        if where is None:
            return None
        axis, start, expert = where
        return Weight(op.weight.name, axis, start + run.start, run.step, expert, self.bias(op))

    def writing(self, op: WeightOp, block: int) -> Weight | None:
        where = self.axis(op, inside=True)
        if where is None:
            return None
        axis, start, expert = where
        return Weight(op.weight.name, axis, start, 1, expert, self.bias(op), block)

    def axis(self, op: WeightOp, inside: bool) -> tuple[int, int, int | None] | None:
        """Along which axis of the parameter the map's inputs (or outputs) lie, from where, and of which expert."""
        p = self.parameters[op.weight.name]
        if op.kind == "conv":
            return (1 if inside else 0), 0, None
        stride, offset = op.weight.stride[-2:], op.weight.offset
        # x @ w has inputs along w's first axis; w @ x along its second.
        mine = stride[0] if inside != op.weight_first else stride[1]
        strides = _strides(p)
        expert = offset // strides[0] if p.dim() == 3 else None
        rest = offset - (expert or 0) * strides[0] if p.dim() == 3 else offset
        if p.dim() > 3 and all(n == 1 for n in p.shape[2:]):
            strides = strides[:2]
        last = strides[-2:]
        if mine == last[0] and mine != last[1]:
            return 0, rest // last[0], expert
        if mine == last[1]:
            return 1, rest % last[0], expert
        return None

    def bias(self, op: WeightOp) -> str | None:
        name = op.weight.name
        guesses = [name.removesuffix("weight") + "bias"] if name.endswith("weight") else [name + "_bias"]
        return next((b for b in guesses if b in self.parameters and self.parameters[b].shape[-1] >= op.out_features), None)

    def place(self, up: WeightOp, down: WeightOp) -> str:
        """The innermost module that holds both weights."""
        a, b = up.weight.name.split(".")[:-1], down.weight.name.split(".")[:-1]
        common = []
        for x, y in zip(a, b, strict=False):
            if x != y:
                break
            common.append(x)
        return ".".join(common)

    # taps

    def tap_out(self, op: WeightOp, run: _Run) -> Tap:
        """Where the map's output passes."""
        got = self.seen.outputs.get(op.module)
        if got is not None and op.module == op.weight.name.rpartition(".")[0]:
            value = got[0]
            axis = _varying(value.streams[0].index) if len(value.streams) == 1 else None
            if axis is not None and self.seen.ops[value.streams[0].op].weight == op.weight and not value.foreign:
                return Tap(self.outer(op.module), "output", axis, run.start, run.step)
        return self.by_weight(op, "result", run)

    def tap_in(self, op: WeightOp, roles: dict[str, tuple[WeightOp, _Run]], alone: bool, block: int) -> Tap:
        """Where the activation passes: into the module that reads it, else out of the nonlinearity."""
        names = {o.weight.name for o, _ in roles.values()}
        places = [(op.module, "input", self.seen.inputs)] if alone else []
        places += [(m, "output", self.seen.outputs) for m in self.seen.outputs] if block > 1 or not alone else []
        for module, side, table in places:
            value = table[module][0] if module in table else None
            if value is None or value.foreign or len(value.streams) != len(op.read.streams):
                continue
            streams = value.streams
            same = {self.seen.ops[s.op].weight.name for s in streams} == names and all(s.nonlinear for s in streams)
            axis = _varying(streams[0].index)
            if same and axis is not None and module not in ("",) and streams[0].index.shape[axis] == roles["up"][1].width:
                return Tap(self.outer(module), side, axis)
        return self.by_weight(op, "argument", _Run(0, 1, roles["up"][1].width, block))

    def by_weight(self, op: WeightOp, side: str, run: _Run) -> Tap:
        expert = op.weight.offset // _strides(self.parameters[op.weight.name])[0] if self.parameters[op.weight.name].dim() == 3 else None
        axis = -2 if op.weight_first else -1
        if op.kind == "conv":
            axis = 1 - op.rank
        owner = op.weight.name.rpartition(".")[0]
        return Tap(owner, side, axis, run.start, run.step, expert, op.weight.name, op.weight.offset)

    def outer(self, name: str) -> str:
        """A wrapper around a layer (LoRA) is where its true input and output pass."""
        while name.endswith(".base_layer"):
            name = name.removesuffix(".base_layer")
        return name

    # experts

    def experts(self, site: Site, ops: list[WeightOp]) -> list[Site]:
        """A site an expert, where experts share parameters along a leading axis."""
        if any(o.kind == "conv" for o in ops):
            return [site]
        counts = {self.expert_count(o) for o in ops}
        if len(counts) != 1 or counts == {1}:
            return [site]
        sites = []
        for e in range(counts.pop()):
            reads = {r: self.for_expert(w, e) for r, w in site.reads.items()}
            write = self.for_expert(site.write, e) if site.write else None
            taps = {r: self.tap_for_expert(t, e, ops) for r, t in site.taps.items()}
            sites.append(replace(site, name=f"{site.name}.{e}".lstrip("."), kind="expert", reads=reads, write=write,
                                 taps=taps, tap=self.tap_for_expert(site.tap, e, ops)))  # fmt: skip
        return sites

    def expert_count(self, op: WeightOp) -> int:
        p = self.parameters[op.weight.name]
        if p.dim() == 3:
            return p.shape[0]
        used = op.weight.shape[-2] * op.weight.shape[-1]
        return p.numel() // used if len(op.weight.shape) == 2 else 1

    def for_expert(self, w: Weight, e: int) -> Weight:
        p = self.parameters[w.name]
        if p.dim() == 3:
            return replace(w, expert=e)
        size = self.chunk(w.name) // _strides(p)[0]
        return replace(w, start=w.start % size + e * size)

    def chunk(self, name: str) -> int:
        op = next(o for o in self.seen.ops if o.weight.name == name)
        return op.weight.shape[-2] * op.weight.shape[-1]

    def tap_for_expert(self, tap: Tap, e: int, ops: list[WeightOp]) -> Tap:
        if not tap.parameter:
            return tap
        p = self.parameters[tap.parameter]
        size = _strides(p)[0] if p.dim() == 3 else self.chunk(tap.parameter)
        return replace(tap, expert=e, offset=tap.offset % size + e * size)


def _strides(p: Tensor) -> list[int]:
    """Strides of a contiguous tensor of this shape (the stand-ins are contiguous whatever the parameter is)."""
    strides, n = [], 1
    for size in reversed(p.shape):
        strides.append(n)
        n *= size
    return strides[::-1]


def _varying(index: Tensor) -> int | None:
    """The one axis (negative) along which entries differ."""
    axes = [a for a in range(-index.dim(), 0) if index.shape[a] > 1 and not torch.equal(index.narrow(a, 0, 1), index.narrow(a, 1, 1))]
    return axes[0] if len(axes) == 1 else None


def _activation(ops: list[WeightOp]) -> str | None:
    names = list(dict.fromkeys(n for o in ops for n in o.activation))
    names = [n for n in names if n != "mul"] or names
    known = {("relu", "pow"): "relu2", ("pow", "tanh"): "gelu_tanh", ("hardtanh",): "relu6"}
    return known.get(tuple(names), "+".join(names)) or None


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
