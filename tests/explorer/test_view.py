"""A table's state is its URL, and nothing in a URL reaches the SQL unquoted."""

from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neuropil.explorer.facts import Facts
from neuropil.explorer.view import MOST_ROWS, View, is_flag, is_list, is_number, is_text

COLUMNS = {"neuron": "VARCHAR", "site": "INTEGER", "index": "INTEGER", "layer": "INTEGER", "label": "VARCHAR",
           "verdict": "VARCHAR", "effect": "FLOAT", "hub": "BOOLEAN", "specialised": "BOOLEAN",
           "up_tokens": "VARCHAR[]"}  # fmt: skip
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@pytest.fixture(scope="module")
def facts(atlas_path: Path) -> Facts:
    return Facts(atlas_path)


@given(
    q=TEXT, label=TEXT, verdict=TEXT, layer=st.from_regex(r"\d{1,4}(-\d{1,4})?", fullmatch=True) | TEXT,
    hub=st.sampled_from(["", "yes", "no", "x"]), sort=st.sampled_from([*COLUMNS, "-effect", "nope", ""]),
    cols=st.lists(st.sampled_from([*COLUMNS, "nope"]), max_size=4), rows=st.integers(-5, 10**6) | TEXT,
)  # fmt: skip
def test_reading_and_writing_a_state_agree(**query: object) -> None:
    given_query = {k: ",".join(v) if isinstance(v, list) else str(v) for k, v in query.items()}
    view = View.read(given_query, COLUMNS)
    assert 1 <= view.rows <= MOST_ROWS
    again = View.read(dict(parse_qsl(urlsplit(view.url("/")).query)), COLUMNS)
    assert again == view


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(label=TEXT, verdict=st.sampled_from(["promotes", "' OR 1=1 --", "x'; DROP TABLE neurons; --", '"']))
def test_filters_filter_and_nothing_else(facts: Facts, label: str, verdict: str) -> None:
    view = View.read({"label": label, "verdict": verdict}, facts.columns)
    rows = facts.page(view).table.to_pylist()
    every = facts.rows("SELECT neuron, label, verdict FROM neurons ORDER BY site, index")
    needle = label.strip().replace("\x00", "").lower()
    wanted = [r["neuron"] for r in every if needle in r["label"].lower() and r["verdict"] == verdict]
    assert [r["neuron"] for r in rows] == wanted[: view.rows]


@pytest.mark.parametrize("sort", ["effect", "-effect", "label", "-specialised", ""])
def test_the_rows_shown_are_those_of_the_statement(facts: Facts, sort: str) -> None:
    view = View.read({"sort": sort, "layer": "0-1", "start": "7", "rows": "20"}, facts.columns)
    page = facts.page(view)
    whole = facts.ask(page.sql)
    assert page.table.to_pylist() == whole.slice(7, 20).to_pylist()
    assert page.more
    assert facts.count(view) == whole.num_rows == 48


def test_search_keeps_the_order_of_the_search(facts: Facts) -> None:
    view = View(q="dog")
    found = facts.found("dog")
    assert found[0] == "0:0"
    assert facts.page(view).table.column("neuron").to_pylist() == found[: view.rows]
    assert facts.page(View(q="dog", sort="-effect")).table.num_rows == min(len(found), view.rows)


def test_sorting_goes_round() -> None:
    view, links = View(), []
    for _ in range(3):
        query = dict(parse_qsl(urlsplit(view.sort_link("effect")).query))
        view = View.read(query, COLUMNS)
        links.append((view.sort, view.aria_sort("effect"), view.aria_sort("hub")))
    assert links == [("-effect", "descending", "none"), ("effect", "ascending", "none"), ("", "none", "none")]


def test_kinds_of_columns(facts: Facts) -> None:
    kinds = {name: (is_list(k), is_text(k), is_flag(k), is_number(k)) for name, k in facts.columns.items()}
    assert all(sum(kind) == 1 for kind in kinds.values()), kinds
    assert kinds["up_tokens"][0]
    assert kinds["verdict"][1]
    assert kinds["hub"][2]
    assert kinds["effect"][3]
    assert kinds["label_sign"][3]
