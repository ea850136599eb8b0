"""Where the columns stand: the heights of their boxes, the room between them, and rows when a line is full.

A row that is full ends, and the next begins with the arrays that are alive, named again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from neuropil.interpret.diagrams.axes import Array
from neuropil.interpret.diagrams.core import Diagram
from neuropil.interpret.diagrams.items import GAP, Item, through, written
from neuropil.interpret.diagrams.shapes import width

BEND, LEAD = 40.0, 12.0  # room for wires that bend, and before a box
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

    def sources(self) -> dict[int, list[float]]:
        """The heights at which each wire leaves."""
        pairs = ((slot, w, ys) for slot in self.slots for w, ys in zip(slot.outs, slot.item.outs, strict=True))
        return {w: [slot.y + y for y in ys] for slot, w, ys in pairs}

    def labelled(self) -> list[int]:
        """The wires that get a label behind the column: those that are new in it."""
        return [w for slot in self.slots for w in slot.outs if not slot.passing] if self.named else []


@dataclass
class Row:
    columns: list[Column] = field(default_factory=list)


def broken(diagram: Diagram, columns: list[Column], room: float) -> list[Row]:
    """Heights of all slots, and columns broken into rows where the room is full."""
    rows = [Row()]
    for number, column in enumerate(columns):
        column.width = max((slot.item.width for slot in column.slots), default=0.0)
        row = rows[-1]
        if row.columns:
            before = row.columns[-1]
            _settle(before, column)
            x = before.x + before.width + _between(diagram, before, column)
            if x + column.width + ROW_END > room and len(row.columns) > 1 and number < len(columns) - 1:
                again = Column(
                    [Slot(through(diagram.wires[w], enters=False), [], [w]) for s in before.slots for w in s.outs]
                )
                _settle(None, again)
                rows.append(Row([again]))
                _settle(again, column)
                x = _between(diagram, again, column)
                row = rows[-1]
            column.x = x
        else:
            _settle(None, column)
        row.columns.append(column)
    return rows


def _settle(before: Column | None, column: Column) -> None:
    """Heights as near to where the wires come from as the order and the gaps allow (least squares)."""
    if not column.slots:
        return
    start = before.sources() if before else {}
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


def axis_label(a: Array, number: int) -> tuple[str, str]:
    """What stands on a wire: the name of its axis, and its size if the name does not end in it."""
    if not a.axes:
        return "1", ""
    one = a.axes[number]
    size = "" if one.free else written(one.size)
    return one.name, "" if one.name.endswith(size) else size


def label_room(diagram: Diagram, column: Column) -> float:
    """The width of the widest label behind a column."""
    names = [
        axis_label(diagram.wires[w], n) for w in column.labelled() for n in range(max(1, len(diagram.wires[w].axes)))
    ]
    return max((width(f"{text} {more}" if more else text, "axis") for text, more in names), default=0.0)


def bent(before: Column, column: Column) -> bool:
    """Whether any wire between two columns branches or does not go on straight."""
    start = before.sources()
    seen: set[int] = set()
    for slot in column.slots:
        for w, ys in zip(slot.ins, slot.item.ins, strict=True):
            if w in seen or any(abs(a - b - slot.y) > 0.5 for a, b in zip(start[w], ys, strict=True)):
                return True
            seen.add(w)
    return False


def _between(diagram: Diagram, before: Column, column: Column) -> float:
    room = label_room(diagram, before)
    bend = BEND if bent(before, column) else 0.0
    return (room + 8.0 if room else 0.0) + bend + LEAD
