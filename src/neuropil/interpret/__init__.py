"""What do the neurons do?"""

from neuropil.interpret.compare import Comparison, compare
from neuropil.interpret.decode import Decoder, decode
from neuropil.interpret.diagrams import circuit_diagram
from neuropil.interpret.nested import NestedSystem
from neuropil.interpret.rows import Decoded, decode_rows

__all__ = [
    "Comparison",
    "Decoded",
    "Decoder",
    "NestedSystem",
    "circuit_diagram",
    "compare",
    "decode",
    "decode_rows",
]
