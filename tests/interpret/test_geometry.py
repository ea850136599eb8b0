"""The geometry of representations: metrics on shapes that are known, tasks of exact alignment, the force on a neuron,
batches of networks that are single runs, and reports on recordings."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import special_ortho_group
from torch import nn

from neuropil.atlas import Atlas
from neuropil.errors import UnknownNeuron
from neuropil.interpret import GeometryStudy, representation, representational_geometry
from neuropil.interpret import geometry_metrics as metrics
from neuropil.interpret import geometry_networks as networks
from neuropil.interpret import geometry_tasks as tasks
from neuropil.interpret.geometry import layer_geometry
from neuropil.interpret.geometry_columns import geometry_columns
from neuropil.interpret.geometry_dynamics import (
    derivative_kernel,
    gradient_field,
    label_share,
    neuron_gradient,
    trajectories,
    weight_plane,
)
from neuropil.interpret.geometry_metrics import (
    DegenerateGeometry,
    alignment,
    ccgp,
    ccgp_scores,
    ccgp_splits,
    centred,
    decodability,
    dichotomies,
    kernel,
    kernel_alignment,
    kernel_parallelism,
    number_of_dichotomies,
    parallelism,
    participation_ratio,
    shattering_dimensionality,
)
from neuropil.interpret.geometry_networks import IDENTITY, RELU, TANH, Networks, train, with_gradient
from neuropil.interpret.geometry_report import MissingConditions, geometry_report
from neuropil.interpret.geometry_tasks import aligned, epsilon_xor, unstructured, walsh
from neuropil.neurons import find_sites

BITS = np.array(list(itertools.product((0, 1), repeat=2)))
B1, B2, XOR = dichotomies(4)


def specimen(seed: int) -> Callable[[int], GeometryStudy]:
    del seed
    chosen = [unstructured(dim=20, seed=i) for i in range(3)]
    return lambda seed: representational_geometry(chosen, width=16, steps=30, classifiers=False, seed=seed)


def parallelogram(a: float = 1.0, b: float = 1.0, dim: int = 6) -> np.ndarray:
    """b1 a + b2 b, turned at random."""
    turn = special_ortho_group.rvs(dim, random_state=0)
    return BITS @ (np.diag([a, b]) @ turn[:2]) + 3.0


def tetrahedron(dim: int = 5) -> np.ndarray:
    return unstructured(4, dim, exact=True, seed=1).means


def gaussian(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


# ------------------------------------------------------------------------------------------------- alignment


def test_alignment_is_that_of_its_definition() -> None:
    x, y = gaussian(20, 7), gaussian(20, 3, 1)
    xc, yc = x - x.mean(0), y - y.mean(0)
    cka = np.linalg.norm(yc.T @ xc) ** 2 / (np.linalg.norm(xc.T @ xc) * np.linalg.norm(yc.T @ yc))
    assert alignment(x, y) == pytest.approx(cka, abs=1e-10)
    assert alignment(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(cka, abs=1e-10)


def test_alignment_has_its_invariances_and_bounds() -> None:
    x, y = gaussian(20, 7), gaussian(20, 3, 1)
    K, L = kernel(x), kernel(y)
    here = kernel_alignment(K, L)
    assert kernel_alignment(K, K) == pytest.approx(1, abs=1e-12)
    assert kernel_alignment(3.7 * K + 5.0, L) == pytest.approx(here, abs=1e-10)
    assert alignment(x @ special_ortho_group.rvs(7, random_state=0), y) == pytest.approx(here, abs=1e-10)
    assert alignment(x + gaussian(1, 7, 2), y) == pytest.approx(here, abs=1e-10)
    for seed in range(20):
        assert 0 <= alignment(gaussian(6, 2, seed), gaussian(6, 1, seed + 100)) <= 1


def test_the_unbiased_alignment_does_not_take_noise_for_agreement() -> None:
    pairs = [(gaussian(12, 400, s), gaussian(12, 400, s + 1000)) for s in range(40)]
    assert np.mean([alignment(*pair) for pair in pairs]) > 0.9
    unbiased = np.array([alignment(*pair, unbiased=True) for pair in pairs])
    assert abs(unbiased.mean()) < 4 * unbiased.std() / math.sqrt(40)
    x = gaussian(12, 3)
    assert alignment(x, x, unbiased=True) == pytest.approx(1)
    U = metrics._off_diagonal(kernel(x))
    np.testing.assert_allclose(U.sum(0), 0, atol=1e-12)
    with pytest.raises(ValueError, match="4 or more"):
        alignment(gaussian(3, 2), gaussian(3, 2), unbiased=True)


def test_what_does_not_differ_gives_nan_and_a_warning() -> None:
    same = np.full((5, 3), 0.1)
    for act in (lambda: alignment(same, gaussian(5, 2)), lambda: participation_ratio(same)):
        with pytest.warns(DegenerateGeometry, match="NaN"):
            assert math.isnan(act())
    with pytest.warns(DegenerateGeometry):
        assert math.isnan(parallelism(np.ones((4, 2)), B1))


def test_participation_ratio_counts_directions() -> None:
    assert participation_ratio(tetrahedron()) == pytest.approx(3)
    assert participation_ratio(parallelogram()) == pytest.approx(2)
    assert participation_ratio(np.arange(5.0)[:, None] * gaussian(1, 4)) == pytest.approx(1)


# ------------------------------------------------------------------------------------------------- dichotomies


def test_dichotomies_are_as_many_as_they_should_be() -> None:
    for n, count in ((4, 3), (8, 35), (16, 6435), (5, 10)):
        found = dichotomies(n)
        assert len(found) == count == number_of_dichotomies(n)
        assert set(found.sum(1)) == {n // 2}
        both = {side.tobytes() for side in found} | {(~side).tobytes() for side in found}
        assert len(both) == 2 * count
    assert number_of_dichotomies(28) == 20_058_300
    drawn = dichotomies(28, 50, seed=3)
    assert len({side.tobytes() for side in drawn}) == 50
    assert drawn[:, 0].all()
    assert set(drawn.sum(1)) == {14}
    np.testing.assert_array_equal(drawn, dichotomies(28, 50, seed=3))
    assert len(dichotomies(16, 40)) == 40
    with pytest.raises(ValueError, match="give most="):
        dichotomies(28)


# ------------------------------------------------------------------------------------------------- parallelism


def test_parallelism_of_known_shapes() -> None:
    z = parallelogram(2.0, 0.7)
    assert [parallelism(z, side) for side in (B1, B2, XOR)] == pytest.approx([1, 1, -1], abs=1e-12)
    skew = BITS @ gaussian(2, 6)
    assert [parallelism(skew, side) for side in (B1, B2)] == pytest.approx([1, 1], abs=1e-12)
    for side in (B1, B2, XOR):
        assert abs(parallelism(tetrahedron(), side)) < 1e-12


def by_hand(z: np.ndarray, side: np.ndarray) -> float:
    """The largest mean cosine over all pairings, written out."""
    positive, negative = np.flatnonzero(side), np.flatnonzero(~side)
    best = -math.inf
    for partners in itertools.permutations(negative):
        v = z[positive] - z[list(partners)]
        v /= np.linalg.norm(v, axis=1, keepdims=True)
        m = len(v)
        best = max(best, ((v @ v.T).sum() - m) / (m * (m - 1)))
    return best


@pytest.mark.parametrize("n", [4, 6, 8])
def test_parallelism_of_kernels_and_of_vectors_is_the_same(n: int) -> None:
    z = gaussian(n, 5, n)
    turn = special_ortho_group.rvs(5, random_state=1)
    for side in dichotomies(n)[::3]:
        here = parallelism(z, side)
        assert here == pytest.approx(by_hand(z, side), abs=1e-10)
        assert kernel_parallelism(kernel(z), side) == here
        assert parallelism(2.5 * z @ turn + 4.0, side) == pytest.approx(here, abs=1e-9)
        assert parallelism(z, ~side) == pytest.approx(here, abs=1e-12)
        assert -1 <= here <= 1


def test_parallelism_of_many_conditions_and_of_unequal_sides() -> None:
    cube = np.array(list(itertools.product((0.0, 1), repeat=4)))
    assert parallelism(cube * [5, 1, 1, 1], cube[:, 0] > 0) == pytest.approx(1)  # 8 + 8: the Hungarian pairing
    extra = np.concatenate([parallelogram(), [[9.0] * 6]])
    assert parallelism(extra, np.array([*B1, True])) == pytest.approx(1)  # the pairing may leave the fifth out
    with pytest.raises(ValueError, match="4 conditions"):
        parallelism(gaussian(3, 2), [True, False, False])
    with pytest.raises(ValueError, match="on one side"):
        parallelism(gaussian(4, 2), [True] * 4)
    with pytest.raises(ValueError, match="expected 4 booleans"):
        parallelism(gaussian(4, 2), [0, 1, 2, 1])


# ------------------------------------------------------------------------------------------------- classifiers


def test_ccgp_of_a_rectangle() -> None:
    z = parallelogram(2.0, 1.0)
    assert ccgp_scores(z, range(4), B1).tolist() == [1.0] * 4
    assert sorted(ccgp_scores(z, range(4), B2)) == [0.0, 0.0, 1.0, 1.0]
    assert ccgp_scores(z, range(4), XOR).tolist() == [0.0] * 4  # below chance is right
    assert ccgp(1e-4 * z, range(4), B1) == 1.0  # whatever the unit
    assert len(ccgp_splits(B1)) == 4
    assert len(ccgp_splits(dichotomies(8)[0])) == 36
    assert len(ccgp_splits(dichotomies(16)[0], 50)) == 50


def test_ccgp_of_a_tetrahedron_is_chance_under_noise() -> None:
    condition = np.repeat(np.arange(4), 200)
    z = tetrahedron()[condition] + 0.4 * gaussian(800, 5)
    assert [ccgp(z, condition, side) for side in (B1, B2, XOR)] == pytest.approx([0.5] * 3, abs=0.12)


def test_shattering_dimensionality_of_known_shapes() -> None:
    assert shattering_dimensionality(tetrahedron(), range(4)) == 1
    square = parallelogram()
    scores = [decodability(square, range(4), side) for side in (B1, B2, XOR)]
    assert scores[:2] == [1, 1]
    assert scores[2] <= 0.75
    assert shattering_dimensionality(square, range(4)) == pytest.approx(np.mean(scores))


def test_decodability_is_tested_on_other_trials() -> None:
    condition = np.repeat(np.arange(4), 10)
    noise = gaussian(40, 60)  # 60 features separate 40 trials in any way: only other trials tell
    assert decodability(noise, condition, B1) == pytest.approx(0.5, abs=0.2)
    assert decodability(noise, condition, B1, test=(noise, condition)) == 1
    shown = tetrahedron()[condition] + 0.1 * noise[:, :5]
    assert decodability(shown, condition, B1) == 1


@pytest.mark.parametrize(
    ("z", "conditions", "said"),
    [
        (gaussian(4, 2), [0, 1, 2], "expected one whole number for each"),
        (gaussian(4, 2), [0, 1, 3, 3], "without gaps"),
        (gaussian(4, 2), [0.5, 1, 2, 3], "whole number"),
        (np.full((4, 2), np.nan), range(4), "not finite"),
        (np.zeros(4), range(4), "items x features"),
    ],
)
def test_wrong_activations_and_conditions(z: np.ndarray, conditions: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ccgp(z, list(conditions), B1)


# ------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_aligned_tasks_have_the_alignment_asked_for(bits: int) -> None:
    n = 2**bits
    for k in sorted({1, bits}):
        if k == n - 1:
            continue
        top = math.sqrt(k / (n - 1))
        for c in (0.0, 0.05, 0.5 * top, top, 0.9, 1.0):
            for concentration in (None, 0.5):
                task = aligned(n, k, c, dim=40, concentration=concentration, seed=bits)
                assert task.alignment == pytest.approx(c, abs=1e-8)
                assert np.mean((task.means**2).sum(1)) == pytest.approx(40)
        np.testing.assert_allclose(tasks.spectrum(n, k, top), 1 / (n - 1), atol=1e-8)
        z = aligned(n, k, top, dim=40).means
        far = np.linalg.norm(z[:, None] - z, axis=2)[np.triu_indices(n, 1)]
        np.testing.assert_allclose(far, far[0], atol=1e-8)
        assert not tasks.spectrum(n, k, 0.0)[:k].any()
        whole = aligned(n, k, 1.0, dim=40)
        ratio = kernel(whole.means) / 40 - kernel(whole.signs) / k
        np.testing.assert_allclose(ratio, 0, atol=1e-8)


def test_walsh_functions_and_their_embedding() -> None:
    for bits in (2, 3, 4):
        h = walsh(bits)
        np.testing.assert_array_equal(h.T @ h, 2**bits * np.eye(2**bits - 1))
        assert not h.sum(0).any()
    pi = tasks.spectrum(8, 3, 0.4, 0.5, seed=2)
    before = walsh(3) * np.sqrt(pi)
    after = aligned(8, 3, 0.4, dim=50, concentration=0.5, seed=2).means / math.sqrt(50)
    assert (
        abs(np.linalg.norm(before[:, None] - before, axis=2) - np.linalg.norm(after[:, None] - after, axis=2)).max()
        < 1e-10
    )


def test_epsilon_xor() -> None:
    def best(z: np.ndarray) -> float:
        return decodability(z, range(4), XOR)

    assert best(epsilon_xor(0.0, seed=3).means) <= 0.75
    for eps in (0.5, 1.0):
        task = epsilon_xor(eps, seed=3)
        np.testing.assert_array_equal(task.labels[:, 0], BITS[:, 0] ^ BITS[:, 1])
        assert best(task.means) == 1
    z = epsilon_xor(1.0, dim=120, seed=3).means
    far = np.linalg.norm(z[:, None] - z, axis=2)[np.triu_indices(4, 1)]
    np.testing.assert_allclose(far, far[0], atol=1e-6)
    assert np.linalg.norm(z[0]) == pytest.approx(math.sqrt(120 / 3))
    # By hand: an exact linear rule exists as soon as eps > 0, the third block's own direction.
    small = epsilon_xor(0.05, seed=3)
    third = small.means[3, 80:] - small.means[1, 80:]
    assert set(np.sign(small.means[:, 80:] @ third)[[0, 3]]) != set(np.sign(small.means[:, 80:] @ third)[[1, 2]])


def test_kernels_of_any_alignment() -> None:
    labels = np.sign(gaussian(32, 3))
    target = centred(labels @ labels.T)
    for c in (0.0, 0.1, 0.4, 0.8, 1.0):
        for rank in (8, None):
            K = tasks.random_kernel(labels, c, rank=rank, seed=4)
            assert kernel_alignment(K, target) == pytest.approx(c, abs=1e-8)
            assert np.linalg.eigvalsh(K).min() > -1e-9
            assert np.linalg.matrix_rank(K, tol=1e-8) <= (rank or 32) + 3
            task = tasks.from_kernel(K, labels > 0, dim=64)
            np.testing.assert_allclose(kernel(task.means) / 64, K, atol=1e-9)


def test_other_tasks() -> None:
    task = tasks.bits_and_classes(2, 3)
    assert task.labels.shape == (12, 5)
    assert tasks.bits_and_classes(5, 1).labels.shape == (32, 5)
    x, y, condition = task.sample(30, seed=1)
    assert condition.bincount().tolist() == [3] * 6 + [2] * 6
    np.testing.assert_array_equal(y.numpy(), task.labels[condition.numpy()])
    assert float((x - torch.from_numpy(task.means).float()[condition]).std()) == pytest.approx(0.1, rel=0.1)
    assert torch.equal(x, task.sample(30, seed=1)[0])
    assert unstructured(6).labels.sum() == 3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: aligned(8, 1, 1.2), "alignment 1.2"),
        (lambda: aligned(8, 1, -0.1), "alignment -0.1"),
        (lambda: aligned(6, 1, 0.1), "power of 2"),
        (lambda: aligned(8, 7, 0.1), "7 labels"),
        (lambda: aligned(32, 1, 0.1, dim=20), "dim=31"),
        (lambda: epsilon_xor(0.5, dim=100), "multiple of 3"),
        (lambda: epsilon_xor(-1.0), "eps -1"),
        (lambda: unstructured(5), "even number"),
        (lambda: tasks.bits_and_classes(0, 3), "1 to 10 bits"),
        (lambda: tasks.random_kernel(np.ones((8, 1)), 0.5, rank=1), "rank 1"),
    ],
)
def test_tasks_that_cannot_be(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


# ------------------------------------------------------------------------------------------------- nonlinearities

POINTS = torch.linspace(-4, 4, 801, dtype=torch.float64) + 0.003
PLAIN = [f for name, f in networks.NONLINEARITIES.items() if "gradient" not in name]


@pytest.mark.parametrize("f", PLAIN, ids=lambda f: f.name)
def test_derivatives_are_those_of_autograd(f: networks.Nonlinearity) -> None:
    x = POINTS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f.forward(x).sum(), [x])
    # torch's softplus is x itself from beta x = 20 on, where its slope differs from 1 by 2e-9.
    torch.testing.assert_close(f.derivative(POINTS), expected, rtol=1e-8, atol=1e-8)
    (used,) = torch.autograd.grad(f(x).sum(), [x])
    torch.testing.assert_close(used, expected, rtol=1e-8, atol=1e-8)


def test_nonlinearities_have_their_limits() -> None:
    assert torch.equal(networks.hard_tanh().forward(POINTS), POINTS.clamp(-1, 1))
    assert torch.equal(networks.capped_relu(math.inf).forward(POINTS), torch.relu(POINTS))
    assert torch.equal(networks.capped_relu(1e9).derivative(POINTS), RELU.derivative(POINTS))
    assert torch.equal(networks.leaky_relu(1.0).forward(POINTS), POINTS)
    assert (networks.softplus(50.0).forward(POINTS) - torch.relu(POINTS)).abs().max() < 0.02
    assert torch.equal(networks.shifted_relu(0.5).forward(POINTS), torch.relu(POINTS + 0.5))
    with pytest.raises(ValueError, match="there are tanh"):
        networks.nonlinearity("wavy")
    with pytest.raises(ValueError, match="lower bound first"):
        networks.hard_tanh(1.0, 0.0)


def test_only_the_gradient_is_replaced() -> None:
    odd = with_gradient(RELU, "one")
    x = POINTS.clone().requires_grad_()
    assert torch.equal(odd(x), torch.relu(x))
    assert torch.equal(torch.autograd.grad(odd(x).sum(), [x])[0], torch.ones_like(x))
    other = with_gradient(RELU, TANH)
    torch.testing.assert_close(torch.autograd.grad(other(x).sum(), [x])[0], TANH.derivative(POINTS))
    noisy = torch.autograd.grad(with_gradient(TANH, "noise")(x).sum(), [x])[0]
    assert 0 <= noisy.min() < 0.1 < 0.9 < noisy.max() <= 1
    with pytest.raises(ValueError, match="'one' or 'noise'"):
        with_gradient(RELU, "two")


# ------------------------------------------------------------------------------------------------- the force


def points(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    task = unstructured(4, 7, seed=seed)
    return torch.from_numpy(task.means), torch.from_numpy(task.labels[:, 0]).double()


@pytest.mark.parametrize("f", PLAIN, ids=lambda f: f.name)
def test_the_force_is_minus_the_gradient_of_the_loss(f: networks.Nonlinearity) -> None:
    x, y = points()
    for sign in (-1.0, 1.0):
        w = torch.from_numpy(0.3 * gaussian(1, 7, 5)[0]).requires_grad_()
        output = sign * f.forward(x @ w)
        loss = nn.functional.binary_cross_entropy_with_logits(output, y)
        (gradient,) = torch.autograd.grad(loss, [w])
        dw = neuron_gradient(w.detach(), x, y, f, sign, torch.sigmoid(output.detach()))
        assert (dw + gradient).abs().max() < 1e-8


def parallel(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).abs().min())


def test_the_force_at_the_origin_and_on_single_points() -> None:
    x, y = points()
    toward = (y - 0.5) @ x
    assert parallel(neuron_gradient(torch.zeros(7, dtype=torch.float64), x, y, TANH), toward) == pytest.approx(
        1, abs=1e-12
    )
    w = torch.from_numpy(gaussian(20, 7, 6))
    assert parallel(neuron_gradient(w, x, y, IDENTITY), toward) == pytest.approx(1, abs=1e-12)
    active = (w @ x.T > 0).sum(1)
    assert (active == 1).any()
    for neuron in w[active == 1]:
        point = x[int((x @ neuron).argmax())]
        assert parallel(neuron_gradient(neuron, x, y, RELU), point) == pytest.approx(1, abs=1e-12)
    given = torch.sigmoid(torch.from_numpy(gaussian(20, 4, 7)))
    torch.testing.assert_close(
        neuron_gradient(w, x, y, with_gradient(RELU, "one"), 1.0, given), neuron_gradient(w, x, y, IDENTITY, 1.0, given)
    )


def test_the_field_on_a_plane_and_the_neurons_on_it() -> None:
    x, y = points(2)
    u, v = weight_plane(x, y)
    assert abs(float(u @ v)) < 1e-12
    field = gradient_field(x, y, TANH, extent=0.5, points=5)
    here = field.places[1, 3, 0] * u + field.places[1, 3, 1] * v
    torch.testing.assert_close(field.project(neuron_gradient(here, x, y, TANH)), field.arrows[1, 3])
    torch.testing.assert_close(field.project(here), field.places[1, 3])
    start = 0.1 * torch.from_numpy(gaussian(40, 7, 8))
    signs = torch.from_numpy(np.tile([1.0, -1.0], 20))

    def loss(w: torch.Tensor) -> float:
        output = signs @ torch.tanh(w @ x.T) / math.sqrt(40)
        return float(nn.functional.binary_cross_entropy_with_logits(output, y))

    path = trajectories(start, signs, x, y, TANH, lr=0.05, steps=60)
    assert path.shape == (61, 40, 7)
    assert loss(path[-1]) < 0.5 * loss(path[0])


def test_the_share_of_the_labels_is_what_many_neurons_do() -> None:
    K = np.array([[1.0, 0.3, -0.5], [0.3, 2.0, 0.1], [-0.5, 0.1, 0.5]])
    rho = K / np.sqrt(np.outer(np.diag(K), np.diag(K)))
    exact = 0.25 + np.arcsin(np.clip(rho, -1, 1)) / (2 * np.pi)
    np.testing.assert_allclose(derivative_kernel(K, RELU), exact, atol=2e-3)
    np.testing.assert_allclose(derivative_kernel(K, IDENTITY), 1, atol=1e-9)
    task = aligned(8, 2, 0.4, dim=60, noise=0.0, seed=1)
    x, errors = torch.from_numpy(task.means), torch.from_numpy(task.labels).double() - 0.5
    w = torch.from_numpy(gaussian(20_000, 60, 9)) / math.sqrt(3 * 60)
    s = torch.from_numpy(gaussian(20_000, 2, 10))
    basis = torch.linalg.qr(x.T @ errors)[0]
    for f in (TANH, RELU, networks.softplus(5.0), networks.capped_relu(0.5)):
        dw = ((s @ errors.T) * f.derivative(w @ x.T)) @ x
        share = float((dw @ basis).square().sum() / dw.square().sum())
        assert label_share(task.means, task.labels, f, bias=False) == pytest.approx(share, abs=0.01)
    assert label_share(task.means, task.labels, IDENTITY) == pytest.approx(1, abs=1e-9)


# ------------------------------------------------------------------------------------------------- networks


def batch(count: int, dim: int = 12, items: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = [unstructured(4, dim, seed=s).sample(items, seed=s)[:2] for s in range(count)]
    return torch.stack([x for x, _ in drawn]), torch.stack([y for _, y in drawn])


@pytest.mark.parametrize(
    ("optimizer", "readout", "depth", "size"),
    [("adam", "trained", 1, 16), ("sgd", "sphere", 1, None), ("adam", "binary", 2, 16), ("sgd", "uniform", 1, 16)],
)
def test_a_batch_of_networks_is_as_many_single_runs(optimizer: str, readout: str, depth: int, size: int | None) -> None:
    x, y = batch(20)
    settings = {"optimizer": optimizer, "lr": 0.02, "steps": 25, "batch_size": size, "level": 0.5}
    sizes = [12, *[10] * depth, 1]
    nets = Networks(sizes, TANH, range(20), readout=readout)
    begun = [p.clone() for p in nets.parameters()]
    whole = train(nets, x, y, **settings)
    for i in (0, 7, 19):
        alone = Networks(sizes, TANH, [i], readout=readout)
        single = train(alone, x[i : i + 1], y[i : i + 1], seeds=[i], **settings)
        for a, b in zip(nets.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=1e-5, atol=1e-5)
        for a, b in zip(whole.matched.parameters(), single.matched.parameters(), strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(whole.losses[:, i], single.losses[:, 0], rtol=1e-4)
    moved = [not torch.equal(a, b) for a, b in zip(begun, nets.parameters(), strict=True)]
    last = depth  # weights come before biases
    assert moved == [True] * last + [readout == "trained"] + [True] * last + [readout == "trained"]
    assert (whole.losses[-1] < whole.losses[0]).all()


def test_networks_are_kept_as_they_first_fall_below_the_level() -> None:
    x, y = batch(4)
    nets = Networks([12, 16, 1], RELU, range(4))
    run = train(nets, x, y, lr=0.01, steps=200, level=0.2, check_every=5, until_matched=True)
    assert run.reached.all()
    assert run.matched is not None
    with torch.no_grad():
        kept = networks.losses(run.matched(x), y).numpy()
    first = (run.losses < 0.2).argmax(0)
    np.testing.assert_allclose(kept, run.losses[first, np.arange(4)], rtol=1e-5)
    assert run.steps[-1] < 200
    never = train(Networks([12, 16, 1], RELU, range(4)), x, y, lr=0.01, steps=10, level=1e-6)
    assert not never.reached.any()
    still = train(Networks([12, 16, 1], RELU, range(4)), x, y, lr=1e-9, steps=200, tolerance=1e-5, optimizer="sgd")
    assert len(still.steps) == 2


def test_readouts_and_likelihoods() -> None:
    sphere = Networks([3, 8, 2], TANH, [0], readout="sphere").weights[-1]
    torch.testing.assert_close(sphere[0].norm(dim=0), torch.full((8,), 1 / math.sqrt(8)))
    binary = Networks([3, 8, 2], TANH, [0], readout="binary").weights[-1][0] * math.sqrt(8)
    codes = [tuple(c) for c in binary.T.round().int().tolist()]
    assert sorted(codes) == sorted([(1, 1), (1, -1), (-1, 1), (-1, -1)] * 2)
    outputs, y = torch.randn(2, 5, 3), torch.randint(2, (2, 5, 3)).float()
    gaussian_loss = networks.losses(outputs, y, "gaussian")
    torch.testing.assert_close(gaussian_loss[0], (outputs[0] - y[0]).square().sum() / 10)
    expected = nn.functional.binary_cross_entropy_with_logits(outputs[1], y[1]) * 3
    torch.testing.assert_close(networks.losses(outputs, y)[1], expected)
    scaled = Networks([3, 4, 1], TANH, [0, 0], scale=torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(3 * scaled.weights[0][0], scaled.weights[0][1])
    bare = Networks([3, 4, 1], TANH, [0], bias=False)
    assert not any(b.requires_grad or b.any() for b in bare.biases)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Networks([3, 1], TANH, [0]), "hidden"),
        (lambda: Networks([3, 4, 1], TANH, [0], readout="loose"), "one of trained"),
        (lambda: train(Networks([12, 4, 1], TANH, [0]), *batch(2)), "there are 1 networks"),
        (lambda: train(Networks([12, 4, 1], TANH, [0]), *batch(1), optimizer="lamb"), "one of adam"),
        (lambda: train(Networks([12, 4, 1], TANH, [0]), *batch(1), likelihood="poisson"), "one of bernoulli"),
        (lambda: representational_geometry([unstructured(4, 10), unstructured(4, 11)]), "the same shape"),
        (lambda: representational_geometry([unstructured(4, 10)], seeds=[1, 2]), "2 seeds for 1 tasks"),
    ],
)
def test_wrong_networks(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


# ------------------------------------------------------------------------------------------------- the study


def test_tanh_takes_the_labels_and_relu_keeps_the_inputs() -> None:
    found = representational_geometry(
        [unstructured(4, 60, noise=0.1, seed=s) for s in range(6)], width=64, steps=400, classifiers=True
    )
    assert found.reached.all()
    assert found.losses.max() < 0.05
    for measure, sign in (
        ("target_alignment", 1),
        ("input_alignment", -1),
        ("parallelism", 1),
        ("ccgp", 1),
        ("untrained", -1),
    ):
        mean, low, high = found.difference(measure, "tanh", "relu")
        assert low <= mean <= high
        assert (low if sign > 0 else -high) > 0, measure
    assert found.theory.mean(1)[0] > found.theory.mean(1)[1] + 0.2
    np.testing.assert_allclose(found.theory, found.simulated, atol=0.12)
    np.testing.assert_allclose(found.theory.mean(1), found.simulated.mean(1), atol=0.03)


def test_the_study_says_the_same_twice_and_pairs_its_networks() -> None:
    chosen = [unstructured(4, 20, seed=s) for s in range(3)]
    settings = {"width": 12, "steps": 20, "nonlinearities": ("tanh", with_gradient(RELU, "noise"))}
    a, b = (representational_geometry(chosen, **settings) for _ in range(2))
    for name in a.trained:
        np.testing.assert_array_equal(a.trained[name], b.trained[name])
    one = representational_geometry(chosen[1:2], seeds=[1], width=12, steps=20, nonlinearities=("tanh",))
    np.testing.assert_allclose(one.trained["target_alignment"][0, 0], a.trained["target_alignment"][0, 1], atol=1e-5)
    lazy = representational_geometry(chosen, scale=[1.0, 1.0, 5.0], level=None, width=12, steps=20, classifiers=False)
    assert not lazy.reached.any()
    assert (lazy.steps == 20).all()


def test_layers_of_several_labels_are_averaged_and_odd_labels_left_out() -> None:
    labels = np.stack([B1, np.array([True, False, False, False])], 1)
    found = layer_geometry(parallelogram(), parallelogram(), labels)
    assert found["parallelism"] == pytest.approx(1)
    assert found["input_alignment"] == pytest.approx(1)
    assert 0.5 < found["untrained"] < 1  # of b2 (1) and XOR (1/2 to 3/4)
    with pytest.warns(DegenerateGeometry):
        still = layer_geometry(np.zeros((4, 3)), parallelogram(), labels)
    assert all(math.isnan(value) for value in still.values())


# ------------------------------------------------------------------------------------------------- recordings


def recording(trials: list[int], noise: float = 0.1, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    condition = np.repeat(np.arange(4), trials)
    z = parallelogram(2.0, 1.0)[condition] + noise * gaussian(len(condition), 6, seed)
    return z, {"shape": BITS[condition, 0], "colour": np.array(["blue", "red"])[BITS[condition, 1]]}


def test_a_report_names_what_the_conditions_name() -> None:
    z, design = recording([30, 30, 30, 30])
    found = geometry_report(z, design, inputs=z)
    rows = {row["dichotomy"]: row for row in found.table.to_pylist()}
    assert list(rows) == ["shape", "colour", "0, blue | 1, red"]
    assert [row["named"] for row in rows.values()] == [True, True, False]
    assert [round(rows[name]["parallelism"], 1) for name in rows] == [1, 1, -1]
    assert rows["shape"]["ccgp"] == 1
    assert rows["0, blue | 1, red"]["ccgp"] == pytest.approx(0, abs=0.05)
    assert found.input_alignment == pytest.approx(1)
    assert found.target_alignment == pytest.approx(alignment(parallelogram(2.0, 1.0), 2 * BITS - 1), abs=0.05)
    assert found.participation_ratio == pytest.approx(participation_ratio(parallelogram(2.0, 1.0)), abs=0.05)
    assert found.conditions == ("0, blue", "0, red", "1, blue", "1, red")
    assert found.shattering_dimensionality == pytest.approx(np.mean(found.table["decodability"].to_numpy()))
    assert not found.missing
    flat = geometry_report(torch.from_numpy(z).reshape(120, 2, 3), BITS[np.repeat(np.arange(4), 30)] @ [2, 1])
    np.testing.assert_allclose(
        sorted(flat.table["parallelism"].to_numpy()), sorted(found.table["parallelism"].to_numpy())
    )
    assert math.isnan(flat.target_alignment)


def test_unbiased_alignments_leave_the_noise_of_single_trials_out() -> None:
    numbers = np.arange(16)
    design = dict(zip("abcd", (numbers[:, None] >> np.arange(4) & 1).T, strict=True))
    both = [
        geometry_report(gaussian(16, 300, seed), design, most=1, unbiased=unbiased).target_alignment
        for unbiased in (False, True)
        for seed in range(4)
    ]
    assert np.mean(both[:4]) > 0.3
    assert abs(np.mean(both[4:])) < 0.15


def test_unequal_trials_are_drawn_alike() -> None:
    z, design = recording([200, 5, 12, 40], noise=0.6)
    found = geometry_report(z, design)
    assert found.trials.tolist() == [200, 5, 12, 40]
    shape = found.table.to_pylist()[0]
    assert shape["decodability"] > 0.85
    # All noise: a classifier that knew only which condition is common would not be at chance.
    none = geometry_report(gaussian(257, 6), design, resamples=20)
    assert none.table["decodability"].to_numpy() == pytest.approx(0.5, abs=0.15)


def test_missing_conditions_are_named_and_odd_numbers_work() -> None:
    condition = np.repeat(np.arange(5), 10)
    bits = np.array(list(itertools.product((0, 1), repeat=3)))[[0, 1, 2, 4, 7]]
    z = bits[condition] + 0.1 * gaussian(50, 3)
    design = {f"b{i}": bits[condition, i] for i in range(3)}
    with pytest.warns(MissingConditions, match="3 conditions of the design left out: 0, 1, 1"):
        found = geometry_report(z, design)
    assert found.missing == ("0, 1, 1", "1, 0, 1", "1, 1, 0")
    assert len(found.conditions) == 5
    assert len(found.table) >= number_of_dichotomies(5)
    z, design = recording([10, 10, 10, 10])
    design["shape"] = np.where(np.arange(40) < 2, 7, design["shape"])
    with pytest.warns(MissingConditions):
        few = geometry_report(z, design, min_trials=3)
    assert few.trials.tolist() == [8, 10, 10, 10]


def test_more_conditions_than_can_be_listed_are_sampled() -> None:
    condition = np.repeat(np.arange(20), 3)
    z = gaussian(20, 8)[condition] + 0.05 * gaussian(60, 8, 1)
    half = condition < 10
    found = geometry_report(z, condition, named={"half": half}, most=4)
    assert found.table["dichotomy"].to_pylist()[0] == "half"
    assert 4 <= len(found.table) <= 5
    assert np.isfinite(found.table["ccgp"].to_numpy()).all()


@pytest.mark.parametrize("null", ["rotate", "shuffle"])
def test_p_values_tell_structure_from_none(null: str) -> None:
    z, design = recording([8, 8, 8, 8], noise=0.3)
    found = geometry_report(z, design, shuffles=19, null=null)
    shape = found.table.to_pylist()[0]
    assert max(shape["p_parallelism"], shape["p_ccgp"], shape["p_decodability"]) <= 0.1
    assert min(shape["p_parallelism"], shape["p_ccgp"], shape["p_decodability"]) >= 1 / 20
    assert 0 < found.p_target_alignment <= 1
    again = geometry_report(z, design, shuffles=19, null=null)
    assert again.table.equals(found.table)
    noise = geometry_report(gaussian(32, 6, 3), design, shuffles=19, null=null)
    assert np.mean(noise.table["p_decodability"].to_numpy()) > 0.1


def test_rotations_keep_each_condition_and_its_distance() -> None:
    from neuropil.interpret.geometry_report import _Rotation

    z, _ = recording([6, 3, 9, 2], noise=0.5)
    numbers = np.repeat(np.arange(4), [6, 3, 9, 2])
    turn = _Rotation(z, numbers)
    drawn = turn.draw(np.random.default_rng(0))
    for c in range(4):
        a, b = (part[numbers == c] - turn.centre for part in (z, drawn))
        np.testing.assert_allclose(a @ a.T, b @ b.T, atol=1e-10)
    assert abs(drawn - z).max() > 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conditions": [0, 1, 2] * 13 + [0]}, "expected 4 or more"),
        ({"conditions": list(range(39))}, "for 40 trials"),
        ({"conditions": [np.nan] * 40}, "without a value"),
        ({"conditions": {}}, "no conditions"),
        ({"named": {"odd": [0, 1] * 20}}, "differs between trials"),
        ({"named": {"flat": [0] * 40}}, "1 values"),
        ({"null": "mirror"}, "rotate, shuffle"),
    ],
)
def test_wrong_recordings(change: dict[str, object], said: str) -> None:
    z, design = recording([10, 10, 10, 10])
    settings: dict[str, object] = {"conditions": design, **change}
    with pytest.raises(ValueError, match=said):
        geometry_report(z, settings.pop("conditions"), **settings)
    z[3, 2] = np.inf
    with pytest.raises(ValueError, match="the first in row 3"):
        geometry_report(z, design)


# ------------------------------------------------------------------------------------------------- models


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 1))


def test_representation_of_sites_and_modules() -> None:
    net, x = small(), torch.from_numpy(gaussian(23, 6)).float()
    net.train()
    h = torch.tanh(net[0](x)).detach()
    for size in (1, 7, 100):
        torch.testing.assert_close(representation(net, 0, x, batch_size=size), h)
    torch.testing.assert_close(representation(net, "1", x), torch.relu(net[2](h)).detach())
    torch.testing.assert_close(representation(net, "3", x), torch.relu(net[2](h)).detach())
    assert net.training
    assert net[4].training
    assert not net[0]._forward_hooks
    linear = nn.Sequential(nn.Linear(6, 2))  # no neurons, and still a module to look at
    torch.testing.assert_close(representation(linear, "0", x), linear(x).detach())
    with pytest.raises(UnknownNeuron, match="one of the sites: 0 "):
        representation(net, "nowhere", x)
    with pytest.raises(ValueError, match="flatten, mean, last"):
        representation(net, 0, x, pool="max")


def test_representation_pools_positions() -> None:
    conv = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 4))
    x = torch.rand(5, 1, 8, 8)
    maps = torch.relu(conv[0](x)).detach()
    torch.testing.assert_close(representation(conv, 0, x, pool="mean"), maps.mean((2, 3)))
    torch.testing.assert_close(representation(conv, 0, x), maps.flatten(1))

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.up, self.down = nn.Embedding(11, 4), nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(self.emb(input_ids))))

    net = Named()
    ids = torch.randint(11, (6, 4))
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]] * 2)
    data = {"input_ids": ids, "attention_mask": mask}
    h = net.up(net.emb(ids)).detach()
    length = mask.sum(1)
    last = representation(net, "up", data, batch_size=4, pool="last")
    mean = representation(net, "up", data, batch_size=4, pool="mean")
    for i, n in enumerate(length.tolist()):
        torch.testing.assert_close(last[i], h[i, n - 1])
        torch.testing.assert_close(mean[i], h[i, :n].mean(0))


def test_columns_add_up_to_the_alignment_of_the_layer() -> None:
    task = unstructured(4, 6, noise=0.2, seed=3)
    x, y, condition = task.sample(80, seed=1)
    net = small()
    with torch.no_grad():
        net[0].weight[4] = 0.0  # a neuron that never changes
    columns = geometry_columns(net, x, condition.numpy(), 2 * y.numpy() - 1, "xor", batch_size=32)
    found = columns(find_sites(net)[0])
    assert set(found) == {"xor_target", "xor_alone", "xor_condition", "xor_selectivity"}
    h = torch.tanh(net[0](x)).detach().double().numpy()
    means = np.stack([h[condition == c].mean(0) for c in range(4)])
    assert float(found["xor_target"].sum()) == pytest.approx(alignment(means, task.signs), abs=1e-9)
    alone = [alignment(means[:, [j]], task.signs) for j in range(9) if j != 4]
    np.testing.assert_allclose(np.delete(found["xor_alone"].numpy(), 4), alone, atol=1e-9)
    np.testing.assert_array_equal(found["xor_condition"], means.argmax(0))
    assert torch.isnan(found["xor_alone"][4])
    assert torch.isnan(found["xor_selectivity"][4])


def test_columns_stand_in_an_atlas(tmp_path: Path) -> None:
    net = small()

    class Mapped:
        name, fingerprint, architecture, sites = "net", "00ff", "Sequential", find_sites(net)

        def tokens(self) -> list[str]:
            return []

    x = torch.from_numpy(gaussian(12, 6)).float()
    columns = geometry_columns(net, x, list("abcd") * 3, [1, 1, -1, -1] * 3)
    with Atlas.create(tmp_path / "atlas", Mapped()) as atlas:
        atlas.add("geometry", columns, progress=False)
        rows = atlas.query("SELECT site, count(*) n, sum(geometry_target) s FROM neurons GROUP BY site").to_pylist()
    found = {row["site"]: (row["n"], row["s"]) for row in rows}
    assert [found[i][0] for i in (0, 1)] == [9, 5]
    for site in find_sites(net):
        assert found[site.number][1] == pytest.approx(float(columns(site)["geometry_target"].sum()))


def test_selectivity_of_known_neurons() -> None:
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        net[0].weight[:] = torch.tensor([[0, 0, 1.0, 0], [1, 1, 0, 0], [3, 3, 3, 2.0]])
    x = torch.eye(4)
    found = geometry_columns(net, x, list("abcd"), [1, 1, -1, -1])(find_sites(net)[0])
    assert found["geometry_selectivity"].tolist() == pytest.approx([1, 2 / 3, 1 / 3], abs=1e-6)
    assert found["geometry_condition"].tolist()[0] == 2
    assert found["geometry_alone"].tolist()[1] == pytest.approx(1)
    for bad, said in (([1, 1, 1, 1], "the same labels"), ([1, 1, -1], "4 conditions and 3 labels")):
        with pytest.raises(ValueError, match=said):
            geometry_columns(net, x, list("abcd"), bad)
    with pytest.raises(ValueError, match="differ between examples"):
        geometry_columns(net, x, list("aabb"), [1, -1, 1, 1])


def test_a_trained_network_of_ones_own_is_seen_as_the_study_sees_it() -> None:
    task = unstructured(4, 30, noise=0.1, seed=0)
    x, y, condition = task.sample(400, seed=1)
    shares = []
    for act in (nn.Tanh(), nn.ReLU()):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(30, 64), act, nn.Linear(64, 1))
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(net(x), y).backward()
            optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = geometry_report(representation(net, 0, x), condition, named={"label": y[:, 0]})
        shares.append(found.target_alignment)
    assert shares[0] > shares[1] + 0.1
