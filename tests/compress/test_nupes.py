"""NUPES and PowerQuant: the grid's invariants, the search, learning, integers, models with awkward parts, files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import llama
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from neuropil.compress._nupes_learn import FreeCodes, Learning, Unit, learn_unit
from neuropil.compress._nupes_power import between, decode, encode, largest, level_of, levels, position, top_code
from neuropil.compress._nupes_search import BINS, Spread, best_size, find_exponent
from neuropil.compress.nupes import (
    PowerChanges,
    PowerConv2d,
    PowerInput,
    PowerLinear,
    add_inputs,
    nupes_quantize,
    power_quantize,
    to_integers,
)
from neuropil.compress.quantize import QuantizationError, Quantizer, soft_round
from neuropil.compress.quantize.tiles import tiling
from neuropil.compress.reconstruction import ReconstructionError, walk
from neuropil.models.packed_files import load_packed, save_packed
from neuropil.packed import Lookup, nbytes, packed_modules


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2, padding=1), nn.Flatten(), nn.Linear(128, 16),
        nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.distributions.Laplace(0.0, 0.5 * float(p.std() + 1e-3)).sample(p.shape))
    return made.eval()


def images(n: int = 16, seed: int = 7) -> Tensor:
    return torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def specimen(seed: int = 0) -> tuple[nn.Module, Callable[[nn.Module], PowerChanges], tuple[Tensor, ...]]:
    """A small convolutional network: its second layer left out, weights and inputs in four bits, learned."""

    def act(model: nn.Module) -> PowerChanges:
        return nupes_quantize(model, 4, calibration=[images()], activations=4, skip=["2"], steps=20, seed=seed)

    return net(seed), act, (images(4, 3),)


def shapes(
    seed: int, kind: str = "normal", size: tuple[int, int] = (12, 40), dtype: torch.dtype = torch.float64
) -> Tensor:
    torch.manual_seed(seed)
    if kind == "laplace":
        return torch.distributions.Laplace(0.0, 1.0).sample(size).to(dtype)
    return torch.randn(size, dtype=dtype)


tensors = st.integers(0, 2**31).map(shapes)
exponents = st.floats(0.1, 1.5)
bits = st.integers(2, 8)
axes = st.sampled_from([None, 0, 1])

# ---------------------------------------------------------------------------------------------------- the grid


@given(tensors, bits, axes)
@settings(max_examples=40, deadline=None)
def test_exponent_one_is_the_uniform_grid(w: Tensor, b: int, axis: int | None) -> None:
    """Invariant 1, and the toolbox's own uniform grid beside it."""
    made = power_quantize(w, b, 1.0, axis)
    s = largest(w, axis) / top_code(b)
    assert torch.equal(made.codes.double(), (w / s).round())
    torch.testing.assert_close(made.values(), (w / s).round() * s, rtol=1e-14, atol=0)
    if axis == 0:
        torch.testing.assert_close(made.values(), Quantizer(b, "restricted", "channel")(w), rtol=1e-14, atol=0)


