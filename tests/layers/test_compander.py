"""The weight compander: the sheet's invariants, what it composes with, checkpoints, ties and bad input."""

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import llama
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

from neuropil.data import digits
from neuropil.layers.compander import (
    WeightCompander,
    compand,
    companders,
    decay_weights,
    fold,
    parameter_groups,
    weight_report,
)
from neuropil.training import fit, supervised

BOUNDED = ("arctan", "tanh", "softsign")
ALL = (*BOUNDED, "mu-law")


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 5)
    )


def batch(seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 1, 6, 6, generator=generator), torch.randint(5, (16,), generator=generator)


def specimen(seed: int = 0) -> tuple[nn.Module, Callable[[nn.Module], object], tuple[Tensor, ...]]:
    """A small convolutional network, the compander with learned scales for each channel, and a batch."""

    def apply(model: nn.Module) -> object:
        return compand(model, learnable=True, per="channel")

    return net(seed), apply, (batch()[0],)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    x, y = batch()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def variable(module: nn.Module) -> Tensor:
    return module.parametrizations.weight.original


def step_of(module: nn.Module) -> WeightCompander:
    return module.parametrizations.weight[0]


# --- the function ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_odd_increasing_bounded(kind: str) -> None:
    psi = WeightCompander(kind, a=0.3, b=0.2)
    grid = torch.linspace(-0.8, 0.8, 2001)
    w = psi(grid)
    assert float(psi(torch.zeros(1))) == 0
    assert torch.equal(psi(-grid), -w)
    assert bool((w.diff() > 0).all())
    far = psi(torch.tensor([1e2, 1e4, 1e6]))
    if kind == "mu-law":
        assert not bool((far <= psi.a).any())
        assert math.isinf(float(psi.bound))
    else:
        assert bool((far <= psi.bound).all())
        assert float(far[-1] / psi.bound) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("kind", "function"), [("arctan", math.atan), ("tanh", math.tanh)])
def test_the_closed_form(kind: str, function: Callable[[float], float]) -> None:
    psi = WeightCompander(kind, a=0.3, b=0.2).double()
    for v in (-1.0, 0.05, 0.7):
        assert float(psi(torch.tensor(v, dtype=torch.float64))) == pytest.approx(0.3 * function(v / 0.2), rel=1e-6)


@pytest.mark.filterwarnings("ignore:a slope below 1")
@given(
    st.sampled_from(ALL), st.floats(0.01, 5), st.floats(0.01, 5), st.lists(st.floats(-0.9, 0.9), min_size=1, max_size=9)
)
@settings(max_examples=60, deadline=None)
def test_round_trip(kind: str, a: float, b: float, shares: list[float]) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        psi = WeightCompander(kind, a=a, b=b, slope=2.0).to(dtype)
        bound = a * (math.pi / 2 if kind == "arctan" else 1)
        w = torch.tensor(shares, dtype=dtype) * bound
        v = psi.right_inverse(w)
        torch.testing.assert_close(psi(v), w, rtol=tolerance, atol=tolerance * bound * 1e-2)
        torch.testing.assert_close(psi.right_inverse(psi(v)), v, rtol=100 * tolerance, atol=tolerance * b)
        assert psi.clamped == 0


