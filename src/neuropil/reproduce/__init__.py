"""The published methods' claims, each re-run against its natural baseline: one file a paper.

A reproduction is a module named after its paper (`neuropil/reproduce/neuron_decoding.py`) that says

- `CLAIM`, `RULE`: the claim, and the rule that turns numbers into a verdict; a sentence each, written first;
- `PAPER_SAYS`: the paper's figures, as strings; `DEVIATIONS`, `NOTES`: optional strings;
- `SETTINGS`: scale -> dictionary of what changes from scale to scale; `SEEDS`: scale -> tuple of seeds;
- `measure(scale, seed, progress) -> list[Measurement]`: one seed's numbers;
- `verdict(rows) -> str`: a pure function of the rows, so that it is tested without a run;
- `figure(report) -> Figure`: optional; `neuropil.reproduce.figures.dots` draws where it is absent;
- `run = runner(__name__)`: gives the module its `run(scale, seed) -> Report`.

This package does the rest: seeding, progress, resuming, adding up, and writing JSON and PNG.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from neuropil.papers import paper, results_folder
from neuropil.report import SCALES, Report, Scale, write_atomically
from neuropil.reproduce.harness import (
    Meter,
    Reproduction,
    ReproductionError,
    measure_all,
    runner,
    work_folder,
)

__all__ = [
    "Meter",
    "Reproduction",
    "ReproductionError",
    "available",
    "figure_of",
    "load",
    "reproduce",
    "run_all",
    "runner",
]

# Modules of this package that are not reproductions; nor are those whose name begins with an underscore.
_MACHINERY = {"harness", "figures"}


def available() -> list[str]:
    """Slugs of the papers whose claim can be re-run, sorted."""
    names = {entry.name for entry in pkgutil.iter_modules(__path__) if entry.name[0] != "_"} - _MACHINERY
    return sorted(name.replace("_", "-") for name in names)


def load(slug: str) -> Reproduction:
    """The reproduction module of a paper, checked against the convention above.

    Raises `UnknownPaper` for a slug that is not in the catalog, `ReproductionError` where there is no module
    or it lacks something.
    """
    paper(slug)
    name = slug.replace("-", "_")
    if slug not in available():
        known = ", ".join(available()) or "none"
        raise ReproductionError(
            f"The claim of {slug!r} cannot be re-run yet: there is no neuropil/reproduce/{name}.py. There are: {known}."
        )
    return Reproduction(slug, importlib.import_module(f"{__name__}.{name}"))


def reproduce(
    slug: str,
    scale: Scale = "default",
    seeds: Sequence[int] | None = None,
    out: Path | str | None = None,
    *,
    fresh: bool = False,
) -> Report:
    """Re-run a paper's claim; write `SLUG.json` and `SLUG.png`; return the report.

    Every seed that is done is kept in the work folder, so a run that is stopped goes on where it was when it
    is called again, and a finished one is not repeated unless the package's code, the versions or the
    settings changed, or `fresh` is true.

    `out` defaults to docs/results for the scales `default` and `paper` with their own seeds, and to the work
    folder otherwise: docs/results holds only what the plain command gives anyone. Only a `default` result is
    called `SLUG.json`; the other scales' carry their name (`SLUG.smoke.json`), so none ever overwrites
    another.
    """
    if scale not in SCALES:
        raise ReproductionError(f"Scale {scale!r}; expected one of {', '.join(SCALES)}.")
    reproduction = load(slug)
    chosen = reproduction.seeds(scale) if seeds is None else tuple(seeds)
    if not chosen or len(set(chosen)) != len(chosen):
        raise ReproductionError(f"Seeds {chosen}; expected at least one and each once.")
    report = measure_all(reproduction, scale, chosen, work=work_folder(), fresh=fresh)
    plain = seeds is None and scale != "smoke"
    folder = Path(out) if out is not None else (results_folder() if plain else None) or work_folder() / "results"
    _write(reproduction, report, folder)
    return report


def run_all(
    scale: Scale = "default", out: Path | str | None = None, *, fresh: bool = False
) -> Iterator[tuple[str, Report | Exception]]:
    """Re-run every claim that can be; yields each slug with its report, or with the error that stopped it."""
    for slug in available():
        try:
            yield slug, reproduce(slug, scale, out=out, fresh=fresh)
        except Exception as error:  # one broken reproduction must not stop the others
            yield slug, error


def figure_of(report: Report) -> bytes:
    """The report's figure as PNG bytes: the reproduction's own, or plain dots with error bars."""
    return load(report.slug).png(report)


def _write(reproduction: Reproduction, report: Report, folder: Path) -> None:
    name = report.slug if report.scale == "default" else f"{report.slug}.{report.scale}"
    # The picture first: a JSON file never stands without its figure.
    write_atomically(folder / f"{name}.png", reproduction.png(report))
    report.save(folder / f"{name}.json")
