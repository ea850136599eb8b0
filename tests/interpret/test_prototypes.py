"""Prototype networks: distances, terms and symmetries in closed form; the estimator; files; the paper's networks."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import contracts
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter, map_coordinates
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris, make_blobs
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from neuropil.errors import MissingAsset, ModelError
from neuropil.interpret._prototype_training import Objective, in_turn
from neuropil.interpret.prototype_images import (
    ConvDecoder,
    ConvEncoder,
    ElasticDeformation,
    displaced,
    smoothed,
)
from neuropil.interpret.prototype_network import (
    PrototypeLayer,
    PrototypeNetwork,
    coverage_error,
    dense_network,
    prototype_error,
    reconstruction_error,
)
from neuropil.interpret.prototype_quality import prototype_quality
from neuropil.interpret.prototypes import PrototypeClassifier

EXPECTED_FAILURES: dict[str, str] = {}
QUICK: dict[str, Any] = {"epochs": 30, "batch_size": 25, "lr": 0.01, "layers": (16, 8), "random_state": 0}


def specimen(seed: int = 0) -> tuple[PrototypeClassifier, np.ndarray, np.ndarray]:
    """Six prototypes on standardised irises."""
    X, y = load_iris(return_X_y=True)
    return PrototypeClassifier(6, **QUICK | {"random_state": seed}), StandardScaler().fit_transform(X), y


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed: int = 0, m: int = 5, q: int = 4, k: int = 3, encoder: nn.Module | None = None) -> PrototypeNetwork:
    torch.manual_seed(seed)
    made = PrototypeNetwork(encoder or nn.Linear(6, q), nn.Linear(q, 6), n_prototypes=m, code_size=q, n_classes=k)
    return made.double()


@pytest.fixture(scope="module")
def fitted() -> tuple[PrototypeClassifier, np.ndarray, np.ndarray]:
    """The specimen, fitted. Not to be changed by a test."""
    estimator, X, y = specimen()
    return estimator.fit(X, y), X, y


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    return (X / 16).astype(np.float32), y


# --- distances and scores ----------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_distances_are_those_of_cdist_squared_and_never_negative(dtype: torch.dtype, within: float) -> None:
    torch.manual_seed(0)
    layer = PrototypeLayer(15, 40).to(dtype)
    z = torch.rand(200, 40, dtype=dtype)
    exact = torch.cdist(z.double(), layer.codes.double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2
    torch.testing.assert_close(layer(z).double(), exact, rtol=within, atol=within)
    near = layer(layer.codes.detach() + 1e-4 * torch.randn(15, 40, dtype=dtype))
    assert bool((near >= 0).all())


def test_a_distance_is_exactly_zero_at_a_prototype() -> None:
    torch.manual_seed(0)
    layer = PrototypeLayer(15, 40)
    with torch.no_grad():
        layer.codes.mul_(1000).add_(0.1)  # where |z|^2 + |p|^2 - 2 z p would be far from it
    assert torch.equal(layer(layer.codes).diagonal(), torch.zeros(15))


def test_the_layer_keeps_the_contract_of_layers() -> None:
    def specimen(seed: int) -> tuple[nn.Module, tuple[Tensor]]:
        torch.manual_seed(seed)
        return PrototypeLayer(5, 3), (torch.rand(4, 3, generator=torch.Generator().manual_seed(7)),)

    contracts.layer(SimpleNamespace(specimen=specimen))


def test_prototypes_and_weights_begin_uniform_between_0_and_1() -> None:
    torch.manual_seed(0)
    made = PrototypeNetwork(nn.Identity(), None, n_prototypes=50, code_size=100, n_classes=40)
    for values in (made.prototypes.codes.detach(), made.classifier.weight.detach()):
        assert 0 <= values.min() < 0.01 < 0.99 < values.max() <= 1
        assert abs(float(values.mean()) - 0.5) < 0.03
    assert made.classifier.bias is None


def test_contributions_add_up_to_the_score() -> None:
    made, x = network(), draw(1, 7, 6)
    torch.testing.assert_close(made.contributions(x).sum(2), made(x), rtol=1e-12, atol=1e-12)


def test_without_weights_or_without_distance_the_answer_is_uniform() -> None:
    made = network(m=1, q=6, k=4, encoder=nn.Identity())
    with torch.no_grad():
        made.prototypes.codes.copy_(draw(0, 1, 6))
    assert torch.equal(made(made.prototypes.codes), torch.zeros(1, 4, dtype=torch.float64))
    blank = network()
    nn.init.zeros_(blank.classifier.weight)
    torch.testing.assert_close(blank(draw(1, 5, 6)).softmax(1), torch.full((5, 3), 1 / 3, dtype=torch.float64))


def test_with_class_means_and_minus_identity_it_is_the_nearest_centroid() -> None:
    X, y = make_blobs(400, centers=4, n_features=6, cluster_std=4.0, random_state=0)
    means = np.stack([X[y == k].mean(0) for k in range(4)])
    made = network(m=4, q=6, k=4, encoder=nn.Identity())
    with torch.no_grad():
        made.prototypes.codes.copy_(torch.from_numpy(means))
        made.classifier.weight.copy_(-torch.eye(4))
        scores = made(torch.from_numpy(X))
    np.testing.assert_array_equal(scores.argmax(1).numpy(), NearestCentroid(metric="euclidean").fit(X, y).predict(X))
    # ... and its softmax is the posterior of spherical Gaussians of variance 1/2 and equal priors
    normal = torch.distributions.Normal(torch.from_numpy(means), 0.5**0.5)
    log = normal.log_prob(torch.from_numpy(X).unsqueeze(1)).sum(2)
    torch.testing.assert_close(scores.softmax(1), log.softmax(1), rtol=1e-9, atol=1e-12)


def test_the_order_of_prototypes_does_not_matter() -> None:
    made, x = network(), draw(1, 7, 6)
    mixed, order = copy.deepcopy(made), torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        mixed.prototypes.codes.copy_(made.prototypes.codes[order])
        mixed.classifier.weight.copy_(made.classifier.weight[:, order])
    torch.testing.assert_close(mixed(x), made(x), rtol=1e-12, atol=1e-12)


def test_turning_and_shifting_codes_and_prototypes_together_changes_nothing() -> None:
    z, p = draw(0, 9, 4), draw(1, 5, 4)
    turn, _ = torch.linalg.qr(draw(2, 4, 4))
    shift = draw(3, 4)
    before, after = PrototypeLayer(5, 4).double(), PrototypeLayer(5, 4).double()
    with torch.no_grad():
        before.codes.copy_(p)
        after.codes.copy_(p @ turn + shift)
    d, moved = before(z), after(z @ turn + shift)
    torch.testing.assert_close(moved, d, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(prototype_error(moved), prototype_error(d))
    torch.testing.assert_close(coverage_error(moved), coverage_error(d))


# --- the terms of the loss -----------------------------------------------------------------------------


def distances(z: list[list[float]], p: list[list[float]]) -> Tensor:
    return torch.cdist(torch.tensor(z), torch.tensor(p)).square()


def test_r1_and_r2_by_hand() -> None:
    z = [[0.0, 0.0], [3.0, 4.0]]
    one, two = distances(z, [[0.0, 0.0]]), distances(z, [[0.0, 0.0], [6.0, 8.0]])
    assert prototype_error(one).item() == 0
    assert coverage_error(one).item() == pytest.approx(12.5)
    assert prototype_error(two).item() == pytest.approx(12.5)
    assert coverage_error(two).item() == pytest.approx(12.5)


def test_r_sums_over_an_input_and_averages_over_inputs() -> None:
    found = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    assert reconstruction_error(found, torch.zeros(2, 1, 2)).item() == 2.5
    with pytest.raises(ValueError, match="decoder gives"):
        reconstruction_error(found, torch.zeros(2, 1, 3))


def test_both_are_zero_with_no_gradient_where_prototypes_are_the_codes() -> None:
    layer, z = PrototypeLayer(6, 4).double(), draw(0, 6, 4).requires_grad_()
    with torch.no_grad():
        layer.codes.copy_(z)
    d = layer(z)
    assert prototype_error(d).item() == coverage_error(d).item() == 0
    (prototype_error(d) + coverage_error(d)).backward()
    assert layer.codes.grad is not None
    assert z.grad is not None
    assert not layer.codes.grad.any()
    assert not z.grad.any()
    # one prototype among the codes: R1 stays 0, R2 does not; and the other way round
    fewer = d.detach()[:, :3]
    assert prototype_error(fewer).item() == 0 < coverage_error(fewer).item()
    assert coverage_error(fewer.T).item() == 0 < prototype_error(fewer.T).item()


def test_gradients_of_r1_and_r2_are_those_of_the_formula() -> None:
    layer, z = PrototypeLayer(5, 4).double(), draw(0, 9, 4).requires_grad_()
    d = layer(z)
    prototypes = layer.codes.detach()
    (of_p,) = torch.autograd.grad(prototype_error(d), layer.codes, retain_graph=True)
    torch.testing.assert_close(of_p, 2 / 5 * (prototypes - z.detach()[d.argmin(0)]))
    (of_z,) = torch.autograd.grad(coverage_error(d), z)
    torch.testing.assert_close(of_z, 2 / 9 * (z.detach() - prototypes[d.argmin(1)]))


def test_the_whole_loss_has_the_gradients_of_finite_differences() -> None:
    made, x, y = network(), draw(1, 7, 6), torch.arange(7) % 3
    leaves = list(made.parameters())
    assert torch.autograd.gradcheck(lambda *_: made.loss(x, y), leaves, fast_mode=True)


def test_the_loss_is_the_weighted_sum_of_its_terms_and_zero_weights_switch_terms_off() -> None:
    made, x, y = network(), draw(1, 7, 6), torch.arange(7) % 3
    terms = made.terms(x, y)
    z = made.encode(x)
    d = torch.cdist(z, made.prototypes.codes).square()
    wanted = (
        cross_entropy(made(x), y),
        (made.decode(z) - x).square().sum(1).mean(),
        d.min(0)[0].mean(),
        d.min(1)[0].mean(),
    )
    for found, exact in zip(terms, wanted, strict=True):
        torch.testing.assert_close(found, exact)
    for lambdas in ((20.0, 1.0, 1.0, 1.0), (1.0, 0.5, 0.0, 2.0), (0.0, 0.0, 3.0, 0.0)):
        exact = sum(weight * term for weight, term in zip(lambdas, terms, strict=True))
        torch.testing.assert_close(made.loss(x, y, lambdas), exact)
    assert torch.equal(made.loss(x, y, (1.0, 0.0, 0.0, 0.0)), cross_entropy(made(x), y)), "cross entropy to the bit"
    made.zero_grad()
    made.loss(x, y, (20.0, 0.0, 1.0, 1.0)).backward()
    assert all(p.grad is None for p in made.decoder.parameters())


def test_terms_without_a_decoder() -> None:
    made = PrototypeNetwork(nn.Identity(), None, n_prototypes=2, code_size=3, n_classes=2)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    assert made.terms(x, y).reconstruction == 0
    with pytest.raises(ValueError, match="no decoder"):
        made.loss(x, y)
    assert torch.isfinite(made.loss(x, y, (1.0, 0.0, 1.0, 1.0)))


def test_a_bank_of_earlier_codes_counts_in_r1_alone() -> None:
    made, x, y = network(), draw(1, 3, 6), torch.arange(3)
    bank = made.prototypes.codes.detach().clone()
    assert made.loss(x, y, (0.0, 0.0, 1.0, 0.0), bank=bank).item() == 0
    assert torch.equal(made.loss(x, y, (1.0, 1.0, 0.0, 1.0), bank=bank), made.loss(x, y, (1.0, 1.0, 0.0, 1.0)))


def test_the_bank_holds_the_newest_codes() -> None:
    made = network(encoder=nn.Identity(), q=6)
    objective = Objective(made, (1.0, 0.0, 1.0, 1.0), memory=5, code_size=6).double()
    batches = draw(0, 4, 3, 6)
    first = objective(batches[0], torch.arange(3))
    assert torch.equal(first, made.loss(batches[0], torch.arange(3), (1.0, 0.0, 1.0, 1.0), bank=batches[0][:0]))
    for batch in batches[1:]:
        objective(batch, torch.arange(3))
    newest = batches.reshape(-1, 6)[-5:]
    assert torch.equal(objective.bank.sort(0).values, newest.sort(0).values)


@pytest.mark.parametrize("lambdas", [(-1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0), (float("nan"), 1.0, 1.0, 1.0)])
def test_weights_of_terms_out_of_range(lambdas: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="lambdas"):
        network().loss(draw(0, 3, 6), torch.arange(3), lambdas)


# --- the paper's networks and its augmentation ---------------------------------------------------------


def test_the_papers_sizes() -> None:
    encoder, decoder = ConvEncoder((1, 28, 28)), ConvDecoder((1, 28, 28))
    assert [size[0] for size in encoder.sizes] == [28, 14, 7, 4, 2]
    assert encoder.code_size == 40
    x, found = torch.rand(2, 1, 28, 28), []
    for layer in encoder.layers[::2]:
        x = layer(x)
        found.append(tuple(x.shape[1:]))
    assert found == [(32, 14, 14), (32, 7, 7), (32, 4, 4), (10, 2, 2)]
    z, found = x, []
    for layer in decoder.layers[::2]:
        z = layer(z)
        found.append(tuple(z.shape[1:]))
    assert found == [(32, 4, 4), (32, 7, 7), (32, 14, 14), (1, 28, 28)]
    convolutions = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    assert all(not m.bias.any() for m in convolutions if m.bias is not None)
    assert convolutions[1].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert isinstance(encoder.layers[-1], nn.ReLU)
    assert isinstance(decoder.layers[-1], nn.Sigmoid)
    assert isinstance(ConvEncoder((1, 8, 8), activation="sigmoid").layers[-1], nn.Sigmoid)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 32, 32), (3, 64, 64), (3, 33, 33), (2, 17, 30), (1, 1, 5)])
def test_any_size_of_image_comes_back(shape: tuple[int, int, int]) -> None:
    encoder, decoder = ConvEncoder(shape), ConvDecoder(shape)
    z = encoder(torch.rand(2, *shape))
    assert z.shape == (2, encoder.code_size)
    assert decoder(z).shape == (2, *shape)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"image_shape": (28, 28)}, "channels, height, width"),
        ({"image_shape": (1, 28, 28), "maps": ()}, "feature maps"),
        ({"image_shape": (1, 28, 28), "activation": "swish"}, "expected one of relu"),
    ],
)
def test_networks_that_cannot_be(how: dict[str, Any], said: str) -> None:
    for kind in (ConvEncoder, ConvDecoder):
        with pytest.raises(ValueError, match=said):
            kind(**how)


def test_blur_and_displacement_are_scipys() -> None:
    fields, images = draw(0, 2, 2, 28, 20), draw(1, 2, 3, 28, 20)
    blurred = smoothed(fields, 4.0)
    for n in range(2):
        for c in range(2):
            exact = gaussian_filter(fields[n, c].numpy(), 4, mode="constant")
            np.testing.assert_allclose(blurred[n, c].numpy(), exact, atol=1e-12)
    by = 20 * blurred + 0.3
    rows, columns = np.mgrid[0:28, 0:20]
    found = displaced(images, by)
    for n in range(2):
        where = [rows + by[n, 0].numpy(), columns + by[n, 1].numpy()]
        for c in range(3):
            exact = map_coordinates(images[n, c].numpy(), where, order=1, mode="nearest")
            np.testing.assert_allclose(found[n, c].numpy(), exact, atol=1e-12)


def test_elastic_deformation_keeps_range_shape_and_dtype_and_is_seeded() -> None:
    images = draw(0, 5, 2, 28, 28).float()
    bent = [ElasticDeformation(generator=torch.Generator().manual_seed(s))(images) for s in (0, 0, 1)]
    assert torch.equal(bent[0], bent[1])
    assert not torch.equal(bent[0], bent[2])
    assert bent[0].shape == images.shape
    assert bent[0].dtype == images.dtype
    for image, other in zip(images, bent[0], strict=True):
        assert not torch.equal(image, other)
        for channel, found in zip(image, other, strict=True):
            assert channel.min() <= found.min() <= found.max() <= channel.max()
    assert torch.equal(ElasticDeformation(alpha=0.0)(images), images)
    with pytest.raises(ValueError, match="sigma"):
        ElasticDeformation(sigma=0.0)


# --- the estimator: what it answers --------------------------------------------------------------------


def test_it_learns(fitted: tuple[PrototypeClassifier, np.ndarray, np.ndarray]) -> None:
    estimator, X, y = fitted
    assert estimator.score(X, y) > 0.9
    assert estimator.losses_[-1] < estimator.losses_[0] / 2


def test_scores_probabilities_and_explanations_are_one(
    fitted: tuple[PrototypeClassifier, np.ndarray, np.ndarray],
) -> None:
    estimator, X, _ = fitted
    contributions, d = estimator.contributions(X), estimator.distances(X)
    np.testing.assert_allclose(contributions, estimator.weights_ * d[:, None], rtol=1e-6)
    scores = torch.from_numpy(contributions.sum(2))
    np.testing.assert_allclose(scores.softmax(1).numpy(), estimator.predict_proba(X), atol=1e-5)
    whys = estimator.explain(X[:10])
    for row, why in enumerate(whys):
        assert why.predicted == why.of == estimator.predict(X)[row]
        assert sum(case.contribution for case in why.references) == pytest.approx(why.score, abs=1e-4)
        assert why.score == pytest.approx(float(scores[row].max()), abs=1e-4)
        assert [case.distance for case in why.references] == sorted(d[row].tolist())
        assert sorted(case.prototype for case in why.references) == list(range(6))
        np.testing.assert_array_equal(why.x, X[row].astype(np.float32))
    assert str(whys[0]).count("\n") == 7
    other = estimator.explain(X[:1], of=2)[0]
    assert other.of == 2
    assert other.score == pytest.approx(float(scores[0, 2]), abs=1e-4)
    with pytest.raises(ValueError, match="is no class"):
        estimator.explain(X[:1], of=7)


def test_reference_cases_are_the_nearest_training_rows(
    fitted: tuple[PrototypeClassifier, np.ndarray, np.ndarray],
) -> None:
    estimator, X, y = fitted
    d = estimator.distances(X)
    exact = d.argsort(0, kind="stable")[:5].T
    np.testing.assert_allclose(estimator.nearest_distances_, np.take_along_axis(d.T, exact, 1), rtol=1e-5)
    np.testing.assert_array_equal(estimator.nearest_[:, 0], d.argmin(0))
    np.testing.assert_array_equal(estimator.nearest_labels_, y[estimator.nearest_])
    np.testing.assert_array_equal(estimator.cases_, X.astype(np.float32)[estimator.nearest_])
    case = estimator.explain(X[:1])[0].references[0]
    assert case.nearest == estimator.nearest_[case.prototype, 0]
    np.testing.assert_array_equal(case.case, X[case.nearest].astype(np.float32))
    decoded = estimator.decode_prototypes()
    assert decoded is not None
    np.testing.assert_array_equal(case.decoded, decoded[case.prototype])
    assert case.stands_for == estimator.classes_[estimator.weights_[:, case.prototype].argmin()]


def test_projected_prototypes_are_cases(fitted: tuple[PrototypeClassifier, np.ndarray, np.ndarray]) -> None:
    estimator, X, y = fitted
    before = estimator.prototypes_
    projected = estimator.project(X, y)
    np.testing.assert_array_equal(estimator.prototypes_, before)
    np.testing.assert_allclose(projected.prototypes_, estimator.encode(X)[estimator.nearest_[:, 0]], atol=1e-6)
    np.testing.assert_allclose(projected.nearest_distances_[:, 0], 0, atol=1e-10)
    assert projected.score(X, y) > 0.8
    again = projected.project(X, y)
    np.testing.assert_allclose(again.prototypes_, projected.prototypes_, atol=1e-6)
    with pytest.raises(ValueError, match="those of fit"):
        estimator.project(X, y + 1)


@pytest.mark.parametrize("labels", [np.array(["setosa", "versicolor", "virginica"]), np.array([7, -3, 100])])
def test_labels_of_any_kind_come_back(labels: np.ndarray) -> None:
    estimator, X, y = specimen()
    found = estimator.set_params(epochs=15).fit(X, labels[y])
    np.testing.assert_array_equal(found.classes_, np.unique(labels))
    assert (found.predict(X) == labels[y]).mean() > 0.8
    assert set(found.prototype_classes_) <= set(labels)
    assert found.explain(X[:1], of=labels[1])[0].of == labels[1]


def test_fewer_prototypes_than_classes_are_warned_of() -> None:
    estimator, X, y = specimen()
    with pytest.warns(UserWarning, match="2 prototypes for 3 classes"):
        estimator.set_params(n_prototypes=2, epochs=1).fit(X, y)


def test_class_weights_move_the_border() -> None:
    X, y = make_blobs([150, 30], centers=[[0, 0], [1.5, 0]], random_state=0)
    share = {
        name: (PrototypeClassifier(4, class_weight=weights, **QUICK | {"epochs": 15}).fit(X, y).predict(X) == 1).mean()
        for name, weights in {"none": None, "balanced": "balanced", "many": {0: 1.0, 1: 30.0}}.items()
    }
    assert share["none"] < share["balanced"] < share["many"]


def test_tables_with_names() -> None:
    X, y = load_iris(return_X_y=True, as_frame=True)
    found = PrototypeClassifier(4, **QUICK | {"epochs": 2}).fit(X, y)
    assert list(found.feature_names_in_) == list(X.columns)
    X = X.copy()
    X.iloc[17, 2] = np.nan
    with pytest.raises(ValueError, match=r"NaN, first in column 2 \('petal length \(cm\)'\) of row 17"):
        found.predict(X)
    with pytest.raises(ValueError, match="column 2"):
        found.fit(pd.DataFrame(X), y)


def test_one_seed_one_fit_and_the_callers_generator_is_left_alone() -> None:
    estimator, X, y = specimen()
    estimator.set_params(epochs=2)
    state = torch.get_rng_state()
    first = estimator.fit(X, y).prototypes_
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    np.testing.assert_array_equal(estimator.fit(X, y).prototypes_, first)
    assert not np.array_equal(estimator.set_params(random_state=1).fit(X, y).prototypes_, first)


# --- the estimator: what it is made of -------------------------------------------------------------------


class Squash(nn.Module):
    """A user's own encoder: codes with two axes, a frozen part, and dropout in training."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.learned, self.drop = nn.Linear(4, 6).requires_grad_(False), nn.Linear(6, 6), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.learned(self.frozen(x).tanh())).unflatten(1, (2, 3))


