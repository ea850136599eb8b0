"""Aggregation weights, global or computed from the input, in three resolutions; and the paper's training loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

EVALUATE, PATIENCE = 100, 500  # steps between evaluations, and without gain before training stops
ENTRIES = 2**24  # weights held at once while predicting
RESOLUTIONS = ("coarse", "medium", "fine")


def perceptron(inputs: int, outputs: int, hidden: int, layers: int, dropout: float) -> nn.Sequential:
    """Linear, ELU, then `layers - 1` times Dropout, Linear, ELU, then Linear."""
    parts: list[nn.Module] = [nn.Linear(inputs, hidden), nn.ELU()]
    for _ in range(layers - 1):
        parts += [nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ELU()]
    return nn.Sequential(*parts, nn.Linear(hidden, outputs))


class AggregationWeights(nn.Module):
    """Weights of `models` base models at `levels` quantile levels, and the weighted sum.

    resolution  "coarse" (one weight a model), "medium" (one a model and level) or "fine" (each output level draws on
                every level of every model)
    features    width of the input that the weights are computed from by a perceptron; None: global weights, one free
                tensor that starts at 0, that is, at the plain average
    normalize   softmax over models (coarse, medium) or models and levels (fine); otherwise free linear weights
    """

    def __init__(
        self,
        resolution: str,
        models: int,
        levels: int,
        features: int | None = None,
        normalize: bool = True,
        hidden: int = 64,
        layers: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if resolution not in RESOLUTIONS:
            raise ValueError(f"weights {resolution!r}; expected one of {', '.join(map(repr, RESOLUTIONS))}")
        self.resolution, self.normalize = resolution, normalize
        rows = models * levels if resolution == "fine" else models
        self.shape = (rows, 1 if resolution == "coarse" else levels)
        self.logits: Tensor | None = None
        self.network: nn.Sequential | None = None
        if features is None:
            self.logits = nn.Parameter(torch.zeros(self.shape))
        else:
            self.network = perceptron(features, math.prod(self.shape), hidden, layers, dropout)

    def weights(
        self, x: Float[Tensor, "n d"], present: Bool[Tensor, "n p m"] | None = None
    ) -> Float[Tensor, "b rows columns"]:
        """Weights at each input, `[n, p, 1]`, `[n, p, m]` or `[n, p * m, m]`; `[1, ...]` where they are global.

        Base forecasts that are not `present` get weight 0 and the others share it.
        """
        if self.network is not None:
            logits = self.network(x).unflatten(1, self.shape)
        else:
            assert self.logits is not None
            logits = self.logits[None]
        if present is not None:
            there = present.flatten(1)[:, :, None] if self.resolution == "fine" else present
            logits = torch.where(there, logits, -torch.inf)
        return logits.softmax(1) if self.normalize else logits

    def forward(
        self, forecasts: Float[Tensor, "n p m"], x: Float[Tensor, "n d"], present: Bool[Tensor, "n p m"] | None = None
    ) -> Float[Tensor, "n m"]:
        """Aggregated quantiles; forecasts that are not `present` may hold any finite number."""
        weights = self.weights(x, present)
        if self.resolution == "fine":
            return (forecasts.flatten(1)[:, None] @ weights).squeeze(1)
        return (forecasts * weights).sum(1)

    def in_chunks(self, count: int) -> int:
        """How many of `count` rows to predict at a time, so that memory stays bounded."""
        return max(1, min(count, ENTRIES // math.prod(self.shape)))


def default_batch_size(n: int) -> int:
    """The paper's code: 2 ** (3 + floor(log10 n))."""
    return 2 ** (3 + int(math.log10(max(n, 1))))


def train(
    network: nn.Module,
    loss: Callable[[Tensor], Tensor],
    n: int,
    *,
    generator: torch.Generator,
    validate: Callable[[], float] | None = None,
    steps: int,
    lr: float = 1e-3,
    weight_decay: float = 1e-7,
    batch_size: int | None = None,
) -> tuple[float, int]:
    """Train in place with Adam (AMSGrad) for at most `steps`; the best validation loss and its step.

    `loss` takes the indices of a batch of the `n` examples. With `validate`, which is called every 100 steps, training
    ends after 500 steps without gain and the network is left as it was at the best one. (Training from scratch for that
    many steps, with the same batches, gives the same network.)
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, weight_decay=weight_decay, amsgrad=True)
    size, best, best_step, done = batch_size or default_batch_size(n), math.inf, 0, 0
    kept = copy.deepcopy(network.state_dict())
    while done < steps:
        for batch in torch.randperm(n, generator=generator).split(size):
            network.train()
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
            done += 1
            if validate is not None and (done % EVALUATE == 0 or done == steps):
                network.eval()
                with torch.no_grad():
                    value = validate()
                if value < best:
                    best, best_step, kept = value, done, copy.deepcopy(network.state_dict())
                elif done - best_step >= PATIENCE:
                    done = steps
            if done >= steps:
                break
    if validate is not None:
        network.load_state_dict(kept)
    network.eval()
    return best, (best_step if validate is not None else done)
