"""The verdict of the MILAN reproduction as a function of rows, its printed letters, and its measurements in small."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from matplotlib.figure import Figure

from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import milan as claim


def rows(wpmi: float, likely: float, label: float, text: float, chance: float, noise: float = 0.5) -> list[Row]:
    jitter = (-noise, 0.0, noise)
    return [
        Row.of(claim.WPMI, claim.F1, [wpmi + j for j in jitter]),
        Row.of(claim.LIKELY, claim.F1, [float(likely)] * 3),
        Row.of(claim.LABEL, claim.F1, [float(label)] * 3),
        Row.of(claim.TEXT_OUT, claim.WRONG, [text + j for j in jitter]),
        Row.of(claim.RANDOM_OUT, claim.WRONG, [float(chance)] * 3),
    ]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (rows(70, 60, 50, 80, 70), "holds"),
        (rows(70, 69.9, 50, 80, 70), "partly"),  # within the noise
        (rows(70, 60, 50, 70, 75), "partly"),
        (rows(70, 70, 50, 80, 70), "does not hold"),
        (rows(70, 60, 75, 80, 70), "does not hold"),
        (rows(math.nan, 60, 50, 80, 70), "does not hold"),
    ],
)
def test_the_rule(found: list[Row], expected: str) -> None:
    assert claim.verdict(found) == expected


def test_one_seed_never_holds() -> None:
    one = [Row.of(r.name, r.metric, r.values[1:2]) for r in rows(70, 60, 50, 80, 70)]
    assert claim.verdict(one) == "partly"


def test_names_are_printed_where_they_should_be() -> None:
    images = torch.full((20, 1, 28, 28), 0.5)
    names = torch.arange(20) % 10
    which = torch.arange(20) < 10
    out = claim.lettered(images, names, which)
    assert out.shape == (20, 1, 32, 32)
    assert torch.equal(out[10:, :, 2:30, 2:30], images[10:])
    corners = out[:10, 0, :12, :16].flatten(1)
    assert len(corners.unique(dim=0)) == 10  # ten names, ten prints
    assert torch.equal(out[:10, :, 16:30, 2:30], images[:10, :, 14:])


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    measured = measured_by(claim)
    found = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    value = {(row.name, row.metric): row.mean for row in found}
    assert value[claim.WPMI, claim.F1] > value[claim.CHANCE, claim.F1]
    assert 0 < value[claim.WHOLE, claim.CLEAN] <= 100
    smoke = claim.SETTINGS["smoke"]
    said = Report("milan", "t", claim.CLAIM, claim.RULE, claim.verdict(found), tuple(found), (), (0,), "smoke", smoke)
    assert isinstance(claim.figure(said), Figure)