def test_a_users_encoder_and_decoder_are_copied_and_trained() -> None:
    torch.manual_seed(0)
    encoder, decoder = Squash(), nn.Linear(6, 4)
    before = copy.deepcopy((encoder.state_dict(), decoder.state_dict()))
    estimator, X, y = specimen()
    found = estimator.set_params(encoder=encoder, decoder=decoder, layers=None).fit(X, y)
    assert contracts.equal((encoder.state_dict(), decoder.state_dict()), before)
    assert encoder.drop.training
    own = found.network_.encoder
    assert torch.equal(own.frozen.weight, encoder.frozen.weight)
    assert not torch.equal(own.learned.weight, encoder.learned.weight)
    assert found.code_size_ == 6
    assert found.score(X, y) > 0.85
    assert not any(module.training for module in found.network_.modules())
    np.testing.assert_array_equal(found.predict_proba(X), found.predict_proba(X))


def test_without_a_decoder_cases_speak() -> None:
    estimator, X, y = specimen()
    found = estimator.set_params(encoder=nn.Identity(), decoder=None, layers=None).fit(X, y)
    assert found.decode_prototypes() is None
    case = found.explain(X[:1])[0].references[0]
    assert case.decoded is None
    np.testing.assert_array_equal(case.case, X[case.nearest].astype(np.float32))
    assert np.isnan(prototype_quality(found, X, y, X).realism)
    with pytest.raises(ValueError, match="no decoder"):
        found.reconstruct(X)


