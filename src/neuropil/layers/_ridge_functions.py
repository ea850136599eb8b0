"""The activations of random networks, with what ridgelet analysis and the certificate must know of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    r"""One activation $\sigma$.

    function    $\sigma(z)$, elementwise
    fourier     $\hat\sigma(w) = \int \sigma(z) e^{-iwz} dz$ at w > 0 (away from 0, where it may be singular); None
                for the cosine, whose spectrum is two atoms at w = 1 and -1
    even        whether $\hat\sigma$ is even (and real) away from 0; else it is odd (and imaginary)
    pole        $\hat\sigma(w)$ grows as $|w|^{-pole}$ at 0
    strip       largest $|\sigma(z)|$ where $|Im\,z| \le s$, as a function of s; None where $\sigma$ is not analytic
    """

    name: str
    function: Callable[[Tensor], Tensor]
    fourier: Callable[[Float[np.ndarray, " w"]], Complex[np.ndarray, " w"]] | None
    even: bool
    pole: int
    strip: Callable[[float], float] | None


def _sigmoid_strip(s: float) -> float:
    """|1 + e^-z| is at least 1 up to an angle of pi/2, then sin s; the pole is at pi."""
    if s >= math.pi:
        return math.inf
    return 1.0 if s <= math.pi / 2 else 1 / math.sin(s)


def _tanh_strip(s: float) -> float:
    return max(1.0, math.tan(s)) if s < math.pi / 2 else math.inf


ACTIVATIONS = {
    entry.name: entry
    for entry in (
        Activation("sigmoid", torch.sigmoid, lambda w: -1j * math.pi / np.sinh(math.pi * w), False, 1, _sigmoid_strip),
        Activation("tanh", torch.tanh, lambda w: -1j * math.pi / np.sinh(math.pi * w / 2), False, 1, _tanh_strip),
        Activation(
            "gaussian",
            lambda z: torch.exp(-0.5 * z * z),
            lambda w: math.sqrt(2 * math.pi) * np.exp(-(w**2) / 2) + 0j,
            True,
            0,
            lambda s: math.exp(min(s * s / 2, 700)),
        ),
        Activation("relu", torch.relu, lambda w: -(w**-2.0) + 0j, True, 2, None),
        Activation("cos", torch.cos, None, True, 0, lambda s: math.cosh(min(s, 700))),
    )
}


def activation_named(name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def hidden(
    x: Float[np.ndarray, "n m"], a: Float[np.ndarray, "d m"], b: Float[np.ndarray, " d"], activation: str
) -> Float[np.ndarray, "n d"]:
    r"""The feature matrix $H_{ij} = \sigma(a_j \cdot x_i - b_j)$, in float64."""
    z = torch.from_numpy(x @ a.T - b)
    return activation_named(activation).function(z).numpy()
