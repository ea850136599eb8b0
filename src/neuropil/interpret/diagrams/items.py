"""How one box is drawn: its glyph, and where the wires of each array enter and leave.

An item knows its size and the heights of its ports; it is drawn at the origin and moved. Axes that a box is
broadcast over run past it, above or below, where the order of the axes lets them; else they are drawn through it,
thin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy

from neuropil.interpret.diagrams.axes import Array
from neuropil.interpret.diagrams.core import Diagram, Op
from neuropil.interpret.diagrams.functions import FUNCTIONS
from neuropil.interpret.diagrams.shapes import Dot, Group, Label, Path, Rect, Shape, moved, width

PITCH, GAP, MARGIN = 18.0, 20.0, 8.0  # between wires, between arrays, beside a title
OVERHANG = 4.0  # by which a box may reach towards the wires that run past it

Ports = list[list[float]]  # a height for each axis of each array; a number has one


@dataclass
class Item:
    """A glyph at the origin, and the heights of its ports on the left and on the right."""

    width: float
    height: float
    ins: Ports
    outs: Ports
    shapes: list[Shape] = field(default_factory=list)
    module: str = ""
    title: str = ""


def lines(a: Array) -> int:
    return max(1, len(a.axes))


def port(number: int) -> float:
    return PITCH * (number + 0.5)


def wire(points: Sequence[tuple[float, float]], a: Array, number: int, curved: bool = False) -> Path:
    """One wire of an array; a number's is dotted."""
    if not a.axes:
        return Path(tuple(points), "unit", "", curved)
    return Path(tuple(points), "wire", a.names[number], curved)


def through(a: Array, enters: bool = True, leaves: bool = True) -> Item:
    """An array on which nothing is done here: it waits, or the diagram begins or ends with it."""
    heights = [[port(i) for i in range(lines(a))]]
    return Item(0.0, PITCH * lines(a), heights if enters else [], heights if leaves else [])


# ---------------------------------------------------------------------------------------------------- what boxes say


def written(size: object) -> str:
    """A size or factor as short as may be."""
    text = str(size).replace("**", "^").replace("*", "·").replace("sqrt", "√")
    return text.replace("floor", "") if isinstance(size, sympy.Expr) else text


def short(number: object) -> str:
    return f"{number:.4g}" if isinstance(number, float) else written(number)


def titles(op: Op, weights: Sequence[Op]) -> tuple[str, str]:
    """What stands in the box, and below it in small."""
    named = ", ".join(w.name.rsplit("/", 1)[-1].removesuffix(".weight") for w in weights)
    if op.kind == "elementwise" or (op.kind == "aten" and op.name in FUNCTIONS):
        function, number = FUNCTIONS.get(op.name), op.option("number")
        symbol = (function.symbol if function else "") or op.name
        shown = symbol if number is None else f"{symbol} {short(number)}"
        return (f"{shown} {named}" if named else shown), ""
    if op.kind == "einsum":
        return named or "·", ""
    if op.kind in ("softmax", "max"):
        return op.kind, str(op.option("axis"))
    if op.kind in ("reindex", "scatter"):
        return op.name, _affine(op)
    if op.kind == "lookup":
        return named or "lookup", "rows"
    if op.kind == "block":
        name = op.name if "last" not in dict(op.options) else f"{op.name} … {op.option('last')}"
        return name.removeprefix("/"), str(op.option("role", ""))
    return op.name.removeprefix("/") or op.kind, str(op.option("role", "")) or named


def _affine(op: Op) -> str:
    """The map of indices in words: "x = 2·x1 + kx - 1"."""
    if op.name in ("rename", "merge", "split") or len(op.option("maps", ())) > 2:
        return ""
    told = []
    for axis, offset, factors in op.option("maps", ()):
        terms = [name if factor == 1 else f"{written(factor)}·{name}" for name, factor in factors]
        if offset != 0:
            terms.append(written(offset))
        told.append(f"{axis} = {' + '.join(terms) or '0'}".replace("+ -", "− "))
    return ", ".join(told) if "=" not in op.name else ""


def past(op: Op, weights: Sequence[Op], dom: Sequence[Array]) -> set[str]:
    """The axes that the box does not touch."""
    if op.kind == "einsum":
        touched = {name for w in weights for a in w.cod for name in a.names}
        return {n for a in dom for n in a.names if n not in touched and n in op.cod[0].names} if weights else set()
    if op.body is not None:
        return _past_body(op.body)
    return set(op.over)


