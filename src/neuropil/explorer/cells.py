"""Rows of a table as cells that a template can draw without thinking."""

import re
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from neuropil.explorer.facts import Facts
from neuropil.explorer.view import View
from neuropil.explorer.words import number, shown

ADDRESS = re.compile(r"\d+:\d+")
TOKENS_SHOWN = 6
VERDICTS = {"promotes": "promotes", "suppresses": "suppresses", "no effect": "none"}
WORDS = ("label", "token")  # text columns that hold pieces of a vocabulary


@dataclass(frozen=True)
class Cell:
    kind: str  # neuron | tokens | images | values | verdict | flag | signed | number | word | text | empty
    text: str = ""
    items: list[str] = field(default_factory=list)
    share: float = 0.0  # of the column's reach, -1..1
    on: bool = False


@dataclass(frozen=True)
class Head:
    name: str
    kind: str  # "number" | "text"
    link: str | None
    sort: str  # aria-sort


def heads(table: pa.Table, view: View) -> list[Head]:
    made = []
    for f in table.schema:
        nested = pa.types.is_nested(f.type)
        numeric = pa.types.is_integer(f.type) or pa.types.is_floating(f.type) or pa.types.is_decimal(f.type)
        made.append(
            Head(
                f.name,
                "number" if numeric else "text",
                None if nested else view.sort_link(f.name),
                view.aria_sort(f.name),
            )
        )
    return made


def cells(table: pa.Table, facts: Facts) -> list[list[Cell]]:
    """Every value of the table as a cell, row by row."""
    columns = [
        [_cell(f.name, value, facts) for value in table.column(i).to_pylist()] for i, f in enumerate(table.schema)
    ]
    if {"neuron", "exemplar_images"} <= set(table.column_names) and facts.images:
        addresses = table.column("neuron").to_pylist()
        columns[table.column_names.index("exemplar_images")] = [
            _images(address, images)
            for address, images in zip(addresses, table.column("exemplar_images").to_pylist(), strict=True)
        ]
    return [list(row) for row in zip(*columns, strict=True)]


def _images(address: Any, images: Any) -> Cell:
    """The first pictures that drive a neuron, with their regions, as addresses of pictures."""
    if not images or not isinstance(address, str) or not ADDRESS.fullmatch(address):
        return Cell("empty")
    return Cell("images", f"/neuron/{address}/exemplars.png")


def _cell(name: str, value: Any, facts: Facts) -> Cell:
    if value is None or value == "":
        return Cell("empty")
    if name == "neuron" and isinstance(value, str) and ADDRESS.fullmatch(value):
        return Cell("neuron", value)
    if isinstance(value, bool):
        return Cell("flag", "yes" if value else "no", on=value)
    if isinstance(value, list):
        if value and isinstance(value[0], str):
            return Cell("tokens", items=[shown(v) for v in value[:TOKENS_SHOWN]])
        return Cell("values", ", ".join(number(v) for v in value[:4]) + (" …" if len(value) > 4 else ""))
    if name == "verdict" and value in VERDICTS:
        return Cell("verdict", value, items=[VERDICTS[value]])
    if isinstance(value, float) and name in facts.columns and facts.signed(name):
        return Cell("signed", number(value), share=max(-1.0, min(1.0, value / facts.scale(name).reach)))
    if isinstance(value, int | float):
        return Cell("number", number(value))
    if isinstance(value, str) and name.endswith(WORDS):
        return Cell("word", shown(value))
    return Cell("text", str(value)[:500])
