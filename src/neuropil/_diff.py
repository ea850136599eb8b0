"""Two atlases of models of one shape (pretrained and fine-tuned, say) compared neuron by neuron."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from neuropil.errors import AtlasError

if TYPE_CHECKING:
    from neuropil.atlas import Atlas

_IDS = re.compile(r"(?!label)\w+?(_neg)?_token_ids\Z")
_NOWHERE = (
    -1,
    -2,
)  # fillers of lists shorter than the longest, unlike in the two atlases and unlike any token


@dataclass(frozen=True)
class Diff:
    """What two atlases say differently of the same neurons.

    `same` is the share of neurons whose first token is the same in both, `jaccard` the mean over neurons of
    |A ∩ B| / |A ∪ B| of their two lists of top tokens, each by list ("up" is the list `up_token_ids`,
    "up_neg" the most negative ones). `by_site` has both for every site; `changed` the neurons whose label
    differs, the most specialised first.
    """

    neurons: int
    same: dict[str, float]
    jaccard: dict[str, float]
    by_site: pa.Table
    changed: pa.Table

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "neurons": self.neurons,
            "same": self.same,
            "jaccard": self.jaccard,
            "by_site": self.by_site.to_pylist(),
            "changed": self.changed.to_pylist(),
        }


def diff(before: Atlas, after: Atlas) -> Diff:
    """Compare the decodings of two atlases, neuron by neuron of the same address.

    Davies 2025 (arXiv 2501.02688) reports the share of equal first tokens (`same["up"]`) of Llama 3.1 8B and
    its instruction-tuned version as above 0.75. Raises AtlasError if the models are of different shape or
    have different vocabularies, or if the atlases have no decoded list in common.
    """
    _same_shape(before, after)
    lists = [c for c in before.columns if _IDS.match(c) and c in after.columns]
    if not lists:
        raise AtlasError(
            f"{before.path} and {after.path} have no decoded tokens in common; run `neuropil atlas` for both "
            "with the same --weights"
        )
    labelled = "label" in before.columns and "label" in after.columns
    rows: list[dict[str, Any]] = []
    for site in before.sites:
        old, new = (_site_columns(atlas, site.number, lists) for atlas in (before, after))
        for name in lists:
            both = [i for i, (a, b) in enumerate(zip(old[name], new[name], strict=True)) if a and b]
            if not both:
                continue
            a = _matrix([old[name][i] for i in both], _NOWHERE[0])
            b = _matrix([new[name][i] for i in both], _NOWHERE[1])
            shares = {"same": float((a[:, 0] == b[:, 0]).mean()), "jaccard": float(jaccard(a, b).mean())}
            about = {"weight": name.removesuffix("_token_ids"), "site": site.number, "layer": site.layer}
            rows.append({**about, "neurons": len(both), **shares})
    if not rows:
        raise AtlasError(f"{before.path} and {after.path} have no decoded neuron in common; finish both atlases")
    changed, schema = list(_changed(before, after)) if labelled else [], _changed_schema(before, after)
    kinds = dict.fromkeys(row["weight"] for row in rows)
    return Diff(
        neurons=sum(row["neurons"] for row in rows if row["weight"] == rows[0]["weight"]),
        same={kind: _mean(rows, kind, "same") for kind in kinds},
        jaccard={kind: _mean(rows, kind, "jaccard") for kind in kinds},
        by_site=pa.Table.from_pylist(rows),
        changed=pa.Table.from_pylist(changed, schema=schema),
    )


def jaccard(a: Int[np.ndarray, "n j"], b: Int[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """|A ∩ B| / |A ∪ B| of the sets in each row; negative entries are fillers.

    >>> jaccard(np.array([[1, 2], [3, -1]]), np.array([[2, 5], [3, -2]])).round(3)
    array([0.333, 1.   ])
    """
    common = (a[:, :, None] == b[:, None, :]).sum((1, 2))
    union = (a >= 0).sum(1) + (b >= 0).sum(1) - common
    return common / np.maximum(union, 1)


def _mean(rows: list[dict[str, Any]], kind: str, key: str) -> float:
    chosen = [row for row in rows if row["weight"] == kind]
    return float(np.average([row[key] for row in chosen], weights=[row["neurons"] for row in chosen]))


def _same_shape(before: Atlas, after: Atlas) -> None:
    shapes = [[(site.number, site.width) for site in atlas.sites] for atlas in (before, after)]
    if shapes[0] != shapes[1]:
        told = [f"{len(shape)} sites, {sum(w for _, w in shape)} neurons" for shape in shapes]
        raise AtlasError(
            f"{before.path} ({told[0]}) and {after.path} ({told[1]}) are of models of different shape; only "
            "models with the same layers can be compared neuron by neuron"
        )
    words = [atlas.query("SELECT token_id, token FROM vocabulary ORDER BY token_id") for atlas in (before, after)]
    if all(len(w) for w in words) and not words[0].equals(words[1]):
        raise AtlasError(
            f"{before.path} and {after.path} have different vocabularies ({len(words[0])} and "
            f"{len(words[1])} tokens); their token ids cannot be compared"
        )


def _site_columns(atlas: Atlas, site: int, names: list[str]) -> dict[str, list[Any]]:
    chosen = ", ".join(f'"{name}"' for name in names)
    table = atlas.query(f"SELECT {chosen} FROM neurons WHERE site = ? ORDER BY index", [site])
    return {name: table[name].to_pylist() for name in names}


def _matrix(lists: list[list[int]], filler: int) -> Int[np.ndarray, "n k"]:
    out = np.full((len(lists), max(map(len, lists))), filler, dtype=np.int64)
    for i, row in enumerate(lists):
        out[i, : len(row)] = row
    return out


def _changed_schema(before: Atlas, after: Atlas) -> pa.Schema:
    fields = [("neuron", pa.string()), ("layer", pa.int32()), ("before", pa.string()), ("after", pa.string())]
    if "specialisation" in before.columns and "specialisation" in after.columns:
        fields += [("specialisation_before", pa.float32()), ("specialisation_after", pa.float32())]
    return pa.schema(fields)


def _changed(before: Atlas, after: Atlas) -> Iterator[dict[str, Any]]:
    score = len(_changed_schema(before, after)) > 4
    sql = (
        f"SELECT neuron, layer, label{', specialisation' if score else ''} FROM neurons "
        "WHERE label IS NOT NULL ORDER BY site, index"
    )
    new = {row["neuron"]: row for row in after.query(sql).to_pylist()}
    pairs = [(a, new[a["neuron"]]) for a in before.query(sql).to_pylist() if a["neuron"] in new]
    pairs = [(a, b) for a, b in pairs if a["label"] != b["label"]]
    if score:
        pairs.sort(key=lambda pair: -max(p["specialisation"] or 0.0 for p in pair))
    for a, b in pairs:
        row = {"neuron": a["neuron"], "layer": a["layer"], "before": a["label"], "after": b["label"]}
        if score:
            row |= {"specialisation_before": a["specialisation"], "specialisation_after": b["specialisation"]}
        yield row
