"""Diagrams: boxes between arrays, in sequence (`>>`) and side by side (`@`).

A diagram is kept as what it means, not as how it was put together: the arrays that come in, the steps with the
arrays that each reads and writes, and the arrays that come out. The steps stand in the one order that a walk
from the outputs back to the inputs gives. So composition is associative, $(f \\otimes g) ; (h \\otimes k)$ and
$(f ; h) \\otimes (g ; k)$ are the same object, two swaps are none, and what is never read is not there.

Broadcasting is part of a step: `over` names the axes that run past its box.
"""

from __future__ import annotations

import dataclasses
import json
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
    array,
    arrays,
    as_size,
    expression,
    same_size,
    sizes_of,
    symbol,
    written,
)

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

    def lift(self, new: Axis, carried: Sequence[bool], at: int) -> Op:
        """Broadcast over one axis more, carried by some of the inputs."""
        if any(new.name in a.names for a in (*self.dom, *self.cod)):
            raise DiagramError(
                f"{self.name or self.kind} cannot be broadcast over {new.name!r}, which it has; rename it"
            )
        if self.kind in ("aten", "opaque", "vjp") or (self.kind == "concat" and not all(carried)):
            raise DiagramError(f"{self.name or self.kind} cannot be broadcast over {new.name!r}: no rule for it")
        dom = tuple(a.with_axis(new, at) if yes else a for a, yes in zip(self.dom, carried, strict=True))
        if self.body is not None:
            body = self.body.lift(new, carried=carried, at=at)
            return dataclasses.replace(self, dom=dom, cod=body.cod, body=body)
        cod = tuple(a.with_axis(new, at) for a in self.cod)
        over = tuple(sorted({*self.over, new.name}))
        if self.kind == "einsum":
            over = ()  # an einsum has no inside: all its axes are alike
        return dataclasses.replace(self, dom=dom, cod=cod, over=over)


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
        unknown = sorted(set(sizes) - {s.name for size in self.sizes.values() for s in _symbols(size)})
        if unknown:
            raise DiagramError(
                f"no size of this diagram is called {', '.join(unknown)}; there are {written_sizes(self.sizes)}"
            )
        return self._bound({symbol(name): size for name, size in sizes.items()})

    def _bound(self, sizes: Mapping[Any, Any]) -> Diagram:
        if not sizes:
            return self

        def number(value: Any) -> Any:
            if not isinstance(value, sympy.Expr):
                return value
            found = value.subs(sizes, simultaneous=True)
            return int(found) if isinstance(found, sympy.Integer) else found

        return self._changed(lambda a: a.sized(sizes), number)

    def _changed(self, array_of: Callable[[Array], Array], size_of: Callable[[Any], Any]) -> Diagram:
        steps = tuple(dataclasses.replace(s, op=s.op.changed(array_of, size_of)) for s in self.steps)
        return Diagram(tuple(map(array_of, self.inputs)), steps, self.outputs)

    # ------------------------------------------------------------------------------------- composition

    def __rshift__(self, other: Any) -> Diagram:
        """First this, then the other; the arrays between them must be the same."""
        if isinstance(other, Polymorphic):
            other = other.on(*self.cod)
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
        new = array(new).axes[0] if isinstance(new, str) else new
        yes = [True] * len(self.inputs) if carried is None else list(carried)
        if len(yes) != len(self.inputs):
            raise DiagramError(f"carried has {len(yes)} entries for {len(self.inputs)} inputs")
        builder = Builder([a.with_axis(new, at) if on else a for a, on in zip(self.inputs, yes, strict=True)])
        wires = list(builder.inputs)
        for step in self.steps:
            on = [yes[i] for i in step.ins]
            op = step.op.lift(new, on, at) if any(on) else step.op
            wires += builder.add(op, [wires[i] for i in step.ins])
            yes += [new.name in a.names for a in op.cod]
        return builder.finish([wires[i] for i in self.outputs])

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
        return json.dumps(_encode(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Diagram:
        """Read what `to_json` wrote."""
        return _decode(json.loads(text))


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
        maker = {wire: number for number, step in enumerate(self.steps) for wire in step.outs}
        order: list[int] = []
        state: dict[int, int] = {}
        for root in (maker[w.number] for w in outputs if w.number in maker):
            stack = [root]
            while stack:
                number = stack[-1]
                if state.get(number) == 2:
                    stack.pop()
                elif state.get(number) == 1:
                    state[number] = 2
                    order.append(stack.pop())
                else:
                    state[number] = 1
                    needed = [maker[i] for i in self.steps[number].ins if i in maker]
                    stack += [n for n in reversed(needed) if n not in state]
        names = {i: i for i in range(self.count)}
        steps = []
        for number in order:
            step = self.steps[number]
            ins = tuple(names[i] for i in step.ins)
            outs = tuple(range(len(names), len(names) + len(step.outs)))
            names |= dict(zip(step.outs, outs, strict=True))
            steps.append(Step(step.op, ins, outs))
        return Diagram(tuple(self.arrays[: self.count]), tuple(steps), tuple(names[w.number] for w in outputs))


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


# ---------------------------------------------------------------------------------------------------- fitting


def check_fit(found: Arrays, wanted: Arrays, who: str) -> None:
    """DiagramError naming the first place where two tuples of arrays differ."""
    if found == wanted:
        return
    if len(found) != len(wanted):
        raise DiagramError(
            f"{len(found)} arrays ({written(found)}) for {who}, which takes {len(wanted)} ({written(wanted)})"
        )
    for number, (have, want) in enumerate(zip(found, wanted, strict=True), 1):
        where = f"array {number} of {who}"
        if len(have.axes) != len(want.axes):
            raise DiagramError(f"{where}: given {str(have)!r} with {len(have.axes)} axes, expected {str(want)!r}")
        if have.dtype != want.dtype:
            raise DiagramError(f"{where}: given an array of {have.dtype}, expected one of {want.dtype}")
        for a, b in zip(have.axes, want.axes, strict=True):
            if a.name != b.name:
                raise DiagramError(
                    f"{where}: given axis {a.name!r} of size {a.size} where axis {b.name!r} of size {b.size} "
                    f"is expected ({str(have)!r} for {str(want)!r}); rename or transpose"
                )
            if not same_size(a.size, b.size):
                raise DiagramError(f"{where}: axis {a.name!r} of size {a.size} given, of size {b.size} expected")


def bindings(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[Any, Any]:
    """What the free sizes of both become when they share axes; DiagramError where sizes clash."""
    out: dict[Any, Any] = {}
    for name in left.keys() & right.keys():
        a, b = left[name], right[name]
        if a == b:
            continue
        if Axis(name, a).free:
            out[symbol(name)] = b
        elif Axis(name, b).free:
            out[symbol(name)] = a
        elif not same_size(a, b):
            raise DiagramError(
                f"axis {name!r} has size {a} on the left and axis {name!r} has size {b} on the right; "
                f"give one another name, or both the same size"
            )
    return dict(sorted(out.items(), key=lambda pair: str(pair[0])))


def unified(left: Diagram, right: Diagram) -> tuple[Diagram, Diagram]:
    bound = bindings(left.sizes, right.sizes)
    return left._bound(bound), right._bound(bound)


def join(path: str, name: str) -> str:
    """A dotted name; one that begins with a slash is whole already."""
    if name.startswith("/"):
        return name[1:]
    return f"{path}.{name}" if path and name else path or name


def written_sizes(sizes: Mapping[str, Any]) -> str:
    return ", ".join(sorted({s.name for size in sizes.values() for s in _symbols(size)})) or "none"


def _symbols(size: Any) -> set[Any]:
    return set() if isinstance(size, int) else size.free_symbols


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


# -------------------------------------------------------------------------------------------------------- JSON


def _encode(value: Any) -> Any:
    if isinstance(value, Diagram):
        steps = [[_encode(s.op), list(s.ins)] for s in value.steps]
        return {"inputs": [_encode(a) for a in value.inputs], "steps": steps, "outputs": list(value.outputs)}
    if isinstance(value, Op):
        return {
            "kind": value.kind,
            "dom": [_encode(a) for a in value.dom],
            "cod": [_encode(a) for a in value.cod],
            "over": list(value.over),
            "options": {key: _encode(v) for key, v in value.options},
            "order": [key for key, _ in value.options],
            "body": None if value.body is None else _encode(value.body),
        }
    if isinstance(value, Array):
        return {"dtype": value.dtype, "axes": [[a.name, _encode(a.size)] for a in value.axes]}
    if isinstance(value, sympy.Expr):
        return {"expression": str(value)}
    if isinstance(value, tuple):
        return [_encode(v) for v in value]
    if isinstance(value, float) and value != value + 0 * value:  # an infinity or no number
        return {"float": str(value)}
    if value is None or isinstance(value, str | int | float):
        return value
    raise DiagramError(f"{value!r} cannot be written to JSON; a box with a function of Python's own cannot")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "expression" in value:
        found = expression(value["expression"])
        return int(found) if isinstance(found, sympy.Integer) else found
    if "float" in value:
        return float(value["float"])
    if "axes" in value:
        return Array(tuple(Axis(name, _decode(size)) for name, size in value["axes"]), value["dtype"])
    if "steps" in value:
        builder = Builder([_decode(a) for a in value["inputs"]])
        wires = list(builder.inputs)
        for op, ins in value["steps"]:
            wires += builder.add(_decode(op), [wires[i] for i in ins])
        return builder.finish([wires[i] for i in value["outputs"]])
    options = tuple((key, _decode(value["options"][key])) for key in value["order"])
    body = None if value["body"] is None else _decode(value["body"])
    return Op(value["kind"], _decode(value["dom"]), _decode(value["cod"]), tuple(value["over"]), options, body)
