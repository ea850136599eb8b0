r"""Fine-tune any model by small blocks that its own frozen weights multiply: the adapter Bone, and its kin.

A frozen weight $W$ (`out x in`) is cut into tiles of $r \times r$. A trainable block $B$, zero at first, changes
each tile by an affine map of the tile itself ("Weight Guide"),
$$W'_{ab} = W_{ab} + W_{ab} B_a + B_a, \qquad W'_{ab} + I = (W_{ab} + I)(I + B_a),$$
so the update is of full rank with `out * r` numbers, guided by the frozen weight from the first step:
$\partial L/\partial B_a = \sum_b (W_{ab} + I)^T G_{ab}$ at $B = 0$, with $G = \partial L / \partial W'$. No
singular value decomposition, no scaling factor, nothing random.

>>> import torch
>>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
>>> x = torch.randn(5, 8); before = model(x)
>>> print(add_bone(model, r=4))                      # in place; everything but the blocks is frozen
changed 2 modules
>>> torch.equal(model(x), before)
True
>>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
>>> model(x).square().mean().backward(); optimizer.step()
>>> tuned = model(x); merge_bone(model)              # the same answers at the speed of the bare model
>>> torch.allclose(model(x), tuned, atol=1e-6)
True
>>> remove_bone(model)                               # plain Linears again, the change baked in
Sequential(... (0): Linear(in_features=8, out_features=16, bias=True) ...)

| variant | dW of tile (a, b) | trainable | called by others |
|---|---|---|---|
| "col" (default) | $W_{ab} B_a + B_a$ | out r | Bone in the paper, Bat in peft (`init_weights="bat"`) |
| "row" | $W_{ab} B_b + B_b$ | in r | Bone in RWKV-PEFT |
| "free" | $W_{ab} B + B$ | r² | |
| "ab" | $W_{ab} A_a + B_a$ | 2 out r | an ablation |
| "miss" | $D^T$, D [r, out], the same for every b | out r | MiSS; *Bone* in peft and in the paper's later versions |
| "mini" | as "miss", D [r, mini_r] repeated along the outputs too | r mini_r | MiSS mini |

*The naming trap.* peft's default `BoneConfig()` and `MissConfig()` are "miss", not the method of the abstract, which
is "col". `neuropil.learn.bone_files` reads and writes peft's files for "col", "miss" and "mini".

*Cost.* "col" and "ab" form W' at every call, which costs `out * in * r` multiplications beside the layer's own and
keeps `out * in` numbers for the backward pass (`recompute=True` forms them again instead). The other variants never
form W': "row" and "free" are $u_b = B_b x_b$, $y = W(x + u) + \sum_b u_b$ (the sum on every block-row), so they also
take layers whose weight is packed (4 or 8 bits). A layer whose weight is a tensor subclass with `.dequantize()` is
dequantised for "col" and for merging.

*Merging* writes W' into the layer; unmerging computes $(W'_{ab} - B_a)(I + B_a)^{-1}$, which is exact up to rounding
times the condition of $I + B_a$, and is refused where that would lose half of the digits. `merge_bone(keep=True)` keeps
the frozen weights and gives them back to the bit; a weight that is shared with another layer (a tied head) is always
kept, and the other layer does not see the merging.

Source: Jiale Kang (later with Qingyu Yin), "Bone: Block-Affine Adaptation of Large Language Models", 2024,
arXiv:2409.15371. The paper's text could not be read for this module: the equations are those of its published code
and of peft. Not given there and chosen here: blocks are float32 on half-precision weights; the output head of a
language model is left out unless `where` asks for it; one adapter is active at a time, and adapters are composed by
merging one after the other. Left out: the "hadamard" variant (W * B + B), of which no source could be found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from neuropil.changes import Changes
from neuropil.learn._bone_block import VARIANTS, BoneBlock, check_sizes
from neuropil.learn._bone_linear import BoneLinear, dense_weight

__all__ = [
    "VARIANTS",
    "BoneBlock",
    "BoneLinear",
    "add_bone",
    "disable_bone",
    "merge_bone",
    "remove_bone",
    "unmerge_bone",
    "use_bone",
]

Where = Callable[[str, nn.Module], bool]

# Layers with a weight matrix or filter: each is either adapted or named among those left as they were.
_LAYERS = (
    nn.Linear,
    Conv1D,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.modules.conv._ConvNd,
)


def add_bone(
    model: nn.Module,
    r: int = 64,
    *,
    variant: str = "col",
    mini_r: int | None = None,
    dropout: float = 0.0,
    where: Where | None = None,
    name: str = "default",
    recompute: bool = False,
) -> Changes:
    """Give the linear layers of `model` Bone adapters, in place, and freeze everything but their blocks.

    r          side of a block; must divide inputs and outputs of every layer, except for "miss" and "mini"
    variant    "col" (the paper's), "row", "free", "ab", "miss" or "mini": see the module's table
    mini_r     for "mini" alone: the number of outputs after which the block repeats; must divide the outputs
    dropout    of the adapter's input, for "miss" and "mini" alone
    where      which layers: `where(name, module)`; by default every `Linear` and `Conv1D` except a language model's
               output head (`model.get_output_embeddings()`)
    name       of the adapter. A model may have several, one of which acts: the newest, or that of `use_bone`. One
               adapter may be given to different layers in several calls, each with its own r
    recompute  for "col" and "ab": form W' again in the backward pass instead of keeping it

    The answers of the model are as before until the blocks are trained. `Changes.model` is the model itself (or, if
    `model` is one linear layer, the layer around it); `Changes.left` names every other layer that has weights.

    Raises ValueError where r does not fit a layer (naming it, and the r's that would), where a layer has an adapter of
    that name, or where no layer is chosen; TypeError where only layers of other kinds are, or where "col" or "ab" meet
    a layer whose weight cannot be read. The model is then as it was.
    """
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter name {name!r}; expected a word without dots, and none that nn.ModuleDict reserves")
    hosts, left = _choose(model, where)
    if not hosts:
        chosen = [layer for layer, why in left.items() if why != _NOT_CHOSEN]
        error = TypeError if chosen else ValueError
        raise error(f"no linear layer to adapt; left: {dict(left) or 'the model has no layers'}")
    _check(hosts, r, variant, mini_r, dropout, name)
    model.requires_grad_(False)
    for host in {id(h): h for h in hosts.values()}.values():
        weight = cast(Any, host.base).weight
        dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        sizes = host.out_features, host.in_features
        block = BoneBlock(*sizes, r, variant, mini_r, dropout, weight.device, dtype)
        host.blocks[name] = block.train(model.training)
        host.recompute = recompute
    for layer, host in hosts.items():
        if layer and model.get_submodule(layer) is not host:
            model.set_submodule(layer, host)
    adapted = hosts.get("", model)
    use_bone(adapted, name)
    return Changes(adapted, changed=tuple(hosts), left=left)


def use_bone(model: nn.Module, name: str | None) -> None:
    """Let the adapter of this name act, and be the only trainable one; None: let none act.

    Raises ValueError where no layer has an adapter of that name.
    """
    hosts = _hosts(model)
    known = sorted({n for host in hosts for n in host.blocks})
    if name is not None and name not in known:
        raise ValueError(f"no adapter {name!r}; there are {', '.join(known)}")
    for host in hosts:
        host.use(name if name is not None and name in host.blocks else None)


@contextmanager
def disable_bone(model: nn.Module) -> Iterator[None]:
    """Inside the block the model answers as the base does. Raises ValueError while an adapter is merged."""
    hosts = _hosts(model)
    if any(host.merges for host in hosts):
        raise ValueError("an adapter is merged into the weights; unmerge_bone(model) first")
    before = [host.active for host in hosts]
    for host in hosts:
        host.active = None
    try:
        yield
    finally:
        for host, name in zip(hosts, before, strict=True):
            host.active = name


def merge_bone(model: nn.Module, keep: bool = False) -> None:
    """Write the active adapter into the weights, in place: same answers, at the speed of the bare model.

    `keep=True` keeps the frozen weights (one copy of them in memory): `unmerge_bone` gives them back to the bit.
    Weights that are quantised or shared with another layer are always kept; a quantised one becomes a dense one.
    A further adapter can be added or used on top, and merged after it. To save the adapter, use
    `neuropil.learn.bone_files`; a `state_dict()` does not say that its weights hold an adapter.

    Raises ValueError where there is nothing to merge or a merged weight would not be finite, TypeError where a layer's
    weight cannot be written; the model is then as it was.
    """
    hosts = [host for host in _hosts(model) if host.block is not None]
    if not hosts:
        raise ValueError("no adapter to merge: none is active and unmerged")
    names = {id(module): name for name, module in model.named_modules()}
    for host in hosts:  # all are tried before one is changed
        if not bool(torch.isfinite(host.weight).all()):
            raise ValueError(f"the merged weight of {names[id(host)]!r} is not finite; was the training diverging?")
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    turn = 1 + max((merge.turn for host in _hosts(model) for merge in host.merges), default=0)
    for host in hosts:
        host.merge(turn, keep or owners[id(cast(Any, host.base).weight)] > 1)


def unmerge_bone(model: nn.Module) -> None:
    """Take the adapter merged last out of the weights, in place, and let it act beside them again, and no other.

    Raises ValueError where none is merged, or where $I + B$ of some layer is so near to singular that the weights
    would come back with less than half of their digits (and were not kept); the model is then as it was.
    """
    hosts = [host for host in _hosts(model) if host.merges]
    if not hosts:
        raise ValueError("no adapter to unmerge: none is merged")
    last = max(host.merges[-1].turn for host in hosts)
    hosts = [host for host in hosts if host.merges[-1].turn == last]
    names = {id(module): name for name, module in model.named_modules()}
    for host in hosts:
        merge = host.merges[-1]
        condition = cast(BoneBlock, host.blocks[merge.name]).condition()
        worst = torch.finfo(cast(Any, host.base).weight.dtype).eps ** -0.5
        if merge.kept is None and not condition < worst:
            raise ValueError(
                f"{names[id(host)]!r} cannot be unmerged: a block I + B has condition number {condition:.3g}, expected "
                f"below {worst:.3g}; load the base weights again, and merge with keep=True another time"
            )
    name = hosts[0].merges[-1].name
    for host in hosts:
        host.unmerge()
    use_bone(model, name)


def remove_bone(model: nn.Module) -> nn.Module:
    """Put the plain linear layers back, in place: with what was merged, without what was not. They stay frozen.

    Returns the model (the layer itself where the model was one linear layer). Raises ValueError where there are none.
    """
    _hosts(model)
    if isinstance(model, BoneLinear):
        return model.base
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, BoneLinear):
            model.set_submodule(name, module.base)
    return model


_NOT_CHOSEN = "not chosen by where"


def _choose(model: nn.Module, where: Where | None) -> tuple[dict[str, BoneLinear], dict[str, str]]:
    """Name -> the layer to adapt (new or there already), and name -> why another layer is left."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    hosts: dict[str, BoneLinear] = {}
    left: dict[str, str] = {}
    made: dict[int, BoneLinear] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(inside) or not isinstance(module, (*_LAYERS, BoneLinear)):
            continue
        if isinstance(module, BoneLinear):
            inside += (f"{name}." if name else "",)
        base = module.base if isinstance(module, BoneLinear) else module
        if where is not None and not where(name, base):
            left[name] = _NOT_CHOSEN
        elif isinstance(base, nn.MultiheadAttention):
            left[name] = "its packed input projection is no linear layer"
        elif not isinstance(base, nn.Linear | Conv1D):
            left[name] = f"{type(base).__name__} is no linear layer"
        elif where is None and module is head:
            left[name] = "the output head; ask for it by where"
        elif isinstance(module, BoneLinear):
            hosts[name] = module
        else:
            hosts[name] = made.setdefault(id(module), BoneLinear(base))
    return hosts, left


def _check(hosts: dict[str, BoneLinear], r: int, variant: str, mini_r: int | None, dropout: float, name: str) -> None:
    """Refuse what does not fit before anything is changed."""
    wrong: list[str] = []
    for layer, host in hosts.items():
        try:
            check_sizes(host.out_features, host.in_features, r, variant, mini_r, dropout)
        except ValueError as error:
            wrong.append(f"{layer or 'the layer'}: {error}")
        if name in host.blocks:
            wrong.append(f"{layer} already has an adapter {name!r}; give this one another name")
        if variant in ("col", "ab"):
            dense_weight(host.base)
    if wrong:
        more = f" (and {len(wrong) - 3} layers more)" if len(wrong) > 3 else ""
        raise ValueError("; ".join(wrong[:3]) + more)


def _hosts(model: nn.Module) -> list[BoneLinear]:
    found = [module for module in model.modules() if isinstance(module, BoneLinear)]
    if not found:
        raise ValueError("the model has no Bone adapter; add_bone(model) first")
    return found
