"""Learning the aggregation weights: one training under given settings, the random search over them, and prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.model_selection import ParameterGrid, ParameterSampler
from torch import Tensor

from neuropil.measure._quantile_order import crossing_penalty, isotonize, margins
from neuropil.measure._quantile_scores import pinball
from neuropil.measure._quantile_weights import AggregationWeights, train

Forecasts = Float[np.ndarray, "n p m"]
MARGINS = ("adaptive", "levels")


@dataclass(frozen=True)
class Settings:
    """How weights are learned; the fields mean what they mean in `QuantileAggregator`."""

    weights: str
    local: bool
    normalize: bool
    isotonic: str | None
    isotonic_training: bool
    soft_strength: float
    crossing_penalty: float
    margin: float | str
    margin_scale: float
    huber: float
    hidden: int
    layers: int
    dropout: float
    lr: float
    weight_decay: float
    batch_size: int | None
    max_steps: int
    device: Any


@dataclass(frozen=True)
class Part:
    """Standardised forecasts (NaN where a model gave none), inputs and targets of some rows."""

    forecasts: Forecasts
    x: Float[np.ndarray, "n d"]
    y: Float[np.ndarray, " n"]

    def of(self, rows: Any) -> Part:
        return Part(self.forecasts[rows], self.x[rows], self.y[rows])


@dataclass(frozen=True)
class Learned:
    """A trained network with the settings it was trained under and what it came to on the validation part."""

    network: AggregationWeights
    settings: Settings
    loss: float
    steps: int


def draws(settings: Settings, count: int, random_state: int) -> list[Settings]:
    """`count` random draws from the grids of the paper's code (as many as there are); 0: the given settings alone."""
    if count == 0:
        return [settings]
    grid: dict[str, list[Any]] = {"lr": [1e-3, 5e-4]}
    if settings.crossing_penalty > 0:
        grid["crossing_penalty"] = [0.5, 1.0, 2.0, 5.0, 10.0]
        if settings.margin in MARGINS:
            grid["margin_scale"] = [1e-1, 5e-2, 1e-2, 1e-3, 1e-4]
        else:
            grid |= {"lr": [1e-3], "margin": [1e-4, 1e-3, 5e-3, 7.5e-3, 9.9e-3]}
    if settings.local:
        grid |= {"hidden": [64, 128], "layers": [2, 3], "dropout": [0.0, 0.05, 0.1]}
    count = min(count, len(ParameterGrid(grid)))
    return [replace(settings, **drawn) for drawn in ParameterSampler(grid, count, random_state=random_state)]


def margin_matrix(settings: Settings, part: Part, levels: np.ndarray) -> Float[Tensor, "m m"] | float:
    """The least gaps that the crossing penalty asks for."""
    if not isinstance(settings.margin, str):
        return float(settings.margin)
    spread = 0.01 * levels
    if settings.margin == "adaptive":
        middle = np.nanmedian(part.forecasts[:, :, part.forecasts.shape[2] // 2], axis=1)
        spread = np.quantile(part.y - middle, levels)
    return margins(torch.as_tensor(spread, dtype=torch.float32, device=settings.device), settings.margin_scale)


def learn(settings: Settings, part: Part, validation: Part, levels: np.ndarray, seed: int) -> Learned:
    """Train weights on `part`, stopping by the pinball loss of the ordered quantiles of `validation`."""
    levels_of = torch.as_tensor(levels, dtype=torch.float32, device=settings.device)
    z, present, x, y = _tensors(part, torch.float32, settings.device)
    z_val, present_val, x_val, y_val = _tensors(validation, torch.float32, settings.device)
    delta = margin_matrix(settings, part, levels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = AggregationWeights(
            settings.weights,
            z.shape[1],
            z.shape[2],
            x.shape[1] if settings.local else None,
            settings.normalize,
            settings.hidden,
            settings.layers,
            settings.dropout,
        ).to(settings.device)

        def loss(batch: Tensor) -> Tensor:
            q = network(z[batch], x[batch], None if present is None else present[batch])
            penalty = settings.crossing_penalty * crossing_penalty(q, delta) if settings.crossing_penalty > 0 else 0.0
            if settings.isotonic is not None and settings.isotonic_training:
                q = isotonize(q, settings.isotonic, settings.soft_strength)
            return pinball(y[batch], q, levels_of, settings.huber).mean() + penalty

        def validate() -> float:
            size, total = network.in_chunks(len(z_val)), 0.0
            for rows in torch.arange(len(z_val)).split(size):
                q = network(z_val[rows], x_val[rows], None if present_val is None else present_val[rows])
                total += float(pinball(y_val[rows], ordered(q, settings.isotonic), levels_of).mean(1).sum())
            return total / len(z_val)

        best, steps = train(
            network,
            loss,
            len(z),
            generator=torch.Generator().manual_seed(seed),
            validate=validate,
            steps=settings.max_steps,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            batch_size=settings.batch_size,
        )
    # In float64 from here on, so that a row's prediction does not depend on the rows beside it.
    return Learned(network.double(), settings, best, steps)


def ordered(q: Float[Tensor, "n m"], isotonic: str | None) -> Float[Tensor, "n m"]:
    """The operator used at prediction: exact sorting where training sorts softly."""
    if isotonic is None:
        return q
    return isotonize(q, "sort" if isotonic == "soft-sort" else isotonic)


def combine(learned: Learned, forecasts: Forecasts, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n m"]:
    """Ordered quantiles of the aggregate, in standardised units, a chunk of rows at a time."""
    part = Part(forecasts, x, np.zeros(len(x)))
    out, size = [], learned.network.in_chunks(len(x))
    for start in range(0, len(x), size):
        z, present, inputs, _ = _tensors(part.of(slice(start, start + size)), torch.float64, learned.settings.device)
        with torch.no_grad():
            out.append(ordered(learned.network(z, inputs, present), learned.settings.isotonic).cpu().numpy())
    return np.concatenate(out)


def _tensors(part: Part, dtype: torch.dtype, device: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    missing = np.isnan(part.forecasts)
    z, x, y = (torch.as_tensor(a, dtype=dtype, device=device) for a in (part.forecasts, part.x, part.y))
    if not missing.any():
        return z, None, x, y
    return z.nan_to_num(0.0), torch.as_tensor(~missing, device=device), x, y
