"""Learners: composed machines train to the weights of torch; requests, neurons, losses, state, modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from neuropil.errors import ModelError
from neuropil.interpret.nested import (
    LOGISTIC,
    SQUARED,
    Error,
    Finite,
    Function,
    Interface,
    Lens,
    NestedSystem,
    Organisation,
    Real,
    System,
    TypeMismatch,
    copier,
    criterion,
    fan_out,
    identity,
    learner,
    neurons,
    oja,
    plastic,
    replicate,
    restack,
    stream,
    tie,
    unstack,
)


def specimen(seed: int = 0) -> tuple[NestedSystem, tuple[Tensor, Tensor]]:
    """A network of composed learners, one layer of it by its neurons, and a batch of 12."""
    torch.manual_seed(seed)
    first, last = nn.Linear(4, 8), nn.Linear(8, 3)
    net = neurons(first, nn.Tanh(), lr=0.1) >> learner(last, lr=0.1)
    trainer = NestedSystem(net >> criterion(cross_entropy, Real(3), Finite(3)))
    return trainer, (torch.randn(12, 4), torch.randint(3, (12,)))


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def examples(count: int, batch: int | None, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    lead = () if batch is None else (batch,)
    return [
        tuple(torch.randn(*lead, n, generator=generator, dtype=torch.float64) for n in (4, 3))  # type: ignore[misc]
        for _ in range(count)
    ]


def by_torch(model: nn.Module, pairs: list[tuple[Tensor, Tensor]], lr: float) -> nn.Module:
    """SGD on half the squared error, summed over outputs, mean over the batch."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for x, y in pairs:
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().sum(-1).mean()).backward()
        optimizer.step()
    return model


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def layers(model: nn.Sequential, lr: float) -> list[Organisation]:
    """Each linear layer with its activation as a learner."""
    parts = [nn.Sequential(model[0], model[1]), nn.Sequential(model[2], model[3]), model[4]]
    return [learner(part, lr=lr) for part in parts]


# --- backpropagation as composition ------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 7])
@pytest.mark.parametrize("grouping", ["left", "right"])
def test_composed_learners_have_the_weights_of_torch(batch: int | None, grouping: str) -> None:
    model, pairs = mlp(), examples(100, batch)
    a, b, c = layers(model, 0.05)
    trainer = NestedSystem((a >> b) >> c if grouping == "left" else a >> (b >> c))
    for pair in pairs:
        trainer.step(pair)
    trained = by_torch(model, pairs, 0.05)
    assert distance(trainer.to_module(), trained) < 1e-12
    assert distance(model, trained) > 0.01


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("batch", [None, 5])
def test_so_have_layers_split_into_their_neurons(vectorised: bool, batch: int | None) -> None:
    model, pairs = mlp(), examples(100 if vectorised or batch is None else 10, batch)
    net = neurons(model[0], model[1], 0.05, vectorised=vectorised)
    net = net >> neurons(model[2], model[3], 0.05, vectorised=vectorised)
    trainer = NestedSystem(net >> neurons(model[4], None, 0.05, vectorised=vectorised))
    for pair in pairs:
        trainer.step(pair)
    trained = by_torch(model, pairs, 0.05)
    x = torch.randn(20, 4, dtype=torch.float64)
    assert float((trainer.predict(x) - trained(x).detach()).abs().max()) < 1e-12
    rows = _rows(trainer.state)
    assert max(float((a - b).abs().max()) for a, b in zip(rows, _flat(trained), strict=True)) < 1e-12


def _rows(state: Any) -> list[Tensor]:
    """The weights of each layer, put together from its neurons' states."""
    found = []
    for link in state:
        if isinstance(link, dict):  # all neurons of a layer, stacked
            found += [link["params"]["weight"], link["params"]["bias"]]
        elif link:  # one state a neuron
            found += [torch.stack([one["params"][name] for one in link]) for name in ("weight", "bias")]
    return found


