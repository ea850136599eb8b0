"""Turbo-VBI: the closed forms, the turbo iteration, pruning that changes no output, and any architecture."""

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import scipy.stats
import torch
from tiny_models import llama
from torch import Tensor, nn
from torch.distributions import Bernoulli, Gamma, Normal, kl_divergence
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, parametrize

from neuropil import models
from neuropil.compress import pack_sparse, regularity
from neuropil.compress._dead import without_dead_neurons
from neuropil.compress._layered import (
    Gammas,
    factorised_evidence,
    gamma_posterior,
    joint_evidence,
    joint_precision,
    marginal,
)
from neuropil.compress._noisy import kept
from neuropil.compress.support import BernoulliPrior, GroupPrior, HMMPrior, Prior, logit
from neuropil.compress.turbo_vbi import TurboVBI
from neuropil.data import digits
from neuropil.errors import ModelError
from neuropil.training import fit

G = Gammas(1.2, 0.3, 1.5, 1e-3)
SQUARES = torch.logspace(-6, 2, 60, dtype=torch.float64)
CHAIN = HMMPrior(0.05, 0.2)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 5)
    )


def batch(seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 1, 6, 6, generator=generator), torch.randint(5, (16,), generator=generator)


def trained(model: nn.Module, vbi: TurboVBI, steps: int, rate: float = 0.01) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    step = stepper(model, optimizer, vbi)
    for _ in range(steps):
        step()
        vbi.step()
    return optimizer


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, vbi: TurboVBI) -> Callable[[], None]:
    x, y = batch()

    def step() -> None:
        optimizer.zero_grad()
        (cross_entropy(model(x), y) + vbi.kl()).backward()
        optimizer.step()

    return step


