"""Does a group of neurons matter for its function, and for no other? Take it away and see what gets worse.

`ablated` sets neurons to zero or to their mean, or disturbs them as the paper does: their activations are shuffled over
all sequences and neurons of the batch and multiplied by four. (The paper shuffles before the rectifier, which is the
same, since relu(4x) = 4 relu(x); gated layers have no rectifier to come.)

`pruning_matrix` does so for each function's neurons in turn and measures every function: rows pruned, columns measured.
Its *specificity* is the mean of the diagonal less that of the rest. Neurons that do much for everything raise the whole
row, so the control is `matched_control`: as many other neurons that together are as active.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from neuropil._taps import tapped
from neuropil.evaluate import evaluating, surprise
from neuropil.interpret.bricks.activity import Example, call
from neuropil.interpret.bricks.functionality import Functionality
from neuropil.interpret.bricks.partition import Partition
from neuropil.neurons import Site, find_sites

WAYS = ("zero", "mean", "shuffle")
Neurons = Mapping[str, Int[Tensor, " _"]]
Loss = Callable[[nn.Module, Example], Any]


@contextmanager
def ablated(
    model: nn.Module,
    neurons: Neurons,
    how: str = "zero",
    *,
    values: Mapping[str, Float[Tensor, " width"]] | None = None,
    strength: float = 4.0,
    seed: int = 0,
) -> Iterator[nn.Module]:
    """Within the block these neurons (site name -> indices) are off: at "zero", at their "mean", or "shuffle"d.

    `values` are the means by site name, `Functionality.mean`; `strength` multiplies what is shuffled, drawn by `seed`.
    The model is as before afterwards. Raises ValueError for another way or means that are missing, KeyError for an
    unknown site.

    >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> with ablated(net, {"0": torch.arange(5)}):
    ...     out = net(torch.ones(1, 3))
    >>> torch.equal(out[0], net[2].bias)
    True
    """
    if how not in WAYS:
        raise ValueError(f"how={how!r}: expected one of {', '.join(WAYS)}")
    if how == "mean" and values is None:
        raise ValueError("how='mean' needs values=..., the mean activations by site (Functionality.mean)")
    sites = {site.name: site for site in find_sites(model)}
    if unknown := set(neurons) - set(sites):
        raise KeyError(f"no site is called {sorted(unknown)[0]!r}; there are {', '.join(list(sites)[:5])} …")
    generator = torch.Generator().manual_seed(seed)

    def act(site: Site, chosen: Tensor) -> Callable[[Tensor], Tensor]:
        held = values[site.name] if values is not None else torch.zeros(site.width)

        def change(h: Tensor) -> Tensor:
            h = h.clone()
            last = h.movedim(site.tap.axis, -1)  # a view
            if how == "shuffle":
                own = last[..., chosen]
                order = torch.randperm(own.numel(), generator=generator).to(h.device)
                last[..., chosen] = strength * own.flatten()[order].reshape(own.shape)
            else:
                last[..., chosen] = (held[chosen] if how == "mean" else torch.zeros(len(chosen))).to(h)
            return h

        return change

    chosen = {sites[name]: torch.as_tensor(indices) for name, indices in neurons.items() if len(indices)}
    with tapped(model, [(site.tap, site.width, act(site, indices)) for site, indices in chosen.items()]):
        yield model


def language_loss(model: nn.Module, example: Example) -> Float[Tensor, ""]:
    """Mean surprise (nats) of each token of a batch but each sequence's first; `example` is ids `[batch, length]`."""
    ids = example["input_ids"] if isinstance(example, Mapping) else example
    assert isinstance(ids, Tensor)
    logits = call(model, example).logits
    return surprise(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).mean()


@torch.no_grad()
def mean_loss(model: nn.Module, data: Sequence[Example], loss: Loss = language_loss) -> float:
    """The mean of a loss over batches, the model in eval mode."""
    if not data:
        raise ValueError("mean_loss(data=...): there is no batch; give at least one")
    with evaluating(model):
        return sum(float(loss(model, example)) for example in data) / len(data)


@dataclass(frozen=True)
class PruningMatrix:
    """By how much each column's loss rises when a row's neurons are taken away; `base` is the loss without."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    base: Float[Tensor, " columns"]
    increase: Float[Tensor, "rows columns"]

    @property
    def own(self) -> Float[Tensor, " own"]:
        """The rise of each row's own function."""
        return torch.stack([self.increase[self.rows.index(name), self.columns.index(name)] for name in self._both])

    @property
    def others(self) -> Float[Tensor, " own"]:
        """The mean rise of all other functions, a row each."""
        totals = torch.stack([self.increase[self.rows.index(name)].sum() for name in self._both])
        return (totals - self.own) / (len(self.columns) - 1)

    @property
    def specificity(self) -> float:
        """Mean over rows of the own function's rise less the others'."""
        return float((self.own - self.others).mean())

    @property
    def _both(self) -> list[str]:
        found = [name for name in self.rows if name in self.columns]
        if not found or len(self.columns) < 2:
            raise ValueError(f"rows {self.rows} and columns {self.columns}: expected a common name and two columns")
        return found


