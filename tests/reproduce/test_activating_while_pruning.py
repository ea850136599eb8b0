"""The verdict of the selective-activation reproduction as a function of rows; its controls, figure and smoke run."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import activating_while_pruning as awp

ENDS = ("50.0 % left", "10.0 % left", "5.0 % left")


def rows(woken: float, gained: float, noise: float = 0.02, early: float = 0.0) -> list[Row]:
    """Three seeds; activation changes rate and accuracy by these at the sparse ends, by `early` before."""
    jitter = (-noise, 0.0, noise)
    out = []
    for base in (awp.MAGNITUDE, awp.LAMP):
        for end in ENDS:
            more, less = (early, early) if end == ENDS[0] else (gained, woken)
            out += [
                Row.of(base, f"accuracy, {end}", [80.0 + s for s in range(3)]),
                Row.of(base, f"dynamic dead rate, {end}", [30.0 - s for s in range(3)]),
                Row.of(base + awp.WITH, f"accuracy, {end}", [80 + s + more + j for s, j in enumerate(jitter)]),
                Row.of(base + awp.WITH, f"dynamic dead rate, {end}", [30 - s + less + j for s, j in enumerate(jitter)]),
            ]
    return out


@pytest.mark.parametrize(
    ("woken", "gained", "expected"),
    [
        (-2.0, 0.5, "holds"),
        (-0.01, 0.5, "partly"),  # within the noise
        (-2.0, 0.01, "partly"),
        (0.5, 0.5, "does not hold"),
        (-2.0, -0.1, "does not hold"),
        (-2.0, math.nan, "does not hold"),
    ],
)
def test_the_rule(woken: float, gained: float, expected: str) -> None:
    assert awp.verdict(rows(woken, gained)) == expected
    assert awp.verdict(rows(woken, gained, early=-30.0)) == expected, "it looks at sparse networks alone"


def test_differences_are_paired_over_seeds() -> None:
    assert awp.low(rows(0, 0)) == ["10.0 % left", "5.0 % left"]
    assert awp.difference(rows(-2.0, 0.5, noise=0.0), "accuracy") == pytest.approx([0.5] * 3)
    mean, error = awp.mean_and_error([0.4, 0.5, 0.6])
    assert (mean, error) == pytest.approx((0.5, 0.1 / math.sqrt(3)))
    one = [Row.of(r.name, r.metric, r.values[:1]) for r in rows(-2.0, 1.0)]
    assert awp.verdict(one) == "partly"


@pytest.mark.parametrize("rule", awp.CONTROLS)
def test_controls_spend_the_same_share_otherwise(rule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made: Any = awp.scheduled(f"magnitude + {rule}", model, optimizer, 1, 1, lambda model: None, 0)
    start = model[0].weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    now = model[0].weight.detach().clone()
    made.step()
    assert made.history == [(72, 8)]
    base = torch.ones(400, dtype=torch.bool)
    base[now.flatten().abs().argsort()[:72]] = False
    gone = (~made.masks["0.weight"].flatten()) & base
    values, moved = now.flatten(), (now - start).flatten().abs()
    assert int(gone.sum()) == 8
    if rule == "least moved":
        assert moved[gone].max() <= moved[base & ~gone].min()
    else:
        assert bool((values[gone] < 0).all())
    if rule == "smallest negative":
        assert values[gone].min() >= values[base & ~gone & (values < 0)].max()


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    settings = awp.SETTINGS["smoke"]
    measured = measured_by(awp)
    last = awp.kept(settings["cycles"])
    assert measured[0].metric == f"accuracy, {last}"
    values = {(m.name, m.metric): m.value for m in measured}
    assert {m.name for m in measured} == set(awp.ARMS)
    assert len(values) == len(measured) == 3 * len(awp.ARMS) * (settings["cycles"] + 1)
    dense = f"accuracy, {awp.kept(0)}"
    assert len({values[name, dense] for name in awp.ARMS}) == 1, "all arms begin with one dense training"
    assert values[awp.MAGNITUDE, dense] > 85
    assert values[awp.MAGNITUDE, f"static dead rate, {awp.kept(0)}"] == 0
    found = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    verdict = awp.verdict(found)
    said = Report(
        "activating-while-pruning", "t", awp.CLAIM, awp.RULE, verdict, tuple(found), (), (0,), "smoke", settings
    )
    assert isinstance(awp.figure(said), Figure)