def _flat(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


@given(st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_any_way_of_cutting_a_network_gives_the_same_training(first: int, sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    modules: list[nn.Module] = []
    for a, b in zip([first, *sizes], sizes, strict=False):
        modules += [nn.Linear(a, b), nn.Tanh()]
    model = nn.Sequential(*modules).double()
    pairs = [(torch.randn(3, first).double(), torch.randn(3, sizes[-1]).double()) for _ in range(5)]
    whole = NestedSystem(learner(model, lr=0.1))
    net: Any = learner(model[0], lr=0.1)
    for module in modules[1:]:
        net = net >> learner(module.double(), lr=0.1, inputs=Real(*net.target.out.shape))
    parts = NestedSystem(net)
    for pair in pairs:
        whole.step(pair)
        parts.step(pair)
    trained = by_torch(model, pairs, 0.1)
    assert distance(whole.to_module(), trained) < 1e-12
    assert distance(parts.to_module(), trained) < 1e-12


def test_composition_of_learners_is_associative_to_the_bit_and_has_identities() -> None:
    a, b, c = layers(mlp(), 0.05)
    still = identity(a.target)
    systems = [NestedSystem(net) for net in ((a >> b) >> c, a >> (b >> c), a >> still >> b >> c)]
    for pair in examples(20, 4):
        shown = [system.step(pair) for system in systems]
        assert torch.equal(shown[0], shown[1])
        assert torch.equal(shown[0], shown[2])
    assert torch.equal(systems[0].request(*pair), systems[1].request(*pair))


def test_learners_side_by_side_learn_apart() -> None:
    one, two = learner(nn.Linear(2, 1), lr=0.1), learner(nn.Linear(3, 2), lr=0.1)
    both = NestedSystem(one @ two)
    apart = [NestedSystem(one), NestedSystem(two)]
    for _ in range(5):
        x, y = (torch.randn(4, 2), torch.randn(4, 3)), (torch.randn(4, 1), torch.randn(4, 2))
        shown = both.step((x, y))
        assert all(torch.equal(shown[i], apart[i].step((x[i], y[i]))) for i in range(2))


def test_the_general_law_of_composition_is_the_fast_one() -> None:
    """`Organisation(wiring, update)` composed by the definition, against `forward` in one go."""
    fast = layers(mlp(), 0.05)
    slow = [Organisation(o.source, o.target, o.state, o.wiring, o.update) for o in fast]
    one, other = NestedSystem(fast[0] >> fast[1] >> fast[2]), NestedSystem(slow[0] >> slow[1] >> slow[2])
    for pair in examples(5, 3):
        assert torch.equal(one.step(pair), other.step(pair))
    assert all(torch.equal(p, q) for p, q in zip(_leaves(one.state), _leaves(other.state), strict=True))


def _leaves(state: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


# --- requests ----------------------------------------------------------------------------------------


def test_the_request_of_a_composite_is_the_input_less_the_gradient() -> None:
    model = mlp()
    a, b, c = layers(model, 0.05)
    trainer = NestedSystem(a >> b >> c)
    for batch in (None, 6):
        ((x, y),) = examples(1, batch)
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(0.5 * (model(leaf) - y).square().sum(), leaf)
        torch.testing.assert_close(trainer.request(x, y), x - slope, rtol=0, atol=1e-14)


def test_a_target_that_is_met_changes_nothing() -> None:
    a, b, c = layers(mlp(), 0.05)
    trainer = NestedSystem(a >> b >> c)
    x = torch.randn(4, dtype=torch.float64)
    y = trainer.predict(x)
    before = copy.deepcopy(_leaves(trainer.state))
    assert torch.equal(trainer.request(x, y), x)
    trainer.step((x, y))
    assert all(torch.equal(p, q) for p, q in zip(before, _leaves(trainer.state), strict=True))


@pytest.mark.parametrize("error", [SQUARED, LOGISTIC])
def test_the_inverse_of_an_error_is_one(error: Error) -> None:
    x, g = torch.randn(2, 50, dtype=torch.float64)
    torch.testing.assert_close(error.slope(x, error.inverse(x, g)), g, rtol=0, atol=1e-14)


def test_another_error_than_the_squared_one_composes_too() -> None:
    model, pairs = mlp(), [(x, (y > 0).double()) for x, y in examples(50, 6)]
    parts = [nn.Sequential(model[0], model[1]), nn.Sequential(model[2], model[3]), model[4]]
    a, b, c = (learner(part, LOGISTIC, 0.1) for part in parts)
    trainer = NestedSystem(a >> b >> c)
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    for x, y in pairs:
        trainer.step((x, y))
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(trained(x), y, reduction="sum").div(len(x)).backward()
        optimizer.step()
    assert distance(trainer.to_module()[:3], trained) < 1e-12


def test_copy_boxes_in_a_gradient_organisation_are_the_learner() -> None:
    """Item 8: examples as the outputs of a machine, wrapped in the organisation and driven by the targets."""
    a, b, c = layers(mlp(), 0.05)
    net, pairs = a >> b >> c, examples(30, 5)
    inputs = stream([x for x, _ in pairs], Real(4), Real(4))
    wrapped = (inputs >> net).run([y for _, y in pairs])
    trainer = NestedSystem(net)
    for n, pair in enumerate(pairs):
        assert torch.equal(trainer.step(pair), wrapped.outputs[n])
    assert all(torch.equal(p, q) for p, q in zip(_leaves(trainer.state), _leaves(wrapped.state[1]), strict=True))


def test_a_copy_box_holds_what_the_learner_asks_for() -> None:
    """Where the weights rest, the input descends the error: gradient descent in input space, of step 1."""
    x, other = torch.randn(2, 4, dtype=torch.float64)
    model = mlp()
    a, b, c = layers(model, 0.0)
    y = model(other).detach()
    dreaming = (copier(Real(4), x) >> (a >> b >> c)).run([y] * 200)
    expected = x
    for _ in range(200):
        leaf = expected.clone().requires_grad_()
        (slope,) = torch.autograd.grad(0.5 * (model(leaf) - y).square().sum(), leaf)
        expected = expected - slope
    torch.testing.assert_close(dreaming.state[0], expected, rtol=0, atol=1e-12)
    errors = (dreaming.outputs - y).square().sum(-1)
    assert float(errors[-1]) < 0.1 * float(errors[0])


# --- losses, modules of all kinds --------------------------------------------------------------------


def test_a_loss_of_torch_trains_as_in_torch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    trained = copy.deepcopy(model)
    trainer = NestedSystem(learner(model, cross_entropy, 0.2, targets=Finite(3)))
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.2)
    for _ in range(50):
        x, y = torch.randn(8, 4).double(), torch.randint(3, (8,))
        trainer.step((x, y))
        optimizer.zero_grad()
        cross_entropy(trained(x), y).backward()
        optimizer.step()
    assert distance(trainer.to_module()[0], trained) < 1e-12
    assert str(trainer.interface) == "[R^4 y^(R^4), R^3 y^3]"


def test_convolutions_batch_norm_and_frozen_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).double()
    model[0].bias.requires_grad_(False)
    trained = copy.deepcopy(model)
    trainer = NestedSystem(learner(model, mse_loss, 0.1, inputs=Real(1, 6, 6)))
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
    for _ in range(20):
        x, y = torch.randn(5, 1, 6, 6).double(), torch.randn(5, 2).double()
        trainer.step((x, y))
        optimizer.zero_grad()
        mse_loss(trained(x), y).backward()
        optimizer.step()
    made = trainer.to_module()[0]
    assert distance(made, trained) < 1e-12
    for name, value in trained.named_buffers():
        torch.testing.assert_close(made.get_buffer(name), value, rtol=0, atol=1e-12)
    assert torch.equal(made[0].bias, model[0].bias)
    assert int(model[1].num_batches_tracked) == 0  # the user's model is as it was


def test_indices_as_inputs_get_no_request() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)).double()
    trainer = NestedSystem(learner(model, lr=0.1, inputs=Finite(7)))
    pairs = [(torch.randint(7, (6,)), torch.randn(6, 3).double()) for _ in range(10)]
    for x, y in pairs:
        assert torch.equal(trainer.request(x, y), x)
        trainer.step((x, y))
    assert distance(trainer.to_module(), by_torch(model, pairs, 0.1)) < 1e-12


