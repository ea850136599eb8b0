"""Equilibrium propagation: exact errors in float64, both biases, homeostasis, convolutions, the trainer."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from neuropil.data import digits
from neuropil.errors import ModelError
from neuropil.learn._eqprop_network import cast_call
from neuropil.learn.eqprop import (
    ConvPool,
    ConvPoolBack,
    Dense,
    EquilibriumNetwork,
    EquilibriumPropagation,
    NotSettled,
    Options,
    bp_grad,
    cnn,
    dsilu,
    ep_grad,
    error_alignment,
    exact_error,
    gradient_angle,
    jacobian,
    jacobian_homeostasis_loss,
    loop,
    mlp,
    rbp_grad,
    residual,
    response,
    rotate,
    softmax_pool,
    symmetry_score,
    weight_angle,
)

T1, T2 = 300, 150  # enough for the small networks here to settle to rounding


def specimen(seed: int = 0) -> tuple[EquilibriumPropagation, tuple[Tensor, Tensor]]:
    """A trainer with homeostasis (so that it draws probes) and a batch of 12."""
    torch.manual_seed(seed)
    network = mlp(5, (8, 6), 3, step_size=0.5)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    trainer = EquilibriumPropagation(network, optimizer, n_nudges=2, T1=60, T2=10, homeostasis=0.1, seed=seed)
    return trainer, (torch.rand(12, 5), torch.randint(3, (12,)))


def small(alpha: float, seed: int = 0, **options: object) -> tuple[EquilibriumNetwork, Tensor, Tensor]:
    torch.manual_seed(seed)
    network = mlp(5, (6, 4), 3, **{"step_size": 0.5, **options}).double()
    rotate(network, alpha)
    return network, torch.rand(7, 5).double(), torch.randint(3, (7,))


def implicit(network: EquilibriumNetwork, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The exact errors and the gradient without the readout's, by solving the linear system."""
    with torch.no_grad():
        u = {k: v.requires_grad_() for k, v in network(x, 4 * T1).items()}
    slope = torch.autograd.grad(
        network.loss(network.activation(u["out"]), y).sum(), list(u.values()), allow_unused=True
    )
    flat = torch.cat([torch.zeros_like(v) if g is None else g for g, v in zip(slope, u.values(), strict=True)], 1)
    J = jacobian(lambda state: network.force(state, x), u)
    delta = -torch.linalg.solve(J.mT, flat)
    split = dict(zip(u, delta.split([v.shape[1] for v in u.values()], 1), strict=True))
    force = network.force({k: v.detach() for k, v in u.items()}, x)
    inner = [p for n, p in network.named_parameters() if not n.startswith("readout")]
    return split, list(torch.autograd.grad([force[k] for k in u], inner, [split[k] / len(x) for k in u]))


def inner_gradients(network: EquilibriumNetwork) -> list[Tensor]:
    return [p.grad.clone() for n, p in network.named_parameters() if not n.startswith("readout") and p.grad is not None]


def error_of(network: EquilibriumNetwork, x: Tensor, y: Tensor, **options: object) -> float:
    """Relative error of the gradient of equilibrium propagation."""
    return errors_of(network, x, y, [options])[0]


def errors_of(network: EquilibriumNetwork, x: Tensor, y: Tensor, settings: list[dict[str, object]]) -> list[float]:
    exact = torch.cat([g.flatten() for g in implicit(network, x, y)[1]])
    found = []
    for options in settings:
        network.zero_grad()
        ep_grad(network, x, y, T1=T1, T2=T2, **options)
        ours = torch.cat([g.flatten() for g in inner_gradients(network)])
        found.append(float((ours - exact).norm() / exact.norm()))
    return found


def spread(network: EquilibriumNetwork, x: Tensor) -> dict[str, Tensor]:
    return {name: part.detach() for name, part in network(x, T1).items()}


# --- against closed forms ----------------------------------------------------------------------------


@pytest.mark.parametrize(("n_nudges", "bound"), [(0, 1e-10), (2, 1e-7), (4, 1e-10)])
def test_symmetric_and_nearly_unnudged_is_the_exact_gradient(n_nudges: int, bound: float) -> None:
    assert error_of(*small(0.0), beta=1e-4, n_nudges=n_nudges) < bound


