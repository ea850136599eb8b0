"""Stores: named tensors on disk or in memory, read one at a time and never unpickled.

A store knows the names and shapes of its tensors at once and reads a tensor only when asked; nothing stays
mapped or open between two reads, so that memory is that of the tensors the caller still holds.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuropil.errors import ModelError
from neuropil.packed import Packing, nbytes, packed_modules

WHOLE = 1 << 30  # bytes up to which a fingerprint covers every byte of the model
PIECES, PIECE = 64, 4096  # above that: so many pieces of so many bytes of every tensor


class Store(ABC):
    """Named tensors. `shapes` maps every name to its shape, in the store's order."""

    shapes: dict[str, tuple[int, ...]]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor as stored (dequantised where the file is quantised)."""

    @abstractmethod
    def pieces(self, name: str, whole: bool) -> Iterable[bytes | memoryview]:
        """Its stored bytes: all of them, or PIECES pieces spread evenly from the first to the last."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""

    def digest(self, config: Any) -> str:
        """BLAKE2b over `config` (as JSON) and every tensor's name, shape and bytes; order does not matter."""
        whole = self.nbytes() <= WHOLE
        hasher = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
        for name in sorted(self.shapes):
            hasher.update(f"\0{name}\0{list(self.shapes[name])}\0".encode())
            for piece in self.pieces(name, whole):
                hasher.update(piece)
        return hasher.hexdigest()


def starts(size: int) -> list[int]:
    """Where the sampled pieces of `size` bytes begin; the last ends with the last byte."""
    if size <= PIECES * PIECE:
        return list(range(0, size, PIECE))
    return [i * (size - PIECE) // (PIECES - 1) for i in range(PIECES)]


def tensor_pieces(tensor: Tensor, whole: bool) -> Iterable[memoryview]:
    """The bytes of a tensor in memory; of a mapped one only the pages asked for are read."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    if whole:
        yield flat.data
    else:
        for start in starts(flat.size):
            yield flat[start : start + PIECE].data


class TensorStore(Store):
    """A store whose tensors torch hands over with their own dtypes."""

    def pieces(self, name: str, whole: bool) -> Iterable[memoryview]:
        return tensor_pieces(self.read(name), whole)


class Safetensors(TensorStore):
    """One or several safetensors files. A file is opened for the read of a tensor and closed again."""

    def __init__(self, files: list[Path]) -> None:
        self.files: dict[str, Path] = {}
        self.shapes = {}
        self.dtypes: dict[str, str] = {}
        self._bytes = 0
        for path in files:
            self._list(path)

    def _list(self, path: Path) -> None:
        header = safetensors_header(path)
        header.pop("__metadata__", None)
        size = path.stat().st_size
        for name, entry in header.items():
            self.files[name] = path
            self.shapes[name] = tuple(entry["shape"])
            self.dtypes[name] = entry["dtype"]
            start, stop = entry["data_offsets"]
            self._bytes += stop - start
            if stop > size:
                raise truncated(path, name)

    def read(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.files[name], framework="pt", device="cpu") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.files[name]}: tensor {name!r} cannot be read ({error}); {AGAIN}") from error

    def nbytes(self) -> int:
        return self._bytes


AGAIN = "the file is truncated or corrupt: copy or download it again"


def truncated(path: Path, name: str) -> ModelError:
    """The error for a file that ends before the data of a tensor does."""
    return ModelError(f"{path}: the file ends before tensor {name!r} does; {AGAIN}")


def safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, checked by the safetensors library."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(size))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path} is missing, though the checkpoint's index names it; download the whole checkpoint again"
        ) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is no readable safetensors file ({error}); {AGAIN}") from error


class TorchFiles(TensorStore):
    """`pytorch_model.bin` files, mapped by `torch.load(weights_only=True, mmap=True)`: no code is run."""

    def __init__(self, files: list[Path]) -> None:
        self.tensors: dict[str, Tensor] = {}
        for path in files:
            self.tensors.update(torch_tensors(path))
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def torch_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, mapped where its format allows; refuses anything that would run code."""
    import pickle

    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # files from before torch 1.6 cannot be mapped
                raise
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than tensors, and neuropil never unpickles objects; save the weights as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ModelError(f"{path} is no readable torch file ({error}); {AGAIN}") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}; expected a state dict (name -> tensor)")
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


class InMemory(TensorStore):
    """The parameters and buffers of a module that the user already has.

    LoRA updates are added when a weight is read, and a packed weight is made dense.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.tensors: dict[str, Tensor] = dict(module.state_dict(keep_vars=True))
        self.packings: dict[str, Packing] = {}
        for name, _, packing in packed_modules(module):
            self.packings[f"{name}.weight"] = packing
            for inside in [key for key in self.tensors if key.startswith(f"{name}.packing.")]:
                del self.tensors[inside]
        self.shapes = {name: tuple(t.shape) for name, t in (self.tensors | self.packings).items()}
        self.tied = _tied(self.tensors) | _repeated(self.packings)

    def read(self, name: str) -> Tensor:
        if name in self.packings:
            return self.packings[name].dense()
        return merged(self.module, name, self.tensors[name].detach())

    def pieces(self, name: str, whole: bool) -> Iterable[memoryview]:
        # A tied tensor is stored once in a file; counted once here too, both fingerprints are the same.
        if name in self.tied:
            return ()
        return tensor_pieces(self.read(name) if name in self.packings else self.tensors[name], whole)

    def digest(self, config: Any) -> str:
        kept = self.shapes
        self.shapes = {name: shape for name, shape in kept.items() if name not in self.tied}
        try:
            return super().digest(config)
        finally:
            self.shapes = kept

    def nbytes(self) -> int:
        plain = sum(t.nbytes for name, t in self.tensors.items() if name not in self.tied)
        return plain + sum(nbytes(p) for name, p in self.packings.items() if name not in self.tied)


def _repeated(packings: dict[str, Packing]) -> set[str]:
    """Names whose packing stands under an earlier name."""
    first: dict[int, str] = {}
    return {name for name, packing in packings.items() if first.setdefault(id(packing), name) != name}


def _tied(tensors: dict[str, Tensor]) -> set[str]:
    """Names of tensors that are an earlier tensor under another name."""
    seen: set[Any] = set()
    tied = set()
    for name, tensor in tensors.items():
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and key in seen:
            tied.add(name)
        seen.add(key)
    return tied


def merged(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """`W + scaling * B A` where the module that owns the weight is wrapped by LoRA, else `W`.

    Wrapping is recognised by structure: an owner with `base_layer`, `lora_A`, `lora_B` and `scaling`.
    """
    path, _, leaf = name.rpartition(".")
    if leaf != "weight" or not path.endswith("base_layer"):
        return weight
    owner: Any = module.get_submodule(path.rpartition(".")[0])
    if not all(hasattr(owner, part) for part in ("lora_A", "lora_B", "scaling")) or getattr(owner, "merged", False):
        return weight
    weight = weight.float()
    for adapter in getattr(owner, "active_adapters", list(owner.lora_A)):
        if adapter in owner.lora_A:
            delta = owner.lora_B[adapter].weight.detach().float() @ owner.lora_A[adapter].weight.detach().float()
            weight = weight + owner.scaling[adapter] * (delta.T if getattr(owner, "fan_in_fan_out", False) else delta)
    return weight
