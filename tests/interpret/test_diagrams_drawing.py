"""The drawing: deterministic, labelled, without crossings and overlaps, and true to what it links to."""

from __future__ import annotations

import functools
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import combinations

import pytest

from neuropil.interpret.diagrams import block, build, einsum, gelu, identity, linear, relu, softmax, wiring
from neuropil.interpret.diagrams.architectures import SMALL
from neuropil.interpret.diagrams.core import Diagram
from neuropil.interpret.diagrams.fold import folded
from neuropil.interpret.diagrams.layout import draw
from neuropil.interpret.diagrams.shapes import Drawing, Group, Label, Path, Rect
from neuropil.interpret.diagrams.svg import PALETTES

DRAWN: dict[str, Callable[[], Diagram]] = {
    **SMALL,
    "backward of attention": lambda: SMALL["attention"]().backward(),
    "swap": lambda: wiring("a b, c", (1, 0)) >> (relu.on("c") @ softmax("a").on("a b")),
    "nothing": lambda: identity("a, b c"),
    "a number": lambda: einsum("a, a -> 1") >> gelu,
}


@functools.cache
def diagram(name: str) -> Diagram:
    return DRAWN[name]()


@functools.cache
def drawing(name: str, depth: int) -> Drawing:
    return draw(folded(diagram(name)), lambda module, level: level < depth)


def layers(count: int) -> Diagram:
    made = identity("s=4 m=6")
    for n in range(count):
        inside = build("s m", lambda x: x + gelu(linear("d -> m", "down")(linear("m -> d=8", "up")(x))))
        made = made >> block(f"layer.{n}", inside, role="Layer")
    return made


# ------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", DRAWN)
def test_no_texts_overlap(name: str, depth: int) -> None:
    labels = [(*shape.bounds, shape.text) for shape in drawing(name, depth).walk() if isinstance(shape, Label)]
    assert labels
    for (left, top, right, bottom, text), (x0, y0, x1, y1, other) in combinations(labels, 2):
        apart = right <= x0 + 0.01 or x1 <= left + 0.01 or bottom <= y0 + 0.01 or y1 <= top + 0.01
        assert apart, f"{text!r} at {left, top} over {other!r} at {x0, y0}"


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", DRAWN)
def test_everything_is_on_the_sheet(name: str, depth: int) -> None:
    made = drawing(name, depth)
    for shape in made.walk():
        if isinstance(shape, Label):
            left, top, right, bottom = shape.bounds
            assert left >= 0
            assert right <= made.width
            assert top >= 0
            assert bottom <= made.height
        elif isinstance(shape, Path):
            assert all(0 <= x <= made.width + 0.01 and 0 <= y <= made.height + 0.01 for x, y in shape.points)
        elif isinstance(shape, Rect):
            assert shape.x >= 0
            assert shape.x + shape.width <= made.width
            assert shape.y + shape.height <= made.height


def crosses(a: Path, b: Path) -> bool:
    """Whether two wires from left to right, over a common stretch, change sides."""
    (ax, ay), (bx, by) = a.points[0], a.points[-1]
    (cx, cy), (dx, dy) = b.points[0], b.points[-1]
    low, high = max(ax, cx), min(bx, dx)
    if high - low < 0.5:
        return False

    def at(x: float, x0: float, y0: float, x1: float, y1: float) -> float:
        """A curve that leaves and arrives flat."""
        t = (x - x0) / (x1 - x0)
        return y0 + (y1 - y0) * t * t * (3 - 2 * t)

    begin = at(low, ax, ay, bx, by) - at(low, cx, cy, dx, dy)
    end = at(high, ax, ay, bx, by) - at(high, cx, cy, dx, dy)
    return begin * end < -0.5


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", DRAWN)
def test_wires_cross_only_in_swaps(name: str, depth: int) -> None:
    wires = [
        shape
        for shape in drawing(name, depth).walk()
        if isinstance(shape, Path) and shape.style in ("wire", "unit") and not shape.swap
    ]
    wires.sort(key=lambda path: path.points[0][0])
    for number, a in enumerate(wires):
        for b in wires[number + 1 :]:
            if b.points[0][0] > a.points[-1][0]:
                break
            assert not crosses(a, b), f"{a} over {b}"


def test_a_swap_is_seen() -> None:
    """The check above can fail: the wires of a swap do cross."""
    wires = [s for s in drawing("swap", 1).walk() if isinstance(s, Path) and s.style == "wire"]
    assert any(crosses(a, b) for a, b in combinations(wires, 2))


@pytest.mark.parametrize("name", DRAWN)
def test_every_axis_is_labelled(name: str) -> None:
    made = drawing(name, 2)
    wires = {shape.axis for shape in made.walk() if isinstance(shape, Path) and shape.axis}
    labels = {shape.text for shape in made.walk() if isinstance(shape, Label) and shape.style == "axis"}
    assert wires <= labels


