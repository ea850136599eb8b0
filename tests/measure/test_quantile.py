"""Quantile aggregation: closed forms of its scores, operators and weights, then whole fits on real tables."""

import sys
from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.stats import norm
from sklearn.base import clone
from sklearn.datasets import load_diabetes
from sklearn.ensemble import GradientBoostingRegressor, HistGradientBoostingRegressor
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LinearRegression, QuantileRegressor
from sklearn.utils.estimator_checks import check_estimator

from neuropil.errors import MissingExtra
from neuropil.measure import _quantile_learn as learning
from neuropil.measure.quantile import (
    AggregationWeights,
    QuantileAggregator,
    QuantileNetwork,
    as_quantile_model,
    calibration_error,
    conformity_scores,
    coverage,
    coverage_error,
    cqr,
    crossing_penalty,
    crossing_rate,
    crps,
    cv_plus,
    default_models,
    interval_score,
    isotonize,
    margins,
    paper_models,
    pinball,
    wis,
)

EXPECTED_FAILURES: dict[str, str] = {}
LEVELS = np.arange(1, 20) / 20
SMALL = {"search": 0, "n_folds": 2, "max_steps": 100, "hidden": 8}


def specimen(seed: int = 0) -> tuple[QuantileAggregator, np.ndarray, np.ndarray]:
    """A small aggregate of a linear model and boosted trees, with the first 120 rows of diabetes."""
    trees = GradientBoostingRegressor(loss="quantile", n_estimators=3)
    models = [QuantileRegressor(alpha=0.0), trees]
    X, y = load_diabetes(return_X_y=True)
    return QuantileAggregator(models, levels=[0.1, 0.5, 0.9], random_state=seed, **SMALL), X[:120], y[:120]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_passes_scikit_learns_checks() -> None:
    estimator, _, _ = specimen()
    estimator.set_params(levels=[0.5], max_steps=5, base_models=[QuantileRegressor(alpha=0.0)])
    check_estimator(estimator, expected_failed_checks=EXPECTED_FAILURES, on_skip=None)


# --- scores ----------------------------------------------------------------------------------------


def test_pinball_is_the_larger_of_its_two_lines_and_least_at_the_quantile() -> None:
    y, q = draw(0, 500).numpy(), draw(1, 500, 19).numpy()
    u = y[:, None] - q
    np.testing.assert_allclose(pinball(y, q, LEVELS), np.maximum(LEVELS * u, (LEVELS - 1) * u), atol=1e-15)
    grid = np.linspace(-2, 2, 401)
    losses = pinball(y, np.repeat(grid[None], 500, 0), np.full(401, 0.8)).mean(0)
    assert abs(grid[losses.argmin()] - np.quantile(y, 0.8)) < 0.02


def test_huber_rounds_the_kink_and_leaves_the_arms() -> None:
    levels, a = np.array([0.2, 0.7]), 0.5
    y, q = np.array([0.0, 0.0, 0.0, 0.0]), np.array([[0.1, 0.1], [-0.1, -0.1], [3.0, 3.0], [-3.0, -3.0]])
    found = pinball(y, q, levels, a)
    slope = np.array([1 - levels, levels, 1 - levels, levels])
    size = np.array([[0.01 / 2 / a], [0.01 / 2 / a], [3 - a / 2], [3 - a / 2]])
    np.testing.assert_allclose(found, slope * size)
    torch.testing.assert_close(pinball(torch.tensor(y), torch.tensor(q), torch.tensor(levels), a), torch.tensor(found))
    np.testing.assert_allclose(pinball(y, q, levels, 1e-9), pinball(y, q, levels), atol=1e-8)
    with pytest.raises(ValueError, match="huber"):
        pinball(y, q, levels, -1.0)


def test_two_pinball_losses_are_an_interval_score_even_where_ends_cross() -> None:
    y, ends = draw(0, 400).numpy(), draw(1, 400, 2).numpy()
    for alpha in (0.1, 0.5, 0.9):
        both = pinball(y, ends, np.array([alpha / 2, 1 - alpha / 2])).sum(1)
        np.testing.assert_allclose(both, alpha / 2 * interval_score(y, ends[:, 0], ends[:, 1], alpha), atol=1e-12)


def test_wis_is_twice_the_mean_pinball_loss() -> None:
    y, q = draw(0, 50).numpy(), draw(1, 50, 19).numpy()
    parts = [tau * interval_score(y, q[:, j], q[:, -1 - j], 2 * tau) for j, tau in enumerate(LEVELS[:9])]
    bracher = (0.5 * abs(y - q[:, 9]) + np.sum(parts, 0)) / 9.5
    np.testing.assert_allclose(wis(y, q, LEVELS), bracher, rtol=1e-12)
    with pytest.raises(ValueError, match="symmetric"):
        wis(y, q[:, :2], [0.1, 0.5])


