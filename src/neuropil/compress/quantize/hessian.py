r"""How sharply the loss bends along each layer's weights: the Hessian's largest eigenvalue and its mean trace.

Only products of the Hessian with vectors are computed. *Power iteration* gives the largest eigenvalue (HAWQ),
*Hutchinson's* $E[v^T H v]$ over random signs v the trace (HAWQ-V2).

>>> w = nn.Parameter(torch.zeros(10))
>>> quadratic = lambda: 0.5 * (torch.arange(1.0, 11.0) * w.square()).sum()  # its Hessian is diag(1 .. 10)
>>> round(hessian_traces(quadratic, {"w": w}, probes=4)["w"].item(), 3)
5.5
>>> round(top_eigenvalues(quadratic, {"w": w}, steps=100)["w"].item(), 2)
10.0

Sources: Dong et al. 2019, arXiv:1905.03696 (HAWQ); Dong et al. 2020, arXiv:1911.03852 (HAWQ-V2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.compress.quantize.models import layers
from neuropil.compress.quantize.tiles import QuantizationError
from neuropil.evaluate import evaluating


def _curves(loss: Callable[[], Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """The gradients, with their history."""
    found = torch.autograd.grad(loss(), list(parameters.values()), create_graph=True)
    if not any(g.requires_grad for g in found):
        raise QuantizationError("the loss is linear in these weights: it does not bend")
    return list(found)


def _products(gradients: list[Tensor], parameters: Mapping[str, Tensor], vectors: list[Tensor]) -> list[Tensor]:
    """The Hessian of each parameter alone times its vector: one pass each, since blocks must not mix."""
    made = []
    for gradient, p, v in zip(gradients, parameters.values(), vectors, strict=True):
        (product,) = torch.autograd.grad(gradient, p, v, retain_graph=True, allow_unused=True)
        made.append(torch.zeros_like(p) if product is None else product)
    return made


def hessian_traces(
    loss: Callable[[], Tensor], parameters: Mapping[str, Tensor], probes: int = 50, seed: int = 0
) -> dict[str, Float[Tensor, ""]]:
    """The trace of each parameter's Hessian divided by its size, from `probes` vectors of random signs."""
    gradients, generator = _curves(loss, parameters), torch.Generator().manual_seed(seed)
    total = {name: torch.zeros((), dtype=torch.float64) for name in parameters}
    values = list(parameters.values())
    for _ in range(probes):
        signs = [(torch.randint(2, p.shape, generator=generator) * 2 - 1).to(p) for p in values]
        # signs of different parameters are independent, so the cross terms of one joint product vanish on average
        products = torch.autograd.grad(gradients, values, signs, retain_graph=True, allow_unused=True)
        for name, v, hv in zip(parameters, signs, products, strict=True):
            total[name] += 0.0 if hv is None else (v * hv).sum().double().cpu() / v.numel()
    return {name: value / probes for name, value in total.items()}


def top_eigenvalues(
    loss: Callable[[], Tensor], parameters: Mapping[str, Tensor], steps: int = 20, seed: int = 0
) -> dict[str, Float[Tensor, ""]]:
    """The eigenvalue of largest size of each parameter's own Hessian, by power iteration."""
    gradients, generator = _curves(loss, parameters), torch.Generator().manual_seed(seed)
    vectors = [torch.randn(p.shape, generator=generator).to(p) for p in parameters.values()]
    values = [torch.zeros(()) for _ in vectors]
    for _ in range(steps):
        vectors = [v / v.norm().clamp_min(1e-30) for v in vectors]
        products = _products(gradients, parameters, vectors)
        values = [(v * hv).sum().detach().cpu() for v, hv in zip(vectors, products, strict=True)]
        vectors = products
    return dict(zip(parameters, values, strict=True))


def curvature(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    what: str = "trace",
    probes: int = 20,
    skip: Iterable[str] = (),
    seed: int = 0,
) -> dict[str, float]:
    """The mean trace ("trace") or the largest eigenvalue ("eigenvalue") of each layer's weight, mean over batches.

    `loss(model, batch)` as in `training.fit`. The model answers in eval mode; `probes` is also the number of steps of
    power iteration. Raises QuantizationError where there is no batch, or `what` is neither.
    """
    if what not in ("trace", "eigenvalue"):
        raise QuantizationError(f'what={what!r}: expected "trace" or "eigenvalue"')
    found, _ = layers(model, skip)
    weights = {name: module.weight for name, module in found.items()}
    total, count = dict.fromkeys(weights, 0.0), 0
    with evaluating(model), torch.enable_grad():
        for batch in batches:

            def at(batch: Any = batch) -> Tensor:
                return loss(model, batch)

            measure = hessian_traces if what == "trace" else top_eigenvalues
            for name, value in measure(at, weights, probes, seed + count).items():  # type: ignore[arg-type]
                total[name] += float(value)
            count += 1
    if not count:
        raise QuantizationError("no batch was given: the curvature needs at least one")
    return {name: value / count for name, value in total.items()}
