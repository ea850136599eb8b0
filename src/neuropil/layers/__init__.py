"""Other kinds of neuron."""

from neuropil.layers.bspline_kan import BSplineKAN
from neuropil.layers.compander import WeightCompander, compand
from neuropil.layers.kat import (
    GRKAN,
    KAT,
    GRKANMlp,
    GroupRational,
    KATBlock,
    fit_rational,
    kat_base,
    kat_small,
    kat_tiny,
)
from neuropil.layers.layer_norm import (
    LayerNorm,
    LayerNormGRU,
    LayerNormGRUCell,
    LayerNormLinear,
    LayerNormLSTM,
    LayerNormLSTMCell,
    LayerNormRNN,
    LayerNormRNNCell,
    add_layer_norm,
)

__all__ = [
    "GRKAN",
    "KAT",
    "BSplineKAN",
    "GRKANMlp",
    "GroupRational",
    "KATBlock",
    "LayerNorm",
    "LayerNormGRU",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "LayerNormLinear",
    "LayerNormRNN",
    "LayerNormRNNCell",
    "WeightCompander",
    "add_layer_norm",
    "compand",
    "fit_rational",
    "kat_base",
    "kat_small",
    "kat_tiny",
]
