"""Sparse and group variational dropout: the divergences against integrals, groups, pruning, resuming."""

import copy
import math

import pytest
import torch
from contracts import equal
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from neuropil.compress import regularity
from neuropil.compress.variational_dropout import THRESHOLD, VariationalDropout


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 4))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 1, 6, 6, generator=generator), torch.randint(4, (12,), generator=generator)


def steps(model: nn.Module, dropout: VariationalDropout, optimizer: torch.optim.Optimizer, count: int) -> None:
    x, y = data()
    for _ in range(count):
        optimizer.zero_grad()
        (cross_entropy(model(x), y) + dropout.kl()).backward()
        optimizer.step()
        dropout.step()


def exact(alpha: float) -> float:
    """KL(N(1, alpha) || log-uniform) up to a constant: E[ln |w|] - entropy, by quadrature."""
    deviation = math.sqrt(alpha)
    tail = torch.logspace(-14, math.log10(1 + 12 * deviation), 400_001, dtype=torch.float64)
    normal = Normal(1.0, deviation)
    density = normal.log_prob(tail).exp() + normal.log_prob(-tail).exp()
    mean_log = torch.trapezoid(density * tail.log() * tail, tail.log())
    return float(mean_log) - float(normal.entropy())


def test_the_divergence_from_the_log_uniform_prior() -> None:
    layer = nn.Linear(1, 1, bias=False)
    dropout = VariationalDropout(layer, data_size=1)
    found, wanted = [], []
    for log_alpha in (-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0):
        with torch.no_grad():
            layer.parametrizations.weight.original.fill_(0.7)
            layer.parametrizations.weight[0].log_variance.fill_(log_alpha + 2 * math.log(0.7))
        found.append(float(dropout.kl().detach()))
        wanted.append(exact(math.exp(log_alpha)))
    apart = [f - w for f, w in zip(found, wanted, strict=True)]
    assert max(apart) - min(apart) < 0.03  # a constant, to the accuracy of the papers' fit
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("group", ["in", "out"])
def test_a_group_shares_its_scale(group: str) -> None:
    model = net()
    dropout = VariationalDropout(model, data_size=1, group=group)
    alpha = dropout.log_alpha
    with torch.no_grad():
        model[3].parametrizations.weight[0].scale.normal_()
        model[3].parametrizations.weight[0].scale_log_variance.normal_()
    alpha = dropout.log_alpha["3"]
    assert bool((alpha == (alpha[:1] if group == "in" else alpha[:, :1])).all())
    held = model[3].parametrizations.weight[0]
    original = model[3].parametrizations.weight.original
    deviation = (0.5 * held.log_variance).exp()
    divergence = kl_divergence(Normal(original, deviation), Normal(0.0, 1.0)).sum()
    scale = VariationalDropout(nn.Linear(held.scale.numel(), 1, bias=False), data_size=1)
    with torch.no_grad():
        scale._layers[0].original.copy_(held.scale.reshape(1, -1))
        scale._layers[0].gaussian.log_variance.copy_(held.scale_log_variance.reshape(1, -1))
    found = dropout._divergence(dropout._layers[1])
    assert float(found.detach()) == pytest.approx(float((divergence + scale.kl()).detach()), rel=1e-5)
    model.eval()
    torch.testing.assert_close(model[3].weight, held.scale * original)


def test_grouped_noise_has_its_variance() -> None:
    layer = nn.Linear(4, 3)
    VariationalDropout(layer, data_size=1, group="in", log_variance=2 * math.log(0.1))
    drawn = torch.stack([layer.weight.detach() for _ in range(20_000)])
    mean = layer.parametrizations.weight.original.detach()
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.01)
    variance = 0.01 * mean**2 + 0.01 + 0.01 * 0.01  # of z v with z ~ N(1, 0.01), v ~ N(mean, 0.01)
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.06, atol=0)


@pytest.mark.parametrize("group", [None, "in", "out"])
def test_it_prunes_and_resumes_to_the_bit(group: str | None) -> None:
    def made(seed: int) -> tuple[nn.Module, VariationalDropout, torch.optim.Optimizer]:
        model = net(seed)
        dropout = VariationalDropout(model, data_size=50, group=group, warmup=3, seed=seed)
        return model, dropout, torch.optim.Adam(model.parameters(), lr=0.01)

    whole = made(0)
    steps(*whole, 8)
    half = made(0)
    steps(*half, 3)
    states = copy.deepcopy([part.state_dict() for part in half])
    resumed = made(1)
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    steps(*resumed, 5)
    assert equal([p.state_dict() for p in resumed], [p.state_dict() for p in whole])
    model, dropout, _ = whole
    pruned = dropout.prune()
    for name, weight in dropout.log_alpha.items():
        assert torch.equal(pruned.model.get_submodule(name).weight != 0, weight < THRESHOLD)
    found = regularity(dropout.prune(0.25).model)
    assert found.nonzero == round(0.25 * found.weights)
    x, _ = data()
    torch.testing.assert_close(dropout.prune(1.0).model.eval()(x), model.eval()(x))
    assert not any(parametrize.is_parametrized(m) for m in pruned.model.modules())


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="expected None, 'in' or 'out'"):
        VariationalDropout(net(), data_size=1, group="rows")
    with pytest.raises(ValueError, match="number of training examples"):
        VariationalDropout(net(), data_size=0)
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        VariationalDropout(net(), data_size=1).prune(1.5)
