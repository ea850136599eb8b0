"""The reproduction of representational geometry: the rule as code, its cells, the smoke run."""

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from neuropil.report import Measurement, Report, Row, aggregate
from neuropil.reproduce import representational_geometry as module
from neuropil.reproduce.representational_geometry import (
    ALL,
    BOTH,
    CAPPED,
    CCGP,
    DEEP,
    DIGITS,
    EPS,
    FIXED,
    INPUT,
    MAIN,
    ONE_SIDED,
    PARALLEL,
    REACHED,
    SCALES,
    SHARE,
    TARGET,
    THEORY,
    UNTRAINED,
    interval,
    row,
    sampled,
)

# Tanh less ReLU where all holds.
HOLDS = {
    TARGET: 0.3,
    INPUT: -0.2,
    PARALLEL: 0.5,
    CCGP: 0.3,
    UNTRAINED: -0.05,
    "x 0.3": 0.2,
    "x 3": 0.02,
    "sphere": 0.1,
    "uniform": 0.2,
    "deep": 0.1,
    "before": 0.01,
    "eps 0": 0.02,
    "one, weak": 0.2,
    "one, strong": 0.1,
    "three, weak": 0.1,
    "three, strong": 0.05,
    DIGITS[0]: 0.1,
    DIGITS[1]: 0.1,
    "capped": 0.05,
    "softplus": 0.0,
    "theory": 0.0,
    "reached": 1.0,
}


def rows(**change: float) -> list[Row]:
    """What a run of four seeds would give, but for some of these numbers."""
    d = {**HOLDS, **change}
    runs = []
    for seed in range(4):
        jitter = 0.002 * (seed - 1.5)
        out: list[Measurement] = []

        def pair(cell: str, metric: str, apart: float, out: list[Measurement] = out, jitter: float = jitter) -> None:
            out.append(row(cell, "tanh", metric, 0.5 + apart + jitter))
            out.append(row(cell, "relu", metric, 0.5))

        for metric in (TARGET, INPUT, PARALLEL, CCGP, UNTRAINED):
            pair(MAIN, metric, d[metric])
        for scale, name in zip(SCALES, ("x 0.3", "x 3"), strict=True):
            pair(f"{MAIN}, weights x {scale:g}", TARGET, d[name])
        for readout in FIXED:
            pair(f"{MAIN}, readout {readout}", TARGET, d[readout])
        pair(DEEP, TARGET, d["deep"])
        pair(f"{MAIN}, untrained", TARGET, d["before"])
        pair("eps 0, noise 0.1", TARGET, d["eps 0"])
        for k, name in ((1, "one"), (3, "three")):
            for j in range(6):
                pair(sampled(k, j), TARGET, d[f"{name}, {'weak' if j < 3 else 'strong'}"])
        for cell in DIGITS:
            pair(cell, TARGET, d[cell])
        for f in ALL:
            if f not in BOTH:
                one_sided = {CAPPED: d["capped"], "softplus 1": d["softplus"]}.get(f, 0.0 if f in ONE_SIDED else 0.3)
                out.append(row(MAIN, f, TARGET, 0.5 + one_sided))
            out.append(row(MAIN, f, THEORY, 0.8))
            out.append(row(MAIN, f, SHARE, 0.8 + d["theory"]))
            out.append(row(MAIN, f, REACHED, d["reached"] if seed == 2 else 1.0))
        runs.append(out)
    return aggregate(runs)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "holds"),
        ({TARGET: 0.0}, "does not hold"),
        ({TARGET: math.nan}, "does not hold"),
        ({"reached": 0.0}, "does not hold"),
        ({"x 3": -0.1}, "does not hold"),
        ({"x 3": 0.0}, "holds"),
        ({INPUT: 0.0}, "partly"),
        ({PARALLEL: 0.0}, "partly"),
        ({CCGP: -0.1}, "partly"),
        ({UNTRAINED: 0.0}, "partly"),
        ({"sphere": 0.0}, "partly"),
        ({"deep": 0.0}, "partly"),
        ({"before": 0.2}, "partly"),
        ({"eps 0": -0.4}, "partly"),
        ({"one, weak": 0.05}, "partly"),
        ({"three, strong": 0.2}, "partly"),
        ({"three, weak": -0.2}, "partly"),
        ({DIGITS[0]: -0.1}, "partly"),
        ({"capped": -0.01}, "partly"),
        ({"softplus": 0.31}, "partly"),
        ({"theory": 0.06}, "partly"),
    ],
)
def test_the_rule(change: dict[str, float], expected: str) -> None:
    assert module.verdict(rows(**change)) == expected


def test_intervals_are_those_of_students_t() -> None:
    found = interval([0.1, 0.2, 0.3, 0.4])
    half = 3.182446 * np.std([0.1, 0.2, 0.3, 0.4], ddof=1) / 2
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25 - half, 0.25 + half), abs=1e-6)


def test_the_cells_of_a_seed() -> None:
    names, tasks, scales = module.cells(module.SETTINGS["default"], 3)
    assert len(set(names)) == len(names) == 2 * len(EPS) + len(SCALES)
    assert MAIN in names
    assert [scale for scale in scales if scale != 1] == list(SCALES)
    assert np.array_equal(tasks[names.index(MAIN)].means, tasks[-1].means)  # the same task at another scale of weights
    levels = module.alignments(module.SETTINGS["default"], 3)
    assert levels[0] == 0
    assert levels[-1] == pytest.approx(math.sqrt(3 / 7))
    assert [f.name for f in module.functions(ALL)] == list(ALL)


def test_smoke(smoke: Callable[[ModuleType], Report]) -> None:
    report = smoke(module)
    table = module.Table(report.rows)
    assert table.of(MAIN, "tanh", REACHED).all()
    assert table.apart(MAIN, TARGET)[0] > 0.1
    figure = module.figure(report)
    assert len(figure.axes) == 4
