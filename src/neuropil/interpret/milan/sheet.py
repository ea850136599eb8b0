"""Folders of pictures as a probe, and descriptions as a table and a page to look at."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neuropil.errors import NeuropilError
from neuropil.interpret.milan.estimator import Description
from neuropil.interpret.milan.exemplars import ExemplarSet
from neuropil.models import ImageInput

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
FIELDS = ("layer", "unit", "dead", "description", "score", "threshold", "images")


class Pictures(Sequence[Tensor]):
    """The pictures below a folder, by name, as bytes of one size: each is `[channels, height, width]`.

    The shorter side is brought to `size`, and the middle cut out. Raises NeuropilError where there is no picture.
    """

    def __init__(self, folder: str | Path, size: tuple[int, int], channels: int = 3) -> None:
        self.folder, self.size, self.channels = Path(folder), size, channels
        self.paths = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise NeuropilError(f"{folder}: no picture is in this folder; expected files in {', '.join(SUFFIXES)}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(path.relative_to(self.folder)) for path in self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: Any) -> Any:
        from PIL import Image, ImageOps

        try:
            with Image.open(self.paths[place]) as file:
                picture = file.convert("RGB" if self.channels == 3 else "L")
        except OSError as error:
            raise NeuropilError(f"{self.paths[place]} is no picture that can be read ({error}); remove it") from error
        high, wide = self.size
        x = torch.from_numpy(np.array(ImageOps.fit(picture, (wide, high), Image.Resampling.BICUBIC)))
        return x.reshape(high, wide, self.channels).permute(2, 0, 1)


class Shown(torch.utils.data.Dataset):
    """Pictures as bytes, each as the model takes it: the data set that `exemplars` goes through; `show` undoes it."""

    def __init__(self, pixels: Sequence[Tensor] | Tensor, names: Sequence[str], wanted: ImageInput) -> None:
        self.pixels, self.names, self.wanted = pixels, tuple(names), wanted

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, place: int) -> Tensor:
        return self.wanted(self.pixels[place][None])[0]

    def show(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n c h w"]:
        """What the model was given, as pictures in 0..1 again."""
        return self.wanted.pictures(x)


def write_table(
    path: str | Path, described: Iterable[tuple[ExemplarSet, list[Description]]], names: Sequence[str] | None = None
) -> Path:
    """A line a unit; `names` are those of the probe's pictures, their numbers otherwise."""
    path = Path(path)
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(FIELDS)
        for found, texts in described:
            rows = zip(
                found.units.tolist(), found.dead.tolist(), texts, found.threshold.tolist(), found.image_ids.tolist(),
                strict=True,
            )  # fmt: skip
            for unit, dead, text, threshold, ids in rows:
                images = ";".join(str(i) if names is None else names[i] for i in ids)
                score = "" if dead else f"{text.score:.4f}"
                lines.writerow([found.layer, unit, dead, text.text, score, f"{threshold:.6g}", images])
    return path


def write_sheet(
    path: str | Path, described: Iterable[tuple[ExemplarSet, list[Description]]], title: str, columns: int = 5
) -> Path:
    """One HTML page, whole in itself: each unit's exemplars, dimmed outside their regions, and its description."""
    path = Path(path)
    with path.open("w", encoding="utf-8") as file:
        file.write(_HEAD.format(title=html.escape(title)))
        for found, texts in described:
            file.write(f"<h2>{html.escape(found.layer)}</h2><main>")
            for row, text in enumerate(texts):
                file.write(_unit(found, row, text, columns))
            file.write("</main>")
    return path


def _unit(found: ExemplarSet, row: int, text: Description, columns: int) -> str:
    said = html.escape(text.text) or "<i>dead: never above its own threshold</i>"
    score = f" <small>{text.score:.2f}</small>" if text.text else ""
    source = _jpeg(found.grid(row, columns))
    unit = int(found.units[row])
    return (
        f'<figure><img loading="lazy" src="data:image/jpeg;base64,{source}" alt="exemplars of unit {unit}">'
        f"<figcaption><b>{unit}</b> {said}{score}</figcaption></figure>\n"
    )


def _jpeg(picture: Tensor, side: int = 480) -> str:
    from PIL import Image

    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    scale = side / image.width
    file = io.BytesIO()
    kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    image.resize((side, round(image.height * scale)), kind).save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }} img {{ width: 100%; display: block; border-radius: 4px; }}
small {{ opacity: 0.6; }}
</style></head><body><h1>{title}</h1>
<p>The pictures that drive each unit most, dark where they do not; what they have in common, and its score.</p>
"""
