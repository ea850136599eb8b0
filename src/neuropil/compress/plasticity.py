r"""How well can a network, as it stands now, recover from pruning? Prune a copy, train it on, and compare.

Of a network at any point of its training, `pruning_plasticity` removes a fraction of the remaining weights at once,
trains on for as long as you say and reports the metric before, right after pruning, and after recovery. The
*pruning plasticity* is

$$\Delta = \mathrm{metric}(\text{pruned, trained on}) - \mathrm{metric}(\text{before pruning}),$$

and `regrow` shows what neuroregeneration adds to it. Model and optimizer are copied; yours stay as they are.

>>> import torch
>>> from torch import nn
>>> _ = torch.manual_seed(0)
>>> x = torch.randn(256, 8); y = (x[:, 0] * x[:, 1] > 0).long()
>>> model = nn.Sequential(nn.Linear(8, 50), nn.ReLU(), nn.Linear(50, 2))
>>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
>>> def train(model, optimizer):
...     for _ in range(100):
...         optimizer.zero_grad()
...         nn.functional.cross_entropy(model(x), y).backward()
...         optimizer.step()
>>> def accuracy(model):
...     return float((model(x).argmax(1) == y).float().mean())
>>> train(model, optimizer)
>>> found = pruning_plasticity(model, optimizer, train, accuracy, fraction=0.8)
>>> found.pruned < found.after, found.density
(True, 0.2)

What the paper leaves to its code: how long to train on is up to `train` (the paper: 30 epochs, by memory). The
metric before pruning is that of the same network, not of a twin trained on without pruning; `fraction=0` gives that
twin. Structured pruning removes whole filters (rows of a Linear) of smallest Euclidean norm, the same fraction in each
tensor; the authors' code names it without showing it, so the norm is a choice made here. Two ways of regrowth:

* ``"pruned"``, the code's: in each tensor as many connections come back as were removed, so the density is as before.
* ``"exchange"``, one step of GraNet: the density stays that of pruning alone, and in each tensor the `rate` smallest
  of the remaining weights are exchanged. With it, pruned networks with and without regeneration are equally large.

Both grow where the gradient of `loss` at the unpruned network is largest among the absent connections, which start
at zero.

Source: Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021,
arXiv:2106.10404; see `neuropil.compress.granet`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from neuropil.compress._granet_masks import NEVER, kept_count, largest, prune, regenerate
from neuropil.compress._granet_slots import KINDS, MASK, Filter, Slot, find_slots, state_of
from neuropil.errors import ModelError

Masks = list[Bool[Tensor, "*_"]]


@dataclass(frozen=True)
class Plasticity:
    """The metric at three moments, the density of the prunable weights after pruning, and the recovered network."""

    before: float
    pruned: float
    after: float
    density: float
    model: nn.Module = field(repr=False, compare=False)

    @property
    def plasticity(self) -> float:
        """What training on has made of the pruned network, against the network before pruning."""
        return self.after - self.before


def pruning_plasticity(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Callable[[nn.Module, torch.optim.Optimizer], Any],
    evaluate: Callable[[nn.Module], float],
    fraction: float,
    *,
    criterion: str = "global",
    regrow: str = "none",
    loss: Callable[[nn.Module], Tensor] | None = None,
    rate: float = 0.5,
    where: Filter | None = None,
    kinds: tuple[type[nn.Module], ...] = KINDS,
) -> Plasticity:
    """Prune `fraction` of the remaining weights of a copy of `model`, train it on, and say how it fared.

    train: `train(model, optimizer)` trains on, in place; masked weights are put back to zero after each
        `optimizer.step()`. Seed in it what should not differ between calls.
    evaluate: the metric, larger is better.
    criterion: "global" (magnitudes of all tensors together), "uniform" (in each tensor), "structured" (whole filters).
    regrow: "none", "pruned" or "exchange" (see the module); the latter two need `loss(model) -> scalar` of a minibatch.
    where, kinds: which modules are pruned, as in `GraNet`.

    Of a network that is sparse already, only what is there is pruned: its GraNet masks say what that is, else its
    nonzero weights. Raises ValueError for settings out of range, `ModelError` for weights that cannot be pruned.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction}; expected the share of weights to prune, 0 <= fraction < 1")
    if criterion not in ("global", "uniform", "structured"):
        raise ValueError(f"criterion={criterion!r}; expected 'global', 'uniform' or 'structured'")
    if regrow not in ("none", "pruned", "exchange"):
        raise ValueError(f"regrow={regrow!r}; expected 'none', 'pruned' or 'exchange'")
    if (regrow != "none") != (loss is not None):
        raise ValueError(f"regrow={regrow!r} with loss={loss!r}; regrowth, and it alone, needs `loss(model) -> scalar`")
    model, optimizer = copy.deepcopy((model, optimizer))  # together, so that the copy steps the copy
    slots = find_slots(model, optimizer, where or (lambda name, module: True), kinds, masked=True)
    transposed = [slot.name for slot in slots if getattr(slot.module, "transposed", False)]
    if criterion == "structured" and transposed:
        raise ModelError(f"the filters of {', '.join(transposed)} are no rows (transposed); exclude them by `where`")
    before = evaluate(model)
    live = [getattr(slot.module, MASK, slot.weight.detach() != 0).clone() for slot in slots]
    gradients = _gradients(model, slots, loss) if loss else []
    masks = _pruned([slot.weight for slot in slots], live, fraction, criterion)
    fresh: Masks = [torch.zeros_like(mask) for mask in masks]
    if regrow == "pruned":
        fresh = [_grown(m, g, int(a.sum() - m.sum())) for m, g, a in zip(masks, gradients, live, strict=True)]
        masks = [mask | new for mask, new in zip(masks, fresh, strict=True)]
    elif regrow == "exchange":
        for i, slot in enumerate(slots):
            kept, fresh[i] = regenerate(slot.weight, masks[i], gradients[i], rate)
            masks[i] = kept | fresh[i]
    _apply(slots, optimizer, [mask & ~new for mask, new in zip(masks, fresh, strict=True)])
    for slot, mask in zip(slots, masks, strict=True):
        if hasattr(slot.module, MASK):
            slot.mask.copy_(mask)
    pruned = evaluate(model)
    handle = optimizer.register_step_post_hook(lambda *_: _apply(slots, optimizer, masks))
    train(model, optimizer)
    handle.remove()
    density = sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
    return Plasticity(before, pruned, evaluate(model), density, model)


