"""The atlas: one table on disk with a row for each neuron of a model and a column for each thing known of it.

An atlas is a folder: `manifest.json` (the model, its sites, and for each *group* of columns the method and settings
that made it), and one Parquet *part* for each group and site. A part is written under a temporary name and renamed, so
that a run killed at any moment is resumed by running it again, and gives the same values.

>>> import tempfile, torch
>>> from neuropil.neurons import find_sites
>>> net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
>>> class Net:
...     name, fingerprint, architecture, sites = "net", "00ff", "Sequential", find_sites(net)
...     def tokens(self): return []
>>> folder = tempfile.TemporaryDirectory()
>>> with Atlas.create(folder.name, Net()) as atlas:
...     written = atlas.add("mine", lambda site: {"score": torch.arange(site.width)}, settings={}, progress=False)
...     atlas.query("SELECT neuron, score FROM neurons ORDER BY score DESC", limit=2).to_pylist()
[{'neuron': '0:4', 'score': 4}, {'neuron': '0:3', 'score': 3}]
>>> folder.cleanup()
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from neuropil import _parts
from neuropil._parts import Stamp
from neuropil._ranks import Lock, Ranks, busy, now
from neuropil._sql import Engine
from neuropil.errors import AtlasError
from neuropil.neurons import Neuron, Site, Tap, Weight

__all__ = ["Atlas", "Compute", "Mapped"]

Compute = Callable[[Site], dict[str, Any]] | dict[str, dict[str, Any]]
"""What fills a group: a function of a site giving column name -> one value a neuron, or all that as nested dicts."""

_FIRST = ("decode", "causal")  # the order of groups in the table; the others follow by age
_TAKEN = ("neurons", "sites", "vocabulary")
_PACKAGES = ("neuropil", "torch", "transformers", "numpy", "pyarrow", "duckdb")


@runtime_checkable
class Mapped(Protocol):
    """What an atlas needs to know of a model; `neuropil.models.Model` has it."""

    name: str
    fingerprint: str
    architecture: str
    sites: list[Site]

    def tokens(self) -> list[str]:
        """The readable text of every token; empty where there is no tokenizer."""
        ...


@dataclass(frozen=True)
class _Part:
    path: Path
    schema: pa.Schema


@dataclass(frozen=True)
class _Snapshot:
    """The finished parts at one moment. Replaced, never changed, so that readers need no lock."""

    seen: tuple[Any, ...]
    manifest: dict[str, Any]
    parts: dict[str, dict[int, _Part]]
    engine: Engine


class Atlas:
    """An atlas on disk; a context manager. `create` and `open` make one.

    Raises AtlasError for a folder that is no atlas, and for one with truncated, damaged or foreign parts, naming them.
    """

    def __init__(self, path: Path, lock: Lock | None, ranks: Ranks | None, memory: str) -> None:
        self.path = path
        self._lock, self._ranks, self._memory = lock, ranks, memory
        self._known: dict[tuple[Any, ...], _Part] = {}
        self._guard = threading.RLock()
        self._snapshot: _Snapshot | None = None
        self._manifest_seen: tuple[Any, ...] = ()
        self._manifest: dict[str, Any] = {}
        self._sites: list[Site] = []

    # ------------------------------------------------------------------------------------- opening and closing

    @classmethod
    def create(cls, path: str | Path, model: Mapped, memory: str = "2GB") -> Atlas:
        """A new atlas of `model` at `path`, open for writing; or the one that is there, if it is of the same model.

        Under `torch.distributed`, every rank calls it. Raises AtlasBusy if another process writes there, AtlasError if
        the folder holds something else or the atlas of another model.
        """
        path = Path(path)

        def begin() -> Lock:
            if (path / "manifest.json").exists():
                lock = cls._seize(path)
                try:
                    _check_model(path, _read_manifest(path), model)
                except BaseException:
                    lock.release()
                    raise
                return lock
            _make_folder(path)
            lock = cls._seize(path)
            try:
                _write_manifest(path, _new_manifest(path, model))
            except BaseException:
                lock.release()
                raise
            return lock

        return cls._writer(path, begin, memory)

    @classmethod
    def open(cls, path: str | Path, write: bool = False, memory: str = "2GB") -> Atlas:
        """The atlas at `path`. Any number of processes may read, also while one writes; `write` takes the lock.

        Raises AtlasError (see the class), AtlasBusy if `write` and another process writes.
        """
        path = Path(path)
        if write:

            def begin() -> Lock:
                _read_manifest(path)
                return cls._seize(path)

            return cls._writer(path, begin, memory)
        atlas = cls(path, None, None, memory)
        atlas._fresh()
        return atlas

    @classmethod
    def _writer(cls, path: Path, begin: Callable[[], Lock], memory: str) -> Atlas:
        ranks = Ranks()
        held: list[Lock] = []

        def start() -> None:
            held.append(begin())

        try:
            ranks.first(start)
            atlas = cls(path, held[0] if held else None, ranks, memory)
            ranks.all(lambda: atlas._fresh() and None)
        except BaseException:
            for lock in held:
                lock.release()
            raise
        return atlas

    @staticmethod
    def _seize(path: Path) -> Lock:
        lock = Lock(path / ".lock")
        _parts.sweep([path, *(path / "parts").glob("*")])
        for dropped in (path / "parts").glob(".*.tmp"):
            shutil.rmtree(dropped, ignore_errors=True)
        return lock

    def close(self) -> None:
        """Give up the lock, if held. What was added stays."""
        if self._lock is not None:
            self._lock.release()
        self._lock = self._ranks = None

    def __enter__(self) -> Atlas:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --------------------------------------------------------------------------------------------- what is here

    @property
    def manifest(self) -> dict[str, Any]:
        """What `manifest.json` says: the model, its sites, and the groups with their settings and versions."""
        return self._fresh().manifest

    @property
    def sites(self) -> list[Site]:
        """The model's sites, whole: addresses, widths, and where the weights lie."""
        self._fresh()
        return list(self._sites)

    @property
    def groups(self) -> list[str]:
        """Names of the groups of columns, in the order of the table."""
        return list(self._fresh().parts)

    @property
    def columns(self) -> dict[str, str]:
        """Column name -> DuckDB type, of the view `neurons`."""
        return self._fresh().engine.columns("neurons")

    def status(self, verify: bool = True) -> dict[str, Any]:
        """How far the atlas is: per group its parts, the sites still missing, and bytes; and who is writing, if anyone.

        `verify` reads every part whole and checks its pages' checksums; raises AtlasError naming the damaged ones.
        """
        snapshot = self._fresh()
        if verify:
            self._verify(snapshot)
        numbers = [site.number for site in self._sites]
        groups = {}
        for group, parts in snapshot.parts.items():
            missing = [n for n in numbers if n not in parts]
            groups[group] = {
                "parts": len(parts),
                "of": len(numbers),
                "missing": missing,
                "complete": not missing,
                "bytes": sum(part.path.stat().st_size for part in parts.values()),
            }
        return {
            "path": str(self.path),
            "model": snapshot.manifest["model"],
            "neurons": sum(site.width for site in self._sites),
            "writing": busy(self.path / ".lock") or None,
            "groups": groups,
        }

    # -------------------------------------------------------------------------------------------------- adding

    def add(
        self,
        group: str,
        compute: Compute,
        *,
        settings: Mapping[str, Any] | None = None,
        method: str = "",
        types: Mapping[str, pa.DataType] | None = None,
        progress: bool = True,
        overwrite: bool = False,
    ) -> int:
        """Add a group of columns; gives the number of parts that this call wrote, over all ranks.

        `compute(site)` gives column name -> tensor, array or list, one entry a neuron; it is called only for sites
        whose part is missing, so that a stopped run goes on where it was. Or give the values themselves, as
        `{site name: {column: values}}`. `settings` are what the values depend on; they are kept in the manifest.
        `types` fixes the Arrow types of columns given as lists. Under `torch.distributed` every rank calls `add`, and
        the sites are dealt out over the ranks.

        Raises AtlasError if the group exists with other settings (unless `overwrite`), if values do not fit, or if the
        disk refuses (what was written before stays); on a rank that did not fail, an error naming the one that did.
        """
        if self._ranks is None:
            raise AtlasError(
                f"{self.path} is open for reading; open it with Atlas.open(path, write=True) to add"
            )
        ranks = self._ranks
        settings = dict(settings or {})
        mark = _parts.digest(settings)
        direct = compute if isinstance(compute, dict) else None
        method = method or ("values given" if direct is not None else _qualified(compute))

        def begin() -> list[int]:
            self._begin(group, settings, mark, method, overwrite)
            return self._todo(group, direct, types or {})

        todo: list[int] = ranks.first(begin)
        mine = [site for site in self._sites if site.number in set(todo[ranks.rank :: ranks.size])]
        fill = (lambda site: direct[site.name]) if direct is not None else compute
        assert not isinstance(fill, dict)
        written = sum(ranks.all(lambda: self._fill(group, fill, mine, mark, types or {}, progress)))
        ranks.first(lambda: self._finish(group))
        return written

    def _begin(self, group: str, settings: dict[str, Any], mark: str, method: str, overwrite: bool) -> None:
        _parts.check_name(group, "group")
        if group in _TAKEN:
            raise AtlasError(f"group {group!r}: the name is kept for the atlas itself; choose another")
        manifest = _read_manifest(self.path)
        entry = manifest["groups"].get(group)
        folder = self.path / "parts" / group
        if entry is not None and entry["digest"] != mark:
            if not overwrite:
                changed = {
                    k: (entry["settings"].get(k), settings.get(k))
                    for k in {*entry["settings"], *settings}
                    if entry["settings"].get(k) != settings.get(k)
                }
                told = "; ".join(f"{k}: {a!r} there, {b!r} now" for k, (a, b) in sorted(changed.items()))
                raise AtlasError(
                    f"{self.path} has group {group!r} with other settings ({told}). Use a new folder, the same "
                    "settings, or overwrite=True to replace it."
                )
        if overwrite and folder.exists():
            # One rename takes all old parts away; a kill after it leaves the group empty, never mixed.
            folder.rename(folder.with_name(f".{group}.{os.getpid()}.tmp"))
            shutil.rmtree(folder.with_name(f".{group}.{os.getpid()}.tmp"), ignore_errors=True)
        if entry is None or entry["digest"] != mark:
            manifest["groups"][group] = {
                "method": method,
                "settings": settings,
                "digest": mark,
                "created": now(),
                "versions": _versions(),
                "columns": {},
            }
            _write_manifest(self.path, manifest)
        folder.mkdir(parents=True, exist_ok=True)

    def _todo(
        self, group: str, direct: dict[str, dict[str, Any]] | None, types: Mapping[str, pa.DataType]
    ) -> list[int]:
        snapshot = self._fresh()
        self._verify(snapshot, group)
        have = snapshot.parts[group]
        if direct is None:
            return [site.number for site in self._sites if site.number not in have]
        by_name = {site.name: site for site in self._sites}
        if unknown := sorted(set(direct) - set(by_name)):
            raise AtlasError(f"no site {unknown[0]!r} in this model; its sites are {_few(list(by_name))}")
        todo = []
        for name in direct:
            site = by_name[name]
            if site.number not in have:
                todo.append(site.number)
                continue
            stamp = self._stamp(group, site, snapshot.manifest["groups"][group]["digest"])
            given = _parts.to_bytes(_parts.table(direct[name], stamp, types))
            if have[site.number].path.read_bytes() != given.to_pybytes():
                raise AtlasError(
                    f"group {group!r} already has other values for site {name!r}; "
                    "give the new ones another group name, or overwrite=True to replace the group"
                )
        return sorted(todo)

    def _fill(
        self,
        group: str,
        compute: Callable[[Site], dict[str, Any]],
        sites: list[Site],
        mark: str,
        types: Mapping[str, pa.DataType],
        progress: bool,
    ) -> int:
        assert self._ranks is not None
        show = progress and self._ranks.rank == 0 and len(sites) > 0
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not show,
        ) as bar:
            task = bar.add_task(group, total=len(sites))
            for done, site in enumerate(sites):
                stamp = self._stamp(group, site, mark)
                part = _parts.to_bytes(_parts.table(compute(site), stamp, types))
                safe = f"The {done} parts written before are safe. "
                _parts.atomic_write(self._part_path(group, site.number), part, safe)
                bar.advance(task)
        return len(sites)

    def _finish(self, group: str) -> None:
        snapshot = self._fresh()
        schema = _parts.unify([part.schema for part in snapshot.parts[group].values()], group)
        manifest = _read_manifest(self.path)
        columns = {f.name: str(f.type) for f in schema if f.name not in _parts.RESERVED}
        if manifest["groups"][group]["columns"] != columns:
            manifest["groups"][group]["columns"] = columns
            _write_manifest(self.path, manifest)

    def _stamp(self, group: str, site: Site, mark: str) -> Stamp:
        model = self._manifest["model"]["fingerprint"]
        return Stamp(model, group, site.name, site.number, site.width, mark)

    def _part_path(self, group: str, number: int) -> Path:
        return self.path / "parts" / group / f"{number:05d}.parquet"

    # ------------------------------------------------------------------------------------------------- reading

    def query(
        self,
        sql: str,
        params: Sequence[Any] | Mapping[str, Any] | None = None,
        limit: int | None = None,
        timeout: float | None = None,
    ) -> pa.Table:
        """Run one SELECT over the atlas; gives an Arrow table of at most `limit` rows.

        The tables: `neurons` (every group joined: a row a neuron; NULL where a part is missing), one for each group by
        its name, `sites` and `vocabulary(token_id, token)`. Where two groups have a column of one name, the later
        group's is `GROUP_NAME` in `neurons`. `?` or `$name` in the SQL take `params`. SQL can read these tables and
        nothing else, and can change nothing. Safe to call from many threads.

        Raises QueryError if DuckDB refuses the statement, or after `timeout` seconds; AtlasError if a part is damaged.
        """
        snapshot = self._fresh()
        try:
            return snapshot.engine.query(sql, params, limit, timeout)
        except Exception:
            self._verify(snapshot)  # the real cause may be a damaged part, which it names
            raise

    def neuron(self, address: str | Neuron) -> dict[str, Any]:
        """Everything known of one neuron ("29:808"), as column -> value. Raises UnknownNeuron, with what there is."""
        found = Neuron.parse(address, self.sites)
        sql = "SELECT * FROM neurons WHERE site = ? AND index = ?"
        [row] = self.query(sql, [found.number, found.index]).to_pylist()
        return dict(row)

    def find(self, words: str, limit: int = 20, by: str = "both") -> pa.Table:
        """Neurons that stand for `words`: by token (its case, space and inflection variants) and by meaning.

        Columns: neuron, label, match ("token" or "meaning"), similarity (cosine of label and words; null for tokens),
        found (where the token stands), tokens, specialisation and verdict where the atlas has them. Specialised
        neurons come first. Half of the rows are kept for each match as long as there are enough. Without the
        sentence model it finds by token only: the table's schema metadata then has a `note`, and a warning is given.
        `by`: "both", "token" or "meaning". Raises MissingExtra for by="meaning" without the sentence model.
        """
        from neuropil import _find

        return _find.find(self, words, limit, by)

    def _fresh(self) -> _Snapshot:
        """The snapshot, made anew if files came or went since."""
        with self._guard:
            if self._manifest_seen != (seen := _stat(self.path / "manifest.json")) or not seen:
                self._manifest = _read_manifest(self.path)
                self._manifest_seen = seen
                self._sites = [_site(entry) for entry in self._manifest["sites"]]
            files = {group: _listing(self.path / "parts" / group) for group in self._manifest["groups"]}
            key = (seen, tuple(files.items()))
            if self._snapshot is None or self._snapshot.seen != key:
                parts = self._collect(files)
                self._snapshot = _Snapshot(key, self._manifest, parts, self._engine(parts))
            return self._snapshot

    def _collect(self, files: dict[str, tuple[Any, ...]]) -> dict[str, dict[int, _Part]]:
        """Check every part that was not checked before. Raises AtlasError naming all bad ones."""
        groups: dict[str, dict[int, _Part]] = {}
        bad: list[str] = []
        known: dict[tuple[Any, ...], _Part] = {}
        by_file = {f"{site.number:05d}.parquet": site for site in self._sites}
        order = {name: i for i, name in enumerate(_FIRST)}
        for group in sorted(files, key=lambda g: order.get(g, len(order))):
            groups[group] = {}
            for entry in files[group]:
                path = self.path / "parts" / group / entry[0]
                site = by_file.get(entry[0])
                if site is None:
                    bad.append(f"{path}: foreign: no site of this model has that number")
                    continue
                mark = self._manifest["groups"][group]["digest"]
                part = self._known.get((group, mark, *entry))
                if part is None:
                    try:
                        schema, wrong = _parts.inspect(path, self._stamp(group, site, mark))
                    except FileNotFoundError:  # taken away by a writer since it was listed
                        continue
                    if schema is None:
                        bad.append(f"{path}: {wrong}")
                        continue
                    part = _Part(path, schema)
                known[(group, mark, *entry)] = part
                groups[group][site.number] = part
        if bad:
            raise AtlasError(_mend(bad))
        self._known = known
        return groups

    def _verify(self, snapshot: _Snapshot, group: str | None = None) -> None:
        """Read parts whole. Raises AtlasError naming the damaged ones."""
        bad = []
        by_number = {site.number: site for site in self._sites}
        for name, parts in snapshot.parts.items():
            mark = snapshot.manifest["groups"][name]["digest"]
            for number, part in parts.items() if group in (None, name) else ():
                try:
                    _, wrong = _parts.inspect(
                        part.path, self._stamp(name, by_number[number], mark), deep=True
                    )
                except FileNotFoundError:
                    continue
                if wrong:
                    bad.append(f"{part.path}: {wrong}")
        if bad:
            raise AtlasError(_mend(bad))

    def _engine(self, parts: dict[str, dict[int, _Part]]) -> Engine:
        sites = self._sites
        widths = np.array([site.width for site in sites], dtype=np.int64)
        tables: dict[str, pa.Table | ds.Dataset] = {
            "sites": pa.table(
                {
                    "site": pa.array([s.number for s in sites], pa.int32()),
                    "module": pa.array([s.name for s in sites], pa.string()),
                    "layer": pa.array([s.layer for s in sites], pa.int32()),
                    "width": pa.array([s.width for s in sites], pa.int32()),
                    "kind": pa.array([s.kind for s in sites], pa.string()),
                    "activation": pa.array([s.activation for s in sites], pa.string()),
                }
            ),
            "_index": pa.table(
                {
                    "site": pa.array(np.repeat([s.number for s in sites], widths).astype(np.int32)),
                    "index": pa.array(np.concatenate([np.arange(w, dtype=np.int32) for w in widths])),
                }
            ),
            "vocabulary": _vocabulary(self.path),
        }
        views: dict[str, str] = {}
        chosen = ["n.site || ':' || n.index AS neuron", "n.site", "n.index", "s.layer", "s.module"]
        joins = ["_index n JOIN sites s ON s.site = n.site"]
        used = set(_parts.RESERVED)
        for group, found in parts.items():
            if not found:
                continue
            schema = _parts.unify([part.schema for part in found.values()], group)
            tables[f"_{group}"] = _dataset(found, schema)
            names = schema.names[2:]
            views[group] = f"SELECT site || ':' || index AS neuron, * FROM \"_{group}\""
            kind = "JOIN" if len(found) == len(sites) else "LEFT JOIN"
            joins.append(f'{kind} "_{group}" ON "_{group}".site = n.site AND "_{group}".index = n.index')
            for name in names:
                shown = name if name.lower() not in used else f"{group}_{name}"
                used.add(shown.lower())
                chosen.append(f'"_{group}"."{name}" AS "{shown}"')
        views["neurons"] = f"SELECT {', '.join(chosen)} FROM {' '.join(joins)}"
        return Engine(tables, views, self._memory)


