"""What stands for a weight in few bits: `Affine`, `Lookup`, `Sparse`, `Residual`. See `neuropil.packed`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from neuropil.packed_codes import PackingError, code_bits, pack_codes, unpack_codes


class Packing(nn.Module):
    """What stands for a weight of `shape`: buffers, and `dense()`, the weight. Made by the classes' `of`."""

    shape: torch.Size

    def __init__(self, shape: Sequence[int], **constants: int) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.constants = constants

    def dense(self) -> Tensor:
        """The weight, in the dtype of its scales or values."""
        raise NotImplementedError

    def rows(self, at: Integer[Tensor, " n"]) -> Tensor:
        """Rows of the weight by number, without making the others dense where the codes of a row are whole bytes."""
        return self.dense()[at]

    def spec(self) -> dict[str, Any]:
        """What of it is no tensor, for JSON; `empty` makes a packing of it, ready for `load_state_dict`."""
        sizes = {name: [list(b.shape), str(b.dtype).removeprefix("torch.")] for name, b in self.named_buffers()}
        return {"kind": type(self).__name__, "shape": list(self.shape), **self.constants, "buffers": sizes}

    @property
    def bits(self) -> float:
        """Stored bits a weight, scales and tables included."""
        return 8 * nbytes(self) / max(1, self.shape.numel())

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.bits:.2f} bits a weight"


def _matrix(shape: torch.Size) -> tuple[int, int]:
    return (shape[0], shape[1:].numel()) if len(shape) else (1, 1)


def _tiles(shape: torch.Size, serving: Tensor, what: str) -> tuple[int, int, int, int]:
    """`[r, rows / r, g, fan / g]`: the weight's matrix cut into the tiles that `serving` `[r, g, ...]` is for."""
    (rows, fan), (r, g) = _matrix(shape), serving.shape[:2]
    if rows % r or fan % g:
        raise PackingError(
            f"{what} of shape {list(serving.shape)} for a weight of shape {list(shape)}: its {rows} rows and {fan} "
            f"inputs must be divisible by {r} and {g}; choose a group size that divides {fan}, or one a channel"
        )
    return r, rows // r, g, fan // g


class Affine(Packing):
    """`scale * (code - zero)` tile by tile: the uniform grid."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(
        cls,
        codes: Integer[Tensor, "*shape"],
        levels: int,
        scale: Float[Tensor, "r g"],
        zero: Float[Tensor, "r g"] | float,
    ) -> Affine:
        """From codes in `[0, levels)` of the weight's own shape. One `zero` for all is kept as a single number."""
        made = cls(codes.shape, levels=levels)
        _tiles(made.shape, scale, "a scale")
        zeros = zero if isinstance(zero, Tensor) else scale.new_full((1, 1), zero)
        if zeros.shape not in (scale.shape, (1, 1)):
            raise PackingError(f"a zero of shape {list(zeros.shape)}: expected that of the scale, {list(scale.shape)}")
        stored = pack_codes(codes, levels)
        made.register_buffer("codes", (stored ^ 128).view(torch.int8) if made.offset else stored)
        made.register_buffer("scale", scale.detach().clone())
        made.register_buffer("zero", zeros.detach().clone())
        return made

    @property
    def levels(self) -> int:
        return self.constants["levels"]

    @property
    def offset(self) -> int:
        """What the stored codes of eight bits lie below the codes: they are int8, as the matrix kernels read them."""
        return 128 if 128 < self.levels <= 256 else 0

    def integers(self) -> Tensor:
        """The codes, in the weight's shape."""
        if self.offset:
            return (self.codes.view(torch.uint8) ^ 128).reshape(self.shape)
        return unpack_codes(self.codes, self.shape.numel(), self.levels).reshape(self.shape)

    def rows(self, at: Integer[Tensor, " n"]) -> Tensor:
        rows, fan = _matrix(self.shape)
        r = self.scale.shape[0]
        width = self.codes.numel() // max(1, rows)
        if r not in (1, rows) or width * rows != self.codes.numel() or width * 8 != fan * code_bits(self.levels):
            return super().rows(at)
        scale = self.scale[at] if r == rows else self.scale
        zero = self.zero[at] if self.zero.shape[0] == rows and rows > 1 else self.zero
        small = Affine((len(at), *self.shape[1:]), levels=self.levels)
        small.codes, small.scale, small.zero = self.codes.reshape(rows, width)[at].flatten(), scale, zero
        return small.dense()

    def dense(self) -> Tensor:
        tiles = _tiles(self.shape, self.scale, "a scale")
        at = self.integers().reshape(tiles).to(self.scale.dtype)
        return ((at - self.zero[:, None, :, None]) * self.scale[:, None, :, None]).reshape(self.shape)


