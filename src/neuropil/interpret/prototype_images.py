r"""The pair of convolutional networks and the elastic deformation with which prototypes were first shown.

Four convolutions of stride 2 halve an image, rounding up, to a code of a few numbers; four transposed ones bring a
code, such as a prototype, back to an image of exactly the same size, odd sizes included:

>>> import torch
>>> encoder, decoder = ConvEncoder((1, 28, 28)), ConvDecoder((1, 28, 28))
>>> encoder.sizes, encoder.code_size
(((28, 28), (14, 14), (7, 7), (4, 4), (2, 2)), 40)
>>> decoder(encoder(torch.rand(3, 1, 28, 28))).shape
torch.Size([3, 1, 28, 28])

`ElasticDeformation` bends images as a hand would: each pixel is fetched, by bilinear interpolation, from where a smooth
random field sends it.

>>> images = torch.rand(3, 1, 28, 28)
>>> bent = ElasticDeformation()(images)
>>> bent.shape == images.shape, torch.equal(ElasticDeformation(alpha=0.0)(images), images)
(True, True)

Filters are 3 x 3 with a padding of one pixel on each side. TensorFlow's "SAME" in the authors' code pads even sizes
below and to the right only, which gives the same sizes, shifted by a pixel.

Sources: Li, Liu, Chen and Rudin, "Deep Learning for Case-Based Reasoning through Prototypes", AAAI 2018,
arXiv:1710.04806, and its code; Simard, Steinkraus and Platt, "Best Practices for Convolutional Neural Networks Applied
to Visual Document Analysis", ICDAR 2003.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv1d

MAPS = (32, 32, 32, 10)
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "elu": nn.ELU}


def activation_named(name: str) -> nn.Module:
    """A new activation module. Raises ValueError for a name that is not in ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


class ConvEncoder(nn.Module):
    """Images to codes: 3 x 3 convolutions of stride 2, an activation after each, the last too.

    image_shape   (channels, height, width)
    maps          feature maps of each layer; the last times its height and width is the size of a code
    activation    "relu" (the authors' code), "sigmoid", "tanh" or "elu"
    init_std      filters begin as N(0, init_std^2), biases at 0
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        *,
        maps: tuple[int, ...] = MAPS,
        activation: str = "relu",
        init_std: float = 0.01,
    ) -> None:
        super().__init__()
        channels = _channels(image_shape, maps)
        self.image_shape, self.sizes = tuple(image_shape), halved(image_shape, len(maps))
        self.code_size = maps[-1] * math.prod(self.sizes[-1])
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [_filters(nn.Conv2d(before, after, 3, 2, 1), init_std), activation_named(activation)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n q"]:
        return self.layers(x).flatten(1)


class ConvDecoder(nn.Module):
    """Codes to images: the layers of `ConvEncoder` in the other direction; the last activation is a sigmoid.

    Arguments are those of the encoder; `maps` are given in the encoder's order.
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        *,
        maps: tuple[int, ...] = MAPS,
        activation: str = "relu",
        init_std: float = 0.01,
    ) -> None:
        super().__init__()
        channels = _channels(image_shape, maps)[::-1]
        sizes = halved(image_shape, len(maps))[::-1]
        self.image_shape, self.code_shape = tuple(image_shape), (maps[-1], *sizes[0])
        layers: list[nn.Module] = []
        for before, after, size in zip(channels, channels[1:], sizes[1:], strict=False):
            more = (1 - size[0] % 2, 1 - size[1] % 2)  # an even size is one more than what the stride alone gives
            layers += [
                _filters(nn.ConvTranspose2d(before, after, 3, 2, 1, output_padding=more), init_std),
                activation_named(activation),
            ]
        self.layers = nn.Sequential(*layers[:-1], nn.Sigmoid())

    def forward(self, z: Float[Tensor, "n q"]) -> Float[Tensor, "n c h w"]:
        return self.layers(z.unflatten(1, self.code_shape))


class ElasticDeformation:
    """Bend each image of a batch by its own smooth random displacement.

    Displacements are uniform noise in (-1, 1), smoothed by a Gaussian of `sigma` pixels (nothing outside the image)
    and multiplied by `alpha`; rows and columns have their own. What lies outside an image is its nearest edge pixel,
    so values stay within the image's own range; the authors' code has 0 there, which is the same for digits on black.

    generator     where the noise is drawn from; by default torch's own
    """

    def __init__(self, sigma: float = 4.0, alpha: float = 20.0, generator: torch.Generator | None = None) -> None:
        if not (sigma > 0 and math.isfinite(alpha)):
            raise ValueError(f"sigma={sigma} must be above 0 and alpha={alpha} finite")
        self.sigma, self.alpha, self.generator = sigma, alpha, generator

    def __call__(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        n, _, height, width = images.shape
        noise = torch.rand((n, 2, height, width), generator=self.generator, dtype=images.dtype, device=images.device)
        return displaced(images, self.alpha * smoothed(2 * noise - 1, self.sigma))


def smoothed(fields: Float[Tensor, "n c h w"], sigma: float) -> Float[Tensor, "n c h w"]:
    """Gaussian blur, cut at four sigma, zero outside: scipy's `gaussian_filter(mode="constant")` on each field."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=fields.dtype, device=fields.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).reshape(1, 1, -1)
    for axis in (-2, -1):
        lines = fields.movedim(axis, -1)
        blurred = conv1d(lines.reshape(-1, 1, lines.shape[-1]), kernel, padding=radius)
        fields = blurred.reshape(lines.shape).movedim(-1, axis)
    return fields


def displaced(images: Float[Tensor, "n c h w"], by: Float[Tensor, "n 2 h w"]) -> Float[Tensor, "n c h w"]:
    """Each pixel from (row + by[0], column + by[1]) of its image, bilinear, edge pixels repeated outwards."""
    _, channels, height, width = images.shape
    rows = torch.arange(height, dtype=by.dtype, device=by.device).unsqueeze(1) + by[:, 0]
    columns = torch.arange(width, dtype=by.dtype, device=by.device) + by[:, 1]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    top, left = rows.floor(), columns.floor()
    down, right = (rows - top).unsqueeze(1), (columns - left).unsqueeze(1)
    flat = images.flatten(2)

    def pixels(row: Tensor, column: Tensor) -> Tensor:
        index = row.long().clamp(max=height - 1) * width + column.long().clamp(max=width - 1)
        return flat.gather(2, index.flatten(1).unsqueeze(1).expand(-1, channels, -1)).reshape(images.shape)

    above = torch.lerp(pixels(top, left), pixels(top, left + 1), right)
    below = torch.lerp(pixels(top + 1, left), pixels(top + 1, left + 1), right)
    return torch.lerp(above, below, down)


def halved(image_shape: tuple[int, ...], layers: int) -> tuple[tuple[int, int], ...]:
    """Height and width before the first and after each layer of stride 2."""
    height, width = image_shape[1:]
    sizes = [(height, width)]
    for _ in range(layers):
        height, width = -(-height // 2), -(-width // 2)
        sizes.append((height, width))
    return tuple(sizes)


def _channels(image_shape: tuple[int, ...], maps: tuple[int, ...]) -> tuple[int, ...]:
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape={image_shape}: expected (channels, height, width), for MNIST (1, 28, 28)")
    if not maps or min(maps) < 1:
        raise ValueError(f"maps={maps}: expected the number of feature maps of each layer, such as {MAPS}")
    return (image_shape[0], *maps)


def _filters(layer: nn.Conv2d | nn.ConvTranspose2d, std: float) -> nn.Module:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
