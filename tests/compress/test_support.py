"""Priors of the support against enumeration of all patterns, and what their parameters mean."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from neuropil.compress.support import (
    BernoulliPrior,
    GroupPrior,
    HMMPrior,
    Prior,
    chain_messages,
    logit,
    pairs,
)

DOUBLE = torch.float64


def evidence(*shape: int, seed: int = 0, size: float = 2.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def chain_log(s: Tensor, p01: float, p10: float) -> Tensor:
    """ln p(s) of chains along the last dimension."""
    start = torch.tensor([p10, p01], dtype=DOUBLE) / (p01 + p10)
    change = torch.tensor([[1 - p01, p01], [p10, 1 - p10]], dtype=DOUBLE)
    state = s.long()
    return start[state[..., 0]].log() + change[state[..., :-1], state[..., 1:]].log().sum(-1)


def patterns(n: int) -> Tensor:
    return torch.tensor(list(itertools.product((False, True), repeat=n)))


def left_out(log_prior: Tensor, s: Tensor, e: Tensor) -> Tensor:
    """By enumeration: the log-odds of each place given the evidence at all others."""
    out = []
    for n in range(s.shape[1]):
        others = e.clone()
        others[n] = 0
        score = log_prior + (s * others).sum(1)
        out.append(torch.logsumexp(score[s[:, n]], 0) - torch.logsumexp(score[~s[:, n]], 0))
    return torch.stack(out)


@pytest.mark.parametrize(("p01", "p10"), [(0.05, 0.2), (0.6, 0.3), (0.9, 0.95), (1e-3, 0.5)])
def test_a_chain_is_summed_as_by_enumeration(p01: float, p10: float) -> None:
    s, e = patterns(6), evidence(6)
    expected = left_out(chain_log(s, p01, p10), s, e)
    torch.testing.assert_close(chain_messages(e[None], p01, p10)[0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(HMMPrior(p01, p10).messages(e[None])[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p01", [0.05, 0.5, 0.9])
def test_independent_weights_say_nothing_of_each_other(p01: float) -> None:
    e = evidence(4, 9)
    for prior in (HMMPrior(p01, 1 - p01), HMMPrior(p01, 1 - p01, axis="both"), BernoulliPrior(p01)):
        torch.testing.assert_close(prior.messages(e), torch.full_like(e, logit(p01)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("axis", ["in", "out", "both"])
def test_without_evidence_the_marginals_are_the_density(axis: str) -> None:
    prior = HMMPrior(0.05, 0.2, axis=axis)
    nothing = torch.zeros(5, 7, dtype=DOUBLE)
    torch.testing.assert_close(
        prior.messages(nothing).sigmoid(), torch.full_like(nothing, prior.density), rtol=0, atol=1e-12
    )


def test_a_chain_read_backwards_is_the_same() -> None:
    e = evidence(3, 20)
    prior = HMMPrior(0.1, 0.3)
    torch.testing.assert_close(prior.messages(e.flip(1)).flip(1), prior.messages(e), rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", [-0.5, 0.5])
def test_a_chain_that_never_changes_is_one_group(level: float) -> None:
    e = torch.full((1, 6), level, dtype=DOUBLE)
    sticky = HMMPrior(1e-12, 1e-12).messages(e)
    torch.testing.assert_close(sticky + e, torch.full_like(e, 6 * level), rtol=0, atol=1e-9)
    torch.testing.assert_close(sticky, GroupPrior(0.5).messages(e), rtol=0, atol=1e-9)


def test_groups_are_summed_as_by_enumeration() -> None:
    e = evidence(3, 5)
    s = torch.stack([torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)])
    log_prior = torch.tensor([math.log(0.7), math.log(0.3)], dtype=DOUBLE)
    expected = torch.stack([(e[i].sum() - e[i]) + log_prior[1] - log_prior[0] for i in range(3)])
    torch.testing.assert_close(GroupPrior(0.3).messages(e), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(GroupPrior(0.3, "out").messages(e.T).T, expected, rtol=0, atol=1e-12)
    assert s.shape == (2, 5)


def test_a_grid_of_one_row_or_one_column_is_a_chain() -> None:
    e = evidence(1, 12)
    both, along = HMMPrior(0.05, 0.2, axis="both"), HMMPrior(0.05, 0.2)
    torch.testing.assert_close(both.messages(e), along.messages(e), rtol=0, atol=1e-12)
    torch.testing.assert_close(both.messages(e.T), along.messages(e).T, rtol=0, atol=1e-12)


def test_a_small_grid_is_near_its_enumeration() -> None:
    p01, p10 = 0.2, 0.5
    s, e = patterns(9), evidence(3, 3, size=1.0)
    grid = s.reshape(-1, 3, 3)
    density = p01 / (p01 + p10)
    single = torch.tensor([1 - density, density], dtype=DOUBLE)[grid.long()].log().sum((1, 2))
    log_prior = chain_log(grid, p01, p10).sum(1) + chain_log(grid.mT, p01, p10).sum(1) - single
    exact = left_out(log_prior, s, e.flatten()).reshape(3, 3)
    loopy = HMMPrior(p01, p10, axis="both", sweeps=50).messages(e)
    apart = (loopy.sigmoid() - exact.sigmoid()).abs().max()
    alone = (logit(density) - exact).abs().max()
    assert apart < 0.02  # loops of four, weakly coupled
    assert alone > 0.3


def test_across_the_neurons_is_along_the_inputs_of_the_transpose() -> None:
    e = evidence(5, 8)
    torch.testing.assert_close(
        HMMPrior(0.1, 0.2, axis="out").messages(e), HMMPrior(0.1, 0.2).messages(e.T.contiguous()).T
    )


def test_chains_of_a_convolution() -> None:
    e = evidence(4, 3, 2, 2)
    prior = HMMPrior(0.1, 0.2)
    torch.testing.assert_close(prior.messages(e), prior.messages(e.flatten(1)).reshape(e.shape))
    kernels = HMMPrior(0.1, 0.2, per_kernel=True)
    torch.testing.assert_close(kernels.messages(e), prior.messages(e.reshape(12, 4)).reshape(e.shape))
    torch.testing.assert_close(kernels.messages(e[..., 0, 0]), prior.messages(e[..., 0, 0]))
    down = HMMPrior(0.1, 0.2, axis="out")
    torch.testing.assert_close(down.messages(e), down.messages(e.flatten(1)).reshape(e.shape))


def test_samples_have_the_density_and_the_runs() -> None:
    prior = HMMPrior(0.05, 0.2)
    s = prior.sample(1, 100_000, torch.Generator().manual_seed(0))[0]
    assert float(s.double().mean()) == pytest.approx(prior.density, abs=0.01)
    starts = int((s[1:] & ~s[:-1]).sum()) + int(s[0])
    assert int(s.sum()) / starts == pytest.approx(1 / 0.2, rel=0.05)
    assert HMMPrior(0.05, 0.2, axis="out").sample(7, 3).shape == (7, 3)
    assert BernoulliPrior(0.3).sample(4, 2).shape == (4, 2)
    tied = GroupPrior(0.5, "out").sample(40, 30, torch.Generator().manual_seed(0))
    assert bool((tied == tied[0]).all())
    assert 5 < int(tied[0].sum()) < 25


def test_expected_pairs_are_those_of_enumeration() -> None:
    s, e = patterns(6), evidence(6)
    weight = torch.softmax(chain_log(s, 0.1, 0.3) + (s * e).sum(1), 0)
    for i, j in itertools.product((0, 1), repeat=2):
        count = ((s[:, :-1] == bool(i)) & (s[:, 1:] == bool(j))).sum(1)
        assert float(pairs(e[None], 0.1, 0.3)[i, j]) == pytest.approx(float((weight * count).sum()), abs=1e-12)


@pytest.mark.parametrize(("axis", "truth"), [("in", (0.05, 0.2)), ("out", (0.1, 0.4))])
def test_the_parameters_are_learned_from_evidence(axis: str, truth: tuple[float, float]) -> None:
    drawn = HMMPrior(*truth, axis=axis).sample(200, 200, torch.Generator().manual_seed(1))
    e = torch.where(drawn, 3.0, -3.0).double() + evidence(200, 200, size=math.sqrt(6))  # as log-odds vary
    prior = HMMPrior(0.3, 0.3, axis=axis)
    for _ in range(20):
        prior = prior.learned(e)
    assert (prior.p01, prior.p10) == pytest.approx(truth, rel=0.15)


def test_learning_does_not_lower_the_likelihood_of_a_long_chain() -> None:
    e, prior = evidence(1, 400), HMMPrior(0.3, 0.3)

    def likelihood(p: HMMPrior) -> float:
        """ln of sum_s p(s) exp(s e), by the chain rule of leave-out messages on growing chains."""
        total = 0.0
        message = logit(p.density)
        for x in e[0].tolist():
            q = 1 / (1 + math.exp(-message))
            total += math.log(q * math.exp(x) + 1 - q)
            seen = 1 / (1 + math.exp(-(message + x)))
            ahead = seen * (1 - p.p10) + (1 - seen) * p.p01
            message = logit(ahead)
        return total

    values = [likelihood(prior)]
    for _ in range(15):
        prior = prior.learned(e)
        values.append(likelihood(prior))
    assert all(b > a - 1e-3 for a, b in itertools.pairwise(values))  # the first place of the chain is left out
    assert values[-1] > values[0] + 0.1


def test_other_priors_learn_their_density() -> None:
    drawn = BernoulliPrior(0.2).sample(100, 100, torch.Generator().manual_seed(0))
    e = torch.where(drawn, 4.0, -4.0).double()
    plain, grouped, grid = BernoulliPrior(0.5), GroupPrior(0.5), HMMPrior(0.3, 0.3, axis="both")
    rows = torch.where(GroupPrior(0.25).sample(400, 5, torch.Generator().manual_seed(0)), 4.0, -4.0).double()
    for _ in range(10):
        plain, grouped, grid = plain.learned(e), grouped.learned(rows), grid.learned(e)
    assert plain.density == pytest.approx(0.2, abs=0.02)
    assert grouped.density == pytest.approx(0.25, abs=0.06)
    assert grid.density == pytest.approx(0.2, abs=0.05)
    assert grid.p10 > 0.6  # no runs in there


def test_any_object_with_messages_is_a_prior() -> None:
    class Mine:
        def messages(self, evidence: Tensor) -> Tensor:
            return torch.zeros_like(evidence)

    assert isinstance(Mine(), Prior)
    assert not isinstance(object(), Prior)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_probabilities_are_inside(p: float) -> None:
    for make in (BernoulliPrior, GroupPrior, lambda p: HMMPrior(p, 0.5), lambda p: HMMPrior(0.5, p)):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            make(p)


def test_other_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 'in', 'out' or 'both'"):
        HMMPrior(0.1, 0.1, axis="rows")
    with pytest.raises(ValueError, match=r"expected 'in' \(of a neuron\)"):
        GroupPrior(0.1, axis="both")
    with pytest.raises(ValueError, match="along 'in' alone"):
        HMMPrior(0.1, 0.1, axis="out", per_kernel=True)
    with pytest.raises(ValueError, match="one or more"):
        HMMPrior(0.1, 0.1, sweeps=0)
    with pytest.raises(ValueError, match="must exceed 4"):
        HMMPrior.of(0.8, run=3.0)
    with pytest.raises(ValueError, match="must exceed 1"):
        HMMPrior.of(0.2, run=0.0)
    with pytest.raises(ValueError, match="cannot be sampled"):
        HMMPrior(0.1, 0.1, axis="both").sample(2, 2)
