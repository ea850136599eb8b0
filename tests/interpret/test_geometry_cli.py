"""`neuropil geometry`: files in, the report's numbers out, and errors that say what is wrong with which file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from neuropil.cli import app
from neuropil.interpret.geometry_report import geometry_report


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """40 trials of a rectangle: acts.npz with `h` and `x`, acts.npy, labels.csv."""
    rng = np.random.default_rng(0)
    bits = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])[np.arange(40) % 4]
    h = bits @ [[3.0, 0, 0], [0, 1, 0]] + 0.1 * rng.standard_normal((40, 3))
    np.savez(tmp_path / "acts.npz", h=h, x=2.0 * bits)
    np.save(tmp_path / "acts.npy", h)
    words = np.array(["blue", "red"])[bits[:, 1]]
    lines = [f"{shape},{colour},{shape}" for shape, colour in zip(bits[:, 0], words, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["shape,colour,again", *lines]) + "\n")
    return tmp_path


def test_it_says_what_the_library_says(files: Path) -> None:
    call = ["geometry", files / "acts.npz", files / "labels.csv", "--array", "h", "--inputs", "x"]
    options = ["--condition", "shape", "--condition", "colour"]
    result = run(*call, *options, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    arrays = np.load(files / "acts.npz")
    shape = np.array([0, 0, 1, 1])[np.arange(40) % 4]
    colour = np.array(["blue", "red"])[np.arange(40) % 2]
    expected = geometry_report(arrays["h"], {"shape": shape, "colour": colour}, inputs=arrays["x"])
    assert said["conditions"] == {"0, blue": 10, "0, red": 10, "1, blue": 10, "1, red": 10}
    rows = {row["dichotomy"]: row for row in said["dichotomies"]}
    assert set(rows) == {"shape", "colour", "again", "0, blue | 1, red"}
    for row in expected.table.to_pylist():
        for name in ("parallelism", "ccgp", "decodability"):
            assert rows[row["dichotomy"]][name] == pytest.approx(row[name])
    assert rows["again"]["ccgp"] == rows["shape"]["ccgp"]  # a column beside the conditions
    assert said["input_alignment"] == pytest.approx(expected.input_alignment)


def test_the_table_lists_named_dichotomies_first(files: Path) -> None:
    result = run("geometry", files / "acts.npy", files / "labels.csv", "--condition", "shape", "--condition", "colour")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["dichotomy", "parallelism", "ccgp", "decodability"]
    assert {line.split()[0] for line in lines[1:4]} == {"shape", "colour", "again"}
    assert lines[4].startswith("0, blue | 1, red")
    assert any(line.split()[:2] == ["conditions", "4,"] for line in lines[5:])
    assert "target alignment" in result.stdout
    assert "input alignment" not in result.stdout


def test_p_values_and_missing_conditions(files: Path) -> None:
    result = run("geometry", files / "acts.npy", files / "labels.csv", "--shuffles", 9, "--json")
    assert result.exit_code == 0, result.stderr
    assert "4 conditions of the design left out: 0, blue, 1" in result.stderr  # shape and its copy never differ
    said = json.loads(result.stdout)
    assert len(said["missing"]) == 4
    assert all(0.1 <= row["p_decodability"] <= 1 for row in said["dichotomies"])
    shown = run("geometry", files / "acts.npy", files / "labels.csv", "--shuffles", 9).stdout
    assert shown.splitlines()[0].split().count("p") == 3


@pytest.mark.parametrize(
    ("call", "code", "said"),
    [
        ("acts.npz labels.csv", 2, "has h, x; name one of them"),
        ("acts.npz labels.csv --array nothing", 2, "has h, x"),
        ("acts.npy labels.csv --condition size", 2, "has no column 'size'"),
        ("labels.csv labels.csv", 2, "no .npy or .npz file"),
        ("acts.npy gaps.csv", 2, "line 3 of"),
        ("acts.npy empty.csv", 2, "no lines below its header"),
        ("acts.npy short.csv", 1, "for 40 trials"),
        ("acts.npy labels.csv --condition shape", 1, "expected 4 or more"),
    ],
)
def test_wrong_files(files: Path, call: str, code: int, said: str) -> None:
    (files / "gaps.csv").write_text("shape,colour\n0,red\n1,\n")
    (files / "empty.csv").write_text("shape,colour\n")
    (files / "short.csv").write_text("shape\n0\n1\n")
    arguments = [files / part if "." in part else part for part in call.split()]
    result = run("geometry", *arguments)
    assert result.exit_code == code
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
