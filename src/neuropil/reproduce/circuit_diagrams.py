"""Neural circuit diagrams (Abbott 2024, arXiv:2402.05424).

A notation has no benchmark; what it claims can be measured. Eight architectures are written as diagrams, and what
is read off them (operations, gradients) is compared with what PyTorch counts and computes. Then faults are put into
five networks, and it is counted by which check each is found: the types of the diagram, its types and costs,
jaxtyping on every intermediate result, the shapes that a summary of the model shows, and the numbers themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, jaxtyped
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from neuropil.interpret.diagrams import Diagram, DiagramError, build
from neuropil.interpret.diagrams import architectures as shipped
from neuropil.interpret.diagrams.axes import Array, axis
from neuropil.interpret.diagrams.cost import flops
from neuropil.interpret.diagrams.library import einsum_of
from neuropil.interpret.diagrams.run import weights_of
from neuropil.report import Measurement, Report, Row, Scale, find, paired
from neuropil.reproduce._circuit_diagrams_bugs import PROGRAMS, Program
from neuropil.reproduce.harness import Meter, runner

CLAIM = (
    "A diagram in which axes are wires fixes an architecture so exactly that its code, its gradient and its costs can "
    "be read off, and so that mistakes in it are found."
)
RULE = (
    "(1) For all eight architectures the operations read off differ from those counted by 0 and the gradient of the "
    "reverse diagram from autograd's by less than 1e-8, relative. (2) The types of the diagram alone find more than "
    "half of the faults, types and costs together at least three quarters. (3) The types find more faults than "
    "jaxtyping on every intermediate result: the difference, paired over seeds, exceeds twice its standard error. "
    "Holds if (1), (2) and (3); does not hold if (1) fails or the mean difference of (3) is zero or less; partly "
    "otherwise."
)
PAPER_SAYS = (
    "a notation, without a benchmark: diagrams of eight architectures, with code of the same structure beside them",
    "broadcasting, linear rewrites, backpropagation and costs are derived from the diagrams",
)
DEVIATIONS = (
    "the paper's claim to communicate better is about readers; the share of faults that are found stands in for it",
    "torchview and torchinfo, which show shapes and check nothing, are represented by a comparison of the shapes of "
    "all intermediate results with those of the right program",
)
NOTES = (
    "A fault counts as found by jaxtyping also where PyTorch itself stops, and by costs where the polynomials of "
    "operations, of parameters or of memory at the cuts differ from those of the right diagram.",
    "Each seed draws the sizes of all axes; two axes may have one size, and then a check of shapes cannot tell them "
    "apart where one of names can.",
    "Diagrams are checked in symbols, so their share does not depend on the sizes and has no spread.",
    "Likely reason that types find no more than annotations: most of these faults keep every type. A softmax over "
    "another axis, a wrong number, two arguments of one type in the wrong order are well typed for both; and a box "
    "that runs over all axes it does not name takes an array that the annotation of its result would have refused (a "
    "mean over another axis, a stride). The costs find those: they are what the diagram adds to annotations.",
    "What the numbers miss is no fault at these sizes: where a head has as many numbers as there are heads, say, both "
    "layouts of the heads are one.",
)
SEEDS: dict[Scale, tuple[int, ...]] = {"smoke": (0,), "default": (0, 1, 2), "paper": tuple(range(10))}
SETTINGS: dict[Scale, dict[str, Any]] = {
    "smoke": {"draws": 1, "architectures": ("mlp", "attention", "convolution"), "chains": 2},
    "default": {"draws": 4, "architectures": "all", "chains": 10},
    "paper": {"draws": 20, "architectures": "all", "chains": 50},
}
CAUGHT, FLOPS, GRADIENT, SAVED = "faults found", "operations, error", "gradient, error", "operations after rewriting"
TYPES, COSTS, NUMBERS = "types of the diagram", "types and costs", "numbers"
JAXTYPING, SIGNATURES, SHAPES = "jaxtyping, every result", "jaxtyping, in and out", "shapes shown"
CHECKS = (TYPES, COSTS, SIGNATURES, JAXTYPING, SHAPES, NUMBERS)
OURS, PEER = "diagrams, merged and reordered", "opt_einsum"


def measure(scale: Scale, seed: int, progress: Meter) -> list[Measurement]:
    settings = SETTINGS[scale]
    found = dict.fromkeys(CHECKS, 0)
    jobs = [(program, draw) for program in PROGRAMS for draw in range(settings["draws"])]
    for program, draw in progress.track(jobs, "faults", 0.0, 0.6):
        for check, count in caught(program, 1000 * seed + draw).items():
            found[check] += count
    tried = settings["draws"] * sum(len(program.bugs) for program in PROGRAMS)
    ours = (TYPES, COSTS)
    rows = [Measurement(check, CAUGHT, 100 * found[check] / tried, "%", True, check not in ours) for check in CHECKS]
    chosen = shipped.SMALL if settings["architectures"] == "all" else settings["architectures"]
    for name in progress.track(chosen, "architectures", 0.6, 0.95):
        counted, gradient = exactness(shipped.SMALL[name](), seed)
        rows += [Measurement(name, FLOPS, counted, "", False), Measurement(name, GRADIENT, gradient, "", False)]
    return rows + rewriting(seed, settings["chains"])


# -------------------------------------------------------------------------------------------------- what is read off


def exactness(diagram: Diagram, seed: int) -> tuple[float, float]:
    """Relative errors of the operations and of the gradients that are read off."""
    net = diagram.torch(seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(a.shape, generator=generator, dtype=torch.float64).requires_grad_() for a in diagram.dom]
    with FlopCounterMode(display=False) as counter:
        out = net(*inputs)
    counted = counter.get_total_flops()
    wanted = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    names = [name for name, op in weights_of(diagram.flat()).items() if op.option("trainable", True)]
    leaves = [*inputs, *(net.value_of(name) for name in names)]
    right = torch.autograd.grad(out, leaves, wanted)
    weights = {name: net.value_of(name).detach() for name in weights_of(diagram.flat())}
    back = diagram.backward().torch(weights).double()
    with torch.no_grad():
        made = back(*inputs, wanted)
    pairs = zip(made if isinstance(made, tuple) else (made,), right, strict=True)
    worst = max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)
    return abs(float(diagram.cost().matmul) / counted - 1), worst


# ----------------------------------------------------------------------------------------------------------- faults


def caught(program: Program, seed: int) -> dict[str, int]:
    """How many of a program's faults each check finds, at the sizes of this seed."""
    generator = np.random.default_rng(seed)
    sizes = program.draw(lambda *choices: int(generator.choice(choices)))
    net = program.diagram("", sizes).torch(seed=seed)
    weights = {name: p.detach() for name, p in net.named_parameters()}
    weights["sizes"] = torch.tensor([sizes.get("k", 0), sizes.get("h", 0)])
    draws = torch.Generator().manual_seed(seed)
    inputs = tuple(torch.randn(a.shape, generator=draws) for a in program.diagram("", sizes).dom)
    wanted, right = watched(program, "", weights, inputs)
    torch.testing.assert_close(net(*inputs), wanted, rtol=1e-4, atol=1e-5)  # both languages say the same
    known = sizes | ({"x": sizes["y"]} if program is PROGRAMS[1] else {})
    out = dict.fromkeys(CHECKS, 0)
    for bug in program.bugs:
        types, costs = read_off(program, bug)
        out[TYPES] += types
        out[COSTS] += types or costs
        try:
            made, seen = watched(program, bug, weights, inputs)
        except (RuntimeError, IndexError):  # PyTorch itself stops
            for check in (SIGNATURES, JAXTYPING, SHAPES, NUMBERS):
                out[check] += 1
            continue
        ends = [*seen[: len(inputs)], seen[-1]]
        out[SIGNATURES] += not annotated(ends, known)
        out[JAXTYPING] += not annotated(seen, known)
        out[SHAPES] += [x.shape for x, _ in seen] != [x.shape for x, _ in right]
        out[NUMBERS] += made.shape != wanted.shape or not torch.allclose(made, wanted, rtol=1e-4, atol=1e-5)
    return out


