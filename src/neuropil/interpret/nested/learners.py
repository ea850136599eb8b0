r"""Learners: any torch module as an organisation that learns by gradient descent.

A learner A -> B has parameters p, implements I(p, a), updates them on a pair (a, b) and requests an input that would
have suited it better:
$$p' = p - \epsilon\, \nabla_p E, \qquad r = h_a(\nabla_a E), \qquad E = \sum_j e(I(p, a)_j, b_j),$$
with $h_a$ the inverse of $y \mapsto \partial e/\partial x (a, y)$; for $e = (x - y)^2 / 2$ it is
$r = a - \nabla_a E$. That is a machine on [A y^A, B y^B], and composing two of them is the chain rule: what the second
requests is the target of the first.

>>> _ = torch.manual_seed(0)
>>> net = learner(nn.Linear(4, 8), lr=0.1) >> learner(nn.Tanh(), inputs=Real(8)) >> learner(nn.Linear(8, 3), lr=0.1)
>>> net.interface
[R^4 y^(R^4), R^3 y^(R^3)]
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from neuropil.errors import ModelError
from neuropil.interpret.nested.lenses import Lens
from neuropil.interpret.nested.machines import Machine, repeated
from neuropil.interpret.nested.organisations import (
    Chain,
    Computed,
    Constant,
    Learn,
    Organisation,
    Replicated,
    Tensored,
    fan_out,
    restack,
    unstack,
)
from neuropil.interpret.nested.spaces import Finite, Interface, Real, Space, TypeMismatch


@dataclass(frozen=True)
class Error:
    """e(x, y), by its slope in x and the inverse of that in y: `slope(x, inverse(x, g)) == g`.

    Learners that are composed must share one, or their composite is no gradient descent.
    """

    name: str
    slope: Callable[[Tensor, Tensor], Tensor]
    inverse: Callable[[Tensor, Tensor], Tensor]


SQUARED = Error("(x - y)^2 / 2", lambda x, y: x - y, lambda x, g: x - g)
LOGISTIC = Error(  # cross entropy of a probability y with a logit x
    "log(1 + exp x) - x y", lambda x, y: x.sigmoid() - y, lambda x, g: x.sigmoid() - g
)


def learner(
    module: nn.Module,
    loss: Any = SQUARED,
    lr: float = 0.01,
    *,
    inputs: Space | None = None,
    targets: Space | None = None,
    name: str | None = None,
) -> Organisation:
    """A copy of `module` as a machine that learns from pairs (input, target) by gradient descent.

    loss: an `Error`, or any function (output, target) -> mean over the batch, as those of `torch.nn.functional`; it is
        then put around the module as a `criterion`, whose targets are of the space `targets` (the output's if None).
    lr: the step of gradient descent, on the mean over the batch.
    inputs: the space of its input without the batch; by default R^n for a module that begins with an `nn.Linear`.
        `Finite(n)` for indices, which get no request.

    Parameters with `requires_grad=False` stay as they are, buffers (of batch norm, say) change as the module has it.

    Raises ModelError for a module of which the output has no gradient, or is no single tensor of real numbers;
    ValueError where `inputs` cannot be guessed.
    """
    if not isinstance(loss, Error):
        inner = learner(module, SQUARED, lr, inputs=inputs, name=name)
        return Chain([inner, Constant(criterion(loss, inner.target.out, targets))])
    if lr < 0:
        raise ValueError(f"lr={lr}; expected 0 or more")
    space = _guessed(module) if inputs is None else inputs
    if not isinstance(space, Real | Finite):
        raise TypeMismatch(f"inputs={space}; expected Real(...) or Finite(n): a module takes one tensor here")
    return Learner(copy.deepcopy(module), loss, lr, space, name or type(module).__name__)


class Learner(Computed):
    """See `learner`."""

    def __init__(self, module: nn.Module, loss: Error, lr: float, space: Space, name: str) -> None:
        self.skeleton, self.loss, self.lr = module, loss, lr
        params = {k: p.detach().clone() for k, p in module.named_parameters() if p.requires_grad}
        fixed = {k: p.detach().clone() for k, p in module.named_parameters() if not p.requires_grad}
        buffers = {k: b.detach().clone() for k, b in module.named_buffers()}
        state = {"params": params, "fixed": fixed, "buffers": buffers}
        self.space = space
        out = Real(*_checked_output(module, space, name))
        super().__init__(Interface(space, space), Interface(out, out), state, name)

    def forward(self, state: Any, inside: Tensor) -> tuple[Tensor, Learn]:
        params, real = state["params"], isinstance(self.space, Real)

        def implement(params: Any, *a: Tensor) -> tuple[Tensor, Any]:
            buffers = {k: b.clone() for k, b in state["buffers"].items()}  # which the module may change in place
            out = functional_call(self.skeleton, {**params, **state["fixed"], **buffers}, a or (inside,))
            return out, buffers

        computed: Any = vjp(implement, params, *([inside] if real else []), has_aux=True)
        out, pull, buffers = computed
        batch = self.target.out.batch(out).numel()  # type: ignore[attr-defined]

        def learn(given: Tensor) -> tuple[Any, Any]:
            slopes, *requests = pull(self.loss.slope(out, given))
            new = {k: p - self.lr * slopes[k] / batch for k, p in params.items()}
            asked = self.loss.inverse(inside, requests[0]) if real else inside
            return {**state, "params": new, "buffers": buffers}, asked

        return out, learn

    def get(self, state: Any, inside: Tensor) -> Tensor:
        buffers = {k: b.clone() for k, b in state["buffers"].items()}
        out: Tensor = functional_call(self.skeleton, {**state["params"], **state["fixed"], **buffers}, (inside,))
        return out

    def module(self, state: Any) -> nn.Module:
        made = copy.deepcopy(self.skeleton)
        with torch.no_grad():
            for name, value in [*made.named_parameters(), *made.named_buffers()]:
                value.copy_(next(part[name] for part in state.values() if name in part))
        return made

    def weights(self, state: Any) -> Any:
        return {part: dict.fromkeys(values, part == "params") for part, values in state.items()}


def criterion(loss: Callable[[Tensor, Tensor], Tensor], outputs: Space, targets: Space | None = None) -> Lens:
    """A loss as a lens B y^B -> B y^T that turns a target into a request: b less the gradient of the loss there.

    `loss(output, target)` is the mean over the batch, as the functions of torch give it. Learners of squared error
    inside then descend exactly this loss.

    >>> classes = criterion(torch.nn.functional.cross_entropy, Real(10), Finite(10))
    >>> classes
    cross_entropy: R^10 y^(R^10) -> R^10 y^10
    """
    if not isinstance(outputs, Real):
        raise TypeMismatch(f"outputs={outputs}; a loss is taken of real ones")

    def put(b: Tensor, target: Any) -> Tensor:
        slope = vjp(lambda x: loss(x, target), b)
        return b - slope[1](torch.ones_like(slope[0]))[0] * outputs.batch(b).numel()

    name = getattr(loss, "__name__", type(loss).__name__)
    return Lens(Interface(outputs, outputs), Interface(outputs, targets or outputs), lambda b: b, put, name)


def neurons(
    layer: nn.Linear,
    activation: nn.Module | None = None,
    lr: float = 0.01,
    loss: Error = SQUARED,
    *,
    vectorised: bool = True,
) -> Organisation:
    """A layer as its neurons, each a machine with its own weights, that all read one input.

    vectorised: all at once by `torch.func.vmap`; otherwise as separate machines, side by side.
    """
    space, n = Real(layer.in_features), layer.out_features

    def single(j: int) -> Organisation:
        return learner(_Neuron(layer, j, activation), loss, lr, inputs=space, name="neuron")

    if vectorised:
        one = single(0)
        state = repeated(one.state, n, one.name)
        for part in state.values():
            part |= {name: getattr(layer, name).detach().clone() for name in ("weight", "bias") if name in part}
        return Chain([Constant(fan_out(space, n)), Replicated(one, n, state)])
    apart = Chain([Constant(fan_out(space, n)), Constant(unstack(space, n))])
    return Chain([apart, Tensored(tuple(single(j) for j in range(n))), Constant(restack(Real(), n))])


class _Neuron(nn.Module):
    """Neuron j of a layer: R^n -> R."""

    def __init__(self, layer: nn.Linear, j: int, activation: nn.Module | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight[j].detach().clone(), layer.weight.requires_grad)
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias[j].detach().clone(), bias.requires_grad)
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        drive = x @ self.weight
        out: Tensor = self.activation(drive if self.bias is None else drive + self.bias)
        return out


def copier(space: Space, value: Any) -> Machine:
    """A machine A y^A that shows the last input it was given, `value` at first."""
    return Machine(Interface(space, space), value, lambda s: s, lambda s, d: d, "copy")


def _guessed(module: nn.Module) -> Real:
    first = next((m for m in module.modules() if not list(m.children())), module)
    if isinstance(first, nn.Linear):
        return Real(first.in_features)
    raise ValueError(
        f"the input of {type(module).__name__} cannot be told from its first layer, {type(first).__name__}: give "
        "inputs=Real(...), the shape without the batch, or Finite(n) for indices"
    )


def _checked_output(module: nn.Module, space: Space, name: str) -> tuple[int, ...]:
    """The shape of what comes out, without the batch; what cannot learn by gradients is refused."""
    probe = copy.deepcopy(module)
    parameter = next(iter(probe.parameters()), torch.zeros(()))
    like: Any = {"dtype": parameter.dtype, "device": parameter.device}
    generator = torch.Generator().manual_seed(0)
    lead = (4,)
    if isinstance(space, Real):
        x = torch.randn(*lead, *space.shape, generator=generator).to(**like).requires_grad_()
    else:
        assert isinstance(space, Finite)
        x = torch.randint(space.n, lead, generator=generator).to(parameter.device)
    with torch.enable_grad(), torch.random.fork_rng():
        try:
            out = probe(x)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ModelError(f"{name} cannot be run on a batch of {space}: {error}") from error
    if not isinstance(out, Tensor) or not out.is_floating_point() or out.shape[:1] != lead:
        told = f"a tensor of {out.dtype}, {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ModelError(f"{name} gives {told} for a batch of 4; expected one tensor of real numbers, the batch first")
    _check_gradient(out, [x] if x.is_floating_point() else list(probe.parameters()), name)
    return tuple(out.shape[1:])


def _check_gradient(out: Tensor, leaves: list[Tensor], name: str) -> None:
    slopes: Any = [None]
    if out.requires_grad:
        leaves = [leaf for leaf in leaves if leaf.requires_grad]
        weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device).reshape(out.shape)
        slopes = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
    if not any(slope is not None and bool(slope.any()) for slope in slopes):
        raise ModelError(
            f"{name} is not differentiable: no gradient reaches its input, so it has nothing to request and a gradient "
            "organisation stops at it. Give it as a Lens with a `put` of your own (a straight-through one, say), or "
            "keep it outside, as a machine"
        )
