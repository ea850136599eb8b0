"""BiPer: the sheet's invariants, closed forms by Monte Carlo, two stages, one bit, the XNOR product."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from neuropil.compress import BiPer, BiPerConv2d, BiPerLinear, bake, binarize_model, quantization_error
from neuropil.compress.biper import SignInput, binarizers, biper, regularizer, set_stage, tau_at
from neuropil.compress.biper_error import laplace_error, laplace_moments
from neuropil.compress.quantize import QuantizationError, quantize_model
from neuropil.compress.quantize.sign_gradients import sign
from neuropil.compress.quantize.xnor import pack_signs, xnor_matmul
from neuropil.errors import ModelError
from neuropil.models.packed_files import load_packed, save_packed
from neuropil.packed import Lookup, nbytes, packed_modules


def convnet(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Hardtanh(),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.Hardtanh(),
        nn.Conv2d(16, 16, 3, stride=2, groups=4, bias=False),
        nn.BatchNorm2d(16),
        nn.Flatten(),
        nn.Linear(16 * 9, 12),
        nn.Hardtanh(),
        nn.Linear(12, 5),
    )


def images(seed: int = 3) -> Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def specimen(seed: int) -> tuple[nn.Module, Callable[[nn.Module], object], tuple[Tensor, ...]]:
    """A convolution and a linear layer with signs of sines for weights."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))

    def apply(made: nn.Module) -> None:
        for name, stage in (("0", 2), ("2", 1)):
            layer = made.get_submodule(name)
            parametrize.register_parametrization(layer, "weight", BiPer(20.0, stage).for_layer(layer))

    return model, apply, (torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(7)),)


def weights(count: int = 1000, seed: int = 0) -> Tensor:
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- the square wave


@pytest.mark.parametrize("omega", [0.7, 5.0, 20.0, 50.0])
def test_the_binarizer_is_a_square_wave(omega: float) -> None:
    w = weights()
    w = w[torch.sin(omega * w).abs() > 1e-6]
    b = biper(w, omega)
    assert set(b.tolist()) == {-1.0, 1.0}
    assert torch.equal(biper(w + 2 * math.pi / omega, omega), b)
    assert torch.equal(biper(w + math.pi / omega, omega), -b)
    assert torch.equal(biper(-w, omega), -b)
    near = w[w.abs() < math.pi / omega]
    assert torch.equal(biper(near, omega), near.sign())
    assert len(near) > 20
    assert biper(torch.zeros(1), omega).item() == 1


@pytest.mark.parametrize("hard", [True, False])
def test_the_gradient_is_that_of_the_sine(hard: bool) -> None:
    w, g = weights().requires_grad_(), weights(seed=1)
    (biper(w, 20.0, hard) * g).sum().backward()
    torch.testing.assert_close(w.grad, g * 20 * torch.cos(20 * w.detach()), rtol=1e-6, atol=1e-12)


def test_a_slow_wave_is_a_plain_sign_layer() -> None:
    torch.manual_seed(0)
    layer = BiPerConv2d(4, 8, 3, padding=1, omega=1.0, stage=2).eval()
    latent = layer.parametrizations.weight.original
    assert latent.abs().max() < math.pi
    x = torch.randn(2, 4, 6, 6)
    alpha = layer.parametrizations.weight[0].alpha
    plain = functional.conv2d(sign(x), latent.sign() * alpha[:, :, None, None], layer.bias, padding=1)
    assert torch.equal(layer(x), plain)


def test_stage_one_is_a_convolution_with_sines() -> None:
    torch.manual_seed(0)
    layer = BiPerConv2d(4, 6, 3, stride=2, padding=1, dilation=1, groups=2, bias=False, omega=15.0).double().eval()
    x = torch.randn(3, 4, 7, 7, dtype=torch.float64)
    chain: Any = layer.parametrizations
    w, alpha = chain.weight.original, chain.weight[0].alpha
    wanted = functional.conv2d(sign(x), torch.sin(15.0 * w), stride=2, padding=1, groups=2) * alpha[:, :, None]
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
    plain = copy.deepcopy(chain.weight[0])
    assert torch.autograd.gradcheck(plain, w.detach().requires_grad_())
    assert bool((alpha >= 0).all())
    assert bool((alpha <= 1).all())


