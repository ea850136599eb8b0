"""Windows that slide along axes: convolutions and poolings as a map of indices, then a contraction.

A window on axis x is the affine map $x = s\\,x' + d\\,k - p$ from the output's index $x'$ and the place $k$ in the
window; a convolution reads through it and contracts, its transpose contracts and writes through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any, NamedTuple

import sympy

from neuropil.interpret.diagrams.axes import Array, Axis, DiagramError, as_size, same_size, signature
from neuropil.interpret.diagrams.construct import Polymorphic, build, identity
from neuropil.interpret.diagrams.core import Diagram, Wire
from neuropil.interpret.diagrams.learned import weight
from neuropil.interpret.diagrams.library import add, einsum_of, having, in_place, maximum, mean, reindex, scatter


class Window(NamedTuple):
    """A window on an axis: the name of the axis that comes out, its size, step, padding and dilation."""

    to: str
    size: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def out(self, size: Any) -> Any:
        """How many places the window has on an axis of this size."""
        reach = size + 2 * self.padding - self.dilation * (self.size - 1) - 1
        if isinstance(reach, int) and reach < 0:
            raise DiagramError(f"a window of {self.size} on an axis of size {size}; it does not fit")
        return reach // self.stride + 1 if isinstance(reach, int) else as_size(sympy.floor(reach / self.stride) + 1)

    def back(self, size: Any) -> Any:
        """The size that a transposed convolution gives back."""
        return as_size((size - 1) * self.stride - 2 * self.padding + self.dilation * (self.size - 1) + 1)

    def map(self, name: str) -> tuple[int, dict[str, int]]:
        """The index of the wide axis from those of the narrow one and of the window."""
        return -self.padding, {name: self.stride, self.place(name): self.dilation}

    def place(self, name: str) -> str:
        """The name of the axis of places in the window: `k3x` for a window of 3 on x."""
        return f"k{self.size}{name}"


Windows = Mapping[str, Window]


def _new(window: Window, old: Axis, size: Any) -> Axis:
    """The axis that comes out; it may keep its name where it keeps its size."""
    if window.to == old.name and not same_size(size, old.size):
        raise DiagramError(
            f"a window on axis {old.name!r} of size {old.size} gives size {size}; give the new axis another name"
        )
    return Axis(window.to, size)


def unfold(windows: Windows, fill: float = 0.0) -> Polymorphic:
    """Every window of an array, its places on new axes: axis x becomes x' and k3x'."""

    def make(a: Array) -> Diagram:
        having(a, tuple(windows), "a window")
        new = {n: _new(w, a[n], w.out(a[n].size)) for n, w in windows.items()}
        places = tuple(Axis(w.place(w.to), w.size) for w in windows.values())
        to = Array((*(new.get(one.name, one) for one in a.axes), *places))
        return reindex(a, to, {n: w.map(w.to) for n, w in windows.items()}, fill, "window")

    return Polymorphic(make, "unfold")


def conv(channels: str, name: str, windows: Windows, bias: bool = True) -> Polymorphic:
    """A learned convolution, "c -> d": its weight has the axes d, c, then the windows', as `torch.nn.Conv2d` has."""
    dom, cod = signature(channels)

    def make(a: Array) -> Diagram:
        old = having(a, dom[0].names, f"conv {name}")
        opened = unfold(windows).on(a) if windows else identity((a,))
        wide = opened.cod[0]
        places = tuple(wide[w.place(w.to)] for w in windows.values())
        kernel = Array((*cod[0].axes, *(old[n] for n in dom[0].names), *places))
        to = in_place(wide.without([p.name for p in places]), dom[0].names, cod[0].axes)

        def apply(x: Wire) -> Any:
            w = x.beside(weight(f"{name}.weight", kernel))
            y = einsum_of((wide, kernel), to)(opened(x), w)
            return add(y, x.beside(weight(f"{name}.bias", cod[0]))) if bias else y

        return build((a,), apply)

    return Polymorphic(make, f"conv {name}")


def conv_transpose(channels: str, name: str, windows: Windows, bias: bool = True) -> Polymorphic:
    """The adjoint of a convolution, learned: weight c, d, then the windows', as `torch.nn.ConvTranspose2d` has."""
    dom, cod = signature(channels)

    def make(a: Array) -> Diagram:
        old = having(a, (*dom[0].names, *windows), f"conv_transpose {name}")
        places = tuple(Axis(w.place(n), w.size) for n, w in windows.items())
        kernel = Array((*(old[n] for n in dom[0].names), *cod[0].axes, *places))
        flat = in_place(a, dom[0].names, cod[0].axes)
        wide = Array((*flat.axes, *places))
        new = {n: _new(w, a[n], w.back(a[n].size)) for n, w in windows.items()}
        to = Array(tuple(new.get(one.name, one) for one in flat.axes))

        def apply(x: Wire) -> Any:
            y = einsum_of((a, kernel), wide)(x, x.beside(weight(f"{name}.weight", kernel)))
            y = scatter(wide, to, {w.to: w.map(n) for n, w in windows.items()}, "window")(y)
            return add(y, x.beside(weight(f"{name}.bias", cod[0]))) if bias else y

        return build((a,), apply)

    return Polymorphic(make, f"conv_transpose {name}")


def max_pool(windows: Windows) -> Polymorphic:
    """The largest number of every window."""

    def make(a: Array) -> Diagram:
        made = unfold(windows, -inf).on(a)
        for window in windows.values():
            made = made >> maximum(window.place(window.to))
        return made

    return Polymorphic(make, "max_pool")


def mean_pool(windows: Windows) -> Polymorphic:
    """The mean of every window."""
    return unfold(windows) >> mean(" ".join(window.place(window.to) for window in windows.values()))
