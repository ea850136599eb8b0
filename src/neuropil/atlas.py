"""The atlas: one table on disk with a row for each neuron of a model and a column for each thing known of it.

An atlas is a folder: `manifest.json` (the model, its sites, and for each *group* of columns the method and
settings that made it), and one Parquet *part* for each group and site. A part is written under a temporary
name and renamed, so that a run killed at any moment is resumed by running it again, and gives the same
values.

>>> import tempfile, torch
>>> from neuropil.neurons import find_sites
>>> net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
>>> class Net:
...     name, fingerprint, architecture, sites = "net", "00ff", "Sequential", find_sites(net)
...     def tokens(self): return []
>>> folder = tempfile.TemporaryDirectory()
>>> with Atlas.create(folder.name, Net()) as atlas:
...     parts = atlas.add("mine", lambda site: {"score": torch.arange(site.width)}, progress=False)
...     atlas.query("SELECT neuron, score FROM neurons ORDER BY score DESC", limit=2).to_pylist()
[{'neuron': '0:4', 'score': 4}, {'neuron': '0:3', 'score': 3}]
>>> folder.cleanup()
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from neuropil import _manifest, _parts
from neuropil._diff import Diff, diff
from neuropil._manifest import Mapped
from neuropil._ranks import Lock, Ranks, busy
from neuropil._scan import Scanner, Snapshot
from neuropil._sql import Unreadable
from neuropil.errors import AtlasError
from neuropil.neurons import Neuron, Site

__all__ = ["Atlas", "Compute", "Diff", "Mapped", "diff"]

Compute = Callable[[Site], dict[str, Any]] | dict[str, dict[str, Any]]
"""What fills a group: a function of a site giving column -> one value a neuron; or the values themselves."""

_TAKEN = ("neurons", "sites", "vocabulary")


class Atlas:
    """An atlas on disk; a context manager. `create` and `open` make one.

    Raises AtlasError for a folder that is no atlas, and for one with truncated, damaged or foreign parts,
    which it names.
    """

    def __init__(self, path: Path, lock: Lock | None, ranks: Ranks | None, memory: str) -> None:
        self.path = path
        self._lock, self._ranks = lock, ranks
        self._scanner = Scanner(path, memory)

    # --------------------------------------------------------------------------- opening and closing

    @classmethod
    def create(cls, path: str | Path, model: Mapped, memory: str = "2GB") -> Atlas:
        """A new atlas of `model` at `path`, open for writing; or the one there, if it is of the same model.

        Under `torch.distributed`, every rank calls it. `memory` bounds what queries may use. Raises AtlasBusy
        if another process writes there, AtlasError if the folder holds something else or another model's
        atlas.
        """
        path = Path(path)

        there = path / "manifest.json"

        def prepare() -> None:
            if not there.exists():
                _manifest.make_folder(path)

        def begin() -> None:
            if there.exists():
                _manifest.same_model(path, _manifest.read(path), model)
            else:
                _manifest.begin(path, model)
            if (source := getattr(model, "source", None)) is not None:
                from neuropil.models.files import trust

                trust(source)

        return cls._writer(path, prepare, begin, memory)

    @classmethod
    def open(cls, path: str | Path, write: bool = False, memory: str = "2GB") -> Atlas:
        """The atlas at `path`. Any number of processes may read, also while one writes; `write` takes the
        lock.

        Raises AtlasError (see the class), AtlasBusy if `write` and another process writes.
        """
        path = Path(path)
        if write:
            return cls._writer(path, lambda: _manifest.read(path), lambda: None, memory)
        atlas = cls(path, None, None, memory)
        atlas._fresh()
        return atlas

    @classmethod
    def _writer(cls, path: Path, prepare: Callable[[], Any], begin: Callable[[], None], memory: str) -> Atlas:
        ranks = Ranks()
        held: list[Lock] = []

        def start() -> None:
            prepare()
            held.append(Lock(path / ".lock"))
            _parts.sweep([path, *(path / "parts").glob("*")])
            for dropped in (path / "parts").glob(".*.tmp"):
                shutil.rmtree(dropped, ignore_errors=True)
            begin()

        try:
            ranks.first(start)
            atlas = cls(path, held[0] if held else None, ranks, memory)
            ranks.all(lambda: len(atlas._fresh().parts))
        except BaseException:
            for lock in held:
                lock.release()
            raise
        return atlas

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

    # --------------------------------------------------------------------------- what is here

    @property
    def manifest(self) -> dict[str, Any]:
        """What `manifest.json` says: the model, its sites, the groups with their settings and versions."""
        return self._fresh().manifest

    @property
    def sites(self) -> list[Site]:
        """The model's sites, whole: addresses, widths, and where the weights lie."""
        return list(self._fresh().sites)

    @property
    def groups(self) -> list[str]:
        """Names of the groups of columns, in the order of the table."""
        return list(self._fresh().parts)

    @property
    def columns(self) -> dict[str, str]:
        """Column name -> DuckDB type, of the view `neurons`."""
        return self._fresh().engine.columns("neurons")

    def status(self, verify: bool = True) -> dict[str, Any]:
        """How far the atlas is: per group its parts, the sites still missing, and bytes; and who is writing.

        `verify` reads every part whole and checks its checksums; raises AtlasError naming the damaged
        ones.
        """
        snapshot = self._fresh()
        if verify:
            snapshot.verify()
        numbers = [site.number for site in snapshot.sites]
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
            "neurons": sum(site.width for site in snapshot.sites),
            "writing": busy(self.path / ".lock") or None,
            "groups": groups,
        }

    # --------------------------------------------------------------------------- adding

    def add(
        self,
        group: str,
        compute: Compute,
        *,
        settings: Mapping[str, Any] | None = None,
        method: str = "",
        types: Mapping[str, pa.DataType] | None = None,
        sites: Sequence[Site] | None = None,
        progress: bool = True,
        overwrite: bool = False,
    ) -> int:
        """Add a group of columns; gives the number of parts that this call wrote, over all ranks.

        `compute(site)` gives column name -> tensor, array or list, one entry a neuron; it is called only for
        sites whose part is missing (of `sites`, where given), so that a stopped run goes on where it was. Or
        give the values themselves, as `{site name: {column: values}}`. `settings` are what the values depend on; they
        are
        kept in the manifest. `types` fixes the Arrow types of columns given as lists. Under
        `torch.distributed` every rank calls `add`, and the sites are dealt out over the ranks.

        Raises AtlasError if the group exists with other settings (unless `overwrite`), if values do not fit,
        or if the disk refuses (what was written before stays); on a rank that did not fail, an error naming
        the one that did.
        """
        if self._ranks is None:
            raise AtlasError(f"{self.path} is open for reading; open it with Atlas.open(path, write=True) to add")
        ranks = self._ranks
        settings = dict(settings or {})
        direct = compute if isinstance(compute, dict) else None
        method = method or ("values given" if direct is not None else _qualified(compute))

        def begin() -> list[int]:
            self._begin(group, settings, method, overwrite)
            todo = self._todo(group, direct, types or {})
            return todo if sites is None else [n for n in todo if n in {site.number for site in sites}]

        todo: list[int] = ranks.first(begin)
        mine = set(todo[ranks.rank :: ranks.size])
        fill = compute if callable(compute) else lambda site: compute[site.name]
        written = sum(ranks.all(lambda: self._fill(group, fill, mine, types or {}, progress)))
        ranks.first(lambda: self._finish(group))
        return written

    def _begin(self, group: str, settings: dict[str, Any], method: str, overwrite: bool) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", group) or group in _TAKEN:
            raise AtlasError(
                f"group {group!r}: expected lower-case letters, digits and underscores, and none of {_TAKEN}"
            )
        manifest = _manifest.read(self.path)
        there = manifest["groups"].get(group)
        if there is not None and not overwrite:
            _manifest.same_settings(self.path, group, there, settings)
        folder = self.path / "parts" / group
        if overwrite and folder.exists():
            # One rename takes all old parts away; a kill after it leaves the group empty, never mixed.
            away = folder.with_name(f".{group}.{os.getpid()}.tmp")
            folder.rename(away)
            shutil.rmtree(away, ignore_errors=True)
        if there is None or overwrite:
            manifest["groups"][group] = _manifest.entry(method, settings)
            _manifest.write(self.path, manifest)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as bad:
            raise AtlasError(f"cannot make {folder}: {bad.strerror}") from bad

    def _todo(
        self, group: str, direct: dict[str, dict[str, Any]] | None, types: Mapping[str, pa.DataType]
    ) -> list[int]:
        """Numbers of the sites whose part is still to be written."""
        snapshot = self._fresh()
        snapshot.verify(group)
        have = snapshot.parts[group]
        if direct is None:
            return [site.number for site in snapshot.sites if site.number not in have]
        by_name = {site.name: site for site in snapshot.sites}
        if unknown := sorted(set(direct) - set(by_name)):
            known = _manifest.few(list(by_name))
            raise AtlasError(f"no site {unknown[0]!r} in this model; its sites are {known}")
        todo = []
        for name, columns in direct.items():
            site = by_name[name]
            given = _parts.to_bytes(_parts.table(columns, snapshot.stamp(group, site), types))
            if site.number not in have:
                todo.append(site.number)
            elif have[site.number].path.read_bytes() != given:
                raise AtlasError(
                    f"group {group!r} already has other values for site {name!r}; give the new ones another "
                    "group name, or overwrite=True (--overwrite) to replace the group"
                )
        return sorted(todo)

    def _fill(
        self,
        group: str,
        compute: Callable[[Site], dict[str, Any]],
        mine: set[int],
        types: Mapping[str, pa.DataType],
        progress: bool,
    ) -> int:
        """Write the parts of the sites numbered `mine`."""
        snapshot = self._fresh()
        sites = [site for site in snapshot.sites if site.number in mine]
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not progress or not sites or self._ranks is None or self._ranks.rank > 0,
        ) as bar:
            task = bar.add_task(group, total=len(sites))
            for site in sites:
                table = _parts.table(compute(site), snapshot.stamp(group, site), types)
                path = self.path / "parts" / group / f"{site.number:05d}.parquet"
                _parts.atomic_write(path, _parts.to_bytes(table), "The parts written before are safe. ")
                bar.advance(task)
        return len(sites)

    def _finish(self, group: str) -> None:
        snapshot = self._fresh()
        if not snapshot.parts[group]:
            return
        schema = _parts.unify([part.schema for part in snapshot.parts[group].values()], group)
        manifest = _manifest.read(self.path)
        columns = {field.name: str(field.type) for field in schema if field.name not in _parts.RESERVED}
        if manifest["groups"][group]["columns"] != columns:
            manifest["groups"][group]["columns"] = columns
            _manifest.write(self.path, manifest)

    # ------------------------------------------------------------------------------- reading

    def query(
        self,
        sql: str,
        params: Sequence[Any] | Mapping[str, Any] | None = None,
        limit: int | None = None,
        timeout: float | int | None = None,
    ) -> pa.Table:
        """Run one SELECT over the atlas; gives an Arrow table of at most `limit` rows.

        The tables: `neurons` (every group joined: a row a neuron; NULL where a part is missing), one for each
        group by its name, `sites` and `vocabulary(token_id, token)`. Where two groups have a column of one
        name, the later group's is `GROUP_NAME` in `neurons`. `?` or `$name` in the SQL take `params`. SQL can
        read these tables and nothing else, and can change nothing. Safe to call from many threads.

        Raises QueryError if DuckDB refuses the statement, or after `timeout` seconds; AtlasError if a part is
        damaged.
        """
        snapshot = self._fresh()
        try:
            return snapshot.engine.query(sql, params, limit, timeout)
        except Unreadable:
            if (now := self._fresh()) is not snapshot:  # a writer replaced a group meanwhile
                return now.engine.query(sql, params, limit, timeout)
            snapshot.verify()  # the cause may be a damaged part, which this names
            raise

    def neuron(self, address: str | Neuron) -> dict[str, Any]:
        """Everything known of one neuron ("29:808"): column -> value. Raises UnknownNeuron."""
        found = Neuron.parse(address, self.sites)
        sql = "SELECT * FROM neurons WHERE site = ? AND index = ?"
        [row] = self.query(sql, [found.number, found.index]).to_pylist()
        return dict(row)

    def find(self, words: str, limit: int = 20, by: str = "both") -> pa.Table:
        """Neurons that stand for `words`: by token (its case, space and inflection variants) and by meaning.

        Columns: neuron, label, match ("token" or "meaning"), similarity (cosine of label and words; null for
        tokens), found (where the token stands), tokens; specialised, specialisation, verdict and effect where
        the atlas has them. By token, neurons with the word as label come first, then those with it at the top
        of a list; within each, specialised ones first. Half of the rows are kept for each kind of match as
        long as there are enough. `by`: "both", "token" or "meaning".

        Without the sentence model it finds by token only, warns, and says so in the schema's metadata
        (`note`). Raises QueryError if there is nothing to search for, AtlasError if the atlas has no labels,
        MissingExtra for by="meaning" without the sentence model.
        """
        from neuropil import _find

        return _find.find(self, words, limit, by)

    def _fresh(self) -> Snapshot:
        return self._scanner.fresh()


def _qualified(function: Any) -> str:
    of = function if hasattr(function, "__qualname__") else type(function)
    return f"{of.__module__}.{of.__qualname__}"
