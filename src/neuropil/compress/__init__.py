"""Which can go, in how few bits?"""

from neuropil.compress.activating import ActivateWhilePruning
from neuropil.compress.biper import BiPer, BiPerConv2d, BiPerLinear, binarize_model
from neuropil.compress.biper_error import quantization_error
from neuropil.compress.core_clusters import CoreClusters
from neuropil.compress.core_reports import semantic_similarity_report, stability_curve
from neuropil.compress.coreinfer import CoreInfer, core_neurons, only, restrict
from neuropil.compress.dead_neurons import DeadRate, DeadRates, dead_neuron_rate
from neuropil.compress.dimap import dimap_masks, dimap_neuron_scores, dimap_prune, dimap_prune_neurons, dimap_scores
from neuropil.compress.granet import GraNet
from neuropil.compress.jlcm import learn_codebooks
from neuropil.compress.masks import bake_masks, hold_masks
from neuropil.compress.nupes import nupes_quantize
from neuropil.compress.ofq import LsqActivation, StatsQuantizer
from neuropil.compress.ofq_attention import QKRAttention
from neuropil.compress.ofq_models import CGA, ofq_bake, ofq_quantize
from neuropil.compress.operations import Operations, count_operations
from neuropil.compress.oscillation import OscillationTracker
from neuropil.compress.plasticity import Plasticity, pruning_plasticity
from neuropil.compress.quantize import Quantizer, bake, calibrate, qat_prepare, quantize_model
from neuropil.compress.regularity import Regularity, packed_bytes, regularity, regularity_by_layer
from neuropil.compress.sparse import pack_sparse, prune_magnitude
from neuropil.compress.structured import neuron_scores, prune_neurons, remove_neurons
from neuropil.compress.support import BernoulliPrior, GroupPrior, HMMPrior
from neuropil.compress.turbo_vbi import TurboVBI
from neuropil.compress.variational_dropout import VariationalDropout

__all__ = [
    "CGA",
    "ActivateWhilePruning",
    "BernoulliPrior",
    "BiPer",
    "BiPerConv2d",
    "BiPerLinear",
    "CoreClusters",
    "CoreInfer",
    "DeadRate",
    "DeadRates",
    "GraNet",
    "GroupPrior",
    "HMMPrior",
    "LsqActivation",
    "Operations",
    "OscillationTracker",
    "Plasticity",
    "QKRAttention",
    "Quantizer",
    "Regularity",
    "StatsQuantizer",
    "TurboVBI",
    "VariationalDropout",
    "bake",
    "bake_masks",
    "binarize_model",
    "calibrate",
    "core_neurons",
    "count_operations",
    "dead_neuron_rate",
    "dimap_masks",
    "dimap_neuron_scores",
    "dimap_prune",
    "dimap_prune_neurons",
    "dimap_scores",
    "hold_masks",
    "learn_codebooks",
    "neuron_scores",
    "nupes_quantize",
    "ofq_bake",
    "ofq_quantize",
    "only",
    "pack_sparse",
    "packed_bytes",
    "prune_magnitude",
    "prune_neurons",
    "pruning_plasticity",
    "qat_prepare",
    "quantization_error",
    "quantize_model",
    "regularity",
    "regularity_by_layer",
    "remove_neurons",
    "restrict",
    "semantic_similarity_report",
    "stability_curve",
]
