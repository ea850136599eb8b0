"""Which can go, in how few bits?"""

from neuropil.compress.granet import GraNet
from neuropil.compress.plasticity import Plasticity, pruning_plasticity

__all__ = ["GraNet", "Plasticity", "pruning_plasticity"]
