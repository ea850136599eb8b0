"""SQL over an atlas for anybody: a DuckDB that can read the atlas' tables, nothing else, and change nothing.

The Parquet parts reach DuckDB as Arrow data sets, so that DuckDB itself needs no files at all and its whole
file system is switched off, then its settings are locked. On top of that a statement must be one SELECT, may
call only table functions that make rows from their arguments, and runs in a read-only transaction.
"""

from __future__ import annotations

import difflib
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from neuropil.errors import QueryError

if TYPE_CHECKING:
    Connection = duckdb.DuckDBPyConnection
else:  # a checker of types at run time would keep DuckDB's class alive past the end, which DuckDB reports
    Connection = Any

_SETTINGS = (
    "temp_directory = ''",  # before the file system goes: no spilling to disk
    "autoinstall_known_extensions = false",
    "autoload_known_extensions = false",
    "allow_community_extensions = false",
    "allow_persistent_secrets = false",
    "enable_external_access = false",
)
# Lets SQL name any variable of the Python program; called differently from one DuckDB to the next.
_REPLACEMENTS = ("python_enable_replacements", "python_enable_replacement_scans")
_TABLE_FUNCTIONS = {"unnest", "range", "generate_series", "repeat", "json_each", "json_tree"}
_READING = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
_SHOWN = 24


_ASKING = (
    duckdb.BinderException,
    duckdb.CatalogException,
    duckdb.ParserException,
    duckdb.SyntaxException,
    duckdb.ConversionException,
    duckdb.OutOfMemoryException,
    duckdb.PermissionException,
    duckdb.TransactionException,
    duckdb.OutOfRangeException,
)


class Unreadable(QueryError):  # noqa: N818
    """A query that failed while the data were read, not for what it asks."""


class Engine:
    """One DuckDB database over Arrow tables and data sets, safe to use from many threads.

    `tables` are what is scanned; `views` (name -> SELECT) are made over them, in order. `memory` bounds what
    DuckDB may use.
    """

    def __init__(self, tables: Mapping[str, pa.Table | ds.Dataset], views: Mapping[str, str], memory: str) -> None:
        self._tables, self._views = dict(tables), dict(views)
        self._columns: dict[str, dict[str, str]] = {}
        self._database = duckdb.connect(":memory:")
        for setting in (*_SETTINGS, f"memory_limit = '{memory}'"):
            self._database.execute(f"SET {setting}")
        for name in _REPLACEMENTS:
            known = self._database.execute("SELECT 1 FROM duckdb_settings() WHERE name = ?", [name]).fetchone()
            if known:
                self._database.execute(f"SET {name} = false")
        self._database.execute("SET lock_configuration = true")

    def columns(self, view: str) -> dict[str, str]:
        """Column name -> DuckDB type of a view."""
        if view not in self._columns:
            with self._cursor() as cursor:
                rows = cursor.execute(f'DESCRIBE "{view}"').fetchall()
            self._columns[view] = {row[0]: str(row[1]) for row in rows}
        return dict(self._columns[view])

    def query(
        self,
        sql: str,
        params: Sequence[Any] | Mapping[str, Any] | None,
        limit: int | None,
        timeout: float | int | None,
    ) -> pa.Table:
        """Run one SELECT; raises QueryError (see `Atlas.query`)."""
        with self._cursor() as cursor:
            statement = self._one_select(cursor, sql)
            stopped = threading.Event()

            def stop() -> None:
                stopped.set()
                cursor.interrupt()

            clock = threading.Timer(timeout, stop) if timeout is not None else None
            if clock:
                clock.daemon = True
                clock.start()
            try:
                given = dict(params) if isinstance(params, Mapping) else list(params) if params else None
                answer = cursor.sql(statement, params=given)
                if answer is None:
                    raise QueryError("this statement gives no rows; write one SELECT")
                return (answer if limit is None else answer.limit(limit)).to_arrow_table()
            except (duckdb.Error, RuntimeError, pa.ArrowException) as bad:
                if stopped.is_set():
                    raise QueryError(
                        f"stopped after {timeout:g} s; ask for less (WHERE, LIMIT) or give it more time"
                    ) from bad
                kind = QueryError if isinstance(bad, _ASKING) else Unreadable
                raise kind(self._explain(sql, bad)) from bad
            finally:
                if clock:
                    clock.cancel()

    @contextmanager
    def _cursor(self) -> Iterator[Connection]:
        # Views of the session, not of the database: what one query could do to them dies with its cursor.
        cursor = self._database.cursor()
        try:
            for name, data in self._tables.items():
                cursor.register(name, data)
            for name, select in self._views.items():
                cursor.execute(f'CREATE TEMP VIEW "{name}" AS {select}')
            cursor.execute("BEGIN TRANSACTION READ ONLY")
            yield cursor
        finally:
            cursor.close()

    def _one_select(self, cursor: Connection, sql: str) -> str:
        try:
            statements = cursor.extract_statements(sql)
        except duckdb.Error as bad:
            raise QueryError(self._explain(sql, bad)) from bad
        if len(statements) != 1:
            raise QueryError(f"{len(statements)} statements given; expected one SELECT")
        kind = statements[0].type
        if kind == duckdb.StatementType.MULTI:
            raise QueryError(
                "this PIVOT is several statements to DuckDB; name its values: PIVOT ... ON x IN ('a', 'b')"
            )
        if kind != duckdb.StatementType.SELECT:
            raise QueryError(f"{kind.name} is refused: an atlas is read with SELECT (or FROM, DESCRIBE, SUMMARIZE)")
        text = str(statements[0].query)
        for name in sorted(set(_calls(cursor, text)) - _TABLE_FUNCTIONS):
            raise QueryError(
                f"the table function {name}() is refused; the tables are {self._names()}, "
                f"and of functions {', '.join(sorted(_TABLE_FUNCTIONS))} may stand in FROM"
            )
        return text

    def _names(self) -> str:
        return ", ".join(name for name in (*self._views, *self._tables) if not name.startswith("_"))

    def _explain(self, sql: str, bad: Exception) -> str:
        message = str(bad).strip()
        if not isinstance(bad, (duckdb.BinderException, duckdb.CatalogException)):
            return message
        columns = {name for view in self._views for name in self.columns(view)}
        words = {w for w in re.findall(r"[A-Za-z_]\w*", sql) if w not in columns}
        near = {m for w in words for m in difflib.get_close_matches(w, columns, n=3, cutoff=0.6)}
        listed = sorted(near) or sorted(columns)[:_SHOWN]
        more = "" if near or len(columns) <= _SHOWN else f" and {len(columns) - _SHOWN} more (DESCRIBE neurons)"
        kind = "columns of a similar name" if near else "columns"
        return f"{message}\n{kind}: {', '.join(listed)}{more}\ntables: {self._names()}"


def _calls(cursor: Connection, sql: str) -> Iterator[str]:
    """Names of the table functions that a SELECT calls anywhere, read from DuckDB's own parse of it."""
    [[text]] = cursor.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchall()
    tree = json.loads(text)
    if tree.get("error"):
        raise QueryError(f"only a plain SELECT is run here: {tree.get('error_message', 'it cannot be parsed')}")
    todo: list[Any] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo += node
        elif isinstance(node, dict):
            todo += node.values()
            kind = node.get("type")
            if "cte_map" in node and kind not in _READING:
                raise QueryError(f"{str(kind).partition('_')[0]} is refused: an atlas is only read")
            if kind == "TABLE_FUNCTION":
                yield str(node["function"].get("function_name", "?")).lower()