def specimen(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, TurboVBI, Callable[[], None]]:
    """A small convolutional network, its optimizer, the training under learned chains, and one step."""
    model = net(seed)
    vbi = TurboVBI(model, CHAIN, data_size=200, every=2, warmup=3, learn=True, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return model, optimizer, vbi, stepper(model, optimizer, vbi)


# --- the closed forms -------------------------------------------------------------------------------


def test_the_gamma_update_of_a_sure_support() -> None:
    one, zero = torch.ones_like(SQUARES), torch.zeros_like(SQUARES)
    for support, a, b in ((one, G.a, G.b), (zero, G.a_bar, G.b_bar)):
        shape, rate = gamma_posterior(SQUARES, support, G)
        torch.testing.assert_close(shape, torch.full_like(SQUARES, a + 0.5), rtol=0, atol=1e-15)
        torch.testing.assert_close(rate, b + SQUARES / 2, rtol=1e-15, atol=0)
        assert bool(((shape / rate).diff() < 0).all())
        torch.testing.assert_close(joint_precision(SQUARES, support, G), shape / rate, rtol=1e-14, atol=0)


def test_the_marginal_is_students_t() -> None:
    for a, b in ((G.a, G.b), (G.a_bar, G.b_bar), (0.7, 2.0)):
        expected = scipy.stats.t(df=2 * a, scale=math.sqrt(b / a)).pdf(SQUARES.sqrt().numpy())
        torch.testing.assert_close(marginal(SQUARES, a, b).exp(), torch.tensor(expected), rtol=1e-8, atol=1e-12)
        grid = torch.logspace(-9, 7, 200_001, dtype=torch.float64)
        at = torch.tensor([0.0, 0.1, 2.0], dtype=torch.float64)
        integrand = (
            Normal(0, grid.rsqrt()).log_prob(at[:, None]) + Gamma(a, torch.tensor(b).double()).log_prob(grid)
        ).exp()
        torch.testing.assert_close(
            torch.trapezoid(integrand * grid, grid.log(), dim=1), marginal(at**2, a, b).exp(), rtol=1e-5, atol=0
        )


def test_the_evidence_is_the_ratio_of_two_students() -> None:
    w = SQUARES.sqrt().numpy()
    ratio = scipy.stats.t(df=2 * G.a, scale=math.sqrt(G.b / G.a)).logpdf(w)
    ratio -= scipy.stats.t(df=2 * G.a_bar, scale=math.sqrt(G.b_bar / G.a_bar)).logpdf(w)
    torch.testing.assert_close(joint_evidence(SQUARES, G), torch.tensor(ratio), rtol=1e-8, atol=1e-8)


def test_the_evidence_of_a_factorised_posterior_is_the_mean_log_ratio_of_the_gammas() -> None:
    shape, rate = gamma_posterior(SQUARES[::20], torch.full_like(SQUARES[::20], 0.4), G)
    drawn = torch.distributions.Gamma(shape, rate)
    torch.manual_seed(0)
    rho = drawn.sample((400_000,))
    there, gone = (
        Gamma(torch.tensor(a).double(), torch.tensor(b).double()) for a, b in ((G.a, G.b), (G.a_bar, G.b_bar))
    )
    ratio = there.log_prob(rho) - gone.log_prob(rho)
    error = ratio.std(0) / math.sqrt(len(rho))
    assert bool(((ratio.mean(0) - factorised_evidence(shape, rate, G)).abs() < 5 * error + 1e-9).all())


def bound(square: Tensor, shape: Tensor, rate: Tensor, support: Tensor, prior: float) -> Tensor:
    """E[ln p(w | rho) + ln p(rho | s) + ln p(s)] + H[q(rho)] + H[q(s)], by torch.distributions and Gamma moments."""
    q = Gamma(shape, rate)
    log_rho = torch.digamma(shape) - rate.log()
    likelihood = 0.5 * (log_rho - q.mean * square - math.log(2 * math.pi))

    def expected(a: float, b: float) -> Tensor:
        return a * math.log(b) - math.lgamma(a) + (a - 1) * log_rho - b * q.mean

    layers = support * expected(G.a, G.b) + (1 - support) * expected(G.a_bar, G.b_bar)
    pattern = -kl_divergence(Bernoulli(support), Bernoulli(torch.full_like(support, prior)))
    return likelihood + layers + q.entropy() + pattern


def test_the_bound_never_falls_under_an_update() -> None:
    support = torch.full_like(SQUARES, 0.5)
    shape, rate = torch.full_like(SQUARES, 2.0), torch.full_like(SQUARES, 0.5)
    last = bound(SQUARES, shape, rate, support, 0.2)
    first = last
    for _ in range(20):
        shape, rate = gamma_posterior(SQUARES, support, G)
        now = bound(SQUARES, shape, rate, support, 0.2)
        assert bool((now >= last - 1e-9).all())
        support = torch.sigmoid(factorised_evidence(shape, rate, G) + logit(0.2)).clamp(1e-12, 1 - 1e-12)
        last = bound(SQUARES, shape, rate, support, 0.2)
        assert bool((last >= now - 1e-9).all())
    assert bool((last > first).all())
    joint = torch.logaddexp(
        math.log(0.2) + marginal(SQUARES, G.a, G.b), math.log(0.8) + marginal(SQUARES, G.a_bar, G.b_bar)
    )
    assert bool((joint >= last - 1e-9).all())  # the joint posterior's bound is the tighter one
    assert bool((joint > last + 1e-3).any())


def test_the_factorised_posterior_has_the_trap_and_the_joint_one_has_not() -> None:
    g, square = Gammas(1.0, 1.0, 1.0, 1e-2), torch.tensor([1e-8], dtype=torch.float64)
    support = torch.ones_like(square)
    for _ in range(100):
        shape, rate = gamma_posterior(square, support, g)
        support = torch.sigmoid(factorised_evidence(shape, rate, g) + logit(0.5))
    assert float(support) > 0.9
    assert float(shape / rate) == pytest.approx(1.5, abs=0.2)
    assert float(torch.sigmoid(joint_evidence(square, g) + logit(0.5))) < 0.2


def test_kl_is_that_of_two_normals() -> None:
    model = net().double()
    vbi = TurboVBI(model, CHAIN, data_size=300)
    expected = torch.zeros((), dtype=torch.float64)
    for layer in vbi._layers:
        deviation = (0.5 * layer.gaussian.log_variance).exp()
        prior = Normal(0.0, vbi._precision[layer.name].rsqrt())
        expected = expected + kl_divergence(Normal(layer.original, deviation), prior).sum()
    assert float(vbi.kl().detach() * 300) == pytest.approx(float(expected.detach()), rel=1e-6)
    with torch.no_grad():
        for layer in vbi._layers:
            layer.original.zero_()
            layer.gaussian.log_variance.copy_(-vbi._precision[layer.name].log())
    assert float(vbi.kl().detach()) == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        vbi._layers[0].original.add_(1e-3)
    assert float(vbi.kl().detach()) > 1e-9


def test_the_weight_of_the_prior_rises_along_an_s() -> None:
    vbi = TurboVBI(net(), CHAIN, data_size=100, warmup=10)
    shares = []
    for t in range(13):
        vbi.t = t
        shares.append(float(vbi.kl().detach()))
    assert shares[0] == 0
    assert shares[5] == pytest.approx(shares[10] / 2)
    assert shares == sorted(shares)
    assert shares[10] == shares[12]
    assert shares[1] < shares[10] / 10


# --- the turbo iteration -----------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", ["joint", "factorised"])
@pytest.mark.parametrize("prior", [CHAIN, HMMPrior(0.1, 0.5, axis="both"), BernoulliPrior(0.2), GroupPrior(0.3)])
def test_the_posterior_is_evidence_plus_message_and_settles(posterior: str, prior: Prior) -> None:
    model = net()
    vbi = TurboVBI(model, prior, data_size=100, rate=1.0, posterior=posterior)
    vbi.t = 1
    for _ in range(10):
        vbi.update()
    odds = copy.deepcopy(vbi.odds)
    vbi.update()
    for layer in vbi._layers:
        torch.testing.assert_close(vbi.odds[layer.name], odds[layer.name], rtol=0, atol=1e-6)
        if posterior == "joint":
            evidence = joint_evidence(vbi._square(layer), vbi._gammas[layer.name])
            message = prior.messages(evidence)
            torch.testing.assert_close(layer.seen(vbi.odds[layer.name]) - evidence, message, rtol=0, atol=1e-12)
    assert set(vbi.support) == {"0", "4", "6"}
    assert all(float(s.min()) >= 0 and float(s.max()) <= 1 for s in vbi.support.values())
    assert vbi.support["0"].shape == (6, 1, 3, 3)


def test_messages_are_damped_and_wait() -> None:
    vbi = TurboVBI(net(), CHAIN, data_size=100, rate=0.25, alone=5)
    base = logit(CHAIN.density)
    vbi.t = 4
    vbi.update()
    torch.testing.assert_close(vbi._prior["4"], torch.full_like(vbi._prior["4"], base), rtol=0, atol=1e-12)
    vbi.t = 5
    vbi.update()
    layer = vbi._layers[1]
    target = CHAIN.messages(joint_evidence(vbi._square(layer), vbi._gammas["4"]))
    torch.testing.assert_close(vbi._prior["4"], base + 0.25 * (target - base))


def test_clusters_are_found_where_single_weights_are_not_sure() -> None:
    layer = nn.Linear(30, 1)
    with torch.no_grad():
        layer.weight.fill_(0.001)
        layer.weight[0, 8:14] = 0.3
        layer.weight[0, 11] = 0.02  # too weak alone, within a run
        layer.weight[0, 22] = 0.1  # lone
    kept_by = {}
    for name, prior in (("chain", HMMPrior.of(0.1, 6.0)), ("alone", BernoulliPrior(0.1))):
        vbi = TurboVBI(copy.deepcopy(layer), prior, data_size=10, b=0.05, b_bar=1e-4, log_variance=-12.0, rate=1.0)
        vbi.t = 1
        vbi.update()
        kept_by[name] = (vbi.odds[""] > 0)[0].nonzero().flatten().tolist()
    assert kept_by["alone"] == [8, 9, 10, 12, 13, 22]
    assert kept_by["chain"] == [8, 9, 10, 11, 12, 13]


def test_noise_in_training_only_and_from_its_own_generator() -> None:
    model = net()
    plain = copy.deepcopy(model)
    vbi = TurboVBI(model, CHAIN, data_size=100)
    x, _ = batch()
    before = torch.get_rng_state()
    a, b = model(x), model(x)
    assert not torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model[4].parametrizations.weight.original, plain[4].weight)
    model.eval()
    plain.eval()
    plain.load_state_dict({**plain.state_dict(), **{k: v for k, v in model.state_dict().items() if k.startswith("1.")}})
    assert torch.equal(model(x), plain(x))
    assert 0 < vbi.density < 1


