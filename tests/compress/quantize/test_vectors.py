"""Product quantization: lossless where it can be, at the weighted optimum, fine-tuned, baked."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from neuropil.compress.quantize import (
    ProductQuantizer,
    QuantizationError,
    bake,
    finetune_codebooks,
    product_quantize,
    quantize_model,
)
from neuropil.compress.quantize.vectors import input_moments, kmeans_vectors
from neuropil.packed import nbytes


@pytest.mark.parametrize("codebook", ["layer", "block"])
def test_as_many_entries_as_vectors_lose_nothing(codebook: str) -> None:
    """Invariant 16."""
    gen = torch.Generator().manual_seed(0)
    table = torch.randn(7, 4, generator=gen)
    w = table[torch.randint(0, 7, (12, 5), generator=gen)].reshape(12, 20)
    q = ProductQuantizer(4, 7, codebook)
    assert torch.equal(q.pack(w).dense(), w)
    assert torch.equal(q(w), w)


def test_k_means_never_gets_worse() -> None:
    vectors = torch.randn(3, 60, 4, generator=torch.Generator().manual_seed(0))
    gram = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(1))
    gram = gram @ gram.mT
    for shared in (True, False):
        for moment in (None, gram):
            losses = []
            for rounds in (0, 1, 2, 4, 8, 30):
                codes, table = kmeans_vectors(vectors, 8, moment, rounds, shared=shared)
                away = vectors - table.expand(3, -1, -1).gather(1, codes[..., None].expand(-1, -1, 4))
                weigh = torch.eye(4).expand(3, 4, 4) if moment is None else moment
                losses.append(float(torch.einsum("bni,bij,bnj->", away, weigh, away)))
            assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(losses)), losses
            assert losses[-1] < losses[0]


def test_entries_are_at_the_weighted_optimum() -> None:
    """With shared codebooks and different second moments, no gradient is left in any entry."""
    vectors = torch.randn(3, 60, 4, generator=torch.Generator().manual_seed(0)).double()
    gram = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(1)).double()
    gram = gram @ gram.mT
    codes, table = kmeans_vectors(vectors, 8, gram, 200, shared=True)
    table = table.clone().requires_grad_()
    away = vectors - table.expand(3, -1, -1).gather(1, codes[..., None].expand(-1, -1, 4))
    torch.einsum("bni,bij,bnj->", away, gram, away).backward()
    assert table.grad.abs().max() < 1e-5


def test_an_entry_that_serves_none_is_moved() -> None:
    vectors = torch.cat([torch.zeros(500, 2), torch.tensor([[9.0, 9.0], [-9.0, 9.0], [9.0, -9.0], [5.0, 1.0]])])
    _, table = kmeans_vectors(vectors[None], 4, None, 20, seed=0)
    assert table[0].unique(dim=0).shape[0] == 4


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 8)
    )


def images(seed: int = 1, count: int = 64) -> Tensor:
    x = torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([0.1, 3.0])[:, None, None]


def test_moments_are_those_of_the_columns() -> None:
    model, x = net(), images()
    moments = input_moments(model, [x[:30], x[30:]], 2)
    columns = nn.functional.unfold(x, 3, padding=1).mT.reshape(-1, 9, 2)
    torch.testing.assert_close(moments["0"], torch.einsum("nbi,nbj->bij", columns, columns) / len(columns))
    read = model[:3](x).detach().reshape(-1, 128, 2)
    torch.testing.assert_close(moments["3"], torch.einsum("nbi,nbj->bij", read, read) / len(read))
    line = nn.Sequential(nn.Conv1d(4, 2, 3, stride=2))
    y = torch.randn(5, 4, 11)
    found = input_moments(line, [y], 4)["0"]
    columns = y.unfold(2, 3, 2).permute(0, 2, 1, 3).reshape(-1, 3, 4)
    torch.testing.assert_close(found, torch.einsum("nbi,nbj->bij", columns, columns) / len(columns))


@pytest.mark.parametrize("codebook", ["layer", "block"])
def test_weighing_by_activations_keeps_outputs_nearer(codebook: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    read = torch.randn(2048, 64) * torch.logspace(-1, 1, 64)[torch.randperm(64)]
    quantizer = ProductQuantizer(4, 16, codebook)
    error = {}
    for name, data in (("plain", None), ("weighed", [read[:1024]])):
        changes = product_quantize(model, quantizer, calibration=data)
        assert changes.changed == ("0",)
        error[name] = (changes.model(read[1024:]) - model(read[1024:])).square().mean().item()
    assert error["weighed"] < 0.7 * error["plain"]


def test_bytes_of_a_codebook() -> None:
    model = nn.Sequential(nn.Linear(256, 256))
    made = quantize_model(model, ProductQuantizer(8, 256, rounds=3)).model
    assert nbytes(made[0].packing) == 256 * 32 + 256 * 8 * 4
    block = quantize_model(model, ProductQuantizer(64, 16, "block", rounds=3)).model
    assert nbytes(block[0].packing) == 256 * 4 // 2 + 4 * 16 * 64 * 4


def test_codebooks_are_fine_tuned_and_baked() -> None:
    model, x = net(), images()
    wanted = model(x).detach()
    with pytest.raises(QuantizationError, match=r"^3.*divide"):
        product_quantize(model, ProductQuantizer(3, 8))
    mixed = quantize_model(model, {"0": ProductQuantizer(3, 8), "*": {"bits": 8}}).model
    tuned = finetune_codebooks(mixed)
    assert tuned.changed == ("0",)
    assert set(tuned.left) == {"3", "5"}
    assert torch.equal(tuned.model(x), mixed(x))
    start = (tuned.model(x) - wanted).square().mean().item()
    table = tuned.model[0].parametrizations.weight[0].table
    assert {id(p) for p in tuned.model[0].parameters() if p.requires_grad} == {id(table), id(tuned.model[0].bias)}
    g = torch.randn(16, 2, 3, 3)
    (tuned.model[0].weight * g).sum().backward()
    codes = mixed[0].packing.integers().long().flatten()
    sums = torch.zeros(8, 3).index_add_(0, codes, g.reshape(-1, 3))
    torch.testing.assert_close(table.grad[0, 0], sums)
    optimizer = torch.optim.Adam([table], lr=0.003)
    for _ in range(150):
        optimizer.zero_grad()
        (tuned.model(x) - wanted).square().mean().backward()
        optimizer.step()
    assert (tuned.model(x) - wanted).square().mean().item() < 0.9 * start
    baked = bake(tuned.model)
    torch.testing.assert_close(baked.model(x), tuned.model(x))
    assert nbytes(baked.model) == nbytes(mixed)


def test_bad_vectors() -> None:
    for make in (lambda: ProductQuantizer(0), lambda: ProductQuantizer(2, 1), lambda: ProductQuantizer(2, 4, "all")):
        with pytest.raises(QuantizationError, match="expected"):
            make()
    with pytest.raises(QuantizationError, match="empty"):
        product_quantize(net(), ProductQuantizer(2, 4), calibration=[])
