"""The annealing law: areas in closed form, planted coefficients, the authors' own points, and what is refused."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import check_grad
from scipy.signal import lfilter

from neuropil.errors import Extrapolation
from neuropil.measure import lr_schedules as lr
from neuropil.measure import power_law
from neuropil.measure._annealing_law_peer import MultiPowerLaw, _value
from neuropil.measure.annealing_law import AnnealingLaw, Curve, areas, best_schedule, choose_lambda, read_curve
from neuropil.measure.loss_curves import CurveError, warmup_length
from neuropil.measure.power_law import ChinchillaLaw
from neuropil.reproduce.lr_annealing_law import PAPER_STEPS, paper_curve

TRUTH = {"L0": 2.6, "A": 0.43, "alpha": 0.55, "C": 0.41}
SHAPE: dict[str, Any] = {"total_steps": 20_000, "max_lr": 2e-4, "warmup_steps": 500}
COSINE, CONSTANT = lr.cosine(**SHAPE), lr.constant(**SHAPE)


def planted(
    schedule: np.ndarray, steps: Any = PAPER_STEPS, noise: float = 0.0, seed: int = 0, **settings: Any
) -> Curve:
    """A curve that follows the law exactly, or up to relative noise."""
    S1, S2 = areas(schedule, **settings)[steps].T
    losses = TRUTH["L0"] + TRUTH["A"] * S1 ** -TRUTH["alpha"] - TRUTH["C"] * S2
    return Curve(steps, losses * np.exp(noise * np.random.default_rng(seed).standard_normal(len(losses))), schedule)


def specimen(seed: int = 0) -> tuple[AnnealingLaw, np.ndarray, np.ndarray]:
    """A law, with areas and slightly noisy losses of a cosine and a constant run."""
    law = AnnealingLaw(n_bootstrap=20)
    X, y = law.points([planted(rates, noise=1e-3, seed=seed + i) for i, rates in enumerate((COSINE, CONSTANT))])
    return law, X, y


def outside(X: np.ndarray) -> np.ndarray:
    """Runs five times as long as the longest fitted."""
    return X * [5.0, 1.0]


@pytest.fixture(scope="module")
def authors() -> AnnealingLaw:
    return AnnealingLaw(n_bootstrap=0).fit_curves([paper_curve("cosine"), paper_curve("constant")])


# ----------------------------------------------------------------------------------------------- areas


def test_a_constant_rate_has_no_annealing_and_its_area_is_rate_times_steps() -> None:
    found = areas(np.full(501, 3e-4))
    assert not found[:, 1].any()
    np.testing.assert_allclose(found[:, 0], 3e-4 * np.arange(1, 502), rtol=1e-12)
    warm = areas(CONSTANT)
    np.testing.assert_allclose(warm[:, 0], 2e-4 * np.arange(1, 20_002), rtol=1e-12)
    assert not warm[:, 1].any()


def test_the_ends_of_lambda_telescope() -> None:
    rates = np.random.default_rng(0).uniform(0.1, 1.0, 300)
    rates[0] = 1.0  # no leading rise, so no warm-up
    none, all_ = areas(rates, 0.0), areas(rates, 1.0)
    np.testing.assert_allclose(none[:, 1], rates[0] - rates, atol=1e-12)
    np.testing.assert_allclose(all_[:, 1], np.arange(1, 301) * rates[0] - all_[:, 0], rtol=1e-9, atol=1e-9)


def test_the_recursion_is_the_double_sum_and_the_filter() -> None:
    rates = np.random.default_rng(1).uniform(0.1, 1.0, 2000)
    rates[0] = 1.0
    drops = np.concatenate([[0.0], rates[:-1] - rates[1:]])
    lags = np.arange(2000)[:, None] - np.arange(2000)
    momentum = np.where(lags >= 0, 0.99 ** np.maximum(lags, 0), 0.0) @ drops
    found = areas(rates, 0.99)[:, 1]
    np.testing.assert_allclose(found, np.cumsum(momentum), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found, np.cumsum(lfilter([1], [1, -0.99], drops)), rtol=1e-10, atol=1e-12)


def test_one_drop_pays_off_in_closed_form() -> None:
    rates = np.full(3001, 1e-3)
    rates[700:] = 4e-4
    s = np.arange(3001)
    expected = np.where(s >= 700, 6e-4 * (1 - 0.999 ** (s - 700 + 1.0)) / 0.001, 0.0)
    np.testing.assert_allclose(areas(rates)[:, 1], expected, rtol=1e-9, atol=1e-15)


def test_areas_are_linear_in_the_rates() -> None:
    one, two = lr.cosine(400, 1e-3), lr.wsd(400, 5e-4)
    np.testing.assert_allclose(areas(7 * one), 7 * areas(one), rtol=1e-10)
    np.testing.assert_allclose(areas(one + two), areas(one) + areas(two), rtol=1e-9)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "multistep"])
def test_a_schedule_that_never_rises_only_gains(name: str) -> None:
    assert (np.diff(areas(lr.parse(name, **SHAPE))[:, 1]) >= 0).all()


def test_a_rise_takes_back_what_a_drop_gave() -> None:
    S2 = areas(lr.rewarmup(20_000, 2e-4, rise=0.1))[:, 1]
    assert S2[10_000] > S2[12_000] > 0
    assert areas([1.0, 1.0, 2.0], 0.5)[-1, 1] == -1.0


def test_the_authors_areas() -> None:
    np.testing.assert_allclose(areas(COSINE)[-1], [2.0501, 0.19747], atol=1e-5)
    np.testing.assert_allclose(areas(CONSTANT)[-1], [4.0002, 0.0], atol=1e-5)


def test_the_warm_up_counts_as_at_its_top_or_as_it_was() -> None:
    assert warmup_length(COSINE) == 500
    whole, actual = areas(COSINE), areas(COSINE, warmup="actual")
    np.testing.assert_array_equal(whole[:, 1], actual[:, 1])  # never annealing
    np.testing.assert_allclose(actual[:, 0], np.cumsum(COSINE), rtol=1e-12)
    # The warm-up's mean is half the top: 500 of its steps, from 0 to just below the top, are worth 249.5.
    np.testing.assert_allclose((whole - actual)[500:, 0], 2e-4 * 250.5, rtol=1e-9)
    late = np.concatenate([np.zeros(3), COSINE])  # steps at rate 0 before it belong to it
    assert warmup_length(late) == 503
    assert areas(late)[-1, 1] == pytest.approx(areas(COSINE)[-1, 1], rel=1e-12)


def test_areas_refuse_what_is_no_convention() -> None:
    with pytest.raises(ValueError, match=r"lambda_ is 1\.5"):
        areas(COSINE, 1.5)
    with pytest.raises(ValueError, match="warmup is 'half'"):
        areas(COSINE, warmup="half")


# ------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("name", sorted(lr.SCHEDULES))
def test_every_schedule_warms_up_and_stays_between_its_rates(name: str) -> None:
    rates = lr.parse(name, total_steps=1000, max_lr=0.5, warmup_steps=100, min_lr=0.05)
    assert rates.shape == (1001,)
    np.testing.assert_allclose(rates[:101], 0.5 * np.arange(101) / 100)
    assert rates[100:].max() == 0.5
    assert rates[100:].min() >= 0.05 - 1e-12
    assert rates[-1] == pytest.approx(0.5 if name == "constant" else 0.05)


def test_the_shapes_of_schedules() -> None:
    assert lr.multistep(100, 1.0, at=(0.5,), factor=0.1)[[49, 50, 100]] == pytest.approx([1, 0.1, 0.1])
    assert lr.cyclic(100, 1.0, cycles=2.0)[[0, 25, 50, 75, 100]] == pytest.approx([1, 0, 1, 0, 1])
    assert lr.wsd(100, 1.0, 0.01, shape="exponential")[[80, 90, 100]] == pytest.approx([1, 0.1, 0.01])
    assert lr.wsd(100, 1.0, shape="1-sqrt")[[80, 85, 100]] == pytest.approx([1, 0.5, 0])
    assert lr.rewarmup(100, 1.0, at=0.5, rise=0.1)[[0, 25, 50, 55, 60, 80, 100]] == pytest.approx(
        [1, 0.5, 0, 0.5, 1, 0.5, 0]
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: lr.cosine(100, 1.0, warmup_steps=100), "100 warm-up steps of 100"),
        (lambda: lr.cosine(100, 0.1, min_lr=0.2), "rates from 0.1 to 0.2"),
        (lambda: lr.wsd(100, 1.0, shape="exponential"), "never reaches"),
        (lambda: lr.wsd(100, 1.0, shape="round"), "'round'"),
        (lambda: lr.wsd(100, 1.0, decay=1.2), "decay is 1.2"),
        (lambda: lr.wsd(100, 1.0, warmup_steps=50, decay=0.6), "overlap"),
        (lambda: lr.cyclic(100, 1.0, cycles=0.0), "cycles is 0.0"),
        (lambda: lr.rewarmup(100, 1.0, at=0.9, rise=0.2), "follow one another"),
        (lambda: lr.parse("wavy", total_steps=5, max_lr=1.0), "expected one of constant"),
        (lambda: lr.parse("wsd:dekay=0.1", total_steps=5, max_lr=1.0), "no option 'dekay'"),
        (lambda: lr.parse("wsd:decay=much", total_steps=5, max_lr=1.0), "expected a number"),
        (lambda: lr.parse("wsd", max_lr=1.0), "lacks total_steps"),
        (lambda: lr.rates([1.0, float("nan")]), "at step 1 is nan"),
        (lambda: lr.rates([1.0, -0.1]), "at step 1 is -0.1"),
        (lambda: lr.rates([[1.0, 2.0]]), "one-dimensional"),
        (lambda: lr.rates([1.0, 0.5], 5), "need 6"),
        (lambda: lr.rates(lambda step: 1.0), "give total_steps"),
    ],
)
def test_schedules_that_make_no_sense(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_text_gives_the_same_schedule_as_the_call() -> None:
    text = lr.parse("multistep:at=0.5+0.8,factor=0.3,total_steps=1e3", max_lr=1.0)
    np.testing.assert_array_equal(text, lr.multistep(1000, 1.0, at=(0.5, 0.8), factor=0.3))


@pytest.mark.parametrize("kind", ["cosine", "sequential", "onecycle"])
def test_a_torch_scheduler_is_read_and_put_back(kind: str) -> None:
    def made() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-3)
        schedulers = torch.optim.lr_scheduler
        if kind == "cosine":
            return optimizer, schedulers.CosineAnnealingLR(optimizer, 50)
        if kind == "onecycle":
            return optimizer, schedulers.OneCycleLR(optimizer, 1e-2, total_steps=60)
        parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=10), schedulers.CosineAnnealingLR(optimizer, 40)]
        return optimizer, schedulers.SequentialLR(optimizer, parts, [10])

    optimizer, scheduler = made()
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    found = lr.rates(scheduler, 40)
    other, other_scheduler = made()
    for _ in range(3):
        other.step()
        other_scheduler.step()
    for step in range(41):  # what training would do, after the dry run and without one
        assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] == found[step]
        for each, schedule in ((optimizer, scheduler), (other, other_scheduler)):
            each.step()
            schedule.step()


def test_losses_under_a_torch_scheduler_or_a_function_are_predicted(authors: AnnealingLaw, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=2e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3000)
    steps = [2000, 3000]
    expected = authors.predict_curve(lr.cosine(3000, 2e-4), steps)
    np.testing.assert_allclose(authors.predict_curve(scheduler, steps), expected, rtol=1e-9)
    cosine = lambda step: 1e-4 * (1 + np.cos(np.pi * step / 3000))  # noqa: E731
    np.testing.assert_allclose(authors.predict_curve(cosine, steps), expected, rtol=1e-9)
    path = tmp_path / "run.csv"
    path.write_text("step,loss\n2000,3.0\n3000,2.9\n")
    np.testing.assert_allclose(read_curve(path, scheduler).schedule, lr.cosine(3000, 2e-4), atol=1e-15)


def test_a_scheduler_that_looks_at_the_loss_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(TypeError, match="depend on the losses"):
        lr.rates(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), 10)
    np.testing.assert_allclose(lr.rates(lambda step: 1 / (1 + step), 2), [1, 1 / 2, 1 / 3])


# ----------------------------------------------------------------------------------------------- fitting


def test_the_authors_fit_of_their_own_points(authors: AnnealingLaw) -> None:
    curves = [paper_curve("cosine"), paper_curve("constant")]
    found = [round(authors.coefficients_[name], 3) for name in ("L0", "A", "alpha", "C")]
    assert found == pytest.approx([2.628, 0.430, 0.550, 0.411], abs=1e-3)
    assert authors.objective_ == pytest.approx(1.6292e-5, rel=1e-4)
    assert authors.score(*authors.points(curves)) > 0.9996
    errors = [np.abs(authors.predict_curve(c.schedule, c.steps) / c.losses - 1).mean() for c in curves]
    assert np.mean(errors) == pytest.approx(7e-4, abs=1e-4)
    assert str(authors) == "L = 2.628 + 0.4297 S1^-0.5498 - 0.4108 S2"


def test_the_authors_constant_run_from_their_cosine_run() -> None:
    law = AnnealingLaw(n_bootstrap=0).fit_curves([paper_curve("cosine")])
    X, y = law.points([paper_curve("constant")])
    assert np.abs(law.predict(X) / y - 1).mean() == pytest.approx(0.0032, abs=1e-4)
    train, losses = law.points([paper_curve("cosine")])
    bare = ChinchillaLaw(n_bootstrap=0).fit(train[:, :1], losses)
    assert np.abs(bare.predict(X[:, :1]) / y - 1).mean() == pytest.approx(0.022, abs=1e-3)


def test_planted_coefficients_are_found_and_unseen_schedules_predicted() -> None:
    law = AnnealingLaw(n_bootstrap=0).fit_curves([planted(COSINE), planted(CONSTANT)])
    assert law.coefficients_ == pytest.approx(TRUTH, rel=1e-3)
    for name in ("linear", "wsd", "multistep"):
        unseen = planted(lr.parse(name, **SHAPE))
        np.testing.assert_allclose(law.predict_curve(unseen.schedule, unseen.steps), unseen.losses, rtol=1e-5)


@pytest.mark.parametrize(("rate", "loss"), [(500.0, 1.0), (1.0, 1e-3), (1e-3, 50.0)])
def test_the_units_of_rates_and_losses_do_not_matter(rate: float, loss: float, authors: AnnealingLaw) -> None:
    """L is the same under eta -> a eta, A -> a^alpha A, C -> C / a; and follows the losses' unit."""
    curves = [
        Curve(c.steps, loss * c.losses, rate * c.schedule) for c in (paper_curve("cosine"), paper_curve("constant"))
    ]
    law = AnnealingLaw(n_bootstrap=0).fit_curves(curves)
    c = authors.coefficients_
    expected = {"L0": loss * c["L0"], "A": loss * c["A"] * rate ** c["alpha"], "alpha": c["alpha"]}
    assert law.coefficients_ == pytest.approx({**expected, "C": loss * c["C"] / rate}, rel=1e-4)