def test_crps_of_the_normal_law() -> None:
    levels = np.arange(1, 1000) / 1000
    exact = (np.sqrt(2) - 1) / np.sqrt(np.pi)
    assert abs(crps(np.zeros(1), norm.ppf(levels)[None], levels)[0] - exact) < 2e-3
    assert abs(2 * pinball(np.zeros(1), norm.ppf(levels)[None], levels).mean() - exact) < 2e-3
    uneven = norm.cdf(np.linspace(-4, 4, 400))
    assert abs(crps(np.zeros(1), norm.ppf(uneven)[None], uneven)[0] - exact) < 2e-3


def test_coverage_and_calibration_of_true_and_of_shifted_quantiles() -> None:
    y = draw(0, 20_000).numpy()
    q = np.repeat(norm.ppf(LEVELS)[None], len(y), 0)
    np.testing.assert_allclose(coverage(y, q, LEVELS), 1 - 2 * LEVELS[:9], atol=0.01)
    assert coverage_error(y, q, LEVELS) < 0.01
    assert calibration_error(y, q, LEVELS) < 0.01
    np.testing.assert_allclose(calibration_error(y, q - 100, LEVELS), LEVELS.mean())
    assert crossing_rate(q) == 0
    assert crossing_rate(np.r_[q[:1], q[:1, ::-1]]) == 0.5


# --- order -----------------------------------------------------------------------------------------


def test_sorting_and_isotonic_projection_never_raise_the_loss_and_the_sweep_can() -> None:
    q, y = draw(0, 20_000, 19), draw(1, 20_000).numpy()
    before = pinball(y, q.numpy(), LEVELS).sum(1)
    for how in ("sort", "pava"):
        assert (pinball(y, isotonize(q, how).numpy(), LEVELS).sum(1) <= before + 1e-12).all()
    swept = pinball(y, isotonize(q, "sweep").numpy(), LEVELS).sum(1)
    raised = (swept > before + 1e-12).mean()
    assert 0.02 < raised < 0.2
    # The smallest counter-example: the low outlier at a high level was right, and the sweep hides it.
    q, y = torch.tensor([[0.0, 1.0, -1.0]]), np.array([-1.0])
    levels = np.array([0.25, 0.5, 0.75])
    assert pinball(y, isotonize(q, "sweep").numpy(), levels).sum() > pinball(y, q.numpy(), levels).sum()


@pytest.mark.parametrize("m", [1, 2, 7, 20])
def test_the_operators_are_what_their_names_say(m: int) -> None:
    q = draw(m, 60, m)
    expected = [IsotonicRegression().fit_transform(np.arange(m), row) for row in q.numpy()]
    np.testing.assert_allclose(isotonize(q, "pava").numpy(), expected, atol=1e-6)
    np.testing.assert_array_equal(isotonize(q, "sort").numpy(), np.sort(q.numpy(), 1))
    assert torch.equal(isotonize(q, "sweep")[:, m // 2], q[:, m // 2])
    for how in ("sort", "pava", "sweep"):
        once = isotonize(q, how)
        assert (once.diff(dim=1) >= 0).all()
        torch.testing.assert_close(isotonize(once, how), once)
        if how != "sweep":
            torch.testing.assert_close(once.mean(1), q.mean(1))


def test_ties_and_increasing_rows_stay() -> None:
    q = torch.tensor([[1.0, 1.0, 2.0, 2.0], [0.0, 1.0, 2.0, 5.0], [3.0, 3.0, 3.0, 3.0]])
    for how in ("sort", "pava", "sweep", "soft-sort"):
        torch.testing.assert_close(isotonize(q, how), q)
    with pytest.raises(ValueError, match="'sort', 'pava', 'sweep', 'soft-sort'"):
        isotonize(q, "shuffle")
    with pytest.raises(ValueError, match="soft_strength"):
        isotonize(q, "soft-sort", 0.0)


def test_gradients_follow_the_permutation_and_the_blocks() -> None:
    levels, y = torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64), torch.tensor([0.35], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.1, 0.3, 0.2]], dtype=torch.float64, requires_grad=True)
    slope = torch.where(y[:, None] > q.sort(1).values, -levels, 1 - levels)
    pinball(y, isotonize(q, "sort"), levels).sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q).scatter(1, q.argsort(1), slope))
    q.grad = None  # all four are pooled to 0.275, below y
    pinball(y, isotonize(q, "pava"), levels).sum().backward()
    torch.testing.assert_close(q.grad, (-levels).mean().expand(1, 4))
    rows = draw(3, 5, 6).requires_grad_()
    for how, strength in (("sort", 0.1), ("pava", 0.1), ("sweep", 0.1), ("soft-sort", 0.1), ("soft-sort", 3.0)):
        assert torch.autograd.gradcheck(lambda r, how=how, s=strength: isotonize(r, how, s), rows)


