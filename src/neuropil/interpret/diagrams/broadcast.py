"""Broadcasting: a diagram over one axis more, $(G_c X)[:, j] = G(X[:, j])$ for every index j of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from neuropil.interpret.diagrams.axes import Axis, DiagramError, array
from neuropil.interpret.diagrams.core import Builder, Diagram, Op


def broadcast(diagram: Diagram, new: str | Axis, carried: Sequence[bool] | None, at: int) -> Diagram:
    """See `Diagram.lift`."""
    new = array(new).axes[0] if isinstance(new, str) else new
    yes = [True] * len(diagram.inputs) if carried is None else list(carried)
    if len(yes) != len(diagram.inputs):
        raise DiagramError(f"carried has {len(yes)} entries for {len(diagram.inputs)} inputs")
    builder = Builder([a.with_axis(new, at) if on else a for a, on in zip(diagram.inputs, yes, strict=True)])
    wires = list(builder.inputs)
    for step in diagram.steps:
        on = [yes[i] for i in step.ins]
        op = _lifted(step.op, new, on, at) if any(on) else step.op
        wires += builder.add(op, [wires[i] for i in step.ins])
        yes += [new.name in a.names for a in op.cod]
    return builder.finish([wires[i] for i in diagram.outputs])


def _lifted(op: Op, new: Axis, carried: Sequence[bool], at: int) -> Op:
    """One box over one axis more, carried by some of its inputs."""
    if any(new.name in a.names for a in (*op.dom, *op.cod)):
        raise DiagramError(f"{op.name or op.kind} cannot be broadcast over {new.name!r}, which it has; rename it")
    if op.kind in ("aten", "opaque", "vjp") or (op.kind == "concat" and not all(carried)):
        raise DiagramError(f"{op.name or op.kind} cannot be broadcast over {new.name!r}: no rule for it")
    dom = tuple(a.with_axis(new, at) if on else a for a, on in zip(op.dom, carried, strict=True))
    if op.body is not None:
        body = broadcast(op.body, new, carried, at)
        return dataclasses.replace(op, dom=dom, cod=body.cod, body=body)
    cod = tuple(a.with_axis(new, at) for a in op.cod)
    # An einsum has no inside: all its axes are alike.
    over = () if op.kind == "einsum" else tuple(sorted({*op.over, new.name}))
    return dataclasses.replace(op, dom=dom, cod=cod, over=over)
