"""Reports: what is written is what was measured, NaN included; a foreign file is refused."""

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from neuropil.report import (
    VERSION,
    Measurement,
    Report,
    ReportError,
    Row,
    aggregate,
    find,
    versions,
    write_atomically,
)

FLOATS = st.floats(allow_nan=True, allow_infinity=True)
FINITE = st.floats(-1e6, 1e6)
TEXT = st.text(max_size=20)


def report(rows: tuple[Row, ...], **changes: object) -> Report:
    facts = {
        "slug": "granet", "title": "A title", "claim": "A claim.", "rule": "A rule.", "verdict": "holds",
        "rows": rows, "paper_says": ("91 % [Table 1]",), "seeds": (0, 1), "scale": "smoke",
        "settings": {"steps": 10, "rate": 0.1}, "versions": versions(), "seconds": 1.5,
        "notes": ("a note",), "deviations": ("a smaller net",),
    }  # fmt: skip
    return Report(**{**facts, **changes})  # type: ignore[arg-type]


def same(first: Report, second: Report) -> bool:
    """Equal, where NaN counts as equal to NaN (which `==` denies)."""
    facts = [{**vars(one), "rows": repr(one.rows)} for one in (first, second)]
    return facts[0] == facts[1]


ROWS = st.tuples(
    TEXT,
    TEXT,
    st.lists(FLOATS, min_size=1, max_size=4),
    TEXT,
    st.sampled_from([True, False, None]),
    st.booleans(),
)


@given(st.lists(ROWS, max_size=4), TEXT, st.lists(TEXT, max_size=3))
@settings(max_examples=50, deadline=None)
def test_a_report_survives_json(rows: list[Any], claim: str, said: list[str]) -> None:
    first = report(tuple(Row.of(*facts) for facts in rows), claim=claim, paper_says=tuple(said))
    again = Report.from_json(first.to_json())
    assert same(again, first)
    assert again.to_json() == first.to_json()


def test_json_is_strict_and_sorted() -> None:
    text = report((Row.of("a", "m", [math.nan, math.inf, -math.inf, 2.0]),)).to_json()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    data = json.loads(text, parse_constant=refuse)
    assert data["rows"][0]["values"] == ["NaN", "Infinity", "-Infinity", 2.0]
    assert data["rows"][0]["spread"] is None
    assert list(data) == sorted(data)


@given(st.lists(FINITE, min_size=2, max_size=8))
@settings(max_examples=50, deadline=None)
def test_a_row_is_mean_and_standard_deviation(values: list[float]) -> None:
    row = Row.of("a", "m", values)
    assert row.mean == pytest.approx(statistics.fmean(values), rel=1e-12, abs=1e-9)
    assert row.spread == pytest.approx(statistics.stdev(values), rel=1e-9, abs=1e-9)
    assert (row.seeds, row.failed, row.values) == (len(values), 0, tuple(values))


def test_failed_runs_are_counted_not_averaged() -> None:
    row = Row.of("a", "m", [1.0, math.nan, 3.0, math.inf], unit="%")
    assert (row.mean, row.failed, row.seeds) == (2.0, 2, 4)
    assert row.spread == pytest.approx(math.sqrt(2))
    assert row.text == "2.0 ± 1.4 % (2 of 4 failed)"
    dead = Row.of("a", "m", [math.nan])
    assert math.isnan(dead.mean)
    assert dead.spread is None
    assert dead.text == "all failed"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.5], "0.5"),
        ([0.5, 0.5], "0.5 ± 0"),
        ([91.2, 91.4, 90.9], "91.17 ± 0.25"),
        ([1000.0, 1500.0], "1250 ± 354"),
        ([1.0, 1.0 + 1e-9], "1 ± 7.1e-10"),
        ([-0.25, 0.25], "0.00 ± 0.35"),
    ],
)
def test_numbers_are_printed_to_their_spread(values: list[float], text: str) -> None:
    assert Row.of("a", "m", values).text == text


def test_aggregate_joins_seeds_whatever_their_order() -> None:
    first = [Measurement("ours", "acc", 0.9, "%"), Measurement("random", "acc", 0.5, "%", baseline=True)]
    second = [Measurement("random", "acc", 0.7, "%", baseline=True), Measurement("ours", "acc", 0.8, "%")]
    rows = aggregate([first, second])
    assert [(row.name, row.values, row.baseline) for row in rows] == [
        ("ours", (0.9, 0.8), False), ("random", (0.5, 0.7), True)
    ]  # fmt: skip
    assert find(rows, "random", "acc") is rows[1]
    with pytest.raises(LookupError, match="'ours'/'acc'"):
        find(rows, "ours", "loss")


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "Nothing to aggregate"),
        ([[]], "Nothing to aggregate"),
        ([[Measurement("a", "m", 1.0)], []], "must report NaN"),
        ([[Measurement("a", "m", 1.0)], [Measurement("a", "m", 1.0), Measurement("b", "m", 1.0)]], "'b'/'m'"),
        ([[Measurement("a", "m", 1.0), Measurement("a", "m", 2.0)]], "twice"),
        ([[Measurement("a", "m", 1.0, "s")], [Measurement("a", "m", 1.0, "ms")]], "otherwise"),
    ],
)
def test_aggregate_refuses_seeds_that_do_not_match(runs: list[list[Measurement]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate(runs)


GOOD = json.loads(report((Row.of("a", "m", [1.0, 2.0]),)).to_json())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "Not a report"),
        ({"version": VERSION + 1}, f"version {VERSION + 1}"),
        ({"verdict": "maybe"}, "verdict"),
        ({"scale": "huge"}, "scale"),
        ({"extra": 1}, "extra"),
        ({"rows": [{"name": "a"}]}, "Not a report"),
        ({"rows": [{**GOOD["rows"][0], "mean": "many"}]}, "'many'"),
        ({"rows": None}, "Not a report"),
    ],
)
def test_a_file_that_is_no_report_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(ReportError, match=message) as caught:
        Report.load(path)
    assert "x.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe"])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ReportError, match=r"x\.json"):
        Report.load(tmp_path / "x.json")
    with pytest.raises(ReportError, match="No report"):
        Report.load(tmp_path / "absent.json")


def test_a_saved_report_is_read_back(tmp_path: Path) -> None:
    first = report((Row.of("a", "m", [1.0, math.nan]),))
    path = first.save(tmp_path / "deep" / "granet.json")
    assert same(Report.load(path), first)
    assert [entry.name for entry in path.parent.iterdir()] == ["granet.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """The rename fails, for the target is a folder: it stays, and the temporary file goes."""
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomically(tmp_path / "taken", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_printed_report_puts_the_paper_beside_the_measured() -> None:
    rows = (Row.of("ours [x]", "acc", [0.9, 0.8]), Row.of("random", "acc", [math.nan, 0.5], baseline=True))
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report(rows))
    text = console.export_text()
    parts = ["91 % [Table 1]", "ours [x]", "0.850 ± 0.071", "random (baseline)", "1 of 2 failed", "holds"]
    parts += ["a note", "a smaller net", "standard deviation over seeds; 2 seeds, scale smoke"]
    for part in parts:
        assert part in text, part
