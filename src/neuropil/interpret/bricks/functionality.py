r"""What each neuron is for: how well its activity tells the sequences of one function from the others.

The paper's measure is *predictivity*. A neuron's score of a sequence is its greatest strength over the tokens, and

    predictivity = max(AP(z, act), AP(1 - z, act))

with z = 1 for the sequences of a function and AP the average precision of ranking them by the score. Two plainer
scores stand beside it: the mean strength on the function's sequences less that on the others ("difference"), and their
share a_f / (a_f + a_others) ("ratio"), which large general neurons cannot win by size alone.

The paper's functions are pairs of labels of about equal number. Here one function stands against all others, so both
classes are given half of the weight: a neuron that says nothing then has 0.5 of every function instead of the share of
the larger class, which no rare function could pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from neuropil.interpret.bricks.activity import Activity, Example, observe

SCORES = ("predictivity", "ap", "difference", "ratio")
TOP = 0.01
FEW = 30  # sequences: with fewer, an average precision says little


def average_precision(
    act: Float[Tensor, "sequences width"],
    labels: Bool[Tensor, "functions sequences"],
    weights: Float[Tensor, "functions sequences"] | None = None,
) -> Float[Tensor, "functions width"]:
    """Average precision of ranking the sequences by each neuron's activity, ties counted as one step.

    The same as `sklearn.metrics.average_precision_score(labels, act, sample_weight=weights)`, for all neurons at once.

    >>> average_precision(torch.tensor([[3.0], [1.0], [2.0]]), torch.tensor([[True, False, True]])).item()
    1.0
    """
    order = act.argsort(dim=0, descending=True, stable=True)
    ranked = act.gather(0, order)
    place = torch.arange(len(act))[:, None].expand_as(ranked)
    last = torch.ones_like(ranked, dtype=torch.bool)
    last[:-1] = ranked[:-1] != ranked[1:]
    end = torch.where(last, place, len(act) - 1).flip(0).cummin(0).values.flip(0)  # where the ties of a place end
    found = []
    for number, z in enumerate(labels):
        w = torch.ones(len(act), dtype=torch.float64) if weights is None else weights[number].double()
        hit, weight = (w * z)[order], w[order]
        precision = (hit.cumsum(0) / weight.cumsum(0)).gather(0, end)
        found.append((hit * precision).sum(0) / (w * z).sum())
    return torch.stack(found)


def balance(labels: Bool[Tensor, "functions sequences"]) -> Float[Tensor, "functions sequences"]:
    """Weights that give the sequences of a function half of the weight, and those of all others the other half."""
    z = labels.double()
    return z / (2 * z.sum(1, keepdim=True)) + (1 - z) / (2 * (1 - z).sum(1, keepdim=True))


@dataclass(frozen=True)
class Functionality:
    """Scores of every neuron for every function, by site name `[functions, width]`.

    `names` are the functions, or sub-functions "function/part"; `ap` and `negation` are the average precisions of a
    function and of its absence; `inside` and `outside` the mean strength on its sequences and on the others; `spread`
    the standard deviation of strength within the two classes; `mass` the mean strength and `mean` the mean activation
    over all sequences, every function counting alike, `[width]`.
    """

    names: tuple[str, ...]
    ap: dict[str, Float[Tensor, "functions _"]]
    negation: dict[str, Float[Tensor, "functions _"]]
    inside: dict[str, Float[Tensor, "functions _"]]
    outside: dict[str, Float[Tensor, "functions _"]]
    spread: dict[str, Float[Tensor, "functions _"]]
    mass: dict[str, Float[Tensor, " _"]]
    mean: dict[str, Float[Tensor, " _"]]
    sequences: int

    @property
    def predictivity(self) -> dict[str, Float[Tensor, "functions width"]]:
        """The greater of the two average precisions: silence can tell of a function, too."""
        return {site: torch.maximum(ap, self.negation[site]) for site, ap in self.ap.items()}

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions, each once: what stands before the "/" of the names."""
        return tuple(dict.fromkeys(name.partition("/")[0] for name in self.names))

    def score(self, kind: str) -> dict[str, Float[Tensor, "functions width"]]:
        """By "predictivity", "ap" (of firing on the function), "difference" or "ratio". ValueError for another."""
        if kind == "predictivity":
            return self.predictivity
        if kind == "ap":
            return self.ap
        if kind == "difference":
            return {site: self.inside[site] - self.outside[site] for site in self.ap}
        if kind == "ratio":
            tiny = torch.finfo(torch.float64).tiny
            return {site: a / (a + self.outside[site]).clamp_min(tiny) for site, a in self.inside.items()}
        raise ValueError(f"score {kind!r}: expected one of {', '.join(SCORES)}")

    def ranking(self, kind: str = "predictivity") -> dict[str, Int[Tensor, "functions width"]]:
        """The neurons of each site from the highest score down.

        Few sequences leave many neurons with equal average precision; among those, the one goes first whose mean
        strengths lie further apart, in standard deviations.
        """
        found = {}
        for site, score in self.score(kind).items():
            apart = (self.inside[site] - self.outside[site]) / self.spread[site].clamp_min(1e-12)
            second = (apart.abs() if kind == "predictivity" else apart).argsort(dim=1, descending=True, stable=True)
            # Rounded, so that sums of the same numbers in another order do not pass for a better score.
            first = score.gather(1, second).round(decimals=9).argsort(dim=1, descending=True, stable=True)
            found[site] = second.gather(1, first)
        return found

    def top(self, share: float = TOP, kind: str = "predictivity") -> dict[str, Int[Tensor, "functions top"]]:
        """The best share of each site's neurons (at least one) for each function."""
        return {site: order[:, : max(1, int(share * order.shape[1]))] for site, order in self.ranking(kind).items()}

    def best(self) -> dict[str, Float[Tensor, " functions"]]:
        """By site, the best neuron's predictivity for each function, averaged over its sub-functions."""
        groups = [name.partition("/")[0] for name in self.names]
        rows = [[i for i, group in enumerate(groups) if group == function] for function in self.functions]
        return {site: torch.stack([p.amax(1)[row].mean() for row in rows]) for site, p in self.predictivity.items()}

    def overlap(self, share: float = TOP, kind: str = "predictivity") -> Float[Tensor, "functions functions"]:
        """Which share of two functions' best neurons is the same, averaged over sites; `share` by chance."""
        found = []
        for site, top in self.top(share, kind).items():
            chosen = torch.zeros(self.ap[site].shape, dtype=torch.float64).scatter_(1, top, 1.0)
            found.append(chosen @ chosen.T / top.shape[1])
        return torch.stack(found).mean(0)


