"""Codes and exponents learned so that a layer's or block's output stays what it was (NUPES)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.func import functional_call

from neuropil.compress._nupes_inputs import PowerInput
from neuropil.compress._nupes_power import between, encode, position
from neuropil.compress.quantize.gradients import soft_round
from neuropil.compress.quantize.quantizer import straight_through
from neuropil.compress.quantize.tiles import Tiling, from_tiles
from neuropil.compress.reconstruction import Seen, mean_error, minimise, output_error
from neuropil.evaluate import evaluating

A_LOW, A_HIGH = 0.2, 1.5  # the exponents that can be learned
STEEP = 1.0  # the largest gradient that an exponent follows
WARM_UP = 0.2  # the share of the steps before codes are drawn to integers
WARM, COLD = 1.0, 0.05  # temperatures of the soft rounding


@dataclass(frozen=True)
class Learning:
    """How codes are learned; see `nupes_quantize`."""

    exponent: bool = True
    steps: int = 1000
    batch: int = 32
    lr: float = 3e-2
    exponent_lr: float = 3e-3
    strength: float = 0.1
    rounding: str = "soft"
    seed: int = 0

    @property
    def soft(self) -> bool:
        return self.rounding == "soft"


class FreeCodes(nn.Module):
    """A weight as real codes, what its exponent gives plus a shift of each that may cross any number of levels."""

    def __init__(self, w: Float[Tensor, "r g n"], size: Float[Tensor, "r g 1"], a: float, top: int, soft: bool) -> None:
        super().__init__()
        self.w, self.size, self.top, self.start, self.soft = w, size, top, a, soft
        self.shift = nn.Parameter(torch.zeros_like(w))
        share = (min(max(a, A_LOW + 1e-3), A_HIGH - 1e-3) - A_LOW) / (A_HIGH - A_LOW)
        self.free = nn.Parameter(torch.tensor(math.log(share / (1 - share))))
        self.free.register_hook(lambda gradient: gradient.clamp(-STEEP, STEEP))
        self.temperature, self.hard, self.moving = WARM, False, False

    def exponent(self) -> Float[Tensor, ""]:
        """A_LOW to A_HIGH; before it moves exactly the exponent that was given."""
        if not self.moving:
            return self.free * 0 + self.start
        return A_LOW + (A_HIGH - A_LOW) * torch.sigmoid(self.free)

    def code(self) -> Float[Tensor, "r g n"]:
        """Where each weight lies among the codes."""
        a = self.exponent() if self.moving else self.start
        return (position(self.w, self.size, a, self.top) + self.shift).clamp(-self.top, self.top)

    def rounded(self, code: Float[Tensor, "r g n"]) -> Float[Tensor, "r g n"]:
        """Integer codes; while it learns, softly rounded ones, or integers with a straight-through gradient."""
        if self.hard:
            return code.detach().round()
        return soft_round(code, self.temperature) if self.soft else straight_through(code, code.detach().round())

    def weight(self) -> Float[Tensor, "r g n"]:
        return between(self.rounded(self.code()), self.exponent(), self.top) * self.size

    def unrounded(self, beta: float) -> Float[Tensor, ""]:
        """mean(1 - |2 frac(u) - 1|^beta): 0 where all codes are integers."""
        code = self.code()
        share = code - code.detach().floor()
        return (1 - (2 * share - 1).abs().pow(beta)).mean()

    @torch.no_grad()
    def project(self) -> None:
        """Keep codes on the grid: a shift that leads beyond its end could not find back."""
        a = self.exponent() if self.moving else self.start
        at = position(self.w, self.size, a, self.top)
        self.shift.copy_((at + self.shift).clamp(-self.top, self.top) - at)

    @torch.no_grad()
    def restore(self) -> None:
        """Forget what was learned."""
        self.shift.zero_()
        self.moving = False

    @torch.no_grad()
    def settled(self) -> tuple[Integer[Tensor, "r g n"], float, tuple[int, int]]:
        """Integer codes, the exponent, and how many codes lie one level or more, and two or more, off the first."""
        codes = self.code().round().to(torch.int16)
        away = (codes - encode(self.w, self.size, self.start, self.top)).abs()
        a = float(self.exponent()) if self.moving else self.start
        return codes, a, (int((away >= 1).sum()), int((away >= 2).sum()))


@dataclass
class Learned:
    """What came of one layer."""

    codes: Integer[Tensor, "r g n"]
    exponent: float
    moved: tuple[int, int]  # codes that differ from plain rounding at all, and by two levels or more
    before: float  # the error of the output, of its own mean square
    after: float


@dataclass
class Unit:
    """A layer or block, the layers in it, and what rounds their inputs."""

    name: str
    layers: dict[str, FreeCodes]
    tiles: dict[str, Tiling]
    relu: bool = False
    inputs: dict[str, PowerInput] = field(default_factory=dict)


def learn_unit(work: nn.Module, unit: Unit, seen: Seen, how: Learning) -> dict[str, Learned]:
    """Learn the codes of one unit of the model `work`; where it does not help on the calibration, nothing is moved."""
    module = work.get_submodule(unit.name)
    run = _runner(module, unit)
    error = _after_relu if unit.relu else mean_error
    every = list(unit.layers.values())
    plain = sum(float(error(torch.zeros_like(c.output), c.output)) * c.rows for c in seen.calls)
    plain = max(plain / sum(c.rows for c in seen.calls), 1e-30)
    with _frozen(module):
        with _hard(every):
            before = output_error(run, seen, error)
        with torch.enable_grad():
            _minimise(run, unit, seen, how, error, before or plain)
        with _hard(every):
            after = output_error(run, seen, error)
            if not after <= before:
                for each in every:
                    each.restore()
                after = before
    found = {}
    for name, each in unit.layers.items():
        found[name] = Learned(*each.settled(), before / plain, after / plain)
    return found


def _runner(module: nn.Module, unit: Unit) -> Callable[..., Any]:
    """The unit with the weights that its codes stand for."""

    def run(*args: Any, **kwargs: Any) -> Any:
        weights = {}
        for name, each in unit.layers.items():
            inside = name[len(unit.name) + 1 :] if name != unit.name else ""
            layer: Any = module.get_submodule(inside)
            weight = from_tiles(each.weight(), unit.tiles[name], layer.weight.shape)
            weights[f"{inside}.weight" if inside else "weight"] = weight.to(layer.weight.dtype)
            if name in unit.inputs:
                unit.inputs[name].exponent = each.exponent().to(unit.inputs[name].exponent.dtype)
        return functional_call(module, weights, args, kwargs)

    return run


def _minimise(
    run: Callable[..., Any],
    unit: Unit,
    seen: Seen,
    how: Learning,
    error: Callable[[Tensor, Tensor], Tensor],
    scale: float,
) -> None:
    """Adam on the error, in units of that of rounding to the nearest, so that one strength suits all layers."""
    every = list(unit.layers.values())
    groups: list[dict[str, Any]] = [{"params": [each.shift for each in every], "lr": how.lr}]
    if how.exponent:
        groups.append({"params": [each.free for each in every], "lr": how.exponent_lr})
    warm = int(WARM_UP * how.steps)

    def penalty(step: int) -> Tensor:
        if step < warm:
            return torch.zeros(())
        beta = 20 - 18 * (step - warm) / max(1, how.steps - warm)
        return how.strength * torch.stack([each.unrounded(beta) for each in every]).sum()

    done = 0

    def after() -> None:
        nonlocal done
        done += 1
        for each in every:
            each.project()
            each.moving = how.exponent
            each.temperature = WARM * (COLD / WARM) ** (done / how.steps)

    minimise(
        run,
        groups,
        seen,
        steps=how.steps,
        batch=how.batch,
        loss=lambda made, wanted: error(made, wanted) / scale,
        penalty=penalty,
        after=after,
        seed=how.seed,
    )


def _after_relu(made: Tensor, wanted: Tensor) -> Tensor:
    return mean_error(made.relu(), wanted.relu())


@contextmanager
def _hard(every: Sequence[FreeCodes]) -> Iterator[None]:
    for each in every:
        each.hard = True
    try:
        yield
    finally:
        for each in every:
            each.hard = False


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """In eval mode, and no gradient for the module's own parameters."""
    asked = [p for p in module.parameters() if p.requires_grad]
    for p in asked:
        p.requires_grad_(False)
    try:
        with evaluating(module):
            yield
    finally:
        for p in asked:
            p.requires_grad_(True)


def put(work: nn.Module, unit: Unit, found: dict[str, Learned]) -> None:
    """The learned weights in the place of the plain ones, in place, for the layers that come after."""
    for name, each in unit.layers.items():
        layer: Any = work.get_submodule(name)
        with torch.no_grad(), _hard([each]):
            layer.weight.copy_(from_tiles(each.weight(), unit.tiles[name], layer.weight.shape))
        if name in unit.inputs:
            unit.inputs[name].exponent = torch.tensor(found[name].exponent)
