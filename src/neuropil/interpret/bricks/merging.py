r"""Merge bricks, or whole models: one set of parameters that does the work of several.

    average     Σ w_i θ_i / Σ w_i
    arithmetic  θ_0 + Σ w_i (θ_i - θ_0)
    TIES        θ_0 + c · (of each change the largest entries are kept; of what is left, the sign of the larger sum is
                elected entry by entry; entries of that sign are averaged)
    concat      of LoRA bricks, B A = Σ w_i B_i A_i exactly, with the ranks added

The functions take dictionaries of tensors (`state_dict`s); `merge_bricks` takes bricks.

Sources: task arithmetic, G. Ilharco et al. 2023, arXiv:2212.04089; TIES, P. Yadav et al. 2023, arXiv:2306.01708, which
keeps 0.2 of the entries; here of each tensor by itself, as the usual libraries do. Weights count in the vote, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from neuropil.errors import ModelError
from neuropil.interpret.bricks.custom import CustomBrick, LoraBrick

State = Mapping[str, Tensor]
METHODS = ("average", "sum", "ties")


def average(states: Sequence[State], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted mean; by default every state counts alike."""
    weights = _checked(states, weights)
    share = [w / sum(weights) for w in weights]
    return {name: _combined([s[name] for s in states], share) for name in states[0]}


def _combined(tensors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    return torch.stack([c * x for c, x in zip(scales, tensors, strict=True)]).sum(0)


def arithmetic(base: State, states: Sequence[State], scales: Sequence[float]) -> dict[str, Tensor]:
    """The base with every state's change added, times its scale (0 for nothing, negative to unlearn)."""
    _checked([base, *states], None)
    _counted(states, scales)
    return {name: start + _combined([s[name] - start for s in states], scales) for name, start in base.items()}


def ties(
    base: State, states: Sequence[State], weights: Sequence[float] | None = None, *, density: float = 0.2,
    scale: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    """The base with the trimmed, elected and averaged change of the states."""
    weights = _checked(states, weights)
    _checked([base, *states], None)
    if not 0 < density <= 1:
        raise ValueError(f"ties(density={density}): expected a share of the entries in (0, 1]")
    merged = {}
    for name, start in base.items():
        changes = [w * trimmed(s[name] - start, density) for w, s in zip(weights, states, strict=True)]
        merged[name] = start + scale * elected(torch.stack(changes))
    return merged


def trimmed(change: Float[Tensor, "*shape"], density: float) -> Float[Tensor, "*shape"]:
    """The share of entries that are largest in size; zero elsewhere."""
    flat = change.flatten()
    kept = flat.abs().topk(max(1, int(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(change)


def elected(changes: Float[Tensor, states * shape]) -> Float[Tensor, "*shape"]:
    """Of each entry, the mean of the values that have the sign of their sum.

    >>> elected(torch.tensor([[3.0, -1.0], [-1.0, 0.0], [1.0, -2.0]]))
    tensor([ 2.0000, -1.5000])
    """
    agree = changes.sign() == changes.sum(0).sign()
    agree &= changes != 0
    return (changes * agree).sum(0) / agree.sum(0).clamp_min(1)


def _counted(states: Sequence[State], weights: Sequence[float]) -> None:
    if len(weights) != len(states):
        raise ValueError(f"{len(weights)} weights for {len(states)} things to merge; give one each")


def _checked(states: Sequence[State], weights: Sequence[float] | None) -> Sequence[float]:
    """The weights, all one by default. Raises ValueError where the states do not fit each other."""
    if not states:
        raise ValueError("nothing to merge: give one or more")
    shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in states]
    if any(each != shapes[0] for each in shapes):
        raise ValueError("what is to be merged must have tensors of the same names and shapes")
    weights = [1.0] * len(states) if weights is None else weights
    _counted(states, weights)
    return weights


def merge_bricks(
    bricks: Sequence[CustomBrick],
    weights: Sequence[float] | None = None,
    *,
    method: str = "average",
    name: str = "",
    density: float = 0.2,
) -> CustomBrick:
    """One brick in place of several of one kind and base: their "average", weighted "sum", or "ties".

    Of LoRA bricks it is the change B A of each module that is averaged or summed, exactly, by joining the ranks; a
    module that one brick lacks gets nothing from it. "ties" gives a change of full rank. Adapters are not linear, so
    only the "average" of their parameters has a meaning. The key is the mean of the keys.

    Raises ValueError for mixed kinds or another method, ModelError for bricks of different base models.
    """
    if not bricks:
        raise ValueError("nothing to merge: give one brick or more")
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    if len({brick.kind for brick in bricks}) > 1:
        raise ValueError(f"bricks of several kinds cannot be merged: {[brick.kind for brick in bricks]}")
    if len({brick.base for brick in bricks}) > 1:
        raise ModelError(f"bricks of different base models cannot be merged: {[brick.base for brick in bricks]}")
    weights = [1.0] * len(bricks) if weights is None else list(weights)
    _counted([{}] * len(bricks), weights)
    if isinstance(bricks[0], LoraBrick):
        tensors = _merged_lora([b for b in bricks if isinstance(b, LoraBrick)], weights, method, density)
    elif method == "average":
        states = [{f"{t}|{p}": x for t, each in b.tensors().items() for p, x in each.items()} for b in bricks]
        tensors = {}
        for path, value in average(states, weights).items():
            tensors.setdefault(path.rpartition("|")[0], {})[path.rpartition("|")[2]] = value
    else:
        raise ValueError(f"adapters are not linear: only their 'average' can be taken, not {method!r}")
    keys = [brick.key for brick in bricks if isinstance(brick.key, Tensor)]
    key = torch.stack(keys).mean(0) if len(keys) == len(bricks) else None
    made = name or "+".join(brick.name for brick in bricks)
    owner = ", ".join(dict.fromkeys(brick.owner for brick in bricks if brick.owner))
    return type(bricks[0])(made, tensors, key=key, owner=owner, base=bricks[0].base)


def _merged_lora(
    bricks: Sequence[LoraBrick], weights: Sequence[float], method: str, density: float
) -> dict[str, dict[str, Tensor]]:
    total = sum(weights) if method == "average" else 1.0
    if total == 0:
        raise ValueError("the weights of an average must not add up to zero")
    tensors = {}
    for target in dict.fromkeys(t for brick in bricks for t in brick.targets):
        owners = [(w / total, brick) for w, brick in zip(weights, bricks, strict=True) if target in brick.targets]
        if method == "ties":
            changes = [{"": w * brick.change(target)} for w, brick in owners]
            zero = {"": torch.zeros_like(changes[0][""])}
            tensors[target] = factored(ties(zero, changes, density=density)[""])
        else:
            up = torch.cat([w * brick.part(target, "up").detach() for w, brick in owners], 1)
            down = torch.cat([brick.part(target, "down").detach() for _, brick in owners], 0)
            tensors[target] = {"down": down, "up": up}
    return tensors


def factored(change: Float[Tensor, "out in"]) -> dict[str, Tensor]:
    """A matrix as B A of its own rank, by its singular values."""
    u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
    rank = max(1, int((s > s[0] * 1e-7).sum()))
    return {"down": v[:rank].to(change).contiguous(), "up": (u[:, :rank] * s[:rank]).to(change).contiguous()}
