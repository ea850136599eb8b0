"""What the trainable block of a Bone adapter does to one weight matrix: the equations of `neuropil.learn.bone`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

# Which of the tiles' two indices (a: block-row, b: block-column) the blocks of a tiled variant are numbered by.
TILED = {"col": "a", "row": "b", "free": "", "ab": "a"}
SHARDED = ("miss", "mini")
VARIANTS = (*TILED, *SHARDED)


class BoneBlock(nn.Module):
    """The trainable numbers of one adapter on one `out x in` weight, zero at first. See `neuropil.learn.bone`.

    `block` has shape [out/r, r, r] for "col", [in/r, r, r] for "row", [r, r] for "free", [2, out/r, r, r]
    (first A, then B) for "ab", [r, out] for "miss", [r, mini_r] for "mini".

    Raises ValueError for sizes that do not fit the variant.

    >>> block = BoneBlock(12, 8, r=4)
    >>> block.block.shape, torch.equal(block.change(torch.ones(12, 8)), torch.ones(12, 8))
    (torch.Size([3, 4, 4]), True)
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        r: int,
        variant: str = "col",
        mini_r: int | None = None,
        dropout: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(out_features, in_features, r, variant, mini_r, dropout)
        self.out_features, self.in_features, self.r = out_features, in_features, r
        self.variant, self.mini_r, self.dropout = variant, mini_r, dropout
        rows, columns = out_features // r, in_features // r
        shape = {
            "col": (rows, r, r),
            "row": (columns, r, r),
            "free": (r, r),
            "ab": (2, rows, r, r),
            "miss": (r, out_features),
            "mini": (r, mini_r or 0),
        }[variant]
        self.block = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"{self.out_features} x {self.in_features}, r={self.r}, variant={self.variant!r}"

    @property
    def settings(self) -> dict[str, int | float | str | None]:
        """The arguments that made it, apart from the sizes of the weight."""
        return {"r": self.r, "variant": self.variant, "mini_r": self.mini_r, "dropout": self.dropout}

    @property
    def forms_weight(self) -> bool:
        """Whether the layer must form W' to answer; the other variants only change what goes in and out."""
        return self.variant in ("col", "ab")

    def change(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W' = W + dW, in the wider of the two number formats."""
        if self.variant in SHARDED:
            return weight + self._shards()
        factor, shift = self._factor_and_shift()
        tiles = self._tiles(weight).to(torch.promote_types(weight.dtype, factor.dtype))
        return (tiles + self._times(tiles, factor) + self._spread(shift)).reshape(weight.shape)

    def undo(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W from W': `(W' - B)(I + B)^-1` a tile, in float32 or wider. See `condition` for how exact it is."""
        if self.variant in SHARDED:
            return weight - self._shards()
        factor, shift = self._factor_and_shift()
        factor = factor.to(torch.promote_types(torch.promote_types(weight.dtype, factor.dtype), torch.float32))
        inverse = torch.linalg.inv(factor + torch.eye(self.r, device=factor.device, dtype=factor.dtype))
        return self._times(self._tiles(weight) - self._spread(shift.to(factor.dtype)), inverse).reshape(weight.shape)

    def condition(self) -> float:
        """The largest condition number of any I + B, by which `undo` may magnify rounding; 1 where it inverts nothing.

        Infinite where some I + B is singular: W then cannot be had back from W'.
        """
        if self.variant in SHARDED:
            return 1.0
        factor = self._factor_and_shift()[0].detach().double()
        condition = torch.linalg.cond(factor + torch.eye(self.r, device=factor.device, dtype=factor.dtype))
        return float(condition.nan_to_num(nan=math.inf).max())  # the zero matrix gives NaN

    def around(self, base: Callable[[Tensor], Tensor], x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The adapted layer's answer from the base layer's, without its weight (variants that allow it).

        row, free:  u_b = B_b x_b for each piece x_b of r inputs;  y = base(x + u) + (sum_b u_b) on every block-row
        miss, mini: y = base(x) + S(x) D, with S(x) the sum of the pieces of r inputs
        """
        wide = x.to(torch.promote_types(x.dtype, self.block.dtype))
        if self.variant in SHARDED:
            pieces = functional.pad(
                functional.dropout(wide, self.dropout, self.training), (0, -self.in_features % self.r)
            )
            y, added = base(x), pieces.unflatten(-1, (-1, self.r)).sum(-2) @ self.block.to(wide.dtype)
        else:
            index = TILED[self.variant]
            u = torch.einsum(f"...bj,{index}kj->...bk", wide.unflatten(-1, (-1, self.r)), self.block.to(wide.dtype))
            y, added = base((wide + u.flatten(-2)).to(x.dtype)), u.sum(-2)
        times = self.out_features // added.shape[-1]
        return (y + added.repeat(*[1] * (added.dim() - 1), times)).to(y.dtype)

    def _shards(self) -> Float[Tensor, "out in"]:
        """dW of MiSS: D's columns, repeated along the inputs (the last repetition may be cut)."""
        rows = self.block.T.repeat(self.out_features // self.block.shape[1], 1)
        return rows.repeat(1, -(-self.in_features // self.r))[:, : self.in_features]

    def _factor_and_shift(self) -> tuple[Tensor, Tensor]:
        """dW = W factor + shift, tile by tile: the same block twice, except in "ab"."""
        return (self.block[0], self.block[1]) if self.variant == "ab" else (self.block, self.block)

    def _tiles(self, weight: Tensor) -> Float[Tensor, "a i b j"]:
        """A view of the weight in which entry [a, i, b, j] is entry [i, j] of tile (a, b)."""
        return weight.unflatten(1, (-1, self.r)).unflatten(0, (-1, self.r))

    def _times(self, tiles: Tensor, factor: Tensor) -> Float[Tensor, "a i b j"]:
        return torch.einsum(f"aibk,{TILED[self.variant]}kj->aibj", tiles, factor.to(tiles.dtype))

    def _spread(self, shift: Tensor) -> Tensor:
        """The shift as an addend to the tiles: [a or 1, i, b or 1, j]."""
        if TILED[self.variant] == "b":
            return shift.transpose(0, 1).unsqueeze(0)
        return (shift if TILED[self.variant] else shift.unsqueeze(0)).unsqueeze(2)


def check_sizes(out_features: int, in_features: int, r: int, variant: str, mini_r: int | None, dropout: float) -> None:
    """Raise ValueError, with what would be right, where the sizes do not fit the variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}; expected one of {', '.join(VARIANTS)}")
    if r < 1:
        raise ValueError(f"r is {r}; expected 1 or more")
    if (mini_r is None) == (variant == "mini"):
        raise ValueError(f"mini_r={mini_r} with variant {variant!r}; 'mini' needs it and no other variant takes it")
    if not 0 <= dropout < 1 or (dropout and variant not in SHARDED):
        raise ValueError(
            f"dropout={dropout} with variant {variant!r}; expected 0, or less than 1 for 'miss' and 'mini'"
        )
    common = math.gcd(out_features, in_features)
    if variant in TILED and common % r:
        legal = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
        raise ValueError(
            f"a weight of {out_features} x {in_features} is not divisible into blocks of {r} x {r}; "
            f"expected r among {legal} (or variant 'miss', which takes any r up to {in_features})"
        )
    if variant in SHARDED and r > in_features:
        raise ValueError(f"r is {r}; expected at most the {in_features} inputs of the layer")
    if mini_r is not None and (mini_r < 1 or out_features % mini_r):
        raise ValueError(f"mini_r is {mini_r}; expected a divisor of the {out_features} outputs of the layer")
