"""What a drawing is made of, before it is SVG or TikZ. Lengths are in pixels, y grows downwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

CHARACTER = 0.6  # width of a character in its height; a little more than most fonts have, so that nothing overlaps


@dataclass(frozen=True)
class Path:
    """A line through points, straight, or curved between each two as a wire that leaves and arrives flat."""

    points: tuple[tuple[float, float], ...]
    style: str  # "wire", "unit" (a number without axes), "separator"
    axis: str = ""
    curved: bool = False
    swap: bool = False  # part of a place where wires may cross


@dataclass(frozen=True)
class Rect:
    x: float
    y: float
    width: float
    height: float
    style: str  # "box", "learned", "block", "pill", "fence", "opaque"


@dataclass(frozen=True)
class Label:
    x: float
    y: float  # of the base line
    text: str
    style: str  # "title", "small", "axis"
    anchor: str = "middle"
    more: str = ""  # a size, set lighter behind the text

    @property
    def height(self) -> float:
        return {"title": 12.0, "small": 9.5, "axis": 10.5}[self.style]

    @property
    def width(self) -> float:
        return width(self.text, self.style) + (width(" " + self.more, self.style) if self.more else 0.0)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        left = self.x - {"start": 0.0, "middle": self.width / 2, "end": self.width}[self.anchor]
        return left, self.y - 0.8 * self.height, left + self.width, self.y + 0.2 * self.height


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    radius: float = 2.5


@dataclass(frozen=True)
class Group:
    """Shapes that are one thing: a box of the diagram, with the dotted name of the module that it draws."""

    children: tuple[Shape, ...]
    module: str = ""
    title: str = ""


Shape = Path | Rect | Label | Dot | Group


@dataclass(frozen=True)
class Drawing:
    """All shapes, the size of the sheet, and the axes in order of appearance (each has a colour)."""

    width: float
    height: float
    shapes: tuple[Shape, ...]
    axes: tuple[str, ...] = field(default=())

    def walk(self) -> Iterator[Shape]:
        """Every shape, those in groups too."""
        stack = list(reversed(self.shapes))
        while stack:
            shape = stack.pop()
            yield shape
            if isinstance(shape, Group):
                stack += reversed(shape.children)


def width(text: str, style: str) -> float:
    return {"title": 12.0, "small": 9.5, "axis": 10.5}[style] * CHARACTER * len(text)


def moved(shape: Shape, dx: float, dy: float) -> Shape:
    """The shape somewhere else."""
    if isinstance(shape, Path):
        points = tuple((x + dx, y + dy) for x, y in shape.points)
        return Path(points, shape.style, shape.axis, shape.curved, shape.swap)
    if isinstance(shape, Rect):
        return Rect(shape.x + dx, shape.y + dy, shape.width, shape.height, shape.style)
    if isinstance(shape, Label):
        return Label(shape.x + dx, shape.y + dy, shape.text, shape.style, shape.anchor, shape.more)
    if isinstance(shape, Dot):
        return Dot(shape.x + dx, shape.y + dy, shape.radius)
    return Group(tuple(moved(child, dx, dy) for child in shape.children), shape.module, shape.title)