def test_bias_of_a_finite_nudge_falls_as_beta_to_the_n() -> None:
    counts = (1, 2, 3, 4, 6)
    wide, narrow = (errors_of(*small(0.0), [{"beta": beta, "n_nudges": n} for n in counts]) for beta in (0.05, 0.025))
    assert wide == sorted(wide, reverse=True)
    assert wide[-1] < 1e-6 < 1e-3 < wide[0]
    for n, far, near in zip(counts[:4], wide, narrow, strict=False):  # six nudges are near rounding
        assert n - 0.3 < math.log2(far / near) < n + 0.3


def test_bias_of_asymmetry_does_not_fall() -> None:
    pairs = ((0.05, 4), (1e-3, 4), (1e-4, 2), (0.05, 6), (0.5, 0))
    errors = errors_of(*small(90.0), [{"beta": beta, "n_nudges": n} for beta, n in pairs])
    assert min(errors) > 0.1
    assert max(errors) - min(errors) < 1e-3 * max(errors)


@pytest.mark.parametrize("alpha", [0.0, 90.0])
def test_nudged_response_tends_to_the_derivative(alpha: float) -> None:
    network, x, y = small(alpha)
    u = spread(network, x)
    exact = response(network, u, x, y, steps=T2)
    near = response(network, u, x, y, beta=1e-4, n_nudges=2, steps=T2)
    for name in u:
        assert (near[name] - exact[name]).norm() < 1e-6 * exact[name].norm()


def test_derivative_is_that_of_the_nudged_steps_also_before_settling() -> None:
    network, x, y = small(90.0)
    u = spread(network, torch.rand(7, 5).double())  # a state that is no fixed point for x

    def activity(beta: Tensor) -> dict[str, Tensor]:
        return network.activate(network(x, 7, u, y, beta))

    expected = torch.func.jvp(activity, (x.new_zeros(()),), (x.new_ones(()),))[1]
    found = response(network, u, x, y, steps=7)
    for name in u:
        torch.testing.assert_close(found[name], expected[name])
    before = response(network, u, x, y, steps=1)
    assert not before["l1"].any()  # a nudge reaches the hidden layers one step later


@pytest.mark.parametrize("method", ["recurrent", "neumann"])
def test_exact_error_solves_the_linear_system(method: str) -> None:
    network, x, y = small(90.0, step_size=1.0)
    with torch.no_grad():
        for name, p in network.named_parameters():  # weak enough for the full step and the series to converge
            p.mul_(1.0 if name.startswith("readout") else 0.5)
    found = exact_error(network, spread(network, x), x, y, steps=T1, method=method)
    expected, _ = implicit(network, x, y)
    for name in found:
        assert (found[name] - expected[name]).norm() < 1e-6 * expected[name].norm()


def test_neumann_series_is_recurrent_backpropagation_one_step_ahead() -> None:
    network, x, y = small(90.0, step_size=1.0)
    u = spread(network, x)
    series, recurrent = (
        exact_error(network, u, x, y, steps=s, method=m) for s, m in ((4, "neumann"), (5, "recurrent"))
    )
    for name in u:
        torch.testing.assert_close(series[name], recurrent[name])