def test_tied_learners_are_a_shared_module() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(3, 2).double()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = copy.deepcopy(shared)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.shared(x[..., :3]), self.shared(x[..., 3:])], -1)

    pairs = [(torch.randn(4, 6).double(), torch.randn(4, 4).double()) for _ in range(20)]
    trained = by_torch(Twice(), pairs, 0.1)
    tied, free = NestedSystem(tie(learner(shared, lr=0.1), 2)), NestedSystem(learner(shared) @ learner(shared))
    for x, y in pairs:
        tied.step((tuple(x.split(3, -1)), tuple(y.split(2, -1))))
        free.step((tuple(x.split(3, -1)), tuple(y.split(2, -1))))
    torch.testing.assert_close(tied.state["params"]["weight"], trained.shared.weight, rtol=0, atol=1e-12)
    assert not torch.equal(free.state[0]["params"]["weight"], free.state[1]["params"]["weight"])


def test_many_learners_at_once_are_many_learners() -> None:
    torch.manual_seed(0)
    one = learner(nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double(), lr=0.1)
    many = NestedSystem(replicate(one, 4))
    apart = [NestedSystem(one) for _ in range(4)]
    for lead in ((), (5,), (2, 3)):
        x, y = torch.randn(*lead, 4, 3).double(), torch.randn(*lead, 4, 2).double()
        expected_request = torch.stack([s.request(x[..., j, :], y[..., j, :]) for j, s in enumerate(apart)], -2)
        torch.testing.assert_close(many.request(x, y), expected_request, rtol=0, atol=1e-13)
        shown = many.step((x, y))
        expected = torch.stack([s.step((x[..., j, :], y[..., j, :])) for j, s in enumerate(apart)], -2)
        torch.testing.assert_close(shown, expected, rtol=0, atol=1e-13)
    for j, alone in enumerate(apart):
        torch.testing.assert_close(
            many.state["params"]["0.weight"][j], alone.state["params"]["0.weight"], rtol=0, atol=1e-13
        )


