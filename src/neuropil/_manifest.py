"""The manifest of an atlas: the model, its sites, and what made each group of columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import Any, Protocol, Union, get_args, get_origin, get_type_hints, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq

from neuropil import _parts
from neuropil._ranks import now
from neuropil.errors import AtlasError
from neuropil.neurons import Site

PACKAGES = ("neuropil", "torch", "transformers", "numpy", "pyarrow", "duckdb")
_KIND = "neuropil atlas"


@runtime_checkable
class Mapped(Protocol):
    """What an atlas needs to know of a model; `neuropil.models.Model` has it."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def sites(self) -> list[Site]: ...

    def tokens(self) -> list[str]:
        """The readable text of every token; empty where there is no tokenizer."""
        ...


def read(path: Path) -> dict[str, Any]:
    """The manifest of the atlas at `path`. Raises AtlasError if there is none, or none that can be used."""
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as bad:
        what = "is no atlas: it has no manifest.json" if path.is_dir() else "is no folder"
        raise AtlasError(f"{path} {what}; `neuropil atlas MODEL --out {path}` makes one") from bad
    except (OSError, ValueError) as bad:
        raise AtlasError(f"{file} cannot be read as an atlas manifest: {bad}") from bad
    if not isinstance(manifest, dict) or manifest.get("kind") != _KIND:
        raise AtlasError(f'{file} is no atlas manifest: it does not say "kind": "{_KIND}"')
    if manifest.get("format") != _parts.FORMAT:
        raise AtlasError(
            f"{path} has atlas format {manifest.get('format')!r}; this version reads format {_parts.FORMAT}. "
            "Use the version of neuropil that made it, or make the atlas anew"
        )
    if missing := {"model", "sites", "groups", "vocabulary"} - set(manifest):
        raise AtlasError(f"{file} lacks {', '.join(sorted(missing))}; make the atlas anew in a new folder")
    return manifest


def write(path: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest, whole."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    _parts.atomic_write(path / "manifest.json", text.encode(), "The parts written before are safe. ")


def begin(path: Path, model: Mapped) -> None:
    """Write the vocabulary and then, as the last thing, the manifest of a new atlas."""
    tokens = list(model.tokens() or [])
    table = {"token_id": pa.array(range(len(tokens)), pa.int32()), "token": pa.array(tokens, pa.string())}
    _parts.atomic_write(path / "vocabulary.parquet", _parts.to_bytes(pa.table(table)))
    (path / "parts").mkdir(exist_ok=True)
    source = getattr(model, "source", None) or getattr(model, "path", None)
    about = {
        "name": model.name,
        "source": str(source) if source else model.name,
        "fingerprint": model.fingerprint,
        "architecture": model.architecture,
        "parameters": getattr(model, "parameters", None),
    }
    manifest = {
        "kind": _KIND,
        "format": _parts.FORMAT,
        "created": now(),
        "versions": versions(),
        "model": about,
        "vocabulary": len(tokens),
        "sites": [site_entry(site) for site in model.sites],
        "groups": {},
    }
    write(path, manifest)


def entry(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of a new group."""
    return {
        "method": method,
        "settings": dict(settings),
        "digest": _parts.digest(settings),
        "created": now(),
        "versions": versions(),
        "columns": {},
    }


def same_settings(path: Path, group: str, there: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise AtlasError, with the differences, unless the group was made with these settings."""
    if there["digest"] == _parts.digest(settings):
        return
    old = there["settings"]
    keys = sorted(k for k in {*old, *settings} if old.get(k) != settings.get(k))
    told = "; ".join(f"{k}: {old.get(k)!r} there, {settings.get(k)!r} now" for k in keys)
    raise AtlasError(
        f"{path} has group {group!r} with other settings ({told}). Use a new folder, the same settings, or "
        "overwrite=True (--overwrite) to replace the group."
    )


def same_model(path: Path, manifest: Mapping[str, Any], model: Mapped) -> None:
    """Raise AtlasError unless the atlas is of this model."""
    there = manifest["model"]
    if there["fingerprint"] != model.fingerprint:
        raise AtlasError(
            f"{path} is the atlas of {there['name']!r} (fingerprint {there['fingerprint'][:12]}), not of "
            f"{model.name!r} ({model.fingerprint[:12]}); choose another folder"
        )


def make_folder(path: Path) -> None:
    """Make the folder of a new atlas. Raises AtlasError if it holds something else."""
    ours = {".lock", "vocabulary.parquet", "parts"}  # a killed `create` may have left these
    try:
        path.mkdir(parents=True, exist_ok=True)
        others = [p.name for p in path.iterdir() if p.name not in ours and not p.name.endswith(".tmp")]
    except OSError as bad:
        raise AtlasError(f"cannot make an atlas at {path}: {bad.strerror}") from bad
    if others:
        raise AtlasError(f"{path} is not empty ({few(others)}) and no atlas; choose a new folder")


def vocabulary(path: Path) -> pa.Table:
    """The table (token_id, token). Raises AtlasError if its file is missing or damaged."""
    file = path / "vocabulary.parquet"
    try:
        if _parts.broken(file, deep=True):
            raise OSError("its bytes are not as they were written")
        return pq.read_table(file)
    except (OSError, pa.ArrowException) as bad:
        raise AtlasError(f"{file} is missing or damaged ({bad}); make the atlas anew in a new folder") from bad


def site_entry(site: Site) -> dict[str, Any]:
    """A `Site` as plain values: all that two equal sites have in common."""
    return {f.name: _flat(getattr(site, f.name)) for f in fields(site) if f.compare}


def site(entry: Mapping[str, Any]) -> Site:
    """The `Site` of an entry that `site_entry` made."""
    found: Site = _typed(Site, entry)
    return found


def _flat(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _flat(v) for key, v in value.items()}
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _typed(kind: Any, value: Any) -> Any:
    """`value` as what the annotation `kind` says: a dataclass, a dict of them, either or None, or plain."""
    if value is None:
        return None
    if get_origin(kind) in (Union, UnionType):
        kind = next(k for k in get_args(kind) if k is not type(None))
    if get_origin(kind) is dict:
        return {key: _typed(get_args(kind)[1], v) for key, v in value.items()}
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return kind(**{f.name: _typed(hints[f.name], value[f.name]) for f in fields(kind) if f.name in value})
    return value


def versions() -> dict[str, str]:
    """The versions of the packages that the values may depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def few(names: list[str], n: int = 4) -> str:
    """The first names, for a message."""
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(repr(name) for name in names[:n]) + more
