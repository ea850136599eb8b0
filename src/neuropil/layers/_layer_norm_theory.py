"""What normalization leaves unchanged, and the geometry it gives to learning."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.layers._layer_norm_core import LayerNormLinear

DELTA = 3.7  # the factor of every re-scaling in the report
TINY = 1e-100  # in place of every eps: torch's batch norm refuses 0


def invariance_report(layer: nn.Module, x: Float[Tensor, "n d"] | None = None) -> dict[str, float]:
    """How much the outputs of a layer change under the six changes of weights and data of the paper's Table 1.

    `layer` is any module that maps [n, d] to [n, h] and has one `nn.Linear` in it (plain, or under
    `torch.nn.utils.parametrizations.weight_norm`): a `LayerNormLinear`, or `nn.Sequential(nn.Linear(...),
    nn.BatchNorm1d(...))`. Each entry is the root mean square change of the unit or the case that changed most,
    over that of all outputs: about 0 means invariant. A copy is measured, in float64, in training mode (batch norm
    then uses the batch's statistics) and with every `eps` set to 1e-100. The paper's table is for layers without a bias
    before the norm; with one, what is reported is what that layer does. `x` is 64 normal rows with mean 1 unless given.

    Raises ValueError where there is not one `nn.Linear`.

    >>> layer = LayerNormLinear(5, 8)
    >>> [name for name, change in invariance_report(layer).items() if change < 1e-10]
    ['weight matrix re-scaled', 'weight matrix re-centred', 'dataset re-scaled', 'single case re-scaled']
    """
    layer = deepcopy(layer).double().train()
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    if len(linears) != 1:
        raise ValueError(f"the layer has {len(linears)} nn.Linear modules; expected one, whose weights are changed")
    for module in layer.modules():
        if hasattr(module, "eps"):
            module.eps = TINY  # type: ignore[assignment]
    weight = _free_weight(linears[0])
    generator = torch.Generator().manual_seed(0)
    d = weight.shape[1]
    x = torch.randn(64, d, generator=generator, dtype=torch.float64) + 1 if x is None else x.double().cpu()
    x = x.to(weight.device)
    shift = torch.randn(d, generator=generator, dtype=torch.float64).to(weight.device)
    first_row, first_case = weight.detach().clone(), x.clone()
    first_row[0] *= DELTA
    first_case[0] *= DELTA
    w = weight.detach().clone()
    changes = {
        "weight matrix re-scaled": (DELTA * w, x),
        "weight matrix re-centred": (w + shift, x),
        "weight vector re-scaled": (first_row, x),
        "dataset re-scaled": (w, DELTA * x),
        "dataset re-centred": (w, x + shift),
        "single case re-scaled": (w, first_case),
    }
    with torch.no_grad():
        before = layer(x)
        return {name: _change(layer, weight, before, *changed) for name, changed in changes.items()}


def _free_weight(linear: nn.Linear) -> Tensor:
    """The matrix that is learned: under weight normalization, the direction vectors."""
    if hasattr(linear, "parametrizations"):
        return linear.parametrizations.weight.original1  # type: ignore[union-attr, return-value]
    return linear.weight


def _change(layer: nn.Module, weight: Tensor, before: Tensor, new_weight: Tensor, x: Tensor) -> float:
    """The root mean square change of the unit or case that changed most, over that of the outputs."""
    weight.copy_(new_weight)
    # Where one unit of many or one case of many changes, a mean over all would hide it.
    apart = (layer(x) - before).square()
    worst = max(float(apart.mean(0).max()), float(apart.mean(1).max()))
    return (worst / float(before.square().mean())) ** 0.5


def fisher_metric(
    layer: LayerNormLinear,
    x: Float[Tensor, "n d"],
    covariance: Callable[[Float[Tensor, "n h"]], Float[Tensor, "n h h"]],
    dispersion: float = 1.0,
    across_units: bool = False,
) -> Float[Tensor, "h d+2 h d+2"]:
    """The Fisher information of a small generalised linear model whose natural parameters are $LN(W x)$.

    Unit i has the parameters $(w_i, b_i, g_i)$, in this order; block [i, :, j, :] is
    $$E_x\\left[\\frac{Cov(y_i, y_j | x)}{\\phi^2} J_i J_j^T\\right], \\qquad
    J_i = \\left(\\frac{g_i}{\\sigma} \\chi_i,\\ 1,\\ \\frac{a_i - \\mu}{\\sigma}\\right), \\qquad
    \\chi_i = x - \\frac{d\\mu}{dw_i} - \\frac{a_i - \\mu}{\\sigma} \\frac{d\\sigma}{dw_i}.$$

    covariance    from natural parameters [n, h] to Cov(y | x) [n, h, h]: for a softmax, diag(p) - p p^T
    dispersion    $\\phi$
    across_units  the paper's formula lets a weight act on its own unit alone; under layer normalization it also
                  moves the mean and deviation of all others. With True these terms are kept, and the result is
                  the exact Fisher information.

    `[:, -1, :, -1]` is the metric along the gains: it does not depend on the scale of weights or inputs, while the
    block of the weights falls by 4 when they are doubled.

    Raises ValueError for a layer with a nonlinearity.
    """
    gain = layer.norm.weight
    if layer.nonlinearity is not None or gain is None:
        raise ValueError("expected a LayerNormLinear without a nonlinearity and with gains: a generalised linear model")
    with torch.no_grad():
        n, h = len(x), layer.out_features
        unit = torch.eye(h, dtype=x.dtype, device=x.device)
        a = nn.functional.linear(x, layer.weight, layer.bias)
        centred = a - a.mean(1, keepdim=True)
        spread = centred.square().mean(1, keepdim=True)
        eps = layer.norm.eps
        sigma = (spread + eps).sqrt() if layer.norm.eps_mode == "var" else spread.sqrt() + eps
        root = sigma if layer.norm.eps_mode == "var" else spread.sqrt()  # dsigma/da is centred / (h root)
        z = centred / sigma
        # d z_k / d a_i, times sigma: [n, k, i]
        slopes = unit - 1 / h - z[:, :, None] * (centred / root)[:, None, :] / h
        by_weight = (gain / sigma)[:, :, None] * (slopes if across_units else slopes * unit)
        own = unit.expand(n, h, h)
        parts = (by_weight[..., None] * x[:, None, None, :], own[..., None], (own * z[:, :, None])[..., None])
        jacobian = torch.cat(parts, -1)  # [n, k, i, parameter]
        of_y = covariance(layer(x)) / dispersion**2
        return torch.einsum("nkip,nkl,nljq->ipjq", jacobian, of_y, jacobian) / n
