"""Rows of columns as shapes: boxes, the wires between them, their labels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from neuropil.interpret.diagrams.axes import Array
from neuropil.interpret.diagrams.core import Diagram
from neuropil.interpret.diagrams.items import Item, Ports, wire
from neuropil.interpret.diagrams.rows import BEND, Column, Row, Slot, axis_label, bent, label_room
from neuropil.interpret.diagrams.shapes import Dot, Group, Label, Path, Shape, moved

TAIL = 14.0  # room at the end


def painted(diagram: Diagram, rows: list[Row]) -> Item:
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
    return column.x + column.width + (TAIL if last else label_room(diagram, column) + 20.0)


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
                shapes += _straight(diagram, slot, slot.ins, slot.item.ins, column.x, wide)
        else:
            shapes += _row_end(diagram, column)
    return shapes


def _paint_slot(diagram: Diagram, column: Column, slot: Slot) -> list[Shape]:
    """The glyph in the middle of its column, its wires drawn on to both sides."""
    glyph = slot.item
    begin, end = column.x, column.x + column.width
    if slot.passing and column.width:
        return _straight(diagram, slot, slot.ins, glyph.ins, begin, end)
    left = begin + (column.width - glyph.width) / 2
    shapes: list[Shape] = []
    if left > begin:
        shapes += _straight(diagram, slot, slot.ins, glyph.ins, begin, left)
        shapes += _straight(diagram, slot, slot.outs, glyph.outs, left + glyph.width, end)
    inside = tuple(moved(shape, left, slot.y) for shape in glyph.shapes)
    if not inside:
        return shapes
    return [*shapes, Group(inside, glyph.module, glyph.title)] if glyph.title else [*shapes, *inside]


def _straight(
    diagram: Diagram, slot: Slot, wires: Sequence[int], ports: Ports, begin: float, end: float
) -> list[Shape]:
    """The wires of arrays between two places at the heights of their ports."""
    return [
        wire([(begin, slot.y + y), (end, slot.y + y)], diagram.wires[w], n)
        for w, ys in zip(wires, ports, strict=True)
        for n, y in enumerate(ys)
    ]


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
    room = label_room(diagram, before)
    begin = before.x + before.width
    lead = begin + (room + 8.0 if room else 0.0)
    start = before.sources()
    shapes: list[Shape] = []
    for w in before.labelled():
        shapes += [_label(diagram.wires[w], n, begin, y) for n, y in enumerate(start[w])]
    turn, end = (lead + BEND if bent(before, column) else lead), column.x
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


def _label(a: Array, number: int, x: float, y: float) -> Label:
    text, more = axis_label(a, number)
    return Label(x + 5.0, y - 3.0, text, "axis", "start", more)


def _crossing(pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether any two of these wires cross: their order on the left is not that on the right."""
    by_end = [a for a, _ in sorted(pairs, key=lambda pair: pair[1])]
    return any(a > b + 0.5 for a, b in pairwise(by_end))


def _row_end(diagram: Diagram, column: Column) -> list[Shape]:
    """A row that goes on below: its wires named and ended by an arrow."""
    shapes: list[Shape] = []
    room = label_room(diagram, column)
    begin = column.x + column.width
    named = set(column.labelled())
    for w, ys in column.sources().items():
        for n, y in enumerate(ys):
            shapes.append(wire([(begin, y), (begin + room + 10.0, y)], diagram.wires[w], n))
            shapes.append(Label(begin + room + 12.0, y + 4.0, "›", "axis", "start"))
            if w in named:
                shapes.append(_label(diagram.wires[w], n, begin, y))
    return shapes