def test_an_ever_slower_sine_is_the_weight() -> None:
    w = weights()
    for omega in (1e-2, 1e-3):
        assert (biper(w, omega, hard=False) / omega - w).abs().max() < omega**2 * w.abs().max() ** 3 / 6 * 1.001


# ----------------------------------------------------------------------------------------------- activations


def test_the_gradient_of_activations_is_a_tent() -> None:
    a = torch.linspace(-2, 2, 4001, dtype=torch.float64, requires_grad=True)
    SignInput().eval()(a).sum().backward()
    torch.testing.assert_close(a.grad, (2 - 2 * a.detach().abs()).clamp_min(0))
    assert a.grad.max() == 2
    assert float(a.grad.mean() * 4) == pytest.approx(2, rel=1e-3)  # the jump of the sign


@pytest.mark.parametrize("layer", [BiPerConv2d(3, 4, 3), BiPerLinear(6, 4)])
def test_size_of_a_sample_does_not_matter(layer: nn.Module) -> None:
    x = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.01, 1.0, 300.0])[:, None, None, None]
    for mode in (True, False):
        layer.train(mode)
        assert torch.equal(layer(x), layer(scale * x))
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_training_divides_by_the_deviation_of_the_sample() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    signs = SignInput(core=3)
    g = torch.randn_like(x)
    (found,) = torch.autograd.grad((signs(x) * g).sum(), x)
    y = x / (x.var((1, 2, 3), keepdim=True) + signs.eps).sqrt()  # unbiased; the gradient flows through it
    (wanted,) = torch.autograd.grad((sign(y, "approx") * g).sum(), x)
    torch.testing.assert_close(found, wanted)
    one = SignInput()(torch.tensor([[3.0], [-2.0]]))
    assert one.tolist() == [[1.0], [-1.0]]


# -------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("u", "first", "second", "least"),
    [
        (0.5, 0.4015, 0.25, 0.0888),
        (1.0, 0.5452, 0.4, 0.1028),
        (2.0, 0.6099, 0.4706, 0.0986),
        (20.0, 0.6363, 0.4997, 0.0948),
    ],
)
def test_moments_by_monte_carlo(u: float, first: float, second: float, least: float) -> None:
    draws = torch.distributions.Laplace(0.0, 1.0)
    torch.manual_seed(0)
    wave = torch.sin(u * draws.sample((4_000_000,)).double())
    found = laplace_moments(u)
    assert found == pytest.approx((first, second), abs=1e-4)
    assert laplace_error(u) == pytest.approx(least, abs=1e-4)
    assert found == pytest.approx((float(wave.abs().mean()), float(wave.square().mean())), abs=1e-3)
    signs = torch.where(wave >= 0, 1.0, -1.0)
    assert laplace_error(u) == pytest.approx(float((wave - found[0] * signs).square().mean()), abs=1e-3)
    assert laplace_error(u, unit=True) == pytest.approx(float((wave - signs).square().mean()), abs=1e-3)


def test_limits_of_the_error() -> None:
    assert laplace_error(1e-4) == pytest.approx(0, abs=1e-7)
    assert laplace_error(1e5) == pytest.approx(0.5 - 4 / math.pi**2, abs=1e-5)
    assert laplace_error(1e-4, unit=True) == pytest.approx(1, abs=1e-3)
    assert laplace_error(1e5, unit=True) == pytest.approx(1.5 - 4 / math.pi, abs=1e-4)
    assert laplace_error(20.0, unit=True) == pytest.approx(0.2270, abs=1e-4)
    grid = [0.5 + 0.01 * i for i in range(200)]
    assert 0.9 < max(grid, key=laplace_error) < 1.3


