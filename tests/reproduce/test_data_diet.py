"""The verdict on data diets, over rows made by hand, and the parts of its measurement that need no training."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from neuropil.report import Report, Row
from neuropil.reproduce import data_diet
from neuropil.reproduce.data_diet import ACCURACY, AUC, DROPPED, subsets, verdict


def rows(
    full: tuple[float, ...] = (87.0, 87.2),
    hard: tuple[float, ...] = (86.9, 87.3),
    random: tuple[float, ...] = (86.0, 86.2),
    half: tuple[float, ...] = (86.8, 86.9),
    auc: tuple[float, ...] = (0.97, 0.98),
) -> list[Row]:
    return [
        Row.of("full set", ACCURACY, full, baseline=True),
        Row.of("70 %: EL2N", ACCURACY, hard),
        Row.of("70 %: random", ACCURACY, random, baseline=True),
        Row.of("50 %: EL2N", ACCURACY, half),
        Row.of("EL2N, one network", AUC, (0.5, 0.5), baseline=True),
        Row.of("EL2N, mean of networks", AUC, auc),
    ]


def test_holds_where_all_four_tests_pass() -> None:
    assert verdict(rows()) == "holds"


@pytest.mark.parametrize("worse", [{"half": (86.0, 86.3)}, {"hard": (86.5, 86.6), "random": (85.0, 85.0)}])
def test_partly_where_pruning_costs_accuracy(worse: dict[str, tuple[float, ...]]) -> None:
    assert verdict(rows(**worse)) == "partly"


@pytest.mark.parametrize(
    "worse",
    [
        {"random": (86.5, 86.9)},  # too near
        {"random": (87.0, 84.0)},  # far below in the mean, above in one seed
        {"auc": (0.89, 0.9)},
        {"hard": (float("nan"), float("nan"))},
    ],
)
def test_does_not_hold_where_the_score_tells_nothing(worse: dict[str, tuple[float, ...]]) -> None:
    assert verdict(rows(**worse)) == "does not hold"


def test_subsets_are_of_the_size_they_say() -> None:
    names = ("EL2N", "GraNd", "EL2N of an MLP", "max margin", "forgetting", "GraNd at initialisation")
    scores = {name: torch.rand(50, dtype=torch.float64) for name in names}
    for name, kept in subsets(scores, seed=0).items():
        assert len(kept.unique()) == len(kept) == {"f": 50, "7": 35, "5": 25}[name[0]]
    assert scores["EL2N"][subsets(scores, 0)["50 %: EL2N"]].min() >= scores["EL2N"].median()


def test_the_smoke_run_measures_everything_the_figure_needs(smoke: Callable[[ModuleType], Report]) -> None:
    pytest.importorskip("scipy")
    report = smoke(data_diet)
    assert {row.metric for row in report.rows} == {ACCURACY, data_diet.NOISY, AUC, data_diet.RANKS}
    assert report.row("70 %: EL2N", ACCURACY).mean > 30  # of 100; chance is 10
    panel = data_diet.figure(report).axes[2]
    assert len(panel.lines[0].get_xdata()) == len(DROPPED)
    assert len([row for row in report.rows if row.metric == AUC]) == 5
