"""A system as a drawing: boxes in boxes, wires between ports, drawn by `neuropil.interpret.diagrams`.

>>> from neuropil.interpret.nested import Real, System, integrator
>>> tank = System({"tank": integrator(Real())}, [("in", "tank"), ("tank", "out")], name="plant")
>>> picture = svg(tank)
>>> picture[:4], ">tank<" in picture
('<svg', True)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from neuropil.interpret.diagrams.shapes import Dot, Drawing, Group, Label, Path, Rect, Shape, moved, width
from neuropil.interpret.diagrams.svg import render
from neuropil.interpret.nested.machines import Beside, Machine, Wrapped
from neuropil.interpret.nested.organisations import Chain, Constant, Organisation, Tensored
from neuropil.interpret.nested.plastic import Plastic
from neuropil.interpret.nested.show import tree
from neuropil.interpret.nested.spaces import Product
from neuropil.interpret.nested.system import NestedSystem, System
from neuropil.interpret.nested.wiring import End, Function, ports

PORT, HEAD, PAD, TRACK, ALIKE = 20.0, 38.0, 14.0, 9.0, 6


@dataclass(frozen=True)
class Glyph:
    """Shapes from (0, 0) to (width, height), and the heights of the ports on the left and on the right side."""

    width: float
    height: float
    shapes: tuple[Shape, ...]
    ins: dict[Any, float] = field(default_factory=dict)
    outs: dict[Any, float] = field(default_factory=dict)


def svg(system: Machine | NestedSystem, depth: int = 4, palette: str = "light", title: str = "") -> str:
    """The system as SVG text: boxes opened `depth` levels deep; `palette` as in `neuropil.interpret.diagrams`.

    Wires that learn, and learners, have thick frames; functions round ends; an organisation has two lines on each side,
    values to the right above, requests to the left below.
    """
    machine = system.machine if isinstance(system, NestedSystem) else system
    whole = _glyph(machine, machine.name, depth)
    shapes = tuple(moved(shape, PAD, PAD) for shape in whole.shapes)
    drawing = Drawing(whole.width + 2 * PAD, whole.height + 2 * PAD, shapes)
    return render(drawing, palette, title or str(machine), tree(machine))


def _glyph(part: Any, label: str, depth: int) -> Glyph:
    if depth > 0 and isinstance(part, System):
        return _system(part, label, depth)
    if depth > 0 and isinstance(part, Chain):
        return _chain([_glyph(link, link.name, depth - 1) for link in part.links])
    if depth > 0 and isinstance(part, Tensored | Beside):
        return _stack(part, depth)
    if depth > 0 and isinstance(part, Wrapped):
        return _wrapped(part, depth)
    return _leaf(part, label)


# --- single boxes ------------------------------------------------------------------------------------


def _leaf(part: Any, label: str) -> Glyph:
    if isinstance(part, Organisation):
        return _synapse(part, label)
    ins = list(ports(part.inputs if isinstance(part, Function) else part.interface.in_))
    outs = list(ports(part.outputs if isinstance(part, Function) else part.interface.out))
    style = "pill" if isinstance(part, Function) else "box"
    names = [[("" if port is None else str(port)) for port in side] for side in (ins, outs)]
    wide = max(width(label, "title"), sum(max((width(n, "small") for n in side), default=0.0) for side in names) + 12)
    wide, high = wide + 20.0, HEAD - 14.0 + PORT * max(len(ins), len(outs), 1)
    places = [{port: HEAD - 6.0 + PORT * n for n, port in enumerate(side)} for side in (ins, outs)]
    shapes: list[Shape] = [Rect(0.0, 0.0, wide, high, style), Label(wide / 2, 16.0, label, "title")]
    for side, x, anchor in ((0, 5.0, "start"), (1, wide - 5.0, "end")):
        ends = zip(names[side], places[side].values(), strict=True)
        shapes += [Label(x, y + 3.5, name, "small", anchor) for name, y in ends if name]
    return Glyph(wide, high, (Group(tuple(shapes), label, str(part)),), *places)


def _synapse(part: Organisation, label: str) -> Glyph:
    """A box around other systems: values pass it to the right, requests to the left."""
    types = f"{_brief(part.source.out)} -> {_brief(part.target.out)}"
    label = label if len(label) < 40 else f"{label[:37]}..."
    wide = max(width(label, "title"), width(types, "small")) + 24.0
    style = "block" if isinstance(part, Constant) else "learned"
    shapes = (
        Rect(0.0, 0.0, wide, 52.0, style),
        Label(wide / 2, 22.0, label, "title"),
        Label(wide / 2, 38.0, types, "small"),
    )
    both = {"value": 16.0, "request": 36.0}
    return Glyph(wide, 52.0, (Group(shapes, label, str(part)),), both, both)


def _brief(space: Any) -> str:
    """A space, of many alike side by side only one and their number."""
    parts = list(space.parts.values()) if isinstance(space, Product) and not space.named else []
    return f"{len(parts)} x {parts[0]}" if len(parts) > 2 and len(set(map(str, parts))) == 1 else str(space)


# --- composites --------------------------------------------------------------------------------------


def _chain(links: list[Glyph]) -> Glyph:
    high, x, gap = max(link.height for link in links), 16.0, 26.0
    shapes: list[Shape] = []
    for link in links:
        top = (high - link.height) / 2
        shapes += [moved(shape, x, top) for shape in link.shapes]
        shapes += _two_way(x - gap if x > gap else 0.0, x, high / 2)
        x += link.width + gap
    shapes += _two_way(x - gap, x - 10.0, high / 2)
    both = {"value": high / 2 - 10.0, "request": high / 2 + 10.0}
    return Glyph(x - 10.0, high, tuple(shapes), both, both)


def _two_way(start: float, end: float, middle: float) -> list[Shape]:
    return [
        Path(((start, middle - 10.0), (end, middle - 10.0)), "wire"),
        Label(end - 1.0, middle - 6.6, "▸", "small", "end"),
        Path(((start, middle + 10.0), (end, middle + 10.0)), "unit"),
        Label(start + 1.0, middle + 13.4, "◂", "small", "start"),
    ]


def _stack(part: Tensored | Beside, depth: int) -> Glyph:
    """Parts below one another, in a frame; of many, the first two and the last."""
    items = list(part.parts.items())
    hidden = len(items) - 3 if len(items) > ALIKE else 0
    shown = items[:2] + items[-1:] if hidden else items
    glyphs = [_glyph(inner, inner.name if name.isdigit() else name, depth - 1) for name, inner in shown]
    wide = max(glyph.width for glyph in glyphs) + 2 * PAD
    shapes: list[Shape] = []
    ins: dict[Any, float] = {}
    outs: dict[Any, float] = {}
    y = PAD
    for number, (glyph, (name, _)) in enumerate(zip(glyphs, shown, strict=True)):
        if hidden and number == 2:
            shapes.append(Label(wide / 2, y + 8.0, f"... {hidden} more", "small"))
            y += 22.0
        shapes += [moved(shape, (wide - glyph.width) / 2, y) for shape in glyph.shapes]
        ins |= {(name, port): y + at for port, at in glyph.ins.items()}
        outs |= {(name, port): y + at for port, at in glyph.outs.items()}
        y += glyph.height + 12.0
    high = y - 12.0 + PAD
    return Glyph(wide, high, (Rect(0.0, 0.0, wide, high, "fence"), *shapes), ins, outs)


def _wrapped(part: Wrapped, depth: int) -> Glyph:
    """The inside within a frame that is the wiring around it."""
    inner = _glyph(part.inside, part.inside.name, depth - 1)
    name = part.around.name if len(part.around.name) < 60 else f"{part.around.name[:57]}..."
    wide = max(inner.width + 60.0, width(name, "title") + 24.0)
    left, high = (wide - inner.width) / 2, inner.height + HEAD + 10.0
    shapes: list[Shape] = [Rect(0.0, 0.0, wide, high, "learned" if part.dynamic else "fence")]
    shapes.append(Label(wide / 2, 16.0, name, "title"))
    shapes += [moved(shape, left, HEAD - 8.0) for shape in inner.shapes]
    middle = high / 2
    for y in inner.ins.values():
        shapes.append(Path(((0.0, middle), (left, y + HEAD - 8.0)), "wire", curved=True))
    for y in inner.outs.values():
        shapes.append(Path(((left + inner.width, y + HEAD - 8.0), (wide, middle)), "wire", curved=True))
    return Glyph(wide, high, tuple(shapes), {None: middle}, {None: middle})


# --- systems of boxes and wires ----------------------------------------------------------------------


def _system(system: System, label: str, depth: int) -> Glyph:
    """Boxes in columns, in the order in which signals reach them; a wire that goes back or far has a lane below."""
    around: Any = system.around
    learns = isinstance(around, Plastic)
    edges = [(a, b) for a, b, _ in around.edges] if learns else [(a, b) for b, a in around.plan.wires.items()]
    glyphs = {name: _glyph(box, name, depth - 1) for name, box in system.boxes.items()}
    columns = _columns(list(glyphs), edges)
    sheet = _Sheet(glyphs, columns, edges)
    title = f"{label}, wires: {around.rule.name}" if learns else label
    wide = max(sheet.wide, width(title, "title") + 24.0)
    shapes: list[Shape] = [
        Rect(0.0, 0.0, wide, sheet.high, "learned" if learns else "fence"),
        Label(12.0, 17.0, title, "title", "start"),
    ]
    shapes += sheet.shapes(wide)
    whole = Group(tuple(shapes), label, f"{label}: {system.interface}")
    return Glyph(wide, sheet.high, (whole,), sheet.outer("in"), sheet.outer("out"))


def _columns(names: list[str], edges: list[tuple[End, End]]) -> list[list[str]]:
    """Boxes by how far signals from outside have come when they reach them, loops cut where they close."""
    after: dict[str, list[str]] = {name: [] for name in names}
    for (start, _), (end, _) in edges:
        if start in after and end in after and end not in after[start]:
            after[start].append(end)
    first = [end for (start, _), (end, _) in edges if start == "in" and end in after]
    order: list[str] = []
    kept: set[tuple[str, str]] = set()
    _visit(list(dict.fromkeys(first + names)), after, order, kept)
    rank = dict.fromkeys(names, 0)
    for name in reversed(order):
        for end in after[name]:
            if (name, end) in kept:
                rank[end] = max(rank[end], rank[name] + 1)
    return [[n for n in names if rank[n] == level] for level in range(max(rank.values(), default=-1) + 1)]


def _visit(roots: Iterable[str], after: dict[str, list[str]], order: list[str], kept: set[tuple[str, str]]) -> None:
    """Depth first; `order` gets each box after all that follow it, `kept` the wires that close no loop."""
    state: dict[str, int] = {}

    def go(name: str) -> None:
        state[name] = 1
        for end in after[name]:
            if state.get(end) != 1:
                kept.add((name, end))
            if end not in state:
                go(end)
        state[name] = 2
        order.append(name)

    for root in roots:
        if root not in state:
            go(root)


class _Sheet:
    """Where boxes, ports and wires of one system stand. Column -1 is the left edge, the last one the right edge."""

    def __init__(self, glyphs: dict[str, Glyph], columns: list[list[str]], edges: list[tuple[End, End]]) -> None:
        self.glyphs, self.columns, self.edges = glyphs, columns, edges
        self.level = {name: n for n, column in enumerate(columns) for name in column} | {"in": -1, "out": len(columns)}
        self.ports = {side: self._outer_ports(side) for side in ("in", "out")}
        sources = list(dict.fromkeys(start for start, _ in edges))
        self.lanes = {s: n for n, s in enumerate(s for s in sources if any(self._far(e) for e in edges if e[0] == s))}
        self.tracks = self._tracks(sources)
        self._place()

    def outer(self, side: str) -> dict[Any, float]:
        return {port: self.at[side, port][1] for port in self.ports[side]}

    def shapes(self, wide: float) -> list[Shape]:
        found: list[Shape] = []
        for name, glyph in self.glyphs.items():
            found += [moved(shape, *self.corner[name]) for shape in glyph.shapes]
        for port in self.ports["in"]:
            if port is not None:
                found.append(Label(3.0, self.at["in", port][1] - 3.0, str(port), "small", "start"))
        for port in self.ports["out"]:
            self.end["out", port] = (wide, self.end["out", port][1])
            if port is not None:
                found.append(Label(wide - 9.0, self.end["out", port][1] - 3.0, str(port), "small", "end"))
        return found + self._wires()

    def _outer_ports(self, side: str) -> list[Any]:
        ends = [edge[0] if side == "in" else edge[1] for edge in self.edges]
        return list(dict.fromkeys(port for box, port in ends if box == side))

    def _far(self, edge: tuple[End, End]) -> bool:
        return self.level[edge[1][0]] != self.level[edge[0][0]] + 1

    def _tracks(self, sources: list[End]) -> dict[tuple[End, int], int]:
        """The upright pieces of each source's wires: in the gap before column n, the how-manieth."""
        found: dict[tuple[End, int], int] = {}
        count: dict[int, int] = {}
        for source in sources:
            mine = [edge for edge in self.edges if edge[0] == source]
            gaps = {self.level[source[0]] + 1} | {self.level[edge[1][0]] for edge in mine if self._far(edge)}
            for gap in sorted(gaps):
                found[source, gap] = count.get(gap, 0)
                count[gap] = count.get(gap, 0) + 1
        return found

    def _place(self) -> None:
        counts = [
            1 + max((n for (_, g), n in self.tracks.items() if g == gap), default=-1) for gap in range(self._last + 1)
        ]
        names = [
            max((width(str(p), "small") for p in self.ports[s] if p is not None), default=0.0) for s in ("in", "out")
        ]
        tops = self._tops()
        ends = [top + self.glyphs[name].height + 24.0 - HEAD for name, top in tops.items()]
        edge = PORT * max(len(self.ports["in"]), len(self.ports["out"]))
        body = max([*ends, edge, 20.0])
        self.corner: dict[str, tuple[float, float]] = {}
        self.gap: list[float] = []
        x = names[0] + 8.0
        for number, column in enumerate([*self.columns, []]):
            self.gap.append(x + 8.0)
            x += 16.0 + TRACK * counts[number]
            wide = max((self.glyphs[n].width for n in column), default=0.0)
            for name in column:
                self.corner[name] = (x + (wide - self.glyphs[name].width) / 2, tops[name])
            x += wide
        self.lane = HEAD + body
        self.wide, self.high = x + names[1] + 12.0, self.lane + TRACK * len(self.lanes) + 4.0
        self._port_places(body)

    def _tops(self) -> dict[str, float]:
        """The height at which each box begins: where the wires from the column before it run straight, or below."""
        tops: dict[str, float] = {}
        for column in self.columns:
            wish = {name: self._straight(name, tops) for name in column}
            y = HEAD - 8.0
            for name in sorted(column, key=lambda n: wish[n]):
                tops[name] = y = max(y, wish[name])
                y += self.glyphs[name].height + 16.0
        return tops

    def _straight(self, name: str, tops: dict[str, float]) -> float:
        near = [(s, e) for s, e in self.edges if e[0] == name and s[0] in tops and not self._far((s, e))]
        return max(
            (tops[s[0]] + self.glyphs[s[0]].outs[s[1]] - self.glyphs[name].ins[e[1]] for s, e in near), default=0.0
        )

    @property
    def _last(self) -> int:
        return len(self.columns)

    def _port_places(self, body: float) -> None:
        self.at: dict[End, tuple[float, float]] = {}
        self.end: dict[End, tuple[float, float]] = {}
        for name, glyph in self.glyphs.items():
            x, y = self.corner[name]
            self.end |= {(name, port): (x, y + at) for port, at in glyph.ins.items()}
            self.at |= {(name, port): (x + glyph.width, y + at) for port, at in glyph.outs.items()}
        for side in ("in", "out"):
            many = self.ports[side]
            for number, port in enumerate(many):
                y = HEAD - 8.0 + body / 2 + PORT * (number + 0.5 - len(many) / 2)
                y = y if side == "in" else self._free(y, port)
                (self.at if side == "in" else self.end)[side, port] = (0.0 if side == "in" else self.wide, y)
        self.at |= {("out", port): place for (side, port), place in list(self.end.items()) if side == "out"}

    def _free(self, y: float, port: Any) -> float:
        """`y`, or lower where an output of the last column that goes elsewhere would be run over."""
        own = {start for start, end in self.edges if end == ("out", port)}
        last = self.columns[-1] if self.columns else []
        taken = [at[1] for end, at in self.at.items() if end[0] in last and end not in own]
        while any(abs(y - other) < TRACK - 1.0 for other in taken):
            y += TRACK
        return y

    def _wires(self) -> list[Shape]:
        found: list[Shape] = []
        for source in dict.fromkeys(start for start, _ in self.edges):
            mine = [edge for edge in self.edges if edge[0] == source]
            (x, y), gap = self.at[source], self.level[source[0]] + 1
            upright = self.gap[gap] + TRACK * self.tracks[source, gap]
            for edge in mine:
                to_x, to_y = self.end[edge[1]]
                points = [(x, y), (upright, y)]
                if self._far(edge):
                    lane = self.lane + TRACK * self.lanes[source]
                    before = self.level[edge[1][0]]
                    other = self.gap[before] + TRACK * self.tracks[source, before]
                    points += [(upright, lane), (other, lane), (other, to_y)]
                else:
                    points.append((upright, to_y))
                found.append(Path((*points, (to_x, to_y)), "wire"))
                found.append(Label(to_x - 0.5, to_y + 3.4, "▸", "small", "end"))
            if len(mine) > 1:
                found.append(Dot(upright, y, 2.0))
        return found
