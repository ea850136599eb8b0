"""Other kinds of neuron."""

from neuropil.layers.bspline_kan import BSplineKAN
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
    "add_layer_norm",
    "fit_rational",
    "kat_base",
    "kat_small",
    "kat_tiny",
]
