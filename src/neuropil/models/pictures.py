"""How a vision model takes its images: channels, size, normalisation, and what its outputs are called.

>>> from torch import nn
>>> from neuropil.models import load
>>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 10))
>>> load(net).image_input.fitted((28, 28)).size
(28, 28)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from neuropil._trace import trace
from neuropil.errors import ModelError

USUAL = (32, 28, 64, 224, 16, 96, 128, 256, 299)  # sides of images, where a model does not say


@dataclass(frozen=True)
class ImageInput:
    """What a vision model wants.

    channels, size   of its images; `size` None: not settled by the model
    mean, std        by which pixels in 0..1 are normalised, one number a channel
    classes          names of the model's outputs, where it has any
    flat             it takes each image as one row of numbers
    """

    channels: int
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    classes: tuple[str, ...] = ()
    flat: bool = False
    accepts: Any = None  # whether the model runs on images of a size

    def __call__(self, pixels: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n ..."]:
        """What the model is given for these pixels."""
        x = pixels.float() / 255
        x = (x - torch.tensor(self.mean).view(-1, 1, 1)) / torch.tensor(self.std).view(-1, 1, 1)
        return x.flatten(1) if self.flat else x

    def pictures(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n c h w"]:
        """What the model was given, as pictures in 0..1 again.

        >>> asked = ImageInput(3, (2, 2), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), flat=True)
        >>> pixels = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
        >>> torch.allclose(asked.pictures(asked(pixels)), pixels / 255, atol=1e-6)
        True
        """
        if self.flat and self.size is not None:
            x = x.unflatten(1, (self.channels, *self.size))
        mean, std = (torch.tensor(values, device=x.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (x * std + mean).clamp(0, 1)

    def fitted(self, natural: tuple[int, int]) -> ImageInput:
        """The same with a size: the model's own, else that of the images, else one the model runs on.

        Raises ModelError where the model runs on none.
        """
        if self.size is not None:
            return self
        for size in (natural, *((side, side) for side in USUAL)):
            if self.accepts is None or self.accepts(size):
                return replace(self, size=size)
        raise ModelError(
            f"no size of image fits this model (tried {natural[0]} x {natural[1]} and squares of {USUAL}); "
            "set model.image_input = ImageInput(channels, size=(height, width))"
        )


def image_input(skeleton: nn.Module, folder: Path | None) -> ImageInput | None:
    """How a model takes images; None for one that takes none."""
    config = getattr(skeleton, "config", None)
    main = getattr(skeleton, "main_input_name", None)
    if config is not None and main is not None:
        return _configured(skeleton, config, folder) if main == "pixel_values" else None
    first = next((m for m in skeleton.modules() if isinstance(m, nn.Embedding | nn.Linear) or _convolves(m)), None)
    if not isinstance(first, nn.Conv2d):
        return None
    own = getattr(skeleton, "image_size", None)
    size = (own, own) if isinstance(own, int) else own if isinstance(own, tuple) and len(own) == 2 else None
    return ImageInput(first.in_channels, size, accepts=lambda size: _runs(skeleton, first.in_channels, size))


def as_images(skeleton: nn.Module) -> ImageInput | None:
    """A network of linear maps read as one that takes images, each as a row of numbers: grey or of three colours."""
    first = next((m for m in skeleton.modules() if isinstance(m, nn.Embedding | nn.Linear) or _convolves(m)), None)
    if not isinstance(first, nn.Linear):
        return None
    for channels in (1, 3):
        side = round((first.in_features / channels) ** 0.5)
        if side > 3 and channels * side * side == first.in_features:
            flat = not _runs(skeleton, channels, (side, side))
            return ImageInput(channels, (side, side), flat=flat)
    return None


def _convolves(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _runs(skeleton: nn.Module, channels: int, size: tuple[int, int]) -> bool:
    try:
        trace(skeleton, (torch.zeros(1, channels, *size, device="meta"),), "meta", set())
    except Exception:  # any module may refuse in its own way
        return False
    return True


def _configured(skeleton: nn.Module, config: Any, folder: Path | None) -> ImageInput:
    channels = getattr(config, "num_channels", None) or 3
    found = _preprocessor(folder)
    size = next((s for s in _sizes(config, found) if s is not None), None)
    names = getattr(config, "id2label", None) or {}
    classes = tuple(str(names[i]) for i in sorted(names)) if hasattr(skeleton, "classifier") else ()
    named = bool(classes) and classes != tuple(f"LABEL_{i}" for i in range(len(classes)))
    mean, std = (0.0,) * channels, (1.0,) * channels
    if found.get("do_normalize", True) and found.get("image_mean") and found.get("image_std"):
        mean, std = (_each(found[key], channels) for key in ("image_mean", "image_std"))
    return ImageInput(
        channels, size, mean, std, classes if named else (), accepts=lambda s: _runs(skeleton, channels, s)
    )


def _each(values: float | list[float], channels: int) -> tuple[float, ...]:
    """One number a channel: a processor may keep three, or one, for images of any."""
    values = values if isinstance(values, list) else [values]
    return tuple(float(v) for v in (values * channels)[:channels])


def _sizes(config: Any, found: dict[str, Any]) -> Iterator[tuple[int, int] | None]:
    yield _square(getattr(config, "image_size", None))
    for key in ("crop_size", "size"):
        yield _square(found.get(key))


def _square(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        return (size["height"], size["width"]) if "height" in size else ((side, side) if side else None)
    return (int(size[-2]), int(size[-1])) if isinstance(size, list | tuple) and len(size) >= 2 else None


def _preprocessor(folder: Path | None) -> dict[str, Any]:
    """What `preprocessor_config.json` says of the images; nothing where there is none."""
    file = None if folder is None else folder / "preprocessor_config.json"
    if file is None or not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({error}); get the checkpoint again") from error
    return found if isinstance(found, dict) else {}
