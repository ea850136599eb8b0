"""What the pages show is what the atlas says."""

import csv
import io
import json
import math
import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from neuropil.errors import NeuropilError, QueryError
from neuropil.explorer import alike, words
from neuropil.explorer.facts import Facts
from neuropil.explorer.view import View
from neuropil.models import Model


@pytest.fixture(scope="module")
def facts(atlas_path: Path) -> Facts:
    return Facts(atlas_path)


def decoded(data: bytes) -> tuple[dict, np.ndarray]:
    [size] = struct.unpack_from("<I", data)
    return json.loads(data[4 : 4 + size]), np.frombuffer(data, "<f4", offset=4 + size)


@pytest.mark.parametrize("column", ["effect", "specialised", "verdict", "label_sign"])
def test_the_map_holds_every_value_in_its_place(facts: Facts, column: str) -> None:
    head, values = decoded(facts.map(column))
    rows = facts.rows(f'SELECT "{column}" AS v FROM neurons ORDER BY site, index')
    wanted = [head["categories"].index(r["v"]) if column == "verdict" else float(r["v"]) for r in rows]
    np.testing.assert_array_equal(values, np.array(wanted, np.float32))
    assert [s["width"] for s in head["sites"]] == [24, 24, 24]
    assert head["kind"] == {"effect": "signed", "specialised": "flag", "verdict": "category"}.get(column, "signed")


def test_the_map_refuses_what_is_no_colour(facts: Facts) -> None:
    for column in ("up_tokens", "nope", 'effect"; DROP TABLE x; --'):
        with pytest.raises(QueryError, match="cannot colour"):
            facts.map(column)


def test_labels_stand_beside_their_neurons(facts: Facts) -> None:
    labels = facts.labels()
    assert [len(site) for site in labels] == [24, 24, 24]
    assert labels[0][0] == facts.neuron("0:0")["label"] == "dog"


def test_neighbours_by_tokens_are_by_jaccard(facts: Facts) -> None:
    rows = facts.rows("SELECT neuron, up_token_ids || up_neg_token_ids AS ids FROM neurons")
    sets = {r["neuron"]: set(r["ids"]) for r in rows}
    mine = sets.pop("1:3")
    brute = sorted((-len(mine & s) / len(mine | s), n) for n, s in sets.items())[:12]
    assert alike.by_tokens(facts, "1:3") == [(n, pytest.approx(-s)) for s, n in brute if s]


@pytest.mark.parametrize("everywhere", [False, True])
def test_neighbours_by_weights_are_by_cosine(facts: Facts, model: Model, everywhere: bool) -> None:
    found = alike.by_rows("1:3", "down", model, everywhere)
    rows = torch.cat([model.rows(s, "down") for s in model.sites])
    cosines = torch.nn.functional.cosine_similarity(rows, rows[24 + 3][None])
    cosines[24 + 3] = 0
    if not everywhere:
        cosines[:24] = cosines[48:] = 0
    best = cosines.abs().topk(12).indices
    assert [a for a, _ in found] == [f"{i // 24}:{i % 24}" for i in best.tolist()]
    assert [c for _, c in found] == pytest.approx(cosines[best].tolist(), abs=1e-5)
    with pytest.raises(NeuropilError, match="no 'sideways' weight"):
        alike.by_rows("1:3", "sideways", model, everywhere)


def test_downloads_hold_the_whole_view(facts: Facts) -> None:
    view = View(layer="1", sort="-effect", cols=("label", "effect", "up_tokens"))
    whole = facts.ask(facts.page(view).sql)
    data, media = facts.download(view, "parquet")
    assert pq.read_table(io.BytesIO(data)).to_pylist() == whole.to_pylist()
    assert "parquet" in media
    text, _ = facts.download(view, "csv")
    rows = list(csv.DictReader(io.StringIO(text.decode())))
    assert [json.loads(r["up_tokens"]) for r in rows] == whole.column("up_tokens").to_pylist()
    assert [float(r["effect"]) for r in rows] == pytest.approx(whole.column("effect").to_pylist(), rel=1e-5)


def test_a_grown_atlas_is_noticed(tmp_path: Path) -> None:
    import atlas_factory

    from neuropil.atlas import Atlas

    path = atlas_factory.tiny_atlas(tmp_path / "a", causal=False)
    facts = Facts(path)
    facts.refresh()
    assert "effect" not in facts.columns
    assert facts.verdicts == {}
    with Atlas.open(path, write=True) as atlas:
        atlas.add("causal", atlas_factory.causal_columns, settings={}, progress=False)
    facts._seen = (-10.0, facts._seen[1])  # as if a second had passed
    facts.refresh()
    assert "effect" in facts.columns
    assert sum(facts.verdicts.values()) == facts.total


# ------------------------------------------------------------------------------------------- plain words


def test_a_suppressor_is_called_one() -> None:
    row = {"label": "dog", "verdict": "suppresses", "effect": -1.2, "effect_se": 0.1, "control": 0.0, "control_se": 0.2}
    said = words.verdict(row)
    assert said.head == "Suppresses “dog”"
    assert "suppresses what its weights point at" in said.body
    assert "−1.20 ± 0.100" in said.body
    assert words.verdict(row | {"verdict": "promotes", "effect": 1.2}).head == "Promotes “dog”"
    assert words.verdict(row | {"verdict": "no effect"}).kind == "no effect"
    assert words.verdict({"label": "dog"}).kind == "unmeasured"
    away = words.verdict(row | {"label_from": "down", "label_sign": -1})
    assert away.body.startswith("Its down column points away from “dog”, and turned up it makes “dog” less likely.")


def test_what_is_within_chance_is_not_said() -> None:
    row = {"label": "flight", "label_from": "gate", "specialisation": 2.0, "cos_up": -0.1, "cos_gate": 0.4,
           "cos_down": 0.35}  # fmt: skip
    assert words.signs(row) == "Beyond chance, it opens on “flight” and writes towards it."
    assert words.signs(row | {"cos_gate": None, "cos_down": None}) == ""


@pytest.mark.parametrize(("up", "down", "ends"), [
    (0.4, 0.3, "adds more of it"), (-0.4, -0.3, "adds more of it"),
    (-0.4, 0.3, "takes the word away"), (0.4, -0.3, "takes the word away"),
])  # fmt: skip
def test_signs_follow_the_product(up: float, down: float, ends: str) -> None:
    assert ends in words.signs({"cos_up": up, "cos_down": down, "label": "dog", "specialisation": 2.0})


def test_an_axis_holds_zero_and_all_its_whiskers() -> None:
    axis = words.axis([("effect", 2.0, 0.5, "effect"), ("control", None, None, "control"), ("x", -1.0, None, "x")])
    assert axis is not None
    assert [m.name for m in axis.marks] == ["effect", "x"]
    assert all(0 <= at <= 100 for m in axis.marks for at in (m.low, m.at, m.high, axis.zero))
    effect, other = axis.marks
    assert other.at < axis.zero < effect.low < effect.at < effect.high
    assert (effect.at - axis.zero) / (axis.zero - other.at) == pytest.approx(2.0, abs=0.01)
    assert words.axis([("effect", math.nan, None, "effect")]) is None
    assert words.axis([("effect", 0.0, 0.0, "effect")]) is not None


def test_the_null_is_recovered_from_the_score() -> None:
    row = {"specialisation": 2.0, "cos_gate": -0.4, "label_from": "gate"}
    assert words.null99(row) == pytest.approx(0.2)
    assert words.null99({"specialisation": None}) is None
