r"""Which weights and biases does a target need? Its ridgelet transform tells, before any training.

A network of one hidden layer, in the limit of infinitely many neurons, is an integral over its parameters,
$S[\gamma](x) = \int \gamma(a, b)\,\sigma(a \cdot x - b)\,da\,db$. The ridgelet transform of a target f,

$$R_\psi f(a, b) = \int f(x)\,\overline{\psi(a \cdot x - b)}\,dx,$$

is a $\gamma$ that gives f back, $S[R_\psi f] = C f$, where the pair of $\sigma$ and $\psi$ is admissible, that is
where

$$C = (2\pi)^{m-1} \int \overline{\hat\psi(w)}\,\hat\sigma(w)\,|w|^{-m}\,dw$$

is finite and not 0. By the Fourier slice identity $\int R_\psi f(a, b)\,e^{-iwb}\,db = \overline{\hat\psi(w)}\,\hat
f(wa)$ frequency $\xi$ of the target is carried by the parameters with $a = \xi / w$, w where $\hat\psi$ lives. With
$\psi$ the derivative of order k of a Gaussian, the share of the transform outside $\max_i |a_i| \le \lambda$ is

$$\frac{\lVert R \rVert^2_{V^c}}{\lVert R \rVert^2} =
\int |\hat f(\xi)|^2\,P\big(k - \tfrac{m-1}{2},\,(\lVert\xi\rVert_\infty/\lambda)^2\big)\,d\xi
\;\Big/ \int |\hat f(\xi)|^2 d\xi$$

where P is the regularised lower incomplete gamma function: one Fourier transform gives it for all $\lambda$.

>>> import numpy as np
>>> bump = Spectrum.of(lambda x: np.exp(-(x[:, 0] ** 2) / 2), domain=(-8, 8))
>>> narrow = Spectrum.of(lambda x: np.exp(-((10 * x[:, 0]) ** 2) / 2), domain=(-0.8, 0.8))
>>> round(required_bandwidth(narrow) / required_bandwidth(bump), 3)  # ten times as narrow: ten times the range
10.0

The order of the derivative has to have the parity of $\hat\sigma$ (odd for sigmoid and tanh, even for Gaussian, ReLU
and cosine; with the other parity C is 0) and be high enough for C to be finite; `admissible_order` gives the lowest.

What is analysed is a function on all of $R^m$ that vanishes at infinity. Samples on an interval are interpolated,
extended beyond each end by their reflection through the end point (which keeps value and slope), and faded out there:
a cut-off would have a wide spectrum of its own. Scattered samples in two or more dimensions are analysed in slices:
along each of some directions u, the Fourier transform of $\sum_i y_i \delta(t - u \cdot x_i)$, which is that of the
target times the density of the inputs, corrected for the floor that a finite sample adds. Slices are weighed equally
(no factor $r^{m-1}$, under which that floor would drown all else), so there the share is a proxy.

Source: the transform is that of Sonoda and Murata, "Neural network with unbounded activation functions is universal
approximator", 2017, arXiv:1505.03654; its use on bounded parameters that of Li, Sonoda, Cao, Wang and Liang, 2020,
arXiv:2008.08427. The closed form of the share is derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Complex, Float
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import gammainc

from neuropil.layers._ridge_functions import activation_named, hidden

__all__ = [
    "GaussianDerivative",
    "Spectrum",
    "admissibility",
    "admissible_order",
    "inverse_ridgelet_transform",
    "required_bandwidth",
    "ridgelet_transform",
    "spectrum_mass_outside",
]

CHUNK = 4_000_000  # entries of a temporary matrix
SLICES = 64  # directions along which scattered samples are analysed ...
MOST = 4000  # ... and how many of them at most, drawn at random


@dataclass(frozen=True)
class GaussianDerivative:
    r"""$\psi = g^{(k)}$ with $g(t) = e^{-t^2/2}$, so that $\hat\psi(w) = (iw)^k \sqrt{2\pi}\,e^{-w^2/2}$."""

    order: int

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ValueError(f"order {self.order}; expected 1 or more (of order 0 the transform has no finite norm)")

    def __call__(self, t: Float[np.ndarray, "*s"]) -> Float[np.ndarray, "*s"]:
        hermite = np.polynomial.hermite_e.HermiteE.basis(self.order).convert(kind=np.polynomial.Polynomial)
        return (-1) ** self.order * hermite(t) * np.exp(-0.5 * t * t)

    def fourier(self, w: Float[np.ndarray, "*s"]) -> Complex[np.ndarray, "*s"]:
        return (1j * w) ** self.order * math.sqrt(2 * math.pi) * np.exp(-0.5 * w * w)

    def share_below(self, w: Float[np.ndarray, "*s"], dimension: int) -> Float[np.ndarray, "*s"]:
        r"""Share of $\int |\hat\psi|^2 |w|^{-m} dw$ below frequency w."""
        shape = self.order - (dimension - 1) / 2
        if shape <= 0:
            raise ValueError(
                f"a derivative of order {self.order} in {dimension} dimensions has no finite norm; "
                f"expected an order above {(dimension - 1) / 2:g}"
            )
        return gammainc(shape, np.square(w))

    def norm(self, dimension: int) -> float:
        r"""$\int |\hat\psi(w)|^2 |w|^{-m} dw$, by which $\lVert R_\psi f\rVert^2$ exceeds
        $\int |\hat f|^2 d\xi / 2\pi$."""
        return 2 * math.pi * math.gamma(self.order - (dimension - 1) / 2)


def admissible_order(activation: str = "sigmoid", dimension: int = 1) -> int:
    """The lowest order of Gaussian derivative that is admissible with this activation.

    >>> admissible_order("sigmoid"), admissible_order("gaussian"), admissible_order("relu")
    (3, 2, 4)
    """
    known = activation_named(activation)
    order = max(1, dimension + known.pole)  # w^(order - pole - m) is integrable at 0 above dimension + pole - 1
    return order if (order % 2 == 0) == known.even else order + 1


def admissibility(psi: GaussianDerivative, activation: str = "sigmoid", dimension: int = 1) -> float:
    r"""The constant C of the pair, by numerical integration. 0 where the parities differ.

    Raises ValueError where the order is too low for the integral to be finite.
    """
    known = activation_named(activation)
    if (psi.order % 2 == 0) != known.even:
        return 0.0
    if psi.order < dimension + known.pole and known.fourier is not None:
        raise ValueError(
            f"a derivative of order {psi.order} with {activation} in {dimension} dimensions: C is not finite; "
            f"expected order {admissible_order(activation, dimension)} or more"
        )
    front = (2 * math.pi) ** (dimension - 1)
    if known.fourier is None:  # atoms of weight pi at -1 and 1
        return front * 2 * math.pi * float(psi.fourier(np.ones(1)).real[0])
    spectrum = known.fourier

    def integrand(w: float) -> float:
        at = np.array([w])
        return float((psi.fourier(at).conj() * spectrum(at)).real[0]) * w**-dimension

    return front * 2 * quad(integrand, 0.0, 12.0, epsabs=1e-14, epsrel=1e-12, limit=400)[0]


def ridgelet_transform(
    x: Float[np.ndarray, "n m"],
    f: Float[np.ndarray, " n"],
    a: Float[np.ndarray, "p m"],
    b: Float[np.ndarray, " q"],
    psi: GaussianDerivative | None = None,
    weights: Float[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, "p q"]:
    r"""$R_\psi f$ on the grid of all a and all b, from values f at the places x.

    x           places, in any number of dimensions
    psi         the third derivative of a Gaussian by default, which goes with the sigmoid in one dimension
    weights     volume of each place in the integral. By default the trapezoidal rule in one dimension; 1/n each in
                more, which gives the transform of f times the density of the places
    """
    psi = psi or GaussianDerivative(admissible_order("sigmoid", x.shape[1]))
    weighed = f * (_volumes(x) if weights is None else weights)
    t = a @ x.T
    out = np.empty((len(a), len(b)))
    step = max(1, CHUNK // (len(b) * len(x)))
    for start in range(0, len(a), step):
        out[start : start + step] = psi(t[start : start + step, None, :] - b[:, None]) @ weighed
    return out


def inverse_ridgelet_transform(
    transform: Float[np.ndarray, "p q"],
    a: Float[np.ndarray, "p m"],
    b: Float[np.ndarray, " q"],
    x: Float[np.ndarray, "n m"],
    psi: GaussianDerivative,
    activation: str = "sigmoid",
    weights: Float[np.ndarray, " p"] | None = None,
) -> Float[np.ndarray, " n"]:
    r"""$S[R_\psi f] / C$ at the places x: a network whose output weights are the transform.

    `weights` is the volume of each a in the integral; by default the trapezoidal rule, in one dimension only.
    Raises ValueError where the pair is not admissible.
    """
    constant = admissibility(psi, activation, x.shape[1])
    if constant == 0:
        raise ValueError(
            f"a derivative of order {psi.order} is not admissible with {activation} (parity); "
            f"expected {admissible_order(activation, x.shape[1])} or that plus an even number"
        )
    if weights is None and a.shape[1] > 1:
        raise ValueError(f"a of {a.shape[1]} dimensions without weights; expected the volume of each a")
    volumes = _volumes(a) if weights is None else weights
    weighed = transform * volumes[:, None] * _volumes(b[:, None])
    out = np.zeros(len(x))
    step = max(1, CHUNK // (len(b) * len(x)))
    for start in range(0, len(a), step):
        some = np.repeat(a[start : start + step], len(b), axis=0)
        biases = np.tile(b, len(some) // len(b))
        out += hidden(x, some, biases, activation) @ weighed[start : start + step].ravel()
    return out / constant


def _volumes(x: Float[np.ndarray, "n m"]) -> Float[np.ndarray, " n"]:
    """The trapezoidal rule at places in one dimension, in any order; equal weights in more."""
    if x.shape[1] > 1 or len(x) == 1:
        return np.full(len(x), 1 / len(x))
    order = np.argsort(x[:, 0], kind="stable")
    gaps = np.diff(x[order, 0])
    out = np.empty(len(x))
    out[order] = (np.append(gaps, 0) + np.insert(gaps, 0, 0)) / 2
    return out


@dataclass(frozen=True, eq=False)
class Spectrum:
    r"""The power $|\hat f|^2$ of a target at frequencies, from `Spectrum.of` or `Spectrum.of_samples`.

    frequency   $\lVert \xi \rVert_\infty$, as weights are drawn from a box
    power       $|\hat f(\xi)|^2$, each with the volume it stands for
    dimension   of the integral over $\xi$ (1 for slices)
    x, values   the function itself on a grid, in one dimension; else the samples
    direction   that of the strongest slice ([1] in one dimension)
    """

    frequency: Float[np.ndarray, " k"]
    power: Float[np.ndarray, " k"]
    dimension: int
    x: Float[np.ndarray, "n m"]
    values: Float[np.ndarray, "n q"]
    direction: Float[np.ndarray, " m"]

    @classmethod
    def of(
        cls,
        f: Callable[[Float[np.ndarray, "n m"]], Float[np.ndarray, " n"]],
        domain: Sequence[Any],
        points: int | None = None,
    ) -> Spectrum:
        """Of a function that vanishes outside `domain`: (low, high), or one such pair for each of up to 3 dimensions.

        f is called with places [n, m] and gives values [n]; `points` is for each dimension (4096, 256, 64).
        """
        sides = np.atleast_2d(np.asarray(domain, dtype=float))
        m = len(sides)
        if m > 3 or sides.shape[1] != 2 or not (sides[:, 0] < sides[:, 1]).all():
            raise ValueError(f"domain {domain}; expected (low, high), or such a pair for each of up to 3 dimensions")
        points = points or (4096, 256, 64)[m - 1]
        axes = [np.linspace(low, high, points) for low, high in sides]
        x = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], 1)
        values = np.asarray(f(x), dtype=float).reshape(-1, 1)
        return cls._of_grid(axes, values, x)

    @classmethod
    def of_samples(cls, x: Float[np.ndarray, "n m"], y: Float[np.ndarray, n * q], center: bool = True) -> Spectrum:
        """Of a target known at places x [n, m], with values [n] or [n, q]; the powers of several outputs add up.

        With `center` the mean is taken off first: a constant needs no range of weights.
        """
        if len(x) < 2 or len(x) != len(y):
            raise ValueError(f"{len(x)} places and {len(y)} values; expected as many, and 2 or more")
        values = y.reshape(len(y), -1)
        values = values - values.mean(0) if center else values
        return _interpolated(cls, x[:, 0], values) if x.shape[1] == 1 else _sliced(cls, x, values)

    @classmethod
    def _of_grid(cls, axes: list[np.ndarray], values: np.ndarray, x: np.ndarray) -> Spectrum:
        m, points = len(axes), len(axes[0])
        padded = [4 * points if m == 1 else 2 * points] * m
        grid = values.reshape(*[points] * m, -1)
        power = np.square(np.abs(np.fft.fftn(grid, s=padded, axes=range(m)))).sum(-1)
        steps = [axis[1] - axis[0] for axis in axes]
        scale = np.prod([2 * math.pi * step / n for step, n in zip(steps, padded, strict=True)])  # = step^2 d xi
        one = [np.abs(2 * math.pi * np.fft.fftfreq(n, step)) for n, step in zip(padded, steps, strict=True)]
        frequency = np.max(np.stack(np.meshgrid(*one, indexing="ij")), 0)
        return cls(frequency.ravel(), scale * power.ravel(), m, x, values, np.eye(m)[0])

    def check(self) -> None:
        if not self.power.sum() > 0:
            raise ValueError("a target without any power (a constant, or noise alone); it has no bandwidth")


def _interpolated(cls: type[Spectrum], x: np.ndarray, values: np.ndarray) -> Spectrum:
    places, inverse = np.unique(x, return_inverse=True)
    if len(places) < 2:
        raise ValueError(f"all {len(x)} places are at {places[0]:g}; expected 2 places or more")
    sums = np.zeros((len(places), values.shape[1]))
    np.add.at(sums, inverse, values)
    means = sums / np.bincount(inverse)[:, None]
    points = 2049
    grid = np.linspace(places[0], places[-1], points)
    inside = np.stack([np.interp(grid, places, column) for column in means.T], 1)
    more = points // 2
    fade = np.sin(0.5 * math.pi * np.linspace(0, 1, more, endpoint=False)) ** 2
    window = np.concatenate([fade, np.ones(points), fade[::-1]])
    extended = np.pad(inside, ((more, more), (0, 0)), "reflect", reflect_type="odd") * window[:, None]
    step = grid[1] - grid[0]
    axis = grid[0] + step * np.arange(-more, points + more)
    return cls._of_grid([axis], extended, axis[:, None])


def _sliced(cls: type[Spectrum], x: np.ndarray, values: np.ndarray) -> Spectrum:
    rng = np.random.default_rng(0)
    if len(x) > MOST:
        some = rng.choice(len(x), MOST, replace=False)
        x, values = x[some], values[some]
    n, m = x.shape
    random = rng.standard_normal((max(0, SLICES - m), m))
    directions = np.concatenate([np.eye(m), random / np.linalg.norm(random, axis=1, keepdims=True)])
    span = float(np.ptp(x @ directions.T, axis=0).max())
    if span == 0:
        raise ValueError(f"all {n} places are the same; expected places that differ")
    radii = math.pi / span * np.arange(1, 2 + math.ceil(2 * math.sqrt(n)))
    floor = np.square(values).sum()
    power = np.empty((len(directions), len(radii)))
    for row, direction in enumerate(directions):
        waves = np.exp(-1j * np.outer(radii, x @ direction))
        # Without its diagonal terms the double sum over samples has the true power as its mean.
        power[row] = (np.square(np.abs(waves @ values)).sum(1) - floor) / (n * (n - 1))
    frequency = np.outer(np.abs(directions).max(1), radii)
    strongest = directions[power.sum(1).argmax()]
    # Below the first radius at which the mean over slices is no longer above 0 the target is told from the floor.
    lost = np.flatnonzero(power.mean(0) <= 0)
    last = int(lost[0]) if len(lost) else len(radii)
    return cls(frequency[:, :last].ravel(), power[:, :last].clip(0).ravel(), 1, x, values, strongest)


def spectrum_mass_outside(
    spectrum: Spectrum, lam: float, lam_b: float | None = None, order: int | None = None
) -> float:
    r"""$\lVert R\rVert_{V^c} / \lVert R\rVert$, the part of the ridgelet spectrum outside the box: 0 to 1.

    lam     weights in the box are at most this, each in absolute value
    lam_b   biases likewise; None for no bound on them. A bound is possible in one dimension and for one output
    order   of the Gaussian derivative; by default the lowest that goes with the sigmoid

    A proxy of the error that no number of neurons removes, in units of the target's own norm.
    """
    if lam < 0 or (lam_b is not None and lam_b < 0):
        raise ValueError(f"lam {lam}, lam_b {lam_b}; expected 0 or more")
    spectrum.check()
    psi = GaussianDerivative(order or admissible_order("sigmoid", spectrum.dimension))
    if lam == 0 or lam_b == 0:
        return 1.0
    if lam_b is not None:
        return _mass_outside_box(spectrum, lam, lam_b, psi)
    with np.errstate(over="ignore"):
        shares = psi.share_below(spectrum.frequency / lam, spectrum.dimension)
    return float(np.sqrt(np.clip(spectrum.power @ shares / spectrum.power.sum(), 0, 1)))


def _mass_outside_box(spectrum: Spectrum, lam: float, lam_b: float, psi: GaussianDerivative) -> float:
    if spectrum.x.shape[1] > 1 or spectrum.values.shape[1] > 1:
        raise ValueError(
            f"lam_b with {spectrum.x.shape[1]} dimensions and {spectrum.values.shape[1]} outputs; expected one of "
            f"each, or lam_b=None"
        )
    step = max(1, len(spectrum.x) // 1024)
    x, values = spectrum.x[::step], spectrum.values[::step, 0]
    # R(-a, -b) = +-R(a, b), so half the box is enough. |R|^2 has no frequency above 9 along b and 9 max|x| along a.
    a = np.linspace(0, lam, min(600, 60 + math.ceil(3 * lam * np.abs(x).max())))
    b = np.linspace(-lam_b, lam_b, 2 * min(800, 20 + math.ceil(2 * lam_b)) + 1)
    inside = np.square(ridgelet_transform(x, values, a[:, None], b, psi))
    half = float(_volumes(a[:, None]) @ inside @ _volumes(b[:, None]))
    total = spectrum.power.sum() * psi.norm(1) / (2 * math.pi)
    return float(np.sqrt(np.clip(1 - 2 * half / total, 0, 1)))


def required_bandwidth(spectrum: Spectrum, eps: float = 0.1, order: int | None = None) -> float:
    """The smallest range of weights outside which less than `eps` of the ridgelet spectrum is left, for any biases."""
    if not 0 < eps < 1:
        raise ValueError(f"eps {eps}; expected a share above 0 and below 1")
    spectrum.check()

    def excess(log_lam: float) -> float:
        return spectrum_mass_outside(spectrum, math.exp(log_lam), order=order) - eps

    largest = float(spectrum.frequency[spectrum.power > 0].max())
    if largest == 0:
        return 0.0
    return math.exp(float(brentq(excess, math.log(largest) - 40, math.log(largest) + 40, xtol=1e-12)))
