"""Which neurons fire together: the graph of co-activation, its cut into equal parts, and correlations.

    A_ij = Σ_tokens min(1, a_i a_j)        a = max(h, 0)      of ungated neurons, as the paper has it
    A_ij = Σ_tokens f_i f_j                f_i = 1 on the tenth of tokens where |h_i| is largest

The second is for gated neurons, which are never silent, so that every pair would be joined in the first. Weak edges are
dropped: those below 0.99 of the first of the 10th, 20th, ... percentiles of A that is not zero. METIS (the library
`pymetis`) cuts the graph into parts of about equal size and few edges between them; then neurons drawn at random move
from parts too large to parts too small.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuropil.errors import MissingExtra
from neuropil.evaluate import evaluating
from neuropil.interpret.bricks.activity import Example, by_sequence, call, real_places, strength, tensors
from neuropil.interpret.bricks.kmeans import capacities, evened
from neuropil.neurons import Site, capture

FIRES = 0.1  # share of tokens on which a gated neuron is said to fire
WEIGHTS = 1000  # METIS weighs edges in whole numbers: the heaviest edge gets this
PLACES = 64  # of a sequence or feature map: so that one image of 12,544 places is not all that is looked at


@torch.no_grad()
def token_strengths(
    model: nn.Module, sites: Sequence[Site], data: Iterable[Example], tokens: int
) -> dict[str, Float[Tensor, "tokens width"]]:
    """The strength of each neuron at the first `tokens` places of the data, in half precision to save memory.

    Of longer sequences and larger feature maps than 64 places, 64 drawn at random are taken. A site with fewer places
    than others (a dense layer after convolutions) is looked at on more of the data. Raises ValueError for no data.
    """
    found: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    counted = dict.fromkeys(found, 0)
    draw = torch.Generator().manual_seed(0)
    with evaluating(model), capture(model, sites) as seen:
        for example in data:
            if min(counted.values()) >= tokens:
                break
            call(model, example)
            sequences = tensors(example)[0].shape[0]
            for site in sites:
                if counted[site.name] >= tokens:
                    continue
                h = by_sequence(site, seen[site.name], sequences)
                mask = real_places(example, sequences, h.shape[1])
                if mask is None and h.shape[1] > PLACES:
                    h = h[:, torch.randperm(h.shape[1], generator=draw)[:PLACES].sort().values.to(h.device)]
                kept = strength(site, h)[mask] if mask is not None else strength(site, h).flatten(0, 1)
                found[site.name].append(kept.cpu().to(torch.bfloat16))
                counted[site.name] += len(kept)
    if not any(counted.values()):
        raise ValueError("co-activation needs data: give at least one batch")
    return {name: torch.cat(parts)[:tokens] for name, parts in found.items()}


def coactivation(site: Site, a: Float[Tensor, "tokens width"]) -> Float[Tensor, "width width"]:
    """The matrix A of the neurons of a site, its diagonal zero; see the module."""
    a = a.float()
    if "gate" in site.reads:
        least = a.topk(max(1, int(FIRES * len(a))), dim=0).values[-1]
        fires = ((a >= least) & (a > 0)).float()
        joint = fires.T @ fires
    else:
        joint = torch.zeros(a.shape[1], a.shape[1])
        for part in a.split(16):  # a block of tokens at a time: the minimum is taken token by token
            joint += (part[:, :, None] * part[:, None, :]).clamp_max(1).sum(0)
    return joint.fill_diagonal_(0)


def correlation(a: Float[Tensor, "tokens width"]) -> Float[Tensor, "width width"]:
    """Correlation of the neurons' strengths over tokens; zero where one never changes."""
    a = a.float() - a.float().mean(0)
    a = a / a.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    return a.T @ a


def edge_threshold(joint: Float[Tensor, "width width"]) -> float:
    """0.99 of the first of the 10th, 20th, ... percentiles that is not zero; infinite where nothing is joined."""
    levels = np.percentile(joint.numpy(), np.arange(10, 101, 10))
    above = levels[levels > 0]
    return 0.99 * float(above[0]) if len(above) else float("inf")


def cut(joint: Float[Tensor, "width width"], parts: int, seed: int = 0) -> Int[Tensor, " width"]:
    """Labels of equal parts with few edges of A between them. Raises MissingExtra without pymetis."""
    try:
        import pymetis
    except ImportError as error:
        raise MissingExtra("cutting the graph of co-activation needs METIS: pip install pymetis") from error
    sizes = capacities(len(joint), parts)
    if parts == 1:
        return torch.zeros(len(joint), dtype=torch.long)
    kept = joint >= edge_threshold(joint)
    kept.fill_diagonal_(False)
    weights = (WEIGHTS * joint / joint.max().clamp_min(torch.finfo(torch.float32).tiny)).round().clamp_min(1).long()
    starts = torch.cat([torch.zeros(1, dtype=torch.long), kept.sum(1).cumsum(0)])
    _, labels = pymetis.part_graph(
        parts,
        pymetis.CSRAdjacency(starts.numpy(), kept.nonzero()[:, 1].numpy()),
        eweights=weights[kept].numpy(),
        options=pymetis.Options(seed=seed),
    )
    return evened(torch.as_tensor(labels), sizes, seed)
