r"""Weights and activations in few bits: each class of method that the survey names, as a small function to compose.

>>> import torch
>>> from torch import nn
>>> from torch.nn.utils import parametrize
>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
>>> x = torch.randn(8, 64)

After training, with real bytes (`neuropil.packed`):

>>> from neuropil.packed import nbytes
>>> changes = quantize_model(model, Quantizer(4, "affine", ("group", 32)))
>>> nbytes(model), nbytes(changes.model)
(19240, 3848)

As a parametrization, for training with rounded weights:

>>> layer = nn.Linear(64, 64)
>>> _ = parametrize.register_parametrization(layer, "weight", Quantizer(2, granularity="channel", observer="mse"))
>>> layer.weight[0].unique().numel()
4

A uniform grid of b bits rounds $r$ to $S (q - z)$, $q = \mathrm{clip}(\mathrm{round}(r / S) + z)$; the survey writes
$Z = -z$.

Source: Gholami, Kim, Dong, Yao, Mahoney and Keutzer, "A Survey of Quantization Methods for Efficient Neural Network
Inference", 2021, arXiv:2103.13630.
"""

from neuropil.compress.quantize.binary import TTQ, BinaryWeight, LossAwareBinary, clip_masters
from neuropil.compress.quantize.binary_codes import BinaryCodes
from neuropil.compress.quantize.deep import MaskedQuantizer, deep_compress
from neuropil.compress.quantize.gradients import (
    GumbelQuantizer,
    ProxQuant,
    SoftQuantizer,
    grid_distance,
    sine_penalty,
    soft_round,
)
from neuropil.compress.quantize.grids import Levels, Uniform, stochastic_round, uniform
from neuropil.compress.quantize.importance import fisher_diagonal, hessian_quantize
from neuropil.compress.quantize.learned import LSQ, PACT, QIL, LearnedLevels, LSQPlus
from neuropil.compress.quantize.low_precision import LowPrecision
from neuropil.compress.quantize.methods import Method, list_methods
from neuropil.compress.quantize.models import (
    RECIPES,
    bake,
    calibrate,
    layers,
    pack_layers,
    qat_prepare,
    quantize_model,
    quantizer_for,
    round_inputs,
    run_batches,
)
from neuropil.compress.quantize.noise import QuantNoise, stochastic_signs
from neuropil.compress.quantize.nonuniform import kmeans
from neuropil.compress.quantize.observers import Observer
from neuropil.compress.quantize.quantizer import FakeQuantizer, Quantizer, packing_of, straight_through
from neuropil.compress.quantize.sign_gradients import ABCActivation, RPReLU, Sign, sign
from neuropil.compress.quantize.tiles import QuantizationError, channels_of, from_tiles, tiling, to_tiles
from neuropil.compress.quantize.vectors import ProductQuantizer, finetune_codebooks, product_quantize
from neuropil.compress.quantize.xnor import XNORConv2d, XNORLinear

__all__ = [
    "LSQ",
    "PACT",
    "QIL",
    "RECIPES",
    "TTQ",
    "ABCActivation",
    "BinaryCodes",
    "BinaryWeight",
    "FakeQuantizer",
    "GumbelQuantizer",
    "LSQPlus",
    "LearnedLevels",
    "Levels",
    "LossAwareBinary",
    "LowPrecision",
    "MaskedQuantizer",
    "Method",
    "Observer",
    "ProductQuantizer",
    "ProxQuant",
    "QuantNoise",
    "QuantizationError",
    "Quantizer",
    "RPReLU",
    "Sign",
    "SoftQuantizer",
    "Uniform",
    "XNORConv2d",
    "XNORLinear",
    "bake",
    "calibrate",
    "channels_of",
    "clip_masters",
    "deep_compress",
    "finetune_codebooks",
    "fisher_diagonal",
    "from_tiles",
    "grid_distance",
    "hessian_quantize",
    "kmeans",
    "layers",
    "list_methods",
    "pack_layers",
    "packing_of",
    "product_quantize",
    "qat_prepare",
    "quantize_model",
    "quantizer_for",
    "round_inputs",
    "run_batches",
    "sign",
    "sine_penalty",
    "soft_round",
    "stochastic_round",
    "stochastic_signs",
    "straight_through",
    "tiling",
    "to_tiles",
    "uniform",
]
