"""What a command says, and where: answers to stdout, everything else to stderr.

A terminal gets tables cut to its width; a pipe gets plain text, aligned and never cut; `--json` gets
JSON alone. Text that came out of a model or a file is cleaned of control characters before it is shown,
so that no token can move the cursor.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

_answers: TextIO | None = None
_debug = False
PIECE = 32768


@contextlib.contextmanager
def answers_only() -> Iterator[None]:
    """While a command runs, only this module writes to stdout; a library's `print` goes to stderr.

    >>> with answers_only():
    ...     print("a warning of some library")
    ...     say("the answer")
    the answer
    """
    global _answers
    before, _answers = _answers, sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _answers = before


def console() -> Console:
    """The console of answers. In a pipe it is so wide that nothing is ever cut or wrapped."""
    stream = _answers or sys.stdout
    shown = Console(file=stream, highlight=False)
    return shown if shown.is_terminal else Console(file=stream, highlight=False, width=1_000_000)


def errors() -> Console:
    """The console of progress, hints and errors."""
    return Console(stderr=True, highlight=False)


def is_terminal() -> bool:
    return console().is_terminal


def say(text: str | Text = "", style: str | None = None) -> None:
    """One paragraph of the answer; `text` is never read as markup."""
    shown = Text(text) if isinstance(text, str) else text
    console().print(shown, style=style, soft_wrap=not is_terminal())


def note(text: str | Text, style: str | None = "dim") -> None:
    """A remark on stderr, beside the answer and not part of it."""
    shown = errors()
    shown.print(Text(text) if isinstance(text, str) else text, style=style, soft_wrap=not shown.is_terminal)


def hint(text: str) -> None:
    """What to do next: shown to a person at a terminal, not to a pipe."""
    if is_terminal():
        note(text)


def draw(shape: RenderableType) -> None:
    console().print(shape)


def clean(text: object, newlines: bool = False) -> str:
    """`text` without control characters: they are written out, so that they cannot act on the terminal.

    >>> clean("a\\x1b[31m\\n")
    'a\\\\x1b[31m\\\\n'
    """

    def shown(character: str) -> str:
        if character.isprintable() or (newlines and character == "\n"):
            return character
        return character.encode("unicode_escape").decode("ascii")

    return "".join(shown(character) for character in str(text))


def token(text: object) -> str:
    """A token as it is listed: its leading space dropped, a space or an empty token in quotes.

    >>> token(" dog"), token("\\n"), token(" ")
    ('dog', '\\\\n', '" "')
    """
    raw = clean(text)
    bare = raw.removeprefix(" ")
    return bare if bare.strip() else f'"{raw}"'


def tokens(texts: Sequence[object] | None, limit: int | None = None) -> str:
    return ", ".join(token(text) for text in (texts or [])[:limit])


def number(value: Any, digits: int = 2, signed: bool = False) -> str:
    """A number of fixed decimals, a dash where there is none; on a terminal with a true minus sign.

    >>> number(-0.4567), number(None), number(3.0, signed=True)
    ('-0.46', '–', '+3.00')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return _minus(f"{value:{'+' if signed else ''}.{digits}f}")


def _minus(text: str) -> str:
    return text.replace("-", "−") if is_terminal() else text


def share(part: int, whole: int) -> str:
    """A percentage.

    >>> share(1, 8), share(0, 0)
    ('12.5%', '–')
    """
    return f"{100 * part / whole:.1f}%" if whole else "–"


def plural(count: int, noun: str) -> str:
    """
    >>> plural(1, "neuron"), plural(46080, "neuron")
    ('1 neuron', '46,080 neurons')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def by_reason(left: Mapping[str, str]) -> dict[str, list[str]]:
    """Why -> the names of what was left for it.

    >>> by_reason({"a": "too small", "b": "no data", "c": "too small"})
    {'too small': ['a', 'c'], 'no data': ['b']}
    """
    reasons: dict[str, list[str]] = {}
    for name, why in left.items():
        reasons.setdefault(why, []).append(name)
    return reasons


def first(names: Sequence[str]) -> str:
    """
    >>> first(["a"]), first(["a", "c"])
    ('a', 'a …')
    """
    return names[0] + (" …" if len(names) > 1 else "")


def cell(value: Any) -> str:
    """Any value of a table in one line."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _minus(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(token(item) if isinstance(item, str) else cell(item) for item in value)
    return clean(value)


