"""The catalog: whole, well formed, its status computed, its search useful by meaning and by words."""

import importlib
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuropil import meaning, papers
from neuropil.papers import FAMILIES, Kind, UnknownPaper, catalog, paper, search
from neuropil.report import Report, Row

SLUGS = [entry.slug for entry in catalog()]


def test_the_catalog_is_whole() -> None:
    assert Counter(entry.family for entry in catalog()) == {
        "interpret": 8, "compress": 10, "grow": 4, "layers": 13, "learn": 7, "measure": 8, "brain": 6
    }  # fmt: skip
    assert len(set(SLUGS)) == 56
    assert len({(entry.family, entry.module) for entry in catalog()}) == 56
    assert len({(entry.family, entry.public) for entry in catalog()}) == 56
    assert set(FAMILIES) == {entry.family for entry in catalog()}
    assert {entry.kind for entry in catalog()} == set(get_args(Kind))


@pytest.mark.parametrize("entry", catalog(), ids=SLUGS)
def test_an_entry_is_well_formed(entry: papers.Paper) -> None:
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", entry.slug)
    assert entry.module.isidentifier()
    assert entry.public.isidentifier()
    assert re.fullmatch(r"\d{4}\.\d{5}", entry.arxiv or "") or re.fullmatch(r"10\.\d{4,}/\S+", entry.doi or "")
    # An arXiv number opens with the year and month of the first version, which no citation predates.
    if entry.arxiv and entry.slug not in {
        "filter-design",
        "weight-compander",
    }:  # preprints first put up elsewhere
        assert entry.year >= 2000 + int(entry.arxiv[:2])
    assert 2016 <= entry.year <= 2025
    assert entry.authors
    # One sentence: a capital, a full stop at its end and none inside but in numbers and abbreviations.
    assert re.fullmatch(r"[A-Z][^.]*(\d\.\d[^.]*)*\.", entry.claim), entry.claim
    assert entry.citation.endswith(".")
    assert str(entry.year) in entry.citation


def test_status_is_not_typed() -> None:
    text = (papers.PACKAGE / "papers.toml").read_text()
    assert not re.search(r"^\s*(status|verdict|implemented)\s*=", text, re.M)


def test_what_is_called_implemented_can_be_imported() -> None:
    for entry in catalog():
        if entry.implemented:
            module = importlib.import_module(f"neuropil.{entry.family}.{entry.module}")
            assert hasattr(module, entry.public), entry.address
            assert hasattr(importlib.import_module(f"neuropil.{entry.family}"), entry.public), entry.address


def test_status_follows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a copy of the package's layout: no file, a file without the name, the name, a report."""
    package = tmp_path / "src" / "neuropil"
    (package / "compress").mkdir(parents=True)
    monkeypatch.setattr(papers, "PACKAGE", package)
    entry = paper("granet")
    assert entry.status == "planned"
    entry.source.write_text("class Other: ...\n# GraNet\n")
    assert entry.status == "planned"
    entry.source.write_text("def broken(:")
    assert entry.status == "planned"
    entry.source.write_text("class GraNet: ...\n")
    assert entry.status == "implemented"
    report = Report("granet", entry.title, entry.claim, "r", "partly", (Row.of("a", "m", [1.0]),), (), (0,), "default")
    report.save(tmp_path / "docs" / "results" / "granet.json")
    assert entry.status == "implemented", "without a pyproject.toml this is no source tree"
    (tmp_path / "pyproject.toml").touch()
    assert entry.status == "reproduced: partly"
    entry.source.unlink()
    (package / "compress" / "granet").mkdir()
    (package / "compress" / "granet" / "__init__.py").write_text("from .core import Core as GraNet\n")
    assert entry.status == "reproduced: partly"


def test_an_installed_package_copes_without_docs(tmp_path: Path) -> None:
    """The package's files alone, as a wheel has them, in a folder of their own."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(papers.PACKAGE, tmp_path / "neuropil", ignore=ignore)
    code = "import neuropil.papers as p; print(p.PACKAGE, p.results_folder(), {e.status for e in p.catalog()})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'neuropil'} None ")
    assert "reproduced" not in done.stdout


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("granett", "granet"), ("neuron", "neuron-decoding"), ("GRANET", "granet"), ("kan", "kat")],
)
def test_an_unknown_slug_names_its_neighbours(typo: str, meant: str) -> None:
    with pytest.raises(UnknownPaper, match=meant):
        paper(typo)


@given(st.text(max_size=30))
@settings(max_examples=20, deadline=None)
def test_any_text_is_a_paper_or_an_unknown_paper(slug: str) -> None:
    if slug in SLUGS:
        assert paper(slug).slug == slug
    else:
        with pytest.raises(UnknownPaper):
            paper(slug)


QUERIES = {
    "forgetting earlier tasks": {"hebbian-projection", "field-space-continual"},
    "pruning weights": {"granet", "activating-while-pruning", "dimap", "turbo-vbi"},
    "spiking neurons": {"learned-delays", "hebbian-projection", "liquid-state-machine"},
    "learning rate schedule": {"lr-annealing-law", "homeostatic-networks"},
    "MRI of the brain": {"anatcl", "rim", "pls-net"},
}


@pytest.mark.parametrize("query", QUERIES)
def test_search_by_words_finds_what_is_meant(query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meaning, "available", lambda: False)
    assert {entry.slug for entry in search(query, 3)} & QUERIES[query]


def test_search_by_words_leaves_out_what_shares_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meaning, "available", lambda: False)
    assert search("xylophone") == []
    assert all("prun" in f"{entry.title} {entry.claim} {entry.slug}".lower() for entry in search("pruned", 56))


needs_model = pytest.mark.skipif(not meaning.available(), reason="the sentence model is not installed")


@needs_model
@pytest.mark.parametrize("query", QUERIES)
def test_search_by_meaning_finds_what_is_meant(query: str) -> None:
    assert {entry.slug for entry in search(query, 3)} & QUERIES[query]


@needs_model
@pytest.mark.parametrize(
    ("query", "slug"),
    [
        ("which training pictures can I throw away", "data-diet"),
        ("electricity used by training", "energy"),
        ("worm that swims", "ncap"),
        ("make the model smaller than its bits", "quantization-survey"),
    ],
)
def test_search_by_meaning_needs_no_common_word(query: str, slug: str) -> None:
    assert slug in {entry.slug for entry in search(query, 5)}


@pytest.mark.parametrize("slug", SLUGS)
def test_a_paper_named_outright_comes_first(slug: str) -> None:
    assert search(slug, 1)[0].slug == slug
    assert search(paper(slug).public.upper(), 1)[0].slug == slug


def test_search_takes_odd_input() -> None:
    assert search("") == []
    assert len(search("network", 3)) == 3
    assert len(search("network", 1000)) <= 56
    with pytest.raises(ValueError, match="limit"):
        search("network", 0)
