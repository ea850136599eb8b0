"""What every reproduction is run by: the check of its convention, progress, seeding, resuming, drawing."""

from __future__ import annotations

import hashlib
import io
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from neuropil.errors import NeuropilError
from neuropil.papers import PACKAGE, paper
from neuropil.report import (
    SCALES,
    Measurement,
    Report,
    ReportError,
    Scale,
    aggregate,
    decode_number,
    encode,
    versions,
    write_atomically,
)

Item = TypeVar("Item")


class ReproductionError(NeuropilError):
    """A reproduction that does not exist, lacks part of the convention, or was asked for the impossible."""

    exit_code = 13


class Meter:
    """How far a measurement has got: call it with a fraction and a word, or wrap a loop in `track`.

    >>> quiet = Meter()
    >>> quiet(0.5, "training")
    >>> sum(quiet.track([1, 2, 3], "adding"))
    6
    """

    def __init__(self, progress: Progress | None = None, task: TaskID | None = None, prefix: str = "") -> None:
        self._progress, self._task, self._prefix = progress, task, prefix

    def __call__(self, fraction: float, note: str = "") -> None:
        """Say that `fraction` (0 to 1) of this seed is done, and what is going on."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=fraction, description=f"{self._prefix} {note}")

    def track(self, items: Iterable[Item], note: str = "", begin: float = 0.0, end: float = 1.0) -> Iterator[Item]:
        """Go through `items`, moving from fraction `begin` to `end`."""
        items = list(items)
        for done, item in enumerate(items):
            self(begin + (end - begin) * done / len(items), note)
            yield item
        self(end, note)


@dataclass(frozen=True)
class Reproduction:
    """A reproduction module, checked, with its optional parts filled in."""

    slug: str
    module: ModuleType

    def __post_init__(self) -> None:
        wanted = ("CLAIM", "RULE", "PAPER_SAYS", "SEEDS", "SETTINGS", "measure", "verdict", "run")
        missing = [name for name in wanted if not hasattr(self.module, name)]
        if missing:
            raise ReproductionError(f"{self.module.__name__} lacks {', '.join(missing)}; see CONTRIBUTING.md.")
        for table in ("SEEDS", "SETTINGS"):
            absent = [scale for scale in SCALES if scale not in getattr(self.module, table)]
            if absent:
                raise ReproductionError(f"{self.module.__name__}.{table} lacks the scale {', '.join(absent)}.")

    def seeds(self, scale: Scale) -> tuple[int, ...]:
        """The seeds of this scale."""
        return tuple(self.module.SEEDS[scale])

    def settings(self, scale: Scale) -> dict[str, Any]:
        """The settings of this scale."""
        return dict(self.module.SETTINGS[scale])

    def png(self, report: Report) -> bytes:
        """The figure, as PNG bytes that depend on nothing but the report (no date, no program name)."""
        from neuropil.reproduce import figures

        figure = getattr(self.module, "figure", figures.dots)(report)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
        return stream.getvalue()


def runner(name: str) -> Callable[..., Report]:
    """The `run` of a reproduction module: `run = runner(__name__)` at its end.

    `run(scale, seed)` measures one seed, `run(scale)` all of the scale's seeds. It keeps and writes nothing;
    `neuropil.reproduce.reproduce` does.
    """

    def run(scale: Scale = "smoke", seed: int | None = None) -> Report:
        reproduction = Reproduction(name.rpartition(".")[2].replace("_", "-"), sys.modules[name])
        seeds = reproduction.seeds(scale) if seed is None else (seed,)
        return measure_all(reproduction, scale, seeds)

    return run


def measure_all(
    reproduction: Reproduction,
    scale: Scale,
    seeds: Sequence[int],
    work: Path | None = None,
    fresh: bool = False,
) -> Report:
    """Measure every seed, or take it from `work`, where it was measured before; put the report together."""
    module = reproduction.module
    runs: list[list[Measurement]] = []
    seconds = 0.0
    with _bar() as bar:
        task = bar.add_task(reproduction.slug, total=1.0)
        for seed in seeds:
            meter = Meter(bar, task, f"{reproduction.slug}, seed {seed}:")
            meter(0.0)
            measured, took = _one_seed(reproduction, scale, seed, meter, work, fresh)
            runs.append(measured)
            seconds += took
    rows = tuple(aggregate(runs))
    return Report(
        slug=reproduction.slug,
        title=paper(reproduction.slug).title,
        claim=module.CLAIM,
        rule=module.RULE,
        verdict=module.verdict(rows),
        rows=rows,
        paper_says=tuple(module.PAPER_SAYS),
        seeds=tuple(seeds),
        scale=scale,
        settings=reproduction.settings(scale),
        versions=versions(),
        seconds=round(seconds, 1),
        notes=tuple(getattr(module, "NOTES", ())),
        deviations=tuple(getattr(module, "DEVIATIONS", ())),
    )


def work_folder() -> Path:
    """Where seeds in hand are kept: `reproduce` in the cache folder (`NEUROPIL_CACHE`)."""
    from neuropil.models.assets import cache_dir

    return cache_dir() / "reproduce"


def _one_seed(
    reproduction: Reproduction, scale: Scale, seed: int, meter: Meter, work: Path | None, fresh: bool
) -> tuple[list[Measurement], float]:
    path = work / reproduction.slug / scale / f"{_digest(reproduction, scale)}-{seed}.json" if work else None
    if path is not None and not fresh and (kept := _kept(path)) is not None:
        return kept
    start = time.perf_counter()
    with _seeded(seed):
        measured = list(reproduction.module.measure(scale, seed, meter))
    took = time.perf_counter() - start
    if path is not None:
        data = {"measured": [asdict(entry) for entry in measured], "seconds": took}
        write_atomically(path, json.dumps(encode(data), allow_nan=False).encode())
    return measured, took


def _kept(path: Path) -> tuple[list[Measurement], float] | None:
    """A seed measured before; None if there is none or its file is damaged, so that it is measured again."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        entries = [{**entry, "value": decode_number(entry["value"])} for entry in data["measured"]]
        return [Measurement(**entry) for entry in entries], decode_number(data["seconds"])
    except (OSError, ValueError, KeyError, TypeError, ReportError):
        return None


def _digest(reproduction: Reproduction, scale: Scale) -> str:
    """Of all that can change a measured number: settings, versions, and the package's code.

    Faces (the command line, the explorer) and other papers' reproductions cannot, and are left out.
    """
    seen = hashlib.sha256(json.dumps([reproduction.settings(scale), versions()], default=str).encode())
    own = Path(reproduction.module.__file__ or "")
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        if room not in {"cli", "cli.py", "explorer", "reproduce", "docs.py"}:
            seen.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    seen.update(own.read_bytes() + Path(__file__).read_bytes())
    return seen.hexdigest()[:16]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators of Python, NumPy and torch at this seed, and as they were before afterwards."""
    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state()  # noqa: NPY002 - what is saved is the legacy state
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002


def _bar() -> Progress:
    """Progress on stderr, only where a person sees it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
