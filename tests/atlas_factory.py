"""A small real atlas for tests: the columns of groups `decode` and `causal` over a tiny random Llama.

    tiny_atlas(path, sites=3, width=16, causal=True) -> path

The values are random (from a seed) but of the real types and lengths. A few neurons are planted:
`0:0` has label "dog" and suppresses it, `1:1` has " dogs" in `down_tokens`, `2:2` (if there is a third site)
has label "puppy".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from neuropil.atlas import Atlas
from neuropil.neurons import Site, find_sites

WORDS = str.split(
    "dog dogs Dog cat cats water river money bank Paris France London England run running runs king queen "
    "red green blue music song tree forest sun moon star war peace doctor hospital school teacher book read "
    "computer phone table chair house door window bread cheese apple puppy horse bird fish sea ship"
)
TOKENS = [*WORDS, *(" " + w for w in WORDS), "ing", ",", ".", "\n", "<|end|>", "é", "日"]
TYPES = {
    "label_tokens": pa.list_(pa.int32()),
    **{f"{w}{n}_tokens": pa.list_(pa.string()) for w in ("up", "gate", "down") for n in ("", "_neg")},
}


@dataclass
class TinyModel:
    """What an atlas needs to know of a model."""

    sites: list[Site]
    name: str = "tiny-llama"
    fingerprint: str = "f" * 16
    architecture: str = "LlamaForCausalLM"
    parameters: int = 1234
    words: list[str] = field(default_factory=lambda: list(TOKENS))

    def tokens(self) -> list[str]:
        return self.words


def tiny_model(sites: int = 3, width: int = 16, fingerprint: str = "f" * 16) -> TinyModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=sites,
        intermediate_size=width,
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(TOKENS),
    )
    with torch.device("meta"):
        net = LlamaForCausalLM(config)
    return TinyModel(find_sites(net), fingerprint=fingerprint)


def decode_columns(site: Site, seed: int = 0, top_k: int = 5) -> dict[str, Any]:
    """The columns of group `decode` for one site."""
    rng = np.random.default_rng([seed, site.number])
    width = site.width
    label = rng.integers(0, len(WORDS), width).astype(np.int32)
    if site.number == 0:
        label[0] = WORDS.index("dog")
    if site.number == 2:
        label[min(2, width - 1)] = WORDS.index("puppy")
    spread = rng.random(width).astype(np.float32) + 0.5
    spread[0] = 2.0
    out: dict[str, Any] = {
        "label": [WORDS[i].lower() for i in label],
        "label_token": label,
        "label_tokens": [[int(i), int(i) + len(WORDS)] for i in label],
        "label_from": ["up"] * width,
        "label_sign": rng.choice(np.array([-1, 1], np.int8), width),
        **{f"cos_{w}": (rng.random(width) - 0.5).astype(np.float32) for w in ("up", "gate", "down")},
        "specialisation": spread,
        "null_percentile": rng.random(width).astype(np.float32) * 100,
        "coherence": rng.random(width).astype(np.float32),
        "hub": rng.random(width) < 0.1,
        "specialised": spread > 1,
    }
    for w in ("up", "gate", "down"):
        for side in ("", "neg_"):
            ids = np.stack([rng.permutation(len(TOKENS))[:top_k] for _ in range(width)]).astype(np.int32)
            if site.number == 1 and w == "down" and not side and width > 1:
                ids[1, -1] = TOKENS.index(" dogs")
            sign = -1 if side else 1
            out[f"{w}_{side}tokens"] = [[TOKENS[i] for i in row] for row in ids]
            out[f"{w}_{side}token_ids"] = torch.from_numpy(ids)
            out[f"{w}_{side}scores"] = torch.from_numpy(
                sign * -np.sort(-rng.random((width, top_k)), axis=1).astype(np.float32)
            )
        out[f"{w}_label"] = [row[0].strip().lower() for row in out[f"{w}_tokens"]]
        out[f"{w}_norm"] = rng.random(width).astype(np.float32)
        out[f"{w}_null"] = rng.random(width).astype(np.float32) * 100
        out[f"{w}_hub_tokens"] = rng.integers(0, 9, width).astype(np.int32)
    out["up_probability"] = rng.random(width).astype(np.float32)
    return out


def causal_columns(site: Site, seed: int = 0) -> dict[str, Any]:
    """The columns of group `causal` for one site."""
    rng = np.random.default_rng([seed, site.number, 1])
    width = site.width
    out: dict[str, Any] = {
        name: rng.standard_normal(width).astype(np.float32)
        for name in (
            "effect",
            "effect_se",
            "control",
            "control_se",
            "effect_up",
            "effect_down",
            "clamp_value",
        )
    }
    verdict = rng.choice(["promotes", "suppresses", "no effect"], width)
    if site.number == 0:
        verdict[0] = "suppresses"
    out["prompts"] = np.full(width, 16, np.int32)
    out["verdict"] = verdict.tolist()
    out["confirmed"] = verdict != "no effect"
    return out


def tiny_atlas(
    path: str | Path, sites: int = 3, width: int = 16, causal: bool = True, seed: int = 0, top_k: int = 5
) -> Path:
    """Build the atlas at `path` (a new or half-built folder) and return the path."""
    with Atlas.create(path, tiny_model(sites, width, fingerprint=f"{seed:016x}")) as atlas:
        settings = {"which": ["up", "gate", "down"], "score": "cosine", "top_k": top_k, "seed": seed}
        atlas.add(
            "decode",
            lambda site: decode_columns(site, seed, top_k),
            settings=settings,
            method="decode",
            types=TYPES,
            progress=False,
        )
        if causal:
            atlas.add(
                "causal",
                lambda site: causal_columns(site, seed),
                settings={"prompts": 16, "seed": seed},
                method="causal",
                progress=False,
            )
    return Path(path)
