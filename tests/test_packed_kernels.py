"""The kernels for packed weights against the dense weight, in double precision."""

import pytest
import torch
from torch import nn

from neuropil.packed import Affine, Packing, Sparse, nbytes, pack
from neuropil.packed_kernels import linear


def affine(levels: int, r: int, g: int, zero: str = "middle", rows: int = 48, fan: int = 128) -> Affine:
    gen = torch.Generator().manual_seed(levels + r + g)
    codes = torch.randint(0, levels, (rows, fan), generator=gen)
    scale = torch.rand(r, g, generator=gen) / levels + 0.01
    middle = float(levels // 2)
    zeros: torch.Tensor | float = middle if zero == "middle" else torch.rand(r, g, generator=gen) * levels
    return Affine.of(codes, levels, scale, zeros)


def error(packing: Packing, x: torch.Tensor, out: torch.Tensor) -> float:
    """Relative to what the largest sum of bfloat16 roundings can be."""
    dense = packing.dense().double()
    wanted = x.double() @ dense.T
    room = x.double().abs() @ dense.abs().T
    return float(((out.double() - wanted).abs() / room).max())


@pytest.mark.parametrize("packing", [affine(256, 48, 1), affine(255, 48, 1), affine(200, 48, 1)])
@pytest.mark.parametrize("batch", [(1,), (2, 5), (70,)])
def test_eight_bits(packing: Affine, batch: tuple[int, ...]) -> None:
    x = torch.randn(*batch, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = linear(packing, x)
    assert out is not None
    assert out.shape == (*batch, 48)
    assert error(packing, x, out) < 2**-7


@pytest.mark.parametrize(
    "packing",
    [affine(16, 48, 4), affine(16, 48, 1, "own"), affine(15, 1, 1), affine(4, 48, 2, "own"), affine(8, 48, 4)],
)
@pytest.mark.parametrize("batch", [(1,), (2, 5), (70,)])
def test_four_bits_and_fewer(packing: Affine, batch: tuple[int, ...]) -> None:
    x = torch.randn(*batch, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = linear(packing, x)
    assert out is not None
    assert error(packing, x, out) < 2**-6
    assert torch.equal(out, linear(packing, x))  # type: ignore[arg-type]


def test_where_there_is_no_kernel_the_weight_is_made_dense() -> None:
    x = torch.randn(3, 128).bfloat16()
    for packing in (
        affine(256, 48, 4),
        affine(256, 48, 1, "own"),
        affine(32, 48, 1),
        affine(16, 48, 8),
        Sparse.of(torch.eye(128)),
    ):
        assert linear(packing, x) is None
        model = nn.Sequential(nn.Linear(128, packing.shape[0]).bfloat16())
        pack(model, {"0": packing})
        assert model(x).shape == (3, packing.shape[0])
    assert linear(affine(256, 48, 1), x.float()) is None
    assert linear(affine(256, 48, 1), x.requires_grad_()) is None


def test_a_packed_layer_uses_its_kernel_and_keeps_its_bias() -> None:
    layer = nn.Linear(128, 48).bfloat16()
    model, packing, x = nn.Sequential(layer), affine(16, 48, 4), torch.randn(3, 128).bfloat16()
    size = nbytes(packing)
    pack(model, {"0": packing})
    with torch.no_grad():
        out = linear(packing, x)
        assert out is not None
        assert torch.equal(model(x), out + layer.bias)
    assert nbytes(packing) == size, "what is laid out for the kernel is not stored"


@pytest.mark.parametrize(("rows", "fan"), [(8, 8), (8, 24), (32, 40), (64, 20), (64, 100), (33, 17), (33, 16), (7, 32)])
@pytest.mark.parametrize("levels", [256, 16])
def test_sizes_that_the_kernels_do_not_take(rows: int, fan: int, levels: int) -> None:
    packing, x = affine(levels, rows, 1, rows=rows, fan=fan), torch.randn(3, fan).bfloat16()
    model = nn.Sequential(nn.Linear(fan, rows, bias=False).bfloat16())
    pack(model, {"0": packing})
    with torch.no_grad():
        assert error(packing, x, model[0](input=x)) < 2**-6
