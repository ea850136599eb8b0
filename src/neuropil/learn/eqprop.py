r"""Train a network by watching how it settles: no backward pass, and forward and backward weights need not agree.

A recurrent network settles to a fixed point $u^*$ of its force $F_\theta(u, x)$. Then its output layer is nudged by
$\beta\, \partial L/\partial r_{out}$, and it settles again. From the response $a = dr/d\beta$ of the activities
$r = \phi(u)$ every connection learns by what its two ends know,
$$\nabla_\theta L \approx \frac{1}{B} \sum_{batch} \Big(\frac{\partial F}{\partial \theta}\Big|_{u^*}\Big)^T a,
\qquad \text{for a matrix from layer } i \text{ to } j:\quad dW = a_j\, r_i^T.$$
Two things stand between this and the gradient of backpropagation:

* *the finite nudge*. With N nudges on a circle in the complex plane, the Cauchy integral
  $a = \frac{1}{N} \sum_k \mathrm{Re}[\,r(\beta e^{2\pi i k/N}) / (\beta e^{2\pi i k/N})\,]$ is exact up to order
  $\beta^N$ (`n_nudges` > 2; the activation must be holomorphic). One (`1`) and two opposite (`2`) real nudges, and the
  derivative itself by automatic differentiation (`0`), are there too.
* *asymmetry*. The exact error is $\delta = -J^{-T}\, dL/du$ with $J = dF/du$, the network answers with $J^{-1}$.
  *Jacobian homeostasis* adds $\lambda\, E_\epsilon[\lVert J\epsilon\rVert^2 - \epsilon^T J^2\epsilon]$, which is
  $2\lambda\lVert (J - J^T)/2\rVert_F^2$: it makes the Jacobian, not the weights, symmetric, and so works without any
  reciprocal connections.

>>> _ = torch.manual_seed(0)
>>> x = torch.rand(32, 6); y = (x[:, 0] > 0.5).long()
>>> network = mlp(6, (8,), 2, step_size=0.5)
>>> rotate(network, 90.0)  # backward weights unrelated to the forward ones
>>> adam = torch.optim.Adam(network.parameters(), lr=0.03)
>>> trainer = EquilibriumPropagation(network, adam, n_nudges=4, T1=60, T2=20, homeostasis=1.0)
>>> before = gradient_angle(network, x, y)["all"]  # degrees from the gradient of backpropagation
>>> losses = [trainer.step((x, y)).loss for _ in range(40)]
>>> before > 40, gradient_angle(network, x, y)["all"] < 10, losses[-1] < 0.8 * losses[0]
(True, True, True)

`ep_grad` does the same for one batch and fills `.grad`, for any optimizer and any training loop. `gradient_angle` and
`error_alignment` say how far the estimate is from backpropagation; `exact_error`, `rbp_grad` and `bp_grad` are
the baselines (recurrent backpropagation, and backpropagation through the last steps). `jacobian_homeostasis_loss`
serves any fixed-point model.

Chosen where the paper leaves it open, or otherwise than in its code: a response that is not finite raises ModelError
(the code puts zeros); online, T1 // T2 must be whole turns of N nudges, since only whole turns cancel; a free
phase that has not settled (mean $|F|$ above 1e-3) warns; whether activations are holomorphic is tested at a random
complex point, which finds `relu`, `abs` and maxima, but not a function that is holomorphic in pieces;
`EquilibriumNetwork(step_size=...)` below 1 settles where the paper's full step oscillates.

Source: Axel Laborieux and Friedemann Zenke, "Improving equilibrium propagation without weight symmetry through
Jacobian homeostasis", ICLR 2024, arXiv:2309.02214.
"""

from __future__ import annotations

import math
import warnings
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from neuropil.learn._eqprop_jacobian import jacobian, jacobian_homeostasis_loss, symmetry_score
from neuropil.learn._eqprop_network import (
    ConvPool,
    ConvPoolBack,
    Dense,
    EquilibriumNetwork,
    State,
    cast_call,
    cnn,
    dsilu,
    loop,
    mlp,
    rotate,
    sigmoid,
    softmax_pool,
    weight_angle,
)
from neuropil.learn._eqprop_response import MODES, check_nudges, exact_error, online, response

__all__ = [
    "ConvPool",
    "ConvPoolBack",
    "Dense",
    "EquilibriumNetwork",
    "EquilibriumPropagation",
    "NotSettled",
    "Options",
    "Outcome",
    "bp_grad",
    "cnn",
    "dsilu",
    "ep_grad",
    "error_alignment",
    "exact_error",
    "gradient_angle",
    "jacobian",
    "jacobian_homeostasis_loss",
    "loop",
    "mlp",
    "rbp_grad",
    "residual",
    "response",
    "rotate",
    "sigmoid",
    "softmax_pool",
    "symmetry_score",
    "weight_angle",
]

SETTLED = 1e-3


class NotSettled(UserWarning):
    """The free phase has not reached its fixed point, so the gradient is biased."""