def test_images_go_in_with_four_axes_or_as_rows(digits: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = digits[0][:200], digits[1][:200]
    how: dict[str, Any] = {"epochs": 2, "batch_size": 50, "random_state": 0}
    rows = PrototypeClassifier(12, image_shape=(1, 8, 8), **how).fit(X, y)
    images = PrototypeClassifier(12, **how).fit(X.reshape(-1, 1, 8, 8), y)
    assert isinstance(rows.network_.encoder, ConvEncoder)
    np.testing.assert_array_equal(rows.predict_proba(X), images.predict_proba(X.reshape(-1, 1, 8, 8)))
    assert images.cases_.shape == (12, 5, 1, 8, 8)
    assert isinstance(images.explain(X[:1])[0].sheet(), Figure)


def test_elastic_training_and_a_callable() -> None:
    X = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    y = np.arange(60) % 2
    how: dict[str, Any] = {"epochs": 2, "batch_size": 20, "random_state": 0}
    plain = PrototypeClassifier(3, **how).fit(X, y)
    for augment in ("elastic", lambda x: x.flip(-1)):
        bent = PrototypeClassifier(3, augment=augment, **how).fit(X, y)
        assert bent.losses_ != plain.losses_
    same = PrototypeClassifier(3, augment=lambda x: x, **how).fit(X, y)
    assert same.losses_ == plain.losses_


@pytest.mark.parametrize("init", ["k-means++", "classes"])
def test_prototypes_can_start_at_codes(init: str) -> None:
    estimator, X, y = specimen()
    estimator.set_params(encoder=nn.Identity(), decoder=None, layers=None, init=init, epochs=1, lr=1e-9)
    found = estimator.fit(X, y)
    np.testing.assert_allclose(found.nearest_distances_[:, 0], 0, atol=1e-8)
    labels = y[found.nearest_[:, 0]]
    assert len(np.unique(found.nearest_[:, 0])) == 6
    if init == "classes":
        assert np.bincount(labels).tolist() == [2, 2, 2]


def test_classes_in_turn_pass_over_those_used_up() -> None:
    labels = np.array([0, 1, 1, 1, 2, 2])
    rows = in_turn(labels, 6, np.random.default_rng(0))
    assert labels[rows].tolist() == [0, 1, 2, 1, 2, 1]
    assert len(set(rows)) == 6


def test_pretraining_the_autoencoder_comes_first() -> None:
    estimator, X, y = specimen()
    estimator.set_params(epochs=1, lr=0.01)
    cold, warm = (clone(estimator).set_params(pretrain_epochs=epochs).fit(X, y) for epochs in (0, 20))
    errors = [np.square(each.reconstruct(X) - X).sum(1).mean() for each in (cold, warm)]
    assert errors[1] < errors[0] / 2


def test_a_memory_of_codes_trains_batches_smaller_than_the_prototypes() -> None:
    estimator, X, y = specimen()
    estimator.set_params(batch_size=4, epochs=5)
    without = clone(estimator).fit(X, y)
    with_bank = clone(estimator).set_params(memory=60).fit(X, y)
    assert with_bank.losses_ != without.losses_
    assert np.mean(with_bank.losses_[-30:]) < np.mean(without.losses_[-30:])


def test_the_dense_network_to_compare_with() -> None:
    estimator, X, y = specimen()
    found = estimator.set_params(head="dense").fit(X, y)
    assert found.score(X, y) > 0.9
    assert found.predict_proba(X).shape == (150, 3)
    for ask in (found.explain, found.distances, found.contributions, found.reconstruct):
        with pytest.raises(ValueError, match="head='dense'"):
            ask(X)
    net = dense_network(nn.Identity(), width=15, code_size=40, n_classes=10)
    assert [tuple(p.shape) for p in net.parameters()] == [(15, 40), (15,), (10, 15), (10,)]


def test_the_terms_do_what_they_are_for() -> None:
    """Without R1 prototypes stay away from the data, without R2 data stay away from prototypes."""
    estimator, X, y = specimen()
    found = {}
    for name, off in {"full": {}, "-R1": {"lambda_1": 0}, "-R2": {"lambda_2": 0}}.items():
        fit = estimator.set_params(lambda_1=1, lambda_2=1).set_params(**off).fit(X, y)
        found[name] = prototype_quality(fit, X, y, X)
    assert found["-R1"].remoteness > 2 * found["full"].remoteness
    assert found["-R2"].coverage > 2 * found["full"].coverage


def test_quality_of_prototypes_that_are_the_data() -> None:
    """Codes are the inputs and prototypes rows of them, one row a class."""
    X, y = make_blobs(90, centers=3, n_features=5, random_state=0)
    X = X.astype(np.float32)
    how: dict[str, Any] = {"encoder": nn.Identity(), "decoder": nn.Identity(), "init": "classes", "lr": 1e-9}
    found = PrototypeClassifier(3, **how, epochs=1, random_state=0).fit(X, y)
    with torch.no_grad():
        found.network_.prototypes.codes.copy_(torch.from_numpy(X[found.nearest_[:, 0]]))
        found.network_.classifier.weight.copy_(1 - torch.eye(3))
    measured = prototype_quality(found, X, y, X)
    assert measured.misfit == measured.remoteness == 0
    assert np.isnan(measured.realism), "reconstructions are the data themselves"
    assert measured.classes == 3
    assert measured.agreement == 1
    spread = np.square(X[:, None] - X[None]).sum(2).sum() / (90 * 89)
    own = np.square(X[:, None] - found.prototypes_[None]).sum(2)
    assert measured.coverage == pytest.approx(own.min(1).mean() / spread, rel=1e-4)
    between = np.square(found.prototypes_[:, None] - found.prototypes_[None]).sum(2)
    assert measured.closest_pair == pytest.approx(between[np.triu_indices(3, 1)].min() / spread, rel=1e-4)


# --- files, going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [{}, {"head": "dense"}, {"lambda_1": 0, "init": "classes", "class_weight": {0: 2.0, 1: 1.0, 2: 1.0}}]
)
def test_a_file_brings_everything_back(tmp_path: Path, how: dict[str, Any]) -> None:
    estimator, X, y = specimen()
    found = estimator.set_params(epochs=2, **how).fit(X, y)
    back = PrototypeClassifier.load(found.save(tmp_path / "a" / "irises.pt"))
    assert back.get_params() == found.get_params()
    np.testing.assert_array_equal(back.predict_proba(X), found.predict_proba(X))
    if "head" not in how:
        assert str(back.explain(X[:1])[0]) == str(found.explain(X[:1])[0])
        np.testing.assert_array_equal(back.cases_, found.cases_)
    assert list(tmp_path.joinpath("a").iterdir()) == [tmp_path / "a" / "irises.pt"]


