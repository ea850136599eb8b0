r"""Weights that flip back and forth between two levels in quantization-aware training: counted, frozen, dampened.

A change of a weight's code is an oscillation where it goes against that weight's last change. The frequency is an
exponential mean, $f \leftarrow m\, o_t + (1 - m) f$ with m = 0.01.

>>> layer = nn.Linear(4, 1, bias=False)
>>> _ = nn.utils.parametrize.register_parametrization(layer, "weight", StatsQuantizer(2))
>>> tracker = OscillationTracker(layer)
>>> for value in (0.1, -0.1, 0.1, -0.1, 0.1):  # an optimizer's steps
...     _ = layer.parametrizations.weight.original.data.copy_(torch.tensor([[value, 1.0, 1.0, 1.0]]))
...     tracker.step()
>>> tracker.report()[""].oscillations
3

The two remedies of Nagel et al., for comparison: `IterativeFreezing` and `dampening`.

Sources: Nagel, Fournarakis, Bondarenko and Blankevoort, "Overcoming Oscillations in Quantization-Aware Training", 2022,
arXiv:2203.11086; S.-Y. Liu, Z. Liu and Cheng 2023, arXiv:2302.02210.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.compress.ofq import StatsQuantizer
from neuropil.compress.ofq_attention import QueryKey
from neuropil.compress.ofq_models import latents
from neuropil.compress.quantize.grids import Uniform
from neuropil.compress.quantize.learned import LSQ
from neuropil.compress.quantize.tiles import QuantizationError, from_tiles, to_tiles, working


def _grid(q: StatsQuantizer | LSQ, w: Tensor) -> Uniform:
    """The levels of a weight now."""
    if isinstance(q, StatsQuantizer):
        return q.grid(w)
    q.begin(w)
    return q.grid()


def _codes(q: StatsQuantizer | LSQ, w: Tensor) -> Tensor:
    if isinstance(q, StatsQuantizer):
        return q.codes(w)
    grid, tiles = _grid(q, w), q.tiles(w)
    return from_tiles(grid.codes(to_tiles(working(w), tiles)), tiles, w.shape)


def _rounded(model: nn.Module) -> list[tuple[str, StatsQuantizer | LSQ, nn.Parameter | QueryKey]]:
    found = [(name, q, w) for name, q, w in latents(model) if isinstance(q, StatsQuantizer | LSQ) and q.bits != 32]
    if not found:
        raise QuantizationError("no weight of the model is rounded by a StatsQuantizer or LSQ; prepare it first")
    return found


def _value(w: nn.Parameter | QueryKey) -> Tensor:
    return w.product().detach() if isinstance(w, QueryKey) else w.detach()


@dataclass(frozen=True)
class Oscillation:
    """One layer: the mean frequency, the share of weights above a frequency, oscillations and changes of codes."""

    frequency: float
    share: float
    oscillations: int
    changes: int
    weights: int


class OscillationTracker:
    """Call `step()` after each step of the optimizer: it follows the codes of all rounded weights of a model.

    Products of queries and keys are followed as one weight. `state_dict` goes into a checkpoint.
    Raises QuantizationError where nothing is rounded.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.01) -> None:
        if not 0 < momentum <= 1:
            raise QuantizationError(f"momentum={momentum}: expected more than 0, up to 1")
        self.momentum = momentum
        self._weights = _rounded(model)
        self._state: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Compare the codes with those of the last call."""
        for name, q, w in self._weights:
            code = _codes(q, _value(w)).float()
            if name not in self._state:
                zero = torch.zeros_like(code)
                counts = torch.zeros((), dtype=torch.long, device=code.device)
                self._state[name] = {
                    "code": code, "mean": code.clone(), "direction": zero, "frequency": zero.clone(),
                    "oscillations": counts, "changes": counts.clone(),
                }  # fmt: skip
                continue
            s, m = self._state[name], self.momentum
            turn = (s["code"] - code).sign()
            back = turn * s["direction"] < 0
            s["frequency"].mul_(1 - m).add_(back.float(), alpha=m)
            s["mean"].mul_(1 - m).add_(code, alpha=m)
            s["oscillations"] += back.sum()
            s["changes"] += (turn != 0).sum()
            s["direction"] = torch.where(turn != 0, turn, s["direction"])
            s["code"] = code

    def report(self, above: float = 0.005) -> dict[str, Oscillation]:
        """What each layer has done so far, by name; `share` counts the weights of a frequency above this."""
        return {
            name: Oscillation(
                float(s["frequency"].mean()),
                float((s["frequency"] > above).float().mean()),
                int(s["oscillations"]),
                int(s["changes"]),
                s["code"].numel(),
            )
            for name, s in self._state.items()
        }

    def share(self, above: float = 0.005) -> float:
        """The share of all weights that oscillate more often than this."""
        found = self.report(above).values()
        return sum(o.share * o.weights for o in found) / max(1, sum(o.weights for o in found))

    def state_dict(self) -> dict[str, Any]:
        return {name: {k: v.clone() for k, v in s.items()} for name, s in self._state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Raises QuantizationError for one of another model."""
        shapes = {name: _value(w).shape for name, _, w in self._weights}
        for name, s in state.items():
            if shapes.get(name) != s["code"].shape:
                raise QuantizationError(f"the state has a weight {name!r} of shape {list(s['code'].shape)}; here not")
        self._state = {name: {k: v.clone() for k, v in s.items()} for name, s in state.items()}


