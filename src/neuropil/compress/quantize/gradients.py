r"""Other ways for a gradient to pass a rounding: soft rounding, Gumbel-softmax, and pulls toward the grid.

| method | what training sees |
| --- | --- |
| `Quantizer(gradient=...)` | the rounded numbers, with the straight-through gradient ("identity", or "clipped") |
| `SoftQuantizer` | tanh steps that harden as the temperature falls (DSQ); rounded in eval mode |
| `GumbelQuantizer` | a random mixture of the two neighbouring levels that hardens likewise |
| `ProxQuant` | float weights that are drawn toward the grid after each step of the optimizer |
| `grid_distance`, `sine_penalty` | float weights, with a term in the loss: mean \|w - nearest\|, mean sin^2(pi w / S) |

>>> u = torch.linspace(0, 1, 5)
>>> soft_round(u, 0.1), soft_round(u, 100.0)
(tensor([0.0000, 0.0066, 0.5000, 0.9934, 1.0000]), tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000]))

Sources: Gong et al. 2019, arXiv:1908.05033 (DSQ); Louizos et al. 2019, arXiv:1810.01875 (relaxed quantization); Bai,
Wang and Liberty 2019, arXiv:1810.00861 (ProxQuant); Naumov et al. 2018, arXiv:1811.02883, and Elthakeb et al. 2020,
arXiv:2003.00146 (periodic regularisers).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.compress.quantize.grids import Uniform
from neuropil.compress.quantize.models import Weights, layers, quantizer_for
from neuropil.compress.quantize.quantizer import FakeQuantizer, Quantizer
from neuropil.compress.quantize.tiles import QuantizationError, from_tiles, to_tiles
from neuropil.packed import Packing


def soft_round(u: Float[Tensor, "*shape"], temperature: float) -> Float[Tensor, "*shape"]:
    """A smooth rounding that leaves integers and half-integers fixed at every temperature.

    floor(u) + 1/2 + tanh((frac - 1/2) / T) / (2 tanh(1 / 2T)): `round` as T goes to 0, u as it grows.
    """
    floor = u.detach().floor()
    return floor + 0.5 + ((u - floor - 0.5) / temperature).tanh() / (2 * math.tanh(0.5 / temperature))


class SoftQuantizer(FakeQuantizer):
    """Rounds by tanh steps in training (DSQ), exactly in eval mode. Set `temperature` lower and lower while training.

    The settings are those of a uniform `Quantizer`, whose grid is used; numbers beyond it are clipped.
    """

    def __init__(self, bits: int = 4, scheme: str = "symmetric", temperature: float = 0.3, **settings: Any) -> None:
        super().__init__()
        self.hard, self.temperature = Quantizer(bits, scheme, **settings), temperature
        if self.hard.scheme == "binary" or bits == 32 or temperature <= 0:
            raise QuantizationError(
                f"{bits} bits {scheme}, temperature={temperature}: soft rounding needs a uniform grid of 16 "
                "bits or fewer, and a temperature above 0"
            )

    def settings(self) -> dict[str, Any]:
        return {**self.hard.settings(), "temperature": self.temperature}

    def for_layer(self, module: nn.Module) -> FakeQuantizer:
        made = type(self)(**self.settings())
        made.hard = self.hard.for_layer(module)  # type: ignore[assignment]
        return made

    def soften(self, at: Float[Tensor, "r g n"]) -> Float[Tensor, "r g n"]:
        """Codes from positions among them."""
        return soft_round(at, self.temperature)

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if not self.training:
            rounded: Tensor = self.hard(w)
            return rounded
        grid, tiles = self.hard.grid_for(w), self.hard.tiles(w)
        if not isinstance(grid, Uniform):
            raise QuantizationError(f'scheme="{self.hard.scheme}" is not uniform: soft rounding has no levels between')
        at = grid.positions(to_tiles(w, tiles)).clamp(grid.low, grid.high)
        soft = self.soften(at)
        return from_tiles((soft - grid.zero[..., None]) * grid.scale[..., None], tiles, w.shape).to(w.dtype)

    def pack(self, w: Float[Tensor, "*shape"]) -> Packing:
        return self.hard.pack(w)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class GumbelQuantizer(SoftQuantizer):
    """Rounds to a random mixture of the two neighbouring levels (relaxed quantization), exactly in eval mode.

    A number at `frac` between two codes takes the upper with the probability `frac`. With logistic noise, the
    difference of two Gumbel draws, sigmoid((logit(frac) + noise) / temperature) is the mixture's share of it.
    """

    def soften(self, at: Float[Tensor, "r g n"]) -> Float[Tensor, "r g n"]:
        floor = at.detach().floor()
        share = (at - floor).clamp(1e-6, 1 - 1e-6)
        noise = torch.rand_like(share).clamp(1e-6, 1 - 1e-6)
        return floor + ((share.logit() + noise.logit()) / self.temperature).sigmoid()


def grid_distance(w: Float[Tensor, "*shape"], quantizer: Quantizer) -> Float[Tensor, ""]:
    """The W-shaped regulariser: the mean distance of weights from the nearest level."""
    return (w - quantizer(w).detach()).abs().mean()


def sine_penalty(w: Float[Tensor, "*shape"], quantizer: Quantizer) -> Float[Tensor, ""]:
    """mean sin^2(pi (w / S + z)): 0 on every level of a uniform grid, 1 half-way between.

    >>> q = Quantizer(2, "affine")
    >>> w = torch.tensor([0.0, 3.0, 1.5])
    >>> round(sine_penalty(w, q).item(), 4)
    0.3333
    """
    grid = quantizer.grid_for(w)
    if not isinstance(grid, Uniform):
        raise QuantizationError(f'scheme="{quantizer.scheme}" is not uniform: it has no period')
    return (math.pi * grid.positions(to_tiles(w, quantizer.tiles(w)))).sin().square().mean()


def prox(
    w: Float[Tensor, "*shape"], rounded: Float[Tensor, "*shape"], strength: float, kind: str = "l1"
) -> Float[Tensor, "*shape"]:
    """The proximal step of strength * |w - level|: toward the level by so much, or onto it ("l1").

    "l2" is that of strength / 2 * (w - level)^2: a weighted mean of both.
    """
    away = w - rounded
    if kind == "l2":
        return rounded + away / (1 + strength)
    if kind != "l1":
        raise QuantizationError(f'kind={kind!r}: expected "l1" or "l2"')
    return rounded + away.sign() * (away.abs() - strength).clamp_min(0)


class ProxQuant:
    """Draws a model's float weights toward their grids: call `step` after each step of the optimizer.

    The strength is `rate` times the number of steps done: it grows, so that weights end on the grid (the paper's
    homotopy). `quantize_model` with the same settings then changes them little. Changes the model in place.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> proximal = ProxQuant(model, {"bits": 2, "dynamic": True}, rate=0.01)
    >>> for _ in range(100):
    ...     proximal.step()
    >>> model[0].weight.unique().numel() <= 4
    True
    """

    def __init__(self, model: nn.Module, weights: Weights, rate: float = 1e-4, kind: str = "l1") -> None:
        if rate <= 0:
            raise QuantizationError(f"rate={rate}: expected more than 0")
        found, self.left = layers(model)
        made = {name: quantizer_for(weights, name, module) for name, module in found.items()}
        self.quantizers = {name: q for name, q in made.items() if q is not None}
        self.modules, self.rate, self.kind, self.t = found, rate, kind, 0

    @torch.no_grad()
    def step(self) -> None:
        """One step toward the grid."""
        self.t += 1
        done: set[int] = set()
        for name, quantizer in self.quantizers.items():
            weight = self.modules[name].weight
            if isinstance(weight, nn.Parameter) and id(weight) not in done:
                done.add(id(weight))
                weight.copy_(prox(weight, quantizer(weight), self.rate * self.t, self.kind))

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "quantizers": {name: q.state_dict() for name, q in self.quantizers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.t = state["t"]
        for name, quantizer in self.quantizers.items():
            quantizer.load_state_dict(state["quantizers"][name])
