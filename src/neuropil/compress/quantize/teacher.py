r"""A rounded student that learns from its float teacher.

$$ (1 - \lambda)\,\mathrm{CE}(s, y) + \lambda T^2\,\mathrm{KL}(t / T \,\|\, s / T)
   + \mu \sum_l \lVert s_l - t_l \rVert^2 $$

>>> from neuropil.compress.quantize import LSQ, qat_prepare
>>> from neuropil.training import fit
>>> _ = torch.manual_seed(0)
>>> teacher = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
>>> student = qat_prepare(teacher, LSQ(2, granularity="channel")).model
>>> x = torch.randn(256, 8)
>>> optimizer = torch.optim.Adam(student.parameters(), 1e-2)
>>> run = fit(student, (x,), distillation(teacher, weight=1.0), optimizer, epochs=5, progress=False)
>>> run.losses[-1] < run.losses[0]
True

Sources: Hinton, Vinyals and Dean 2015, arXiv:1503.02531; Mishra and Marr 2018, arXiv:1711.05852 (with low bits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.compress.quantize.tiles import QuantizationError
from neuropil.compress.reconstruction import first
from neuropil.evaluate import evaluating


def soft_loss(
    student: Float[Tensor, "*batch classes"], teacher: Float[Tensor, "*batch classes"], temperature: float = 4.0
) -> Float[Tensor, ""]:
    """$T^2\\,\\mathrm{KL}$ of the softened answers, mean over all but the classes.

    >>> round(soft_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 2.0]])).item(), 6)
    0.0
    """
    s, t = (x.flatten(0, -2).div(temperature).log_softmax(-1) for x in (student, teacher))
    return temperature**2 * nn.functional.kl_div(s, t, reduction="batchmean", log_target=True)


def distillation(
    teacher: nn.Module,
    *,
    weight: float = 0.5,
    temperature: float = 4.0,
    features: Sequence[str] = (),
    feature_weight: float = 1.0,
    criterion: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> Callable[[nn.Module, Any], Tensor]:
    """A loss for `training.fit`, of batches `(x, y)`, or of `(x,)` without labels, which needs `weight=1`.

    `features` names modules of both whose answers should be alike as well. The teacher answers in eval mode.
    Raises QuantizationError for a weight outside [0, 1] and a temperature that is not above 0.
    """
    if not 0 <= weight <= 1 or temperature <= 0:
        raise QuantizationError(f"weight={weight}, temperature={temperature}: expected 0 to 1, and more than 0")

    def loss(student: nn.Module, batch: Any) -> Tensor:
        x, *labels = batch if isinstance(batch, list | tuple) else (batch,)
        if not labels and weight != 1:
            raise QuantizationError("batches without labels: give weight=1.0, or batches (x, y)")
        with torch.no_grad(), evaluating(teacher), _answers(teacher, features) as theirs:
            wanted = first(teacher(x))
        with _answers(student, features) as ours:
            made = first(student(x))
        total = weight * soft_loss(made, wanted, temperature)
        if weight != 1:
            total = total + (1 - weight) * criterion(made, labels[0])
        for name in features:
            total = total + feature_weight * (ours[name] - theirs[name]).square().mean()
        return total

    return loss


@contextmanager
def _answers(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the named modules answer while the context is open."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, out: Any) -> None:
            found[name] = first(out)

        return keep

    handles = [model.get_submodule(_inner(model, name)).register_forward_hook(hook(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _inner(model: nn.Module, name: str) -> str:
    """The name below a wrapper such as Fabric's, which calls the model `module`."""
    names = dict(model.named_modules())
    return next((n for n in (name, f"_forward_module.{name}", f"module.{name}") if n in names), name)
