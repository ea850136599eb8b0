"""Descriptions as columns of an atlas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from neuropil.interpret.milan.estimator import MILAN, Description
from neuropil.interpret.milan.exemplars import ExemplarSet, exemplars
from neuropil.neurons import Site

Columns = Callable[[Site], dict[str, Any]]


def description_columns(
    model: nn.Module, images: Any, milan: MILAN, *, keep: dict[str, ExemplarSet] | None = None, **settings: Any
) -> Columns:
    """For `Atlas.add`: site -> `description`, `description_score` (its WPMI, null where dead) and `dead`.

    The exemplars of a site are computed when it is asked for, with `settings` of `exemplars`, and put into `keep`
    under its name where that is given. A probe that can be gone through only once will not do for several sites.
    """

    def columns(site: Site) -> dict[str, Any]:
        found = exemplars(model, images, site, **settings)
        if keep is not None:
            keep[site.name] = found
        return as_columns(found, milan.describe(found))

    return columns


def described_columns(described: Mapping[str, tuple[ExemplarSet, list[Description]]]) -> Columns:
    """The same of descriptions that are there already, by the name of the site; KeyError for another."""

    def columns(site: Site) -> dict[str, Any]:
        if site.name not in described:
            raise KeyError(f"site {site.name!r} was not described; there are {', '.join(described)}")
        found, texts = described[site.name]
        if not torch.equal(found.units, torch.arange(site.width)):
            raise ValueError(f"site {site.name!r} has {site.width} units, and {len(found)} of them are described")
        return as_columns(found, texts)

    return columns


def as_columns(found: ExemplarSet, texts: list[Description]) -> dict[str, Any]:
    """One entry a unit."""
    dead = found.dead.tolist()
    scores = [None if d else t.score for d, t in zip(dead, texts, strict=True)]
    return {
        "description": pa.array([t.text for t in texts], pa.string()),
        "description_score": pa.array(scores, pa.float32()),
        "dead": pa.array(dead, pa.bool_()),
    }
