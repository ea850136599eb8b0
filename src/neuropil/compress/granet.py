r"""Train once and finish with a very sparse network: prune gradually, and let connections grow back at every step.

>>> import torch
>>> from torch import nn
>>> _ = torch.manual_seed(0)
>>> x, y = torch.randn(64, 8), torch.randint(3, (64,))
>>> model = nn.Sequential(nn.Linear(8, 50), nn.ReLU(), nn.Linear(50, 3))
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
>>> granet = GraNet(model, optimizer, density=(0.5, 0.1), steps=(0, 100, 200), every=10)
>>> for _ in range(200):
...     optimizer.zero_grad()
...     nn.functional.cross_entropy(model(x), y).backward()
...     optimizer.step()
...     granet.step()
>>> granet.density, sum(granet.counts.values())
(0.1, 55)
>>> granet.remove()  # the zeros stay, the masks go

Every `every` optimizer steps three things happen, in this order (masks are applied between them):

1. The density falls along a cubic from $d_i$ at step $t_0$ to $d_f$ at $t_f$,
   $d_t = d_f + (d_i - d_f) (1 - \frac{t - t_0}{t_f - t_0})^3$, and of all masked tensors together the
   $\lfloor N d_t \rfloor$ weights of largest magnitude stay.
2. In each tensor the $\lceil p_t\, n_l \rceil$ smallest of its $n_l$ remaining weights are removed.
3. As many connections are grown where $|\partial L / \partial w|$ is largest among those that are absent. The
   gradient is the one that the optimizer step has just used, so this *zero-cost neuroregeneration* needs no pass
   of its own. It goes on after $t_f$; $p_t$ falls along a cosine from `prune_rate` to `min_prune_rate` at the end.

From $d_i = 1$ this is dense-to-sparse training, from $d_i < 1$ sparse-to-sparse, begun at random with densities
by the Erdős-Rényi-kernel rule. The same object gives the baselines: `GraNet.gmp` (step 1 alone), `GraNet.rigl` and
`GraNet.set` (steps 2 and 3 alone), `GraNet.one_shot` and `GraNet.static`. How well a network recovers from
pruning is measured by `neuropil.compress.pruning_plasticity`.

Chosen where the paper or its code leaves something open:

* A connection that is removed and grown again within one update keeps its value and its momentum, as in the authors'
  code (and in RigL's), where the two steps are one exchange of masks; only connections that were absent before the
  update begin at zero. `returning="reset"` lets those begin at zero too.
* The authors' code ends its pruning one update short of $d_f$; here $d_f$ is reached at step $t_f$ exactly, with an
  update there even where $t_f$ is no multiple of `every`. It prunes by a threshold, which miscounts ties; here
  counts are exact. For the same reason the random start draws an exact number of positions, not each
  by its own coin.
* A weight once pruned comes back by growth alone, never by pruning's own choice among zeros.
* Growth by momentum, an option of the code, is left out: the momentum of an absent weight is zero by construction.
* Besides SGD's momentum, every state of the optimizer that has the weight's shape is masked (Adam's moments too).

Source: Liu, Chen, Chen, Atashgahi, Yin, Kou, Shen, Pechenizkiy, Wang and Mocanu, "Sparse Training via Boosting
Pruning Plasticity with Neuroregeneration", NeurIPS 2021, arXiv:2106.10404.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from neuropil.compress._granet_masks import erk, kept_count, prune, random_mask, regenerate, split_count
from neuropil.compress._granet_slots import (
    KINDS,
    MASK,
    Filter,
    Slot,
    check_same,
    find_slots,
    hand_over,
    state_of,
    take_off,
    zero_masked,
)
from neuropil.errors import ModelError

CLASSIFIER_DENSITY, CLASSIFIER_FROM = 0.2, 0.8  # uniform pruning: the classifier's density from this sparsity on


class GraNet:
    """Gradual pruning with zero-cost neuroregeneration, stepped like a learning-rate scheduler.

    Changes `model` in place: its masked weights are zero outside their masks after every step, and each module
    that owns one has its mask as the boolean buffer `weight_mask` until `remove` (so the model's `state_dict` holds
    it). Call `step` after `optimizer.step()` and before the gradients are cleared.

    Parameters
    ----------
    density: of the masked weights at the beginning and at the end, in (0, 1].
    steps: (t0, t_f, T) in optimizer steps: pruning begins, pruning has ended, training ends. The paper has t_f at
        half of the training (CIFAR) or at 30 of 100 epochs (ImageNet), t0 = 0.
    every: optimizer steps between updates (paper: 1000 on CIFAR, 4000 on ImageNet).
    prune_rate, min_prune_rate: p at step 0 and from step T on.
    growth: "gradient", or "random" (then no gradient is needed).
    scope: "global" pools magnitudes over all tensors; "uniform" prunes each tensor to the same density, but
        keeps the classifier at 0.2 once the sparsity is 0.8 and thins the others so much more.
    init: "erk" or "uniform" densities where training begins sparse.
    returning: "keep" or "reset" the value of weights that one update removes and grows again (see the module).
    classifier: name of the module that "uniform" spares; by default the last that is masked.
    where: which modules of these `kinds` are masked, `where(name, module)`; all by default. The parameters with two
        or more dimensions that stay dense are listed in `dense`.
    kinds: module types whose `weight` may be masked; add `nn.Embedding` or transformers' `Conv1D` if wanted.
    seed: of the random start and of random growth; the global generator is not touched.

    Gradients are used as the optimizer saw them: accumulated over micro-batches, and after clipping (which changes
    no order within a tensor). Where a `GradScaler` skipped the optimizer's step, skip this one too. A weight shared by
    several modules is masked once.

    Raises ValueError for settings out of range; `ModelError` for weights that cannot be masked (parametrised, already
    masked, unknown to the optimizer), named.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps: tuple[int, int, int],
        density: tuple[float, float] = (0.5, 0.05),
        every: int = 1000,
        prune_rate: float = 0.5,
        min_prune_rate: float = 0.005,
        growth: str = "gradient",
        scope: str = "global",
        init: str = "erk",
        returning: str = "keep",
        classifier: str | None = None,
        where: Filter | None = None,
        kinds: tuple[type[nn.Module], ...] = KINDS,
        seed: int = 0,
    ) -> None:
        _check_range(density, steps, every, prune_rate, min_prune_rate)
        _check_choice("growth", growth, ("gradient", "random"))
        _check_choice("scope", scope, ("global", "uniform"))
        _check_choice("init", init, ("erk", "uniform"))
        _check_choice("returning", returning, ("keep", "reset"))
        if scope == "uniform" and init == "erk" and density[0] < 1:
            raise ValueError(
                "uniform pruning cannot begin from ERK densities: give init='uniform', or density=(1, ...)"
            )
        self.optimizer, self.initial_density, self.final_density = optimizer, *density
        self.start, self.stop, self.total = steps
        self.every, self.prune_rate, self.min_prune_rate = every, prune_rate, min(min_prune_rate, prune_rate)
        self.growth, self.scope, self.init, self.returning = growth, scope, init, returning
        self.t = 0  # optimizer steps done
        self._generator = torch.Generator().manual_seed(seed)
        self._slots = find_slots(model, optimizer, where or (lambda name, module: True), kinds)
        self._sizes = [slot.weight.numel() for slot in self._slots]
        self._classifier = self._find_classifier(classifier)
        masked = {id(slot.weight) for slot in self._slots}
        self.dense = tuple(n for n, p in model.named_parameters() if p.ndim > 1 and id(p) not in masked)
        if min(self._counts(self.final_density)) < 1:
            raise ValueError(f"a final density of {self.final_density} keeps none of {self._sizes} weights; raise it")
        for slot, mask in zip(self._slots, self._initial_masks(), strict=True):
            slot.module.register_buffer(MASK, mask.to(slot.weight.device))
        self._apply()

    # --- the baselines ---------------------------------------------------------------------------

    @classmethod
    def gmp(cls, model: nn.Module, optimizer: torch.optim.Optimizer, *, density: float, **settings: Any) -> GraNet:
        """Gradual magnitude pruning (Zhu and Gupta 2017): from dense to `density`, nothing grows back."""
        return cls(model, optimizer, density=(1.0, density), **settings | {"prune_rate": 0.0})

    @classmethod
    def rigl(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, *, density: float, steps: int, **settings: Any
    ) -> GraNet:
        """RigL (Evci et al. 2020) at a fixed density, exchanging until the end of `steps` (as in the ITOP study)."""
        return cls(model, optimizer, density=(density, density), steps=(0, steps, steps), **settings)

    @classmethod
    def set(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, *, density: float, steps: int, **settings: Any
    ) -> GraNet:
        """Sparse evolutionary training (Mocanu et al. 2018): as `rigl`, with random growth."""
        return cls.rigl(model, optimizer, density=density, steps=steps, **settings | {"growth": "random"})

    @classmethod
    def static(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, *, density: float, steps: int, **settings: Any
    ) -> GraNet:
        """A random mask of this density that never changes."""
        return cls.rigl(model, optimizer, density=density, steps=steps, **settings | {"prune_rate": 0.0})

    @classmethod
    def one_shot(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, *, density: float, at: int, **settings: Any
    ) -> GraNet:
        """Magnitude pruning from dense to `density` in one go, after optimizer step `at` (1 or later)."""
        settings |= {"steps": (at - 1, at, max(at, 2)), "every": 1}
        return cls.gmp(model, optimizer, density=density, **settings)

    # --- the schedule ----------------------------------------------------------------------------

    def step(self) -> None:
        """Count one optimizer step: zero what is masked and, where an update is due, prune and regenerate."""
        self.t += 1
        self._apply()
        if self.t < self.start or (self.t % self.every and self.t != self.stop):
            return
        if self.t <= self.stop:
            self._prune(self.density_at(self.t))
        rate = self.rate_at(self.t)
        if rate > 0:
            for slot in self._slots:
                self._regenerate(slot, rate)
            self._apply()

    def density_at(self, t: int) -> float:
        """The density that the schedule has for step `t`; the initial one before t0, the final one from t_f on."""
        done = min(max((t - self.start) / (self.stop - self.start), 0.0), 1.0)
        return self.final_density + (self.initial_density - self.final_density) * (1 - done) ** 3

    def rate_at(self, t: int) -> float:
        """The share of each tensor's weights that an update at step `t` exchanges."""
        cosine = math.cos(math.pi * min(t / self.total, 1.0))
        return self.min_prune_rate + (self.prune_rate - self.min_prune_rate) * (1 + cosine) / 2

    @property
    def density(self) -> float:
        """The share of the masked weights that is there now."""
        return sum(self.counts.values()) / sum(self._sizes)

    @property
    def counts(self) -> dict[str, int]:
        """How many weights of each tensor are there now."""
        return {name: int(mask.sum()) for name, mask in self.masks.items()}

    @property
    def masks(self) -> dict[str, Bool[Tensor, "*_"]]:
        """The mask of each tensor, True where a weight is."""
        return {slot.name: slot.mask for slot in self._slots}

    # --- keeping and ending ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands: plain values and tensors."""
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        return {"t": self.t, "generator": self._generator.get_state(), "masks": masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict` of a schedule over the same weights. Raises ValueError for one over others."""
        check_same(self._slots, state["masks"])
        self.t = state["t"]
        self._generator.set_state(state["generator"].cpu())
        for name, mask in self.masks.items():
            mask.copy_(state["masks"][name])
        self._apply()

    def remove(self) -> None:
        """Take the masks off the model; the zeros stay. The schedule is over."""
        take_off(self._slots)

    def to_torch_prune(self) -> None:
        """Hand the masks over to `torch.nn.utils.prune` (`weight_orig` and `weight_mask`). The schedule is over."""
        hand_over(self._slots)

    # --- inside ------------------------------------------------------------------------------------

    def _find_classifier(self, name: str | None) -> int:
        names = [slot.name for slot in self._slots]
        if name is None:
            return len(names) - 1
        if f"{name}.weight" not in names:
            raise ValueError(f"classifier={name!r} is no masked module; those are {', '.join(names)}")
        return names.index(f"{name}.weight")

    def _densities(self, density: float) -> list[float]:
        """Of each tensor under uniform pruning."""
        rest = sum(self._sizes) - self._sizes[self._classifier]
        if 1 - density < CLASSIFIER_FROM - 1e-9 or rest == 0:
            return [density] * len(self._sizes)
        spared = CLASSIFIER_DENSITY * self._sizes[self._classifier]
        others = (density * sum(self._sizes) - spared) / rest
        if others <= 0:
            raise ValueError(
                f"a density of {density} is less than the fifth of {self._slots[self._classifier].name} that uniform "
                "pruning spares; raise it, name another classifier, or use scope='global'"
            )
        return [CLASSIFIER_DENSITY if i == self._classifier else others for i in range(len(self._sizes))]

    def _counts(self, density: float) -> list[int]:
        """Weights kept at this density: one number for all tensors (global), or one each (uniform)."""
        if self.scope == "global":
            return [kept_count(density, sum(self._sizes))]
        return [kept_count(d, size) for d, size in zip(self._densities(density), self._sizes, strict=True)]

    def _initial_masks(self) -> list[Bool[Tensor, "*_"]]:
        shapes = [tuple(slot.weight.shape) for slot in self._slots]
        if self.initial_density == 1:
            return [torch.ones(shape, dtype=torch.bool) for shape in shapes]
        if self.scope == "uniform":
            counts = self._counts(self.initial_density)
        else:
            uniform = [self.initial_density] * len(shapes)
            densities = erk(shapes, self.initial_density) if self.init == "erk" else uniform
            shares = [d * size for d, size in zip(densities, self._sizes, strict=True)]
            counts = split_count(kept_count(self.initial_density, sum(self._sizes)), shares)
        return [random_mask(shape, n, self._generator) for shape, n in zip(shapes, counts, strict=True)]

    def _apply(self) -> None:
        zero_masked(self._slots, self.optimizer)

    @torch.no_grad()
    def _prune(self, density: float) -> None:
        counts, slots = self._counts(density), self._slots
        before = self.counts
        for count, group in zip(counts, [slots] if self.scope == "global" else [[s] for s in slots], strict=True):
            masks = [slot.mask for slot in group]
            for mask, kept in zip(masks, prune([slot.weight for slot in group], masks, count), strict=True):
                mask.copy_(kept)
        emptied = [name for name, left in self.counts.items() if not left and before[name]]
        if emptied:
            warnings.warn(
                f"pruning to a density of {density:.4g} has left no connection in {', '.join(emptied)}; raise the "
                "final density, or exclude them by `where`",
                stacklevel=3,
            )
        self._apply()

    @torch.no_grad()
    def _regenerate(self, slot: Slot, rate: float) -> None:
        kept, grown = regenerate(slot.weight, slot.mask, self._score(slot), rate)
        slot.mask.copy_(kept | grown)
        if self.returning == "reset":
            for tensor in (slot.weight, *state_of(self.optimizer, slot.weight)):
                tensor.mul_(~grown)

    def _score(self, slot: Slot) -> Tensor:
        """By which connections are grown: the larger, the sooner."""
        weight = slot.weight
        if self.growth == "random":
            return torch.rand(weight.shape, generator=self._generator).to(weight.device)
        if weight.grad is None:
            raise ModelError(
                f"{slot.name} has no gradient at step {self.t}, where an update is due: call step() after "
                "optimizer.step() and before zero_grad(), and exclude by `where` what the loss does not reach"
            )
        gradient = weight.grad.to_dense()  # of an embedding it may be sparse
        if not bool(gradient.isfinite().all()):
            raise ModelError(
                f"the gradient of {slot.name} is not finite at step {self.t}: lower the learning rate, or, under "
                "a GradScaler, call step() only where it did not skip the optimizer's step"
            )
        return gradient


def _check_choice(name: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"{name}={given!r}; expected {' or '.join(map(repr, known))}")


def _check_range(
    density: tuple[float, float], steps: tuple[int, int, int], every: int, prune_rate: float, min_prune_rate: float
) -> None:
    first, last = density
    if not 0 < last <= first <= 1:
        raise ValueError(f"density={density}; expected (initial, final) with 0 < final <= initial <= 1 (1 is dense)")
    start, stop, total = steps
    if not 0 <= start < stop <= total:
        raise ValueError(f"steps={steps}; expected (t0, t_f, T) with 0 <= t0 < t_f <= T")
    if every < 1:
        raise ValueError(f"every={every}; expected 1 or more optimizer steps between updates")
    for name, rate in (("prune_rate", prune_rate), ("min_prune_rate", min_prune_rate)):
        if not 0 <= rate <= 1:
            raise ValueError(f"{name}={rate}; expected a share, 0 to 1")
    if total // every < 2:
        warnings.warn(f"{total} steps with an update every {every}: fewer than two updates", stacklevel=3)
