"""Core neurons of groups of like texts, for prompts too short to show their own (similarity-guided CoreInfer).

Off line: each text's most used neurons in one deep layer make a vector of zeros and ones; k-means groups them; in
each group the tokens of all texts together rank the neurons of every layer. At run time a prompt's own vector finds
its group. `CoreInfer(model, mode="similarity", clusters=CoreClusters.fit(model, texts))` does the rest.

The authors' settings: alpha 0.4; the deep layer is the 25th of 32; its vector has 3000 neurons, 0.2 of the width of
their models; k is where the inertia over k = 1 to 10 bends most, and at least 4. Their code lets each group begin with
the neurons counted for the groups before it; here each has its own.

Source: see `neuropil.compress.coreinfer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from neuropil.compress._coreinfer_slots import Layers, find_slots
from neuropil.compress._coreinfer_usage import SCORES, Usage, share_of
from neuropil.evaluate import evaluating
from neuropil.neurons import find_sites
from neuropil.slots import Slot

Inputs = str | Tensor | Mapping[str, Any]
DEPTH, SHARE = 25 / 32, 0.2
LARGEST, SMALLEST = 10, 4


def row_mask(mask: Any, given: Tensor) -> Bool[Tensor, "batch length"]:
    """Which positions of a batch are real tokens."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -given.shape[1] :].bool()
    return torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)


@torch.no_grad()
def observe(
    model: nn.Module, slots: Sequence[Slot], inputs: Inputs, *, alpha: float, score: str, tokenizer: Any = None
) -> dict[str, Usage]:
    """How the tokens of one input use the neurons of each slot; all rows together, padding left out.

    Raises ValueError for a text without its tokenizer and for an input without tokens.
    """
    arguments, valid = read_inputs(inputs, tokenizer)
    usages = {slot.site.name: Usage.none(slot.site.width, slot.device) for slot in slots}

    def count(usage: Usage) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            h = args[0].detach()
            h = h.flatten(0, -2) if valid is None else h.reshape(*valid.shape, -1)[valid]
            usage.add(h, alpha, score)

        return hook

    hooks = [slot.write.register_forward_pre_hook(count(usages[slot.site.name])) for slot in slots]
    try:
        with evaluating(model):
            model(**arguments) if isinstance(arguments, dict) else model(arguments)
    finally:
        for handle in hooks:
            handle.remove()
    return usages


def read_inputs(inputs: Inputs, tokenizer: Any) -> tuple[dict[str, Any] | Tensor, Tensor | None]:
    """What to call the model with, and which positions are real tokens (None where all are)."""
    if isinstance(inputs, str):
        if tokenizer is None:
            raise ValueError("a text needs its tokenizer: give tokenizer=..., or token ids instead of the text")
        inputs = dict(tokenizer(inputs, return_tensors="pt"))
    if isinstance(inputs, Mapping):
        arguments = dict(inputs)
        given = arguments.get("input_ids", arguments.get("inputs_embeds"))
        valid = row_mask(arguments.get("attention_mask"), given) if isinstance(given, Tensor) else None
        size = int(valid.sum()) if valid is not None else 1
        if size == 0:
            raise ValueError("an empty text: there is no token whose neurons could be counted")
        return arguments, valid
    if inputs.numel() == 0:
        raise ValueError("an empty input: there is no token whose neurons could be counted")
    return inputs, None


