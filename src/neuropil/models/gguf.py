"""GGUF files: the header is read here, tensors are dequantised one by one by the `gguf` package.

Names, and the few tensors that GGUF keeps in another form (rows of q and k permuted for its rotary embedding,
gains of Gemma's norms with one added, GPT-2's matrices transposed, experts stacked), go through transformers'
own GGUF maps, so that a tensor read here is the one transformers would load.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuropil.errors import ModelError
from neuropil.models.stores import AGAIN, PIECE, Store, starts, truncated

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_AT_ONCE = 1 << 21  # numbers dequantised at a time

# transformers turns these into a config by renaming keys alone; the others go through its own (slow) reader.
_RENAMED = {
    "llama",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3",
    "gpt2",
    "starcoder2",
    "qwen2moe",
    "qwen3moe",
}


# Sizes that transformers' map leaves at their defaults; without them a model of another size would not fit.
_UNMAPPED = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


class _Header:
    """The key-value pairs and the tensor table of a GGUF file (version 2 or 3, little-endian)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}  # name -> shape, type, offset in the file
        with path.open("rb") as self._file:
            try:
                self._read()
            except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError) as error:
                raise ModelError(f"{path}: the GGUF header is damaged ({error!r}); {AGAIN}") from error

    def _read(self) -> None:
        if self._file.read(4) != b"GGUF":
            raise ModelError(f"{self.path} does not begin with 'GGUF', so it is no GGUF file")
        version = self._value("I")
        if version not in (2, 3):
            raise ModelError(f"{self.path} is GGUF version {version}; expected 2 or 3: convert the model again")
        count, pairs = self._value("Q"), self._value("Q")
        for _ in range(pairs):
            key = self._string()
            self.metadata[key] = self._typed(self._value("I"))
        for _ in range(count):
            name = self._string()
            dims = self._values("Q", self._value("I"))
            kind, offset = self._value("I"), self._value("Q")
            self.tensors[name] = (tuple(reversed(dims)), kind, offset)
        align = int(self.metadata.get("general.alignment", 32))
        start = -(-self._file.tell() // align) * align
        self.tensors = {n: (shape, kind, start + offset) for n, (shape, kind, offset) in self.tensors.items()}

    def _bytes(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise ModelError(f"{self.path}: the file ends inside the GGUF header; {AGAIN}")
        return data

    def _values(self, kind: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{kind}", self._bytes(count * struct.calcsize(f"<{kind}")))

    def _value(self, kind: str) -> Any:
        return self._values(kind, 1)[0]

    def _string(self) -> str:
        return self._bytes(self._value("Q")).decode("utf-8")

    def _strings(self, count: int) -> list[str]:
        """A vocabulary or its merges: one loop without calls, for there are a hundred thousand."""
        read, size = self._file.read, struct.Struct("<Q").unpack
        found = [read(size(read(8))[0]) for _ in range(min(count, self.path.stat().st_size // 8))]
        if len(found) < count:
            raise ModelError(f"{self.path}: the file ends inside the GGUF header; {AGAIN}")
        return [text.decode("utf-8") for text in found]

    def _typed(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._value("I"), self._value("Q")
            if inner in _SCALARS:
                return list(self._values(_SCALARS[inner], count))
            if inner == _STRING:
                return self._strings(count)
            return [self._typed(inner) for _ in range(count)]
        return self._value(_SCALARS[kind])


class Gguf(Store):
    """The tensors of a GGUF file under its own names, dequantised to float32 when read."""

    def __init__(self, path: Path) -> None:
        from gguf import GGMLQuantizationType

        header = _Header(path)
        self.path, self.metadata = path, header.metadata
        if "general.architecture" not in self.metadata:
            raise ModelError(f"{path}: the GGUF header names no architecture; {AGAIN}")
        self.architecture: str = self.metadata["general.architecture"]
        self.shapes = {name: shape for name, (shape, _, _) in header.tensors.items()}
        self.places: dict[str, tuple[Any, int, int]] = {}  # name -> type, offset, bytes
        size = path.stat().st_size
        for name, (shape, kind, offset) in header.tensors.items():
            try:
                quantisation = GGMLQuantizationType(kind)
            except ValueError as error:
                raise ModelError(
                    f"{path}: tensor {name!r} has quantisation type {kind}, unknown to the installed gguf "
                    "package; "
                    "pip install --upgrade gguf"
                ) from error
            nbytes = _stored_bytes(shape, quantisation)
            if offset + nbytes > size:
                raise truncated(path, name)
            self.places[name] = (quantisation, offset, nbytes)

    def read(self, name: str) -> Tensor:
        kind, offset, nbytes = self.places[name]
        shape = self.shapes[name]
        made = np.empty(shape, dtype=np.float32)
        # Rows at a time, so that neither the stored bytes nor the temporaries of dequantising are ever whole.
        rows = made.reshape(-1, shape[-1]) if shape else made.reshape(1, 1)
        step = max(1, _AT_ONCE // rows.shape[1])
        with self.path.open("rb") as file:
            file.seek(offset)
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                raw = np.fromfile(file, dtype=np.uint8, count=nbytes // len(rows) * len(part))
                if raw.size < nbytes // len(rows) * len(part):
                    raise truncated(self.path, name)
                part[:] = self._plain(name, kind, raw.reshape(len(part), -1))
        return torch.from_numpy(made)

    def _plain(self, name: str, kind: Any, raw: np.ndarray) -> np.ndarray:
        """Rows of stored bytes as rows of numbers."""
        from gguf import dequantize

        plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(kind.name)
        if plain is not None:
            return raw.view(plain)
        try:
            return dequantize(raw, kind)
        except (NotImplementedError, KeyError, ValueError) as error:
            raise ModelError(
                f"{self.path}: tensor {name!r} is stored as {kind.name}, which the gguf package cannot "
                "dequantise "
                f"({error}); use a file quantised another way"
            ) from error

    def pieces(self, name: str, whole: bool) -> Iterable[bytes]:
        _, offset, nbytes = self.places[name]
        with self.path.open("rb") as file:
            spans = [(0, nbytes)] if whole else [(start, PIECE) for start in starts(nbytes)]
            for start, length in spans:
                file.seek(offset + start)
                yield file.read(min(length, nbytes - start))

    def nbytes(self) -> int:
        return sum(nbytes for _, _, nbytes in self.places.values())


def _stored_bytes(shape: tuple[int, ...], kind: Any) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // block * size


def config_of(store: Gguf) -> Any:
    """The transformers config that the file's metadata describe."""
    from transformers import AutoConfig

    try:
        settings = _renamed(store) if store.architecture in _RENAMED else _slow_config(store)
        return AutoConfig.for_model(**settings)
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"{store.path}: transformers cannot load GGUF models of architecture {store.architecture!r} "
            f"({error}); convert the model to safetensors, or use its original checkpoint"
        ) from error


def _renamed(store: Gguf) -> dict[str, Any]:
    """The config, by transformers' map of GGUF keys to its own."""
    from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

    kind = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gemma3": "gemma3_text"}.get(
        store.architecture, store.architecture
    )
    entry = "gemma3" if kind == "gemma3_text" else kind
    config: dict[str, Any] = dict(GGUF_CONFIG_DEFAULTS_MAPPING.get(entry, {}))
    config["tie_word_embeddings"] = "output.weight" not in store.shapes
    for key, value in store.metadata.items():
        prefix, _, rest = key.partition(".")
        names: Any = GGUF_CONFIG_MAPPING.get(entry if prefix == store.architecture else prefix, {})
        name = names.get(rest)
        if name not in (None, -1):
            config[name] = value
    for key, name in _UNMAPPED.items():
        if (value := store.metadata.get(f"{store.architecture}.{key}")) is not None:
            config[name] = value
    config["model_type"] = kind
    if kind == "gpt2" and "n_ctx" in config:
        config["n_positions"] = config["n_ctx"]
    config.pop("_model_name_or_path", None)
    config.setdefault("vocab_size", store.shapes["token_embd.weight"][0])
    return config


def _slow_config(store: Gguf) -> dict[str, Any]:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    return load_gguf_checkpoint(str(store.path), return_tensors=False)["config"]


def _name_map(store: Gguf, skeleton: nn.Module, processor: Any) -> dict[str, str]:
    """GGUF name -> name in the module: as `get_gguf_hf_weights_map` of transformers, which takes seconds.

    Some converters dropped the name of the outer module, so names are also tried without their first parts.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == store.architecture), None)
    if arch is None:
        raise ModelError(f"{store.path}: the gguf package knows no architecture {store.architecture!r}; upgrade it")
    layers = int(store.metadata.get(f"{store.architecture}.block_count", 0))
    names = get_tensor_name_map(arch, layers)
    found: dict[str, str] = {}
    for dropped in range(3):
        for full in skeleton.state_dict():
            parts = full.split(".")
            outer = "".join(f"{part}." for part in parts[:dropped])
            inner = processor.preprocess_name(".".join(parts[dropped:]))
            stem, dot, leaf = inner.rpartition(".")
            stem, suffix = (stem, f".{leaf}") if dot and leaf in ("weight", "bias") else (inner, "")
            theirs = names.get_name(stem)
            if theirs is not None:
                found.setdefault(theirs + suffix, outer + inner)
            elif dropped == 0:
                processor.perform_fallback_tensor_mapping(found, suffix, outer, inner)
    return found


class Names:
    """Which tensors of a GGUF file make up a parameter of the transformers model, and how."""

    def __init__(self, store: Gguf, skeleton: nn.Module) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self.store = store
        settings: Any = skeleton.config
        config = settings.to_dict()
        self.processor = TENSOR_PROCESSORS.get(store.architecture, TensorProcessor)(config=config)
        self.map = _name_map(store, skeleton, self.processor)
        self.sources: dict[str, list[str]] = {}
        for name in store.shapes:
            # Stacked experts are listed without their suffix, since the fused parameter has none.
            target = self.map.get(name) or self.map.get(name.removesuffix(".weight"))
            if name == "output.weight" and target is None:
                target = "lm_head.weight"
            if target is not None:
                self.sources.setdefault(target, []).append(name)

    def read(self, parameter: str) -> Tensor:
        """The parameter in float32, in the form the transformers model holds it."""
        parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
        whole: np.ndarray | None = None
        for name in self.sources[parameter]:
            weights = self.store.read(name).numpy()
            result = self.processor.process(
                weights=weights, name=name, tensor_key_mapping=self.map, parsed_parameters=parsed
            )
            if result.name is not None:
                whole = result.weights
        if whole is None:
            return parsed["tensors"][parameter]
        return torch.from_numpy(np.ascontiguousarray(whole))
