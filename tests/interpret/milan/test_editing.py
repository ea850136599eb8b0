"""Ablation by masks, the three applications on planted networks, the label baselines, a CLIP, columns."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from neuropil.atlas import Atlas
from neuropil.interpret.milan import (
    Description,
    UnknownLayer,
    ablate,
    accuracy,
    analyse,
    audit,
    choose,
    compositional,
    described_columns,
    edit_spurious,
    exemplars,
    finetune_last,
    iou,
    netdissect,
    unit_masks,
)
from neuropil.interpret.milan.candidates import HuggingFaceCLIP, _attention_to
from neuropil.interpret.milan.editing import (
    by_layer,
    count_tags,
    count_words,
    histogram,
    length,
    word_difference,
    word_similarity,
)
from neuropil.models import load
from neuropil.neurons import clamp, find_sites


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)
    ).eval()


def images(count: int = 20) -> Tensor:
    return torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


# --- ablation --------------------------------------------------------------------------------------


def test_no_unit_taken_out_changes_nothing_to_the_bit() -> None:
    model, x = net(), images()
    before = model(x)
    with ablate(model, {}), ablate(model, {"1": []}):
        assert torch.equal(model(x), before)


def test_all_units_out_is_a_layer_of_zeros() -> None:
    model, x = net(), images()
    with ablate(model, {"1": range(4)}):
        out = model(x)
    assert torch.equal(out, model[2:](torch.zeros(20, 4, 6, 6)))


def test_a_unit_out_is_a_unit_clamped_at_zero() -> None:
    model, x = net(), images()
    [first, second] = find_sites(model)
    with clamp(model, {"0:2": 0.0, "1:3": 0.0}):
        expected = model(x)
    with ablate(model, {first: [2], second: [3]}):
        torch.testing.assert_close(model(x), expected)
    with ablate(model, {"1": [2], "3": [3]}):
        torch.testing.assert_close(model(x), expected)


def test_the_model_is_as_before_also_after_an_exception() -> None:
    model, x = net().train(), images()
    before = model(x)
    for units in ({"1": [0]}, {find_sites(model)[0]: [1]}):
        with pytest.raises(KeyError), ablate(model, units):
            raise KeyError
    assert torch.equal(model(x), before)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    accuracy(model, (x, torch.zeros(20, dtype=torch.int64)))
    assert all(m.training for m in model.modules())


def test_gradients_pass_through_the_units_that_stay() -> None:
    model, x = net(), images()
    with ablate(model, {"1": [0, 1]}):
        model(x).sum().backward()
    felt = model[0].weight.grad.flatten(1).abs().sum(1)
    assert (felt[:2] == 0).all()
    assert (felt[2:] > 0).all()


def test_units_that_are_not_there_are_refused() -> None:
    model = net()
    with pytest.raises(UnknownLayer, match="near names"), ablate(model, {"9": [0]}):
        pass
    with pytest.raises(ValueError, match="units 0 to 3"), ablate(model, {"1": [4]}):
        model(images())


# --- a network that half relies on a planted feature -----------------------------------------------


class Leaning(nn.Module):
    """Unit 0 sees the class in the red channel, unit 1 in the green one ("text"), 2 and 3 nothing; text weighs more."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Conv2d(3, 4, 1, bias=False)
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            self.units.weight.zero_()
            self.units.weight[0, 0] = self.units.weight[1, 1] = self.units.weight[2, 2] = 1
            self.head.weight.copy_(torch.tensor([[-1.0, -2, 0, 0], [1, 2, 0, 0]]))
            self.head.bias.copy_(torch.tensor([1.5, -1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(x).amax((2, 3)))


TEXTS = {("units", 0): "red areas", ("units", 1): "Letters and words", ("units", 2): "blue", ("units", 3): "nothing"}


def world(spurious: bool, count: int = 200) -> tuple[Tensor, Tensor]:
    """Red tells the class; green tells it too, or a random one."""
    g = torch.Generator().manual_seed(int(spurious))
    y = torch.randint(2, (count,), generator=g)
    other = y if spurious else torch.randint(2, (count,), generator=g)
    x = torch.zeros(count, 3, 2, 2)
    x[:, 0], x[:, 1] = y[:, None, None], other[:, None, None]
    x[:, 2] = torch.rand(count, 1, 1, generator=g)
    return x, y


def test_an_edit_takes_out_the_spurious_unit() -> None:
    model = Leaning()
    test = world(spurious=False)
    found = edit_spurious(model, test, test, TEXTS, most=3)
    assert found.candidates == found.order == [("units", 1)]
    assert len(found.test) == len(found.validation) == 2
    assert found.test[0] == accuracy(model, test) < 0.8
    with torch.no_grad():
        without = Leaning()
        without.units.weight[1] = 0
        assert found.test[1] == accuracy(without, test)
    assert found.chosen == int(found.validation[1] > found.validation[0])
    every = edit_spurious(model, test, test, TEXTS, None, most=2)
    assert len(every.candidates) == 4
    assert len(every.order) == 2
    assert [len(r) for r in every.random] == [3] * 5
    scores = {u: accuracy_without(model, test, u) for u in TEXTS}
    assert scores[every.order[0]] == max(scores.values())


def accuracy_without(model: nn.Module, data: tuple[Tensor, Tensor], unit: tuple[str, int]) -> float:
    with ablate(model, {unit[0]: [unit[1]]}):
        return accuracy(model, data)


def test_the_last_layer_learns_without_the_units() -> None:
    model = Leaning()
    data = world(spurious=False)
    out = {"units": [1]}
    edited = finetune_last(model, data, out, "head", epochs=40, lr=0.1)
    assert torch.equal(edited.units.weight, model.units.weight)
    assert not torch.equal(edited.head.weight, model.head.weight)
    assert torch.equal(model.head.weight, Leaning().head.weight)
    with ablate(edited, out):
        assert accuracy(edited, data) == 1
    assert all(p.requires_grad for p in edited.parameters())


def test_analysis_deletes_by_property_and_at_random() -> None:
    model, data = Leaning(), world(spurious=True)
    found = analyse(model, data, TEXTS, count_words(["red", "letter", "word"]), shares=(0.0, 0.25, 0.5, 1.0), orders=3)
    assert found.counts == [0, 1, 2, 4]
    assert found.accuracy[0] == accuracy(model, data) == 1
    assert found.accuracy[1] == accuracy_without(model, data, ("units", 1))  # two such words
    assert found.accuracy[2] == found.accuracy[3] == accuracy_without_all(model, data)
    assert len(found.random) == 3
    assert all(r[0] == 1 and r[3] == found.accuracy[3] for r in found.random)


def accuracy_without_all(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    with ablate(model, {"units": range(4)}):
        return accuracy(model, data)


def test_properties_of_descriptions() -> None:
    assert length("A red ball, striped.") == 6
    assert count_words(["letter"])("Letters and a letter") == 2
    assert count_tags("ADJ", lambda text: ["ADJ" if w == "red" else "NOUN" for w in text.split()])("red red ball") == 2
    vectors = {"red": torch.tensor([1.0, 0]), "ball": torch.tensor([0.0, 2])}
    assert word_difference(vectors.get)("a red ball") == 5
    assert word_difference(vectors.get)("nothing") == 0
    assert word_similarity("red", vectors.get)("red") == pytest.approx(1)
    with pytest.raises(ValueError, match="no vector"):
        word_similarity("cat", vectors.get)
    assert histogram(TEXTS, length) == {"units": [2, 3, 1, 1]}
    assert by_layer([("a", 1), ("b", 0), ("a", 2)]) == {"a": [1, 2], "b": [0]}


def test_an_audit_counts_the_units_that_speak_of_it() -> None:
    found = audit({"plain": TEXTS, "blurred": {("units", 0): "sky"}}, ["letter", "face"])
    assert found.found == {"plain": [("units", 1)], "blurred": []}
    assert found.share == {"plain": 0.25, "blurred": 0}
    with pytest.raises(ValueError, match="words is empty"):
        audit({"plain": TEXTS}, [])


# --- labels ----------------------------------------------------------------------------------------


def test_iou_of_the_same_of_nothing_shared_and_of_half() -> None:
    a = torch.tensor([[1, 1, 0, 0]]).bool()
    others = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    torch.testing.assert_close(iou(a, others), torch.tensor([[1, 0, 1 / 3, 0]]))


def test_formulas_of_planted_units_are_found() -> None:
    concepts = torch.rand(4, 600, generator=torch.Generator().manual_seed(2)) < 0.4
    red, round_, small, big = concepts
    units = torch.stack([red & round_, red | small, red & ~big, (red & round_) & ~small, small])
    found = compositional(units, concepts, ["red", "round", "small", "big"])
    assert [label.iou for label in found] == pytest.approx([1] * 5)
    assert found[1].text in ("(red or small)", "(small or red)")
    assert found[2].text == "(red and not big)"
    assert found[2].concepts == ("red",)
    assert found[4].text == "small"
    assert set(found[3].concepts) == {"red", "round"}
    single = netdissect(units, concepts, ["red", "round", "small", "big"])
    assert [s.iou <= f.iou for s, f in zip(single, found, strict=True)] == [True] * 5
    with pytest.raises(ValueError, match="give one each"):
        netdissect(units, concepts, ["red"])
    with pytest.raises(ValueError, match="one grid"):
        netdissect(units[:, :5], concepts, ["red", "round", "small", "big"])


def test_a_formulas_iou_is_that_of_its_mask() -> None:
    g = torch.Generator().manual_seed(3)
    concepts, units = torch.rand(5, 300, generator=g) < 0.3, torch.rand(6, 300, generator=g) < 0.2
    names = list("abcde")
    for unit, label in zip(units, compositional(units, concepts, names), strict=True):
        text = label.text.replace("and not", "& ~").replace("and", "&").replace("or", "|")
        mask = eval(text, {"__builtins__": {}}, dict(zip(names, concepts, strict=True)))
        assert label.iou == pytest.approx(float(iou(unit[None], mask[None])), abs=1e-6)


def test_unit_masks_are_over_the_threshold_everywhere() -> None:
    model, x = net(), images()
    found = exemplars(model, x, "1", k=3)
    masks = unit_masks(model, x, "1", found.threshold, 6, batch_size=7)
    assert torch.equal(masks, (model[:2](x) > found.threshold[:, None, None]).transpose(0, 1))
    some = unit_masks(model, x, "1", found.threshold[[3]], 6, units=[3])
    assert torch.equal(some[0], masks[3])


# --- a model of pictures and words -----------------------------------------------------------------


class Reds:
    """Pictures by their mean colour (in the region), words by name."""

    def images(self, pictures: Tensor, masks: Tensor | None) -> Tensor:
        m = torch.ones_like(pictures[:, :1]) if masks is None else masks
        return nn.functional.normalize((pictures * m).mean((2, 3)), dim=1)

    def words(self, sentences: list[str]) -> Tensor:
        return torch.stack([torch.eye(3)[["red", "green", "blue"].index(s)] for s in sentences])


def test_candidates_are_chosen_by_the_region() -> None:
    pictures = torch.zeros(2, 4, 3, 4, 4)
    pictures[:, :, 0, :, :1] = 1  # red at the left, green elsewhere
    pictures[:, :, 1, :, 1:] = 1
    masks = torch.zeros(2, 4, 1, 4, 4)
    masks[0, ..., :1] = 1
    masks[1, ..., 1:] = 1
    words = ["blue", "green", "red"]
    assert [c for c, _ in choose(Reds(), (pictures, masks), words, 0.0)] == ["red", "green"]
    assert [c for c, _ in choose(Reds(), (pictures, masks), words, 1.0)] == ["green", "green"]
    with pytest.raises(ValueError, match="candidates is empty"):
        choose(Reds(), (pictures, masks), [])
    with pytest.raises(ValueError, match="lam is"):
        choose(Reds(), (pictures, masks), words, 2.0)


def test_a_clip_looks_at_the_region_only() -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=CLIPTextConfig(vocab_size=30, **sizes).to_dict(),
        vision_config=CLIPVisionConfig(image_size=16, patch_size=4, **sizes).to_dict(),
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    clip = HuggingFaceCLIP(model, None, lambda x: x - 0.5)
    x = torch.rand(2, 3, 16, 16)
    whole = clip.images(x, torch.ones(2, 1, 16, 16))
    torch.testing.assert_close(whole, clip.images(x, None), rtol=1e-4, atol=1e-5)
    left = torch.zeros(2, 1, 16, 16)
    left[..., :8] = 1
    other = x.clone()
    other[..., 8:] = 0
    seen, same = clip.images(x, left), clip.images(other, left)
    assert not torch.allclose(seen, clip.images(x, None), atol=1e-3)
    # What lies outside still decides how attention is shared, but is not looked at: much closer than the pictures are.
    apart = (clip.images(x, None) - clip.images(other, None)).norm()
    assert (seen - same).norm() < 0.5 * apart
    kind = model.vision_model.config._attn_implementation
    with pytest.raises(KeyError), _attention_to(model.vision_model, torch.ones(2, 16)):
        raise KeyError
    assert model.vision_model.config._attn_implementation == kind


# --- the atlas -------------------------------------------------------------------------------------


def test_descriptions_are_columns_of_an_atlas(tmp_path: object) -> None:
    module = net()
    model = load(module)
    described = {}
    for site in model.sites:
        found = exemplars(module, images(), site, k=3)
        texts = [Description(f"unit {i}", 0.5 * i, 0.0, 0.0) for i in range(site.width)]
        described[site.name] = (found, texts)
    columns = described_columns(described)
    mapped = SimpleNamespace(  # a model without tokens
        name="net", fingerprint=model.fingerprint, architecture="Sequential", sites=model.sites, tokens=lambda: []
    )
    with Atlas.create(f"{tmp_path}/atlas", mapped) as atlas:
        atlas.add("milan", columns, progress=False)
        table = atlas.query("SELECT neuron, description, description_score, dead FROM neurons ORDER BY site, index")
    assert table.num_rows == 9
    assert table["description"].to_pylist() == [f"unit {i}" for i in (*range(4), *range(5))]
    dead = [d for f, _ in described.values() for d in f.dead.tolist()]
    assert table["dead"].to_pylist() == dead
    scores = [None if d else 0.5 * i for i, d in zip((*range(4), *range(5)), dead, strict=True)]
    assert table["description_score"].to_pylist() == scores
