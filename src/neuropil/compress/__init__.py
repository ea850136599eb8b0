"""Which can go, in how few bits?"""

from neuropil.compress.granet import GraNet
from neuropil.compress.plasticity import Plasticity, pruning_plasticity
from neuropil.compress.quantize import Quantizer, bake, calibrate, qat_prepare, quantize_model
from neuropil.compress.regularity import Regularity, packed_bytes, regularity, regularity_by_layer
from neuropil.compress.sparse import pack_sparse, prune_magnitude
from neuropil.compress.structured import neuron_scores, prune_neurons, remove_neurons
from neuropil.compress.support import BernoulliPrior, GroupPrior, HMMPrior
from neuropil.compress.turbo_vbi import TurboVBI
from neuropil.compress.variational_dropout import VariationalDropout

__all__ = [
    "BernoulliPrior",
    "GraNet",
    "GroupPrior",
    "HMMPrior",
    "Plasticity",
    "Quantizer",
    "Regularity",
    "TurboVBI",
    "VariationalDropout",
    "bake",
    "calibrate",
    "neuron_scores",
    "pack_sparse",
    "packed_bytes",
    "prune_magnitude",
    "prune_neurons",
    "pruning_plasticity",
    "qat_prepare",
    "quantize_model",
    "regularity",
    "regularity_by_layer",
    "remove_neurons",
]
