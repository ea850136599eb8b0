"""What passes along a wire, and what a system shows and takes: spaces, and interfaces made of them.

>>> Interface({"y": Real()}, {"u": Real(3)})
(y: R) y^(u: R^3)
>>> p, q = Interface(2, 2), Interface(3, 3)  # numbers are finite sets
>>> hom(p, q).out.size, hom(p, q).in_.size  # lenses from p to q, and what passes through one of them
(576, 6)
>>> polynomial(3, 0, 1) @ polynomial(2)  # inputs that depend on the output
3 x 1 outputs, each with its own inputs: y^(3 x 2) + 1 + y^(1 x 2)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuropil.errors import NeuropilError


class TypeMismatch(NeuropilError, TypeError):  # noqa: N818 - reads as the sentence it is
    """Two things of different types were joined, or a value is not of its type; the message names both."""


class Space:
    """A set of values. Tensors may have leading dimensions besides: a batch of values."""

    size: int | None = None  # how many values there are; None where they cannot be counted

    def check(self, value: Any, where: str = "a value") -> None:
        """Raise `TypeMismatch` if `value` is not of this space."""
        raise NotImplementedError

    def elements(self) -> Iterator[Any]:
        """All values of a finite space. Raises `TypeMismatch` for another."""
        raise TypeMismatch(f"{self} is not finite, so its values cannot be listed; use Finite spaces to count")

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, repr=False)
class Finite(Space):
    """The numbers 0 to n - 1, as integers or as tensors of integers."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ValueError(f"a finite space of {self.n} values; expected 0 or more")

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.n

    def check(self, value: Any, where: str = "a value") -> None:
        if isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex():
            low, high = (int(value.min()), int(value.max())) if value.numel() else (0, 0)
        elif isinstance(value, int):
            low = high = int(value)
        else:
            raise TypeMismatch(f"{where} is {_told(value)}; expected one of {self.n} values, an integer")
        if low < 0 or high >= self.n:
            raise TypeMismatch(f"{where} is {low if low < 0 else high}; expected 0 to {self.n - 1}")

    def elements(self) -> Iterator[int]:
        return iter(range(self.n))

    def __str__(self) -> str:
        return str(self.n)


