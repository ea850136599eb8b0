"""`neuropil papers`: the catalog, listed or searched by meaning, or one paper whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from neuropil.cli import output
from neuropil.cli.app import AsJson, command
from neuropil.cli.output import Column

if TYPE_CHECKING:
    from neuropil.papers import Paper

PANEL = "The papers"


@command(
    "papers",
    PANEL,
    "neuropil papers                             all 56",
    "neuropil papers prune while training        the nearest in meaning",
    "neuropil papers neuron-decoding             one of them whole",
)
def papers(
    words: Annotated[
        list[str] | None, typer.Argument(help="What you look for, or a paper's slug.", show_default="all")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Papers listed by a search.")] = 8,
    as_json: AsJson = False,
) -> None:
    """List the papers whose methods neuropil carries, and how far each has got."""
    from neuropil.papers import catalog, search

    asked = " ".join(words or [])
    if not asked.strip():
        found = list(catalog())
    else:
        found = [paper for paper in catalog() if paper.slug == asked] or search(asked, limit=limit)
    if as_json:
        return output.as_json([_facts(paper) for paper in found])
    if not found:
        return output.note(f"No paper speaks of {asked!r}. `neuropil papers` lists all.")
    if len(found) == 1 and found[0].slug == asked:
        return _whole(found[0])
    columns = [Column("paper", style="bold cyan"), Column("family"), Column("year"), Column("status")]
    rows: list[list[str | Text]] = [
        [paper.slug, paper.family, str(paper.year), _status(paper), paper.title] for paper in found
    ]
    output.listing([*columns, Column("title", give=True)], rows)
    done = sum(paper.status != "planned" for paper in found)
    output.hint(f"\n{output.plural(len(found), 'paper')}, {done} implemented.")


def _status(paper: Paper) -> Text:
    status = paper.status
    style = "dim" if status == "planned" else "green" if status.endswith(": holds") else ""
    return Text(status, style=style)


def _facts(paper: Paper) -> dict[str, Any]:
    return {
        "slug": paper.slug,
        "title": paper.title,
        "authors": list(paper.authors),
        "year": paper.year,
        "family": paper.family,
        "kind": paper.kind,
        "address": paper.address,
        "claim": paper.claim,
        "status": paper.status,
        "url": paper.url,
    }


def _whole(paper: Paper) -> None:
    output.say(paper.title, style="bold")
    output.say(paper.claim)
    output.say()
    method = Text.assemble((paper.address, "cyan"), f"  ({paper.kind})")
    output.pairs({"status": _status(paper), "method": method, "paper": paper.citation, "read": paper.url})
    if paper.status != "planned":
        output.hint(f"\nneuropil reproduce {paper.slug}")
