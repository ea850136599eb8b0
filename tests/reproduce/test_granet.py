"""The verdict of the GraNet reproduction as a function of rows, its figure, and its measurements in small."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
from matplotlib.figure import Figure

from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import granet

WHEN = ("plasticity, pruned after 25 % of training", "plasticity, pruned after 58 % of training")


def rows(gradual: float, sparse: float, regrown: float, noise: float = 0.02) -> list[Row]:
    """Three seeds; the first numbers are the differences of the rule."""
    jitter = (-noise, 0.0, noise)

    def of(name: str, metric: str, mean: float, own: float = 0.0) -> Row:
        return Row.of(name, metric, [mean + own * j for j in jitter])

    out = [
        of(granet.GMP, granet.ACCURACY, 86.0),
        of(granet.FROM_DENSE, granet.ACCURACY, 86.0 + gradual, 1.0),
        of(granet.RIGL, granet.ACCURACY, 84.0),
        of(granet.FROM_HALF, granet.ACCURACY, 84.0 + sparse, 1.0),
    ]
    for metric in WHEN:
        out += [of(granet.PLAIN, metric, -3.0), of(granet.REGROWN, metric, -3.0 + regrown, 1.0)]
    return out


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ((0.3, 1.0, 0.5), "holds"),
        ((0.01, 1.0, 0.5), "partly"),  # within the noise
        ((-0.01, 1.0, 0.5), "partly"),
        ((0.3, 0.01, 0.5), "partly"),
        ((-0.3, 1.0, 0.5), "does not hold"),
        ((0.3, -0.1, 0.5), "does not hold"),
        ((0.3, 1.0, -0.1), "does not hold"),
        ((math.nan, 1.0, 0.5), "does not hold"),
    ],
)
def test_the_rule(differences: tuple[float, float, float], expected: str) -> None:
    assert granet.verdict(rows(*differences)) == expected


def test_one_seed_never_holds() -> None:
    one = [Row.of(r.name, r.metric, r.values[:1]) for r in rows(1.0, 1.0, 1.0)]
    assert granet.verdict(one) == "partly"


def test_differences_are_paired_over_seeds() -> None:
    mean, error = granet.paired([1.0, 12.0, 103.0], [0.0, 10.0, 100.0])
    assert mean == 2
    assert error == pytest.approx(1 / math.sqrt(3))


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    settings = granet.SETTINGS["smoke"]
    measured = measured_by(granet)
    accuracies = {m.name: m.value for m in measured if m.metric == granet.ACCURACY}
    assert set(accuracies) == set(granet.TUNED)
    assert accuracies[granet.DENSE] > 90
    costs = {m.name: m.value for m in measured if m.metric == granet.COST}
    assert costs[granet.RIGL] == pytest.approx(100 * settings["density"], abs=0.01)
    assert costs[granet.RIGL] < costs[granet.FROM_HALF] < costs[granet.GMP] < costs[granet.DENSE] == 100
    found = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    verdict = granet.verdict(found)
    said = Report("granet", "t", granet.CLAIM, granet.RULE, verdict, tuple(found), (), (0,), "smoke", settings)
    assert isinstance(granet.figure(said), Figure)
