"""Diagrams: boxes between arrays, in sequence (`>>`) and side by side (`@`).

A diagram is kept as what it means, not as how it was put together: the arrays that come in, the steps with the
arrays that each reads and writes, and the arrays that come out. The steps stand in the one order that a walk
from the outputs back to the inputs gives. So composition is associative, $(f \\otimes g) ; (h \\otimes k)$ and
$(f ; h) \\otimes (g ; k)$ are the same object, two swaps are none, and what is never read is not there.

Broadcasting is part of a step: `over` names the axes that run past its box.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import sympy
from torch import Tensor

from neuropil.interpret.diagrams.axes import (
    Array,
    Arrays,
    Axis,
    DiagramError,
    as_size,
    plain,
    sizes_of,
    symbol,
    written,
)
from neuropil.interpret.diagrams.fitting import bindings, check_fit

if TYPE_CHECKING:
    from neuropil.interpret.diagrams.cost import Cost
    from neuropil.interpret.diagrams.run import Compiled

Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Op:
    """One box: which primitive, between which arrays, and the axes it is broadcast `over`."""

    kind: str
    dom: Arrays
    cod: Arrays
    over: tuple[str, ...] = ()
    options: Options = ()
    body: Diagram | None = None  # of a block

    def option(self, name: str, default: Any = None) -> Any:
        return next((value for key, value in self.options if key == name), default)

    @property
    def name(self) -> str:
        return str(self.option("name", ""))

    @cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.dom, self.cod, self.over, self.options, self.body))

    def __hash__(self) -> int:
        return self._hash

    @property
    def core(self) -> tuple[Arrays, Arrays]:
        """The arrays of the box itself, without the axes that run past it."""
        return tuple(a.without(self.over) for a in self.dom), tuple(a.without(self.over) for a in self.cod)

    def changed(self, array_of: Callable[[Array], Array], size_of: Callable[[Any], Any]) -> Op:
        """With every array, and every size among the options, replaced."""
        return dataclasses.replace(
            self,
            dom=tuple(map(array_of, self.dom)),
            cod=tuple(map(array_of, self.cod)),
            options=tuple((key, _sizes_in(value, size_of)) for key, value in self.options),
            body=None if self.body is None else self.body._changed(array_of, size_of),
        )


@dataclass(frozen=True)
class Step:
    """A box and the numbers of the wires that it reads and writes."""

    op: Op
    ins: tuple[int, ...]
    outs: tuple[int, ...]


@dataclass(frozen=True)
class Wire:
    """An array inside a diagram that is being built."""

    number: int
    builder: Builder = field(repr=False, compare=False)

    @property
    def array(self) -> Array:
        return self.builder.arrays[self.number]

    def beside(self, source: Diagram) -> Wire:
        """The one array of a diagram without inputs, such as a weight, in the diagram that this wire is of."""
        return self.builder.put(source, [])[0]

    def __add__(self, other: Wire) -> Wire:
        from neuropil.interpret.diagrams.library import add

        return add(self, other)


@dataclass(frozen=True)
class Diagram:
    """Arrays in, steps, arrays out. Wires are numbered: the inputs first, then what each step writes."""

    inputs: Arrays
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def __post_init__(self) -> None:
        wires = list(self.inputs)
        for step in self.steps:
            if step.outs != tuple(range(len(wires), len(wires) + len(step.op.cod))):
                raise DiagramError("the wires of a diagram are numbered in the order in which they are written")
            found = tuple(wires[i] for i in step.ins)
            check_fit(found, step.op.dom, step.op.name or step.op.kind)
            wires += step.op.cod
        object.__setattr__(self, "wires", tuple(wires))
        object.__setattr__(self, "_hash", hash((self.inputs, self.steps, self.outputs)))

    wires: Arrays = field(init=False, compare=False, repr=False)
    _hash: int = field(init=False, compare=False, repr=False)

    def __hash__(self) -> int:
        return self._hash

    # ------------------------------------------------------------------------------------------- types

    @property
    def dom(self) -> Arrays:
        return self.inputs

    @property
    def cod(self) -> Arrays:
        return tuple(self.wires[i] for i in self.outputs)

    def walk(self, path: str = "") -> Iterator[tuple[str, Op]]:
        """Every box, those in blocks too, with the dotted name of the block it stands in."""
        for step in self.steps:
            yield path, step.op
            if step.op.body is not None:
                yield from step.op.body.walk(join(path, step.op.name))

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """The size of every axis; DiagramError where one name has two."""
        return sizes_of(self.inputs, *((*op.dom, *op.cod) for _, op in self.walk()))

    def sized(self, **sizes: Any) -> Diagram:
        """With sizes in place of symbols: `diagram.sized(y=20, x=22)`."""
        known = {s.name for size in self.sizes.values() if not isinstance(size, int) for s in size.free_symbols}
        if unknown := sorted(set(sizes) - known):
            there = ", ".join(sorted(known)) or "none"
            raise DiagramError(f"no size of this diagram is called {', '.join(unknown)}; there are {there}")
        return self._bound({symbol(name): size for name, size in sizes.items()})

    def _bound(self, sizes: Mapping[Any, Any]) -> Diagram:
        if not sizes:
            return self

        def number(value: Any) -> Any:
            return plain(value.subs(sizes, simultaneous=True)) if isinstance(value, sympy.Expr) else value

        return self._changed(lambda a: a.sized(sizes), number)

    def _changed(self, array_of: Callable[[Array], Array], size_of: Callable[[Any], Any]) -> Diagram:
        steps = tuple(dataclasses.replace(s, op=s.op.changed(array_of, size_of)) for s in self.steps)
        return Diagram(tuple(map(array_of, self.inputs)), steps, self.outputs)

    # ------------------------------------------------------------------------------------- composition

    def __rshift__(self, other: Any) -> Diagram:
        """First this, then the other; the arrays between them must be the same."""
        if not isinstance(other, Diagram):
            return NotImplemented
        left, right = unified(self, other)
        check_fit(left.cod, right.dom, "the diagram on the right")
        builder = Builder(left.inputs)
        middle = builder.put(left, builder.inputs)
        return builder.finish(builder.put(right, middle))

    def __matmul__(self, other: Any) -> Diagram:
        """This above the other, side by side."""
        if not isinstance(other, Diagram):
            return NotImplemented
        left, right = unified(self, other)
        builder = Builder((*left.inputs, *right.inputs))
        first = builder.put(left, builder.inputs[: len(left.inputs)])
        return builder.finish([*first, *builder.put(right, builder.inputs[len(left.inputs) :])])

    def lift(self, new: str | Axis, *, carried: Sequence[bool] | None = None, at: int = -1) -> Diagram:
        """Broadcast over one axis more: for every index of it the same function (`torch.vmap`).

        `carried` says which inputs have the axis (inner broadcasting); all by default. It stands last, or first with
        `at=0`. Boxes that nothing of it reaches, such as weights, stay as they are.
        """
        from neuropil.interpret.diagrams.broadcast import broadcast

        return broadcast(self, new, carried, at)

    def __call__(self, *given: Any) -> Any:
        """On wires (while a diagram is built) or on tensors (its value, for diagrams without weights)."""
        if given and isinstance(given[0], Wire):
            outs = given[0].builder.put(self, given)
            return outs[0] if len(outs) == 1 else tuple(outs)
        if all(isinstance(x, Tensor) for x in given):
            return self.torch()(*given)
        raise DiagramError("a diagram is called with wires or with tensors")

    # ------------------------------------------------------------------------------------- what to do with it

    def flat(self) -> Diagram:
        """Without blocks: their insides in their place, weights under their dotted names."""
        builder = Builder(self.inputs)
        return builder.finish(_unpack(builder, self, builder.inputs, ""))

    def torch(self, weights: Mapping[str, Tensor] | None = None, *, seed: int = 0, **sizes: Any) -> Compiled:
        """The diagram as a module that runs: see `neuropil.interpret.diagrams.run`."""
        from neuropil.interpret.diagrams.run import Compiled

        return Compiled(self.sized(**sizes) if sizes else self, weights, seed)

    def cost(self, **sizes: Any) -> Cost:
        """Operations and memory, as numbers or as polynomials in the sizes that are not known."""
        from neuropil.interpret.diagrams.cost import cost

        return cost(self.sized(**sizes) if sizes else self)

    def backward(self) -> Diagram:
        """The diagram of backpropagation: inputs and gradients of outputs in, gradients of inputs and weights out."""
        from neuropil.interpret.diagrams.reverse import backward

        return backward(self)

    def simplified(self, **sizes: Any) -> Diagram:
        """With linear steps merged and in the cheapest order: the same function, never more operations."""
        from neuropil.interpret.diagrams.rewrite import simplified

        return simplified(self.sized(**sizes) if sizes else self)

    def svg(self, **options: Any) -> str:
        """The drawing: see `neuropil.interpret.diagrams.svg.svg` for the options."""
        from neuropil.interpret.diagrams.svg import svg

        return svg(self, **options)

    def tikz(self, **options: Any) -> str:
        from neuropil.interpret.diagrams.exports import tikz

        return tikz(self, **options)

    def mermaid(self, **options: Any) -> str:
        from neuropil.interpret.diagrams.exports import mermaid

        return mermaid(self, **options)

    def describe(self, **options: Any) -> str:
        """The diagram in sentences, a line a step."""
        from neuropil.interpret.diagrams.exports import describe

        return describe(self, **options)

    def _repr_svg_(self) -> str:
        return self.svg()

    def __str__(self) -> str:
        return f"{written(self.dom)} -> {written(self.cod)}"

    def to_json(self) -> str:
        from neuropil.interpret.diagrams.serialize import to_json

        return to_json(self)

    @staticmethod
    def from_json(text: str) -> Diagram:
        """Read what `to_json` wrote."""
        from neuropil.interpret.diagrams.serialize import from_json

        return from_json(text)


class Builder:
    """Puts boxes on wires, one after another."""

    def __init__(self, inputs: Iterable[Array]) -> None:
        self.arrays: list[Array] = list(inputs)
        self.count = len(self.arrays)
        self.steps: list[Step] = []
        self.known = sizes_of(self.arrays)
        self.bound: dict[Any, Any] = {}  # of the symbols, those whose size is known
        self._bind(self.known)
        self.inputs = [Wire(i, self) for i in range(self.count)]

    def add(self, op: Op, wires: Sequence[Wire]) -> list[Wire]:
        first = len(self.arrays)
        outs = tuple(range(first, first + len(op.cod)))
        self.steps.append(Step(op, tuple(w.number for w in wires), outs))
        self.arrays += op.cod
        return [Wire(i, self) for i in outs]

    def put(self, diagram: Diagram, wires: Sequence[Wire]) -> list[Wire]:
        """All of a diagram, reading these wires."""
        diagram = diagram._bound(self.bound)
        fresh = bindings(self.known, diagram.sizes)
        diagram = diagram._bound(fresh)
        self._bind({s.name: size for s, size in fresh.items()} | diagram.sizes)
        self.known |= diagram.sizes
        check_fit(tuple(w.array for w in wires), diagram.dom, "what is applied")
        here = list(wires)
        for step in diagram.steps:
            here += self.add(step.op, [here[i] for i in step.ins])
        return [here[i] for i in diagram.outputs]

    def _bind(self, sizes: Mapping[str, Any]) -> None:
        """What was free and is now known, in all that has been put so far."""
        new = {symbol(name): size for name, size in sizes.items() if not Axis(name, size).free}
        new = {name: size for name, size in new.items() if name not in self.bound}
        if new:
            self.bound |= new
            inside = Diagram(tuple(self.arrays[: self.count]), tuple(self.steps), ())._bound(new)
            self.arrays, self.steps = list(inside.wires), list(inside.steps)
            self.known = {name: as_size(sympy.sympify(size).subs(new)) for name, size in self.known.items()}

    def finish(self, outputs: Sequence[Wire]) -> Diagram:
        """The diagram, its steps in the canonical order and those that nothing reads left out."""
        names = {i: i for i in range(self.count)}
        steps = []
        for number in self._needed(outputs):
            step = self.steps[number]
            ins = tuple(names[i] for i in step.ins)
            outs = tuple(range(len(names), len(names) + len(step.outs)))
            names |= dict(zip(step.outs, outs, strict=True))
            steps.append(Step(step.op, ins, outs))
        return Diagram(tuple(self.arrays[: self.count]), tuple(steps), tuple(names[w.number] for w in outputs))

    def _needed(self, outputs: Sequence[Wire]) -> list[int]:
        """The steps that the outputs depend on, in the order of a walk back from them, what is read first."""
        maker = {wire: number for number, step in enumerate(self.steps) for wire in step.outs}
        order: list[int] = []
        opened: set[int] = set()
        done: set[int] = set()
        for root in (maker[w.number] for w in outputs if w.number in maker):
            stack = [root]
            while stack:
                number = stack[-1]
                if number in opened:
                    stack.pop()
                    if number not in done:
                        done.add(number)
                        order.append(number)
                else:
                    opened.add(number)
                    needed = [maker[i] for i in self.steps[number].ins if i in maker]
                    stack += [n for n in reversed(needed) if n not in opened]
        return order


def unified(left: Diagram, right: Diagram) -> tuple[Diagram, Diagram]:
    bound = bindings(left.sizes, right.sizes)
    return left._bound(bound), right._bound(bound)


def join(path: str, name: str) -> str:
    """A dotted name; one that begins with a slash is whole already."""
    if name.startswith("/"):
        return name[1:]
    return f"{path}.{name}" if path and name else path or name


def _sizes_in(value: Any, size_of: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple):
        return tuple(_sizes_in(v, size_of) for v in value)
    return size_of(value)


def _unpack(builder: Builder, diagram: Diagram, wires: Sequence[Wire], path: str) -> list[Wire]:
    here = list(wires)
    for step in diagram.steps:
        ins = [here[i] for i in step.ins]
        if step.op.body is not None:
            here += _unpack(builder, step.op.body, ins, join(path, step.op.name))
            continue
        op = step.op
        if op.kind in ("weight", "opaque"):
            options = tuple((k, "/" + join(path, v) if k == "name" else v) for k, v in op.options)
            op = dataclasses.replace(op, options=options)
        here += builder.add(op, ins)
    return [here[i] for i in diagram.outputs]