def test_the_three_backward_methods_agree_at_a_fixed_point() -> None:
    network, x, y = small(90.0)
    found = []
    for grad, steps in ((rbp_grad, T2), (bp_grad, T2)):
        network.zero_grad()
        grad(network, x, y, T1=T1, T2=steps)
        found.append([p.grad.clone() for p in network.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found[0][:8], implicit(network, x, y)[1], rtol=1e-8, atol=1e-12)


def test_a_dense_map_learns_from_its_two_ends() -> None:
    network, x, y = small(90.0)
    ep_grad(network, x, y, T1=T1, T2=T2)
    u = spread(network, x)
    a, r = response(network, u, x, y, steps=T2), network.activate(u)
    torch.testing.assert_close(network.connections["l1-l2"].weight.grad, a["l2"].T @ r["l1"] / 7)
    torch.testing.assert_close(network.connections["l2-l1"].weight.grad, a["l1"].T @ r["l2"] / 7)
    torch.testing.assert_close(network.connections["in-l1"].bias.grad, a["l1"].mean(0))
    gap = network.logits(r["out"]).softmax(1) - nn.functional.one_hot(y, 3)
    torch.testing.assert_close(network.readout.weight.grad, gap.T @ r["out"] / 7)


def test_squared_error_and_given_targets() -> None:
    torch.manual_seed(0)
    network = mlp(5, (6,), None, n_out=2, step_size=0.5).double()
    rotate(network, 0.0)
    x, y = torch.rand(4, 5).double(), torch.rand(4, 2).double()
    for n_nudges in (2, 4):
        assert error_of(network, x, y, beta=1e-3, n_nudges=n_nudges) < 1e-5
    labels = torch.tensor([0, 1, 1, 0])
    r = torch.rand(4, 2).double()
    torch.testing.assert_close(network.loss(r, labels), 0.5 * (r - nn.functional.one_hot(labels)).square().sum(1))
    single = mlp(5, (6,), None, n_out=1, step_size=0.5).double()
    ep_grad(single, x, torch.rand(4).double(), n_nudges=4)
    with pytest.raises(ValueError, match="targets"):
        network.loss(r, torch.rand(4, 3))


def test_online_estimate_never_returns_to_the_free_state_and_is_exact_too() -> None:
    network, x, y = small(0.0)
    outcome = ep_grad(network, x, y, mode="online", beta=0.02, n_nudges=4, T1=8 * 200, T2=200)
    ours, exact = (torch.cat([g.flatten() for g in s]) for s in (inner_gradients(network), implicit(network, x, y)[1]))
    assert (ours - exact).norm() < 1e-5 * exact.norm()
    assert outcome.residual < 1e-5
    short = Options(mode="online", n_nudges=4, T1=50, T2=10)
    with pytest.raises(ValueError, match="makes 5 blocks"):
        ep_grad(network, x, y, **vars(short))


# --- holomorphic functions ---------------------------------------------------------------------------


def test_softmax_pool_of_constants_and_of_far_apart_values() -> None:
    torch.testing.assert_close(softmax_pool(torch.full((2, 3, 4, 6), 1.7)), torch.full((2, 3, 2, 3), 1.7))
    x = torch.tensor([[[[500.0, -900.0], [-900.0, -900.0]]]])
    assert softmax_pool(x).item() == softmax_pool(x.to(torch.complex64)).real.item() == 500.0


def test_real_input_stays_real_on_the_complex_path() -> None:
    torch.manual_seed(0)
    for network, x in (
        (mlp(5, (6, 4), 3), torch.rand(3, 5)),
        (cnn(3, image=(1, 12, 12), channels=(3, 4)), torch.rand(3, 1, 12, 12)),
    ):
        u = cast_call(network, torch.complex64, x, 20, None, torch.tensor([0, 1, 2]), 0.3)
        real = network(x, 20, None, torch.tensor([0, 1, 2]), 0.3)
        for name, part in u.items():
            assert not part.imag.any()
            torch.testing.assert_close(part.real, real[name])


def test_top_down_convolution_is_the_gradient_of_the_bottom_up_one() -> None:
    torch.manual_seed(0)
    for padding, size in ((1, 6), (0, 4)):
        up, down = ConvPool(3, 5, padding, bias=False), ConvPoolBack(3, 5, padding)
        down.load_state_dict(up.state_dict())
        low = torch.rand(2, 3, size, size, requires_grad=True)
        pooled = up(low, torch.zeros(2, 5, size // 2 - 1 + padding, size // 2 - 1 + padding))
        high = torch.rand_like(pooled)
        (expected,) = torch.autograd.grad((pooled * high).sum(), low)
        torch.testing.assert_close(down(high, low), expected)


def test_convolutional_network_with_tied_kernels_follows_the_gradient() -> None:
    torch.manual_seed(0)
    network = cnn(4, image=(2, 12, 12), channels=(3, 4)).double()
    x, y = torch.rand(3, 2, 12, 12).double(), torch.tensor([0, 1, 3])
    assert network.shapes == {"conv1": (3, 6, 6), "out": (4, 2, 2)}
    rotate(network, 0.0)
    assert gradient_angle(network, x, y, beta=0.1, n_nudges=4, T1=200, T2=100)["all"] < 1e-3
    torch.testing.assert_close(
        symmetry_score(network.coupling, network.activate(network(x, 200))), torch.ones(3).double()
    )
    rotate(network, 90.0)
    assert gradient_angle(network, x, y, T1=200, T2=100)["all"] < 1e-3  # sin 90 B + cos 90 W leaves B
    nn.init.normal_(network.connections["out-conv1"].weight, std=0.2)
    assert gradient_angle(network, x, y, T1=200, T2=100)["all"] > 1


def test_the_papers_network_for_cifar() -> None:
    with torch.device("meta"):
        network = cnn(10)
    assert network.shapes == {"conv1": (128, 16, 16), "conv2": (256, 8, 8), "conv3": (512, 4, 4), "out": (512, 1, 1)}
    assert network.connections["conv2-conv1"].weight.shape == (256, 128, 3, 3)
    assert network.connections["out-conv3"].bias is None
    assert network.predict(torch.empty(2, 3, 32, 32, device="meta"), 2).shape == (2, 10)
    with pytest.raises(ValueError, match="expected even sizes"):
        cnn(10, image=(1, 28, 28))


@pytest.mark.parametrize("bad", [torch.relu, torch.abs, lambda z: z.abs(), lambda z: z.real.tanh() + 0 * z])
def test_functions_that_are_not_holomorphic_are_refused_for_complex_nudges(bad) -> None:
    network, x, y = small(0.0, activation=bad)
    with pytest.raises(ValueError, match="holomorphic"):
        ep_grad(network, x, y, n_nudges=3, T1=5, T2=5)
    if bad is torch.relu:
        ep_grad(network, x, y, n_nudges=2, beta=0.1, T1=200, T2=100)  # real nudges are welcome


def test_dsilu_goes_from_nought_to_one() -> None:
    z = torch.tensor([-40.0, 1.0, 40.0])
    torch.testing.assert_close(dsilu(z), torch.tensor([0.0, 0.5, 1.0]))


# --- Jacobian homeostasis ----------------------------------------------------------------------------


def test_penalty_is_twice_the_antisymmetric_part() -> None:
    torch.manual_seed(0)
    J = torch.randn(8, 8).double()
    f = lambda u: u @ J.T  # noqa: E731
    estimate = float(jacobian_homeostasis_loss(f, torch.zeros(20_000, 8).double(), 10))
    exact = float(2 * ((J - J.T) / 2).square().sum() / 8)
    assert abs(estimate - exact) < 0.01 * exact


def test_every_draw_is_nought_for_a_symmetric_jacobian_and_blind_to_the_leak() -> None:
    torch.manual_seed(0)
    J = torch.randn(8, 8).double()
    S = J + J.T
    for _ in range(5):
        assert abs(jacobian_homeostasis_loss(lambda u: u @ S.T, torch.randn(1, 8).double(), 1)) < 1e-10
    values = [
        jacobian_homeostasis_loss(f, torch.ones(3, 8).double(), 2, torch.Generator().manual_seed(1))
        for f in (lambda u: u @ J.T, lambda u: u @ J.T - u)
    ]
    torch.testing.assert_close(*values)


def test_penalty_equals_the_two_jvps_of_the_paper() -> None:
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 5)).double()  # any fixed-point map
    u = torch.rand(3, 5).double()
    eps = torch.randn(3, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    once = torch.func.jvp(f, (u,), (eps,))[1]
    twice = torch.func.jvp(f, (u,), (once,))[1]
    expected = ((once.square() - eps * twice).sum(1) / 5).mean()
    found = jacobian_homeostasis_loss(f, u, 1, torch.Generator().manual_seed(4))
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(v, [f[0].weight, f[2].weight]) for v in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_penalty_reaches_recurrent_weights_alone() -> None:
    network, x, _ = small(90.0)
    u = network.activate(spread(network, x))
    jacobian_homeostasis_loss(network.coupling, u).backward()
    for name, p in network.named_parameters():
        recurrent = name.endswith("weight") and "in-" not in name and "readout" not in name
        assert (p.grad is not None and bool(p.grad.any())) is recurrent, name


@pytest.mark.parametrize("build", [mlp, loop])
def test_descending_the_penalty_makes_the_jacobian_symmetric(build) -> None:
    torch.manual_seed(0)
    network = build(4, (6, 5), 3)
    x = torch.rand(8, 4)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.04)
    slower = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)  # the probes are noisy
    before = symmetry_score(network.coupling, network.activate(network(x, 50))).mean()
    for _ in range(150):
        optimizer.zero_grad()
        jacobian_homeostasis_loss(network.coupling, network.activate(network(x, 50))).backward()
        optimizer.step()
        slower.step()
    after = symmetry_score(network.coupling, network.activate(network(x, 50))).mean()
    assert after > 0.97 > 0.85 > before  # the identity part of the Jacobian counts as symmetric


