"""What the table shows. All of it stands in the URL, and the same URL always shows the same thing."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlencode

PAGE = 60  # rows fetched at a time
MOST_ROWS = 600  # rows kept in one page before a new page begins: more make a browser slow
FLAGS = ("specialised", "hub", "confirmed", "dead")
# The first of the two is what an atlas of words shows, the second one of images: each has only its own.
DEFAULT_COLUMNS = (
    *("neuron", "label", "verdict", "effect", "cos_up", "cos_gate", "cos_down", "specialisation"),
    *("up_tokens", "down_tokens"),
    *("exemplar_images", "description", "preferred_class", "selectivity", "ablation", "activation_max", "sparsity"),
    *("dead", "brick", "brick_function"),
)
CHOICES = {"prefers": "preferred_class", "serves": "brick_function"}  # filters by one value of a column
RANGES = ("layer", "site", "brick")  # filters by a number or, as 3-5, by all from one to another


def quoted(name: str) -> str:
    """A column's name as SQL.

    >>> quoted('in"dex')
    '"in""dex"'
    """
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text as SQL.

    >>> literal("it's")
    "'it''s'"
    """
    return "'" + text.replace("'", "''").replace("\x00", "") + "'"


def is_list(kind: str) -> bool:
    kind = kind.lower()
    return kind.endswith("[]") or kind.startswith(("list", "large_list"))


def is_text(kind: str) -> bool:
    return not is_list(kind) and kind.lower().startswith(("varchar", "string", "large_string", "utf8"))


def is_flag(kind: str) -> bool:
    return kind.lower().startswith("bool")


def is_number(kind: str) -> bool:
    """Whether a DuckDB or Arrow type holds numbers.

    >>> [is_number(k) for k in ("UTINYINT", "float", "DOUBLE[]", "VARCHAR", "HUGEINT")]
    [True, True, False, False, True]
    """
    return re.fullmatch(r"(u|tiny|small|big|huge)*int(eger)?\d*|float|double|real|half\w*|decimal.*",
                        kind.lower()) is not None  # fmt: skip


