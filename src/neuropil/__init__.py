"""See, shrink, grow, build, train and measure neural networks one neuron at a time.

    from neuropil import Atlas, load
    from neuropil.build import build_atlas

    build_atlas(load("smollm2"), "atlases/smollm2")
    with Atlas.open("atlases/smollm2") as atlas:
        print(atlas.find("dog").to_pylist()[0])

Names are imported when they are first used, so that `import neuropil` takes milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuropil.atlas import Atlas
    from neuropil.models import load
    from neuropil.neurons import Neuron, Site, capture, clamp, find_sites

__version__ = "0.1.0"

__all__ = ["Atlas", "Neuron", "Site", "capture", "clamp", "find_sites", "load"]

_HOMES = {"Atlas": "neuropil.atlas", "load": "neuropil.models"} | dict.fromkeys(
    ("Neuron", "Site", "capture", "clamp", "find_sites"), "neuropil.neurons"
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'neuropil' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
