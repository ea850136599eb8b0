"""`neuropil compress` and `neuropil compare`: what is written, said and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run, save

from neuropil.atlas import Atlas
from neuropil.build import build_atlas
from neuropil.compare import ARMS
from neuropil.compress.recipes import RECIPES
from neuropil.models import about_packed, load
from neuropil.packed import nbytes


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny", layers=2)


def test_methods_are_listed() -> None:
    listed = json.loads(run("compress", "--json").stdout)
    assert [entry["method"] for entry in listed] == list(RECIPES)
    said = run("compress").stdout
    assert all(name in said for name in RECIPES)


def test_what_is_written_is_as_small_as_it_says_and_loads(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    done = run("compress", net, "--bits", 4, "--group", 8, "--out", out, "--no-evaluate", "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    model: Any = load(out).module()
    assert facts["bytes"] == nbytes(model)
    assert facts["left"] == {}
    assert about_packed(out)["method"] == "uniform"
    again: Any = load(out)
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids).logits, again.module()(ids).logits)
    assert again.tokenizer("dog cat")["input_ids"] == load(net).tokenizer("dog cat")["input_ids"]


def test_the_original_is_as_it_was(net: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in net.iterdir()}
    assert run("compress", net, "--bits", 2, "--no-evaluate", "--out", tmp_path / "two").exit_code == 0
    assert {path.name: path.read_bytes() for path in net.iterdir()} == before


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("neurons", "core", "adaround")])
def test_every_method_adds_its_columns(net: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "atlas"
    build_atlas(load(net), path, causal=False, progress=False)
    done = run("compress", net, "-m", name, "--no-evaluate", "--atlas", path, "--json")
    assert done.exit_code == 0, done.stderr
    columns = json.loads(done.stdout)["columns"]
    assert columns == [f"{name}_error", f"{name}_kept"]
    with Atlas.open(path) as atlas:
        table = atlas.query(f"SELECT {', '.join(columns)} FROM neurons")
    assert table.num_rows == 48
    assert all(0 <= value <= 1 for value in table[f"{name}_kept"].to_pylist())


def test_neurons_are_taken_out_and_marked(net: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "atlas", tmp_path / "few"
    build_atlas(load(net), path, causal=False, progress=False)
    done = run("compress", net, "-m", "neurons", "--sparsity", 0.25, "--no-evaluate", "--atlas", path, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert [site.width for site in load(out).sites] == [18, 18]
    with Atlas.open(path) as atlas:
        removed = atlas.query("SELECT count(*) AS n FROM neurons WHERE neurons025_removed")["n"].to_pylist()
    assert removed == [12]


def test_core_neurons_are_counted(net: Path, tmp_path: Path) -> None:
    path = tmp_path / "atlas"
    build_atlas(load(net), path, causal=False, progress=False)
    done = run("compress", net, "-m", "core", "--sparsity", 0.25, "--no-evaluate", "--atlas", path, "--json")
    assert done.exit_code == 0, done.stderr
    with Atlas.open(path) as atlas:
        shares = atlas.query("SELECT core025_share AS s FROM neurons")["s"].to_pylist()
    assert all(0 <= share <= 1 for share in shares)
    assert 0 < sum(shares) <= 2 * 18  # of two layers at most three quarters of 24 neurons each


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "magic"], "there are uniform"),
        (["--bits", "77"], "bits"),
        (["--bits", "4", "--group", "7"], "group"),
        (["--sparsity", "0.5"], "takes no sparsity"),
        (["-m", "magnitude", "--sparsity", "1.5"], "sparsity"),
        (["--atlas", "nowhere"], "nowhere"),
    ],
)
def test_wrong_calls_say_how_to_mend_them(net: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    out = tmp_path / "none"
    done = run("compress", net, "--no-evaluate", *arguments, *(["--out", out] if "--atlas" not in arguments else []))
    assert done.exit_code not in (0, 1) or "error" in done.stderr
    assert done.exit_code != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists(), "nothing is half written"


def test_a_folder_with_something_in_it_is_refused(net: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = run("compress", net, "--no-evaluate", "--out", tmp_path)
    assert done.exit_code == 2
    assert "not empty" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_what_is_compressed_already_is_refused(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert run("compress", net, "--no-evaluate", "--out", out).exit_code == 0
    done = run("compress", out, "--no-evaluate", "--out", tmp_path / "smaller")
    assert done.exit_code != 0
    assert "already" in done.stderr


def test_compare_refuses_what_it_does_not_know() -> None:
    done = run("compare", "compress", "--arm", "magic")
    assert done.exit_code == 2
    assert ARMS[0].name in done.stderr
    assert run("compare", "compress", "--model", "bert").exit_code == 2
