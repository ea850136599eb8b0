"""Packed models on disk: one safetensors file that is as small as the bits say, with a checked header.

The folder is a Hugging Face folder (config.json, tokenizer files) whose weights are in `neuropil.safetensors`, a
name that no other library takes for plain weights. Its tensors are those of the model's `state_dict`: parameters
under their own names, and for a packed weight `MODULE.packing.codes`, `.scale`, `.table` and so on (see
`neuropil.packed`). The safetensors metadata holds:

    format    "neuropil.packed"
    version   "1"
    packings  JSON: module name -> the packing's kind, shape, levels, and the shape and dtype of each buffer
    sha256    of all tensors' bytes, in the order of their names
    about     JSON: how the model was made (method, settings, source), for the reader

Modules that were made smaller (structured pruning) are recognised by the shapes of their tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuropil.errors import ModelError
from neuropil.models import assets
from neuropil.models.skeleton import ties
from neuropil.models.stores import AGAIN, Safetensors, safetensors_header
from neuropil.packed import Packing, PackingError, empty, is_packed, pack, packed_modules

FILE = "neuropil.safetensors"
FORMAT, VERSION = "neuropil.packed", "1"


def save_packed(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model, packed or partly packed, to a new folder; it appears there whole or not at all.

    `tokenizer` (a transformers tokenizer) is written beside it. Gives the folder's path.

    Raises ModelError where the folder exists and is not empty.

    >>> import tempfile
    >>> from neuropil.packed import Affine
    >>> model = nn.Sequential(nn.Linear(64, 8))
    >>> pack(model, {"0": Affine.of(torch.ones(8, 64, dtype=torch.int), 4, torch.ones(8, 1), 1.5)})
    >>> folder = save_packed(model, tempfile.mkdtemp() + "/small", about={"method": "by hand"})
    >>> again = load_packed(folder, into=nn.Sequential(nn.Linear(64, 8)))
    >>> torch.equal(again[0].weight, model[0].weight), about_packed(folder)["method"]
    (True, 'by hand')
    """
    from safetensors.torch import save_file

    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists and is not empty; choose another folder, or remove it first")
    tensors = _tensors(model)
    packings = {name: packing.spec() for name, _, packing in packed_modules(model)}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "packings": json.dumps(packings, sort_keys=True),
        "sha256": _digest(tensors),
        "about": json.dumps(dict(about or {}), sort_keys=True, default=str),
    }
    if target.is_dir():
        target.rmdir()
    with assets.written_whole(target) as path:
        path.mkdir()
        config: Any = getattr(model, "config", None)
        if hasattr(config, "save_pretrained"):
            config.architectures = [type(model).__name__]
            config.save_pretrained(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        save_file(tensors, path / FILE, metadata=metadata)
    return target


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dictionary without the second names of shared tensors, each tensor on its own memory."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in [*model.named_parameters(), *_persistent(model)]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach().cpu().contiguous().clone()
    return found


def _persistent(model: nn.Module) -> list[tuple[str, Tensor]]:
    kept = model.state_dict()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


def _digest(tensors: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(f"{name}\0{list(tensors[name].shape)}\0{tensors[name].dtype}\0".encode())
        if tensors[name].numel():
            hasher.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def is_packed_folder(path: Path) -> bool:
    return (path / FILE).is_file()


def _metadata(path: Path) -> dict[str, Any]:
    """The header's metadata, checked."""
    said = safetensors_header(path).get("__metadata__") or {}
    if said.get("format") != FORMAT:
        raise ModelError(f"{path} is not a packed model: its format is {said.get('format')!r}, expected {FORMAT!r}")
    if said.get("version") != VERSION:
        raise ModelError(
            f"{path}: packed in version {said.get('version')} of the format; this neuropil reads {VERSION}"
        )
    try:
        return {**said, "packings": json.loads(said["packings"]), "about": json.loads(said["about"])}
    except (KeyError, ValueError) as error:
        raise ModelError(f"{path}: its header is damaged ({error!r}); {AGAIN}") from error


def about_packed(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What was written of how a packed model was made."""
    about: dict[str, Any] = _metadata(Path(folder) / FILE)["about"]
    return about


def read_packed(folder: Path) -> tuple[dict[str, Tensor], dict[str, Packing]]:
    """The plain tensors and the filled packings of a packed file, all checked against its checksum."""
    from safetensors.torch import load_file

    path = folder / FILE
    metadata = _metadata(path)
    tensors = load_file(path)
    if _digest(tensors) != metadata["sha256"]:
        raise ModelError(f"{path}: its tensors do not have the checksum that its header names; {AGAIN}")
    packings: dict[str, Packing] = {}
    for name, spec in metadata["packings"].items():
        prefix = f"{name}.packing."
        own = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        if own:  # else it shares the packing of a module it is tied to
            packings[name] = _filled(spec, own, name, path)
    return tensors, packings


def _filled(spec: Mapping[str, Any], tensors: dict[str, Tensor], name: str, path: Path) -> Packing:
    packing = empty(spec)
    try:
        packing.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelError(f"{path}: the packed weight of {name!r} is incomplete ({error}); {AGAIN}") from error
    return packing


def load_packed(folder: str | os.PathLike[str], into: nn.Module) -> nn.Module:
    """Fill `into`, a model of the architecture that was saved, and give it back; packed weights stay packed.

    Raises ModelError for a file that is truncated, tampered with, of another version, or of another architecture.
    """
    plain, packings = read_packed(Path(folder))
    if any(is_packed(module) for module in into.modules()):
        raise ModelError("the model to be filled is packed already; give a freshly made one")
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.items()}
    try:
        resize(into, shapes | {f"{name}.weight": tuple(packing.shape) for name, packing in packings.items()})
        pack(into, packings)
        missing, foreign = into.load_state_dict(plain, strict=False, assign=True)
    except (RuntimeError, AttributeError, PackingError) as error:
        raise ModelError(f"{folder}: it does not fit a {type(into).__name__} ({error})") from error
    missing = [name for name in missing if ".packing." not in name and not _tied(into, name, plain)]
    if missing or foreign:
        raise ModelError(
            f"{folder}: it does not fit a {type(into).__name__}: without {missing[:3]}, with unknown {foreign[:3]}"
        )
    return into.eval()


def _tied(model: nn.Module, name: str, plain: Mapping[str, Tensor]) -> bool:
    """Whether a parameter that the file lacks is tied to one that it has; it is tied anew."""
    source = ties(model).get(name)
    if source is None or source not in plain:
        return False
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, model.get_parameter(source))
    return True


def resize(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give layers that structured pruning made smaller the sizes that `shapes` names, in place, without values."""
    for name, module in model.named_modules():
        shape, own = shapes.get(f"{name}.weight"), module._parameters.get("weight")
        if shape is None or own is None or tuple(own.shape) == shape or len(own.shape) != len(shape):
            continue
        for part in ("weight", "bias", "running_mean", "running_var"):
            old, size = getattr(module, part, None), shapes.get(f"{name}.{part}")
            if old is not None and size is not None:
                new = torch.empty(size, dtype=old.dtype, device=old.device)
                setattr(module, part, nn.Parameter(new) if part in ("weight", "bias") else new)
        _count(module, shape)


def _count(module: nn.Module, shape: tuple[int, ...]) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups == module.in_channels and shape[1] == 1:  # each channel has kernels of its own
            module.groups = shape[0] * module.groups // module.out_channels
        module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        module.num_features = shape[0]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = shape


class PackedStore(Safetensors):
    """A packed file read as plain tensors, one at a time: a packed weight is made dense when it is read."""

    def __init__(self, path: Path) -> None:
        super().__init__([path])
        self.packings: dict[str, dict[str, Any]] = _metadata(path)["packings"]
        self.path, stored = path, self.shapes
        self.parts = {name: [k for k in stored if k.startswith(f"{name}.packing.")] for name in self.packings}
        inside = {key for keys in self.parts.values() for key in keys}
        self.shapes = {name: shape for name, shape in stored.items() if name not in inside}
        for name, spec in self.packings.items():
            if self.parts[name]:
                self.shapes[f"{name}.weight"] = tuple(spec["shape"])

    def read(self, name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if not self.parts.get(module):
            return super().read(name)
        prefix = f"{module}.packing."
        parts = {key.removeprefix(prefix): super(PackedStore, self).read(key) for key in self.parts[module]}
        return _filled(self.packings[module], parts, module, self.path).dense()
