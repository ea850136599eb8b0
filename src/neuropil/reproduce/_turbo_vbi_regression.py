"""The support of sparse linear regressions, found with and without a Markov prior; weights with full covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from neuropil.compress._layered import Gammas, joint_evidence, joint_precision
from neuropil.compress.support import HMMPrior, Prior

WEIGHTS, EXAMPLES, NOISE = 120, 60, 0.05
TRUTH = HMMPrior.of(0.2, run=1 / 0.15)
GAMMAS = Gammas(1.0, 0.3, 1.0, 1e-3)
ROUNDS, ALONE, RATE = 100, 20, 0.3  # turbo iterations, how many of them without messages, damping of these


def problems(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Designs `[count, examples, weights]`, true weights and targets: Gaussian weights on a support of the chain."""
    x = torch.randn(count, EXAMPLES, WEIGHTS, generator=generator, dtype=torch.float64)
    support = TRUTH.sample(count, WEIGHTS, generator)
    w = torch.randn(count, WEIGHTS, generator=generator, dtype=torch.float64) * support
    noise = torch.randn(count, EXAMPLES, generator=generator, dtype=torch.float64)
    return x, w, (x @ w[..., None])[..., 0] + NOISE * noise


def solved(x: Tensor, y: Tensor, prior: Prior | None) -> tuple[Tensor, Tensor]:
    """Posterior means and q(s = 1) by the turbo iteration; without a prior, every weight is there."""
    gram, seen = x.mT @ x / NOISE**2, (x.mT @ y[..., None])[..., 0] / NOISE**2
    support = torch.ones_like(seen)
    precision = torch.full_like(seen, GAMMAS.a / GAMMAS.b)
    messages = prior.messages(torch.zeros_like(seen)) if prior is not None else None
    for number in range(ROUNDS if prior is not None else 1):
        covariance = torch.linalg.inv(gram + torch.diag_embed(precision))
        mean = (covariance @ seen[..., None])[..., 0]
        square = mean.square() + covariance.diagonal(dim1=-2, dim2=-1)
        if prior is not None and messages is not None:
            evidence = joint_evidence(square, GAMMAS)
            if number >= ALONE:
                messages = messages.lerp(prior.messages(evidence), RATE)
            support = torch.sigmoid(evidence + messages)
        precision = joint_precision(square, support, GAMMAS)
    return mean, support


def f1(found: Tensor, truth: Tensor) -> Tensor:
    """Of each problem's support."""
    hits = (found & truth).sum(1)
    return 2 * hits / (found.sum(1) + truth.sum(1)).clamp_min(1)


def error(mean: Tensor, truth: Tensor) -> Tensor:
    """Squared error of each problem's weights by their squared norm."""
    return (mean - truth).square().sum(1) / truth.square().sum(1).clamp_min(1e-12)
