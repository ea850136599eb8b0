r"""Priors on which weights there are: independent, in runs along the inputs or across the neurons, in whole groups.

A prior of the support $s \in \{0, 1\}^N$ answers one question. Each weight brings its evidence, the log-odds
$e_n$ that the rest of a model has for "this weight is there"; `messages(evidence)` gives back what the *other*
weights say of it,

$$\mathrm{logit}\, \pi_n = \ln \frac{\sum_{s: s_n = 1} p(s) \prod_{m \ne n} e^{s_m e_m}}
                                    {\sum_{s: s_n = 0} p(s) \prod_{m \ne n} e^{s_m e_m}},$$

so that the posterior log-odds are $e_n + \mathrm{logit}\, \pi_n$. Evidence has the shape of a weight with its
neurons first, `[neurons, inputs, *kernel]`. Any object with such a method is a prior for `TurboVBI`; one with
`learned(evidence)`, a copy with better parameters, can be fitted as well.

>>> import torch
>>> evidence = torch.tensor([[4.0, 4.0, 0.0, 4.0, -4.0, -4.0, 0.0, -4.0]], dtype=torch.float64)
>>> BernoulliPrior(0.2).messages(evidence).round(decimals=2)[0].tolist() == 8 * [-1.39]
True
>>> prior = HMMPrior(p01=0.05, p10=0.2)  # a fifth of the weights, in runs of five
>>> (evidence + prior.messages(evidence))[0, [2, 6]].round(decimals=1).tolist()
[3.2, -4.4]

Chains are summed exactly by the forward-backward recursions, in one number a weight (the log-odds), in float64 and
in time linear in the weights. Two chains through every weight (`axis="both"`) make a grid with loops; rows and
columns then pass each other their messages `sweeps` times (loopy belief propagation), the stationary density
counted once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

CLIP = 30.0  # log-odds beyond this say no more
EDGE = 1e-4  # transition probabilities are learned between this and 1 - this
Evidence = Float[Tensor, "neurons inputs *kernel"]


@runtime_checkable
class Prior(Protocol):
    """What `TurboVBI` needs of a prior of the support."""

    def messages(self, evidence: Evidence) -> Evidence:
        """The log-odds of each weight that the prior and all other weights' evidence give."""
        ...


@dataclass(frozen=True)
class BernoulliPrior:
    """Every weight is there with probability `density`, whatever the others do: plain sparsity."""

    density: float

    def __post_init__(self) -> None:
        _check("BernoulliPrior", density=self.density)

    def messages(self, evidence: Evidence) -> Evidence:
        return torch.full_like(evidence, logit(self.density), dtype=torch.float64)

    def learned(self, evidence: Evidence) -> BernoulliPrior:
        """One step of expectation-maximisation: the mean posterior probability."""
        posterior = torch.sigmoid(evidence.double() + logit(self.density))
        return BernoulliPrior(_inside(float(posterior.mean())))

    def sample(self, neurons: int, inputs: int, generator: torch.Generator | None = None) -> Tensor:
        """A support `[neurons, inputs]` of this prior."""
        return torch.rand(neurons, inputs, generator=generator) < self.density


@dataclass(frozen=True)
class GroupPrior:
    """All weights of a group are there together: `axis="in"` ties what a neuron reads, `"out"` what reads an input.

    For convolutions a group is a filter (`"in"`) or an input channel's kernels (`"out"`).
    """

    density: float
    axis: str = "in"

    def __post_init__(self) -> None:
        _check("GroupPrior", density=self.density)
        if self.axis not in ("in", "out"):
            raise ValueError(f"GroupPrior(axis={self.axis!r}): expected 'in' (of a neuron) or 'out' (of an input)")

    def messages(self, evidence: Evidence) -> Evidence:
        evidence = evidence.double()
        others = self._total(evidence) - evidence
        return (others + logit(self.density)).clamp(-CLIP, CLIP)

    def learned(self, evidence: Evidence) -> GroupPrior:
        """One step of expectation-maximisation: the mean posterior probability of a group."""
        posterior = torch.sigmoid(self._total(evidence.double()) + logit(self.density))
        return replace(self, density=_inside(float(posterior.mean())))

    def sample(self, neurons: int, inputs: int, generator: torch.Generator | None = None) -> Tensor:
        """A support `[neurons, inputs]` of this prior."""
        shape = (neurons, 1) if self.axis == "in" else (1, inputs)
        return (torch.rand(shape, generator=generator) < self.density).expand(neurons, inputs).clone()

    def _total(self, evidence: Tensor) -> Tensor:
        kept = 0 if self.axis == "in" else 1
        return evidence.sum([d for d in range(evidence.dim()) if d != kept], keepdim=True)