# ------------------------------------------------------------------------------------------------ the manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError as bad:
        what = "is no atlas: it has no manifest.json" if path.is_dir() else "is no folder"
        raise AtlasError(f"{path} {what}; `neuropil atlas MODEL --out {path}` makes one") from bad
    except (OSError, ValueError) as bad:
        raise AtlasError(f"{file} cannot be read as an atlas manifest: {bad}") from bad
    if not isinstance(manifest, dict) or manifest.get("kind") != "neuropil atlas":
        raise AtlasError(f'{file} is no atlas manifest: it does not say "kind": "neuropil atlas"')
    if manifest.get("format") != _parts.FORMAT:
        raise AtlasError(
            f"{path} has atlas format {manifest.get('format')!r}; this version reads format {_parts.FORMAT}. "
            "Use the version of neuropil that made it, or make the atlas anew"
        )
    return manifest


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    _parts.atomic_write(path / "manifest.json", text.encode(), "The parts written before are safe. ")


def _new_manifest(path: Path, model: Mapped) -> dict[str, Any]:
    tokens = list(model.tokens() or [])
    vocabulary = pa.table(
        {"token_id": pa.array(range(len(tokens)), pa.int32()), "token": pa.array(tokens, pa.string())}
    )
    _parts.atomic_write(path / "vocabulary.parquet", _parts.to_bytes(vocabulary))
    (path / "parts").mkdir(exist_ok=True)
    source = getattr(model, "path", None)
    return {
        "kind": "neuropil atlas",
        "format": _parts.FORMAT,
        "created": now(),
        "versions": _versions(),
        "model": {
            "name": model.name,
            "source": str(source) if source else model.name,
            "fingerprint": model.fingerprint,
            "architecture": model.architecture,
            "parameters": getattr(model, "parameters", None),
        },
        "vocabulary": len(tokens),
        "sites": [asdict(site) for site in model.sites],
        "groups": {},
    }