@dataclass(frozen=True)
class Column:
    """A column of a listing: what its head says, and how it stands."""

    title: str
    justify: Literal["left", "right"] = "left"
    style: str = ""
    give: bool = False  # whether it gives way (is cut) when the terminal is narrow


def listing(columns: Sequence[Column], rows: Iterable[Sequence[str | Text]]) -> None:
    """A table: cut to the terminal's width, or aligned and whole in a pipe."""
    if not is_terminal():
        _aligned(columns, [[str(item) for item in row] for row in rows])
        return
    lines = [[item if isinstance(item, Text) else Text(item) for item in row] for row in rows]
    widths = [
        max([cell_len(column.title), *(line[place].cell_len for line in lines)]) for place, column in enumerate(columns)
    ]
    fitted = fit(widths, [column.give for column in columns], console().width)
    if fitted is None:
        _records(columns, lines)
        return
    table = Table(box=None, header_style="bold dim", pad_edge=False, padding=(0, 2, 0, 0))
    for column, width in zip(columns, fitted, strict=True):
        table.add_column(
            Text(column.title),
            justify=column.justify,
            style=column.style,
            width=width,
            no_wrap=True,
            overflow="ellipsis",
        )
    for line in lines:
        table.add_row(*line)
    draw(table)


GAP, NARROWEST = 2, 8


def fit(widths: Sequence[int], gives: Sequence[bool], room: int) -> list[int] | None:
    """Column widths that fit into `room`: those that give are cut first, then the widest; None if none can be.

    >>> fit([5, 30, 60], [False, False, True], 60)
    [5, 30, 21]
    >>> fit([30, 30, 30], [False, False, False], 20) is None
    True
    """
    fitted = list(widths)
    excess = sum(fitted) + GAP * (len(fitted) - 1) - room
    while excess > 0:
        cuttable = [i for i, width in enumerate(fitted) if width > NARROWEST]
        if not cuttable:
            return None
        widest = max(cuttable, key=lambda i: (gives[i], fitted[i]))
        fitted[widest] -= 1
        excess -= 1
    return fitted


def _records(columns: Sequence[Column], lines: Sequence[Sequence[Text]]) -> None:
    """Too many columns for the terminal: a block a row, a line a column."""
    for number, line in enumerate(lines):
        if number:
            say()
        pairs({column.title: text for column, text in zip(columns, line, strict=True)})


def _aligned(columns: Sequence[Column], lines: Sequence[Sequence[str]]) -> None:
    heads = [column.title for column in columns]
    widths = [max(cell_len(text) for text in texts) for texts in zip(heads, *lines, strict=True)]
    for line in [heads, *lines]:
        padded = []
        for column, width, text in zip(columns, widths, line, strict=True):
            space = " " * (width - cell_len(text))
            padded.append(space + text if column.justify == "right" else text + space)
        write("  ".join(padded).rstrip() + "\n")


def pairs(rows: Mapping[str, str | Text]) -> None:
    """Names and values in two columns."""
    width = max((len(name) for name in rows), default=0)
    for name, value in rows.items():
        say(Text.assemble((f"{name:<{width}}  ", "dim"), value))


def write(text: str) -> None:
    """`text` as it is, in pieces: some kernels tell of a closed pipe only at the next piece."""
    stream = _answers or sys.stdout
    for start in range(0, len(text), PIECE):
        stream.write(text[start : start + PIECE])


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return _plain(value.tolist())
    return str(value)


def as_json(value: Any) -> None:
    """`value` as JSON; numbers that JSON has not (NaN, infinity) become null."""
    stream = _answers or sys.stdout
    unicode = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")
    write(json.dumps(_plain(value), ensure_ascii=not unicode, indent=2, allow_nan=False) + "\n")


def debug(on: bool) -> None:
    """Tracebacks and the libraries' warnings from now on, or no longer."""
    global _debug
    _debug = on


def debugging() -> bool:
    return _debug or os.environ.get("NEUROPIL_DEBUG", "") not in ("", "0")
