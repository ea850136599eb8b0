"""Sets of images on which a vision model's neurons are looked at: a probe.

>>> found = probe("photos", channels=3, size=(32, 32))
>>> len(found) > 100, found.pixels.shape[1:], found.pixels.dtype, found.labels is None
(True, torch.Size([3, 32, 32]), torch.uint8, True)
>>> found.names[0]
'china.jpg 427x427+0+0'

Three kinds: `photos` cuts crops, always the same ones, out of the photographs that scikit-learn, matplotlib and (where
it is installed) scikit-image carry; `fashion-mnist` and `digits` take test images, as many of each class; a folder's
images are its files, with a class for each subfolder that holds some. All are brought to the model's own size.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from neuropil import _parts
from neuropil.data.images import SETS, image_set
from neuropil.errors import AtlasError, MissingAsset, ModelError
from neuropil.models.assets import package_dir

FILE = "probe.parquet"  # in the folder of an atlas
SHOWN = 128  # pixels of the longer side of the pictures kept there
LIMIT = 1000  # images of a set or of a folder, unless told
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Photographs only: no drawings, no medical or microscope images.
PHOTOS = {
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    "skimage": tuple(
        f"data/{name}"
        for name in (
            "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "color.png",
            "grass.png", "gravel.png", "motorcycle_left.png", "rocket.jpg",
        )
    ),
}  # fmt: skip
CROPS = (1.0, 0.6, 0.35)  # sides of the crops, as shares of a photograph's shorter side
_CROP = re.compile(r" \d+x\d+\+\d+\+\d+$")  # what the name of a crop has after that of its photograph


@dataclass(frozen=True)
class Probe:
    """Images as bytes `[n, channels, height, width]`; `labels` are indices into `classes`, None where there are none.

    `name` tells the set, `names` where each image comes from.
    """

    name: str
    pixels: UInt8[Tensor, "n c h w"]
    names: tuple[str, ...]
    labels: Int[Tensor, " n"] | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    @cached_property
    def digest(self) -> str:
        """16 hex digits of the images and labels, by which two probes are told apart."""
        hasher = hashlib.blake2b(self.pixels.contiguous().numpy().tobytes(), digest_size=8)
        hasher.update(repr((self.classes, None if self.labels is None else self.labels.tolist())).encode())
        return hasher.hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """What an atlas remembers of the images its columns come from."""
        return {"images": self.name, "count": len(self), "size": list(self.pixels.shape[1:]), "digest": self.digest}

    def part(self, chosen: Sequence[int]) -> Probe:
        """Some of the images, by their places."""
        chosen = list(chosen)
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, pixels=self.pixels[chosen], names=tuple(self.names[i] for i in chosen), labels=labels)

    def halves(self) -> tuple[Probe, Probe]:
        """Every other image, and the rest; of crops, every other photograph, since those of one show the same things.

        Raises ValueError for fewer than two images (photographs).

        >>> one, other = probe("digits", 1, (8, 8), limit=20).halves()
        >>> len(one), len(other), set(one.names) & set(other.names)
        (10, 10, set())
        """
        numbers: dict[Any, int] = {}
        for i, name in enumerate(self.names):
            numbers.setdefault(self._source(i, name), len(numbers))
        if len(numbers) < 2:
            raise ValueError(f"{self.name}: {len(self)} images of one source cannot be halved; give two at least")
        odd = [numbers[self._source(i, name)] % 2 for i, name in enumerate(self.names)]
        return tuple(self.part([i for i, side in enumerate(odd) if side == wanted]) for wanted in (0, 1))  # type: ignore[return-value]

    @staticmethod
    def _source(place: int, name: str) -> Any:
        """What an image is cut out of: its photograph, or nothing but itself."""
        cut = _CROP.sub("", name)
        return place if cut == name else cut

    def save(self, folder: Path) -> None:
        """The images into an atlas, as PNG in one Parquet file, for showing: at most 128 pixels a side."""
        _parts.atomic_write(folder / FILE, _parts.to_bytes(self._table()))

    def _table(self) -> pa.Table:
        classes = [None] * len(self) if self.labels is None else [self.classes[i] for i in self.labels.tolist()]
        return pa.table(
            {
                "image": pa.array(range(len(self)), pa.int32()),
                "name": pa.array(self.names, pa.string()),
                "class": pa.array(classes, pa.string()),
                "png": pa.array([_png(each) for each in self.pixels], pa.binary()),
            }
        ).replace_schema_metadata({"probe": self.name, "digest": self.digest})


def probe(source: str | Path, channels: int, size: tuple[int, int], limit: int = LIMIT) -> Probe:
    """Images by name ("photos", "fashion-mnist", "digits") or from a folder, for a model that takes such images.

    Of more than `limit` images, so many evenly spaced ones are taken: of a named set as many of each class. Raises
    MissingAsset as the sets do, ModelError for a folder without images or with a file that is none, ValueError for
    other channels than 1 (grey) and 3 (colour).
    """
    if channels not in (1, 3):
        raise ValueError(
            f"this model takes images of {channels} channels; give your own: images=Probe(name, pixels, ...)"
        )
    if source == "photos":
        return _cut(channels, size, limit)
    if source in SETS:
        return _labelled(str(source), channels, size, limit)
    return _folder(Path(source).expanduser(), channels, size, limit)


def stored(folder: Path) -> pa.Table | None:
    """The images of an atlas: `image`, `name`, `class`, `png`; None where it has none. AtlasError if damaged."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        if _parts.broken(file, deep=True):
            raise OSError("its bytes are not as they were written")
        return pq.read_table(file)
    except (OSError, pa.ArrowException) as bad:
        raise AtlasError(f"{file} is damaged ({bad}); run the same `neuropil atlas` again") from bad


