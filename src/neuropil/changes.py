"""What a method that transforms a model did to it, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Changes:
    """The model, the names of the modules that were changed, and why each other candidate was left as it was.

    >>> changes = Changes(nn.Linear(2, 2), changed=("up_proj",), left={"conv": "not a Linear"})
    >>> print(changes)
    changed 1 module; left conv as it was (not a Linear)
    """

    model: nn.Module = field(repr=False)
    changed: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        said = f"changed {len(self.changed)} module{'s' if len(self.changed) != 1 else ''}"
        return "; ".join([said, *(f"left {name} as it was ({why})" for name, why in self.left.items())])
