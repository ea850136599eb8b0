"""Which can go, in how few bits?"""

from neuropil.compress.core_clusters import CoreClusters
from neuropil.compress.core_reports import semantic_similarity_report, stability_curve
from neuropil.compress.coreinfer import CoreInfer, core_neurons, only, restrict
from neuropil.compress.granet import GraNet
from neuropil.compress.plasticity import Plasticity, pruning_plasticity
from neuropil.compress.quantize import Quantizer, bake, calibrate, qat_prepare, quantize_model
from neuropil.compress.sparse import pack_sparse, prune_magnitude
from neuropil.compress.structured import neuron_scores, prune_neurons, remove_neurons

__all__ = [
    "CoreClusters",
    "CoreInfer",
    "GraNet",
    "Plasticity",
    "Quantizer",
    "bake",
    "calibrate",
    "core_neurons",
    "neuron_scores",
    "only",
    "pack_sparse",
    "prune_magnitude",
    "prune_neurons",
    "pruning_plasticity",
    "qat_prepare",
    "quantize_model",
    "remove_neurons",
    "restrict",
    "semantic_similarity_report",
    "stability_curve",
]
