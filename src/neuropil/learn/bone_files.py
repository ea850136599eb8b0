"""Bone adapters as files: in peft's format where peft has the variant, so that each loads what the other trained.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, as peft writes them. "miss" and "mini" are
peft's `MissConfig()` and `MissConfig(init_weights="mini")`, "col" is `MissConfig(init_weights="bat")`. For "row",
"free" and "ab" peft has no counterpart: the files look alike but name another method, so that peft refuses them.
The files of peft's former `BoneConfig` (up to 0.18) are read too; its default is "miss" here.

>>> import tempfile, torch
>>> from torch import nn
>>> model, other = (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(2))
>>> changes = add_bone(model, r=4)
>>> folder = save_bone(model, tempfile.mkdtemp())
>>> load_bone(other, folder).changed
('0', '2')
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from neuropil.changes import Changes
from neuropil.errors import ModelError
from neuropil.learn._bone_block import SHARDED
from neuropil.learn.bone import BoneBlock, BoneLinear, add_bone
from neuropil.report import write_atomically

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's two wrappers around the model
# variant -> peft's name of its initialisation, by which it tells the variants apart
_IN_PEFT: dict[str, bool | str] = {"miss": True, "mini": "mini", "col": "bat"}
_OURS = "NEUROPIL_BONE"
_KEYS = {"MISS": "miss_block", "BONE": "bone_block", _OURS: "bone_block"}


def save_bone(model: nn.Module, folder: Path | str, name: str = "default") -> Path:
    """Write the adapter of this name, and nothing of the model, into `folder` (made if need be); returns the folder.

    Raises ValueError where no layer has such an adapter, or where its layers differ in r, variant or dropout, for
    which a file has one place.
    """
    blocks: dict[str, BoneBlock] = {
        layer: cast(BoneBlock, host.blocks[name])
        for layer, host in model.named_modules(remove_duplicate=False)
        if isinstance(host, BoneLinear) and name in host.blocks
    }
    if not blocks:
        raise ValueError(f"the model has no Bone adapter {name!r}")
    if "" in blocks:
        raise ValueError("the model is one linear layer, which has no name to be saved under; put it into a Sequential")
    settings = [block.settings for block in blocks.values()]
    if any(entry != settings[0] for entry in settings):
        raise ValueError(f"adapter {name!r} has layers of different settings; give each setting an adapter of its own")
    config = _config(settings[0], list(blocks), getattr(model, "name_or_path", None))
    key = _KEYS[config["peft_type"]]
    tensors = {f"{PREFIX}{layer}.{key}": block.block.detach().cpu().clone() for layer, block in blocks.items()}
    folder = Path(folder)
    write_atomically(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return folder


def load_bone(model: nn.Module, folder: Path | str, name: str = "default") -> Changes:
    """Add the adapter in `folder` to the model, in place, and let it act; everything but its blocks is frozen.

    Reads what `save_bone` wrote, peft's MiSS and Bat adapters, and those of its former `BoneConfig`. Raises ModelError
    where the folder holds no such adapter, or one with more than blocks (trained biases, whole layers); ValueError
    where the blocks do not fit the model's layers or a layer has an adapter of that name; TypeError where such a layer
    is not linear. The model is then as it was.
    """
    folder = Path(folder)
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder} holds no adapter ({error}); expected {CONFIG} and {WEIGHTS}") from error
    settings = _settings(config, folder)
    blocks = _blocks(tensors, _KEYS[config["peft_type"]], folder)
    _check_fit(model, blocks, settings)
    changes = add_bone(model, **settings, where=lambda layer, _: layer in blocks, name=name)
    for layer, values in blocks.items():
        block = cast(Any, changes.model.get_submodule(layer)).blocks[name].block
        with torch.no_grad():
            block.copy_(values)
    return changes


def _config(settings: dict[str, Any], layers: list[str], base: str | None) -> dict[str, Any]:
    """The settings as peft's config; the layers as a pattern, for peft takes a list of names as endings of names."""
    pattern = "|".join(re.escape(layer) for layer in layers)
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "miss_dropout": settings["dropout"],
        "mini_r": settings["mini_r"] or 1,
        "peft_type": "MISS",
        "r": settings["r"],
        "target_modules": f"({pattern})",
        "task_type": None,
    }
    if settings["variant"] in _IN_PEFT:
        return config | {"init_weights": _IN_PEFT[settings["variant"]]}
    return config | {"peft_type": _OURS, "variant": settings["variant"]}


def _settings(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The arguments of `add_bone` that a config stands for."""
    kind = config.get("peft_type")
    if kind not in _KEYS:
        raise ModelError(f"{folder} holds an adapter of type {kind!r}; expected one of {', '.join(_KEYS)}")
    if config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise ModelError(f"{folder} holds trained biases or whole layers beside the blocks; load it with peft")
    names = {initial: variant for variant, initial in _IN_PEFT.items()} | {False: "miss"}
    variant = config.get("variant") if kind == _OURS else names.get(config.get("init_weights", True))
    if variant is None or "r" not in config:
        raise ModelError(f"{folder / CONFIG} does not say which variant of Bone or which r it is")
    mini_r = config.get("mini_r") if variant == "mini" else None
    dropout = config.get("miss_dropout", 0.0) if variant in SHARDED else 0.0  # peft's Bat has it in the config alone
    return {"variant": variant, "r": config["r"], "mini_r": mini_r, "dropout": dropout}


def _blocks(tensors: dict[str, Tensor], key: str, folder: Path) -> dict[str, Tensor]:
    """Layer -> block. peft's names begin with its wrappers and end with the kind of tensor."""
    odd = [n for n in tensors if not (n.startswith(PREFIX) and n.endswith(f".{key}"))]
    if odd or not tensors:
        raise ModelError(f"{folder / WEIGHTS} holds {odd[:3] or 'nothing'}; expected blocks {PREFIX}LAYER.{key} alone")
    return {n.removeprefix(PREFIX).removesuffix(f".{key}"): tensor for n, tensor in tensors.items()}


def _check_fit(model: nn.Module, blocks: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Raise ValueError, before anything is changed, where a block is of another model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    absent = [layer for layer in blocks if layer not in modules]
    if absent:
        raise ValueError(f"the model has no layer {absent[0]!r} ({len(absent)} of {len(blocks)} layers are missing)")
    for layer, values in blocks.items():
        module = modules[layer]
        host = module if isinstance(module, BoneLinear) else BoneLinear(module)
        fresh = BoneBlock(host.out_features, host.in_features, **settings, device=torch.device("meta"))
        if fresh.block.shape != values.shape:
            given, expected = tuple(values.shape), tuple(fresh.block.shape)
            raise ValueError(f"the block of {layer!r} is {given}, expected {expected}: it is of another model")