def pruning_matrix(
    model: nn.Module,
    sets: Mapping[str, Neurons],
    tests: Mapping[str, Sequence[Example]],
    *,
    how: str = "zero",
    values: Mapping[str, Float[Tensor, " width"]] | None = None,
    loss: Loss = language_loss,
    base: Float[Tensor, " columns"] | None = None,
) -> PruningMatrix:
    """Take each set of neurons away in turn and measure the loss on each function's batches.

    `how` and `values` as in `ablated`; `base` are the losses without, where they are known already.
    """
    if base is None:
        base = torch.tensor([mean_loss(model, data, loss) for data in tests.values()], dtype=torch.float64)
    rows = []
    for neurons in sets.values():
        with ablated(model, neurons, how, values=values):
            rows.append([mean_loss(model, data, loss) for data in tests.values()])
    return PruningMatrix(tuple(sets), tuple(tests), base, torch.tensor(rows, dtype=torch.float64) - base)


# --- which neurons ------------------------------------------------------------------------------------------


def neurons_of(
    found: Functionality, function: str | None, share: float, *, score: str = "ap", parts: Partition | None = None
) -> dict[str, Int[Tensor, " _"]]:
    """The share of each site's neurons that score highest for a function; for None, on average over all functions.

    With a partition, whole bricks: those of the highest mean score, as many as come nearest to the share.
    Scores of several sub-functions are averaged. Raises ValueError for an unknown function or a share outside (0, 1].
    """
    if function is not None and function not in found.functions:
        raise ValueError(f"function {function!r}: expected one of {', '.join(found.functions)}")
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: expected a share of the neurons in (0, 1]")
    rows = [i for i, name in enumerate(found.names) if function in (None, name.partition("/")[0])]
    chosen = {}
    if parts is None and len(rows) == 1:
        order = found.ranking(score)
        return {name: o[rows[0], : max(1, int(share * o.shape[1]))].sort().values for name, o in order.items()}
    for name, values in found.score(score).items():
        value = values[rows].mean(0)
        if parts is None:
            count = max(1, int(share * len(value)))
            chosen[name] = value.argsort(descending=True, stable=True)[:count].sort().values
        elif name in parts.labels:
            sizes = parts.sizes(name)
            means = torch.zeros(len(sizes), dtype=value.dtype).index_add_(0, parts.labels[name], value) / sizes
            best = means.argsort(descending=True, stable=True)[: max(1, round(share * len(sizes)))]
            chosen |= parts.neurons({name: best})
    return chosen


def random_control(found: Functionality, neurons: Neurons, seed: int) -> dict[str, Int[Tensor, " _"]]:
    """As many neurons of each site, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randperm(len(found.mass[name]), generator=generator)[: len(chosen)].sort().values
        for name, chosen in neurons.items()
    }


def matched_control(found: Functionality, neurons: Neurons, seed: int) -> dict[str, Int[Tensor, " _"]]:
    """As many other neurons of each site, drawn at random among those as active: each replaces one of like strength.

    Pairs minimise the summed difference of log strength and a random cost that lets near equals take turns. Raises
    ValueError where a site has fewer neurons left than are to be replaced.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, chosen in neurons.items():
        log = found.mass[name].clamp_min(1e-12).log()
        rest = torch.ones(len(log), dtype=torch.bool)
        rest[chosen] = False
        others = rest.nonzero()[:, 0]
        if len(others) < len(chosen):
            raise ValueError(f"site {name!r}: {len(chosen)} neurons to match and {len(others)} others; choose fewer")
        cost = (log[chosen][:, None] - log[others]).abs()
        cost = cost + 0.1 * torch.rand(cost.shape, generator=generator, dtype=cost.dtype)
        drawn[name] = others[torch.as_tensor(linear_sum_assignment(cost.numpy())[1])].sort().values
    return drawn


def mass_ratio(found: Functionality, drawn: Neurons, neurons: Neurons) -> float:
    """Total strength of drawn neurons over that of the neurons they stand for."""
    total = [sum(float(found.mass[name][chosen].sum()) for name, chosen in each.items()) for each in (drawn, neurons)]
    return total[0] / total[1]
