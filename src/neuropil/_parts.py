"""One part of an atlas: the columns that one group says of the neurons of one site, as one Parquet file.

A part is whole or absent: it is written under a temporary name in its own folder, brought to the disk, and
renamed. Its Parquet metadata say what it belongs to (`Stamp`), it carries checksums, and it holds
nothing that differs between two runs of the same computation, such as a time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from neuropil.errors import AtlasError

FORMAT = 1
RESERVED = ("neuron", "site", "index", "layer", "module")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


@dataclass(frozen=True)
class Stamp:
    """What a part belongs to; kept in its Parquet metadata and compared when the atlas is opened."""

    model: str
    group: str
    module: str
    site: int
    width: int
    settings: str
    format: int = FORMAT

    def metadata(self) -> dict[bytes, bytes]:
        """The stamp as Parquet metadata."""
        return {b"neuropil." + k.encode(): str(v).encode() for k, v in asdict(self).items()}

    def differs(self, metadata: Mapping[bytes, bytes] | None) -> str:
        """What in `metadata` is not this stamp's, in words; empty if they agree."""
        found = metadata or {}
        return "; ".join(
            f"its {key.decode().removeprefix('neuropil.')} is "
            f"{found.get(key, b'missing').decode(errors='replace')!r}, not {value.decode()!r}"
            for key, value in self.metadata().items()
            if found.get(key) != value
        )


def digest(settings: Mapping[str, Any]) -> str:
    """A short hash of settings, whatever their order. Raises AtlasError if they are not JSON."""
    try:
        text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as bad:
        raise AtlasError(
            f"settings must be plain values (text, numbers, lists, dicts), to be kept in the manifest: {bad}"
        ) from bad
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_name(name: str, what: str) -> None:
    """Raise AtlasError unless `name` may name a group or a column."""
    if not _NAME.match(name):
        raise AtlasError(f"{what} {name!r}: expected letters, digits and underscores, not starting with a digit")


# ------------------------------------------------------------------------------------------------- values


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
    if isinstance(value, (list, tuple)):
        return [v.tolist() if isinstance(v, (torch.Tensor, np.ndarray, np.generic)) else v for v in value]
    return value


def column(values: Any, type: pa.DataType | None = None) -> pa.Array:
    """A tensor, array or list as one Arrow column; a matrix `[width, k]` makes a column of lists of length k.

    >>> column(torch.tensor([[1, 2], [3, 4]])).to_pylist()
    [[1, 2], [3, 4]]
    """
    values = _plain(values)
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        return values if type is None else values.cast(type)
    if isinstance(values, np.ndarray) and values.ndim == 2:
        ends = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        lists = pa.ListArray.from_arrays(pa.array(ends), flat)
        return lists if type is None else lists.cast(type)
    if isinstance(values, np.ndarray) and values.ndim != 1:
        raise ValueError(f"it has {values.ndim} dimensions; expected [width] or [width, k]")
    return pa.array(values, type=type)


def table(columns: Mapping[str, Any], stamp: Stamp, types: Mapping[str, pa.DataType]) -> pa.Table:
    """The part's table: site and index, then the group's columns. AtlasError where a column does not fit."""
    out = {
        "site": pa.array(np.full(stamp.width, stamp.site, np.int32)),
        "index": pa.array(np.arange(stamp.width, dtype=np.int32)),
    }
    for name, values in columns.items():
        where = f"column {name!r} of group {stamp.group!r} at site {stamp.module!r}"
        check_name(name, "column")
        if name.lower() in RESERVED:
            raise AtlasError(f"{where}: the name is kept for the atlas itself (as are {', '.join(RESERVED)})")
        if name.lower() in map(str.lower, out):
            raise AtlasError(f"{where}: another column has that name; SQL knows no difference of case")
        try:
            array = column(values, types.get(name))
        except (pa.ArrowException, ValueError, TypeError) as bad:
            raise AtlasError(f"{where}: these values make no column: {bad}") from bad
        if len(array) != stamp.width:
            raise AtlasError(f"{where}: {len(array)} values given, expected one for each of {stamp.width} neurons")
        out[name] = array
    return pa.table(out).replace_schema_metadata(stamp.metadata())


# -------------------------------------------------------------------------------------------------- files


def atomic_write(path: Path, data: bytes, safe: str = "") -> None:
    """Write `path` whole or not at all, and be sure that it is on the disk.

    Raises AtlasError where the system refuses (a full disk, say); `safe` tells what is kept in that case.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb", buffering=0) as file:
            rest = memoryview(data).cast("B")
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as bad:
        temporary.unlink(missing_ok=True)
        full = bad.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        mend = "free some space and run again" if full else "mend that and run again"
        raise AtlasError(f"cannot write {path}: {bad.strerror or bad}. {safe}{mend[0].upper()}{mend[1:]}.") from bad
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there, and renames are journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folders: Iterable[Path]) -> None:
    """Remove the temporary files that killed writers left. Only for who holds the lock."""
    for folder in folders:
        for stray in folder.glob(".*.tmp"):
            if stray.is_file():
                stray.unlink(missing_ok=True)


def to_bytes(part: pa.Table) -> bytes:
    """The part as a Parquet file: the same table gives the same bytes.

    Parquet has checksums for the contents of pages, but none for what describes them. So a seal stands before the
    footer, where readers of Parquet do not look: digests of all that is before it and of all that is after it.
    """
    sink = pa.BufferOutputStream()
    rows = max(part.num_rows, 1)  # a part is read whole
    pq.write_table(
        part, sink, compression="zstd", row_group_size=rows, write_page_checksum=True, write_statistics=False
    )
    plain = sink.getvalue().to_pybytes()
    start = len(plain) - int.from_bytes(plain[-8:-4], "little") - 8
    return plain[:start] + _seal(plain[:start]) + _seal(plain[start:]) + plain[start:]


def _seal(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


def broken(path: Path, deep: bool) -> bool:
    """Whether the seals do not fit; the pages' is looked at if `deep`. Before anything parses the bytes."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 8, 0))
        start = end - 8 - int.from_bytes(file.read(8)[:4], "little")
        if start < 32:
            return True
        file.seek(start - 32)
        pages, footer, rest = file.read(16), file.read(16), file.read()
        if _seal(rest) != footer:
            return True
        file.seek(0)
        return deep and _seal(file.read(start - 32)) != pages


def inspect(path: Path, stamp: Stamp, deep: bool = False) -> tuple[pa.Schema | None, str]:
    """The schema of a part and what is wrong with it (nothing: ""). `deep` reads every byte."""
    try:
        if broken(path, deep):
            return None, "truncated, damaged, or foreign: its bytes are not as neuropil wrote them"
        metadata = pq.read_metadata(path)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as bad:
        return None, f"truncated or damaged: {str(bad).splitlines()[0]}"
    if wrong := stamp.differs(metadata.metadata):
        return None, f"foreign: {wrong}"
    schema = metadata.schema.to_arrow_schema()
    if metadata.num_rows != stamp.width or schema.names[:2] != ["site", "index"]:
        return None, f"foreign: it has {metadata.num_rows} rows, expected {stamp.width} with site and index"
    return schema.remove_metadata(), ""


def unify(schemas: Sequence[pa.Schema], group: str) -> pa.Schema:
    """One schema for all parts of a group: an empty column of one site takes the type it has elsewhere."""
    try:
        return pa.unify_schemas(list(schemas), promote_options="permissive")
    except pa.ArrowException as bad:
        raise AtlasError(f"the parts of group {group!r} disagree on the type of a column: {bad}") from bad
