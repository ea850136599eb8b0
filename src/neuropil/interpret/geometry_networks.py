r"""Many small networks of one shape, trained at once, with any nonlinearity or with the gradient of another.

    h_0 = x,   h_l = f(W_l h_{l-1} + b_l),   output = J h_L + c,   loss = -log likelihood (Bernoulli or Gaussian)

Each of the networks has its own weights, data and order of data, all from its own seed: a batch of twenty is twenty
single runs in the time of a few. `Nonlinearity` holds f and, apart from it, the derivative that backpropagation
uses; `with_gradient` exchanges the second alone.

>>> nets = Networks([3, 8, 1], RELU, seeds=range(5))
>>> x, y = torch.randn(5, 64, 3), torch.randint(2, (5, 64, 1)).float()
>>> run = train(nets, x, y, steps=20)
>>> run.losses.shape, nets.hidden(x)[-1].shape
((2, 5), torch.Size([5, 64, 8]))
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

READOUTS = ("trained", "uniform", "sphere", "binary")
LIKELIHOODS = ("bernoulli", "gaussian")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


class _Replaced(torch.autograd.Function):
    """f forwards, and a derivative that need not be f's backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Nonlinearity) -> Tensor:
        ctx.save_for_backward(x)
        ctx.derivative = f.derivative
        return f.forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grads[0] * ctx.derivative(x), None


