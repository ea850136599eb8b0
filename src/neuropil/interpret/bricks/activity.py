"""What the neurons of a model did on data: for each sequence their strongest and their mean activity.

The strength of an activation is what it adds in its neuron's own direction:

    a = max(h, 0)   of an ungated neuron            a = |h|   of a gated one, h = f(W_gate x) (W_up x)

For a rectified, SiLU or GELU layer the first rises and falls with `relu(W x)`, the measure of the paper; a gated
neuron writes as strongly with either sign, so its sign is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.evaluate import evaluating
from neuropil.neurons import Site, capture, find_sites

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""A batch as the model takes it: one argument, several, or by keyword. Its first axis counts the sequences."""


def call(model: nn.Module, example: Example) -> Any:
    """The model's answer to a batch."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def tensors(example: Example) -> list[Tensor]:
    """The tensors of a batch, whose first axis counts its sequences."""
    given: Iterable[Any] = example.values() if isinstance(example, Mapping) else example
    return [example] if isinstance(example, Tensor) else [x for x in given if isinstance(x, Tensor) and x.dim() > 0]


def strength(site: Site, h: Tensor) -> Tensor:
    """How strongly neurons act; see the module."""
    return h.abs() if "gate" in site.reads else h.clamp_min(0)


def chosen_sites(model: nn.Module, layers: Sequence[int] | None = None) -> tuple[list[Site], dict[str, str]]:
    """The sites whose neurons can be told apart by sequence, and why each other one cannot.

    `layers` are numbers of sites, by default all. Raises ValueError for one that is not there, and where none is left.
    """
    sites = find_sites(model)
    numbers = range(len(sites)) if layers is None else [int(n) for n in layers]
    if unknown := set(numbers) - set(range(len(sites))):
        raise ValueError(f"layers={sorted(unknown)}: this model has sites 0 to {len(sites) - 1}")
    chosen = [sites[n] for n in sorted(set(numbers))]
    left = {s.name: "an expert of a router: it is a brick already" for s in chosen if s.kind == "expert"}
    chosen = [s for s in chosen if s.name not in left]
    if not chosen:
        raise ValueError("no layer of neurons to look at: all are experts, which are bricks already" if left else
                         "layers=[]: name at least one")  # fmt: skip
    return chosen, left


def by_sequence(site: Site, h: Tensor, sequences: int) -> Float[Tensor, "sequences places width"]:
    """Activations with the neurons last, and all places of a sequence on one axis."""
    return h.movedim(site.tap.axis, -1).reshape(sequences, -1, site.width)


def real_places(example: Example, sequences: int, places: int) -> Tensor | None:
    """Which places of a batch are real tokens, where an attention mask of that shape says so."""
    mask = example.get("attention_mask") if isinstance(example, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == (sequences, places):
        return mask.bool()
    return None


@dataclass(frozen=True)
class Activity:
    """By site name, for every sequence: the greatest and the mean strength of each neuron, and its mean activation."""

    peak: dict[str, Float[Tensor, "sequences _"]]
    size: dict[str, Float[Tensor, "sequences _"]]
    mean: dict[str, Float[Tensor, "sequences _"]]

    @property
    def sequences(self) -> int:
        return len(next(iter(self.peak.values())))


@torch.no_grad()
def observe(model: nn.Module, data: Iterable[Example], layers: Sequence[int] | None = None) -> Activity:
    """What the neurons of these layers (numbers of sites, by default all) did on each sequence of the batches.

    Padding that an `attention_mask` marks is left out. The model answers in eval mode and is left as it was.
    Raises ValueError for no data.

    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    >>> observe(net, [torch.tensor([[3.0], [-2.0]])]).peak["0"]
    tensor([[3., 0.],
            [0., 2.]])
    """
    sites, _ = chosen_sites(model, layers)
    peak: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    size: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    mean: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    with evaluating(model), capture(model, sites) as seen:
        for example in data:
            call(model, example)
            sequences = tensors(example)[0].shape[0]
            for site in sites:
                h = by_sequence(site, seen[site.name], sequences).float()
                a = strength(site, h)
                mask = real_places(example, sequences, h.shape[1])
                real = torch.ones(h.shape[:2], device=h.device) if mask is None else mask.to(h)
                weight = (real / real.sum(1, keepdim=True).clamp_min(1))[..., None]
                peak[site.name].append((a * (real > 0)[..., None]).amax(1).cpu())
                size[site.name].append((a * weight).sum(1).cpu())
                mean[site.name].append((h * weight).sum(1).cpu())
    if not peak[sites[0].name]:
        raise ValueError("observe(data=...): there is no batch; give at least one")
    return Activity(*({name: torch.cat(parts) for name, parts in kept.items()} for kept in (peak, size, mean)))
