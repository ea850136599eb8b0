"""Labelled images, as tensors in 0..1, with a fixed training and test part."""

from __future__ import annotations

import gzip
import hashlib
import struct
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuropil.errors import MissingAsset, ModelError
from neuropil.models.assets import cache_dir, written_whole


@dataclass(frozen=True)
class Images:
    """Images `[n, 1, height, width]`, float32 in 0..1, and their labels `[n]`, int64 indices into
    `classes`."""

    train_x: Float[Tensor, "n 1 h w"]
    train_y: Int[Tensor, " n"]
    test_x: Float[Tensor, "m 1 h w"]
    test_y: Int[Tensor, " m"]
    classes: tuple[str, ...]


def image_set(name: str) -> Images:
    """Images by name: "digits" or "fashion-mnist". Raises ValueError for another, MissingAsset as they do."""
    if name not in SETS:
        raise ValueError(f"image_set({name!r}): expected one of {', '.join(SETS)}")
    return SETS[name]()


def digits() -> Images:
    """Handwritten digits, 8 x 8: 1,437 to train on and 360 to test, the same proportions of each class.

    The 1,797 images that scikit-learn carries (UCI, Alpaydin and Kaynak 1998). The split never changes.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy((pixels / 16).astype(np.float32)).reshape(-1, 1, 8, 8)
    y = torch.from_numpy(labels.astype(np.int64))
    train, test = train_test_split(np.arange(len(y)), test_size=360, random_state=0, stratify=labels)
    return Images(x[train], y[train], x[test], y[test], tuple("0123456789"))


CLOTHES = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
# SHA-256 of the uncompressed files: the same images are distributed with different gzip headers.
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


@cache
def fashion_mnist() -> Images:
    """Fashion-MNIST, 28 x 28: 60,000 images to train on and 10,000 to test, ten kinds of clothes, balanced.

    Taken from the Debian package `dataset-fashion-mnist`, else from the folder `fashion-mnist` in the cache,
    else downloaded there; checked by SHA-256 in each case. Kept in memory after the first call: do not
    change it in place.

    Raises MissingAsset where it is not here and cannot be downloaded; ModelError for damaged files.

    Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747.
    """
    train_x, train_y, test_x, test_y = (_idx(_content(name), name) for name in FILES)
    return Images(_pixels(train_x), _labels(train_y), _pixels(test_x), _labels(test_y), CLOTHES)


def _pixels(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).unsqueeze(1).to(torch.float32).div_(255)


def _labels(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(torch.int64)


def _content(name: str) -> bytes:
    """The uncompressed bytes of one of the four files, checked."""
    folders = (DEBIAN, cache_dir() / "fashion-mnist")
    path = next((folder / f"{name}.gz" for folder in folders if (folder / f"{name}.gz").is_file()), None)
    if path is None:
        path = _fetched(name, folders[1] / f"{name}.gz")
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ModelError(f"{path} is no readable gzip file ({error}); delete it and fetch it again") from error
    if hashlib.sha256(content).hexdigest() != FILES[name]:
        raise ModelError(f"{path} is not the file of Fashion-MNIST it is named after; delete it and fetch it again")
    return content


def _fetched(name: str, target: Path) -> Path:
    """Download one file to the cache; its content is checked when it is read."""
    try:
        with urllib.request.urlopen(f"{MIRROR}/{target.name}", timeout=20) as answer:
            content = answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise MissingAsset(
            f"Fashion-MNIST ({name}) is neither in {DEBIAN} nor in {target.parent}, and could not be "
            "downloaded "
            f"({error}). Bring it with: apt-get install -y dataset-fashion-mnist"
        ) from error
    with written_whole(target) as path:
        path.write_bytes(content)
    return target


def _idx(content: bytes, name: str) -> np.ndarray:
    """The array in an IDX file: two zero bytes, type, number of axes, their sizes (big-endian), the bytes."""
    kind, axes = content[2], content[3]
    if kind != 8:
        raise ModelError(f"{name}: IDX type {kind}, expected 8 (unsigned bytes)")
    sizes = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(sizes).copy()


SETS: dict[str, Callable[[], Images]] = {"digits": digits, "fashion-mnist": fashion_mnist}
