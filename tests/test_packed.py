"""Packed weights: every code comes back, every byte is counted, modules stay what they were."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from neuropil import packed as pk


@given(st.integers(2, 300), st.integers(0, 200), st.integers(0, 2**31))
def test_codes_come_back(levels: int, count: int, seed: int) -> None:
    codes = torch.randint(0, levels, (count,), generator=torch.Generator().manual_seed(seed))
    stored = pk.pack_codes(codes, levels)
    assert torch.equal(pk.unpack_codes(stored, count, levels).long(), codes)
    bits = pk.code_bits(levels)
    assert bits * count <= 8 * len(stored) < bits * count + 64 + 8
    assert bits <= max(1, (levels - 1).bit_length())


def test_wide_codes_come_back() -> None:
    codes = torch.tensor([0, 65535, 1000, 4095, 7])
    assert torch.equal(pk.unpack_codes(pk.pack_codes(codes, 1 << 16), 5, 1 << 16).long(), codes)


@pytest.mark.parametrize(("codes", "levels"), [([0, 4], 4), ([-1], 4), ([0], 1), ([0], 70000)])
def test_codes_out_of_range_are_refused(codes: list[int], levels: int) -> None:
    with pytest.raises(pk.PackingError, match=r"levels|expected"):
        pk.pack_codes(torch.tensor(codes), levels)


def affine(shape: tuple[int, ...], levels: int, r: int, g: int) -> pk.Affine:
    gen = torch.Generator().manual_seed(levels)
    codes = torch.randint(0, levels, shape, generator=gen)
    return pk.Affine.of(codes, levels, torch.rand(r, g, generator=gen) + 0.5, torch.rand(r, g, generator=gen) * levels)


@pytest.mark.parametrize(("r", "g"), [(1, 1), (6, 1), (6, 4), (2, 3)])
def test_affine_is_its_formula(r: int, g: int) -> None:
    made = affine((6, 3, 4), 11, r, g)
    matrix, rows, fan = made.integers().reshape(6, 12).double(), 6 // r, 12 // g
    for i in range(6):
        for j in range(12):
            s, z = made.scale[i // rows, j // fan].double(), made.zero[i // rows, j // fan].double()
            wanted = s * (matrix[i, j] - z)
            torch.testing.assert_close(made.dense().reshape(6, 12)[i, j].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("d", [1, 2, 4])
def test_lookup_is_its_formula(d: int) -> None:
    gen = torch.Generator().manual_seed(0)
    table, codes = torch.randn(2, 3, 5, d, generator=gen), torch.randint(0, 5, (4, 12 // d), generator=gen)
    scale = torch.rand(4, 1, generator=gen)
    made = pk.Lookup.of(codes, table, (4, 12), scale)
    wanted = torch.stack(
        [torch.cat([table[i // 2, (j * d) // 4, codes[i, j]] for j in range(12 // d)]) * scale[i] for i in range(4)]
    )
    assert torch.equal(made.dense(), wanted)


def test_sparse_and_residual_are_exact() -> None:
    weight = torch.randn(5, 7).relu()
    sparse = pk.Sparse.of(weight)
    assert torch.equal(sparse.dense(), weight)
    both = pk.Residual.of([sparse, affine((5, 7), 4, 1, 1)])
    assert torch.equal(both.dense(), weight + affine((5, 7), 4, 1, 1).dense())


def test_bytes_are_what_the_bits_say() -> None:
    made = affine((128, 256), 16, 128, 8)
    assert pk.nbytes(made) == 128 * 256 // 2 + 2 * 128 * 8 * 4
    assert made.bits == 8 * pk.nbytes(made) / (128 * 256)


def test_a_spec_makes_an_equal_packing() -> None:
    table = torch.randn(1, 1, 3, 1)
    for made in (
        affine((6, 4), 5, 6, 1),
        pk.Lookup.of(torch.randint(0, 3, (6, 4)), table, (6, 4), torch.rand(6, 1)),
        pk.Lookup.of(torch.randint(0, 3, (6, 4)), table, (6, 4)),
        pk.Sparse.of(torch.randn(6, 4).relu()),
        pk.Residual.of([affine((6, 4), 5, 6, 1), pk.Sparse.of(torch.randn(6, 4).relu())]),
    ):
        again = pk.empty(made.spec())
        again.load_state_dict(made.state_dict())
        assert torch.equal(again.dense(), made.dense())


@pytest.mark.parametrize("spec", [{}, {"kind": "Affine", "shape": [1]}, {"kind": "nn.Linear", "shape": [2, 2]}])
def test_a_foreign_spec_is_refused(spec: dict[str, object]) -> None:
    with pytest.raises(pk.PackingError, match="not a packing"):
        pk.empty(spec)


def test_a_packed_module_is_still_one_of_its_kind() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 8))
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 8, 8)
    kept = {"0": affine((4, 3, 3, 3), 16, 4, 1), "3": affine((8, 144), 8, 8, 9)}
    pk.pack(model, kept)
    assert isinstance(model[0], nn.Conv2d)
    assert isinstance(model[3], nn.Linear)
    with torch.no_grad():
        plain[0].weight.copy_(kept["0"].dense())
        plain[3].weight.copy_(kept["3"].dense())
    assert torch.equal(model(x), plain(x))
    assert "0.weight" not in model.state_dict()
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    double: Any = copy.deepcopy(model).double()
    assert double(x.double()).dtype == torch.float64
    assert double[3].packing.codes.dtype == torch.uint8
    assert double[3].packing.scale.dtype == torch.float32
    pk.unpack(model)
    assert torch.equal(model(x), plain(x))
    assert type(model[0]) is nn.Conv2d
    assert not list(pk.packed_modules(model))


def test_tied_weights_share_a_packing() -> None:
    model: Any = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    pk.pack(model, {"embed": affine((10, 4), 16, 10, 1)})
    assert [name for name, *_ in pk.packed_modules(model)] == ["embed", "head"]
    ids = torch.tensor([1, 2])
    assert torch.equal(
        model["head"](model["embed"](ids)), functional.linear(model["embed"].weight[ids], model["embed"].weight)
    )
    assert pk.nbytes(model) == pk.nbytes(model["embed"])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(pk.PackingError, match="divisible"):
        affine((6, 7), 4, 6, 2)
    with pytest.raises(pk.PackingError, match="shape"):
        pk.packed(nn.Linear(3, 3), affine((6, 4), 4, 1, 1))
    with pytest.raises(pk.PackingError, match="no weight"):
        pk.packed(nn.ReLU(), affine((6, 4), 4, 1, 1))
    with pytest.raises(pk.PackingError, match="itself"):
        pk.pack(nn.Linear(4, 6), {"": affine((6, 4), 4, 1, 1)})


def test_a_parametrised_weight_is_baked_in() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    pk.pack(model, {"0": affine((4, 8), 16, 4, 1)})
    assert set(model.state_dict()) == {"0.bias", "0.packing.codes", "0.packing.scale", "0.packing.zero"}
    pk.unpack(model)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, affine((4, 8), 16, 4, 1).dense())


@pytest.mark.parametrize("levels", [3, 8, 11, 16, 256])
@pytest.mark.parametrize(("r", "g", "fan"), [(10, 1, 16), (10, 4, 16), (1, 1, 16), (5, 1, 16), (10, 1, 7)])
def test_rows_are_those_of_the_dense_weight(levels: int, r: int, g: int, fan: int) -> None:
    made, at = affine((10, fan), levels, r, g), torch.tensor([3, 3, 9, 0])
    assert torch.equal(made.rows(at), made.dense()[at])
    one = pk.Affine.of(made.integers(), levels, made.scale, 2.0)
    assert torch.equal(one.rows(at), one.dense()[at])
    model: Any = nn.Sequential(nn.Embedding(10, fan))
    pk.pack(model, {"0": made})
    assert torch.equal(model(at.reshape(2, 2)), made.dense()[at].reshape(2, 2, fan))