class IterativeFreezing:
    """Holds weights that oscillate more often than `threshold`, for good, at the rounded mean of their codes.

    Call `step()` after each step of the optimizer: it calls the tracker's. The threshold may be lowered on the way
    (Nagel et al. do so by a cosine). Products of queries and keys cannot be set; they are not frozen.
    """

    def __init__(self, tracker: OscillationTracker, threshold: float = 0.02) -> None:
        self.tracker, self.threshold = tracker, threshold
        self._at: dict[str, tuple[Tensor, Tensor]] = {}
        self._last: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        self.tracker.step()
        for name, q, w in self.tracker._weights:
            if isinstance(w, QueryKey):
                continue
            s = self.tracker._state[name]
            held, code = self._at.get(name, (torch.zeros_like(s["code"], dtype=torch.bool), s["code"]))
            new = (s["frequency"] > self.threshold) & ~held
            held, code = held | new, torch.where(new, s["mean"].round(), code)
            self._at[name] = held, code
            w.copy_(torch.where(held & ~new, self._last.get(name, w), w))  # else a scale made of w would follow
            grid, tiles = _grid(q, w), q.tiles(w)
            level = from_tiles(grid.values(to_tiles(code.int(), tiles)), tiles, w.shape)
            w.copy_(torch.where(held, level.to(w.dtype), w))
            self._last[name] = w.detach().clone()

    def frozen(self) -> float:
        """The share of weights that are held."""
        masks = [held for held, _ in self._at.values()]
        return sum(int(m.sum()) for m in masks) / max(1, sum(m.numel() for m in masks))


def dampening(model: nn.Module) -> Float[Tensor, ""]:
    """The sum over weights of (level - w)^2, w clipped to the range of the levels: draws weights to their levels."""
    terms = []
    for _, q, w in _rounded(model):
        value = w.product() if isinstance(w, QueryKey) else w
        grid, tiles = _grid(q, value.detach()), q.tiles(value)
        tiled = to_tiles(value, tiles)
        ends = grid.values(torch.tensor([grid.low, grid.high], device=value.device).expand(*grid.scale.shape, 2))
        level = grid.values(to_tiles(_codes(q, value.detach()), tiles))
        terms.append((level - torch.minimum(torch.maximum(tiled, ends[..., :1]), ends[..., 1:])).square().sum())
    return torch.stack(terms).sum()
