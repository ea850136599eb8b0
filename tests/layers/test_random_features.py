"""Random features: the certificate is never violated, the ridgelet identities, the estimators, the diagnosis."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from neuropil.layers import (
    RandomFeatureClassifier,
    RandomFeatureRegressor,
    RandomFeatures,
    Spectrum,
    bandlimit_lower_bound,
    diagnose_random_features,
    required_bandwidth,
    ridgelet_transform,
    spectrum_mass_outside,
    suggest_scale,
)
from neuropil.layers._bandlimit import _degree, _relu_corners
from neuropil.layers._ridge_functions import ACTIVATIONS, hidden
from neuropil.layers.random_features import (
    RandomFeatureDiagnosis,
    RankDeficient,
    UnscaledInputs,
    draw_features,
    solve,
)
from neuropil.layers.ridgelet import (
    GaussianDerivative,
    admissibility,
    admissible_order,
    inverse_ridgelet_transform,
)

LINE = np.linspace(-1, 1, 200)[:, None]
NAMES = tuple(ACTIVATIONS)


def sine(k: float, x: np.ndarray = LINE) -> np.ndarray:
    return np.sin(2 * np.pi * k * x[:, 0])


def specimen(seed: int) -> Callable[[int], RandomFeatureDiagnosis]:
    del seed  # the target is the same for all
    return lambda seed: diagnose_random_features(LINE, sine(3), n_neurons=60, lams=(0.5, 5.0, 50.0), random_state=seed)


def quiet(**settings: object) -> RandomFeatureRegressor:
    return RandomFeatureRegressor(**{"random_state": 0, **settings})


@pytest.fixture(autouse=True)
def _no_talk() -> None:
    warnings.simplefilter("ignore", RankDeficient)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


# ------------------------------------------------------------------------------------------------ the network


def test_as_many_neurons_as_samples_interpolate() -> None:
    x = np.linspace(-1, 1, 20)[:, None]
    y = np.random.default_rng(0).standard_normal(20)
    # Biases from the data and weights of the order of the spacing: others are 0 or 1 at nearly all the samples.
    for seed in range(5):
        net = quiet(n_neurons=20, lam=20.0, bias_dist="data", rcond=1e-16, random_state=seed).fit(x, y)
        assert rms(net.predict(x) - y) < 1e-6
        assert net.rank_ == 20


@pytest.mark.parametrize("weight_dist", ["uniform", "normal", "log-uniform"])
@pytest.mark.parametrize("bias_dist", ["uniform", "normal", "data"])
def test_fewer_neurons_are_the_first_of_more(weight_dist: str, bias_dist: str) -> None:
    x = np.random.default_rng(0).standard_normal((30, 3))
    few, many = (draw_features(x, d, 2.0, weight_dist=weight_dist, bias_dist=bias_dist, seed=4) for d in (7, 19))
    assert torch.equal(few.weight, many.weight[:7])
    assert torch.equal(few.bias, many.bias[:7])


def test_the_residual_falls_with_neurons_and_rises_with_the_ridge() -> None:
    y = sine(2)
    by_size = [rms(quiet(n_neurons=d, lam=10.0).fit(LINE, y).predict(LINE) - y) for d in (1, 2, 4, 8, 16, 32)]
    assert (np.diff(by_size) <= 1e-12).all()
    ridges = (0.0, 1e-8, 1e-4, 1e-2, 1.0, 100.0)
    nets = [quiet(n_neurons=30, lam=10.0, ridge=r).fit(LINE, y) for r in ridges]
    assert (np.diff([rms(net.predict(LINE) - y) for net in nets]) >= 0).all()
    assert (np.diff([np.linalg.norm(net.coef_) for net in nets]) <= 1e-12).all()


def test_the_output_layer_is_that_of_the_normal_equations() -> None:
    rng = np.random.default_rng(1)
    h, y = rng.standard_normal((40, 12)), rng.standard_normal((40, 3))
    coef, rank = solve(h, y, 0.7, 1e-12)
    np.testing.assert_allclose(coef, np.linalg.solve(h.T @ h + 0.7 * np.eye(12), h.T @ y), rtol=1e-10)
    assert rank == 12
    np.testing.assert_allclose(solve(h, y, 0.0, 1e-12)[0], np.linalg.lstsq(h, y, rcond=None)[0], rtol=1e-9)
    twice = np.concatenate([h, h], 1)
    assert solve(twice, y, 0.0, 1e-12)[1] == 12


def test_peers_of_scikit_learn() -> None:
    """Its ridge regression on the same features, and its kernel, which cosines approximate (Rahimi and Recht)."""
    x = np.random.default_rng(0).uniform(-1, 1, (80, 3))
    y = np.sin(x @ np.array([1.0, 2.0, 3.0]))
    net = quiet(n_neurons=30, lam=2.0, ridge=0.3).fit(x, y)
    h = net.features_(torch.from_numpy(x)).numpy()
    peer = Ridge(alpha=0.3, fit_intercept=False, solver="svd").fit(h, y)
    np.testing.assert_allclose(net.predict(x), peer.predict(h), atol=1e-9)
    cosines = draw_features(x, 40_000, 1.5, lam_b=math.pi, weight_dist="normal", activation="cos")
    h = cosines(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(2 * h @ h.T / 40_000, rbf_kernel(x, gamma=1.5**2 / 2), atol=0.03)


def test_relu_with_kinks_outside_the_data_is_affine() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (50, 1)), rng.choice([-1, 1], 50) * rng.uniform(1.1, 2, 50)
    h = hidden(LINE, a, b, "relu")
    assert np.linalg.matrix_rank(h, tol=1e-10) == 2
    y = sine(1) + LINE[:, 0]
    best = np.polyval(np.polyfit(LINE[:, 0], y, 1), LINE[:, 0])
    coef, rank = solve(h, y[:, None], 0.0, 1e-12)
    assert rank == 2
    np.testing.assert_allclose(h @ coef[:, 0], best, atol=1e-8)


def test_without_weights_the_best_is_a_constant_and_with_tiny_ones_a_polynomial() -> None:
    y = np.exp(LINE[:, 0])
    b = np.random.default_rng(0).uniform(-1, 1, 30)
    coef, _ = solve(hidden(LINE, np.zeros((30, 1)), b, "sigmoid"), y[:, None], 0.0, 1e-12)
    np.testing.assert_allclose(hidden(LINE, np.zeros((30, 1)), b, "sigmoid") @ coef, y.mean(), atol=1e-10)
    h = hidden(LINE, 1e-2 * np.random.default_rng(1).uniform(-1, 1, (30, 1)), b, "sigmoid")
    coef, rank = solve(h, y[:, None], 0.0, 1e-9)
    assert rank < 7  # of 30: to this precision only low powers of x are there
    fits = [rms(np.polyval(np.polyfit(LINE[:, 0], y, degree), LINE[:, 0]) - y) for degree in range(6)]
    assert min(abs(rms(h @ coef[:, 0] - y) / fit - 1) for fit in fits[1:]) < 0.02


def test_features_are_frozen_saved_and_the_same_for_a_seed() -> None:
    x = np.random.default_rng(0).standard_normal((30, 3))
    one, two, other = (draw_features(x, 8, 1.0, seed=s) for s in (5, 5, 6))
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, other.weight)
    assert not list(one.parameters())
    assert not one.weight.requires_grad
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(torch.from_numpy(x)), one(torch.from_numpy(x)))
    assert one(torch.zeros(2, 5, 3, dtype=torch.float64)).shape == (2, 5, 8)


def test_distributions() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (50, 2))
    made = {kind: draw_features(x, 4000, 3.0, weight_dist=kind) for kind in ("uniform", "normal", "log-uniform")}
    assert 2.99 < float(made["uniform"].weight.abs().max()) <= 3
    assert abs(float(made["normal"].weight.std()) - 3) < 0.1
    lengths = made["log-uniform"].weight.norm(dim=1)
    assert float(lengths.max()) <= 3
    assert abs(float(lengths.median()) / (3 * 10**-1.5) - 1) < 0.2
    data = draw_features(x, 200, 3.0, bias_dist="data")
    z = torch.from_numpy(x) @ data.weight.T
    assert ((z.min(0).values <= data.bias) & (data.bias <= z.max(0).values)).all()
    assert float(draw_features(x, 500, 3.0, lam_b=0.1).bias.abs().max()) <= 0.1


def test_the_ridgelet_transform_says_where_neurons_are_needed() -> None:
    y = sine(10)
    drawn = draw_features(LINE, 300, 100.0, weight_dist="ridgelet", y=y, seed=0)
    blind = draw_features(LINE, 300, 100.0, weight_dist="log-uniform", seed=0)
    # The target's frequency is 2 pi 10, and psi of order 3 lives around sqrt(3): weights around 36.
    assert 25 < float(drawn.weight.abs().median()) < 55
    assert float(blind.weight.abs().median()) < 6
    again = draw_features(LINE, 300, 100.0, weight_dist="ridgelet", y=y, seed=0)
    assert torch.equal(drawn.weight, again.weight)
    assert len(np.unique(drawn.weight.numpy())) == 300


@pytest.mark.parametrize("estimator", [RandomFeatureRegressor(), RandomFeatureClassifier()], ids=type)
def test_scikit_learns_own_checks(estimator: RandomFeatureRegressor | RandomFeatureClassifier) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(clone(estimator), on_fail=None, on_skip=None)
    assert not {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert sum(r["status"] == "passed" for r in results) > 40


def test_classes_and_several_outputs_and_the_torch_network() -> None:
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x).clip(-5, 5)
    names = np.array(["malignant", "benign"])[y]
    net = RandomFeatureClassifier(80, lam=0.2, ridge=1e-3, random_state=0).fit(x[:400], names[:400])
    assert net.score(x[400:], names[400:]) > 0.93
    targets = np.stack([sine(1), sine(2)], 1)
    both = quiet(n_neurons=60, lam=10.0).fit(LINE, targets)
    assert both.predict(LINE).shape == (200, 2)
    np.testing.assert_allclose(both.predict(LINE), targets, atol=1e-4)
    network = both.network()
    with torch.no_grad():
        np.testing.assert_allclose(network(torch.from_numpy(LINE)).numpy(), both.predict(LINE), atol=1e-6)
    assert [p.requires_grad for p in network.parameters()] == [True]
    assert isinstance(network[0], RandomFeatures)
    assert both.coef_norm_ == np.abs(both.coef_).sum(0).max()


def test_what_it_warns_of() -> None:
    with pytest.warns(RankDeficient, match="rank of"):
        quiet(n_neurons=100, lam=0.1).fit(LINE, sine(1))
    with pytest.warns(UnscaledInputs, match="StandardScaler"):
        quiet(lam=1.0).fit(100 * LINE, sine(1))
    with pytest.warns(UnscaledInputs):
        diagnose_random_features(100 * LINE, sine(1), n_neurons=10, lams=(1.0,), draws=1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lam": 0.0}, "above 0"),
        ({"lam": -1.0}, "above 0"),
        ({"lam": math.inf}, "finite"),
        ({"n_neurons": 0}, "1 or more"),
        ({"activation": "swish"}, "expected one of sigmoid"),
        ({"weight_dist": "cauchy"}, "expected one of uniform"),
        ({"bias_dist": "cauchy"}, "expected one of uniform"),
        ({"ridge": -1.0}, "ridge"),
        ({"rcond": 1.0}, "rcond"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        quiet(**settings).fit(LINE, sine(1))


def test_data_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="minimum of 2"):
        quiet().fit(LINE[:1], [1.0])
    bad = sine(1)
    bad[3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        quiet().fit(LINE, bad)
    with pytest.raises(ValueError, match="NaN"):
        diagnose_random_features(LINE, bad)
    with pytest.raises(ValueError, match="8 or more"):
        suggest_scale(LINE[:5], sine(1)[:5])
    with pytest.raises(ValueError, match="lam > 0"):
        suggest_scale(LINE, sine(1), lams=(0.0, 1.0))
    with pytest.raises(ValueError, match="held_out"):
        suggest_scale(LINE, sine(1), held_out=1.0)
    with pytest.raises(ValueError, match="lam 0"):
        diagnose_random_features(LINE, sine(1), lam=0.0)
    with pytest.raises(ValueError, match="needs the targets"):
        draw_features(LINE, 5, 1.0, weight_dist="ridgelet")
    with pytest.raises(ValueError, match="one class"):
        RandomFeatureClassifier().fit(LINE, np.ones(200, dtype=int))


# -------------------------------------------------------------------------------------------- the certificate


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("lam", [0.5, 3.0])
def test_no_network_of_the_box_is_below_the_bound(activation: str, lam: float) -> None:
    f = sine(2) + 0.3
    proof = bandlimit_lower_bound(LINE, f, lam, activation=activation)
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-lam, lam, (400, 1)), rng.uniform(-lam, lam, 400)
    a[:4, 0], b[:4] = [lam, lam, -lam, -lam], [lam, -lam, lam, -lam]
    h = hidden(LINE, a, b, activation)
    for budget in (0.1, 1.0, 30.0, 1e3):
        c = rng.dirichlet(np.full(400, 0.02), 300) * rng.choice([-1, 1], (300, 400)) * budget
        assert np.sqrt(np.mean((h @ c.T - f[:, None]) ** 2, axis=0)).min() >= proof.bound(budget)
    for ridge in 10.0 ** np.arange(-14, 4):  # networks that were fitted, at the sum that each has
        coef, _ = solve(h, f[:, None], float(ridge), 1e-13)
        assert rms(h @ coef[:, 0] - f) >= proof.bound(float(np.abs(coef).sum()))


@pytest.mark.parametrize("activation", NAMES)
def test_the_bound_on_the_correlation_is_above_a_dense_search_and_near_it(activation: str) -> None:
    f, lam, lam_b = sine(1), 2.0, 3.0
    proof = bandlimit_lower_bound(LINE, f, lam, lam_b, activation=activation)
    a, b = np.meshgrid(np.linspace(-lam, lam, 161), np.linspace(-lam_b, lam_b, 161))
    searched = np.abs(hidden(LINE, a.reshape(-1, 1), b.ravel(), activation).T @ f).max() / len(f)
    assert searched <= proof.correlation[0] <= 1.25 * searched  # the first direction is f itself


def test_the_corners_of_relu_hold_its_maximum() -> None:
    rng = np.random.default_rng(0)
    x, h = rng.uniform(-1, 1, 30), rng.standard_normal(30)
    a, b = _relu_corners(x, 2.0, 0.7)
    found = np.abs(hidden(x[:, None], a[:, None], b, "relu").T @ h).max()
    many = rng.uniform(-2, 2, (40_000, 1)), rng.uniform(-0.7, 0.7, 40_000)
    searched = np.abs(hidden(x[:, None], *many, "relu").T @ h).max()
    assert searched <= found + 1e-12
    assert found < 1.05 * searched
    assert ((np.abs(a) <= 2 + 1e-9) & (np.abs(b) <= 0.7 + 1e-9)).all()


@pytest.mark.parametrize("activation", [name for name in NAMES if name != "relu"])
def test_polynomials_follow_the_activation_as_far_as_is_said(activation: str) -> None:
    strip = ACTIVATIONS[activation].strip
    assert strip is not None
    degree, error = _degree(strip, 4.0, 4.0)
    assert error < 1e-13
    a = np.cos(np.pi * (np.arange(4 * degree) + 0.5) / (4 * degree))
    for x, b in ((1.0, 0.3), (-0.7, 4.0), (0.9, -2.2)):
        values = hidden(np.array([[x]]), 4 * a[:, None], np.full(len(a), b), activation)[0]
        series = np.polynomial.chebyshev.chebfit(a, values, degree)
        assert np.abs(np.polynomial.chebyshev.chebval(a, series) - values).max() < 1e-12


@pytest.mark.parametrize("activation", [name for name in NAMES if name != "relu"])
def test_the_activation_is_bounded_in_the_strip_as_is_said(activation: str) -> None:
    real = np.linspace(-12, 12, 4001)
    for s in (0.3, 1.0, 1.5):
        z = torch.from_numpy(real + 1j * s)
        values = 1 / (1 + torch.exp(-z)) if activation == "sigmoid" else ACTIVATIONS[activation].function(z)
        strip = ACTIVATIONS[activation].strip
        assert strip is not None
        assert float(values.abs().max()) <= strip(s) * (1 + 1e-9)


def test_the_certificate_of_given_neurons_meets_the_best_fit() -> None:
    x = np.random.default_rng(0).standard_normal((60, 3))
    f = np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2]
    made = draw_features(x, 25, 1.0)
    weight, bias = made.weight.numpy(), made.bias.numpy()
    proof = bandlimit_lower_bound(x, f, neurons=(weight, bias))
    h = hidden(x, weight, bias, "sigmoid")
    best, _ = solve(h, f[:, None], 0.0, 1e-13)
    residual, budget = rms(h @ best[:, 0] - f), float(np.abs(best).sum())
    assert 0.98 * residual < proof.bound(budget) <= residual * (1 + 1e-9)
    assert proof.bound(0.0) == pytest.approx(rms(f))
    needed = proof.budget(0.9 * residual)
    assert proof.bound(needed) == pytest.approx(0.9 * residual, rel=1e-6)
    falling = [proof.bound(b) for b in np.geomspace(1e-3, 1e8, 40)]
    assert (np.diff(falling) <= 1e-12).all()


def test_what_the_certificate_refuses() -> None:
    with pytest.raises(ValueError, match="one dimension and a box, or neurons"):
        bandlimit_lower_bound(np.zeros((5, 2)), np.ones(5), 1.0)
    with pytest.raises(ValueError, match="0 everywhere"):
        bandlimit_lower_bound(LINE, np.zeros(200), 1.0)
    with pytest.raises(ValueError, match="too wide"):
        bandlimit_lower_bound(LINE, sine(1), 200.0)
    with pytest.raises(ValueError, match="above 0"):
        bandlimit_lower_bound(LINE, sine(1), 0.0)
    with pytest.raises(ValueError, match="as many"):
        bandlimit_lower_bound(LINE, sine(1)[:5], 1.0)
    with pytest.raises(ValueError, match="0 or more"):
        bandlimit_lower_bound(LINE, sine(1), 1.0).bound(-1.0)


# ------------------------------------------------------------------------------------------ ridgelet transform


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_fourier_slice(order: int) -> None:
    """Along b the transform of a Gaussian has the Fourier transform conj(psi^(w)) f^(w a)."""
    psi = GaussianDerivative(order)
    x = np.linspace(-9, 9, 601)[:, None]
    b = np.linspace(-30, 30, 1201)
    a = np.array([[0.0], [0.4], [-1.3], [2.5]])
    found = ridgelet_transform(x, np.exp(-(x[:, 0] ** 2) / 2), a, b, psi)
    for w in (0.3, 1.0, 2.2, -1.5):
        along = np.trapezoid(found * np.exp(-1j * w * b), b, axis=1)
        closed = psi.fourier(np.array([w]))[0].conj() * math.sqrt(2 * math.pi) * np.exp(-((w * a[:, 0]) ** 2) / 2)
        np.testing.assert_allclose(along, closed, atol=1e-6)


def test_fourier_slice_in_two_dimensions() -> None:
    psi = GaussianDerivative(3)
    axis = np.linspace(-7, 7, 57)
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    f = np.exp(-np.square(x).sum(1) / 2)
    b, a = np.linspace(-25, 25, 501), np.array([[0.5, -0.3], [1.0, 1.0]])
    found = ridgelet_transform(x, f, a, b, psi, np.full(len(x), (axis[1] - axis[0]) ** 2))
    along = np.trapezoid(found * np.exp(-1j * 0.8 * b), b, axis=1)
    closed = psi.fourier(np.array([0.8]))[0].conj() * 2 * math.pi * np.exp(-0.5 * 0.64 * np.square(a).sum(1))
    np.testing.assert_allclose(along, closed, atol=1e-6)


def test_the_derivatives_of_a_gaussian() -> None:
    t = np.linspace(-3, 3, 13)
    for order in (1, 2, 3, 6):
        w = np.linspace(-12, 12, 961)
        numeric = np.trapezoid(GaussianDerivative(order).fourier(w) * np.exp(1j * np.outer(t, w)), w, axis=1)
        np.testing.assert_allclose(GaussianDerivative(order)(t), numeric / (2 * math.pi), atol=1e-9)
    with pytest.raises(ValueError, match="1 or more"):
        GaussianDerivative(0)


def test_admissibility() -> None:
    # In closed form, with a Gaussian activation, k = 2, m = 1: 2 pi * -int w exp(-w^2) |.| = -2 pi.
    assert admissibility(GaussianDerivative(2), "gaussian") == pytest.approx(-2 * math.pi, rel=1e-10)
    assert admissibility(GaussianDerivative(4), "relu") == pytest.approx(-2 * math.sqrt(2 * math.pi), rel=1e-10)
    for name in NAMES:
        for m in (1, 2, 3):
            order = admissible_order(name, m)
            assert abs(admissibility(GaussianDerivative(order), name, m)) > 0.1
            assert admissibility(GaussianDerivative(order + 1), name, m) == 0  # of the other parity
    with pytest.raises(ValueError, match="not finite"):
        admissibility(GaussianDerivative(1), "sigmoid")
    with pytest.raises(ValueError, match="not admissible"):
        inverse_ridgelet_transform(np.zeros((2, 2)), np.ones((2, 1)), np.ones(2), LINE, GaussianDerivative(2))


@pytest.mark.parametrize("activation", ["sigmoid", "gaussian", "tanh", "relu"])
def test_the_network_of_the_transform_is_the_function(activation: str) -> None:
    psi = GaussianDerivative(admissible_order(activation) + 2)
    x = np.linspace(-6, 6, 241)[:, None]
    f = np.exp(-(x[:, 0] ** 2) / 2)
    a = np.linspace(-8, 8, 161)[:, None]
    b = np.linspace(-45, 45, 1801 if activation == "relu" else 361)  # its kink needs small steps
    transform = ridgelet_transform(x, f, a, b, psi)
    at = np.linspace(-3, 3, 61)[:, None]
    wanted = np.exp(-(at[:, 0] ** 2) / 2)
    errors = []
    for lam in (8.0, 4.0, 2.0, 1.0, 0.5):
        kept = np.abs(a[:, 0]) <= lam
        found = inverse_ridgelet_transform(transform[kept], a[kept], b, at, psi, activation)
        errors.append(rms(found - wanted) / rms(wanted))
    assert errors[0] < 1e-3
    assert (np.diff(errors) > 0).all(), errors


def test_mass_outside() -> None:
    bump = Spectrum.of(lambda x: np.exp(-(x[:, 0] ** 2) / 2), (-8, 8))
    lams = np.geomspace(0.05, 50, 40)
    mass = [spectrum_mass_outside(bump, float(lam)) for lam in lams]
    assert spectrum_mass_outside(bump, 0.0) == 1
    assert all(0 <= m <= 1 for m in mass)
    assert (np.diff(mass) <= 0).all()
    assert mass[0] > 0.95
    assert mass[-1] < 1e-3
    for s in (0.3, 4.0):
        scaled = Spectrum.of(lambda x, s=s: np.exp(-((s * x[:, 0]) ** 2) / 2), (-8 / s, 8 / s))
        for lam in (0.5, 2.0, 9.0):
            assert spectrum_mass_outside(scaled, lam) == pytest.approx(spectrum_mass_outside(bump, lam / s), rel=1e-9)
        assert required_bandwidth(scaled) == pytest.approx(s * required_bandwidth(bump), rel=1e-9)
    assert spectrum_mass_outside(bump, required_bandwidth(bump, 0.2)) == pytest.approx(0.2, abs=1e-9)


def test_mass_outside_is_that_of_the_transform_itself() -> None:
    """The closed form against the transform on a grid, with and without a bound on the biases."""
    x = np.linspace(-8, 8, 401)[:, None]
    a, b = np.linspace(-12, 12, 481)[:, None], np.linspace(-60, 60, 361)
    found = np.square(ridgelet_transform(x, np.exp(-(x[:, 0] ** 2) / 2), a, b, GaussianDerivative(3)))
    bump = Spectrum.of(lambda x: np.exp(-(x[:, 0] ** 2) / 2), (-8, 8))
    for lam in (0.4, 1.0, 3.0):
        out = found[np.abs(a[:, 0]) > lam + 0.025].sum() / found.sum()
        edge = found[np.abs(np.abs(a[:, 0]) - lam) < 0.025].sum() / found.sum() / 2
        assert spectrum_mass_outside(bump, lam) ** 2 == pytest.approx(out + edge, abs=1e-3)
        wide = spectrum_mass_outside(bump, lam, 60.0)
        assert wide == pytest.approx(spectrum_mass_outside(bump, lam), abs=2e-3)
        clipped = [spectrum_mass_outside(bump, lam, lam_b) for lam_b in (0.0, 0.5, 1.0, 4.0)] + [wide]
        assert clipped[0] == 1
        assert (np.diff(clipped) <= 1e-9).all()
        assert clipped[2] > clipped[-1]


def test_mass_outside_in_two_dimensions() -> None:
    """Of a Gaussian, whose largest of two frequencies has a known distribution."""
    flat = Spectrum.of(lambda x: np.exp(-np.square(x).sum(1) / 2), ((-7, 7), (-7, 7)), 128)
    psi = GaussianDerivative(3)

    def density(r: float) -> float:  # of max(|u|, |v|), where u, v have the density exp(-u^2) / sqrt(pi)
        return 4 / math.sqrt(math.pi) * math.exp(-r * r) * math.erf(r)

    for lam in (0.5, 1.0, 3.0):
        closed = quad(lambda r, lam=lam: density(r) * float(psi.share_below(np.array([r / lam]), 2)[0]), 0, 8)[0]
        assert spectrum_mass_outside(flat, lam) == pytest.approx(math.sqrt(closed), rel=2e-3)
    with pytest.raises(ValueError, match="lam_b=None"):
        spectrum_mass_outside(flat, 1.0, 1.0)


def test_samples_tell_the_bandwidth_of_their_function() -> None:
    found = [required_bandwidth(Spectrum.of_samples(LINE, sine(k))) for k in (1, 2, 5, 10)]
    np.testing.assert_allclose(np.array(found) / found[0], [1, 2, 5, 10], rtol=0.1)
    some = np.sort(np.random.default_rng(0).uniform(-1, 1, 400))[:, None]
    scattered = required_bandwidth(Spectrum.of_samples(some, sine(5, some)))
    assert scattered == pytest.approx(found[2], rel=0.15)
    shuffled = np.random.default_rng(1).permutation(400)
    assert required_bandwidth(Spectrum.of_samples(some[shuffled], sine(5, some)[shuffled])) == pytest.approx(scattered)
    both = Spectrum.of_samples(LINE, np.stack([sine(1), sine(10)], 1))
    assert found[0] < required_bandwidth(both) < found[3]


def test_slices_of_scattered_samples() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (3000, 4))
    direction = np.array([1.0, 0.0, 0.0, 0.0])
    found = [Spectrum.of_samples(x, np.sin(k * np.pi * x[:, 0])) for k in (1, 4)]
    assert abs(found[1].direction @ direction) == 1
    assert required_bandwidth(found[1]) > 2 * required_bandwidth(found[0])
    many = rng.uniform(-1, 1, (9000, 4))
    assert len(Spectrum.of_samples(many, many[:, 0]).x) == 4000
    # The power of the floor is taken off: at a frequency the target lacks, it is 0 on average.
    power = []
    for seed in range(40):
        x = np.random.default_rng(seed).uniform(-1, 1, (60, 2))
        values = np.random.default_rng(seed + 99).standard_normal(60)
        waves = np.exp(-3j * x[:, 0])
        power.append((abs(waves @ values) ** 2 - np.square(values).sum()) / (60 * 59))
    assert abs(np.mean(power)) < 3 * np.std(power) / math.sqrt(40)
    with pytest.raises(ValueError, match="without any power"):
        required_bandwidth(Spectrum.of_samples(LINE, np.ones(200)))
    with pytest.raises(ValueError, match="the same"):
        Spectrum.of_samples(np.ones((9, 2)), np.arange(9.0))
    with pytest.raises(ValueError, match="2 places or more"):
        Spectrum.of_samples(np.ones((9, 1)), np.arange(9.0))
    with pytest.raises(ValueError, match=r"\(low, high\)"):
        Spectrum.of(lambda x: x[:, 0], (1, -1))
    with pytest.raises(ValueError, match="above 0 and below 1"):
        required_bandwidth(Spectrum.of_samples(LINE, sine(1)), 1.0)
    with pytest.raises(ValueError, match="0 or more"):
        spectrum_mass_outside(Spectrum.of_samples(LINE, sine(1)), -1.0)


# ------------------------------------------------------------------------------------------------- the diagnosis


def test_a_range_too_small_is_told_from_one_that_is_not() -> None:
    x = np.linspace(-1, 1, 400)[:, None]
    settings = {"n_neurons": 200, "lams": (0.3, 10.0, 30.0, 60.0), "random_state": 0}
    small = diagnose_random_features(x, sine(8, x), lam=1.0, **settings)
    assert small.too_narrow is True
    assert "too small for this target; more neurons will not help" in small.messages[0]
    assert small.messages[1].startswith("proven")
    good = diagnose_random_features(x, sine(8, x), lam=30.0, **settings)
    assert good.too_narrow is False
    none = diagnose_random_features(x, sine(8, x), **settings)
    assert none.too_narrow is None
    assert none.suggested in (10.0, 30.0, 60.0)
    assert list(small.curve.lams) == [0.3, 1.0, 10.0, 30.0, 60.0]
    at = int(np.flatnonzero(small.curve.lams == 1.0)[0])
    assert small.theory[at] > 0.9 * small.curve.target
    assert small.mass_outside[at] > 0.99
    assert (np.diff(small.mass_outside) <= 0).all()


def test_theory_is_below_simulation_in_one_dimension_and_in_many() -> None:
    line = diagnose_random_features(LINE, np.stack([sine(4), sine(1)], 1), n_neurons=80, lams=(0.3, 3.0, 30.0))
    assert (line.curve.bounds <= line.curve.errors * (1 + 1e-12)).all()
    assert line.theory[0] > 0.3 * line.simulated[0]
    x, y = load_diabetes(return_X_y=True)
    table = diagnose_random_features(StandardScaler().fit_transform(x), y, n_neurons=80, lams=(0.1, 1.0), ridge=1.0)
    assert (table.curve.bounds <= table.curve.errors * (1 + 1e-12)).all()
    assert (table.theory > 0).all()
    assert 0 < table.required < 20


def test_noise_is_said_to_have_no_range() -> None:
    rng = np.random.default_rng(0)
    found = diagnose_random_features(rng.standard_normal((120, 3)), rng.standard_normal(120), n_neurons=20, lam=1.0)
    assert "no range fits this target well" in found.messages[-1]
    assert found.too_narrow is False


def test_suggested_scale_grows_with_the_target() -> None:
    x = np.linspace(-1, 1, 400)[:, None]
    found = [suggest_scale(x, sine(k, x), lams=(3.0, 10.0, 30.0, 90.0), draws=3) for k in (1, 10)]
    assert found[1].suggested >= 3 * found[0].suggested
    assert found[0].errors.shape == (3, 4)
    assert (found[0].ranks <= 200).all()


def test_the_plot_shows_the_spectrum_and_the_box() -> None:
    figure = specimen(0)(0).plot()
    assert [axes.get_xlabel() for axes in figure.axes[:2]] == ["range of weights and biases", "a"]
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (200, 3))
    found = diagnose_random_features(x, np.sin(3 * x[:, 1]), n_neurons=30, lams=(1.0, 3.0), lam=1.0)
    assert "strongest slice" in found.plot().axes[1].get_xlabel()
