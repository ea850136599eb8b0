"""The verdict as a function of rows, its figure, and the measurements in small."""

from __future__ import annotations

import math

import pytest
import torch
from matplotlib.figure import Figure

from neuropil.report import Report, Row
from neuropil.reproduce import nested_dynamical_systems as module
from neuropil.reproduce.nested_dynamical_systems import ARMS, RECOVERY, STEPS, SWITCH, WINDOWS, Plant

GOOD = {"distance": 1e-14, "accuracy": 0.0, "fixed": 4.0, "gradient": 1.1, "memoryless": 3.0, "ratio": 12.0}


def rows(**changes: float) -> list[Row]:
    """Two seeds: distance and accuracy differences, errors grown by these factors, the ratio of gains."""
    given = GOOD | changes
    found = [Row.of(module.TORCH, module.ACCURACY, [90.0, 91.0])]
    for name in (module.LEARNERS, module.NEURONS):
        found.append(Row.of(name, module.DISTANCE, [1e-15, given["distance"]]))
        found.append(Row.of(name, module.ACCURACY, [90.0, 91.0 + given["accuracy"]]))
    for arm, name in ARMS.items():
        for metric in (*WINDOWS, module.AFTER, RECOVERY):
            level = 0.1 if arm in ("fixed", "gradient") else 0.1 * given["memoryless"]
            last = given[arm] if arm in ("fixed", "gradient") and metric == module.LAST else 1.0
            found.append(Row.of(name, metric, [level * last, level * last]))
    return [
        *found,
        Row.of(module.CONSTANT, module.RATIO, [1.0, 1.0]),
        Row.of(module.HEBBIAN, module.RATIO, [given["ratio"]] * 2),
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "holds"),
        ({"distance": 1e-9}, "does not hold"),
        ({"distance": math.nan}, "does not hold"),
        ({"accuracy": 0.1}, "does not hold"),
        ({"fixed": 1.1}, "does not hold"),
        ({"fixed": math.nan}, "does not hold"),
        ({"fixed": 2.5}, "partly"),
        ({"gradient": 1.3}, "partly"),
        ({"memoryless": 1.2}, "does not hold"),
        ({"memoryless": 1.8}, "partly"),
        ({"ratio": 4.0}, "partly"),
    ],
)
def test_the_rule(changes: dict[str, float], expected: str) -> None:
    assert module.verdict(rows(**changes)) == expected


def test_the_figure() -> None:
    settings = module.SETTINGS["default"]
    report = Report(
        "nested-dynamical-systems", "t", "c", "r", "holds", tuple(rows()), (), (0, 1), "default", dict(settings)
    )
    figure = module.figure(report)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 3


def test_recovery_is_the_first_time_it_is_good_again() -> None:
    errors = torch.ones(STEPS, dtype=torch.float64)
    assert module.recovery(errors) == 0
    errors[SWITCH : SWITCH + 300] = 5.0
    assert 290 < module.recovery(errors) < 300
    errors[SWITCH:] = 5.0
    assert module.recovery(errors) == 1900


def test_the_plant_hides_a_state_and_changes() -> None:
    plant = Plant(0)
    assert torch.equal(plant.y, Plant(0).y)
    assert not torch.equal(plant.y, Plant(1).y)
    before, after = (float(plant.y[a:b].std()) for a, b in ((1000, 2000), (3000, 4000)))
    assert after == pytest.approx(2 * before, rel=0.2)


def test_composed_training_on_digits_is_that_of_torch() -> None:
    found = {(m.name, m.metric): m.value for m in module.exactness(0, epochs=1)}
    for name in (module.LEARNERS, module.NEURONS):
        assert found[name, module.DISTANCE] < 1e-12
        assert found[name, module.ACCURACY] == found[module.TORCH, module.ACCURACY] > 50


def test_wires_grow_within_a_population_and_constant_ones_do_not() -> None:
    found = {m.name: m.value for m in module.grown_wires(0, 400)}
    assert found[module.CONSTANT] == 1
    assert found[module.HEBBIAN] > 3


def test_fixed_wires_are_the_best_ones_before_the_change() -> None:
    """No worse there than least squares on the past itself, six lags of it, allows."""
    plant = Plant(3)
    errors = module.fixed(plant, 0) - plant.y
    past = torch.stack([s.roll(lag) for s in (plant.y, plant.u) for lag in (1, 2, 3)], 1)
    fit = torch.linalg.lstsq(past[200:SWITCH], plant.y[200:SWITCH, None]).solution
    best = module.rms((past @ fit)[1000:SWITCH, 0] - plant.y[1000:SWITCH])
    assert module.rms(errors[1000:SWITCH]) < 1.02 * best
    assert module.rms(errors[SWITCH:]) > 2 * best
