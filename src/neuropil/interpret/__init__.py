"""What do the neurons do?"""

from neuropil.interpret.bricks import partition_bricks
from neuropil.interpret.compare import Comparison, compare
from neuropil.interpret.decode import Decoder, decode

    "Comparison",
    "Decoded",
    "Decoder",
    "ExemplarSet",
    "MILAN",
    "compare",
    "decode",
    "decode_rows",
    "exemplars",
]
__all__ = [
__all__ = ["Comparison", "Decoded", "Decoder", "circuit_diagram", "compare", "decode", "decode_rows", "partition_bricks"]
from neuropil.interpret.diagrams import circuit_diagram
from neuropil.interpret.milan import MILAN, ExemplarSet, exemplars
from neuropil.interpret.rows import Decoded, decode_rows