@pytest.mark.parametrize("kind", ALL)
def test_the_slope_and_the_derivative(kind: str) -> None:
    psi = WeightCompander(kind, a=0.3, slope=1.5).double()
    v = torch.linspace(-2, 2, 41, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(psi(v).sum(), v)
    torch.testing.assert_close(psi.derivative(v), slope, rtol=1e-9, atol=1e-12)
    assert float(slope[20]) == pytest.approx(1.5, rel=1e-6)  # at exactly 0, where no half of the mu-law may be dead
    assert float(psi.slope) == pytest.approx(1.5, rel=1e-6)
    assert bool((slope[20:].diff() < 0).all())
    torch.autograd.gradcheck(psi, v[[0, 5, 15, 30]].detach().requires_grad_())


@pytest.mark.parametrize("kind", ALL)
def test_one_step_moves_a_weight_by_the_slope_squared(kind: str) -> None:
    layer = nn.Linear(6, 4).double()
    parametrize.register_parametrization(layer, "weight", WeightCompander(kind))
    before, expected = layer.weight.detach(), step_of(layer).derivative(variable(layer).detach()).square()
    out = layer(torch.randn(9, 6, dtype=torch.float64)).square().mean()
    w = torch.autograd.grad(out, variable(layer), retain_graph=True)[0] / expected.sqrt()  # dL/dw by the chain rule
    out.backward()
    torch.optim.SGD([variable(layer)], lr=1e-6).step()
    torch.testing.assert_close(layer.weight.detach() - before, -1e-6 * expected * w, rtol=0, atol=1e-9)
    assert float((layer.weight.detach() - before).abs().max()) > 1e-9


@pytest.mark.filterwarnings("ignore:a slope below 1")
def test_scaling() -> None:
    v = torch.linspace(-2, 2, 41, dtype=torch.float64)
    for kind in ALL:
        w = WeightCompander(kind, a=0.3, b=0.2).double()(v)
        torch.testing.assert_close(WeightCompander(kind, a=0.9, b=0.2).double()(v), 3 * w, rtol=1e-6, atol=0)
        torch.testing.assert_close(WeightCompander(kind, a=0.3, b=0.6).double()(3 * v), w, rtol=1e-6, atol=0)


def test_a_wide_one_is_the_identity() -> None:
    v = torch.linspace(-1, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(WeightCompander(a=1e4, b=1e4).double()(v), v, rtol=0, atol=1e-8)
    plain, bent = net().double(), net().double()
    compand(bent, a=1e4, b=1e4)
    x, y = batch()
    curves = []
    for model in (plain, bent):
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
        for _ in range(50):
            optimizer.zero_grad()
            loss = cross_entropy(model(x.double()), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert curves[0][-1] < 0.5 * curves[0][0]


# --- on a model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("per", ["layer", "channel", "global"])
@pytest.mark.parametrize("learnable", [False, True])
def test_the_initial_function_is_kept(kind: str, per: str, learnable: bool) -> None:
    model, plain = net(), net()
    changes = compand(model, kind=kind, per=per, learnable=learnable, bound_std=12.0 if per == "global" else 4.0)
    assert changes.changed == ("0", "4", "6")
    assert changes.model is model
    x, _ = batch()
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=1e-5)
    assert sum(entry.clamped for entry in weight_report(model)) == 0


def test_clamped_weights_are_counted() -> None:
    model = net()
    weight = model[4].weight.detach().clone()
    compand(model, bound_std=1.5)
    most = 0.95 * 1.5 * float(weight.square().mean().sqrt())
    entry = next(e for e in weight_report(model) if e.name == "4.weight")
    assert entry.clamped == int((weight.abs() > most).sum()) > 100
    torch.testing.assert_close(model[4].weight, weight.clamp(-most, most), rtol=1e-5, atol=1e-6)
    assert entry.bound == pytest.approx(most / 0.95, rel=1e-5)
    assert entry.slope == pytest.approx(1.5, rel=1e-5)


def test_starting_at_the_value_scales_small_weights_by_the_slope() -> None:
    model = net()
    weight = model[4].weight.detach().clone()
    compand(model, bound_std=100.0, slope=2.0, start="value")
    assert torch.equal(variable(model[4]), weight)
    torch.testing.assert_close(model[4].weight, 2 * weight, rtol=1e-2, atol=0)


def test_folding_is_exact_and_gives_the_plain_network() -> None:
    model, plain = net(), net()
    compand(model, learnable=True)
    optimizer = torch.optim.SGD(parameter_groups(model), lr=0.1, momentum=0.9)
    train(model, optimizer, 20)
    x, _ = batch()
    out = model.eval()(x)
    assert fold(model) == ("0.weight", "4.weight", "6.weight")
    assert torch.equal(model(x), out)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert type(model[4]) is nn.Linear
    assert fold(model) == ()
    compand(model, bound_std=5.0)
    torch.testing.assert_close(model(x), out, rtol=1e-5, atol=1e-5)  # outputs of magnitude 20 by now


def test_weights_stay_within_the_bound_at_a_huge_learning_rate() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    bent = copy.deepcopy(plain)
    compand(bent)
    x, y = batch()
    x = x.flatten(1)[:, :6]
    for model in (plain, bent):
        optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "bias" not in n], lr=30.0)
        for _ in range(1000):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    for name, module, _, step in companders(bent):
        assert bool((module.weight.abs() <= step.bound).all()), name
        assert float(module.weight.detach().abs().max()) > 0.9 * float(step.bound), "the bound was put to the test"
    widest = max(float(s.bound) for *_, s in companders(bent))
    assert not max(float(p.detach().abs().max()) for p in plain.parameters()) < 5 * widest