def kept(folder: Path, size: tuple[int, int]) -> tuple[Probe, bool]:
    """The images of an atlas at the size a model takes, and whether they are the very ones it was shown.

    Larger ones than an atlas keeps are made again where they are of a named set, and enlarged otherwise: then the
    answer is False. Classes are left out. Raises AtlasError where the atlas has no images.
    """
    table = stored(folder)
    if table is None:
        raise AtlasError(f"{folder} holds no images; give some (a folder of pictures, photos, {', '.join(SETS)})")
    about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    name, images = about.get("probe", ""), [_decoded(each) for each in table["png"].to_pylist()]
    if tuple(images[0].shape[1:]) == size:
        return Probe(name, torch.stack(images), tuple(table["name"].to_pylist())), True
    if name in ("photos", *SETS):
        again = probe(name, len(images[0]), size, len(images))
        if again.digest == about.get("digest"):
            return again, True
    large = [torch.nn.functional.interpolate(each[None].float(), size, mode="bicubic")[0] for each in images]
    pixels = torch.stack(large).round().clamp(0, 255).to(torch.uint8)
    return Probe(name, pixels, tuple(table["name"].to_pylist())), False


def stored_digest(folder: Path) -> str:
    """The digest of the probe whose images an atlas holds; "" where it has none that can be read."""
    try:
        table = stored(folder)
    except AtlasError:
        return ""
    return "" if table is None else str((table.schema.metadata or {}).get(b"digest", b"").decode())


def natural(source: str | Path, limit: int = LIMIT) -> tuple[int, int]:
    """The size that the images of a set have by themselves (of photographs and folders: 224 x 224)."""
    if source in SETS:
        high, wide = image_set(str(source)).test_x.shape[-2:]
        return int(high), int(wide)
    return 224, 224