def test_the_fit_is_a_minimum_of_the_huber_loss(authors: AnnealingLaw) -> None:
    X, y = authors.points([paper_curve("cosine"), paper_curve("constant")])
    theta = authors.fit_.theta
    at = power_law.huber(np.log(y) - np.log(power_law.value(theta, X)))
    assert at == pytest.approx(authors.objective_, rel=1e-9)
    for name in range(4):
        for factor in (0.999, 1.001):
            moved = theta.copy()
            moved[name] *= factor
            assert power_law.huber(np.log(y) - np.log(power_law.value(moved, X))) > at


def test_huber_is_that_of_the_script() -> None:
    assert power_law.huber(np.array([5e-4, -2e-3])) == pytest.approx(0.5 * 25e-8 + 1e-3 * 2e-3 - 0.5e-6)


def test_derivatives_are_exact() -> None:
    X = np.array([[0.5, 0.1, 2e6], [3.0, -0.2, 4e7]])
    theta = np.array([2.6, 0.43, 0.55, 0.41, 30.0, 0.25])
    slopes = power_law.jacobian(theta, X)
    np.testing.assert_array_equal(slopes[:, 0], 1.0)
    np.testing.assert_array_equal(slopes[:, 3], -X[:, 1])
    for row in range(2):
        one = X[row : row + 1]
        off = check_grad(lambda t, x: power_law.value(t, x)[0], lambda t, x: power_law.jacobian(t, x)[0], theta, one)
        assert off < 1e-5