def test_the_gradients_of_learned_scales() -> None:
    layer = nn.Linear(6, 4).double()
    parametrize.register_parametrization(layer, "weight", WeightCompander(learnable=True))
    step, v = step_of(layer), variable(layer).detach()
    a, b = step.a.detach(), step.b.detach()
    weight = layer.weight
    weight.retain_grad()
    (nn.functional.linear(torch.randn(9, 6, dtype=torch.float64), weight).square().mean()).backward()
    g = weight.grad
    torch.testing.assert_close(step.log_a.grad / a, (g * (v / b).atan()).sum())
    torch.testing.assert_close(step.log_b.grad / b, -(g * (a * v / b**2) / (1 + (v / b) ** 2)).sum())


@pytest.mark.parametrize("per", ["layer", "channel", "global"])
def test_learned_scales_at_rate_zero_are_the_fixed_version(per: str) -> None:
    fixed, learned = net(), net()
    compand(fixed, per=per)
    compand(learned, per=per, learnable=True)
    options = {"lr": 0.1, "momentum": 0.9}
    ours = train(learned, torch.optim.SGD(parameter_groups(learned, weight_decay=1e-3, hyper_lr=0.0), **options), 30)
    theirs = train(fixed, torch.optim.SGD(parameter_groups(fixed, weight_decay=1e-3), **options), 30)
    assert ours == theirs
    assert ours[-1] < ours[0]


def test_the_count_of_parameters() -> None:
    def count(**options: object) -> int:
        model = net()
        compand(model, **options)
        return sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in net().parameters())

    assert count() == 0
    assert count(learnable=True) == 2 * 3
    assert count(learnable=True, per="channel") == 2 * (6 + 20 + 5)
    assert count(learnable=True, per="global") == 2
    assert [p.numel() for p in parameter_groups(net())[0]["params"]] == [p.numel() for p in net().parameters()]


def test_the_least_slope_is_kept() -> None:
    model = net()
    compand(model, learnable=True, min_slope=1.2)
    step = step_of(model[4])
    with torch.no_grad():
        step.log_b.add_(3.0)
    assert float(step.slope) == pytest.approx(1.2, rel=1e-5)
    v = torch.tensor([1e-4])
    assert float(step(v).detach() / v) == pytest.approx(1.2, rel=1e-3)


def test_decay_on_the_weights_is_the_gradient_of_their_norm() -> None:
    ours, theirs = net(), net()
    for model in (ours, theirs):
        compand(model, learnable=True)
    x, y = batch()
    cross_entropy(ours(x), y).backward()
    scales = [step.log_a.grad.clone() for *_, step in companders(ours)]
    decay_weights(ours, 0.3)
    penalty = sum(0.5 * 0.3 * module.weight.square().sum() for _, module, *_ in companders(theirs))
    (cross_entropy(theirs(x), y) + penalty).backward()
    for (_, module, *_), (_, other, *_) in zip(companders(ours), companders(theirs), strict=True):
        torch.testing.assert_close(variable(module).grad, variable(other).grad, rtol=1e-4, atol=1e-6)
    assert [step.log_a.grad for *_, step in companders(ours)] == scales