@dataclass(frozen=True)
class View:
    """One state of the table, read from a query string and written back to one."""

    q: str = ""
    layer: str = ""
    verdict: str = ""
    label: str = ""
    specialised: str = ""
    hub: str = ""
    confirmed: str = ""
    dead: str = ""
    site: str = ""
    brick: str = ""
    serves: str = ""
    prefers: str = ""
    about: str = ""
    sort: str = ""
    cols: tuple[str, ...] = ()
    start: int = 0
    rows: int = PAGE
    sql: str = ""

    @classmethod
    def read(cls, query: Mapping[str, str], columns: Mapping[str, str]) -> "View":
        """Read a state, dropping whatever this atlas does not know.

        >>> View.read({"layer": "3-5", "sort": "-nope", "rows": "x"}, {"layer": "INTEGER"}).url("/")
        '/?layer=3-5'
        """
        sql = query.get("sql", "").strip()
        sort = query.get("sort", "")
        if not sql and sort.lstrip("-") not in columns:
            sort = ""
        flags = {f: query.get(f, "") if query.get(f) in {"yes", "no"} and f in columns else "" for f in FLAGS}
        chosen = {f: query.get(f, "")[:200] if column in columns else "" for f, column in CHOICES.items()}
        ranges = {f: re.sub(r"\s+", "", query.get(f, "")) for f in RANGES if f in columns}
        chosen |= {f: text for f, text in ranges.items() if re.fullmatch(r"\d{1,9}(-\d{1,9})?", text)}
        return cls(
            q=query.get("q", "").strip()[:400],
            verdict=query.get("verdict", "") if "verdict" in columns else "",
            label=query.get("label", "").strip()[:200] if "label" in columns else "",
            about=query.get("about", "").strip()[:200] if "description" in columns else "",
            sort=sort,
            cols=tuple(c for c in query.get("cols", "").split(",") if c in columns),
            start=_whole(query.get("start"), 0, 10**9, 0),
            rows=_whole(query.get("rows"), 1, MOST_ROWS, PAGE),
            sql=sql,
            **flags,
            **chosen,
        )

    def url(self, path: str = "/", **changes: object) -> str:
        """The address of this state with some things changed; defaults are left out."""
        state = replace(self, **changes)  # type: ignore[arg-type]
        pairs = []
        for name, default in vars(View()).items():
            value = getattr(state, name)
            if value != default:
                pairs.append((name, ",".join(value) if isinstance(value, tuple) else str(value)))
        return path + ("?" + urlencode(pairs) if pairs else "")

    @staticmethod
    def boxes(ticked: list[str], columns: Mapping[str, str]) -> str:
        """The `cols` of a query from the column chooser's boxes: the usual columns stay in their usual order."""
        usual = [c for c in DEFAULT_COLUMNS if c in columns and c != "neuron"]
        names = [c for c in usual if c in ticked] + [c for c in ticked if c not in usual]
        return "" if names == usual else ",".join(names)

    def reset(self) -> "View":
        """From the top again: what a new filter or order asks for."""
        return replace(self, start=0, rows=PAGE)

    def chosen(self, columns: Mapping[str, str]) -> list[str]:
        """The columns to show, the neuron's address always first."""
        names = list(self.cols) or [c for c in DEFAULT_COLUMNS if c in columns]
        return ["neuron", *(c for c in names if c != "neuron")]

    @property
    def filtered(self) -> bool:
        rest = {"sort", "cols", "start", "rows", "sql"}
        return any(value for name, value in vars(self).items() if name not in rest)

    def where(self, found: list[str] | None) -> str:
        """The WHERE clause of the filters; `found` are the addresses that the search gave."""
        terms = []
        for name in RANGES:
            low, _, high = getattr(self, name).partition("-")
            if low:
                terms.append(f"{name} BETWEEN {int(low)} AND {int(high)}" if high else f"{name} = {int(low)}")
        if self.verdict == "unmeasured":
            terms.append("verdict IS NULL")
        elif self.verdict:
            terms.append(f"verdict = {literal(self.verdict)}")
        if self.label:
            terms.append(f"contains(lower(label), {literal(self.label.lower())})")
        if self.about:
            terms.append(f"contains(lower(description), {literal(self.about.lower())})")
        terms += [f"{column} = {literal(value)}" for f, column in CHOICES.items() if (value := getattr(self, f))]
        terms += [
            f"{name} IS {'' if value == 'yes' else 'NOT '}TRUE" for name in FLAGS if (value := getattr(self, name))
        ]
        if found is not None:
            terms.append(f"neuron IN ({', '.join(map(literal, found)) or 'NULL'})")
        return "\nWHERE " + "\n  AND ".join(terms) if terms else ""

    def statement(
        self, columns: Mapping[str, str], found: list[str] | None = None, only_addresses: bool = False
    ) -> str:
        """The whole question as SQL, without the paging: it can be read, edited and run again."""
        if self.sql:
            sql = self.sql.rstrip().rstrip(";")
            if not self.sort:
                return sql
            return f"SELECT * FROM (\n{sql}\n) AS q\nORDER BY {self._order(self.sort)}"
        names = "neuron" if only_addresses else ", ".join(map(quoted, self.chosen(columns)))
        order = "site, " + quoted("index")
        if self.sort:
            order = self._order(self.sort) + ", " + order
        elif found:
            order = f"list_position([{', '.join(map(literal, found))}], neuron)"
        return f"SELECT {names}\nFROM neurons{self.where(found)}\nORDER BY {order}"

    @staticmethod
    def _order(sort: str) -> str:
        return quoted(sort.lstrip("-")) + (" DESC NULLS LAST" if sort.startswith("-") else " NULLS LAST")

    def sort_link(self, column: str) -> str:
        """What pressing a column's head leads to: largest first, then smallest first, then as it was."""
        following = {"-" + column: column, column: ""}.get(self.sort, "-" + column)
        return self.reset().url("/sql" if self.sql else "/", sort=following)

    def aria_sort(self, column: str) -> str:
        return {"-" + column: "descending", column: "ascending"}.get(self.sort, "none")


def _whole(text: str | None, low: int, high: int, default: int) -> int:
    return min(max(int(text), low), high) if text and re.fullmatch(r"\d{1,9}", text) else default