def test_copies_are_undone() -> None:
    space, x = Real(2), torch.randn(5, 3, 2)
    there, back = unstack(space, 3), restack(space, 3)
    assert torch.equal((there >> back).get(x), x)
    assert torch.equal((there >> back).put(x, x + 1), x + 1)
    asked = fan_out(space, 3).put(x[:, 0], x)
    torch.testing.assert_close(asked, x[:, 0] + (x - x[:, :1]).sum(1))


# --- to_module, state --------------------------------------------------------------------------------


def test_the_module_of_a_trained_network_is_a_copy_of_it() -> None:
    trainer, (x, y) = specimen()
    for _ in range(3):
        trainer.step((x, y))
    module, shown = trainer.to_module(), trainer.predict(x)
    assert isinstance(module, nn.Sequential)
    torch.testing.assert_close(module(x), shown, rtol=0, atol=1e-6)
    trainer.step((x, y))
    torch.testing.assert_close(module(x), shown, rtol=0, atol=1e-6)
    assert not torch.equal(trainer.predict(x), shown)
    cross_entropy(module(x), y).backward()  # and goes on learning by torch
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


def test_the_module_of_plastic_wires_has_their_gains() -> None:
    face = Interface({"y": Real(2)}, {"u": Real(2)})
    wires = [("a.y", "out.y", torch.randn(3, 2)), ("in.u", "a.u")]
    synapses = plastic({"a": face}, wires, oja(0.1))
    module = NestedSystem(synapses).to_module()
    x = torch.randn(5, 2)
    torch.testing.assert_close(module({"a": {"y": x}})["y"], x @ wires[0][2].T)  # type: ignore[union-attr]
    assert [p.shape for p in module.parameters()] == [(5, 4)]


def test_a_state_of_another_system_is_refused() -> None:
    trainer, other = specimen()[0], NestedSystem(learner(nn.Linear(4, 3)))
    with pytest.raises(ValueError, match=r"state of another system: expected one of .*cross_entropy"):
        trainer.load_state_dict(other.state_dict())
    state = other.state_dict()
    state["state"]["params"]["weight"] = torch.zeros(3, 5)
    with pytest.raises(ValueError, match="state of another system"):
        other.load_state_dict(state)


def test_the_saved_state_is_a_copy_and_reset_goes_back() -> None:
    trainer, batch = specimen()
    saved, first = trainer.state_dict(), trainer.step(batch)
    trainer.step(batch)
    trainer.load_state_dict(saved)
    assert torch.equal(trainer.step(batch), first)
    trainer.reset()
    assert torch.equal(trainer.step(batch), first)


