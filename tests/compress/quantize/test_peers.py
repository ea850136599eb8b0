"""The same scales, codes and weights as torchao and optimum-quanto, where they do the same."""

import pytest
import torch

from neuropil.compress.quantize import Quantizer


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_affine_groups_are_those_of_torchao(group: int, bits: int) -> None:
    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    w = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    q = Quantizer(bits, "affine", ("group", group))
    codes = q.codes(w)
    block = (1, group)
    scale, zero = ao.choose_qparams_affine(w, ao.MappingType.ASYMMETRIC, block, torch.uint8, 0, 2**bits - 1)
    torch.testing.assert_close(q.grid.scale, scale, rtol=1e-6, atol=0)
    assert torch.equal(q.grid.zero, zero.to(q.grid.zero.dtype))
    peer = ao.quantize_affine(w, block, scale, zero, torch.uint8, 0, 2**bits - 1)
    at = w.reshape(48, -1, group) / scale[..., None]
    off_ties = ((at - at.floor() - 0.5).abs() > 1e-4).reshape(w.shape)
    assert torch.equal(codes[off_ties], peer.int()[off_ties])
    dense = ao.dequantize_affine(peer, block, scale, zero, torch.uint8, 0, 2**bits - 1)
    torch.testing.assert_close(q(w)[off_ties], dense[off_ties], rtol=1e-5, atol=1e-6)


def test_symmetric_channels_are_those_of_torchao() -> None:
    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    w = torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    q = Quantizer(8, "symmetric", "channel")
    codes = q.codes(w)
    scale, _ = ao.choose_qparams_affine(w, ao.MappingType.SYMMETRIC, (1, 128), torch.int8, -128, 127)
    torch.testing.assert_close(q.grid.scale.flatten(), scale.flatten(), rtol=1e-6, atol=0)
    peer = ao.quantize_affine(w, (1, 128), scale, torch.zeros_like(scale).int(), torch.int8, -128, 127)
    at = w / q.grid.scale
    off_ties = (at - at.floor() - 0.5).abs() > 1e-4
    assert torch.equal(codes[off_ties], peer.int()[off_ties])


def test_restricted_channels_are_those_of_quanto() -> None:
    quanto = pytest.importorskip("optimum.quanto")
    w = torch.randn(48, 128, generator=torch.Generator().manual_seed(2))
    scale = quanto.AbsmaxOptimizer()(w, quanto.qint8, axis=0)
    peer = quanto.quantize_weight(w, quanto.qint8, 0, scale, optimized=False)
    q = Quantizer(8, "restricted", "channel")
    rounded = q(w)
    torch.testing.assert_close(q.grid.scale, scale.reshape(48, 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rounded, peer.dequantize(), rtol=0, atol=float(scale.max()) * 1.001)
    same = (rounded - peer.dequantize()).abs() < 1e-6
    assert same.float().mean() > 0.999