def _past_body(body: Diagram) -> set[str]:
    """The axes that every box inside is broadcast over, and that come in and go out."""
    names = {n for a in body.dom for n in a.names} & {n for a in body.cod for n in a.names}
    sources = {i: s.op for s in body.steps if s.op.kind == "weight" for i in s.outs}
    for step in body.steps:
        weights = [sources[i] for i in step.ins if i in sources]
        dom = [body.wires[i] for i in step.ins if i not in sources]
        names -= {n for a in dom for n in a.names} - past(step.op, weights, dom)
    return names


# ------------------------------------------------------------------------------------------------------------ glyphs


def item(op: Op, weights: Sequence[Op], dom: Sequence[Array], module: str) -> Item:
    """The glyph of a closed box that reads `dom`; `weights` are drawn as part of it."""
    if op.kind == "einsum" and not weights:
        return _einsum(op, dom, module)
    return _box(op, weights, dom, module)


def _style(op: Op, weights: Sequence[Op]) -> str:
    if op.kind == "opaque" or op.option("opaque"):
        return "opaque"
    if op.kind == "block":
        learned = any(inner.kind == "weight" for _, inner in (op.body.walk() if op.body else ()))
        single = op.body is not None and sum(s.op.kind != "weight" for s in op.body.steps) <= 2
        return "learned" if learned and single else "block"
    if op.kind == "weight" or any(w.option("trainable", True) for w in weights):
        return "learned"
    everywhere = op.kind == "aten" and bool(op.cod) and set(op.cod[0].names) <= set(op.over)
    return "pill" if op.kind == "elementwise" or everywhere else "box"


def _box(op: Op, weights: Sequence[Op], dom: Sequence[Array], module: str) -> Item:
    cod = op.cod
    free = past(op, weights, dom)
    above = _common(dom[0].names, cod[0].names, free, [*dom[1:], *cod[1:]]) if dom and cod else 0
    below = 0
    if dom and cod:
        last, final = dom[-1].names, cod[-1].names
        if len(dom) == len(cod) == 1:
            last, final = last[above:], final[above:]
        below = _common(last[::-1], final[::-1], free, [*dom[:-1], *cod[:-1]])
    title, small = titles(op, weights)
    style = _style(op, weights)
    repeat = op.option("repeat")
    core_in = [_lines_in(a, i, len(dom), above, below) for i, a in enumerate(dom)]
    core_out = [_lines_in(a, i, len(cod), above, below) for i, a in enumerate(cod)]
    text = 22.0 if style == "pill" else 24.0 + (12.0 if small else 0.0)
    inside = max(text - 2 * OVERHANG, _stack(core_in), _stack(core_out))
    wide = max(width(title, "title"), width(small, "small"), 14.0) + 2 * MARGIN + (26.0 if repeat else 0.0)
    top = PITCH * above + (OVERHANG if style == "pill" or not any(core_in) else 0.0)
    total = top + inside + PITCH * below
    ins = _ports(core_in, above, below, top, inside)
    outs = _ports(core_out, above, below, top, inside)
    shapes: list[Shape] = []
    shapes += [wire([(0.0, ins[0][n]), (wide, outs[0][n])], dom[0], n) for n in range(above)]
    ends = range(-1, -below - 1, -1)
    shapes += [wire([(0.0, ins[-1][n]), (wide, outs[-1][n])], dom[-1], len(dom[-1].axes) + n) for n in ends]
    high = max(text, inside)
    start = top + (inside - high) / 2
    if repeat:
        shapes.append(Rect(3.0, start + 3, wide, high, style))
    shapes.append(Rect(0.0, start, wide, high, style))
    middle = top + inside / 2
    centre = wide / 2 - (13.0 if repeat else 0.0)
    shapes.append(Label(centre, middle + (4.0 if not small else -2.0), title, "title"))
    if small:
        shapes.append(Label(centre, middle + 11.0, small, "small"))
    if repeat:
        shapes.append(Label(wide - 6, middle + 4.0, f"×{repeat}", "title", "end"))
    return Item(wide, total, ins, outs, shapes, module, _tooltip(op, title, module))


def _tooltip(op: Op, title: str, module: str) -> str:
    return f"{module or title}: {', '.join(map(str, op.dom)) or 'nothing'} -> {', '.join(map(str, op.cod))}"


