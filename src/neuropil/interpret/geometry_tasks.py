r"""Tasks whose inputs and labels have a geometry that is chosen.

A `Task` is n conditions: their mean inputs `[n, d]`, their binary labels `[n, k]`, and the standard deviation of the
noise around the means. The question that they are made for is how well inputs and labels agree beforehand:

    Kx = X X^T,  Ky = Y Y^T (labels ±1),      A(Kx, Ky) = <Kx, Ky> / (||Kx|| ||Ky||), both centred

`aligned` makes tasks of any such alignment: the labels are k columns h_j of a Hadamard matrix, the inputs have the
kernel $\sum_j \pi_j h_j h_j^T$ over all n - 1 columns, and then A is the cosine between $\pi$ and the indicator of
the labels. At $\sqrt{k/(n-1)}$ all conditions are equally far apart: inputs without structure.

>>> task = aligned(8, 1, 0.2, seed=0)
>>> task.means.shape, task.labels.shape, round(task.alignment, 6)
((8, 100), (8, 1), 0.2)
>>> x, y, condition = task.sample(512, seed=1)
>>> tuple(x.shape), tuple(y.shape), condition.unique().tolist()
((512, 100), (512, 1), [0, 1, 2, 3, 4, 5, 6, 7])

The norm of a mean is $\sqrt d$ on average, one unit a dimension, except in `epsilon_xor`, which is the paper's.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.linalg import helmert
from scipy.optimize import brentq
from torch import Tensor

from neuropil.interpret.geometry_metrics import alignment, centred, kernel_alignment


@dataclass(frozen=True, eq=False)
class Task:
    """Conditions with mean inputs, binary labels (False and True), and noise around the means."""

    name: str
    means: Float[np.ndarray, "n d"]
    labels: Bool[np.ndarray, "n k"]
    noise: float = 0.0

    def __post_init__(self) -> None:
        if len(self.means) != len(self.labels):
            raise ValueError(f"{len(self.means)} conditions with labels for {len(self.labels)}; expected one for each")
        if self.noise < 0:
            raise ValueError(f"noise {self.noise}; expected a standard deviation, 0 or more")

    @property
    def signs(self) -> Float[np.ndarray, "n k"]:
        """The labels as ±1."""
        return np.where(self.labels, 1.0, -1.0)

    @property
    def alignment(self) -> float:
        """How well the mean inputs agree with the labels before anything is learned."""
        return alignment(self.means, self.signs)

    def sample(
        self, count: int, seed: int = 0, noise: float | None = None
    ) -> tuple[Float[Tensor, "count d"], Float[Tensor, "count k"], Int[Tensor, " count"]]:
        """Inputs, labels (0 and 1) and conditions; each condition as often as the others, as far as `count` allows."""
        generator = torch.Generator().manual_seed(seed)
        condition = torch.arange(count) % len(self.means)
        spread = self.noise if noise is None else noise
        x = torch.from_numpy(self.means).float()[condition]
        x = x + spread * torch.randn(x.shape, generator=generator)
        return x, torch.from_numpy(self.labels).float()[condition], condition


def unstructured(n: int = 4, dim: int = 100, noise: float = 0.3, seed: int = 0, exact: bool = False) -> Task:
    """Random patterns, nearly orthogonal, and one balanced dichotomy as the label (the paper's first figure).

    `exact` makes them equally far apart to the last digit (a regular simplex, turned at random).
    """
    _even(n)
    rng = np.random.default_rng(seed)
    if exact:
        _fits(n - 1, dim)
        means = math.sqrt(dim * n / (n - 1)) * helmert(n).T @ _directions(n - 1, dim, rng)
    else:
        means = rng.standard_normal((n, dim))
        means -= means.mean(0)
    labels = np.zeros((n, 1), dtype=bool)
    labels[rng.permutation(n)[: n // 2]] = True
    return Task("unstructured", means, labels, noise)


def epsilon_xor(eps: float, dim: int = 120, noise: float = 0.1, seed: int = 0) -> Task:
    r"""The XOR of two bits, linearly separable in so far as `eps` is above 0 (the paper's graded task).

    $x = (2 b_1 - 1) m_1 + (2 b_2 - 1) m_2 + \epsilon (2\,xor - 1) m_3$, each $m$ in its own third of the dimensions,
    with entries |N(0, 1)| and norm $\sqrt{d/9}$. With eps = 0 inputs are a square, with 1 a regular tetrahedron.
    `dim` is a multiple of 3.
    """
    if dim < 3 or dim % 3:
        raise ValueError(f"dim {dim}; expected a multiple of 3, one third for each of the three directions")
    if not math.isfinite(eps) or eps < 0:
        raise ValueError(f"eps {eps}; expected 0 (not separable) to 1 (unstructured), or more")
    block = dim // 3
    rng = np.random.default_rng(seed)
    bits = np.array(list(itertools.product((0, 1), repeat=2)))
    xor = bits[:, 0] ^ bits[:, 1]
    weights = np.stack([2 * bits[:, 0] - 1, 2 * bits[:, 1] - 1, eps * (2 * xor - 1)], axis=1)
    directions = np.abs(rng.standard_normal((3, block)))
    directions *= math.sqrt(block / 3) / np.linalg.norm(directions, axis=1, keepdims=True)
    means = (weights[:, :, None] * directions).reshape(4, dim)
    return Task(f"XOR, eps {eps:g}", means, xor[:, None].astype(bool), noise)


def walsh(bits: int) -> Float[np.ndarray, "n m"]:
    """The 2^bits - 1 nontrivial Walsh functions of all patterns of `bits` bits, as columns of ±1.

    Products of fewer bits come first: the bits themselves, then their pairwise XORs, and so on.

    >>> walsh(2).astype(int)
    array([[ 1,  1,  1],
           [ 1, -1, -1],
           [-1,  1, -1],
           [-1, -1,  1]])
    """
    signs = 1.0 - 2.0 * np.array(list(itertools.product((0, 1), repeat=bits)))
    subsets = itertools.chain.from_iterable(itertools.combinations(range(bits), r) for r in range(1, bits + 1))
    return np.stack([signs[:, list(subset)].prod(1) for subset in subsets], axis=1)


def spectrum(
    n: int, k: int, alignment: float, concentration: float | None = None, seed: int = 0
) -> Float[np.ndarray, " m"]:
    r"""The weights $\pi$ of the n - 1 Walsh functions, on the simplex, with cosine `alignment` to the first k.

    Without `concentration` they are the most even: all labels alike and all others alike. With it the others are
    drawn from a Dirichlet distribution of that concentration, from a few that dominate (0.1) to nearly even (100).
    """
    bits = _bits(n)
    if not 1 <= k < n - 1:
        raise ValueError(f"{k} labels of {n} conditions; expected 1 to {n - 2} (the paper: 1 or {bits})")
    if not 0 <= alignment <= 1:
        raise ValueError(f"alignment {alignment}; expected 0 to 1 (unstructured inputs: {math.sqrt(k / (n - 1)):.4f})")
    rest = np.ones(n - 1 - k)
    if concentration is not None:
        if concentration <= 0:
            raise ValueError(f"concentration {concentration}; expected a number above 0")
        rest = np.random.default_rng(seed).dirichlet(np.full(n - 1 - k, concentration))
    pi = np.concatenate(
        [
            np.full(k, alignment / math.sqrt(k)),
            math.sqrt(max(0.0, 1 - alignment**2)) * rest / np.linalg.norm(rest),
        ]
    )
    return pi / pi.sum()


def aligned(
    n: int,
    k: int,
    alignment: float,
    dim: int = 100,
    noise: float = 1.0,
    concentration: float | None = None,
    seed: int = 0,
) -> Task:
    """n = 2^bits conditions with k labels, and inputs whose alignment with the labels is `alignment`, exactly.

    k = 1 gives labels of one dimension, k = log2 n of as many as the conditions have bits. Up to sqrt(k / (n - 1))
    the inputs are "unstructured or worse", the paper's range. Raises ValueError for an n that is no power of 2, an
    alignment outside [0, 1], or fewer dimensions than n - 1.
    """
    pi = spectrum(n, k, alignment, concentration, seed)
    _fits(n - 1, dim)
    h = walsh(_bits(n))
    # Seeded apart from the weights, so that tasks of several alignments share their directions.
    turned = _directions(n - 1, dim, np.random.default_rng([seed, 1]))
    means = math.sqrt(dim) * (h * np.sqrt(pi)) @ turned
    return Task(f"aligned {alignment:g}, {n} conditions, {k} labels", means, h[:, :k] > 0, noise)


def random_kernel(
    labels: Float[np.ndarray, "n k"], alignment: float, rank: int | None = None, seed: int = 0
) -> Float[np.ndarray, "n n"]:
    """A random positive semidefinite kernel of the items, centred, with this alignment to labels of ±1.

    It begins as the kernel of `rank` random features. To raise the alignment the labels' own kernel is added; to
    lower it, the part of the features in the span of the labels shrinks. `rank` is that of the features, so that
    the labels may add k to it.
    """
    n, k = labels.shape
    if not 0 <= alignment <= 1:
        raise ValueError(f"alignment {alignment}; expected 0 to 1")
    rank = n if rank is None else rank
    if not k < rank <= n:
        raise ValueError(f"rank {rank}; expected more than the {k} labels, and at most the {n} items")
    target = centred(labels @ labels.T)
    basis = np.linalg.svd(labels - labels.mean(0), full_matrices=False)[0][:, : np.linalg.matrix_rank(target)]
    z = np.random.default_rng(seed).standard_normal((n, rank))
    z -= z.mean(0)
    own = basis @ (basis.T @ z)

    def at(t: float) -> Float[np.ndarray, "n n"]:
        if t <= 0:  # from no part in the span of the labels (-1) to the whole (0)
            part = z + t * own
            return part @ part.T
        share = math.sin(t * math.pi / 2)  # from the features alone (0) to the labels alone (1)
        K = z @ z.T
        return (1 - share) * K / np.linalg.norm(K) + share * target / np.linalg.norm(target)

    def miss(t: float) -> float:
        return kernel_alignment(at(t), target) - alignment

    # The ends are known, and the bracket must not be asked for what it holds at an end.
    t = 2 * alignment - 1 if alignment in (0.0, 1.0) else float(brentq(miss, -1.0, 1.0, xtol=1e-14))
    found = at(t)
    return found * n / np.trace(found)


def from_kernel(
    K: Float[np.ndarray, "n n"], labels: Bool[np.ndarray, "n k"], dim: int = 100, noise: float = 1.0, seed: int = 0
) -> Task:
    """The task whose mean inputs have this kernel (of trace n; norms are then those of `aligned`)."""
    values, vectors = np.linalg.eigh(K)
    if values.min() < -1e-8 * abs(values).max():
        raise ValueError(f"a kernel with the eigenvalue {values.min():.3g}; expected none below 0")
    kept = values > 1e-12 * values.max()
    _fits(int(kept.sum()), dim)
    turned = _directions(int(kept.sum()), dim, np.random.default_rng([seed, 1]))
    means = math.sqrt(dim) * (vectors[:, kept] * np.sqrt(values[kept])) @ turned
    return Task("given kernel", means, labels, noise)


def bits_and_classes(bits: int, classes: int, dim: int = 128, noise: float = 0.1, seed: int = 0) -> Task:
    """Several outputs at once: every combination of so many bits with one of so many classes, on random patterns.

    The labels are the bits, then one indicator a class (none where there is one class only). How bits and classes
    were joined is not in what could be read of the paper; this is the full design.
    """
    if not 1 <= bits <= 10 or classes < 1:
        raise ValueError(f"{bits} bits and {classes} classes; expected 1 to 10 bits and 1 class or more")
    design = np.array(list(itertools.product(*[(0, 1)] * bits, range(classes))))
    indicators = design[:, -1:] == np.arange(classes) if classes > 1 else np.empty((len(design), 0), dtype=bool)
    means = np.random.default_rng(seed).standard_normal((len(design), dim))
    labels = np.concatenate([design[:, :bits].astype(bool), indicators], axis=1)
    return Task(f"{bits} bits x {classes} classes", means - means.mean(0), labels, noise)


def _directions(count: int, dim: int, rng: np.random.Generator) -> Float[np.ndarray, "count dim"]:
    """Random orthonormal rows."""
    q, r = np.linalg.qr(rng.standard_normal((dim, count)))
    return (q * np.sign(np.diag(r))).T


def _bits(n: int) -> int:
    bits = n.bit_length() - 1
    if n < 4 or 1 << bits != n:
        raise ValueError(f"{n} conditions; expected a power of 2, from 4")
    return bits


def _even(n: int) -> None:
    if n < 4 or n % 2:
        raise ValueError(f"{n} conditions; expected an even number, from 4")


def _fits(needed: int, dim: int) -> None:
    if needed > dim:
        raise ValueError(f"dim {dim}; these conditions span {needed} dimensions: give dim={needed} or more")
