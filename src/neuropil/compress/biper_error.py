r"""How far the signs of BiPer are from its sines: measured on a model, and in closed form for Laplace weights.

For $w$ with density $e^{-|w|/b} / 2b$ and $u = \omega b$,

$$m_1 = E|\sin \omega w| = \frac{u \coth(\pi / 2u)}{1 + u^2}, \qquad m_2 = E \sin^2 \omega w = \frac{2u^2}{1 + 4u^2}.$$

The least error $E(\sin \omega w - \gamma b(w))^2$ is $m_2 - m_1^2$, at $\gamma = m_1$: 0 for slow waves, the largest
(0.103) near u = 1, then 1/2 - 4/pi^2. With $\gamma = 1$ it is $1 - 2 m_1 + m_2$: from 1 down to 3/2 - 4/pi.

>>> [round(value, 4) for value in laplace_moments(1.0)], round(laplace_error(1.0), 4)
([0.5452, 0.4], 0.1028)

The formulas are derived here from the definition; arXiv:2404.01278 gives the setting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuropil.compress.biper import _signs, _some
from neuropil.compress.quantize.tiles import QuantizationError


def laplace_moments(u: float) -> tuple[float, float]:
    """E|sin(omega w)| and E sin^2(omega w) for Laplace weights, u = omega times their mean magnitude.

    Raises QuantizationError where u is not positive.
    """
    if not u > 0:
        raise QuantizationError(f"u={u}: the frequency times the mean magnitude of the weights is positive")
    return u / math.tanh(math.pi / (2 * u)) / (1 + u * u), 2 * u * u / (1 + 4 * u * u)


def laplace_error(u: float, unit: bool = False) -> float:
    """The mean squared distance of the sine from its sign times the best scale, or (`unit`) times 1."""
    first, second = laplace_moments(u)
    return 1 - 2 * first + second if unit else second - first * first


@dataclass(frozen=True)
class SineError:
    """One layer: `absolute` is mean|sin - sign| (the authors' measure), `least` and `unit` as in the module's text.

    `u` is omega mean|w|, `expected_least` and `expected_unit` what Laplace weights of this u would have, and `misfit`
    the Kolmogorov-Smirnov distance of the magnitudes from those of Laplace weights (0.08 for normal ones): how well
    the formula can fit.
    """

    absolute: float
    least: float
    unit: float
    u: float
    expected_least: float
    expected_unit: float
    misfit: float


@torch.no_grad()
def quantization_error(model: nn.Module) -> dict[str, SineError]:
    """The error of each binarized layer, by name; the authors' total is the sum of `absolute`.

    Raises QuantizationError where nothing is binarized, or the weights of a layer are all 0.
    """
    found = {}
    for name, step, w in _some(model):
        w = w.double()
        size = float(w.abs().mean())
        if size == 0:
            raise QuantizationError(f"the weights of {name} are all 0: they have no scale to compare with")
        wave, u = torch.sin(step.omega.double() * w), float(step.omega) * size
        signs = _signs(wave)
        first, second = float(wave.abs().mean()), float(wave.square().mean())
        found[name] = SineError(
            float((wave - signs).abs().mean()),
            second - first * first,
            1 - 2 * first + second,
            u,
            laplace_error(u),
            laplace_error(u, unit=True),
            _misfit(w.abs().flatten(), size),
        )
    return found


def _misfit(sizes: Tensor, scale: float) -> float:
    """The greatest distance between the distribution of magnitudes and the exponential one of the same mean."""
    count = len(sizes)
    wanted = -torch.expm1(-sizes.sort().values / scale)
    below = torch.arange(count, dtype=wanted.dtype, device=wanted.device) / count
    return float(torch.maximum((wanted - below).abs(), (wanted - below - 1 / count).abs()).max())
