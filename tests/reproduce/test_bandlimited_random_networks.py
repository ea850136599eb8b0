"""The reproduction of bandlimited random networks: the rule as code, the pieces it measures with, the smoke run."""

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from neuropil.report import Measurement, Report, Row, aggregate
from neuropil.reproduce import bandlimited_random_networks as module
from neuropil.reproduce.bandlimited_random_networks import (
    ACTIVATIONS,
    BELOW,
    BEST,
    BOUND,
    RELATIVE,
    RMSE,
    ZERO,
    network,
)

KS, LAMS = (1, 5, 10, 20), (1.0, 50.0, 200.0)


def rows(
    floor: float = 0.7,
    best: tuple[float, ...] = (7.0, 20.0, 50.0, 60.0),
    told: float = 1e-4,
    below: float = 0.0,
    bound: float = 0.69,
    wide: float = 0.3,
    end: float = 1.1,
) -> list[Row]:
    """What a run that holds would give, but for one of these numbers."""
    out = [Measurement("all", BELOW, below)]
    for act in ACTIVATIONS:
        for i, k in enumerate(KS):
            errors = {(200, 1.0): 0.7, (1000, 1.0): floor, (200, 50.0): 0.1, (1000, 50.0): 1e-5}
            errors |= {(200, 200.0): wide, (1000, 200.0): 1e-3}
            out += [Measurement(network(act, k, d, lam), RMSE, e) for (d, lam), e in errors.items()]
            out += [Measurement(network(act, k, 1000, "told"), RMSE, told)]
            out += [Measurement(network(act, k, 1000, 1.0), BOUND, bound), Measurement(f"{act}, k={k}", BEST, best[i])]
    out += [Measurement(f"k={k}", ZERO, math.sqrt(0.5)) for k in KS]
    for name in ("diabetes", "breast cancer", "digits"):
        for lam, value in (("0.01", 0.9), ("1", 0.5), ("100", end)):
            out.append(Measurement(f"{name}, range {lam}", RELATIVE, value))
        out.append(Measurement(f"{name}, chosen range", RELATIVE, 0.5))
    return aggregate([out])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "holds"),
        ({"floor": 0.6}, "does not hold"),  # five times the neurons leave less than 90 % of the error
        ({"floor": math.nan}, "does not hold"),
        ({"best": (7.0, 50.0, 20.0, 60.0)}, "does not hold"),
        ({"best": (7.0, 8.0, 9.0, 10.0)}, "does not hold"),
        ({"told": 0.1}, "partly"),
        ({"below": 1.0}, "partly"),
        ({"bound": 0.3}, "partly"),
        ({"wide": 0.05}, "partly"),
        ({"end": 0.4}, "partly"),
    ],
)
def test_the_rule(change: dict[str, float], expected: str) -> None:
    assert module.verdict(rows(**change)) == expected


def test_tuning_looks_at_the_held_out_points_only() -> None:
    wanted = module.target(module.TEST, (1,))
    held = np.random.default_rng(3).permutation(len(module.TEST)) < 500
    good, bad = wanted.copy(), wanted.copy()
    good[~held] += 0.5  # right where it is chosen, and off by 0.5 where it is tested
    bad[held] += 0.1
    assert module._tuned(np.stack([bad, good]), (1,), 3)[0] == pytest.approx(0.5)


def test_the_table_is_split_in_three_and_scaled_by_the_first() -> None:
    parts = module._split("diabetes", 0)
    assert sum(len(x) for x, _ in parts) == 442
    assert abs(parts[0][0].mean()) < 1e-12
    assert abs(parts[0][1].mean()) < 1e-12
    assert abs(parts[2][0].mean()) > 1e-6


def test_smoke(smoke: Callable[[ModuleType], Report]) -> None:
    report = smoke(module)
    assert all(row.failed == 0 for row in report.rows)
    assert report.row("all", BELOW).mean == 0
    figure = module.figure(report)
    assert len(figure.axes) == 4