def test_the_error_of_a_model_with_laplace_weights() -> None:
    model = nn.Sequential(nn.Linear(700, 700), nn.Linear(3, 3))
    torch.manual_seed(0)
    with torch.no_grad():
        model[0].weight.copy_(torch.distributions.Laplace(0.0, 0.05).sample((700, 700)))
    made = binarize_model(model, 20.0, skip=["last"]).model
    (error,) = quantization_error(made).values()
    assert error.u == pytest.approx(1.0, rel=0.01)
    assert error.least == pytest.approx(error.expected_least, rel=0.01)
    assert error.unit == pytest.approx(error.expected_unit, rel=0.01)
    assert error.misfit < 0.01
    latent = made[0].parametrizations.weight.original.detach()
    values = latent.abs().flatten().double().numpy()
    assert error.misfit == pytest.approx(stats.kstest(values, stats.expon(scale=values.mean()).cdf).statistic, rel=1e-6)
    wave = torch.sin(20 * latent)
    assert error.absolute == pytest.approx(float((wave - wave.sign()).abs().mean()), rel=1e-5)


def test_the_regularizer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5)).double()
    made = binarize_model(model, {"0": 20.0, "1": 5.0}, skip=[]).model
    penalty = regularizer(made, 0.3)
    penalty.backward()
    assert 0 <= penalty.item() <= 2 * 0.3
    for (_, _, w), omega in zip(binarizers(made), (20.0, 5.0), strict=True):
        wanted = 0.3 * omega * torch.sin(2 * omega * w) / w.numel()
        torch.testing.assert_close(w.grad, wanted, rtol=1e-6, atol=1e-12)
        with torch.no_grad():
            w.copy_(torch.arange(w.numel(), dtype=torch.float64).reshape(w.shape) * math.pi / (2 * omega))
        w.grad = None
    regularizer(made, 0.3).backward()
    assert all(w.grad.abs().max() < 1e-12 for _, _, w in binarizers(made))
    middle = tau_at(0.5)
    e = math.e
    a = (0.99 - 0.85) / (e - 1)
    assert middle == pytest.approx(a * e**0.5 + 0.85 - a)


# ------------------------------------------------------------------------------------------ models, stages


def trained(made: nn.Module, steps: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.05, momentum=0.9)
    x, y = images(), torch.tensor([0, 1, 2, 3, 4, 0])
    for _ in range(steps):
        optimizer.zero_grad()
        (functional.cross_entropy(made(x), y) + regularizer(made, 0.037)).backward()
        optimizer.step()
    return made


def test_all_layers_are_binarized_or_named() -> None:
    model = convnet()
    changes = binarize_model(model)
    assert changes.changed == ("3", "6", "9")
    assert changes.left == {"0": "skipped as asked", "11": "skipped as asked"}
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    assert all(
        m.weight.abs().flatten(1).unique(dim=1).shape[1] > 1 for n, m in model.named_modules() if n in "369" and n
    )
    only = binarize_model(model, {"3": 10.0, "6*": 30.0}, binary_inputs=False).model
    assert {name: float(step.omega) for name, step, _ in binarizers(only)} == {"3": 10.0, "6": 30.0}
    assert not any(isinstance(m, SignInput) for m in only.modules())


