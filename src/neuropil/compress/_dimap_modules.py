"""Which weights of a model are ranked together: its functional modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from neuropil.compress.masks import owners
from neuropil.compress.sparse import prunable
from neuropil.errors import ModelError

Modules = str | Mapping[str, str] | Callable[[str], str | None]
GRANULARITIES = ("kind", "stage", "block", "layer")
AUX = "aux"


class ModulesError(ModelError, ValueError):
    """Weights that belong to no functional module, or a module without weights."""


# The names that transformers, timm, torchvision and torch give to the layers of a block, after the block's own.
_ATTENTION = r"(?:[^.]*att(?:n|ention)[^.]*\.)(?:(?:self|attention)\.)?"
_QKV = (
    r"qkv(?:_proj)?|query|key|value|query_key_value|[qkv]_proj(?:_weight)?|in_proj_weight|in_proj_(?:qkv|q|kv)|"
    r"c_attn|Wqkv|[qkv]|[qkv]_lin|[qkv](?:_a|_b)_proj|kv_a_proj_with_mqa"
)
_PROJ = r"(?:output\.)?(?:proj|o_proj|out_proj|c_proj|dense|out_lin|o|out)"
_MLP = (
    r"(?:mlp|ffn|feed_forward|DenseReluDense|block_sparse_moe)\..+|(?:intermediate|output)\.dense|fc[12]|linear[12]|"
    r"lin[12]|w[123]"
)
_TRANSFORMER = tuple(
    (kind, re.compile(rf"(?:(?P<block>.*?)\.)?(?:{pattern})", re.IGNORECASE))
    for kind, pattern in (("qkv", _ATTENTION + f"(?:{_QKV})"), ("proj", _ATTENTION + _PROJ), ("mlp", _MLP))
)
_RESNET = re.compile(r"(?:.*\.)?(?P<block>(?P<stage>layer\d+|stages\.\d+)(?:\.layers)?\.\d+)\..+")
_POSITION_BIAS = re.compile(r"position_bias|cpb_mlp|rel_pos", re.IGNORECASE)

Place = tuple[str, str, str]  # kind, stage, block


def in_transformer(path: str) -> Place:
    """Kind, stage and block of a layer of a transformer, windowed or not, by its name.

    >>> in_transformer("swin.encoder.layers.1.blocks.0.attention.q_proj")
    ('qkv', 'swin.encoder.layers.1.blocks', 'swin.encoder.layers.1.blocks.0')
    >>> in_transformer("features.1.0.mlp.3"), in_transformer("head")
    (('mlp', 'features.1', 'features.1.0'), ('aux', '', ''))
    """
    for kind, pattern in _TRANSFORMER:
        if found := pattern.fullmatch(path):
            block = found["block"] or ""
            return kind, block.rpartition(".")[0], block
    return AUX, "", ""


def in_resnet(path: str) -> Place:
    """As `in_transformer`, where each stage of a residual network is a kind of its own.

    >>> in_resnet("layer2.0.conv1"), in_resnet("resnet.encoder.stages.1.layers.0.shortcut.convolution")
    (('layer2', 'layer2', 'layer2.0'), ('stages.1', 'stages.1', 'stages.1.layers.0'))
    """
    found = _RESNET.fullmatch(path)
    return (found["stage"], found["stage"], found["block"]) if found else (AUX, "", "")


PRESETS: dict[str, Callable[[str], Place]] = {"transformer": in_transformer, "resnet": in_resnet}


def find_weights(model: nn.Module, skip: Sequence[str]) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """The weights to prune, by parameter name in the model's order, and why each other module with a matrix is left.

    They are those of `prunable` and the fused projections of `nn.MultiheadAttention`. A weight that several modules
    share is there once. Layers that make relative position biases are left. Raises ModulesError for weights that are
    not numbers and for masks of `torch.nn.utils.prune`.
    """
    layers, left = prunable(model, skip)
    for name in list(layers):
        if _POSITION_BIAS.search(name):
            del layers[name]
            left[name] = "it makes a relative position bias, which is not pruned"
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module) and isinstance(module, nn.MultiheadAttention):
            left[name] = "its weight is parametrized; bake that in first (torch.nn.utils.parametrize)"
        if any(isinstance(hook, torch_prune.BasePruningMethod) for hook in module._forward_pre_hooks.values()):
            raise ModulesError(f"{name} is pruned by torch.nn.utils.prune; bake that in first (prune.remove)")
        for short in _matrices(module, name in layers):
            full = f"{name}.{short}" if name else short
            weight = module._parameters.get(short)
            if weight is None or id(weight) in seen:
                continue
            if short != "weight" and any(fnmatchcase(name, pattern) for pattern in skip):
                left[name] = "skipped as asked"
                continue
            if not bool(torch.isfinite(weight).all()):
                raise ModulesError(f"{full} holds NaN or infinity; mend the model before it is pruned")
            seen.add(id(weight))
            found[full] = weight
    for name, module in model.named_modules():
        others = [n for n, p in module._parameters.items() if p is not None and p.dim() > 1 and id(p) not in seen]
        if others and not isinstance(module, parametrize.ParametrizationList):  # tables, tokens, experts in one tensor
            left.setdefault(name, f"{', '.join(others)}: no linear map's or convolution's weight")
    return found, left


def _matrices(module: nn.Module, is_layer: bool) -> tuple[str, ...]:
    if isinstance(module, nn.MultiheadAttention):
        return ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return ("weight",) if is_layer else ()


def names_of(model: nn.Module, parameters: Sequence[str]) -> tuple[str, ...]:
    """The modules, by name, that hold these parameters."""
    return tuple(dict.fromkeys(name for full in parameters for name, _, _ in owners(model, full)))


def pools(names: Sequence[str], modules: Modules, granularity: str) -> dict[str, list[str]]:
    """Functional module -> the parameters in it, of these parameter names; see `dimap_scores`.

    Raises ModulesError for weights in no module and patterns that match nothing, ValueError for unknown settings.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r}: expected one of {', '.join(map(repr, GRANULARITIES))}")
    if granularity == "layer":
        return {name: [name] for name in names}
    homes: Mapping[str, str | None]
    if isinstance(modules, str):
        preset = _preset(names, modules)
        homes = {name: _home(preset(name.removesuffix(".weight")), granularity) for name in names}
    elif granularity != "kind":
        raise ValueError(f"granularity={granularity!r} goes with a preset; your own modules say themselves what is one")
    elif isinstance(modules, Mapping):
        homes = _mapped(names, modules)
    else:
        homes = {name: modules(name) for name in names}
    unmapped = [name for name, home in homes.items() if home is None]
    if unmapped:
        raise ModulesError(
            f"in no module: {', '.join(unmapped)}; map them too (a last pattern '.*' takes the rest), or skip them"
        )
    found: dict[str, list[str]] = {}
    for name, home in homes.items():
        found.setdefault(str(home), []).append(name)
    return found