@dataclass(frozen=True)
class CoreClusters:
    """Groups of texts, and how often each neuron is core in each.

    probe: the site whose neurons tell the groups apart.
    centres: one a group, the share of its texts whose vector has the neuron.
    rankings: site name -> neurons of each group in the order of use, -1 where no more were used.
    labels: the group of each text that was given.
    """

    probe: str
    centres: Float[Tensor, "k width"]
    rankings: Mapping[str, Int[Tensor, "k _"]] = field(repr=False)
    labels: Int[Tensor, " texts"]
    alpha: float = 0.4
    score: str = "abs"
    share: float = SHARE

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        texts: Sequence[Inputs],
        *,
        k: int | None = None,
        alpha: float = 0.4,
        score: str = "abs",
        layers: Layers = None,
        probe: int | None = None,
        share: float = SHARE,
        tokenizer: Any = None,
        seed: int = 42,
    ) -> CoreClusters:
        """Group these texts by their core neurons. `k=None` finds the number of groups, `probe` is a layer's number.

        Raises ValueError for settings out of range, and for fewer texts than groups.
        """
        if not texts or (k is not None and not 1 <= k <= len(texts)):
            raise ValueError(f"{len(texts)} texts in k={k} groups: expected at least one text a group")
        if not (0 < alpha <= 1 and 0 < share <= 1) or score not in SCORES:
            raise ValueError(
                f"alpha={alpha}, share={share}, score={score!r}: expected shares in (0, 1], one of {SCORES}"
            )
        slots, _ = find_slots(model, layers)
        deep = _probe(model, probe)
        watched = [*slots, *([deep] if deep.site.name not in {s.site.name for s in slots} else [])]
        seen = [observe(model, watched, text, alpha=alpha, score=score, tokenizer=tokenizer) for text in texts]
        vectors = torch.stack([multi_hot(usages[deep.site.name], share) for usages in seen])
        labels, centres = _grouped(vectors, k, seed)
        rankings = {
            slot.site.name: torch.stack([_ranking([u[slot.site.name] for u in _members(seen, labels, g)], slot)
                                         for g in range(len(centres))])
            for slot in slots
        }  # fmt: skip
        return cls(deep.site.name, centres, rankings, labels, alpha, score, share)

    def predict(self, usage: Usage) -> int:
        """The group whose centre is nearest to a prompt that uses the probe's neurons so."""
        vector = multi_hot(usage, self.share).to(self.centres)
        return int((self.centres - vector).square().sum(1).argmin())

    def core(self, group: int, site: str, keep: float) -> Int[Tensor, " kept"]:
        """A group's core neurons of one site, ascending; all neurons for `keep=1`."""
        ranking = self.rankings[site][group]
        if keep == 1:
            return torch.arange(len(ranking))
        kept = ranking[: share_of(keep, len(ranking))]
        return kept[kept >= 0].sort().values

    def probes(self, model: nn.Module) -> list[Slot]:
        """The probe's place in a model, as a list of one."""
        number = {site.name: site.number for site in find_sites(model)}.get(self.probe)
        if number is None:
            raise ValueError(f"the clusters were fitted on another model: this one has no site {self.probe!r}")
        return [_probe(model, number)]

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for `torch.save`; `CoreClusters(**state)` is the same again."""
        return {**vars(self), "rankings": dict(self.rankings)}


def multi_hot(usage: Usage, share: float) -> Float[Tensor, " width"]:
    """1 for the most used neurons (this share of all), 0 for the others."""
    vector = torch.zeros(len(usage.counts))
    vector[usage.ranking()[: max(1, share_of(share, len(vector)))].cpu()] = 1
    return vector


def _probe(model: nn.Module, number: int | None) -> Slot:
    count = len(find_sites(model))
    return find_slots(model, [min(int(DEPTH * count), count - 1) if number is None else number])[0][0]


def _members(seen: list[dict[str, Usage]], labels: Tensor, group: int) -> list[dict[str, Usage]]:
    return [usages for usages, label in zip(seen, labels.tolist(), strict=True) if label == group]


def _ranking(usages: list[Usage], slot: Slot) -> Tensor:
    """Of the tokens of several texts together, filled up with -1."""
    pooled = Usage.none(slot.site.width, slot.device)
    for usage in usages:
        pooled.counts += usage.counts
        pooled.sizes += usage.sizes
    used = pooled.ranking().cpu()
    return torch.cat([used, torch.full((slot.site.width - len(used),), -1)])


def _grouped(vectors: Tensor, k: int | None, seed: int) -> tuple[Tensor, Tensor]:
    from sklearn.cluster import KMeans

    data = vectors.double().numpy()

    def kmeans(k: int) -> KMeans:
        return KMeans(k, n_init=10, random_state=seed).fit(data)

    if k is None:
        k = _elbow([kmeans(n).inertia_ for n in range(1, min(LARGEST, len(data)) + 1)], len(np.unique(data, axis=0)))
    found = kmeans(k)
    return torch.from_numpy(found.labels_).long(), torch.from_numpy(found.cluster_centers_).float()


def _elbow(inertias: Sequence[float], distinct: int) -> int:
    """Where the inertia over k bends most; at least 4, at most as many as there are different vectors."""
    bends = np.diff(inertias, 2)
    return min(max(SMALLEST, int(bends.argmax()) + 2 if len(bends) else 1), distinct)
