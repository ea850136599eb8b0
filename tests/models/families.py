"""Tiny random models of many families, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
PLAIN = {k: SMALL[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
WIDE = {**PLAIN, "intermediate_size": 48}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}

FAMILIES: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama-untied": lambda: hf.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "gemma": lambda: hf.GemmaConfig(**SMALL),
    "gemma2": lambda: hf.Gemma2Config(**SMALL),
    "gemma3": lambda: hf.Gemma3TextConfig(**SMALL),
    "gpt2": lambda: hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64),
    "neox": lambda: hf.GPTNeoXConfig(**WIDE),
    "gptj": lambda: hf.GPTJConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=64, rotary_dim=4),
    "opt": lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=32),
    "opt-projected": lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "phi3": lambda: hf.Phi3Config(**SMALL),
    "bloom": lambda: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64),
    "nemotron": lambda: hf.NemotronConfig(**SMALL),
    "olmo2": lambda: hf.Olmo2Config(**SMALL),
    "cohere": lambda: hf.CohereConfig(**SMALL),
    "mixtral": lambda: hf.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "qwen2moe": lambda: hf.Qwen2MoeConfig(**SMALL, **EXPERTS, shared_expert_intermediate_size=24),
    "gptoss": lambda: hf.GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "t5": lambda: hf.T5Config(
        d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=64, feed_forward_proj="gated-gelu"
    ),
    "bert": lambda: hf.BertConfig(**WIDE, architectures=["BertForMaskedLM"]),
    "roberta": lambda: hf.RobertaConfig(**WIDE, architectures=["RobertaForMaskedLM"]),
    "electra": lambda: hf.ElectraConfig(**WIDE, embedding_size=16, architectures=["ElectraForMaskedLM"]),
    "vit": lambda: hf.ViTConfig(
        **{k: v for k, v in WIDE.items() if k != "vocab_size"}, image_size=16, patch_size=8,
        architectures=["ViTForImageClassification"],
    ),
    "convnext": lambda: hf.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32,
        architectures=["ConvNextForImageClassification"],
    ),
}  # fmt: skip


def build(family: str) -> Any:
    """The model in memory, every parameter (norm gains and biases too) moved off its initial value."""
    from neuropil.models.skeleton import model_class

    torch.manual_seed(0)
    config = FAMILIES[family]()
    model = model_class(config, family)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def saved(family: str, folder: Path, **options: Any) -> Any:
    """The model, after saving it to `folder`."""
    model = build(family)
    model.save_pretrained(folder, **options)
    return model
