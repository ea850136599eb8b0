"""Which neurons are like a given one: in their tokens, in the images that drive them, in their weights."""

from __future__ import annotations

from typing import Any

from neuropil.errors import NeuropilError
from neuropil.explorer.facts import Facts
from neuropil.explorer.view import literal


def by_tokens(facts: Facts, address: str, limit: int = 12) -> list[tuple[str, float]]:
    """Neurons whose top tokens overlap most with this one's: Jaccard index of the two sets.

    Compared are the lists, both sides, of the weight that this neuron has its label from.
    """
    own = facts.neuron(address)
    role = own.get("label_from") or "up"
    lists = [c for c in (f"{role}_token_ids", f"{role}_neg_token_ids") if c in facts.columns]
    if not lists:
        return []
    mine = sorted({int(t) for c in lists for t in own[c] or []})
    if not mine:
        return []
    ids = "list_concat(" + ", ".join(lists) + ")" if len(lists) > 1 else lists[0]
    rows = facts.rows(
        f"WITH t AS (SELECT neuron, list_distinct({ids}) AS ids FROM neurons), "
        f"n AS (SELECT neuron, len(ids) AS size, len(list_intersect(ids, {mine})) AS common FROM t) "
        f"SELECT neuron, common / ({len(mine)} + size - common) AS s FROM n "
        f"WHERE common > 0 AND neuron <> {literal(address)} ORDER BY s DESC, neuron LIMIT {limit}"
    )
    return [(row["neuron"], row["s"]) for row in rows]


def by_images(facts: Facts, address: str, limit: int = 12) -> list[tuple[str, float]]:
    """Neurons that share most of the images that drive them: Jaccard index of the two sets."""
    own = facts.neuron(address).get("exemplar_images")
    if not own:
        return []
    mine = sorted(set(map(int, own)))
    rows = facts.rows(
        "WITH n AS (SELECT neuron, len(exemplar_images) AS size, "
        f"len(list_intersect(exemplar_images, {mine})) AS common FROM neurons) "
        f"SELECT neuron, common / ({len(mine)} + size - common) AS s FROM n "
        f"WHERE common > 0 AND neuron <> {literal(address)} ORDER BY s DESC, neuron LIMIT {limit}"
    )
    return [(row["neuron"], row["s"]) for row in rows]


def by_rows(address: str, role: str, model: Any, everywhere: bool, limit: int = 12) -> list[tuple[str, float]]:
    """Neurons whose weight rows point the same way (or the opposite): cosine, by size."""
    number, index = (int(x) for x in address.split(":"))
    sites = {s.number: s for s in model.sites}
    if number not in sites or role not in sites[number].roles:
        raise NeuropilError(f"site {number} has no {role!r} weight")
    own = model.rows(sites[number], role)[index]
    own = own / own.norm().clamp_min(1e-12)
    best: list[tuple[str, float]] = []
    for site in sites.values() if everywhere else [sites[number]]:
        if role not in site.roles:
            continue
        rows = model.rows(site, role)
        if rows.shape[1] != own.shape[0]:
            continue
        cos = (rows @ own) / rows.norm(dim=1).clamp_min(1e-12)
        if site.number == number:
            cos[index] = 0
        top = cos.abs().topk(min(limit, site.width)).indices
        best += zip((f"{site.number}:{i}" for i in top.tolist()), cos[top].tolist(), strict=True)
    return sorted(best, key=lambda pair: -abs(pair[1]))[:limit]
