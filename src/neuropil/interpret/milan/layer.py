"""Any layer of any network as feature maps `[batch, units, height, width]`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from neuropil._taps import tapped
from neuropil.errors import ModelError, NeuropilError
from neuropil.neurons import Site, Tap

Reshape = Callable[[Tensor], Tensor]


class UnknownLayer(NeuropilError, LookupError):  # noqa: N818
    """A name that no module of this model has."""


def tokens_to_grid(prefix: int = 1, grid: tuple[int, int] | None = None) -> Reshape:
    """A reshape for `exemplars`: tokens `[batch, tokens, units]` without the first `prefix` ones, as maps.

    A ViT has one token before the patches (CLS), one with four registers five, a Swin none. `grid` is the number of
    patches down and across where the image is not square.

    >>> import torch
    >>> tokens = torch.arange(10.0).reshape(1, 5, 2)  # CLS, then 2 x 2 patches of two units
    >>> tokens_to_grid()(tokens)[0, 0]
    tensor([[2., 4.],
            [6., 8.]])
    """

    def reshape(h: Float[Tensor, "batch tokens units"]) -> Float[Tensor, "batch units height width"]:
        patches = h.shape[1] - prefix
        high, wide = grid or (math.isqrt(max(patches, 0)),) * 2
        if patches < 1 or high * wide != patches:
            raise ValueError(
                f"{h.shape[1]} tokens less {prefix} before the patches are no grid of {high} x {wide}; give "
                "reshape=tokens_to_grid(prefix=..., grid=(height, width))"
            )
        return h[:, prefix:].transpose(1, 2).unflatten(2, (high, wide))

    return reshape


def check_layer(model: nn.Module, layer: str | Site) -> Tap:
    """Where the layer's output passes; raises UnknownLayer with the nearest names."""
    if isinstance(layer, Site):
        return layer.tap
    names = [name for name, _ in model.named_modules() if name]
    if layer in names:
        return Tap(layer, side="output", axis=1)
    near = difflib.get_close_matches(layer, names, n=5, cutoff=0.3)
    near += [name for name in names if layer and layer in name and name not in near][:5]
    raise UnknownLayer(
        f"no layer {layer!r} in this {type(model).__name__}; near names: {', '.join(near or names[:10]) or 'none'}. "
        "model.named_modules() lists all; a neuropil Site does as well"
    )


def as_maps(h: Any, batch: int, channels_last: bool, reshape: Reshape | None, name: str) -> tuple[Tensor, bool]:
    """`[batch, units, height, width]` of whatever a layer gave, and whether it has no places (fully connected)."""
    if not isinstance(h, Tensor):
        raise ModelError(f"layer {name!r} gives a {type(h).__name__}, not a tensor; choose a layer inside it")
    if reshape is not None:
        h = reshape(h)
    elif h.dim() == 3 and h.shape[0] == batch:
        h = _tokens(h, name)
    elif h.dim() == 4 and channels_last:
        h = h.movedim(-1, 1)
    flat = h.dim() == 2
    if flat:
        h = h[:, :, None, None]
    if h.dim() != 4 or h.shape[0] != batch:
        raise ModelError(
            f"layer {name!r} gives {list(h.shape)} for {batch} images; expected [batch, units, height, width] or "
            "[batch, units]. Give reshape=, a function to that shape (for tokens: tokens_to_grid(prefix=...))"
        )
    if not h.isfinite().all():
        raise ModelError(f"layer {name!r} gives NaN or infinity; the model or its input is broken there")
    return h.detach().float(), flat


def _tokens(h: Tensor, name: str) -> Tensor:
    """Patches with or without one token before them; one of the two is a square, or neither."""
    for prefix in (0, 1):
        patches = h.shape[1] - prefix
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            return tokens_to_grid(prefix)(h)
    raise ModelError(
        f"layer {name!r} gives {h.shape[1]} tokens, with or without CLS no square; give "
        "reshape=tokens_to_grid(prefix=..., grid=(height, width))"
    )


@contextmanager
def seen_layer(model: nn.Module, layer: str | Site) -> Iterator[list[Any]]:
    """A list that holds, after a forward pass, what the layer gave."""
    tap = check_layer(model, layer)
    seen: list[Any] = []
    if isinstance(layer, Site):
        with tapped(model, [(tap, layer.width, lambda h: seen.append(h.detach()))]):
            yield seen
        return

    def look(_: nn.Module, __: Any, out: Any) -> None:
        first = out[0] if isinstance(out, tuple | list) else out
        seen.append(first if isinstance(first, Tensor) else getattr(first, "last_hidden_state", first))

    handle = model.get_submodule(layer).register_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()
