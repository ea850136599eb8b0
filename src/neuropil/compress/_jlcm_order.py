r"""Neurons put in another order without changing what a network computes.

With a permutation P of the outputs of one layer and the inputs of the next, $W_2 f(W_1 x + b) = W_2 P^T f(P W_1 x + P
b)$ for every f that treats all neurons alike; batch norms and other parameters between are permuted along.

>>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
>>> [run] = runs(net)
>>> print(run)
0 (4 rows), read by 2
>>> x, before = torch.randn(5, 3), net[0].weight.clone()
>>> y = net(x)
>>> reorder(net, run, torch.tensor([2, 0, 3, 1]))
>>> torch.allclose(net(x), y), torch.equal(net[0].weight, before[[2, 0, 3, 1]])
(True, True)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Integer
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from neuropil.errors import NoNeurons
from neuropil.neurons import Site, find_sites

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# What works on each number alone, by the names of modules and functions in lower case without underscores.
_ALONE = {
    *("relu", "relu6", "leakyrelu", "elu", "celu", "selu", "gelu", "silu", "mish", "tanh", "sigmoid", "hardtanh"),
    *("hardswish", "hardsigmoid", "softplus", "softsign", "logsigmoid", "tanhshrink", "identity", "contiguous"),
    *("dropout", "alphadropout", "dropout1d", "dropout2d", "dropout3d", "featurealphadropout", "clone"),
}
# What works on each feature map alone.
_MAPS = {f"{kind}pool{d}d" for kind in ("max", "avg", "adaptiveavg", "adaptivemax", "lp") for d in (1, 2, 3)}
_VALUES, _OUTPUTS = ("v_proj", "value", "v_lin"), ("o_proj", "out_proj", "out_lin", "dense")


@dataclass(frozen=True)
class Run:
    """Layers whose rows can be put in another order together.

    The rows of `layers` and the vectors in `along` are permuted alike; of `reader`'s inputs each row has `block` in a
    run. With a `head` size, only rows of one head may change places, and each head's inputs are there `repeat` times
    (query heads that share a value head).
    """

    layers: tuple[str, ...]
    reader: str
    rows: int
    along: tuple[str, ...] = ()
    block: int = 1
    head: int = 0
    repeat: int = 1

    def __str__(self) -> str:
        within = f", within heads of {self.head}" if self.head else ""
        return f"{' and '.join(self.layers)} ({self.rows} rows{within}), read by {self.reader}"


def runs(model: nn.Module, partners: Mapping[str, str] | None = None) -> list[Run]:
    """Where rows can be re-ordered: chains of layers and batch norms, the MLPs of transformers, values of attention.

    torch.fx finds chains; where it cannot follow a model, `neuropil.neurons` finds its MLPs. `partners` names further
    pairs, layer -> the linear map or convolution that alone reads its outputs, which are taken on trust.
    """
    found = [_trusted(model, *pair) for pair in (partners or {}).items()]
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # whatever the model's own code raises when its inputs are no tensors
        found += _of_sites(model)
    else:
        found += _of_graph(model, graph)
    found += _of_attention(model)
    taken: set[str] = set()
    kept = []
    for run in found:
        if not taken & set(run.layers) and not any(_several(model, name) for name in (*run.layers, run.reader)):
            taken |= set(run.layers)
            kept.append(run)
    return kept


def _several(model: nn.Module, name: str) -> bool:
    """Whether a layer's weight is used elsewhere too, or is no plain parameter."""
    module = model.get_submodule(name)
    if parametrize.is_parametrized(module) or module._parameters.get("weight") is None:
        return True
    return sum(m._parameters.get("weight") is module.weight for m in _all_modules(model)) > 1


def _all_modules(model: nn.Module) -> Iterator[nn.Module]:
    return (module for _, module in model.named_modules(remove_duplicate=False))


