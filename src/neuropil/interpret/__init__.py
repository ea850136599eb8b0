"""What do the neurons do?"""

from neuropil.interpret.bricks import partition_bricks
from neuropil.interpret.compare import Comparison, compare
from neuropil.interpret.decode import Decoder, decode
from neuropil.interpret.diagrams import circuit_diagram
from neuropil.interpret.geometry import (
    GeometryReport,
    GeometryStudy,
    geometry_columns,
    geometry_report,
    representation,
    representational_geometry,
)
from neuropil.interpret.milan import MILAN, ExemplarSet, exemplars
from neuropil.interpret.nested import NestedSystem
from neuropil.interpret.prototype_explanation import Explanation, Reference
from neuropil.interpret.prototype_images import ConvDecoder, ConvEncoder, ElasticDeformation
from neuropil.interpret.prototype_network import PrototypeLayer, PrototypeNetwork
from neuropil.interpret.prototype_quality import PrototypeQuality, prototype_quality
from neuropil.interpret.prototypes import PrototypeClassifier
from neuropil.interpret.rows import Decoded, decode_rows

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
    "circuit_diagram",
    "compare",
    "decode",
    "decode_rows",
    "exemplars",
    "geometry_columns",
    "geometry_report",
    "partition_bricks",
    "prototype_quality",
    "representation",
    "representational_geometry",
]
