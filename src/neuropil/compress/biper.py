r"""One-bit weights whose sign is that of a sine: the frequency sets the error, and the sine carries the gradient.

$b(w) = \mathrm{sign}(\sin \omega w)$ is a square wave of period $2\pi/\omega$, so a weight changes its sign wherever
it stands, not only at 0. Backward, the sign passes the gradient as it is and the sine multiplies it:
$\partial L / \partial w = \partial L / \partial b \cdot \omega \cos \omega w$. Training has two stages: in the
first the weights are $\sin \omega w$ (real) and the activations binary; the second goes on from there with $b(w)$.
A layer is

$$y = \alpha \odot (\mathrm{sign}(a / \mathrm{std}(a)) * b(w)) + \text{bias}$$

with a learned $\alpha$ for each output, drawn from U(0, 1), and the gradient $2 - 2|a|$ of the sign of activations.

>>> from neuropil.compress.quantize import bake
>>> from neuropil.packed import nbytes
>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Hardtanh(), nn.Linear(64, 64), nn.Linear(64, 10))
>>> changes = binarize_model(model)  # the first and the last layer stay real
>>> changes.changed
('3',)
>>> loss = changes.model(torch.randn(8, 64)).square().mean() + regularizer(changes.model, tau=0.037)
>>> loss.backward()  # ... and so on: stage 1
>>> set_stage(changes.model, 2)  # ... stage 2
1
>>> small = bake(changes.model.eval()).model
>>> nbytes(model[3]), nbytes(small[3])  # 64 x 64 bits, two levels, 64 scales, 64 biases, one epsilon
(16640, 1036)

`BiPer` is the parametrization alone; `BiPerLinear` and `BiPerConv2d` are layers made with it.

What the paper leaves open, or its code has otherwise: sign(0) is +1 (torch has 0), so that there are two levels. The
scale multiplies the weight rather than the product: the same numbers but for rounding, and a bias stays outside it. The
standard deviation is over the whole sample in convolutions, as in the code, and over each vector in linear layers, for
which the paper has none. The penalty has the sign that the authors' code has: it draws sin(w omega) to 0.

Source: Vargas, Correa, Hinojosa and Arguello, "BiPer: Binary Neural Networks using a Periodic Function", CVPR 2024,
arXiv:2404.01278.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuropil.changes import Changes
from neuropil.compress.quantize.grids import Levels
from neuropil.compress.quantize.models import layers, qat_prepare, round_inputs
from neuropil.compress.quantize.quantizer import FakeQuantizer, packing_of, straight_through
from neuropil.compress.quantize.sign_gradients import sign
from neuropil.compress.quantize.tiles import (
    QuantizationError,
    check_finite,
    from_tiles,
    tiling,
    to_tiles,
    working,
)
from neuropil.packed import Packing

OMEGA = 20.0


def biper(w: Float[Tensor, "*shape"], omega: float | Tensor = OMEGA, hard: bool = True) -> Float[Tensor, "*shape"]:
    """sign(sin(omega w)) with the gradient omega cos(omega w); with `hard=False` the sine itself.

    >>> w = torch.tensor([0.1, 0.2], requires_grad=True)
    >>> biper(w, 20.0).sum().backward()
    >>> biper(w.detach(), 20.0), w.grad
    (tensor([ 1., -1.]), tensor([ -8.3229, -13.0729]))
    """
    wave = torch.sin(omega * w)
    return straight_through(wave, _signs(wave)) if hard else wave


def _signs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


class BiPer(FakeQuantizer):
    """A weight as alpha sin(omega w) in stage 1, alpha sign(sin(omega w)) in stage 2: a parametrization.

    `for_layer(module)` makes one for a layer, with an alpha for each output channel where `scaled`; without a layer
    alpha is 1. The frequency and the stage are in the `state_dict`. `pack` keeps a bit a weight, and the scales.

    Raises QuantizationError for a frequency that is not positive, a stage other than 1 and 2, and for packing in
    stage 1, where weights are not binary.

    >>> layer = nn.Linear(8, 4)
    >>> _ = parametrize.register_parametrization(layer, "weight", BiPer(20.0, stage=2).for_layer(layer))
    >>> layer.weight[0].abs().unique().numel()
    1
    """

    omega: Tensor
    stage: Tensor
    alpha: Tensor | None

    def __init__(self, omega: float = OMEGA, stage: int = 1, scaled: bool = True) -> None:
        super().__init__()
        if not (omega > 0 and math.isfinite(omega)):
            raise QuantizationError(f"omega={omega}: the frequency is a positive number (the paper has 20)")
        self.scaled = scaled
        self.register_buffer("omega", torch.tensor(float(omega)))
        self.register_buffer("stage", torch.tensor(_stage(stage)))
        self.register_parameter("alpha", None)

    def settings(self) -> dict[str, Any]:
        return {"omega": float(self.omega), "stage": int(self.stage), "scaled": self.scaled}

    def for_layer(self, module: nn.Module) -> BiPer:
        made = super().for_layer(module)
        assert isinstance(made, BiPer)
        weight = module.weight
        assert isinstance(weight, Tensor)
        if self.scaled:
            tiles = tiling(weight.shape, "channel", made.axis, made.splits)
            made.alpha = nn.Parameter(torch.rand(tiles.scales, dtype=weight.dtype, device=weight.device))
        return made.to(weight.device)

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        wave = biper(w, self.omega, hard=int(self.stage) == 2)
        if self.alpha is None:
            return wave
        tiles = tiling(w.shape, "channel", self.axis, self.splits)
        return from_tiles(to_tiles(wave, tiles) * self.alpha[..., None], tiles, w.shape)

    def pack(self, w: Float[Tensor, "*shape"]) -> Packing:
        check_finite(w, "the weight")
        if int(self.stage) != 2:
            raise QuantizationError("in stage 1 weights are sines, not signs: call set_stage(model, 2), and train on")
        w = working(w)
        alpha = w.new_ones(1, 1) if self.alpha is None else self.alpha.detach()
        grid = Levels(alpha, w.new_tensor([[[-1.0, 1.0]]]), w.new_zeros(1, 1, 1))
        return packing_of(grid, (torch.sin(self.omega * w) >= 0).int())

    def extra_repr(self) -> str:
        return f"omega {float(self.omega):g}, stage {int(self.stage)}"


def _stage(stage: int) -> int:
    if stage not in (1, 2):
        raise QuantizationError(f"stage={stage}: expected 1 (weights are sines) or 2 (weights are signs)")
    return int(stage)


class SignInput(FakeQuantizer):
    """Signs of activations with the gradient max(0, 2 - 2|a|), where a is divided by its deviation in training.

    `core` is how many of the last dimensions make up a sample: 1 for vectors, 3 for images with channels. The mean is
    not taken off. In eval mode nothing is divided: the signs are the same. The epsilon is in the `state_dict`, so that
    a file of a binary model does not fit a model that reads real numbers.
    """

    eps: Tensor

    def __init__(self, core: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.core = core
        self.register_buffer("eps", torch.tensor(eps))

    def settings(self) -> dict[str, Any]:
        return {"core": self.core, "eps": float(self.eps)}

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.training:
            sample = tuple(range(-min(self.core, x.dim()), 0))
            count = math.prod(x.shape[d] for d in sample)
            x = x / (x.var(sample, correction=min(1, count - 1), keepdim=True) + self.eps).sqrt()
        return sign(x, "approx")


# --------------------------------------------------------------------------------------------------- layers


class BiPerLinear(nn.Linear):
    """A linear layer of binary weights and binary inputs (real ones with `binary_inputs=False`: ReLU networks).

    >>> layer = BiPerLinear(16, 4)
    >>> layer(torch.randn(2, 7, 16)).shape
    torch.Size([2, 7, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        omega: float = OMEGA,
        stage: int = 1,
        binary_inputs: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        _binarize(self, BiPer(omega, stage), binary_inputs)


class BiPerConv2d(nn.Conv2d):
    """A convolution of binary weights and binary inputs; arguments of `nn.Conv2d`, then those of BiPer.

    Weights begin by Kaiming's normal distribution, as in the authors' networks. Padding is with 0, as there.

    >>> layer = BiPerConv2d(4, 8, 3, padding=1, groups=2, bias=False, stage=2)
    >>> layer(torch.randn(2, 4, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self, *args: Any, omega: float = OMEGA, stage: int = 1, binary_inputs: bool = True, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        nn.init.kaiming_normal_(self.weight)
        _binarize(self, BiPer(omega, stage), binary_inputs)


def _binarize(module: nn.Module, quantizer: BiPer, inputs: bool) -> None:
    """Binarize one layer in place."""
    parametrize.register_parametrization(module, "weight", quantizer.for_layer(module))
    if inputs:
        round_inputs(module, SignInput(_core(module)), [""])


def _core(module: nn.Module) -> int:
    """The dimensions of one sample that a layer reads."""
    spatial = getattr(module, "kernel_size", None)
    return 1 if spatial is None else 1 + len(spatial)


# --------------------------------------------------------------------------------------------------- models


def binarize_model(
    model: nn.Module,
    omega: float | Mapping[str, float] = OMEGA,
    *,
    stage: int = 1,
    binary_inputs: bool = True,
    skip: Sequence[str] = ("first", "last"),
) -> Changes:
    """A copy whose linear layers and convolutions have binary weights and inputs, ready to be trained in two stages.

    Parameters
    ----------
    omega: the frequency, or one for each layer, by names or patterns: `{"0": 10.0, "*": 20.0}`.
    stage: 1, or 2 to train with signs from the start.
    binary_inputs: whether layers read signs; real inputs are for networks with ReLU.
    skip: names, patterns with * and ?, and the words "first" and "last" for the first and the last layer.

    Embeddings stay: they are read by token. So does the inside of `nn.MultiheadAttention`, which does not call its
    layers. Weights are kept as they are. `bake` (in `neuropil.compress`) ends the training.

    Raises QuantizationError for frequencies and stages out of range, NaN weights (named) and a packed model.
    """
    found, _ = layers(model)
    unfit = {name: why for name, module in found.items() if (why := _unfit(model, name, module, binary_inputs))}
    able = [name for name in found if name not in unfit]
    ends = {"first": able[:1], "last": able[-1:]}
    skipped = [name for word in skip for name in ends.get(word, [word])]
    each = dict(omega) if isinstance(omega, Mapping) else {"*": omega}
    recipe = {pattern: BiPer(value, stage) for pattern, value in each.items()}
    changes = qat_prepare(model, recipe, skip=[*skipped, *unfit])
    for name in changes.changed if binary_inputs else ():
        round_inputs(changes.model, SignInput(_core(changes.model.get_submodule(name))), [name])
    return Changes(changes.model, changes.changed, {**changes.left, **unfit})


def _unfit(model: nn.Module, name: str, module: nn.Module, binary_inputs: bool) -> str:
    if isinstance(module, nn.Embedding):
        return "an embedding is read by token: there is no product to make binary"
    parent = model.get_submodule(name.rpartition(".")[0])
    if binary_inputs and isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention does not call it, so its inputs would stay real"
    return ""


def binarizers(model: nn.Module) -> Iterator[tuple[str, BiPer, Tensor]]:
    """The binarized weights of a model: name of the layer, parametrization, latent weight. Tied ones once."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            chain: Any = module.parametrizations
            for step in chain["weight"]:
                if isinstance(step, BiPer) and id(step) not in seen:
                    seen.add(id(step))
                    yield name, step, chain["weight"].original


def set_stage(model: nn.Module, stage: int) -> int:
    """Put all binarized layers, in place, into stage 1 (sines) or 2 (signs); how many. Latent weights stay.

    Raises QuantizationError for another stage, and where nothing is binarized.
    """
    stage = _stage(stage)
    count = 0
    for _, step, _ in _some(model):
        step.stage.fill_(stage)
        count += 1
    return count


def _some(model: nn.Module) -> list[tuple[str, BiPer, Tensor]]:
    found = list(binarizers(model))
    if not found:
        raise QuantizationError("no layer of the model is binarized: call binarize_model first, or use BiPer layers")
    return found


def regularizer(model: nn.Module, tau: float) -> Float[Tensor, ""]:
    """The sum over layers of tau mean(sin^2(omega w)), to be added to the loss in both stages.

    The paper's code has tau = 0.037 and 0.0468 in its stages on CIFAR-10; on ImageNet see `tau_at`, then 0.
    """
    terms = [torch.sin(step.omega * w).square().mean() for _, step, w in _some(model)]
    return tau * torch.stack(terms).sum()


def tau_at(done: float, low: float = 0.85, high: float = 0.99) -> float:
    """ImageNet's tau when a share `done` of stage 1 is over: exponential from `low` to `high`.

    >>> tau_at(0.0), tau_at(1.0)
    (0.85, 0.99)
    """
    return low + (high - low) * math.expm1(done) / math.expm1(1.0)