def test_outliers_move_the_fit_little() -> None:
    spoilt = planted(COSINE)
    spoilt.losses[[4, 11]] *= 1.1
    law = AnnealingLaw(n_bootstrap=0).fit_curves([spoilt, planted(CONSTANT)])
    assert law.coefficients_ == pytest.approx(TRUTH, rel=0.02)


def test_constant_rates_alone_do_not_tell_c() -> None:
    with pytest.warns(UserWarning, match="C cannot be told"):
        law = AnnealingLaw(n_bootstrap=5).fit_curves([planted(CONSTANT)])
    assert np.isnan(law.coefficients_["C"])
    assert not law.identified_
    assert str(law).endswith(" - C S2 (C unknown)")
    X, y = law.points([planted(CONSTANT)])
    assert not power_law.jacobian(law.fit_.theta, X)[:, 3].any()
    np.testing.assert_allclose(law.predict(X), y, rtol=1e-5)
    with pytest.raises(ValueError, match="what annealing gains is not known"):
        law.predict_curve(COSINE, [20_000])
    with pytest.raises(ValueError, match="add annealing"):
        best_schedule(law, 100, 1e-3)


def test_where_annealing_does_harm_c_stays_at_zero() -> None:
    up = planted(COSINE)
    up.losses += 2 * TRUTH["C"] * areas(COSINE)[up.steps, 1]  # as if C were -0.41
    law = AnnealingLaw(n_bootstrap=0).fit_curves([up, planted(CONSTANT)])
    assert law.coefficients_["C"] == pytest.approx(0.0, abs=1e-6)


