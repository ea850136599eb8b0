"""Packed models on disk: as small as they say, the same to the bit when loaded, and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from neuropil.errors import ModelError
from neuropil.models import about_packed, load, load_packed, save_packed
from neuropil.models.packed_files import FILE
from neuropil.neurons import find_sites
from neuropil.packed import Affine, Sparse, nbytes, pack, packed_modules


def four_bits(weight: torch.Tensor) -> Affine:
    """Eight inputs a scale, on a symmetric grid of 15 levels."""
    tiles = weight.detach().reshape(len(weight), -1, 8)
    scale = tiles.abs().amax(2) / 7
    codes = (tiles / scale[..., None]).round().int() + 7
    return Affine.of(codes.reshape(weight.shape), 15, scale.half().float(), 7.0)


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def packed_llama() -> Any:
    model = tiny_llama()
    kept = {name: four_bits(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    del kept["lm_head"]
    pack(model, kept)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_packed(packed_llama(), tmp_path / "small", about={"method": "four bits"})


def test_a_packed_model_loads_to_the_bit(folder: Path) -> None:
    model, ids = packed_llama(), torch.arange(12).reshape(1, 12)
    loaded = load(folder)
    whole: Any = loaded.module()
    assert torch.equal(whole(ids).logits, model(ids).logits)
    assert len(list(packed_modules(whole))) == len(list(packed_modules(model)))
    assert whole.lm_head.packing is whole.model.embed_tokens.packing
    assert about_packed(folder) == {"method": "four bits"}


def test_its_bytes_are_those_of_its_tensors(folder: Path) -> None:
    header = 8 + int.from_bytes((folder / FILE).read_bytes()[:8], "little")
    assert (folder / FILE).stat().st_size == header + nbytes(packed_llama())


def test_its_neurons_are_read_dense_one_at_a_time(folder: Path) -> None:
    model, loaded = packed_llama(), load(folder)
    assert [site.width for site in loaded.sites] == [48, 48]
    wanted = model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(loaded.rows(loaded.sites[1], "up"), wanted)
    assert torch.equal(loaded.tensor("lm_head.weight"), model.lm_head.weight)
    inside = load(model)
    assert [site.name for site in inside.sites] == [site.name for site in loaded.sites]
    assert torch.equal(inside.rows(inside.sites[1], "up"), wanted)
    assert torch.equal(inside.head().weight, loaded.head().weight)
    assert find_sites(model)


def test_smaller_layers_keep_their_sizes(tmp_path: Path) -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            part = getattr(layer.mlp, name)
            part.weight = nn.Parameter(part.weight.detach().narrow(dim, 0, 40))
            part.in_features, part.out_features = part.weight.shape[1], part.weight.shape[0]
    loaded = load(save_packed(model, tmp_path / "narrow"))
    ids = torch.arange(6).reshape(1, 6)
    whole: Any = loaded.module()
    assert torch.equal(whole(ids).logits, model(ids).logits)
    assert [site.width for site in loaded.sites] == [40, 40]


def test_plain_networks_are_filled(tmp_path: Path) -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))

    torch.manual_seed(0)
    model: Any = network().eval()
    model[1].running_mean += 0.3
    with torch.no_grad():
        model[4].weight.masked_fill_(model[4].weight.abs() < 0.03, 0)
    pack(model, {"4": Sparse.of(model[4].weight)})
    folder, x = save_packed(model, tmp_path / "net"), torch.randn(2, 1, 8, 8)
    assert torch.equal(load_packed(folder, into=network())(x), model(x))
    with pytest.raises(ModelError, match="does not fit"):
        load_packed(folder, into=nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ModelError, match="packed already"):
        load_packed(folder, into=model)


def test_what_is_there_is_not_written_over(folder: Path) -> None:
    before = (folder / FILE).read_bytes()
    with pytest.raises(ModelError, match="not empty"):
        save_packed(packed_llama(), folder)
    assert (folder / FILE).read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["small"]


def test_a_broken_file_is_refused(folder: Path) -> None:
    path = folder / FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 100])
    with pytest.raises(ModelError, match=r"readable|ends before"):
        load(folder).module()
    damaged = bytearray(whole)
    damaged[-50] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(ModelError, match="checksum"):
        load(folder).module()


@pytest.mark.parametrize(("key", "value"), [("format", "other"), ("version", "9"), ("packings", "{")])
def test_a_foreign_header_is_refused(folder: Path, key: str, value: str) -> None:
    path = folder / FILE
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"][key] = value
    new = json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + size :])
    with pytest.raises(ModelError, match=r"format|version|damaged"):
        load(folder)


def test_depthwise_convolutions_of_fewer_channels_are_filled(tmp_path: Path) -> None:
    """Pruning takes channels and their kernels together, so the groups are fewer too."""

    def net(channels: int) -> nn.Sequential:
        depthwise = nn.Conv2d(channels, 2 * channels, 3, groups=channels)
        return nn.Sequential(nn.Conv2d(3, channels, 1), depthwise, nn.Conv2d(2 * channels, 4, 1))

    torch.manual_seed(0)
    small = net(5)
    again = load_packed(save_packed(small, tmp_path / "small"), into=net(8))
    x = torch.rand(2, 3, 6, 6)
    assert torch.equal(again(x), small(x))
    assert again[1].groups == 5
