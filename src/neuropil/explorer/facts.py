"""What the pages ask of the atlas: the table's rows, the map's values, a neuron's neighbours."""

import contextlib
import json
import struct
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from neuropil.atlas import Atlas
from neuropil.data import probes
from neuropil.errors import NeuropilError, QueryError
from neuropil.explorer.view import View, is_flag, is_list, is_number, is_text, literal, quoted
from neuropil.neurons import Neuron

FOUND = 300  # neurons that a search gives at most
LAYERS_KEPT = 8  # whose exemplars are in memory
CATEGORIES = 12  # so many values of a text column have a colour of their own on the map
MOST_DOWNLOADED = 5_000_000
FIRST = {"up_tokens": "up_tokens[1]", "description": "description", "preferred_class": "preferred_class"}  # to name by
PATIENCE = 10.0  # seconds that a visitor's SQL may take


@dataclass(frozen=True)
class Scale:
    """How a column's numbers spread: what bars and colours are scaled by."""

    low: float
    high: float
    signed: bool

    @property
    def reach(self) -> float:
        return max(abs(self.low), abs(self.high)) or 1.0


@dataclass(frozen=True)
class Page:
    table: pa.Table
    more: bool
    seconds: float
    sql: str


@dataclass(frozen=True)
class LayerShare:
    layer: int
    neurons: int
    specialised: int
    confirmed: int


@dataclass(frozen=True)
class Brick:
    """Neurons of one layer that belong together."""

    site: int
    number: int
    size: int
    function: str
    neurons: list[str]  # the first few
    description: str = ""  # of the first that has one