def test_two_stages_and_one_bit(tmp_path: Path) -> None:
    made = trained(binarize_model(convnet()).model)
    latents = {name: w.detach().clone() for name, _, w in binarizers(made)}
    with pytest.raises(QuantizationError, match="set_stage"):
        bake(made)
    assert set_stage(made, 2) == 3
    assert all(torch.equal(latents[name], w) for name, _, w in binarizers(made))
    trained(made, seed=1)
    made.eval()
    x = images(9)
    out = made(x)
    changes = bake(made)
    assert changes.changed == ("3", "6", "9")
    assert torch.equal(changes.model(x), out)
    for name, _, packing in packed_modules(changes.model):
        assert isinstance(packing, Lookup)
        count, rows = packing.shape.numel(), packing.shape[0]
        assert nbytes(packing) == -(-count // 8) + 4 * rows + 8
        latent = made.get_submodule(name).parametrizations.weight.original
        exact = torch.where(torch.sin(20 * latent) >= 0, 1, -1)
        assert torch.equal(2 * packing.integers().reshape(packing.shape).int() - 1, exact)
    folder = save_packed(changes.model, tmp_path / "small")
    again = load_packed(folder, into=binarize_model(convnet(1)).model)
    assert torch.equal(again(x), out)
    with pytest.raises(ModelError, match="does not fit"):
        load_packed(folder, into=convnet(1))  # it would read real numbers


def test_a_state_dict_carries_frequency_and_stage() -> None:
    made = binarize_model(convnet(), 7.0, stage=2).model.eval()
    other = binarize_model(convnet(1)).model.eval()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(images()), made(images()))
    assert {(float(s.omega), int(s.stage)) for _, s, _ in binarizers(other)} == {(7.0, 2)}


def test_the_product_of_bits_is_that_of_signs() -> None:
    torch.manual_seed(0)
    layer = BiPerLinear(150, 20, bias=False, stage=2).eval()
    x = torch.randn(9, 150)
    chain: Any = layer.parametrizations
    bits = xnor_matmul(pack_signs(x), pack_signs(torch.sin(20.0 * chain.weight.original)), 150)
    alpha = chain.weight[0].alpha[:, 0]
    floats = sign(x) @ sign(layer.weight * alpha.sign()[:, None]).T
    assert torch.equal(bits.float(), floats)
    torch.testing.assert_close(bits * alpha, layer(x))


def test_transformers_and_attention() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    changes = binarize_model(model, skip=[])
    assert changes.changed == ("linear1", "linear2")
    assert "nn.MultiheadAttention" in changes.left["self_attn.out_proj"]
    assert changes.left["self_attn"]
    assert changes.model(torch.randn(2, 5, 16)).shape == (2, 5, 16)
    real = binarize_model(model, skip=[], binary_inputs=False)
    assert "self_attn.out_proj" in real.changed
    words = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    assert "by token" in binarize_model(words, skip=[]).left["0"]


def test_it_learns() -> None:
    """Signs of sines fit what a layer of signs made."""
    torch.manual_seed(0)
    x = torch.randn(256, 24).sign()
    y = x @ torch.randn(24, 6).sign()
    model = BiPerLinear(24, 6, stage=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for step in range(400):
        if step == 200:
            set_stage(model, 2)
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_bad_input() -> None:
    for omega in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(QuantizationError, match="omega"):
            BiPer(omega)
    with pytest.raises(ValueError, match="stage=3"):
        BiPer(20.0, stage=3)
    model = convnet()
    made = binarize_model(model).model
    with pytest.raises(QuantizationError, match="stage=0"):
        set_stage(made, 0)
    for act in (lambda: set_stage(model, 2), lambda: regularizer(model, 0.1), lambda: quantization_error(model)):
        with pytest.raises(QuantizationError, match="no layer of the model is binarized"):
            act()
    assert "parametrized" in binarize_model(made).left["3"]
    with pytest.raises(QuantizationError, match="compressed already"):
        binarize_model(quantize_model(model).model)
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(QuantizationError, match=r"3\.weight holds NaN"):
        binarize_model(model)
    with pytest.raises(QuantizationError, match="u=0"):
        laplace_moments(0.0)
    zero = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(zero[0].weight)
    with pytest.raises(QuantizationError, match="all 0"):
        quantization_error(binarize_model(zero, skip=[]).model)
    assert binarize_model(zero, skip=[], stage=2).model[0].weight.abs().min() >= 0