def _labelled(name: str, channels: int, size: tuple[int, int], limit: int) -> Probe:
    found = image_set(name)
    each = max(1, limit // len(found.classes))
    chosen = torch.cat([torch.nonzero(found.test_y == k)[:each, 0] for k in range(len(found.classes))])
    chosen = chosen.sort().values
    x = found.test_x[chosen]
    if tuple(x.shape[-2:]) != size:
        x = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    pixels = (255 * x).round().clamp(0, 255).to(torch.uint8).expand(-1, channels, -1, -1).contiguous()
    return Probe(name, pixels, tuple(f"test {i}" for i in chosen.tolist()), found.test_y[chosen], found.classes)


def _cut(channels: int, size: tuple[int, int], limit: int) -> Probe:
    """Crops of every photograph at three scales, in rows and columns that overlap by half or more."""
    opened = {path: _opened(path) for path in photographs()}
    crops = [
        (path, (left, top, left + side, top + side))
        for path, picture in opened.items()
        for side in (round(share * min(picture.size)) for share in CROPS)
        for top in _starts(picture.height, side)
        for left in _starts(picture.width, side)
    ]
    chosen = [crops[i] for i in spaced(len(crops), limit)]
    names = tuple(f"{path.name} {box[2] - box[0]}x{box[3] - box[1]}+{box[0]}+{box[1]}" for path, box in chosen)
    return Probe("photos", torch.stack([_tensor(opened[path], channels, size, box) for path, box in chosen]), names)


def photographs() -> list[Path]:
    """The photographs on this machine. Raises MissingAsset where no package that carries some is installed."""
    folders = {package: package_dir(package) for package in PHOTOS}
    found = [
        folder / name
        for package, folder in folders.items()
        if folder is not None
        for name in PHOTOS[package]
        if (folder / name).is_file()
    ]
    if not found:
        raise MissingAsset("no photographs are installed; bring some with: pip install scikit-learn scikit-image")
    return found


def _starts(length: int, side: int) -> list[int]:
    """Where crops begin: the first at the edge, the last at the other edge, none further apart than half a crop."""
    if length <= side:
        return [0]
    count = -(-2 * (length - side) // side) + 1
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def _folder(folder: Path, channels: int, size: tuple[int, int], limit: int) -> Probe:
    if not folder.is_dir():
        raise ModelError(
            f"{folder}: there is no such folder of images; expected one, or one of photos, {', '.join(SETS)}"
        )
    files = list(_files(folder))
    files = [files[i] for i in spaced(len(files), limit)]
    if not files:
        raise ModelError(f"{folder} holds no images ({', '.join(SUFFIXES)}), in itself or its subfolders")
    kinds = [file.relative_to(folder).parts[0] if file.parent != folder else "" for file in files]
    classes = tuple(sorted(set(kinds) - {""}))
    labels = torch.tensor([classes.index(kind) for kind in kinds]) if classes and "" not in kinds else None
    pixels = torch.stack([_tensor(_opened(file), channels, size, None) for file in files])
    names = tuple(str(file.relative_to(folder)) for file in files)
    return Probe(folder.name, pixels, names, labels, classes if labels is not None else ())


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def spaced(count: int, limit: int) -> list[int]:
    """So many of `count` places at most, evenly spaced."""
    return list(range(count)) if count <= limit else [i * count // limit for i in range(limit)]


def _opened(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(path)
        picture.load()
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise ModelError(
            f"{path} cannot be read as an image ({error}); mend it or take it out of the folder"
        ) from error
    return picture


def _tensor(
    picture: Any, channels: int, size: tuple[int, int], box: tuple[int, int, int, int] | None
) -> UInt8[Tensor, "c h w"]:
    """A picture, or the part of it in a box, scaled to `size`; without a box its largest centred part of that shape."""
    from PIL import Image

    high, wide = size
    if box is None:
        scale = min(picture.width / wide, picture.height / high)
        w, h = round(wide * scale), round(high * scale)
        left, top = (picture.width - w) // 2, (picture.height - h) // 2
        box = (left, top, left + w, top + h)
    made = picture.convert("L" if channels == 1 else "RGB").resize((wide, high), Image.Resampling.BICUBIC, box=box)
    array = np.asarray(made, dtype=np.uint8).reshape(high, wide, channels)
    return torch.from_numpy(array.copy()).movedim(-1, 0)


def _decoded(png: bytes) -> UInt8[Tensor, "c h w"]:
    from PIL import Image

    array = np.array(Image.open(io.BytesIO(png)))
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).movedim(-1, 0)


def _png(pixels: UInt8[Tensor, "c h w"]) -> bytes:
    from PIL import Image

    array = pixels[0].numpy() if len(pixels) == 1 else pixels.movedim(0, -1).numpy()
    made, sink = Image.fromarray(np.ascontiguousarray(array)), io.BytesIO()
    made.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    made.save(sink, "PNG", optimize=True)
    return sink.getvalue()
