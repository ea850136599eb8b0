"""Dyadic scales, the integer-only network, integer functions."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuropil.compress.quantize import (
    IntegerGELU,
    IntegerLayerNorm,
    IntegerSoftmax,
    QuantizationError,
    convert_integer,
    dyadic,
    i_exp,
    i_gelu,
    i_layernorm,
    i_softmax,
    i_sqrt,
    integer_functions,
    quantize_model,
    requantize,
)
from neuropil.compress.quantize.integer import IntegerAdd, IntegerLayer, IntegerMean
from neuropil.compress.quantize.integer_math import EXP, i_polynomial


def test_dyadic_numbers_are_as_near_as_they_can_be() -> None:
    """Invariant 10, first half."""
    x = 10.0 ** torch.empty(10_000, dtype=torch.float64).uniform_(-8, 4)
    m, c = dyadic(x)
    assert bool(((m.double() / 2.0**c - x).abs() <= 2.0 ** (-(c + 1).double())).all())
    assert int(m.max()) < 2**31
    assert dyadic(torch.tensor([0.0, 0.5]))[0][0] == 0
    for bad in (-1.0, float("nan"), 2.0**31):
        with pytest.raises(QuantizationError, match="expected"):
            dyadic(torch.tensor([bad]))


def test_requantized_accumulators_are_those_of_real_scales() -> None:
    """Invariant 10, second half."""
    generator = torch.Generator().manual_seed(0)
    acc = torch.randint(-(2**24), 2**24, (10_000,), generator=generator)
    scale = 10.0 ** torch.empty(10_000, dtype=torch.float64).uniform_(-6, -4, generator=generator)
    made = requantize(acc, *dyadic(scale))
    wanted = (acc.double() * scale + 0.5).floor()
    assert (made - wanted).abs().max() <= 1
    assert float((made != wanted).double().mean()) < 1e-3


class Net(nn.Module):
    """Branches, groups, strides, norms, an unusual function and a global mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.pool, self.mean = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.head, self.last = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.first(x)))
        h = F.relu(self.wide(self.depth(h)) + h)
        h = torch.flatten(self.mean(self.pool(h)), 1)
        return self.last(torch.sigmoid(self.head(h)))


def branchy() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(64, 2, 16, 16)
    for _ in range(20):
        model(x)
    return model.eval(), x


def test_the_integer_network_answers_as_the_float_one() -> None:
    model, x = branchy()
    before = copy.deepcopy(model.state_dict())
    changes = convert_integer(model, [x[:32], x[32:]])
    assert set(changes.changed) == {"first", "depth", "wide", "head", "last"}
    assert list(changes.left.values()) == ["sigmoid has no integer form here: it is computed in float"]
    out, wanted = changes.model(x), model(x)
    assert (out - wanted).abs().max() < 0.05 * wanted.std() + 0.02
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    kinds = {type(m) for m in changes.model.modules()}
    assert {IntegerLayer, IntegerAdd, IntegerMean} <= kinds


def test_between_rounding_and_scaling_all_is_int8() -> None:
    model, x = branchy()
    made = convert_integer(model, [x]).model
    seen: list[torch.dtype] = []
    for module in made.modules():
        if isinstance(module, IntegerLayer | IntegerAdd | IntegerMean):
            module.register_forward_hook(lambda m, args, out: seen.extend([*(a.dtype for a in args), out.dtype]))
    made(x)
    assert set(seen) == {torch.int8}
    sums = []
    for module in made.modules():
        if isinstance(module, IntegerLayer):
            module.register_forward_pre_hook(lambda m, args: sums.append(m.accumulate(args[0]).dtype))
    made(x)
    assert set(sums) == {torch.int32}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(8, 5),
        nn.Conv1d(8, 6, 3, padding=1),
        nn.Conv2d(8, 6, 3, stride=2, padding=1),
        nn.Conv2d(8, 6, (3, 1), padding="same", groups=2),
        nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect", bias=False),
        nn.Conv3d(8, 4, 2, dilation=2),
    ],
    ids=lambda m: f"{type(m).__name__}{getattr(m, 'kernel_size', '')}",
)
def test_integer_sums_are_exact(layer: nn.Module) -> None:
    """The accumulator is the sum of products of codes; the simulation in floating point is at most one code away."""
    torch.manual_seed(0)
    dims = 1 if isinstance(layer, nn.Linear) else layer.weight.ndim - 1
    shape = (16, 8) if dims == 1 else (4, 8, *[9] * (dims - 1))
    x = torch.rand(shape) * 3 - 1
    model = nn.Sequential(layer, nn.ReLU())
    made = convert_integer(model, [x]).model
    integer = next(m for m in made.modules() if isinstance(m, IntegerLayer))
    q = next(m for n, m in made.named_modules() if n.endswith("_round"))(x)
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        exact.weight.copy_(integer.codes.double())
        if exact.bias is not None:
            exact.bias.zero_()
    wanted = exact(q.double() - integer.zero_in)
    own = integer.bias.double() + integer.zero_in * integer.codes.flatten(1).double().sum(1)
    shift = own if dims == 1 else own.reshape(-1, *[1] * (dims - 1))
    assert torch.equal(integer.accumulate(q).double(), wanted.detach() + shift)
    assert (integer(q).int() - integer.simulate(q).int()).abs().max() <= 1
    assert (made(x) - model(x)).abs().max() < 0.1


