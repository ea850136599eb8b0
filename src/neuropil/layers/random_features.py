r"""Can a network with frozen random weights fit this target, and from what range must the weights come?

In the network $g_d(x) = \sum_{j=1}^d c_j\,\sigma(a_j \cdot x - b_j)$ the pairs $(a_j, b_j)$ are drawn once, from a
distribution that does not know the data, and only c is fitted. Where they are drawn from a bounded set V, part of
the target's ridgelet spectrum is out of reach, and *more neurons do not help*; a range wide enough exists, but
depends on the target. `diagnose_random_features` says, for given data, on which side of this one is:

>>> x = np.linspace(-1, 1, 400)[:, None]
>>> found = diagnose_random_features(x, np.sin(20 * np.pi * x[:, 0]), lam=1.0, random_state=0)
>>> found.too_narrow, found.messages[0][:53]
(True, 'the range 1 is too small for this target; more neuron')
>>> 30 < found.required < 200 and found.suggested > 10
True

It puts three things side by side, for a grid of ranges $\lambda$:

- *measured*: the error on held-out samples, with d neurons and with d/4, several draws each, and the sum of |c|;
- *provable* (`bandlimit_lower_bound`): for any h, every network with parameters in V and $\sum|c_j| \le B$ has
  $\lVert f - g\rVert \ge (\langle f, h\rangle - B \max_V |\langle\sigma(a \cdot x - b), h\rangle|) / \lVert h\rVert$;
- *spectral* (`neuropil.layers.ridgelet`): the share $\lVert R_\psi f\rVert_{V^c} / \lVert R_\psi f\rVert$ of the
  ridgelet spectrum outside the box, and the range outside which little is left, both before any network is drawn.

What the theory means on a computer. The paper's lower bound is for the integral over V and functions on all of $R^m$.
On a compact interval, and in exact arithmetic, finite combinations of an analytic $\sigma$ (sigmoid, tanh, Gaussian,
cosine) with parameters from any open V are dense, so the error of a finite network is never bounded away from 0
without a bound on c. What one meets instead is a system so ill-conditioned that the coefficients needed grow beyond
any precision: with 40 periods on [-1, 1] and weights up to 1, a sum of |c| of 1e12 still leaves nearly all of the
target (the example of `bandlimit_lower_bound`). So a bound here always names its B, and a fit the smallest singular
value it uses (`rcond`); all is float64, as float32 would hide the effect.

What is here: `RandomFeatureRegressor` and `RandomFeatureClassifier` (scikit-learn), `RandomFeatures` (the frozen
layer, torch), `suggest_scale` (a range by held-out error), `bandlimit_lower_bound`, the ridgelet transform and its
inverse, `spectrum_mass_outside`, `required_bandwidth`, and `RandomFeatureDiagnosis.plot` (the spectrum with the box).

Source: Ming Li, Sho Sonoda, Feilong Cao, Yu Guang Wang, Jiye Liang, "How Powerful are Shallow Neural Networks with
Bandlimited Random Weights?", ICML 2023, arXiv:2008.08427. Its text could not be read beyond the abstract and the
model: the constants and assumptions of its theorem are not known here, and the certificate, which needs none, is
derived here instead; so are the closed form of the spectral share and the uses made of both. Distributions other than
uniform on a cube are common ones (normal, log-uniform, biases from the range of the data) and the importance sampling
that the transform suggests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from sklearn.model_selection import train_test_split
from sklearn.utils import check_X_y

from neuropil.layers._bandlimit import BandlimitCertificate, bandlimit_lower_bound
from neuropil.layers._random_net import (
    RandomFeatureClassifier,
    RandomFeatureRegressor,
    RandomFeatures,
    RankDeficient,
    UnscaledInputs,
    draw_features,
    solve,
    warn_if_unscaled,
)
from neuropil.layers._ridge_functions import hidden
from neuropil.layers.ridgelet import (
    GaussianDerivative,
    Spectrum,
    admissible_order,
    required_bandwidth,
    ridgelet_transform,
    spectrum_mass_outside,
)

__all__ = [
    "BandlimitCertificate",
    "RandomFeatureClassifier",
    "RandomFeatureDiagnosis",
    "RandomFeatureRegressor",
    "RandomFeatures",
    "RankDeficient",
    "ScaleCurve",
    "UnscaledInputs",
    "bandlimit_lower_bound",
    "diagnose_random_features",
    "draw_features",
    "suggest_scale",
]

LAMS = tuple(float(lam) for lam in np.geomspace(0.1, 200, 12))
NARROW = 0.5  # "too narrow": no better than this share of the target is reached, ...
GAIN = 0.8  # ... four times the neurons leave more than this share of the error, ...
WIDER = 0.5  # ... and a wider range leaves less than this share
Certificates = list[BandlimitCertificate | None]  # one for each output, None where it is 0
MOST = 2000  # samples held out
WIDE = 12.0  # boxes beyond this take seconds to bound, and have bounds near 0


@dataclass(frozen=True, eq=False)
class ScaleCurve:
    """Held-out errors over ranges, and the range of the smallest.

    lams        [l] ranges
    errors      [draws, l] root mean square error on the held-out samples, with all neurons
    fewer       [draws, l] likewise with a quarter of the neurons
    budgets     [draws, l] sum of |output weights| of the network with all neurons (of the output where it is largest)
    ranks       [draws, l] singular values that were kept
    bounds      [draws, l] what no network with that sum of |output weights| can go below on the held-out samples
    suggested   the range whose median error is smallest
    target      root mean square of the held-out targets, about their mean in training
    """

    lams: Float[np.ndarray, " l"]
    errors: Float[np.ndarray, "draws l"]
    fewer: Float[np.ndarray, "draws l"]
    budgets: Float[np.ndarray, "draws l"]
    ranks: Float[np.ndarray, "draws l"]
    bounds: Float[np.ndarray, "draws l"]
    suggested: float
    target: float


@dataclass(frozen=True, eq=False)
class RandomFeatureDiagnosis:
    """What `diagnose_random_features` found; see there. `theory` is beside `simulated`, one entry a range.

    curve           held-out errors over the ranges
    theory          proven lower bound of the error, at the coefficients that were fitted (median over draws)
    simulated       the error measured (median over draws)
    mass_outside    share of the ridgelet spectrum outside each range
    required        the range outside which less than `eps` of the spectrum is left (NaN where no spectrum was found)
    suggested       the range of the smallest held-out error
    lam             the range asked about, None where none was
    too_narrow      whether that range is too small, so that more neurons do not help
    messages        the findings in words
    spectrum        the target's spectrum
    """

    curve: ScaleCurve
    theory: Float[np.ndarray, " l"]
    simulated: Float[np.ndarray, " l"]
    mass_outside: Float[np.ndarray, " l"]
    required: float
    suggested: float
    lam: float | None
    too_narrow: bool | None
    messages: tuple[str, ...]
    spectrum: Spectrum = field(repr=False)
    activation: str = "sigmoid"

    def plot(self) -> Figure:
        """Left: errors, bound and spectral share over ranges. Right: the spectrum over (a, b), and the box asked about.

        In two or more dimensions the right panel has weights along the direction of the strongest slice.
        """
        figure = Figure(figsize=(11, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        lams = self.curve.lams
        left.loglog(lams, self.simulated, "o-", label="measured")
        left.loglog(lams, np.median(self.curve.fewer, axis=0), "o--", label="with a quarter of the neurons")
        left.loglog(lams, np.where(self.theory > 0, self.theory, np.nan), "k-", lw=3, alpha=0.4, label="proven bound")
        left.loglog(lams, self.curve.target * self.mass_outside, ":", label="spectrum outside")
        left.axhline(self.curve.target, color="grey", lw=0.8)
        left.text(lams[0], self.curve.target, "the mean", va="bottom", color="grey", fontsize="small")
        left.set(xlabel="range of weights and biases", ylabel="error on held-out samples (RMSE)")
        left.set_ylim(0.3 * float(self.simulated.min()), 10 * self.curve.target)
        left.legend(frameon=False, fontsize="small", loc="lower left")
        box = self.lam or self.suggested
        widest = 1.5 * max(box, self.required if math.isfinite(self.required) else 0.0)
        a = np.linspace(-widest, widest, 161)
        x = self.spectrum.x[:: max(1, len(self.spectrum.x) // 1024)]
        values = self.spectrum.values[:: max(1, len(self.spectrum.x) // 1024), 0]
        side = widest * float(np.quantile(np.abs(x @ self.spectrum.direction), 0.95))
        b = np.linspace(-side, side, 161)
        psi = GaussianDerivative(admissible_order(self.activation, 1))
        size = np.abs(ridgelet_transform(x, values, a[:, None] * self.spectrum.direction, b, psi))
        image = right.pcolormesh(a, b, size.T, shading="nearest", cmap="magma", rasterized=True)
        figure.colorbar(image, label="|ridgelet transform|")
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]) * box
        right.plot(corners[:, 0], corners[:, 1], "w--", lw=1.2)
        along = "a" if x.shape[1] == 1 else "a along the strongest slice"
        right.set(
            xlabel=along, ylabel="b", xlim=a[[0, -1]], ylim=b[[0, -1]], title=f"dashed: parameters up to {box:.3g}"
        )
        return figure


def suggest_scale(
    X: Float[np.ndarray, "n m"],
    y: Float[np.ndarray, n * q],
    *,
    n_neurons: int = 200,
    lams: Sequence[float] = LAMS,
    activation: str = "sigmoid",
    ridge: float = 0.0,
    rcond: float = 1e-12,
    held_out: float = 0.25,
    draws: int = 3,
    random_state: int = 0,
) -> ScaleCurve:
    """Networks of each range on one split of the data, and the range with the smallest error on the part held out.

    `held_out` is the share of samples held out, of which there are at most 2000.
    Weights and biases are uniform in [-lam, lam]. Targets are centred on their mean in training. In one dimension
    the bounds are for all networks in the box; in more (and for boxes too wide) for all output weights of the neurons
    drawn.

    Raises ValueError for fewer than 8 samples, values that are not finite, and settings out of range.
    """
    X, y = _checked(X, y)
    if draws < 1 or not len(lams):
        raise ValueError(f"{draws} draws of {len(lams)} ranges; expected 1 or more of each")
    if min(lams) <= 0 or n_neurons < 4:
        raise ValueError(f"smallest lam {min(lams)}, n_neurons {n_neurons}; expected lam > 0 and 4 neurons or more")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out {held_out}; expected a share above 0 and below 1")
    size = min(math.ceil(held_out * len(X)), MOST)
    train_x, test_x, train_y, test_y = train_test_split(X, y, test_size=size, random_state=random_state)
    mean = train_y.mean(0)
    train_y, test_y = train_y - mean, test_y - mean
    shape = draws, len(lams)
    errors, fewer, budgets, ranks, bounds = (np.empty(shape) for _ in range(5))
    for at, lam in enumerate(lams):
        box = _certificate(test_x, test_y, lam, activation)
        for draw in range(draws):
            features = draw_features(X, n_neurons, lam, activation=activation, seed=random_state + draw)
            weight, bias = features.weight.numpy(), features.bias.numpy()
            h, test_h = (hidden(part, weight, bias, activation) for part in (train_x, test_x))
            few = max(1, n_neurons // 4)
            errors[draw, at], coef, ranks[draw, at] = _fit(h, train_y, test_h, test_y, ridge, rcond)
            fewer[draw, at] = _fit(h[:, :few], train_y, test_h[:, :few], test_y, ridge, rcond)[0]
            sums = np.abs(coef).sum(0)
            budgets[draw, at] = sums.max()
            bounds[draw, at] = _bound(box or _of_neurons(test_x, test_y, weight, bias, activation), sums)
    best = float(lams[int(np.median(errors, axis=0).argmin())])
    target = float(np.sqrt(np.mean(test_y**2)))
    return ScaleCurve(np.asarray(lams, dtype=float), errors, fewer, budgets, ranks, bounds, best, target)


def diagnose_random_features(
    X: Float[np.ndarray, "n m"],
    y: Float[np.ndarray, n * q],
    *,
    lam: float | None = None,
    eps: float = 0.1,
    n_neurons: int = 200,
    lams: Sequence[float] = LAMS,
    activation: str = "sigmoid",
    ridge: float = 0.0,
    rcond: float = 1e-12,
    held_out: float = 0.25,
    draws: int = 3,
    random_state: int = 0,
) -> RandomFeatureDiagnosis:
    """What range of random weights this target needs, and whether `lam` is too small for it.

    X, y        samples [n, m], targets [n] or [n, q]; scale X first (a range of weights is in units of 1 / X). For
                classes give an indicator of each as a column
    lam         the range in use or intended, which is added to `lams`
    eps         share of the ridgelet spectrum that may be left out by `required`
    lams, ...   see `suggest_scale`

    A range is called too narrow where three things meet: its error is above half of that of the mean, a quarter of
    the neurons do at least 80 % as well, and a wider range leaves less than half of it.

    Raises ValueError as `suggest_scale` does. Warns `UnscaledInputs`.
    """
    X, y = _checked(X, y)
    warn_if_unscaled(X)
    if lam is not None and not lam > 0:
        raise ValueError(f"lam {lam}; expected a number above 0")
    grid = sorted({*(float(v) for v in lams), *([] if lam is None else [float(lam)])})
    curve = suggest_scale(
        X,
        y,
        n_neurons=n_neurons,
        lams=grid,
        activation=activation,
        ridge=ridge,
        rcond=rcond,
        held_out=held_out,
        draws=draws,
        random_state=random_state,
    )
    spectrum = Spectrum.of_samples(X, y)
    order = admissible_order(activation, spectrum.dimension)
    found = bool(spectrum.power.sum() > 0)
    mass = np.array([spectrum_mass_outside(spectrum, v, order=order) if found else np.nan for v in grid])
    required = required_bandwidth(spectrum, eps, order) if found else math.nan
    simulated, few = np.median(curve.errors, axis=0), np.median(curve.fewer, axis=0)
    at = None if lam is None else grid.index(float(lam))
    narrow = None if at is None else _too_narrow(simulated, few, curve.target, at)
    theory = np.median(curve.bounds, axis=0)
    messages = _messages(curve, theory, simulated, mass, required, eps, at, bool(narrow), few)
    return RandomFeatureDiagnosis(
        curve, theory, simulated, mass, required, curve.suggested, lam, narrow, messages, spectrum, activation
    )


def _too_narrow(errors: np.ndarray, fewer: np.ndarray, target: float, at: int) -> bool:
    stuck = errors[at] > NARROW * target and errors[at] > GAIN * fewer[at]
    return bool(stuck and len(errors) > at + 1 and errors[at + 1 :].min() < WIDER * errors[at])


def _messages(
    curve: ScaleCurve,
    theory: np.ndarray,
    errors: np.ndarray,
    mass: np.ndarray,
    required: float,
    eps: float,
    at: int | None,
    narrow: bool,
    fewer: np.ndarray,
) -> tuple[str, ...]:
    best = int(np.argmin(errors))
    out = []
    if at is not None and narrow:
        out.append(
            f"the range {curve.lams[at]:g} is too small for this target; more neurons will not help: error "
            f"{errors[at]:.3g} with all neurons, {fewer[at]:.3g} with a quarter of them, {errors[best]:.3g} at range "
            f"{curve.lams[best]:g}; {100 * mass[at]:.0f} % of the target's ridgelet spectrum is outside"
        )
    elif at is not None:
        out.append(f"range {curve.lams[at]:g}: error {errors[at]:.3g}, not held up by the range alone")
    if at is not None and theory[at] > 0:
        out.append(
            f"proven: with weights that add up to {np.median(curve.budgets[:, at]):.1e} no network of that range, "
            f"of any number of neurons, has an error below {theory[at]:.3g}"
        )
    out.append(f"suggested range {curve.suggested:g}: error {errors[best]:.3g} (the mean: {curve.target:.3g})")
    if math.isfinite(required):
        out.append(f"{100 * eps:g} % of the ridgelet spectrum is left outside range {required:.3g}")
    else:
        out.append("no spectrum is told from sampling noise: the target is noise, or too fine for so few samples")
    if errors[best] > NARROW * curve.target:
        out.append("no range fits this target well; other neurons, more of them, or more data are needed")
    return tuple(out)


def _checked(X: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    X, y = check_X_y(X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=2)
    y = np.asarray(y, dtype=np.float64)
    if len(X) < 8:
        raise ValueError(f"{len(X)} samples; expected 8 or more, as some are held out")
    return X, y.reshape(len(y), -1)


def _fit(
    h: np.ndarray, y: np.ndarray, test_h: np.ndarray, test_y: np.ndarray, ridge: float, rcond: float
) -> tuple[float, np.ndarray, int]:
    coef, rank = solve(h, y, ridge, rcond)
    return float(np.sqrt(np.mean((test_h @ coef - test_y) ** 2))), coef, rank


def _certificate(x: np.ndarray, y: np.ndarray, lam: float, activation: str) -> Certificates | None:
    """One for each output, for all networks of the box; None where the box is too wide or of many dimensions."""
    if x.shape[1] > 1 or (lam * np.abs(x).max() > WIDE and activation != "relu"):
        return None
    return [bandlimit_lower_bound(x, f, lam, activation=activation) if f.any() else None for f in y.T]


def _of_neurons(x: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: np.ndarray, activation: str) -> Certificates:
    return [
        bandlimit_lower_bound(x, f, activation=activation, neurons=(weight, bias)) if f.any() else None for f in y.T
    ]


def _bound(certificates: Certificates, sums: np.ndarray) -> float:
    """Of the error over all outputs: each output has its own certificate and its own sum of |weights|."""
    each = [0.0 if proof is None else proof.bound(float(b)) for proof, b in zip(certificates, sums, strict=True)]
    return float(np.sqrt(np.mean(np.square(each))))
