"""Lenses: maps of interfaces. A constant wiring is a lens from the boxes inside to the interface outside.

A lens p -> q shows an output of q for every output of p (`get`), and turns an input of q, taken while p showed that
output, into an input of p (`put`).

>>> from neuropil.interpret.nested import Real
>>> double = Lens(Interface(Real(), Real()), Interface(Real(), Real()), lambda a: 2 * a, lambda a, d: d + a)
>>> four = double >> double
>>> four.get(3.0), four.put(3.0, 1.0)  # put: 1 + 6 by the outer, then + 3 by the inner
(12.0, 10.0)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from neuropil.interpret.nested.spaces import Interface, TypeMismatch, each, hom, side_by_side

Back = Callable[[Any], Any]


class Lens:
    """`get`: output of `source` -> output of `target`; `put`: (output of source, input of target) -> input of source.

    `both`, if given, computes them in one go: output of source -> (output of target, input of target -> input of
    source). `f >> g` is f, then g outside it; `f @ g` is both side by side.
    """

    def __init__(
        self,
        source: Interface,
        target: Interface,
        get: Callable[[Any], Any],
        put: Callable[[Any, Any], Any],
        name: str = "lens",
        both: Callable[[Any], tuple[Any, Back]] | None = None,
    ) -> None:
        self.source, self.target, self.get, self.put, self.name = source, target, get, put, name
        self._both = both

    def forward(self, inside: Any) -> tuple[Any, Back]:
        """What is shown outside, and what then takes an input from outside to the input inside."""
        if self._both is not None:
            return self._both(inside)
        return self.get(inside), lambda outside: self.put(inside, outside)

    def __rshift__(self, other: Any) -> Lens:
        if not isinstance(other, Lens):
            return NotImplemented
        if self.target != other.source:
            raise TypeMismatch(f"{self.name} shows {self.target}, but {other.name} is around {other.source}")

        def both(inside: Any) -> tuple[Any, Back]:
            middle, back = self.forward(inside)
            outside, further_back = other.forward(middle)
            return outside, lambda given: back(further_back(given))

        return Lens(
            self.source,
            other.target,
            lambda inside: other.get(self.get(inside)),
            lambda inside, outside: both(inside)[1](outside),
            f"{self.name} >> {other.name}",
            both,
        )

    def __matmul__(self, other: Any) -> Lens:
        if not isinstance(other, Lens):
            return NotImplemented
        return lenses_side_by_side((self, other))

    def __repr__(self) -> str:
        return f"{self.name}: {self.source} -> {self.target}"

    def table(self) -> dict[Any, tuple[Any, dict[Any, Any]]]:
        """A lens of finite interfaces written out: output -> (output shown, input given -> input passed on)."""
        return {
            i: (self.get(i), {d: self.put(i, d) for d in self.target.directions(self.get(i)).elements()})
            for i in self.source.out.elements()
        }


def identity(interface: Interface) -> Lens:
    """The wires that change nothing."""
    return Lens(interface, interface, lambda out: out, lambda out, given: given, "identity")


def swap(first: Interface, second: Interface) -> Lens:
    """first @ second -> second @ first."""
    return Lens(first @ second, second @ first, lambda out: out[::-1], lambda out, given: given[::-1], "swap")


def lenses_side_by_side(parts: Any) -> Lens:
    """The parallel product of a tuple or dictionary of lenses."""
    return Lens(
        side_by_side(each(lambda f: f.source, parts)),
        side_by_side(each(lambda f: f.target, parts)),
        lambda inside: each(lambda f, i: f.get(i), parts, inside),
        lambda inside, outside: each(lambda f, i, d: f.put(i, d), parts, inside, outside),
        " @ ".join(f.name for f in (parts.values() if isinstance(parts, dict) else parts)),
    )


def lenses(source: Interface, target: Interface) -> Iterator[Lens]:
    """All lenses between two finite interfaces."""
    places = list(source.out.elements())
    choices = [list(_choices(source, target, i)) for i in places]
    for chosen in itertools.product(*choices):
        yield from_table(source, target, dict(zip(places, chosen, strict=True)))


def from_table(source: Interface, target: Interface, table: dict[Any, tuple[Any, dict[Any, Any]]]) -> Lens:
    """The lens that `Lens.table` wrote out."""
    return Lens(source, target, lambda i: table[i][0], lambda i, d: table[i][1][d], "table")


def _choices(source: Interface, target: Interface, i: Any) -> Iterator[tuple[Any, dict[Any, Any]]]:
    given = list(source.directions(i).elements())
    for j in target.out.elements():
        wanted = list(target.directions(j).elements())
        for values in itertools.product(given, repeat=len(wanted)):
            yield j, dict(zip(wanted, values, strict=True))


def curry(lens: Lens, first: Interface, second: Interface) -> Lens:
    """first @ second -> r as first -> [second, r]: for each output of the first, a wiring of the second."""
    inner = hom(second, lens.target)

    def get(a: Any) -> Lens:
        return Lens(second, lens.target, lambda b: lens.get((a, b)), lambda b, d: lens.put((a, b), d)[1], "curried")

    return Lens(first, inner, get, lambda a, passed: lens.put((a, passed[0]), passed[1])[0], f"curry({lens.name})")


def uncurry(lens: Lens) -> Lens:
    """The inverse of `curry`."""
    inner: Any = lens.target
    if not hasattr(inner, "source"):
        raise TypeMismatch(f"{lens.name} ends in {inner}; expected an internal hom [q, r]")

    def put(pair: Any, d: Any) -> Any:
        a, b = pair
        return lens.put(a, (b, d)), lens.get(a).put(b, d)

    return Lens(
        lens.source @ inner.source, inner.target, lambda ab: lens.get(ab[0]).get(ab[1]), put, f"uncurry({lens.name})"
    )
