"""Soft roundings, pulls toward the grid, and the gradients of signs, against their formulas."""

import math

import pytest
import torch
from torch import Tensor, nn

from neuropil.compress.quantize import (
    ABCActivation,
    GumbelQuantizer,
    ProxQuant,
    QuantizationError,
    Quantizer,
    RPReLU,
    Sign,
    SoftQuantizer,
    bake,
    grid_distance,
    qat_prepare,
    quantize_model,
    sign,
    sine_penalty,
    soft_round,
)
from neuropil.compress.quantize.gradients import prox
from neuropil.compress.quantize.sign_gradients import GRADIENTS, residual_signs


@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.5, 3.0])
def test_soft_rounding_keeps_integers_and_halves(temperature: float) -> None:
    whole = torch.arange(-3.0, 4, dtype=torch.float64)
    torch.testing.assert_close(soft_round(whole, temperature), whole)
    torch.testing.assert_close(soft_round(whole + 0.5, temperature), whole + 0.5)
    line = torch.linspace(-2, 2, 1001, dtype=torch.float64)
    assert bool((soft_round(line, temperature).diff() >= -1e-12).all())
    at = (torch.rand(20, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: soft_round(u, temperature), at)


def test_soft_rounding_hardens() -> None:
    u = torch.rand(200) * 6 - 3
    u = u[(u - u.floor() - 0.5).abs() > 0.05]
    torch.testing.assert_close(soft_round(u, 0.005), u.round(), rtol=0, atol=1e-4)
    torch.testing.assert_close(soft_round(u, 100.0), u, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", [SoftQuantizer, GumbelQuantizer])
@pytest.mark.parametrize("scheme", ["affine", "symmetric", "midrise"])
def test_soft_quantizers(kind: type[SoftQuantizer], scheme: str) -> None:
    torch.manual_seed(0)
    w = torch.randn(4, 50, requires_grad=True)
    soft = kind(3, scheme, 1e-3, granularity="channel")
    hard = Quantizer(3, scheme, "channel")
    if kind is SoftQuantizer:
        near = (soft(w) - hard(w)).abs() < 1e-3
        assert near.float().mean() > 0.98
    else:  # hardened mixtures are one of the two neighbours, right on average
        gap = (soft(w) - w) / hard.grid_for(w).scale
        assert (gap.abs() < 1.01)[hard.grid.inside(w[:, None])[:, 0]].all()
        many = sum(soft(w).detach() for _ in range(3000)) / 3000
        at = hard.grid.positions(w.detach()[:, None])[:, 0]
        inside = (at >= hard.grid.low) & (at <= hard.grid.high)  # beyond the last level there is only that level
        assert ((many - w).abs() / hard.grid.scale < 0.06)[inside].all()
    soft.temperature = 0.5
    soft(w).sum().backward()
    assert torch.isfinite(w.grad).all()
    assert w.grad.abs().sum() > 0
    assert torch.equal(soft.eval()(w), hard(w))
    assert torch.equal(soft.pack(w.detach()).dense(), hard(w))


def test_soft_quantizers_train_and_bake() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
    x = torch.randn(100, 6)
    y = x[:, :1].abs()
    made = qat_prepare(model, SoftQuantizer(3, "symmetric", 0.5, dynamic=True)).model
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    for step in range(100):
        for module in made.modules():
            if isinstance(module, SoftQuantizer):
                module.temperature = 0.5 * 0.97**step
        optimizer.zero_grad()
        loss = (made(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert (made.eval()(x) - y).square().mean() < 0.6 * (model(x) - y).square().mean()
    torch.testing.assert_close(bake(made).model(x), made(x))


def test_regularisers_are_zero_on_the_grid() -> None:
    w = torch.randn(3, 40)
    for scheme in ("affine", "symmetric", "midrise"):
        q = Quantizer(3, scheme)
        rounded = q(w)
        assert float(grid_distance(rounded, q)) < 1e-6
        assert float(sine_penalty(rounded, q)) < 1e-9
        inside = q.grid.inside(w[None].reshape(1, 1, -1)).reshape(w.shape)
        v = w.clone().requires_grad_()
        grid_distance(v, q).backward()
        torch.testing.assert_close(v.grad, (w - rounded).sign() / w.numel())
        v.grad = None
        sine_penalty(v, q).backward()
        s, z = q.grid.scale, q.grid.zero
        wanted = (2 * math.pi * (w / s + z)).sin() * math.pi / s / w.numel()
        torch.testing.assert_close(v.grad, wanted, rtol=1e-3, atol=1e-4)
        assert inside.any()
    with pytest.raises(QuantizationError, match="period"):
        sine_penalty(w, Quantizer(2, "codebook"))


def test_proximal_steps() -> None:
    """The proximal map minimises strength * penalty + (v - w)^2 / 2 over v: against a fine grid."""
    w, level = torch.tensor([0.3, -0.8, 0.05]), torch.tensor([0.0, -1.0, 0.0])
    v = torch.linspace(-1.5, 1.5, 30001)[:, None]
    for kind, penalty in (("l1", lambda d: d.abs()), ("l2", lambda d: d.square() / 2)):
        best = v[(0.1 * penalty(v - level) + (v - w).square() / 2).argmin(0), 0]
        torch.testing.assert_close(prox(w, level, 0.1, kind), best, rtol=0, atol=2e-4)
    with pytest.raises(QuantizationError, match="kind"):
        prox(w, level, 0.1, "l3")


def test_prox_quant_ends_on_the_grid_and_resumes() -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer, ProxQuant]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
        return model, torch.optim.SGD(model.parameters(), lr=0.05), ProxQuant(model, {"bits": 3}, rate=2e-4)

    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, proximal: ProxQuant, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x) - x[:, :1]).square().mean().backward()
            optimizer.step()
            proximal.step()

    model, optimizer, proximal = begin()
    run(model, optimizer, proximal, 100)
    half = {k: v.clone() for k, v in model.state_dict().items()}
    kept = proximal.state_dict()
    run(model, optimizer, proximal, 200)
    other, other_optimizer, resumed = begin()
    other.load_state_dict(half)
    resumed.load_state_dict(kept)
    run(other, other_optimizer, resumed, 200)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    for name in ("0", "2"):
        weight = model.get_submodule(name).weight
        torch.testing.assert_close(proximal.quantizers[name](weight), weight.detach(), rtol=0, atol=1e-6)
    assert (model(x) - x[:, :1]).square().mean() < 0.5
    with pytest.raises(QuantizationError, match="rate"):
        ProxQuant(model, "int4", rate=0.0)


def test_gradients_of_signs() -> None:
    x = torch.linspace(-2, 2, 81, dtype=torch.float64)
    grads = {}
    for kind in GRADIENTS:
        v = x.clone().requires_grad_()
        out = sign(v, kind, 2.0)
        assert set(out.tolist()) == {-1.0, 1.0}
        out.sum().backward()
        grads[kind] = v.grad
    assert torch.equal(grads["clipped"], (x.abs() <= 1).double())
    torch.testing.assert_close(grads["approx"], (2 - 2 * x.abs()).clamp_min(0))
    b = 5.0
    stated = b * (2 - b * x * (b * x / 2).tanh()) / (1 + (b * x).cosh())  # the derivative as BNN+ gives it
    torch.testing.assert_close(grads["swish"], stated)
    torch.testing.assert_close(grads["tanh"], 2 * (1 - (2 * x).tanh().square()))
    with pytest.raises(QuantizationError, match="gradient"):
        sign(x, "magic")
    with pytest.raises(QuantizationError, match="gradient"):
        Sign("magic")


def test_surrogates_are_derivatives_of_what_is_stated() -> None:
    x = torch.linspace(-3, 3, 61, dtype=torch.float64).requires_grad_()
    s = (5 * x).sigmoid()
    (swish,) = torch.autograd.grad((2 * s * (1 + 5 * x * (1 - s)) - 1).sum(), x)
    torch.testing.assert_close(GRADIENTS["swish"](x.detach(), 1.0), swish)
    for t in (0.1, 1.0, 10.0):
        (tanh,) = torch.autograd.grad((max(1 / t, 1) * (t * x).tanh()).sum(), x)
        torch.testing.assert_close(GRADIENTS["tanh"](x.detach(), t), tanh)
    line = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    assert float(torch.trapezoid(GRADIENTS["approx"](line, 1.0), line)) == pytest.approx(2)


def test_tanh_is_annealed() -> None:
    layer = Sign("tanh")
    sharpness = []
    for done in (0.0, 0.5, 1.0):
        layer.anneal(done)
        sharpness.append(layer.sharpness)
    assert sharpness == pytest.approx([0.1, 1.0, 10.0])


def test_learned_thresholds() -> None:
    layer = Sign("approx", shift=3)
    x = torch.randn(8, 3, 5)
    with torch.no_grad():
        layer.threshold.copy_(torch.tensor([0.0, 0.5, -0.5]))
    assert torch.equal(layer(x), torch.where(x >= layer.threshold[:, None], 1.0, -1.0))
    layer(x).sum().backward()
    slope = (2 - 2 * (x - layer.threshold.detach()[:, None]).abs()).clamp_min(0)
    torch.testing.assert_close(layer.threshold.grad, -slope.sum((0, 2)))
    act = RPReLU(3).double()
    with torch.no_grad():
        for p in act.parameters():
            p += torch.randn_like(p)
    y = torch.randn(4, 3, 2, dtype=torch.float64)
    moved = y - act.before[:, None]
    torch.testing.assert_close(
        act(y), moved.clamp_min(0) + act.slope[:, None] * moved.clamp_max(0) + act.after[:, None]
    )


def test_bases_of_activations() -> None:
    layer = ABCActivation(3)
    x = torch.linspace(-1.5, 2, 50)
    base = sum(
        torch.where((x + v).clamp(0, 1) >= 0.5, 1.0, -1.0) * b for v, b in zip(layer.shift, layer.scale, strict=True)
    )
    torch.testing.assert_close(layer(x), base)
    assert layer(x).unique().numel() == 4
    layer(x).sum().backward()
    assert bool((layer.shift.grad != 0).all())
    with pytest.raises(QuantizationError, match="bases"):
        ABCActivation(0)


def test_residual_signs_lose_less_with_order() -> None:
    x = torch.randn(20, 100)
    errors = [float((residual_signs(x, k) - x).square().mean()) for k in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    torch.testing.assert_close(residual_signs(x, 1), x.abs().mean(1, keepdim=True) * x.sign())
    assert errors[1] == pytest.approx(0.131, rel=0.1)


def test_a_clipped_quantizer_in_a_model_is_packed_unchanged() -> None:
    model: nn.Module = nn.Sequential(nn.Linear(5, 5))
    x: Tensor = torch.randn(2, 5)
    clipped = quantize_model(model, Quantizer(4, observer="percentile", percentile=90.0)).model
    plain = quantize_model(model, Quantizer(4, observer="percentile", percentile=90.0, gradient="identity")).model
    assert torch.equal(clipped(x), plain(x))
