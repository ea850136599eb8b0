"""The verdict on the quantization survey as a function of rows, its figure, its measurements in small."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
from matplotlib.figure import Figure

from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import quantization_survey as survey


def rows(wrong: tuple[str, ...] = (), lost: float = 0.2, values: int = 3) -> list[Row]:
    """Every comparison as its statement says (by a point), but those of the letters in `wrong`."""
    accuracy = {survey.FLOAT: 90.0}
    for _ in range(6):  # chains of comparisons settle
        for statement, (compared, margin) in survey.STATEMENTS.items():
            for better, worse in compared:
                accuracy.setdefault(worse, 80.0)
                gap = -lost if margin is not None else 1.0
                if statement[0] in wrong:
                    gap = -3.0
                accuracy[better] = accuracy[worse] + gap
    return [Row.of(name, survey.ACCURACY, [value + k for k in range(values)]) for name, value in accuracy.items()]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ((), "holds"),
        (("c",), "partly"),
        (("f", "g", "h", "i"), "partly"),
        (("f", "g", "h", "i", "j"), "does not hold"),
        (("a", "b", "c", "f", "g", "h", "i", "j"), "does not hold"),
    ],
)
def test_the_rule(wrong: tuple[str, ...], expected: str) -> None:
    found = rows(wrong)
    confirmed = survey.confirmed(found)
    assert {s[0] for s, right in confirmed.items() if not right} == set(wrong)
    assert survey.verdict(found) == expected


def test_eight_bits_may_lose_half_a_point_and_no_more() -> None:
    assert survey.confirmed(rows(lost=0.49))["a: 8 bits are lossless"]
    found = survey.confirmed(rows(lost=0.6))
    assert not found["a: 8 bits are lossless"]
    assert found["g: made-up data calibrate"]


def test_a_run_that_failed_confirms_nothing() -> None:
    found = [row if row.name != "binary, trained" else Row.of(row.name, row.metric, [math.nan] * 3) for row in rows()]
    assert math.isnan(survey.difference(found, "ternary, trained", "binary, trained")[0])
    assert not survey.confirmed(found)["j: ternary > binary"]


def test_differences_are_paired_over_seeds() -> None:
    pair = [Row.of("a", survey.ACCURACY, [1.0, 12.0, 103.0]), Row.of("b", survey.ACCURACY, [0.0, 10.0, 100.0])]
    mean, error = survey.difference(pair, "a", "b")
    assert mean == 2
    assert error == pytest.approx(1 / math.sqrt(3))


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    measured = measured_by(survey)
    accuracy = {m.name: m.value for m in measured if m.metric == survey.ACCURACY}
    assert {name for found, _ in survey.STATEMENTS.values() for pair in found for name in pair} <= set(accuracy)
    assert accuracy[survey.FLOAT] > 90
    assert abs(accuracy["integer only"] - accuracy[survey.FLOAT]) < 3
    assert accuracy["uneven, 8 bits, equalised"] > accuracy["uneven, 8 bits"]
    size = {m.name: m.value for m in measured if m.metric == survey.SIZE}
    assert size["HAWQ-V2 at the size of 3 bits"] <= size["3 bits, nearest"]
    assert size["binary, trained"] < size["ternary, trained"] < size["2 bits, trained"] < size[survey.FLOAT] / 8
    found = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    verdict = survey.verdict(found)
    settings = survey.SETTINGS["smoke"]
    said = Report(
        "quantization-survey", "t", survey.CLAIM, survey.RULE, verdict, tuple(found), (), (0,), "smoke", settings
    )
    assert isinstance(survey.figure(said), Figure)
