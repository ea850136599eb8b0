"""What do the neurons do?"""

from neuropil.interpret.compare import Comparison, compare
from neuropil.interpret.decode import Decoder, decode
from neuropil.interpret.geometry import (
    GeometryReport,
    GeometryStudy,
    geometry_columns,
    geometry_report,
    representation,
    representational_geometry,
)
from neuropil.interpret.rows import Decoded, decode_rows

__all__ = [
    "Comparison",
    "Decoded",
    "Decoder",
    "GeometryReport",
    "GeometryStudy",
    "compare",
    "decode",
    "decode_rows",
    "geometry_columns",
    "geometry_report",
    "representation",
    "representational_geometry",
]
