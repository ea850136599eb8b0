"""`neuropil reproduce`: the papers' claims, each run again beside its baseline."""

from __future__ import annotations

import json
from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from neuropil.cli import output
from neuropil.cli.app import AsJson, command, interruptible
from neuropil.cli.output import Column
from neuropil.cli.papers import PANEL
from neuropil.errors import NeuropilError

if TYPE_CHECKING:
    from neuropil.report import Report


class Scale(StrEnum):
    """How much is run: seconds, minutes on two cores, or the paper's own setting."""

    smoke = "smoke"
    default = "default"
    paper = "paper"


@command(
    "reproduce",
    PANEL,
    "neuropil reproduce                                   what can be reproduced",
    "neuropil reproduce neuron-decoding                   in minutes, on two cores",
    "neuropil reproduce neuron-decoding --scale smoke     in seconds: does it run?",
    "neuropil reproduce --all                             every one; renews docs/results",
)
def reproduce(
    slug: Annotated[str | None, typer.Argument(help="The paper's slug.", show_default="list them")] = None,
    scale: Annotated[Scale, typer.Option(help="How much is run.")] = Scale.default,
    everything: Annotated[bool, typer.Option("--all", help="Run every reproduction there is.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what is already there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a paper's central claim again, against its baseline, and say whether it holds."""
    if slug and everything:
        raise typer.BadParameter("give a slug or --all, not both.", param_hint="SLUG")
    from neuropil import reproduce as harness

    if not slug and not everything:
        return _available(as_json)
    reports: list[Report] = []
    failed = 0
    with interruptible(lambda: "Stopped; every finished seed is kept. The same command goes on from there."):
        runs: Iterable[tuple[str, Report | Exception]]
        if everything:
            runs = harness.run_all(scale.value, fresh=fresh)
        else:
            runs = [(str(slug), harness.reproduce(str(slug), scale=scale.value, fresh=fresh))]
        for name, outcome in runs:
            if isinstance(outcome, Exception):
                failed += 1
                output.note(f"{name}: {type(outcome).__name__}: {outcome}", style="red")
                continue
            reports.append(outcome)
            if not as_json:
                _shown(outcome)
    if as_json:
        facts = [json.loads(report.to_json()) for report in reports]
        output.as_json(facts if everything else facts[0])
    if failed:
        raise NeuropilError(f"{output.plural(failed, 'reproduction')} did not finish; see above.")


def _available(as_json: bool) -> None:
    from neuropil import reproduce as harness
    from neuropil.papers import paper

    found = [paper(slug) for slug in harness.available()]
    if as_json:
        return output.as_json([{"slug": one.slug, "status": one.status, "claim": one.claim} for one in found])
    columns = [Column("paper", style="bold cyan"), Column("status"), Column("claim", give=True)]
    output.listing(columns, [[one.slug, one.status, one.claim] for one in found])
    if found:
        output.hint(f"\nneuropil reproduce {found[0].slug}")


def _shown(report: Report) -> None:
    """The report; in a pipe without its frames, which would be as wide as the pipe."""
    if output.is_terminal():
        return output.draw(report)
    output.say(f"{report.title} ({report.slug})\nClaim: {report.claim}\nRule: {report.rule}")
    for said in report.paper_says:
        output.say(f"The paper says: {said}")
    columns = [Column("metric"), Column("variant"), Column("measured", "right")]
    output.listing(
        columns,
        [[row.metric, row.name + (" (baseline)" if row.baseline else ""), row.text] for row in report.rows],
    )
    for text in (*report.notes, *report.deviations):
        output.say(f"Note: {text}")
    output.say(f"Verdict: {report.verdict}\n")
