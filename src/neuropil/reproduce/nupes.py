"""Power-law grids, searched without data and learned with some (Yvinec et al. 2023, arXiv:2308.05600, 2301.09858).

Without data: all matrices of SmolLM2's blocks rounded to 4 and 3 bits, a scale a tensor or a channel, on the uniform
grid and on power grids; measured by the mean surprise on English text. With data: a convolutional network trained on
Fashion-MNIST, its inner layers rounded to 3 and 2 bits (and what layers read to 4) to the nearest, by AdaRound, and by
NUPES without and with learned exponents, from 512 images without labels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from neuropil import evaluate
from neuropil.compress.nupes import nupes_quantize
from neuropil.compress.quantize import Quantizer, quantize_model
from neuropil.compress.quantize.models import calibrate, round_inputs
from neuropil.compress.quantize.rounding import learn_rounding
from neuropil.data import digits, fashion_mnist
from neuropil.data.texts import text
from neuropil.models import load
from neuropil.packed import unpack
from neuropil.report import Measurement, Report, Row, Scale, find
from neuropil.reproduce.harness import Meter, runner
