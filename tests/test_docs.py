"""Generated docs: blocks are renewed, the rest is left alone, stale files are found; our own are fresh."""

from pathlib import Path

import pytest

from neuropil import docs, papers
from neuropil.docs import Docs, DocsError, markdown
from neuropil.papers import catalog
from neuropil.report import Report, Row

METHOD = '''"""What it gives | the user.

>>> 1 + 1
2

The end.
"""

class GraNet:
    """Prunes and regrows."""

    density: float

    def __init__(self, density: float) -> None:
        self.density = density

def _hidden():
    """Not shown."""
'''
REPORT = Report(
    slug="granet",
    title="Sparse Training",
    claim="Regrowing helps | a lot.",
    rule="Holds if better.",
    verdict="partly",
    rows=(
        Row.of("GraNet", "accuracy", [0.5, 0.75]),
        Row.of("magnitude", "accuracy", [0.25, 0.5], baseline=True),
        Row.of("GraNet", "seconds", [3.0, 4.0], unit="s", higher_is_better=False),
    ),
    paper_says=("76.0 top-1 (Table 2)",),
    seeds=(0, 1),
    scale="default",
    versions={"torch": "2.13"},
    seconds=61.4,
    notes=("a note",),
    deviations=("a smaller net",),
)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Docs:
    """A source tree with one implemented, reproduced method."""
    monkeypatch.setattr(papers, "PACKAGE", tmp_path / "src" / "neuropil")
    (tmp_path / "pyproject.toml").touch()
    source = papers.paper("granet").source
    source.parent.mkdir(parents=True)
    source.write_text(METHOD)
    REPORT.save(tmp_path / "docs" / "results" / "granet.json")
    (tmp_path / "docs" / "results" / "granet.png").write_bytes(b"png")
    (tmp_path / "README.md").write_text(
        "Before.\n<!-- results:begin -->\nold\n<!-- results:end -->\nBetween.\n"
        "<!-- methods:begin -->\n<!-- methods:end -->\nAfter.\n"
    )
    (tmp_path / "docs" / "more.md").write_text(
        "<!-- result granet:begin -->\n<!-- result granet:end -->\n<!-- count:begin -->\n<!-- count:end -->\n"
    )
    return Docs(tmp_path)


def test_blocks_are_renewed_and_the_rest_is_left(tree: Docs) -> None:
    assert {path.name for path in tree.build()} == {"README.md", "more.md", "granet.md"}
    readme = (tree.root / "README.md").read_text()
    assert readme.startswith("Before.\n<!-- results:begin -->\n| paper |")
    assert "\nBetween.\n" in readme
    assert readme.endswith("<!-- methods:end -->\nAfter.\n")
    assert "old" not in readme.split("Between.")[0].splitlines()
    assert tree.build() == []
    assert tree.stale() == []


def test_the_results_table_puts_the_paper_beside_the_measured(tree: Docs) -> None:
    table = tree.block("results", tree.root)
    row = next(line for line in table.splitlines() if "Regrowing" in line)
    assert "[granet](docs/results/granet.png)" in row
    assert "Regrowing helps \\| a lot." in row
    assert "76.0 top-1 (Table 2)" in row
    assert "GraNet: 0.62 ± 0.18<br>magnitude (baseline): 0.38 ± 0.18" in row
    assert "**partly**" in row
    assert "3.50" not in row, "the first metric alone"
    assert "sample standard deviation" in table


def test_the_methods_table_has_every_paper_once(tree: Docs) -> None:
    rows = [line for line in tree.block("methods", tree.root / "docs").splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 56
    for entry, row in zip(catalog(), rows, strict=True):
        assert entry.title in row
        assert f"| {entry.family} | {entry.kind} | `{entry.address}` |" in row
        status = "reproduced: **partly**" if entry.slug == "granet" else "planned"
        assert row.endswith(f"| {status} |")
    assert sum("](methods/" in row for row in rows) == 1


def test_a_report_in_full(tree: Docs) -> None:
    text = tree.block("result granet", tree.root / "docs" / "methods")
    for part in ("Regrowing helps", "Holds if better.", "Verdict: partly", "- 76.0 top-1 (Table 2)",
                 "| GraNet | seconds | 3.50 ± 0.71 s |", "](../results/granet.png)", "a note",
                 "a smaller net", "over seeds 0, 1; 61 s in all; torch 2.13"):  # fmt: skip
        assert part in text, part
    assert "`neuropil reproduce milan`" in tree.block("result milan", tree.root)


def test_a_method_page_is_made_of_its_docstrings(tree: Docs) -> None:
    tree.build()
    page = (tree.root / "docs" / "methods" / "granet.md").read_text()
    assert "What it gives | the user.\n\n```python\n>>> 1 + 1\n2\n```\n\nThe end.\n" in page
    assert "class GraNet:\n    density: float\n    def __init__(self, density: float) -> None:\n```" in page
    assert "Not shown" not in page
    assert "arXiv 2106.10404" in page
    assert "**Verdict: partly.**" in page


def test_the_count(tree: Docs) -> None:
    expected = "56 papers in the catalog; 1 implemented; the claims of 1 re-run (1 partly).\n"
    assert tree.block("count", tree.root) == expected


def test_check_finds_what_is_stale(tree: Docs, capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main([], tree.root) == 0
    assert docs.main(["--check"], tree.root) == 0
    capsys.readouterr()
    page = tree.root / "docs" / "methods" / "granet.md"
    page.write_text(page.read_text() + "typed by hand")
    assert docs.main(["--check"], tree.root) == 1
    assert "stale: docs/methods/granet.md" in capsys.readouterr().err
    papers.paper("granet").source.unlink()
    assert docs.main([], tree.root) == 0
    assert "removed docs/methods/granet.md" in capsys.readouterr().out
    assert not page.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- results:begin -->\n", "stand once each"),
        ("<!-- results:end -->\n<!-- results:begin -->\n", "before its beginning"),
        ("<!-- count:begin -->\n<!-- count:end -->\n" * 2, "stand once each"),
        ("<!-- nonsense:begin -->\n<!-- nonsense:end -->\n", "'nonsense'"),
        ("<!-- result nobody:begin -->\n<!-- result nobody:end -->\n", "nobody"),
    ],
)
def test_broken_markers_are_refused(tree: Docs, text: str, message: str) -> None:
    (tree.root / "README.md").write_text(text)
    with pytest.raises((DocsError, papers.UnknownPaper), match=message):
        tree.build()


def test_a_doctest_at_the_end_is_closed() -> None:
    assert markdown("A.\n\n>>> 1\n1") == "A.\n\n```python\n>>> 1\n1\n```"


def test_our_own_docs_are_fresh() -> None:
    root = Path(docs.__file__).parents[2]
    assert [path.name for path in Docs(root).stale()] == [], "run `make docs`"
