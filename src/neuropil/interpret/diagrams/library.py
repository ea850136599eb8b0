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
    same_size,
    signature,
    symbol,
)
from neuropil.interpret.diagrams.core import Builder, Diagram, Op, Polymorphic, build, of
from neuropil.interpret.diagrams.functions import FUNCTIONS, arguments

# --------------------------------------------------------------------------------------- linear maps of indices


def einsum(text: str) -> Diagram:
    """A multilinear step: inputs multiplied where they share an index, summed over what the output lacks.

    Inner and outer products, transposes, diagonals, sums and traces are all of this form.
    """
    dom, cod = signature(text)
    return einsum_of(dom, cod[0]) if len(cod) == 1 else _refuse(text)


def _refuse(text: str) -> Diagram:
    raise DiagramError(f"an einsum {text!r}; expected one array after the arrow")


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
    return Polymorphic(lambda a: einsum_of((a,), _has(a, names, "the sum").without(names)), f"sum over {axes}")


def mean(axes: str) -> Polymorphic:
    """The mean over these axes: their sum, scaled."""
    names = tuple(axes.split())

    def make(a: Array) -> Diagram:
        count = Array(tuple(_has(a, names, "the mean")[n] for n in names)).numel
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
    if isinstance(number, str):
        number = expression(number)
    if isinstance(number, sympy.Integer):
        number = int(number)
    options = (("name", name),) if number is None else (("name", name), ("number", number))

    def make(*given: Array) -> Diagram:
        if len(given) != arguments(name):
            raise DiagramError(f"{name} takes {arguments(name)} arrays; given {len(given)}")
        return of(elementwise_op(name, given, options))

    return Polymorphic(make, name)


def elementwise_op(name: str, given: Sequence[Array], options: Any = None) -> Op:
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
    return Op(
        "elementwise", tuple(given), (Array(whole.axes),), tuple(sorted(whole.names)), options or (("name", name),)
    )


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
    return Polymorphic(lambda a: of(_along("softmax", a, over)), f"softmax over {over}")


def maximum(over: str) -> Polymorphic:
    """The largest along an axis, which it ends."""

    def make(a: Array) -> Diagram:
        op = _along("max", a, over)
        return of(Op("max", op.dom, (a.without([over]),), op.over, op.options))

    return Polymorphic(make, f"maximum over {over}")


def _along(kind: str, a: Array, over: str) -> Op:
    _has(a, (over,), kind)
    others = tuple(sorted(name for name in a.names if name != over))
    return Op(kind, (a,), (a,), others, (("axis", over),))


def _has(a: Array, names: Sequence[str], who: str) -> Array:
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
        _has(a, tuple(names), "rename")
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
        have = _has(a, (old.name,), "split")[old.name]
        places, factor = {}, 1
        for one in reversed(new):
            places[one.name], factor = factor, factor * one.size
        to = _in_place(a, (old.name,), new)
        made = reindex(a, to, {old.name: (0, dict(reversed(places.items())))}, name="split")
        return made._bound(_equal(have, Axis(old.name, factor), "split"))

    return Polymorphic(make, f"split {text}")


def merge(text: str) -> Polymorphic:
    """Several axes as one, the last running fastest: "h k -> m"."""
    dom, cod = signature(text)
    old, (new,) = dom[0].axes, cod[0].axes

    def make(a: Array) -> Diagram:
        here = [_has(a, (one.name,), "merge")[one.name] for one in old]
        places, factor = {}, 1
        for one in reversed(here):
            places[one.name], factor = factor, factor * one.size
        size = factor if new.free else new.size
        to = _in_place(a, [one.name for one in old], [Axis(new.name, size)])
        made = scatter(a, to, {new.name: (0, dict(reversed(places.items())))}, name="merge")
        return made._bound(_equal(Axis(new.name, size), Axis(new.name, factor), "merge"))

    return Polymorphic(make, f"merge {text}")


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
            return {unknown: int(one) if one.is_Integer else one}
    raise DiagramError(f"{who}: axis {whole.name!r} of size {whole.size} for parts of size {parts.size} in all")


def _in_place(a: Array, old: Sequence[str], new: Sequence[Axis]) -> Array:
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
        size = _has(a, (axis,), "pick")[axis].size
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


