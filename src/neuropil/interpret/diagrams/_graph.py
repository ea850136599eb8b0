"""From an exported program to a diagram: its operations, named axes, and a block for each call of a module."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from neuropil.interpret.diagrams._export import Exported
from neuropil.interpret.diagrams.axes import Array, Axis, DiagramError, array
from neuropil.interpret.diagrams.construct import of
from neuropil.interpret.diagrams.core import Builder, Diagram, Op, Wire
from neuropil.interpret.diagrams.dims import Dims, relate

NICE = {"scaled_dot_product_attention": "attention", "_safe_softmax": "softmax", "_unsafe_view": "view",
        "_to_copy": "to", "native_layer_norm": "layer_norm", "conv2d": "conv2d", "_softmax": "softmax"}  # fmt: skip
NOTHING = {"to", "alias", "contiguous", "clone", "detach", "dropout", "expand", "lift_fresh_copy", "view", "reshape",
           "slice", "feature_dropout", "flatten", "permute", "type_as", "expand_as", "view_as"}  # fmt: skip
NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}
INPUT_NAMES = {1: "", 2: "batch", 3: "batch seq", 4: "batch c h w", 5: "batch c t h w"}
Stack = tuple[tuple[str, str], ...]  # the modules that a call stands in: dotted name and class


@dataclass
class Value:
    """One tensor of the run."""

    shape: tuple[int, ...]
    floating: bool
    dims: list[int]
    weight: str = ""
    trained: bool = False


@dataclass
class Record:
    """One operation of the run."""

    stack: Stack
    kind: str
    name: str
    options: tuple[tuple[str, Any], ...]
    ins: list[int]
    outs: list[int]
    target: Any = None
    args: tuple[Any, ...] = ()


@dataclass
class Reader:
    """Reads a graph into values and records."""

    export: Exported
    dims: Dims = field(default_factory=Dims)
    values: list[Value] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    def value(self, x: Tensor, weight: str = "") -> int:
        shape = tuple(int(n) for n in x.shape)
        trained = weight in self.export.trained
        self.values.append(Value(shape, x.is_floating_point(), self.dims.new(shape), weight, trained))
        return len(self.values) - 1

    def graph(self, graph: Any, env: dict[Node, Any], owner: Any, stack: Stack = ()) -> list[Any]:
        """Runs through a graph whose placeholders are in `env`; gives what it returns."""
        for node in graph.nodes:
            if node.op == "get_attr":
                env[node] = self._attribute(owner, node.target)
            elif node.op == "call_function":
                here = _stack(node) or stack
                env[node] = self._call(node, env, here)
            elif node.op == "output":
                return list(node.args[0]) if isinstance(node.args[0], list | tuple) else [node.args[0]]
        return []

    def _attribute(self, owner: Any, target: str) -> Any:
        found = owner
        for part in target.split("."):
            found = getattr(found, part)
        return found if isinstance(found, GraphModule) else self.value(found, target)

    def _call(self, node: Node, env: dict[Node, Any], stack: Stack) -> Any:
        args = pytree.tree_map(lambda x: env.get(x, x) if isinstance(x, Node) else x, (node.args, node.kwargs))
        flat = pytree.tree_leaves(args)
        if node.target is operator.getitem:
            return args[0][0][args[0][1]]
        inner = next((x for x in flat if isinstance(x, GraphModule)), None)
        if inner is not None:
            return self._inline(inner, args[0], stack)
        outs = [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]
        if not outs:
            return None
        return self._operation(node, args, outs, stack)

    def _inline(self, inner: GraphModule, args: tuple[Any, ...], stack: Stack) -> list[Any]:
        """A piece of the program in a graph of its own (where gradients are off, say) is read as if it stood here."""
        place = next(i for i, x in enumerate(args) if x is inner)
        given = list(args[place + 1 :])
        inside: dict[Node, Any] = {}
        holes = [n for n in inner.graph.nodes if n.op == "placeholder"]
        inside |= dict(zip(holes, given, strict=True))
        return [inside.get(x, x) for x in self.graph(inner.graph, inside, inner, stack)]

    def _operation(self, node: Node, args: Any, outs: list[Tensor], stack: Stack) -> Any:
        target: Any = node.target
        packet = target._schema.name.split("::")[1]
        name = packet.removesuffix("_") if not packet.endswith("__") else packet.strip("_")
        name = NICE.get(name, name)
        ins: list[int] = []
        nodes = pytree.tree_map(lambda x: _Ref(x) if isinstance(x, Node) else x, (node.args, node.kwargs))
        frozen, values = _frozen(nodes, args, ins), [self.values[i] for i in ins]
        number = _number(node.args)
        if len(outs) == 1 and ins and values[0].shape == tuple(outs[0].shape) and _dtype_kept(node, outs[0]):
            if name in NOTHING and not _moves(name, node.args):
                return ins[0]
            if number is not None and number == NEUTRAL.get(name):
                return ins[0]
        made = [self.value(x) for x in outs]
        if packet == "opaque":
            path = args[0][1]
            options: tuple[tuple[str, Any], ...] = (("role", stack[-1][1] if stack else ""),)
            self.records.append(Record(stack[:-1], "opaque", f"/{path}", options, ins, made))
        else:
            options = (("target", str(target)), ("args", frozen[0]), ("kwargs", frozen[1]))
            options += () if number is None else (("number", number),)
            self.records.append(Record(stack, "aten", name, options, ins, made, target, args[0]))
            given = [self.values[i].dims for i in ins]
            for one in made:
                relate(self.dims, name, target, given, self.values[one].dims, args[0])
        return made if isinstance(node.meta["val"], list | tuple) else made[0]


@dataclass(frozen=True)
class _Ref:
    node: Node


def _dtype_kept(node: Node, out: Tensor) -> bool:
    first = node.args[0]
    value = first.meta.get("val") if isinstance(first, Node) else None
    return isinstance(value, Tensor) and value.dtype == out.dtype


def _moves(name: str, args: Sequence[Any]) -> bool:
    """Whether a permutation of axes is one; other views that keep the shape change nothing."""
    return name == "permute" and list(args[1]) != sorted(args[1])


def _number(args: Sequence[Any]) -> float | int | None:
    """The number that a binary operation has as its second argument."""
    if len(args) == 2 and isinstance(args[1], int | float) and not isinstance(args[1], bool):
        return args[1]
    return None


def _frozen(nodes: Any, args: Any, ins: list[int]) -> tuple[Any, Any]:
    """The arguments of a call as nested tuples that can be hashed and written; `ins` collects its tensors."""

    def freeze(ref: Any, value: Any) -> Any:
        if isinstance(ref, _Ref):
            ins.append(value)
            return ("wire", len(ins) - 1)
        if isinstance(ref, list | tuple):
            return ("list", *(freeze(r, v) for r, v in zip(ref, value, strict=True)))
        if isinstance(ref, torch.dtype | torch.layout | torch.memory_format):
            return ("torch", str(ref).removeprefix("torch."))
        return ("device", str(ref)) if isinstance(ref, torch.device) else ref

    pairs = tuple((key, freeze(nodes[1][key], args[1][key])) for key in nodes[1])
    positional = ("list", *(freeze(r, v) for r, v in zip(nodes[0], args[0], strict=True)))
    return positional, ("pairs", *pairs)


def _stack(node: Node) -> Stack:
    """The modules around a call, the outermost first."""
    found = node.meta.get("nn_module_stack") or {}
    return tuple((path, str(kind).rsplit(".", 1)[-1].rstrip("'>")) for path, kind in found.values())


def emit(export: Exported, names: Sequence[str | Sequence[str]] | None) -> Diagram:
    """The diagram of an exported program."""
    if export.program is None:
        return _one_box(export, names)
    reader = Reader(export)
    program = _functional(export.program)
    env: dict[Node, Any] = {}
    inputs: list[int] = []
    holes = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(holes, program.graph_signature.input_specs, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            env[node] = value
        elif spec.kind.name == "USER_INPUT":
            env[node] = reader.value(value)
            inputs.append(env[node])
        else:
            env[node] = reader.value(value, spec.target)
    _name_inputs(reader, inputs, names)
    returned = reader.graph(program.graph, env, program.graph_module)
    wanted = [
        env[node]
        for node, spec in zip(returned, program.graph_signature.output_specs, strict=True)
        if spec.kind.name == "USER_OUTPUT" and isinstance(node, Node)
    ]
    outputs = [x for x in pytree.tree_leaves(wanted) if isinstance(x, int)]
    return _Emitter(reader, outputs).whole(inputs)


def _functional(program: Any) -> Any:
    """The program without operations that write into their inputs."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and node.target is not torch.ops.neuropil.opaque.default:
            return program.run_decompositions({})
    return program


