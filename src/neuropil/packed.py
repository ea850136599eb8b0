"""Weights kept in the bits they need, and modules that compute with them.

A *packing* stands for a weight tensor: `Affine` (integer codes on a uniform grid), `Lookup` (codes into tables of
levels or of short vectors), `Sparse` (a bit map and the values it marks), `Residual` (a sum of packings). `pack` puts
packings in the place of a model's weights; such a module still has a `weight`, made anew whenever it is read, so
everything that works on the plain model works on the packed one. `models.save_packed` and `models.load` keep
packed models on disk, byte for byte what `nbytes` says.

>>> model = nn.Sequential(nn.Linear(64, 8))
>>> codes = torch.arange(8 * 64).reshape(8, 64) % 16
>>> packing = Affine.of(codes, levels=16, scale=torch.full((8, 2), 0.1), zero=torch.full((8, 2), 8.0))
>>> pack(model, {"0": packing})
>>> model[0].weight[0, :3]
tensor([-0.8000, -0.7000, -0.6000])
>>> nbytes(packing), 8 * 64 * 4  # 4 bits a weight, and two numbers for each of the 16 groups
(384, 2048)

A weight of any shape is seen as a matrix `[rows, fan]`: the first dimension, and all others. Scales, zeros and
tables have two leading dimensions `[r, g]` and serve tiles of `rows / r` by `fan / g` weights: `[1, 1]` is one for
the whole tensor, `[rows, 1]` one a channel, `[rows, fan / 32]` one for each 32 weights of a channel.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuropil.errors import ModelError


class PackingError(ModelError, ValueError):
    """Codes, scales or tables that do not fit the weight they are to stand for."""


# -------------------------------------------------------------------------------------------------- codes in bytes


def code_bits(levels: int) -> float:
    """Bits that a code of so many levels takes: five ternary codes share a byte, eight codes of three bits share three.

    >>> [code_bits(levels) for levels in (2, 3, 4, 8, 16, 256, 1000)]
    [1.0, 1.6, 2.0, 3.0, 4.0, 8.0, 10.0]
    """
    bits = float(max(1, math.ceil(math.log2(levels))))
    return min(8 / _a_byte(levels), bits) if levels <= 256 else bits


def _a_byte(levels: int) -> int:
    """How many codes of so many levels one byte can hold as digits."""
    digits = 1
    while levels ** (digits + 1) <= 256:
        digits += 1
    return digits


def pack_codes(codes: Integer[Tensor, "*shape"], levels: int) -> UInt8[Tensor, " bytes"]:
    """Codes in `[0, levels)` as bytes, in order; `unpack_codes` gives them back.

    Raises PackingError for codes outside the range or levels outside 2..65536.

    >>> stored = pack_codes(torch.tensor([2, 0, 1, 1, 2, 2]), levels=3)
    >>> stored.tolist(), unpack_codes(stored, 6, levels=3).tolist()
    ([200, 2], [2, 0, 1, 1, 2, 2])
    """
    if not 2 <= levels <= 1 << 16:
        raise PackingError(f"{levels} levels: codes have 2 to 65536 levels (1 to 16 bits)")
    flat = codes.flatten().long()
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= levels):
        raise PackingError(f"codes from {int(flat.min())} to {int(flat.max())}: expected 0 to {levels - 1}")
    if levels <= 256 and 8 / _a_byte(levels) <= (bits := max(1, math.ceil(math.log2(levels)))):
        digits = _a_byte(levels)
        padded = nn.functional.pad(flat, (0, -len(flat) % digits)).reshape(-1, digits)
        return (padded * levels ** torch.arange(digits, device=flat.device)).sum(1).to(torch.uint8)
    bits = math.ceil(math.log2(levels))
    words = nn.functional.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8)
    each = torch.stack([(words >> bit) & 1 for bit in range(bits)], dim=-1).reshape(-1, 8)  # [8 bits of a byte]
    return (each << torch.arange(8, device=flat.device)).sum(1).to(torch.uint8)


def unpack_codes(stored: UInt8[Tensor, " bytes"], count: int, levels: int) -> Integer[Tensor, " count"]:
    """The first `count` codes in `stored`, as uint8 (int32 above 256 levels)."""
    if levels <= 256 and 8 / _a_byte(levels) <= max(1, math.ceil(math.log2(levels))):
        return _digits(levels).to(stored.device)[stored.int()].reshape(-1)[:count]
    bits = math.ceil(math.log2(levels))
    each = (stored[:, None] >> torch.arange(8, dtype=torch.uint8, device=stored.device)) & 1
    each = each.reshape(-1, bits)
    kind = torch.uint8 if levels <= 256 else torch.int32
    weights = 2 ** torch.arange(bits, dtype=torch.int32, device=stored.device)
    return (each.int() * weights).sum(1, dtype=torch.int32)[:count].to(kind)


@lru_cache
def _digits(levels: int) -> Tensor:
    """`[256, digits]`: the digits of every byte in base `levels`, the lowest first."""
    byte = torch.arange(256)[:, None]
    return (byte // levels ** torch.arange(_a_byte(levels)) % levels).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------- the packings


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
    """`scale * table[code]` tile by tile: any levels (powers, codebooks, signs), or vectors of `d` weights a code."""

    codes: Tensor
    table: Tensor
    scale: Tensor

    @classmethod
    def of(
        cls,
        codes: Integer[Tensor, "*shape"],
        table: Float[Tensor, "r g K d"],
        shape: Sequence[int],
        scale: Float[Tensor, "scales groups"] | None = None,
    ) -> Lookup:
        """From codes `[rows, fan / d]` (or the weight's shape where `d` is 1) into `table`'s K entries of d weights."""
        levels, d = table.shape[2:]
        made = cls(shape, levels=levels)
        _, _, _, fan = _tiles(made.shape, table, "a table")
        if fan % d or codes.numel() * d != made.shape.numel():
            raise PackingError(
                f"{codes.numel()} codes of {d} weights each for a weight of shape {list(shape)} in tiles {fan} wide"
            )
        made.register_buffer("codes", pack_codes(codes, max(2, levels)))
        made.register_buffer("table", table.detach().clone())
        if scale is not None:
            _tiles(made.shape, scale, "a scale")
        made.register_buffer("scale", None if scale is None else scale.detach().clone())
        return made

    def integers(self) -> Tensor:
        """The codes, `[rows, fan / d]`."""
        rows, fan = _matrix(self.shape)
        levels, d = self.table.shape[2:]
        return unpack_codes(self.codes, rows * fan // d, max(2, levels)).reshape(rows, fan // d)

    def dense(self) -> Tensor:
        r, high, g, wide = _tiles(self.shape, self.table, "a table")
        levels, d = self.table.shape[2:]
        codes = self.integers().reshape(r, high, g, wide // d).int()
        first = torch.arange(r * g, device=codes.device, dtype=torch.int32).reshape(r, 1, g, 1) * levels
        dense = self.table.reshape(-1, d)[codes + first]
        if self.scale is None:
            return dense.reshape(self.shape)
        tiles = _tiles(self.shape, self.scale, "a scale")
        return (dense.reshape(tiles) * self.scale[:, None, :, None]).reshape(self.shape)


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
        for name in ("scale",) if kind is Lookup else ():
            made.register_buffer(name, None)
        for name, (size, dtype) in spec["buffers"].items():
            made.register_buffer(name, torch.empty(size, dtype=getattr(torch, dtype)))
        return made
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise PackingError(f"not a packing of this version of neuropil ({error!r}): {str(spec)[:200]}") from error


# ----------------------------------------------------------------------------------------------------- the modules


class _Packed:
    """Mixed into a module's class: its `weight` is that of its packing, made when it is read."""

    packing: Packing
    _dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        return self.packing.dense().to(self._dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        probe = fn(torch.empty(0, dtype=self._dtype))  # where .to(dtype) would have taken the weight
        self._dtype = probe.dtype if probe.is_floating_point() else self._dtype
        packing = self._modules.pop("packing")  # type: ignore[attr-defined]
        try:
            super()._apply(fn, recurse)  # type: ignore[misc]
        finally:
            self._modules["packing"] = packing  # type: ignore[attr-defined]
        if probe.device != next(packing.buffers()).device:
            packing.to(probe.device)
        return self


class _PackedLinear(_Packed):
    """A linear map that uses the kernels for packed weights where they apply."""

    def forward(self, x: Tensor) -> Tensor:
        from neuropil import packed_kernels

        out = packed_kernels.linear(self.packing, x)
        if out is None:
            return super().forward(x)  # type: ignore[misc]
        bias: Tensor | None = self.bias  # type: ignore[attr-defined]
        return out if bias is None else out + bias


class _PackedEmbedding(_Packed):
    """An embedding that makes only the rows dense that are asked for."""

    def forward(self, ids: Tensor) -> Tensor:
        if self.max_norm is not None:  # type: ignore[attr-defined]
            return super().forward(ids)  # type: ignore[misc]
        found = self.packing.rows(ids.flatten()).to(self._dtype)
        return found.reshape(*ids.shape, -1)


@lru_cache
def _packed_class(cls: Any) -> Any:
    special: dict[Any, type] = {nn.Linear.forward: _PackedLinear, nn.Embedding.forward: _PackedEmbedding}
    mixin = special.get(getattr(cls, "forward", None), _Packed)
    return type(f"Packed{cls.__name__}", (mixin, cls), {"__module__": cls.__module__})


def packed(module: nn.Module, packing: Packing) -> nn.Module:
    """A module of the same kind (still an `nn.Linear`, say) whose weight is in `packing`.

    The bias and all else are shared with `module`, which is left as it is. Raises PackingError where the shapes
    differ or there is no weight.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise PackingError(f"{type(module).__name__} has no weight to pack")
    if weight.shape != packing.shape:
        raise PackingError(f"a packing of shape {list(packing.shape)} for a weight of shape {list(weight.shape)}")
    kind: Any = type(module)
    if parametrize.is_parametrized(module):
        kind = kind.__bases__[0]  # the class that torch derived the parametrised one from
    made = _remade(module, kind if isinstance(module, _Packed) else _packed_class(kind))
    made._modules["packing"] = packing
    made._dtype = weight.dtype
    return made


def _remade(module: nn.Module, cls: Any) -> Any:
    """The module as one of another class, with the same attributes and bias, and neither weight nor packing."""
    made: Any = cls.__new__(cls)
    nn.Module.__init__(made)
    own = ("_parameters", "_modules", "_buffers")
    made.__dict__.update({name: value for name, value in vars(module).items() if name not in own})
    made._buffers.update(module._buffers)
    made._parameters.update({name: value for name, value in module._parameters.items() if name != "weight"})
    inside = ("parametrizations", "packing")
    made._modules.update({name: child for name, child in module._modules.items() if name not in inside})
    return made


def pack(model: nn.Module, packings: Mapping[str, Packing]) -> None:
    """Put packings in the place of weights, in place: module name -> packing. Tied weights follow.

    A module tied to a packed one (an output head that is the embedding) shares the packing.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    for name, packing in packings.items():
        module = model.get_submodule(name)
        weight = module._parameters.get("weight")
        for other in owners.get(id(weight), [name]) if weight is not None else [name]:
            _put(model, other, packed(model.get_submodule(other), packing))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    if not name:
        raise PackingError("the model is itself the layer: put it in a Sequential first")
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def packed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Packing]]:
    """Every packed module of a model, with its name and packing."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _Packed):
            yield name, module, module.packing  # type: ignore[misc]


def is_packed(module: nn.Module) -> bool:
    return isinstance(module, _Packed)


def unpack(model: nn.Module) -> None:
    """Give every packed module a plain weight again, in place: larger, and as fast as the plain model."""
    weights: dict[int, nn.Parameter] = {}
    for name, packed_module, packing in list(packed_modules(model)):
        module: Any = packed_module
        if id(packing) not in weights:
            weights[id(packing)] = nn.Parameter(module.weight.detach())
        made = _remade(module, next(base for base in type(module).__mro__[1:] if not issubclass(base, _Packed)))
        made._parameters = {"weight": weights[id(packing)], **made._parameters}
        _put(model, name, made)


def plain_twin(model: nn.Module) -> nn.Module:
    """A copy on the meta device with plain weights: the shapes of the model before it was packed, and no values."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        bare = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
    twin = copy.deepcopy(model, memo)
    unpack(twin)
    return twin


def nbytes(module: nn.Module) -> int:
    """Bytes of what a module's `state_dict` holds, shared tensors counted once.

    >>> nbytes(nn.Linear(10, 10))
    440
    """
    tensors = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