class Facts:
    """One atlas, open for reading, shared by the threads that serve the pages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.atlas = Atlas.open(path)
        self._scales: dict[str, Scale] = {}
        self._counts: dict[str, int] = {}
        self._found: dict[str, list[str]] = {}
        self._values: dict[str, list[str]] = {}
        self._drivers: dict[int, pa.Table] = {}
        self._reading = threading.Lock()
        self._seen: tuple[float, object] = (-1.0, None)

    def refresh(self) -> None:
        """Forget what was counted if the atlas has grown since (it is looked at once a second at most)."""
        now = time.monotonic()
        if now - self._seen[0] < 1.0:
            return
        status = self.atlas.status(verify=False)["groups"]
        state = {name: (group["parts"], group["bytes"]) for name, group in status.items()}
        if self._seen[1] not in (None, state):
            for name, value in vars(type(self)).items():
                if isinstance(value, cached_property):
                    vars(self).pop(name, None)
            self._scales, self._counts, self._found, self._values = {}, {}, {}, {}
            self._drivers = {}
        self._seen = (now, state)

    @cached_property
    def columns(self) -> dict[str, str]:
        return dict(self.atlas.columns)

    @cached_property
    def sites(self) -> list[Any]:
        return list(self.atlas.sites)

    def told(self, *names: str) -> str:
        """The first of these texts that the manifest has; it keeps the facts of the model under "model"."""
        manifest = self.atlas.manifest
        model = manifest.get("model")
        model = model if isinstance(model, dict) else {}
        for name in names:
            value = model.get(name) or manifest.get(name)
            if isinstance(value, str) and value:
                return value
        return ""

    @property
    def sees(self) -> bool:
        """Whether the atlas is of a vision model: its neurons answer to images, not to tokens."""
        return "activation_mean" in self.columns or "exemplar_images" in self.columns

    def drivers(self, address: str) -> list[tuple[bytes, str]]:
        """The exemplars of a neuron whose images are here: PNG and mask, best first. Raises UnknownNeuron.

        A page shows those of many neurons, so they are read a layer at a time, and the last few layers kept.
        """
        neuron = Neuron.parse(address, self.sites)
        if not {"exemplar_images", "exemplar_masks"} <= set(self.columns):
            return []
        with self._reading:
            if neuron.number not in self._drivers:
                names = "exemplar_images, exemplar_masks FROM neurons WHERE site = "
                table = self.ask(f'SELECT {names}{neuron.number} ORDER BY "index"')
                while len(self._drivers) >= LAYERS_KEPT:
                    del self._drivers[next(iter(self._drivers))]
                self._drivers[neuron.number] = table
            row = self._drivers[neuron.number].slice(neuron.index, 1).to_pylist()[0]
        pairs = zip(row["exemplar_images"] or [], row["exemplar_masks"] or [], strict=False)
        return [(self.images[image]["png"], mask) for image, mask in pairs if image in self.images]

    @property
    def groups(self) -> list[str]:
        return self.atlas.groups

    @cached_property
    def roles_missing(self) -> set[str]:
        """Weights that no neuron of this model has: nothing is compared by them."""
        have = {role for site in self.sites for role in site.roles}
        return {"up", "gate", "down"} - have

    @cached_property
    def images(self) -> dict[int, dict[str, Any]]:
        """The images that the model was shown: place -> name, class and PNG."""
        table = probes.stored(self.path)
        return {} if table is None else {row["image"]: row for row in table.to_pylist()}

    def ask(self, sql: str, limit: int | None = None, timeout: float | None = None) -> pa.Table:
        return self.atlas.query(sql, limit=limit, timeout=timeout)

    def rows(self, sql: str) -> list[dict[str, Any]]:
        return self.ask(sql).to_pylist()

    def page(self, view: View) -> Page:
        """The rows that the view shows. Raises QueryError for SQL that does not run."""
        began = time.perf_counter()
        sql = view.statement(self.columns, self.found(view.q) if view.q and not view.sql else None)
        last = view.start + view.rows + 1
        table = self.ask(sql, last, PATIENCE).slice(view.start) if view.sql else self._slice(view)
        return Page(table.slice(0, view.rows), table.num_rows > view.rows, time.perf_counter() - began, sql)

    def _slice(self, view: View) -> pa.Table:
        """The rows of the view's statement that are shown, and one more if there is one.

        The order is found from the addresses alone: sorting whole rows would carry all their lists along.
        """
        found = self.found(view.q) if view.q else None
        first = view.statement(self.columns, found, only_addresses=True)
        addresses = self.ask(first, view.start + view.rows + 1).slice(view.start).column("neuron").to_pylist()
        sites = sorted({int(a.split(":")[0]) for a in addresses})
        names = ", ".join(map(quoted, view.chosen(self.columns)))
        rows = self.ask(
            f"SELECT {names} FROM neurons WHERE site IN ({', '.join(map(str, sites)) or 'NULL'}) "
            f"AND neuron IN ({', '.join(map(literal, addresses)) or 'NULL'})"
        )
        place = {a: i for i, a in enumerate(rows.column("neuron").to_pylist())}
        return rows.take(pa.array([place[a] for a in addresses], pa.int64()))

    def found(self, words: str) -> list[str]:
        """The addresses of the neurons that fit the words, best first."""
        if words not in self._found:
            found = list(self.atlas.find(words, limit=FOUND).column("neuron").to_pylist()) if self._told else []
            found += self._of_class(words)
            if len(self._found) > 200:
                self._found.clear()
            self._found[words] = list(dict.fromkeys(found))
        return self._found[words]

    @property
    def _told(self) -> bool:
        """Whether there is more to search than classes."""
        return not self.sees or bool({"description", "label"} & set(self.columns))

    def _of_class(self, words: str) -> list[str]:
        """Neurons of a vision model whose preferred class, or brick's function, has one of the words in it."""
        names = [c for c in ("preferred_class", "brick_function") if c in self.columns]
        terms = [literal(word) for word in words.lower().split()]
        if not self.sees or not names or not terms:
            return []
        text = "lower(concat_ws(' ', " + ", ".join(names) + "))"
        hits = " + ".join(f"contains({text}, {term})::INT" for term in terms)
        best = "selectivity DESC NULLS LAST, " if "selectivity" in self.columns else ""
        rows = self.rows(
            f"SELECT neuron FROM (SELECT *, {hits} AS _hits FROM neurons) WHERE _hits > 0 "
            f"ORDER BY _hits DESC, {best}site, index LIMIT {FOUND}"
        )
        return [row["neuron"] for row in rows]

    def warm(self) -> None:
        """Do what the first search and the first table would otherwise wait for."""
        with contextlib.suppress(NeuropilError):
            self.found("warm")
            self.page(View())

    def count(self, view: View) -> int | None:
        """How many neurons pass the view's filters; None for a visitor's SQL, which is not run twice."""
        if view.sql:
            return None
        where = view.where(self.found(view.q) if view.q else None)
        if where not in self._counts:
            [row] = self.rows(f"SELECT count(*) AS n FROM neurons{where}")
            self._counts[where] = row["n"]
        return self._counts[where]

    def everything(self, view: View) -> pa.Table:
        """All rows of the view, for downloading."""
        sql = view.statement(self.columns, self.found(view.q) if view.q and not view.sql else None)
        return self.ask(sql, MOST_DOWNLOADED, 6 * PATIENCE if view.sql else None)

    def scale(self, column: str) -> Scale:
        if column not in self._scales:
            q = quoted(column)
            [row] = self.rows(
                f"SELECT quantile_cont(v, 0.005) AS low, quantile_cont(v, 0.995) AS high, min(v) AS least "
                f"FROM (SELECT CAST({q} AS DOUBLE) AS v FROM neurons WHERE {q} IS NOT NULL) WHERE isfinite(v)"
            )
            low, high = row["low"] or 0.0, row["high"] or 0.0
            self._scales[column] = Scale(low, high, (row["least"] or 0.0) < 0)
        return self._scales[column]

    def signed(self, column: str) -> bool:
        return is_number(self.columns.get(column, "")) and self.scale(column).signed

    @cached_property
    def total(self) -> int:
        return sum(int(site.width) for site in self.sites)

    @cached_property
    def verdicts(self) -> dict[str, int]:
        if "verdict" not in self.columns:
            return {}
        rows = self.rows("SELECT verdict, count(*) AS n FROM neurons GROUP BY ALL ORDER BY n DESC")
        return {row["verdict"]: row["n"] for row in rows if row["verdict"] is not None}

    @cached_property
    def layers(self) -> list[LayerShare]:
        def share(name: str) -> str:
            return f"count(*) FILTER ({name})" if name in self.columns else "0"

        rows = self.rows(
            f"SELECT layer, count(*) AS neurons, {share('specialised')} AS specialised, "
            f"{share('confirmed')} AS confirmed FROM neurons GROUP BY layer ORDER BY layer"
        )
        return [LayerShare(**row) for row in rows]

    @property
    def most(self) -> float:
        """The largest share of a layer, specialised or confirmed: what the bars are scaled by."""
        return max((max(s.specialised, s.confirmed) / s.neurons for s in self.layers), default=0.0) or 1.0

    @cached_property
    def colourable(self) -> dict[str, str]:
        """Columns that can colour the map -> "number", "flag" or "category"."""
        kinds = {}
        for name, kind in self.columns.items():
            if name in {"site", "index", "layer"} or name.endswith("label_token"):
                continue
            if is_flag(kind):
                kinds[name] = "flag"
            elif is_number(kind):
                kinds[name] = "number"
            elif is_text(kind) and name in {"verdict", "label_from", "preferred_class", "brick_function"}:
                kinds[name] = "category"
        return kinds

    def categories(self, column: str) -> list[str]:
        q = quoted(column)
        rows = self.rows(f"SELECT DISTINCT {q} AS v FROM neurons WHERE {q} IS NOT NULL ORDER BY v")
        names = [row["v"] for row in rows]
        known = [v for v in ("promotes", "suppresses", "no effect") if v in names]
        return (known + [v for v in names if v not in known])[:CATEGORIES]

    def map(self, column: str) -> bytes:
        """The map's values: `u32 length of head | head (JSON) | float32 a neuron, site after site`.

        Missing values are NaN; a category is the position of its name in the head's list.
        """
        kind = self.colourable.get(column)
        if kind is None:
            raise QueryError(f"{column!r} cannot colour the map; expected one of {list(self.colourable)}")
        q, names = quoted(column), []
        value = f"CAST({q} AS FLOAT)"
        if kind == "category":
            names = self.categories(column)
            value = f"CAST(list_position([{', '.join(map(literal, names))}], {q}) AS FLOAT) - 1"
        table = self.ask(f'SELECT site, "index" AS i, {value} AS v FROM neurons')
        starts = np.zeros(max(s.number for s in self.sites) + 1, dtype=np.int64)
        starts[[s.number for s in self.sites]] = np.cumsum([0, *(s.width for s in self.sites)])[:-1]
        values = np.full(self.total, np.nan, dtype="<f4")
        where = starts[table.column("site").to_numpy()] + table.column("i").to_numpy()
        values[where] = table.column("v").cast(pa.float32()).to_numpy(zero_copy_only=False)
        scale = self.scale(column) if kind == "number" else Scale(0.0, 1.0, False)
        head = json.dumps(
            {
                "column": column,
                "kind": "signed" if kind == "number" and scale.signed else kind,
                "low": scale.low,
                "high": scale.high,
                "categories": names,
                "sites": [{"number": s.number, "layer": s.layer, "width": s.width, "name": s.name} for s in self.sites],
            }
        ).encode()
        head += b" " * (-len(head) % 4)
        return struct.pack("<I", len(head)) + head + values.tobytes()

    def labels(self) -> list[list[str]]:
        """A word for every neuron, site by site: its label, or else its first token."""
        first = next((f for c, f in FIRST.items() if c in self.columns), "''")
        label = f"coalesce(nullif(label, ''), {first}, '')" if "label" in self.columns else f"coalesce({first}, '')"
        table = self.ask(f'SELECT site, "index" AS i, {label} AS w FROM neurons ORDER BY site, i')
        words: dict[int, list[str]] = {s.number: [""] * s.width for s in self.sites}
        for site, i, word in zip(*(table.column(c).to_pylist() for c in ("site", "i", "w")), strict=True):
            words[site][i] = word
        return [words[s.number] for s in self.sites]

    def neuron(self, address: str) -> dict[str, Any]:
        return self.atlas.neuron(address)

    def brief(self, addresses: list[str]) -> dict[str, dict[str, Any]]:
        """Label, verdict and first tokens of some neurons, by address; what they are described as, where they are."""
        told = ("label", "verdict", "effect", "up_tokens", "clamp_value", "description", "preferred_class")
        names = [c for c in told if c in self.columns]
        if not addresses:
            return {}
        wanted = ["neuron", *map(quoted, names)]
        wanted += ["len(exemplar_images) AS exemplars"] if "exemplar_images" in self.columns else []
        rows = self.rows(
            f"SELECT {', '.join(wanted)} FROM neurons WHERE neuron IN ({', '.join(map(literal, addresses))})"
        )
        return {row["neuron"]: row for row in rows}

    def values(self, column: str) -> list[str]:
        """The values of a text column, those of most neurons first."""
        if column in self.columns and column not in self._values:
            q = quoted(column)
            rows = self.rows(
                f"SELECT {q} AS v FROM neurons WHERE {q} IS NOT NULL GROUP BY ALL ORDER BY count(*) DESC, v LIMIT 200"
            )
            self._values[column] = [str(row["v"]) for row in rows]
        return self._values.get(column, [])

    @cached_property
    def tally(self) -> dict[str, int]:
        """What the start page of a vision atlas counts."""
        asked = {
            "dead": ("dead", "count(*) FILTER (dead)"),
            "selective": ("selectivity", "count(*) FILTER (selectivity >= 0.5)"),
            "described": ("description", "count(*) FILTER (description <> '')"),
            "silenced": ("ablation", "count(ablation)"),
        }
        chosen = {name: sql for name, (column, sql) in asked.items() if column in self.columns}
        if not chosen:
            return {}
        [row] = self.rows("SELECT " + ", ".join(f"{sql} AS {name}" for name, sql in chosen.items()) + " FROM neurons")
        return {name: int(row[name]) for name in chosen}

    @cached_property
    def bricks(self) -> dict[int, list[Brick]]:
        """The bricks of every layer: site -> its bricks, those with a function first, the largest first."""
        if "brick" not in self.columns:
            return {}
        function = "brick_function" if "brick_function" in self.columns else "NULL"
        about = "first(description) FILTER (description <> '')" if "description" in self.columns else "NULL"
        rows = self.rows(
            f"SELECT site, brick, {function} AS function, count(*) AS size, "
            '(list(neuron ORDER BY "index"))[1:6] AS first, '
            f"{about} AS about FROM neurons WHERE brick IS NOT NULL GROUP BY site, brick, {function} "
            "ORDER BY site, (function IS NULL), size DESC, brick"
        )
        made: dict[int, list[Brick]] = {}
        for row in rows:
            brick = Brick(
                row["site"], row["brick"], row["size"], row["function"] or "", row["first"], row["about"] or ""
            )
            made.setdefault(brick.site, []).append(brick)
        return made

    def offered(self, words: str, limit: int = 8) -> list[dict[str, Any]]:
        """Neurons for the playground: those found by words, or else those with the largest effect."""
        if words:
            found = self.found(words)[:limit]
            known = self.brief(found)
            return [known[a] for a in found if a in known]
        if "effect" in self.columns:
            order = "WHERE confirmed AND NOT coalesce(hub, false) ORDER BY abs(effect) DESC"
        elif "specialisation" in self.columns:
            order = "ORDER BY specialisation DESC"
        else:
            order = ""
        first = [r["neuron"] for r in self.rows(f"SELECT neuron FROM neurons {order} LIMIT {limit}")]
        known = self.brief(first)
        return [known[a] for a in first if a in known]

    def download(self, view: View, kind: str) -> tuple[bytes, str]:
        """The view's rows as a CSV or Parquet file, and its media type."""
        import pyarrow.csv
        import pyarrow.parquet

        table, sink = self.everything(view), pa.BufferOutputStream()
        if kind == "parquet":
            pyarrow.parquet.write_table(table, sink)
            return sink.getvalue().to_pybytes(), "application/vnd.apache.parquet"
        for i, field in enumerate(table.schema):
            if is_list(str(field.type)) or pa.types.is_nested(field.type):
                cells = [None if v is None else json.dumps(v, ensure_ascii=False, default=str)
                         for v in table.column(i).to_pylist()]  # fmt: skip
                table = table.set_column(i, field.name, pa.array(cells, pa.string()))
        pyarrow.csv.write_csv(table, sink)
        return sink.getvalue().to_pybytes(), "text/csv; charset=utf-8"