def test_soft_sort_is_sorting_until_gaps_exceed_its_reach() -> None:
    q = torch.tensor([[30.0, 0.0, 4.0]])
    torch.testing.assert_close(isotonize(q, "soft-sort", 0.02), torch.tensor([[0.0, 4.0, 30.0]]))
    soft = isotonize(q, "soft-sort", 0.1)  # gaps of more than 10 are pulled in
    torch.testing.assert_close(soft.mean(), q.mean())
    assert (soft.diff(dim=1) <= 10 + 1e-5).all()
    assert (soft.diff(dim=1) >= 0).all()


def test_the_penalty_is_zero_exactly_where_all_gaps_are_kept() -> None:
    wide = torch.arange(4.0, dtype=torch.float64)[None] * 0.1
    assert crossing_penalty(wide, 0.1 - 1e-9) == 0
    assert crossing_penalty(wide, 0.11) > 0
    gaps = margins(torch.tensor([0.0, 1.0, 3.0, 3.5], dtype=torch.float64), 0.05)
    assert gaps[2, 1] == pytest.approx(0.1)
    assert crossing_penalty(wide, gaps.fill_diagonal_(9.0)) == 0  # the diagonal is no pair
    q = draw(0, 7, 5)
    by_hand = sum(torch.relu(q[:, j] - q[:, i] + 0.3) for i in range(5) for j in range(i)).sum() / (7 * 10)
    torch.testing.assert_close(crossing_penalty(q, 0.3), by_hand)
    torch.testing.assert_close(crossing_penalty(q + 11.0, 0.3), by_hand)
    assert torch.autograd.gradcheck(lambda r: crossing_penalty(r, 0.3), q.requires_grad_())
    assert crossing_penalty(q[:, :1], 0.3) == 0


# --- weights ---------------------------------------------------------------------------------------


def network(resolution: str, features: int | None = None, p: int = 3, m: int = 4, **more: bool) -> AggregationWeights:
    torch.manual_seed(0)
    return AggregationWeights(resolution, p, m, features, hidden=5, **more).double()


@torch.no_grad()
def test_zero_logits_average_and_huge_ones_choose() -> None:
    z, x = draw(0, 6, 3, 4), draw(1, 6, 2)
    for resolution in ("coarse", "medium"):
        torch.testing.assert_close(network(resolution)(z, x), z.mean(1))
    torch.testing.assert_close(network("fine")(z, x), z.mean((1, 2))[:, None].expand(6, 4))
    for resolution in ("coarse", "medium", "fine"):
        net = network(resolution)
        assert net.logits is not None
        if resolution == "fine":
            net.logits.unflatten(0, (3, 4))[1].diagonal().fill_(1e4)
        else:
            net.logits[1] = 1e4
        assert torch.equal(net(z, x), z[:, 1])