def test_simulated_and_integer_paths_agree() -> None:
    """Fake quantization of the same bits, and the integers, differ from the float network by as little."""
    model, x = branchy()
    fake = quantize_model(model, "int8", activations={"bits": 8, "scheme": "affine"}, calibration=[x]).model
    integer = convert_integer(model, [x]).model
    wanted = model(x)
    simulated, real = ((m(x) - wanted).square().mean().sqrt() for m in (fake, integer))
    assert real < 3 * simulated + 1e-3
    assert real < 0.05 * wanted.std()


def test_what_cannot_become_integers_is_refused() -> None:
    model, x = branchy()
    with pytest.raises(QuantizationError, match="empty"):
        convert_integer(model, [])
    with pytest.raises(QuantizationError, match="moving"):
        convert_integer(model, [x], observer="moving")
    with pytest.raises(QuantizationError, match="compressed already"):
        convert_integer(quantize_model(model).model, [x])


# ----------------------------------------------------------------------------------------------------- functions


def test_the_integer_exponential() -> None:
    """Invariant 15: the polynomial on (-ln 2, 0], and the whole."""
    x = torch.linspace(-0.6931, 0, 20_001, dtype=torch.float64)
    a, b, c = EXP
    assert 2.0e-3 < (a * (x + b) ** 2 + c - x.exp()).abs().max() < 2.2e-3
    scale = 1e-4
    q = (x / scale).round().long()
    value, made = i_polynomial(q, scale, *EXP)
    assert (value * made - (q * scale).exp()).abs().max() < 2.3e-3
    q = -torch.arange(0, 200_000, 7)
    value, made = i_exp(q, scale)
    assert value.dtype == torch.int64
    assert (value * made - (q * scale).exp()).abs().max() < 2.4e-3
    assert bool((value >= 0).all())
    with pytest.raises(QuantizationError, match="maximum"):
        i_exp(torch.tensor([1]), scale)


def test_the_integer_square_root() -> None:
    n = torch.arange(1 << 20)
    root = i_sqrt(n)
    assert bool((root * root <= n).all())
    assert bool(((root + 1) ** 2 > n).all())
    large = torch.randint(1 << 40, 1 << 60, (1000,))
    large = torch.cat([large, torch.tensor([2**62, (2**31) ** 2 - 1, 0, 1])])
    root = i_sqrt(large)
    assert bool(((root * root <= large) & ((root + 1) * (root + 1) > large)).all())
    with pytest.raises(QuantizationError, match="expected"):
        i_sqrt(torch.tensor([-1]))


def test_gelu_softmax_and_norm_are_near_their_real_ones() -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(32, 64)
    q, scale = (x / 1e-2).round().long(), 1e-2
    value, made = i_gelu(q, scale)
    assert (value * made - F.gelu(q * scale)).abs().max() < 2.5e-2  # the fit of erf itself is 1.8e-2 off
    value, made = i_softmax(q, scale, bits=16)
    assert (value * made - (q * scale).softmax(-1)).abs().max() < 5e-3
    value, made = i_layernorm(q)
    assert (value * made - F.layer_norm(q * scale, (64,))).abs().max() < 1e-2
    assert not i_layernorm(torch.full((2, 8), 7))[0].any()


def test_functions_of_a_model_are_replaced() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4), nn.Softmax(-1)).eval()
    made = copy.deepcopy(model)
    assert integer_functions(made) == {"1": "IntegerGELU", "2": "IntegerLayerNorm", "4": "IntegerSoftmax"}
    kinds = (IntegerGELU, IntegerLayerNorm, IntegerSoftmax)
    assert sum(isinstance(m, kinds) for m in made) == 3
    x = torch.randn(64, 8)
    assert (made(x) - model(x)).abs().max() < 0.03
    with pytest.raises(QuantizationError, match="last dimension"):
        IntegerLayerNorm(nn.LayerNorm((2, 3)))
