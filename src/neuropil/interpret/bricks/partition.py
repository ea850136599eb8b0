"""The neurons of each layer as bricks of equal size: the partition itself."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from neuropil.interpret.bricks.activity import Example, chosen_sites
from neuropil.interpret.bricks.coactivation import coactivation, correlation, cut, token_strengths
from neuropil.interpret.bricks.kmeans import balanced_kmeans, capacities
from neuropil.models import Model, load
from neuropil.neurons import Site

METHODS = ("parameters", "coactivation", "correlation", "random", "blocks")
WITH_DATA = ("coactivation", "correlation")
TOKENS = 4096


@dataclass(frozen=True)
class Partition:
    """Which brick of its site each neuron belongs to.

    labels[site name][i] is the brick of neuron i; `counts` has the number of bricks of each site, `method` how they
    were found, and `left` why a site has none.
    """

    labels: dict[str, Int[Tensor, " width"]]
    counts: dict[str, int]
    method: str
    left: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, labels in self.labels.items():
            if not (int(labels.min()) >= 0 and int(labels.max()) < self.counts[name]):
                raise ValueError(f"site {name!r}: labels must lie in 0 to {self.counts[name] - 1}")

    def sizes(self, site: str) -> Int[Tensor, " bricks"]:
        """How many neurons each brick of a site has."""
        return torch.bincount(self.labels[site], minlength=self.counts[site])

    def members(self, site: str) -> Bool[Tensor, "bricks width"]:
        """Row e marks the neurons of brick e."""
        return self.labels[site] == torch.arange(self.counts[site])[:, None]

    def neurons(self, bricks: Mapping[str, Sequence[int] | Tensor]) -> dict[str, Int[Tensor, " kept"]]:
        """The neurons of some bricks of each named site, in ascending order. Raises KeyError, ValueError for others."""
        found = {}
        for site, numbers in bricks.items():
            if site not in self.labels:
                raise KeyError(f"site {site!r} has no bricks; there are {', '.join(list(self.labels)[:5])} …")
            wanted = torch.as_tensor(numbers, dtype=torch.long)
            if wanted.numel() and not (int(wanted.min()) >= 0 and int(wanted.max()) < self.counts[site]):
                raise ValueError(f"site {site!r} has bricks 0 to {self.counts[site] - 1}, got {wanted.tolist()}")
            found[site] = torch.isin(self.labels[site], wanted).nonzero()[:, 0]
        return found

    def grown(self, site: str, neurons: int) -> Partition:
        """With a brick more at the site, of so many new neurons after the others."""
        brick = self.counts[site]
        labels = torch.cat([self.labels[site], torch.full((neurons,), brick)])
        return Partition(self.labels | {site: labels}, self.counts | {site: brick + 1}, self.method, self.left)


def partition_bricks(
    model: nn.Module | Model,
    bricks: int | None = None,
    *,
    size: int | None = None,
    method: str = "parameters",
    data: Iterable[Example] | None = None,
    layers: Sequence[int] | None = None,
    tokens: int = TOKENS,
    seed: int = 0,
) -> Partition:
    """Deal the neurons of every layer into bricks of equal size (sizes differ by one where they must).

    Give the number of `bricks` a layer (by default 16, as in the paper's analysis, or as many as a layer has neurons
    where these are fewer) or their `size` (32 in its perturbations). `layers` are numbers of sites, by default all.
    `method`:

    "parameters"    k-means with equal clusters of what each neuron reads and writes: rows of its weights scaled to
                    unit length (W_in of an ungated layer, as in the paper; gate, up and down side by side else)
    "coactivation"  the graph of neurons that fire together on `data`, cut by METIS (`pymetis`; without it, a warning
                    and "correlation")
    "correlation"   k-means with equal clusters of the rows of the correlation matrix of strengths on `data`
    "random"        drawn by `seed`: what the others must beat
    "blocks"        consecutive neurons, the paper's baseline

    The methods with data hold the strengths of `tokens` tokens of all those layers in memory (2 bytes each).
    Renumbering the neurons of a model renumbers the labels and changes nothing else ("random" and "blocks" aside).
    Raises ValueError for more bricks than neurons, an unknown method, data that is missing, or a model whose layers are
    all experts of a router.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> partition_bricks(net, 3, method="blocks").labels["0"]
    tensor([0, 0, 1, 1, 2, 2])
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    if bricks is not None and size is not None:
        raise ValueError(f"partition_bricks(bricks={bricks}, size={size}): give one of them")
    if method in WITH_DATA and data is None:
        raise ValueError(f"method={method!r} needs data=..., batches that the model takes")
    if method == "coactivation" and importlib.util.find_spec("pymetis") is None:
        warnings.warn("pymetis is not installed; bricks are found by k-means of correlations", stacklevel=2)
        method = "correlation"
    loaded = model if isinstance(model, Model) else load(model)
    sites, left = chosen_sites(loaded.skeleton, layers)
    counts = {site.name: _count(site, bricks, size) for site in sites}
    if method in WITH_DATA:
        assert data is not None
        found = _by_data(loaded.module(), sites, counts, method, data, tokens, seed)
    else:
        found = {site.name: _by_weights(loaded, site, counts[site.name], method, seed) for site in sites}
    return Partition(found, counts, method, left)


