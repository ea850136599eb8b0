"""What do the neurons do?"""

from typing import TYPE_CHECKING, Any

from neuropil.interpret.compare import Comparison, compare
from neuropil.interpret.decode import Decoder, decode
from neuropil.interpret.rows import Decoded, decode_rows

if TYPE_CHECKING:
    from neuropil.interpret.shapley import ShapleyWorkflow, aspects

__all__ = [
    "Comparison",
    "Decoded",
    "Decoder",
    "ShapleyWorkflow",
    "aspects",
    "compare",
    "decode",
    "decode_rows",
]


def __getattr__(name: str) -> Any:
    # What stands on scikit-learn is imported when it is asked for: an atlas does without that second.
    if name in ("ShapleyWorkflow", "aspects"):
        from importlib import import_module

        return getattr(import_module("neuropil.interpret.shapley"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
