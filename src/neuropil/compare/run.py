"""Runs the comparison: every arm on every subject and seed, each measured beside the model it was made from."""

from __future__ import annotations

import copy
import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuropil.compare.arms import ARMS, Arm, size
from neuropil.compare.subjects import SUBJECTS, Subject, subject
from neuropil.models import save_packed
from neuropil.models.assets import cache_dir
from neuropil.packed import packed_modules, unpack

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Outcome:
    """One arm on one subject with one seed.

    quality     accuracy in percent, or perplexity
    bytes       of all that is kept of the model (a peer's: as torch saves it)
    speed       its rate over that of the float32 model, both measured one after the other; NaN where it failed
    memory      peak bytes of a process that loads it and generates 16 tokens, over those of one that has only
                imported neuropil; None where that was not measured
    seconds     it took to make
    threads     of the processor that it was made and measured with
    """

    subject: str
    arm: str
    seed: int
    quality: float
    bytes: int
    speed: float
    memory: int | None
    seconds: float
    threads: int

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.subject, self.arm, self.seed)


def run(
    subjects: Sequence[str] = SUBJECTS,
    arms: Iterable[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    scale: str = "default",
    fresh: bool = False,
) -> Iterator[Outcome]:
    """Every outcome, as it comes. What an earlier run measured at this scale is taken from the cache, unless `fresh`.

    On the language model, an arm that uses no calibration gives the same for every seed and is run once.
    """
    wanted = [arm for arm in ARMS if arms is None or arm.name in set(arms)]
    kept = _Kept(cache_dir() / "compare" / f"outcomes-{scale}.jsonl", fresh)
    for name in subjects:
        for seed in seeds:
            todo = [arm for arm in wanted if name in arm.on and (seed == seeds[0] or arm.seeded(name))]
            known = [kept.found[(name, arm.name, seed)] for arm in todo if (name, arm.name, seed) in kept.found]
            yield from known
            todo = [arm for arm in todo if (name, arm.name, seed) not in kept.found]
            made = subject(name, seed, scale) if todo else None
            for arm in todo:
                assert made is not None
                yield kept.add(measure(arm, made))
                gc.collect()


class _Kept:
    """Outcomes in a file, a line each; a line that was cut off is left out."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path = path
        self.found: dict[tuple[str, str, int], Outcome] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                outcome = Outcome(**json.loads(line))
            except (ValueError, TypeError):
                continue
            self.found[outcome.key] = outcome

    def add(self, outcome: Outcome) -> Outcome:
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        self.found[outcome.key] = outcome
        return outcome


def measure(arm: Arm, subject: Subject) -> Outcome:
    """Make the small model, and measure it beside the original."""
    torch.manual_seed(subject.seed)
    started = time.perf_counter()
    model = arm.make(subject)
    seconds = time.perf_counter() - started
    kept = size(model) if arm.stored is None else arm.stored()
    memory = _memory(arm, subject, model) if subject.language and subject.seed == SEEDS[0] else None
    runs = _as_it_runs(arm, subject, model)
    quality = subject.quality(runs)
    speed = subject.rate(runs) / subject.rate(subject.model) if arm.stored is None else math.nan
    threads = torch.get_num_threads()
    return Outcome(subject.name, arm.name, subject.seed, quality, kept, speed, memory, seconds, threads)


def _as_it_runs(arm: Arm, subject: Subject, model: nn.Module) -> nn.Module:
    """A language model in bfloat16 where there are kernels for it; else with its weights made dense once."""
    packed = any(True for _ in packed_modules(model))
    if not packed:
        return model
    model = copy.deepcopy(model)
    if arm.kernel and subject.language:
        return model.to(torch.bfloat16)
    unpack(model)
    return model


_CHILD = """
import resource, sys, torch
from neuropil import evaluate, models
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source, dtype = sys.argv[1], getattr(torch, sys.argv[2])
model = models.load(source).module(dtype)
evaluate.generation_rate(model, torch.arange(32)[None], 16, 1)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base))
"""


def _memory(arm: Arm, subject: Subject, model: nn.Module) -> int | None:
    """Peak memory of a process that loads the model from disk and generates; None for what is not kept on disk."""
    if arm.peer or arm.kind == "run time":
        return None
    with tempfile.TemporaryDirectory() as folder:
        if arm.kind == "original":
            source, dtype = subject.name, arm.name
        else:
            source = str(save_packed(model, Path(folder) / "model", tokenizer=subject.tokenizer))
            dtype = "bfloat16" if arm.kernel else "float32"
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, source, dtype], capture_output=True, text=True, check=False
        )
    return int(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.strip() else None


@dataclass(frozen=True)
class Line:
    """One arm on one subject over all seeds: means, and the sample standard deviation of quality."""

    subject: str
    arm: str
    kind: str
    peer: bool
    seeds: int
    quality: float
    spread: float | None
    bytes: int
    share: float  # of the original's bytes
    speed: float
    memory: int | None
    threads: int
    pareto: bool  # no other arm is both smaller and better


def lines(outcomes: Sequence[Outcome]) -> list[Line]:
    """The outcomes summed up, subject by subject, arms in their order."""
    known = {arm.name: arm for arm in ARMS}
    found: list[Line] = []
    for name in SUBJECTS:
        groups: dict[str, list[Outcome]] = {}
        for outcome in outcomes:
            if outcome.subject == name:
                groups.setdefault(outcome.arm, []).append(outcome)
        if "float32" not in groups:
            continue
        original = groups["float32"][0].bytes
        made = [_line(known[arm], groups[arm], original) for arm in known if arm in groups]
        better = 1 if name != "smollm2" else -1
        found += [_marked(line, made, better) for line in made]
    return found


def _line(arm: Arm, group: list[Outcome], original: int) -> Line:
    values = torch.tensor([o.quality for o in group], dtype=torch.float64)
    spread = float(values.std()) if len(group) > 1 else None
    size_ = round(sum(o.bytes for o in group) / len(group))
    speed = sum(o.speed for o in group) / len(group)
    memory = next((o.memory for o in group if o.memory is not None), None)
    return Line(
        group[0].subject, arm.name, arm.kind, arm.peer, len(group), float(values.mean()), spread, size_,
        size_ / original, speed, memory, group[0].threads, False,
    )  # fmt: skip


def _marked(line: Line, others: Sequence[Line], better: int) -> Line:
    def beats(other: Line) -> bool:
        smaller, good = other.bytes <= line.bytes, better * (other.quality - line.quality) >= 0
        return smaller and good and (other.bytes < line.bytes or other.quality != line.quality)

    alive = math.isfinite(line.quality) and not any(beats(other) for other in others if other is not line)
    return Line(**{**asdict(line), "pareto": alive})


def as_json(outcomes: Sequence[Outcome], scale: str) -> dict[str, Any]:
    """What is kept in docs/results."""
    return {"format": "neuropil.compare", "version": 1, "scale": scale, "outcomes": [asdict(o) for o in outcomes]}