def _check_model(path: Path, manifest: dict[str, Any], model: Mapped) -> None:
    there = manifest["model"]
    if there["fingerprint"] != model.fingerprint:
        raise AtlasError(
            f"{path} is the atlas of {there['name']!r} (fingerprint {there['fingerprint'][:12]}), not of "
            f"{model.name!r} ({model.fingerprint[:12]}); choose another folder"
        )


def _make_folder(path: Path) -> None:
    # What a killed `create` may have left does not count.
    ours = {".lock", "vocabulary.parquet", "parts"}
    try:
        path.mkdir(parents=True, exist_ok=True)
        others = [p.name for p in path.iterdir() if p.name not in ours and not p.name.endswith(".tmp")]
    except OSError as bad:
        raise AtlasError(f"cannot make an atlas at {path}: {bad.strerror}") from bad
    if others:
        raise AtlasError(f"{path} is not empty ({_few(others)}) and no atlas; choose a new folder")


def _site(entry: dict[str, Any]) -> Site:
    weights = {role: Weight(**w) for role, w in entry["reads"].items()}
    write = Weight(**entry["write"]) if entry["write"] else None
    taps = {key: Tap(**entry[key]) for key in ("tap", "up_tap")}
    return Site(**{**entry, "reads": weights, "write": write, **taps})


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# --------------------------------------------------------------------------------------------------- the files