def test_the_delay_is_chosen_by_the_fit() -> None:
    law = choose_lambda([planted(COSINE, lambda_=0.99), planted(lr.multistep(**SHAPE), lambda_=0.99)], (0.99, 0.999))
    assert law.lambda_ == 0.99
    assert law.coefficients_ == pytest.approx(TRUTH, rel=0.01)


def test_the_share_that_is_skipped_and_the_warm_up_are_left_out() -> None:
    curve = planted(COSINE, np.arange(100, 20_001, 100))
    assert AnnealingLaw().kept_steps(curve)[0] == 1000
    assert AnnealingLaw(skip=0.0).kept_steps(curve)[0] == 500
    assert len(AnnealingLaw(skip=0.5).points([curve])[1]) == 101


def test_model_sizes() -> None:
    curves = []
    for size in (25e6, 100e6, 400e6, 1600e6):
        for schedule in (COSINE, CONSTANT):
            curve = planted(schedule)
            curve.losses += 40.0 * size**-0.3 - 0.3
            curve.n_params = size
            curves.append(curve)
    law = AnnealingLaw(n_bootstrap=0).fit_curves(curves[:2] + curves[4:])
    expected = {**TRUTH, "L0": 2.3, "B": 40.0, "beta": 0.3}
    assert law.coefficients_ == pytest.approx(expected, rel=0.02)
    found = law.predict_curve(COSINE, PAPER_STEPS, n_params=100e6)
    np.testing.assert_allclose(found, curves[2].losses, rtol=1e-4)
    with pytest.raises(ValueError, match="has 2 columns; the law was fitted to 3"):
        law.predict_curve(COSINE, PAPER_STEPS)
    with pytest.raises(ValueError, match="2 model sizes"):
        AnnealingLaw().fit_curves(curves[:4])
    with pytest.warns(Extrapolation):
        law.predict_curve(COSINE, [20_000], n_params=1e12)


