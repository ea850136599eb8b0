"""From effects on a few prompts to a verdict: tests that are sound with few replicates and many neurons.

With three or four prompts a neuron's own variance is hardly known. `moderated_t` squeezes it towards that of
all the site's neurons (empirical Bayes, Smyth 2004, "Linear models and empirical Bayes methods for assessing
differential expression", the standard of genomics, where genes are many and replicates few).
`beyond_controls` asks how far a token lies outside the spread of its matched control tokens. `step_up` is
the rule of Benjamini and Hochberg (1995).

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(1000, 3))                         # nothing but noise
    >>> p, prior = moderated_t(x)
    >>> bool(0.03 < (p < 0.05).mean() < 0.07), step_up(p, 0.05)
    (True, 0.0)
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.special import digamma, polygamma
from scipy.stats import t as student

__all__ = ["beyond_controls", "moderated_t", "step_up"]

Vector = Float[np.ndarray, " n"]


def moderated_t(x: Float[np.ndarray, "n prompts"]) -> tuple[Vector, float]:
    """Two-sided p-values of "mean(x) = 0", one a row, and how many degrees of freedom the prior is worth.

    With s2 the row's sample variance on f = prompts - 1 degrees of freedom, and s2 ~ s0 * F(f, f0) over rows,

        t = mean * sqrt(prompts / s2'),   s2' = (f0 * s0 + f * s2) / (f0 + f),   on f0 + f degrees of freedom.

    f0 and s0 are found from the mean and variance of log s2. Rows of equal entries (s2 = 0) do not enter
    the prior. Raises ValueError with fewer than two prompts.
    """
    n, prompts = x.shape
    if prompts < 2:
        raise ValueError(f"a test over prompts needs at least 2 of them, got {prompts}")
    f = prompts - 1
    mean, s2 = x.mean(1), x.var(1, ddof=1)
    f0, s0 = _prior(s2[s2 > 0], f)
    shrunk = np.full(n, s0) if np.isinf(f0) else (f0 * s0 + f * s2) / (f0 + f)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, mean * np.sqrt(prompts / shrunk))
    return 2 * student.sf(np.abs(t), f0 + f), f0


def _prior(s2: Vector, f: int) -> tuple[float, float]:
    """Degrees of freedom and scale of the variances' prior, by the moments of their logarithm."""
    if len(s2) < 2:
        return 0.0, 0.0
    e = np.log(s2) - digamma(f / 2) + np.log(f / 2)
    excess = float(e.var(ddof=1) - polygamma(1, f / 2))
    if excess <= 0:
        return float("inf"), float(np.exp(e.mean()))
    half = _inverse_trigamma(excess)
    return 2 * half, float(np.exp(e.mean() + digamma(half) - np.log(half)))


def _inverse_trigamma(y: float) -> float:
    """The x > 0 with polygamma(1, x) = y, by Newton's method on 1 / trigamma, which is convex."""
    x = 0.5 + 1 / y
    for _ in range(50):
        trigamma = float(polygamma(1, x))
        step = trigamma * (1 - trigamma / y) / float(polygamma(2, x))
        x += step
        if abs(step) < 1e-9 * x:
            break
    return x


def beyond_controls(effect: Vector, controls: Float[np.ndarray, "n k"]) -> tuple[Vector, Float[np.ndarray, " n"]]:
    """Two-sided p-values of "the token is one more draw from its controls"; the controls' standard deviation.

        t = (effect - mean(controls)) / (s * sqrt(1 + 1 / k))   on k - 1 degrees of freedom

    This is a prediction interval for one more token, not a test of the controls' mean: `s` does not shrink
    with k.
    """
    k = controls.shape[1]
    spread = controls.std(1, ddof=1)
    difference = effect - controls.mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(difference == 0, 0.0, difference / (spread * np.sqrt(1 + 1 / k)))
    return 2 * student.sf(np.abs(t), k - 1), spread


def step_up(p: Vector, rate: float) -> float:
    """The largest p-value that is rejected when the false discovery rate is held at `rate`; 0 if none is.

    >>> step_up(np.array([0.001, 0.02, 0.03, 0.9]), 0.05)
    0.03
    """
    p = np.sort(p[np.isfinite(p)])
    passed = np.flatnonzero(p <= rate * np.arange(1, len(p) + 1) / max(len(p), 1))
    return float(p[passed[-1]]) if len(passed) else 0.0
