"""Which architectures of `transformers` the neurons of can be found in, tried on every one.

Each model type is built at a tiny configuration with random weights. It passes if sites are found and, at every site
(at most a few of each kind in large models):

- recomputing the activation from the weights that the site says it reads gives what `capture` saw;
- clamping one neuron changes the model's output;
- afterwards the output is what it was, bit for bit.

A model type is out of scope only where it has no layer of neurons at all or cannot be built here, and says why.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuropil import _tiny
from neuropil.errors import NoNeurons
from neuropil.neurons import Neuron, Site, activation, capture, capture_inputs, clamp, find_sites

MAPPINGS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
TIMEOUT = 90  # seconds a model type


@dataclass(frozen=True)
class Row:
    """What was found for one model type."""

    model_type: str
    mapping: str
    verdict: str  # "pass" | "fail" | "out of scope"
    reason: str = ""
    sites: int = 0
    kinds: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Coverage:
    """The verdicts for all model types tried.

    >>> rows = (Row("llama", "causal-lm", "pass", sites=2), Row("mamba", "causal-lm", "out of scope", "no MLP"))
    >>> Coverage(rows, "5.0").count("pass")
    1
    """

    rows: tuple[Row, ...]
    transformers: str

    def count(self, verdict: str, mapping: str | None = None) -> int:
        """How many model types have this verdict."""
        return sum(r.verdict == verdict and mapping in (None, r.mapping) for r in self.rows)

    def to_json(self) -> str:
        """All rows and the counts, as JSON."""
        mappings = list(dict.fromkeys(r.mapping for r in self.rows))
        verdicts = ("pass", "fail", "out of scope")
        counts = {m: {v: self.count(v, m) for v in verdicts} for m in mappings}
        rows = [asdict(r) for r in self.rows]
        return json.dumps({"transformers": self.transformers, "counts": counts, "rows": rows}, indent=1)

    def markdown(self) -> str:
        """The page of the documentation."""
        lines = [
            "# Architectures whose neurons are found",
            "",
            "Written by `neuropil coverage --write docs`; do not edit. Each model type of transformers "
            f"{self.transformers} was built at a tiny configuration with random weights. It passes if layers of "
            "neurons are found, if recomputing their activation from the weights they are said to read gives what "
            "`capture` saw, if clamping one neuron of each changes the output, and if the model is the same "
            "afterwards, bit for bit.",
            "",
            "| task | pass | fail | out of scope |",
            "|---|---:|---:|---:|",
        ]
        mappings = list(dict.fromkeys(r.mapping for r in self.rows))
        verdicts = ("pass", "fail", "out of scope")
        lines += [f"| {m} | " + " | ".join(str(self.count(v, m)) for v in verdicts) + " |" for m in mappings]
        for verdict, title in (("fail", "Fail"), ("out of scope", "Out of scope")):
            chosen = [r for r in self.rows if r.verdict == verdict]
            if chosen:
                lines += ["", f"## {title}", "", "| model type | task | reason |", "|---|---|---|"]
                lines += [f"| {r.model_type} | {r.mapping} | {r.reason.replace('|', '/')} |" for r in chosen]
        lines += ["", "## Pass", "", "| model type | task | sites | kinds |", "|---|---|---:|---|"]
        lines += [f"| {r.model_type} | {r.mapping} | {r.sites} | {r.kinds} |" for r in self.rows if r.verdict == "pass"]
        return "\n".join(lines) + "\n"

    def table(self) -> Any:
        """A rich table: the counts, and every model type that does not pass."""
        from rich.table import Table

        table = Table(title=f"neurons found in the model types of transformers {self.transformers}")
        for column in ("model type", "task", "verdict", "reason"):
            table.add_column(column, overflow="fold")
        colours = {"fail": "red", "out of scope": "yellow", "pass": "green"}
        for r in self.rows:
            if r.verdict != "pass":
                table.add_row(r.model_type, r.mapping, f"[{colours[r.verdict]}]{r.verdict}", r.reason)
        for m in dict.fromkeys(r.mapping for r in self.rows):
            n = [self.count(v, m) for v in ("pass", "fail", "out of scope")]
            table.add_row(f"all {sum(n)}", m, f"{n[0]} pass", f"{n[1]} fail, {n[2]} out of scope")
        return table


def model_types(mapping: str) -> dict[str, str]:
    """Model type -> class name, for one of `MAPPINGS`."""
    if mapping not in MAPPINGS:
        raise ValueError(f"mapping {mapping!r}: expected one of {', '.join(MAPPINGS)}")
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    names = dict(getattr(auto, MAPPINGS[mapping]))
    return {t: (c if isinstance(c, str) else c[0]) for t, c in names.items()}


def run(
    mappings: Sequence[str] = tuple(MAPPINGS), only: Sequence[str] | None = None, progress: bool = True
) -> Coverage:
    """Try every model type of the mappings (or those of `only`). An exception or a timeout is a reported failure."""
    import transformers
    from rich.progress import track

    jobs = [(t, c, m) for m in mappings for t, c in model_types(m).items() if only is None or t in only]
    rows = [check(t, c, m) for t, c, m in track(jobs, "model types", disable=not progress)]
    return Coverage(tuple(rows), transformers.__version__)


def check(model_type: str, class_name: str, mapping: str) -> Row:
    """Build one model type at a tiny configuration and try its neurons."""
    start = time.perf_counter()

    def row(verdict: str, reason: str = "", sites: Sequence[Site] = ()) -> Row:
        kinds = ", ".join(sorted({s.kind for s in sites}))
        return Row(model_type, mapping, verdict, reason, len(sites), kinds, round(time.perf_counter() - start, 2))

    known = _tiny.OUT_OF_SCOPE.get(model_type)
    try:
        with _quietly(), _limited(TIMEOUT):
            torch.manual_seed(0)
            model, inputs = _tiny.build(model_type, class_name, mapping)
            if known is not None:
                with contextlib.suppress(NoNeurons):
                    find_sites(model)
                    return row("fail", f"said to be out of scope ({known}), but sites were found")
                return row("out of scope", known)
            sites = find_sites(model)
            problem = _problem(model, inputs, sites)
            return row("fail" if problem else "pass", problem, sites)
    except _tiny.NotHere as missing:
        return row("out of scope", str(missing))
    except NoNeurons:
        return row("fail", "no sites were found")
    except Exception as bad:
        return row(
            "fail", f"{type(bad).__name__}: {str(bad).strip().splitlines()[0][:160] if str(bad).strip() else ''}"
        )


def _problem(model: nn.Module, inputs: dict[str, Any], sites: list[Site]) -> str:
    """The first thing wrong with the sites of this model, "" if nothing is."""
    before = _output(model, inputs)
    if not bool(torch.isfinite(before).all()):
        return "the tiny model's output is not finite"
    with torch.no_grad(), capture(model) as seen, capture_inputs(model) as read:
        model(**inputs)
    fired = [s for s in sites if s.name in seen]
    for site in fired:
        h = seen[site.name]
        again = activation(site, read[site.name], _lookup(model))
        if again.numel() != h.numel():
            return f"{site.name}: recomputed shape {tuple(again.shape)}, captured {tuple(h.shape)}"
        again = again.reshape(h.shape)
        if site.formula is not None and site.formula.scaled:
            again = again * (again * h).sum(-1, keepdim=True) / (again * again).sum(-1, keepdim=True).clamp_min(1e-30)
        error = float((again - h).abs().max())
        if not error <= 1e-4 * (1 + float(h.abs().max())):
            return f"{site.name}: recomputed activation differs by {error:.2g}"
    connected = 0
    for site in _sample(fired):
        if any(_moves(model, inputs, before, n, v) for n, v in _trials(site)):
            connected += 1
        elif _reaches(model, inputs, site):
            return f"{site.name}: clamping a neuron leaves the output unchanged"
        # Else there is no path: a pooler the task does not use, a patcher whose output only cuts the text.
    if not connected:
        return "no site has a path to the output"
    if not torch.equal(_output(model, inputs), before):
        return "the output after clamping is not what it was before"
    asleep = [s for s in sites if s.name not in seen and s.kind != "expert"]
    if asleep and not fired:
        return f"{asleep[0].name}: did not fire"
    return ""


def _reaches(model: nn.Module, inputs: dict[str, Any], site: Site) -> bool:
    """Whether there is a path from the site to the output: whether its weights get a gradient."""
    p = dict(model.named_parameters(remove_duplicate=False))[site.reads["up"].name]
    frozen = not p.requires_grad
    try:
        p.requires_grad_(True)
        [gradient] = torch.autograd.grad(_output(model, inputs, grad=True).sum(), [p], allow_unused=True)
    except RuntimeError:  # a forward without gradients: judge by the clamp
        return True
    finally:
        p.requires_grad_(not frozen)
    return gradient is not None


def _trials(site: Site) -> list[tuple[Neuron, float]]:
    """What to clamp: one neuron, and others in case that one meets a closed gate or a saturated unit."""
    return [(Neuron(site.number, int(site.width * at)), v) for v in (50.0, -5.0, 1.0) for at in (0.5, 0.0, 0.9)]


def _moves(model: nn.Module, inputs: dict[str, Any], before: Tensor, neuron: Neuron, value: float) -> bool:
    with clamp(model, {neuron: value}):
        return not torch.equal(_output(model, inputs), before)


def _sample(sites: list[Site], most: int = 40) -> list[Site]:
    """All sites, or evenly spread ones where there are many."""
    step = max(1, -(-len(sites) // most))
    return sites[::step]


def _lookup(model: nn.Module) -> Any:
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return tensors.__getitem__


def _output(model: nn.Module, inputs: dict[str, Any], grad: bool = False) -> Tensor:
    """The model's answer, as one vector."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad):
        out = model(**inputs)
    main = [out[k] for k in ("logits", "prediction_logits", "last_hidden_state") if k in out and out[k] is not None]
    return torch.cat([t.float().flatten() for t in main])


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings of half a thousand configurations."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after so many seconds, where signals can be had (main thread, not Windows)."""
    import threading

    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def coverage_command(
    mapping: list[str] | None = None,
    only: list[str] | None = None,
    as_json: bool = False,
    write: Path | None = None,
) -> int:
    """Try every model type of transformers and say how many pass; the exit code is 1 if any fails.

    `mapping` and `only` choose; `as_json` prints JSON instead of the table; `write` is a folder that gets `coverage.md`
    and `coverage.json`.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = run(tuple(mapping or MAPPINGS), only, progress=not as_json)
    if write is not None:
        write.mkdir(parents=True, exist_ok=True)
        (write / "coverage.md").write_text(found.markdown(), encoding="utf-8")
        (write / "coverage.json").write_text(found.to_json() + "\n", encoding="utf-8")
    if as_json:
        print(found.to_json())
    else:
        from rich.console import Console

        Console().print(found.table())
    return 1 if found.count("fail") else 0