def _pruned(weights: Sequence[Shaped[Tensor, "*_"]], live: Masks, fraction: float, criterion: str) -> Masks:
    """What is left of `live`."""
    if criterion == "structured":
        return [_without_filters(w, m, fraction) for w, m in zip(weights, live, strict=True)]
    if criterion == "uniform":
        return [_pruned([w], [m], fraction, "global")[0] for w, m in zip(weights, live, strict=True)]
    return prune(weights, live, kept_count(1 - fraction, sum(int(m.sum()) for m in live)))


def _without_filters(weight: Shaped[Tensor, " *shape"], live: Bool[Tensor, " *shape"], fraction: float) -> Tensor:
    there = live.flatten(1).any(1)
    norms = (weight.detach() * live).flatten(1).norm(dim=1).masked_fill(~there, NEVER)
    kept = largest(norms, kept_count(1 - fraction, int(there.sum())))
    return live & kept.reshape(-1, *[1] * (weight.ndim - 1))


def _grown(mask: Bool[Tensor, "*_"], score: Shaped[Tensor, "*_"], count: int) -> Tensor:
    return largest(score.abs().masked_fill(mask, NEVER), count)


def _gradients(model: nn.Module, slots: Sequence[Slot], loss: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    """Of the loss, taken on a copy: a forward pass may move running statistics, and draw random numbers."""
    twin = copy.deepcopy(model)
    with torch.random.fork_rng():
        value = loss(twin)
    gradients = torch.autograd.grad(value, [twin.get_parameter(slot.name) for slot in slots], allow_unused=True)
    missing = [slot.name for slot, gradient in zip(slots, gradients, strict=True) if gradient is None]
    if missing:
        raise ModelError(f"the loss does not reach {', '.join(missing)}; exclude them by `where`")
    return list(gradients)


@torch.no_grad()
def _apply(slots: Sequence[Slot], optimizer: torch.optim.Optimizer, masks: Masks) -> None:
    for slot, mask in zip(slots, masks, strict=True):
        for tensor in (slot.weight, *state_of(optimizer, slot.weight)):
            tensor.mul_(mask)
