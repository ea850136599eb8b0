r"""Where gradient descent takes a neuron: the force on its weights, the field of it on a plane, and what it predicts.

A hidden neuron of weights w and output weight s, for conditions with inputs $x_i$ and labels $y_i$ in {0, 1}, moves by

$$dw = E_i[\, s\,(y_i - \hat y_i)\, f'(w \cdot x_i)\, x_i \,].$$

At first $\hat y = 1/2$. Where f' is about 1 for all conditions (Tanh near 0) the neuron then moves along
$u = \sum_i (y_i - 1/2)\, x_i$, the direction of the labels. ReLU counts only the conditions it is active for, so that
each neuron moves along the inputs of its own subset, and what distinguishes these inputs is learned too.

`label_share` is how much of that first movement, squared and averaged over random initial weights, lies in the
directions of the labels. It needs only the inputs' inner products and $E[f'(a_i) f'(a_j)]$ over Gaussian
pre-activations:

>>> from neuropil.interpret.geometry_tasks import unstructured
>>> task = unstructured(exact=True)
>>> [round(label_share(task.means, task.labels, f, bias=False), 2) for f in ("identity", "tanh", "relu")]
[1.0, 0.97, 0.64]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuropil.interpret.geometry_networks import Networks, Nonlinearity, losses, nonlinearity

POINTS = (240, 331)  # of the grid on which expectations over two pre-activations are taken
REACH = 6.0  # standard deviations


def neuron_gradient(
    w: Float[Tensor, "*neurons d"],
    x: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    f: Nonlinearity | str,
    sign: float | Float[Tensor, "*neurons"] = 1.0,
    prediction: float | Float[Tensor, "*#neurons n"] = 0.5,
) -> Float[Tensor, "*neurons d"]:
    """The expected movement dw of every neuron; minus the gradient of the mean Bernoulli loss.

    `prediction` is the network's output, after the sigmoid: one number, or one for each condition.
    """
    f = nonlinearity(f)
    force = (y - torch.as_tensor(prediction, dtype=x.dtype)) * f.derivative(w @ x.T)
    return torch.as_tensor(sign, dtype=x.dtype)[..., None] * (force @ x) / len(x)


@dataclass(frozen=True, eq=False)
class GradientField:
    """The movement of neurons on a plane of weights.

    u, v     [d] unit vectors: the direction between the classes, and one within a class, orthogonal to u
    places   [p, p, 2] coordinates along u and v
    arrows   [p, p, 2] the movement there, along u and v
    """

    u: Float[Tensor, " d"]
    v: Float[Tensor, " d"]
    places: Float[Tensor, "p p 2"]
    arrows: Float[Tensor, "p p 2"]

    def project(self, w: Float[Tensor, "*neurons d"]) -> Float[Tensor, "*neurons 2"]:
        """Weights as places on the plane."""
        return torch.stack([w @ self.u, w @ self.v], dim=-1)


def weight_plane(x: Float[Tensor, "n d"], y: Float[Tensor, " n"]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Unit vectors: between the classes, and between two conditions of class 1 (made orthogonal to the first)."""
    own = (y > 0.5).nonzero().flatten()
    if len(own) < 2:
        raise ValueError(f"{len(own)} condition of class 1; a direction within the class needs two")
    u = (y - 0.5) @ x
    u = u / u.norm()
    v = x[own[0]] - x[own[1]]
    v = v - (v @ u) * u
    return u, v / v.norm()


def gradient_field(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    f: Nonlinearity | str,
    *,
    sign: float = 1.0,
    prediction: float | Float[Tensor, " n"] = 0.5,
    extent: float = 1.0,
    points: int = 21,
) -> GradientField:
    """`neuron_gradient` on a grid of the plane of `weight_plane`, from -extent to extent along both axes."""
    u, v = weight_plane(x, y)
    line = torch.linspace(-extent, extent, points, dtype=x.dtype)
    places = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    dw = neuron_gradient(places @ torch.stack([u, v]), x, y, f, sign, prediction)
    return GradientField(u, v, places, torch.stack([dw @ u, dw @ v], dim=-1))


def trajectories(
    w: Float[Tensor, "neurons d"],
    signs: Float[Tensor, " neurons"],
    x: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    f: Nonlinearity | str,
    *,
    lr: float = 0.1,
    steps: int = 100,
) -> Float[Tensor, "steps1 neurons d"]:
    """The weights of a network's neurons before and after every step of gradient descent, output weights fixed.

    The network's output is the sum over neurons of sign * f(w . x) / sqrt(neurons); the step is that of the loss
    times sqrt(neurons), so that it does not depend on how many there are.
    """
    f = nonlinearity(f)
    path = [w]
    for _ in range(steps):
        output = torch.sigmoid(signs @ f.forward(w @ x.T) / math.sqrt(len(w)))
        w = w + lr * neuron_gradient(w, x, y, f, signs, output)
        path.append(w)
    return torch.stack(path)


