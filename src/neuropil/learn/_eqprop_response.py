"""Two kinds of neuronal error: what a network answers to a nudge, and what backpropagation would send back."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from neuropil.errors import ModelError
from neuropil.learn._eqprop_network import EquilibriumNetwork, State, cast_call

__all__ = ["MODES", "check_nudges", "exact_error", "online", "response"]

MODES = ("auto", "finite", "holomorphic", "online")
COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
NOT_HOLOMORPHIC = (
    "complex nudges need functions that are holomorphic (sigmoid, dsilu, softmax_pool; not "
    "relu, abs or maxima), and this network's are not: change them, or take n_nudges 0, 1 or 2."
)


@torch.no_grad()
def response(
    network: EquilibriumNetwork,
    u: State,
    x: Float[Tensor, "b ..."],
    y: Shaped[Tensor, "b ..."],
    *,
    beta: float = 0.5,
    n_nudges: int = 0,
    steps: int = 20,
    mode: str = "auto",
) -> State:
    """$a = dr/d\\beta$ at $\\beta = 0$, of the activities, from the free state `u`: the network's own errors.

    n_nudges  0: the derivative itself, through `steps` nudged steps. 1: $(r(\\beta) - r^*)/\\beta$. 2: $(r(\\beta) -
              r(-\\beta))/2\\beta$. More: a Cauchy integral over a circle of radius `beta`.
    mode      "auto" chooses as above; "finite" insists on real nudges, "holomorphic" on complex ones.

    Raises ValueError for impossible nudges and functions that are not holomorphic, ModelError where the
    nudged phase ends in infinity or NaN.
    """
    check_nudges(beta, n_nudges, mode, ("auto", "finite", "holomorphic"))
    if n_nudges == 0:
        found = _derivative(network, u, x, y, steps)
    elif mode == "holomorphic" or n_nudges > 2:
        found = _cauchy(network, u, x, y, beta, n_nudges, steps)
    else:
        found = _difference(network, u, x, y, beta, n_nudges, steps)
    return _finite(found, beta)


def _derivative(network: EquilibriumNetwork, u: State, x: Tensor, y: Tensor, steps: int) -> State:
    """Forward-mode derivative, as the derivative of a backward pass: linear in its seed, and fast in torch."""
    with torch.enable_grad():
        beta = x.new_zeros(()).requires_grad_()
        u = {name: part + 0 * beta for name, part in u.items()}  # layers that no nudge has reached answer with zero
        r = network.activate(cast_call(network, x.dtype, x, steps, u, y, beta))
        seeds = [torch.zeros_like(part, requires_grad=True) for part in r.values()]
        (linear,) = torch.autograd.grad(list(r.values()), beta, seeds, create_graph=True)
        found = torch.autograd.grad(linear, seeds)
    return dict(zip(r, found, strict=True))


def _difference(
    network: EquilibriumNetwork, u: State, x: Tensor, y: Tensor, beta: float, n_nudges: int, steps: int
) -> State:
    up = network.activate(network(x, steps, u, y, beta))
    down = network.activate(u if n_nudges == 1 else network(x, steps, u, y, -beta))
    return {name: (up[name] - down[name]) / (n_nudges * beta) for name in u}


def _cauchy(
    network: EquilibriumNetwork, u: State, x: Tensor, y: Tensor, beta: float, n_nudges: int, steps: int
) -> State:
    """All nudges at once, stacked along the batch; conjugate nudges give conjugate responses, so half of them do."""
    _check_holomorphic(network, u, x)
    k = torch.arange(n_nudges // 2 + 1, dtype=x.dtype, device=x.device)
    circle = torch.polar(torch.full_like(k, beta), 2 * math.pi * k / n_nudges)
    weight = torch.where((k == 0) | (2 * k == n_nudges), 1.0, 2.0).to(x.dtype) / n_nudges
    many, size = len(k), len(x)
    stacked = {name: part.repeat(many, *[1] * (part.ndim - 1)) for name, part in {**u, "x": x, "y": y}.items()}
    x, y = stacked.pop("x"), stacked.pop("y")
    settled = cast_call(network, COMPLEX[x.dtype], x, steps, stacked, y, circle.repeat_interleave(size))
    r = network.activate(settled)
    return {
        name: torch.einsum("k,kb...->b...", weight / circle, part.unflatten(0, (many, size))).real
        for name, part in r.items()
    }


@torch.no_grad()
def online(
    network: EquilibriumNetwork, x: Tensor, y: Tensor, beta: float, n_nudges: int, T1: int, T2: int
) -> tuple[State, State]:
    """The mean state and the response of a network whose nudge goes round and is never switched off."""
    blocks = T1 // T2
    if n_nudges < 3 or blocks == 0 or blocks % n_nudges:
        raise ValueError(
            f"online with n_nudges={n_nudges}, T1={T1}, T2={T2} makes {blocks} blocks; expected 3 or more nudges and "
            "T1 // T2 a multiple of them"
        )
    u = network.rest(x)
    _check_holomorphic(network, u, x)
    mean, answer = network.rest(x), network.rest(x)
    for i in range(blocks):
        nudge = torch.polar(x.new_tensor(beta), x.new_tensor(2 * math.pi * i / n_nudges))
        u = cast_call(network, COMPLEX[x.dtype], x, T2, u, y, nudge)
        r = network.activate(u)
        mean = {name: mean[name] + u[name].real / blocks for name in u}
        answer = {name: answer[name] + (r[name] / nudge).real / blocks for name in u}
    return mean, _finite(answer, beta)


def exact_error(
    network: EquilibriumNetwork,
    u: State,
    x: Float[Tensor, "b ..."],
    y: Shaped[Tensor, "b ..."],
    *,
    steps: int = 150,
    method: str = "recurrent",
) -> State:
    """$\\delta = -J^{-T} dL/du$ at the state `u`: the errors of backpropagation, by so many steps of it.

    "recurrent" (recurrent backpropagation) adds $\\eta (J^T \\delta + dL/du)$ to $\\delta$, from zero, with the
    network's `step_size`; "neumann" sums the series of which that is the partial sum (at step size 1).
    """
    if method not in ("recurrent", "neumann"):
        raise ValueError(f"method {method!r}; expected 'recurrent' or 'neumann'")
    u = {name: part.detach() for name, part in u.items()}
    x = x.detach()
    leaves = {name: part.clone().requires_grad_() for name, part in u.items()}
    loss = network.loss(network.activation(leaves["out"]), y).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    slope = dict(zip(u, found, strict=True))
    with torch.no_grad():
        inputs = network.inputs(x)
        pull = torch.func.vjp(lambda state: network.force(state, x, inputs=inputs), u)[1]
        if method == "neumann":
            return _neumann(pull, slope, steps)
        delta = {name: torch.zeros_like(part) for name, part in u.items()}
        for _ in range(steps):
            back = pull(delta)[0]
            delta = {n: d + network.step_size * (back[n] + slope[n]) for n, d in delta.items()}
    return delta


def _neumann(pull: Callable[[State], tuple[State]], slope: State, steps: int) -> State:
    term, total = slope, slope
    for _ in range(steps):
        back = pull(term)[0]
        term = {name: term[name] + back[name] for name in term}
        total = {name: total[name] + term[name] for name in total}
    return total


def check_nudges(beta: float, n_nudges: int, mode: str, modes: tuple[str, ...]) -> None:
    if mode not in modes:
        raise ValueError(f"mode {mode!r}; expected one of {', '.join(modes)}")
    if n_nudges < 0:
        raise ValueError(f"n_nudges is {n_nudges}; expected 0 (the derivative) or more")
    if n_nudges > 0 and not (beta != 0 and math.isfinite(beta)):
        raise ValueError(f"beta is {beta} with n_nudges={n_nudges}; a nudge is a finite number other than 0")
    fits = {"auto": True, "finite": n_nudges in (1, 2), "holomorphic": n_nudges >= 2, "online": n_nudges >= 3}
    if not fits[mode]:
        raise ValueError(
            f"mode {mode!r} with n_nudges={n_nudges}; finite takes 1 or 2, holomorphic 2 or more, online 3 or more"
        )


@torch.no_grad()
def _check_holomorphic(network: EquilibriumNetwork, u: State, x: Tensor) -> None:
    """Compare the slopes of one step along 1 and along i, at one random complex point."""
    if x.dtype not in COMPLEX:
        raise ValueError(f"x is {x.dtype}; complex nudges need float32 or float64")
    draw = torch.Generator().manual_seed(0)

    def noise(part: Tensor) -> Tensor:
        return torch.randn(part[:1].shape, generator=draw, dtype=torch.complex128).to(part.device) / 10

    point = {name: part[:1] + noise(part) for name, part in u.items()}
    direction = {name: noise(part) for name, part in u.items()}

    def slope(h: complex) -> Tensor:
        ahead, behind = (
            cast_call(network, torch.complex128, x[:1], 1, {n: point[n] + side * direction[n] for n in u})
            for side in (h, -h)
        )
        return torch.cat([(network.activation(ahead[n]) - network.activation(behind[n])).flatten() for n in u]) / (
            2 * h
        )

    try:
        along, across = slope(complex(1e-4)), slope(1e-4j)
    except RuntimeError as error:
        raise ValueError(f"{NOT_HOLOMORPHIC} torch says: {error}") from error
    if float((along - across).norm()) > 1e-4 * float(along.norm()):
        raise ValueError(NOT_HOLOMORPHIC)


def _finite(found: State, beta: float) -> State:
    if not all(bool(part.isfinite().all()) for part in found.values()):
        raise ModelError(f"the nudged phase ends in infinity or NaN; lower beta (now {beta}) or the learning rate")
    return found
