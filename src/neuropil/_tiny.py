"""Model types of transformers at tiny configurations, for `coverage`.

One rule shrinks every configuration: attributes are set small by what their name says. `_OVERRIDES` holds what a
type needs besides.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class NotHere(Exception):  # noqa: N818 - reads as the sentence it is
    """A model type that cannot be built in this environment, with the reason."""


# True statements only: the run fails a model type that is listed here and has sites.
OUT_OF_SCOPE: dict[str, str] = {
    "mamba": "no MLP: state-space blocks alone",
    "falcon_mamba": "no MLP: state-space blocks alone",
    "mamba2": "no MLP: state-space blocks alone",
}

_VOCABULARY = 120
_MOST_PARAMETERS = 40_000_000

# Attributes of a configuration, by what their name says, and what they shrink to.
_SMALL: tuple[tuple[str, int], ...] = (
    (r"hidden_size|d_model|n_embd|embed_dim|model_dim|dim|emb_dim|n_embed|word_embed_proj_dim|true_hidden_size|"
     r"pooler_output_size|attention_hidden_size|lru_width|backbone_hidden_size|output_embedding_size|"
     r"hidden_size_global", 32),
    (r"intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|encoder_ffn_dim|decoder_ffn_dim|dff|dim_ff|"
     r"intermediate_size_mlp|dense_intermediate_size|feed_forward_size|mlp_dim|shared_intermediate_size|"
     r"hidden_dim", 48),
    (r"\w*moe\w*intermediate_size|shared_experts?_intermediate_size|expert_ffn_hidden_size", 24),
    (r"num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_encoder_layers|"
     r"num_decoder_layers|depth|num_layers_per_stack|num_blocks", 2),
    (r"num_attention_heads|n_heads?|num_heads|encoder_attention_heads|decoder_attention_heads|attention_heads|"
     r"num_encoder_attention_heads|num_decoder_attention_heads|swa_num_attention_heads", 4),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|swa_num_key_value_heads", 2),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts", 4),
    (r"num_experts_per_tok(en)?|moe_top_k|moe_topk|moe_k|top_k_experts", 2),
    (r"n_groups?|topk_group|num_expert_group", 1),
    (r"\w*vocab_size\w*", _VOCABULARY),
    (r"head_dim|attention_head_dim|v_head_dim|qk_nope_head_dim|qk_rope_head_dim|global_head_dim|dim_head|d_head|"
     r"swa_head_dim|kv_channels|d_kv|swa_v_head_dim", 8),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|qk_head_dim", 16),
    (r"image_size", 32),
    (r"mamba_n_heads|mamba_num_heads", 4),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim|mamba_d_state|ssm_state_size|state_size|index_head_dim", 16),
    (r"mamba_n_groups|mamba_ngroups|n_mamba_groups", 1),
    (r"mamba_d_ssm", 64),
    (r"linear_num_key_heads|linear_num_value_heads|linear_num_heads|index_n_heads", 2),
    (r"linear_key_head_dim|linear_value_head_dim|linear_head_dim", 8),
    (r"index_topk\w*", 4),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|max_source_positions", 64),
    (r"first_k_dense_replace", 1),
)  # fmt: skip

# Tried all the same; where it fails, it is for this reason.
_UNBUILDABLE = dict.fromkeys(
    ("gemma4_assistant", "gemma4_unified_assistant"),
    "its configuration needs all layers to share keys and values, which the attention it is made of refuses",
)

# By type: attributes to set ("text_config.x" reaches a part), after the general rule.
_SWIN = {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
_INDEXER = {"indexer_budget": 4, "indexer_compress_ratio": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1,
            "indexer_head_dim": 16}  # fmt: skip
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "clip": {"vision_config.patch_size": 8},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "donut-swin": _SWIN,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4,
                                                                   "mrope_section": [1, 1, 2]}}},
    "esm": {"vocab_size": 120, "pad_token_id": 1, "mask_token_id": 32},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48,
                                         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
                                         "global_head_dim": 8, "vocab_size": 120, "hidden_size_per_layer_input": 0,
                                         "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2,
                                         "max_position_embeddings": 64,
                                         "layer_types": ["sliding_attention", "full_attention"]},
                         "backbone_hidden_size": 32},
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 2, "text_config.per_layer_config": {}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "mobilebert": {"hidden_size": 64, "embedding_size": 32, "true_hidden_size": 128, "intra_bottleneck_size": 128},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 2, "d_model": 32, "image_size": 32},
    "qwen4_exp": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": [4, 16], "axial_pos_embds_dim": [16, 16], "hidden_size": 32,
                 "attn_layers": ["local", "local"], "local_attn_chunk_length": 8, "feed_forward_size": 48},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6, "image_token_index": 7, "mm_tokens_per_image": 4,
                     "vision_config.patch_size": 8},
    "squeezebert": {"embedding_size": 32},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "mamba", "hybrid", "hybrid"]},
}  # fmt: skip
_ARGUMENTS: dict[str, dict[str, Any]] = {"blt": {"use_cache": False}, "hrm_text": {"use_cache": False}}
_ROWS = {"musicgen": 8, "musicgen_melody": 8}  # rows of input for a batch of two: a row a codebook


def build(model_type: str, class_name: str, mapping: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model with random weights, in evaluation mode, and inputs for it."""
    import transformers

    made = getattr(transformers, class_name, None)
    if made is None:
        raise NotHere(f"transformers has no class {class_name} here")
    errors = []
    for values in _settings(made.config_class, model_type, class_name):
        try:
            config = made.config_class(**values)
            with torch.device("meta"):
                size = sum(p.numel() for p in made._from_config(config).parameters())
            if size > _MOST_PARAMETERS:
                raise RuntimeError(f"{size:,} parameters is not tiny")
            model = made._from_config(config).eval()
            _randomise(model)
            inputs = _inputs(model, model_type, mapping)
            with torch.no_grad():
                model(**inputs)
            return model, inputs
        except ImportError as missing:
            raise NotHere(" ".join(str(missing).split(". ")[0].split())) from missing
        except TimeoutError:
            raise
        except Exception as bad:
            errors.append(bad)
    if model_type in _UNBUILDABLE:
        raise NotHere(f"transformers {transformers.__version__} cannot build it: {_UNBUILDABLE[model_type]}")
    raise RuntimeError(f"no tiny configuration: {type(errors[0]).__name__}: {errors[0]}") from errors[0]