def _stat(path: Path) -> tuple[Any, ...]:
    try:
        s = path.stat()
    except OSError:
        return ()
    return (s.st_ino, s.st_size, s.st_mtime_ns)


def _listing(folder: Path) -> tuple[Any, ...]:
    """The finished files of a folder: name, inode, size, time; in order of name."""
    try:
        names = sorted(e.name for e in os.scandir(folder) if not e.name.startswith("."))
    except FileNotFoundError:
        return ()
    return tuple((name, *stat) for name in names if (stat := _stat(folder / name)))


def _vocabulary(path: Path) -> pa.Table:
    file = path / "vocabulary.parquet"
    try:
        return pq.read_table(file, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as bad:
        raise AtlasError(
            f"{file} is missing or damaged ({bad}); make the atlas anew in a new folder"
        ) from bad


def _dataset(parts: dict[int, _Part], schema: pa.Schema) -> ds.Dataset:
    options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    form = ds.ParquetFileFormat(default_fragment_scan_options=options)
    system = pyarrow.fs.LocalFileSystem()
    fragments = [
        # Knowing each file's site, a scan for one site opens one file.
        form.make_fragment(str(part.path.absolute()), system, partition_expression=ds.field("site") == number)
        for number, part in sorted(parts.items())
    ]
    return ds.FileSystemDataset(fragments, schema, form, system)


def _mend(bad: list[str]) -> str:
    lines = "\n".join(f"  {line}" for line in bad)
    what = "this part" if len(bad) == 1 else f"these {len(bad)} parts"
    return f"the atlas cannot use {what}:\n{lines}\nDelete the named file(s) and run the same command again."


def _few(names: list[str], n: int = 4) -> str:
    return ", ".join(repr(name) for name in names[:n]) + (
        f" and {len(names) - n} more" if len(names) > n else ""
    )


def _qualified(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
