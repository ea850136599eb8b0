"""Wires that learn: rules against their closed forms, swapped for constant wires, in systems with memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuropil.interpret.nested import (
    InstantaneousLoop,
    Interface,
    Machine,
    NestedSystem,
    Real,
    System,
    TypeMismatch,
    WiringError,
    delay,
    gains,
    gradient,
    hebbian,
    integrator,
    learner,
    oja,
    plastic,
    reward_modulated,
    stream,
)

FACE = Interface({"y": Real()}, {"u": Real()})
DOUBLE = torch.float64


def cell(factor: float) -> Machine:
    start = torch.tensor(0.1, dtype=DOUBLE)
    return Machine(FACE, start, lambda s: {"y": s}, lambda s, d: factor * s + d["u"], "cell")


def readout(rule: Any, gain: Tensor, **signals: Any) -> Any:
    """One bundle of wires from a box of n outputs to the outside."""
    box = Interface(Real(gain.shape[1]), Real())
    wires = [("box", "out.y", gain), ("in.u", "box")]
    return plastic({"box": box}, wires, rule, learning=[("box", "out.y")], dtype=DOUBLE, **signals)


def w(state: Any, like: Tensor) -> Tensor:
    return state["gain"][1 : 1 + like.shape[0], : like.shape[1]]


def inputs(count: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(count, n, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# --- rules against closed forms ----------------------------------------------------------------------


def test_hebb_is_its_recursion() -> None:
    gain, x = inputs(2, 3, 1) / 10, inputs(40, 3) / 3
    system = NestedSystem(readout(hebbian(0.05, decay=0.1), gain))
    expected = gain.clone()
    for row in x:
        shown = system.step(({"box": row}, {"u": torch.tensor(0.0, dtype=DOUBLE)}))["y"]
        torch.testing.assert_close(shown, expected @ row, rtol=1e-12, atol=0)
        expected = expected + 0.05 * (torch.outer(expected @ row, row) - 0.1 * expected)
    torch.testing.assert_close(w(system.state, gain), expected, rtol=1e-12, atol=1e-15)


def test_hebb_on_linear_boxes_is_a_product_of_matrices() -> None:
    """w grows by w (I + lr x xᵀ) at each step."""
    gain, x = inputs(1, 4, 1), inputs(30, 4) / 4
    system = NestedSystem(readout(hebbian(0.1), gain))
    product = torch.eye(4, dtype=DOUBLE)
    for row in x:
        system.step(({"box": row}, {"u": torch.tensor(0.0, dtype=DOUBLE)}))
        product = product @ (torch.eye(4, dtype=DOUBLE) + 0.1 * torch.outer(row, row))
    torch.testing.assert_close(w(system.state, gain), gain @ product, rtol=1e-11, atol=1e-14)


def test_oja_is_its_recursion_and_finds_the_leading_eigenvector() -> None:
    mixing = torch.tensor([[2.0, 0.0, 0.0], [0.8, 0.5, 0.0], [0.0, 0.3, 0.4]], dtype=DOUBLE)
    x, gain = inputs(1200, 3) @ mixing.T, torch.full((1, 3), 0.3, dtype=DOUBLE)
    system = NestedSystem(readout(oja(0.01), gain))
    expected = gain.clone()
    for row in x:
        system.step(({"box": row}, {"u": torch.tensor(0.0, dtype=DOUBLE)}))
        y = expected @ row
        expected = expected + 0.01 * y[:, None] * (row - y[:, None] * expected)
    found = w(system.state, gain)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    leading = torch.linalg.eigh(mixing @ mixing.T).eigenvectors[:, -1]
    assert float((found[0] @ leading).abs() / found.norm()) > 0.99
    assert float(found.norm()) == pytest.approx(1, abs=0.05)


def test_the_gradient_rule_is_the_learner() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False).double()
    trained = NestedSystem(learner(layer, lr=0.1))
    rule = NestedSystem(readout(gradient(0.1), layer.weight.detach(), teachers={"out.y": "in.target"}))
    for batch in ((), (5,)):
        for _ in range(20):
            x, y = torch.randn(*batch, 3).double(), torch.randn(*batch, 2).double()
            trained.step((x, y))
            rule.step(({"box": x}, {"u": torch.zeros(batch).double(), "target": y}))
    torch.testing.assert_close(w(rule.state, layer.weight), trained.state["params"]["weight"], rtol=1e-12, atol=1e-14)


def test_normalised_gradient_learns_a_map_whatever_the_scale() -> None:
    truth = inputs(2, 4, 3)
    for scale in (0.01, 100.0):
        rule = gradient(0.5, normalised=True)
        system = NestedSystem(readout(rule, torch.zeros(2, 4, dtype=DOUBLE), teachers={"out.y": "in.target"}))
        for row in scale * inputs(200, 4):
            system.step(({"box": row}, {"u": torch.tensor(0.0, dtype=DOUBLE), "target": truth @ row}))
        torch.testing.assert_close(w(system.state, truth), truth, rtol=0, atol=0.02)


def test_reward_modulation_ascends_the_reward_in_the_mean() -> None:
    """The mean change over many draws of the noise is the gradient of the expected reward."""
    gain, x, target = inputs(1, 3, 1), inputs(1, 3, 2)[0], torch.tensor([0.7], dtype=DOUBLE)
    rule = reward_modulated(1.0, noise=0.01, baseline=0.0)
    organisation = readout(rule, gain, teachers={"out.y": "in.target"})
    passed = ({"box": x}, {"u": torch.tensor(0.0, dtype=DOUBLE), "target": target})
    expected = -((target - gain @ x).square().sum() / 2)
    state, changes = organisation.state, []
    state["rule"] |= {"expected": expected, "count": torch.tensor(1)}
    for _ in range(400):
        after = organisation.update(state, passed)
        changes.append(w(after, gain) - gain)
        state = {**after, "gain": state["gain"]}  # the next noise, the old gains
    gradient_of_reward = (target - gain @ x)[:, None] * x
    mean = torch.stack(changes).mean(0)
    error = torch.stack(changes).std(0) / 20
    assert bool(((mean - gradient_of_reward).abs() < 4 * error).all())
    assert float(torch.cosine_similarity(mean, gradient_of_reward, -1)) > 0.99


def test_reward_modulation_learns_from_a_number_alone() -> None:
    rule = reward_modulated(0.005, noise=0.1, baseline=0.3, seed=1)
    gain = torch.zeros(1, 1, dtype=DOUBLE)
    system = NestedSystem(readout(rule, gain, reward="in.r"))
    zero, one = torch.tensor(0.0, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)
    for _ in range(600):
        shown = system.machine.get(system.state, {"box": one})["y"]  # type: ignore[attr-defined]
        system.step(({"box": one}, {"u": zero, "r": -(shown - 2.0).square().sum()}))
    assert float(w(system.state, gain)) == pytest.approx(2.0, abs=0.3)


def test_reward_modulation_resumes_to_the_bit() -> None:
    def start(seed: int) -> NestedSystem:
        rule = reward_modulated(0.001, noise=0.1, trace=0.5, seed=seed)
        return NestedSystem(readout(rule, torch.zeros(1, 2, dtype=DOUBLE), teachers={"out.y": "in.t"}))

    def go(system: NestedSystem, rows: Tensor) -> None:
        for row in rows:
            system.step(({"box": row}, {"u": row[0], "t": row[:1]}))

    x, whole, half, rest = inputs(20, 2), start(3), start(3), start(3)
    go(whole, x)
    go(half, x[:9])
    rest.load_state_dict(half.state_dict())
    go(rest, x[9:])
    assert torch.equal(rest.state["gain"], whole.state["gain"])
    assert bool(whole.state["gain"].isfinite().all())
    assert torch.equal(rest.state["rule"]["noise"], whole.state["rule"]["noise"])


# --- wires for wires ---------------------------------------------------------------------------------


def loop(rule: Any = None, **signals: Any) -> System:
    boxes = {"a": cell(0.5), "b": cell(-0.3)}
    wires = [("a.y", "b.u"), ("in.u", "a.u"), ("b.y", "out.y")]
    return (
        System(boxes, wires, rule, **signals) if rule is None else System(boxes, wires, rule, dtype=DOUBLE, **signals)
    )


def test_wires_that_do_not_learn_yet_are_the_constant_ones() -> None:
    u = {"u": inputs(50, 1)[:, 0]}
    constant = loop().run(u).outputs["y"]
    for rule in (hebbian(0.0), oja(0.0)):
        torch.testing.assert_close(loop(rule).run(u).outputs["y"], constant, rtol=1e-14, atol=1e-14)
    assert not torch.allclose(loop(hebbian(0.01)).run(u).outputs["y"], constant, atol=1e-3)


def test_only_the_wires_that_may_learn_do() -> None:
    u = {"u": inputs(20, 1)[:, 0]}
    system = loop(hebbian(0.1), learning=[("a.y", "b.u")])
    after = gains(system.around, system.run(u).state[1])  # type: ignore[arg-type]
    assert float(after["a.y", "b.u"]) != 1
    assert float(after["in.u", "a.u"]) == float(after["b.y", "out.y"]) == 1


def test_signals_add_up_where_wires_meet() -> None:
    boxes = {"a": cell(0.0), "b": cell(0.0)}
    wires = [("in.u", "a.u", 2.0), ("b.y", "a.u", -1.0), ("in.v", "a.u"), ("a.y", "b.u", 0.5), ("a.y", "out.y")]
    system = System(boxes, wires, hebbian(0.0), dtype=DOUBLE)
    one = torch.ones(4, dtype=DOUBLE)
    a, b, expected = 0.1, 0.1, []
    for _ in range(4):
        expected.append(a)
        a, b = 2.0 - b + 1.0, 0.5 * a
    torch.testing.assert_close(system.run({"u": one, "v": one}).outputs["y"], torch.tensor(expected, dtype=DOUBLE))


def test_a_recurrent_system_learns_online_what_needs_memory() -> None:
    """Delays inside, the wires from them to the outside learn: the sum of the inputs two and three steps ago."""
    u = inputs(400, 1)[:, 0]
    boxes = {f"d{i}": delay(Real(), torch.tensor(0.0, dtype=DOUBLE)) for i in range(4)}
    wires: list[Any] = [("in.u", "d0")] + [(f"d{i}", f"d{i + 1}") for i in range(3)]
    wires += [(f"d{i}", "out.y", 0.0) for i in range(4)]
    reading = [(f"d{i}", "out.y") for i in range(4)]
    system = NestedSystem(
        System(boxes, wires, gradient(0.3, normalised=True), learning=reading, teachers={"out.y": "in.t"}, dtype=DOUBLE)
    )
    target = torch.zeros_like(u)
    target[3:] = u[1:-2] + u[:-3]
    shown = system.run({"u": u, "t": target})["y"]
    assert float((shown - target)[-50:].abs().max()) < 0.02
    assert float((shown - target)[:20].abs().max()) > 0.5


def test_correlated_ends_grow_together() -> None:
    common = inputs(600, 2) * torch.tensor([1.0, 0.5], dtype=DOUBLE)
    spikes = torch.stack([common[:, i // 2] for i in range(4)], 1) + 0.3 * inputs(600, 4, 5)
    boxes: dict[str, Any] = {f"s{i}": stream(spikes[:, i], Real()) for i in range(4)}
    boxes |= {"cell": integrator(Real(), torch.tensor(0.0, dtype=DOUBLE), leak=1.0)}
    wires: list[Any] = [(f"s{i}", "cell", 0.6 if i < 2 else 0.1) for i in range(4)] + [("cell", "out.y")]
    system = System(boxes, wires, oja(0.02), learning=[(f"s{i}", "cell") for i in range(4)], dtype=DOUBLE)
    after = gains(system.around, system.run(600).state[1])  # type: ignore[arg-type]
    sizes = [float(after[f"s{i}", "cell"]) for i in range(4)]
    assert min(sizes[:2]) > 5 * max(abs(v) for v in sizes[2:])


def test_plastic_systems_nest_in_constant_ones_and_the_other_way() -> None:
    u = {"u": inputs(30, 1)[:, 0]}
    inner = loop(hebbian(0.05))
    outer = System({"i": inner, "c": cell(0.2)}, [("in.u", "i.u"), ("i.y", "c.u"), ("c.y", "out.y")])
    assert set(outer.flatten().boxes) == {"i", "c"}
    assert torch.equal(outer.flatten().run(u).outputs["y"], outer.run(u).outputs["y"])
    around = System(
        {"i": loop(), "c": cell(0.2)}, [("in.u", "i.u"), ("i.y", "c.u"), ("c.y", "out.y")], hebbian(0.01), dtype=DOUBLE
    )
    assert float(gains(around.around, around.run(u).state[1])["i.y", "c.u"]) != 1  # type: ignore[arg-type]
    with pytest.raises(WiringError, match="no constant plan"):
        around.flatten()


def test_gains_are_parameters_of_the_recurrent_module_and_boxes_are_buffers() -> None:
    module = NestedSystem(loop(oja(0.0))).to_module()
    assert len(list(module.parameters())) == 1
    assert len(list(module.buffers())) == 2
    shown, _ = module({"u": inputs(6, 1)[:, 0]})
    shown["y"][-1].backward()
    gain = next(iter(module.parameters()))
    assert gain.grad is not None
    assert bool(gain.grad.any())


# --- what is refused ---------------------------------------------------------------------------------

WIDE = Interface({"y": Real(2)}, {"u": Real(3)})


@pytest.mark.parametrize(
    ("boxes", "wires", "options", "error", "message"),
    [
        ({"a": FACE}, [("a.y", "out.y")], {}, WiringError, r"not connected: a\.u"),
        ({"a": FACE}, [("a.y", "a.u"), ("in.x", "out.y")], {}, InstantaneousLoop, "delay box"),
        ({"a": FACE}, [("a.y", "a.u"), ("a.y", "a.u", 2.0)], {}, WiringError, "two wires from a.y to a.u"),
        ({"a": WIDE}, [("a.y", "a.u")], {}, TypeMismatch, r"a matrix of shape \(3, 2\)"),
        ({"a": WIDE}, [("a.y", "a.u", torch.zeros(2, 3))], {}, TypeMismatch, r"shape \(2, 3\); expected \(3, 2\)"),
        ({"a": Interface(2, 2)}, [("a", "a")], {}, TypeMismatch, "gains are for real numbers"),
        ({"a": FACE}, [("a.y", "a.u")], {"learning": [("in.x", "a.u")]}, WiringError, "no wire from in.x to a.u"),
        ({"a": FACE}, [("a.y", "a.u")], {"teachers": {"out.y": "in.t"}}, WiringError, "has no wire"),
        ({"a": WIDE}, [("in.u", "a.u")], {"reward": "a.y"}, TypeMismatch, "a.y carries R\\^2, and R is wanted"),
        ({"a": FACE}, [("a.y", "a.u"), ("a.y", "out"), ("a.y", "out.y")], {}, WiringError, "both used"),
    ],
)
def test_bad_wires_are_refused(boxes: Any, wires: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plastic(boxes, wires, hebbian(0.1), **options)


def test_bad_rules_are_refused() -> None:
    wires = [("a.y", "a.u"), ("a.y", "out.y")]
    with pytest.raises(ValueError, match="gradient needs teachers"):
        plastic({"a": FACE}, wires, gradient(0.1))
    with pytest.raises(ValueError, match="reward-modulated needs reward"):
        plastic({"a": FACE}, wires, reward_modulated(0.1))
    for make in (hebbian, oja, gradient, reward_modulated):
        with pytest.raises(ValueError, match="lr=-1"):
            make(-1.0)
    with pytest.raises(ValueError, match="noise=0"):
        reward_modulated(0.1, noise=0.0)