@given(st.floats(0.01, 10), st.floats(0.01, 10), exponents)
@settings(max_examples=40, deadline=None)
def test_powers_keep_products(x: float, y: float, a: float) -> None:
    """Invariant 2, first half."""
    x, y = torch.tensor([x], dtype=torch.float64), torch.tensor([y], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    assert torch.allclose((x * y).pow(a), x.pow(a) * y.pow(a), rtol=1e-12)
    k, top = torch.tensor([3.0, 5.0], dtype=torch.float64), 7
    assert torch.allclose(level_of(k[:1] * k[1:], a, top**2), level_of(k[:1], a, top) * level_of(k[1:], a, top) * one)


@given(tensors, bits, exponents, axes)
@settings(max_examples=60, deadline=None)
def test_fixed_points_symmetry_and_levels(w: Tensor, b: int, a: float, axis: int | None) -> None:
    """Invariant 3, in single precision, where it is used."""
    w = w.float()
    w[0, 0] = 0
    made = power_quantize(w, b, a, axis)
    values = made.values()
    again = power_quantize(values, b, a, axis)
    assert torch.equal(again.codes, made.codes)
    assert torch.equal(again.values(), values)
    assert torch.equal(power_quantize(-w, b, a, axis).values(), -values)
    assert values[0, 0] == 0
    size = largest(w, axis)
    top = w.abs() == size
    assert torch.equal(values[top], w[top])
    codes = made.codes.unique()
    assert len(codes) <= 2 * top_code(b) + 1
    assert codes.abs().max() == top_code(b)


@given(tensors, bits, exponents, st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_scale_equivariance(w: Tensor, b: int, a: float, c: float) -> None:
    """Invariant 4; numbers on the edge between two codes may fall on either side."""
    at = position(w, largest(w), a, top_code(b)).abs()
    off_edges = ((at - at.floor()) - 0.5).abs() > 1e-9
    scaled, plain = power_quantize(c * w, b, a).values(), power_quantize(w, b, a).values()
    torch.testing.assert_close(scaled[off_edges], c * plain[off_edges], rtol=1e-6, atol=0)


def test_levels_are_powers() -> None:
    """Invariant 5: at a = 1/2 squares; as a goes to 0, the ratio of neighbours grows without end."""
    assert torch.allclose(levels(0.5, 7), torch.arange(8.0).double() ** 2 / 49, rtol=1e-14)
    assert torch.allclose(levels(1.0, 7), torch.arange(8.0).double() / 7, rtol=1e-14)
    small = levels(0.01, 7)
    assert small[0] == 0
    assert small[7] == 1
    assert torch.allclose(small[1:].log(), 100 * (torch.arange(1, 8).double() / 7).log())
    k = torch.arange(8.0, dtype=torch.float64)
    assert torch.allclose(level_of(k, 0.3, 7), levels(0.3, 7))
    assert torch.allclose(between(-k, 0.3, 7), -levels(0.3, 7))


def test_rounding_is_to_the_nearest_after_the_power() -> None:
    """By hand: sqrt(0.3) * 3 = 1.64 -> 2 -> 4/9; a nearest level (1/9, 4/9) would be 4/9 too; 0.2 -> 1.34 -> 1/9."""
    made = power_quantize(torch.tensor([1.0, 0.3, 0.2, -0.26, 0.02]), 3, 0.5)
    assert made.codes.tolist() == [3, 2, 1, -2, 0]
    assert torch.allclose(made.values() * 9, torch.tensor([9.0, 4, 1, -4, 0]))


# --------------------------------------------------------------------------------------------------- gradients


@given(exponents, st.integers(1, 127))
@settings(max_examples=30, deadline=None)
def test_gradient_of_levels_is_that_of_finite_differences(a: float, top: int) -> None:
    """Invariant 8: with the codes held; and the closed forms of the sheet."""
    k = torch.arange(top + 1, dtype=torch.float64, requires_grad=True)
    free = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    value = level_of(k, free, top)
    for at in (0, 1, top // 2, top):
        (slope,) = torch.autograd.grad(value[at], free, retain_graph=True)
        h = 1e-6
        wanted = (level_of(k.detach(), a + h, top) - level_of(k.detach(), a - h, top))[at] / (2 * h)
        assert abs(float(slope - wanted)) < 1e-6 * max(1.0, abs(float(wanted)))
    (by_k,) = torch.autograd.grad(value.sum(), k)
    assert torch.allclose(by_k[1:], (value / (a * k))[1:].detach(), rtol=1e-9)
    assert torch.allclose(by_k[0], torch.tensor(top, dtype=torch.float64) ** (-1 / a), rtol=1e-9)


def test_no_nan_with_zeros() -> None:
    """Invariant 8, second half: zeros in the weight, channels of nothing but zeros, in values and gradients."""
    w = torch.randn(4, 10)
    w[0], w[1, :5] = 0, 0
    size = w.abs().amax(1, keepdim=True)
    a = torch.tensor(0.4, requires_grad=True)
    at = position(w, size, a, 7)
    assert torch.equal(at[0], torch.zeros(10))
    between(at, a, 7).sum().backward()
    assert a.grad is not None
    assert torch.isfinite(a.grad)
    free = FreeCodes(w[:, None], size[:, None], 0.4, 7, True)
    free.moving = True
    free.weight().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in free.parameters())
    made = power_quantize(w, 4, axis=0)
    assert torch.equal(made.values()[0], torch.zeros(10))
    assert power_quantize(torch.zeros(3, 4)).values().abs().sum() == 0
    assert torch.equal(power_quantize(torch.full((3, 4), 2.0), 2).values(), torch.full((3, 4), 2.0))


def test_gradient_of_the_exponent_is_clipped_in_learning() -> None:
    free = FreeCodes(torch.randn(1, 1, 20), torch.ones(1, 1, 1) * 5, 0.4, 7, True)
    free.moving = True
    (gradient,) = torch.autograd.grad(1e6 * free.weight().square().sum(), [free.free])
    assert abs(float(gradient)) == 1.0


@given(st.floats(0.02, 5.0), st.integers(-7, 7))
@settings(max_examples=40, deadline=None)
def test_soft_rounding(temperature: float, k: int) -> None:
    """Invariant 9: it keeps integers and half-integers, is monotone, and becomes hard rounding."""
    fixed = torch.tensor([float(k), k + 0.5], dtype=torch.float64)
    torch.testing.assert_close(soft_round(fixed, temperature), fixed, rtol=0, atol=1e-12)
    row = soft_round(torch.linspace(-3, 3, 601, dtype=torch.float64), temperature)
    assert (row.diff() >= -1e-12).all()
    u = torch.tensor([0.3, 1.8, -2.4], dtype=torch.float64)
    torch.testing.assert_close(soft_round(u, 0.01), u.round(), rtol=0, atol=1e-8)


# ---------------------------------------------------------------------------------------------------- the search


def relative(w: Tensor, b: int, a: float, axis: int | None = None) -> float:
    return float((power_quantize(w, b, a, axis).values() - w).norm() / w.norm())


@pytest.mark.parametrize(("b", "kind"), [(3, "normal"), (4, "normal"), (4, "laplace")])
@pytest.mark.parametrize("axis", [None, 0])
def test_the_error_has_one_minimum_and_it_is_found(b: int, kind: str, axis: int | None) -> None:
    """Invariant 6: the row of exponents falls, then rises; the search ends within 0.02 of its lowest point."""
    w = shapes(0, kind, (256, 576), torch.float32)
    row = torch.linspace(0.1, 1.5, 71).tolist()
    errors = torch.tensor([relative(w, b, a, axis) for a in row])
    best = int(errors.argmin())
    slack = 2e-3 * float(errors.min())  # beside the minimum the curve is flat, and each sample ripples a little
    assert (errors[: best + 1].diff() < slack).all()
    assert (errors[best:].diff() > -slack).all()
    found = power_quantize(w, b, axis=axis).exponent
    assert abs(found - row[best]) <= 0.02 + 0.01  # half a step of the row more
    assert relative(w, b, found, axis) <= float(errors.min()) * (1 + 1e-3)


def test_known_optima() -> None:
    """Invariant 7, per tensor at 4 bits; and at 8 bits, where the error ripples, still near the best of a row."""
    assert 0.55 <= power_quantize(shapes(0, size=(400, 500), dtype=torch.float32)).exponent <= 0.70
    laplace = shapes(1, "laplace", (400, 500), torch.float32)
    assert 0.45 <= power_quantize(laplace).exponent <= 0.55
    found = power_quantize(laplace, 8).exponent
    row = [relative(laplace, 8, a) for a in torch.linspace(0.2, 1.2, 41).tolist()]
    assert relative(laplace, 8, found) <= 1.02 * min(row)


def test_sums_tell_the_error() -> None:
    """The search's sums against the rounding itself, per tensor and per channel, with and without a clip."""
    w = shapes(3, "laplace", (64, 300))[None]
    for size in (w.abs().amax().reshape(1, 1, 1), w.abs().amax(-1, keepdim=True)):
        spread = Spread.of(w, size, 7)
        for a in (0.2, 0.5, 1.0, 1.4):
            wanted = float((decode(encode(w, size, a, 7), size, a, 7) - w).norm())
            assert spread.error(a) == pytest.approx(wanted, rel=2e-3)
        clipped = min(
            float((decode(encode(w, c * size, 0.7, 7), c * size, 0.7, 7) - w).norm())
            for c in torch.logspace(0, -1, 17, dtype=torch.float64).tolist()
        )
        assert spread.error(0.7, clip=True) == pytest.approx(clipped, rel=2e-3)
    assert BINS > 1000


def test_a_clip_is_never_worse() -> None:
    w = shapes(3, "laplace", (6, 300)).reshape(6, 1, 300)
    size = w.abs().amax(-1, keepdim=True)

    def error(at: Tensor) -> Tensor:
        return (decode(encode(w, at, 1.0, 3), at, 1.0, 3) - w).square().sum(-1)

    best = best_size(w, size, 1.0, 3)
    assert (error(best) <= error(size)).all()
    assert (error(best) < 0.8 * error(size)).any()
    assert (best <= size).all()


def test_one_exponent_for_all_is_that_of_the_sum() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(64, 64))
        model[1].weight.copy_(torch.distributions.StudentT(3.0).sample((64, 64)))
    each = [layer.exponent for layer in nupes_quantize(model, exponent="layer").layers.values()]
    (shared,) = {layer.exponent for layer in nupes_quantize(model).layers.values()}
    assert min(each) < shared < max(each)

    def total(a: float) -> float:
        return sum(
            float((power_quantize(m.weight.detach(), 4, a, 0).values() - m.weight.detach()).norm()) for m in model
        )

    assert total(shared) <= 1.002 * min(total(a) for a in torch.linspace(0.2, 1.2, 51).tolist())
    assert (
        find_exponent([Spread.of(m.weight.detach(), m.weight.detach().abs().amax(1, True), 7) for m in model]) == shared
    )


# ------------------------------------------------------------------------------------------------------ learning


def test_learning_lowers_the_error_and_moves_codes_far() -> None:
    """Invariant 10."""
    torch.manual_seed(0)
    mixed = torch.randn(48, 48)  # correlated inputs: errors of several weights can cancel
    layer = nn.Sequential(nn.Linear(48, 24))
    with torch.no_grad():
        layer[0].weight.copy_(torch.distributions.Laplace(0.0, 0.1).sample((24, 48)))
    data = [torch.randn(512, 48) @ mixed]
    made = nupes_quantize(layer, 4, per="tensor", calibration=data, steps=300, lr=1e-1, strength=1.0)
    told = made.layers["0"]
    assert told.output_error < 0.7 * told.start_error
    assert told.moved[0] >= told.moved[1] > 0
    start = nupes_quantize(layer, 4, per="tensor")
    plain = layer(data[0]).detach()
    power = (plain.square().sum(1)).mean()
    for changes, wanted in ((start, told.start_error), (made, told.output_error)):
        found = (changes.model(data[0]).detach() - plain).square().sum(1).mean() / power
        assert float(found) == pytest.approx(wanted, rel=1e-3)
    codes = made.model[0].packing.integers()
    assert codes.max() <= 14
    assert told.exponent != start.layers["0"].exponent
    weights = nupes_quantize(
        layer, 4, per="tensor", calibration=data, steps=300, lr=1e-1, strength=1.0, learn="weights"
    )
    assert weights.layers["0"].exponent == start.layers["0"].exponent
    straight = nupes_quantize(layer, 4, per="tensor", calibration=data, steps=300, lr=3e-4, rounding="straight-through")
    assert straight.layers["0"].output_error < straight.layers["0"].start_error


def test_what_does_not_help_is_undone() -> None:
    """A learning rate that throws the codes about leaves the rounding it began with."""
    model, data = net(), [images(64)]
    bad = nupes_quantize(model, 4, calibration=data, steps=3, lr=50.0)
    plain = nupes_quantize(model, 4)
    for layer in bad.layers.values():
        assert layer.output_error <= layer.start_error
    undone = [n for n, layer in bad.layers.items() if layer.output_error == layer.start_error]
    assert undone
    for name in undone:
        assert torch.equal(bad.model.get_submodule(name).weight, plain.model.get_submodule(name).weight)
        assert bad.layers[name].moved == (0, 0)


def test_layers_learn_on_what_rounded_layers_give_and_blocks_are_kept_whole() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), nn.Linear(16, 4))
    data = [torch.randn(256, 16)]
    made = nupes_quantize(model, 2, calibration=data, ends=None, steps=150, blocks=["0"], lr=2e-2)
    assert made.layers["0.0"].output_error == made.layers["0.2"].output_error  # that of the block
    assert made.layers["0.0"].output_error < made.layers["0.0"].start_error
    block = (made.model[0](data[0]) - model[0](data[0])).square().sum(1).mean()
    whole = model[0](data[0]).square().sum(1).mean()
    assert float((block / whole).detach()) == pytest.approx(made.layers["0.2"].output_error, rel=1e-3)
    with pytest.raises(QuantizationError, match="no layer that can be learned"):
        nupes_quantize(model, 2, calibration=data, blocks=["0.1"])