def weight(name: str, text: str | Array, init: str = "fan", trainable: bool = True) -> Diagram:
    """A learned array. `init`: "fan" (uniform, by the last axes' size), "zeros" or "ones"."""
    return of(Op("weight", (), (array(text),), (), (("name", name), ("init", init), ("trainable", trainable))))


# --------------------------------------------------------------------------------------------------------- learned


def linear(text: str, name: str, bias: bool = True) -> Polymorphic:
    """A learned linear map from some axes to others, over all that remain: "m -> h k".

    Its weight `NAME.weight` has the output's axes, then the input's, as `torch.nn.Linear` has.
    """
    dom, cod = signature(text)
    old, new = dom[0], cod[0]
    if set(new.names) & set(old.names):
        raise DiagramError(f"linear {name}: {text!r} has an axis on both sides; give the output's another name")

    def make(a: Array) -> Diagram:
        _has(a, old.names, f"linear {name}")
        to = _in_place(a, old.names, new.axes)
        here = Array(tuple(a[n] for n in old.names))
        w = Array((*new.axes, *here.axes))

        def apply(x: Any) -> Any:
            builder: Builder = x.builder
            kernel = builder.put(weight(f"{name}.weight", w), [])[0]
            y = einsum_of((a, w), to)(x, kernel)
            return add(y, builder.put(weight(f"{name}.bias", new), [])[0]) if bias else y

        return build((a,), apply)

    return Polymorphic(make, f"linear {name}")


def learned_scale(axes: str, name: str, init: str = "ones", trainable: bool = True) -> Polymorphic:
    """Times a learned array with these axes."""
    return _with_weight(mul, axes, name, init, trainable)


def learned_shift(axes: str, name: str, init: str = "zeros", trainable: bool = True) -> Polymorphic:
    """Plus a learned array with these axes."""
    return _with_weight(add, axes, name, init, trainable)


def _with_weight(function: Polymorphic, axes: str, name: str, init: str, trainable: bool) -> Polymorphic:
    def make(a: Array) -> Diagram:
        w = Array(tuple(_has(a, axes.split(), name)[n] for n in axes.split()))
        return build((a,), lambda x: function(x, x.builder.put(weight(name, w, init, trainable), [])[0]))

    return Polymorphic(make, name)


def embedding(text: str, name: str) -> Polymorphic:
    """Rows of a learned table: "v -> m" adds the axis m to an array of indices below v."""
    dom, cod = signature(text)

    def make(a: Array) -> Diagram:
        table = Array((*dom[0].axes, *cod[0].axes))
        op = Op("lookup", (a, table), (Array((*a.axes, *cod[0].axes)),), tuple(sorted(a.names)))
        return build((a,), lambda x: of(op)(x, x.builder.put(weight(f"{name}.weight", table, "ones"), [])[0]))

    return Polymorphic(make, f"embedding {name}")


def layer_norm(axes: str, name: str = "norm", eps: float = 1e-5) -> Polymorphic:
    """Mean 0 and variance 1 along some axes, then a learned gain and bias."""
    from neuropil.interpret.diagrams.core import block

    def inside(x: Any) -> Any:
        centred = sub(x, mean(axes)(x))
        spread = rsqrt(shift(eps)(mean(axes)(square(centred))))
        return learned_shift(axes, "bias")(learned_scale(axes, "weight")(mul(centred, spread)))

    return Polymorphic(lambda a: block(name, build((a,), inside), role="LayerNorm"), name)


def batch_norm(axis: str, name: str = "norm", eps: float = 1e-5) -> Polymorphic:
    """Batch normalisation as it answers after training: an affine map of each channel."""
    from neuropil.interpret.diagrams.core import block

    def inside(x: Any) -> Any:
        size = x.array[axis]
        put = x.builder.put
        average = put(weight("running_mean", Array((size,)), "zeros", False), [])[0]
        variance = put(weight("running_var", Array((size,)), "ones", False), [])[0]
        spread = rsqrt(shift(eps)(variance))
        return learned_shift(axis, "bias")(learned_scale(axis, "weight")(mul(sub(x, average), spread)))

    return Polymorphic(lambda a: block(name, build((a,), inside), role="BatchNorm"), name)
