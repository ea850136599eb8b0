"""Every item of the survey is there, or said not to be."""

from neuropil.compress.quantize import list_methods
from neuropil.compress.quantize.methods import Method


def test_all_items_are_listed() -> None:
    methods = list_methods()
    assert list(methods) == list(range(1, 43))
    for number, method in methods.items():
        assert isinstance(method, Method)
        assert method.number == number
        assert method.name
        assert all(callable(call) for call in method.calls)
    assert all("out of scope" in methods[n].note and not methods[n].calls for n in (40, 41))


def test_what_is_built_has_a_callable() -> None:
    methods = list_methods()
    for number in (*range(1, 40), 42):
        assert methods[number].calls, methods[number].name