def _settings(config_class: type, model_type: str, class_name: str) -> Iterator[dict[str, Any]]:
    """Keyword arguments of tiny configurations, likeliest first."""
    from transformers import PretrainedConfig

    try:
        default = config_class()
    except Exception:
        default = PretrainedConfig()
    overrides = _OVERRIDES.get(model_type, {})
    if model_type == "reformer" and "MaskedLM" in class_name:
        overrides = {**overrides, "is_decoder": False}
    for ratio in (0, 16, 4):
        values = _shrunk(default, ratio)
        for path, value in overrides.items():
            inner = values
            *parents, last = path.split(".")
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = value
        yield values


def _shrunk(config: Any, ratio: int) -> dict[str, Any]:
    """What to pass to the configuration's class.

    With a ratio, widths are divided by it instead of set, so that their relations hold.
    """
    values: dict[str, Any] = {}
    layers = 2
    attributes = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    count = next(
        (attributes[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(attributes.get(k), int)), 0
    )
    per_layer = {k: v for k, v in attributes.items() if isinstance(v, list) and len(v) == count > 2}
    keep = _layers_to_keep(per_layer, count)
    for name, value in attributes.items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            values[name] = _shrunk(value, ratio) | ({"model_type": value.model_type} if value.model_type else {})
        elif name in per_layer:
            values[name] = [value[k] for k in keep]
        elif isinstance(value, int) and not isinstance(value, bool):
            small = next((n for pattern, n in _SMALL if re.fullmatch(pattern, name)), None)
            if small == layers:
                values[name] = (
                    (len(keep) if per_layer else layers) if "layer" in name or name == "depth" else min(value, small)
                )
            elif small is not None and ratio and small in (32, 48, 24, 8, 16) and value > 64:
                values[name] = max(4, value // ratio)
            elif small is not None and ratio and "head" in name:
                continue
            elif small is not None:
                values[name] = min(value, small)
            elif re.search(r"token_(id|index)$|^(mask|image)_\w*(index|id)$", name) and value >= _VOCABULARY:
                values[name] = 60 + len(values) % 50
        elif name == "image_size" and isinstance(value, list | tuple):
            values[name] = [64, 64]
        elif name == "depths" and isinstance(value, list | tuple):
            values[name] = [min(2, d) for d in value]
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values.get("num_attention_heads", 4)  # latent attention has no groups
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if isinstance(attributes.get(name), int | list):
            values[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, 1)
    return values


def _layers_to_keep(per_layer: dict[str, list[Any]], count: int) -> list[int]:
    """The first layer of each sort, so that a tiny model still has all sorts."""
    seen: dict[str, int] = {}
    for k in range(count):
        seen.setdefault(repr([str(v[k]) for v in per_layer.values()]), k)
    keep = sorted(seen.values())[:4]
    return keep if len(keep) > 1 else [*keep, 1]


def _randomise(model: nn.Module) -> None:
    """Weights none of which is zero or unset, so that what is clamped is felt."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if not p.is_floating_point():
            continue
        with torch.no_grad():
            if p.dim() >= 2:
                # Convolutions lose half their signal to each rectifier and have no norm to restore it here.
                spread = (2.0 if p.dim() == 4 else 1.0) * p[0].numel() ** -0.5
                p.normal_(0, min(0.5, spread), generator=generator)
            else:
                noise = torch.empty_like(p).normal_(0, 0.1, generator=generator)
                unset = torch.nan_to_num(p, 0.0, 0.0, 0.0).clamp(-4, 4)
                p.copy_(noise + (1.0 if name.endswith("weight") else unset))


def _inputs(model: nn.Module, model_type: str, mapping: str) -> dict[str, Any]:
    """A batch of two for this model."""
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    if model_type.startswith("gemma4") and model_type.endswith("assistant"):
        return _drafting(config, generator)
    if model_type == "siglip2":  # takes patches, each with its channels, and says how they lie
        patches = torch.randn(2, 16, 3 * config.vision_config.patch_size**2, generator=generator)
        return {"pixel_values": patches, "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
                "spatial_shapes": torch.tensor([[4, 4], [4, 4]])}  # fmt: skip
    if model_type == "shieldgemma2":  # asks a question about an image, whose place in the text is marked
        words = torch.randint(8, 60, (2, 6), generator=generator)
        ids = torch.cat([torch.full((2, config.mm_tokens_per_image), config.image_token_index), words], 1)
        size = config.vision_config.image_size
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    takes_pixels = "pixel_values" in inspect.signature(model.forward).parameters
    if mapping == "image-classification" and takes_pixels:
        size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", 64)
        high, wide = (size, size) if isinstance(size, int) else tuple(size or (64, 64))
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.randn(2, channels, high, wide, generator=generator)}
    ids = torch.randint(5, 40, (_ROWS.get(model_type, 2), 8), generator=generator)
    if mapping == "image-classification" and "input_ids" in inspect.signature(model.forward).parameters:
        return {"input_ids": ids}
    inputs: dict[str, Any] = {"input_ids": ids, **_ARGUMENTS.get(model_type, {})}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def _drafting(config: Any, generator: torch.Generator) -> dict[str, Any]:
    """What a drafting model takes from the model it drafts for: embeddings with hidden states, keys and values."""
    text = config.text_config
    embeddings = torch.randn(2, 8, 2 * config.backbone_hidden_size, generator=generator)
    cached = torch.randn(2, text.num_key_value_heads, 8, text.head_dim, generator=generator)
    return {
        "inputs_embeds": embeddings,
        "shared_kv_states": dict.fromkeys(text.layer_types, (cached, cached)),
        "position_ids": torch.arange(8).expand(2, 8),
    }
