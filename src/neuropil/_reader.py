"""From what a trace saw to the sites of a module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from neuropil._formula import Formula
from neuropil._streams import Stream, WeightOp
from neuropil._trace import Trace
from neuropil.neurons import Site, Tap, Weight


@dataclass(frozen=True)
class _Run:
    """Entries `start, start + step, ...`: the outputs of a map that are a site's neurons."""

    start: int
    step: int
    width: int
    block: int = 1


def _run(stream: Stream, axis: int) -> _Run | None:
    if not stream.index.numel():
        return None
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


class Reader:
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
            runs = {self.seen.ops.index(roles["up"][0]) for _, roles in group}
            if len(writes) > 1 and len(runs) > 1:
                continue  # a router that runs anew for each of its readers has no one activation to see or set
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
        tap, node = self.tap_in(op, roles, alone, block)
        kind = "conv" if roles["up"][0].kind == "conv" else ("gated" if "gate" in reads else "dense")
        formula = Formula.of(self.seen, node, {r: (self.seen.ops.index(o), run.start, run.step, run.width)
                                                       for r, (o, run) in roles.items()})  # fmt: skip
        site = Site(
            name=roles["up"][0].module if kind == "conv" else self.place(roles["up"][0], op),
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
        taken = {w.name for s in sites for w in s.reads.values()}
        extra = []
        for k, op in enumerate(self.seen.ops):
            if (
                op.kind != "conv"
                or not op.to_nonlinear
                or op.weight.name in taken
                or op.weight.name not in self.parameters
            ):
                continue
            taken.add(op.weight.name)
            run = _Run(0, 1, op.out_features)
            reading = self.reading(op, run)
            if reading is None:
                continue
            out = self.tap_out(op, run)
            tap, node = self.normalised(k, out)
            formula = Formula.of(self.seen, node, {"up": (k, 0, 1, run.width)})
            extra.append(Site(op.module, 0, 0, run.width, "conv", {"up": reading}, None, tap, {"up": out},
                              _activation([op]), formula))  # fmt: skip
        return extra

    def normalised(self, k: int, out: Tap) -> tuple[Tap, int]:
        """Where what a filter gives to others passes (and its node): out of the norm after it, if it has one.

        Before the norm a map may have the other sign.
        """
        op, best = self.seen.ops[k], (out, self.seen.op_nodes[k])
        for module, (value, rank, _) in self.seen.outputs.items():
            own = len(value.streams) == 1 and value.streams[0].op == k and not value.streams[0].nonlinear
            own = own and value.node not in self.seen.bordered and not value.foreign and value.node > best[1]
            if own and module and rank == op.rank and value.streams[0].index.shape[1 - rank] == op.out_features:
                best = Tap(self.outer(module), "output", 1 - rank), value.node
        return best

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
        return next(
            (b for b in op.biases if b in self.parameters and self.parameters[b].shape[-1] >= op.out_features), None
        )

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
        got = self.seen.outputs.get(op.module) if self.expert_count(op) == 1 else None
        if got is not None and op.module == op.weight.name.rpartition(".")[0]:
            value = got[0]
            axis = _varying(value.streams[0].index) if len(value.streams) == 1 else None
            if axis is not None and self.seen.ops[value.streams[0].op].weight == op.weight and not value.foreign:
                return Tap(self.outer(op.module), "output", axis, run.start, run.step)
        return self.by_weight(op, "result", run)

    def tap_in(self, op: WeightOp, roles: dict[str, tuple[WeightOp, _Run]], alone: bool, block: int) -> tuple[Tap, int]:
        """Where the activation passes (and its node): into the module that reads it, else out of the nonlinearity."""
        names = {o.weight.name for o, _ in roles.values()}
        if self.expert_count(op) > 1:  # a module would show the tokens of all its experts
            return self.by_weight(op, "argument", _Run(0, 1, roles["up"][1].width)), op.read.node
        bordered = op.read.node in self.seen.bordered  # what was padded is seen before that, without its border
        places = [(op.module, "input", self.seen.inputs)] if alone else []
        if block > 1 or not alone or bordered:
            places += [(m, "output", self.seen.outputs) for m in self.seen.outputs]
        for module, side, table in places:
            value = table[module][0] if module in table else None
            if value is None or value.foreign or len(value.streams) != len(op.read.streams):
                continue
            if value.node in self.seen.bordered:
                continue
            streams = value.streams
            same = {self.seen.ops[s.op].weight.name for s in streams} == names and all(s.nonlinear for s in streams)
            axis = _varying(streams[0].index)
            if (
                same
                and axis is not None
                and module not in ("",)
                and streams[0].index.shape[axis] == roles["up"][1].width
            ):
                # A module that runs several times was last seen on another run than this map's.
                runs = {s.op for s in streams} == {s.op for s in op.read.streams}
                return Tap(self.outer(module), side, axis), value.node if runs else op.read.node
        return self.by_weight(op, "argument", _Run(0, 1, roles["up"][1].width, block)), op.read.node

    def by_weight(self, op: WeightOp, side: str, run: _Run) -> Tap:
        expert = (
            op.weight.offset // _strides(self.parameters[op.weight.name])[0]
            if self.parameters[op.weight.name].dim() == 3
            else None
        )
        axis = -2 if op.weight_first else -1
        if op.kind == "conv":
            axis = 1 - op.rank
        owner = op.weight.name.rpartition(".")[0]
        bias = (self.bias(op) or "") if side == "result" and op.late_bias else ""
        return Tap(owner, side, axis, run.start, run.step, expert, op.weight.name, op.weight.offset, bias)

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
        if op.kind == "conv":
            return 1
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
    axes = [
        a
        for a in range(-index.dim(), 0)
        if index.shape[a] > 1 and not torch.equal(index.narrow(a, 0, 1), index.narrow(a, 1, 1))
    ]
    return axes[0] if len(axes) == 1 else None


def _activation(ops: list[WeightOp]) -> str | None:
    names = list(dict.fromkeys(n for o in ops for n in o.activation))
    names = [n for n in names if n != "mul"] or names
    known = {("relu", "pow"): "relu2", ("pow", "tanh"): "gelu_tanh", ("hardtanh",): "relu6"}
    return known.get(tuple(names), "+".join(names)) or None