@functools.cache
def read_off(program: Program, bug: str) -> tuple[bool, bool]:
    """Whether the diagram with this fault is refused or of another type, and whether its costs are others.

    Both in symbols: no sizes are needed.
    """
    right = program.diagram("", SYMBOLS[program.name])
    try:
        made = program.diagram(bug, SYMBOLS[program.name])
        _ = made.sizes, weights_of(made.flat())
    except DiagramError:
        return True, True
    if made.dom != right.dom or made.cod != right.cod:
        return True, True
    a, b = made.cost(), right.cost()
    cuts = [sorted(map(str, cost.cuts)) for cost in (a, b)]
    return False, (a.flops, a.parameters, cuts[0]) != (b.flops, b.parameters, cuts[1])


SYMBOLS: dict[str, dict[str, Any]] = {
    "attention": {name: name for name in "yxkh"},
    "multi-head attention": {"y": "y", "k": "k", "h": "h", "n": "k*h", "m": "k*h"},
    "perceptron": {name: name for name in "bmd"},
    "layer norm": {name: name for name in "bsm"},
    "convolutions": {"c": "c", "d": "d", "x": 8, "y": 16, "o": "o"},  # windows want numbers
}


def watched(
    program: Program, bug: str, weights: dict[str, Tensor], inputs: tuple[Tensor, ...]
) -> tuple[Tensor, list[tuple[Tensor, str]]]:
    """What the program in PyTorch gives, and all its results with their annotations."""
    seen: list[tuple[Tensor, str]] = []

    def see(x: Tensor, axes: str) -> Tensor:
        seen.append((x, axes))
        return x

    return program.torch(bug, weights, inputs, see), seen


