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
from neuropil.layers.random_features import (
    RandomFeatureClassifier,
    RandomFeatureRegressor,
    RandomFeatures,
    bandlimit_lower_bound,
    diagnose_random_features,
    suggest_scale,
)
from neuropil.layers.ridgelet import (
    Spectrum,
    required_bandwidth,
    ridgelet_transform,
    spectrum_mass_outside,
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
    "RandomFeatureClassifier",
    "RandomFeatureRegressor",
    "RandomFeatures",
    "Spectrum",
    "add_layer_norm",
    "bandlimit_lower_bound",
    "diagnose_random_features",
    "fit_rational",
    "kat_base",
    "kat_small",
    "kat_tiny",
    "required_bandwidth",
    "ridgelet_transform",
    "spectrum_mass_outside",
    "suggest_scale",
]
