"""What compression does to each neuron, as columns of an atlas.

    error_i = ‖w_i - ŵ_i‖ / ‖w_i‖        kept_i = share of w_i's nonzero weights that are still nonzero

over all weights w_i by which neuron i reads and writes. The first tells which neurons a quantizer hurts, the second
which a pruner would remove.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.models import Model, load
from neuropil.neurons import Site

Columns = Callable[[Site], dict[str, Float[Tensor, " width"]]]


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
