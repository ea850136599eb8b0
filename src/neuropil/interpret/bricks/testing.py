r"""Are bricks functional? Whether a function's best neurons crowd into few bricks more than chance allows.

Of a layer's m neurons, N are the best for a function; k_e of them lie in brick e of n_e neurons. Had the bricks nothing
to do with the function, k_e would be hypergeometric, P(k_e) = C(n_e, k_e) C(m - n_e, N - k_e) / C(m, N). With

    t = the smallest number with P(X > t) <= 0.001,        brick e is *functional* if k_e > t.

For a function of several sub-functions their best neurons are counted together, with repetition, and the null is
binomial(N, n_e / m), N the sum over sub-functions. Reported are the share of bricks that are functional ("rejected", as
the hypothesis of chance is) and the degree of modularisation, the mean over those of k_e / (N n_e / m). The control is
the same count for random partitions of the same sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from neuropil.interpret.bricks.functionality import TOP, Functionality
from neuropil.interpret.bricks.partition import Partition

LEVEL = 0.001


def hypergeometric_threshold(neurons: int, size: int, top: int, level: float = LEVEL) -> int:
    """The smallest t with P(X > t) <= level for the number X of `top` drawn neurons that lie in a brick of `size`.

    >>> hypergeometric_threshold(3072, 192, 30)
    7
    """
    return int(np.argmax(stats.hypergeom.sf(np.arange(top + 1), neurons, size, top) <= level))


def binomial_threshold(neurons: int, size: int, top: int, level: float = LEVEL) -> int:
    """The same for neurons drawn with repetition: X is binomial(top, size / neurons)."""
    return int(np.argmax(stats.binom.sf(np.arange(top + 1), top, size / neurons) <= level))


@dataclass(frozen=True)
class BrickTest:
    """By site name: the counts k_e, which bricks are functional, and the same share for random partitions.

    `names` are the functions; `expected` is N n_e / m. `control` is the mean share of functional bricks over random
    partitions.
    """

    names: tuple[str, ...]
    counts: dict[str, Int[Tensor, "functions _"]]
    thresholds: dict[str, Int[Tensor, "functions _"]]
    expected: dict[str, Float[Tensor, "functions _"]]
    control: dict[str, Float[Tensor, " functions"]]

    @property
    def functional(self) -> dict[str, Bool[Tensor, "functions bricks"]]:
        """Whether k_e > t."""
        return {site: counts > self.thresholds[site] for site, counts in self.counts.items()}

    @property
    def rejected(self) -> dict[str, Float[Tensor, " functions"]]:
        """The share of bricks that are functional."""
        return {site: marks.double().mean(1) for site, marks in self.functional.items()}

    @property
    def degree(self) -> dict[str, Float[Tensor, " functions"]]:
        """The mean of k_e / (N n_e / m) over functional bricks; NaN where there is none."""
        found = {}
        for site, marks in self.functional.items():
            times = self.counts[site] / self.expected[site]
            found[site] = (times * marks).sum(1) / marks.sum(1)
        return found

    def functions_of(self, site: str) -> list[str | None]:
        """The function each brick serves: of those it is functional for, the one whose count most exceeds chance."""
        times = torch.where(self.functional[site], self.counts[site] / self.expected[site], -torch.inf)
        best = times.max(0)
        return [
            self.names[row] if value > 0 else None
            for value, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def bricks_of(self, function: str) -> dict[str, Int[Tensor, " bricks"]]:
        """By site, the bricks that are functional for a function. Raises ValueError for an unknown one."""
        if function not in self.names:
            raise ValueError(f"function {function!r}: expected one of {', '.join(self.names)}")
        row = self.names.index(function)
        return {site: marks[row].nonzero()[:, 0] for site, marks in self.functional.items()}


def functional_bricks(
    found: Functionality,
    parts: Partition,
    *,
    share: float = TOP,
    score: str = "predictivity",
    level: float = LEVEL,
    draws: int = 200,
    seed: int = 0,
) -> BrickTest:
    """Test every brick for every function; see the module. `draws` random partitions are the control.

    Raises ValueError where the partition and the scores share no site.
    """
    sites = [site for site in parts.labels if site in found.ap]
    if not sites:
        raise ValueError("the partition and the scores have no site in common; use the same model and layers for both")
    groups = [found.functions.index(name.partition("/")[0]) for name in found.names]
    tops = found.top(share, score)
    counts, thresholds, expected, control = {}, {}, {}, {}
    for number, site in enumerate(sites):
        labels, sizes = parts.labels[site], parts.sizes(site)
        counts[site] = _counts(labels[None], tops[site], groups, len(sizes))[0]
        thresholds[site] = _thresholds(counts[site].sum(1), groups, len(labels), sizes, level)
        expected[site] = counts[site].sum(1)[:, None] * sizes / len(labels)
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        shuffled = torch.rand(draws, len(labels), generator=generator).argsort(1)
        drawn = _counts(labels[shuffled], tops[site], groups, len(sizes))
        control[site] = (drawn > thresholds[site]).double().mean((0, 2))
    return BrickTest(found.functions, counts, thresholds, expected, control)


@dataclass(frozen=True)
class Stability:
    """By site, the correlation of predictivity between two models, neuron by neuron and brick by brick."""

    neurons: dict[str, float]
    bricks: dict[str, float]


def stability(first: Functionality, second: Functionality, parts: Partition) -> Stability:
    """How alike two models of one architecture (two checkpoints of one training, say) use their neurons and bricks.

    In training the bricks are said to settle before the neurons. Correlations are taken over the functions and neurons
    of a site, or over functions and the mean predictivity of its bricks. Raises ValueError for other functions.
    """
    if first.names != second.names:
        raise ValueError(f"two models must be scored on the same functions, not {first.names} and {second.names}")
    neurons, bricks = {}, {}
    for site, labels in parts.labels.items():
        pair = torch.stack([each.predictivity[site] for each in (first, second)])
        means = torch.zeros(*pair.shape[:2], parts.counts[site], dtype=pair.dtype).index_add_(2, labels, pair)
        neurons[site] = float(torch.corrcoef(pair.flatten(1))[0, 1])
        bricks[site] = float(torch.corrcoef((means / parts.sizes(site)).flatten(1))[0, 1])
    return Stability(neurons, bricks)


def _counts(labels: Tensor, top: Tensor, groups: list[int], bricks: int) -> Int[Tensor, "draws functions bricks"]:
    """How many of each function's best neurons lie in each brick, for many labellings at once."""
    where = labels[:, top]  # draws, sub-functions, top
    one = torch.zeros(*where.shape[:2], bricks, dtype=torch.long).scatter_add_(2, where, torch.ones_like(where))
    whole = torch.zeros(len(labels), max(groups) + 1, bricks, dtype=torch.long)
    return whole.index_add_(1, torch.tensor(groups), one)


def _thresholds(totals: Tensor, groups: list[int], neurons: int, sizes: Tensor, level: float) -> Tensor:
    """One a function and brick; there are at most two sizes of brick."""
    found = torch.zeros(len(totals), len(sizes), dtype=torch.long)
    for row, total in enumerate(totals.tolist()):
        rule = hypergeometric_threshold if groups.count(row) == 1 else binomial_threshold
        for size in sizes.unique().tolist():
            found[row, sizes == size] = rule(neurons, size, total, level)
    return found