def test_it_spreads_the_weights_of_a_trained_network() -> None:
    images = digits()
    data = (images.train_x[:500], images.train_y[:500])
    found = {}
    for name in ("plain", "compander"):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )
        for module in (model[1], model[3], model[5]):
            nn.init.kaiming_normal_(module.weight)
        if name == "compander":
            compand(model, slope=2.0, bound_std=2.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        run = fit(model, data, supervised(cross_entropy), optimizer, epochs=5, progress=False)
        assert run.losses[-1] < 0.3
        found[name] = weight_report(model)[1]
    assert found["compander"].near_zero < found["plain"].near_zero
    assert found["compander"].kurtosis < 2.6 < 2.8 < found["plain"].kurtosis
    assert found["compander"].peak < 2.5 < 3.5 < found["plain"].peak
    assert found["plain"].slope is None


def test_the_report_of_known_weights() -> None:
    layer = nn.Linear(4, 1)
    layer.weight.data = torch.tensor([[1.0, -1.0, 3.0, -3.0]])
    (entry,) = weight_report(layer)
    assert entry.name == "weight"
    assert entry.kurtosis == pytest.approx((2 * 1 + 2 * 81) / 4 / 25)
    assert entry.peak == pytest.approx(3 / math.sqrt(5))
    assert entry.near_zero == 0
    normal = nn.Linear(500, 400)
    nn.init.normal_(normal.weight)
    (entry,) = weight_report(normal)
    assert entry.near_zero == pytest.approx(math.erf(0.1 / math.sqrt(2)), abs=3e-3)
    assert entry.kurtosis == pytest.approx(3, abs=0.05)


# --- what it composes with -------------------------------------------------------------------------


def test_skipping_and_what_is_left() -> None:
    model = net()
    nn.init.zeros_(model[6].weight)
    changes = compand(model, skip=lambda name, module: name == "0")
    assert changes.changed == ("4",)
    assert changes.left["0"] == "skipped"
    assert changes.left["6"] == "its weight is all 0 and sets no bound; give a and b"
    other = net()
    nn.init.zeros_(other[0].weight[2])
    assert compand(other, per="channel").left == {
        "0": "its weight has channels that are all 0 and sets no bound; give a and b"
    }
    assert [name for name, *_ in companders(model)] == ["4.weight"]


def test_a_plain_checkpoint_is_taken() -> None:
    x, _ = batch()
    for per in ("layer", "channel"):
        trained, model = net(3), net(0)
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.mul_(5)  # far beyond the bounds of the fresh network
        compand(model, per=per, bound_std=4.0, learnable=True)
        optimizer = torch.optim.SGD(parameter_groups(model), lr=0.1)
        model.load_state_dict(trained.state_dict())
        torch.testing.assert_close(model.eval()(x), trained.eval()(x), rtol=1e-4, atol=1e-4)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters()}
    with pytest.raises(RuntimeError, match=r"Missing key.*4\.parametrizations"):
        model.load_state_dict({**trained.state_dict(), "4.weight": torch.ones(2, 2)})


def test_a_plain_checkpoint_keeps_global_scales() -> None:
    model = net(0)
    compand(model, per="global", bound_std=6.0)
    before = float(step_of(model[4]).a)
    model.load_state_dict(net(3).state_dict())
    torch.testing.assert_close(model[4].weight, net(3)[4].weight, rtol=1e-4, atol=1e-5)
    assert {float(step.a) for *_, step in companders(model)} == {before}


def test_training_goes_on_to_the_bit_from_a_file() -> None:
    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net(seed)
        compand(model, learnable=True, per="global")
        return model, torch.optim.AdamW(parameter_groups(model, weight_decay=0.01, hyper_lr=1e-3), lr=0.01)

    whole = train(*start(0), 12)
    model, optimizer = start(0)
    train(model, optimizer, 5)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    model, optimizer = start(1)
    for part, state in zip((model, optimizer), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert train(model, optimizer, 7) == whole[5:]


def test_a_shared_weight_has_one_variable() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    model[2].weight = model[0].weight
    x = torch.randn(5, 8)
    before = model(x)
    assert compand(model, bound_std=4.0, learnable=True).changed == ("0", "2", "3")
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
    assert variable(model[0]) is variable(model[2])
    assert step_of(model[0]) is step_of(model[2])
    optimizer = torch.optim.SGD(parameter_groups(model), lr=0.1)
    model(x).square().mean().backward()
    gradient = variable(model[0]).grad.clone()
    decay_weights(model, 0.5)  # once
    step = step_of(model[0])
    v = variable(model[0]).detach()
    torch.testing.assert_close(variable(model[0]).grad - gradient, (0.5 * step(v) * step.derivative(v)).detach())
    optimizer.step()
    out = model(x).detach()
    assert len(fold(model)) == 3
    assert model[0].weight is model[2].weight
    assert torch.equal(model(x), out)


def test_a_weight_shared_with_an_embedding_is_left() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False))
    model[2].weight = model[0].weight
    before = model[0].weight.detach().clone()
    changes = compand(model)
    assert changes.changed == ("1",)
    assert "shared with 0" in changes.left["2"]
    assert torch.equal(model[0].weight, before)


def test_a_language_model_with_tied_embeddings() -> None:
    model = llama(tied=True)
    tokens = torch.arange(12).reshape(2, 6)
    before = model(tokens).logits
    changes = compand(model, bound_std=6.0)
    assert len(changes.changed) == 2 * 7  # q, k, v, o, gate, up and down in each of two blocks
    assert list(changes.left) == ["lm_head"]
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)
    model(tokens, labels=tokens).loss.backward()
    assert all(bool(variable(module).grad.any()) for _, module, *_ in companders(model))
    fold(model)
    assert model.state_dict().keys() == llama(tied=True).state_dict().keys()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.LSTMCell])