# ----------------------------------------------------------------------------------------- uncertainty


def test_the_standard_deviation_is_that_of_repeated_experiments() -> None:
    """Of the final loss of an unseen schedule: the bootstrap's spread beside that of 40 simulated experiments."""
    law, X, _ = specimen()
    free = np.array([True] * 4 + [False] * 2)
    theta = np.array([*(TRUTH[name] for name in ("L0", "A", "alpha", "C")), 0.0, 0.0])
    end = law.points([planted(lr.wsd(**SHAPE))])[0][-1:]
    generator = np.random.default_rng(0)
    clean = np.log(power_law.value(theta, X))
    ends = []
    for _ in range(40):
        noisy = clean + 2e-3 * generator.standard_normal(len(clean))
        ends.append(power_law.value(power_law._polish(theta, X, noisy, free), end)[0])
    noise = 2e-3 * generator.standard_normal(len(clean))
    found = power_law.fit_power_law(X, np.exp(clean + noise), n_bootstrap=60)
    spread = np.std([power_law.value(sample, end)[0] for sample in found.samples])
    assert spread == pytest.approx(np.std(ends), rel=0.5)
    assert found.std(end)[0] == pytest.approx(np.hypot(spread, found.scatter * power_law.value(found.theta, end)[0]))


def test_more_noise_means_less_certainty() -> None:
    stds = []
    for noise in (1e-4, 1e-2):
        law = AnnealingLaw(n_bootstrap=30).fit_curves([planted(COSINE, noise=noise), planted(CONSTANT, noise=noise)])
        stds.append(law.predict_curve(COSINE, [20_000], return_std=True)[1][0])
    assert stds[1] > 30 * stds[0]