@dataclass(frozen=True)
class Options:
    """How a gradient is estimated. Raises ValueError for nudges that contradict one another.

    beta         radius of the nudges (unused by `n_nudges=0`); the paper tries 0.05, 0.5 and, for convolutions, 1.
    n_nudges     0: the derivative by automatic differentiation, as in most runs of the paper. 1 and 2: real
                 nudges to one side and to both. More: complex ones, on a circle.
    T1, T2       steps without a nudge, and with each of them.
    mode         "auto" as above; "finite" and "holomorphic" insist on real and complex nudges; "online" never returns
                 to the free state: T1 // T2 blocks of T2 steps, the nudge turning by 1/N from block to block.
    homeostasis  the weight $\\lambda$ of the Jacobian's asymmetry, 0 for none; `n_draws` probes an example.
    free_dtype   the precision of the free phase (torch.float16 in the paper's convolutions); None for the network's.
    """

    beta: float = 0.5
    n_nudges: int = 0
    T1: int = 150
    T2: int = 20
    mode: str = "auto"
    homeostasis: float = 0.0
    n_draws: int = 5
    free_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_nudges(self.beta, self.n_nudges, self.mode, MODES)
        if self.T1 < 0 or self.T2 < 1:
            raise ValueError(f"T1={self.T1}, T2={self.T2}; expected 0 or more free steps, and 1 or more nudged ones")
        if self.homeostasis < 0 or self.n_draws < 1:
            raise ValueError(
                f"homeostasis={self.homeostasis}, n_draws={self.n_draws}; expected 0 or more, and 1 or more"
            )


@dataclass(frozen=True)
class Outcome:
    """What a gradient was computed from: the free state, and the mean over the batch of three numbers."""

    u: State
    loss: float
    residual: float  # |F| of the free phase, 0 when settled
    homeostasis: float = math.nan  # the penalty before its weight; NaN where it was not asked for


# --- gradients ---------------------------------------------------------------------------------------


