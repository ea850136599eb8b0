"""What bricks say of each neuron, as columns of an atlas.

brick                    the neuron's brick in its layer (null where the layer has none)
brick_function           the function that the brick serves by the test of `BrickTest` (null where none)
predictivity_{function}  how well the neuron's activity tells the function's sequences from others
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from neuropil.interpret.bricks.functionality import Functionality
from neuropil.interpret.bricks.partition import Partition
from neuropil.interpret.bricks.testing import BrickTest
from neuropil.neurons import Site

BRICK, FUNCTION, PREDICTIVITY = "brick", "brick_function", "predictivity_{}"
TYPES = {BRICK: pa.int32(), FUNCTION: pa.string()}


def column_name(function: str) -> str:
    """The column of a function's predictivity.

    >>> column_name("genre/Science fiction")
    'predictivity_genre_science_fiction'
    """
    return PREDICTIVITY.format(re.sub(r"[^a-z0-9]+", "_", function.lower()).strip("_"))


def column_names(functions: Iterable[str]) -> list[str]:
    """The columns of predictivity of some functions. Raises ValueError where two would share one."""
    names = [column_name(name) for name in functions]
    if len(set(names)) < len(names):
        raise ValueError(f"two functions would share a column: {names}; give them names of other letters and digits")
    return names


def brick_columns(parts: Partition, found: Functionality, tested: BrickTest) -> Callable[[Site], dict[str, Any]]:
    """For `Atlas.add(..., types=TYPES)`: site -> `brick`, `brick_function` and `predictivity_{function}`.

    Each sub-function has its column. Raises ValueError where two functions would share one.
    """
    names = column_names(found.names)

    def columns(site: Site) -> dict[str, Any]:
        if site.name not in parts.labels or site.name not in found.predictivity:
            unknown: Float[Tensor, " width"] = torch.full((site.width,), torch.nan)
            return {BRICK: [None] * site.width, FUNCTION: [None] * site.width, **dict.fromkeys(names, unknown)}
        labels = parts.labels[site.name]
        serves = tested.functions_of(site.name)
        values = found.predictivity[site.name].float()
        return {
            BRICK: labels.int(),
            FUNCTION: [serves[label] for label in labels.tolist()],
            **{name: values[row] for row, name in enumerate(names)},
        }

    return columns
