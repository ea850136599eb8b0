"""What do the neurons do?"""

from neuropil.interpret.compare import Comparison, compare
from neuropil.interpret.decode import Decoder, decode
from neuropil.interpret.milan import MILAN, ExemplarSet, exemplars
from neuropil.interpret.rows import Decoded, decode_rows

__all__ = [
    "MILAN",
    "Comparison",
    "Decoded",
    "Decoder",
    "ExemplarSet",
    "compare",
    "decode",
    "decode_rows",
    "exemplars",
]
