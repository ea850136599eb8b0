"""Binary and ternary training: closed forms of scales, gradients, curvature from Adam; the packed product of signs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d

from neuropil.compress.quantize import (
    TTQ,
    BinaryWeight,
    LossAwareBinary,
    QuantizationError,
    Quantizer,
    XNORConv2d,
    XNORLinear,
    bake,
    clip_masters,
    qat_prepare,
    quantize_model,
)
from neuropil.compress.quantize.binary import loss_aware_binary, masters, watch
from neuropil.compress.quantize.xnor import pack_signs, popcount, xnor_matmul
from neuropil.packed import nbytes


def signs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_the_packed_product_is_exact(n: int, m: int, k: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    a, b = torch.randn(m, n, generator=gen), torch.randn(k, n, generator=gen)
    a[0, 0] = 0.0
    found = xnor_matmul(pack_signs(a), pack_signs(b), n)
    assert torch.equal(found.float(), signs(a) @ signs(b).T)


def test_popcount() -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (1000,), generator=torch.Generator().manual_seed(0))
    wanted = [bin(w & (2**64 - 1)).count("1") for w in words.tolist()]
    assert popcount(words).tolist() == wanted
    assert popcount(torch.tensor([-(2**63), 2**63 - 1, -1, 0])).tolist() == [1, 63, 64, 0]


def test_signs_are_packed_in_a_bit_each() -> None:
    assert pack_signs(torch.randn(10, 128)).shape == (10, 2)
    assert pack_signs(torch.randn(10, 129)).shape == (10, 3)


@pytest.mark.parametrize("scaled", [True, False])
def test_xnor_linear(scaled: bool) -> None:
    torch.manual_seed(0)
    layer = XNORLinear(70, 9, scaled_inputs=scaled)
    x = torch.randn(2, 3, 70)
    out = layer(x)
    wanted = (signs(x) @ signs(layer.weight).T) * layer.weight.abs().mean(1)
    wanted = wanted * x.abs().mean(-1, keepdim=True) if scaled else wanted
    torch.testing.assert_close(out, wanted + layer.bias)
    layer.packed_product = True
    torch.testing.assert_close(layer.eval()(x), out)


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (2, 1)])
def test_xnor_convolution(stride: int, padding: int) -> None:
    torch.manual_seed(0)
    layer = XNORConv2d(5, 7, 3, stride, padding)
    x = torch.randn(2, 5, 9, 8)
    out = layer(x)
    around = nn.functional.pad(x, (padding,) * 4)
    wanted = conv2d(signs(around), signs(layer.weight), stride=stride)
    box = torch.full((1, 1, 3, 3), 1 / 9)
    wanted = wanted * conv2d(around.abs().mean(1, keepdim=True), box, stride=stride)
    wanted = wanted * layer.weight.abs().mean((1, 2, 3))[:, None, None] + layer.bias[:, None, None]
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    layer.packed_product = True
    torch.testing.assert_close(layer.eval()(x), out, rtol=1e-4, atol=1e-5)
    layer.train()(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_binary_connect() -> None:
    torch.manual_seed(0)
    w = (torch.randn(4, 30) * 1.5).requires_grad_()
    g = torch.randn(4, 30)
    q = BinaryWeight("none")
    out = q(w)
    assert torch.equal(out, signs(w))
    (out * g).sum().backward()
    assert torch.equal(w.grad, g * (w.abs() <= 1))
    assert torch.equal(q.pack(w.detach()).dense(), out)
    noisy = BinaryWeight("none", stochastic=True)
    assert not torch.equal(noisy(w), noisy(w))
    assert torch.equal(noisy.eval()(w), out)


def test_xnor_weights_and_their_gradient() -> None:
    w = torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 30, dtype=torch.float64)
    q = BinaryWeight("mean")
    alpha = w.detach().abs().mean(1, keepdim=True)
    out = q(w)
    torch.testing.assert_close(out, alpha * signs(w))
    (out * g).sum().backward()
    inside = w.detach().abs() <= 1
    through_mean = (g * signs(w)).sum(1, keepdim=True) * w.detach().sign() / 30
    torch.testing.assert_close(w.grad, alpha * g * inside + through_mean)
    torch.testing.assert_close(q.pack(w.detach()).dense(), out)


def test_masters_are_clipped() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    made = qat_prepare(model, BinaryWeight()).model
    with torch.no_grad():
        for weight in masters(made).values():
            weight.mul_(100)
    clip_masters(made)
    assert all(weight.abs().max() <= 1 for weight in masters(made).values())
    assert set(masters(made)) == {"0", "1"}


def test_the_loss_aware_scale_is_the_weighted_optimum() -> None:
    gen = torch.Generator().manual_seed(0)
    w, d = torch.randn(1, 1, 200, generator=gen), torch.rand(1, 1, 200, generator=gen) ** 3
    alpha, b = loss_aware_binary(w, d)
    scales = torch.linspace(0.5, 1.5, 201) * float(alpha)
    errors = torch.stack([(d * (w - s * b).square()).sum() for s in scales])
    assert int(errors.argmin()) == 100
    plain, _ = loss_aware_binary(w, torch.ones_like(w))
    assert float(plain) == pytest.approx(float(w.abs().mean()))


def test_loss_aware_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    made = qat_prepare(model, LossAwareBinary()).model
    x = torch.randn(64, 8) * torch.linspace(0.1, 2, 8)
    y = (x[:, 0] * 8 > x[:, 7]).long()
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    with pytest.raises(QuantizationError, match=r"0\.weight.*Adam"):
        watch(made, optimizer)
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(made(x), y)
        loss.backward()
        optimizer.step()
        assert watch(made, optimizer) == 2
    assert loss.item() < 0.5
    q = made[0].parametrizations.weight[0]
    w, d = masters(made)["0"].detach(), q.curvature
    assert d.shape == w.shape
    torch.testing.assert_close(made[0].weight[:, 0].abs(), (d * w.abs()).sum(1) / d.sum(1))
    again = qat_prepare(model, LossAwareBinary()).model
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(x), made(x))
    baked = bake(made).model
    torch.testing.assert_close(baked(x), made(x))
    assert nbytes(baked[0]) < nbytes(model[0]) / 2


def test_trained_ternary_weights_lose_no_more_than_where_they_began() -> None:
    torch.manual_seed(0)
    w = torch.randn(6, 100)
    q = TTQ(0.05)
    start = (q(w) - w).square().mean().item()
    optimizer = torch.optim.Adam(q.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        (q(w) - w).square().mean().backward()
        optimizer.step()
    assert (q(w) - w).square().mean().item() <= start * 1.001
    assert q(w).unique().numel() == 3


def test_extremes_pack_small_and_ternary_is_nearer() -> None:
    model = nn.Sequential(nn.Linear(256, 128))
    errors, sizes = {}, {}
    for recipe in ("binary", "ternary", "int8"):
        made = quantize_model(model, recipe).model
        errors[recipe] = (made[0].weight - model[0].weight).square().mean().item()
        sizes[recipe] = nbytes(made)
    assert errors["int8"] < errors["ternary"] < errors["binary"]
    assert sizes["binary"] < sizes["ternary"] < sizes["int8"]
    assert sizes["binary"] <= 256 * 128 / 8 + 128 * 8 + 64


def test_bad_binary_settings() -> None:
    for make in (
        lambda: BinaryWeight("median"),
        lambda: BinaryWeight(gradient="odd"),
        lambda: BinaryWeight(stochastic=True, gradient="approx"),
    ):
        with pytest.raises(QuantizationError, match=r"expected|stochastic"):
            make()
    layer = XNORConv2d(1, 1, 3)
    layer.padding = "same"
    with pytest.raises(QuantizationError, match="padding"):
        layer(torch.randn(1, 1, 5, 5))
    with pytest.raises(QuantizationError, match="NaN"):
        Quantizer(1)(torch.tensor([torch.nan]))
