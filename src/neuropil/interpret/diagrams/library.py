"""The boxes: linear maps of indices, functions of numbers, softmax, windows, learned maps.

Boxes with a full signature (`einsum`, `box`) are strict: what comes before must give these very arrays. The others
are polymorphic: they name the axes that they work on and run over all others.

>>> scores = einsum("y k, x k -> y x") >> scale("1/sqrt(k)") >> softmax("x")
>>> str(scores)
'y k, x k -> y x'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy

from neuropil.interpret.diagrams.axes import (
    Array,
    Axis,
    DiagramError,
    array,
    expression,
    plain,
    same_size,
    signature,
    symbol,
)
from neuropil.interpret.diagrams.construct import Polymorphic, of
from neuropil.interpret.diagrams.core import Diagram, Op, Options
from neuropil.interpret.diagrams.functions import FUNCTIONS, arguments

# --------------------------------------------------------------------------------------- linear maps of indices


def einsum(text: str) -> Diagram:
    """A multilinear step: inputs multiplied where they share an index, summed over what the output lacks.

    Inner and outer products, transposes, diagonals, sums and traces are all of this form.
    """
    dom, cod = signature(text)
    if len(cod) != 1:
        raise DiagramError(f"an einsum {text!r}; expected one array after the arrow")
    return einsum_of(dom, cod[0])


def einsum_of(dom: Sequence[Array], cod: Array) -> Diagram:
    known = {name for a in dom for name in a.names}
    lost = [name for name in cod.names if name not in known]
    if lost:
        raise DiagramError(f"an einsum whose output has axis {lost[0]!r}, which no input has")
    return of(Op("einsum", tuple(dom), (cod,)))


def outer(left: str, right: str) -> Diagram:
    """The outer product: every number of one array times every number of the other."""
    a, b = array(left), array(right)
    return einsum_of((a, b), Array((*a.axes, *b.axes)))


def total(axes: str) -> Polymorphic:
    """The sum over these axes."""
    names = tuple(axes.split())
    return Polymorphic(lambda a: einsum_of((a,), having(a, names, "the sum").without(names)), f"sum over {axes}")


def mean(axes: str) -> Polymorphic:
    """The mean over these axes: their sum, scaled."""
    names = tuple(axes.split())

    def make(a: Array) -> Diagram:
        count = Array(tuple(having(a, names, "the mean")[n] for n in names)).numel
        return total(axes).on(a) >> scale(sympy.Integer(1) / count)

    return Polymorphic(make, f"mean over {axes}")


def transpose(axes: str) -> Polymorphic:
    """The same array with its axes in this order."""
    names = axes.split()

    def make(a: Array) -> Diagram:
        if sorted(names) != sorted(a.names):
            raise DiagramError(f"an order {axes!r} of the axes of {str(a)!r}; expected each of them once")
        return einsum_of((a,), Array(tuple(a[n] for n in names), a.dtype))

    return Polymorphic(make, f"transpose to {axes}")


# ------------------------------------------------------------------------------------------ functions of numbers


def elementwise(name: str, number: Any = None) -> Polymorphic:
    """A function of single numbers, run over all axes; a smaller argument has some axes of the largest."""
    if name not in FUNCTIONS:
        raise DiagramError(f"no function {name!r}; there are {', '.join(FUNCTIONS)}")
    number = plain(expression(number) if isinstance(number, str) else number)
    options = (("name", name),) if number is None else (("name", name), ("number", number))

    def make(*given: Array) -> Diagram:
        if len(given) != arguments(name):
            raise DiagramError(f"{name} takes {arguments(name)} arrays; given {len(given)}")
        return of(_elementwise(name, given, options))

    return Polymorphic(make, name)


def _elementwise(name: str, given: Sequence[Array], options: Options) -> Op:
    whole = max(given, key=lambda a: len(a.axes))
    for a in given:
        for one in a.axes:
            if one.name not in whole.names:
                raise DiagramError(
                    f"{name} of {str(given[0])!r} and {', '.join(repr(str(b)) for b in given[1:])}: axis {one.name!r} "
                    f"is not in {str(whole)!r}"
                )
            if one != whole[one.name]:
                raise DiagramError(
                    f"{name}: axis {one.name!r} has size {one.size} in one argument "
                    f"and {whole[one.name].size} in another"
                )
    return Op("elementwise", tuple(given), (Array(whole.axes),), tuple(sorted(whole.names)), options)


relu, gelu, silu = elementwise("relu"), elementwise("gelu"), elementwise("silu")
sigmoid, tanh, exp, log = elementwise("sigmoid"), elementwise("tanh"), elementwise("exp"), elementwise("log")
rsqrt, square = elementwise("rsqrt"), elementwise("square")
add, sub, mul, div = elementwise("add"), elementwise("sub"), elementwise("mul"), elementwise("div")


def scale(number: Any) -> Polymorphic:
    """Times a number, or an expression in sizes such as "1/sqrt(k)"."""
    return elementwise("scale", number)


def shift(number: Any) -> Polymorphic:
    """Plus a number."""
    return elementwise("shift", number)


def softmax(over: str) -> Polymorphic:
    """Numbers that are positive and sum to one along an axis."""
    return Polymorphic(lambda a: _along("softmax", a, over, a), f"softmax over {over}")


def maximum(over: str) -> Polymorphic:
    """The largest along an axis, which it ends."""
    return Polymorphic(lambda a: _along("max", a, over, a.without([over])), f"maximum over {over}")


def _along(kind: str, a: Array, over: str, to: Array) -> Diagram:
    having(a, (over,), kind)
    others = tuple(sorted(name for name in a.names if name != over))
    return of(Op(kind, (a,), (to,), others, (("axis", over),)))


def having(a: Array, names: Sequence[str], who: str) -> Array:
    """The array; DiagramError if it lacks one of these axes."""
    missing = [name for name in names if name not in a.names]
    if missing:
        raise DiagramError(f"{who} needs axis {missing[0]!r}; the array has {str(a)!r}")
    return a


def box(name: str, text: str, function: Callable[..., Any] | None = None) -> Diagram:
    """A function of one's own on arrays, the box of the language; without `function` it is drawn and not run."""
    dom, cod = signature(text)
    options: tuple[tuple[str, Any], ...] = (("name", name),)
    return of(Op("box", dom, cod, (), options if function is None else (*options, ("function", function))))