def _common(a: Sequence[str], b: Sequence[str], free: set[str], others: Sequence[Array]) -> int:
    """How many axes at the beginning of both run past the box."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y or x not in free or any(x in o.names for o in others):
            break
        count += 1
    return count


def _lines_in(a: Array, number: int, count: int, above: int, below: int) -> int:
    """How many wires of an array end at the box."""
    taken = (above if number == 0 else 0) + (below if number == count - 1 else 0)
    return lines(a) if not taken else len(a.axes) - taken


def _stack(counts: Sequence[int]) -> float:
    return PITCH * sum(counts) + GAP * max(0, len(counts) - 1)


def _ports(core: Sequence[int], above: int, below: int, top: float, inside: float) -> Ports:
    y = top + (inside - _stack(core)) / 2
    out: Ports = []
    for number, count in enumerate(core):
        here = [y + port(i) for i in range(count)]
        if number == 0:
            here = [port(i) for i in range(above)] + here
        if number == len(core) - 1:
            here += [top + inside + port(i) for i in range(below)]
        out.append(here)
        y += PITCH * count + GAP
    return out


def _einsum(op: Op, dom: Sequence[Array], module: str) -> Item:
    """Wires joined: two that end together are an inner product, a dot is an index used by several."""
    wide = 46.0
    heights = [_stack([lines(a) for a in group]) for group in (dom, op.cod)]
    total = max(*heights, PITCH)
    ins = _ports([lines(a) for a in dom], 0, 0, 0.0, total) if dom else []
    outs = _ports([lines(op.cod[0])], 0, 0, 0.0, total)
    shapes: list[Shape] = []
    for name in dict.fromkeys(n for a in dom for n in a.names):
        starts = [ins[i][a.place(name)] for i, a in enumerate(dom) if name in a.names]
        ends = [outs[0][op.cod[0].place(name)]] if name in op.cod[0].names else []
        shapes += _index(name, starts, ends, wide)
    for i, a in enumerate(dom):
        if not a.axes:
            shapes.append(Path(((0.0, ins[i][0]), (wide / 2, ins[i][0])), "unit"))
    if not op.cod[0].axes:
        shapes.append(Path(((wide / 2, outs[0][0]), (wide, outs[0][0])), "unit"))
    return Item(wide, total, ins, outs, shapes, module, _tooltip(op, "einsum", module))


def _index(name: str, starts: list[float], ends: list[float], wide: float) -> list[Shape]:
    def line(*points: tuple[float, float]) -> Path:
        return Path(points, "wire", name, True, True)

    if len(starts) == 1 and ends:
        return [line((0.0, starts[0]), (wide, ends[0]))]
    if len(starts) == 2 and not ends:
        middle = sum(starts) / 2
        return [
            line(
                (0.0, starts[0]),
                (0.3 * wide, starts[0]),
                (0.6 * wide, middle),
                (0.3 * wide, starts[1]),
                (0.0, starts[1]),
            )
        ]
    middle = ends[0] if ends else sum(starts) / len(starts)
    node = 0.55 * wide
    shapes: list[Shape] = [line((0.0, y), (node, middle)) for y in starts]
    shapes += [line((node, middle), (wide, y)) for y in ends]
    return [*shapes, Dot(node, middle, 3.0 if ends else 4.0)]


def fence(op: Op, inside: Item, module: str) -> Item:
    """An opened block: its inside in a dashed frame with its name."""
    head, pad = 24.0, 10.0
    title, small = titles(op, ())
    repeat = op.option("repeat")
    text = title + (f" · {small}" if small else "") + (f" ×{repeat}" if repeat else "")
    wide = max(inside.width + 2 * pad, width(text, "small") + 2 * MARGIN)
    shift = (wide - inside.width) / 2
    down = [[[y + head for y in group] for group in side] for side in (inside.ins, inside.outs)]
    total = inside.height + head + pad
    shapes: list[Shape] = [Rect(0.0, 4.0, wide, total - 4.0, "fence"), Label(MARGIN, 16.5, text, "small", "start")]
    for a, group in zip(op.dom, down[0], strict=True):
        shapes += [wire([(0.0, y), (shift, y)], a, i) for i, y in enumerate(group)]
    for a, group in zip(op.cod, down[1], strict=True):
        shapes += [wire([(shift + inside.width, y), (wide, y)], a, i) for i, y in enumerate(group)]
    shapes += [moved(shape, shift, head) for shape in inside.shapes]
    return Item(wide, total, down[0], down[1], [Group(tuple(shapes), module, _tooltip(op, title, module))])
