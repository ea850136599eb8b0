"""What do the neurons do?"""

from neuropil.interpret.bricks import partition_bricks
from neuropil.interpret.compare import Comparison, compare
from neuropil.interpret.decode import Decoder, decode
from neuropil.interpret.diagrams import circuit_diagram
from neuropil.interpret.milan import MILAN, ExemplarSet, exemplars
from neuropil.interpret.rows import Decoded, decode_rows

__all__ = [
    "MILAN",
    "Comparison",
    "Decoded",
    "Decoder",
    "ExemplarSet",
    "circuit_diagram",
    "compare",
    "decode",
    "decode_rows",
    "exemplars",
    "partition_bricks",
]
