"""The verdict of the codebook reproduction as a function of rows, its figure, its measurements in small."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
from matplotlib.figure import Figure

from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import jlcm
from neuropil.reproduce.jlcm import ALONE, BITS, BOOKS, INVERSE, ONE, PLAIN


def rows(groups: float, both: float, proximal: float, noise: float = 0.02) -> list[Row]:
    """Three seeds; the first numbers are the gains of the rule, in logarithms."""
    ours = -4.0
    logs = {ONE: -1.0, ALONE: ours + both, PLAIN: ours + proximal, INVERSE: ours}
    logs |= {name: -1.0 - groups + 0.1 * i for i, name in zip((-1, 0, 1), BOOKS.values(), strict=True)}
    out = []
    for bits in BITS:
        for name, log in logs.items():
            jitter = noise if name in (INVERSE, *BOOKS.values()) else 0.0
            values = [math.exp(log + jitter * j) for j in (-1, 0, 1)]
            out.append(Row.of(name, jlcm.error_at(bits), values, "", False))
    return out


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ((0.3, 0.5, 0.1), "holds"),
        ((0.01, 0.5, 0.1), "partly"),  # within the noise
        ((0.3, 0.01, 0.1), "partly"),
        ((0.3, 0.5, 0.01), "partly"),
        ((-0.1, 0.5, 0.1), "does not hold"),
        ((0.3, -0.1, 0.1), "does not hold"),
        ((0.3, 0.5, -0.01), "does not hold"),
        ((0.3, math.nan, 0.1), "does not hold"),
    ],
)
def test_the_rule(gains: tuple[float, float, float], expected: str) -> None:
    assert jlcm.verdict(rows(*gains)) == expected


def test_gains_are_means_over_bits_and_groups() -> None:
    found = list(jlcm.gains(rows(0.3, 0.5, 0.1)).values())
    assert [mean for mean, _ in found] == pytest.approx([0.3, 0.5, 0.1])
    assert [error for _, error in found] == pytest.approx([0.02 / math.sqrt(3)] * 3)


def test_one_seed_never_holds() -> None:
    one = [Row.of(r.name, r.metric, r.values[:1]) for r in rows(0.3, 0.5, 0.1)]
    assert jlcm.verdict(one) == "partly"


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    measured = measured_by(jlcm)
    found = {(m.name, m.metric): m.value for m in measured}
    for bits in BITS:
        errors = {name: found[name, jlcm.error_at(bits)] for name in jlcm.ARMS}
        assert errors[INVERSE] < errors[ALONE] < errors[ONE] < errors[jlcm.UNIFORM]
        assert found[ONE, jlcm.size_at(bits)] == pytest.approx(bits, rel=0.02)
        assert bits < found[INVERSE, jlcm.size_at(bits)] < bits + 0.3
    rows = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    settings = jlcm.SETTINGS["smoke"]
    said = Report("jlcm", "t", jlcm.CLAIM, jlcm.RULE, jlcm.verdict(rows), tuple(rows), (), (0,), "smoke", settings)
    assert isinstance(jlcm.figure(said), Figure)