def test_a_file_of_names_and_a_users_modules(tmp_path: Path) -> None:
    X, y = load_iris(return_X_y=True, as_frame=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    made = PrototypeClassifier(4, encoder=Squash(), decoder=nn.Linear(6, 4), epochs=1, random_state=0)
    path = made.fit(X, names).save(tmp_path / "own.pt")
    back = PrototypeClassifier.load(path, encoder=Squash(), decoder=nn.Linear(6, 4))
    np.testing.assert_array_equal(back.predict_proba(X), made.predict_proba(X))
    np.testing.assert_array_equal(back.nearest_labels_, made.nearest_labels_)
    assert list(back.feature_names_in_) == list(X.columns)
    with pytest.raises(ValueError, match="decoder, encoder of its maker's own"):
        PrototypeClassifier.load(path)
    with pytest.raises(ValueError, match="does not fit"):
        PrototypeClassifier.load(path, encoder=nn.Linear(4, 5), decoder=nn.Linear(5, 4))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MissingAsset, match="not there"):
        PrototypeClassifier.load(tmp_path / "no.pt")
    (tmp_path / "text.pt").write_text("prototypes")
    torch.save({"format": "other"}, tmp_path / "other.pt")
    for name in ("text.pt", "other.pt"):
        with pytest.raises(ModelError, match="no file of"):
            PrototypeClassifier.load(tmp_path / name)
    with pytest.raises(ValueError, match="not fitted"):
        PrototypeClassifier().save(tmp_path / "no.pt")


