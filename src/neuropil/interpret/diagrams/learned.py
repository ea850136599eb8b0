"""The boxes that learn: weights, linear maps, embeddings and norms, under the names that `torch.nn` gives them."""

from __future__ import annotations

from typing import Any

from neuropil.interpret.diagrams.axes import Array, DiagramError, array, signature
from neuropil.interpret.diagrams.construct import Polymorphic, block, build, of
from neuropil.interpret.diagrams.core import Diagram, Op, Wire
from neuropil.interpret.diagrams.library import add, einsum_of, having, in_place, mean, mul, rsqrt, shift, square, sub


def weight(name: str, text: str | Array, init: str = "fan", trainable: bool = True) -> Diagram:
    """A learned array. `init`: "fan" (uniform, by the last axes' size), "zeros" or "ones"."""
    return of(Op("weight", (), (array(text),), (), (("name", name), ("init", init), ("trainable", trainable))))


def linear(text: str, name: str, bias: bool = True) -> Polymorphic:
    """A learned linear map from some axes to others, over all that remain: "m -> h k".

    Its weight `NAME.weight` has the output's axes, then the input's, as `torch.nn.Linear` has.
    """
    dom, cod = signature(text)
    old, new = dom[0], cod[0]
    if set(new.names) & set(old.names):
        raise DiagramError(f"linear {name}: {text!r} has an axis on both sides; give the output's another name")

    def make(a: Array) -> Diagram:
        having(a, old.names, f"linear {name}")
        to = in_place(a, old.names, new.axes)
        here = Array(tuple(a[n] for n in old.names))
        w = Array((*new.axes, *here.axes))

        def apply(x: Wire) -> Any:
            y = einsum_of((a, w), to)(x, x.beside(weight(f"{name}.weight", w)))
            return add(y, x.beside(weight(f"{name}.bias", new))) if bias else y

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
        w = Array(tuple(having(a, axes.split(), name)[n] for n in axes.split()))
        return build((a,), lambda x: function(x, x.beside(weight(name, w, init, trainable))))

    return Polymorphic(make, name)


def embedding(text: str, name: str) -> Polymorphic:
    """Rows of a learned table: "v -> m" adds the axis m to an array of indices below v."""
    dom, cod = signature(text)

    def make(a: Array) -> Diagram:
        table = Array((*dom[0].axes, *cod[0].axes))
        op = Op("lookup", (a, table), (Array((*a.axes, *cod[0].axes)),), tuple(sorted(a.names)))
        return build((a,), lambda x: of(op)(x, x.beside(weight(f"{name}.weight", table, "ones"))))

    return Polymorphic(make, f"embedding {name}")


def layer_norm(axes: str, name: str = "norm", eps: float = 1e-5) -> Polymorphic:
    """Mean 0 and variance 1 along some axes, then a learned gain and bias."""

    def inside(x: Wire) -> Any:
        centred = sub(x, mean(axes)(x))
        spread = rsqrt(shift(eps)(mean(axes)(square(centred))))
        return learned_shift(axes, "bias")(learned_scale(axes, "weight")(mul(centred, spread)))

    return Polymorphic(lambda a: block(name, build((a,), inside), role="LayerNorm"), name)


def batch_norm(axis: str, name: str = "norm", eps: float = 1e-5) -> Polymorphic:
    """Batch normalisation as it answers after training: an affine map of each channel."""

    def inside(x: Wire) -> Any:
        size = x.array[axis]
        average = x.beside(weight("running_mean", Array((size,)), "zeros", False))
        variance = x.beside(weight("running_var", Array((size,)), "ones", False))
        spread = rsqrt(shift(eps)(variance))
        return learned_shift(axis, "bias")(learned_scale(axis, "weight")(mul(sub(x, average), spread)))

    return Polymorphic(lambda a: block(name, build((a,), inside), role="BatchNorm"), name)
