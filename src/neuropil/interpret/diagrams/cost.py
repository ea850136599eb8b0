r"""Operations and memory, read off a diagram: numbers where sizes are known, polynomials where they are not.

A box that costs $c$ on its own axes costs $c$ times the sizes of all axes that run past it. An einsum costs one
multiplication for each input after the first, and one addition if it sums, for every value of all its indices. The
memory at a cut is the sum over the arrays that are alive there.

>>> from neuropil.interpret.diagrams import einsum
>>> einsum("y k h, x k h -> y x h").cost().matmul
2*h*k*x*y
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass

import sympy

from neuropil.interpret.diagrams.axes import Array, DiagramError, Size, plain
from neuropil.interpret.diagrams.core import Diagram, Op
from neuropil.interpret.diagrams.reverse import saved
from neuropil.interpret.diagrams.run import weights_of


@dataclass(frozen=True)
class Cost:
    """What a diagram costs. Memory is in numbers, not bytes, and without the weights."""

    flops: Size  # all operations, with those of elementwise functions and softmaxes
    matmul: Size  # those of the products alone, as torch.utils.flop_counter counts them
    parameters: Size  # trained numbers, shared ones once
    cuts: tuple[Size, ...]  # memory before, between and after the steps
    training: Size | None  # what the reverse boxes read; None where a box has no reverse

    @property
    def peak(self) -> Size:
        """Memory at the widest cut."""
        if all(isinstance(cut, int) for cut in self.cuts):
            return max(self.cuts)
        return sympy.Max(*self.cuts)

    def __str__(self) -> str:
        said = f"{_shown(self.flops)} operations ({_shown(self.matmul)} in products)"
        said += f", {_shown(self.parameters)} parameters"
        return said if self.training is None else f"{said}, {_shown(self.training)} numbers kept for training"


def _shown(value: Size) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def cost(diagram: Diagram) -> Cost:
    flat = diagram.flat()
    steps = [step.op for step in flat.steps]
    weights = [op.cod[0] for op in weights_of(flat).values() if op.option("trainable", True)]
    return Cost(
        _sum(flops(op) for op in steps),
        _sum(flops(op) for op in steps if is_product(op)),
        _sum(a.numel for a in weights),
        tuple(_cuts(flat)),
        _training(flat),
    )


def _training(flat: Diagram) -> Size | None:
    try:
        return _sum(a.numel for a in saved(flat))
    except DiagramError:
        return None


def _sum(values: Iterable[Size]) -> Size:
    total = functools.reduce(operator.add, values, 0)
    return total if isinstance(total, int) else plain(sympy.expand(total))


def _product(values: Iterable[Size]) -> Size:
    return functools.reduce(operator.mul, values, 1)


def is_product(op: Op) -> bool:
    """Whether a box is a matrix product or a convolution."""
    if op.kind == "aten":
        return op.name in PRODUCTS
    return op.kind == "einsum" and len(op.dom) > 1 and bool(_summed(op))


def _summed(op: Op) -> set[str]:
    return {n for a in op.dom for n in a.names} - set(op.cod[0].names)


def flops(op: Op) -> Size:
    """The operations of one box, the axes that run past it included."""
    if op.kind == "einsum":
        every = {one.name: one.size for a in op.dom for one in a.axes}
        return (len(op.dom) - 1 + bool(_summed(op))) * _product(every.values())
    if op.kind == "aten":
        return _of_aten(op)
    if op.kind in ("weight", "constant", "reindex", "concat", "lookup", "opaque", "box", "block"):
        return 0
    if op.kind == "scatter" and op.name == "merge":
        return 0
    if op.kind == "vjp":
        inner: Op = op.option("of")
        return 2 * flops(inner)
    each = {"softmax": 5, "softmax'": 4}.get(op.kind, 1)
    return each * _product(a.numel for a in (max((*op.dom, *op.cod), key=lambda a: len(a.axes)),))


def _cuts(flat: Diagram) -> list[Size]:
    last = dict.fromkeys(range(len(flat.inputs)), -1)
    last |= {wire: number for number, step in enumerate(flat.steps) for wire in (*step.outs, *step.ins)}
    last |= {wire: len(flat.steps) for wire in flat.outputs}
    held = {i for step in flat.steps if step.op.kind in ("weight", "constant") for i in step.outs}
    alive = set(range(len(flat.inputs)))
    out = [_memory(flat, alive)]
    for number, step in enumerate(flat.steps):
        alive |= set(step.outs) - held
        if step.op.kind not in ("weight", "constant"):
            alive = {wire for wire in alive if last[wire] > number}
            out.append(_memory(flat, alive))
    return out


def _memory(flat: Diagram, alive: Iterable[int]) -> Size:
    return _sum(flat.wires[wire].numel for wire in sorted(alive))


# ------------------------------------------------------------------------------------------- operations of PyTorch

PRODUCTS = {
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "attention", "conv1d", "conv2d", "conv3d",
    "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip
FREE = {
    "view", "reshape", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "split",
    "chunk", "flatten", "unflatten", "cat", "stack", "embedding", "t", "roll", "pad", "to", "arange", "full",
    "clone", "unbind", "index", "index_select", "ones", "zeros", "alias", "contiguous",
}  # fmt: skip


def _of_aten(op: Op) -> Size:
    """A product by its shapes; any other operation one for each number that comes out."""
    if op.name not in PRODUCTS:
        return 0 if op.name in FREE else _product(op.cod[0].shape) if op.cod else 0
    dom, out = op.dom, op.cod[0]
    if op.name == "linear":
        return 2 * out.numel * dom[0].shape[-1]
    if op.name in ("addmm", "baddbmm"):
        return 2 * out.numel * dom[1].shape[-1]
    if op.name == "attention":
        query, key, value = dom[:3]
        lead = _product(query.shape[:-2])
        length, other = query.shape[-2], key.shape[-2]
        return 2 * lead * length * other * (query.shape[-1] + value.shape[-1])
    if op.name.startswith("conv_transpose"):
        return 2 * dom[0].numel * _product(dom[1].shape[1:])
    if op.name.startswith("conv"):
        return 2 * out.numel * _product(dom[1].shape[1:])
    if op.name == "einsum":
        return 0
    return 2 * out.numel * _last(dom[0])


def _last(a: Array) -> Size:
    return a.shape[-1] if a.axes else 1
