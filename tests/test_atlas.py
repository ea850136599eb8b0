"""The folder of an atlas: what is written, what is refused, and what damage is noticed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from atlas_builder import CHAIN, SITES, WIDTH, columns
from atlas_factory import decode_columns, tiny_atlas, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from neuropil.atlas import Atlas, diff
from neuropil.errors import AtlasBusy, AtlasError, UnknownNeuron
from neuropil.neurons import Site


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_atlas(tmp_path_factory.mktemp("tiny") / "atlas")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def part(folder: Path, group: str = "decode", site: int = 1) -> Path:
    return folder / "parts" / group / f"{site:05d}.parquet"


# ------------------------------------------------------------------------------------------- contents


def test_rows_are_neurons_and_values_come_back(tiny: Path) -> None:
    with Atlas.open(tiny) as atlas:
        assert atlas.groups == ["decode", "causal"]
        assert list(atlas.columns)[:5] == ["neuron", "site", "index", "layer", "module"]
        rows = atlas.query("SELECT neuron, label, up_scores, up_tokens FROM neurons ORDER BY site, index").to_pylist()
        assert len(rows) == 48
        for site in atlas.sites:
            given_ = decode_columns(site)
            for i in range(site.width):
                row = rows[site.number * 16 + i]
                assert row["neuron"] == f"{site.number}:{i}"
                assert row["label"] == given_["label"][i]
                assert row["up_tokens"] == given_["up_tokens"][i]
                assert row["up_scores"] == given_["up_scores"][i].tolist()


def test_some_sites_are_added_and_the_rest_later(tmp_path: Path) -> None:
    called: list[int] = []

    def compute(site: Any) -> dict[str, Any]:
        called.append(site.number)
        return columns(site)

    with Atlas.create(tmp_path / "atlas", CHAIN) as atlas:
        assert atlas.add("mine", compute, sites=CHAIN.sites[2:4], progress=False) == 2
        assert atlas.add("mine", compute, sites=CHAIN.sites[3:5], progress=False) == 1
        assert called == [2, 3, 4]
        assert atlas.add("mine", compute, progress=False) == len(CHAIN.sites) - 3
        assert sorted(called) == [site.number for site in CHAIN.sites]


def test_sites_survive_the_manifest(tiny: Path) -> None:
    with Atlas.open(tiny) as atlas:
        assert atlas.sites == tiny_model().sites
        manifest = atlas.manifest
    entry = manifest["groups"]["decode"]
    assert entry["settings"]["top_k"] == 5
    assert entry["columns"]["up_tokens"] == "list<element: string>"
    assert {"torch", "pyarrow"} <= set(entry["versions"])
    assert entry["created"].startswith("20")
    assert manifest["model"]["architecture"] == "LlamaForCausalLM"


def test_neuron_gives_everything_and_refuses_unknown_ones(tiny: Path) -> None:
    with Atlas.open(tiny) as atlas:
        known = atlas.neuron("model.layers.0.mlp:0")
        assert known == atlas.neuron("0:0")
        assert set(known) == set(atlas.columns)
        assert (known["label"], known["verdict"]) == ("dog", "suppresses")
        for address, said in (("9:0", "0 to 2"), ("0:16", "0 to 15"), ("dog", "SITE:INDEX")):
            with pytest.raises(UnknownNeuron, match=said):
                atlas.neuron(address)


VALUES = st.one_of(
    st.lists(st.floats(width=32), min_size=WIDTH, max_size=WIDTH).map(lambda v: np.array(v, np.float32)),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=WIDTH, max_size=WIDTH).map(lambda v: torch.tensor(v)),
    st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"])), min_size=WIDTH, max_size=WIDTH),
    st.lists(st.lists(st.text("ab'\"\\\n\0é", max_size=3), max_size=3), min_size=WIDTH, max_size=WIDTH),
    st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH).map(lambda v: torch.tensor(v)),
)


@settings(max_examples=25, deadline=None)
@given(values=VALUES)
def test_any_column_comes_back_as_given(values: Any) -> None:
    plain = values if isinstance(values, list) else values.tolist()
    with tempfile.TemporaryDirectory() as folder, Atlas.create(folder, CHAIN) as atlas:
        atlas.add("mine", {CHAIN.sites[3].name: {"x": values}}, progress=False)
        if all(v is None or v == [] for v in plain):
            return  # nothing in it to come back; its type is unknown
        got = atlas.query("SELECT x FROM neurons WHERE site = 3 ORDER BY index")["x"].to_pylist()
    if isinstance(values, np.ndarray):
        np.testing.assert_array_equal(np.array(got, np.float32), values)
    else:
        assert got == plain


def test_lower_precision_is_widened_and_empty_lists_take_the_type_of_others(tmp_path: Path) -> None:
    def compute(site: Site) -> dict[str, Any]:
        empty = site.number == 0
        return {
            "half": torch.full((site.width,), 0.5, dtype=torch.bfloat16),
            "words": [[] if empty else ["a"]] * site.width,
            "note": [None if empty else "b"] * site.width,
        }

    with Atlas.create(tmp_path / "a", CHAIN) as atlas:
        atlas.add("mine", compute, progress=False)
        assert {k: atlas.columns[k] for k in ("half", "words", "note")} == {
            "half": "FLOAT",
            "words": "VARCHAR[]",
            "note": "VARCHAR",
        }
        first = atlas.neuron("0:0")
        assert (first["half"], first["words"], first["note"]) == (0.5, [], None)
        assert atlas.neuron("1:0")["words"] == ["a"]


def test_parts_that_are_missing_are_null_and_counted(tmp_path: Path) -> None:
    seen: list[int] = []

    def stop_at_two(site: Site) -> dict[str, Any]:
        if site.number == 2:
            raise KeyboardInterrupt
        seen.append(site.number)
        return columns(site)

    with Atlas.create(tmp_path / "a", CHAIN) as atlas, pytest.raises(KeyboardInterrupt):
        atlas.add("first", stop_at_two, progress=False)
    with Atlas.open(tmp_path / "a") as atlas:
        state = atlas.status()["groups"]["first"]
        assert (state["parts"], state["of"], state["complete"]) == (2, SITES, False)
        assert state["missing"] == list(range(2, SITES))
        rows = atlas.query("SELECT site, count(score) AS n FROM neurons GROUP BY site ORDER BY site").to_pylist()
        assert [row["n"] for row in rows] == [WIDTH] * 2 + [0] * (SITES - 2)
        assert atlas.neuron("5:0")["score"] is None
        with Atlas.open(tmp_path / "a", write=True) as writer:
            assert writer.add("first", lambda s: seen.append(s.number) or columns(s), progress=False) == SITES - 2
        assert seen == list(range(SITES)), "a finished part was computed again"
        assert atlas.neuron("5:0")["score"] == columns(CHAIN.sites[5])["score"][0].item(), "an open reader sees it"


def test_two_groups_may_have_a_column_of_one_name(copy: Path) -> None:
    with Atlas.open(copy, write=True) as atlas:
        atlas.add("order", lambda s: {"label": ["mine"] * s.width}, progress=False)
        assert atlas.neuron("0:0")["label"] == "dog"
        assert atlas.neuron("0:0")["order_label"] == "mine"
        assert atlas.query('SELECT DISTINCT label FROM "order"').to_pylist() == [{"label": "mine"}]


# -------------------------------------------------------------------------------------------- refusals


def test_bad_columns_are_refused_with_the_place(tmp_path: Path) -> None:
    width = CHAIN.sites[0].width
    with Atlas.create(tmp_path / "a", CHAIN) as atlas:
        for bad, said in (
            ({"x": torch.zeros(width + 1)}, f"{width + 1} values given, expected one for each of {width}"),
            ({"x": torch.zeros(width, 2, 2)}, "3 dimensions"),
            ({"x": [object()] * width}, "make no column"),
            ({"layer": torch.zeros(width)}, "kept for the atlas itself"),
            ({"a b": torch.zeros(width)}, "letters, digits and underscores"),
            ({"x": torch.zeros(width), "X": torch.zeros(width)}, "no difference of case"),
        ):
            with pytest.raises(AtlasError, match=said):
                atlas.add("bad", lambda site, bad=bad: bad, progress=False)
        for group in ("neurons", "Bad", "../up", ""):
            with pytest.raises(AtlasError, match="group"):
                atlas.add(group, columns, progress=False)
        with pytest.raises(AtlasError, match="no site 'nowhere'"):
            atlas.add("mine", {"nowhere": {"x": torch.zeros(width)}}, progress=False)
        with pytest.raises(AtlasError, match=r"plain values"):
            atlas.add("mine", columns, settings={"f": object()}, progress=False)
        assert not list((tmp_path / "a" / "parts").rglob("*.parquet"))


def test_other_settings_are_refused_unless_overwriting(copy: Path) -> None:
    with Atlas.open(copy, write=True) as atlas:
        same = {"prompts": 16, "seed": 0}
        assert atlas.add("causal", lambda s: {}, settings=same, progress=False) == 0
        with pytest.raises(AtlasError, match=r"prompts: 16 there, 8 now.*new folder.*overwrite=True"):
            atlas.add("causal", lambda s: {}, settings={**same, "prompts": 8}, progress=False)
        new = {"effect": torch.ones(16)}
        assert atlas.add("causal", lambda s: new, settings={"prompts": 8}, overwrite=True, progress=False) == 3
        assert atlas.neuron("0:0")["effect"] == 1
        assert "verdict" not in atlas.columns


def test_given_values_may_be_given_again_but_not_changed(copy: Path) -> None:
    names = [site.name for site in tiny_model().sites]
    with Atlas.open(copy, write=True) as atlas:
        assert atlas.add("mine", {names[0]: {"x": torch.arange(16)}}, progress=False) == 1
        assert atlas.add("mine", {name: {"x": torch.arange(16)} for name in names}, progress=False) == 2
        with pytest.raises(AtlasError, match="already has other values"):
            atlas.add("mine", {names[1]: {"x": torch.arange(16) + 1}}, progress=False)


def test_wrong_folders_are_named(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(AtlasError, match="is no folder"):
        Atlas.open(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(AtlasError, match=r"no manifest.json"):
        Atlas.open(tmp_path / "full")
    with pytest.raises(AtlasError, match=r"'thesis.tex'"):
        Atlas.create(tmp_path / "full", CHAIN)
    assert sorted(os.listdir(tmp_path / "full")) == ["thesis.tex"]
    with pytest.raises(AtlasError, match="is the atlas of 'tiny-llama'"):
        Atlas.create(copy, CHAIN)
    for text in (
        "{",
        "[]",
        "{}",
        '{"kind": "neuropil atlas", "format": 99}',
        '{"kind": "neuropil atlas", "format": 1}',
    ):
        (copy / "manifest.json").write_text(text)
        with pytest.raises(AtlasError, match=r"manifest|format 99"):
            Atlas.open(copy)


def test_a_reader_cannot_add_and_one_process_cannot_write_twice(copy: Path) -> None:
    with Atlas.open(copy) as reader, pytest.raises(AtlasError, match="open for reading"):
        reader.add("mine", columns)
    with Atlas.open(copy, write=True), pytest.raises(AtlasBusy, match=f"process {os.getpid()}"):
        Atlas.open(copy, write=True)
    Atlas.open(copy, write=True).close()


# ---------------------------------------------------------------------------------------------- damage


def damage(folder: Path, how: str) -> Path:
    target = part(folder)
    data = target.read_bytes()
    if how == "truncated":
        target.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        target.write_bytes(b"")
    elif how == "of another site":
        shutil.copy(part(folder, site=2), target)
    elif how == "of another group":
        shutil.copy(part(folder, group="causal"), target)
    elif how == "unstamped":
        pq.write_table(pq.read_table(target).replace_schema_metadata(None), target)
    elif how == "of no site":
        target = part(folder, site=77)
        target.write_bytes(data)
    return target


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "of another site", "of another group", "unstamped", "of no site"]
)
def test_a_bad_part_is_named_and_mended_as_told(copy: Path, how: str) -> None:
    before = {p.name: p.read_bytes() for p in part(copy).parent.iterdir()}
    target = damage(copy, how)
    for attempt in (lambda: Atlas.open(copy), lambda: Atlas.open(copy, write=True)):
        with pytest.raises(AtlasError, match=r"(?s)truncated|foreign") as caught:
            attempt()
        assert str(target) in str(caught.value)
        assert "Delete the named file" in str(caught.value)
    target.unlink()
    tiny_atlas(copy)
    assert {p.name: p.read_bytes() for p in part(copy).parent.iterdir()} == before


def test_parts_of_another_model_or_other_settings_are_foreign(copy: Path, tmp_path: Path) -> None:
    other = tiny_atlas(tmp_path / "other", seed=1)
    shutil.copy(part(other), part(copy))
    with pytest.raises(AtlasError, match=r"(?s)00001.parquet: foreign: its model is '0+1', not '0+'.*its settings is"):
        Atlas.open(copy)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_never_passes_unnoticed(tiny: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        spoiled = Path(shutil.copytree(tiny, Path(folder) / "spoiled"))
        target = data.draw(st.sampled_from([part(spoiled), spoiled / "vocabulary.parquet"]))
        raw = bytearray(target.read_bytes())
        place = data.draw(st.integers(0, len(raw) - 1), "place")
        raw[place] ^= data.draw(st.integers(1, 255), "flip")
        target.write_bytes(raw)
        with pytest.raises(AtlasError) as caught:
            Atlas.open(spoiled).status()
        assert str(target) in str(caught.value)


def test_parts_are_ordinary_parquet(tiny: Path) -> None:
    for path in tiny.rglob("*.parquet"):
        assert pq.read_table(path).num_rows == duckdb.read_parquet(str(path)).count("*").fetchall()[0][0]


def test_a_query_over_a_damaged_page_names_the_part(copy: Path) -> None:
    target = part(copy)
    raw = bytearray(target.read_bytes())
    for place in range(40, len(raw) // 2):  # the pages lie before the footer
        raw[place] ^= 0xFF
    target.write_bytes(raw)
    with Atlas.open(copy) as atlas, pytest.raises(AtlasError, match=r"00001.parquet: truncated, damaged"):
        atlas.query("SELECT * FROM neurons")


def test_stray_temporary_files_are_ignored_and_swept_by_the_next_writer(copy: Path) -> None:
    strays = [copy / ".manifest.json.9-ab.tmp", part(copy).with_name(".00001.parquet.9-ab.tmp")]
    for stray in strays:
        stray.write_bytes(b"half")
    (copy / "parts" / ".gone.9.tmp").mkdir()
    with Atlas.open(copy) as atlas:
        assert atlas.status()["groups"]["decode"]["parts"] == 3
    assert all(stray.exists() for stray in strays), "a reader changed the folder"
    Atlas.open(copy, write=True).close()
    assert not list(copy.rglob("*.tmp"))


# ----------------------------------------------------------------------------------------- a full disk

FILL = """
import resource, sys
from atlas_builder import CHAIN, columns
from neuropil.atlas import Atlas
from neuropil.errors import AtlasError
import numpy as np, torch
folder, limit = sys.argv[1], int(sys.argv[2])
def compute(site):
    noise = np.random.default_rng(site.number).random((site.width, 400 if site.number >= 5 else 1))
    return {"noise": torch.from_numpy(noise)}
