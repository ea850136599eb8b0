"""A diagram that runs: a module whose weights carry the dotted names of the diagram.

Each primitive has one evaluator, which finds its dimensions by the names of the axes, so the order of axes and
whatever it is broadcast over need no case of their own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuropil.interpret.diagrams.axes import Array, DiagramError, symbol
from neuropil.interpret.diagrams.core import Diagram, Op
from neuropil.interpret.diagrams.functions import FUNCTIONS, reads

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Compiled(nn.Module):
    """`diagram.torch()`: call it with the input tensors; one output, or a tuple of them.

    `weights` maps names to tensors, which are used as they are; those not given are drawn under `seed`. The sizes of
    the weights must be known; those of the inputs are learned from the tensors at every call. Raises DiagramError for
    tensors that do not fit.
    """

    def __init__(
        self,
        diagram: Diagram,
        weights: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        modules: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        super().__init__()
        self._flat = diagram.flat()
        self._calls = dict(modules or {})
        self._sized: dict[tuple[torch.Size, ...], Diagram] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, op in weights_of(self._flat).items():
            given = None if weights is None else weights.get(name)
            value = _initial(op, name, generator) if given is None else _checked(given, op.cod[0], name)
            self._keep(name, value, bool(op.option("trainable", True)))

    def _keep(self, name: str, value: Tensor, trainable: bool) -> None:
        """Under its dotted name, so that a state dictionary has the names of the diagram."""
        *path, last = name.split(".")
        home: nn.Module = self
        for part in path:
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = home.get_submodule(part)
        if isinstance(value, nn.Parameter) or (trainable and value.is_floating_point()):
            home.register_parameter(last, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
        else:
            home.register_buffer(last, value)

    def value_of(self, name: str) -> Tensor:
        """The weight of this dotted name."""
        home: Any = self
        for part in name.split("."):
            home = getattr(home, part)
        return home

    def forward(self, *inputs: Tensor) -> Any:
        key = tuple(x.shape for x in inputs)
        if key not in self._sized:
            self._sized[key] = self._flat._bound(sizes_from(self._flat, inputs))
        diagram = self._sized[key]
        like = self._like(inputs)
        values: dict[int, Any] = dict(enumerate(inputs))
        last = _last_reads(diagram)
        for number, step in enumerate(diagram.steps):
            given = [values[i] for i in step.ins]
            found = self._run(step.op, given, like)
            values |= dict(zip(step.outs, found if isinstance(found, tuple) else (found,), strict=True))
            for wire in last.get(number, ()):
                del values[wire]
        out = tuple(values[i] for i in diagram.outputs)
        return out[0] if len(out) == 1 else out

    def _like(self, inputs: Sequence[Tensor]) -> Tensor:
        """What constants are to be like: the first tensor that holds numbers, not indices."""
        floating = (x for x in (*inputs, *self.parameters(), *self.buffers()) if x.is_floating_point())
        return next(floating, torch.empty(0))

    def _run(self, op: Op, given: Sequence[Tensor], like: Tensor) -> Any:
        if op.kind == "weight":
            return self.value_of(op.name.removeprefix("/"))
        if op.kind == "opaque":
            return self._calls[op.name.removeprefix("/")](*given)
        return evaluate(op, given, like)


def weights_of(flat: Diagram) -> dict[str, Op]:
    """The weights of a diagram by name, each once; DiagramError where one name has two shapes."""
    found: dict[str, Op] = {}
    for step in flat.steps:
        if step.op.kind == "weight":
            name = step.op.name.removeprefix("/")
            before = found.setdefault(name, step.op)
            if before.cod != step.op.cod:
                raise DiagramError(
                    f"two weights called {name!r}, of {str(before.cod[0])!r} and of {str(step.op.cod[0])!r}; "
                    f"rename one, or put it into a block"
                )
    return found


def _initial(op: Op, name: str, generator: torch.Generator) -> Tensor:
    shape = _shape(op.cod[0], f"weight {name!r}")
    if op.option("init") == "ones":
        return torch.ones(shape)
    if op.option("init") == "zeros":
        return torch.zeros(shape)
    bound = 1 / math.sqrt(max(1, math.prod(shape[1:]) if len(shape) > 1 else shape[0] if shape else 1))
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


def _shape(a: Array, who: str) -> tuple[int, ...]:
    for one in a.axes:
        if not isinstance(one.size, int):
            raise DiagramError(
                f"{who} has an axis {one.name!r} of unknown size {one.size}; say it, as .torch({one.name}=...)"
            )
    return a.shape


def _checked(value: Tensor, a: Array, name: str) -> Tensor:
    if tuple(value.shape) != a.shape:
        raise DiagramError(f"weight {name!r} of shape {tuple(value.shape)}; the diagram has {str(a)!r}")
    return value


def sizes_from(diagram: Diagram, inputs: Sequence[Tensor]) -> dict[Any, int]:
    """The free sizes as these tensors have them; DiagramError where they do not fit."""
    if len(inputs) != len(diagram.inputs):
        raise DiagramError(f"{len(inputs)} tensors for a diagram of {len(diagram.inputs)} inputs: {diagram}")
    found: dict[Any, int] = {}
    for a, x in zip(diagram.inputs, inputs, strict=True):
        if x.dim() != len(a.axes):
            raise DiagramError(f"a tensor of shape {tuple(x.shape)} for {str(a)!r}, which has {len(a.axes)} axes")
        for one, size in zip(a.axes, x.shape, strict=True):
            if one.free and found.setdefault(symbol(one.name), size) != size:
                raise DiagramError(
                    f"axis {one.name!r} has size {found[symbol(one.name)]} in one tensor and {size} in another"
                )
    for a, x in zip(diagram.inputs, inputs, strict=True):
        for one, size in zip(a.sized(found).axes, x.shape, strict=True):
            if one.size != size:
                raise DiagramError(f"axis {one.name!r} has size {size} in a tensor; the diagram says {one.size}")
    return found


def _last_reads(diagram: Diagram) -> dict[int, list[int]]:
    """After which step each array is not read any more."""
    last = {wire: number for number, step in enumerate(diagram.steps) for wire in (*step.outs, *step.ins)}
    out: dict[int, list[int]] = {}
    for wire, number in last.items():
        if wire not in diagram.outputs:
            out.setdefault(number, []).append(wire)
    return out


# --------------------------------------------------------------------------------------------------------- evaluators


def evaluate(op: Op, given: Sequence[Tensor], like: Tensor) -> Any:
    """The value of one box on tensors whose dimensions stand in the order of its arrays."""
    if op.kind not in EVALUATE:
        raise DiagramError(f"a box {op.name or op.kind!r} without a function cannot be run")
    return EVALUATE[op.kind](op, given, like)


def _einsum(op: Op, given: Sequence[Tensor], like: Tensor) -> Tensor:
    names = list(dict.fromkeys(n for a in op.dom for n in a.names))
    if len(names) > len(LETTERS):
        raise DiagramError(f"an einsum of {len(names)} indices; at most {len(LETTERS)} can be run")
    letter = dict(zip(names, LETTERS, strict=False))
    left = ",".join("".join(letter[n] for n in a.names) for a in op.dom)
    return torch.einsum(f"{left}->{''.join(letter[n] for n in op.cod[0].names)}", *given)


def aligned(x: Tensor, a: Array, names: Sequence[str]) -> Tensor:
    """The tensor with its dimensions in this order, and one of size 1 for each name that it lacks."""
    kept = [n for n in names if n in a.names]
    x = x.permute([a.place(n) for n in kept])
    return x[tuple(slice(None) if n in a.names else None for n in names)]


@functools.cache
def function_of(name: str) -> Callable[..., Tensor]:
    """The function of a name, or of its gradient: "relu'0" is that of relu's argument 0."""
    base, prime, argument = name.partition("'")
    if not prime:
        text = FUNCTIONS[base].code.format("a", "b", n="n")
        return eval(f"lambda n, a, b=None: {text}", {"torch": torch, "F": nn.functional})
    used = reads(base, int(argument))
    names = {"0": "a", "1": "b", "y": "y"}
    text = FUNCTIONS[base].slopes[int(argument)].format("a", "b", g="g", y="y", n="n")
    arguments = ", ".join([*(names[key] for key in used), "g"])
    return eval(f"lambda n, {arguments}: {text}", {"torch": torch, "F": nn.functional})


