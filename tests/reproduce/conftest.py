"""Every reproduction runs once at smoke scale, whichever worker asks first; all tests of it look at that report."""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

from neuropil.report import Measurement, Report
from neuropil.reproduce import reproduce

Smoke = Callable[[ModuleType], Report]


@pytest.fixture(scope="session")
def smoke_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def smoke_of(smoke_folder: Path) -> Callable[[str], Report]:
    """The report of a slug, as it comes back from its file."""

    def made(slug: str) -> Report:
        path = smoke_folder / f"{slug}.smoke.json"
        with FileLock(smoke_folder / f"{slug}.lock"):
            if not path.is_file():
                report = reproduce(slug, "smoke", out=smoke_folder, fresh=True)
                kept = Report.load(path)
                same = repr(kept.rows) == repr(report.rows)  # by repr: nan is nan
                assert same, f"{slug}: a number changed on its way through the file"
                assert kept.verdict == report.verdict
        return Report.load(path)

    return made


@pytest.fixture(scope="session")
def smoke(smoke_of: Callable[[str], Report]) -> Smoke:
    """The report of a reproduction's module."""
    return lambda module: smoke_of(module.__name__.rpartition(".")[2].replace("_", "-"))


@pytest.fixture(scope="session")
def measured_by(smoke: Smoke) -> Callable[[ModuleType], list[Measurement]]:
    """What the module measured with its one seed."""

    def measured(module: ModuleType) -> list[Measurement]:
        rows = smoke(module).rows
        return [Measurement(r.name, r.metric, r.values[0], r.unit, r.higher_is_better, r.baseline) for r in rows]

    return measured
