r"""Backpropagation as a diagram: every box has its reverse, wires run back, and what a reverse box reads is carried
along.

A linear map reverses to its transpose and needs no value; an elementwise $f$ multiplies by $f'(x)$; a softmax with
value $y$ gives $y (\dot y - \langle y, \dot y \rangle)$; a copy becomes a sum, a sum a copy. An axis that a box is
broadcast over is broadcast over in reverse, and summed for what does not have it: so the gradient of shared weights
is a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from neuropil.interpret.diagrams.axes import Array, DiagramError
from neuropil.interpret.diagrams.core import Builder, Diagram, Op, Step, Wire
from neuropil.interpret.diagrams.functions import FUNCTIONS, reads

Gradients = list[Wire | None]


def backward(diagram: Diagram) -> Diagram:
    """From the inputs and the gradients of the outputs to the gradients of the inputs, then of the weights.

    Weights come in the order of `weights_of(diagram.flat())`, those that are not trained left out; inputs of
    indices have no gradient.
    """
    builder, ends = _recorded(diagram.flat())
    return builder.finish(ends)


def saved(diagram: Diagram) -> list[Array]:
    """The arrays, weights and constants aside, that the reverse boxes read: the memory of training."""
    flat = diagram.flat()
    builder, ends = _recorded(flat)
    count, gradients = len(flat.inputs), len(flat.cod)
    first = len(flat.wires) + gradients  # wires below are of the forward pass
    forward = {i for i in range(first) if not count <= i < count + gradients}
    for step in builder.steps[: len(flat.steps)]:
        if step.op.kind in ("weight", "constant"):
            forward -= set(step.outs)
    needed, read = {w.number for w in ends}, set()
    for step in reversed(builder.steps[len(flat.steps) :]):
        if needed.intersection(step.outs):
            needed.update(step.ins)
            read.update(forward.intersection(step.ins))
    return [builder.arrays[i] for i in sorted(read)]


def _recorded(flat: Diagram) -> tuple[Builder, list[Wire]]:
    """The forward steps, then the reverse steps, and the gradients asked for."""
    builder = Builder((*flat.inputs, *flat.cod))
    wires = list(builder.inputs[: len(flat.inputs)])
    for step in flat.steps:
        wires += builder.add(step.op, [wires[i] for i in step.ins])
    sums: dict[int, Wire] = {}

    def give(place: int, gradient: Wire | None) -> None:
        if gradient is not None:
            sums[place] = _plus(builder, sums[place], gradient) if place in sums else gradient

    for place, gradient in zip(flat.outputs, builder.inputs[len(flat.inputs) :], strict=True):
        give(place, gradient)
    for step in reversed(flat.steps):
        if step.ins and any(i in sums for i in step.outs):
            for place, back in zip(step.ins, _reverse(builder, step, wires, sums), strict=True):
                give(place, back)
    ends = [sums[i] if i in sums else _zeros(builder, a) for i, a in enumerate(flat.inputs) if a.dtype == "float"]
    shared: dict[str, list[Wire]] = {}
    arrays: dict[str, Array] = {}
    for step in flat.steps:
        if step.op.kind == "weight" and step.op.option("trainable", True):
            arrays[step.op.name] = step.op.cod[0]
            shared.setdefault(step.op.name, []).extend([sums[step.outs[0]]] if step.outs[0] in sums else [])
    for name, parts in shared.items():
        whole = parts[0] if parts else _zeros(builder, arrays[name])
        for part in parts[1:]:
            whole = _plus(builder, whole, part)
        ends.append(whole)
    return builder, ends


def _plus(builder: Builder, a: Wire, b: Wire) -> Wire:
    over = tuple(sorted(a.array.names))
    return builder.add(Op("elementwise", (a.array, b.array), (a.array,), over, (("name", "add"),)), [a, b])[0]


def _zeros(builder: Builder, a: Array) -> Wire:
    return builder.add(Op("constant", (), (a,), (), (("name", "full"), ("number", 0.0))), [])[0]


def _ones(builder: Builder, a: Array) -> Wire:
    return builder.add(Op("constant", (), (a,), (), (("name", "full"), ("number", 1.0))), [])[0]


def _reverse(builder: Builder, step: Step, wires: Sequence[Wire], sums: dict[int, Wire]) -> Gradients:
    ins, outs = [wires[i] for i in step.ins], [wires[i] for i in step.outs]
    if step.op.kind in RULES and (step.op.kind != "elementwise" or step.op.name in FUNCTIONS):
        return RULES[step.op.kind](builder, step.op, ins, outs[0], sums[step.outs[0]])
    if step.op.kind in ("aten", "opaque", "box"):
        gradients = [sums[i] if i in sums else _zeros(builder, wires[i].array) for i in step.outs]
        return _by_vjp(builder, step.op, ins, gradients)
    raise DiagramError(f"no rule for the gradient of a box {step.op.name or step.op.kind!r}")


def _einsum(builder: Builder, op: Op, ins: Sequence[Wire], y: Wire, g: Wire) -> Gradients:
    out: Gradients = []
    for number, a in enumerate(op.dom):
        others = [w for i, w in enumerate(ins) if i != number]
        known = {n for w in (g, *others) for n in w.array.names}
        lost = Array(tuple(one for one in a.axes if one.name not in known))
        read = [g, *others, *([_ones(builder, lost)] if lost.axes else [])]
        out.append(_linear(builder, read, a))
    return out


def _linear(builder: Builder, read: Sequence[Wire], to: Array) -> Wire:
    """An einsum, and no box at all where it would change nothing."""
    if len(read) == 1 and read[0].array == to:
        return read[0]
    return builder.add(Op("einsum", tuple(w.array for w in read), (to,)), list(read))[0]


def _elementwise(builder: Builder, op: Op, ins: Sequence[Wire], y: Wire, g: Wire) -> Gradients:
    out: Gradients = []
    for number, a in enumerate(op.dom):
        gradient = g
        if FUNCTIONS[op.name].slopes[number] != "{g}":
            read = [{"0": ins[0], "1": ins[-1], "y": y}[key] for key in reads(op.name, number)]
            options = (("name", f"{op.name}'{number}"), *(o for o in op.options if o[0] != "name"))
            dom = tuple(w.array for w in (*read, g))
            gradient = builder.add(Op("elementwise", dom, op.cod, op.over, options), [*read, g])[0]
        out.append(_linear(builder, [gradient], a))
    return out


def _softmax(builder: Builder, op: Op, ins: Sequence[Wire], y: Wire, g: Wire) -> Gradients:
    made = Op("softmax'", (y.array, g.array), op.dom, op.over, op.options)
    return list(builder.add(made, [y, g]))


def _max(builder: Builder, op: Op, ins: Sequence[Wire], y: Wire, g: Wire) -> Gradients:
    return list(builder.add(Op("max'", (op.dom[0], g.array), op.dom, op.over, op.options), [ins[0], g]))


def _adjoint(builder: Builder, op: Op, ins: Sequence[Wire], y: Wire, g: Wire) -> Gradients:
    kind = {"reindex": "scatter", "scatter": "reindex"}[op.kind]
    options = tuple((key, 0.0 if key == "fill" else value) for key, value in op.options)
    return list(builder.add(Op(kind, op.cod, op.dom, op.over, options), [g]))


def _concat(builder: Builder, op: Op, ins: Sequence[Wire], y: Wire, g: Wire) -> Gradients:
    axis, offset, out = op.option("axis"), 0, []
    for a, part in zip(op.dom, op.option("parts"), strict=True):
        options = (("name", "slice"), ("maps", ((axis, offset, ((part, 1),)),)), ("fill", 0.0))
        out += builder.add(Op("reindex", op.cod, (a,), op.over, options), [g])
        offset = offset + a[part].size
    return list(out)


def _lookup(builder: Builder, op: Op, ins: Sequence[Wire], y: Wire, g: Wire) -> Gradients:
    return [None, *builder.add(Op("lookup'", (op.dom[0], g.array), (op.dom[1],), op.over), [ins[0], g])]


def _by_vjp(builder: Builder, op: Op, ins: Sequence[Wire], gs: Sequence[Wire]) -> Gradients:
    floats = [a for a in op.dom if a.dtype == "float"]
    dom = (*op.dom, *(w.array for w in gs))
    over = tuple(n for n in op.over if all(n in a.names for a in floats))
    made = iter(
        builder.add(Op("vjp", dom, tuple(floats), over, (("name", f"reverse {op.name}"), ("of", op))), [*ins, *gs])
    )
    return [next(made) if a.dtype == "float" else None for a in op.dom]


RULES: dict[str, Callable[[Builder, Op, Sequence[Wire], Wire, Wire], Gradients]] = {
    "einsum": _einsum,
    "elementwise": _elementwise,
    "softmax": _softmax,
    "max": _max,
    "reindex": _adjoint,
    "scatter": _adjoint,
    "concat": _concat,
    "lookup": _lookup,
}
