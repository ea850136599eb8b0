r"""Add to any pruner: spend a small part of what it prunes on weights whose removal wakes silent ReLU neurons.

>>> import torch
>>> from torch import nn
>>> _ = torch.manual_seed(0)
>>> x, y = torch.randn(64, 8), torch.randint(3, (64,))
>>> model = nn.Sequential(nn.Linear(8, 50), nn.ReLU(), nn.Linear(50, 3))
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
>>> pruning = ActivateWhilePruning(model, optimizer, every=20, cycles=3, rate=0.5, ap_rate=0.05)
>>> for _ in range(80):
...     optimizer.zero_grad()
...     nn.functional.cross_entropy(model(x), y).backward()
...     optimizer.step()
...     pruning.step()
>>> pruning.history  # (by the base method, by activation) of each cycle
[(248, 27), (124, 13), (63, 6)]
>>> pruning.remove()  # the zeros stay, the masks go

Pruning goes in cycles of `every` optimizer steps. At the end of each, of the $R$ weights that are left

1. the base method removes $\lfloor pR \rfloor - \lfloor qR \rfloor$ (by default the smallest of all layers together),
2. *selective activation* removes $\lfloor qR \rfloor$ of the remaining **negative** weights, those that moved least
   since the cycle began, $|w - w_{start}|$: a negative weight on non-negative inputs holds its neuron below zero, and
   one that hardly moved belongs to a neuron that was seldom awake to learn,
3. weights go back to their first values, under the new masks, and are trained again.

$p$ is `rate`, $q$ is `ap_rate`. The first cycle trains the dense network; after `cycles` prunings the last training
follows. In one bias-free layer with non-negative inputs step 2 never lowers a pre-activation. How many neurons are
silent is measured by `neuropil.compress.dead_neuron_rate`.

The base method is "magnitude", "lamp", a scoring function (`base=lambda model: dimap_scores(model)`), an unstructured
method of `torch.nn.utils.prune` (`base=prune.L1Unstructured`), or a `GraNet` schedule that prunes in its own time.

Chosen where the paper, of which abstract and code could be read, leaves something open:

* `version="lite"` does steps 1 and 2 at once; "pro" trains for a whole cycle between them, at twice the cost.
* The authors' code removes as many as its percentile says, one more than asked and more where there are ties; here
  counts are exact, and of equal movement the first weight goes. It masks all tensors called "weight", those of batch
  norms too; here linear maps and convolutions.
* Where fewer negative weights are left than are to go, the base method removes the difference, with a warning.
* `batchnorm_sign`: behind a batch norm with a negative gain a positive weight holds the neuron down. The
  paper's rule does not see that; this option does.
* The optimizer's memory is cleared when weights are rewound. The learning rate is the affair of your scheduler: let it
  start over every `every` steps (`CosineAnnealingWarmRestarts(optimizer, every)`).
* With a `GraNet`, activation acts just before each of its pruning updates and takes the share $q/p$ of what that
  update is to prune; GraNet's density is as without it, and its regrowth may take weights back.

Source: Liu, Ghosh, Tan and Motani, "AP: Selective Activation for De-sparsifying Pruned Neural Networks", TMLR 2023,
arXiv:2212.06145.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from neuropil.compress._activating_base import (
    Base,
    base_masks,
    count_of,
    following_norms,
    sign_of,
    without_still_negatives,
)
from neuropil.compress._granet_masks import kept_count
from neuropil.compress._granet_slots import (
    KINDS,
    MASK,
    Filter,
    check_same,
    find_slots,
    hand_over,
    take_off,
    zero_masked,
)
from neuropil.compress.granet import GraNet
from neuropil.errors import ModelError, NoNeurons
from neuropil.neurons import find_sites

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class ActivateWhilePruning:
    """Pruning in cycles with selective activation, stepped like a learning-rate scheduler after `optimizer.step()`.

    Changes `model` in place: masked weights are zero after every step, and each module that owns one has its mask as
    the boolean buffer `weight_mask` until `remove` (the model's `state_dict` holds it).

    Parameters
    ----------
    every: optimizer steps in a cycle. Not with a `GraNet`, which has its own.
    cycles: how often to prune (the authors' code: 25).
    base: the method that selective activation is added to, see the module.
    rate: p, the share of the remaining weights that a cycle removes, in (0, 1).
    ap_rate: q, the share that activation removes of it, in [0, p]. 0 is the base method alone.
    rewind: what weights, biases and buffers go back to when a cycle begins: "init", where they were when the schedule
        was made; a number, where they were after so many steps (fewer than `every`); "random", new first values
        from each module's own `reset_parameters` and `seed`; None, nothing.
    version: "lite" or "pro", see the module.
    batchnorm_sign: multiply weights by the sign of the gain of the batch norm right after their layer.
    where, kinds: which modules are masked, as for `GraNet`.
    cycle_end: called with the trained, masked model each time before it is pruned, to test or save it.

    Raises ValueError for settings out of range or at odds; `ModelError` for weights that cannot be masked. Warns
    where the model shows no ReLU, without which no neuron can be woken.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        every: int | None = None,
        cycles: int = 25,
        base: Base | GraNet = "magnitude",
        rate: float = 0.2,
        ap_rate: float = 0.02,
        rewind: str | int | None = "init",
        version: str = "lite",
        batchnorm_sign: bool = False,
        where: Filter | None = None,
        kinds: tuple[type[nn.Module], ...] = KINDS,
        cycle_end: Callable[[nn.Module], Any] | None = None,
        seed: int = 0,
    ) -> None:
        _check(every, cycles, base, rate, ap_rate, rewind, version)
        self.model, self.optimizer, self.base = model, optimizer, base
        self.every, self.cycles, self.rate, self.ap_rate = every, cycles, rate, ap_rate
        self.rewind, self.version, self.cycle_end, self.seed = rewind, version, cycle_end, seed
        self.t = 0  # optimizer steps done
        self.history: list[tuple[int, int]] = []  # weights removed by the base method and by activation
        self._owed = 0  # what activation is still to remove in this cycle ("pro")
        if isinstance(base, GraNet):
            self._slots = base._slots
        else:
            self._slots = find_slots(model, optimizer, where or (lambda name, module: True), kinds)
            for slot in self._slots:
                slot.module.register_buffer(MASK, torch.ones_like(slot.weight, dtype=torch.bool))
        self._norms = following_norms(model, self._slots) if batchnorm_sign else [None] * len(self._slots)
        self._starts = self._weights()
        self._origin = self._everything() if rewind == "init" or rewind == 0 else {}
        if not _rectified(model):
            warnings.warn(
                f"{type(model).__name__} shows no ReLU: a neuron whose output is never exactly zero cannot be woken",
                stacklevel=2,
            )

    # --- the schedule ----------------------------------------------------------------------------

    def step(self) -> None:
        """Count one optimizer step: zero what is masked and, at the end of a cycle, prune and rewind."""
        self.t += 1
        if isinstance(self.base, GraNet):
            self._step_with(self.base)
            return
        assert self.every is not None
        self._apply()
        if self.t == self.rewind:
            self._origin = self._everything()
        turn, rest = divmod(self.t, self.every)
        if rest or turn > self.cycles * (2 if self.version == "pro" else 1):
            return
        if self.cycle_end is not None:
            self.cycle_end(self.model)
        if self.version == "lite" or turn % 2:
            self._prune()
        if self.version == "lite" or turn % 2 == 0:
            self._activate()
        self._restart()

    def _prune(self) -> None:
        """The base method's part, and how much it leaves to activation."""
        live = sum(self.counts.values())
        total, share = count_of(self.rate, live), count_of(self.ap_rate, live)
        self._base(total - share)
        self.history.append((total - share, 0))
        self._owed = share

    def _base(self, count: int) -> None:
        if count:
            assert not isinstance(self.base, GraNet)
            self._set(base_masks(self.base, self.model, self._slots, count))
            self._apply()

    def _activate(self) -> None:
        removed = self._wake(self._owed)
        by_base = self.history[-1][0]
        if removed < self._owed:
            short = self._owed - removed
            warnings.warn(
                f"{removed} negative weights were left where activation was to remove {self._owed}; the base method "
                f"removes the other {short}",
                stacklevel=4,
            )
            self._base(short)
            by_base += short
        self.history[-1] = (by_base, removed)
        self._owed = 0

    def _wake(self, count: int) -> int:
        """Remove so many of the negative weights that moved least; how many that were."""
        if not count:
            return 0
        signs = [
            sign_of(norm, slot.weight, isinstance(slot.module, TRANSPOSED))
            for norm, slot in zip(self._norms, self._slots, strict=True)
        ]
        weights, masks = [slot.weight for slot in self._slots], [slot.mask for slot in self._slots]
        kept, removed = without_still_negatives(weights, self._starts, masks, count, signs)
        self._set(kept)
        self._apply()
        return removed

    def _step_with(self, base: GraNet) -> None:
        """Before a pruning update of GraNet take a share of it."""
        after = base.t + 1
        due = base.start <= after <= base.stop and (after % base.every == 0 or after == base.stop)
        if not due:
            base.step()
            return
        live = sum(self.counts.values())
        budget = max(0, live - kept_count(base.density_at(after), sum(slot.weight.numel() for slot in self._slots)))
        removed = self._wake(count_of(self.ap_rate / self.rate, budget))
        self.history.append((budget - removed, removed))
        base.step()
        self._starts = self._weights()

    @torch.no_grad()
    def _restart(self) -> None:
        """Begin a cycle: back to the first values, or to new ones."""
        if self.rewind == "random":
            self._reset()
        elif self.rewind is not None:
            state = self.model.state_dict()
            for name, value in self._origin.items():
                state[name].copy_(value)
        if self.rewind is not None:
            self.optimizer.state.clear()
        self._apply()
        self._starts = self._weights()

    def _reset(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000_003 * self.seed + self.t)
            for name, module in self.model.named_modules():
                own = list(module.parameters(recurse=False))
                if own and not callable(getattr(module, "reset_parameters", None)):
                    raise ModelError(f"{name} ({type(module).__name__}) has no reset_parameters(); use rewind='init'")
                if own:
                    module.reset_parameters()

    # --- where it stands -------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Bool[Tensor, "*_"]]:
        """The mask of each tensor, True where a weight is."""
        return {slot.name: slot.mask for slot in self._slots}

    @property
    def counts(self) -> dict[str, int]:
        """How many weights of each tensor are there now."""
        return {name: int(mask.sum()) for name, mask in self.masks.items()}

    @property
    def density(self) -> float:
        """The share of the masked weights that is there now."""
        return sum(self.counts.values()) / sum(slot.weight.numel() for slot in self._slots)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands: plain values and tensors."""
        state: dict[str, Any] = {"t": self.t, "owed": self._owed, "history": [list(pair) for pair in self.history]}
        state["starts"] = {slot.name: start.clone() for slot, start in zip(self._slots, self._starts, strict=True)}
        state["origin"] = {name: value.clone() for name, value in self._origin.items()}
        state["masks"] = {name: mask.clone() for name, mask in self.masks.items()}
        if isinstance(self.base, GraNet):
            state["base"] = self.base.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict` of a schedule over the same weights. Raises ValueError for one over others."""
        check_same(self._slots, state["masks"])
        self.t, self._owed = state["t"], state["owed"]
        self.history = [(base, woken) for base, woken in state["history"]]
        self._starts = [state["starts"][slot.name].to(slot.weight) for slot in self._slots]
        self._origin = {name: value.clone() for name, value in state["origin"].items()}
        self._set([state["masks"][slot.name] for slot in self._slots])
        if isinstance(self.base, GraNet):
            self.base.load_state_dict(state["base"])
        self._apply()

    def remove(self) -> None:
        """Take the masks off the model; the zeros stay. The schedule is over."""
        take_off(self._slots)

    def to_torch_prune(self) -> None:
        """Hand the masks over to `torch.nn.utils.prune` (`weight_orig` and `weight_mask`). The schedule is over."""
        hand_over(self._slots)

    # --- inside ------------------------------------------------------------------------------------

    def _weights(self) -> list[Tensor]:
        return [slot.weight.detach().clone() for slot in self._slots]

    def _everything(self) -> dict[str, Tensor]:
        masks = {slot.name.removesuffix("weight") + MASK for slot in self._slots}
        return {n: v.detach().clone() for n, v in self.model.state_dict().items() if n not in masks}

    def _set(self, masks: list[Tensor]) -> None:
        for slot, mask in zip(self._slots, masks, strict=True):
            slot.mask.copy_(mask)

    def _apply(self) -> None:
        zero_masked(self._slots, self.optimizer)


def _rectified(model: nn.Module) -> bool:
    if any(isinstance(module, nn.ReLU | nn.ReLU6) for module in model.modules()):
        return True
    try:
        return any("relu" in (site.activation or "") for site in find_sites(model))
    except NoNeurons:
        return False


def _check(
    every: int | None, cycles: int, base: Any, rate: float, ap_rate: float, rewind: str | int | None, version: str
) -> None:
    if not 0 < rate < 1:
        raise ValueError(f"rate={rate}; expected the share of remaining weights that a cycle removes, in (0, 1)")
    if not 0 <= ap_rate <= rate:
        raise ValueError(f"ap_rate={ap_rate}; expected a part of rate={rate}, from 0 to all of it")
    if version not in ("lite", "pro"):
        raise ValueError(f"version={version!r}; expected 'lite' or 'pro'")
    if isinstance(base, GraNet):
        if every is not None or rewind is not None or version != "lite":
            raise ValueError(
                "a GraNet prunes in its own time and trains once: leave out every and version, rewind=None"
            )
        return
    if every is None or every < 1 or cycles < 1:
        raise ValueError(
            f"every={every}, cycles={cycles}; expected 1 or more optimizer steps a cycle, 1 or more cycles"
        )
    if isinstance(rewind, str) and rewind not in ("init", "random"):
        raise ValueError(f"rewind={rewind!r}; expected 'init', 'random', a number of steps, or None")
    if isinstance(rewind, int) and not 0 <= rewind < every:
        raise ValueError(f"rewind={rewind}; expected a step of the first cycle, 0 to {every - 1}")
    if isinstance(base, str) and base not in ("magnitude", "lamp"):
        raise ValueError(f"base={base!r}; expected 'magnitude', 'lamp', a scoring function or a torch pruning method")
    if isinstance(base, type) and getattr(base, "PRUNING_TYPE", None) != "unstructured":
        raise ValueError(f"base={base.__name__}: activation removes single weights; give an unstructured method")
