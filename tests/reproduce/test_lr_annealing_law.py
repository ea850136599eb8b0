"""The verdict of the annealing law's reproduction as a function of rows, its figure, and its measurements in small."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from neuropil.measure import lr_schedules as lr
from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import lr_annealing_law as reproduction
from neuropil.reproduce.lr_annealing_law import ALL, BARE, BLIND, FINAL, LAW, NONE, PEER, SETTINGS, Laboratory


def rows(law: list[float], bare: list[float], c: list[float]) -> list[Row]:
    return [Row.of(LAW, ALL, law), Row.of(BARE, ALL, bare), Row.of(LAW, "fitted C", c)]


@pytest.mark.parametrize(
    ("law", "bare", "c", "expected"),
    [
        ([0.2, 0.3, 0.4], [1.0, 1.0, 1.0], [0.4, 0.5, 0.6], "holds"),
        ([0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [0.4, 0.5, 0.6], "holds"),  # the edge of both thresholds
        ([0.6, 0.6, 0.6], [2.0, 2.0, 2.0], [0.4, 0.5, 0.6], "partly"),  # beyond 0.5 %
        ([0.2, 0.2, 0.2], [1.0, 1.0, 0.3], [0.4, 0.5, 0.6], "partly"),  # not halved in one seed
        ([0.2, math.nan, 0.2], [1.0, 1.0, 1.0], [0.4, 0.5, 0.6], "partly"),  # one seed broke down
        ([0.3, 0.3, 0.3], [0.3, 0.3, 0.3], [0.4, 0.5, 0.6], "does not hold"),
        ([0.2, 0.2, 0.2], [1.0, 1.0, 1.0], [0.4, 0.0, 0.6], "does not hold"),
        ([math.nan] * 3, [1.0, 1.0, 1.0], [0.4, 0.5, 0.6], "does not hold"),
    ],
)
def test_the_rule(law: list[float], bare: list[float], c: list[float], expected: str) -> None:
    assert reproduction.verdict(rows(law, bare, c)) == expected


def test_where_schedules_part() -> None:
    trunk = lr.constant(100, 1.0, 10)
    assert reproduction.departure(lr.wsd(100, 1.0, warmup_steps=10, decay=0.2), trunk) == 80
    assert reproduction.departure(lr.multistep(100, 1.0, 10, at=(0.5,)), trunk) == 49
    assert reproduction.departure(lr.cosine(100, 1.0, warmup_steps=10), trunk) == 10
    assert reproduction.departure(lr.constant(50, 1.0, 10), trunk) == 50
    assert reproduction.departure(trunk, trunk) == 100


def test_a_run_continued_from_the_trunk_is_the_run_from_the_start() -> None:
    settings = {**SETTINGS["smoke"], "steps": 30, "warmup": 3, "every": 5}
    trunk = lr.constant(30, 1e-3, 3)
    rates = lr.wsd(30, 1e-3, warmup_steps=3, decay=0.4)
    lab = Laboratory(settings, 0, trunk, [rates])
    assert [trial.step for trial in lab.kept] == [0, 18]
    whole = lab.run(copy.deepcopy(lab.kept[0]), rates, 30)
    continued = lab.curve("wsd", rates)
    np.testing.assert_array_equal(continued.losses, list(whole.losses.values()))
    assert continued.steps.tolist() == [5, 10, 15, 20, 25, 30]
    torch.testing.assert_close(whole.optimizer.param_groups[0]["lr"], float(rates[-1]))


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    settings = SETTINGS["smoke"]
    measured = measured_by(reproduction)
    assert measured[0].metric == ALL
    table = {(m.name, m.metric): m for m in measured}
    for name in (LAW, BARE, BLIND, PEER, NONE):
        assert table[name, ALL].baseline == (name != LAW)
        assert 0 < table[name, ALL].value < 50
        assert table[name, FINAL].value > 0
    # No training and no chance in these: what the same points gave elsewhere.
    metric = "mean relative error, the paper's constant run from its cosine run"
    assert table[LAW, metric].value == pytest.approx(0.32, abs=0.01)
    assert table[BARE, metric].value == pytest.approx(2.2, abs=0.05)
    found = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    verdict = reproduction.verdict(found)
    said = Report(
        "lr-annealing-law",
        "t",
        reproduction.CLAIM,
        reproduction.RULE,
        verdict,
        tuple(found),
        (),
        (0,),
        "smoke",
        settings,
    )
    assert isinstance(reproduction.figure(said), Figure)
