"""The images of a vision model's atlas: which drive a neuron, and where on them, drawn from what the atlas keeps."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DIMMED = 0.25  # brightness outside a region, as MILAN shows it
DIMMED_SMALL, SMALL, GAP = 0.45, 72, 6
LEAST = 168  # pixels of the shorter side of a picture with a region, for a soft edge of the region
OUTLINE = (245, 155, 76)


@dataclass(frozen=True)
class Exemplar:
    """One image that drives a neuron."""

    place: int  # its rank: 0 drives it most
    image: int
    name: str
    kind: str  # its class, "" where the images have none
    value: float
    share: float  # of the image that lies in the region


def exemplars(row: Mapping[str, Any], known: Mapping[int, Mapping[str, Any]]) -> list[Exemplar]:
    """The exemplars of one row of the atlas, as far as their images are there."""
    images, values = row.get("exemplar_images") or [], row.get("exemplar_values") or []
    masks = row.get("exemplar_masks") or []
    made = []
    for place, image in enumerate(images):
        if image not in known:
            continue
        value = values[place] if place < len(values) else math.nan
        share = float(region(masks[place]).mean()) if place < len(masks) else 1.0
        about = known[image]
        made.append(Exemplar(place, image, about["name"] or "", about["class"] or "", value, share))
    return made


def region(mask: str) -> np.ndarray:
    """A kept mask as a square of shares in 0..1.

    >>> region("0f80").tolist()
    [[0.0, 1.0], [0.5333333333333333, 0.0]]
    """
    cells = np.array([int(digit, 16) for digit in mask], dtype=np.float64) / 15
    side = math.isqrt(len(cells))
    return cells[: side * side].reshape(side, side)


def strip(drivers: Sequence[tuple[bytes, str]]) -> bytes:
    """Some pictures with their regions, small and side by side, as one PNG: a table shows very many."""
    from PIL import Image

    made = Image.new("RGBA", (len(drivers) * (SMALL + GAP) - GAP, SMALL))
    for place, (png, mask) in enumerate(drivers):
        picture = _lit(png, mask, small=True)
        left = place * (SMALL + GAP) + (SMALL - picture.width) // 2
        made.paste(picture, (left, (SMALL - picture.height) // 2))
    return _written(made)


def lit(png: bytes, mask: str) -> bytes:
    """A picture as PNG with what lies outside the region dimmed, and the region outlined.

    Of an image without a region nothing is dimmed.
    """
    return _written(_lit(png, mask, small=False))


def _written(picture: Any) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG", compress_level=3)
    return sink.getvalue()


def _lit(png: bytes, mask: str, small: bool) -> Any:
    """Small, it is dimmed less and has no outline."""
    from PIL import Image, ImageFilter

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    cells = region(mask)
    if not cells.any():
        cells = np.ones_like(cells)
    scale = max(1, math.ceil((SMALL if small else LEAST) / min(picture.size)))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    if small:
        picture.thumbnail((SMALL, SMALL), Image.Resampling.LANCZOS)
    inside = Image.fromarray((255 * cells).astype(np.uint8)).resize(picture.size, Image.Resampling.BILINEAR)
    edge = inside.point(lambda v: 255 if v > 127 else 0)
    share = np.asarray(inside, dtype=np.float64)[..., None] / 255
    dimmed = DIMMED_SMALL if small else DIMMED
    shown = np.asarray(picture, dtype=np.float64) * (dimmed + (1 - dimmed) * share)
    rim = np.asarray(edge.filter(ImageFilter.MaxFilter(3)), dtype=int) - np.asarray(edge, dtype=int) > 0
    if not small:
        shown[rim] = OUTLINE
    return Image.fromarray(shown.round().astype(np.uint8))