@pytest.mark.parametrize("memory", [0, 30])
def test_a_fit_that_goes_on_is_one_that_was_not_stopped(tmp_path: Path, memory: int) -> None:
    X = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    y = np.arange(60) % 2
    how: dict[str, Any] = {"batch_size": 25, "random_state": 0, "augment": "elastic", "memory": memory}
    how |= {"init": "k-means++", "pretrain_epochs": 1}
    whole = PrototypeClassifier(3, epochs=5, **how).fit(X, y)
    part = PrototypeClassifier(3, epochs=2, checkpoint=tmp_path / "run.ckpt", **how).fit(X, y)
    assert part.losses_ == whole.losses_[:6]
    resumed = part.set_params(epochs=5).fit(X, y)
    assert resumed.losses_ == whole.losses_
    assert contracts.equal(resumed.network_.state_dict(), whole.network_.state_dict())


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"n_prototypes": 0}, "n_prototypes"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"epochs": 0}, "epochs"),
        ({"memory": -1}, "memory"),
        ({"lr": 0}, "learning rate"),
        ({"init": "zeros"}, "k-means"),
        ({"head": "tree"}, "prototypes, dense"),
        ({"lambda_1": -1}, "lambdas"),
        ({"encoder": "vit"}, "'auto', 'conv', 'dense'"),
        ({"encoder": "conv"}, "image_shape"),
        ({"decoder": "none"}, "'mirror', None"),
        ({"encoder": nn.Linear(4, 4)}, "no mirror"),
        ({"encoder": nn.Linear(4, 4), "decoder": nn.Linear(4, 3)}, "decoder gives"),
        ({"decoder": None, "pretrain_epochs": 1}, "autoencoder"),
        ({"image_shape": (1, 3, 3)}, "rows of 4 numbers"),
        ({"augment": "elastic"}, "bends images"),
        ({"activation": "swish"}, "activation"),
        ({"init": "classes", "n_prototypes": 200}, "cannot start"),
    ],
)
def test_settings_that_make_no_sense_are_named(how: dict[str, Any], said: str) -> None:
    estimator, X, y = specimen()
    with pytest.raises(ValueError, match=said):
        estimator.set_params(**how).fit(X, y)


def test_codes_of_another_size_and_sheets_of_tables(fitted: tuple[PrototypeClassifier, np.ndarray, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="codes of 3 numbers"):
        PrototypeLayer(2, 4)(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="1 or more"):
        PrototypeLayer(0, 4)
    estimator, X, _ = fitted
    with pytest.raises(ValueError, match="a sheet needs images"):
        estimator.explain(X[:1])[0].sheet()


# --- real images -----------------------------------------------------------------------------------------


def test_digits_are_explained_by_digits(digits: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = digits
    made = PrototypeClassifier(15, image_shape=(1, 8, 8), encoder="dense", epochs=40, batch_size=50, random_state=0)
    made.fit(X[:1000], y[:1000])
    assert made.score(X[1000:], y[1000:]) > 0.85
    found = prototype_quality(made, X[:1000], y[:1000], X[1000:])
    assert found.classes >= 8
    assert found.realism < 3
    assert found.coverage < 0.5
    assert made.weights_.min(0).max() < made.weights_.max(0).min()