# ------------------------------------------------------------------------------------------------- maps of indices


def reindex(a: Array, to: Array, maps: Mapping[str, Any], fill: float = 0.0, name: str = "reindex") -> Diagram:
    """`out[j] = a[A j + b]`, and `fill` where that is outside: views, diagonals, slices and windows.

    `maps` has, for each axis of `a` that is not simply kept, `(b, {axis of the output: factor})`.
    """
    return of(_affine("reindex", a, to, maps, fill, name))


def scatter(a: Array, to: Array, maps: Mapping[str, Any], name: str = "scatter") -> Diagram:
    """The adjoint of `reindex`: `out[A j + b] += a[j]`, for the axes of the output that `maps` names."""
    return of(_affine("scatter", a, to, maps, 0.0, name))


def _affine(kind: str, a: Array, to: Array, maps: Mapping[str, Any], fill: float, name: str) -> Op:
    source, target = (a, to) if kind == "reindex" else (to, a)
    for one in source.names:
        if one not in maps and one not in target.names:
            raise DiagramError(f"{name}: axis {one!r} is neither kept nor mapped")
    kept = [n for n in source.names if n not in maps]
    table = tuple(
        (axis, offset, tuple(factors.items()))
        for axis, (offset, factors) in ((n, maps[n]) for n in source.names if n in maps)
    )
    options = (("name", name), ("maps", table), ("fill", float(fill)))
    return Op(kind, (a,), (to,), tuple(sorted(kept)), options)


def rename(**names: str) -> Polymorphic:
    """The same numbers under other names of axes: `rename(x="y")`."""

    def make(a: Array) -> Diagram:
        having(a, tuple(names), "rename")
        fresh = {old: _named(new, a[old].size) for old, new in names.items()}
        to = Array(tuple(fresh.get(one.name, one) for one in a.axes), a.dtype)
        return reindex(a, to, {old: (0, {new.name: 1}) for old, new in fresh.items()}, name="rename")

    return Polymorphic(make, "rename")


def _named(text: str, size: Any) -> Axis:
    """An axis of this name; its size is the text's own, or the size given."""
    one = array(text).axes[0]
    return Axis(one.name, size) if one.free else one