def ep_grad(
    network: EquilibriumNetwork,
    x: Float[Tensor, "b ..."],
    y: Shaped[Tensor, "b ..."],
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Outcome:
    """Add the gradient of equilibrium propagation to `.grad` of the network's parameters, as `backward()` would.

    `y`: class indices `[b]`, or values of the network's outputs. `options`: see `Options`. Probes of homeostasis are
    drawn from `generator`. The readout, if any, gets its direct gradient.

    Warns `NotSettled`; raises what `Options` and `response` raise.
    """
    surrogate, outcome = _surrogate(network, x, y, Options(**options), generator)
    surrogate.backward()
    return outcome


def rbp_grad(
    network: EquilibriumNetwork,
    x: Float[Tensor, "b ..."],
    y: Shaped[Tensor, "b ..."],
    *,
    T1: int = 150,
    T2: int = 20,
    method: str = "recurrent",
) -> Outcome:
    """Add the gradient of recurrent backpropagation to `.grad`: `T1` free steps, then `T2` steps of `exact_error`."""
    u = _free(network, x, T1)
    delta = exact_error(network, u, x, y, steps=T2, method=method)
    _local(network, u, x, y, delta).backward()
    return _outcome(network, u, x, y)


def bp_grad(
    network: EquilibriumNetwork, x: Float[Tensor, "b ..."], y: Shaped[Tensor, "b ..."], *, T1: int = 150, T2: int = 20
) -> Outcome:
    """Add the gradient of backpropagation through `T2` further steps after `T1` free ones to `.grad`."""
    u = network(x, T2, _free(network, x, T1))
    network.loss(network.activation(u["out"]), y).mean().backward()
    return _outcome(network, {name: part.detach() for name, part in u.items()}, x, y)


def _surrogate(
    network: EquilibriumNetwork, x: Tensor, y: Tensor, options: Options, generator: torch.Generator | None = None
) -> tuple[Tensor, Outcome]:
    """A scalar with the gradient of equilibrium propagation."""
    x, beta, n_nudges = x.detach(), options.beta, options.n_nudges
    if options.mode == "online":
        u, answer = online(network, x, y, beta, n_nudges, options.T1, options.T2)
    else:
        u = _free(network, x, options.T1, options.free_dtype)
        answer = response(network, u, x, y, beta=beta, n_nudges=n_nudges, steps=options.T2, mode=options.mode)
    total, asymmetry = _local(network, u, x, y, answer), math.nan
    if options.homeostasis:
        penalty = jacobian_homeostasis_loss(network.coupling, network.activate(u), options.n_draws, generator)
        total, asymmetry = total + options.homeostasis * penalty, float(penalty.detach())
    return total, _outcome(network, u, x, y, asymmetry)


@torch.no_grad()
def _free(network: EquilibriumNetwork, x: Tensor, steps: int, dtype: torch.dtype | None = None) -> State:
    if dtype is None:
        return network(x, steps)
    return {name: part.to(x.dtype) for name, part in cast_call(network, dtype, x, steps).items()}


def _local(network: EquilibriumNetwork, u: State, x: Tensor, y: Tensor, error: State) -> Tensor:
    """A scalar whose gradient is $(\\partial F/\\partial\\theta)^T$ error (mean over the batch) and the readout's."""
    r = {name: part.detach() for name, part in network.activate(u).items()}
    drive = network.drive(r, network.inputs(x.detach()))
    local = sum((drive[name] * error[name]).sum() for name in u)
    return local / len(x) + network.loss(r["out"], y).mean()


@torch.no_grad()
def _outcome(network: EquilibriumNetwork, u: State, x: Tensor, y: Tensor, asymmetry: float = math.nan) -> Outcome:
    left = float(residual(network, u, x).mean())
    if not left <= SETTLED:
        warnings.warn(  # always in the same words, so that a training loop is told once
            f"the free phase has not settled (Outcome.residual, the mean |F|, is above {SETTLED:g}), so the gradient "
            "is biased: take more free steps (T1), or build the network with a step_size below 1",
            NotSettled,
            stacklevel=3,
        )
    return Outcome(u, float(network.loss(network.activation(u["out"]), y).mean()), left, asymmetry)


# --- diagnostics -------------------------------------------------------------------------------------


@torch.no_grad()
def residual(network: EquilibriumNetwork, u: State, x: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """$|F|$ of each example without a nudge: 0 at a fixed point."""
    force = network.force(u, x)
    return torch.cat([part.flatten(1) for part in force.values()], 1).norm(dim=1)


def gradient_angle(
    network: EquilibriumNetwork, x: Float[Tensor, "b ..."], y: Shaped[Tensor, "b ..."], **options: Any
) -> dict[str, float]:
    """The angle in degrees between the gradient of `ep_grad(network, x, y, **options)` and backpropagation's.

    One entry a parameter, and "all" for everything but the readout, whose gradient both take alike.
    Backpropagation is recurrent, at the same free state, for T1 steps. `.grad` is left alone; a homeostatic term
    counts as part of the estimate.
    """
    chosen = Options(**options)
    surrogate, outcome = _surrogate(network, x, y, chosen)
    delta = exact_error(network, outcome.u, x, y, steps=chosen.T1)
    names, parameters = zip(
        *[(n, p) for n, p in network.named_parameters() if p.requires_grad and not n.startswith("readout")], strict=True
    )
    ours, exact = (
        torch.autograd.grad(scalar, parameters, allow_unused=True, materialize_grads=True)
        for scalar in (surrogate, _local(network, outcome.u, x, y, delta))
    )
    flat = [torch.cat([g.flatten() for g in gradient]) for gradient in (ours, exact)]
    angles = {name: _angle(a, b) for name, a, b in zip(names, ours, exact, strict=True)}
    return angles | {"all": _angle(*flat)}


def error_alignment(
    network: EquilibriumNetwork,
    x: Float[Tensor, "b ..."],
    y: Shaped[Tensor, "b ..."],
    *,
    beta: float = 0.5,
    n_nudges: int = 0,
    T1: int = 150,
    T2: int = 20,
) -> dict[str, float]:
    """Cosine between the response and the exact error (of T1 steps), mean over examples: one a layer, and "all"."""
    u = _free(network, x, T1)
    answer = response(network, u, x, y, beta=beta, n_nudges=n_nudges, steps=T2)
    delta = exact_error(network, u, x, y, steps=T1)
    pairs = {name: (answer[name].flatten(1), delta[name].flatten(1)) for name in u}
    pairs["all"] = tuple(torch.cat([pair[side] for pair in pairs.values()], 1) for side in (0, 1))  # type: ignore[assignment]
    return {name: float(torch.cosine_similarity(a, b).mean()) for name, (a, b) in pairs.items()}


def _angle(a: Tensor, b: Tensor) -> float:
    """In degrees, exact near 0; NaN where one is zero."""
    a, b = a.flatten().double(), b.flatten().double()
    if not (a.any() and b.any()):
        return math.nan
    a, b = a / a.norm(), b / b.norm()
    return math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm())))


# --- the trainer -------------------------------------------------------------------------------------


class EquilibriumPropagation:
    """Trains a network batch by batch: `ep_grad`, then the optimizer's step.

    For `options` see `Options`; `homeostasis` is the paper's $\\lambda$ (1 for its dense network, 0.1 for the
    ring, 15 and 10 for convolutions). Probes are drawn from `seed`. The network is trained in place.
    """

    def __init__(
        self, network: EquilibriumNetwork, optimizer: torch.optim.Optimizer, *, seed: int = 0, **options: Any
    ) -> None:
        self.network, self.optimizer, self.options = network, optimizer, Options(**options)
        device = next(network.parameters()).device
        self.generator = torch.Generator(device).manual_seed(seed)

    def step(self, batch: tuple[Tensor, Tensor]) -> Outcome:
        """One update on `(x, y)`. Its `Outcome` is from before the update."""
        self.optimizer.zero_grad()
        outcome = ep_grad(self.network, *batch, generator=self.generator, **vars(self.options))
        self.optimizer.step()
        return outcome

    def predict(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b k"]:
        """Logits (or outputs) after T1 free steps."""
        return self.network.predict(x, self.options.T1)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer and the state of the probes: all that the next steps depend on."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))  # torch would share its tensors
        self.generator.set_state(state["generator"].cpu())
