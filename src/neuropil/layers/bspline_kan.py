r"""A Kolmogorov-Arnold layer of B-splines: a learnable curve on every edge, as the yardstick for cheaper ones.

$$y_o = \sum_i \left[ w^b_{oi}\, silu(x_i) + w^s_{oi} \sum_{k=1}^{G+K} c_{oik} B_k(x_i) \right] + bias_o$$

$B_k$ are the B-splines of order K on G equal intervals of `grid_range`, continued by K knots on either side, and zero
outside these. Parameters: $d_{in} d_{out} (G + K + 2) + d_{out}$; a linear map has $d_{in} d_{out} + d_{out}$.

>>> layer = BSplineKAN(3, 5)
>>> layer(torch.rand(7, 3)).shape
torch.Size([7, 5])

It begins as the KAN paper has it: $c \sim N(0, 0.1^2)$, $w^s = 1$, $w^b$ uniform as Xavier; so the variance of what it
gives is about $0.01 + 1.06$ of what it gets at each edge, and is not kept. The grid is fixed: where inputs leave
`grid_range` only the silu remains, and the adaptive grids of that paper are not here.

Sources: Ziming Liu et al., "KAN: Kolmogorov-Arnold Networks", 2024, arXiv:2404.19756; as the baseline of Xingyi Yang,
Xinchao Wang, "Kolmogorov-Arnold Transformer", 2024, arXiv:2409.10594 (which counts G + K + 3 parameters an edge).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BSplineKAN", "bspline_basis"]


def bspline_basis(x: Float[Tensor, "*shape"], knots: Float[Tensor, " n"], order: int) -> Float[Tensor, "*shape k"]:
    """All B-splines of this order on these (strictly increasing) knots at x: `len(knots) - order - 1` of them.

    >>> bspline_basis(torch.tensor([1.5]), torch.arange(5.0), 1)  # two of the three hats meet there
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    x = x.unsqueeze(-1)
    basis = ((x >= knots[:-1]) & (x < knots[1:])).to(x.dtype)
    for k in range(1, order + 1):
        rise = (x - knots[: -k - 1]) / (knots[k:-1] - knots[: -k - 1])
        fall = (knots[k + 1 :] - x) / (knots[k + 1 :] - knots[1:-k])
        basis = rise * basis[..., :-1] + fall * basis[..., 1:]
    return basis


class BSplineKAN(nn.Module):
    """The layer of the equation above, in place of a linear map and the activation before it.

    in_features, out_features, bias    as in `torch.nn.Linear`
    grid, order    G intervals and the order K of the splines, 3 and 3 in the comparison of the KAT paper
    grid_range     the interval on which the splines are complete, (-1, 1) in the KAN paper
    """

    knots: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        grid: int = 3,
        order: int = 3,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(in_features, out_features, grid, order) < 1 or not grid_range[0] < grid_range[1]:
            raise ValueError(
                f"{in_features} inputs, {out_features} outputs, grid {grid}, order {order}, range {grid_range}; "
                "expected sizes of at least 1 and a range from low to high"
            )
        self.in_features, self.out_features, self.grid, self.order = in_features, out_features, grid, order
        self.grid_range = grid_range
        step = (grid_range[1] - grid_range[0]) / grid
        knots = torch.arange(-order, grid + order + 1, device=device, dtype=dtype or torch.get_default_dtype())
        self.register_buffer("knots", knots * step + grid_range[0])
        shape = (out_features, in_features)
        self.base_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.spline_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.coefficients = nn.Parameter(torch.empty(*shape, grid + order, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The KAN paper's initial values, bias 0."""
        nn.init.xavier_uniform_(self.base_weight)
        nn.init.ones_(self.spline_weight)
        nn.init.normal_(self.coefficients, std=0.1)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch o"]:
        """Raises ValueError for another number of inputs."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"input of shape {tuple(x.shape)}; expected {self.in_features} in the last dimension")
        basis = bspline_basis(x, self.knots, self.order)
        splines = (self.spline_weight.unsqueeze(-1) * self.coefficients).flatten(1)
        return F.linear(F.silu(x), self.base_weight, self.bias) + F.linear(basis.flatten(-2), splines)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, grid={self.grid}, order={self.order}, range={self.grid_range}"
