"""The verdict of the Shapley reproduction as a function of rows, its simulated clinic, and all of it in small."""

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from matplotlib.figure import Figure

from neuropil.errors import MissingAsset
from neuropil.interpret.shapley import aspects
from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import _shapley_workflow_cohorts as cohorts
from neuropil.reproduce import shapley_workflow as reproduction


def rows(
    gain: float = 2.0,
    other: float = 0.0,
    permutation: float = 0.6,
    natural: float = 0.6,
    merged: float = 0.85,
    random: float = 0.75,
    recovered: float = 0.8,
) -> list[Row]:
    """Two cohorts, the black box ahead by `gain` and `other` (noise 0.1 over seeds); single columns score 0.7."""
    noise = (-0.1, 0.0, 0.1)
    out = []
    for cohort, ahead in (("here", gain), ("there", other)):
        metric = reproduction.accuracy(cohort)
        out.append(Row.of(reproduction.BLACK, metric, [80 + ahead + e for e in noise]))
        out.append(Row.of(reproduction.READABLE, metric, [80.0] * 3, baseline=True))
    for selection in (reproduction.FORWARD, reproduction.ALL):
        for kind, value in ((reproduction.PERMUTATION, permutation), (reproduction.NATURAL, natural)):
            out.append(Row.of(f"{kind}, {selection}", reproduction.AGREEMENT, [value] * 3))
    for kind, value in ((reproduction.SINGLE, 0.7), (reproduction.SUM, merged), (reproduction.RANDOM, random)):
        out.append(Row.of(kind, reproduction.STABILITY, [value] * 3))
    for kind, value in ((reproduction.SINGLE, 0.7), (reproduction.SUM, recovered)):
        out.append(Row.of(kind, reproduction.RECOVERY, [value] * 3))
    return out


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "holds"),
        ({"gain": 0.05}, "partly"),  # within the noise
        ({"other": -2.0}, "partly"),  # beaten as often as it wins
        ({"merged": 0.78}, "partly"),
        ({"random": 0.9}, "partly"),
        ({"recovered": 0.6}, "partly"),
        ({"gain": 0.05, "recovered": 0.6}, "does not hold"),
        ({"permutation": 0.2}, "does not hold"),
        ({"natural": 0.2}, "does not hold"),
        ({"natural": math.nan}, "does not hold"),
    ],
)
def test_the_rule(given: dict[str, float], expected: str) -> None:
    assert reproduction.verdict(rows(**given)) == expected


def test_one_seed_beats_nobody() -> None:
    one = [Row.of(r.name, r.metric, r.values[:1]) for r in rows()]
    assert reproduction.verdict(one) == "partly"


def test_the_clinic_is_what_it_says() -> None:
    clinic = cohorts.clinic(4000, 0)
    a = clinic["A"]
    assert list(a.X) == list(clinic["B"].X)
    r = aspects(a.X, 0.7, list(a.X)).correlation
    assert r[0, 1] == pytest.approx(0.9, abs=0.03)
    assert set(np.unique(a.diagnosis)) == {"CN", "MCI", "AD"}
    assert ((a.course != "") == (a.diagnosis == "MCI")).all()
    np.testing.assert_allclose(a.truth.mean(0), 0, atol=1e-10)
    names = list(a.X)
    for unused in ("left putamen", "right thalamus", "naming", "male"):
        assert (a.truth[:, names.index(unused)] == 0).all()
    sick = {name: (cohort.diagnosis == "AD").mean() for name, cohort in clinic.items()}
    assert sick["B"] < sick["A"] < sick["C"]
    assert clinic["B"].X["age"].mean() > a.X["age"].mean() + 2
    for task, (mild, severe) in cohorts.TASKS.items():
        X, y, truth = a.task(task)
        assert len(X) == len(y) == len(truth) == np.isin([a.course, a.diagnosis], [mild, severe]).any(0).sum()
        assert truth[y == 1].sum(1).mean() > truth[y == 0].sum(1).mean()
    again = cohorts.clinic(4000, 0)["A"]
    assert again.X.equals(a.X)
    assert not cohorts.clinic(4000, 1)["A"].X.equals(a.X)


@pytest.mark.parametrize("name", list(reproduction.PAIRS))
def test_no_row_is_trained_on_and_tested(name: str) -> None:
    try:
        study = reproduction._real(name, reproduction.SETTINGS["default"], 0)
    except MissingAsset as error:
        pytest.skip(str(error))
    (X, y) = study.cohorts[reproduction.PAIRS[name]]
    assert list(X) == list(study.X)
    assert len(X) == len(y) > 50
    if name in ("alzheimer", "tumour"):
        assert not set(X.index) & set(study.X.index)
    assert 0.05 < study.y.mean() < 0.95


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    measured = measured_by(reproduction)
    value = {(m.name, m.metric): m.value for m in measured}
    for model in (reproduction.BLACK, reproduction.READABLE):
        assert value[model, reproduction.accuracy("clinic, CN vs AD")] > 75
    natural = value[f"{reproduction.NATURAL}, {reproduction.ALL}", reproduction.AGREEMENT]
    assert natural > value[f"{reproduction.CHANCE}, {reproduction.ALL}", reproduction.AGREEMENT]
    assert value[reproduction.COGNITION, reproduction.SETS] > value[reproduction.VOLUMES, reproduction.SETS]
    assert value[reproduction.SINGLE, reproduction.RECOVERY] > 0
    found = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    said = Report(
        "shapley-workflow", "t", reproduction.CLAIM, reproduction.RULE, reproduction.verdict(found), tuple(found), (),
        (0,), "smoke", reproduction.SETTINGS["smoke"],
    )  # fmt: skip
    assert isinstance(reproduction.figure(said), Figure)
