"""The Brown corpus's tagged tokens, put back into running text.

A file holds a sentence a line, a token as `word/tag`; a line that begins with a tab, or follows an empty
one, begins a paragraph. Quotes are the tokens `` and '', single quotes a lone ', dashes --, and every ; ? !
stands twice.
"""

from __future__ import annotations

import itertools
import re

# While tokens are joined, typographic marks stand for the typed ones: no file of the corpus holds them.
_MARKS = {"``": "\u201c", "''": "\u201d", "--": "\u2014"}
_ASCII = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'"})
_STEPS = [
    (r"\*\*[a-z]+", ""),  # codes for symbols that no typewriter has
    (r"\*&?0", "\u00b0"),
    (r"``|''", '"'),  # inside a token: inches
    (r"(?<!\S)([;?!]) \1(?!\S)", r"\1"),  # each stands twice
    (r"(?<=\w\.) \.(?!\S)", ""),  # an abbreviation ends the sentence
    (r" +([,.;:?!)\]%\u201d\u2019])(?!\S)", r"\1"),
    (r"(?<![^\s(\[\u201c\u2018])([(\[\u201c\u2018]) +", r"\1"),
    (r" *\u2014 *", "\u2014"),
    (r"  +", " "),
]
_PATTERNS = [(re.compile(pattern), replacement) for pattern, replacement in _STEPS]
_LONE = re.compile(r"(?<!\S)'(?!\S)")


def read_document(content: str) -> str:
    """The text of a file: its paragraphs, one a line."""
    paragraphs: list[list[str]] = []
    fresh = True
    for line in content.splitlines():
        if not line.strip():
            fresh = True
            continue
        if fresh or line.startswith("\t"):
            paragraphs.append([])
        fresh = False
        paragraphs[-1].extend(token.rpartition("/")[0] for token in line.split())
    return "\n".join(filter(None, (running(words) for words in paragraphs)))


def running(words: list[str]) -> str:
    """The tokens of one paragraph as running text.

    >>> running("`` Why not ? ? '' -- so she asked -- `` It's Atlanta's ( old ) law ; ; '' .".split())
    '"Why not?"—so she asked—"It\\'s Atlanta\\'s (old) law;".'
    """
    text = " ".join([_MARKS.get(word, word) for word in words])
    quotes = itertools.cycle("\u2018\u2019")
    text = _LONE.sub(lambda _: next(quotes), text)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text.strip().translate(_ASCII)
