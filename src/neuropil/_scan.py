"""What is in an atlas folder at this moment: the finished parts, checked, and a database over them."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs

from neuropil import _manifest, _parts
from neuropil._parts import Stamp
from neuropil._sql import Engine
from neuropil.errors import AtlasError
from neuropil.neurons import Site

_FIRST = ("decode", "causal")  # the order of groups in the table; the others follow by age


@dataclass(frozen=True)
class Part:
    """A finished part whose stamp was found right."""

    path: Path
    schema: pa.Schema


@dataclass(frozen=True)
class Snapshot:
    """The finished parts at one moment. Replaced, never changed, so that readers need no lock."""

    key: tuple[Any, ...]
    manifest: dict[str, Any]
    sites: list[Site]
    parts: dict[str, dict[int, Part]]
    vocabulary: pa.Table
    memory: str

    @cached_property
    def engine(self) -> Engine:
        """The database over these parts, made when first asked for."""
        return _engine(self)

    def stamp(self, group: str, site: Site) -> Stamp:
        """What a part of this group and site must say of itself."""
        mark = self.manifest["groups"][group]["digest"]
        return Stamp(self.manifest["model"]["fingerprint"], group, site.name, site.number, site.width, mark)

    def verify(self, group: str | None = None) -> None:
        """Read parts whole, with their checksums. Raises AtlasError naming the damaged ones."""
        bad = []
        by_number = {site.number: site for site in self.sites}
        for name, parts in self.parts.items():
            for number, part in parts.items() if group in (None, name) else ():
                try:
                    _, wrong = _parts.inspect(part.path, self.stamp(name, by_number[number]), deep=True)
                except FileNotFoundError:
                    continue
                if wrong:
                    bad.append(f"{part.path}: {wrong}")
        _refuse(bad)


class Scanner:
    """Keeps the snapshot of one folder up to date; safe to call from many threads."""

    def __init__(self, path: Path, memory: str) -> None:
        self._path, self._memory = path, memory
        self._guard = threading.RLock()
        self._snapshot: Snapshot | None = None
        self._known: dict[tuple[Any, ...], Part] = {}
        self._read: tuple[tuple[Any, ...], dict[str, Any], list[Site]] = ((), {}, [])
        self._vocabulary: pa.Table | None = None

    def fresh(self) -> Snapshot:
        """The snapshot, made anew if files came or went since. Raises AtlasError naming bad parts."""
        with self._guard:
            seen = _stat(self._path / "manifest.json")
            if not seen or self._read[0] != seen:
                manifest = _manifest.read(self._path)
                self._read = (seen, manifest, [_manifest.site(entry) for entry in manifest["sites"]])
            if self._vocabulary is None:  # written once, before the first manifest
                self._vocabulary = _manifest.vocabulary(self._path)
            _, manifest, sites = self._read
            files = {group: _listing(self._path / "parts" / group) for group in manifest["groups"]}
            key = (seen, tuple(files.items()))
            if self._snapshot is None or self._snapshot.key != key:
                parts = self._collect(manifest, sites, files)
                self._snapshot = Snapshot(key, manifest, sites, parts, self._vocabulary, self._memory)
            return self._snapshot

    def _collect(
        self, manifest: dict[str, Any], sites: list[Site], files: dict[str, tuple[Any, ...]]
    ) -> dict[str, dict[int, Part]]:
        groups: dict[str, dict[int, Part]] = {}
        bad: list[str] = []
        known: dict[tuple[Any, ...], Part] = {}
        by_file = {f"{site.number:05d}.parquet": site for site in sites}
        for group in sorted(files, key=lambda g: _FIRST.index(g) if g in _FIRST else len(_FIRST)):
            mark, groups[group] = manifest["groups"][group]["digest"], {}
            for entry in files[group]:
                path = self._path / "parts" / group / entry[0]
                if (site := by_file.get(entry[0])) is None:
                    bad.append(f"{path}: foreign: no site of this model has that number")
                    continue
                key = (group, mark, *entry)
                if (part := self._known.get(key)) is None:
                    fingerprint = manifest["model"]["fingerprint"]
                    stamp = Stamp(fingerprint, group, site.name, site.number, site.width, mark)
                    try:
                        schema, wrong = _parts.inspect(path, stamp)
                    except FileNotFoundError:  # taken away by a writer since it was listed
                        continue
                    if schema is None:
                        bad.append(f"{path}: {wrong}")
                        continue
                    part = Part(path, schema)
                known[key] = groups[group][site.number] = part
        _refuse(bad)
        self._known = known
        return groups


def _engine(snapshot: Snapshot) -> Engine:
    sites = snapshot.sites
    widths = np.array([site.width for site in sites], dtype=np.int64)
    numbers = np.array([site.number for site in sites], dtype=np.int32)
    tables: dict[str, pa.Table | ds.Dataset] = {
        "sites": pa.table(
            {
                "site": numbers,
                "module": pa.array([s.name for s in sites], pa.string()),
                "layer": pa.array([s.layer for s in sites], pa.int32()),
                "width": widths.astype(np.int32),
                "kind": pa.array([s.kind for s in sites], pa.string()),
                "activation": pa.array([s.activation for s in sites], pa.string()),
            }
        ),
        "_index": pa.table(
            {
                "site": np.repeat(numbers, widths),
                "index": np.concatenate([np.arange(w, dtype=np.int32) for w in widths]),
            }
        ),
        "vocabulary": snapshot.vocabulary,
    }
    views: dict[str, str] = {}
    chosen = ["n.site || ':' || n.index AS neuron", "n.site", "n.index", "s.layer", "s.module"]
    joins = ["_index n JOIN sites s ON s.site = n.site"]
    used = set(_parts.RESERVED)
    for group, found in snapshot.parts.items():
        if not found:
            continue
        schema = _parts.unify([part.schema for part in found.values()], group)
        data = f'"_group_{group}"'
        tables[data.strip('"')] = _dataset(found, schema)
        views[group] = f"SELECT site || ':' || index AS neuron, * FROM {data}"
        kind = "JOIN" if len(found) == len(sites) else "LEFT JOIN"
        joins.append(f"{kind} {data} ON {data}.site = n.site AND {data}.index = n.index")
        for name in schema.names[2:]:
            shown = name if name.lower() not in used else f"{group}_{name}"
            used.add(shown.lower())
            chosen.append(f'{data}."{name}" AS "{shown}"')
    views["neurons"] = f"SELECT {', '.join(chosen)} FROM {' '.join(joins)}"
    return Engine(tables, views, snapshot.memory)


def _refuse(bad: list[str]) -> None:
    if bad:
        lines = "\n".join(f"  {line}" for line in bad)
        what = "this part" if len(bad) == 1 else f"these {len(bad)} parts"
        mend = "Delete the named file(s) and run the same command again."
        raise AtlasError(f"the atlas cannot use {what}:\n{lines}\n{mend}")


def _stat(path: Path) -> tuple[Any, ...]:
    try:
        s = path.stat()
    except OSError:
        return ()
    return (s.st_ino, s.st_size, s.st_mtime_ns)


def _listing(folder: Path) -> tuple[Any, ...]:
    """The finished files of a folder, by name: name, inode, size, time. Hidden ones are not finished."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except FileNotFoundError:
        return ()
    return tuple((name, *stat) for name in names if (stat := _stat(folder / name)))


def _dataset(parts: dict[int, Part], schema: pa.Schema) -> ds.Dataset:
    options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    form = ds.ParquetFileFormat(default_fragment_scan_options=options)
    system = pyarrow.fs.LocalFileSystem()
    fragments = [
        # Knowing each file's site, a scan for one site opens one file.
        form.make_fragment(str(part.path.absolute()), system, partition_expression=ds.field("site") == number)
        for number, part in sorted(parts.items())
    ]
    return ds.FileSystemDataset(fragments, schema, form, system)
