"""The verdict of the OFQ reproduction as a function of rows, its figure, and its measurements in small."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
from matplotlib.figure import Figure

from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import ofq


def rows(share: float, *ladder: float, noise: float = 0.02) -> list[Row]:
    """Three seeds: StatsQ's share where LSQ's is 10, and the accuracies from LSQ up."""
    jitter = (-noise, 0.0, noise)
    names = (ofq.LEARNED, ofq.STATS, ofq.PRODUCT, ofq.ANNEALED)
    out = [
        Row.of(name, ofq.ACCURACY, [v + i * j for j in jitter])
        for i, (name, v) in enumerate(zip(names, ladder, strict=True))
    ]
    return [*out, Row.of(ofq.LEARNED, ofq.SHARE, [10.0] * 3), Row.of(ofq.STATS, ofq.SHARE, [share] * 3)]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (rows(5.0, 70, 71, 72, 73), "holds"),
        (rows(5.0, 70, 70.0, 72, 73), "holds"),
        (rows(8.0, 70, 71, 72, 73), "partly"),  # a fifth less is not a third less
        (rows(5.0, 70, 71, 72, 70.01), "partly"),
        (rows(5.0, 70, 69, 72, 73), "partly"),  # a step is inverted
        (rows(5.0, 70, 71, 72, 70.5, noise=3.0), "partly"),
        (rows(11.0, 70, 71, 72, 73), "does not hold"),
        (rows(5.0, 70, 71, 72, 69), "does not hold"),
        (rows(5.0, 70, 71, 72, math.nan), "does not hold"),
    ],
)
def test_the_rule(found: list[Row], expected: str) -> None:
    assert ofq.verdict(found) == expected


def test_one_seed_never_holds() -> None:
    one = [Row.of(r.name, r.metric, r.values[:1]) for r in rows(1.0, 70, 71, 72, 73)]
    assert ofq.verdict(one) == "partly"


def test_annealing_stills_the_regression() -> None:
    assert ofq.regression(ofq.ANNEALED, 300, 0) < 0.2 * ofq.regression(ofq.STATS, 300, 0)


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    measured = measured_by(ofq)
    accuracies = {m.name: m.value for m in measured if m.metric == ofq.ACCURACY}
    assert set(accuracies) == {ofq.FULL, *ofq.ARMS} == set(ofq.TUNED)
    assert accuracies[ofq.FULL] > 50
    counts = {m.name: m.value for m in measured if m.metric == ofq.TOY}
    assert set(counts) == {ofq.LEARNED, ofq.STATS, "StatsQ + CGA"}
    found = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    verdict = ofq.verdict(found)
    settings = ofq.SETTINGS["smoke"]
    said = Report("ofq", "t", ofq.CLAIM, ofq.RULE, verdict, tuple(found), (), (0,), "smoke", settings)
    assert isinstance(ofq.figure(said), Figure)