def _name_inputs(reader: Reader, inputs: Sequence[int], names: Sequence[str | Sequence[str]] | None) -> None:
    if names is not None and len(names) != len(inputs):
        raise DiagramError(f"names for {len(names)} tensors; the example has {len(inputs)}")
    known: dict[str, int] = {}
    for number, value in enumerate(inputs):
        shape, dims = reader.values[value].shape, reader.values[value].dims
        if names is None:
            text = (
                "batch seq"
                if len(shape) == 2 and not reader.values[value].floating
                else INPUT_NAMES.get(len(shape), "")
            )
            words: Sequence[str] = text.split()
        else:
            given = names[number]
            words = given.split() if isinstance(given, str) else given
        if len(words) > len(shape):
            raise DiagramError(f"names {' '.join(words)!r} for a tensor of {len(shape)} dimensions")
        for word, one in zip(words, dims, strict=False):
            array(word)  # refuses what is no name
            if word in known and reader.dims.size[known[word]] == reader.dims.size[one]:
                reader.dims.join(known[word], one)
            elif word not in known:
                known[word] = one
                reader.dims.name[reader.dims.root(one)] = word
            elif names is not None:
                sizes = reader.dims.size[known[word]], reader.dims.size[one]
                raise DiagramError(f"axis {word!r} has size {sizes[0]} in one tensor and {sizes[1]} in another")


