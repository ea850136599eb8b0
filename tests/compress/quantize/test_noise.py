"""Chance in rounding is unbiased; noise in training leaves the rest alone; training on coarse grids."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from neuropil.compress.quantize import (
    LowPrecision,
    QuantizationError,
    Quantizer,
    QuantNoise,
    bake,
    qat_prepare,
    stochastic_round,
    stochastic_signs,
)
from neuropil.compress.quantize.low_precision import stochastic_bfloat16


def test_stochastic_rounding_is_unbiased() -> None:
    """Invariant 5."""
    draws = stochastic_round(torch.full((1_000_000,), 0.3), torch.Generator().manual_seed(0))
    assert abs(float(draws.mean()) - 0.3) < 0.002
    assert abs(float(draws.var()) - 0.21) < 0.002
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    whole = torch.arange(-3.0, 4)
    assert torch.equal(stochastic_round(whole), whole)


@pytest.mark.parametrize(("scheme", "bits"), [("affine", 3), ("symmetric", 4), ("codebook", 3), ("pow2", 4)])
def test_a_stochastic_quantizer_is_right_on_average(scheme: str, bits: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(1, 60)
    q = Quantizer(bits, scheme, rounding="stochastic")
    q(w)
    inside = w.clamp(-w.abs().max() * 0.5, w.abs().max() * 0.5)
    low, high = q(w).min(), q(w).max()
    inside = inside.clamp(low, high)
    mean = sum(q(inside) for _ in range(4000)) / 4000
    assert (mean - inside).abs().max() < 0.06 * (high - low)
    gaps = q(inside) - Quantizer(bits, scheme)(w)
    assert gaps.abs().max() > 0


def test_stochastic_signs() -> None:
    torch.manual_seed(0)
    for w, mean in ((0.0, 0.0), (0.5, 0.5), (-3.0, -1.0)):
        assert float(stochastic_signs(torch.full((200_000,), w)).mean()) == pytest.approx(mean, abs=0.01)
    w = torch.tensor([-1.5, -0.2, 0.9], requires_grad=True)
    stochastic_signs(w).sum().backward()
    assert w.grad.tolist() == [0, 1, 1]


def test_quant_noise_rounds_a_share_of_blocks() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 500)
    noise = QuantNoise(Quantizer(2, gradient="identity"), share=0.25, block=8)
    parametrize.register_parametrization(layer, "weight", noise)
    original = layer.parametrizations.weight.original
    hit = (layer.weight != original).reshape(-1, 8)
    assert float(hit.any(1).float().mean()) == pytest.approx(0.25, abs=0.03)
    layer.weight.sum().backward()
    assert bool((original.grad == 1).all())
    layer.eval()
    assert torch.equal(layer.weight, noise.quantizer(original))
    with pytest.raises(QuantizationError, match="blocks"):
        QuantNoise(Quantizer(2), block=7)(torch.randn(3, 5))
    with pytest.raises(QuantizationError, match="share"):
        QuantNoise(Quantizer(2), share=0.0)


def test_quant_noise_is_baked() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    changes = qat_prepare(model, QuantNoise(Quantizer(3, granularity="channel"), 0.5))
    made = changes.model.eval()
    x = torch.randn(4, 16)
    assert torch.equal(bake(made).model(x), made(x))


def test_stochastic_bfloat16_gives_neighbours() -> None:
    torch.manual_seed(0)
    x = torch.randn(10_000)
    y = stochastic_bfloat16(x)
    assert torch.equal(y, y.bfloat16().float())
    assert float(((y - x) / x).abs().max()) < 2**-7
    assert float((y - x).mean().abs()) < 1e-4
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    assert torch.equal(stochastic_bfloat16(odd).nan_to_num(), odd.nan_to_num())


def test_small_updates_survive_only_stochastic_rounding() -> None:
    torch.manual_seed(0)
    moved = {}
    for rounding in ("stochastic", "nearest"):
        model = nn.Sequential(nn.Linear(100, 100, bias=False))
        with torch.no_grad():
            model[0].weight.fill_(1.0)
        coarse = LowPrecision(model, "bfloat16", rounding)
        for _ in range(100):
            with torch.no_grad():
                model[0].weight += 2**-11  # a sixteenth of a step
            coarse.step()
        moved[rounding] = model[0].weight.mean().item() - 1
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(100 * 2**-11, rel=0.05)


def test_training_stays_on_the_grid() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    coarse = LowPrecision(model, {"bits": 8, "scheme": "restricted", "granularity": "channel"})
    x = torch.randn(64, 8)
    y = x[:, :1] * x[:, 1:2]
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        coarse.step()
        losses.append(loss.item())
        assert model[0].weight[0].unique().numel() <= 255
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(QuantizationError, match="bfloat16"):
        LowPrecision(model, "float8")
    with pytest.raises(QuantizationError, match="rounding"):
        LowPrecision(model, "bfloat16", "up")