def test_jacobian_and_symmetry_score_of_a_known_matrix() -> None:
    A = torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
    torch.testing.assert_close(jacobian(lambda u: u @ A.T, torch.ones(3, 2)), A.expand(3, 2, 2))
    assert symmetry_score(lambda u: u @ A.T, torch.ones(1, 2)).item() == 0
    assert symmetry_score(lambda u: 3 * u, torch.ones(1, 2)).item() == 1
    torch.manual_seed(0)
    random = torch.randn(200, 200)
    assert abs(symmetry_score(lambda u: u @ random.T, torch.ones(1, 200)).item() - 0.5) < 0.01
    with pytest.raises(ValueError, match="keeps its state's shapes"):
        jacobian(nn.Linear(2, 3), torch.ones(1, 2))
    with pytest.raises(ValueError, match="n_draws"):
        jacobian_homeostasis_loss(nn.Linear(2, 2), torch.ones(1, 2), 0)


def test_homeostasis_brings_the_response_back_to_the_exact_error() -> None:
    network, x, y = small(90.0, seed=3)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.04)
    options = {"T1": 60, "T2": 40}
    before = error_alignment(network, x, y, **options)
    for _ in range(60):
        optimizer.zero_grad()
        ep_grad(network, x, y, homeostasis=5.0, **options)
        optimizer.step()
    after = error_alignment(network, x, y, **options)
    assert after["l1"] > 0.9 > before["l1"]
    assert set(after) == {"l1", "l2", "out", "all"}