def _elementwise(op: Op, given: Sequence[Tensor], like: Tensor) -> Tensor:
    names = op.cod[0].names
    parts = [aligned(x, a, names) for x, a in zip(given, op.dom, strict=True)]
    number = op.option("number")
    return function_of(op.name)(None if number is None else float(number), *parts)


def _softmax(op: Op, given: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.softmax(given[0], op.dom[0].place(op.option("axis")))


def _softmax_back(op: Op, given: Sequence[Tensor], like: Tensor) -> Tensor:
    y, g = given
    return y * (g - (y * g).sum(op.dom[0].place(op.option("axis")), keepdim=True))


def _max(op: Op, given: Sequence[Tensor], like: Tensor) -> Tensor:
    return given[0].max(op.dom[0].place(op.option("axis"))).values


def _max_back(op: Op, given: Sequence[Tensor], like: Tensor) -> Tensor:
    x, g = given
    place = op.dom[0].place(op.option("axis"))
    best = x.argmax(place, keepdim=True)
    return torch.zeros_like(x).scatter(place, best, aligned(g, op.dom[1], op.dom[0].names))


def index_map(op: Op, source: Array, target: Array) -> tuple[Tensor, Tensor, list[str], list[str]]:
    """Where each core index of the target reads in the flattened core of the source, and whether that exists."""
    core = [n for n in source.names if n not in op.over]
    out = [n for n in target.names if n not in op.over]
    maps = {axis: (offset, dict(factors)) for axis, offset, factors in op.option("maps")}
    shape = [target[n].size for n in out]
    flat = torch.zeros(shape, dtype=torch.long)
    inside = torch.ones(shape, dtype=torch.bool)
    for name in core:
        offset, factors = maps[name]
        place = torch.full(shape, int(offset))
        for axis, factor in factors.items():
            steps = torch.arange(target[axis].size) * int(factor)
            place = place + steps.view([-1 if n == axis else 1 for n in out])
        inside &= (place >= 0) & (place < source[name].size)
        flat = flat * source[name].size + place
    return flat, inside, core, out


def _reindex(op: Op, given: Sequence[Tensor], like: Tensor) -> Tensor:
    source, target = op.dom[0], op.cod[0]
    flat, inside, core, out = index_map(op, source, target)
    x = aligned(given[0], source, [*op.over, *core])
    x = x.reshape([*x.shape[: len(op.over)], -1])
    picked = x[..., torch.where(inside, flat, 0).to(x.device)]
    if not bool(inside.all()):
        picked = torch.where(inside.to(x.device), picked, torch.full((), op.option("fill"), dtype=x.dtype))
    order = [*op.over, *out]
    return picked.permute([order.index(n) for n in target.names])


def _scatter(op: Op, given: Sequence[Tensor], like: Tensor) -> Tensor:
    source, target = op.cod[0], op.dom[0]  # of the map, which runs the other way
    flat, inside, core, out = index_map(op, source, target)
    x = aligned(given[0], target, [*op.over, *out])
    x = x.reshape([*x.shape[: len(op.over)], -1])
    keep = inside.flatten()
    sizes = [source[n].size for n in core]
    made = x.new_zeros([*x.shape[:-1], math.prod(sizes)])
    made = made.index_add(-1, flat.flatten()[keep].to(x.device), x[..., keep.to(x.device)])
    order = [*op.over, *core]
    return made.reshape([*x.shape[:-1], *sizes]).permute([order.index(n) for n in source.names])


def _concat(op: Op, given: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat(list(given), op.cod[0].place(op.option("axis")))


def _lookup(op: Op, given: Sequence[Tensor], like: Tensor) -> Tensor:
    return given[1][given[0]]


def _lookup_back(op: Op, given: Sequence[Tensor], like: Tensor) -> Tensor:
    ids, g = given
    table = g.new_zeros(op.cod[0].shape)
    return table.index_add(0, ids.flatten(), g.reshape(-1, *table.shape[1:]))


def _constant(op: Op, given: Sequence[Tensor], like: Tensor) -> Tensor:
    shape = _shape(op.cod[0], f"constant {op.name!r}")
    made: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    if op.name == "eye":
        return torch.eye(*shape, **made)
    if op.name == "causal":
        return torch.full(shape, -torch.inf, **made).triu(1)
    return torch.full(shape, float(op.option("number")), **made)


def _box(op: Op, given: Sequence[Tensor], like: Tensor) -> Any:
    function = op.option("function")
    if function is None:
        raise DiagramError(f"box {op.name!r} has no function; give one to run it")
    return lifted(function, op.dom, op.cod, op.over)(*given)


def lifted(function: Callable[..., Any], dom: Sequence[Array], cod: Sequence[Array], over: Sequence[str]) -> Any:
    """The function broadcast over these axes, one `torch.vmap` each."""
    if not over:
        return function
    name, rest = over[0], over[1:]
    inner = lifted(function, [a.without([name]) for a in dom], [a.without([name]) for a in cod], rest)
    in_dims = tuple(a.place(name) if name in a.names else None for a in dom)
    out_dims = tuple(a.place(name) for a in cod)
    return torch.vmap(inner, in_dims, out_dims[0] if len(out_dims) == 1 else out_dims)


def _vjp(op: Op, given: Sequence[Tensor], like: Tensor) -> Any:
    """The gradient of a box without a rule of its own: its vector-Jacobian product, computed anew."""
    inner: Op = op.option("of")
    count = len(inner.dom)
    xs, gs = given[:count], given[count:]
    which = [i for i, a in enumerate(inner.dom) if a.dtype == "float"]

    def of_floats(*floats: Tensor) -> tuple[Tensor, ...]:
        whole = list(xs)
        for i, x in zip(which, floats, strict=True):
            whole[i] = x
        out = evaluate(inner, whole, like)
        return out if isinstance(out, tuple) else (out,)

    with torch.enable_grad():
        leaves = [xs[i].detach().requires_grad_() for i in which]
        outs = of_floats(*leaves)
        pairs = [(y, g) for y, g in zip(outs, gs, strict=True) if y.requires_grad]
        found = torch.autograd.grad([y for y, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    made = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))
    return made if len(made) > 1 else made[0]


def _aten(op: Op, given: Sequence[Tensor], like: Tensor) -> Any:
    """An operation of PyTorch as it was traced."""
    space, packet, overload = op.option("target").split(".")
    function = getattr(getattr(getattr(torch.ops, space), packet), overload)
    if packet == "view":  # what made its input contiguous may have been left out
        function = torch.ops.aten.reshape.default
    arguments = unfrozen(op.option("args"), given)
    found = function(*arguments, **dict(unfrozen(op.option("kwargs"), given)))
    return tuple(found) if isinstance(found, list | tuple) else found


def unfrozen(value: Any, given: Sequence[Any]) -> Any:
    """The arguments of a traced call from their frozen form: ("wire", n), ("list", ...), ("dtype", name), ..."""
    if not isinstance(value, tuple):
        return value
    tag, rest = value[0], value[1:]
    if tag == "wire":
        return given[rest[0]]
    if tag == "list":
        return [unfrozen(v, given) for v in rest]
    if tag == "pairs":
        return [(key, unfrozen(v, given)) for key, v in rest]
    if tag == "torch":
        return getattr(torch, rest[0])
    return torch.device(rest[0])


EVALUATE: dict[str, Callable[[Op, Sequence[Tensor], Tensor], Any]] = {
    "einsum": _einsum,
    "elementwise": _elementwise,
    "softmax": _softmax,
    "softmax'": _softmax_back,
    "max": _max,
    "max'": _max_back,
    "reindex": _reindex,
    "scatter": _scatter,
    "concat": _concat,
    "lookup": _lookup,
    "lookup'": _lookup_back,
    "constant": _constant,
    "box": _box,
    "vjp": _vjp,
    "aten": _aten,
}

__all__ = ["Compiled", "evaluate", "function_of", "lifted", "sizes_from", "unfrozen", "weights_of"]
