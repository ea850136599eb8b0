"""The verdict of the reproduction of circuit diagrams, its faults, and its measurements in small."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from matplotlib.figure import Figure

from neuropil.interpret.diagrams import architectures
from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import circuit_diagrams as reproduction
from neuropil.reproduce._circuit_diagrams_bugs import PROGRAMS


def rows(types: float, costs: float, peer: float, flops: float = 0.0, gradient: float = 1e-12) -> list[Row]:
    jitter = (-1.0, 0.0, 1.0)
    means = dict.fromkeys(reproduction.CHECKS, 50.0)
    means |= {reproduction.TYPES: types, reproduction.COSTS: costs, reproduction.NUMBERS: 100.0}
    out = [Row.of(name, reproduction.CAUGHT, [mean] * 3) for name, mean in means.items()]
    out = [r for r in out if r.name != reproduction.JAXTYPING]
    out.append(Row.of(reproduction.JAXTYPING, reproduction.CAUGHT, [peer + j for j in jitter]))
    out.append(Row.of("mlp", reproduction.FLOPS, [flops] * 3))
    return [*out, Row.of("mlp", reproduction.GRADIENT, [gradient] * 3)]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((60.0, 80.0, 50.0), "holds"),
        ((40.0, 80.0, 30.0), "partly"),  # the types find too few
        ((60.0, 70.0, 50.0), "partly"),  # types and costs find too few
        ((60.0, 80.0, 59.5), "partly"),  # within the noise
        ((60.0, 80.0, 60.0), "does not hold"),
        ((60.0, 80.0, 65.0), "does not hold"),
        ((60.0, 80.0, 50.0, 0.1), "does not hold"),
        ((60.0, 80.0, 50.0, 0.0, 1e-3), "does not hold"),
    ],
)
def test_the_rule(found: tuple[float, ...], expected: str) -> None:
    assert reproduction.verdict(rows(*found)) == expected


def test_one_seed_never_holds() -> None:
    one = [Row.of(r.name, r.metric, r.values[:1]) for r in rows(60.0, 80.0, 50.0)]
    assert reproduction.verdict(one) == "partly"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_both_languages_have_the_same_faults(program: object) -> None:
    """Where a faulty diagram runs, it computes what the faulty program in PyTorch does."""
    sizes = {"y": 6, "x": 6, "k": 4, "h": 4, "n": 16, "m": 16, "b": 4, "d": 8, "s": 4, "c": 3, "o": 5}
    if program.name == "convolutions":
        sizes |= {"x": 8, "y": 8}
    net = program.diagram("", sizes).torch(seed=0)
    weights = {name: p.detach() for name, p in net.named_parameters()}
    weights["sizes"] = torch.tensor([4, 4])
    inputs = tuple(torch.randn(a.shape) for a in program.diagram("", sizes).dom)
    compared = 0
    for bug in program.bugs:
        try:
            made = program.diagram(bug, sizes).torch(weights)(*inputs)
        except ValueError:
            continue
        compared += 1
        wanted, _ = reproduction.watched(program, bug, weights, inputs)
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert compared > len(program.bugs) // 3


def test_a_right_program_is_not_accused() -> None:
    for program in PROGRAMS:
        assert reproduction.read_off(program, "") == (False, False)


def test_numbers_find_the_faults() -> None:
    """All but one of a network at most, which may be none at these sizes."""
    for program in PROGRAMS:
        found = reproduction.caught(program, 3)
        assert found[reproduction.NUMBERS] >= len(program.bugs) - 1
        assert found[reproduction.TYPES] <= found[reproduction.COSTS] <= found[reproduction.NUMBERS]
        assert found[reproduction.SIGNATURES] <= found[reproduction.JAXTYPING]


def test_annotations_are_checked() -> None:
    x = torch.zeros(2, 3)
    assert reproduction.annotated([(x, "a b"), (x.T, "b a")], {"a": 2, "b": 3})
    assert not reproduction.annotated([(x, "a b"), (x, "b a")], {"a": 2, "b": 3})
    assert reproduction.annotated([(x[:, :1], "a b//2")], {"a": 2, "b": 3})


def test_what_is_read_off_is_exact() -> None:
    flops, gradient = reproduction.exactness(architectures.SMALL["attention"](), 0)
    assert flops == 0
    assert gradient < 1e-12


def test_rewriting_matches_the_peer() -> None:
    pytest.importorskip("opt_einsum")
    ours, peer = reproduction.rewriting(0, 3)
    assert ours.value == pytest.approx(peer.value)
    assert ours.value <= 100


def test_measurements_and_figure(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    pytest.importorskip("opt_einsum")
    found = measured_by(reproduction)
    table = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in found]
    verdict = reproduction.verdict(table)
    report = Report(
        "circuit-diagrams", "t", reproduction.CLAIM, reproduction.RULE, verdict, tuple(table), (), (0,), "smoke"
    )
    assert isinstance(reproduction.figure(report), Figure)