def _count(site: Site, bricks: int | None, size: int | None) -> int:
    if size is not None and size < 1:
        raise ValueError(f"size={size}: expected at least one neuron a brick")
    count = min(16, site.width) if bricks is None and size is None else bricks
    count = -(-site.width // size) if count is None and size is not None else count
    assert count is not None
    if not 1 <= count <= site.width:
        raise ValueError(f"{count} bricks of the {site.width} neurons of {site.name!r}: expected 1 to {site.width}")
    return count


def _by_weights(model: Model, site: Site, bricks: int, method: str, seed: int) -> Tensor:
    even = torch.repeat_interleave(torch.arange(bricks), capacities(site.width, bricks))
    if method == "blocks":
        return even
    if method == "random":
        return even[torch.randperm(site.width, generator=torch.Generator().manual_seed(1_000_003 * seed + site.number))]
    return in_canonical_order(neuron_rows(model, site), lambda x: balanced_kmeans(x, bricks, seed=seed))


def neuron_rows(model: Model, site: Site) -> Float[Tensor, "width d"]:
    """What each neuron reads (and, of a gated layer, writes), each part scaled to unit length."""
    roles = site.roles if "gate" in site.reads else ("up",)
    return torch.cat([nn.functional.normalize(model.rows(site, role), dim=1) for role in roles], 1)


def _by_data(
    model: nn.Module, sites: Sequence[Site], counts: Mapping[str, int], method: str, data: Iterable[Example],
    tokens: int, seed: int,
) -> dict[str, Tensor]:  # fmt: skip
    group = _graph_cut if method == "coactivation" else _correlated
    strengths = token_strengths(model, sites, data, tokens)
    return {
        site.name: in_canonical_order(
            strengths[site.name].T.float(), partial(group, site, bricks=counts[site.name], seed=seed)
        )
        for site in sites
    }


def _graph_cut(site: Site, rows: Tensor, bricks: int, seed: int) -> Tensor:
    return cut(coactivation(site, rows.T), bricks, seed)


def _correlated(site: Site, rows: Tensor, bricks: int, seed: int) -> Tensor:
    return balanced_kmeans(correlation(rows.T), bricks, seed=seed)


def in_canonical_order(
    rows: Float[Tensor, "width d"], group: Callable[[Float[Tensor, "width d"]], Int[Tensor, " width"]]
) -> Int[Tensor, " width"]:
    """Labels that follow the neurons wherever they stand: these are sorted by their values before they are grouped."""
    direction = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = (rows.double() * direction).sum(1).argsort(stable=True)
    labels = torch.empty(len(rows), dtype=torch.long)
    labels[order] = group(rows[order])
    return labels