def test_recurrent_matrices(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([kind(4, 6)])
    x = torch.randn(7, 4)

    def output() -> Tensor:  # of two steps, so that the recurrent matrix counts
        return model[0](x, model[0](x))[0] if kind is nn.LSTMCell else model[0](x)[0]

    before = output()
    assert compand(model, include=(kind,), bound_std=4.0).changed == ("0",)
    names = [name for name, *_ in companders(model)]
    assert len(names) == 2
    assert all("weight" in name for name in names)
    out = output()
    torch.testing.assert_close(out, before, rtol=0, atol=1e-5)
    out.square().mean().backward()
    assert all(bool(chain.original.grad.any()) for chain in model[0].parametrizations.values())
    fold(model)
    torch.testing.assert_close(output(), out, rtol=0, atol=1e-6)


def test_after_weight_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(5, 8)
    before = model(x)
    compand(model, bound_std=4.0)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="2 parametrisations"):
        decay_weights(model, 0.1)
    out = model(x).detach()
    fold(model)
    assert torch.equal(model(x), out)


def test_a_mask_on_the_variable_is_a_mask_on_the_weights() -> None:
    layer = nn.Linear(8, 6)
    weight = layer.weight.detach().clone()
    compand(layer, bound_std=5.0)
    prune.l1_unstructured(layer.parametrizations.weight, "original", 0.5)
    kept = weight.abs() > weight.abs().flatten().kthvalue(24).values
    torch.testing.assert_close(layer.weight, weight * kept, rtol=1e-4, atol=1e-6)
    assert torch.equal(layer.weight == 0, ~kept)


def test_a_pruned_layer_is_left() -> None:
    layer = nn.Sequential(nn.Linear(8, 6))
    prune.l1_unstructured(layer[0], "weight", 0.5)
    changes = compand(layer)
    assert changes.changed == ()
    assert changes.left == {"0": "its weight is no parameter"}


def test_averages_copies_and_half_precision() -> None:
    model = net()
    compand(model, learnable=True, per="channel")
    x, y = batch()
    averaged = AveragedModel(model)
    train(model, torch.optim.SGD(parameter_groups(model), lr=0.1), 3)
    averaged.update_parameters(model)
    assert torch.equal(averaged.module(x), copy.deepcopy(model)(x))
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(model(x), y)
    loss.backward()
    assert variable(model[4]).grad.dtype == torch.float32
    half = copy.deepcopy(model).bfloat16()
    assert half[4].weight.dtype == torch.bfloat16
    assert half(x.bfloat16()).dtype == torch.bfloat16
    frozen = nn.Linear(3, 3).requires_grad_(False)
    compand(frozen)
    assert not variable(frozen).requires_grad


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"a": 0.0},
        {"b": -1.0},
        {"slope": 0.0},
        {"bound_std": math.nan},
        {"min_slope": -1.0},
        {"limit": 1.0},
        {"kind": "sine"},
        {"per": "row"},
        {"start": "zero"},
        {"beyond": "ignore"},
        {"kind": "mu-law", "mu": 0.0},
    ],
)
def test_settings_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"=.*expected"):
        WeightCompander(**options)
    model = net()
    with pytest.raises(ValueError, match=r"=.*expected"):
        compand(model, **options)
    assert model.state_dict().keys() == net().state_dict().keys()


@pytest.mark.parametrize("options", [{"slope": 0.9}, {"a": 1.0, "b": 2.0}, {"a": 1.0, "slope": 0.5}])
def test_a_slope_below_one_warns(options: dict[str, float]) -> None:
    with pytest.warns(UserWarning, match="only compresses"):
        compand(net(), **options)


def test_weights_that_cannot_be_companded() -> None:
    with pytest.raises(ValueError, match=r"torch\.int64"):
        WeightCompander().right_inverse(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="all 0"):
        WeightCompander().right_inverse(torch.zeros(3, 3))
    model = net()
    with torch.no_grad():
        model[4].weight[3, 5] = 9.0
    with pytest.raises(ValueError, match=r"4: 1 of 1920 weights exceed 0\.95 of the bound"):
        compand(model, bound_std=4.0, beyond="raise")
    assert model.state_dict().keys() == net().state_dict().keys(), "nothing is changed by half"
    assert torch.equal(model[0].weight, net()[0].weight)
    model = net()
    compand(model)
    with pytest.raises(ValueError, match=r"0\.weight.* companded already"):
        compand(model)
