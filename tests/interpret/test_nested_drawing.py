"""Drawings of systems: all there, nothing overlapping, wires from port to port."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from neuropil.interpret.diagrams.shapes import Group, Label, Path, Rect
from neuropil.interpret.nested import (
    Finite,
    Function,
    Interface,
    Machine,
    NestedSystem,
    Real,
    System,
    copier,
    criterion,
    delay,
    hebbian,
    learner,
    neurons,
    parallel,
)
from neuropil.interpret.nested.drawing import Glyph, _glyph, svg


def cell() -> Machine:
    face = Interface({"y": Real()}, {"u": Real()})
    return Machine(face, torch.tensor(0.0), lambda s: {"y": s}, lambda s, d: d["u"], "cell")


def loop(rule: object = None) -> System:
    add = Function(lambda ref, y: ref - y, {"ref": Real(), "y": Real()}, Real(), "minus")
    inner = System({"a": cell(), "b": cell()}, [("in.u", "a.u"), ("a.y", "b.u"), ("b.y", "out.y")], name="plant")
    if rule is not None:
        boxes = {"plant": inner, "c": cell()}
        wires = [("in.u", "plant.u"), ("c.y", "plant.u", -1.0), ("plant.y", "c.u"), ("plant.y", "out.y")]
        return System(boxes, wires, rule, name="loop")  # type: ignore[arg-type]
    return System(
        {"plant": inner, "minus": add, "wait": delay(Real(), 0.0)},
        [("in.ref", "minus.ref"), ("plant.y", "wait"), ("wait", "minus.y"), ("minus", "plant.u"), ("plant.y", "out.y")],
        name="loop",
    )


def network() -> Machine:
    net = neurons(nn.Linear(4, 8), nn.Tanh(), vectorised=False) >> learner(nn.Linear(8, 3))
    return net >> criterion(nn.functional.cross_entropy, Real(3), Finite(3))


SYSTEMS = {
    "loop": loop,
    "plastic": lambda: loop(hebbian(0.1)),
    "network": network,
    "wrapped": lambda: copier(Real(4), torch.zeros(4)) >> learner(nn.Linear(4, 3), name="synapse"),
    "beside": lambda: parallel({"one": cell(), "two": loop()}),
    "closed": lambda: System({"a": cell()}, [("a.y", "a.u")]),
    "empty": lambda: System({}, []),
}


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("depth", [0, 1, 4])
def test_a_drawing_is_well_formed_and_on_its_sheet(name: str, depth: int) -> None:
    system = SYSTEMS[name]()
    text = svg(system, depth)
    root = ElementTree.fromstring(text)
    assert text == svg(SYSTEMS[name](), depth)
    wide, high = float(root.attrib["width"]), float(root.attrib["height"])
    for rect in root.iter("{http://www.w3.org/2000/svg}rect"):
        x, y, w, h = (float(rect.attrib.get(key, 0)) for key in ("x", "y", "width", "height"))
        assert x >= 0
        assert y >= 0
        assert x + w <= wide + 0.01
        assert y + h <= high + 0.01
    glyph = _glyph(system, system.name, depth)
    for shape in _flat(glyph):
        if isinstance(shape, Label):
            left, top, right, bottom = shape.bounds
            assert left > -1, shape
            assert top > -1, shape
            assert right < glyph.width + 1, shape
            assert bottom < glyph.height + 4, shape


def _flat(glyph: Glyph) -> list:
    found, left = [], list(glyph.shapes)
    while left:
        shape = left.pop()
        if isinstance(shape, Group):
            left += shape.children
        else:
            found.append(shape)
    return found


@pytest.mark.parametrize("name", SYSTEMS)
def test_boxes_lie_apart_or_within_one_another(name: str) -> None:
    glyph = _glyph(SYSTEMS[name](), "it", 4)
    rects = [shape for shape in _flat(glyph) if isinstance(shape, Rect)]
    for a, b in itertools.combinations(rects, 2):
        apart = (
            a.x + a.width <= b.x + 0.01
            or b.x + b.width <= a.x + 0.01
            or a.y + a.height <= b.y + 0.01
            or b.y + b.height <= a.y + 0.01
        )
        assert apart or _within(a, b) or _within(b, a), (a, b)


def _within(a: Rect, b: Rect) -> bool:
    return a.x >= b.x and a.y >= b.y and a.x + a.width <= b.x + b.width and a.y + a.height <= b.y + b.height


def test_every_wire_runs_from_an_output_to_an_input() -> None:
    system = loop()
    glyph = _glyph(system, "loop", 1)  # the plant closed
    paths = [shape for shape in _flat(glyph) if isinstance(shape, Path)]
    assert len(paths) == len(system.plan.wires)
    rects = [shape for shape in _flat(glyph) if isinstance(shape, Rect)]
    lefts = {round(r.x, 3) for r in rects[1:]} | {round(r.x, 3) for r in rects} | {round(glyph.width, 3)}
    rights = {round(r.x + r.width, 3) for r in rects} | {0.0}
    for path in paths:
        assert round(path.points[0][0], 3) in rights
        assert round(path.points[-1][0], 3) in lefts
        for (x, y), (to_x, to_y) in itertools.pairwise(path.points):
            assert abs(x - to_x) < 0.01 or abs(y - to_y) < 0.01


def test_names_and_depth_are_shown() -> None:
    closed, opened = svg(loop(), 1), svg(loop(), 2)
    assert all(f">{name}<" in closed for name in ("loop", "plant", "minus", "wait"))
    assert ">a<" not in closed
    assert ">a<" in opened
    assert "wires: hebbian" in svg(loop(hebbian(0.1)))
    assert "... 5 more" in svg(network())
    assert NestedSystem(loop()).svg(depth=1) == closed
    assert "np-learned" in svg(SYSTEMS["wrapped"]())
