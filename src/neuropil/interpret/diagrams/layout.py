"""A diagram as columns of boxes from left to right, level by level of its blocks.

A column is a set of boxes that run at one time, and the arrays that wait. Between two columns wires go on straight,
branch (a copy) or change places (a swap); they cross nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from neuropil.interpret.diagrams.core import Diagram, Op, Step, join
from neuropil.interpret.diagrams.items import Item, fence, item, through
from neuropil.interpret.diagrams.paint import painted
from neuropil.interpret.diagrams.rows import Column, Slot, broken
from neuropil.interpret.diagrams.shapes import Drawing, Path, moved


def draw(diagram: Diagram, opened: Callable[[str, int], bool], max_width: float = 1100.0) -> Drawing:
    """The drawing of a diagram; `opened(dotted name, depth)` says which blocks show their inside."""
    whole = _level(diagram, "", 0, opened, max_width)
    pad = 16.0
    shapes = tuple(moved(shape, pad, pad) for shape in whole.shapes)
    drawing = Drawing(whole.width + 2 * pad, whole.height + 2 * pad, shapes)
    axes = dict.fromkeys(s.axis for s in drawing.walk() if isinstance(s, Path) and s.axis)
    return Drawing(drawing.width, drawing.height, shapes, tuple(axes))


def _level(diagram: Diagram, path: str, depth: int, opened: Callable[[str, int], bool], room: float) -> Item:
    columns = _columns(diagram, path, depth, opened, room)
    return painted(diagram, broken(diagram, columns, room))


def _columns(diagram: Diagram, path: str, depth: int, opened: Callable[[str, int], bool], room: float) -> list[Column]:
    absorbed, left = _absorbed(diagram)
    uses: dict[int, int] = {}
    for step in left:
        for i in step.ins:
            uses[i] = uses.get(i, 0) + 1
    for i in diagram.outputs:
        uses[i] = uses.get(i, 0) + 1
    live = list(range(len(diagram.inputs)))
    columns = [Column([Slot(through(diagram.wires[i], enters=False), [], [i]) for i in live])]
    while left:
        chosen = _ready(left, set(live), absorbed)
        place = {w: float(n) for n, w in enumerate(live)}
        slots = []
        for step in chosen:
            ins = [i for i in step.ins if i not in absorbed]
            if step.op.kind in ("elementwise", "aten") and step.op.name in ("add", "mul"):
                ins.sort(key=place.__getitem__)
            glyph = _glyph(diagram, step, ins, absorbed, path, depth, opened, room)
            key = sum(place[i] for i in ins) / len(ins) if ins else _where(diagram, step, place)
            slots.append(Slot(glyph, ins, list(step.outs), key))
            for i in step.ins:
                uses[i] = uses.get(i, 0) - 1
        waiting = [w for w in live if uses.get(w, 0) > 0]
        slots += [Slot(through(diagram.wires[w]), [w], [w], place[w] - 0.25, passing=True) for w in waiting]
        slots.sort(key=lambda slot: slot.key)
        columns.append(Column(slots))
        live = [w for slot in slots for w in slot.outs]
        left = [s for s in left if s not in chosen]
    ends = [Slot(through(diagram.wires[w], leaves=False), [w], []) for w in diagram.outputs]
    return [*columns, Column(ends, named=False)]


def shows(op: Op) -> bool:
    """Whether a block is worth opening: one box alone says no more than the block."""
    inside = [] if op.body is None else [s.op for s in op.body.steps if s.op.kind != "weight"]
    return not op.option("group") and (len(inside) > 1 or any(o.body is not None for o in inside))


def _absorbed(diagram: Diagram) -> tuple[dict[int, Step], list[Step]]:
    """Weights that are drawn inside the one box that reads them, and the steps that are left."""
    readers: dict[int, list[Step]] = {}
    for step in diagram.steps:
        for i in step.ins:
            readers.setdefault(i, []).append(step)
    weights = {s.outs[0]: s for s in diagram.steps if s.op.kind == "weight"}
    inside = {
        wire_: step
        for wire_, step in weights.items()
        if wire_ not in diagram.outputs
        and all(any(i not in weights for i in reader.ins) for reader in readers.get(wire_, []))
    }
    return inside, [s for s in diagram.steps if not (s.outs and s.outs[0] in inside)]


def _ready(left: Sequence[Step], live: set[int], absorbed: dict[int, Step]) -> list[Step]:
    """The steps that can run now; boxes without inputs wait until their reader could run but for them."""

    def needs(step: Step) -> set[int]:
        return {i for i in step.ins if i not in absorbed} - live

    sources = {s.outs[0]: s for s in left if not {i for i in s.ins if i not in absorbed} and s.outs}
    chosen = [s for s in left if not needs(s) and s.outs[0] not in sources]
    wanted = {w for s in left if (missing := needs(s)) and missing <= sources.keys() for w in missing}
    return [*chosen, *(s for w, s in sources.items() if w in wanted or not chosen)]


def _where(diagram: Diagram, step: Step, place: dict[int, float]) -> float:
    """The height of a box without inputs: beside what its reader reads."""
    reader = next((s for s in diagram.steps if step.outs[0] in s.ins), None)
    near = [] if reader is None else [(i, place[i]) for i in reader.ins if i in place]
    if not near or reader is None:
        return float(len(place))
    after = [p for i, p in near if reader.ins.index(i) < reader.ins.index(step.outs[0])]
    return max(after) + 0.4 if after else min(p for _, p in near) - 0.4


def _glyph(
    diagram: Diagram,
    step: Step,
    ins: Sequence[int],
    absorbed: dict[int, Step],
    path: str,
    depth: int,
    opened: Callable[[str, int], bool],
    room: float,
) -> Item:
    op, dom = step.op, [diagram.wires[i] for i in ins]
    module = path if op.option("group") or op.kind not in ("block", "opaque") else join(path, op.name)
    if op.body is not None and shows(op) and opened(module, depth + 1):
        return fence(op, _level(op.body, module, depth + 1, opened, max(room - 110.0, 320.0)), module)
    return item(op, [absorbed[i].op for i in step.ins if i in absorbed], dom, module)