def test_no_bootstrap_means_no_standard_deviation(authors: AnnealingLaw) -> None:
    assert all(np.isnan(value) for value in authors.coefficients_std_.values())
    with pytest.raises(ValueError, match="n_bootstrap=0"):
        authors.predict_curve(COSINE, [20_000], return_std=True)


def test_extrapolation_is_said(authors: AnnealingLaw) -> None:
    longer = lr.constant(60_000, 2e-4, 500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        authors.predict_curve(longer, np.arange(1000, 60_001, 1000))  # the paper's own stretch, three times the steps
        authors.predict_curve(lr.wsd(**SHAPE), PAPER_STEPS)
    for schedule, step in ((lr.constant(61_000, 2e-4), 61_000), (CONSTANT, 100), (5 * COSINE, 20_000)):
        with pytest.warns(Extrapolation, match="1 of 1 places"):
            authors.predict_curve(schedule, [step])


def test_the_same_seed_gives_the_same_and_it_pickles() -> None:
    law, X, y = specimen()
    one, two = law.fit(X, y).predict(X, return_std=True), pickle.loads(pickle.dumps(law)).predict(X, return_std=True)
    np.testing.assert_array_equal(one, two)


# ------------------------------------------------------------------------------------------ Chinchilla, peer


def test_chinchilla_finds_its_coefficients() -> None:
    tokens, sizes = (grid.ravel() for grid in np.meshgrid([1e8, 1e9, 1e10, 1e11], [1e7, 1e8, 1e9]))
    losses = 1.7 + 410.0 * tokens**-0.28 + 400.0 * sizes**-0.34
    law = ChinchillaLaw(n_bootstrap=0).fit(np.stack([tokens, sizes], 1), losses)
    expected = {"L0": 1.7, "A": 410.0, "alpha": 0.28, "B": 400.0, "beta": 0.34}
    assert law.coefficients_ == pytest.approx(expected, rel=0.01)
    with pytest.warns(Extrapolation):
        law.predict(np.array([[1e12, 1e8]]))
    with pytest.raises(ValueError, match="2 points"):
        ChinchillaLaw().fit(np.array([[1.0], [2.0]]), np.array([2.0, 1.0]))
    with pytest.raises(ValueError, match="expected columns"):
        law.predict(np.ones((2, 3)))


def test_at_a_constant_rate_the_annealing_law_is_chinchillas() -> None:
    curve = planted(CONSTANT, noise=1e-3)
    with pytest.warns(UserWarning, match="C cannot"):
        law = AnnealingLaw(n_bootstrap=0).fit_curves([curve])
    bare = ChinchillaLaw(n_bootstrap=0).fit(curve.steps[:, None] + 1.0, curve.losses)
    assert bare.coefficients_["alpha"] == pytest.approx(law.coefficients_["alpha"], rel=1e-4)
    scale = 2e-4 ** -law.coefficients_["alpha"]
    assert bare.coefficients_["A"] == pytest.approx(scale * law.coefficients_["A"], rel=1e-3)


def test_the_peer_is_its_formula_and_fits_the_authors_points(authors: AnnealingLaw) -> None:
    curves = [paper_curve("cosine"), paper_curve("constant")]
    peer = MultiPowerLaw(authors, curves)
    # Three numbers more: fitted as well, it is no worse where it was fitted.
    off = [np.log(peer.predict(c.schedule, c.steps) / c.losses) for c in curves]
    assert power_law.huber(np.concatenate(off)) < authors.objective_
    peer.theta = np.log([2.0, 0.5, 0.4, 300.0, 0.7, 0.3, 0.2])
    rates = np.array([1.0, 0.8, 0.8, 0.5]) * peer.top
    area = np.cumsum(rates)
    drops = sum(
        (rates[k - 1] - rates[k]) * (1 - (1 + 0.7 * rates[k] ** -0.2 * (area[3] - area[k - 1])) ** -0.3)
        for k in range(1, 4)
    )
    expected = 2.0 + 0.5 * area[3] ** -0.4 - 300.0 * drops
    assert peer.predict(rates, np.array([3]))[0] == pytest.approx(expected, rel=1e-9)
    terms = peer._terms(rates, np.array([1, 3]))
    for row in range(2):
        off = check_grad(
            lambda theta, row: _value(theta, terms)[0][row],
            lambda theta, row: _value(theta, terms)[1][row],
            peer.theta,
            row,
        )
        assert off < 1e-4


# --------------------------------------------------------------------------------------- best schedule


@pytest.mark.parametrize("min_lr", [0.0, 2e-5])
def test_no_other_schedule_ends_lower_by_the_law(min_lr: float, authors: AnnealingLaw) -> None:
    shape = {**SHAPE, "min_lr": min_lr}
    best = best_schedule(authors, **shape)

    def end(rates: np.ndarray) -> float:
        return float(power_law.value(authors.fit_.theta, areas(rates)[-1:])[0])

    assert set(best[500:]) == {2e-4, min_lr}
    generator = np.random.default_rng(0)
    for _ in range(100):
        other = best.copy()
        other[501:] = min_lr + (2e-4 - min_lr) * np.sort(generator.beta(*generator.uniform(0.1, 3, 2), 19_500))[::-1]
        assert end(other) > end(best)
    for step in range(501, 20_001, 50):  # nor can one rate be moved with profit
        other = best.copy()
        other[step] = 1.1e-4
        assert end(other) >= end(best) - 1e-12
    for name in ("cosine", "linear", "wsd"):
        assert end(lr.parse(name, **shape)) > end(best)


def test_a_short_run_had_better_not_anneal_by_the_law(authors: AnnealingLaw) -> None:
    """Early on the forward area is worth more: the constant rate is ahead of the cosine, and is the best."""
    np.testing.assert_array_equal(best_schedule(authors, 2000, 2e-4, 0.0, 50), lr.constant(2000, 2e-4, 50))


def test_wsd_has_a_best_share_of_decay(authors: AnnealingLaw) -> None:
    """Annealing too long loses forward area, too short loses annealing area."""
    shares = np.arange(0.01, 0.96, 0.01)
    ends = [authors.predict_curve(lr.wsd(**SHAPE, decay=share), [20_000])[0] for share in shares]
    assert 0.02 < shares[int(np.argmin(ends))] < 0.5


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Curve([1, 2], [3.0], np.ones(9)), "2 steps and losses"),
        (lambda: Curve([1, 20], [3.0, 2.0], np.ones(9)), r"steps\[1\] is 20; expected a whole number from 0 to 8"),
        (lambda: Curve([1, 2.5], [3.0, 2.0], np.ones(9)), r"steps\[1\] is 2.5"),
        (lambda: Curve([1, 2], [3.0, -1.0], np.ones(9)), r"losses\[1\] is -1.0"),
        (lambda: Curve([1, 2], [float("nan"), 1.0], np.ones(9)), r"losses\[0\] is nan"),
        (lambda: AnnealingLaw().fit_curves([]), "no curves"),
        (lambda: AnnealingLaw(skip=1.0).fit_curves([planted(COSINE)]), "skip is 1.0"),
        (lambda: AnnealingLaw().fit_curves([planted(COSINE, PAPER_STEPS[:4])]), "4 points"),
        (lambda: AnnealingLaw().fit(np.ones((9, 4)), np.ones(9)), r"X has shape \(9, 4\)"),
        (lambda: AnnealingLaw().fit(np.ones((9, 2)), np.ones(8)), "9 rows and y 8"),
        (lambda: AnnealingLaw().fit(np.ones((9, 2)), np.arange(9.0)), r"y\[0\] is 0.0"),
        (lambda: AnnealingLaw().fit(np.eye(9)[:, :2], np.ones(9)), r"X\[1\] is"),
        (lambda: AnnealingLaw(lambda_=2.0).fit_curves([planted(COSINE)]), "lambda_ is 2.0"),
        (lambda: best_schedule(specimen()[0].fit(*specimen()[1:]), 100, 1e-3, 1e-3), "from 0.001 to 0.001"),
    ],
)
def test_bad_input_is_named(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_sizes_on_some_curves_only_are_refused() -> None:
    sized = planted(COSINE)
    sized.n_params = 1e6
    with pytest.raises(ValueError, match="give it for all or none"):
        AnnealingLaw().fit_curves([sized, planted(CONSTANT)])


# ------------------------------------------------------------------------------------------------- files


def test_a_curve_is_read_from_csv(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text("\ufeffStep,train/lr,Value\n5,0.5,\n10,1.0,4.0\n20,1.0,3.0\n40,0.5,2.5\n", encoding="utf-8")
    curve = read_curve(path, n_params=7.0)
    assert curve.steps.tolist() == [10, 20, 40]
    assert curve.losses.tolist() == [4.0, 3.0, 2.5]
    assert curve.schedule[[0, 1, 5, 10, 15, 30, 40]].tolist() == pytest.approx([0, 0.1, 0.5, 1, 1, 0.75, 0.5])
    assert (curve.warmup_steps, curve.n_params, curve.name) == (10, 7.0, "run.csv")
    given = read_curve(path, lr.constant(50, 2.0))
    assert given.max_lr == 2.0
    path.write_text("step,lr,loss\n10,1.0,4.0\n20,0.5,3.0\n")  # a log that begins after the warm-up
    assert read_curve(path).schedule[:11].tolist() == [1.0] * 11


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has the columns none"),
        ("step,loss\n1,2\n", "expected one called lr or"),
        ("lr,loss\n1,2\n", "expected one called step or"),
        ("step,lr,loss\n1,1,\n2,1,\n", "nothing in its column 'loss'"),
        ("step,lr,loss\n1,1,3\n2,1,nan\n", "line 3: loss is 'nan'"),
        ("step,lr,loss\n1,1,3\nx,1,2\n", "line 3: step is 'x'"),
        ("step,lr,loss\n1,1,3\n2,1,-2\n", r"losses\[1\] is -2.0"),
        ("step,lr,loss\n1,-1,3\n2,1,2\n", "learning rate at step 1 is -1"),
        ("step,lr,loss\n1,1,3\n", "one learning rate"),
    ],
)
def test_files_that_hold_no_curve(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text(content)
    with pytest.raises(CurveError, match=said):
        read_curve(path)
    path.write_bytes(b"step,lr,loss\n\xff\xfe\n")
    with pytest.raises(CurveError, match="not CSV text"):
        read_curve(path)
