"""Learned quantizers: their gradients by the stated closed forms, starts, keeping, packing, and that they learn."""

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from neuropil.compress.quantize import (
    LSQ,
    PACT,
    QIL,
    TTQ,
    LearnedLevels,
    LSQPlus,
    QuantizationError,
    Quantizer,
    bake,
    qat_prepare,
    quantize_model,
)
from neuropil.compress.quantize.learned import Learned
from neuropil.packed import nbytes

MAKERS: list[Callable[[], Learned]] = [
    lambda: LSQ(3),
    lambda: LSQ(4, granularity="channel"),
    lambda: LSQ(2, signed=False),
    lambda: LSQPlus(3, granularity="channel"),
    lambda: QIL(3),
    lambda: QIL(4, "channel", power=True),
    lambda: LearnedLevels(2),
    lambda: TTQ(),
    lambda: PACT(4, clip=1.0),
]
IDS = ["LSQ3", "LSQ4c", "LSQ2u", "LSQPlus", "QIL", "QILpower", "Levels", "TTQ", "PACT"]


def data(seed: int = 0, shape: tuple[int, ...] = (6, 40)) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen).requires_grad_(), torch.randn(shape, generator=gen)


def test_straight_through_is_the_mask_of_the_range() -> None:
    """Invariant 14: of the STE, exactly."""
    q = Quantizer(3, "affine", observer="percentile", percentile=80.0)
    x, g = data()
    (q(x) * g).sum().backward()
    at = x.detach() / q.grid.scale + q.grid.zero
    assert torch.equal(x.grad, g * ((at >= -0.5) & (at <= 7.5)))
    y = x.detach().clone().requires_grad_()
    scale, zero = q.grid.scale.item(), int(q.grid.zero)
    (torch.fake_quantize_per_tensor_affine(y, scale, zero, 0, 7) * g).sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert (x.grad == 0).float().mean() > 0.1
    x.grad = None
    plain = Quantizer(3, "affine", observer="percentile", percentile=80.0, gradient="identity")
    (plain(x) * g).sum().backward()
    assert torch.equal(x.grad, g)


@pytest.mark.parametrize("signed", [True, False])
def test_lsq_gradients(signed: bool) -> None:
    q = LSQ(3, signed=signed)
    x, g = data()
    (q(x) * g).sum().backward()
    low, high = (-4, 3) if signed else (0, 7)
    s = q.scale.item()
    v = x.detach() / s
    each = torch.where(v <= low, float(low), torch.where(v >= high, float(high), v.round() - v))
    wanted = float((each * g).sum()) / (x.numel() * high) ** 0.5
    assert float(q.scale.grad) == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(x.grad, g * ((v >= low) & (v <= high)), rtol=1e-5, atol=1e-6)
    assert s == pytest.approx(2 * float(x.detach().abs().mean()) / high**0.5, rel=1e-5)
    torch.testing.assert_close(q(x), v.round().clamp(low, high) * s)


def test_lsq_channels_have_their_own_gradients() -> None:
    q, x = LSQ(3, granularity="channel"), data()[0]
    q(x)[2].sum().backward()
    assert q.scale.grad.nonzero()[:, 0].tolist() == [2]


def test_lsq_plus_gradients() -> None:
    q = LSQPlus(2)
    x, g = data()
    with torch.no_grad():
        q(x)
        q.scale *= 0.5
    (q(x) * g).sum().backward()
    v = (x.detach() - q.offset) / q.scale
    inside = (v >= 0) & (v <= 3)
    factor = (x.numel() * 3) ** -0.5
    each = torch.where(inside, v.round() - v, v.clamp(0, 3))
    assert float(q.scale.grad) == pytest.approx(float((each * g).sum()) * factor, rel=1e-3)
    assert float(q.offset.grad) == pytest.approx(float((g * ~inside).sum()) * factor, rel=1e-3)


def test_pact_gradients() -> None:
    q = PACT(4, clip=0.8)
    x, g = data()
    (q(x) * g).sum().backward()
    over = x.detach() >= 0.8
    assert float(q.alpha.grad) == pytest.approx(float((g * over).sum()), rel=1e-4)
    assert torch.equal(x.grad, g * ((x.detach() >= 0) & ~over))
    step = 0.8 / 15
    torch.testing.assert_close(q(x), (x.clamp(0, 0.8) / step).round() * step, rtol=1e-5, atol=1e-6)
    q.alpha.grad = None
    q.decay(0.5).backward()
    assert float(q.alpha.grad) == pytest.approx(0.8)


