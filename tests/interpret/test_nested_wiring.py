"""Machines in wires: laws of circuits, nesting, errors, boxes of scipy and gymnasium, drawing."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal
from torch import nn

from neuropil.interpret.nested import (
    UNIT,
    Finite,
    Function,
    InstantaneousLoop,
    Interface,
    Lens,
    Machine,
    NestedSystem,
    Organisation,
    Real,
    System,
    TypeMismatch,
    WiringError,
    constant,
    copier,
    delay,
    environment,
    fit,
    hom,
    identity,
    integrator,
    learner,
    lti,
    parallel,
    polynomial,
    replicate,
    stream,
    tree,
    wiring,
)

WIRE = Interface(Real(), Real())


def cell(factor: float, name: str = "cell") -> Machine:
    """A leaky tanh unit with ports."""
    start = torch.tensor(0.1, dtype=torch.float64)
    face = Interface({"y": Real()}, {"u": Real()})
    return Machine(face, start, lambda s: {"y": s.tanh()}, lambda s, d: factor * s + d["u"], name)


def nor() -> Machine:
    face = Interface(Finite(2), {"a": Finite(2), "b": Finite(2)})
    return Machine(face, 0, lambda s: s, lambda s, d: int(not (d["a"] or d["b"])), "nor")


# --- circuits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [  # each input held for four steps; (set, reset) -> (q, not q) at the end of it
        ([(1, 0)], [(1, 0)]),
        ([(1, 0), (0, 0)], [(1, 0), (1, 0)]),
        ([(0, 1), (0, 0), (1, 0), (0, 0)], [(0, 1), (0, 1), (1, 0), (1, 0)]),
        ([(1, 0), (1, 1), (0, 1), (0, 0)], [(1, 0), (0, 0), (0, 1), (0, 1)]),
    ],
)
def test_two_nor_gates_are_a_latch(inputs: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    latch = System(
        {"q": nor(), "n": nor()},
        {"q.a": "in.reset", "q.b": "n", "n.a": "in.set", "n.b": "q", "out.q": "q", "out.n": "n"},
    )
    held = [{"set": s, "reset": r} for s, r in inputs for _ in range(4)]
    run = latch.run([*held, held[-1]])
    shown = [(int(q), int(n)) for q, n in zip(run.outputs["q"][4::4], run.outputs["n"][4::4], strict=True)]
    assert shown == expected


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_ring_of_n_delays_has_period_n(n: int) -> None:
    boxes = {str(i): delay(Real(), float(i == 0)) for i in range(n)}
    ring = System(boxes, [(str(i), str((i + 1) % n)) for i in range(n)] + [("0", "out")])
    shown = ring.run(3 * n + 1).outputs
    assert torch.equal(shown, torch.tensor([float(t % n == 0) for t in range(3 * n + 1)]))


def test_integrators_in_a_loop_are_a_power_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    start = torch.randn(3, generator=generator, dtype=torch.float64)
    boxes: dict[str, Any] = {str(i): integrator(Real(), start[i], dt=0.1) for i in range(3)}
    wires = []
    for i in range(3):
        ins = {f"x{j}": Real() for j in range(3)}
        row = A[i]
        boxes[f"sum{i}"] = Function(lambda row=row, **x: sum(row[j] * x[f"x{j}"] for j in range(3)), ins, Real())
        wires += [(str(j), f"sum{i}.x{j}") for j in range(3)] + [(f"sum{i}", str(i)), (str(i), f"out.x{i}")]
    shown = System(boxes, wires).run(41).outputs
    last = torch.stack([shown[f"x{i}"][40] for i in range(3)])
    expected = np.linalg.matrix_power(np.eye(3) + 0.1 * A.numpy(), 40) @ start.numpy()
    np.testing.assert_allclose(last, expected, rtol=1e-10)


def test_predators_and_prey_composed_are_the_equations_at_once() -> None:
    """The example of resource sharing: growth, predation and decline as boxes of their own."""
    dt, start = 0.01, (10.0, 100.0)
    real, kind = Real(), torch.float64

    def species(rate: float, level: float) -> Machine:
        face = Interface({"n": real}, {"change": real})
        return Machine(
            face, torch.tensor(level, dtype=kind), lambda n: {"n": n}, lambda n, d: n + dt * (rate * n + d["change"])
        )

    eaten = Function(
        lambda rabbits, foxes: {"lost": -0.015 * rabbits * foxes, "won": 0.015 * rabbits * foxes},
        {"rabbits": real, "foxes": real},
        {"lost": real, "won": real},
    )
    system = System(
        {"rabbits": species(0.3, start[0]), "foxes": species(-0.7, start[1]), "predation": eaten},
        [
            ("rabbits.n", "predation.rabbits"),
            ("foxes.n", "predation.foxes"),
            ("predation.lost", "rabbits.change"),
            ("predation.won", "foxes.change"),
            ("rabbits.n", "out.rabbits"),
            ("foxes.n", "out.foxes"),
        ],
    )
    shown = system.run(1000).outputs
    r, f = start
    for t in range(1000):
        assert float(shown["rabbits"][t]) == pytest.approx(r, rel=1e-12)
        assert float(shown["foxes"][t]) == pytest.approx(f, rel=1e-12)
        r, f = r + dt * (0.3 * r - 0.015 * r * f), f + dt * (-0.7 * f + 0.015 * r * f)


# --- nesting -----------------------------------------------------------------------------------------


def three_levels() -> System:
    inner = System(
        {"a": cell(0.5), "b": cell(-0.3), "sum": Function(lambda p, q: p - q, {"p": Real(), "q": Real()}, Real())},
        [("in.u", "sum.p"), ("b.y", "sum.q"), ("sum", "a.u"), ("a.y", "b.u"), ("a.y", "out.y"), ("b.y", "out.z")],
        name="inner",
    )
    middle = System(
        {"left": inner, "right": inner, "c": cell(0.9)},
        [
            ("left.y", "right.u"),
            ("right.z", "c.u"),
            ("in.u", "left.u"),
            ("c.y", "out.y"),
            ("right.y", "out.z"),
        ],
        name="middle",
    )
    return System(
        {"m": middle, "n": middle, "d": cell(0.2)},
        [("m.y", "n.u"), ("n.z", "d.u"), ("d.y", "m.u"), ("n.y", "out.y"), ("m.z", "out.z")],
        name="outer",
    )


def test_a_nested_system_flattened_shows_the_same_to_the_bit() -> None:
    nested = three_levels()
    flat = nested.flatten()
    assert set(flat.boxes) == {"d"} | {
        f"{m}/{part}"
        for m in "mn"
        for part in ["c", *(f"{s}/{b}" for s in ("left", "right") for b in ("a", "b", "sum"))]
    }
    one, other = nested.run(50).outputs, flat.run(50).outputs
    assert one.keys() == other.keys()
    assert all(torch.equal(one[port], other[port]) for port in one)
    assert float(one["y"].std()) > 1e-3  # something happens


@given(st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_any_nesting_flattens_to_the_same(seed: int) -> None:
    draw = random.Random(seed)

    def build(depth: int) -> Any:
        boxes = {
            f"b{i}": build(depth - 1) if depth and draw.random() < 0.6 else cell(draw.uniform(-1, 1)) for i in range(3)
        }
        sources = [f"{name}.y" for name in boxes] + ["in.u"]
        wires = [(draw.choice(sources), f"{name}.u") for name in boxes]
        if not any(source == "in.u" for source, _ in wires):
            wires[0] = ("in.u", wires[0][1])
        return System(boxes, [*wires, (draw.choice(sources[:-1]), "out.y")])

    system = build(2)
    inputs = {"u": torch.randn(15, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}
    assert torch.equal(system.run(inputs).outputs["y"], system.flatten().run(inputs).outputs["y"])


def test_wirings_compose_as_lenses() -> None:
    """Wiring the boxes in two steps is wiring them by the composite."""
    face = cell(0.5).interface
    first = wiring({"a": face, "b": face}, [("a.y", "b.u"), ("in.u", "a.u"), ("b.y", "out.y")])
    second = wiring({"box": first.target}, [("box.y", "box.u"), ("box.y", "out.y")])
    around = Lens(first.target, parallel({"box": first.target}), lambda a: {"box": a}, lambda a, d: d["box"])
    boxes = parallel({"a": cell(0.5), "b": cell(-0.7)})
    in_steps = ((boxes >> first) >> around) >> second
    at_once = boxes >> (first >> around >> second)
    assert torch.equal(in_steps.run(50).outputs["y"], at_once.run(50).outputs["y"])


@given(st.permutations(range(3)))
@settings(max_examples=6, deadline=None)
def test_side_by_side_and_wrapping_interchange(order: list[int]) -> None:
    machines = [[cell(0.5), cell(-0.2), cell(0.8)][i] for i in order][:2]
    double = Lens(
        machines[0].interface, machines[0].interface, lambda a: {"y": 2 * a["y"]}, lambda a, d: {"u": d["u"] - a["y"]}
    )
    inputs = tuple({"u": torch.linspace(-1, 1, 20, dtype=torch.float64)} for _ in range(2))
    one = ((machines[0] >> double) @ (machines[1] >> double)).run(inputs).outputs
    other = ((machines[0] @ machines[1]) >> (double @ double)).run(inputs).outputs
    assert all(torch.equal(a["y"], b["y"]) for a, b in zip(one, other, strict=True))


# --- the type argument -------------------------------------------------------------------------------


def test_an_artificial_neuron_is_no_nerve_cell() -> None:
    neuron = learner(nn.Linear(1, 1), name="neuron")
    with pytest.raises(
        TypeError, match=r"neuron has type \[R\^1 y\^\(R\^1\), R\^1 y\^\(R\^1\)\].* type R y\^R.*synapse"
    ):
        fit(neuron, WIRE)
    with pytest.raises(TypeError, match=r"\[R\^1 y.*this slot is for a system.*nerve cell"):
        System({"cell": neuron}, [("in", "cell"), ("cell", "out")])
    with pytest.raises(TypeError, match=r"neuron, of type \[R\^1 y.*identity, of type \[R y\^R, R y\^R\]"):
        neuron >> identity(WIRE)


def test_an_artificial_neuron_is_a_synapse() -> None:
    face = Interface(Real(1), Real(1))
    neuron = learner(nn.Linear(1, 1), name="neuron")
    fit(neuron, hom(face, face))
    assert isinstance(neuron, Organisation)
    around = copier(Real(1), torch.zeros(1)) >> neuron  # a nerve cell inside the synapse has the type of one outside
    fit(around, face)
    with pytest.raises(TypeError, match=r"puts out a wiring; copy is what is wired"):
        fit(copier(Real(1), torch.zeros(1)), hom(face, face))
    with pytest.raises(TypeError, match="what is wired"):
        Organisation.of(copier(Real(1), torch.zeros(1)))


def test_a_constant_wiring_is_an_organisation_of_one_state() -> None:
    lens = wiring({"a": cell(0.5).interface}, [("a.y", "a.u"), ("a.y", "out.y")])
    still = Organisation.constant(lens)
    fit(still, hom(lens.source, lens.target))
    assert still.state == ()
    again = Organisation.of(Machine(hom(lens.source, lens.target), (), lambda t: lens, lambda t, passed: t, "wires"))
    boxes = parallel({"a": cell(0.5)})
    runs = [(boxes >> w).run(50).outputs["y"] for w in (lens, still, again)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@given(st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_one_state_is_a_wiring_on_every_trajectory(seed: int) -> None:
    draw = random.Random(seed)
    boxes = {name: cell(draw.uniform(-1, 1)) for name in "abc"}
    wires = [(draw.choice(["a.y", "b.y", "c.y", "in.u"]), f"{name}.u") for name in "abc"]
    wires = [("in.u", "a.u"), *wires[1:], (draw.choice(["a.y", "c.y"]), "out.y")]
    lens = wiring(boxes, wires)
    inputs = {"u": torch.randn(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}
    one = (parallel(boxes) >> lens).run(inputs).outputs["y"]
    other = (parallel(boxes) >> Organisation.constant(lens)).run(inputs).outputs["y"]
    assert torch.equal(one, other)


def test_machines_are_not_composed_as_wirings() -> None:
    with pytest.raises(TypeMismatch, match=r"around a machine goes a wiring.*System"):
        cell(0.5) >> cell(0.5)
    with pytest.raises(TypeMismatch, match=r"cell has type .* and the slot inside identity has type R y\^R"):
        cell(0.5) >> identity(WIRE)


# --- states ------------------------------------------------------------------------------------------


def test_copies_share_no_state_and_runs_leave_none_behind() -> None:
    one = cell(0.5)
    both = System({"a": one, "b": one}, [("in.u", "a.u"), ("a.y", "b.u"), ("a.y", "out.a"), ("b.y", "out.b")])
    inputs = {"u": torch.ones(10, dtype=torch.float64)}
    first = both.run(inputs)
    assert not torch.equal(first.outputs["a"], first.outputs["b"])
    assert torch.equal(both.run(inputs).outputs["b"], first.outputs["b"])
    assert torch.equal(one.run(inputs).outputs["y"], first.outputs["a"])
    system = NestedSystem(both)
    shown = system.run(inputs)
    assert torch.equal(shown["b"], first.outputs["b"])
    assert not torch.equal(system.run(inputs)["b"], shown["b"])  # it goes on from where it was
    system.reset()
    assert torch.equal(system.run(inputs)["b"], shown["b"])


def test_a_box_that_changes_its_state_in_place_does_not_leak() -> None:
    rude = Machine(WIRE, torch.zeros(()), lambda s: s.clone(), lambda s, d: s.add_(d), "rude")
    first = rude.run(torch.ones(5)).outputs
    assert torch.equal(rude.run(torch.ones(5)).outputs, first)
    assert float(rude.state) == 0


def test_a_run_goes_on_from_a_state() -> None:
    one = cell(0.7)
    u = torch.randn(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    half = one.run({"u": u[:12]})
    rest = one.run({"u": u[12:]}, half.state)
    assert torch.equal(torch.cat([half.outputs["y"], rest.outputs["y"]]), one.run({"u": u}).outputs["y"])


def test_many_machines_at_once_are_many_machines() -> None:
    n, generator = 5, torch.Generator().manual_seed(0)
    many = replicate(cell(0.6), n)
    state = torch.randn(n, generator=generator, dtype=torch.float64)
    u = torch.randn(12, n, generator=generator, dtype=torch.float64)
    at_once = many.run({"u": u}, state)
    for j in range(n):
        alone = cell(0.6).run({"u": u[:, j]}, state[j])
        torch.testing.assert_close(at_once.outputs["y"][:, j], alone.outputs["y"], rtol=1e-14, atol=1e-14)
    with pytest.raises(TypeMismatch, match="a state of tensors only"):
        replicate(stream([1.0], Real()), 3)
    with pytest.raises(TypeMismatch, match="only over real tensors"):
        replicate(nor(), 3)


# --- what is refused ---------------------------------------------------------------------------------

Y = Interface({"y": Real()}, {"u": Real()})
ADD = Function(lambda a, b: a + b, {"a": Real(), "b": Real()}, Real(), "add")


@pytest.mark.parametrize(
    ("boxes", "wires", "error", "message"),
    [
        ({"p": Y, "q": Y}, [("p.y", "q.u")], WiringError, r"not connected: p\.u"),
        ({"p": Y}, [("p.y", "p.u"), ("in.u", "p.u")], WiringError, r"p\.u is driven twice, by p\.y and by in\.u"),
        ({"p": Y}, [("p.z", "p.u")], WiringError, r"'p\.z' is not an output; there are p\.y"),
        ({"p": Y}, [("p.y", "p.v")], WiringError, r"'p\.v' is not an input; there are p\.u"),
        ({"p": Y}, [("p", "p.u")], WiringError, "'p' is not an output"),
        ({"p": Y}, [("p.y", "p.u", 2)], WiringError, "expected a pair"),
        ({"p": Y}, 3, WiringError, "expected pairs"),
        ({"in": Y}, [], WiringError, "stands for the outside"),
        ({"p": Interface(Real(2), Real(3))}, [("p", "p")], TypeMismatch, r"p carries R\^2, and p takes R\^3"),
        (
            {"p": Y, "q": Interface(Real(2), Real(2))},
            [("in.u", "p.u"), ("in.u", "q")],
            TypeMismatch,
            r"in\.u carries R, and q takes R\^2",
        ),
        ({"p": Y}, [("p.y", "p.u"), ("in.a", "out.b")], InstantaneousLoop, "delay box"),
        (
            {"f": ADD, "g": ADD},
            [("f", "g.a"), ("g", "f.a"), ("in.x", "f.b"), ("in.x", "g.b")],
            InstantaneousLoop,
            "f <- g <- f.*delay box",
        ),
        ({"f": ADD}, [("f", "f.a"), ("in.x", "f.b"), ("f", "out.y")], InstantaneousLoop, "f <- f.*delay box"),
        (
            {"p": Y, "f": ADD, "g": ADD},
            [("p.y", "p.u"), ("p.y", "f.a"), ("in.x", "f.b"), ("f", "g.a"), ("p.y", "g.b"), ("g", "out.y")],
            InstantaneousLoop,
            r"out\.y would depend on the outside within the same step, through g <- f <- in: .*delay box",
        ),
        ({"p": Y}, [("p.y", "p.u"), ("p.y", "out"), ("p.y", "out.y")], WiringError, "both used"),
        ({"p": len}, [], TypeMismatch, r"wrap it as Function\(f, inputs, outputs\)"),
        ({"p": 3}, [], TypeMismatch, "expected a Machine"),
    ],
)
def test_bad_wires_are_refused(boxes: Any, wires: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wiring(boxes, wires)


def test_a_delay_mends_an_instantaneous_loop() -> None:
    boxes = {"f": ADD, "wait": delay(Real(), 0.0)}
    total = System(boxes, [("f", "wait"), ("wait", "f.a"), ("in", "f.b"), ("wait", "out")])
    assert total.run(torch.tensor([1.0, 2.0, 3.0, 4.0])).outputs.tolist() == [0.0, 1.0, 3.0, 6.0]


def test_what_machines_show_and_take_is_checked() -> None:
    with pytest.raises(TypeMismatch, match=r"what wide shows at first has shape \(3,\); expected R\^2"):
        Machine(Interface(Real(2), Real(2)), torch.zeros(3), lambda s: s, lambda s, d: s, "wide")
    with pytest.raises(TypeMismatch, match=r"input 1 of cell, u is a tensor of torch\.int64"):
        cell(0.5).run([{"u": torch.tensor(1.0)}, {"u": torch.tensor(1)}])
    with pytest.raises(TypeMismatch, match="3 steps without input"):
        cell(0.5).run(3)
    with pytest.raises(TypeMismatch, match=r"lengths \['3', '4'\]"):
        (cell(0.5) @ cell(0.5)).run(({"u": torch.zeros(3)}, {"u": torch.zeros(4)}))
    with pytest.raises(TypeMismatch, match="expected tensors with time first"):
        cell(0.5).run(None)
    with pytest.raises(TypeMismatch, match="depend on its output"):
        wiring({"p": polynomial(1, 2)}, [])
    with pytest.raises(WiringError, match="give a rule"):
        System({"p": cell(0.5)}, [("p.y", "p.u")], reward="in.r")


# --- boxes -------------------------------------------------------------------------------------------


def test_linear_systems_are_those_of_scipy() -> None:
    A, B, C = np.array([[0.0, 1.0], [-2.0, -0.3]]), np.array([[0.0], [1.0]]), np.array([[1.0, 0.5]])
    u = np.random.default_rng(0).normal(size=60)
    continuous = signal.StateSpace(A, B, C, [[0.0]])
    shown = lti(continuous, 0.1).run({"u": torch.as_tensor(u)}).outputs["y"]
    discrete = signal.cont2discrete((A, B, C, np.zeros((1, 1))), 0.1)
    _, expected, _ = signal.dlsim(discrete, u)
    np.testing.assert_allclose(shown, expected[:, 0], rtol=1e-10, atol=1e-12)
    transfer = signal.TransferFunction([1.0], [1.0, -0.5, 0.2], dt=True)
    _, expected = signal.dlsim(transfer, u)
    np.testing.assert_allclose(lti(transfer).run({"u": torch.as_tensor(u)}).outputs["y"], expected[:, 0], atol=1e-12)


def test_a_direct_path_is_refused_or_delayed() -> None:
    matrices = ([[0.5]], [[1.0]], [[1.0], [2.0]], [[1.0], [0.0]])
    with pytest.raises(ValueError, match=r"direct path.*delayed=True"):
        lti(matrices)
    u = np.random.default_rng(0).normal(size=20)
    shown = lti(matrices, delayed=True).run({"u": torch.as_tensor(u)}).outputs["y"]
    _, expected, _ = signal.dlsim((*map(np.array, matrices), True), u)
    np.testing.assert_allclose(shown[1:], expected[:-1], atol=1e-12)
    with pytest.raises(ValueError, match="needs dt"):
        lti(signal.StateSpace([[0.0]], [[1.0]], [[1.0]], [[0.0]]))


def test_a_feedback_loop_is_that_of_scipy() -> None:
    """Proportional control of a discrete plant: y = P (k (r - y)), its closed loop by the matrices."""
    A, B, C, k = np.array([[0.9, 0.2], [0.0, 0.7]]), np.array([[0.0], [0.5]]), np.array([[1.0, 0.0]]), 0.3
    loop = System(
        {
            "plant": lti((A, B, C, np.zeros((1, 1)))),
            "ctrl": Function(lambda y, ref: {"u": k * (ref - y)}, {"y": Real(), "ref": Real()}, {"u": Real()}),
        },
        [("ctrl.u", "plant.u"), ("plant.y", "ctrl.y"), ("in.ref", "ctrl.ref"), ("plant.y", "out.y")],
    )
    ref = np.ones(50)
    _, expected, _ = signal.dlsim((A - k * B @ C, k * B, C, np.zeros((1, 1)), True), ref)
    np.testing.assert_allclose(loop.run({"ref": torch.as_tensor(ref)}).outputs["y"], expected[:, 0], atol=1e-12)


class Walk:
    """An environment as gymnasium has them: a walk on a line, which ends at 3."""

    observation_space = SimpleNamespace(low=np.zeros(1), shape=(1,))
    action_space = SimpleNamespace(n=2)

    def reset(self, *, seed: int | None = None) -> tuple[np.ndarray, dict]:
        self.at = 0
        return np.array([0.0]), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.at += 2 * action - 1
        return np.array([float(self.at)]), float(action), self.at == 3, False, {}


def test_an_environment_is_a_machine_that_can_be_run_again() -> None:
    env = environment(Walk())
    policy = Function(lambda seen: int(seen >= 0), Real(1), Finite(2)).machine(1)
    loop = System(
        {"env": env, "policy": policy},
        [
            ("env.observation", "policy"),
            ("policy", "env.action"),
            ("env.observation", "out.x"),
            ("env.done", "out.done"),
        ],
    )
    first = loop.run(7).outputs
    assert first["x"].flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0]
    assert first["done"].tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert torch.equal(loop.run(7).outputs["x"], first["x"])
    with pytest.raises(TypeMismatch, match="expected Box, Discrete"):
        environment(SimpleNamespace(observation_space=SimpleNamespace(), action_space=SimpleNamespace(n=2)))


def test_delays_streams_and_constants() -> None:
    u = torch.arange(1.0, 7.0)
    assert delay(Real(), 0.0, 3).run(u).outputs.tolist() == [0, 0, 0, 1, 2, 3]
    assert stream([1.0, 2.0], Real()).run(5).outputs.tolist() == [1, 2, 1, 2, 1]
    assert constant(Finite(3), 2).run(3).outputs.tolist() == [2, 2, 2]
    leaky = integrator(Real(2), dt=0.5, leak=1.0).run(torch.ones(4, 2)).outputs
    assert leaky[:, 0].tolist() == [0.0, 0.5, 0.75, 0.875]
    with pytest.raises(ValueError, match="1 or more"):
        delay(Real(), 0.0, 0)
    with pytest.raises(ValueError, match="no values"):
        stream([], Real())


# --- seen from outside -------------------------------------------------------------------------------


def test_types_are_printed_nested() -> None:
    text = tree(three_levels())
    lines = text.splitlines()
    assert lines[0] == "outer: (y: R, z: R) y"
    assert lines[1] == "├─ m: middle: (y: R, z: R) y^(u: R)"
    assert "│  ├─ left: inner: (y: R, z: R) y^(u: R)" in lines
    assert lines[-1].startswith("└─ wires: wiring: (d: (y: R), m: (y: R, z: R)")
    assert lines[-1].endswith("constant")


def test_a_system_is_a_recurrent_module_that_can_be_trained() -> None:
    u = torch.randn(15, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    system = System({"a": cell(0.5), "b": cell(0.9)}, [("in.u", "a.u"), ("a.y", "b.u"), ("b.y", "out.y")])
    module = NestedSystem(system).to_module()
    shown, state = module({"u": u})
    assert torch.equal(shown["y"], system.run({"u": u}).outputs["y"])
    again, _ = module({"u": u[:3]}, state)
    assert len(again["y"]) == 3
    assert {name for name, _ in module.named_buffers()} == {"state0", "state1"}
    (slope,) = torch.autograd.grad(shown["y"][-1], u)
    assert slope[-1] == slope[-2] == 0  # two boxes, two steps
    assert slope[-3] != 0


def test_systems_of_batches() -> None:
    u = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    system = System({"a": cell(0.5)}, [("in.u", "a.u"), ("a.y", "out.y")])
    for n, column in enumerate(u.T):
        got = system.run({"u": u}, {"a": torch.full((4,), 0.1, dtype=torch.float64)}).outputs["y"][:, n]
        torch.testing.assert_close(got, system.run({"u": column}).outputs["y"], rtol=1e-14, atol=1e-14)


def test_an_empty_system_has_the_unit_interface() -> None:
    assert wiring({}, []).target == Interface(UNIT, UNIT)
    assert System({}, []).run(2).outputs == [{}, {}]
