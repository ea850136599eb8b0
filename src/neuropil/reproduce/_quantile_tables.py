"""Tables with a real-valued target: one of scikit-learn's, four of the wheel of ISLP (James et al., BSD-3)."""

from __future__ import annotations

import csv
import hashlib
import io
import zipfile
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float
from sklearn.datasets import load_diabetes

from neuropil.errors import MissingAsset, ModelError
from neuropil.models.assets import cache_dir

WHEEL = "islp-0.6.0-py3-none-any.whl"
SHA256 = "ca772cecca1747a2f84ee799a5503ddddbdf0e98f90c235494790c1d036c694b"
Table = tuple[Float[np.ndarray, "n d"], Float[np.ndarray, " n"]]


@dataclass(frozen=True)
class Source:
    """A file of the wheel, its target, the columns that would give the target away or say nothing, and those that
    name a category."""

    file: str
    target: str
    dropped: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()


SOURCES = {
    "auto": Source("Auto.csv", "mpg", ("name",), ("origin",)),
    "college": Source("College.csv", "Grad.Rate", (), ("Private",)),
    "wage": Source(
        "Wage.csv",
        "wage",
        ("logwage", "region", "race"),
        ("maritl", "education", "jobclass", "health", "health_ins"),
    ),
    "bikeshare": Source("Bikeshare.csv", "bikers", ("casual", "registered", "day"), ("mnth", "weathersit")),
}
TABLES = ("diabetes", *SOURCES)


def table(name: str) -> Table:
    """Inputs `[n, d]`, categories as 0/1 columns, and targets `[n]`.

    "diabetes" (442 rows: progression after a year), "auto" (392 cars: miles per gallon), "college" (777: share that
    graduates), "wage" (3,000 men), "bikeshare" (8,645 hours: bicycles hired). Raises MissingAsset, with the command
    that brings the wheel, for all but the first; it is read, never installed or run.
    """
    if name == "diabetes":
        return load_diabetes(return_X_y=True)
    source = SOURCES[name]
    rows = list(csv.DictReader(io.StringIO(_file(source.file))))
    columns = []
    for column in rows[0]:
        if column == source.target or column in source.dropped:
            continue
        values = np.array([row[column] for row in rows])
        if column in source.categories:
            columns += [values == kind for kind in np.unique(values)[1:]]
        else:
            columns.append(values.astype(np.float64))
    return np.column_stack(columns).astype(np.float64), np.array([float(row[source.target]) for row in rows])


@cache
def _file(name: str) -> str:
    path = cache_dir() / WHEEL
    if not path.is_file():
        raise MissingAsset(
            f"the tables of ISLP are not in {path}; bring them with: "
            f"pip download --no-deps ISLP==0.6.0 -d {cache_dir()}"
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ModelError(f"{path} is damaged or another version (its SHA-256 is not {SHA256}); fetch it again")
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        return wheel.read(f"ISLP/data/{name}").decode()