def annotated(results: list[tuple[Tensor, str]], sizes: dict[str, int]) -> bool:
    """Whether jaxtyping finds every result to be as annotated, the sizes being known."""
    hint: Any = Float
    with jaxtyped("context"):
        for name, size in sizes.items():
            assert isinstance(torch.empty(size), hint[Tensor, name])
        right = [isinstance(x, hint[Tensor, axes]) for x, axes in results]
        return all(right)


# ---------------------------------------------------------------------------------------------------------- rewriting


def rewriting(seed: int, count: int) -> list[Measurement]:
    """Chains of linear steps at random sizes: operations after rewriting, in percent of those before."""
    import opt_einsum

    generator = np.random.default_rng(seed)
    ours, peers = [], []
    for _ in range(count):
        diagram = random_chain(generator)
        before = sum(flops(s.op) for s in diagram.steps)
        after = sum(flops(s.op) for s in diagram.simplified().steps)
        text, shapes = _as_text(diagram)
        _, info = opt_einsum.contract_path(text, *shapes, shapes=True, optimize="optimal")
        ours.append(100 * after / before)
        peers.append(100 * min(float(info.opt_cost), before) / before)
    return [
        Measurement(OURS, SAVED, float(np.mean(ours)), "%", False),
        Measurement(PEER, SAVED, float(np.mean(peers)), "%", False, True),
    ]


def random_chain(generator: np.random.Generator) -> Diagram:
    """A product of five matrices in a ring of axes, one after another from the left."""
    sizes = [int(generator.integers(2, 12)) for _ in range(6)]
    axes = [axis(f"a{n}", size) for n, size in enumerate(sizes)]
    dom = tuple(Array((axes[n], axes[n + 1])) for n in range(5))

    def chain(*wires: Any) -> Any:
        made = wires[0]
        for n in range(1, 5):
            cod = Array((axes[0], axes[n + 1]))
            made = einsum_of((made.array, dom[n]), cod)(made, wires[n])
        return made

    return build(dom, chain)


def _as_text(diagram: Diagram) -> tuple[str, list[tuple[int, ...]]]:
    letters = {name: "abcdefgh"[n] for n, name in enumerate(diagram.sizes)}
    left = ",".join("".join(letters[n] for n in a.names) for a in diagram.dom)
    right = "".join(letters[n] for n in diagram.cod[0].names)
    return f"{left}->{right}", [a.shape for a in diagram.dom]


# ------------------------------------------------------------------------------------------------- verdict and figure


def verdict(rows: Sequence[Row]) -> str:
    exact = all(r.mean == 0 for r in rows if r.metric == FLOPS)
    exact = exact and all(r.mean < 1e-8 for r in rows if r.metric == GRADIENT)
    types, costs, peer = (find(rows, name, CAUGHT) for name in (TYPES, COSTS, JAXTYPING))
    gain, error = paired(types.values, peer.values)
    if not exact or not gain > 0:
        return "does not hold"
    return "holds" if types.mean > 50 and costs.mean >= 75 and gain > 2 * error else "partly"


def figure(report: Report) -> Figure:
    """What share of the faults each check finds."""
    rows = [find(report.rows, check, CAUGHT) for check in CHECKS]
    drawn = Figure(figsize=(7.0, 3.2), layout="constrained")
    panel = drawn.subplots()
    heights = range(len(rows))[::-1]
    colours = ["#8a8f98" if row.baseline else "#0b6e99" for row in rows]
    panel.barh(
        list(heights), [row.mean for row in rows], xerr=[row.spread or 0 for row in rows], color=colours, capsize=3
    )
    for height, row in zip(heights, rows, strict=True):
        panel.text(row.mean + (row.spread or 0) + 1.5, height, f"{row.mean:.0f} %", va="center", fontsize="small")
    panel.set_yticks(list(heights), CHECKS)
    panel.set_xlim(0, 112)
    panel.set_xlabel(f"faults found, % of {sum(len(p.bugs) for p in PROGRAMS)} faults at random sizes")
    panel.set_title("Which check finds the faults in five networks (blue: read off the diagram)", fontsize="medium")
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    return drawn


run = runner(__name__)
