r"""Where do easy and hard examples part? Loss surface and kernel, example by example.

*Linear mode connectivity.* Two children are trained from the same weights $w_t$ with different minibatches. On the
straight line between them the error rises by the barrier
$$\max_\alpha err((1 - \alpha) w_1 + \alpha w_2) - \tfrac{1}{2}(err(w_1) + err(w_2)),$$
which is 0 once SGD noise no longer decides the basin. `path_errors` gives the errors of every example along the
line and `barrier` the barrier over any subset, so easy and hard examples can be compared.

*Kernel velocity.* $K_t$ holds the inner products of the logit gradients of some examples at time t, and
$v(t, t') = 1 - \langle K_t, K_{t'}\rangle_F / (\lVert K_t\rVert \lVert K_{t'}\rVert)$ says how fast it turns.

>>> import torch
>>> from torch import nn
>>> net = nn.Linear(3, 2); data = (torch.randn(8, 3), torch.randint(2, (8,)))
>>> barrier(path_errors(net, net, data))
0.0
>>> round(kernel_velocity(kernel(net, data[0]), kernel(net, data[0])), 6)
0.0

The paper leaves open: how many points of the line (here 11), and what happens to running statistics of BatchNorm
(here they are interpolated like weights, not measured anew).

Source: Paul, Ganguli and Dziugaite, "Deep learning on a data diet", 2021, arXiv:2107.07075, after Frankle et al.
2020, arXiv:1912.05671 (barrier) and Fort et al. 2020, arXiv:2010.15110 (kernel).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from neuropil.evaluate import evaluating
from neuropil.measure._data_diet_examples import Data, Examples, Inputs, check_classes, logits_of
from neuropil.measure._data_diet_gradients import logit_kernel

__all__ = ["barrier", "kernel", "kernel_velocity", "path_errors"]


def path_errors(
    first: nn.Module, second: nn.Module, data: Data, *, points: int = 11, batch_size: int = 256
) -> Float64[Tensor, "points n"]:
    """1 where an example is misclassified at a point of the line from `first` to `second`, ends included.

    Both are left as they were. Raises ValueError where they are not two of a kind, or for fewer than two points.
    """
    one, two = first.state_dict(), second.state_dict()
    if {k: v.shape for k, v in one.items()} != {k: v.shape for k, v in two.items()}:
        raise ValueError("the two models have other parameters or shapes; expected two children of one network")
    if points < 2:
        raise ValueError(f"points is {points}; expected 2 or more, for both ends are points")
    examples = Examples(data)
    check_classes(first, examples)

    def errors(alpha: float) -> Tensor:
        state = {k: torch.lerp(v, two[k].to(v), alpha) if v.is_floating_point() else v for k, v in one.items()}
        return examples.map(lambda inputs, y: _wrong(logits_of(first, inputs, state), y), batch_size)

    with evaluating(first), torch.no_grad():
        return torch.stack([errors(alpha) for alpha in torch.linspace(0, 1, points).tolist()])


def _wrong(logits: Tensor, y: Tensor) -> Tensor:
    if y.ndim != 1:
        raise ValueError("the error of a path needs one integer label an example")
    return logits.argmax(1).cpu() != y.cpu()


def barrier(errors: Float[Tensor, "points n"]) -> float:
    """The greatest mean error on the path above the mean of both ends; for a subset, give `errors[:, subset]`."""
    curve = errors.double().mean(1)
    return float(curve.max() - (curve[0] + curve[-1]) / 2)


def kernel(model: nn.Module, inputs: Inputs) -> Float64[Tensor, "nc nc"]:
    """The Gram matrix of the logit gradients of all trainable parameters, in evaluation mode.

    Row and column `i * classes + k` belong to logit k of example i. Memory: examples x classes x parameters, so
    take some hundred examples at most.
    """
    return logit_kernel(model, inputs)


def kernel_velocity(first: Float[Tensor, "m m"], second: Float[Tensor, "m m"]) -> float:
    """1 minus the cosine of two kernels of the same examples: 0 where one is a multiple of the other."""
    first, second = first.double(), second.double()
    return float(1 - (first * second).sum() / (first.norm() * second.norm()))
