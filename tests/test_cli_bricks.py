"""`neuropil bricks`: the matrix, the columns, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import run, said_no_traceback, save

from neuropil.atlas import Atlas
from neuropil.build import build_atlas
from neuropil.models import load


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny", layers=2)


SMALL = ("--sequences", 16, "--length", 8, "--bricks", 4)


def test_the_matrix_and_the_columns(net: Path, tmp_path: Path) -> None:
    path, mine = tmp_path / "atlas", tmp_path / "dogs.txt"
    mine.write_text("dog cat " * 2000)
    build_atlas(load(net), path, causal=False, progress=False)
    done = run(
        "bricks", net, "--functions", f"arithmetic,json,{mine}", *SMALL, "--share", 0.1, "--atlas", path, "--json"
    )
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    names = ["arithmetic", "json", "dogs"]
    assert [*facts["rise"]] == [*facts["loss"]] == names
    assert all([*row] == names for row in facts["rise"].values())
    wanted = ["brick", "brick_function", *(f"predictivity_{name}" for name in names)]
    assert facts["columns"] == wanted
    with Atlas.open(path) as atlas:
        table = atlas.query(f"SELECT site, {', '.join(wanted)} FROM neurons").to_pylist()
    assert len(table) == 48
    assert {row["brick"] for row in table} == {0, 1, 2, 3}
    assert {row["brick_function"] for row in table} <= {None, *names}
    assert all(0.5 <= row["predictivity_dogs"] <= 1 for row in table)


def test_it_is_shown(net: Path) -> None:
    done = run("bricks", net, "--functions", "json,numerals", *SMALL, "-m", "random")
    assert done.exit_code == 0, done.stderr
    assert "others as active" in done.stdout
    assert "specificity" in done.stdout


def test_what_is_refused(net: Path, tmp_path: Path) -> None:
    for options, code in (
        (("--functions", "json"), 2),
        (("--functions", "json,numerals", "-m", "spectral"), 2),
        (("--functions", "json,numerals", "--share", 0.7), 2),
        (("--functions", "json,numerals", "--how", "noise"), 2),
    ):
        assert run("bricks", net, *options).exit_code == code
    assert str(tmp_path) in said_no_traceback(run("bricks", net, "--atlas", tmp_path), 7)
    assert "25 bricks" in said_no_traceback(run("bricks", net, "--functions", "json,numerals", "--bricks", 25,
                                                "--sequences", 8, "--length", 8), 1)  # fmt: skip