@pytest.mark.parametrize("name", DRAWN)
def test_every_box_is_in_a_group_that_says_what_it_is(name: str) -> None:
    made = drawing(name, 2)

    def loose(shapes: tuple[object, ...]) -> list[object]:
        return [s for s in shapes if isinstance(s, Rect)]

    assert not loose(made.shapes)
    for group in (s for s in made.walk() if isinstance(s, Group)):
        assert "->" in group.title


# ------------------------------------------------------------------------------------------------------------ the text


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_bytes_every_time(name: str) -> None:
    """Of the drawing of a diagram, and of one that is built anew."""
    first = diagram(name).svg(depth=2)
    assert first == DRAWN[name]().svg(depth=2)
    ET.fromstring(first)


@pytest.mark.parametrize("palette", [*PALETTES, "auto"])
def test_palettes(palette: str) -> None:
    text = layers(1).svg(palette=palette)
    ET.fromstring(text)
    assert ("prefers-color-scheme" in text) == (palette == "auto")
    assert PALETTES["dark" if palette == "dark" else "print" if palette == "print" else "light"][1] in text
    assert "<script" not in text


def test_an_unknown_palette_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of light, dark, print, auto"):
        layers(1).svg(palette="pink")


def test_it_can_be_read_aloud() -> None:
    root = ET.fromstring(layers(2).svg(title="Two layers"))
    space = "{http://www.w3.org/2000/svg}"
    assert root.get("role") == "img"
    assert root.findtext(f"{space}title") == "Two layers"
    assert "layer.0 … layer.1 (Layer), 2 times: from s=4 m=6 to s=4 m=6." in str(root.findtext(f"{space}desc"))


def test_modules_are_named_and_linked() -> None:
    made = layers(2)
    text = made.svg(depth=2, fold=False, href=lambda name: f"#n-{name}" if name.endswith("1") else None)
    names = set(re.findall(r'data-module="([^"]+)"', text))
    assert names == {"layer.0", "layer.1"}
    assert re.findall(r'href="([^"]+)"', text)[0] == "#n-layer.1"
    assert "#n-layer.0" not in text


def test_what_is_written_cannot_break_out() -> None:
    made = block('<b a="1">&', relu.on("a"))
    text = made.svg(href=lambda name: f'"><script>{name}')
    ET.fromstring(text)
    assert "<script>" not in text


def test_blocks_open_by_depth_and_by_name() -> None:
    made = layers(2)
    closed, open_one = made.svg(fold=False), made.svg(fold=False, opened={"layer.1"})
    assert "up.bias" not in closed
    assert open_one.count(">up<") == 1
    assert made.svg(fold=False, depth=2).count(">up<") == 2


def test_repeats_are_folded() -> None:
    made = layers(12)
    text = made.svg()
    assert "×12" in text
    assert len(text) < 1.1 * len(layers(3).svg())
    short = folded(made)
    assert len(short.steps) == 1
    assert short.steps[0].op.option("repeat") == 12
    assert len(folded(layers(1)).steps) == 1
    mixed = layers(2) >> softmax("m") >> layers(2)
    assert [s.op.option("repeat") for s in folded(mixed).steps] == [2, None, 2]


def test_a_long_diagram_goes_on_in_rows() -> None:
    made = layers(6)
    wide, narrow = (draw(made, lambda m, n: n < 2, width) for width in (4000.0, 500.0))
    assert narrow.width < wide.width
    assert narrow.height > wide.height


# ---------------------------------------------------------------------------------------------------------- elsewhere


def test_mermaid() -> None:
    text = layers(2).mermaid(depth=2, fold=False)
    assert text.startswith("flowchart LR\n")
    assert text.count("subgraph") == text.count("end\n") == 2
    nodes = set(re.findall(r"^ *(\w+)[\[(]", text, re.M)) | set(re.findall(r"subgraph (\w+)", text))
    for line in re.findall(r"^ *(\w+) -- .* --> (\w+)$", text, re.M):
        assert set(line) <= nodes


def test_tikz() -> None:
    text = diagram("attention").tikz()
    assert text.startswith(r"\begin{tikzpicture}")
    assert text.rstrip().endswith(r"\end{tikzpicture}")
    assert text.count("{") == text.count("}")
    assert r"\node" in text
    assert "softmax" in text
    assert all(line.rstrip().endswith(";") for line in text.splitlines()[1:-1])


def test_sentences() -> None:
    said = diagram("attention").describe()
    assert said.splitlines()[1] == "1. inner product: from y=3 k=2 h=3, x=4 k=2 h=3 to y=3 x=4 h=3."
    assert "softmax (x), over h y" in said
