"""Interfaces and lenses: the laws of the category, counts by enumeration, currying."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuropil.errors import NeuropilError
from neuropil.interpret.nested import (
    UNIT,
    Finite,
    Interface,
    Lens,
    Product,
    Real,
    TypeMismatch,
    count_lenses,
    curry,
    hom,
    identity,
    lenses,
    parallel,
    polynomial,
    swap,
    uncurry,
)
from neuropil.interpret.nested.lenses import from_table

small = st.lists(st.integers(0, 2), min_size=1, max_size=3).map(lambda exponents: polynomial(*exponents))
inhabited = st.lists(st.integers(1, 2), min_size=1, max_size=2).map(lambda exponents: polynomial(*exponents))
monomial = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda n: Interface(*n))


@st.composite
def chains(draw: st.DrawFn, length: int) -> list[Lens]:
    """Lenses that can be composed, drawn by their tables."""
    faces = [draw(st.one_of(inhabited, monomial)) for _ in range(length + 1)]
    return [draw(lens_of(a, b)) for a, b in itertools.pairwise(faces)]


@st.composite
def lens_of(draw: st.DrawFn, source: Interface, target: Interface) -> Lens:
    table = {}
    for i in source.out.elements():
        j = draw(st.sampled_from(list(target.out.elements())))
        back = st.sampled_from(list(source.directions(i).elements()))
        table[i] = (j, {d: draw(back) for d in target.directions(j).elements()})
    return from_table(source, target, table)


# --- the category of lenses --------------------------------------------------------------------------


@given(chains(3))
@settings(max_examples=40, deadline=None)
def test_composition_is_associative_and_has_identities(chain: list[Lens]) -> None:
    f, g, h = chain
    assert ((f >> g) >> h).table() == (f >> (g >> h)).table()
    assert (identity(f.source) >> f).table() == f.table() == (f >> identity(f.target)).table()


@given(chains(2), chains(2))
@settings(max_examples=40, deadline=None)
def test_side_by_side_is_a_functor_and_symmetric(left: list[Lens], right: list[Lens]) -> None:
    (f, h), (g, k) = left, right
    assert ((f @ g) >> (h @ k)).table() == ((f >> h) @ (g >> k)).table()
    assert ((f @ g) >> swap(f.target, g.target)).table() == (swap(f.source, g.source) >> (g @ f)).table()
    twice = swap(f.source, g.source) >> swap(g.source, f.source)
    assert twice.table() == identity(f.source @ g.source).table()


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_laws_on_tensors_to_the_bit(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes = [2, 3, 4, 2]

    def lens(a: int, b: int) -> Lens:
        forth, back = draw(a, b), draw(a + b, a)
        faces = (Interface(Real(n), Real(n)) for n in (a, b))
        return Lens(*faces, lambda x: (x @ forth).tanh(), lambda x, d: torch.cat([x, d], -1) @ back)

    f, g, h = (lens(a, b) for a, b in itertools.pairwise(sizes))
    x, d = draw(5, 2), draw(5, 2)
    one, other = (f >> g) >> h, f >> (g >> h)
    assert torch.equal(one.get(x), other.get(x))
    assert torch.equal(one.put(x, d), other.put(x, d))
    out, back = one.forward(x)
    assert torch.equal(out, one.get(x))
    assert torch.equal(back(d), one.put(x, d))


def test_lenses_of_other_types_do_not_compose() -> None:
    with pytest.raises(TypeMismatch, match=r"shows 2 y\^2, but identity is around 3 y\^3"):
        identity(Interface(2, 2)) >> identity(Interface(3, 3))
    assert issubclass(TypeMismatch, TypeError)
    assert issubclass(TypeMismatch, NeuropilError)


# --- counting ----------------------------------------------------------------------------------------


@given(small, small)
@settings(max_examples=40, deadline=None)
def test_lenses_are_counted_as_they_are_listed(p: Interface, q: Interface) -> None:
    exponents = {r: [r.directions(i).size for i in r.out.elements()] for r in (p, q)}
    formula = prod(sum(a**b for b in exponents[q]) for a in exponents[p])
    assert count_lenses(p, q) == formula
    if formula < 2000:
        listed = list(lenses(p, q))
        assert len(listed) == formula == len({str(lens.table()) for lens in listed})
        for lens in listed[:20]:
            hom(p, q).out.check(lens)


def test_three_polynomials_by_hand() -> None:
    y, square_plus_one, two = polynomial(1), polynomial(2, 0), polynomial(0, 0)
    assert count_lenses(y, square_plus_one) == 2  # y -> y^2 one way, y -> 1 one way
    assert count_lenses(square_plus_one, y) == 2 * 0 + 0  # from the output without inputs none can be passed on
    assert count_lenses(square_plus_one, two) == 4
    assert count_lenses(polynomial(3), polynomial(2, 1)) == 9 + 3


def test_the_hom_of_two_copying_systems() -> None:
    p, q = Interface(2, 2), Interface(3, 3)
    assert hom(p, q).out.size == 3**2 * 2**6 == 576
    assert hom(p, q).in_.size == 6
    assert sum(1 for _ in lenses(p, q)) == 576
    assert str(hom(p, q)) == "[2 y^2, 3 y^3]"


def test_directions_of_a_hom_depend_on_the_lens() -> None:
    p, q = polynomial(1, 1), polynomial(0, 3)
    inner = hom(p, q)
    for lens in lenses(p, q):
        counted = sum(q.directions(lens.get(i)).size for i in p.out.elements())
        assert inner.directions(lens).size == counted == len(list(inner.directions(lens).elements()))


@given(inhabited, inhabited, inhabited)
@settings(max_examples=25, deadline=None)
def test_currying_keeps_the_count(p: Interface, q: Interface, r: Interface) -> None:
    assert count_lenses(p @ q, r) == count_lenses(p, hom(q, r))


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_currying_and_back_is_the_identity(data: st.DataObject) -> None:
    p, q, r = (data.draw(inhabited) for _ in range(3))
    lens = data.draw(lens_of(p @ q, r))
    assert uncurry(curry(lens, p, q)).table() == lens.table()


def test_only_a_lens_into_a_hom_can_be_uncurried() -> None:
    with pytest.raises(TypeMismatch, match="expected an internal hom"):
        uncurry(identity(Interface(2, 2)))


# --- spaces ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "value", "message"),
    [
        (Real(3), torch.zeros(4), r"shape \(4,\); expected R\^3"),
        (Real(2, 3), torch.zeros(3), r"expected R\^\(2x3\)"),
        (Real(3), torch.zeros(3, dtype=torch.long), "floating point"),
        (Real(), "one", "'one'; expected R"),
        (Finite(3), 3, "3; expected 0 to 2"),
        (Finite(3), torch.tensor([0, -1]), "-1; expected 0 to 2"),
        (Finite(3), 0.5, "an integer"),
        (Product({"u": Real(), "v": Real()}), {"u": 1.0}, "a dict of u; expected"),
        (Product((Finite(2), Finite(2))), (0, 2), "1 is 2; expected 0 to 1"),
        (Product((Finite(2), Finite(2))), 1, "a tuple"),
        (UNIT, 1.0, "expected 1"),
    ],
)
def test_values_of_another_space_are_refused(space: object, value: object, message: str) -> None:
    with pytest.raises(TypeMismatch, match=message):
        space.check(value, "it")  # type: ignore[attr-defined]


def test_batches_are_values() -> None:
    Real(3).check(torch.zeros(5, 2, 3))
    Real().check(torch.zeros(7))
    Finite(4).check(torch.tensor([[0, 3]]))
    Product({"u": Real(2)}).check({"u": torch.zeros(9, 2)})
    assert Real(3).batch(torch.zeros(5, 2, 3)) == (5, 2)


def test_spaces_are_read_from_numbers_tuples_and_dictionaries() -> None:
    face = Interface({"b": Real(), "a": 2}, (3, Real(2)))
    assert face == Interface(Product({"a": Finite(2), "b": Real()}), Product((Finite(3), Real(2))))
    assert hash(face) == hash(Interface({"a": 2, "b": Real()}, (3, Real(2))))
    assert str(face) == "(a: 2, b: R) y^(3 x R^2)"
    assert str(Interface(Real(3))) == "R^3 y"
    assert str(Interface((), Real())) == "y^R"
    with pytest.raises(TypeMismatch, match="is no space"):
        Interface("real")
    with pytest.raises(TypeMismatch, match="not finite"):
        Real(2).elements()
    with pytest.raises(ValueError, match="0 or more"):
        Finite(-1)


def test_dependent_interfaces_side_by_side() -> None:
    p, q = polynomial(2, 0), polynomial(3)
    both = parallel((p, q))
    assert [both.directions(place).size for place in both.out.elements()] == [6, 0]
    with pytest.raises(TypeMismatch, match="no output"):
        both.directions((5, 0))


def test_parallel_wants_all_of_one_sort() -> None:
    with pytest.raises(TypeMismatch, match="expected all of one sort"):
        parallel((Interface(2, 2), identity(Interface(2, 2))))
