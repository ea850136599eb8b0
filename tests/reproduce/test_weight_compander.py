"""The verdict of the weight compander's reproduction as a function of rows, its controls, and its figure in small."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils import parametrize

from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import weight_compander as wc


def rows(gain: float, over_rate: float, spread: float, second: float | None = None, noise: float = 0.02) -> list[Row]:
    """Three seeds. The compander's gain over the plain network and over the higher rate, and its near-zero weights less
    the plain network's; `second` is the gain over both on the second network, if it is another."""
    jitter = (-noise, 0.0, noise)
    out = []
    for kind in wc.METHODS:
        if kind != "perceptron" and second is not None:
            gain = over_rate = second

        def of(name: str, metric: str, mean: float, own: float = 0.0, kind: str = kind) -> Row:
            return Row.of(name, f"{kind}: {metric}", [mean + own * j for j in jitter])

        out += [of(wc.PLAIN, wc.ACCURACY, 80.0), of(wc.RATE, wc.ACCURACY, 80.0 + gain - over_rate)]
        out += [of(wc.FIXED, wc.ACCURACY, 80.0 + gain, 1.0)]
        out += [of(wc.PLAIN, wc.NEAR, 8.0), of(wc.FIXED, wc.NEAR, 8.0 + spread, 1.0)]
        out += [of(wc.PLAIN, wc.PEAK, 4.5), of(wc.FIXED, wc.PEAK, 2.7, 1.0)]
    return out


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((1.0, 0.5, -0.5), "holds"),
        ((0.01, 0.5, -0.5), "partly"),  # within the noise
        ((1.0, 0.01, -0.5), "partly"),
        ((1.0, 0.5, 0.1), "partly"),  # no fewer weights near zero
        ((1.0, 1.0, -0.5, -0.5), "partly"),  # better on one network only
        ((1.0, 1.0, -0.5, -1.5), "does not hold"),
        ((-0.1, 0.5, -0.5), "does not hold"),
        ((1.0, -0.1, -0.5), "does not hold"),  # a higher rate does the same
        ((math.nan, 0.5, -0.5), "does not hold"),
    ],
)
def test_the_rule(found: tuple[float, ...], expected: str) -> None:
    assert wc.verdict(rows(*found)) == expected


def test_one_seed_never_holds() -> None:
    one = [Row.of(r.name, r.metric, r.values[:1]) for r in rows(1.0, 1.0, -0.5)]
    assert wc.verdict(one) == "partly"


def test_powerpropagation_is_flat_at_zero_and_inverts() -> None:
    w = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    power = wc.Powerprop()
    torch.testing.assert_close(power(power.right_inverse(w)), w)
    v = torch.tensor([0.0, 1e-4, 1.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(power(v).sum(), v)
    assert slope.tolist() == pytest.approx([0, wc.POWER * 1e-4 ** (wc.POWER - 1), wc.POWER])


def test_the_controls_are_what_they_are_called() -> None:
    settings = wc.SETTINGS["smoke"]
    torch.manual_seed(0)
    model = wc.network("convolutional", settings, (1, 8, 8), 0.0)
    optimizer, _ = wc.prepared(wc.RATE, model, 0.1, 0.01)
    rate = {id(p): (g["lr"], g["lr"] * g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rate.keys() == {id(p) for p in model.parameters()}
    for parameter in model.parameters():
        fast = parameter.ndim > 1
        assert rate[id(parameter)] == pytest.approx((0.1 * wc.SLOPE**2 if fast else 0.1, 0.1 * 0.01))
    clip = wc.Clip.of(model)
    bounds = [wc.BOUND * float(w.detach().square().mean().sqrt()) for w in wc.matrices(model)]
    for weight in wc.matrices(model):
        weight.data.mul_(100)
    clip()
    assert [float(w.detach().abs().max()) for w in wc.matrices(model)] == pytest.approx(bounds)


def test_halving_takes_the_smaller_half() -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].weight.data = torch.tensor([[1.0, -4.0, 2.0, -3.0]])
    assert wc.halved(model)[0].weight.tolist() == [[0.0, -4.0, 0.0, -3.0]]
    assert model[0].weight.tolist() == [[1.0, -4.0, 2.0, -3.0]]


@pytest.mark.parametrize("method", [wc.FIXED, wc.POWERED, wc.DROPPED])
def test_a_trained_network_is_plain(method: str) -> None:
    settings = wc.SETTINGS["smoke"] | {"epochs": {"perceptron": 1}}
    train, _ = wc.splits(settings)
    model = wc.trained("perceptron", method, train, settings, 0, (0.03, 0.0))
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    assert not model.training


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    measured = measured_by(wc)
    assert {m.name for m in measured} == {name for names in wc.METHODS.values() for name in names}
    assert {m.name for m in measured if not m.baseline} == {wc.FIXED, wc.STRONG, wc.LEARNED}
    found = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    values = {(r.name, r.metric): r.mean for r in found}
    assert values[wc.PLAIN, f"perceptron: {wc.ACCURACY}"] > 60
    assert values[wc.FIXED, f"perceptron: {wc.PEAK}"] < values[wc.PLAIN, f"perceptron: {wc.PEAK}"]
    settings = wc.SETTINGS["smoke"]
    report = Report(
        "weight-compander", "t", wc.CLAIM, wc.RULE, wc.verdict(found), tuple(found), (), (0,), "smoke", settings
    )
    assert isinstance(wc.figure(report), Figure)
