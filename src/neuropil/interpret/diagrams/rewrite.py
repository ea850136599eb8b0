"""Rewrites that change no value: linear steps merged into one, then taken apart in the cheapest order.

Parallel and successive einsums are one multilinear map, and any order of its pairwise products gives the same
numbers. Two einsums of which one alone reads the other are merged; a merged one of three inputs or more is done by
the pairwise order with the fewest operations (all orders tried, by subsets). The result is taken only where it
costs less, or as much in fewer boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from neuropil.interpret.diagrams.axes import Array, Axis, DiagramError
from neuropil.interpret.diagrams.core import Builder, Diagram, Op, Wire
from neuropil.interpret.diagrams.cost import flops

MOST = 10  # inputs of one einsum for which all orders are tried


def simplified(diagram: Diagram) -> Diagram:
    """The same function with its einsums merged and reordered; needs the sizes."""
    unknown = sorted(name for name, size in diagram.sizes.items() if not isinstance(size, int))
    if unknown:
        raise DiagramError(f"the cheapest order depends on the sizes of {', '.join(unknown)}; give them")
    flat = diagram.flat()
    found = ordered(merged(flat))
    return found if _total(found) < _total(flat) else flat


def _total(diagram: Diagram) -> tuple[int, int]:
    """Operations, then boxes."""
    return sum(flops(step.op) for step in diagram.steps), len(diagram.steps)


def merged(flat: Diagram) -> Diagram:
    """Every einsum that one other einsum alone reads, merged into that one."""
    readers: dict[int, int] = {}
    for wire in (i for step in flat.steps for i in step.ins):
        readers[wire] = readers.get(wire, 0) + 1
    for wire in flat.outputs:
        readers[wire] = readers.get(wire, 0) + 1
    einsums = {step.outs[0] for step in flat.steps if step.op.kind == "einsum"}
    lone = {i for step in flat.steps if step.op.kind == "einsum" for i in step.ins if i in einsums and readers[i] == 1}
    builder = Builder(flat.inputs)
    wires: dict[int, Wire] = dict(enumerate(builder.inputs))
    pending: dict[int, tuple[Op, list[Wire]]] = {}  # einsums not yet put, with what they read
    for step in flat.steps:
        if step.op.kind != "einsum":
            wires |= dict(zip(step.outs, builder.add(step.op, [wires[i] for i in step.ins]), strict=True))
            continue
        op, ins = _opened(builder, step.op, step.ins, wires, pending)
        if step.outs[0] in lone:
            pending[step.outs[0]] = (op, ins)
        else:
            wires[step.outs[0]] = builder.add(op, ins)[0]
    return builder.finish([wires[i] for i in flat.outputs])


def _opened(
    builder: Builder, op: Op, ins: Sequence[int], wires: dict[int, Wire], pending: dict[int, tuple[Op, list[Wire]]]
) -> tuple[Op, list[Wire]]:
    """An einsum with those that it reads in their place; one that sums over a name that is taken stays apart."""
    taken = {n for a in (*op.dom, *op.cod) for n in a.names}
    read: list[Wire] = []
    for wire in ins:
        if wire not in pending:
            read.append(wires[wire])
            continue
        inner, inner_read = pending.pop(wire)
        summed = {n for a in inner.dom for n in a.names} - set(inner.cod[0].names)
        if summed & taken:
            read += builder.add(inner, inner_read)
        else:
            taken |= summed
            read += inner_read
    return Op("einsum", tuple(w.array for w in read), op.cod), read


def ordered(flat: Diagram) -> Diagram:
    """Every einsum of three inputs or more as pairwise ones, in the cheapest order."""
    builder = Builder(flat.inputs)
    wires: dict[int, Wire] = dict(enumerate(builder.inputs))
    for step in flat.steps:
        ins = [wires[i] for i in step.ins]
        if step.op.kind == "einsum" and 2 < len(ins) <= MOST:
            wires[step.outs[0]] = _pairwise(builder, step.op, ins)
        else:
            wires |= dict(zip(step.outs, builder.add(step.op, ins), strict=True))
    return builder.finish([wires[i] for i in flat.outputs])


def _pairwise(builder: Builder, op: Op, ins: Sequence[Wire]) -> Wire:
    everyone = frozenset(range(len(ins)))
    axes = {one.name: one for a in op.dom for one in a.axes}
    best: dict[frozenset[int], tuple[int, Any]] = {frozenset([i]): (0, i) for i in everyone}
    for size in range(2, len(ins) + 1):
        for some in map(frozenset, combinations(sorted(everyone), size)):
            best[some] = min((_joined(op, axes, best, some, half) for half in _halves(some)), key=lambda pair: pair[0])
    return _put(builder, op, axes, best, ins, everyone)


def _halves(some: frozenset[int]) -> list[frozenset[int]]:
    """Every way to part a set in two, each once."""
    first, *rest = sorted(some)
    return [frozenset([first, *part]) for size in range(len(rest)) for part in combinations(rest, size)]


def _array(op: Op, axes: dict[str, Axis], some: frozenset[int]) -> Array:
    """What the product of some inputs must keep: the axes that the others or the output have."""
    outside = {n for i, a in enumerate(op.dom) if i not in some for n in a.names} | set(op.cod[0].names)
    names = dict.fromkeys(n for i in sorted(some) for n in op.dom[i].names)
    return Array(tuple(axes[n] for n in names if n in outside))


def _joined(
    op: Op,
    axes: dict[str, Axis],
    best: dict[frozenset[int], tuple[int, Any]],
    some: frozenset[int],
    half: frozenset[int],
) -> tuple[int, Any]:
    other = some - half
    dom = tuple(op.dom[min(s)] if len(s) == 1 else _array(op, axes, s) for s in (half, other))
    step = flops(Op("einsum", dom, (_array(op, axes, some),)))
    return best[half][0] + best[other][0] + step, (half, other)


def _put(
    builder: Builder,
    op: Op,
    axes: dict[str, Axis],
    best: dict[frozenset[int], tuple[int, Any]],
    ins: Sequence[Wire],
    some: frozenset[int],
) -> Wire:
    if len(some) == 1:
        return ins[min(some)]
    half, other = best[some][1]
    parts = [_put(builder, op, axes, best, ins, s) for s in (half, other)]
    cod = op.cod[0] if len(some) == len(ins) else _array(op, axes, some)
    return builder.add(Op("einsum", tuple(w.array for w in parts), (cod,)), parts)[0]
