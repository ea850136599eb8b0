"""The verdict of the quantile reproduction as a function of rows, its tables, simulation and figure, in small."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.figure import Figure

from neuropil.errors import MissingAsset, ModelError
from neuropil.measure import pinball
from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import _quantile_tables as tables
from neuropil.reproduce import quantile_aggregation as reproduction


def rows(ours: float, simulated: float = 85.0, raised: float = 0.0, noise: float = 0.1) -> list[Row]:
    """Three seeds; the rivals score 100, 101, 102 and 99, global weights 92 on the simulation."""
    out = [
        Row.of(name, reproduction.REAL, [value] * 3)
        for name, value in zip(reproduction.RIVALS, (100.0, 101.0, 102.0, 99.0), strict=True)
    ]
    out.append(Row.of(reproduction.DQA, reproduction.REAL, [ours - noise, ours, ours + noise]))
    out.append(Row.of(reproduction.AVERAGE, reproduction.SIMULATED, [100.0] * 3))
    for name, (_, local) in reproduction.WEIGHTINGS.items():
        value = simulated if name == reproduction.DQA else max(simulated, 86.0) if local else max(simulated, 92.0)
        out.append(Row.of(name, reproduction.SIMULATED, [value] * 3))
    out += [Row.of(name, reproduction.RAISED, [0.0] * 3) for name in reproduction.OPERATORS]
    out[-2] = Row.of("isotonic projection", reproduction.RAISED, [0.0, 0.0, raised])
    return out


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"ours": 98.0}, "holds"),
        ({"ours": 98.95}, "partly"),  # within the noise of the globally weighted average
        ({"ours": 99.5}, "partly"),
        ({"ours": 100.5}, "does not hold"),
        ({"ours": 98.0, "simulated": 93.0}, "partly"),
        ({"ours": 98.0, "simulated": 101.0}, "does not hold"),
        ({"ours": 98.0, "raised": 0.01}, "does not hold"),
        ({"ours": math.nan}, "does not hold"),
    ],
)
def test_the_rule(given: dict[str, float], expected: str) -> None:
    assert reproduction.verdict(rows(**given)) == expected


def test_one_seed_never_holds() -> None:
    one = [Row.of(r.name, r.metric, r.values[:1]) for r in rows(90.0)]
    assert reproduction.verdict(one) == "partly"


def test_each_forecaster_of_the_simulation_is_right_on_its_side() -> None:
    levels = np.arange(1, 20) / 20
    task = reproduction.simulation(20_000, levels, 0)
    below = task.x[:, 0] < 0
    for side, better, worse in ((below, 0, 1), (~below, 1, 0)):
        shares = (task.y[side, None] <= task.forecasts[side, better]).mean(0)
        np.testing.assert_allclose(shares, levels, atol=0.02)
        losses = [pinball(task.y[side], task.forecasts[side, j], levels).mean() for j in (better, worse)]
        assert losses[0] < 0.7 * losses[1]
    np.testing.assert_allclose((task.y[:, None] <= task.forecasts[:, 2]).mean(0), levels, atol=1e-3)
    assert not np.isin(task.x, task.test_x).any()


def test_forecasts_of_a_table_are_made_out_of_fold_and_never_from_test_rows() -> None:
    settings = reproduction.SETTINGS["smoke"]
    first, again = (reproduction.tabular("diabetes", settings, 3) for _ in range(2))
    assert first.forecasts.shape == (160, 3, 9)
    assert first.test_forecasts.shape == (40, 3, 9)
    np.testing.assert_array_equal(first.test_forecasts, again.test_forecasts)
    rows_of = {tuple(row) for row in first.x}
    assert not any(tuple(row) in rows_of for row in first.test_x)
    np.testing.assert_allclose([first.y.mean(), first.y.std()], [0, 1], atol=1e-12)


@pytest.mark.parametrize("name", tables.TABLES)
def test_tables_are_numbers_without_their_target(name: str) -> None:
    try:
        X, y = tables.table(name)
    except MissingAsset as error:
        pytest.skip(str(error))
    assert len(X) == len(y) > 300
    assert np.isfinite(X).all()
    assert (X.std(0) > 0).all()
    assert max(abs(np.corrcoef(column, y)[0, 1]) for column in X.T) < 0.95
    expected = {"diabetes": (442, 10), "auto": (392, 8), "college": (777, 17), "wage": (3000, 13)}
    assert X.shape == expected.get(name, (8645, 23))


def test_a_wheel_that_is_missing_or_damaged_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROPIL_CACHE", str(tmp_path))
    tables._file.cache_clear()
    with pytest.raises(MissingAsset, match=r"pip download --no-deps ISLP==0\.6\.0"):
        tables.table("wage")
    (tmp_path / tables.WHEEL).write_bytes(b"no wheel")
    with pytest.raises(ModelError, match="SHA-256"):
        tables.table("wage")


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    measured = measured_by(reproduction)
    value = {(m.name, m.metric): m.value for m in measured}
    assert value[reproduction.AVERAGE, reproduction.REAL] == pytest.approx(100)
    assert value[reproduction.DQA, reproduction.SIMULATED] < 95
    assert value["local coarse", reproduction.SIMULATED] < value["global coarse", reproduction.SIMULATED]
    for name in reproduction.WEIGHTINGS:
        assert value[name, reproduction.REAL] <= value[name, reproduction.UNORDERED] + 1e-9
        assert value[name, reproduction.ORDERED] == 0
    assert value["sorting", reproduction.RAISED] == value["isotonic projection", reproduction.RAISED] == 0
    assert value["min-max sweep", reproduction.RAISED] > 0
    found = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    settings = reproduction.SETTINGS["smoke"]
    said = Report(
        "quantile-aggregation", "t", reproduction.CLAIM, reproduction.RULE, reproduction.verdict(found), tuple(found),
        (), (0,), "smoke", settings,
    )  # fmt: skip
    assert isinstance(reproduction.figure(said), Figure)
