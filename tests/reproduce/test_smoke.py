"""Every claim that can be re-run, re-run at the scale of seconds."""

from pathlib import Path

import pytest

from neuropil.report import VERDICTS, Report
from neuropil.reproduce import available, reproduce


@pytest.mark.parametrize("slug", available())
def test_it_runs_and_is_kept(slug: str, tmp_path: Path) -> None:
    report = reproduce(slug, "smoke", out=tmp_path, fresh=True)
    assert report.verdict in VERDICTS
    assert any(row.baseline for row in report.rows), "a claim is measured against a baseline"
    kept = Report.load(tmp_path / f"{slug}.smoke.json")
    assert kept.verdict == report.verdict
    assert repr(kept.rows) == repr(report.rows), "a number changed on its way through the file"  # by repr: nan is nan
    assert (tmp_path / f"{slug}.smoke.png").read_bytes().startswith(b"\x89PNG")
