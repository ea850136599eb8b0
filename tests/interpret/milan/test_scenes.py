"""Generated scenes: what is drawn is what is written down; the grammar says it and reads it back; planted units."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuropil.interpret.milan import exemplars
from neuropil.interpret.milan.grammar import ATTRIBUTES, COLOURS, KINDS, RELATIONS, SHAPES, f1, mentioned, say
from neuropil.interpret.milan.scene_models import Planted, annotated, encoder_of, scene_captioner, trained_net
from neuropil.interpret.milan.scenes import RGB, Scenes, annotate, scenes, shared, worn


@pytest.fixture(scope="module")
def made() -> Scenes:
    return scenes(300, seed=1)


def test_one_seed_gives_the_same_scenes(made: Scenes) -> None:
    again = scenes(300, seed=1)
    assert torch.equal(again.images, made.images)
    assert not torch.equal(scenes(300, seed=2).objects, made.objects)


def test_objects_have_the_colour_that_is_written_down(made: Scenes) -> None:
    for which in (0, 1):
        plain = made.objects[:, which, 1] == 0
        rgb = torch.einsum("nchw,nhw->nc", made.images, made.regions[:, which].float())
        rgb = rgb / made.regions[:, which].sum((1, 2))[:, None]
        nearest = torch.cdist(rgb, RGB).argmin(1)
        assert (nearest == made.objects[:, which, 0])[plain].float().mean() > 0.97


def test_textures_differ_in_how_much_is_dark_and_sizes_in_area(made: Scenes) -> None:
    light = made.images.amax(1)
    share = [
        float((light * made.regions[:, 1])[made.objects[:, 1, 1] == t].sum())
        / float(made.regions[made.objects[:, 1, 1] == t, 1].sum())
        for t in range(4)
    ]
    assert share[0] > share[1] > share[2]
    area = made.regions[:, 1].sum((1, 2)).float()
    for shape in range(4):
        same = made.objects[:, 1, 2] == shape
        small = made.objects[:, 1, 3] == 0
        assert area[same & small].max() < area[same & ~small].mean()


def test_relations_are_where_the_objects_are(made: Scenes) -> None:
    place = torch.arange(64.0)
    rows, columns = (
        (made.regions[:, :2].float().sum(axis) * place).sum(2) / made.regions[:, :2].sum((2, 3)) for axis in (3, 2)
    )
    r = made.relation
    assert (rows[:, 0] < rows[:, 1])[r == RELATIONS.index("above")].all()
    assert (rows[:, 0] > rows[:, 1])[r == RELATIONS.index("below")].all()
    assert (columns[:, 0] < columns[:, 1])[r == RELATIONS.index("left")].all()
    assert (columns[:, 0] > columns[:, 1])[r == RELATIONS.index("right")].all()


def test_letters_are_in_a_corner_where_there_are_any(made: Scenes) -> None:
    assert torch.equal(made.regions[:, 2].flatten(1).any(1), made.text)
    assert not (made.regions[:, 2] & made.regions[:, :2].any(1)).any()
    middle = made.regions[:, 2, 20:44, 30:34]
    assert not middle.any()


def test_concept_masks_hold_the_regions_that_have_them(made: Scenes) -> None:
    grid = made.concepts(64)
    for attribute in (0, 8, 12, 17):
        expected = (made.regions & made.has[:, :, attribute, None, None]).any(1)
        assert torch.equal(grid[attribute], expected)


@given(
    st.tuples(*[st.sampled_from([None, *kind]) for kind in KINDS]),
    st.sampled_from([None, *RELATIONS]),
    st.integers(0, 10**6),
)
@settings(max_examples=100, deadline=None)
def test_what_is_said_is_read_back(parts: tuple[str | None, ...], relation: str | None, seed: int) -> None:
    has = {p for p in parts if p}
    said = say(has | ({relation} if relation and has else set()), random.Random(seed))
    assert mentioned(said) == has
    assert mentioned(say({"text"}, random.Random(seed))) == {"text"}


def test_f1() -> None:
    assert f1({"red"}, {"red"}) == 1
    assert f1(set(), {"red"}) == f1({"red"}, {"blue"}) == 0
    assert f1({"red", "large"}, {"red", "circle"}) == 0.5


def test_most_of_a_set_has_its_concept(made: Scenes) -> None:
    found = annotate(made, 60, seed=3)
    assert len(found.sentences) == len(found.concepts) == len(found.scene) == 60
    for row in range(60):
        concept = found.concepts[row] & set(ATTRIBUTES)
        has = made.has[found.scene[row], found.region[row]]
        rate = has[:, [ATTRIBUTES.index(a) for a in concept]].all(1).float().mean() if concept else 1.0
        assert rate >= 0.8
        assert all(mentioned(s) <= concept for s in found.sentences[row])
    assert len({s for unit in found.sentences for s in unit}) > 40


def test_worn_regions_stay_near(made: Scenes) -> None:
    soft = worn(made.regions[:50])
    assert torch.equal(soft.flatten(2).any(2), made.regions[:50].flatten(2).any(2))
    assert ((soft > 0) & made.regions[:50]).flatten(2).any(2).eq(made.regions[:50].flatten(2).any(2)).all()


def test_planted_units_mean_what_they_are_said_to(made: Scenes) -> None:
    """Of the units whose regions agree on something, what they agree on is the planted meaning."""
    found = exemplars(Planted(), made.images, "units")
    truth = shared(found, made)
    right = [Planted.meanings[u] <= t for u, t in enumerate(truth)]
    assert sum(right) >= 18, [(sorted(Planted.meanings[u]), sorted(t)) for u, t in enumerate(truth) if not right[u]]


def test_a_small_captioner_learns_colours_and_is_kept(tmp_path: Path, made: Scenes) -> None:
    milan = scene_captioner(tmp_path / "kept", count=500, sets=400, epochs=3, captioner_epochs=6)
    found = exemplars(Planted(), made.images, "units", units=range(7))
    said = milan.describe(found)
    colours = [mentioned(d.text) & set(COLOURS) for d in said]
    assert sum(c == {COLOURS[u]} for u, c in enumerate(colours)) >= 4, [d.text for d in said]
    again = scene_captioner(tmp_path / "kept")
    assert again.describe(found) == said


def test_the_net_tells_attributes_and_encodes_regions(made: Scenes) -> None:
    net = trained_net(made, epochs=1, widths=(4, 4, 8, 8, 8))
    keys, said = annotated(encoder_of(net), made, 10)
    assert keys.shape == (10, 15, 32)
    assert [len(s) for s in said] == [3] * 10
    assert len(SHAPES) == 4