def test_a_system_moves_to_another_precision() -> None:
    trainer, (x, y) = specimen()
    assert trainer.to(torch.float64).step((x.double(), y)).dtype == torch.float64


def test_a_running_learner_shows_lenses() -> None:
    """As a machine, a learner shows wirings: the network as it is now, and gives requests."""
    net = learner(nn.Linear(2, 1).double(), lr=0.1)
    pairs = [(torch.randn(2).double(), torch.randn(1).double()) for _ in range(3)]
    run = net.run(pairs)
    assert all(isinstance(lens, Lens) for lens in run.outputs)
    system = NestedSystem(net)
    for lens, (x, y) in zip(run.outputs, pairs, strict=True):
        assert torch.equal(lens.put(x, y), system.request(x, y))
        assert torch.equal(lens.get(x), system.step((x, y)))


def test_only_organisations_predict() -> None:
    system = NestedSystem(copier(Real(), torch.tensor(1.0)))
    with pytest.raises(TypeMismatch, match="only those map an inside to an outside"):
        system.predict(torch.tensor(1.0))
    assert NestedSystem(identity(Interface(2, 2))).predict(1) == 1


# --- what is refused ---------------------------------------------------------------------------------


class Rounds(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(3, 3), how

    def forward(self, x: Tensor) -> Any:
        out = self.linear(x)
        if self.how == "argmax":
            return out.argmax(-1, keepdim=True)
        return out.round() if self.how == "round" else out.detach() if self.how == "detach" else (out, out)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("round", "not differentiable: no gradient reaches its input.*straight-through"),
        ("detach", "not differentiable"),
        ("argmax", r"a tensor of torch\.int64.*expected one tensor of real numbers"),
        ("pair", "gives tuple"),
    ],
)
def test_what_cannot_learn_by_gradients_is_refused(how: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        learner(Rounds(how))


def test_a_nondifferentiable_box_can_be_given_its_own_request() -> None:
    """As the message says: a straight-through lens between two learners."""
    a, c = learner(nn.Linear(4, 3).double(), lr=0.1), learner(nn.Linear(3, 2).double(), lr=0.1)
    signs = Lens(a.target, a.target, torch.sign, lambda x, d: x + d - x.sign(), "sign")
    trainer = NestedSystem(a >> signs >> c)
    before = trainer.state[0]["params"]["weight"].clone()
    trainer.step((torch.randn(5, 4).double(), torch.randn(5, 2).double()))
    assert not torch.equal(trainer.state[0]["params"]["weight"], before)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be told from its first layer, Conv2d: give inputs"):
        learner(nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError, match="lr=-1"):
        learner(nn.Linear(2, 2), lr=-1.0)
    with pytest.raises(TypeMismatch, match="a module takes one tensor"):
        learner(nn.Linear(2, 2), inputs=Interface(2, (Real(), Real())).in_)
    with pytest.raises(ModelError, match=r"cannot be run on a batch of R\^3"):
        learner(nn.Linear(2, 2), inputs=Real(3))
    with pytest.raises(TypeMismatch, match=r"Linear, of type \[R\^2.*shows R\^3 y\^\(R\^3\); Linear, of type .* R\^4"):
        learner(nn.Linear(2, 3)) >> learner(nn.Linear(4, 1))
    with pytest.raises(TypeMismatch, match="a loss is taken of real ones"):
        criterion(cross_entropy, Finite(3))
    with pytest.raises(TypeMismatch, match=r"0 has shape \(5, 3\); expected R\^4"):
        specimen()[0].step((torch.zeros(5, 3), torch.zeros(5, dtype=torch.long)))
    with pytest.raises(TypeMismatch, match="1 is 7; expected 0 to 2"):
        specimen()[0].step((torch.zeros(5, 4), torch.full((5,), 7)))
    with pytest.raises(TypeMismatch, match="a function has no place among wires that learn"):
        System({"f": Function(lambda x: x, Real(), Real())}, [("in", "f"), ("f", "out")], rule=oja(0.1))