def _preset(names: Sequence[str], modules: str) -> Callable[[str], Place]:
    if modules in PRESETS:
        return PRESETS[modules]
    if modules != "auto":
        raise ValueError(f"modules={modules!r}: expected 'auto', {', '.join(map(repr, PRESETS))}, or your own mapping")
    paths = [name.removesuffix(".weight") for name in names]
    if any(in_transformer(path)[0] in ("qkv", "proj") for path in paths):
        return in_transformer
    if any(in_resnet(path)[0] != AUX for path in paths):
        return in_resnet
    few = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    raise ModulesError(
        f"the functional modules of this model are not known (those of transformers and ResNets are); say which of "
        f"its {len(names)} weights ({few}) belong together: modules={{pattern: module}}, or granularity='layer' for "
        "each on its own; magnitude pruning needs no modules"
    )


def _home(place: Place, granularity: str) -> str:
    kind, stage, block = place
    where = {"kind": "", "stage": stage, "block": block}[granularity]
    return kind if where in ("", kind) else f"{where} {kind}"


def _mapped(names: Sequence[str], patterns: Mapping[str, str]) -> dict[str, str | None]:
    """By the first pattern that is found in each name; its groups may be used in the module's name."""
    homes: dict[str, str | None] = dict.fromkeys(names)
    for pattern, home in patterns.items():
        matched = {name: found for name in names if (found := re.search(pattern, name))}
        if not matched:
            raise ModulesError(f"no weight matches {pattern!r} of module {home!r}; there are {', '.join(names)}")
        for name, found in matched.items():
            homes[name] = found.expand(home) if homes[name] is None else homes[name]
    return homes


def energy_shares(weights: Sequence[Tensor]) -> list[Tensor]:
    """Of each weight: its square over the sum of squares of all these weights that are at least as large.

    In double precision on the CPU. Of equal weights the earlier one counts as the larger.
    """
    sizes = torch.cat([w.detach().flatten().cpu().double().abs() for w in weights])
    largest = sizes.max()
    if largest > 0:
        sizes = sizes / largest  # so that squares do not vanish
    order = sizes.argsort(descending=True, stable=True)
    energy = sizes[order].square()
    shares = torch.empty_like(sizes)
    shares[order] = (energy / energy.cumsum(0)).nan_to_num(0.0)  # 0 / 0 where all weights are zero
    return [s.reshape(w.shape) for s, w in zip(shares.split([w.numel() for w in weights]), weights, strict=True)]
