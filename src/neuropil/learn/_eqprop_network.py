r"""Networks that settle: layers, the connections between them, and the dynamics that equilibrium propagation perturbs.

The state is one membrane potential $u$ a unit, its activity is $r = \phi(u)$, and one step is
$u \leftarrow u + \eta F$ with the force $F = H_\theta(r, x) - u + \beta\, \partial L / \partial r_{out}$ on the output
layer, $H_\theta(r, x) - u$ on the others. The paper takes $\eta = 1$. A smaller step has the same fixed points and
settles where the full step oscillates. Forward and backward weights are untied: each is a connection of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Inexact, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "ConvPool",
    "ConvPoolBack",
    "Dense",
    "EquilibriumNetwork",
    "State",
    "cast_call",
    "cnn",
    "dsilu",
    "loop",
    "mlp",
    "rotate",
    "sigmoid",
    "softmax_pool",
    "weight_angle",
]

State = dict[str, Tensor]  # name of a layer -> its units, [b, *shape]


def sigmoid(z: Inexact[Tensor, "*n"]) -> Inexact[Tensor, "*n"]:
    """$1 / (1 + e^{-4z + 2})$: from 0 to 1 over z in 0..1, slope at most 1; holomorphic."""
    return torch.sigmoid(4 * z - 2)


def dsilu(z: Inexact[Tensor, "*n"]) -> Inexact[Tensor, "*n"]:
    """$z\\,s(z)/2 + (1 - z/2)\\,s(z - 2)$ with the logistic function s: a soft step from 0 to 1; holomorphic."""
    return 0.5 * z * torch.sigmoid(z) + (1 - 0.5 * z) * torch.sigmoid(z - 2)


def softmax_pool(x: Inexact[Tensor, "b c h w"]) -> Inexact[Tensor, "b c h2 w2"]:
    """$\\sum x e^x / \\sum e^x$ over windows of 2 x 2, stride 2: a maximum that is holomorphic."""
    windows = _windows(x)
    return (windows * _softmax(windows)).sum(-1)


class Dense(nn.Module):
    """`pre` to `post` by one matrix, whatever the shapes of the two layers.

    Weights `[n_post, n_pre]` are truncated normals of variance 1 / n_pre, biases zero (the paper's initialisation).
    """

    def __init__(self, n_pre: int, n_post: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(_lecun(torch.empty(n_post, n_pre), n_pre))
        self.bias = nn.Parameter(torch.zeros(n_post)) if bias else None

    def forward(self, pre: Shaped[Tensor, "b ..."], post: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "b ..."]:
        return F.linear(pre.flatten(1), self.weight, self.bias).view_as(post)

    def reversed_weight(self) -> Tensor:
        """The weight that the opposite connection has when the two are symmetric."""
        return self.weight.T


class ConvPool(nn.Module):
    """Bottom-up: convolution 3 x 3 (`padding` 1 keeps the size, 0 is "valid"), then softmax pooling 2 x 2."""

    def __init__(self, channels_pre: int, channels_post: int, padding: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.padding = padding
        self.weight = nn.Parameter(_lecun(torch.empty(channels_post, channels_pre, 3, 3), 9 * channels_pre))
        self.bias = nn.Parameter(torch.zeros(channels_post)) if bias else None

    def forward(self, pre: Shaped[Tensor, "b c h w"], post: Shaped[Tensor, "b d h2 w2"]) -> Shaped[Tensor, "b d h2 w2"]:
        return softmax_pool(F.conv2d(pre, self.weight, self.bias, padding=self.padding))

    def reversed_weight(self) -> Tensor:
        """The weight that the opposite connection has when the two are symmetric."""
        return self.weight


class ConvPoolBack(ConvPool):
    """Top-down: the gradient, with respect to the lower activity, of $\\langle P(K * r_{low}), r_{high} \\rangle$.

    The kernel K is its own and has the shape of the bottom-up one: `ConvPoolBack(lower channels, upper channels)`.
    """

    def __init__(self, channels_low: int, channels_high: int, padding: int = 1) -> None:
        super().__init__(channels_low, channels_high, padding, bias=False)

    def forward(self, pre: Shaped[Tensor, "b d h2 w2"], post: Shaped[Tensor, "b c h w"]) -> Shaped[Tensor, "b c h w"]:
        z = F.conv2d(post, self.weight, padding=self.padding)
        windows = _windows(z)
        share = _softmax(windows)
        pooled = (windows * share).sum(-1, keepdim=True)
        slope = share * (1 + windows - pooled)  # dP/dz, by the quotient rule
        high = rearrange(slope * pre[..., None], "b c h w (i j) -> b c (h i) (w j)", i=2)
        return F.conv_transpose2d(high, self.weight, padding=self.padding)


class EquilibriumNetwork(nn.Module):
    """Layers of units that settle under an input, with any wiring.

    shapes       layer name -> shape of its units without the batch. `"out"` must be there; `"in"` is the input.
    connections  `"pre-post"` -> module called as `module(r_pre, r_post)`, giving the input of `post`: `Dense`,
                 `ConvPool`, `ConvPoolBack` or the user's own. Of two opposite connections the one listed
                 second is the backward one. `mlp`, `loop` and `cnn` build the paper's networks.
    classes      number of classes of a linear softmax readout of the output layer (outside the dynamics) with
                 cross entropy; None for the squared error $|r_{out} - y|^2 / 2$ of the output layer itself.
    activation   $\\phi$, elementwise; `sigmoid` (default), `dsilu`, or any function. Three or more nudges need a
                 holomorphic one.
    step_size    $\\eta$ in 0..1; the paper's is 1.

    Raises ValueError for connections between unknown layers and layers that nothing drives.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        connections: Mapping[str, nn.Module],
        *,
        classes: int | None = None,
        activation: Callable[[Tensor], Tensor] = sigmoid,
        step_size: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < step_size <= 1:
            raise ValueError(f"step_size is {step_size}; expected above 0, at most 1")
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.activation, self.step_size, self.classes = activation, step_size, classes
        self.ends = {name: _ends(name, self.shapes) for name in connections}
        _check_driven(self.shapes, {post for _, post in self.ends.values()})
        self.connections = nn.ModuleDict(connections)
        self.readout = Dense(math.prod(self.shapes["out"]), classes) if classes is not None else None

    def rest(self, x: Inexact[Tensor, "b ..."]) -> State:
        """All potentials zero, for the batch, type and device of `x`."""
        return {name: x.new_zeros(len(x), *shape) for name, shape in self.shapes.items()}

    def activate(self, u: State) -> State:
        return {name: self.activation(value) for name, value in u.items()}

    def inputs(self, x: Inexact[Tensor, "b ..."]) -> State:
        """What reaches each layer from the input. It does not change while the network settles."""
        total = self.rest(x)
        for name, (pre, post) in self.ends.items():
            if pre == "in":
                total[post] = total[post] + self.connections[name](x, total[post])
        return total

    def drive(self, r: State, inputs: State) -> State:
        """$H_\\theta(r, x)$, from activities and `inputs(x)`."""
        total = dict(inputs)
        for name, (pre, post) in self.ends.items():
            if pre != "in":
                total[post] = total[post] + self.connections[name](r[pre], r[post])
        return total

    def coupling(self, r: State) -> State:
        """$H_\\theta(r, 0) - r$: how activities drive one another; its Jacobian is what homeostasis makes symmetric."""
        total = self.drive(r, {name: torch.zeros_like(value) for name, value in r.items()})
        return {name: total[name] - r[name] for name in r}

    def logits(self, r_out: Inexact[Tensor, "b ..."]) -> Inexact[Tensor, "b k"]:
        """The readout's logits; without a readout, the output layer's activities."""
        if self.readout is None:
            return r_out.flatten(1)
        return F.linear(r_out.flatten(1), self.readout.weight, self.readout.bias)

    def loss(self, r_out: Inexact[Tensor, "b ..."], y: Shaped[Tensor, "b ..."]) -> Inexact[Tensor, " b"]:
        """The loss of each example: cross entropy, or half the squared error."""
        if self.readout is None:
            return 0.5 * (r_out - self.target(y, r_out)).square().flatten(1).sum(1)
        return F.cross_entropy(self.logits(r_out), self.target(y, r_out), reduction="none")

    def target(self, y: Shaped[Tensor, "b ..."], like: Tensor) -> Tensor:
        """`y` as the loss compares it: class indices become one-hot rows; anything else must fit as it is."""
        width = self.classes if self.classes is not None else math.prod(self.shapes["out"])
        if y.ndim == 1 and not (y.is_floating_point() or y.is_complex()):
            y = F.one_hot(y, width)
        shape = (len(y), width) if self.readout is not None else (len(y), *self.shapes["out"])
        if y.numel() != math.prod(shape):
            raise ValueError(f"targets {tuple(y.shape)}; expected class indices [b] or values {['b', *shape[1:]]}")
        return y.reshape(shape).to(like.dtype)

    def output_error(self, r_out: Inexact[Tensor, "b ..."], y: Shaped[Tensor, "b ..."]) -> Inexact[Tensor, "b ..."]:
        """$\\partial L / \\partial r_{out}$ of each example, as a holomorphic function of `r_out`."""
        if self.readout is None:
            return r_out - self.target(y, r_out)
        gap = _softmax(self.logits(r_out)) - self.target(y, r_out)
        return (gap @ self.readout.weight).view_as(r_out)

    def force(
        self,
        u: State,
        x: Inexact[Tensor, "b ..."],
        y: Shaped[Tensor, "b ..."] | None = None,
        beta: float | Tensor = 0.0,
        *,
        inputs: State | None = None,
    ) -> State:
        """$F$: the change of every potential in a step of size 1. `beta` is one number, or one an example."""
        r = self.activate(u)
        total = self.drive(r, self.inputs(x) if inputs is None else inputs)
        if y is not None:
            error = self.output_error(r["out"], y)
            nudge = beta.view(-1, *[1] * (error.ndim - 1)) if isinstance(beta, Tensor) and beta.ndim else beta
            total["out"] = total["out"] + nudge * error
        return {name: total[name] - u[name] for name in u}

    def forward(
        self,
        x: Inexact[Tensor, "b ..."],
        steps: int = 150,
        u: State | None = None,
        y: Shaped[Tensor, "b ..."] | None = None,
        beta: float | Tensor = 0.0,
    ) -> State:
        """The potentials after so many steps from `u` (from rest if None): free without `y`, else nudged by `beta`."""
        inputs = self.inputs(x)
        u = self.rest(x) if u is None else u
        for _ in range(steps):
            force = self.force(u, x, y, beta, inputs=inputs)
            u = {name: value + self.step_size * force[name] for name, value in u.items()}
        return u

    @torch.no_grad()
    def predict(self, x: Inexact[Tensor, "b ..."], steps: int = 150) -> Inexact[Tensor, "b k"]:
        """The logits (or outputs) once the network has settled freely."""
        return self.logits(self.activation(self(x, steps)["out"]))

    def pairs(self) -> list[tuple[str, str]]:
        """Names of opposite connections, (forward, backward)."""
        names = list(self.ends)
        opposite = {name: "-".join(reversed(self.ends[name])) for name in names}
        return [(n, opposite[n]) for i, n in enumerate(names) if opposite[n] in names[i + 1 :]]


def cast_call(network: EquilibriumNetwork, dtype: torch.dtype, *args: Any) -> State:
    """`network(*args)` with constant weights in another dtype: half precision, or complex for complex nudges."""
    values = {name: _cast(p.detach(), dtype) for name, p in (*network.named_parameters(), *network.named_buffers())}
    return torch.func.functional_call(network, values, tuple(_cast(a, dtype) for a in args))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: _cast(entry, dtype) for name, entry in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@torch.no_grad()
def rotate(network: EquilibriumNetwork, alpha: float) -> None:
    """Set backward weights, in place, to $\\sin\\alpha\\, B + \\cos\\alpha\\, W^T$ (`alpha` in degrees).

    At 0 the weights start symmetric, at 90 unrelated; either way they stay untied. Raises ValueError where
    no connection has an opposite one, or where two opposite ones differ in shape.
    """
    angle = math.radians(alpha)
    for forward, backward in _weights(network):
        backward.mul_(math.sin(angle)).add_(math.cos(angle) * forward)


@torch.no_grad()
def weight_angle(network: EquilibriumNetwork) -> float:
    """The angle in degrees between all forward and all backward weights, transposed. Raises as `rotate` does."""
    pairs = [(f.flatten().double(), b.flatten().double()) for f, b in _weights(network)]
    forward, backward = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    # atan2 of the two diagonals of the rhombus: exact near 0 degrees, where arccos loses half its digits.
    unit, other = F.normalize(forward, dim=0), F.normalize(backward, dim=0)
    return math.degrees(2 * math.atan2(float((unit - other).norm()), float((unit + other).norm())))


def _weights(network: EquilibriumNetwork) -> list[tuple[Tensor, Tensor]]:
    pairs = [(network.connections[f], network.connections[b]) for f, b in network.pairs()]
    if not pairs:
        raise ValueError(f"no two of the connections {', '.join(network.ends)} are opposite; there is no angle")
    out = []
    for (f, b), (forward, backward) in zip(network.pairs(), pairs, strict=True):
        turn = getattr(forward, "reversed_weight", None)
        if not callable(turn):
            raise ValueError(f"{f} is a {type(forward).__name__} without a method reversed_weight() -> Tensor")
        turned, own = turn(), backward.weight
        if not isinstance(own, Tensor) or turned.shape != own.shape:
            raise ValueError(f"{b} has weights {own.shape}; opposite to {f} they must be {tuple(turned.shape)}")
        out.append((turned, own))
    return out


def mlp(
    n_in: int, hidden: Sequence[int], classes: int | None, *, n_out: int | None = None, **options: Any
) -> EquilibriumNetwork:
    """Dense layers coupled both ways; `mlp(784, (256, 256), 10)` is the paper's for Fashion-MNIST.

    The output layer has `n_out` units, by default one a class, under a softmax readout; with `classes=None` it is
    the output itself, under the squared error. `options` go to `EquilibriumNetwork`.
    """
    sizes = _sizes(hidden, classes, n_out)
    connections = {"in-l1": Dense(n_in, sizes["l1"])}
    for low, high in pairwise(sizes):
        connections[f"{low}-{high}"] = Dense(sizes[low], sizes[high])
        connections[f"{high}-{low}"] = Dense(sizes[high], sizes[low], bias=False)
    return EquilibriumNetwork({n: (s,) for n, s in sizes.items()}, connections, classes=classes, **options)


def loop(
    n_in: int, hidden: Sequence[int], classes: int | None, *, n_out: int | None = None, **options: Any
) -> EquilibriumNetwork:
    """A ring: in, l1, l2, ..., out, and out back to l1. No connection has an opposite one. Arguments as for `mlp`."""
    sizes = _sizes(hidden, classes, n_out)
    connections = {"in-l1": Dense(n_in, sizes["l1"])}
    connections |= {f"{a}-{b}": Dense(sizes[a], sizes[b]) for a, b in pairwise(sizes)}
    connections["out-l1"] = Dense(sizes["out"], sizes["l1"], bias=False)
    return EquilibriumNetwork({n: (s,) for n, s in sizes.items()}, connections, classes=classes, **options)


def _sizes(hidden: Sequence[int], classes: int | None, n_out: int | None) -> dict[str, int]:
    if not hidden or (classes is None and n_out is None):
        raise ValueError(
            f"hidden={list(hidden)}, classes={classes}, n_out={n_out}; give hidden layers, and classes or n_out"
        )
    return {f"l{i}": size for i, size in enumerate(hidden, 1)} | {"out": n_out or classes or 0}


def cnn(
    classes: int | None,
    *,
    image: tuple[int, int, int] = (3, 32, 32),
    channels: Sequence[int] = (128, 256, 512, 512),
    activation: Callable[[Tensor], Tensor] = dsilu,
    **options: Any,
) -> EquilibriumNetwork:
    """Convolutions coupled both ways; the defaults are the paper's network for CIFAR and ImageNet 32 x 32.

    `channels` are those of conv1, conv2, ..., out. Each layer halves height and width; the last convolution is
    "valid". Raises ValueError where `image` cannot be halved so often.

    The paper trains it with T1=250, T2=40, homeostasis 15 (CIFAR) or 10 (ImageNet), batches of 256, and SGD: momentum
    0.9, weight decay 1e-4 (readout 2e-4), learning rate 7e-3 (CIFAR) or 5e-3 (ImageNet), falling as a cosine, times 25
    for in-conv1, and both ways 15 for conv1-conv2, 10 for conv2-conv3 and 8 for conv3-out, 5 for the readout.
    """
    names = [*[f"conv{i}" for i in range(1, len(channels))], "out"]
    depth, height, width = image
    shapes: dict[str, tuple[int, ...]] = {}
    connections: dict[str, nn.Module] = {}
    low, low_channels = "in", depth
    for name, count in zip(names, channels, strict=True):
        padding = 0 if name == "out" else 1
        before = (height - 2 + 2 * padding, width - 2 + 2 * padding)
        if min(before) < 2 or before[0] % 2 or before[1] % 2:
            raise ValueError(
                f"image {image}: {name} would pool {before[0]} x {before[1]}; expected even sizes from 2 up"
            )
        height, width = before[0] // 2, before[1] // 2
        shapes[name] = (count, height, width)
        connections[f"{low}-{name}"] = ConvPool(low_channels, count, padding)
        if low != "in":
            connections[f"{name}-{low}"] = ConvPoolBack(low_channels, count, padding)
        low, low_channels = name, count
    return EquilibriumNetwork(shapes, connections, classes=classes, activation=activation, **options)


def _windows(x: Tensor) -> Tensor:
    return rearrange(x, "b c (h i) (w j) -> b c h w (i j)", i=2, j=2)


def _softmax(z: Tensor) -> Tensor:
    """Softmax over the last axis, also of complex numbers: the largest real part is taken off first."""
    if not z.is_complex():
        return z.softmax(-1)
    power = (z - z.real.detach().amax(-1, keepdim=True)).exp()
    return power / power.sum(-1, keepdim=True)


def _lecun(weight: Tensor, fan_in: int) -> Tensor:
    """Normal, cut at two standard deviations, then of variance 1 / fan_in."""
    std = fan_in**-0.5 / 0.87962566103423978
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _ends(name: str, shapes: Mapping[str, Any]) -> tuple[str, str]:
    pre, _, post = name.partition("-")
    if pre not in {"in", *shapes} or post not in shapes:
        raise ValueError(f"connection {name!r}; expected 'pre-post' with layers among in (as pre), {', '.join(shapes)}")
    return pre, post


def _check_driven(shapes: Mapping[str, Any], driven: set[str]) -> None:
    if "out" not in shapes or "in" in shapes:
        raise ValueError(f"layers {', '.join(shapes)}; expected one called 'out' and none called 'in'")
    if idle := [name for name in shapes if name not in driven]:
        raise ValueError(f"nothing drives {', '.join(idle)}; add a connection 'pre-{idle[0]}'")
