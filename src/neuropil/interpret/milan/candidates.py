"""Descriptions chosen or reranked by a model of pictures and words (CLIP and its kin), where the user has one.

    sim(d) = (1 - lam) sum_j s(x_j, m_j, d) + lam sum_j s(x_j, d)

`rerank` orders a wide beam of a captioner's sentences by it, `choose` a list of candidates without any captioner. The
authors added this in April 2022; it is not in the paper. Their settings are a beam of 1000 and a "temperature" of 0.5,
the word by which they also call the prior's share: here it is the default of both. Any object with
`images(pictures, masks) -> [n, d]` and `words(sentences) -> [m, d]` (unit vectors) will do; `HuggingFaceCLIP` makes one
of a CLIP of `transformers`, where a region is seen by multiplying what the class token attends to by the mask, in every
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from neuropil.interpret.milan.estimator import MILAN, Regions
from neuropil.interpret.milan.exemplars import ExemplarSet


@runtime_checkable
class PictureWords(Protocol):
    """Pictures (in 0..1, whole or of a region) and sentences as unit vectors of one space."""

    def images(self, pictures: Tensor, masks: Tensor | None) -> Tensor: ...

    def words(self, sentences: Sequence[str]) -> Tensor: ...


def similarity(
    model: PictureWords, regions: Regions, candidates: Sequence[Sequence[str]], lam: float = 0.5
) -> list[Float[Tensor, " candidates"]]:
    """How well each candidate of each unit fits its regions, and its pictures as a whole (`lam` of the sum)."""
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is {lam}; expected a share between 0 (regions alone) and 1 (whole pictures alone)")
    parts = (
        regions.batches(1)
        if isinstance(regions, ExemplarSet)
        else zip(regions[0].split(1), regions[1].split(1), strict=True)
    )
    found = []
    for (pictures, masks), texts in zip(parts, candidates, strict=True):
        x = pictures[0].float() / 255 if pictures.dtype == torch.uint8 else pictures[0].float()
        words = model.words(list(texts))
        seen = (1 - lam) * model.images(x, masks[0].float()).sum(0) + lam * model.images(x, None).sum(0)
        found.append(words @ seen)
    return found


def choose(
    model: PictureWords, regions: Regions, candidates: Sequence[str], lam: float = 0.5
) -> list[tuple[str, float]]:
    """The best of one list of candidates for each unit, and its similarity."""
    if not len(candidates):
        raise ValueError("candidates is empty; give at least one sentence")
    units = len(regions) if isinstance(regions, ExemplarSet) else len(regions[0])
    scores = similarity(model, regions, [candidates] * units, lam)
    return [(candidates[int(s.argmax())], float(s.max())) for s in scores]


def rerank(
    model: PictureWords, milan: MILAN, regions: Regions, *, beam: int = 1000, lam: float = 0.5
) -> list[list[tuple[str, float]]]:
    """The sentences of a wide beam of each unit with their similarities, best first."""
    found = milan.search(regions, beam=beam, lam=lam)
    real = found.score.isfinite()
    texts = [list(dict.fromkeys(milan.vocabulary_.decode(t[r]))) for t, r in zip(found.tokens, real, strict=True)]
    scores = similarity(model, regions, texts, lam)
    return [
        sorted(zip(names, s.tolist(), strict=True), key=lambda pair: -pair[1])
        for names, s in zip(texts, scores, strict=True)
    ]


class HuggingFaceCLIP:
    """A `transformers.CLIPModel` with its tokenizer as `PictureWords`; neither is changed.

    normalise   from pictures in 0..1 to what the vision model takes (resized and normalised)
    """

    def __init__(self, model: Any, tokenizer: Any, normalise: Callable[[Tensor], Tensor]) -> None:
        self.model, self.tokenizer, self.normalise = model, tokenizer, normalise

    @torch.no_grad()
    def images(self, pictures: Tensor, masks: Tensor | None) -> Tensor:
        vision = self.model.vision_model
        x = self.normalise(pictures)
        if masks is None:
            pooled = vision(pixel_values=x).pooler_output
        else:
            side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
            with _attention_to(vision, adaptive_avg_pool2d(masks, side).flatten(1)):
                pooled = vision(pixel_values=x).pooler_output
        return normalize(self.model.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def words(self, sentences: Sequence[str]) -> Tensor:
        given = self.tokenizer(list(sentences), padding=True, return_tensors="pt")
        pooled = self.model.text_model(**given).pooler_output
        return normalize(self.model.text_projection(pooled), dim=-1)


@contextmanager
def _attention_to(vision: Any, masks: Float[Tensor, "n patches"]) -> Iterator[None]:
    """While open, the class token's attention to the patches is multiplied by the mask."""
    from transformers import AttentionInterface

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, Tensor]:
        weights = (query @ key.transpose(2, 3) * scaling).softmax(-1)
        first = torch.cat([weights[:, :, :1, :1], weights[:, :, :1, 1:] * masks[:, None, None]], 3)
        weights = torch.cat([first, weights[:, :, 1:]], 2)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("neuropil_region", attend)
    configs = {id(m.config): m.config for m in vision.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config, _ in before:
            config._attn_implementation = "neuropil_region"
        yield
    finally:
        for config, kept in before:
            config._attn_implementation = kept