def _one_box(export: Exported, names: Any) -> Diagram:
    """A model of which nothing can be seen but what goes in and out."""
    reader = Reader(export)
    inputs = [reader.value(x) for x in export.inputs]
    _name_inputs(reader, inputs, names)
    with torch.no_grad():
        found = export.calls[""](*export.inputs)
    outs = [reader.value(x) for x in (found if isinstance(found, tuple) else (found,))]
    emitter = _Emitter(reader, outs)
    dom = tuple(emitter.array(i) for i in inputs)
    return of(Op("opaque", dom, tuple(emitter.array(i) for i in outs), (), (("name", "/"), ("role", "opaque"))))


class _Emitter:
    """Puts the records into nested blocks."""

    def __init__(self, reader: Reader, outputs: Sequence[int]) -> None:
        self.reader, self.outputs = reader, list(outputs)
        self.last: dict[int, int] = {}
        for number, record in enumerate(reader.records):
            for i in record.ins:
                self.last[i] = number
        self.last |= dict.fromkeys(outputs, len(reader.records))

    def array(self, value: int) -> Array:
        found = self.reader.values[value]
        names = self.reader.dims.names(found.dims)
        axes = tuple(Axis(n, s) for n, s in zip(names, found.shape, strict=True))
        return Array(axes, "float" if found.floating else "int")

    def whole(self, inputs: Sequence[int]) -> Diagram:
        return self._body(0, len(self.reader.records), 1, "", list(inputs), self.outputs)

    def _body(
        self, low: int, high: int, depth: int, path: str, inputs: Sequence[int], outputs: Sequence[int]
    ) -> Diagram:
        builder = Builder([self.array(i) for i in inputs])
        wires: dict[int, Wire] = dict(zip(inputs, builder.inputs, strict=True))
        number = low
        while number < high:
            record = self.reader.records[number]
            if len(record.stack) > depth:
                end = number
                while (
                    end < high and self.reader.records[end].stack[depth : depth + 1] == record.stack[depth : depth + 1]
                ):
                    end += 1
                op, ins, outs = self._block(number, end, depth, path)
            elif (end := self._indices(number, high, depth)) > number + 2:
                op, ins, outs = self._group(number, end)
            else:
                end, (op, ins, outs) = number + 1, self._plain(record)
            made = builder.add(op, [self._wire(builder, wires, i, path) for i in ins])
            wires |= dict(zip(outs, made, strict=True))
            number = end
        return builder.finish([self._wire(builder, wires, i, path) for i in outputs])

    def _wire(self, builder: Builder, wires: dict[int, Wire], value: int, path: str) -> Wire:
        if value not in wires:
            found = self.reader.values[value]
            inside = path and found.weight.startswith(f"{path}.") and "@" not in path
            name = found.weight[len(path) + 1 :] if inside else f"/{found.weight}"
            options = (("name", name), ("init", "fan"), ("trainable", found.trained))
            wires[value] = builder.add(Op("weight", (), (self.array(value),), (), options), [])[0]
        return wires[value]

    def _indices(self, low: int, high: int, depth: int) -> int:
        """Where a run of operations on indices and masks ends, which begins here if at all."""
        end = low
        while end < high and len((record := self.reader.records[end]).stack) <= depth:
            if any(self.reader.values[i].floating for i in record.outs) or self._reads_weights(record):
                break
            end += 1
        return end

    def _reads_weights(self, record: Record) -> bool:
        return any(self.reader.values[i].weight for i in record.ins)

    def _group(self, low: int, high: int) -> tuple[Op, list[int], list[int]]:
        """Such a run as one box, which no module of the model is."""
        ins, outs = self._ends(low, high)
        body = Builder([self.array(i) for i in ins])
        wires = dict(zip(ins, body.inputs, strict=True))
        for record in self.reader.records[low:high]:
            op, read, made = self._plain(record)
            wires |= dict(zip(made, body.add(op, [wires[i] for i in read]), strict=True))
        inside = body.finish([wires[i] for i in outs])
        options = (("name", "indices"), ("role", "positions, masks"), ("group", True))
        return Op("block", inside.dom, inside.cod, (), options, inside), ins, outs

    def _ends(self, low: int, high: int) -> tuple[list[int], list[int]]:
        """What a run of operations reads from before, weights aside, and what is read after it."""
        records = self.reader.records[low:high]
        made = dict.fromkeys(i for r in records for i in r.outs)
        read = dict.fromkeys(i for r in records for i in r.ins)
        ins = [i for i in read if i not in made and not self.reader.values[i].weight]
        return ins, [i for i in made if self.last.get(i, -1) >= high]

    def _block(self, low: int, high: int, depth: int, path: str) -> tuple[Op, list[int], list[int]]:
        here, role = self.reader.records[low].stack[depth]
        ins, outs = self._ends(low, high)
        body = self._body(low, high, depth + 1, here, ins, outs)
        name = here[len(path) + 1 :] if path and here.startswith(f"{path}.") else here if not path else f"/{here}"
        options = (("name", name), ("role", role))
        return Op("block", body.dom, body.cod, (), options, body), ins, outs

    def _plain(self, record: Record) -> tuple[Op, list[int], list[int]]:
        dom = tuple(self.array(i) for i in record.ins)
        cod = tuple(self.array(i) for i in record.outs)
        over = _over(record, dom, cod) if record.kind == "aten" else ()
        return Op(record.kind, dom, cod, over, (("name", record.name), *record.options)), record.ins, record.outs