def test_qil_tells_apart_what_lies_in_its_interval() -> None:
    q = QIL(3)
    x = torch.tensor([[-1.0, -0.5, -0.1, 0.0, 0.2, 0.4, 0.6, 1.0]])
    q(x)
    with torch.no_grad():
        q.centre.fill_(0.5)
        q.distance.fill_(0.3)
    at = x.sign() * ((x.abs() - 0.2) / 0.6).clamp(0, 1)
    torch.testing.assert_close(q(x), (at * 3).round() / 3 * 0.8)
    w = x.clone().requires_grad_()
    q(w).sum().backward()
    assert q.centre.grad.abs() > 0
    assert q.distance.grad.abs() > 0
    assert w.grad[0, 2] == 0
    torch.testing.assert_close(w.grad[0, 5], torch.tensor(0.8 / 0.6))


def test_qil_is_differentiated_as_by_finite_differences() -> None:
    """Without rounding, the transformer is smooth in its interval: its gradients are those of differences."""
    q = QIL(4, power=True).double()
    x = torch.linspace(0.3, 0.7, 9, dtype=torch.float64)[None]
    q(torch.ones(1, 1, dtype=torch.float64))
    with torch.no_grad():
        q.centre.fill_(0.5)
        q.distance.fill_(0.3)
        q.gamma.fill_(1.3)
    parameters = [q.centre, q.distance, q.gamma]
    assert torch.autograd.gradcheck(lambda *_: q._transformed(x[:, None]), parameters)


def test_ttq_gradients() -> None:
    q = TTQ(0.3)
    w, g = data()
    (q(w) * g).sum().backward()
    delta = 0.3 * float(w.detach().abs().max())
    up, down = w.detach() > delta, w.detach() < -delta
    assert float(q.positive.grad) == pytest.approx(float(g[up].sum()), rel=1e-4)
    assert float(q.negative.grad) == pytest.approx(-float(g[down].sum()), rel=1e-4)
    factor = torch.where(up, q.positive.detach(), torch.where(down, q.negative.detach(), 1.0))
    torch.testing.assert_close(w.grad, g * factor)
    assert float(q.positive) == pytest.approx(float(w.detach()[up].mean()), rel=1e-5)


@pytest.mark.parametrize("make", MAKERS, ids=IDS)
def test_a_learned_quantizer_is_kept_and_packed(make: Callable[[], Learned]) -> None:
    w, _ = data()
    q, other = make(), make()
    out = q(w).detach()
    with torch.no_grad():
        for p in q.parameters():
            p.mul_(1.1)
    out = q(w).detach()
    file = io.BytesIO()
    torch.save(q.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(w), out)
    torch.testing.assert_close(q.pack(w.detach()).dense(), out, rtol=1e-6, atol=1e-6)
    codes = q.pack(w.detach()).integers()
    assert torch.equal(codes, make_again(q, w).pack(w.detach()).integers())
    assert torch.isfinite(make()(torch.zeros(6, 40))).all()


def make_again(q: Learned, w: Tensor) -> Learned:
    made = type(q)(**q.settings())
    made.load_state_dict(q.state_dict())
    return made


@pytest.mark.parametrize("make", MAKERS[:-1], ids=IDS[:-1])
def test_learned_weights_fit_a_task_and_are_baked(make: Callable[[], Learned]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    x = torch.randn(128, 64)
    y = (x @ torch.randn(64, 3)).argmax(1)
    made = qat_prepare(model, make(), activations=LSQ(4, signed=False), skip=["2"]).model
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    made(x)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(made(x), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * nn.functional.cross_entropy(model(x), y).item()
    baked = bake(made.eval()).model
    torch.testing.assert_close(baked(x), made(x), rtol=1e-5, atol=1e-5)
    assert nbytes(baked[0]) < 0.4 * nbytes(model[0])


def test_an_optimizer_made_first_trains_a_step_that_begins_later() -> None:
    q = LSQ(4, granularity="channel")
    optimizer = torch.optim.Adam(q.parameters(), lr=0.1)
    x, _ = data()
    q(x).square().sum().backward()
    before = q.scale.detach().clone()
    optimizer.step()
    assert before.shape == (6, 1)
    assert bool((q.scale != before).all())


def test_learned_settings_out_of_range() -> None:
    for make in (lambda: LSQ(1), lambda: LSQ(32), lambda: QIL(1), lambda: PACT(4, clip=0.0), lambda: LearnedLevels(9)):
        with pytest.raises(QuantizationError, match="bits"):
            make()
    with pytest.raises(QuantizationError, match="threshold"):
        TTQ(1.0)
    with pytest.raises(QuantizationError, match="NaN"):
        LSQ(4)(torch.tensor([torch.nan, 1.0]))


def test_learned_activations_after_training() -> None:
    """A quantizer of activations that learns needs no calibration: it begins with the first batch."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    changes = quantize_model(model, "int8", activations=LSQ(8, signed=True))
    x = torch.randn(64, 4)
    torch.testing.assert_close(changes.model(x), model(x), rtol=0.1, atol=0.1)
