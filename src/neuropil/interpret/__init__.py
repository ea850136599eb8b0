"""What do the neurons do?"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from neuropil.interpret.compare import Comparison, compare
from neuropil.interpret.decode import Decoder, decode
from neuropil.interpret.rows import Decoded, decode_rows

if TYPE_CHECKING:
    from neuropil.interpret.bricks import partition_bricks
    from neuropil.interpret.diagrams import circuit_diagram
    from neuropil.interpret.geometry import GeometryReport, GeometryStudy, representation, representational_geometry
    from neuropil.interpret.milan import MILAN, ExemplarSet, exemplars
    from neuropil.interpret.nested import NestedSystem
    from neuropil.interpret.prototype_explanation import Explanation, Reference
    from neuropil.interpret.prototype_images import ConvDecoder, ConvEncoder, ElasticDeformation
    from neuropil.interpret.prototype_network import PrototypeLayer, PrototypeNetwork
    from neuropil.interpret.prototype_quality import PrototypeQuality
    from neuropil.interpret.prototypes import PrototypeClassifier
    from neuropil.interpret.shapley import ShapleyWorkflow, aspects

# What stands on scikit-learn, sympy or pandas is imported when it is asked for: an atlas does without those seconds.
_LATER = {
    "bricks": ("partition_bricks",),
    "diagrams": ("circuit_diagram",),
    "geometry": ("GeometryReport", "GeometryStudy", "representation", "representational_geometry"),
    "milan": ("MILAN", "ExemplarSet", "exemplars"),
    "nested": ("NestedSystem",),
    "prototype_explanation": ("Explanation", "Reference"),
    "prototype_images": ("ConvDecoder", "ConvEncoder", "ElasticDeformation"),
    "prototype_network": ("PrototypeLayer", "PrototypeNetwork"),
    "prototype_quality": ("PrototypeQuality",),
    "prototypes": ("PrototypeClassifier",),
    "shapley": ("ShapleyWorkflow", "aspects"),
}

__all__ = [
    "MILAN",
    "Comparison",
    "ConvDecoder",
    "ConvEncoder",
    "Decoded",
    "Decoder",
    "ElasticDeformation",
    "ExemplarSet",
    "Explanation",
    "GeometryReport",
    "GeometryStudy",
    "NestedSystem",
    "PrototypeClassifier",
    "PrototypeLayer",
    "PrototypeNetwork",
    "PrototypeQuality",
    "Reference",
    "ShapleyWorkflow",
    "aspects",
    "circuit_diagram",
    "compare",
    "decode",
    "decode_rows",
    "exemplars",
    "partition_bricks",
    "representation",
    "representational_geometry",
]


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            return getattr(import_module(f"neuropil.interpret.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