def split(text: str) -> Polymorphic:
    """One axis as several, the last running fastest: "m -> h k"."""
    dom, cod = signature(text)
    (old,), new = dom[0].axes, cod[0].axes

    def make(a: Array) -> Diagram:
        have = having(a, (old.name,), "split")[old.name]
        places, size = _places(new)
        made = reindex(a, in_place(a, (old.name,), new), {old.name: (0, places)}, name="split")
        return made._bound(_equal(have, Axis(old.name, size), "split"))

    return Polymorphic(make, f"split {text}")


def merge(text: str) -> Polymorphic:
    """Several axes as one, the last running fastest: "h k -> m"."""
    dom, cod = signature(text)
    old, (new,) = dom[0].axes, cod[0].axes

    def make(a: Array) -> Diagram:
        here = [having(a, (one.name,), "merge")[one.name] for one in old]
        places, size = _places(here)
        whole = Axis(new.name, size if new.free else new.size)
        made = scatter(a, in_place(a, [one.name for one in old], [whole]), {new.name: (0, places)}, name="merge")
        return made._bound(_equal(whole, Axis(new.name, size), "merge"))

    return Polymorphic(make, f"merge {text}")


def _places(parts: Sequence[Axis]) -> tuple[dict[str, Any], Any]:
    """The place of each part's index in that of the whole, the last running fastest; and the size of the whole."""
    return {one.name: Array(tuple(parts[n + 1 :])).numel for n, one in enumerate(parts)}, Array(tuple(parts)).numel


def _equal(whole: Axis, parts: Axis, who: str) -> dict[Any, Any]:
    """What must be known for an axis to be as large as its parts together."""
    if same_size(whole.size, parts.size):
        return {}
    if whole.free:
        return {symbol(whole.name): parts.size}
    if not isinstance(parts.size, int) and len(parts.size.free_symbols) == 1:
        (unknown,) = parts.size.free_symbols
        one = sympy.sympify(whole.size) / parts.size.coeff(unknown)
        if one.is_Integer or not isinstance(whole.size, int):
            return {unknown: plain(one)}
    raise DiagramError(f"{who}: axis {whole.name!r} of size {whole.size} for parts of size {parts.size} in all")


def in_place(a: Array, old: Sequence[str], new: Sequence[Axis]) -> Array:
    """The new axes where the first of the old ones stood."""
    first = min(a.place(name) for name in old)
    axes: list[Axis] = []
    for number, one in enumerate(a.axes):
        if number == first:
            axes += new
        if one.name not in old:
            axes.append(one)
    return Array(tuple(axes), a.dtype)


def pick(axis: str, index: int) -> Polymorphic:
    """One element of an axis, which it ends."""

    def make(a: Array) -> Diagram:
        size = having(a, (axis,), "pick")[axis].size
        if isinstance(size, int) and not -size <= index < size:
            raise DiagramError(f"index {index} of axis {axis!r}, which has {size} elements")
        place = index if index >= 0 else size + index
        return reindex(a, a.without([axis]), {axis: (place, {})}, name=f"{axis}={index}")

    return Polymorphic(make, f"{axis}={index}")


def concat(into: str) -> Polymorphic:
    """Arrays one behind another along an axis: those axes in which they differ become one called `into`."""

    def make(*given: Array) -> Diagram:
        first, others = given[0], given[1:]
        differ = [n for n, one in enumerate(first.axes) if any(o.axes[n : n + 1] != (one,) for o in others)]
        if len(differ) != 1 or any(len(o.axes) != len(first.axes) for o in others):
            raise DiagramError(
                f"concat of {', '.join(repr(str(a)) for a in given)}; expected arrays that differ in one axis"
            )
        place = differ[0]
        parts = [a.axes[place] for a in given]
        size = sum((one.size for one in parts), 0)
        axes = list(first.axes)
        axes[place] = _named(into, size)
        over = tuple(sorted(n for i, n in enumerate(first.names) if i != place))
        options = (("axis", axes[place].name), ("parts", tuple(one.name for one in parts)))
        return of(Op("concat", tuple(given), (Array(tuple(axes)),), over, options))

    return Polymorphic(make, f"concat into {into}")


# ------------------------------------------------------------------------------------------------------- constants


def constant(name: str, text: str, number: float = 0.0) -> Diagram:
    """Numbers that are not learned: "eye" (a b), "causal" (y x: 0 up to the diagonal, -inf after), "full"."""
    if name not in ("eye", "causal", "full"):
        raise DiagramError(f"no constant {name!r}; there are eye, causal, full")
    return of(Op("constant", (), (array(text),), (), (("name", name), ("number", number))))