@dataclass(frozen=True)
class Nonlinearity:
    """A function of one number, and the derivative by which it is trained."""

    name: str
    forward: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]

    def __call__(self, x: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        return _Replaced.apply(x, self)


def _step(x: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
    """1 between the bounds, 0 outside."""
    return ((x > low) & (x < high)).to(x.dtype)


TANH = Nonlinearity("tanh", torch.tanh, lambda x: 1 - torch.tanh(x).square())
RELU = Nonlinearity("relu", torch.relu, _step)
IDENTITY = Nonlinearity("identity", torch.clone, torch.ones_like)


def leaky_relu(slope: float = 0.1) -> Nonlinearity:
    """x above 0, slope * x below; slope 1 is the identity."""
    return Nonlinearity(
        f"leaky relu {slope:g}", lambda x: F.leaky_relu(x, slope), lambda x: slope + (1 - slope) * _step(x)
    )


def softplus(beta: float = 1.0) -> Nonlinearity:
    """log(1 + exp(beta x)) / beta, which tends to ReLU as beta grows."""
    return Nonlinearity(f"softplus {beta:g}", lambda x: F.softplus(x, beta=beta), lambda x: torch.sigmoid(beta * x))


def capped_relu(cap: float = 1.0) -> Nonlinearity:
    """ReLU that saturates at `cap`, as ReLU6 does at 6."""
    return Nonlinearity(f"relu cap {cap:g}", lambda x: x.clamp(0.0, cap), lambda x: _step(x, 0.0, cap))


def shifted_relu(shift: float) -> Nonlinearity:
    """ReLU(x + shift): its corner lies at -shift."""
    return Nonlinearity(f"relu shift {shift:+g}", lambda x: torch.relu(x + shift), lambda x: _step(x, -shift))


def hard_tanh(low: float = -1.0, high: float = 1.0) -> Nonlinearity:
    """x between the bounds, and flat outside."""
    if not low < high:
        raise ValueError(f"hard_tanh({low}, {high}): expected the lower bound first")
    return Nonlinearity(f"hardtanh {low:g} {high:g}", lambda x: x.clamp(low, high), lambda x: _step(x, low, high))


def with_gradient(f: Nonlinearity, gradient: Nonlinearity | str) -> Nonlinearity:
    """f forwards, trained as if it had another derivative: another nonlinearity's, "one", or "noise".

    "noise" is uniform in [0, 1] and drawn anew at every step, from torch's global generator.
    """
    if isinstance(gradient, Nonlinearity):
        return replace(f, name=f"{f.name}, gradient of {gradient.name}", derivative=gradient.derivative)
    made = {"one": torch.ones_like, "noise": torch.rand_like}
    if gradient not in made:
        raise ValueError(f"gradient {gradient!r}; expected a Nonlinearity, 'one' or 'noise'")
    return replace(f, name=f"{f.name}, gradient {gradient}", derivative=made[gradient])


NONLINEARITIES: dict[str, Nonlinearity] = {
    f.name: f
    for f in (
        TANH,
        RELU,
        IDENTITY,
        leaky_relu(0.1),
        leaky_relu(0.3),
        softplus(1.0),
        softplus(5.0),
        capped_relu(1.0),
        shifted_relu(1.0),
        shifted_relu(-1.0),
        hard_tanh(-1.0, 1.0),
        hard_tanh(0.0, 1.0),
        with_gradient(RELU, "one"),
        with_gradient(RELU, "noise"),
        with_gradient(RELU, TANH),
        with_gradient(TANH, "one"),
        with_gradient(TANH, "noise"),
        with_gradient(TANH, RELU),
    )
}


def nonlinearity(f: Nonlinearity | str) -> Nonlinearity:
    """A nonlinearity by name; raises ValueError with the names there are."""
    if isinstance(f, Nonlinearity):
        return f
    if f not in NONLINEARITIES:
        raise ValueError(f"no nonlinearity {f!r}; there are {', '.join(NONLINEARITIES)}, or make a Nonlinearity")
    return NONLINEARITIES[f]


class Networks(nn.Module):
    r"""One network for each seed, all of the same sizes; inputs and outputs have the networks first.

    Parameters
    ----------
    sizes: dimensions of the input, of each hidden layer, of the output.
    f: the nonlinearity of all hidden layers.
    seeds: one for each network.
    readout: "trained", or fixed: "uniform" in ±1/sqrt(width); "sphere", a random direction in the space of outputs
        for each neuron; "binary", ±1 in groups of equal size; the last two divided by sqrt(width).
    scale: factor of the initial weights, a number or one for each network.
    bias: whether hidden and output layers have offsets (those of a fixed readout stay 0).

    Weights begin uniform in $\pm 1/\sqrt{fan\ in}$, offsets too.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        f: Nonlinearity | str,
        seeds: Sequence[int],
        *,
        readout: str = "trained",
        scale: float | Float[Tensor, " networks"] = 1.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if len(sizes) < 3 or min(sizes) < 1 or not len(seeds):
            raise ValueError(
                f"sizes {list(sizes)} and {len(seeds)} seeds; expected input, hidden and output sizes, and a seed"
            )
        if readout not in READOUTS:
            raise ValueError(f"readout {readout!r}; expected one of {', '.join(READOUTS)}")
        self.f, self.readout = nonlinearity(f), readout
        drawn = [_draw(sizes, torch.Generator().manual_seed(int(seed)), readout) for seed in seeds]
        factor = torch.as_tensor(scale, dtype=torch.float32).expand(len(seeds))[:, None, None]
        layers = range(len(sizes) - 1)
        last = len(sizes) - 2
        self.weights = nn.ParameterList(
            nn.Parameter(factor * torch.stack([w[at] for w, _ in drawn]), at < last or readout == "trained")
            for at in layers
        )
        self.biases = nn.ParameterList(
            nn.Parameter(
                torch.stack([b[at] for _, b in drawn])[:, None] * (bias and (at < last or readout == "trained")),
                bias and (at < last or readout == "trained"),
            )
            for at in layers
        )

    def hidden(self, x: Float[Tensor, "*networks items d"]) -> list[Float[Tensor, "networks items width"]]:
        """The activations of every hidden layer. Inputs `[items, d]` are shared by all networks."""
        count = len(self.weights[0])
        h = x.expand(count, *x.shape[-2:])
        out = []
        for weight, bias in zip(list(self.weights)[:-1], list(self.biases)[:-1], strict=True):
            h = self.f(torch.baddbmm(bias, h, weight.transpose(1, 2)))
            out.append(h)
        return out

    def forward(self, x: Float[Tensor, "*networks items d"]) -> Float[Tensor, "networks items k"]:
        """The outputs before the sigmoid."""
        return torch.baddbmm(self.biases[-1], self.hidden(x)[-1], self.weights[-1].transpose(1, 2))


def _draw(sizes: Sequence[int], generator: torch.Generator, readout: str) -> tuple[list[Tensor], list[Tensor]]:
    weights, biases = [], []
    for fan, out in itertools.pairwise(sizes):
        bound = 1 / math.sqrt(fan)
        weights.append((2 * torch.rand(out, fan, generator=generator) - 1) * bound)
        biases.append((2 * torch.rand(out, generator=generator) - 1) * bound)
    width, k = sizes[-2:]
    if readout == "sphere":
        weights[-1] = F.normalize(torch.randn(k, width, generator=generator), dim=0) / math.sqrt(width)
    if readout == "binary":
        codes = 1 - 2 * (torch.arange(width) // 2 ** torch.arange(k)[:, None] % 2)
        weights[-1] = codes[:, torch.randperm(width, generator=generator)].float() / math.sqrt(width)
    return weights, biases


def losses(outputs: Tensor, y: Tensor, likelihood: str = "bernoulli") -> Float[Tensor, " networks"]:
    """Negative log likelihood of each network: summed over outputs, averaged over items."""
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood {likelihood!r}; expected one of {', '.join(LIKELIHOODS)}")
    if likelihood == "gaussian":
        return (outputs - y).square().sum(2).mean(1) / 2
    return F.binary_cross_entropy_with_logits(outputs, y.expand_as(outputs), reduction="none").sum(2).mean(1)


@dataclass(frozen=True, eq=False)
class Training:
    """What `train` did: the losses on all items at every check, and the networks as they first had a given loss.

    steps    [checks] optimizer steps done at each check
    losses   [checks, networks]
    matched  the networks, each as it was at the first check with a loss below `level`; None without a level
    reached  [networks] whether it was reached (else the matched network is the last)
    """

    steps: Int[np.ndarray, " checks"]
    losses: Float[np.ndarray, "checks networks"]
    matched: Networks | None
    reached: Bool[np.ndarray, " networks"]


def train(
    nets: Networks,
    x: Float[Tensor, "networks items d"],
    y: Float[Tensor, "networks items k"],
    *,
    optimizer: str = "adam",
    lr: float = 1e-3,
    batch_size: int | None = 64,
    steps: int = 1000,
    likelihood: str = "bernoulli",
    level: float | None = None,
    tolerance: float = 0.0,
    check_every: int = 10,
    seeds: Sequence[int] | None = None,
    until_matched: bool = False,
) -> Training:
    """Train every network in place on its own items.

    batch_size   items a step, in an order of each network's own from its entry of `seeds` (0, 1, ... if there are
                 none); None for all at once
    level        keep each network as it is when its loss on all items first falls below this (`Training.matched`),
                 so that nonlinearities that learn at different speeds are compared at the same loss
    until_matched  stop once every network has fallen below `level`
    tolerance    stop once no network's loss changes by as much between checks

    The paper's settings: SGD, 0.1, batches of 200 for a fixed readout; Adam, 1e-3, batches of 64 for a trained one.
    Raises ValueError for another optimizer, likelihood or number of networks.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {optimizer!r}; expected one of {', '.join(OPTIMIZERS)}")
    count = len(nets.weights[0])
    if len(x) != count or len(y) != count:
        raise ValueError(f"items for {len(x)} networks and labels for {len(y)}; there are {count} networks")
    stepper = OPTIMIZERS[optimizer]([p for p in nets.parameters() if p.requires_grad], lr=lr)
    batches = _batches(x.shape[1], batch_size, range(count) if seeds is None else seeds)
    matched = None if level is None else copy.deepcopy(nets)
    reached = np.zeros(count, dtype=bool)
    at, seen = [], []
    for step in range(1, steps + 1):
        index = next(batches)
        part = (x, y) if index is None else (_take(x, index), _take(y, index))
        stepper.zero_grad(set_to_none=True)
        losses(nets(part[0]), part[1], likelihood).sum().backward()
        stepper.step()
        if step % check_every and step < steps:
            continue
        with torch.no_grad():
            now = losses(nets(x), y, likelihood).double().numpy()
        at.append(step)
        seen.append(now)
        if matched is not None and level is not None:
            _copy(nets, matched, ~reached)
            reached |= now < level
            if until_matched and reached.all():
                break
        if len(seen) > 1 and tolerance and (np.abs(seen[-1] - seen[-2]) < tolerance).all():
            break
    return Training(np.array(at), np.stack(seen), matched, reached)


def _take(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


def _copy(source: Networks, target: Networks, which: np.ndarray) -> None:
    """Those networks' weights, from one batch to the other."""
    chosen = torch.from_numpy(np.flatnonzero(which))
    with torch.no_grad():
        for a, b in zip(source.parameters(), target.parameters(), strict=True):
            b[chosen] = a[chosen]


def _batches(items: int, size: int | None, seeds: Sequence[int]) -> Iterator[Tensor | None]:
    """Index `[networks, size]` of every step, each network's epochs shuffled on their own."""
    if size is None or size >= items:
        while True:
            yield None
    generators = [torch.Generator().manual_seed(1_000_003 + int(seed)) for seed in seeds]
    while True:
        order = torch.stack([torch.randperm(items, generator=g) for g in generators])
        for start in range(0, items - size + 1, size):
            yield order[:, start : start + size]