class Real(Space):
    """Real tensors of a shape: `Real()` a number, `Real(3)` a vector. Dimensions before those are a batch."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def check(self, value: Any, where: str = "a value") -> None:
        if isinstance(value, float | int) and not self.shape:
            return
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeMismatch(f"{where} is {_told(value)}; expected {self}, a tensor of floating point numbers")
        if value.shape[value.ndim - len(self.shape) :] != self.shape or value.ndim < len(self.shape):
            raise TypeMismatch(f"{where} has shape {tuple(value.shape)}; expected {self}, the last dimensions")

    def batch(self, value: Tensor) -> torch.Size:
        """The dimensions of `value` before those of this space."""
        return value.shape[: value.ndim - len(self.shape)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Real) and self.shape == other.shape

    def __hash__(self) -> int:
        return hash(("Real", self.shape))

    def __str__(self) -> str:
        if not self.shape:
            return "R"
        return f"R^{self.shape[0]}" if len(self.shape) == 1 else f"R^({'x'.join(map(str, self.shape))})"


class Product(Space):
    """Values side by side: a tuple of them, or a dictionary where they have names (ports)."""

    def __init__(self, parts: Mapping[str, Any] | Sequence[Any]) -> None:
        named = isinstance(parts, Mapping)
        pairs = sorted(parts.items()) if isinstance(parts, Mapping) else list(enumerate(parts))
        self.parts: dict[Any, Space] = {key: as_space(part) for key, part in pairs}
        self.named = named or not pairs

    @property
    def size(self) -> int | None:  # type: ignore[override]
        sizes = [part.size for part in self.parts.values()]
        return None if any(size is None for size in sizes) else math.prod(sizes)  # type: ignore[arg-type]

    def check(self, value: Any, where: str = "a value") -> None:
        if not self.parts and value in ((), {}):
            return
        keys = (
            set(value) if isinstance(value, Mapping) else set(range(len(value))) if isinstance(value, tuple) else None
        )
        if keys != set(self.parts):
            raise TypeMismatch(f"{where} is {_told(value)}; expected {self}, a {'dict' if self.named else 'tuple'}")
        for key, part in self.parts.items():
            part.check(value[key], f"{where}, {key}")

    def elements(self) -> Iterator[Any]:
        for values in itertools.product(*(tuple(part.elements()) for part in self.parts.values())):
            yield dict(zip(self.parts, values, strict=True)) if self.named else values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Product) and (self.named, self.parts) == (other.named, other.parts)

    def __hash__(self) -> int:
        return hash((self.named, tuple(self.parts.items())))

    def __str__(self) -> str:
        if not self.parts:
            return "1"
        if self.named:
            return f"({', '.join(f'{key}: {part}' for key, part in self.parts.items())})"
        return " x ".join(f"({p})" if isinstance(p, Product) and not p.named else str(p) for p in self.parts.values())


UNIT = Product({})


@dataclass(frozen=True, repr=False)
class Dependent(Space):
    """Inputs that depend on the output now shown: a space for each of finitely many positions."""

    at: tuple[tuple[Any, Space], ...]

    def check(self, value: Any, where: str = "a value") -> None:
        """Nothing can be said without the position: `Interface.directions` gives the space to ask."""

    def __str__(self) -> str:
        return " + ".join("1" if part.size == 0 else f"y^{_bracket(part)}" for _, part in self.at)


@dataclass(frozen=True, repr=False)
class Sum(Space):
    """Pairs (label, value), the value from the label's space."""

    parts: tuple[tuple[Any, Space], ...]

    @property
    def size(self) -> int | None:  # type: ignore[override]
        sizes = [part.size for _, part in self.parts]
        return None if any(size is None for size in sizes) else sum(sizes)  # type: ignore[arg-type]

    def check(self, value: Any, where: str = "a value") -> None:
        for label, part in self.parts:
            if isinstance(value, tuple) and len(value) == 2 and label == value[0]:
                return part.check(value[1], where)
        raise TypeMismatch(f"{where} is {_told(value)}; expected a pair of {self}")

    def elements(self) -> Iterator[tuple[Any, Any]]:
        return ((label, value) for label, part in self.parts for value in part.elements())

    def __str__(self) -> str:
        return " + ".join(str(part) for _, part in self.parts)


@dataclass(frozen=True, repr=False)
class Interface:
    """A polynomial: what a system can show (`out`, the positions), and what it takes there (`in_`, the directions).

    Spaces may be given as such, as a number (a finite set), as a dictionary of named ports or as a tuple.
    """

    out: Space
    in_: Space

    def __init__(self, out: Any, in_: Any = UNIT) -> None:
        object.__setattr__(self, "out", as_space(out))
        object.__setattr__(self, "in_", as_space(in_))

    def directions(self, position: Any) -> Space:
        """The inputs that can be taken while `position` is shown."""
        if isinstance(self.in_, Dependent):
            for place, space in self.in_.at:
                if place == position:
                    return space
            raise TypeMismatch(f"{position!r} is no output of {self}")
        return self.in_

    def __matmul__(self, other: Interface) -> Interface:
        """Side by side: pairs of positions, pairs of directions."""
        return side_by_side((self, other))

    def __str__(self) -> str:
        if isinstance(self.in_, Dependent):
            return f"{self.out} outputs, each with its own inputs: {self.in_}"
        shown = "" if str(self.out) == "1" else f"{_bracket(self.out, around=' x ')} "
        return f"{shown}y" if str(self.in_) == "1" else f"{shown}y^{_bracket(self.in_)}"

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, repr=False)
class Lenses(Space):
    """The lenses from one interface to another: the wirings that an organisation can show."""

    source: Interface
    target: Interface

    @property
    def size(self) -> int | None:  # type: ignore[override]
        return count_lenses(self.source, self.target)

    def check(self, value: Any, where: str = "a value") -> None:
        source, target = getattr(value, "source", None), getattr(value, "target", None)
        if not hasattr(value, "put") or (source, target) != (self.source, self.target):
            raise TypeMismatch(f"{where} is {_told(value)}; expected a lens {self.source} -> {self.target}")

    def elements(self) -> Iterator[Any]:
        from neuropil.interpret.nested.lenses import lenses

        return lenses(self.source, self.target)

    def __str__(self) -> str:
        return f"{{{self.source} -> {self.target}}}"