@dataclass(frozen=True)
class HMMPrior:
    r"""Weights come in runs: a stationary Markov chain with $p_{01} = P(1|0)$ and $p_{10} = P(0|1)$.

    The density is $p_{01} / (p_{01} + p_{10})$, the mean run of weights $1 / p_{10}$, of zeros $1 / p_{01}$;
    $p_{01} = 1 - p_{10}$ makes the weights independent.

    Parameters
    ----------
    axis: "in", a chain along what each neuron reads; "out", one across the neurons for each input; "both" (grid).
    per_kernel: of convolutions, a chain for each kernel instead of one for the flattened filter (`axis="in"` only).
    sweeps: of rows and columns, for the grid.
    """

    p01: float
    p10: float
    axis: str = "in"
    per_kernel: bool = False
    sweeps: int = 5

    def __post_init__(self) -> None:
        _check("HMMPrior", p01=self.p01, p10=self.p10)
        if self.axis not in ("in", "out", "both"):
            raise ValueError(f"HMMPrior(axis={self.axis!r}): expected 'in', 'out' or 'both'")
        if self.per_kernel and self.axis != "in":
            raise ValueError(f"HMMPrior(axis={self.axis!r}, per_kernel=True): kernels have chains along 'in' alone")
        if self.sweeps < 1:
            raise ValueError(f"HMMPrior(sweeps={self.sweeps}): expected one or more")

    @classmethod
    def of(cls, density: float, run: float, **settings: object) -> HMMPrior:
        """The chain of this density and mean run of weights.

        Raises ValueError where no chain has both (the run of zeros would be shorter than one).

        >>> HMMPrior.of(density=0.2, run=5.0)
        HMMPrior(p01=0.05, p10=0.2, axis='in', per_kernel=False, sweeps=5)
        """
        _check("HMMPrior.of", density=density)
        p01 = density / (1 - density) / run if run > 0 else math.nan
        if not (run > 1 and p01 < 1):
            raise ValueError(
                f"HMMPrior.of(density={density}, run={run}): no chain; the run must exceed "
                f"{max(1.0, density / (1 - density)):g}"
            )
        return cls(p01, 1 / run, **settings)  # type: ignore[arg-type]

    @property
    def density(self) -> float:
        """The share of weights that are there."""
        return self.p01 / (self.p01 + self.p10)

    def messages(self, evidence: Evidence) -> Evidence:
        evidence = evidence.double()
        if self.axis != "both":
            return self._along(evidence, self.axis).clamp(-CLIP, CLIP)
        rows, columns = self._grid(evidence)
        return (rows + columns + logit(self.density)).clamp(-CLIP, CLIP)

    def learned(self, evidence: Evidence) -> HMMPrior:
        """One step of expectation-maximisation for p01 and p10: expected changes over expected places to change.

        Of a grid, over its rows and columns, each seeing the other's messages. The first place of a chain, whose
        distribution follows from both, is left out of the step, as is usual.
        """
        evidence = evidence.double()
        if self.axis == "both":
            rows, columns = self._grid(evidence)
            seen = [(evidence + columns, "in"), (evidence + rows, "out")]
        else:
            seen = [(evidence, self.axis)]
        counts = sum(pairs(self._chains(e, axis), self.p01, self.p10) for e, axis in seen)
        assert isinstance(counts, Tensor)
        (stay0, up), (down, stay1) = counts.tolist()
        p01, p10 = up / max(up + stay0, 1e-12), down / max(down + stay1, 1e-12)
        return replace(self, p01=_inside(p01), p10=_inside(p10))

    def sample(self, neurons: int, inputs: int, generator: torch.Generator | None = None) -> Tensor:
        """A support `[neurons, inputs]` of the chain along "in" or "out" (a grid has no direct sampler: ValueError)."""
        if self.axis == "both":
            raise ValueError("HMMPrior.sample: a grid of chains cannot be sampled in one pass; take axis 'in' or 'out'")
        chains, length = (neurons, inputs) if self.axis == "in" else (inputs, neurons)
        uniform = torch.rand(length, chains, generator=generator)
        states = [uniform[0] < self.density]
        for u in uniform[1:]:
            states.append(torch.where(states[-1], u >= self.p10, u < self.p01))
        drawn = torch.stack(states, dim=1)
        return drawn if self.axis == "in" else drawn.T.contiguous()

    def _grid(self, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """What its row and what its column add to the stationary log-odds of each weight."""
        base = logit(self.density)
        rows = columns = torch.zeros_like(evidence)
        for _ in range(self.sweeps):
            rows = (self._along(evidence + columns, "in") - base).clamp(-CLIP, CLIP)
            columns = (self._along(evidence + rows, "out") - base).clamp(-CLIP, CLIP)
        return rows, columns

    def _chains(self, evidence: Tensor, axis: str) -> Float[Tensor, "chains length"]:
        if axis == "out":
            return evidence.flatten(1).T
        return evidence.flatten(0, 1).flatten(1) if self.per_kernel and evidence.dim() > 2 else evidence.flatten(1)

    def _along(self, evidence: Tensor, axis: str) -> Tensor:
        message = chain_messages(self._chains(evidence, axis), self.p01, self.p10)
        return (message.T if axis == "out" else message).reshape(evidence.shape)


# ---------------------------------------------------------------------------------------------------- one chain


def chain_messages(evidence: Float[Tensor, "chains length"], p01: float, p10: float) -> Float[Tensor, "chains length"]:
    """Log-odds of every place of a stationary two-state chain, given the evidence at all other places of it."""
    before, after = _passes(evidence, p01, p10)
    return before + after


def pairs(evidence: Float[Tensor, "chains length"], p01: float, p10: float) -> Float[Tensor, "from_ to"]:
    """Expected number of neighbours in each pair of states, over all chains: `[[00, 01], [10, 11]]`."""
    before, after = _passes(evidence, p01, p10)
    here, there = (before + evidence)[:, :-1], (after + evidence)[:, 1:]
    joint = torch.stack(
        [
            torch.full_like(here, math.log1p(-p01)),
            there + math.log(p01),
            here + math.log(p10),
            here + there + math.log1p(-p10),
        ]
    )
    return torch.softmax(joint, dim=0).sum((1, 2)).reshape(2, 2)


def _passes(evidence: Tensor, p01: float, p10: float) -> tuple[Tensor, Tensor]:
    """What the past and what the future say of each place, as log-odds `[chains, length]`."""
    stay1, up, down, stay0 = (math.log(p) for p in (1 - p10, p01, p10, 1 - p01))
    along = evidence.double().T.contiguous()
    before, after = torch.empty_like(along), torch.empty_like(along)
    up_, down_, stay0_ = (torch.full_like(along[:1], v)[0] for v in (up, down, stay0))
    message = torch.full_like(along[0], logit(p01 / (p01 + p10)))
    for place, here in enumerate(along):
        before[place] = message
        seen = message + here
        message = torch.logaddexp(seen + stay1, up_) - torch.logaddexp(seen + down, stay0_)
    message = torch.zeros_like(along[0])
    for place in range(len(along) - 1, -1, -1):
        after[place] = message
        seen = message + along[place]
        message = torch.logaddexp(seen + stay1, down_) - torch.logaddexp(seen + up, stay0_)
    return before.T, after.T


def logit(p: float) -> float:
    """The log-odds of a probability."""
    return math.log(p) - math.log1p(-p)


def _inside(p: float) -> float:
    return min(max(p, EDGE), 1 - EDGE)


def _check(owner: str, **probabilities: float) -> None:
    for name, p in probabilities.items():
        if not 0 < p < 1:
            raise ValueError(f"{owner}({name}={p}): expected a probability strictly between 0 and 1")
