"""The verdict of the BiPer reproduction as a function of rows, its figure, and its measurements in small."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
from matplotlib.figure import Figure

from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import biper

LAYER = f"{biper.wave(biper.CHOSEN)}, layer 3"


def rows(gain: float, departure: float = 0.0, misfit: float = 0.01, noise: float = 0.02) -> list[Row]:
    """Three seeds; the best baseline is the last of plain signs."""
    jitter = (-noise, 0.0, noise)
    out = [Row.of(name, biper.ACCURACY, [70.0 + i] * 3) for i, name in enumerate(biper.SIGNS)]
    best = 70.0 + len(biper.SIGNS) - 1
    out += [Row.of(biper.wave(biper.CHOSEN), biper.ACCURACY, [best + gain + j for j in jitter])]
    return [
        *out,
        Row.of(LAYER, biper.ERROR, [0.1 * (1 + departure)] * 3),
        Row.of(LAYER, biper.FORMULA, [0.1] * 3),
        Row.of(LAYER, biper.MISFIT, [misfit] * 3),
    ]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (rows(0.5), "holds"),
        (rows(0.5, noise=2.0), "partly"),
        (rows(0.5, departure=0.3), "partly"),
        (rows(0.5, departure=-0.3), "partly"),
        (rows(0.5, departure=0.3, misfit=0.09), "holds"),  # no layer is near: the formula is not judged
        (rows(0.0), "does not hold"),
        (rows(-0.5), "does not hold"),
        (rows(math.nan), "does not hold"),
    ],
)
def test_the_rule(found: list[Row], expected: str) -> None:
    assert biper.verdict(found) == expected


def test_one_seed_never_holds() -> None:
    one = [Row.of(r.name, r.metric, r.values[:1]) for r in rows(5.0)]
    assert biper.verdict(one) == "partly"


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    measured = measured_by(biper)
    accuracies = {m.name: m.value for m in measured if m.metric == biper.ACCURACY}
    assert set(accuracies) == set(biper.ARMS) == set(biper.TUNED)
    assert accuracies[biper.REAL] > 80
    assert max(accuracies[name] for name in biper.PERIODIC) > 40
    assert sum(m.metric == biper.ERROR for m in measured) == 3 * len(biper.OMEGAS)
    found = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    verdict = biper.verdict(found)
    settings = biper.SETTINGS["smoke"]
    said = Report("biper", "t", biper.CLAIM, biper.RULE, verdict, tuple(found), (), (0,), "smoke", settings)
    assert isinstance(biper.figure(said), Figure)
