"""Which layer feeds which: chains of layers that can be folded together or scaled against one another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from neuropil.compress.quantize.tiles import QuantizationError
from neuropil.packed import is_packed

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
RELUS = (nn.ReLU, torch.relu, torch.relu_, F.relu, "relu", "relu_")
# f(s x) = s f(x) for positive s, channel by channel
_SCALING = (
    *(nn.LeakyReLU, nn.PReLU, F.leaky_relu, F.prelu),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, F.dropout),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, F.adaptive_avg_pool2d),
    *(nn.Flatten, torch.flatten, "flatten", "contiguous"),
)
_SCALING_NAMES = {getattr(f, "__name__", f) for f in _SCALING if not isinstance(f, type)}


@dataclass(frozen=True)
class Pair:
    """Two layers, the second of which alone reads what the first answers; `relu` where a ReLU lies between."""

    first: str
    second: str
    relu: bool


def traced(model: nn.Module) -> fx.Graph:
    """The graph of a model's layers. Raises QuantizationError where torch.fx cannot follow the model."""
    try:
        return fx.Tracer().trace(model)
    except Exception as error:
        raise QuantizationError(
            f"torch.fx cannot follow {type(model).__name__} ({error}); name the pairs of layers yourself, as "
            '[("conv1", "bn1"), ...]'
        ) from error


def pairs(model: nn.Module, given: Sequence[tuple[str, str]] | None = None) -> list[Pair]:
    """Pairs of linear layers with nothing but scalable operations between; those `given` are taken on trust.

    A pair is given where the first's answer is read by the second alone, both run once, and what lies between keeps
    f(s x) = s f(x) for s > 0 in each channel: ReLU, pooling, dropout, flattening.
    """
    layer = (nn.Linear, *CONVS)
    if given is not None:
        return [Pair(a, b, True) for a, b in given if _both(model, a, b, layer, layer)]
    found = []
    graph = traced(model)
    for node in graph.nodes:
        if not _is_module(model, node, layer) or not _once(graph, node):
            continue
        at, relu = node, False
        while len(at.users) == 1:
            at = next(iter(at.users))
            if _is_module(model, at, layer):
                if _once(graph, at) and _fits(model, str(node.target), str(at.target)):
                    found.append(Pair(str(node.target), str(at.target), relu))
                break
            if _is(model, at, RELUS):
                relu = True
            elif not _is(model, at, _SCALING):
                break
    return found


def normalised(model: nn.Module, given: Sequence[tuple[str, str]] | None = None) -> list[tuple[str, str]]:
    """Pairs of a layer and the batch norm that alone reads it."""
    layer = (nn.Linear, *CONVS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    if given is not None:
        return [(a, b) for a, b in given if _both(model, a, b, layer, NORMS)]
    graph = traced(model)
    return [
        (str(node.args[0].target), str(node.target))
        for node in graph.nodes
        if _is_module(model, node, NORMS)
        and _once(graph, node)
        and isinstance(node.args[0], fx.Node)
        and _is_module(model, node.args[0], layer)
        and len(node.args[0].users) == 1
        and _once(graph, node.args[0])
    ]


def activation_of(model: nn.Module, graph: fx.Graph, name: str) -> bool:
    """Whether a ReLU alone reads what a layer answers."""
    node = next((n for n in graph.nodes if n.op == "call_module" and n.target == name), None)
    return node is not None and len(node.users) == 1 and _is(model, next(iter(node.users)), RELUS)


def _both(model: nn.Module, a: str, b: str, first: tuple[type, ...], second: tuple[type, ...]) -> bool:
    for name, kinds in ((a, first), (b, second)):
        module = dict(model.named_modules()).get(name)
        if not isinstance(module, kinds):
            raise QuantizationError(
                f"{name} is {'no module' if module is None else type(module).__name__}: expected one of "
                f"{', '.join(kind.__name__ for kind in kinds)}"
            )
    return True


def _is_module(model: nn.Module, node: fx.Node, kinds: tuple[type, ...]) -> bool:
    if node.op != "call_module":
        return False
    module = model.get_submodule(str(node.target))
    return isinstance(module, kinds) and not is_packed(module)


def _once(graph: fx.Graph, node: fx.Node) -> bool:
    return sum(n.op == "call_module" and n.target == node.target for n in graph.nodes) == 1


def _is(model: nn.Module, node: fx.Node, kinds: Sequence[object]) -> bool:
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), tuple(k for k in kinds if isinstance(k, type)))
    if node.op == "call_function":
        names = {getattr(k, "__name__", None) for k in kinds if not isinstance(k, type | str)}
        return node.target in kinds or getattr(node.target, "__name__", "?") in names
    return node.op == "call_method" and node.target in kinds


def _fits(model: nn.Module, first: str, second: str) -> bool:
    """Whether the second's inputs are the first's outputs, each once or (flattened images) a few times in a row."""
    a, b = outputs(model.get_submodule(first)), inputs(model.get_submodule(second))
    return b % a == 0


def outputs(module: nn.Module) -> int:
    """How many outputs (channels) a layer has."""
    return int(getattr(module, "out_features", None) or module.out_channels)  # type: ignore[arg-type]


def inputs(module: nn.Module) -> int:
    """How many inputs (channels) a layer has."""
    return int(getattr(module, "in_features", None) or module.in_channels)  # type: ignore[arg-type]


def by_input(module: nn.Module) -> Tensor:
    """A layer's weight as `[inputs, rest]`: what each input is multiplied by. A copy where groups are."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    groups = getattr(module, "groups", 1)
    cut = weight.detach().reshape(groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))
    return cut.transpose(1, 2).reshape(groups * weight.shape[1], -1)


@torch.no_grad()
def scale_inputs(module: nn.Module, factor: Tensor) -> None:
    """Multiply what each input is multiplied by, in place."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    groups = getattr(module, "groups", 1)
    cut = weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
    cut.mul_(factor.reshape(groups, 1, weight.shape[1], 1))


@torch.no_grad()
def scale_outputs(module: nn.Module, factor: Tensor) -> None:
    """Multiply each output, bias and all, in place."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    weight.mul_(factor.reshape(-1, *[1] * (weight.ndim - 1)))
    if isinstance(bias, Tensor):
        bias.mul_(factor)


def read_by_relu(model: nn.Module, names: Iterable[str]) -> set[str]:
    """The layers whose answer a ReLU alone reads, as far as torch.fx can tell: they are judged after it."""
    try:
        graph = traced(model)
    except QuantizationError:
        return set()
    return {name for name in names if activation_of(model, graph, name)}
