"""Deep Compression and Huffman codes: streams come back, bits are counted right, zeros stay."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuropil.compress.quantize import (
    MaskedQuantizer,
    QuantizationError,
    Quantizer,
    bake,
    deep_compress,
    finetune_codebooks,
    qat_prepare,
)
from neuropil.compress.quantize.deep import count_bits, gaps, magnitude_mask, shared_weight
from neuropil.compress.quantize.huffman import huffman_bits, huffman_decode, huffman_encode, huffman_lengths
from neuropil.packed import packed_modules


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8))


def images() -> Tensor:
    return torch.randn(32, 2, 4, 4, generator=torch.Generator().manual_seed(1))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=300), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_huffman_comes_back_and_is_near_the_entropy(symbols: list[int], repeat: int) -> None:
    """Invariant 16: the mean length lies in [H, H + 1)."""
    stream = torch.tensor(symbols * repeat)
    counts = torch.bincount(stream)
    lengths = huffman_lengths(counts)
    assert torch.equal(huffman_decode(huffman_encode(stream, lengths), len(stream), lengths), stream)
    share = counts[counts > 0].double() / len(stream)
    entropy = float(-(share * share.log2()).sum())
    mean = huffman_bits(stream) / len(stream)
    assert entropy - 1e-9 <= mean < entropy + 1 + 1e-9
    if len(share) > 1:
        assert mean < entropy + 1
        assert float((0.5 ** lengths[lengths > 0].double()).sum()) == 1  # Kraft's sum of a full code
    assert 0 <= 8 * len(huffman_encode(stream, lengths)) - huffman_bits(stream) < 8


def test_bad_huffman() -> None:
    lengths = huffman_lengths(torch.tensor([3, 0, 1]))
    with pytest.raises(QuantizationError, match="without a code"):
        huffman_encode(torch.tensor([1]), lengths)
    with pytest.raises(QuantizationError, match="ends after"):
        huffman_decode(torch.zeros(1, dtype=torch.uint8), 100, lengths)
    assert huffman_bits(torch.zeros(0, dtype=torch.int64)) == 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=200), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_gaps_tell_where_codes_were(codes: list[int], bits: int) -> None:
    dense = torch.tensor(codes)
    stored, gap = gaps(dense, bits)
    assert gap.numel() == 0 or (int(gap.min()) >= 0 and int(gap.max()) < 2**bits)
    back = torch.zeros_like(dense)
    back[(gap + 1).cumsum(0) - 1] = stored
    assert torch.equal(back, dense)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.93])
def test_pruned_and_shared(sparsity: float) -> None:
    w = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    packing = shared_weight(w, sparsity, 3)
    dense = packing.dense()
    assert dense.unique().numel() == (8 if sparsity else 7)
    kept = magnitude_mask(w, sparsity)
    assert int(kept.sum()) == 2000 - int(sparsity * 2000)
    assert not dense[~kept].any()
    assert w[kept].abs().min() >= (w[~kept].abs().max() if sparsity else 0)
    bits = count_bits(packing)
    assert bits.kept == int((packing.integers() > 0).sum())
    assert (bits.weights, bits.dense) == (2000, 64000)
    stored, gap = gaps(packing.integers().flatten().long(), 5)
    assert bits.pruned == len(stored) * 37
    assert bits.shared == len(stored) * 8 + 8 * 32
    assert bits.huffman == huffman_bits(stored) + huffman_bits(gap) + 8 * 32 + 5 * 8 + 5 * 32


def test_deep_compression_of_a_model() -> None:
    model, x = net(), images()
    changes, report = deep_compress(model, 0.8, 4)
    assert set(report.layers) == set(changes.changed) == {"0", "3", "5"}
    assert all(layer.kept <= math.ceil(0.2 * layer.weights) + 1 for layer in report.layers.values())
    big = report.layers["3"]
    assert big.huffman < big.shared < big.pruned < big.dense
    assert report.ratio > 8
    assert "times smaller" in str(report)
    tuned = finetune_codebooks(changes.model).model
    zeros = tuned[3].weight == 0
    before = tuned[3].weight.detach().clone()
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        (tuned(x) - model(x).detach()).square().mean().backward()
        optimizer.step()
    assert torch.equal(tuned[3].weight == 0, zeros)
    assert not torch.equal(tuned[3].weight, before)
    for bad in ((1.0, 4), (-0.1, 4), (0.5, 9)):
        with pytest.raises(QuantizationError, match="expected"):
            deep_compress(model, *bad)
    with pytest.raises(QuantizationError, match="no weight"):
        shared_weight(torch.zeros(3, 3), 0.5, 2)


def test_pruning_and_rounding_in_one() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 32)
    parametrize.register_parametrization(layer, "weight", MaskedQuantizer(Quantizer(4, gradient="identity"), 0.75))
    assert float((layer.weight == 0).float().mean()) >= 0.75
    layer.weight.sum().backward()
    assert bool((layer.parametrizations.weight.original.grad == 1).all())
    made = qat_prepare(net(), MaskedQuantizer(Quantizer(4, granularity="channel"), 0.5)).model
    x = images()
    assert torch.equal(bake(made).model(x), made(x))
    assert len(list(packed_modules(bake(made).model))) == 3
    with pytest.raises(QuantizationError, match="sparsity"):
        MaskedQuantizer(Quantizer(4), 1.0)
