"""The verdict of the equilibrium-propagation reproduction as a function of rows, its figure, and it in small."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
from matplotlib.figure import Figure

from neuropil.data import fashion_mnist
from neuropil.errors import ModelError
from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import equilibrium_propagation as ep

GOOD = {
    (6, "symmetric", 0.02): 1e-6,
    (6, "unrelated", 0.02): 1.5,
    (6, "unrelated", 0.5): 1.5,
    (1, "symmetric", 0.02): 0.05,
    (ep.SYMMETRIC, "l1"): 0.8,
    (ep.SYMMETRIC, "l2"): 0.9,
    (ep.UNRELATED, "l1"): 0.3,
    (ep.UNRELATED, "l2"): 0.4,
    (ep.HOMEO, "l1"): 0.9,
    (ep.HOMEO, "l2"): 0.95,
    (ep.UNRELATED, ep.ACCURACY): 75.0,
    (ep.HOMEO, ep.ACCURACY): 80.0,
}


def rows(changed: dict[tuple, float], seeds: int = 3) -> list[Row]:
    """Rows that pass every test, except for what is `changed`: that in the last seed alone."""
    out = []
    for key, value in GOOD.items():
        values = [value] * (seeds - 1) + [changed.get(key, value)]
        if len(key) == 3:
            out.append(Row.of(ep.nudged(*key[:2]), ep.gradient_error(key[2]), values))
        else:
            out.append(Row.of(key[0], key[1] if key[1] == ep.ACCURACY else ep.cosine(key[1]), values))
    return out


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "holds"),
        ({(ep.HOMEO, ep.ACCURACY): 74.9}, "partly"),
        ({(ep.HOMEO, ep.ACCURACY): math.nan}, "partly"),
        ({(6, "symmetric", 0.02): 0.006}, "does not hold"),
        ({(6, "unrelated", 0.5): 0.09}, "does not hold"),
        ({(6, "unrelated", 0.02): 0.09}, "does not hold"),
        ({(ep.SYMMETRIC, "l1"): 0.2}, "does not hold"),
        ({(ep.SYMMETRIC, "l2"): 0.2}, "does not hold"),
        ({(ep.HOMEO, "l1"): 0.2}, "does not hold"),
        ({(ep.HOMEO, "l2"): math.nan}, "does not hold"),
    ],
)
def test_the_rule(changed: dict[tuple, float], expected: str) -> None:
    assert ep.verdict(rows(changed)) == expected


def test_a_run_that_diverges_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise ModelError("infinity")

    monkeypatch.setattr(ep, "ep_grad", diverge)
    images = fashion_mnist()
    data = images.test_x[:300].flatten(1), images.test_y[:300]
    found, other = (ep.arm_rows(arm, ep.SETTINGS["smoke"], 0, data, data) for arm in (ep.HOMEO, ep.BP))
    assert [m.metric for m in found] == [m.metric for m in other]
    assert not any(math.isnan(m.value) for m in other)
    assert all(math.isnan(m.value) for m in found)


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    measured = measured_by(ep)
    found = {(m.name, m.metric): m.value for m in measured}
    assert len(found) == len(measured)
    assert found[ep.SYMMETRIC, ep.ANGLE] < 10 < found[ep.UNRELATED, ep.ANGLE]
    assert found[ep.HOMEO, ep.ANGLE] < found[ep.UNRELATED, ep.ANGLE]
    six, one = (found[ep.nudged(n, "symmetric"), ep.gradient_error(0.02)] for n in (6, 1))
    assert six < one / 10
    rows = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    settings = ep.SETTINGS["smoke"]
    report = Report(
        "equilibrium-propagation", "t", ep.CLAIM, ep.RULE, ep.verdict(rows), tuple(rows), (), (0,), "smoke", settings
    )
    assert isinstance(ep.figure(report), Figure)