def test_learning_is_seeded_and_leaves_the_global_generator_alone() -> None:
    model, data = net(), [images(64)]
    state = torch.get_rng_state()
    one, two = (nupes_quantize(model, 3, calibration=data, steps=20, seed=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.model(data[0]), two.model(data[0]))
    assert one.layers == two.layers


def test_one_layer_by_hand() -> None:
    """`learn_unit` alone: a target that only other codes can meet is met."""
    layer = nn.Linear(8, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08]])  # all but one round to 0
    x = torch.rand(256, 1).expand(256, 8).clone()  # the inputs are one: only the sum of the weights counts
    (seen,) = walk(nn.Sequential(layer), ["0"], [x])
    w, size = layer.weight.data[:, None], torch.ones(1, 1, 1)
    free = FreeCodes(w, size, 1.0, 3, True)
    unit = Unit("0", {"0": free}, {"0": tiling((1, 8), "tensor")})
    found = learn_unit(nn.Sequential(layer), unit, seen, Learning(False, steps=400, lr=2e-2))["0"]
    assert found.before == pytest.approx((0.35 / 1.35) ** 2, rel=1e-4)
    assert found.codes.sum() == 4
    assert found.after < 1e-3


# ------------------------------------------------------------------------------------------- activations, integers


def test_integers_are_exact() -> None:
    """Invariant 2, second half: 4 bits, unsigned and signed inputs, against the sum of products in double precision."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(200, 30))
    for x in (torch.randn(16, 200), torch.rand(16, 200)):
        made = nupes_quantize(linear, 4, exponent=0.5, activations=4, calibration=[x], learn="nothing")
        exact = to_integers(made.model).model
        assert isinstance(exact[0], PowerLinear)
        k, size, top = exact[0].inputs.codes(x)
        assert float(top) == (15 if x.min() >= 0 else 7)
        p = exact[0].weight_codes().double()[None] * k.double()[:, None]
        assert p.abs().max() <= 7 * float(top)
        sums = (p.sign() * p * p).sum(-1)
        scale = (exact[0].packing.scale[:, 0].double() / 49) * (size.double() / float(top) ** 2)
        torch.testing.assert_close(exact(x).double(), sums * scale + linear[0].bias, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(exact(x), made.model(x), rtol=1e-4, atol=1e-5)


def test_convolutions_in_integers_and_what_is_left() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 12, (3, 2), groups=4, dilation=(1, 2)),
        nn.Conv2d(12, 6, 2, padding="same"), nn.ConvTranspose2d(6, 3, 2), nn.Flatten(2), nn.Linear(16, 5),
    ).eval()  # fmt: skip
    x = torch.randn(3, 4, 10, 10)
    model[-1] = nn.Linear(model[:-1](x).shape[-1], 5)
    made = nupes_quantize(model, 4, exponent=0.5, activations=8, calibration=[x], learn="nothing", skip=["6"])
    exact = to_integers(made.model)
    assert exact.changed == ("0", "2")
    assert isinstance(exact.model[2], PowerConv2d)
    assert set(exact.left) == {"3", "4"}
    torch.testing.assert_close(exact.model(x), made.model(x), rtol=1e-4, atol=1e-4)
    assert "exponent" in to_integers(nupes_quantize(model, 4, exponent=0.6, activations=8).model).left["0"]
    assert "not rounded" in to_integers(nupes_quantize(model, 4, exponent=0.5).model).left["0"]
    with pytest.raises(QuantizationError, match="packed"):
        to_integers(model)


def test_sums_beyond_32_bits_do_not_overflow() -> None:
    layer = nn.Sequential(nn.Linear(20, 2, bias=False))
    layer[0].weight.data.fill_(1.0)
    made = nupes_quantize(layer, 8, exponent=0.5, activations=8)
    exact = to_integers(made.model).model
    x = torch.rand(3, 20) + 1
    assert exact[0]._bound(torch.tensor(255.0), 20) > 1 << 31
    torch.testing.assert_close(exact(x), made.model(x), rtol=1e-5, atol=1e-5)


def test_ranges_from_data_from_norms_and_from_each_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 2), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    with torch.no_grad():
        for norm in (model[1], model[5]):
            norm.weight.uniform_(-2, 2)
            norm.bias.uniform_(-1, 1)
    model.eval()
    free = nupes_quantize(model, activations=8).model
    beta, gamma = model[1].bias, model[1].weight.abs()
    inputs = [free[i].input_quantizer for i in (0, 4, 7)]
    assert torch.isnan(inputs[0].high)
    assert float(inputs[1].low) == 0
    assert float(inputs[1].high) == pytest.approx((beta + 6 * gamma).max().item())
    assert float(inputs[2].low) == pytest.approx((model[5].bias - 6 * model[5].weight.abs()).min().item())
    x = images(32)
    seen = nupes_quantize(model, activations=8, calibration=[x[:16], x[16:]], learn="nothing").model
    assert float(seen[0].input_quantizer.high) == pytest.approx(float(x.max()))
    assert float(seen[0].input_quantizer.low) == pytest.approx(float(x.min()))
    for made in (free, seen):
        assert torch.nn.functional.cosine_similarity(made(x).flatten(), model(x).flatten(), dim=0) > 0.95
    q = PowerInput(4, 0.5)
    assert torch.equal(q(torch.zeros(2, 3)), torch.zeros(2, 3))
    x = torch.rand(100)
    assert q(x).unique().numel() <= 16
    assert torch.equal(q(q(x)), q(x))


def test_learning_with_rounded_inputs_shares_the_exponent() -> None:
    made = nupes_quantize(net(), 4, calibration=[images(128)], activations=4, steps=60, exponent_lr=1e-2)
    for name, layer in made.layers.items():
        q = made.model.get_submodule(name).input_quantizer
        assert float(q.exponent) == pytest.approx(layer.exponent, rel=1e-6)
        assert q.bits == (8 if name in ("0", "8") else 4)
        assert torch.isfinite(q.high)
    moved = [layer.exponent for layer in made.layers.values()]
    assert len(set(moved)) > 1


# ------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("tied", [False, True])
def test_language_models(tied: bool, tmp_path: Path) -> None:
    """Ties are kept, the ends have more bits, the file holds it to the bit and is as small as the bits say."""
    model = llama(tied=tied)
    tokens = torch.arange(12)[None]
    skip = ["model.layers.0.self_attn.*"]
    with torch.no_grad():
        plain = model(tokens).logits
        made = nupes_quantize(model, 4, calibration=[{"input_ids": tokens}], steps=10, skip=skip)
        out = made.model(tokens).logits
    assert torch.equal(model(tokens).logits, plain)
    assert {"lm_head", "model.embed_tokens"} <= set(made.changed)
    assert made.layers["model.embed_tokens"].bits == 8
    assert made.layers["model.layers.1.mlp.up_proj"].bits == 4
    assert made.layers["model.embed_tokens"].output_error is None
    assert set(made.left) == {f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"}
    packings = {name: packing for name, _, packing in packed_modules(made.model)}
    assert (packings["lm_head"] is packings["model.embed_tokens"]) == tied
    assert all(isinstance(packing, Lookup) for packing in packings.values())
    save_packed(made.model, tmp_path / "small")
    again = load_packed(tmp_path / "small", into=llama(seed=1, tied=tied))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, out)
    assert nbytes(made.model) < 0.5 * nbytes(model)


def test_rounded_inputs_come_back_from_a_file(tmp_path: Path) -> None:
    model, x = net(), images()
    made = nupes_quantize(model, 4, activations=8, calibration=[x], learn="nothing").model
    save_packed(made, tmp_path / "small")
    into = net(1)
    names = [name for name, _, _ in packed_modules(made)]
    add_inputs(into, dict.fromkeys(names, 8), dict.fromkeys(names, 0.5))
    assert torch.equal(load_packed(tmp_path / "small", into=into)(x), made(x))


def test_other_layers() -> None:
    """A channel is where the outputs lie; transposed convolutions and Conv1D too; what is no layer is named."""
    model = nn.ModuleDict(
        {
            "transposed": nn.ConvTranspose2d(4, 6, 3),
            "one": Conv1D(6, 4),
            "deep": nn.Conv3d(2, 3, 2),
            "table": nn.Embedding(10, 4),
            "odd": nn.Bilinear(2, 3, 4),
        }
    )
    with torch.no_grad():
        model["table"].weight[3] = 0
    made = nupes_quantize(model, 4, ends=None, exponent=0.5)
    assert set(made.changed) == {"transposed", "one", "deep", "table"}
    assert "Bilinear" in made.left["odd"]
    for name, dims in (("transposed", (0, 2, 3)), ("one", (0,)), ("deep", (1, 2, 3, 4)), ("table", (1,))):
        weight, plain = made.model[name].weight, model[name].weight
        wanted = power_quantize(plain.detach(), 4, 0.5, axis=next(d for d in range(plain.ndim) if d not in dims))
        torch.testing.assert_close(weight, wanted.values())
    assert made.model["table"].weight[3].abs().sum() == 0
    half = nupes_quantize(nn.Sequential(nn.Linear(8, 8)).bfloat16()).model
    assert half[0].weight.dtype == torch.bfloat16


def test_ends_have_more_bits() -> None:
    bits = [layer.bits for layer in nupes_quantize(net(), 3).layers.values()]
    assert bits == [8, 3, 3, 3, 8]
    assert {layer.bits for layer in nupes_quantize(net(), 3, ends=None).layers.values()} == {3}
    assert [layer.bits for layer in nupes_quantize(net(), 3, ends=2).layers.values()] == [3] * 5
    made = nupes_quantize(net(), 4, activations=5).model
    assert [made[i].input_quantizer.bits for i in (0, 2, 4, 6, 8)] == [8, 5, 5, 5, 8]


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"bits": 1}, "2 to 8"),
        ({"bits": 9}, "2 to 8"),
        ({"activations": 16}, "2 to 8"),
        ({"ends": 1}, "2 to 8"),
        ({"exponent": 0.0}, "above 0"),
        ({"exponent": -1.0}, "above 0"),
        ({"exponent": float("nan")}, "above 0"),
        ({"exponent": "each"}, "global, layer"),
        ({"per": "group"}, "tensor, channel"),
        ({"clip": "some"}, "max, mse"),
        ({"learn": "biases"}, "nothing, weights"),
        ({"learn": "weights"}, "calibration"),
        ({"rounding": "up"}, "straight-through"),
    ],
)
def test_settings_that_make_no_sense(kwargs: dict[str, object], says: str) -> None:
    with pytest.raises(QuantizationError, match=says):
        nupes_quantize(net(), **kwargs)


def test_bad_weights_models_and_data() -> None:
    model = net()
    with torch.no_grad():
        model[4].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"4\.weight"):
        nupes_quantize(model)
    model = net()
    with pytest.raises(ReconstructionError, match="empty"):
        nupes_quantize(model, calibration=[])
    with pytest.raises(QuantizationError, match="empty"):
        nupes_quantize(model, calibration=[], learn="nothing", activations=8)
    with pytest.raises(QuantizationError, match="NaN"):
        nupes_quantize(model, calibration=[images() / 0], learn="nothing", activations=8)
    with pytest.raises(QuantizationError, match="already"):
        nupes_quantize(nupes_quantize(model).model)
    for bad in (torch.tensor([1.0, torch.inf]), torch.zeros(0)):
        with pytest.raises(QuantizationError):
            power_quantize(bad)
    with pytest.raises(QuantizationError, match="axis"):
        power_quantize(torch.ones(3), axis=1)
    with pytest.raises(QuantizationError, match="above 0"):
        power_quantize(torch.ones(3), a=0.0)


def test_a_layer_that_never_runs_is_rounded_without_being_learned() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    made = nupes_quantize(Idle(), 3, calibration=[torch.randn(32, 6)], steps=5)
    assert set(made.changed) == {"used", "idle"}
    assert made.layers["idle"].output_error is None
    assert made.layers["used"].output_error is not None
    with pytest.raises(QuantizationError, match="never reached idle"):
        nupes_quantize(Idle(), 3, activations=8, calibration=[torch.randn(32, 6)], learn="nothing")
