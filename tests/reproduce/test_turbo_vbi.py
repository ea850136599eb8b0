"""The verdict of the Turbo-VBI reproduction as a function of rows, its figure, its regressions, and a small run."""

import math
import warnings
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from matplotlib.figure import Figure

from neuropil.compress.support import BernoulliPrior
from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import _turbo_vbi_regression as regression
from neuropil.reproduce import turbo_vbi


def rows(run: float, index: float, accuracy: float, support: float, noise: float = 0.02) -> list[Row]:
    """Three seeds; the numbers are chains less independent."""
    metrics = {
        turbo_vbi.run_at(0.1): (1.5, run),
        turbo_vbi.index_at(0.1): (4.0, index),
        turbo_vbi.accuracy_at(0.1): (83.0, accuracy),
        turbo_vbi.F1: (0.7, support),
    }
    out = []
    for metric, (base, more) in metrics.items():
        out.append(Row.of(turbo_vbi.INDEPENDENT, metric, [base] * 3))
        out.append(Row.of(turbo_vbi.CHAINS, metric, [base + more - noise, base + more, base + more + noise]))
    return out


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ((1.0, -1.0, 0.5, 0.1), "holds"),
        ((1.0, -1.0, 0.01, 0.1), "partly"),  # accuracy within the noise
        ((1.0, -1.0, -0.9, 0.1), "partly"),
        ((1.0, -1.0, 0.5, 0.01), "partly"),
        ((0.01, -1.0, 0.5, 0.1), "partly"),
        ((1.0, -0.01, 0.5, 0.1), "partly"),
        ((-0.1, -1.0, 0.5, 0.1), "does not hold"),
        ((1.0, 0.1, 0.5, 0.1), "does not hold"),
        ((1.0, -1.0, -1.1, 0.1), "does not hold"),
        ((1.0, -1.0, math.nan, 0.1), "does not hold"),
    ],
)
def test_the_rule(differences: tuple[float, float, float, float], expected: str) -> None:
    assert turbo_vbi.verdict(rows(*differences)) == expected


def test_one_seed_never_holds() -> None:
    one = [Row.of(r.name, r.metric, r.values[:1]) for r in rows(1.0, -1.0, 1.0, 0.5)]
    assert turbo_vbi.verdict(one) == "partly"


def test_regressions_of_the_chain() -> None:
    x, w, y = regression.problems(20, torch.Generator().manual_seed(5))
    assert float((w != 0).double().mean()) == pytest.approx(0.2, abs=0.06)
    scores = {}
    for name, prior in (("chain", regression.TRUTH), ("independent", BernoulliPrior(0.2)), ("none", None)):
        mean, support = regression.solved(x, y, prior)
        scores[name] = float(regression.f1(support > 0.5, w != 0).mean()), float(regression.error(mean, w).mean())
    assert scores["chain"][0] > scores["independent"][0] > scores["none"][0]
    assert scores["chain"][1] < scores["independent"][1] < scores["none"][1]


def test_scores_of_a_support() -> None:
    found, truth = torch.tensor([[True, True, False]]), torch.tensor([[True, False, True]])
    assert float(regression.f1(found, truth)) == 0.5
    assert float(regression.error(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]]))) == 1


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # group variational dropout loses whole layers here
        measured = measured_by(turbo_vbi)
    found = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    said = Report(
        "turbo-vbi", "t", turbo_vbi.CLAIM, turbo_vbi.RULE, turbo_vbi.verdict(found), tuple(found), (), (0,), "smoke",
        turbo_vbi.SETTINGS["smoke"],
    )  # fmt: skip
    accuracy = {r.name: r.mean for r in found if r.metric == turbo_vbi.accuracy_at(0.1)}
    assert set(accuracy) == set(turbo_vbi.VARIANTS)
    assert accuracy[turbo_vbi.CHAINS] > 85
    runs = {r.name: r.mean for r in found if r.metric == turbo_vbi.run_at(0.1)}
    assert runs[turbo_vbi.CHAINS] > runs[turbo_vbi.INDEPENDENT]
    assert isinstance(turbo_vbi.figure(said), Figure)