def _trusted(model: nn.Module, first: str, second: str) -> Run:
    a, b = (dict(model.named_modules()).get(name) for name in (first, second))
    if not (_plain(a) and _plain(b)) or _inputs(b) % _outputs(a):
        raise ValueError(
            f"partners {first!r} -> {second!r}: expected the names of two linear maps or convolutions without groups, "
            "of which the second has as many inputs as the first has outputs (or a multiple)"
        )
    return Run((first,), second, _outputs(a), block=_inputs(b) // _outputs(a))


def _plain(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, CONVS) and module.groups == 1)


def _outputs(module: nn.Module | None) -> int:
    return int(module.weight.shape[0])  # type: ignore[union-attr, index]


def _inputs(module: nn.Module | None) -> int:
    return int(module.weight.shape[1])  # type: ignore[union-attr, index]


# ------------------------------------------------------------------------------------------------- chains, by fx


def _of_graph(model: nn.Module, graph: fx.Graph) -> Iterator[Run]:
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    once = {name for name, count in calls.items() if count == 1}
    for node in graph.nodes:
        if node.op == "call_module" and node.target in once and _plain(model.get_submodule(str(node.target))):
            run = _followed(model, node, once)
            if run is not None:
                yield run


def _followed(model: nn.Module, node: fx.Node, once: set[str]) -> Run | None:
    """From a layer through what treats its outputs alike to the layer that alone reads them; None if there is none."""
    name = str(node.target)
    layer = model.get_submodule(name)
    maps, flat = isinstance(layer, CONVS), False
    along: list[str] = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        kind = _kind(model, node)
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is not None and _plain(module):
            block, rest = divmod(_inputs(module), _outputs(layer))
            fits = (
                node.target in once and rest == 0 and (block == 1 or flat) and (flat or maps == (type(module) in CONVS))
            )
            return Run((name,), str(node.target), _outputs(layer), tuple(along), block) if fits else None
        if kind in _ALONE or (kind in _MAPS and maps and not flat):
            continue
        if kind == "flatten" and maps and not flat and _from_channels(module, node):
            flat = True
        elif isinstance(module, NORMS) and node.target in once and module.num_features == _outputs(layer) and not flat:
            along += _vectors(module, str(node.target))
        elif type(module) is nn.LayerNorm and node.target in once and module.normalized_shape == (_outputs(layer),):
            if maps:
                return None
            along += _vectors(module, str(node.target))
        elif isinstance(module, nn.PReLU) and node.target in once and not flat:
            along += _vectors(module, str(node.target)) if module.weight.numel() > 1 else []
        else:
            return None
    return None


