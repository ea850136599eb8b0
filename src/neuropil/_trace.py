"""Follow a forward pass without computing it, to see which weights feed which nonlinearity and who reads the result.

A probe runs a module on tensors of the meta device (shapes without values) or, where the code branches on values,
on zero pages that take no memory. Every operation below autograd is seen. Each activation carries *streams*: the
linear maps it stems from, and for each of its entries which output of that map it is. So a slice, a stride, a chunk or
a reshape of fused projections needs no rule of its own: the same views are applied to the numbers of the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from neuropil._streams import (
    Parameter,
    Ref,
    Step,
    Stream,
    Unknown,
    Value,
    View,
    WeightOp,
    constant,
    copied,
    flat,
    same,
    widened,
)  # fmt: skip

aten = torch.ops.aten

# Operations that only move entries about, so that applying them to index tensors is exact.
_MOVES = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze",
    "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "narrow", "unfold", "repeat", "flatten",
    "unflatten", "roll", "flip", "constant_pad_nd", "movedim",
}  # fmt: skip
_SAME = {"clone", "_to_copy", "contiguous", "detach", "alias", "lift_fresh", "native_dropout", "copy_", "_conj"}
_LINEAR = {"add", "sub", "rsub", "neg", "mul", "div", "add_", "sub_", "mul_", "div_", "neg_", "where", "masked_fill"}
# Pointwise, though not tagged so.
_POINTWISE = {
    "softplus",
    "hardswish",
    "hardsigmoid",
    "prelu",
    "_prelu_kernel",
    "rrelu_with_noise",
    "log_sigmoid_forward",
}
_NORMS = {"native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit_no_training",
          "_native_batch_norm_legit", "_fused_rms_norm", "_native_batch_norm_legit_functional", "batch_norm",
          "_batch_norm_no_update", "cudnn_batch_norm", "_batch_norm_with_update", "rms_norm"}  # fmt: skip
_REDUCE = {"mean", "sum", "amax", "amin", "var", "var_mean", "std", "linalg_vector_norm", "norm"}
_POOLS = {"max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool2d",
          "upsample_nearest2d", "upsample_bilinear2d", "avg_pool1d", "adaptive_avg_pool1d",
          "mkldnn_max_pool2d"}  # fmt: skip
_MATMUL = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "_grouped_mm": (0, 1), "mv": (1, 0),
           "grouped_mm_fallback": (0, 1), "_addmm_activation": (1, 2), "_int_mm": (0, 1), "linear": (0, 1)}  # fmt: skip
_CONVS = {"convolution", "_convolution", "mkldnn_convolution", "convolution_overrideable"}


class Trace(TorchDispatchMode):
    """Records weight operations while active."""

    def __init__(self, parameters: dict[str, Tensor], adapters: set[str], device: str) -> None:
        super().__init__()
        self.names = {p.untyped_storage()._cdata: n for n, p in reversed(parameters.items())}
        self.parameters = parameters
        self.adapters = adapters
        self.device = device
        self.values: dict[int, Value] = {}
        self.alive: list[Any] = []
        self.ops: list[WeightOp] = []
        self.steps: dict[int, Step | int] = {}
        self.stack: list[str] = []
        self.ran: set[str] = set()
        self.inputs: dict[str, tuple[Value, int, int]] = {}
        self.outputs: dict[str, tuple[Value, int, int]] = {}
        self.nodes = 0
        self.op_nodes: list[int] = []
        self.scaled: set[int] = set()
        self.before: dict[int, Value] = {}
        self.padded: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.bordered: set[int] = set()  # nodes that have a border of constants
        self.by_node: dict[int, Value] = {}

    # -- values

    def value(self, tensor: Any) -> Value:
        found = self.values.get(id(tensor))
        return Value() if found is None else found

    def mark(self, tensor: Tensor, value: Value) -> None:
        if value.node < 0:
            value.node = self.nodes
            self.nodes += 1
        self.values[id(tensor)] = value
        self.by_node[value.node] = value
        self.alive.append(tensor)

    def parameter(self, tensor: Tensor) -> str | None:
        return self.names.get(tensor.untyped_storage()._cdata)

    # -- dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.device == "meta" and isinstance(kwargs.get("device"), torch.device):
            # Tensors the forward makes for itself must not mix devices with the probe's.
            kwargs = {**kwargs, "device": torch.device("meta")}
        out = func(*args, **kwargs)
        name = func.__name__.split(".")[0] if hasattr(func, "__name__") else str(func)
        self.follow(func, name, args, kwargs, out)
        return out

    def follow(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        tensors = [a for a in flat((args, kwargs)) if isinstance(a, Tensor)]
        values = [self.value(t) for t in tensors]
        # An operation in place gives its first argument a new value: what it read is the value before.
        self.before = {id(t): v for t, v in zip(tensors, values, strict=True)}
        outs = [o for o in flat(out) if isinstance(o, Tensor)]
        if not outs:
            return
        if (name in _MATMUL or name in _CONVS) and self.weight_op(name, args, outs[0]):
            return
        live = [v for v in values if v.streams]
        foreign = any(v.foreign for v in values)
        if not live:
            scale = name not in _MATMUL and any(v.scale for v in values)
            if name == "constant_pad_nd":
                self.padded[id(outs[0])] = (self.value(args[0]).node, tuple(args[1]))
            origin = self.origin(args[0]) if args and isinstance(args[0], Tensor) else ""
            if name in ("index", "index_select") and origin:
                foreign = False  # each token's own expert's bias
            for o in outs:
                self.mark(o, Value(foreign=foreign, scale=scale, parameter=origin))
                if foreign:
                    continue
                # Made of parameters and constants: a formula may need it.
                if name == "expand" and self.values.get(id(args[0])):
                    self.steps[self.values[id(o)].node] = self.value(args[0]).node
                else:
                    self.keep(func, args[:1] if name == "alias" else args, kwargs, o)
            return
        if name == "cat" and self.join(args, outs[0]):
            return
        if name == "constant_pad_nd":
            self.padded[id(outs[0])] = (self.value(args[0]).node, tuple(args[1]))
        if name in _MOVES:
            self.move(func, args, kwargs, out, self.value(args[0]))
        elif name in _SAME:
            source = self.value(args[1] if name == "copy_" else args[0])
            self.mark(outs[0], Value(copied(source.streams), source.foreign, source.scale))
            self.steps[self.values[id(outs[0])].node] = source.node
        elif name in _NORMS and self.value(args[0]).streams:
            source = self.value(args[0])
            self.mark(outs[0], Value(copied(source.streams), source.foreign))
            self.keep(func, args, kwargs, outs[0], norm=True)
        elif name in _REDUCE and len(tensors) == 1:
            self.reduce(func, name, args, kwargs, outs)
        elif name in _POOLS:
            self.pool(func, args, kwargs, outs[0])
        elif torch.Tag.pointwise in func.tags or name in _LINEAR or name.rstrip("_") in _POINTWISE:
            self.pointwise(func, name, args, kwargs, tensors, values, outs[0])
        else:
            self.opaque(outs)

    def origin(self, tensor: Tensor) -> str:
        return self.parameter(tensor) or self.value(tensor).parameter

    def join(self, args: tuple[Any, ...], out: Tensor) -> bool:
        """Tokens of several experts put one after another are still one layer's outputs."""
        values = [self.value(t) for t in args[0]]
        streams = [v.streams[0] for v in values if len(v.streams) == 1 and not v.foreign]
        if len(streams) != len(values) or len({self.ops[s.op].weight.name for s in streams}) != 1:
            return False
        if any(s.nonlinear for s in streams) or (len(args) > 1 and args[1] in (-1, out.dim() - 1)):
            return False
        index = torch.cat([s.index for s in streams], *args[1:])
        self.mark(out, Value([Stream(streams[0].op, index)]))
        return True

    def opaque(self, outs: list[Tensor]) -> None:
        for o in outs:
            self.mark(o, Value(foreign=True))

    def keep(self, func: Any, args: Any, kwargs: Any, out: Tensor, norm: bool = False) -> None:
        """Remember an operation for replay."""

        def ref(a: Any) -> Any:
            if isinstance(a, Tensor):
                name = self.parameter(a)
                if name is not None:
                    whole = self.parameters[name]
                    other = a.shape != whole.shape and a.numel() == whole.numel() and a.is_contiguous()
                    return Parameter(name, tuple(a.shape) if other else ())
                value = self.before.get(id(a))
                if value is not None and value.node >= 0:
                    return Ref(value.node)
                return a.detach().clone() if a.device.type != "meta" and a.numel() < 65 else Unknown()
            if isinstance(a, list | tuple):
                return type(a)(ref(b) for b in a)
            return a

        rank = args[0].dim() if norm else -1
        step = Step(func, ref(tuple(args)), {k: ref(v) for k, v in kwargs.items()}, rank)
        self.steps[self.values[id(out)].node] = step

    def move(self, func: Any, args: Any, kwargs: Any, out: Any, source: Value) -> None:
        def moved(stream: Stream) -> list[Tensor]:
            if func is aten.constant_pad_nd.default and (padded := widened(stream.index, args[1])) is not None:
                return [padded]
            try:
                result = func(stream.index, *args[1:], **kwargs)
            except RuntimeError:  # a view that the expanded index does not allow
                result = func(stream.index.contiguous(), *args[1:], **kwargs)
            return [o for o in flat(result) if isinstance(o, Tensor)]

        outs = [o for o in flat(out) if isinstance(o, Tensor)]
        indices = [moved(s) for s in source.streams]
        for k, o in enumerate(outs):
            streams = [
                Stream(s.op, i[k], s.nonlinear, s.gate, s.bends) for s, i in zip(source.streams, indices, strict=True)
            ]
            self.mark(o, Value(streams, source.foreign, source.scale))
            node = self.values[id(o)].node
            self.steps[node] = source.node
            if func is aten.constant_pad_nd.default and any(args[1]):
                self.bordered.add(node)
                if all(self.ops[s.op].kind == "conv" for s in streams):  # a pool that follows counts the border
                    self.keep(func, args, kwargs, o)

    def reduce(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> None:
        source = self.value(args[0])
        dims = (
            args[2]
            if name in ("linalg_vector_norm", "norm") and len(args) > 2
            else (args[1] if len(args) > 1 else None)
        )
        if name in ("linalg_vector_norm", "norm") and len(args) <= 2:
            dims = kwargs.get("dim")
        keep = outs[0].dim() == args[0].dim()
        dims = [dims] if isinstance(dims, int) else dims
        streams: list[Stream] | None = []
        for s in source.streams:
            if not dims or any(not constant(s.index, d) for d in dims):
                streams = None
                break
            index = s.index.amin(dim=tuple(dims), keepdim=keep)
            assert streams is not None
            streams.append(Stream(s.op, index, s.nonlinear or name not in ("mean", "sum"), s.gate, s.bends))
        for o in outs:
            # A sum over neurons is one number for all of them; a mean over places is still each neuron's own.
            self.mark(
                o,
                Value(foreign=source.foreign, scale=True)
                if streams is None
                else Value(copied(streams), source.foreign),
            )
            self.keep(func, args, kwargs, o)

    def pool(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        source = self.value(args[0])
        rest = out.dim() - 2
        streams = []
        for s in source.streams:
            if s.index.dim() != out.dim() or s.index.shape[1] != out.shape[1]:
                return self.opaque([out])
            corner = s.index[(slice(None), slice(None)) + (slice(0, 1),) * rest]
            streams.append(Stream(s.op, corner.expand(out.shape), s.nonlinear, s.gate, s.bends))
        self.mark(out, Value(streams, source.foreign))
        self.keep(func, args, kwargs, out)

    def pointwise(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], values: list[Value], out: Tensor
    ) -> None:
        linear = name in _LINEAR
        merged: list[Stream] = []
        groups: list[list[Stream]] = []
        foreign = False
        for t, v in zip(tensors, values, strict=True):
            one_for_all = v.scale or (not v.streams and (t.dim() == 0 or t.shape[-1] == 1) and out.shape[-1] > 1)
            foreign |= v.foreign and not (one_for_all and name.startswith(("mul", "div")))
            if v.streams and not v.scale:
                groups.append([Stream(s.op, s.index.expand(out.shape) if s.index.dim() <= out.dim() else s.index,
                                      s.nonlinear, s.gate, s.bends) for s in v.streams])  # fmt: skip
        by_route = [v for v, t in zip(values, tensors, strict=True) if v.foreign and not v.streams]
        if len(groups) == 1 and not foreign and by_route:
            # Every neuron of a token times the same routing weight: a formula cannot know it, and says so.
            source = next(v for v in values if v.streams)
            self.mark(out, Value(groups[0]))
            self.steps[self.values[id(out)].node] = source.node
            self.scaled.add(self.values[id(out)].node)
            return
        if name in ("add", "add_") and len(groups) == 1 and len(groups[0]) == 1 and not foreign:
            op = self.ops[groups[0][0].op]
            if any(not v.streams and self.origin(t) in op.biases for t, v in zip(tensors, values, strict=True)):
                op.late_bias = True
                source = next(v for v in values if v.streams)
                self.mark(out, Value(groups[0]))
                self.steps[self.values[id(out)].node] = source.node
                return
        product = name in ("mul", "mul_") and len(groups) == 2 and not same(groups[0], groups[1])
        if product:
            a, b = groups
            gate = a if max(s.bends for s in a) >= max(s.bends for s in b) else b
            # A bilinear product alone is no nonlinearity of a neuron; a gate that went through one is.
            for s in gate:
                s.gate = True
            bent = any(s.nonlinear for s in a + b)
            for s in a + b:
                s.nonlinear = s.nonlinear or bent
        elif not linear or (name in ("mul", "mul_") and len(groups) == 2):
            straight = [s for g in groups for s in g if not s.nonlinear]
            for s in [s for g in groups for s in g]:
                self.ops[s.op].to_nonlinear |= s in straight and len(straight) <= 2
                s.nonlinear = True
                s.bends += not name.startswith("clamp")
                self.ops[s.op].activation.append(name.rstrip("_"))
        for s in [s for g in groups for s in g]:
            twin = next((m for m in merged if m.op == s.op and torch.equal(m.index, s.index)), None)
            if twin is None:
                merged.append(s)
            else:
                twin.nonlinear |= s.nonlinear
                twin.gate |= s.gate
        if len(merged) > 8:  # a residual stream that many layers wrote to
            merged, foreign = [s for s in merged if not s.nonlinear], True
            merged = [] if len(merged) > 8 else merged
        self.mark(out, Value(merged, foreign, scale=not merged and any(v.scale for v in values) and not foreign))
        self.keep(func, args, kwargs, out)

    # -- linear maps

    def weight_op(self, name: str, args: tuple[Any, ...], out: Tensor) -> bool:
        conv = name in _CONVS
        x_at, w_at = (0, 1) if conv else _MATMUL[name]
        x, w = args[x_at], args[w_at]
        first = False
        if not self.origin(w):
            x, w, first = w, x, True
        param = self.origin(w)
        if (conv and first) or not param or self.parameter(x) is not None:
            return False
        view = self.view(param, w)
        if view is None:
            return False
        module = self.stack[-1] if self.stack else ""
        if param in self.adapters:
            self.mark(out, Value())
            return True
        groups = args[8] if conv and name == "convolution" else 1
        transposed = bool(args[6]) if conv and name == "convolution" else False
        axis = 1 if conv else (-2 if first else -1)
        if conv and (transposed or (w.dim() != 4 and groups == w.shape[0])):
            self.mark(out, Value(foreign=True))
            return True
        settings = tuple(args[3:]) if conv else ()
        op = WeightOp(
            "conv" if conv else "linear", view, first, self.value(x), module, out.shape[axis], x.dim(), settings, groups
        )
        before = self.inputs.get(module)
        if conv and id(x) in self.padded and before is not None and before[0].node == self.padded[id(x)][0]:
            op.padding = self.padded[id(x)][1]
        if self.parameter(w) is None:
            op.weight_node = self.value(w).node
        self.ops.append(op)
        shape = [1] * out.dim()
        shape[axis] = -1
        index = torch.arange(out.shape[axis]).view(shape).expand(out.shape)
        self.mark(out, Value([Stream(len(self.ops) - 1, index)]))
        self.op_nodes.append(self.values[id(out)].node)
        return True

    def view(self, param: str, w: Tensor) -> View | None:
        """The geometry of a weight; one computed from its parameter must have kept its shape or be its transpose."""
        if self.parameter(w) is not None:
            return View(param, tuple(w.shape), tuple(w.stride()), int(w.storage_offset()))
        p = self.parameters[param]
        if w.shape == p.shape:
            return View(param, tuple(p.shape), tuple(p.stride()), 0)
        if p.dim() == 2 and w.shape == p.t().shape:
            return View(param, tuple(p.t().shape), tuple(p.t().stride()), 0)
        return None

    # -- modules

    def enter(self, name: str, args: tuple[Any, ...]) -> None:
        self.stack.append(name)
        self.ran.add(name)
        tensor = next((a for a in args[:1] if isinstance(a, Tensor)), None)
        if tensor is not None:
            self.inputs[name] = (self.value(tensor), tensor.dim(), len(self.ops))

    def leave(self, name: str, out: Any) -> None:
        self.stack.pop()
        tensor = next((a for a in flat(out) if isinstance(a, Tensor)), None)
        if tensor is not None:
            self.outputs[name] = (self.value(tensor), tensor.dim(), len(self.ops))


def stand_ins(module: nn.Module, device: str) -> dict[str, Tensor]:
    """Parameters and buffers of the module's shapes that hold nothing.

    On the CPU they are pages the operating system has not filled yet: they read as zeros and take no memory.
    """

    def empty(t: Tensor) -> Tensor:
        if device == "meta":
            return torch.empty_like(t, device="meta", memory_format=torch.contiguous_format)
        dtype = t.dtype if t.dtype in (torch.int64, torch.int32, torch.bool, torch.uint8) else torch.float32
        kind = {torch.int64: np.int64, torch.int32: np.int32, torch.bool: np.bool_, torch.uint8: np.uint8}
        return torch.from_numpy(np.zeros(tuple(t.shape), kind.get(dtype, np.float32)))

    tensors = {n: empty(p.detach()) for n, p in module.named_parameters()}
    for n, b in module.named_buffers():
        tensors[n] = (
            b.detach().float()
            if device == "cpu" and b.device.type == "cpu" and b.is_floating_point()
            else (b if device == "cpu" and b.device.type == "cpu" else empty(b))
        )
    return tensors


@contextmanager
def _experts_apart(module: nn.Module) -> Iterator[None]:
    """Keep fused experts on an implementation that does not copy their weights token by token."""
    configs: dict[int, Any] = {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}
    chosen = {k: getattr(c, "_experts_implementation", None) for k, c in configs.items()}
    changed = {k: v for k, v in chosen.items() if v not in (None, "eager", "grouped_mm")}
    try:
        for k in changed:
            configs[k]._experts_implementation = "grouped_mm"
        yield
    finally:
        for k, v in changed.items():
            configs[k]._experts_implementation = v


def trace(module: nn.Module, inputs: dict[str, Any] | tuple[Any, ...], device: str, adapters: set[str]) -> Trace:
    """Run the module's forward on stand-ins and return what was seen; the module is left as it was."""
    tensors = stand_ins(module, device)
    seen = Trace(tensors, adapters, device)
    handles = []
    learning = [child for child in module.modules() if child.training]
    for child in learning:
        child.training = False  # dropout and batch statistics would stand between a neuron and who reads it
    for name, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(lambda _, a, name=name: seen.enter(name, a)))
        handles.append(child.register_forward_hook(lambda _, a, o, name=name: seen.leave(name, o)))
    positional = inputs if isinstance(inputs, tuple) else ()
    named = inputs if isinstance(inputs, dict) else {}
    for t in (*positional, *named.values()):
        if isinstance(t, Tensor):
            seen.mark(t, Value(foreign=True))
    try:
        with torch.no_grad(), _experts_apart(module), seen:
            torch.func.functional_call(module, tensors, positional, named)
    finally:
        for handle in handles:
            handle.remove()
        for child in learning:
            child.training = True
    return seen