# --- angles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 30.0, 75.0, 90.0])
def test_rotation_sets_the_weight_angle(alpha: float) -> None:
    torch.manual_seed(0)
    network = mlp(4, (256, 256), 256)
    rotate(network, alpha)
    assert abs(weight_angle(network) - alpha) < (1e-4 if alpha == 0 else 3)


def test_rotation_is_refused_where_there_is_no_fitting_pair() -> None:
    with pytest.raises(ValueError, match="no two of the connections"):
        rotate(loop(4, (3, 3), 2), 0.0)
    with pytest.raises(ValueError, match="no two of the connections"):
        weight_angle(loop(4, (3, 3), 2))
    odd = {"in-a": Dense(2, 4), "a-out": Dense(4, 3), "out-a": ConvPool(3, 4)}
    with pytest.raises(ValueError, match="must be"):
        rotate(EquilibriumNetwork({"a": (4,), "out": (3,)}, odd), 0.0)


def test_gradient_angle_names_each_parameter_and_leaves_the_network_alone() -> None:
    network, x, y = small(0.0)
    before = {n: v.clone() for n, v in network.state_dict().items()}
    angles = gradient_angle(network, x, y, T1=T1, T2=T2)
    assert all(v < 1e-4 for v in angles.values())
    assert set(angles) == {"all", *(n for n, _ in network.named_parameters() if "readout" not in n)}
    assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert gradient_angle(*small(90.0), T1=T1, T2=T2)["all"] > 10
    ring = loop(5, (6, 4), 3, step_size=0.5).double()
    assert gradient_angle(ring, x, y, T1=T1, T2=T2)["all"] > 10


# --- networks and options ----------------------------------------------------------------------------


def test_step_size_moves_no_fixed_point() -> None:
    network, x, _ = small(0.0)
    u = spread(network, x)
    assert residual(network, u, x).max() < 1e-10
    network.step_size = 0.2
    torch.testing.assert_close(spread(network, x), u)


def test_the_users_own_wiring_and_connections() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.full((4,), 0.3))

        def forward(self, pre: Tensor, post: Tensor) -> Tensor:
            return self.gain * pre

    torch.manual_seed(0)
    wiring = {"in-a": Dense(3, 4), "a-a": Gate(), "a-out": Dense(4, 2), "out-a": Dense(2, 4)}
    network = EquilibriumNetwork({"a": (4,), "out": (2,)}, wiring, classes=2, step_size=0.5).double()
    rotate(network, 0.0)
    assert network.pairs() == [("a-out", "out-a")]
    assert error_of(network, torch.rand(5, 3).double(), torch.randint(2, (5,)), n_nudges=6, beta=0.02) < 1e-6


