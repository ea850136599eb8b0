"""Which can go, in how few bits?"""

from neuropil.compress.biper import BiPer, BiPerConv2d, BiPerLinear, binarize_model
from neuropil.compress.biper_error import quantization_error
from neuropil.compress.granet import GraNet
from neuropil.compress.ofq import LsqActivation, StatsQuantizer
from neuropil.compress.ofq_attention import QKRAttention
from neuropil.compress.ofq_models import CGA, ofq_bake, ofq_quantize
from neuropil.compress.oscillation import OscillationTracker
from neuropil.compress.plasticity import Plasticity, pruning_plasticity
from neuropil.compress.quantize import Quantizer, bake, calibrate, qat_prepare, quantize_model
from neuropil.compress.sparse import pack_sparse, prune_magnitude
from neuropil.compress.structured import neuron_scores, prune_neurons, remove_neurons

__all__ = [
    "CGA",
    "BiPer",
    "BiPerConv2d",
    "BiPerLinear",
    "GraNet",
    "LsqActivation",
    "OscillationTracker",
    "Plasticity",
    "QKRAttention",
    "Quantizer",
    "StatsQuantizer",
    "bake",
    "binarize_model",
    "calibrate",
    "neuron_scores",
    "ofq_bake",
    "ofq_quantize",
    "pack_sparse",
    "prune_magnitude",
    "prune_neurons",
    "pruning_plasticity",
    "qat_prepare",
    "quantization_error",
    "quantize_model",
    "remove_neurons",
]