# ------------------------------------------------------------------------------------------------- the prediction


def derivative_kernel(
    K: Float[np.ndarray, "n n"], f: Nonlinearity | str, noise: float = 0.0
) -> Float[np.ndarray, "n n"]:
    """E[f'(a_i) f'(a_j)] for Gaussian pre-activations a of mean 0 and covariance K, by sums over a fine grid.

    `noise` is a variance that each pre-activation has on its own, also two of the same condition. For ReLU without it
    an entry is 1/4 + arcsin(correlation) / (2 pi).
    """
    f = nonlinearity(f)
    size = np.sqrt(np.diag(K) + noise)
    # Grids of different steps, so that no line of jumps runs along their points.
    (line, mass), (cross, weight) = (_normal_grid(points) for points in POINTS)
    out = np.empty_like(K)
    for i in range(len(K)):
        own = f.derivative(size[i] * line)
        for j in range(i + 1):
            rho = float(np.clip(K[i, j] / max(size[i] * size[j], 1e-300), -1, 1))
            if i == j and rho > 1 - 1e-12:
                out[i, i] = float(mass @ own.square())
                continue
            other = f.derivative(size[j] * (rho * line[:, None] + math.sqrt(1 - rho**2) * cross))
            out[i, j] = out[j, i] = float((mass * own) @ (other @ weight))
    return out


def _normal_grid(points: int) -> tuple[Float[Tensor, " points"], Float[Tensor, " points"]]:
    """Places, and the mass of a standard normal variable at them."""
    line = (torch.arange(points, dtype=torch.float64) + 0.5) * (2 * REACH / points) - REACH
    mass = torch.exp(-line.square() / 2)
    return line, mass / mass.sum()


def label_share(
    means: Float[np.ndarray, "n d"],
    labels: Bool[np.ndarray, "n k"],
    f: Nonlinearity | str,
    *,
    noise: float = 0.0,
    scale: float = 1.0,
    bias: bool = True,
) -> float:
    r"""Share of the first movement of a layer's weights that lies in the directions of the labels, from 0 to 1.

    For the initial weights of `Networks` (variance $scale^2/(3d)$, offsets too) and output weights that are
    independent of one another; `noise` is the inputs' standard deviation around their means. NaN where no neuron
    can be active.
    """
    x, errors = np.asarray(means, dtype=np.float64), labels.astype(np.float64) - 0.5
    K, variance = x @ x.T, scale**2 / (3 * x.shape[1])
    slopes = derivative_kernel(variance * (K + bias), f, variance * noise**2 * x.shape[1])
    basis = _span(x, errors)
    pairs = (errors @ errors.T) * slopes
    inside = x @ basis
    whole = float((pairs * K).sum())
    return float((pairs * (inside @ inside.T)).sum()) / whole if whole > 0 else math.nan


def measured_label_share(
    nets: Networks,
    x: Float[Tensor, "networks items d"],
    y: Float[Tensor, "networks items k"],
    means: Float[np.ndarray, "networks n d"],
    labels: Bool[np.ndarray, "networks n k"],
    likelihood: str = "bernoulli",
) -> Float[np.ndarray, " networks"]:
    """The share for real networks on noisy items: of the gradient of the first layer, by backpropagation.

    `means` and `labels` are those of each network's conditions; they only say which directions are the labels'.
    """
    weight = nets.weights[0]
    (gradient,) = torch.autograd.grad(losses(nets(x), y, likelihood).sum(), [weight])
    return moved_share(gradient.double().numpy(), means, labels)


def moved_share(
    moved: Float[np.ndarray, "networks width d"],
    means: Float[np.ndarray, "networks n d"],
    labels: Bool[np.ndarray, "networks n k"],
) -> Float[np.ndarray, " networks"]:
    """Of a movement of the first layer's weights, the share (squared) that lies in the directions of the labels."""
    shares = []
    for change, x, y in zip(moved, means, labels, strict=True):
        inside = change @ _span(x, y.astype(np.float64) - 0.5)
        whole = float((change**2).sum())
        shares.append(float((inside**2).sum()) / whole if whole > 0 else math.nan)
    return np.array(shares)


def _span(x: Float[np.ndarray, "n d"], errors: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "d r"]:
    """An orthonormal basis of the directions of the labels."""
    left, size, _ = np.linalg.svd(x.T @ errors, full_matrices=False)
    return left[:, size > 1e-10 * size.max()]