def _over(record: Record, dom: Sequence[Array], cod: Sequence[Array]) -> tuple[str, ...]:
    """The axes that an operation of PyTorch is broadcast over."""
    name, out = record.name, cod[0].names
    if name in ("linear",):
        found = out[:-1]
    elif name in ("matmul", "bmm", "attention"):
        found = out[:-2]
    elif name.startswith("conv") or "pool" in name:
        found = out[:1]
    elif name in ("softmax", "log_softmax", "cumsum"):
        place = next((a for a in record.args[1:] if isinstance(a, int)), -1)
        found = tuple(n for i, n in enumerate(out) if i != place % max(1, len(out)))
    elif name in ("layer_norm", "rms_norm") and len(record.args) > 1:
        found = out[: len(out) - len(record.args[1])]
    elif name == "embedding":
        found = dom[1].names
    elif name == "batch_norm":  # a scale and a shift for each channel
        found = out[:1] + out[2:]
    elif torch.Tag.pointwise in getattr(record.target, "tags", ()):
        found = out
    elif name in ("mean", "sum", "amax", "amin"):
        found = tuple(n for n in out if n in dom[0].names)
    else:
        return ()
    everywhere = {n for a in dom for n in a.names}
    return tuple(sorted(n for n in found if n in everywhere and not re.search(r"_\d+$", n)))