class Lookup(Packing):
    """`scale * table[code]` tile by tile: any levels (powers, codebooks, signs), or vectors of `d` weights a code.

    Tables and scales of `r` rows serve r equal blocks of the weight's rows, unless it is told otherwise which row has
    which: by the `sizes` of blocks of neighbouring rows (a pattern that repeats if it ends before the rows do), or by
    an `owner` for each row, of ceil(log2 r) bits.
    """

    codes: Tensor
    table: Tensor
    scale: Tensor
    sizes: Tensor | None
    owner: Tensor | None
    OPTIONAL = ("scale", "sizes", "owner")

    @classmethod
    def of(
        cls,
        codes: Integer[Tensor, "*shape"],
        table: Float[Tensor, "r g K d"],
        shape: Sequence[int],
        scale: Float[Tensor, "scales groups"] | None = None,
        *,
        sizes: Sequence[int] | None = None,
        owner: Integer[Tensor, " rows"] | None = None,
    ) -> Lookup:
        """From codes `[rows, fan / d]` (or the weight's shape where `d` is 1) into `table`'s K entries of d weights.

        >>> two, of = torch.tensor([[0.0, 1.0], [0.0, 9.0]]).reshape(2, 1, 2, 1), torch.ones(3, 4, dtype=torch.int)
        >>> Lookup.of(of, two, (3, 4), sizes=[1, 2]).dense()[:, 0]
        tensor([1., 9., 9.])
        """
        levels, d = table.shape[2:]
        made = cls(shape, levels=levels)
        made._keep_blocks(max(table.shape[0], 1 if scale is None else scale.shape[0]), sizes, owner)
        rows, fan = _matrix(made.shape)
        for serving, what in ((table, "a table"), (scale, "a scale")):
            if serving is not None:
                told = serving.shape[0] == made.constants.get("blocks")
                _tiles(torch.Size((serving.shape[0] if told else rows, fan)), serving, what)
        if (fan // table.shape[1]) % d or codes.numel() * d != made.shape.numel():
            raise PackingError(
                f"{codes.numel()} codes of {d} weights each for a weight of shape {list(shape)} in tiles "
                f"{fan // table.shape[1]} wide"
            )
        made.register_buffer("codes", pack_codes(codes, max(2, levels)))
        made.register_buffer("table", table.detach().clone())
        made.register_buffer("scale", None if scale is None else scale.detach().clone())
        return made

    def _keep_blocks(self, blocks: int, sizes: Sequence[int] | None, owner: Tensor | None) -> None:
        """Store which block each row is of, as its buffers are: sizes less one, in the bits of a row's number."""
        rows = _matrix(self.shape)[0]
        self.register_buffer("sizes", None)
        self.register_buffer("owner", None)
        if sizes is not None and owner is not None:
            raise PackingError("give the sizes of blocks of rows, or the owner of each row, not both")
        if sizes is not None:
            if len(sizes) != blocks or min(sizes) < 1 or rows % sum(sizes):
                raise PackingError(
                    f"sizes {list(sizes)}: expected {blocks} numbers above 0, one a block, whose sum divides the "
                    f"{rows} rows"
                )
            self.constants["blocks"] = blocks
            self.register_buffer("sizes", pack_codes(torch.tensor(sizes) - 1, max(2, rows)))
        if owner is not None:
            if owner.numel() != rows or int(owner.max()) >= blocks:
                raise PackingError(
                    f"owners up to {int(owner.max())} of {owner.numel()} rows: expected one for each of {rows} rows, "
                    f"below {blocks}"
                )
            self.constants["blocks"] = blocks
            self.register_buffer("owner", pack_codes(owner, max(2, blocks)))

    def block(self, r: int) -> Integer[Tensor, " rows"]:
        """Which of the r tables (or scales) serves each row."""
        rows, at = _matrix(self.shape)[0], torch.arange(_matrix(self.shape)[0], device=self.codes.device)
        if r == 1 or (self.sizes is None and self.owner is None):
            return at // (rows // r)
        blocks = self.constants["blocks"]
        if self.owner is not None:
            return unpack_codes(self.owner, rows, max(2, blocks)).long()
        assert self.sizes is not None
        sizes = unpack_codes(self.sizes, blocks, max(2, rows)).long() + 1
        pattern = torch.arange(blocks, device=at.device).repeat_interleave(sizes)
        return pattern.repeat(rows // len(pattern))

    def integers(self) -> Tensor:
        """The codes, `[rows, fan / d]`."""
        rows, fan = _matrix(self.shape)
        levels, d = self.table.shape[2:]
        return unpack_codes(self.codes, rows * fan // d, max(2, levels)).reshape(rows, fan // d)

    def rows(self, at: Integer[Tensor, " n"]) -> Tensor:
        (rows, fan), (r, _, levels, d) = _matrix(self.shape), self.table.shape
        width = self.codes.numel() // max(1, rows)
        if width * rows != self.codes.numel() or width * 8 != fan // d * code_bits(max(2, levels)):
            return super().rows(at)
        codes = unpack_codes(self.codes.reshape(rows, width)[at].flatten(), len(at) * fan // d, max(2, levels))
        found = self._values(codes.reshape(len(at), fan // d), self.block(r)[at])
        if self.scale is not None:
            scale = self.scale[self.block(self.scale.shape[0])[at]]
            found = (found.reshape(*scale.shape, -1) * scale[..., None]).reshape(len(at), fan)
        return found.reshape(len(at), *self.shape[1:])

    def _values(self, codes: Tensor, block: Tensor) -> Tensor:
        """Entries of the tables of the given blocks, `[n, fan]`, for codes of rows."""
        _, g, levels, d = self.table.shape
        first = (block[:, None].int() * g + torch.arange(g, device=codes.device, dtype=torch.int32)) * levels
        each = codes.reshape(len(codes), g, -1).int() + first[:, :, None]
        return self.table.reshape(-1, d)[each].reshape(len(codes), -1)

    def dense(self) -> Tensor:
        rows, _ = _matrix(self.shape)
        dense = self._values(self.integers(), self.block(self.table.shape[0]))
        if self.scale is None:
            return dense.reshape(self.shape)
        scale = self.scale[self.block(self.scale.shape[0])]
        return (dense.reshape(rows, scale.shape[1], -1) * scale[:, :, None]).reshape(self.shape)


class Sparse(Packing):
    """The nonzero values and a map of a bit a weight; smaller than a dense tensor of b bits from sparsity 1/b on."""

    where: Tensor
    values: Tensor

    @classmethod
    def of(cls, weight: Float[Tensor, "*shape"], dtype: torch.dtype | None = None) -> Sparse:
        """From a weight with zeros in it; exact unless `dtype` is narrower."""
        made = cls(weight.shape)
        mask = weight.detach() != 0
        made.register_buffer("where", pack_codes(mask.int(), 2))
        made.register_buffer("values", weight.detach()[mask].to(dtype or weight.dtype))
        return made

    def mask(self) -> Tensor:
        return unpack_codes(self.where, self.shape.numel(), 2).bool().reshape(self.shape)

    def dense(self) -> Tensor:
        return self.values.new_zeros(self.shape).masked_scatter(self.mask(), self.values)


class Residual(Packing):
    """A sum of packings: what each leaves is given to the next (several binary bases, say)."""

    parts: nn.ModuleList

    @classmethod
    def of(cls, parts: Sequence[Packing]) -> Residual:
        """From packings of one shape."""
        if not parts or any(part.shape != parts[0].shape for part in parts):
            raise PackingError(
                f"packings of shapes {[list(part.shape) for part in parts]}: expected some, of one shape"
            )
        made = cls(parts[0].shape)
        made.parts = nn.ModuleList(parts)
        return made

    def spec(self) -> dict[str, Any]:
        parts = [part.spec() for part in self.parts if isinstance(part, Packing)]
        return {"kind": "Residual", "shape": list(self.shape), "parts": parts}

    def dense(self) -> Tensor:
        first, *others = (part.dense() for part in self.parts if isinstance(part, Packing))
        return sum(others, start=first)


PACKINGS: dict[str, type[Packing]] = {cls.__name__: cls for cls in (Affine, Lookup, Sparse, Residual)}


def empty(spec: Mapping[str, Any]) -> Packing:
    """The packing that a `spec` describes, its buffers not yet filled. Raises PackingError for a foreign one."""
    try:
        kind, shape = PACKINGS[spec["kind"]], spec["shape"]
        if kind is Residual:
            return Residual.of([empty(part) for part in spec["parts"]])
        made = kind(shape, **{k: int(v) for k, v in spec.items() if k not in ("kind", "shape", "buffers")})
        for name in Lookup.OPTIONAL if kind is Lookup else ():
            made.register_buffer(name, None)
        for name, (size, dtype) in spec["buffers"].items():
            made.register_buffer(name, torch.empty(size, dtype=getattr(torch, dtype)))
        return made
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise PackingError(f"not a packing of this version of neuropil ({error!r}): {str(spec)[:200]}") from error


def nbytes(module: nn.Module) -> int:
    """Bytes of what a module's `state_dict` holds, shared tensors counted once.

    >>> nbytes(nn.Linear(10, 10))
    440
    """
    tensors = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