@torch.no_grad()
def test_coarse_is_medium_is_fine_with_the_matching_logits() -> None:
    z, x, logits = draw(0, 6, 3, 4), draw(1, 6, 2), draw(2, 3)
    coarse, medium, fine = (network(r) for r in ("coarse", "medium", "fine"))
    coarse.logits.copy_(logits[:, None])
    medium.logits.copy_(logits[:, None].expand(3, 4))
    fine.logits.fill_(-1e9)
    for level in range(4):
        fine.logits.view(3, 4, 4)[:, level, level] = logits
    torch.testing.assert_close(medium(z, x), coarse(z, x), rtol=1e-6, atol=0)
    torch.testing.assert_close(fine(z, x), coarse(z, x), rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("resolution", ["coarse", "medium", "fine"])
@pytest.mark.parametrize("normalize", [True, False])
def test_local_with_a_dead_last_layer_is_global(resolution: str, normalize: bool) -> None:
    z, x = draw(0, 6, 3, 4), draw(1, 6, 2)
    local, fixed = network(resolution, 2, normalize=normalize), network(resolution, normalize=normalize)
    assert not torch.equal(local(z, x), local(z, x + 1))
    fixed.logits.copy_(draw(3, *fixed.shape))
    local.network[-1].weight.zero_()
    local.network[-1].bias.copy_(fixed.logits.flatten())
    torch.testing.assert_close(local(z, x), fixed(z, x), rtol=1e-6, atol=0)
    torch.testing.assert_close(local(z, x), local(z, x + 1))


@torch.no_grad()
@pytest.mark.parametrize("resolution", ["coarse", "medium", "fine"])
def test_absent_models_hand_their_weight_to_the_others(resolution: str) -> None:
    z, x = draw(0, 6, 3, 4), draw(1, 6, 2)
    present = torch.ones(6, 3, 4, dtype=torch.bool)
    present[2, 1] = False
    net, two = network(resolution), network(resolution, p=2)
    net.logits.copy_(draw(3, *net.shape))
    keep = net.logits.view(3, -1, net.shape[1])[[0, 2]]
    two.logits.copy_(keep.reshape(two.shape))
    q = net(z, x, present)
    torch.testing.assert_close(q[2], two(z[:, [0, 2]], x)[2])
    torch.testing.assert_close(q[:2], net(z, x)[:2])


def test_averaging_quantiles_keeps_a_normal_law_normal_and_narrower_than_the_mixture() -> None:
    mean, spread, w = np.array([-1.0, 0.5, 2.0]), np.array([1.0, 0.4, 2.0]), torch.tensor([0.2, 0.5, 0.3]).double()
    levels = np.arange(1, 100) / 100
    z = torch.as_tensor(mean[:, None] + spread[:, None] * norm.ppf(levels))[None]
    net = network("coarse", m=99)
    with torch.no_grad():
        net.logits.copy_(w.log()[:, None])
        q = net(z, torch.zeros(1, 0).double()).numpy()[0]
    center, scale = float(w @ torch.tensor(mean)), float(w @ torch.tensor(spread))
    np.testing.assert_allclose(q, norm.ppf(levels, center, scale), atol=1e-12)
    at = np.linspace(-12, 14, 20_001)
    mixture = np.interp(levels, w.numpy() @ norm.cdf(at, mean[:, None], spread[:, None]), at)
    assert q[-10] - q[9] < mixture[-10] - mixture[9]
    mixture_variance = float(w @ torch.tensor(spread**2 + mean**2)) - center**2
    assert scale**2 < mixture_variance


# --- conformal -------------------------------------------------------------------------------------


def test_split_cqr_covers_whatever_the_model() -> None:
    n, repeats, alpha = 19, 2000, 0.2
    rng = np.random.default_rng(0)
    noise = rng.exponential(size=(repeats, n + 1))
    x = rng.normal(size=(repeats, n + 1))
    for ends in ((lambda x: 0 * x, lambda x: 0 * x), (lambda x: np.sin(x) - 9, lambda x: x**2 + 9)):
        hits = 0
        for inputs, y in zip(x, noise, strict=True):
            q = np.stack([ends[0](inputs), ends[1](inputs)], 1)
            found = cqr(conformity_scores(y[:n], q[:n]), q[n:], np.array([alpha / 2, 1 - alpha / 2]))
            hits += bool(found[0, 0] <= y[n] <= found[0, 1])
        error = 3 * np.sqrt(alpha * (1 - alpha) / repeats)
        assert 1 - alpha - error <= hits / repeats <= 1 - alpha + 1 / (n + 1) + error


def test_ranks_of_split_cqr_by_hand() -> None:
    y, q = np.arange(9.0), np.tile([0.0, 4.0, 4.0], (9, 1))
    scores = conformity_scores(y, q)  # how far above 4 or below 0
    assert scores[:, 0].tolist() == [0, -1, -2, -1, 0, 1, 2, 3, 4]
    narrow = cqr(scores, q[:1], np.array([0.4, 0.5, 0.6]))  # alpha 0.8: the second smallest score of nine
    assert narrow.tolist() == [[1.0, 4.0, 3.0]]  # it narrows the interval past the median, which stays
    assert cqr(scores, q[:1], np.array([0.05, 0.5, 0.95])).tolist() == [[-4.0, 4.0, 8.0]]  # the largest of nine
    with pytest.raises(ValueError, match="which takes 9"):
        cqr(scores[:8], q[:1], np.array([0.05, 0.5, 0.95]))


def test_cv_plus_by_hand_and_with_one_model_for_all_folds() -> None:
    rng = np.random.default_rng(0)
    scores, fold, levels = rng.normal(size=(23, 1)), np.arange(23) % 3, np.array([0.1, 0.5, 0.9])
    q, q_folds = rng.normal(size=(4, 3)), rng.normal(size=(3, 4, 3))
    found = cv_plus(scores, fold, q, q_folds, levels)
    low = np.sort(q_folds[fold, :, 0] - scores, axis=0)
    high = np.sort(q_folds[fold, :, 2] + scores, axis=0)
    np.testing.assert_array_equal(found[:, 0], low[int(np.floor(0.2 * 24)) - 1])
    np.testing.assert_array_equal(found[:, 2], high[int(np.ceil(0.8 * 24)) - 1])
    np.testing.assert_array_equal(found[:, 1], q[:, 1])
    same = cv_plus(scores, fold, q, np.repeat(q[None], 3, 0), levels)
    np.testing.assert_allclose(same, cqr(scores, q, levels))


# --- networks and base models ----------------------------------------------------------------------


def simulation(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """y = sin 2x + (0.2 + |x|) noise, and a column that says nothing."""
    rng = np.random.default_rng(seed)
    X = rng.uniform(-1, 1, size=(n, 2))
    return X, np.sin(2 * X[:, 0]) + (0.2 + abs(X[:, 0])) * rng.normal(size=n)


@pytest.mark.parametrize("kind", ["joint", "single", "gaussian"])
def test_networks_learn_the_conditional_quantiles(kind: str) -> None:
    X, y = simulation(0, 1500)
    at = np.stack([np.linspace(-0.9, 0.9, 19), np.zeros(19)], 1)
    levels = np.array([0.1, 0.5, 0.9])
    truth = np.sin(2 * at[:, :1]) + (0.2 + abs(at[:, :1])) * norm.ppf(levels)
    model = QuantileNetwork(kind, levels=levels, layers=2, hidden=32, lr=5e-3, max_steps=800, random_state=0)
    found = model.fit(X, y).predict(at)
    assert np.abs(found - truth).mean() < 0.25
    assert np.abs(truth - np.quantile(y, levels)).mean() > 0.5  # what knowing nothing of x would cost
    assert 0 < model.steps_ <= 800
    np.testing.assert_array_equal(clone(model).fit(X, y).predict(at), found)


def test_a_network_trains_as_long_as_it_is_told_and_passes_scikit_learns_checks() -> None:
    X, y = simulation(0, 60)
    short, same = (QuantileNetwork(steps=s, max_steps=m, random_state=0).fit(X, y) for s, m in ((7, 99), (7, 12)))
    assert short.steps_ == 7
    np.testing.assert_array_equal(short.predict(X), same.predict(X))
    check_estimator(QuantileNetwork(steps=3, hidden=4, levels=[0.5]), on_skip=None)
    with pytest.raises(ValueError, match="kind 'deep'"):
        QuantileNetwork("deep").fit(X, y)


def test_every_kind_of_quantile_regressor_is_understood() -> None:
    lightgbm, forests = pytest.importorskip("lightgbm"), pytest.importorskip("quantile_forest")
    X, y = simulation(0, 300)
    models = [
        QuantileRegressor(alpha=0.0),
        HistGradientBoostingRegressor(loss="quantile", max_iter=20),
        GradientBoostingRegressor(loss="quantile", n_estimators=20),
        lightgbm.LGBMRegressor(objective="quantile", n_estimators=20, verbosity=-1, n_jobs=1),
        forests.RandomForestQuantileRegressor(n_estimators=10, min_samples_leaf=8, random_state=0),
        forests.ExtraTreesQuantileRegressor(n_estimators=10, min_samples_leaf=8, random_state=0),
        QuantileNetwork("single", steps=300, random_state=0),
    ]
    for model in models:
        q = as_quantile_model(model, np.array([0.1, 0.5, 0.9])).fit(X, y).predict(X)
        assert q.shape == (300, 3)
        shares = (y[:, None] <= q).mean(0)
        np.testing.assert_allclose(shares, [0.1, 0.5, 0.9], atol=0.12, err_msg=type(model).__name__)
    assert as_quantile_model(models[4], [0.5]).fit(X, y).predict(X).shape == (300, 1)
    for model, message in (
        (LinearRegression(), "predicts no quantiles"),
        (HistGradientBoostingRegressor(), "predicts no quantiles"),
        (lightgbm.LGBMRegressor(), "predicts no quantiles"),
        ("linear", "no scikit-learn estimator"),
    ):
        with pytest.raises(TypeError, match=message):
            as_quantile_model(model, [0.5])


def test_the_papers_six_need_the_extra_and_the_default_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightgbm"), pytest.importorskip("quantile_forest")
    X, y = simulation(0, 80)
    for name, model, grid in paper_models() + default_models():
        quick = model.set_params(**({"steps": 5} if "network" in name else {}))
        first = {key: values[0] for key, values in grid.items()}
        assert as_quantile_model(quick.set_params(**first), [0.2, 0.8]).fit(X, y).predict(X).shape == (80, 2)
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(MissingExtra, match=r"lightgbm is not installed; pip install 'neuropil\[quantile\]'"):
        paper_models()
    monkeypatch.setitem(sys.modules, "quantile_forest", None)
    assert len(default_models()) == 5


# --- the whole -------------------------------------------------------------------------------------


def regimes(seed: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two forecasters of N(0, 1): each is right on one side of x = 0 and six off on the other.

    Six, so that no global weights can mend it: half of each is 3 too high, and fine weights, which may draw on the
    lowest level alone, bring that down by 1.64 only.
    """
    rng = np.random.default_rng(seed)
    X, y = rng.uniform(-1, 1, size=(n, 1)), rng.normal(size=n)
    right = norm.ppf(LEVELS)[None, None]
    wrong = 6.0 * np.stack([X[:, 0] > 0, X[:, 0] <= 0], 1)
    return right + wrong[:, :, None], X, y


@pytest.mark.parametrize(("weights", "local"), list(product(["coarse", "medium", "fine"], [False, True])))
def test_local_weights_find_regimes_that_global_ones_cannot(weights: str, local: bool) -> None:
    made = QuantileAggregator(
        levels=LEVELS, weights=weights, local=local, search=0, lr=0.01, max_steps=600, random_state=0
    )
    made.fit_from_predictions(*regimes(0, 1200))
    forecasts, X, y = regimes(1, 1000)
    loss = pinball(y, made.predict_from_predictions(forecasts, X), LEVELS).mean()
    ideal = pinball(y, norm.ppf(LEVELS)[None].repeat(1000, 0), LEVELS).mean()
    average = pinball(y, forecasts.mean(1), LEVELS).mean()
    assert (loss < 1.1 * ideal) if local else (loss > 1.3 * ideal)
    assert loss < (0.7 if local else 1.02) * average
    shapes = {"coarse": (2,), "medium": (2, 19), "fine": (2, 19, 19)}
    shown = made.weights_(X if local else None)
    assert shown.shape == ((1000 if local else 1), *shapes[weights])
    np.testing.assert_allclose(shown.sum((1, 2) if weights == "fine" else 1), 1.0)


def exact_medium(forecasts: np.ndarray, y: np.ndarray, tau: float) -> float:
    """The least mean pinball loss of any convex combination of `forecasts` `[n, p]`, by linear programming."""
    n, p = forecasts.shape
    cost = np.r_[np.zeros(p), np.full(n, tau / n), np.full(n, (1 - tau) / n)]
    match = np.c_[forecasts, np.eye(n), -np.eye(n)]
    simplex = np.r_[np.ones(p), np.zeros(2 * n)]
    return linprog(cost, A_eq=np.r_[match, simplex[None]], b_eq=np.r_[y, 1.0]).fun


def test_global_medium_weights_reach_the_exact_optimum() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=300)
    forecasts = norm.ppf(LEVELS) * np.array([0.3, 1.4, 1.0])[:, None] + np.array([0.5, 0.3, -2.0])[:, None]
    forecasts = forecasts[None] + 0.3 * rng.normal(size=(300, 3, 1))
    settings = {"weights": "medium", "local": False, "isotonic": None, "crossing_penalty": 0.0, "search": 0}
    made = QuantileAggregator(levels=LEVELS, lr=0.02, max_steps=3000, random_state=0, **settings)
    part = learning.Part(forecasts, np.zeros((300, 0)), y)
    given = learning.Settings(**{f: getattr(made, f) for f in learning.Settings.__dataclass_fields__})
    reached = learning.learn(given, part, part, LEVELS, seed=0).loss
    best = np.mean([exact_medium(forecasts[:, :, j], y, tau) for j, tau in enumerate(LEVELS)])
    assert best - 1e-6 <= reached <= 1.003 * best


@pytest.mark.parametrize("margin", [0.05, "adaptive", "levels"])
def test_the_penalty_keeps_quantiles_apart_before_any_sorting(margin: float | str) -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=600)
    X = rng.normal(size=(600, 1))
    # Forecasts whose levels are scrambled, so that free weights cross.
    forecasts = norm.ppf(LEVELS)[None, None] + 1.0 * rng.normal(size=(1, 6, 19)) + 0.3 * rng.normal(size=(600, 6, 19))
    found = {}
    for penalty in (0.0, 10.0):
        made = QuantileAggregator(
            levels=LEVELS, weights="medium", local=False, isotonic=None, crossing_penalty=penalty, margin=margin,
            margin_scale=0.01, search=0, lr=0.02, max_steps=500, random_state=0,
        )  # fmt: skip
        q = made.fit_from_predictions(forecasts, X, y).predict_from_predictions(forecasts, X)
        found[penalty] = float(np.maximum(-np.diff(q, axis=1), 0).mean())
    assert found[0.0] > 0
    assert found[10.0] < 0.7 * found[0.0]


def test_adaptive_margins_are_gaps_between_quantiles_of_residuals() -> None:
    made = QuantileAggregator(levels=LEVELS, margin="adaptive", margin_scale=0.1)
    given = learning.Settings(**{f: getattr(made, f) for f in learning.Settings.__dataclass_fields__})
    forecasts, X, y = regimes(0, 400)
    residuals = y - np.median(forecasts[:, :, 9], axis=1)
    delta = learning.margin_matrix(given, learning.Part(forecasts, X, y), LEVELS)
    assert isinstance(delta, torch.Tensor)
    np.testing.assert_allclose(delta[18, 0], 0.1 * (np.quantile(residuals, 0.95) - np.quantile(residuals, 0.05)), 1e-5)
    assert delta.triu().sum() == 0


@pytest.mark.parametrize("isotonic", ["sort", "pava", "sweep", "soft-sort"])
@pytest.mark.parametrize("training", [False, True])
def test_predictions_are_ordered_by_every_operator(isotonic: str, training: bool) -> None:
    made, X, y = specimen()
    made.set_params(isotonic=isotonic, isotonic_training=training, levels=LEVELS, normalize=False)
    q = made.fit(X, y).predict(X)
    assert q.shape == (120, 19)
    assert crossing_rate(q) == 0
    loose = clone(made).set_params(isotonic=None, isotonic_training=False).fit(X, y).predict(X)
    assert crossing_rate(loose) > 0


@pytest.mark.parametrize("conformal", ["cqr", "cv+"])
def test_calibration_mends_a_base_model_that_is_far_too_sure(conformal: str) -> None:
    rng = np.random.default_rng(0)
    y, X = rng.normal(size=1500), rng.normal(size=(1500, 1))
    narrow = np.repeat(0.2 * norm.ppf(LEVELS)[None, None], 1500, 0).repeat(2, 1)
    settings = {"levels": LEVELS, "weights": "coarse", "search": 0, "max_steps": 50, "random_state": 0}
    errors = {}
    for how in (None, conformal):
        made = QuantileAggregator(conformal=how, **settings)
        made.fit_from_predictions(narrow[:1000], X[:1000], y[:1000])
        q = made.predict_from_predictions(narrow[1000:], X[1000:])
        errors[how] = coverage_error(y[1000:], q, LEVELS)
        assert crossing_rate(q) == 0
    assert errors[None] > 0.3
    assert errors[conformal] < 0.05


def test_cv_plus_scores_each_fold_by_models_that_never_saw_it() -> None:
    """A base model that repeats what it was shown would give scores of 0 on rows it has seen."""

    class Memory(QuantileRegressor):
        def fit(self, X: np.ndarray, y: np.ndarray) -> "Memory":
            self.seen = {tuple(row): value for row, value in zip(X, y, strict=True)}
            return self

        def predict(self, X: np.ndarray) -> np.ndarray:
            return np.array([self.seen.get(tuple(row), 50.0) for row in X])

    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 1)), rng.normal(size=60)
    made = QuantileAggregator([Memory()], levels=[0.2, 0.5, 0.8], conformal="cv+", random_state=0, **SMALL).fit(X, y)
    assert (made._conformity > 40).all()
    assert set(made._members.fitted) == {(), (0,), (1,)}


def test_intervals_are_columns_of_the_quantiles() -> None:
    made, X, y = specimen()
    made.fit(X, y)
    np.testing.assert_array_equal(made.predict_interval(X, 0.2), made.predict(X)[:, [0, 2]])
    assert made.score(X, y) == -pinball(y, made.predict(X), made.levels_).mean()
    with pytest.raises(ValueError, match=r"possible are \[0.2\]"):
        made.predict_interval(X, 0.1)


def test_units_of_the_target_do_not_matter() -> None:
    made, X, y = specimen()
    q = made.fit(X, y).predict(X)
    np.testing.assert_allclose(clone(made).fit(X, 1000 * y - 7).predict(X), 1000 * q - 7, rtol=1e-4)


def test_missing_forecasts_are_shared_out_and_lonely_levels_refused() -> None:
    forecasts, X, y = regimes(0, 200)
    holes = forecasts.copy()
    holes[::3, 0] = np.nan
    made = QuantileAggregator(levels=LEVELS, random_state=0, **SMALL).fit_from_predictions(holes, X, y)
    q = made.predict_from_predictions(holes, X)
    assert np.isfinite(q).all()
    flat = forecasts.copy()
    flat[:, 0] = 1e6  # what stands in a hole must not matter
    flat[::3, 0] = np.nan
    flat[1::3, 0], flat[2::3, 0] = holes[1::3, 0], holes[2::3, 0]
    np.testing.assert_array_equal(made.predict_from_predictions(flat, X), q)
    holes[5, :, 3] = np.nan
    with pytest.raises(ValueError, match="row 5 has a level that no model forecasts"):
        QuantileAggregator(levels=LEVELS, weights="medium", **SMALL).fit_from_predictions(holes, X, y)
    with pytest.raises(ValueError, match="only normalised weights"):
        QuantileAggregator(levels=LEVELS, normalize=False, **SMALL).fit_from_predictions(holes, X, y)


def test_the_search_tunes_base_models_and_weights() -> None:
    X, y = simulation(0, 200)
    grid = {"max_depth": [1, 2], "learning_rate": [1e-9, 0.3]}
    trees = GradientBoostingRegressor(loss="quantile", n_estimators=10)
    made = QuantileAggregator(
        [("trees", trees, grid)], **{**SMALL, "search": 4}, levels=[0.2, 0.5, 0.8], random_state=0
    )
    made.fit(X, y)
    assert made._members.params[0]["learning_rate"] == 0.3
    assert made.settings_.hidden in (64, 128)
    assert made.settings_.margin in (1e-4, 1e-3, 5e-3, 7.5e-3, 9.9e-3)
    assert made.model_names_ == ["trees"]


def test_networks_refit_for_as_many_steps_as_were_found() -> None:
    X, y = simulation(0, 100)
    made = QuantileAggregator([("net", QuantileNetwork(max_steps=200))], **SMALL, levels=[0.5], random_state=0)
    made.fit(X, y)
    assert made._members.params[0]["steps"] == made._members.fitted[()][0].steps_


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": [0.5, 0.1]}, "increasing order"),
        ({"levels": [0.5, 0.5]}, "increasing order"),
        ({"levels": [0.0, 0.5]}, "between 0 and 1"),
        ({"levels": [0.1, 0.5], "conformal": "cqr"}, "not symmetric"),
        ({"weights": "rough"}, "'coarse', 'medium', 'fine'"),
        ({"isotonic": "pool"}, "isotonic 'pool'"),
        ({"isotonic": None, "isotonic_training": True}, "name the operator"),
        ({"conformal": "split"}, "'cqr' or 'cv\\+'"),
        ({"margin": "wide"}, "'adaptive' or 'levels'"),
        ({"crossing_penalty": -1.0}, "negative"),
        ({"n_folds": 200}, "200 folds"),
        ({"n_folds": 1}, "at least 2"),
        ({"levels": [0.001, 0.999], "conformal": "cqr"}, "cannot calibrate"),
        ({"base_models": []}, "base_models is empty"),
        ({"base_models": [("a", QuantileRegressor(), {}, 1)]}, "give a regressor"),
    ],
)
def test_bad_settings_are_refused(change: dict, message: str) -> None:
    made, X, y = specimen()
    with pytest.raises(ValueError, match=message):
        made.set_params(**change).fit(X, y)


def test_bad_forecasts_are_refused() -> None:
    forecasts, X, y = regimes(0, 100)
    made = QuantileAggregator(levels=LEVELS, random_state=0, **SMALL)
    for bad, inputs, message in (
        (forecasts[:, :, :5], X, r"expected \[n=100, p, m=19\]"),
        (forecasts[:, 0], X, "expected"),
        (forecasts[:50], X, "n=100"),
        (forecasts, None, "local weights need X"),
        (forecasts, X[:50], "X has 50 rows"),
        (forecasts + np.inf, X, "infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            made.fit_from_predictions(bad, inputs, y)
    made.fit_from_predictions(forecasts, X, y)
    with pytest.raises(ValueError, match="p=2"):
        made.predict_from_predictions(forecasts[:, :1], X)
    with pytest.raises(ValueError, match="predict_from_predictions"):
        made.predict(X)
    with pytest.raises(ValueError, match="give the rows X"):
        made.weights_()
    free = QuantileAggregator(levels=LEVELS, local=False, **SMALL).fit_from_predictions(forecasts, None, y)
    assert free.predict_from_predictions(forecasts).shape == (100, 19)


def test_a_base_model_that_predicts_nonsense_is_named() -> None:
    class Broken(QuantileRegressor):
        def predict(self, X: np.ndarray) -> np.ndarray:
            return np.full(len(X), np.nan)

    made, X, y = specimen()
    with pytest.raises(ValueError, match="base model 'odd' gave predictions"):
        made.set_params(base_models=[("odd", Broken(alpha=0.0))]).fit(X, y)
