r"""A convolutional or fully connected network that computes in integers: int8 times int8, summed in int32.

`convert_integer` gives weights 8-bit codes by channel, activations 8-bit codes by tensor, biases 32-bit ones, and
carries an accumulator into the next layer's codes by a multiplication and a shift:

$$ q_y = z_y + \mathrm{round}\Big( \frac{m}{2^c} \big( \sum q_w (q_x - z_x) + q_b \big) \Big), \quad
   \frac{m}{2^c} \approx \frac{S_w S_x}{S_y} $$

>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10)).eval()
>>> x = torch.randn(64, 1, 8, 8)
>>> changes = convert_integer(model, [x])
>>> print(changes)
changed 2 modules
>>> changes.model(x).shape, bool((changes.model(x) - model(x)).abs().max() < 0.05)
(torch.Size([64, 10]), True)

Batch norms are folded first. Batches of real numbers go in and real numbers come out; between the first rounding and
the last scaling there is no float. What has no integer form (an attention, a sigmoid) is computed in float between
rescaled codes and is named in `left`.

Sources: Jacob et al. 2018, arXiv:1712.05877; Yao et al. 2021, arXiv:2011.10680 (HAWQ-V3).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, fx, nn
from torch.nn import functional as F

from neuropil.changes import Changes
from neuropil.compress.quantize.folding import fold
from neuropil.compress.quantize.graph import CONVS, RELUS, _is, traced
from neuropil.compress.quantize.grids import Uniform, uniform
from neuropil.compress.quantize.models import layers, run_batches, weight_of
from neuropil.compress.quantize.observers import Observer
from neuropil.compress.quantize.rescaling import dyadic, requantize
from neuropil.compress.quantize.tiles import QuantizationError

Codes = Integer[Tensor, "..."]

# Operations that move codes about or choose among them: the same codes, on the same grid.
_MOVES = (
    *(
        nn.Identity,
        nn.Dropout,
        nn.Dropout1d,
        nn.Dropout2d,
        nn.Dropout3d,
        F.dropout,
        nn.Flatten,
        torch.flatten,
        "flatten",
    ),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d),
    *("view", "reshape", "contiguous", "permute", "transpose", torch.permute, torch.transpose, torch.reshape),
)
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")


class Round(nn.Module):
    """Real numbers to int8 codes."""

    def __init__(self, grid: Uniform) -> None:
        super().__init__()
        self.register_buffer("scale", grid.scale.flatten()[0])
        self.zero = int(grid.zero.flatten()[0])

    def forward(self, x: Float[Tensor, ...]) -> Codes:
        scale = self.scale
        assert isinstance(scale, Tensor)
        return ((x / scale).round() + self.zero).clamp(-128, 127).to(torch.int8)


class Scale(Round):
    """int8 codes to real numbers."""

    def forward(self, q: Codes) -> Float[Tensor, ...]:
        scale = self.scale
        assert isinstance(scale, Tensor)
        return (q.to(scale.dtype) - self.zero) * scale


class IntegerLayer(nn.Module):
    """A linear layer or convolution on int8 codes: int32 sums, dyadic rescaling, int8 codes.

    `relu` starts the range of its answers at zero. `simulate(q)` computes the same in floating point (double), the
    way fake quantization does: codes differ by at most one, where rounding ties.
    """

    codes: Tensor
    bias: Tensor
    m: Tensor
    c: Tensor
    real: Tensor

    def __init__(self, layer: nn.Module, before: Uniform, after: Uniform, relu: bool = False) -> None:
        super().__init__()
        weight = weight_of(layer)
        flat = weight.flatten(1)
        grid = uniform("restricted", 8, flat.amin(1, keepdim=True), flat.amax(1, keepdim=True))
        codes = grid.codes(flat[:, None]).reshape(weight.shape)
        scale = (grid.scale.flatten() * before.scale.flatten()).double()
        own = layer.bias
        real_bias = own.detach() if isinstance(own, Tensor) else torch.zeros_like(flat[:, 0])
        bias = (real_bias.double() / scale).round().clamp(-(2**31), 2**31 - 1)
        self.zero_in, self.zero_out = int(before.zero.flatten()[0]), int(after.zero.flatten()[0])
        bias -= self.zero_in * codes.flatten(1).double().sum(1)  # what the inputs' zero point adds to every sum
        real = scale / after.scale.flatten().double()
        m, c = dyadic(real)
        for name, value in {"codes": codes.to(torch.int8), "bias": bias.int(), "m": m, "c": c, "real": real}.items():
            self.register_buffer(name, value)
        self.low = self.zero_out if relu else -128
        self.relu = relu
        names = ("stride", "padding", "dilation", "groups", "padding_mode", "_reversed_padding_repeated_twice")
        self.how: dict[str, Any] = {name: getattr(layer, name) for name in names if hasattr(layer, name)}

    def accumulate(self, q: Codes) -> Codes:
        """The int32 sums, bias and all, channels along their usual dimension."""
        if self.codes.ndim == 2:
            rows = q.reshape(-1, q.shape[-1])
            sums = torch._int_mm(rows.contiguous(), self.codes.T.contiguous())
            return (sums + self.bias).reshape(*q.shape[:-1], -1)
        mode = "constant" if self.how["padding_mode"] == "zeros" else self.how["padding_mode"]
        pads = self.how["_reversed_padding_repeated_twice"]
        value = {"value": float(self.zero_in)} if mode == "constant" else {}
        q = F.pad(q, pads, mode, **value) if any(pads) else q
        return self._sums(q) + self.bias.reshape(-1, *[1] * (self.codes.ndim - 2))

    def _sums(self, q: Codes) -> Codes:
        """The convolution of int8 codes, in int32, as a matrix product with every patch (one for each group)."""
        kernel, groups = self.codes.shape[2:], self.how["groups"]
        for dim, (k, step, d) in enumerate(zip(kernel, self.how["stride"], self.how["dilation"], strict=True)):
            q = q.unfold(2 + dim, d * (k - 1) + 1, step)[..., ::d]
        n, channels, *high = q.shape[: 2 + len(kernel)]
        places = list(range(2, 2 + len(kernel)))
        patches = q.permute(0, *places, 1, *range(2 + len(kernel), q.ndim))
        rows = patches.reshape(-1, groups, channels // groups * kernel.numel())
        if groups == 1:
            sums = torch._int_mm(rows[:, 0].contiguous(), self.codes.flatten(1).T.contiguous())
        else:
            weight = self.codes.reshape(groups, -1, rows.shape[2]).int()
            sums = torch.bmm(rows.transpose(0, 1).int(), weight.transpose(1, 2)).transpose(0, 1)
        return sums.reshape(n, *high, -1).movedim(-1, 1).contiguous()  # torch's int8 max pooling needs that

    def _by_channel(self, x: Tensor) -> Tensor:
        return x if self.codes.ndim == 2 else x.reshape(-1, *[1] * (self.codes.ndim - 2))

    def forward(self, q: Codes) -> Codes:
        scaled = requantize(self.accumulate(q), self._by_channel(self.m), self._by_channel(self.c))
        return (scaled + self.zero_out).clamp(self.low, 127).to(torch.int8)

    def simulate(self, q: Codes) -> Codes:
        """The same by floating point: real scales, sums and rounding (halves up)."""
        scaled = (self.accumulate(q).double() * self._by_channel(self.real) + 0.5).floor()
        return (scaled + self.zero_out).clamp(self.low, 127).to(torch.int8)

    def extra_repr(self) -> str:
        return f"{list(self.codes.shape)}, int8" + ", then ReLU" * self.relu


class IntegerAdd(nn.Module):
    """The sum of two tensors of codes on different grids, in codes of a third."""

    m: Tensor
    c: Tensor

    def __init__(self, first: Uniform, second: Uniform, after: Uniform, relu: bool = False) -> None:
        super().__init__()
        self.zeros = [int(grid.zero.flatten()[0]) for grid in (first, second, after)]
        ratios = torch.stack([grid.scale.flatten()[0] / after.scale.flatten()[0] for grid in (first, second)])
        self.register_buffer("m", dyadic(ratios, 20)[0])
        self.register_buffer("c", dyadic(ratios, 20)[1])
        self.low = self.zeros[2] if relu else -128

    def forward(self, a: Codes, b: Codes) -> Codes:
        m, c, top = self.m, self.c, self.c.max()
        lift = top - c  # both products over one power of two, so that the sum is rounded once
        total = ((a.long() - self.zeros[0]) * m[0] << lift[0]) + ((b.long() - self.zeros[1]) * m[1] << lift[1])
        return (requantize(total, torch.ones_like(top), top) + self.zeros[2]).clamp(self.low, 127).to(torch.int8)


class IntegerMean(nn.Module):
    """The mean over the pixels of each channel: an int32 sum and a dyadic division."""

    def __init__(self, before: Uniform, after: Uniform, keep: bool) -> None:
        super().__init__()
        self.zeros = [int(grid.zero.flatten()[0]) for grid in (before, after)]
        self.ratio, self.keep = float(before.scale.flatten()[0] / after.scale.flatten()[0]), keep

    def forward(self, q: Codes) -> Codes:
        count = q[0, 0].numel()
        sums = q.flatten(2).sum(2, dtype=torch.int32) - count * self.zeros[0]
        m, c = dyadic(torch.tensor(self.ratio / count, dtype=torch.float64, device=q.device))
        out = (requantize(sums, m, c) + self.zeros[1]).clamp(-128, 127).to(torch.int8)
        return out.reshape(*q.shape[:2], *[1] * (q.ndim - 2)) if self.keep else out


class IntegerReLU(nn.Module):
    """Codes below that of zero become it."""

    def __init__(self, grid: Uniform) -> None:
        super().__init__()
        self.zero = int(grid.zero.flatten()[0])

    def forward(self, q: Codes) -> Codes:
        return q.clamp_min(self.zero)


# --------------------------------------------------------------------------------------------------- conversion


def convert_integer(model: nn.Module, calibration: Iterable[Any], *, observer: str = "minmax") -> Changes:
    """A copy of the model that computes in integers, its ranges found from the calibration batches.

    Linear layers, convolutions, ReLU, max and global average pooling, sums of branches, and what moves entries about
    run on int8 codes. The model must be one that torch.fx can follow, of one real input.
    Raises QuantizationError where it is not, where the calibration is empty, or weights are not finite or are packed.
    """
    if observer == "moving":
        raise QuantizationError('observer="moving" keeps no order of nodes: expected minmax, percentile, mse, entropy')
    layers(model)  # says what is wrong with the weights
    plain = fold(model)[0].model
    graph = fx.GraphModule(plain, traced(plain))
    grids = _ranges(graph, calibration, observer)
    return _Conversion(graph, grids).converted()


def _ranges(graph: fx.GraphModule, calibration: Iterable[Any], observer: str) -> dict[fx.Node, Uniform]:
    """The int8 grid of every real tensor in the graph."""
    observers: dict[fx.Node, Observer] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            if isinstance(out, Tensor) and out.is_floating_point() and n.op not in ("output", "get_attr"):
                seen = observers.setdefault(n, Observer(observer))
                seen.observe(out.detach().reshape(1, 1, -1), remember=observer != "minmax")
            return out

    def run(*batch: Any, **named: Any) -> None:
        Watch(graph).run(*batch, *named.values())

    shell = nn.Module()
    shell.forward = run
    graph.eval()
    run_batches(shell, calibration)
    grids = {}
    for node, seen in observers.items():
        grid = uniform("affine", 8, *seen.range("affine", 8))
        grids[node] = Uniform(grid.scale, grid.zero - 128, -128, 127)
    return grids


class _Conversion:
    """Goes through the nodes, with int8 codes for every real tensor; what has no integer form stays in float."""

    def __init__(self, graph: fx.GraphModule, grids: Mapping[fx.Node, Uniform]) -> None:
        self.plain, self.grids = graph, grids
        self.made, self.root = fx.Graph(), nn.Module()
        self.codes: dict[fx.Node, fx.Node] = {}  # where a tensor is in codes
        self.grid: dict[fx.Node, Uniform] = {}  # of which grid
        self.floats: dict[fx.Node, fx.Node] = {}  # where it is in real numbers (and all else)
        self.changed: list[str] = []
        self.left: dict[str, str] = {}

    def converted(self) -> Changes:
        for node in self.plain.graph.nodes:
            if node not in self.codes and node not in self.floats:
                self._node(node)
        self.made.lint()
        made = fx.GraphModule(self.root, self.made, type(self.plain).__name__)
        return Changes(made.eval(), tuple(self.changed), self.left)

    def _add(self, name: str, module: nn.Module, *args: fx.Node) -> fx.Node:
        name = name.replace(".", "_") or "layer"
        while hasattr(self.root, name):
            name += "_"
        self.root.add_module(name, module)
        return self.made.call_module(name, args)

    def _relu_after(self, node: fx.Node) -> fx.Node | None:
        """The ReLU that alone reads a node: it is then part of it."""
        users = list(node.users)
        return users[0] if len(users) == 1 and _is(self.plain, users[0], RELUS) else None

    def _done(self, node: fx.Node, relu: fx.Node | None, made: fx.Node, grid: Uniform) -> None:
        for each in (node, relu):
            if each is not None:
                self.codes[each], self.grid[each] = made, grid

    def _node(self, node: fx.Node) -> None:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        module = self.plain.get_submodule(str(node.target)) if node.op == "call_module" else None
        real = node in self.grids and source is not None and source in self.grids
        if node.op in ("placeholder", "get_attr"):
            self.floats[node] = self.made.node_copy(node, lambda n: self.floats[n])
            if node.op == "get_attr":
                self._attribute(str(node.target))
        elif node.op == "output":
            self.made.output(fx.map_arg(node.args[0], self._float))
        elif real and isinstance(module, (nn.Linear, *CONVS)):
            relu = self._relu_after(node)
            grid = self.grids[relu or node]
            before = self._code(source)  # type: ignore[arg-type]
            layer = IntegerLayer(module, self.grid[source], grid, relu is not None)  # type: ignore[index]
            self._done(node, relu, self._add(str(node.target), layer, before), grid)
            self.changed.append(str(node.target))
        elif real and _is(self.plain, node, RELUS):
            before = self._code(source)  # type: ignore[arg-type]
            grid = self.grid[source]  # type: ignore[index]
            self._done(node, None, self._add(node.name, IntegerReLU(grid), before), grid)
        elif real and _is(self.plain, node, _MOVES):
            self._move(node, source, module)  # type: ignore[arg-type]
        elif real and self._is_sum(node):
            first, second = node.args[0], node.args[1]
            a, b = self._code(first), self._code(second)  # type: ignore[arg-type]
            relu = self._relu_after(node)
            grid = self.grids[relu or node]
            added = IntegerAdd(self.grid[first], self.grid[second], grid, relu is not None)  # type: ignore[index]
            self._done(node, relu, self._add(node.name, added, a, b), grid)
        elif real and (keep := _is_mean(self.plain, node)) is not None:
            before = self._code(source)  # type: ignore[arg-type]
            mean = IntegerMean(self.grid[source], self.grids[node], keep)  # type: ignore[index]
            self._done(node, None, self._add(node.name, mean, before), self.grids[node])
        else:
            self._in_float(node, module)

    def _is_sum(self, node: fx.Node) -> bool:
        both = len(node.args) == 2 and all(isinstance(a, fx.Node) and a in self.grids for a in node.args)
        return both and not node.kwargs and _is(self.plain, node, _ADDS)

    def _move(self, node: fx.Node, source: fx.Node, module: nn.Module | None) -> None:
        before = self._code(source)
        if module is not None:
            made = self._add(str(node.target), module, before)
        else:
            made = self.made.node_copy(node, lambda n: before if n is source else self._float(n))
        self._done(node, None, made, self.grid[source])

    def _in_float(self, node: fx.Node, module: nn.Module | None) -> None:
        arguments = fx.map_arg((node.args, node.kwargs), self._float)
        if module is not None:
            made = self._add(str(node.target), module)
            made.args, made.kwargs = arguments
        else:
            made = self.made.create_node(node.op, node.target, *arguments)
        self.floats[node] = made
        if node in self.grids:
            named = str(node.target) if node.op == "call_module" else node.name
            kind = type(module).__name__ if module is not None else getattr(node.target, "__name__", node.target)
            self.left[named] = f"{kind} has no integer form here: it is computed in float"

    def _attribute(self, target: str) -> None:
        at: Any = self.plain
        for part in target.split("."):
            at = getattr(at, part)
        parent = self.root
        *path, leaf = target.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        setattr(parent, leaf, at) if isinstance(at, nn.Parameter) else parent.register_buffer(leaf, at)

    def _code(self, node: fx.Node) -> fx.Node:
        """The tensor in codes, rounded here if it was in real numbers."""
        if node not in self.codes:
            self.grid[node] = self.grids[node]
            self.codes[node] = self._add(f"{node.name}_round", Round(self.grid[node]), self.floats[node])
        return self.codes[node]

    def _float(self, node: fx.Node) -> fx.Node:
        """The tensor in real numbers, scaled here if it was in codes."""
        if node not in self.floats:
            self.floats[node] = self._add(f"{node.name}_scale", Scale(self.grid[node]), self.codes[node])
        return self.floats[node]


def _is_mean(model: nn.Module, node: fx.Node) -> bool | None:
    """Whether a global average pooling keeps its dimensions; None where a node is none."""
    if node.op == "call_module":
        module: Any = model.get_submodule(str(node.target))
        whole = isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d)
        size = module.output_size if whole else None
    elif node.op == "call_function" and getattr(node.target, "__name__", "") == "adaptive_avg_pool2d":
        size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
    elif node.op == "call_method" and node.target == "mean":
        dims = node.args[1:] if len(node.args) > 1 else (node.kwargs.get("dim"),)
        dims = tuple(dims[0]) if isinstance(dims[0], tuple | list) else dims
        return bool(node.kwargs.get("keepdim", False)) if sorted(map(str, dims)) in (["2", "3"], ["-1", "-2"]) else None
    else:
        return None
    return True if size in (1, (1,), (1, 1), [1, 1], (1, 1, 1)) else None