try:
    with Atlas.create(folder, CHAIN) as atlas:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        print(atlas.add("noise", compute, progress=False))
except AtlasError as bad:
    print("refused:", bad)
"""


def fill(folder: Path, limit: int = 0) -> str:
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", FILL, str(folder), str(limit)]
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_full(folder: Path, said: str, reason: str) -> None:
    assert reason in said
    assert "The parts written before are safe. Free some space and run again." in said
    assert not list(folder.rglob("*.tmp")), "half a part was left"
    with Atlas.open(folder) as atlas:
        assert atlas.status()["groups"]["noise"]["missing"] == list(range(5, SITES))


def test_a_refused_write_loses_nothing(tmp_path: Path) -> None:
    said = fill(tmp_path / "a", limit=60_000)
    check_full(tmp_path / "a", said, "File too large")
    assert fill(tmp_path / "a") == f"{SITES - 5}\n"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root may mount; RLIMIT_FSIZE is tested above")
def test_a_full_disk_loses_nothing(small_disk: Path) -> None:
    said = fill(small_disk / "a")
    check_full(small_disk / "a", said, "No space left on device")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=140k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"mount is not allowed here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


# ------------------------------------------------------------------------------------------------ diff


def test_an_atlas_does_not_differ_from_itself(tiny: Path) -> None:
    with Atlas.open(tiny) as one, Atlas.open(tiny) as two:
        found = diff(one, two)
    assert found.neurons == 48
    assert set(found.same) == {"up", "up_neg", "gate", "gate_neg", "down", "down_neg"}
    assert set(found.same.values()) == set(found.jaccard.values()) == {1.0}
    assert found.changed.num_rows == 0
    json.dumps(found.to_json())


def test_one_changed_layer_is_found(tiny: Path, tmp_path: Path) -> None:
    model = tiny_model(fingerprint="0" * 15 + "2")
    with Atlas.create(tmp_path / "b", model) as other:
        other.add("decode", lambda s: decode_columns(s, seed=5 if s.number == 1 else 0), progress=False)
        with Atlas.open(tiny) as one:
            found = diff(one, other)
    same = {row["site"]: row["same"] for row in found.by_site.to_pylist() if row["weight"] == "up"}
    expected = {n: [decode_columns(s, seed=d)["up_token_ids"] for d in (0, 5)] for n, s in enumerate(model.sites)}
    a, b = expected[1]
    assert same == {0: 1.0, 1: (a[:, 0] == b[:, 0]).float().mean().item(), 2: 1.0}
    overlap = [len({*x} & {*y}) / len({*x} | {*y}) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert found.jaccard["up"] == pytest.approx((2 + np.mean(overlap)) / 3, abs=1e-12)
    labels = [decode_columns(model.sites[1], seed=d)["label"] for d in (0, 5)]
    changed = {row["neuron"]: (row["before"], row["after"]) for row in found.changed.to_pylist()}
    assert changed == {f"1:{i}": (x, y) for i, (x, y) in enumerate(zip(*labels, strict=True)) if x != y}
    scores = [max(r["specialisation_before"], r["specialisation_after"]) for r in found.changed.to_pylist()]
    assert scores == sorted(scores, reverse=True)


def test_models_of_other_shape_are_not_compared(tiny: Path, tmp_path: Path) -> None:
    with Atlas.open(tiny) as one:
        narrow = Atlas.open(tiny_atlas(tmp_path / "b", width=8))
        with pytest.raises(AtlasError, match=r"3 sites, 48 neurons.*3 sites, 24 neurons.*different shape"):
            diff(one, narrow)
        empty = Atlas.create(tmp_path / "c", tiny_model(fingerprint="3"))
        with pytest.raises(AtlasError, match="no decoded tokens in common"):
            diff(one, empty)
        empty.close()


def test_the_arrow_metadata_of_a_part_tell_what_it_is(tiny: Path) -> None:
    stamp = {k.decode(): v.decode() for k, v in pq.read_metadata(part(tiny)).metadata.items() if b"neuropil" in k}
    assert stamp["neuropil.group"] == "decode"
    assert stamp["neuropil.module"] == "model.layers.1.mlp"
    assert (stamp["neuropil.site"], stamp["neuropil.width"], stamp["neuropil.format"]) == ("1", "16", "1")
    assert isinstance(pq.read_schema(part(tiny)).field("up_tokens").type, pa.ListType)
