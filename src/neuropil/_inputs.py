"""What to feed a model, or a part of it, to see what it does with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 3


def model_inputs(model: nn.Module, device: str) -> Iterator[dict[str, Any] | tuple[Any, ...]]:
    """Inputs a model may take, likeliest first."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is not None and main is not None:
        yield from _named_inputs(model, config, main, device)
        return
    first = next((m for m in model.modules() if isinstance(m, nn.Embedding) or fan_in(m)), None)
    if isinstance(first, nn.Embedding):
        yield (torch.zeros(1, TOKENS, dtype=torch.long, device=device),)
    elif first is not None:
        yield from ((x,) for x in float_inputs(first, device))


def _named_inputs(model: nn.Module, config: Any, main: str, device: str) -> Iterator[dict[str, Any]]:
    ids = torch.ones(1, TOKENS, dtype=torch.long, device=device)
    vision = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or getattr(vision, "image_size", None) or 224
    high, wide = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    pixels = torch.zeros(1, getattr(config, "num_channels", None) or 3, high, wide, device=device)
    inputs: dict[str, Any] = {"pixel_values": pixels} if main == "pixel_values" else {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    yield {**inputs, "use_cache": False} if main == "input_ids" else inputs
    yield inputs
    if main == "pixel_values":
        for side in (32, 64, 224):
            yield {"pixel_values": torch.zeros(1, pixels.shape[1], side, side, device=device)}


def fan_in(module: nn.Module) -> int:
    for name in ("in_features", "in_channels", "nx"):
        fan = getattr(module, name, 0)
        if isinstance(fan, int) and fan:
            return fan
    weight = getattr(module, "weight", None)
    return weight.shape[-1] if isinstance(weight, Tensor) and weight.dim() == 2 else 0


def float_inputs(first: nn.Module, device: str) -> Iterator[Tensor]:
    fan = fan_in(first)
    if isinstance(first, nn.Conv2d):
        # A Linear that reads flattened feature maps fixes the size of the image.
        usual = (32, 28, 64, 224, 16, 96, 128, 256, 299)
        for side in (*usual, *(n for n in range(3, 64) if n not in usual)):
            yield torch.zeros(1, fan, side, side, device=device)
    elif isinstance(first, nn.Conv1d):
        for length in (32, 64, 128, 256, 16):
            yield torch.zeros(1, fan, length, device=device)
    elif isinstance(first, nn.Conv3d):
        yield torch.zeros(1, fan, 8, 16, 16, device=device)
    else:
        yield torch.zeros(1, TOKENS, fan, device=device)
        yield torch.zeros(TOKENS, fan, device=device)
