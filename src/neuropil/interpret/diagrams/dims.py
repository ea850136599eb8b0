"""Names for the axes of a traced model: which dimensions of which tensors are the same axis.

Every dimension of every tensor is a node; operations join them (a sum keeps its input's axes, a product of matrices
joins the two that it contracts). What is joined to a dimension that the user named has that name; any other axis is
named by its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

SAME = {
    "softmax", "layer_norm", "batch_norm", "group_norm", "rms_norm", "dropout", "native_layer_norm",
    "instance_norm", "_safe_softmax", "log_softmax", "native_dropout", "cumsum", "roll", "flip", "detach",
    "clone", "to", "contiguous", "alias", "feature_dropout", "alpha_dropout", "gelu", "where", "masked_fill",
    "pow", "hardtanh",
}  # fmt: skip


class Dims:
    """Union-find over dimensions."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.size: list[int] = []
        self.name: dict[int, str] = {}
        self.hint: dict[int, str] = {}

    def new(self, shape: Sequence[int]) -> list[int]:
        first = len(self.parent)
        self.parent += range(first, first + len(shape))
        self.size += shape
        return list(range(first, first + len(shape)))

    def root(self, one: int) -> int:
        while self.parent[one] != one:
            self.parent[one] = self.parent[self.parent[one]]
            one = self.parent[one]
        return one

    def join(self, a: int, b: int) -> None:
        """One axis from now on, if they have one size; of two names the earlier stays."""
        a, b = self.root(a), self.root(b)
        if a == b or self.size[a] != self.size[b]:
            return
        self.parent[b] = a
        for table in (self.name, self.hint):
            if b in table:
                table.setdefault(a, table[b])

    def label(self, one: int) -> str:
        root = self.root(one)
        return self.name.get(root) or f"{self.hint.get(root, 'd')}{self.size[root]}"

    def names(self, dims: Sequence[int]) -> list[str]:
        """The names of an array's axes; an axis that stands twice is numbered."""
        out: list[str] = []
        for one in dims:
            name, number = self.label(one), 2
            while name in out:
                name, number = f"{self.label(one)}_{number}", number + 1
            out.append(name)
        return out


Many = Sequence[Sequence[int]]


def relate(dims: Dims, name: str, target: Any, ins: Many, out: Sequence[int], args: Sequence[Any]) -> None:
    """Join what an operation keeps."""
    if name == "linear":
        _linear(dims, ins, out)
    elif name in ("matmul", "bmm", "mm"):
        _matmul(dims, ins[0], ins[1], out)
    elif name == "attention":
        _attention(dims, ins, out)
    elif name == "embedding":
        _tail(dims, [*ins[1], ins[0][1]], out)
    elif name in ("transpose", "permute", "t", "movedim", "swapaxes"):
        _permute(dims, name, ins[0], out, args)
    elif name in ("view", "reshape", "flatten", "unflatten", "_unsafe_view", "unsqueeze", "squeeze"):
        _reshape(dims, ins[0], out)
    elif name.startswith("conv"):
        _conv(dims, name, ins, out)
    elif "pool" in name:
        _pool(dims, ins[0], out)
    elif name in ("slice", "cat", "narrow", "split", "chunk", "index_select", "pad", "constant_pad_nd", "stack"):
        for one in ins:
            if len(one) == len(out):
                for a, b in zip(one, out, strict=True):
                    _resized(dims, a, b)
    elif name in ("mean", "sum", "amax", "amin", "var", "std", "argmax", "any", "all", "select", "norm"):
        _reduce(dims, ins[0], out, args)
    elif ins and (name in SAME or torch.Tag.pointwise in getattr(target, "tags", ())):
        for one in ins:
            _tail(dims, one, out)
    elif name == "expand":
        _tail(dims, ins[0], out)
    elif ins and [dims.size[i] for i in ins[0]] == [dims.size[i] for i in out]:
        _each(dims, ins[0], out)


def _each(dims: Dims, a: Sequence[int], b: Sequence[int]) -> None:
    if len(a) == len(b):
        for x, y in zip(a, b, strict=True):
            dims.join(x, y)


def _tail(dims: Dims, a: Sequence[int], b: Sequence[int]) -> None:
    """Aligned from the right, as broadcasting does."""
    for x, y in zip(reversed(a), reversed(b), strict=False):
        dims.join(x, y)


