"""What compression does to each neuron, as columns of an atlas.

    error_i = ‖w_i - ŵ_i‖ / ‖w_i‖        kept_i = share of w_i's nonzero weights that are still nonzero

over all weights w_i by which neuron i reads and writes. The first tells which neurons a quantizer hurts, the second
which a pruner would remove.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.compress.coreinfer import core_neurons
from neuropil.models import Model, load
from neuropil.neurons import Site, find_sites

Columns = Callable[[Site], dict[str, Any]]


def compression_columns(model: Model, compressed: nn.Module | Model, prefix: str) -> Columns:
    """For `Atlas.add`: site -> `{prefix}_error` and `{prefix}_kept`, one number a neuron.

    `compressed` is a copy of the same architecture whose neurons are all still there. Raises ValueError, when a site
    is asked for, where they are not.

    >>> from neuropil.compress import prune_magnitude
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> columns = compression_columns(load(net), prune_magnitude(net, 0.5).model, "half")
    >>> {name: tuple(values.shape) for name, values in columns(load(net).sites[0]).items()}
    {'half_error': (6,), 'half_kept': (6,)}
    """
    after = compressed if isinstance(compressed, Model) else load(compressed)
    widths = {site.name: site.width for site in after.sites}

    def columns(site: Site) -> dict[str, Tensor]:
        if widths.get(site.name) != site.width:
            raise ValueError(
                f"site {site.name!r} has {site.width} neurons, and {widths.get(site.name)} when compressed"
            )
        roles = (*site.reads, *(("down",) if site.write is not None else ()))
        old = torch.cat([model.rows(site, role) for role in roles], dim=1)
        new = torch.cat([after.rows(site, role) for role in roles], dim=1)
        error = (old - new).norm(dim=1) / old.norm(dim=1).clamp_min(torch.finfo(old.dtype).tiny)
        there = (old != 0).sum(1).clamp_min(1)
        kept = ((old != 0) & (new != 0)).sum(1) / there
        return {f"{prefix}_error": error, f"{prefix}_kept": kept}

    return columns


def importance_columns(scores: dict[str, Float[Tensor, " width"]], share: float, prefix: str) -> Columns:
    """For `Atlas.add`: a pruner's score of each neuron, and whether it would take it out at this share of each site."""

    def columns(site: Site) -> dict[str, Any]:
        score = scores[site.name]
        gone = torch.zeros(site.width, dtype=torch.bool)
        gone[score.argsort(stable=True)[: int(share * site.width)]] = True
        return {f"{prefix}_score": score, f"{prefix}_removed": gone}

    return columns


def core_columns(model: nn.Module, texts: Iterable[Any], keep: float, prefix: str) -> Columns:
    """For `Atlas.add`: in what share of the texts each neuron is one of the core neurons (`{prefix}_share`).

    `texts` are inputs of the model (texts, images), each with its own core set (see `neuropil.compress.core_neurons`).
    Where neurons cannot be left out (convolutions, experts) the column is empty.
    """
    counts: dict[str, Tensor] = {}
    number = 0
    widths = {site.name: site.width for site in find_sites(model)}
    everywhere = range(len(widths))
    for text in texts:
        number += 1
        for name, kept in core_neurons(model, text, keep=keep, layers=everywhere).items():
            counts.setdefault(name, torch.zeros(widths[name])).index_add_(0, kept, torch.ones(len(kept)))
    if not number:
        raise ValueError("core_columns(texts=...): there is no text; give at least one")

    def columns(site: Site) -> dict[str, Any]:
        count = counts.get(site.name)
        return {f"{prefix}_share": pa.nulls(site.width, pa.float32()) if count is None else count / number}

    return columns
