"""The verdict of the prototype reproduction as a function of rows; its figure; its measurements in small."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.neighbors import NearestCentroid

from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import prototype_network as module


def rows(lost: float, no_r1: float, no_r2: float, neither: tuple[float, float]) -> list[Row]:
    """Three seeds; accuracy lost to the plain network, and the multiples of the rule."""
    jitter = (0.9, 1.0, 1 / 0.9)

    def of(name: str, metric: str, mean: float) -> Row:
        return Row.of(name, metric, [mean * j for j in jitter])

    out = [
        Row.of(module.PLAIN, module.ACCURACY, [88.0, 89.0, 87.0]),
        Row.of(module.FULL, module.ACCURACY, [88.0 - lost, 89.0 - lost, 87.0 - lost]),
        of(module.FULL, module.REALISM, 1.2),
        of(module.FULL, module.COVERAGE, 0.1),
        of(module.NO_R1, module.REALISM, 1.2 * no_r1),
        of(module.NO_R2, module.COVERAGE, 0.1 * no_r2),
    ]
    metrics = (module.REALISM, module.COVERAGE)
    return out + [
        of(module.NEITHER, metric, base * by) for metric, base, by in zip(metrics, (1.2, 0.1), neither, strict=True)
    ]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((1.0, 3.0, 3.0, (3.0, 3.0)), "holds"),
        ((-1.0, 3.0, 3.0, (3.0, 3.0)), "holds"),
        ((2.0, 3.0, 3.0, (3.0, 3.0)), "partly"),
        ((1.0, 1.2, 3.0, (3.0, 3.0)), "partly"),
        ((1.0, 3.0, 1.2, (3.0, 3.0)), "partly"),
        ((1.0, 3.0, 3.0, (3.0, 1.2)), "partly"),
        ((1.0, 1.2, 1.2, (3.0, 3.0)), "does not hold"),
        ((4.0, 3.0, 3.0, (3.0, 3.0)), "does not hold"),
        ((math.nan, 3.0, 3.0, (3.0, 3.0)), "does not hold"),
        ((1.0, math.nan, math.nan, (3.0, 3.0)), "does not hold"),
    ],
)
def test_the_rule(found: tuple[float, float, float, tuple[float, float]], expected: str) -> None:
    assert module.verdict(rows(*found)) == expected


def test_multiples_are_paired_over_seeds() -> None:
    table = [
        Row.of(module.FULL, module.REALISM, [1.0, 10.0]),
        Row.of(module.NO_R1, module.REALISM, [2.0, 80.0]),
    ]
    assert module.multiple(table, module.NO_R1, module.REALISM) == pytest.approx(4)


def test_nearest_mean_is_scikit_learns_and_takes_codes_that_have_fallen_together() -> None:
    codes, labels = np.random.default_rng(0).normal(size=(90, 4)), np.arange(90) % 3
    codes += labels[:, None]
    exact = NearestCentroid().fit(codes[:60], labels[:60]).score(codes[60:], labels[60:])
    assert module.nearest_mean(codes[:60], labels[:60], codes[60:], labels[60:]) == exact
    zeros = np.zeros((90, 4))
    assert module.nearest_mean(zeros[:60], labels[:60], zeros[60:], labels[60:]) == pytest.approx(1 / 3)


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    measured = measured_by(module)
    accuracies = {m.name: m.value for m in measured if m.metric == module.ACCURACY}
    assert set(accuracies) == {*module.ARMS, module.KNN}
    assert accuracies[module.PLAIN] > 50
    assert accuracies[module.KNN] > 95
    found = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    assert {row.name for row in found if row.metric == module.REALISM} == set(module.WITH_PROTOTYPES)
    settings, verdict = module.SETTINGS["smoke"], module.verdict(found)
    said = Report(
        "prototype-network", "t", module.CLAIM, module.RULE, verdict, tuple(found), (), (0,), "smoke", settings
    )
    assert isinstance(module.figure(said), Figure)