def _linear(dims: Dims, ins: Many, out: Sequence[int]) -> None:
    x, w = ins[0], ins[1]
    for a, b in zip(x[:-1], out[:-1], strict=True):
        dims.join(a, b)
    dims.join(x[-1], w[1])
    dims.join(w[0], out[-1])
    if len(ins) > 2:
        dims.join(w[0], ins[2][0])


def _matmul(dims: Dims, a: Sequence[int], b: Sequence[int], out: Sequence[int]) -> None:
    if len(a) < 2 or len(b) < 2:
        return
    dims.join(a[-1], b[-2])
    dims.join(a[-2], out[-2])
    dims.join(b[-1], out[-1])
    for one in (a, b):
        _tail(dims, one[:-2], out[:-2])


def _attention(dims: Dims, ins: Many, out: Sequence[int]) -> None:
    q, k, v = ins[:3]
    _each(dims, q[:-1], out[:-1])
    _tail(dims, v[-1:], out[-1:])
    _tail(dims, q[-1:], k[-1:])
    dims.join(k[-2], v[-2])
    for one in (k, v):
        _each(dims, one[:-2], q[:-2])


def _permute(dims: Dims, name: str, a: Sequence[int], out: Sequence[int], args: Sequence[Any]) -> None:
    order = list(range(len(a)))
    if name == "permute":
        order = [i % len(a) for i in args[1]]
    elif name == "transpose":
        i, j = (n % len(a) for n in args[1:3])
        order[i], order[j] = order[j], order[i]
    elif len(a) == 2:
        order = [1, 0]
    else:
        return
    for to, source in enumerate(order):
        dims.join(a[source], out[to])


def _reshape(dims: Dims, a: Sequence[int], out: Sequence[int]) -> None:
    """Dimensions that a view keeps: walk both shapes and join where the products before agree."""
    i = j = 0
    while i < len(a) and j < len(out):
        x, y = dims.size[a[i]], dims.size[out[j]]
        if x == y:
            dims.join(a[i], out[j])
            i, j = i + 1, j + 1
        elif x == 1:
            i += 1
        elif y == 1:
            j += 1
        else:
            i, j = _skip_group(dims, a, out, i, j)


def _skip_group(dims: Dims, a: Sequence[int], out: Sequence[int], i: int, j: int) -> tuple[int, int]:
    left, right = [dims.size[a[i]]], [dims.size[out[j]]]
    while math.prod(left) != math.prod(right):
        if math.prod(left) < math.prod(right):
            i += 1
            if i >= len(a):
                return len(a), len(out)
            left.append(dims.size[a[i]])
        else:
            j += 1
            if j >= len(out):
                return len(a), len(out)
            right.append(dims.size[out[j]])
    return i + 1, j + 1


def _conv(dims: Dims, name: str, ins: Many, out: Sequence[int]) -> None:
    x, w = ins[0], ins[1]
    dims.join(x[0], out[0])
    transposed = "transpose" in name
    dims.join(w[1 if transposed else 0], out[1])
    dims.join(x[1], w[0 if transposed else 1])
    if len(ins) > 2:
        dims.join(out[1], ins[2][0])
    dims.hint.setdefault(dims.root(out[1]), "c")
    for a, b, c in zip(x[2:], out[2:], w[2:], strict=True):
        _resized(dims, a, b)
        dims.hint.setdefault(dims.root(c), "k")


def _resized(dims: Dims, a: int, b: int) -> None:
    """The same axis where its size is kept (a padded window, a slice of another axis), else one named after it."""
    dims.join(a, b)
    if dims.root(a) != dims.root(b):
        root = dims.root(a)
        base = dims.name.get(root) or dims.hint.get(root) or "d"
        dims.hint.setdefault(dims.root(b), base)


def _pool(dims: Dims, a: Sequence[int], out: Sequence[int]) -> None:
    if len(a) == len(out):
        for x, y in zip(a[:2], out[:2], strict=False):
            dims.join(x, y)
        for x, y in zip(a[2:], out[2:], strict=True):
            if dims.size[y] > 1 or dims.size[x] == 1:
                _resized(dims, x, y)


def _reduce(dims: Dims, a: Sequence[int], out: Sequence[int], args: Sequence[Any]) -> None:
    gone = args[1] if len(args) > 1 else None
    which = (
        {n % len(a) for n in (gone if isinstance(gone, list | tuple) else [gone]) if isinstance(n, int)} if a else set()
    )
    if len(out) == len(a):
        _each(dims, a, out)
    elif len(out) == len(a) - len(which):
        _each(dims, [x for n, x in enumerate(a) if n not in which], out)
