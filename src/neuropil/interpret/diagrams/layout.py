"""Where everything stands: columns of boxes from left to right, wires between them, rows when a line is full.

A column is a set of boxes that run at one time, and the arrays that wait. Between two columns wires go on straight,
branch (a copy) or change places (a swap); they cross nowhere else. A row that is full ends, and the next begins
with the arrays that are alive, named again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from neuropil.interpret.diagrams.axes import Array
from neuropil.interpret.diagrams.core import Diagram, Op, Step, join
from neuropil.interpret.diagrams.items import GAP, Item, fence, item, through, wire, written
from neuropil.interpret.diagrams.shapes import Dot, Drawing, Group, Label, Path, Shape, moved, width

BEND, LEAD, TAIL = 40.0, 12.0, 14.0  # room for wires that bend, before a box, and at the end


ROW_END = 60.0  # room for the labels of wires that go on in the next row


@dataclass
class Slot:
    """One box or waiting array in a column: the wires it reads and writes, and its height on the page."""

    item: Item
    ins: list[int]
    outs: list[int]
    key: float = 0.0
    y: float = 0.0
    passing: bool = False


@dataclass
class Column:
    slots: list[Slot]
    x: float = 0.0
    width: float = 0.0
    named: bool = True  # whether the arrays that leave it are labelled


@dataclass
class Row:
    columns: list[Column] = field(default_factory=list)


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
    rows = _rows(diagram, columns, room, depth)
    return _paint(diagram, rows, depth)


# ------------------------------------------------------------------------------------------------------------ columns


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


# --------------------------------------------------------------------------------------------------------------- rows


def _rows(diagram: Diagram, columns: list[Column], room: float, depth: int) -> list[Row]:
    """Heights of all slots, and columns broken into rows where the room is full."""
    rows = [Row()]
    for number, column in enumerate(columns):
        column.width = max((slot.item.width for slot in column.slots), default=0.0)
        row = rows[-1]
        if row.columns:
            before = row.columns[-1]
            _settle(before, column)
            x = before.x + before.width + _between(diagram, before, column, depth)
            if x + column.width + ROW_END > room and len(row.columns) > 1 and number < len(columns) - 1:
                again = Column(
                    [Slot(through(diagram.wires[w], enters=False), [], [w]) for s in before.slots for w in s.outs]
                )
                _settle(None, again)
                rows.append(Row([again]))
                _settle(again, column)
                x = _between(diagram, again, column, depth)
                row = rows[-1]
            column.x = x
        else:
            _settle(None, column)
        row.columns.append(column)
    return rows


def _sources(column: Column) -> dict[int, list[float]]:
    """The heights at which each wire leaves a column."""
    return {
        w: [slot.y + y for y in ys] for slot in column.slots for w, ys in zip(slot.outs, slot.item.outs, strict=True)
    }


def _settle(before: Column | None, column: Column) -> None:
    """Heights as near to where the wires come from as the order and the gaps allow (least squares)."""
    if not column.slots:
        return
    start = _sources(before) if before else {}
    wanted, offset = [], 0.0
    for slot in column.slots:
        moves = [
            start[w][n] - y
            for w, ys in zip(slot.ins, slot.item.ins, strict=True)
            for n, y in enumerate(ys)
            if w in start
        ]
        wanted.append((sum(moves) / len(moves) if moves else None, offset))
        offset += slot.item.height + GAP
    known = [at - off for at, off in wanted if at is not None]
    blocks: list[list[float]] = []  # sum, count: pooled neighbours that push each other
    spans: list[int] = []
    fallback = known[0] if known else 0.0
    for at, off in wanted:
        value = fallback if at is None else at - off
        fallback = value
        blocks.append([value, 1.0])
        spans.append(1)
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
            more = spans.pop()
            spans[-1] += more
    levels = [b[0] / b[1] for b, n in zip(blocks, spans, strict=True) for _ in range(n)]
    for slot, level, (_, off) in zip(column.slots, levels, wanted, strict=True):
        slot.y = level + off


def _labelled(column: Column) -> list[int]:
    """The wires that get a label after this column: those that are new in it."""
    return [w for slot in column.slots for w in slot.outs if not slot.passing] if column.named else []


def _name(a: Array, number: int) -> tuple[str, str]:
    if not a.axes:
        return "1", ""
    one = a.axes[number]
    size = "" if one.free else written(one.size)
    return one.name, "" if one.name.endswith(size) else size


def _label_room(diagram: Diagram, column: Column) -> float:
    names = [_name(diagram.wires[w], n) for w in _labelled(column) for n in range(max(1, len(diagram.wires[w].axes)))]
    return max((width(f"{text} {more}" if more else text, "axis") for text, more in names), default=0.0)


def _bent(before: Column, column: Column) -> bool:
    start = _sources(before)
    seen: set[int] = set()
    for slot in column.slots:
        for w, ys in zip(slot.ins, slot.item.ins, strict=True):
            if w in seen or any(abs(a - b - slot.y) > 0.5 for a, b in zip(start[w], ys, strict=True)):
                return True
            seen.add(w)
    return False


def _between(diagram: Diagram, before: Column, column: Column, depth: int) -> float:
    room = _label_room(diagram, before)
    bend = BEND if _bent(before, column) else 0.0
    return (room + 8.0 if room else 0.0) + bend + LEAD


# -------------------------------------------------------------------------------------------------------------- paint


def _paint(diagram: Diagram, rows: list[Row], depth: int) -> Item:
    """All rows below one another, as one glyph with the ports of the inputs and the outputs."""
    shapes: list[Shape] = []
    wide = max(_end(diagram, row, row is rows[-1]) for row in rows)
    top, ins, outs = 0.0, [], []
    for number, row in enumerate(rows):
        low = min((s.y for c in row.columns for s in c.slots), default=0.0)
        high = max((s.y + s.item.height for c in row.columns for s in c.slots), default=0.0)
        for column in row.columns:
            for slot in column.slots:
                slot.y += top - low
        last = number == len(rows) - 1
        shapes += _paint_row(diagram, row, wide, last)
        if number == 0:
            ins = [[s.y + y for y in s.item.outs[0]] for s in row.columns[0].slots]
        if last:
            outs = [[s.y + y for y in s.item.ins[0]] for s in row.columns[-1].slots]
        top += high - low + 30.0
    return Item(wide, max(top - 30.0, 1.0), ins, outs, shapes)


def _end(diagram: Diagram, row: Row, last: bool) -> float:
    column = row.columns[-1]
    return column.x + column.width + (TAIL if last else _label_room(diagram, column) + 20.0)


def _paint_row(diagram: Diagram, row: Row, wide: float, last: bool) -> list[Shape]:
    shapes: list[Shape] = []
    for number, column in enumerate(row.columns):
        for slot in column.slots:
            shapes += _paint_slot(diagram, column, slot)
        shapes += _separators(column)
        if number + 1 < len(row.columns):
            shapes += _join(diagram, column, row.columns[number + 1])
        elif last:
            for slot in column.slots:
                a = diagram.wires[slot.ins[0]] if slot.ins else None
                for n, y in enumerate(slot.item.ins[0] if a else []):
                    if a is not None and wide > column.x:
                        shapes.append(wire([(column.x, slot.y + y), (wide, slot.y + y)], a, n))
        else:
            shapes += _row_end(diagram, column)
    return shapes


def _paint_slot(diagram: Diagram, column: Column, slot: Slot) -> list[Shape]:
    """The glyph in the middle of its column, its wires drawn on to both sides."""
    glyph = slot.item
    left = column.x + (column.width - glyph.width) / 2
    right = left + glyph.width
    shapes: list[Shape] = []
    if slot.passing and column.width:
        a = diagram.wires[slot.ins[0]]
        return [
            wire([(column.x, slot.y + y), (column.x + column.width, slot.y + y)], a, n)
            for n, y in enumerate(glyph.ins[0])
        ]
    if left > column.x:
        for w, ys in zip(slot.ins, glyph.ins, strict=True):
            shapes += [
                wire([(column.x, slot.y + y), (left, slot.y + y)], diagram.wires[w], n) for n, y in enumerate(ys)
            ]
        for w, ys in zip(slot.outs, glyph.outs, strict=True):
            end = column.x + column.width
            shapes += [wire([(right, slot.y + y), (end, slot.y + y)], diagram.wires[w], n) for n, y in enumerate(ys)]
    inside = tuple(moved(shape, left, slot.y) for shape in glyph.shapes)
    if not inside:
        return shapes
    return [*shapes, Group(inside, glyph.module, glyph.title)] if glyph.title else [*shapes, *inside]


def _separators(column: Column) -> list[Shape]:
    """Dashed lines between the arrays of a tuple, beside the boxes of the column."""
    shapes: list[Shape] = []
    if column.width:
        for a, b in pairwise(column.slots):
            y = (a.y + a.item.height + b.y) / 2
            shapes.append(Path(((column.x, y), (column.x + column.width, y)), "separator"))
    return shapes


def _join(diagram: Diagram, before: Column, column: Column) -> list[Shape]:
    """Labels of new arrays, then the wires to the next column: straight, branching or swapped."""
    room = _label_room(diagram, before)
    begin = before.x + before.width
    lead = begin + (room + 8.0 if room else 0.0)
    start = _sources(before)
    shapes: list[Shape] = []
    for w in _labelled(before):
        for n, y in enumerate(start[w]):
            text, more = _name(diagram.wires[w], n)
            shapes.append(Label(begin + 5.0, y - 3.0, text, "axis", "start", more))
    bent = _bent(before, column)
    turn, end = (lead + BEND if bent else lead), column.x
    targets = [
        (w, n, slot.y + y)
        for slot in column.slots
        for w, ys in zip(slot.ins, slot.item.ins, strict=True)
        for n, y in enumerate(ys)
    ]
    swap = _crossing([(start[w][n], y) for w, n, y in targets])
    drawn: set[tuple[int, int]] = set()
    for w, n, y in targets:
        a, from_y = diagram.wires[w], start[w][n]
        if (w, n) not in drawn and lead > begin:
            shapes.append(wire([(begin, from_y), (lead, from_y)], a, n))
        elif (w, n) in drawn:
            shapes.append(Dot(lead, from_y))
        drawn.add((w, n))
        line = wire([(lead, from_y), (turn, y)], a, n, curved=abs(from_y - y) > 0.5)
        if turn > lead:
            shapes.append(Path(line.points, line.style, line.axis, line.curved, swap))
        shapes.append(wire([(turn, y), (end, y)], a, n))
    return shapes


def _crossing(pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether any two of these wires cross: their order on the left is not that on the right."""
    by_end = [a for a, _ in sorted(pairs, key=lambda pair: pair[1])]
    return any(a > b + 0.5 for a, b in pairwise(by_end))


def _row_end(diagram: Diagram, column: Column) -> list[Shape]:
    """A row that goes on below: its wires named and ended by an arrow."""
    shapes: list[Shape] = []
    room = _label_room(diagram, column)
    begin = column.x + column.width
    named = set(_labelled(column))
    for w, ys in _sources(column).items():
        for n, y in enumerate(ys):
            shapes.append(wire([(begin, y), (begin + room + 10.0, y)], diagram.wires[w], n))
            shapes.append(Label(begin + room + 12.0, y + 4.0, "›", "axis", "start"))
            if w in named:
                text, more = _name(diagram.wires[w], n)
                shapes.append(Label(begin + 5.0, y - 3.0, text, "axis", "start", more))
    return shapes
