r"""A lower bound, provable and without constants to be guessed, on the error of networks with bounded parameters.

Let $\langle u, v\rangle$ be the mean of uv over places x, V a set of parameters, and g any network with parameters in
V, of any number of neurons, whose output weights have $\sum_j |c_j| \le B$. For every direction h

$$\lVert f - g \rVert \ge \frac{\langle f - g, h\rangle}{\lVert h \rVert}
\ge \frac{\langle f, h \rangle - B \max_{(a, b) \in V} |\langle \sigma(a \cdot x - b), h\rangle|}{\lVert h \rVert}.$$

Good directions are what a fit with bounded weights leaves over: here the residuals of ridge regressions, one for
each of many penalties, on many neurons of V; the best of them is taken for each B. In one dimension V is
the whole box and the maximum over it is bounded, not sampled:

- ReLU is piecewise linear and homogeneous, so the maximum is at one of some 4n parameters on the edge of the box.
- An analytic $\sigma$ makes the correlation an analytic function of (a, b), which a polynomial of degree n in each
  follows up to an error that falls geometrically with n (a Bernstein ellipse inside the strip where $\sigma$ is
  bounded). The maximum of such a polynomial is at most $\cos^{-2}(\pi n / 2N)$ times that over N by N Chebyshev
  points (Ehlich and Zeller).

Up to rounding (of order 1e-16 of the mean of |h|) this is a proof. In more dimensions V is a given set of neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from neuropil.layers._ridge_functions import Activation, activation_named, hidden

PENALTIES = 10.0 ** -np.arange(-1, 29.1, 0.5)  # in units of the largest squared singular value
EXACT = 1e-15  # error of the polynomials, in units of the mean of |h|
WIDEST = 1000  # Chebyshev points along each side of the box
CHUNK = 4_000_000


@dataclass(frozen=True, eq=False)
class BandlimitCertificate:
    """Directions h and what they prove; `bound(budget)` is the lower bound for `sum |c| <= budget`.

    signal        <f, h>, one a direction
    norm          norm of h
    correlation   bound on the largest |<sigma, h>| over all parameters allowed
    target        root mean square of f: the error of the network that is 0
    """

    signal: Float[np.ndarray, " r"]
    norm: Float[np.ndarray, " r"]
    correlation: Float[np.ndarray, " r"]
    target: float

    def bound(self, budget: float) -> float:
        """No network of these parameters whose |output weights| add up to at most `budget` has a smaller RMSE."""
        if budget < 0:
            raise ValueError(f"budget {budget}; expected 0 or more")
        return max(0.0, float(((self.signal - budget * self.correlation) / self.norm).max()))

    def budget(self, error: float) -> float:
        """Sum of |output weights| below which no such network has an RMSE of `error` or less."""
        needed = (self.signal - error * self.norm) / self.correlation
        return max(0.0, float(needed.max()))


def bandlimit_lower_bound(
    x: Float[np.ndarray, "n m"],
    f: Float[np.ndarray, " values"],
    lam: float | None = None,
    lam_b: float | None = None,
    *,
    activation: str = "sigmoid",
    neurons: tuple[Float[np.ndarray, "d m"], Float[np.ndarray, " d"]] | None = None,
) -> BandlimitCertificate:
    r"""What no network with parameters in the box $[-\lambda, \lambda] \times [-\lambda_b, \lambda_b]$ can do at x.

    x, f         places and the target's values there; the error bounded is the root mean square over them
    lam, lam_b   the box, in one dimension; lam_b is lam unless given
    neurons      instead of the box: weights [d, m] and biases [d] of the neurons allowed, in any number of dimensions

    Raises ValueError in two or more dimensions without `neurons`, and for a box too wide to be bounded in
    reasonable time (about 30 for the sigmoid on [-1, 1]; the bound would be next to nothing).

    >>> x = np.linspace(-1, 1, 400)[:, None]
    >>> proof = bandlimit_lower_bound(x, np.sin(40 * np.pi * x[:, 0]), 1.0)
    >>> proof.bound(1e12) > 0.98 * proof.target  # 40 periods, weights up to 1: any number of neurons is too few
    True
    """
    known = activation_named(activation)
    if len(x) != len(f) or len(x) < 2:
        raise ValueError(f"{len(x)} places and {len(f)} values; expected as many, and 2 or more")
    target = float(np.sqrt(np.mean(f**2)))
    if not target > 0:
        raise ValueError("a target that is 0 everywhere, which every network can be")
    if neurons is not None:
        dictionary = hidden(x, *neurons, activation)
        residuals = _residuals(dictionary, f)
        largest = np.abs(dictionary.T @ residuals).max(0) / len(x)
    else:
        if lam is None or x.shape[1] > 1:
            raise ValueError(f"{x.shape[1]} dimensions, lam {lam}: expected one dimension and a box, or neurons")
        lam_b = lam if lam_b is None else lam_b
        if lam <= 0 or lam_b <= 0:
            raise ValueError(f"lam {lam}, lam_b {lam_b}; expected numbers above 0")
        residuals = _residuals(hidden(x, *_spread(lam, lam_b), activation), f)
        largest = _over_box(known, x[:, 0], residuals, lam, lam_b)
    floor = np.finfo(float).eps * np.abs(residuals).mean(0)  # what rounding may have hidden
    norm = np.sqrt(np.mean(residuals**2, axis=0))
    return BandlimitCertificate(f @ residuals / len(x), norm, largest + floor, target)


def _spread(lam: float, lam_b: float) -> tuple[np.ndarray, np.ndarray]:
    """Neurons all over the box, the denser the nearer to its edge, where the most able ones are."""
    side = -np.cos(math.pi * (np.arange(25) + 0.5) / 25)
    a, b = np.meshgrid(lam * side, lam_b * side)
    return a.reshape(-1, 1), b.ravel()


def _residuals(dictionary: np.ndarray, f: np.ndarray) -> np.ndarray:
    """[n, r]: what a ridge regression on the dictionary leaves of f, for each penalty; the first is f itself."""
    left, singular, _ = np.linalg.svd(dictionary, full_matrices=False)
    squared = (singular / singular[0]) ** 2
    shrunk = squared[:, None] / (squared[:, None] + PENALTIES)
    residuals = f[:, None] - left @ (shrunk * (left.T @ f)[:, None])
    residuals = np.concatenate([f[:, None], residuals], 1)
    return residuals[:, np.sqrt(np.mean(residuals**2, axis=0)) > 1e-14 * np.abs(f).max()]


def _over_box(known: Activation, x: np.ndarray, h: np.ndarray, lam: float, lam_b: float) -> np.ndarray:
    """A bound on the largest |<sigma(ax - b), h>| over the box, one for each column of h."""
    if known.strip is None:
        return _largest(known, x, h, *_relu_corners(x, lam, lam_b))
    degree, error = _degree(known.strip, lam * float(np.abs(x).max()), lam_b)
    if 2 * degree > WIDEST:
        raise ValueError(
            f"a box of {lam:g} by {lam_b:g} is too wide to be bounded on |x| <= {np.abs(x).max():g}: "
            f"it takes polynomials of degree {degree}, and at most {WIDEST // 2} are tried; take a smaller lam"
        )
    points = max(2 * degree, min(8 * degree, 300))
    side = np.cos(math.pi * (np.arange(points) + 0.5) / points)
    found = np.zeros(h.shape[1])
    rows = max(1, CHUNK // (points * len(x)))
    for start in range(0, points, rows):
        a, b = np.meshgrid(lam * side[start : start + rows], lam_b * side)
        found = np.maximum(found, _largest(known, x, h, a.ravel(), b.ravel()))
    slack = error * np.abs(h).mean(0)
    return (found + slack) / math.cos(math.pi * degree / (2 * points)) ** 2 + slack


def _largest(known: Activation, x: np.ndarray, h: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(hidden(x[:, None], a[:, None], b, known.name).T @ h).max(0) / len(x)


def _relu_corners(x: np.ndarray, lam: float, lam_b: float) -> tuple[np.ndarray, np.ndarray]:
    """Where on the edge of the box a sum of ReLUs can have its extremes: at kinks, and at the box's corners."""
    nonzero = x[x != 0]
    slopes = np.concatenate([nonzero, [lam_b / lam, -lam_b / lam]])  # b / a of the kinks, and of the corners
    upright = np.concatenate([slopes * lam, -slopes * lam, [0.0, 0.0]])
    sides = np.repeat([lam, -lam], len(slopes)), np.array([lam, -lam])
    along = np.concatenate([lam_b / slopes, -lam_b / slopes, [0.0, 0.0]])
    ends = np.repeat([lam_b, -lam_b], len(slopes)), np.array([lam_b, -lam_b])
    a = np.concatenate([*sides, along])
    b = np.concatenate([upright, *ends])
    inside = (np.abs(a) <= lam * (1 + 1e-12)) & (np.abs(b) <= lam_b * (1 + 1e-12))
    return a[inside], b[inside]


def _degree(strip: Callable[[float], float], reach: float, lam_b: float) -> tuple[int, float]:
    """The degree at which polynomials in a and in b follow any mean of sigma(ax - b) to `EXACT`, and their error.

    With |sigma| <= M where |Im z| <= s, the series of Chebyshev polynomials in one of the variables errs by at most
    2 M r^-n / (r - 1), where r is the ellipse of half-height s / (reach of that variable). The second series is one of
    coefficients of the first, whose sum is at most (log n + 3) times the function.
    """
    best = (np.iinfo(int).max, math.inf)
    for s in np.geomspace(0.05, 50, 120):
        bound = strip(float(s))
        if not bound < 1e300:
            continue
        ellipses = [s / side + math.sqrt(1 + (s / side) ** 2) for side in (reach, lam_b)]
        n = max(_terms(bound, r) for r in ellipses)
        if n < best[0]:
            tails = [2 * bound * r**-n / (r - 1) for r in ellipses]
            best = (n, tails[0] + (math.log(n) + 3) * tails[1])
    return best


def _terms(bound: float, ellipse: float) -> int:
    wanted = math.log(2 * bound / (ellipse - 1) / EXACT) / math.log(ellipse)
    return max(4, math.ceil(wanted) + 1)
