"""`Model`: any model seen the same way, its weights read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.errors import ModelError, NoNeurons
from neuropil.models import trace as tracing
from neuropil.models import vocabulary
from neuropil.models.pictures import ImageInput, as_images, image_input
from neuropil.models.skeleton import Reader, quiet, ties
from neuropil.models.stores import Store
from neuropil.neurons import Site, find_sites


@dataclass(frozen=True)
class Head:
    """The output head of a language model: `logits = (gain * normalised x) @ weight.T + bias`.

    `weight` is `[V, d]`, one row a token, without the rows that pad a vocabulary; `gain` `[d]` is what the
    norm just before it multiplies by (None without such a norm); `note` says what else lies between, "" if
    nothing does.
    """

    weight: Float[Tensor, "V d"]
    gain: Float[Tensor, " d"] | None = None
    bias: Float[Tensor, " V"] | None = None
    note: str = ""


class Model:
    """A model whose weights are read one tensor at a time; made by `neuropil.models.load`.

    name, path          what was loaded (path None for a module in memory)
    source              FILE.py:NAME where it was made so, else None
    config              its transformers config; None for a module without one
    sites               its layers of neurons (raises NoNeurons when there are none)
    architecture        name of its class, e.g. "LlamaForCausalLM"
    parameters          number of parameters, tied ones counted once
    fingerprint         32 hex digits, see the property
    image_input         how it takes images; None for a model that takes none. May be set: no checkpoint and no
                        module says by what its pixels were normalised unless it has a preprocessor_config.json
    """

    def __init__(
        self,
        name: str,
        skeleton: nn.Module,
        store: Store,
        reader: Reader | None,
        *,
        path: Path | None = None,
        identity: Any = None,
        tokenizer: Callable[[], Any],
        whole: Callable[[Model, torch.dtype], nn.Module],
    ) -> None:
        self.name, self.path = name, path
        self.source: str | None = None
        self.skeleton, self.store, self.reader = skeleton, store, reader
        self.config: Any = getattr(skeleton, "config", None)
        self.architecture = type(skeleton).__name__
        self._identity, self._tokenizer, self._whole = identity, tokenizer, whole
        self._ties = ties(skeleton)
        self._modules: dict[torch.dtype, nn.Module] = {}
        self._last: tuple[str, Tensor] | None = None

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {self.architecture}, {self.parameters:,} parameters)"

    @cached_property
    def sites(self) -> list[Site]:
        return find_sites(self.skeleton)

    @cached_property
    def image_input(self) -> ImageInput | None:
        return image_input(self.skeleton, self.path)

    @property
    def takes_images(self) -> ImageInput | None:
        """How it takes images, if need be as a network of linear maps that reads them as rows of numbers."""
        return self.image_input or self._as_images

    @cached_property
    def _as_images(self) -> ImageInput | None:
        return as_images(self.skeleton)

    @cached_property
    def parameters(self) -> int:
        tied = {name for name in self._ties if self._ties[name] != name}
        own = {name: p for name, p in self.skeleton.named_parameters(remove_duplicate=False) if name not in tied}
        return sum(p.numel() for p in own.values())

    @cached_property
    def fingerprint(self) -> str:
        """BLAKE2b (128 bits) of the config's settings and of every stored tensor's name, shape and bytes.

        Up to 1 GiB of weights it covers every byte. Above, it covers 64 pieces of 4 KiB spread evenly over
        every tensor (small tensors whole), so that training any tensor changes it, while an edit of a few
        entries of a large tensor may not. It covers no tokenizer and no file names: the same tensors in other
        shards, or in another folder, give the same fingerprint; the same model stored in another number
        format gives another.
        """
        return self.store.digest(self._identity)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when first used; None if the model comes without one."""
        return self._tokenizer()

    def tensor(self, name: str) -> Tensor:
        """One parameter or buffer, by its name in the state dict: float32, on the CPU, read at every call.

        Raises ModelError for a name that the model or the checkpoint has not, and for a tensor of whole
        numbers that the module holds as a weight (quantised by a library that changes modules in memory).
        """
        tensor = self._read(name).to("cpu")
        if not tensor.is_floating_point() and name.endswith(".weight"):
            raise ModelError(
                f"{self.name}: {name!r} holds {str(tensor.dtype).removeprefix('torch.')} codes, not weights; "
                "dequantise the module first (model.dequantize()) or load the original checkpoint"
            )
        return tensor.to(torch.float32)

    def _read(self, name: str) -> Tensor:
        sources: Any = self.store.shapes if self.reader is None else self.reader.sources
        if name not in sources:
            tied = self._ties.get(name) or next((k for k, v in self._ties.items() if v == name and k in sources), None)
            if tied is None or tied not in sources:
                known = name in self.skeleton.state_dict()
                raise ModelError(
                    f"{self.name}: the checkpoint holds no tensor for {name!r}; the file is incomplete, get it again"
                    if known
                    else f"{self.name}: {self.architecture} has no tensor {name!r}"
                )
            name = tied
        return self.store.read(name) if self.reader is None else self.reader.read(name)

    def _kept(self, name: str) -> Tensor:
        """As `tensor`, and kept until the next one: the sites of one fused parameter then read it once."""
        if self._last is None or self._last[0] != name:
            self._last = None  # let go of the old one before reading the new
            self._last = (name, self.tensor(name))
        return self._last[1]

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{self.name}: {bad} entries of {name!r} are NaN or infinite, so its neurons mean nothing; "
                "the "
                "training diverged or the file is damaged: get the checkpoint again"
            )
        return tensor

    def rows(self, site: Site, role: str) -> Float[Tensor, "width fan"]:
        """By what a site's neurons read ("up", "gate") or write ("down"): one row a neuron, float32.

        Raises ModelError where one is NaN or infinite, KeyError where the site has no such weight.
        """
        weight = site.weight(role)
        shared = sum(weight.name == other.name for other in _weights(site)) > 1 or weight.expert is not None
        whole = self._kept(weight.name) if shared else self.tensor(weight.name)
        return self._finite(weight.name, weight.rows(whole, site.width).contiguous())

    def bias(self, site: Site, role: str) -> Float[Tensor, " width"] | None:
        """The biases that go with `rows(site, role)`; None where there are none."""
        weight = site.weight(role)
        if weight.bias is None or role == "down":
            return None
        return self._finite(weight.bias, weight.offsets(self.tensor(weight.bias), site.width).contiguous())

    @cached_property
    def _trace(self) -> tracing.Trace | None:
        try:
            sites = self.sites
        except NoNeurons:
            sites = []
        watched = [self._owner(w.name) for site in sites for w in site.reads.values()]
        if (head := self._head_name) is not None:
            watched.append(head)
        return tracing.watch(self.skeleton, watched)

    def _owner(self, parameter: str) -> str:
        """The module that receives a parameter's input: its owner (for fused experts, all of them)."""
        return parameter.rpartition(".")[0]

    @cached_property
    def _head_name(self) -> str | None:
        get: Any = getattr(self.skeleton, "get_output_embeddings", None)
        head = get() if callable(get) else None
        if head is None:
            return None
        return next((name for name, module in self.skeleton.named_modules() if module is head), None)

    def gain(self, site: Site) -> Float[Tensor, " fan"] | None:
        """What the norm that feeds a site multiplies by; None if no norm feeds it directly."""
        if self._trace is None:
            return None
        source = self._trace.feeds.get(self._owner(next(iter(site.reads.values())).name))
        return self._gain(source) if source is not None else None

    def _gain(self, name: str) -> Tensor | None:
        norm = self.skeleton.get_submodule(name)
        if not tracing.is_norm(norm):
            return None
        held = [*norm.named_parameters(), *norm.named_buffers()]
        weights = {key: self._finite(f"{name}.{key}", self.tensor(f"{name}.{key}")) for key, _ in held}
        return tracing.measured_gain(norm, weights)

    def head(self) -> Head:
        """The output head; read anew at every call, so that its memory is the caller's to free.

        Raises ModelError for a model that has none, or whose head does not read the residual stream.
        """
        name = self._head_name
        if name is None:
            pixels = "; of a network that is shown images, give some (--images)" if self.config is None else ""
            raise ModelError(
                f"{self.name}: {self.architecture} has no language-model head, so its neurons cannot be "
                "read as tokens; "
                f"use a checkpoint of the model with its head (…ForCausalLM or …ForMaskedLM){pixels}"
            )
        held = self._head_weight(name)
        weight = self._finite(held, self.tensor(held))
        bias = self._head_bias(name)
        source = self._trace.feeds.get(name) if self._trace is not None else None
        gain, note = None, ""
        if source is not None and isinstance(projection := self.skeleton.get_submodule(source), nn.Linear):
            if projection.bias is None:
                # logits = W (P x) = (W P) x: the head of the residual stream is W P.
                weight = weight @ self.tensor(f"{source}.weight")
                note = f"the projection {source} is multiplied in"
        elif source is not None:
            gain = self._gain(source)
            note = self._between(source)
        elif (last := tracing.last_norm(self.skeleton, self._trace)) is not None:
            gain = self._gain(last)
            note = f"{last} is the last norm before the head, but its output was not seen to reach the head as it is"
        self._fits(name, weight)
        rows = min(len(weight), self._vocabulary or len(weight))
        return Head(weight[:rows], gain, None if bias is None else bias[:rows], note)

    def _head_bias(self, name: str) -> Tensor | None:
        held = f"{self._head_weight(name).rpartition('.')[0]}.bias"
        if held not in self.skeleton.state_dict():
            return None
        return self._finite(held, self.tensor(held))

    def _head_weight(self, name: str) -> str:
        """The head's weight by name; a head that is wrapped (LoRA) holds it one level further in."""
        wrapped = f"{name}.base_layer.weight"
        return wrapped if wrapped in self.skeleton.state_dict() else f"{name}.weight"

    def _between(self, norm: str) -> str:
        """What a head's norm belongs to when the head has a transform of its own (masked language models)."""
        base = getattr(self.skeleton, "base_model_prefix", "")
        if not base or not hasattr(self.skeleton, base) or f".{base}." in f".{norm}.":
            return ""
        return (
            f"a transform of the head's own (linear map, nonlinearity, {norm}) lies between the residual "
            "stream and "
            "the head; it is not folded in"
        )

    def _fits(self, name: str, weight: Tensor) -> None:
        width = getattr(self.config.get_text_config() if self.config is not None else None, "hidden_size", None)
        if width is not None and weight.shape[1] != width:
            raise ModelError(
                f"{self.name}: the head {name!r} reads {weight.shape[1]} numbers but the residual stream "
                f"has {width}; "
                f"a nonlinear map lies between, so neurons cannot be compared with tokens in "
                f"{self.architecture}"
            )

    @cached_property
    def _vocabulary(self) -> int:
        """How many token ids the tokenizer knows; 0 without one, or where it cannot be read."""
        try:
            return len(self._texts)
        except ModelError:
            return 0

    @cached_property
    def _texts(self) -> list[str]:
        return [] if self.tokenizer is None else vocabulary.texts(self.tokenizer)

    def tokens(self) -> list[str]:
        """The readable text of every token id, leading space kept: one for each row of `head().weight`.

        None for a model that takes images.
        """
        if self.tokenizer is None and self.image_input is not None:
            return []
        if self.tokenizer is None:
            mended = "give one: load(module, tokenizer=...)"
            if self.source is not None:
                mended = f"let {self.source} give load(module, tokenizer=...)"
            raise ModelError(f"{self.name}: no tokenizer came with the model; {mended}")
        if self._head_name is None:
            return list(self._texts)
        weight: Tensor = self.skeleton.state_dict()[self._head_weight(self._head_name)]
        return self._texts[: len(weight)]

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The whole model with its weights, in eval mode; built once for each dtype and kept.

        A GGUF model is dequantised once and kept as plain safetensors in the cache folder, so that the next
        process loads it at once. A module given to `load` comes back itself, whatever its dtype and mode.
        """
        if dtype not in self._modules:
            with quiet():
                self._modules[dtype] = self._whole(self, dtype)
        return self._modules[dtype]


def _weights(site: Site) -> list[Any]:
    return [*site.reads.values(), *([site.write] if site.write is not None else [])]