def test_noise_has_the_trained_deviation() -> None:
    layer = nn.Linear(200, 200)
    TurboVBI(layer, CHAIN, data_size=100, log_variance=2 * math.log(0.05))
    mean = layer.parametrizations.weight.original
    noise = (layer.weight - mean).detach()
    assert float(noise.std()) == pytest.approx(0.05, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.002)


def test_training_fits_the_data_and_thins_the_support() -> None:
    model = net()
    vbi = TurboVBI(model, CHAIN, data_size=3000, every=10, warmup=50, log_variance=-12.0)
    first = vbi.density
    start = vbi._precision["4"].clone()
    trained(model, vbi, 200)
    x, y = batch()
    model.eval()
    assert float(cross_entropy(model(x), y).detach()) < 1.0
    assert not torch.equal(vbi._precision["4"], start)
    assert 0.01 < vbi.density < 0.6 * first


def test_the_prior_is_learned_layer_by_layer() -> None:
    model = net()
    vbi = TurboVBI(model, CHAIN, data_size=64, every=5, learn=True)
    trained(model, vbi, 20)
    found = list(vbi.priors.values())
    assert len(set(found)) == 3
    assert all(isinstance(p, HMMPrior) and p != CHAIN for p in found)


def test_an_optimizer_that_does_not_know_the_variances_is_told() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    vbi = TurboVBI(model, CHAIN, data_size=64, every=3)
    step = stepper(model, optimizer, vbi)
    for _ in range(2):
        step()
        vbi.step()
    step()
    with pytest.raises(ModelError, match="make the optimizer after TurboVBI"):
        vbi.step()


