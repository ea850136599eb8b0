"""The verdict of the bricks reproduction as a function of rows, and its measurements in small."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from matplotlib.figure import Figure
from tiny_models import llama
from torch import Tensor

from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import _bricks_operations as operations
from neuropil.reproduce import bricks as claim


def rows(
    neurons: float = 1.0, matched: float = 0.0, bricks: float = 0.5, rejected: float = 5.0, chosen: float = 0.5,
    own: float = 2.0, noise: float = 0.01,
) -> list[Row]:  # fmt: skip
    def of(name: str, metric: str, mean: float) -> Row:
        shaken = name in (claim.NEURONS, claim.BRICKS, claim.COACTIVATION, claim.CHOSEN)
        return Row.of(name, metric, [mean + shaken * shift for shift in (-noise, 0.0, noise)])

    half = claim.ROUTED.format(0.5)
    return [
        of(claim.NEURONS, claim.SPECIFIC, neurons),
        of(claim.MATCHED, claim.SPECIFIC, matched),
        of(claim.BRICKS, claim.SPECIFIC, bricks),
        of(claim.MATCHED_BRICKS, claim.SPECIFIC, 0.0),
        of(claim.NEURONS, claim.OWN, own),
        of(claim.NEURONS, claim.OTHERS, 1.0),
        of(claim.COACTIVATION, claim.REJECTED, rejected),
        of(claim.DRAWN, claim.REJECTED, 0.1),
        of(claim.CHOSEN, half, chosen),
        of(claim.ANY, half, 1.0),
        of(claim.CHOSEN_DRAWN, half, 0.8),
    ]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (rows(), "holds"),
        (rows(own=1.9), "partly"),
        (rows(bricks=-0.1), "partly"),
        (rows(chosen=0.9), "partly"),
        (rows(noise=2.0), "partly"),  # within the noise
        (rows(neurons=-0.1), "does not hold"),
        (rows(matched=1.0), "does not hold"),
        (rows(rejected=0.1), "does not hold"),
        (rows(neurons=math.nan), "does not hold"),
    ],
)
def test_the_rule(found: list[Row], expected: str) -> None:
    assert claim.verdict(found) == expected


def test_one_seed_never_holds() -> None:
    assert claim.verdict([Row.of(r.name, r.metric, r.values[:1]) for r in rows()]) == "partly"


def test_training_lowers_the_loss_it_trains_on() -> None:
    net = llama()
    ids: Tensor = torch.randint(0, 200, (4, 12), generator=torch.Generator().manual_seed(0))
    before = operations.mean_loss(net, [ids])
    operations.train(net, net.parameters(), [ids], 5, 1e-2)
    assert operations.mean_loss(net, [ids]) < before


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    measured = measured_by(claim)
    found = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    value = {(row.name, row.metric): row.mean for row in found}
    assert value[claim.NEURONS, claim.OWN] > value[claim.NEURONS, claim.OTHERS]
    assert value["grown, not trained", "loss on json"] == pytest.approx(
        value[operations.NONE, "loss on json"], abs=0.02
    )
    assert value["a brick for json", "loss on json"] < value[operations.NONE, "loss on json"]
    settings = claim.SETTINGS["smoke"]
    said = Report(
        "bricks", "t", claim.CLAIM, claim.RULE, claim.verdict(found), tuple(found), (), (0,), "smoke", settings
    )
    assert isinstance(claim.figure(said), Figure)