def functionality(
    model: nn.Module, functions: Mapping[str, Iterable[Example]], *, layers: Sequence[int] | None = None
) -> Functionality:
    """How well each neuron's activity tells each function's sequences from all others.

    `functions` maps a name to batches that the model takes, each row one sequence; "function/part" names make
    sub-functions, which `BrickTest` takes together. Classes of images do as well as kinds of text.
    Warns below 30 sequences. Raises ValueError for fewer than two functions, or one with fewer than two sequences.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    >>> _ = net[0].weight.data.copy_(torch.eye(2))
    >>> x = torch.rand(40, 2)
    >>> found = functionality(net, {"left": [x * torch.tensor([1, 0.0])], "right": [x * torch.tensor([0, 1.0])]})
    >>> found.predictivity["0"].round(decimals=6)
    tensor([[1., 1.],
            [1., 1.]], dtype=torch.float64)
    """
    if len(functions) < 2:
        raise ValueError(
            f"functionality: got {len(functions)} function; give two or more, since each is told from the others"
        )
    seen = {name: observe(model, batches, layers) for name, batches in functions.items()}
    counts = [each.sequences for each in seen.values()]
    if few := [name for name, each in seen.items() if each.sequences < 2]:
        raise ValueError(f"functionality: {', '.join(map(repr, few))} has one sequence; give two or more of each")
    if sum(counts) < FEW:
        warnings.warn(f"{sum(counts)} sequences: with fewer than {FEW} an average precision says little", stacklevel=2)
    labels = torch.repeat_interleave(torch.eye(len(counts), dtype=torch.bool), torch.tensor(counts), dim=1)
    return _scored(tuple(functions), list(seen.values()), labels)


def _scored(names: tuple[str, ...], seen: Sequence[Activity], labels: Tensor) -> Functionality:
    weights = balance(labels)
    inside = labels.double() / labels.sum(1, keepdim=True)
    outside = (~labels).double() / (~labels).sum(1, keepdim=True)
    alike = inside.mean(0)  # every function counts alike, however many sequences it has
    tables: dict[str, dict[str, Tensor]] = {}
    for site in seen[0].peak:
        peak, size, mean = (
            torch.cat([getattr(each, kind)[site] for each in seen]) for kind in ("peak", "size", "mean")
        )
        size = size.double()
        one, other = inside @ size, outside @ size
        spread = 0.5 * (inside @ size.square() - one.square() + outside @ size.square() - other.square())
        values = {
            "ap": average_precision(peak, labels, weights),
            "negation": average_precision(peak, ~labels, weights),
            "inside": one,
            "outside": other,
            "spread": spread.clamp_min(0).sqrt(),
            "mass": alike @ size,
            "mean": alike @ mean.double(),
        }
        for kind, value in values.items():
            tables.setdefault(kind, {})[site] = value
    return Functionality(names, sequences=labels.shape[1], **tables)