def test_it_goes_through_the_training_loop(tmp_path: Path) -> None:
    def run(stop: int) -> tuple[nn.Module, TurboVBI]:
        model = net()
        vbi = TurboVBI(model, CHAIN, data_size=64, every=2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        fit(
            model,
            batch(),
            lambda m, b: cross_entropy(m(b[0]), b[1]) + vbi.kl(),
            optimizer,
            scheduler=vbi,
            steps=stop,
            batch_size=8,
            progress=False,
            checkpoint=tmp_path / "at.ckpt",
        )
        return model, vbi

    run(4)
    resumed, vbi = run(9)
    (tmp_path / "at.ckpt").unlink()
    whole, other = run(9)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert torch.equal(vbi.odds["4"], other.odds["4"])


# --- pruning -----------------------------------------------------------------------------------------


def test_prune_gives_a_plain_copy_with_exact_counts() -> None:
    model = net()
    vbi = TurboVBI(model, CHAIN, data_size=3000, every=10)
    trained(model, vbi, 60)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    own = vbi.prune()
    odds = vbi.odds
    for name in own.changed:
        weight, original = (
            own.model.get_submodule(name).weight,
            model.get_submodule(name).parametrizations.weight.original,
        )
        assert torch.equal(weight != 0, odds[name] > 0)
        assert torch.equal(weight[weight != 0], original[weight != 0])
    assert not any(parametrize.is_parametrized(m) for m in own.model.modules())
    assert list(own.model.state_dict()) == list(net().state_dict())
    assert type(own.model[4]) is nn.Linear
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for density in (0.02, 0.3, 1.0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = regularity(vbi.prune(density).model)
        assert found.nonzero == round(density * found.weights)
    assert parametrize.is_parametrized(model[4])  # and can be trained on
    trained(model, vbi, 2)
    again = copy.deepcopy(model)
    assert torch.equal(again.eval()(batch()[0]), model.eval()(batch()[0]))


def test_the_highest_odds_stay() -> None:
    scores = {"a": torch.tensor([[3.0, 1.0, 1.0]]), "b": torch.tensor([[2.0, 1.0, 0.0]])}
    masks = kept(scores, 0.0, 0.5)
    assert masks["a"].tolist() == [[True, True, False]]  # the first of equals
    assert masks["b"].tolist() == [[True, False, False]]
    assert kept(scores, 1.0, None)["b"].tolist() == [[True, False, False]]


def sparse(model: nn.Module, share: float, seed: int = 0) -> nn.Module:
    """Random weights zero, and some neurons cut off before, some behind."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.mul_(torch.rand(module.weight.shape, generator=generator) > share)
                module.weight[1] = 0
                module.weight[:, 2 % module.weight.shape[1]] = 0
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.bias.uniform_(-1, 1)
    return model.eval()


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "perceptron": lambda: (
        nn.Sequential(nn.Linear(9, 12), nn.Sigmoid(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)),
        torch.randn(4, 9),
    ),
    "convolutional": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(5 * 16, 4),
        ),
        torch.randn(3, 2, 8, 8),
    ),
}


@pytest.mark.parametrize("kind", NETS)
def test_dead_neurons_are_removed_without_a_change_of_the_outputs(kind: str) -> None:
    torch.manual_seed(0)
    model, x = NETS[kind]()
    vbi = TurboVBI(sparse(model, 0.5), BernoulliPrior(0.5), data_size=10, b=1.0, b_bar=1e-6, log_variance=-20.0)
    masked = vbi.prune()
    smaller = vbi.prune(example=x)
    torch.testing.assert_close(smaller.model(x), masked.model(x), rtol=0, atol=1e-6)
    other = torch.randn_like(x)
    torch.testing.assert_close(smaller.model(other), masked.model(other), rtol=0, atol=1e-6)
    sizes = [p.numel() for p in masked.model.parameters()], [p.numel() for p in smaller.model.parameters()]
    assert sum(sizes[1]) < sum(sizes[0])
    first = (masked.model[0].weight.shape[0], smaller.model[0].weight.shape[0])
    assert first[0] - first[1] == 2  # one that reads nothing, one that nobody reads
    assert not any(module.training for module in smaller.model.modules())


def test_a_constant_that_cannot_be_moved_keeps_its_neuron() -> None:
    torch.manual_seed(0)
    model = sparse(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1)),
        0.0,
    )
    vbi = TurboVBI(model, BernoulliPrior(0.5), data_size=10, b=1.0, b_bar=1e-6, log_variance=-20.0)
    x = torch.randn(2, 1, 7, 7)
    with torch.no_grad():
        model[0].parametrizations.weight.original[:, 0] = torch.randn(4, 3, 3)
        model[0].parametrizations.weight.original[1] = 0
    vbi.update()
    masked, smaller = vbi.prune(), vbi.prune(example=x)
    torch.testing.assert_close(smaller.model(x), masked.model(x), rtol=0, atol=1e-6)
    assert smaller.model[0].weight.shape[0] == 3  # the one that nobody reads is gone, the one that reads nothing stays
    assert any("read nothing" in why for why in smaller.left.values())


def test_a_model_without_neurons_is_only_masked() -> None:
    layer = nn.Sequential(nn.Linear(6, 2))
    vbi = TurboVBI(layer, CHAIN, data_size=10)
    changes = vbi.prune(0.5, torch.randn(1, 6))
    assert changes.model[0].weight.shape == (2, 6)
    assert without_dead_neurons(changes, torch.randn(1, 6)).model is changes.model


def test_a_layer_that_loses_everything_is_told() -> None:
    model = net()
    vbi = TurboVBI(model, BernoulliPrior(1e-9), data_size=64)
    with pytest.warns(UserWarning, match="4 has lost all its weights"):
        vbi.prune()


def test_it_packs_to_the_bit(tmp_path: Path) -> None:
    model = net().eval()
    vbi = TurboVBI(model, CHAIN, data_size=64)
    packed = pack_sparse(vbi.prune(0.1).model).model
    x, _ = batch()
    assert torch.equal(packed(x), vbi.prune(0.1).model(x))
    lm = llama()
    lm_vbi = TurboVBI(lm, CHAIN, data_size=64)
    pruned = lm_vbi.prune(0.1)
    assert "lm_head" in pruned.changed
    small = pack_sparse(pruned.model).model
    models.save_packed(small, tmp_path / "packed")
    ids = torch.arange(6)[None]
    assert torch.equal(models.load(tmp_path / "packed").module()(ids).logits, small(ids).logits)
    with pytest.raises(ValueError, match="compressed already"):
        TurboVBI(small, CHAIN, data_size=64)


# --- any architecture, and bad input --------------------------------------------------------------------


def vision() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_labels=3,
        )
    )


def gpt() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2))


@pytest.mark.parametrize(
    ("make", "x", "left"),
    [
        (vision, torch.randn(2, 1, 8, 8), {"vit.embeddings"}),
        (gpt, torch.arange(6)[None], {"lm_head", "transformer.wte", "transformer.wpe"}),
        (lambda: llama(tied=True), torch.arange(6)[None], {"lm_head", "model.embed_tokens"}),
    ],
)
@pytest.mark.parametrize("axis", ["in", "both"])
def test_transformers_train_and_prune(make: Callable[[], nn.Module], x: Tensor, left: set[str], axis: str) -> None:
    model = make().train()
    vbi = TurboVBI(model, HMMPrior(0.1, 0.4, axis=axis), data_size=50, every=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        (model(x).logits.square().mean() + vbi.kl()).backward()
        optimizer.step()
        vbi.step()
    changes = vbi.prune(0.3)
    assert set(changes.left) == left
    weighted = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)}
    assert weighted <= set(changes.changed) | left
    assert bool(torch.isfinite(changes.model.eval()(x).logits).all())


def test_rows_are_neurons_in_transposed_weights_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2), nn.Conv1d(4, 4, 1, groups=2), nn.ConvTranspose1d(4, 4, 2, groups=2)
    )
    vbi = TurboVBI(model, GroupPrior(0.5), data_size=10)
    assert set(vbi.left) == {"2"}
    vbi.t = 1
    vbi.update()
    assert vbi._prior["0"].shape == (4, 3, 2, 2)
    assert vbi.odds["0"].shape == (3, 4, 2, 2)
    spread = vbi.support["0"].amax((0, 2, 3)) - vbi.support["0"].amin((0, 2, 3))
    assert bool((spread < 1e-3).all())  # a filter's weights are there together


def test_what_is_left_has_a_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    parametrizations.weight_norm(model[3])
    vbi = TurboVBI(model, CHAIN, data_size=10)
    assert set(vbi.left) == {"0", "1", "2", "3"}
    assert "shared" in vbi.left["0"]
    assert "frozen" in vbi.left["2"]
    assert list(vbi.support) == ["4"]
    attention = TurboVBI(nn.MultiheadAttention(8, 2), CHAIN, data_size=10)
    assert "in_proj_weight" in attention.left[""]
    assert list(attention.support) == ["out_proj"]
    reused = nn.Linear(4, 4)
    assert list(TurboVBI(nn.Sequential(reused, reused), CHAIN, data_size=10).support) == ["0"]
    assert set(TurboVBI(net(), CHAIN, data_size=10, skip=["6"]).left) >= {"6"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data_size": 0}, "number of training examples"),
        ({"every": 0}, "steps between updates"),
        ({"warmup": -1}, "0 or more"),
        ({"rate": 0.0}, r"in \(0, 1\]"),
        ({"posterior": "exact"}, "'joint' or 'factorised'"),
        ({"log_variance": float("nan")}, "finite"),
        ({"a": 0.0}, "positive"),
        ({"b_bar": float("nan")}, "positive"),
        ({"b": 1e-3, "b_bar": 1e-3}, "must exceed"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], said: str) -> None:
    given: dict = {"data_size": 10} | settings
    model = net()
    with pytest.raises(ValueError, match=said):
        TurboVBI(model, CHAIN, **given)
    assert not any(parametrize.is_parametrized(m) for m in model.modules())


def test_bad_models_are_refused() -> None:
    broken = net()
    with torch.no_grad():
        broken[4].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        TurboVBI(broken, CHAIN, data_size=10)
    zeros = nn.Sequential(nn.Linear(3, 3))
    nn.init.zeros_(zeros[0].weight)
    with pytest.raises(ValueError, match="layer of zeros"):
        TurboVBI(zeros, CHAIN, data_size=10)
    with pytest.raises(ModelError, match="no linear map"):
        TurboVBI(nn.Sequential(nn.BatchNorm1d(3)), CHAIN, data_size=10)
    model = net()
    vbi = TurboVBI(model, CHAIN, data_size=10)
    with pytest.raises(ModelError, match="no linear map"):
        TurboVBI(model, CHAIN, data_size=10)  # wrapped already
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        vbi.prune(0.0)
    with torch.no_grad():
        model[4].parametrizations.weight.original[0, 0] = float("inf")
    with pytest.raises(ModelError, match="lower the learning rate"):
        vbi.update()

    class Mine:
        def messages(self, evidence: Tensor) -> Tensor:
            return torch.zeros_like(evidence)

    with pytest.raises(ValueError, match="no method `learned"):
        TurboVBI(net(), Mine(), data_size=10, learn=True)
    assert TurboVBI(net(), Mine(), data_size=10).density > 0


def test_a_state_of_other_weights_is_refused() -> None:
    state = TurboVBI(net(), CHAIN, data_size=10).state_dict()
    other = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="of another training: 0, 4, 6 differ"):
        TurboVBI(other, CHAIN, data_size=10).load_state_dict(state)
    with pytest.raises(ValueError, match="`learn`"):
        TurboVBI(net(), CHAIN, data_size=10, learn=True).load_state_dict(state)


def test_digits_stay_readable_with_few_and_clustered_weights() -> None:
    images = digits()
    x, y = images.train_x.flatten(1), images.train_y
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    optimizer = torch.optim.Adam(start.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        cross_entropy(start(x), y).backward()
        optimizer.step()
    runs = {}
    for name, prior in (("chain", HMMPrior.of(0.05, 3.0)), ("alone", BernoulliPrior(0.05))):
        model = copy.deepcopy(start)
        vbi = TurboVBI(model, prior, data_size=5 * len(x), every=20, warmup=150, alone=200, log_variance=-12.0)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(400):
            optimizer.zero_grad()
            (cross_entropy(model(x), y) + vbi.kl()).backward()
            optimizer.step()
            vbi.step()
        pruned = vbi.prune(0.2).model
        right = (pruned(images.test_x.flatten(1)).argmax(1) == images.test_y).float().mean()
        assert float(right) > 0.85
        runs[name] = regularity(pruned).run
    assert runs["chain"] > 1.3 * runs["alone"]