def test_impossible_networks_and_nudges_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing drives b"):
        EquilibriumNetwork({"b": (2,), "out": (2,)}, {"in-out": Dense(2, 2)})
    with pytest.raises(ValueError, match="expected 'pre-post'"):
        EquilibriumNetwork({"out": (2,)}, {"in-elsewhere": Dense(2, 2)})
    with pytest.raises(ValueError, match="called 'out'"):
        EquilibriumNetwork({"a": (2,)}, {"in-a": Dense(2, 2)})
    with pytest.raises(ValueError, match="step_size"):
        mlp(2, (2,), 2, step_size=0.0)
    for options, words in (
        ({"n_nudges": -1}, "n_nudges is -1"),
        ({"n_nudges": 1, "beta": 0.0}, "beta is 0.0"),
        ({"n_nudges": 4, "mode": "finite"}, "finite takes 1 or 2"),
        ({"n_nudges": 1, "mode": "holomorphic"}, "2 or more"),
        ({"n_nudges": 2, "mode": "online"}, "3 or more"),
        ({"mode": "loud"}, "expected one of auto"),
        ({"homeostasis": -1.0}, "homeostasis=-1.0"),
        ({"T2": 0}, "T1=150, T2=0"),
    ):
        with pytest.raises(ValueError, match=words):
            Options(**options)
    with pytest.raises(ValueError, match="method 'x'"):
        exact_error(*small(0.0)[:1], {}, torch.rand(1, 5), torch.tensor([0]), method="x")


def test_an_unsettled_free_phase_warns_and_an_exploding_one_is_refused() -> None:
    network, x, y = small(0.0)
    with pytest.warns(NotSettled, match="take more free steps"):
        ep_grad(network, x, y, T1=2, T2=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ep_grad(network, x, y, T1=T1, T2=2)
    network.activation = lambda z: z**3
    with pytest.raises(ModelError, match="lower beta"):
        ep_grad(network, x, y, n_nudges=2, beta=1e200, T1=1, T2=40)


def test_half_precision_free_phase() -> None:
    torch.manual_seed(0)
    network, x, y = mlp(5, (6,), 3, step_size=0.5), torch.rand(4, 5), torch.randint(3, (4,))
    with pytest.warns(NotSettled):
        outcome = ep_grad(network, x, y, free_dtype=torch.bfloat16)
    assert outcome.u["l1"].dtype == torch.float32
    torch.testing.assert_close(outcome.u, dict(network(x, 150)), atol=0.05, rtol=0.05)


# --- training ----------------------------------------------------------------------------------------


def test_a_step_is_the_gradient_and_the_optimizers_step() -> None:
    trainer, batch = specimen()
    twin, _ = specimen()
    outcome = trainer.step(batch)
    ep_grad(twin.network, *batch, generator=twin.generator, **vars(twin.options))
    twin.optimizer.step()
    for a, b in zip(trainer.network.parameters(), twin.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert outcome.homeostasis > 0
    with pytest.raises(TypeError, match="speed"):
        EquilibriumPropagation(trainer.network, trainer.optimizer, speed=3)


def test_state_resumes_to_the_bit() -> None:
    trainer, batch = specimen(0)
    trainer.step(batch)
    other, _ = specimen(1)
    other.load_state_dict(trainer.state_dict())
    losses = [[t.step(batch).loss for _ in range(3)] for t in (trainer, other)]
    assert losses[0] == losses[1]
    for a, b in zip(trainer.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{"n_nudges": 2}, {"n_nudges": 4}])
def test_learns_handwritten_digits(options: dict[str, int]) -> None:
    images = digits()
    torch.manual_seed(0)
    network = mlp(64, (32,), 10, step_size=0.5)
    rotate(network, 0.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    trainer = EquilibriumPropagation(network, optimizer, beta=0.2, T1=30, T2=10, **options)
    x, y = images.train_x.flatten(1), images.train_y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotSettled)
        for part in torch.randperm(len(x))[:1400].repeat(3).split(50):
            trainer.step((x[part], y[part]))
    right = trainer.predict(images.test_x.flatten(1)).argmax(1) == images.test_y
    assert right.float().mean() > 0.8


def test_convolutions_learn_with_complex_nudges_and_homeostasis() -> None:
    images = digits()
    torch.manual_seed(0)
    network = cnn(10, image=(1, 8, 8), channels=(8, 16), step_size=0.5)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    trainer = EquilibriumPropagation(network, optimizer, n_nudges=4, T1=20, T2=8, homeostasis=1.0)
    x, y = images.train_x.reshape(-1, 1, 8, 8), images.train_y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotSettled)
        for part in torch.randperm(len(x))[:1400].repeat(2).split(50):
            outcome = trainer.step((x[part], y[part]))
    right = trainer.predict(images.test_x.reshape(-1, 1, 8, 8)).argmax(1) == images.test_y
    assert outcome.homeostasis > 0
    assert right.float().mean() > 0.3  # three times chance, after 56 steps
