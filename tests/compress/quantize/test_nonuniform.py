"""Levels of any spacing: rules by their formula, fitted ones against known optima and an exact search."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neuropil.compress.quantize import (
    LearnedLevels,
    Levels,
    QuantizationError,
    Quantizer,
    fisher_diagonal,
    hessian_quantize,
    kmeans,
)
from neuropil.compress.quantize.nonuniform import apot_levels, lloyd_max


def normal(count: int = 400_000) -> Tensor:
    return torch.randn(1, 1, count, generator=torch.Generator().manual_seed(0))


def relative(q: Levels, x: Tensor) -> float:
    return float((q.values(q.codes(x)) - x).square().mean() / x.square().mean())


def test_levels_are_half_open() -> None:
    """Q(r) = X_i where D_i <= r < D_(i+1)."""
    levels = Levels(torch.tensor([[2.0]]), torch.tensor([[[-1.0, 0.5, 3.0]]]), torch.tensor([[[0.0, 1.0]]]))
    x = torch.tensor([[[-9.0, -1e-6, 0.0, 1.9, 2.0, 50.0]]])
    assert levels.codes(x).tolist() == [[[0, 0, 1, 1, 2, 2]]]
    assert levels.values(levels.codes(x)).tolist() == [[[-2.0, -2.0, 1.0, 1.0, 6.0, 6.0]]]


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max_of_a_normal_is_the_known_one(bits: int, error: float) -> None:
    """Invariant 6."""
    x = normal()
    assert relative(lloyd_max(x, bits), x) == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("seed", [0, 1])
def test_k_means_is_never_worse_than_a_uniform_grid(bits: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 1, 300, generator=gen) ** 3
    levels = kmeans(x, 2**bits)
    fitted = (levels.values(levels.codes(x)) - x).square().mean(-1)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    even = (low + ((x - low) / step).round() * step - x).square().mean(-1)
    assert bool((fitted <= even + 1e-9).all())


def exact(x: list[float], h: list[float], k: int) -> float:
    """The least weighted error over all ways to cut sorted numbers into k runs."""
    pairs = sorted(zip(x, h, strict=True))
    least = float("inf")
    for cuts in itertools.combinations(range(1, len(pairs)), k - 1):
        ends = [0, *cuts, len(pairs)]
        total = 0.0
        for a, b in itertools.pairwise(ends):
            weight = sum(w for _, w in pairs[a:b])
            mean = sum(v * w for v, w in pairs[a:b]) / weight
            total += sum(w * (v - mean) ** 2 for v, w in pairs[a:b])
        least = min(least, total)
    return least


def test_k_means_is_close_to_the_exact_optimum() -> None:
    gen = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(30):
        x, h = torch.randn(10, generator=gen), torch.rand(10, generator=gen) + 0.1
        for weights in (None, h):
            levels = kmeans(x[None, None], 3, None if weights is None else weights[None, None])
            w = torch.ones(10) if weights is None else weights
            error = float((w * (levels.values(levels.codes(x[None, None]))[0, 0] - x).square()).sum())
            least = exact(x.tolist(), w.tolist(), 3)
            assert error >= least - 1e-5
            ratios.append(error / least)
    assert sum(ratios) / len(ratios) < 1.15  # a local optimum, near the best on average
    assert sorted(ratios)[len(ratios) // 2] < 1.02


@given(st.integers(1, 8), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_few_values_are_kept_exactly(distinct: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    values = torch.randn(distinct, generator=gen)
    x = values[torch.randint(0, distinct, (2, 3, 50), generator=gen)]
    levels = kmeans(x, 8)
    assert torch.equal(levels.values(levels.codes(x)), x)


def test_importance_moves_levels() -> None:
    x = torch.cat([torch.zeros(50), torch.ones(50) * 0.4, torch.ones(1)])[None, None]
    h = torch.ones_like(x)
    h[..., -1] = 1e4
    plain, weighted = kmeans(x, 2), kmeans(x, 2, h)
    assert abs(float(weighted.level.max()) - 1) < 1e-3
    assert float(plain.level.max()) < 0.5
    with pytest.raises(QuantizationError, match="importance"):
        kmeans(x, 2, -h)


def test_powers_of_two_are_rounded_in_the_exponent() -> None:
    x = torch.tensor([[1.0, 0.75, 0.7, -0.36, 0.35, 0.07, 0.06, 0.0]])
    q = Quantizer(4, "pow2")
    assert q(x).tolist() == [[1.0, 1.0, 0.5, -0.5, 0.25, 0.0625, 0.0625, 0.0]]
    y = torch.randn(1, 500)
    rounded = Quantizer(5, "pow2", "channel")(y)
    kept = rounded != 0
    assert torch.equal(rounded[kept].abs().log2(), y[kept].abs().log2().round().clamp(max=rounded.abs().max().log2()))
    assert torch.equal(rounded[kept].sign(), y[kept].sign())
    assert Quantizer(3, "pow2")(y).unique().numel() <= 7


def test_additive_powers_of_two() -> None:
    assert apot_levels(1) == [0, 1]
    assert apot_levels(2) == [0, 0.25, 0.5, 1]
    for bits in (3, 4, 5, 6):
        levels = apot_levels(bits)
        assert len(levels) == 2**bits
        assert levels == sorted(set(levels))
        assert levels[-1] == 1
    x = normal(50_000)[0]
    error = {s: float((Quantizer(4, s)(x) - x).square().mean()) for s in ("apot", "pow2", "codebook")}
    assert error["codebook"] < error["apot"] < error["pow2"]
    top = Quantizer(4, "apot").forward(x).abs().amax()
    assert top < x.abs().amax()  # the scale was searched, not taken from the largest


@pytest.mark.parametrize("scheme", ["pow2", "apot", "codebook", "binary-code", "ternary", "binary"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", ("group", 16)])
def test_levels_are_packed_as_they_are_simulated(scheme: str, granularity) -> None:
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    w[2] = 0
    q = Quantizer(3, scheme, granularity)
    assert torch.equal(q.pack(w).dense(), q(w))
    assert q(w)[0].unique().numel() <= 8 * (1 if isinstance(granularity, str) else 2)


def test_learned_levels_have_the_summed_gradient() -> None:
    w = torch.randn(3, 40, requires_grad=True)
    q = LearnedLevels(2)
    g = torch.randn(3, 40)
    out = q(w)
    (out * g).sum().backward()
    codes = q.grid().codes(w.detach()[:, None])[:, 0].long()
    wanted = torch.zeros(3, 4).scatter_add_(1, codes, g)
    torch.testing.assert_close(q.level.grad[:, 0], wanted)
    assert torch.equal(w.grad, g)
    assert torch.equal(q.pack(w.detach()).dense(), out.detach())
    optimizer = torch.optim.SGD(q.parameters(), lr=0.5)
    before = (w - out).square().mean().item()
    for _ in range(50):
        optimizer.zero_grad()
        (w.detach() - q(w.detach())).square().mean().backward()
        optimizer.step()
    assert (w - q(w)).square().mean().item() <= before * 1.0001


def test_hessian_weighted_codebooks_lose_less_of_the_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(200, 20) * torch.linspace(0.1, 3, 20)
    y = model(x).argmax(1)
    batches = [(a, b) for a, b in zip(x.split(4), y.split(4), strict=True)]
    h = fisher_diagonal(model, nn.functional.cross_entropy, batches)
    assert all(p.grad is None for p in model.parameters())
    plain = hessian_quantize(model, {k: torch.ones_like(v) for k, v in h.items()}, bits=2)
    weighted = hessian_quantize(model, h, bits=2)
    second = {}
    for name, changes in (("plain", plain), ("weighted", weighted)):
        second[name] = sum(
            float((h[f"{i}.weight"] * (changes.model[i].weight - model[i].weight).square()).sum()) for i in (0, 2)
        )
    assert second["weighted"] < second["plain"]
    assert "no importance" in hessian_quantize(model, {"0.weight": h["0.weight"]}).left["2"]
    with pytest.raises(QuantizationError, match="at least one"):
        fisher_diagonal(model, nn.functional.cross_entropy, [])
    with pytest.raises(QuantizationError, match="shape"):
        hessian_quantize(model, {"0.weight": torch.ones(3)})


def test_too_few_bits() -> None:
    for scheme in ("pow2", "apot"):
        with pytest.raises(QuantizationError, match="2 bits"):
            Quantizer(1, scheme)(torch.randn(3))