def _kind(model: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__.lower()
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.lower().replace("_", "") if node.op in ("call_function", "call_method") else ""


def _from_channels(module: nn.Module | None, node: fx.Node) -> bool:
    """Whether a flattening begins at the channels and goes to the end."""
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    return (node.args[1:], dict(node.kwargs)) in (((1,), {}), ((), {"start_dim": 1}))


def _vectors(module: nn.Module, name: str) -> list[str]:
    """The names of a module's parameters and buffers with one number a channel."""
    held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return [f"{name}.{key}" for key, value in held if value.dim() == 1]


# -------------------------------------------------------------------------------------------- transformers


def _of_sites(model: nn.Module) -> Iterator[Run]:
    """Dense and gated layers of neurons that own whole matrices."""
    try:
        sites = find_sites(model)
    except NoNeurons:
        return
    for site in sites:
        if site.kind in ("dense", "gated") and site.write is not None and _whole(model, site):
            readers = tuple(weight.name.removesuffix(".weight") for weight in site.reads.values())
            yield Run(readers, site.write.name.removesuffix(".weight"), site.width)


def _whole(model: nn.Module, site: Site) -> bool:
    """Whether a site's weights are all those of linear maps, and nothing but its nonlinearity lies between."""
    assert site.write is not None
    for weight, axis, size in [(w, 0, site.width) for w in site.reads.values()] + [(site.write, 1, site.width)]:
        module = dict(model.named_modules()).get(weight.name.removesuffix(".weight"))
        if not isinstance(module, nn.Linear) or weight.axis != axis or module.weight.shape[axis] != size:
            return False
        if (weight.start, weight.step, weight.expert, weight.block) != (0, 1, None, 1):
            return False
    return site.formula is not None and site.formula.complete and _treats_alike(model, site)


def _treats_alike(model: nn.Module, site: Site) -> bool:
    """Whether the nonlinearity of neurons in another order gives its values in that order."""
    assert site.formula is not None
    generator = torch.Generator().manual_seed(0)
    weight = model.get_parameter(next(iter(site.reads.values())).name)
    seen = {role: torch.randn(2, site.width, generator=generator).to(weight) for role in site.reads}
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        straight = site.formula(seen, values.__getitem__)
        turned = site.formula({role: x.flip(1) for role, x in seen.items()}, values.__getitem__)
    return torch.allclose(turned.flip(1), straight, rtol=1e-3, atol=1e-4)


def _of_attention(model: nn.Module) -> Iterator[Run]:
    """Values and output projections of attention layers as transformers names them, head by head."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        value = next((v for v in _VALUES if isinstance(getattr(module, v, None), nn.Linear)), None)
        width = _head(module)
        if value is None or width is None:
            continue
        parent = name.rpartition(".")[0]
        places = [f"{name}.{out}" for out in _OUTPUTS] + [f"{parent}.output.{out}" for out in _OUTPUTS]
        reader = next((p for p in places if isinstance(modules.get(p), nn.Linear)), None)
        if reader is None:
            continue
        values, outputs = modules[f"{name}.{value}"], modules[reader]
        rows, columns = _outputs(values), _inputs(outputs)
        if rows % width == 0 and columns % rows == 0:
            yield Run((f"{name}.{value}",), reader, rows, head=width, repeat=columns // rows)


def _head(module: nn.Module) -> int | None:
    found = next((getattr(module, key) for key in ("head_dim", "attention_head_size") if hasattr(module, key)), None)
    return found if isinstance(found, int) and found > 0 else None


# ------------------------------------------------------------------------------------------------ permuting


@torch.no_grad()
def reorder(model: nn.Module, run: Run, order: Integer[Tensor, " rows"]) -> None:
    """Put rows in another order, in place: new row i is old row `order[i]`. The model computes what it did.

    Raises ValueError where `order` is no permutation of the run's rows, or leaves its heads.
    """
    order = order.long()
    if not torch.equal(order.sort().values, torch.arange(run.rows, device=order.device)):
        raise ValueError(f"expected each of the rows 0 to {run.rows - 1} of {run} once")
    if run.head and not torch.equal(order // run.head, torch.arange(run.rows, device=order.device) // run.head):
        raise ValueError(f"rows may change places within heads of {run.head} only: {run}")
    for name in run.layers:
        module = model.get_submodule(name)
        for value in (module.weight, module.bias):
            if isinstance(value, Tensor):
                value.copy_(value[order.to(value.device)])
    for name in run.along:
        owner, _, leaf = name.rpartition(".")
        vector = getattr(model.get_submodule(owner), leaf)
        vector.copy_(vector[order.to(vector.device)])
    weight = model.get_submodule(run.reader).weight
    assert isinstance(weight, Tensor)
    weight.copy_(weight[:, columns(run, order).to(weight.device)])


def columns(run: Run, order: Integer[Tensor, " rows"]) -> Integer[Tensor, " inputs"]:
    """The order of the reader's inputs that goes with an order of rows."""
    if run.head:
        within = (order % run.head).reshape(-1, 1, run.head).expand(-1, run.repeat, -1).reshape(-1, run.head)
        return (within + torch.arange(len(within), device=order.device)[:, None] * run.head).flatten()
    return (order[:, None] * run.block + torch.arange(run.block, device=order.device)).flatten()