class Hom(Interface):
    """[p, q]: shows a lens from p to q, takes what passed through it: an output of p and an input of q."""

    source: Interface
    target: Interface

    def __init__(self, source: Interface, target: Interface) -> None:
        passed = Sum(()) if isinstance(target.in_, Dependent) else Product((source.out, target.in_))
        super().__init__(Lenses(source, target), passed)
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "target", target)

    def directions(self, position: Any) -> Space:
        if not isinstance(self.target.in_, Dependent):
            return self.in_
        inside = self.source.out.elements()
        return Sum(tuple((i, self.target.directions(position.get(i))) for i in inside))

    def __str__(self) -> str:
        return f"[{self.source}, {self.target}]"


def hom(source: Interface, target: Interface) -> Hom:
    """The interface of things that wire up `source` so that it looks like `target`."""
    return Hom(source, target)


def polynomial(*exponents: int) -> Interface:
    """The sum of y^n over these n: one output each, with n possible inputs."""
    return Interface(len(exponents), Dependent(tuple((i, Finite(n)) for i, n in enumerate(exponents))))


def side_by_side(parts: Any) -> Interface:
    """The parallel product of a tuple of interfaces, or of a dictionary of them (boxes with names)."""
    out = Product(each(lambda p: p.out, parts))
    if not any(isinstance(p.in_, Dependent) for p in _values(parts)):
        return Interface(out, Product(each(lambda p: p.in_, parts)))
    at = []
    for place in out.elements():
        spaces = {key: parts[key].directions(place[key]) for key in out.parts}
        at.append((place, Product(spaces if out.named else tuple(spaces.values()))))
    return Interface(out, Dependent(tuple(at)))


def count_lenses(source: Interface, target: Interface) -> int | None:
    """How many lenses there are: prod over i of sum over j of |source[i]| ^ |target[j]|; None if not finite."""
    if source.out.size is None or target.out.size is None:
        return None
    wanted = [target.directions(j).size for j in target.out.elements()]
    total = 1
    for i in source.out.elements():
        given = source.directions(i).size
        if given is None or None in wanted:
            return None
        total *= sum(given**w for w in wanted if w is not None)
    return total


def as_space(given: Any) -> Space:
    """A space, from a space, a number, a dictionary or a tuple."""
    if isinstance(given, Space):
        return given
    if isinstance(given, int) and not isinstance(given, bool):
        return Finite(given)
    if isinstance(given, Mapping | tuple):
        return Product(given) if given else UNIT
    raise TypeMismatch(f"{given!r} is no space: give Real(...), Finite(n), a number, or a dict or tuple of spaces")


def each(act: Callable[..., Any], *containers: Any) -> Any:
    """`act` on the entries of dictionaries or tuples with the same keys."""
    first = containers[0]
    if isinstance(first, Mapping):
        return {key: act(*[c[key] for c in containers]) for key in first}  # a list: this is the inner loop
    return tuple(act(*entries) for entries in zip(*containers, strict=True))


def _values(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, Mapping) else container)


def _bracket(space: Space, around: str = " ^") -> str:
    text = str(space)
    plain = text.startswith("(") or not any(sign in text for sign in around)
    return text if plain else f"({text})"


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(str, value)) or 'nothing'}"
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"{value!r:.80}"
