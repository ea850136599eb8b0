"""Which can go, in how few bits?"""

from neuropil.compress.granet import GraNet
from neuropil.compress.nupes import nupes_quantize
from neuropil.compress.plasticity import Plasticity, pruning_plasticity
from neuropil.compress.quantize import Quantizer, bake, calibrate, qat_prepare, quantize_model
from neuropil.compress.sparse import pack_sparse, prune_magnitude
from neuropil.compress.structured import neuron_scores, prune_neurons, remove_neurons

__all__ = [
    "GraNet",
    "Plasticity",
    "Quantizer",
    "bake",
    "calibrate",
    "neuron_scores",
    "nupes_quantize",
    "pack_sparse",
    "prune_magnitude",
    "prune_neurons",
    "pruning_plasticity",
    "qat_prepare",
    "quantize_model",
    "remove_neurons",
]
