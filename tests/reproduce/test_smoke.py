"""Every claim that can be re-run, re-run at the scale of seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from neuropil.report import VERDICTS, Report
from neuropil.reproduce import available


@pytest.mark.parametrize("slug", available())
def test_it_runs_and_is_kept(slug: str, smoke_of: Callable[[str], Report], smoke_folder: Path) -> None:
    report = smoke_of(slug)
    assert report.verdict in VERDICTS
    assert any(row.baseline for row in report.rows), "a claim is measured against a baseline"
    assert (smoke_folder / f"{slug}.smoke.png").read_bytes().startswith(b"\x89PNG")
