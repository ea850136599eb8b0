"""Axes, arrays and signatures: the types of the language.

An axis is a named finite set of a size, a number or an expression in symbols; an array is a list of axes, written
with spaces; a tuple of arrays is written with commas. A size may stand in place: `"y=20 k"`. An axis without one
has a size of its own name. `1` is the array without axes, a number; nothing at all is the empty tuple.

>>> dom, cod = signature("y k h, x k h -> y x h")
>>> str(dom[0]), cod[0].names
('y k h', ('y', 'x', 'h'))
>>> array("y=20 k").numel
20*k
"""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from neuropil.errors import NeuropilError

Size = Any  # int or sympy.Expr
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
FUNCTIONS = {"floor": sympy.floor, "sqrt": sympy.sqrt}
OPERATIONS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}


class DiagramError(NeuropilError, ValueError):
    """Diagrams that do not fit together; the message names the axes and sizes of both."""


@functools.cache
def symbol(name: str) -> sympy.Symbol:
    """The size of an axis of which no size was said."""
    return sympy.Symbol(name, integer=True, positive=True)


def as_size(value: Any) -> Size:
    """An int where it is one, else an expression; DiagramError for numbers that are no size."""
    if isinstance(value, str):
        value = expression(value)
    if isinstance(value, sympy.Integer | int):
        if int(value) < 0:
            raise DiagramError(f"a size of {value}; expected a number of elements")
        return int(value)
    if not isinstance(value, sympy.Expr):
        raise DiagramError(f"a size of {value!r}; expected an int or an expression in the names of axes")
    return value


def plain(value: Any) -> Any:
    """An int where an expression is one; all else as it is."""
    return int(value) if isinstance(value, sympy.Integer) else value


def expression(text: str) -> Any:
    """The expression that a text writes with numbers, names, + - * / **, sqrt and floor; nothing is ever run.

    >>> expression("floor((x + 2 - 3) / 2) + 1").subs({symbol("x"): 9})
    5
    """
    try:
        return sympy.sympify(_value(ast.parse(text.strip(), mode="eval").body))
    except (SyntaxError, KeyError, AttributeError):
        raise DiagramError(f"a size {text!r}; expected numbers and names with + - * / **, sqrt() and floor()") from None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return sympy.sympify(node.value)
    if isinstance(node, ast.Name):
        return symbol(node.id)
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp):
        return OPERATIONS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1:
        return FUNCTIONS[node.func.id](_value(node.args[0]))
    raise KeyError(node)


@dataclass(frozen=True)
class Axis:
    """A named, sized finite set."""

    name: str
    size: Size

    @property
    def free(self) -> bool:
        """Whether nothing is known of the size but its name."""
        return not isinstance(self.size, int) and self.size == symbol(self.name)

    def __str__(self) -> str:
        return self.name if self.free else f"{self.name}={self.size}"


def axis(name: str, size: Any = None) -> Axis:
    if not NAME.fullmatch(name):
        raise DiagramError(f"an axis called {name!r}; expected a letter, then letters, digits or _")
    return Axis(name, symbol(name) if size is None else as_size(size))


@dataclass(frozen=True)
class Array:
    """A list of axes, no name twice; `dtype` is "float", or "int" for indices."""

    axes: tuple[Axis, ...] = ()
    dtype: str = "float"

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.axes):
            raise DiagramError(f"an array {' '.join(self.names)!r} with an axis twice; rename one of them")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(axis.name for axis in self.axes)

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def numel(self) -> Size:
        return functools.reduce(operator.mul, self.shape, 1)

    def place(self, name: str) -> int:
        """Where the axis of this name stands."""
        if name not in self.names:
            raise DiagramError(f"no axis {name!r} in an array {str(self)!r}")
        return self.names.index(name)

    def __getitem__(self, name: str) -> Axis:
        return self.axes[self.place(name)]

    def without(self, names: Iterable[str]) -> Array:
        gone = set(names)
        return Array(tuple(axis for axis in self.axes if axis.name not in gone), self.dtype)

    def with_axis(self, new: Axis, at: int) -> Array:
        """With one axis more, in front (`at=0`) or behind (`at=-1`)."""
        return Array((new, *self.axes) if at == 0 else (*self.axes, new), self.dtype)

    def sized(self, sizes: Mapping[Any, Any]) -> Array:
        """With symbols replaced."""
        axes = tuple(
            a if isinstance(a.size, int) else Axis(a.name, as_size(a.size.subs(sizes, simultaneous=True)))
            for a in self.axes
        )
        return self if axes == self.axes else Array(axes, self.dtype)

    def __str__(self) -> str:
        return ("int: " if self.dtype == "int" else "") + (" ".join(map(str, self.axes)) or "1")


Arrays = tuple[Array, ...]


def array(text: str | Array) -> Array:
    """The array that a text such as "y k=16" names; "int: b s" holds indices."""
    if isinstance(text, Array):
        return text
    head, colon, rest = text.partition(":")
    dtype = head.strip() if colon else "float"
    if dtype not in ("float", "int"):
        raise DiagramError(f"an array of {dtype!r}; expected int or float before the colon")
    words = (rest if colon else text).split()
    if words == ["1"]:
        return Array((), dtype)
    return Array(tuple(_axis_of(word) for word in words), dtype)


def _axis_of(word: str) -> Axis:
    name, equals, size = word.partition("=")
    if not equals:
        return axis(name)
    return axis(name, size)


def arrays(text: str | Iterable[Array]) -> Arrays:
    """A tuple of arrays; the empty text is the empty tuple."""
    if not isinstance(text, str):
        return tuple(text)
    return tuple(array(part) for part in text.split(",")) if text.strip() else ()


def signature(text: str) -> tuple[Arrays, Arrays]:
    """What goes in and what comes out: "a b, c -> d"."""
    left, arrow, right = text.partition("->")
    if not arrow:
        raise DiagramError(f"a signature {text!r} without an arrow; expected such as 'a b, c -> d'")
    dom, cod = arrays(left), arrays(right)
    known = sizes_of([*dom, *cod])
    bound = {symbol(name): size for name, size in known.items() if not isinstance(size, sympy.Symbol)}
    return tuple(a.sized(bound) for a in dom), tuple(a.sized(bound) for a in cod)


def written(tuple_: Iterable[Array]) -> str:
    return ", ".join(map(str, tuple_)) or "nothing"


def sizes_of(*many: Iterable[Array]) -> dict[str, Size]:
    """The size of every axis by name; DiagramError where one name has two sizes."""
    known: dict[str, Size] = {}
    for one in (a for group in many for arr in group for a in arr.axes):
        before = known.setdefault(one.name, one.size)
        if before == one.size or one.free:
            continue
        if Axis(one.name, before).free:
            known[one.name] = one.size
        elif not same_size(before, one.size):
            raise DiagramError(
                f"axis {one.name!r} has size {before} in one place and {one.size} in another; "
                f"give one of them another name, or both the same size"
            )
    return known


def same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are provably equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sympy.simplify(sympy.sympify(a) - sympy.sympify(b)) == 0)
