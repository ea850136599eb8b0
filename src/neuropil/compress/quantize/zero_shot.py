r"""Quantization without the training data.

*Level 1*, no training either: `dfq` folds batch norms, equalises, absorbs high biases, rounds, and corrects biases, all
from what the norms know. `distil_data` makes inputs whose statistics at every norm are those that the norm remembers,

$$ \min_x \sum_l \lVert \mu_l(x) - \mu_l \rVert^2 + \lVert \sigma_l(x) - \sigma_l \rVert^2, $$

and such inputs calibrate any other method. *Level 2*: `train_without_data` trains the rounded model on them, with
the float model as its teacher.

>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
>>> _ = [model.train()(torch.randn(64, 1, 8, 8).cumsum(-1)) for _ in range(50)]  # the norm learns what data look like
>>> x = distil_data(model.eval(), (1, 8, 8), steps=300, input_statistics=None)
>>> bool((model[0](x).std((0, 2, 3)) / model[1].running_var.sqrt() - 1).abs().max() < 0.05)
True
>>> print(dfq(model, {"bits": 8}))
changed 2 modules

Sources: Nagel et al. 2019, arXiv:1906.04721 (DFQ); Cai et al. 2020, arXiv:2001.00281 (ZeroQ); Haroush et al. 2020,
arXiv:1912.01274 (training on such data).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.changes import Changes
from neuropil.compress.quantize.correction import correct_bias_from
from neuropil.compress.quantize.equalise import absorb_bias, equalise
from neuropil.compress.quantize.folding import fold
from neuropil.compress.quantize.graph import NORMS
from neuropil.compress.quantize.models import Weights, bake, calibrate, input_quantizers, qat_prepare, quantize_model
from neuropil.compress.quantize.teacher import distillation
from neuropil.compress.quantize.tiles import QuantizationError
from neuropil.evaluate import evaluating
from neuropil.training import fit


def dfq(
    model: nn.Module, weights: Weights = "int8", *, skip: Iterable[str] = (), equal: bool = True, correct: bool = True
) -> Changes:
    """Data-free quantization: a copy with folded, equalised, rounded and bias-corrected layers.

    `equal` and `correct` turn off equalisation with absorption, and correction. Layers that no pair covers are rounded
    all the same. Raises QuantizationError where torch.fx cannot follow the model.
    """
    changes, statistics = fold(model)
    plain = changes.model
    if equal:
        plain = equalise(plain, statistics=statistics).model
        plain = absorb_bias(plain, statistics).model
    made = quantize_model(plain, weights, skip=skip)
    if not correct:
        return made
    return Changes(correct_bias_from(made.model, plain, statistics).model, made.changed, {**changes.left, **made.left})


def distil_data(
    model: nn.Module,
    shape: Sequence[int],
    count: int = 64,
    *,
    steps: int = 500,
    lr: float = 0.1,
    input_statistics: tuple[float, float] | None = (0.0, 1.0),
    limits: tuple[float, float] | None = None,
    seed: int = 0,
) -> Float[Tensor, count * shape]:
    """Inputs of this `shape` that look to every batch norm of the model as the training data did.

    input_statistics: mean and deviation of real inputs (ZeroQ matches these too); None where they are not known.
    limits: the range of real inputs, to which these are kept.

    Raises QuantizationError for a model without batch norms that keep statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, NORMS) and isinstance(m.running_mean, Tensor)]
    if not norms:
        raise QuantizationError("the model has no batch norm with running statistics: there is nothing to match")
    like = next(model.parameters())
    mean, deviation = input_statistics or (0.0, 1.0)
    draw = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    x = (mean + deviation * draw).to(like).requires_grad_()
    seen: list[Tensor] = []

    def hook(norm: Any, args: Any) -> None:
        seen.append(_distance(args[0], norm.running_mean, (norm.running_var + norm.eps).sqrt()))

    optimizer = torch.optim.Adam([x], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    handles = [norm.register_forward_pre_hook(hook) for norm in norms]
    try:
        with evaluating(model), torch.enable_grad():
            for _ in range(steps):
                seen.clear()
                model(x)
                loss = torch.stack(seen).sum()
                if input_statistics is not None:
                    loss = loss + (x.mean() - mean).square() + (x.std() - deviation).square()
                (x.grad,) = torch.autograd.grad(loss, [x])
                optimizer.step()
                schedule.step()
                if limits is not None:
                    x.data.clamp_(*limits)
    finally:
        for handle in handles:
            handle.remove()
    return x.detach()


def _distance(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Squared distances of mean and deviation by channel, summed over channels."""
    others = [dim for dim in range(x.ndim) if dim != 1]
    variance, average = torch.var_mean(x, others, correction=0)
    return (average - mean).square().sum() + ((variance + 1e-8).sqrt() - deviation).square().sum()


def train_without_data(
    model: nn.Module,
    weights: Weights,
    data: Float[Tensor, n * shape],
    *,
    activations: Any = None,
    skip: Iterable[str] = (),
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    epochs: int = 20,
    batch_size: int = 64,
    temperature: float = 4.0,
    seed: int = 0,
) -> Changes:
    """A packed copy trained on made-up inputs to answer as the float model does (no labels, no real data).

    The statistics of batch norms stay those of the real data: norms stay in eval mode. `optimizer` makes an optimizer
    of parameters (Adam at 1e-3).
    """
    changes = qat_prepare(model, weights, activations=activations, skip=skip)
    student = changes.model.train()
    for module in student.modules():
        if isinstance(module, NORMS):
            module.eval()
    if any(True for _ in input_quantizers(student)):
        calibrate(student, data.split(batch_size))
    teaching = distillation(model, weight=1.0, temperature=temperature)

    def loss(made: nn.Module, batch: Any) -> Tensor:
        for module in made.modules():
            if isinstance(module, NORMS):
                module.eval()
        return teaching(made, batch)

    made = optimizer(student.parameters()) if optimizer else torch.optim.Adam(student.parameters(), 1e-3)
    fit(student, (data,), loss, made, epochs=epochs, batch_size=batch_size, seed=seed, progress=False)
    baked = bake(student.eval())
    return Changes(baked.model, baked.changed, {**changes.left, **baked.left})
