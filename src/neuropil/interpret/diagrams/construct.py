"""Ways to make a diagram: one box, a function of wires, wires alone, a block; and boxes for arrays yet unknown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from neuropil.interpret.diagrams.axes import Array, Arrays, DiagramError, array, arrays
from neuropil.interpret.diagrams.core import Builder, Diagram, Op, Step, Wire


@dataclass(frozen=True)
class Polymorphic:
    """A box for arrays yet unknown, such as a softmax over x: it takes whatever has the axes it needs."""

    make: Callable[..., Diagram] = field(repr=False)
    name: str

    def on(self, *given: str | Array) -> Diagram:
        """The diagram for these arrays."""
        return self.make(*(array(a) for a in given))

    def __call__(self, *given: Any) -> Any:
        if not all(isinstance(w, Wire) for w in given):
            raise DiagramError(f"{self.name} is for any arrays; say which with .on('y x'), then call it")
        return self.on(*(w.array for w in given))(*given)

    def __rrshift__(self, other: Any) -> Diagram:
        """Behind a diagram: for the arrays that it gives."""
        return other >> self.on(*other.cod) if isinstance(other, Diagram) else NotImplemented

    def __rshift__(self, other: Any) -> Polymorphic:
        if not isinstance(other, Diagram | Polymorphic):
            return NotImplemented
        return Polymorphic(lambda *given: self.on(*given) >> other, f"{self.name} >> {getattr(other, 'name', other)}")


def build(inputs: str | Arrays, function: Callable[..., Any]) -> Diagram:
    """The diagram of a function of wires, so that a wire can be used by name and twice.

    >>> from neuropil.interpret.diagrams import relu
    >>> str(build("y m", lambda x: x + relu(x)))
    'y m -> y m'
    """
    builder = Builder(arrays(inputs))
    outputs = function(*builder.inputs)
    return builder.finish([outputs] if isinstance(outputs, Wire) else list(outputs))


def of(op: Op) -> Diagram:
    """The diagram of one box."""
    ins = tuple(range(len(op.dom)))
    outs = tuple(range(len(op.dom), len(op.dom) + len(op.cod)))
    return Diagram(op.dom, (Step(op, ins, outs),), outs)


def identity(text: str | Arrays = "") -> Diagram:
    given = arrays(text)
    return Diagram(given, (), tuple(range(len(given))))


def wiring(text: str | Arrays, order: Sequence[int]) -> Diagram:
    """Copies, deletes and swaps: output i is input `order[i]`.

    >>> swap = wiring("a, b", (1, 0))
    >>> swap >> wiring("b, a", (1, 0)) == identity("a, b")
    True
    """
    given = arrays(text)
    if any(not 0 <= i < len(given) for i in order):
        raise DiagramError(f"an order {tuple(order)} of {len(given)} arrays; expected places from 0")
    return Diagram(given, (), tuple(order))


def block(name: str, inside: Diagram, **options: Any) -> Diagram:
    """A fence around a diagram: drawn as one box or opened, its weights under its name."""
    more = tuple(sorted(options.items()))
    return of(Op("block", inside.dom, inside.cod, (), (("name", name), *more), inside))
