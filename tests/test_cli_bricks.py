"""`neuropil bricks`: the matrix, the columns, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from PIL import Image
from test_cli import run, said_no_traceback, save

from neuropil.atlas import Atlas
from neuropil.build import build_atlas, probe_for
from neuropil.data import Probe
from neuropil.interpret.bricks import functionality, matched_control, neurons_of
from neuropil.interpret.bricks.images import OWN, PREFERRED, image_functions
from neuropil.models import load
from neuropil.neurons import clamp


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny", layers=2)


SMALL = ("--sequences", 16, "--length", 8, "--bricks", 4)


def test_the_matrix_and_the_columns(net: Path, tmp_path: Path) -> None:
    path, mine = tmp_path / "atlas", tmp_path / "dogs.txt"
    mine.write_text("dog cat " * 2000)
    build_atlas(load(net), path, causal=False, progress=False)
    done = run(
        "bricks", net, "--functions", f"arithmetic,json,{mine}", *SMALL, "--share", 0.1, "--atlas", path, "--json"
    )
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    names = ["arithmetic", "json", "dogs"]
    assert [*facts["rise"]] == [*facts["loss"]] == names
    assert all([*row] == names for row in facts["rise"].values())
    wanted = ["brick", "brick_function", *(f"predictivity_{name}" for name in names)]
    assert facts["columns"] == wanted
    with Atlas.open(path) as atlas:
        table = atlas.query(f"SELECT site, {', '.join(wanted)} FROM neurons").to_pylist()
    assert len(table) == 48
    assert {row["brick"] for row in table} == {0, 1, 2, 3}
    assert {row["brick_function"] for row in table} <= {None, *names}
    assert all(0.5 <= row["predictivity_dogs"] <= 1 for row in table)


def test_it_is_shown(net: Path) -> None:
    done = run("bricks", net, "--functions", "json,numerals", *SMALL, "-m", "random")
    assert done.exit_code == 0, done.stderr
    assert "others as active" in done.stdout
    assert "specificity" in done.stdout


def test_what_is_refused(net: Path, tmp_path: Path) -> None:
    for options, code in (
        (("--images", "digits"), 2),
        (("--functions", "json"), 2),
        (("--functions", "json,numerals", "-m", "spectral"), 2),
        (("--functions", "json,numerals", "--share", 0.7), 2),
        (("--functions", "json,numerals", "--how", "noise"), 2),
    ):
        assert run("bricks", net, *options).exit_code == code
    assert str(tmp_path) in said_no_traceback(run("bricks", net, "--atlas", tmp_path), 7)
    assert "25 bricks" in said_no_traceback(run("bricks", net, "--functions", "json,numerals", "--bricks", 25,
                                                "--sequences", 8, "--length", 8), 1)  # fmt: skip


# --- classes of images --------------------------------------------------------------------------------------

MINE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3), nn.Linear(6 * 36, 40)
        self.c = nn.Linear(40, classes)
        self.aside = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))

    def forward(self, x, other=None):
        if other is not None:
            return self.aside(other)
        return self.c(self.b(self.a(x).relu().flatten(1)).relu())


def make(classes):
    torch.manual_seed(0)
    return Net(classes)


ten = lambda: make(10)
four = lambda: make(4)
dense = lambda: nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mine") / "nets.py"
    path.write_text(MINE)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of colour: a subfolder of reddish pictures and one of bluish ones, and one that has too few."""
    root = tmp_path_factory.mktemp("pictures")
    made = torch.Generator().manual_seed(0)
    for name, count, channel in (("blue", 20, 2), ("red", 20, 0), ("rare", 3, 1)):
        (root / name).mkdir()
        for i in range(count):
            pixels = torch.randint(0, 120, (32, 32, 3), generator=made, dtype=torch.uint8)
            pixels[..., channel] += 130
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")
    return root


def facts_of(*arguments: object) -> Any:
    done = run("bricks", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["ten", "four"])
@pytest.mark.parametrize("how", ["mean", "zero"])
def test_what_pruning_costs_is_what_clamping_says(name: str, how: str, mine: Path) -> None:
    functions = ["0", "7", "3"]
    facts = facts_of(f"{mine}:{name}", "--images", "digits", "--functions", ",".join(functions), "--how", how,
                     "--share", 0.2)  # fmt: skip
    assert facts["loss_of"] == (OWN if name == "ten" else PREFERRED)
    assert facts["left"] == {"aside": "no image passes it"}

    model = load(f"{mine}:{name}")
    net, shown = model.module(), probe_for(model, "digits")
    assert shown.labels is not None
    own = {f: (shown.labels == shown.classes.index(f)).nonzero()[:, 0] for f in functions}
    learn = {f: [shown.pixels[places[::2]].float() / 255] for f, places in own.items()}
    judge = {f: shown.pixels[places[1::2]].float() / 255 for f, places in own.items()}
    found = functionality(net, learn, layers=[0, 1])
    numbers = {site.name: site.number for site in model.sites}

    def loss(f: str) -> float:
        log = net(judge[f]).log_softmax(1)
        wanted = torch.full((len(log),), int(f)) if name == "ten" else before[f]
        return -float(log.gather(1, wanted[:, None]).mean())

    with torch.no_grad():
        before = {f: net(x).argmax(1) for f, x in judge.items()}
        base = {f: loss(f) for f in functions}
        assert facts["loss"] == pytest.approx(base, abs=1e-5)
        for pruned in functions:
            sets = {"rise": neurons_of(found, pruned, 0.2)}
            sets["rise_of_others_as_active"] = matched_control(found, sets["rise"], 0)
            for told, chosen in sets.items():
                values = {
                    f"{numbers[site]}:{i}": float(found.mean[site][i]) if how == "mean" else 0.0
                    for site, indices in chosen.items()
                    for i in indices.tolist()
                }
                with clamp(net, values):
                    rise = {f: loss(f) - base[f] for f in functions}
                assert facts[told][pruned] == pytest.approx(rise, abs=1e-5)
                assert max(map(abs, rise.values())) > 1e-4


def test_one_half_of_each_class_is_learned_from_and_the_other_tests(mine: Path) -> None:
    model = load(f"{mine}:ten")
    pixels = torch.arange(90, dtype=torch.uint8).view(90, 1, 1, 1).expand(90, 1, 8, 8).contiguous()
    images = Probe("numbered", pixels, tuple(map(str, range(90))), torch.arange(90) % 3, ("x", "y", "z"))
    shown = image_functions(model, images, ["z", "x"])
    for name, rest in (("z", 2), ("x", 0)):
        learn = shown.train[name].pixels[:, 0, 0, 0].tolist()
        [(tested, _)] = shown.test[name]
        test = tested[:, 0, 0, 0].tolist()
        assert len(learn) == len(test) == 15
        assert sorted(learn + test) == list(range(rest, 90, 3))
    assert torch.equal(torch.cat(list(shown.train["x"])), shown.train["x"].takes(shown.train["x"].pixels))
    mixed = shown.mixed.pixels[:, 0, 0, 0]
    assert (mixed % 3).tolist() == [2, 0] * 15
    assert mixed.unique().numel() == 30


def test_a_neuron_that_serves_one_class_costs_that_class_alone(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("""
import torch
from torch import nn


def net():
    made = nn.Sequential(nn.Conv2d(3, 32, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(32, 2, bias=False))
    torch.manual_seed(0)
    with torch.no_grad():
        made[0].weight.copy_(torch.rand(32, 1, 1, 1).expand(32, 3, 1, 1))  # all others answer to every colour alike,
        made[4].weight.zero_()  # and write nothing
        made[0].weight[5, :, 0, 0], made[4].weight[0, 5] = torch.tensor([-1.0, -1.0, 2.0]), 8.0
        made[0].weight[9, :, 0, 0], made[4].weight[1, 9] = torch.tensor([2.0, -1.0, -1.0]), 8.0
    return made
""")
    made = torch.Generator().manual_seed(0)
    for name, channel in (("blue", 2), ("red", 0)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(16):
            pixels = torch.randint(0, 120, (8, 8, 3), generator=made, dtype=torch.uint8)
            pixels[..., channel] += 130
            Image.fromarray(pixels.numpy()).save(tmp_path / "set" / name / f"{i}.png")
    model = f"{tmp_path / 'planted.py'}:net"
    facts = facts_of(model, "--images", tmp_path / "set", "--share", 0.04, "--how", "zero")
    for name, other in (("blue", "red"), ("red", "blue")):
        assert facts["loss"][name] < 0.1
        assert facts["rise"][name][name] > 0.3
        assert abs(facts["rise"][name][other]) < 0.1
        assert abs(facts["rise_of_others_as_active"][name][name]) < 0.1
    assert facts["specificity"] > 0.3


KINDS = {
    "resnet": t.ResNetConfig(embedding_size=4, hidden_sizes=[8, 40], depths=[1, 1], layer_type="basic", num_labels=2),
    "vit": t.ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        num_labels=5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["parameters", "correlation"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_and_a_folder_of_classes(kind: str, method: str, pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    t.AutoModelForImageClassification.from_config(KINDS[kind]).save_pretrained(tmp_path / kind)
    model = load(tmp_path / kind)
    build_atlas(model, tmp_path / "atlas", causal=False, progress=False, images=pictures)
    facts = facts_of(
        tmp_path / kind, "--images", pictures, "--functions", "red,blue", "-m", method, "--atlas", tmp_path / "atlas"
    )
    assert facts["loss_of"] == PREFERRED  # the folder has three classes, the models have two and five
    assert facts["left"] == {}
    assert facts["settings"]["images"] == pictures.name
    assert facts["columns"] == ["brick", "brick_function", "predictivity_red", "predictivity_blue"]
    with Atlas.open(tmp_path / "atlas") as atlas:
        rows = atlas.query(f"SELECT site, {', '.join(facts['columns'])} FROM neurons").to_pylist()
    for site in model.sites:  # narrow layers have a brick a neuron
        assert {row["brick"] for row in rows if row["site"] == site.number} == set(range(min(16, site.width)))
    assert max(row["predictivity_red"] for row in rows) > 0.95  # red is easily told from blue


def test_many_classes_are_shown_in_a_line_each(mine: Path) -> None:
    done = run("bricks", f"{mine}:dense", "--images", "digits")
    assert done.exit_code == 0, done.stderr
    head, first = (line.split() for line in done.stdout.splitlines()[1:3])
    assert head[-2:] == ["functional", "bricks"]
    assert "own" in head
    assert first[0] == "0"
    assert "minus the log-probability of its own class" in done.stdout
    done = run("bricks", f"{mine}:four", "--images", "digits", "--functions", "1,2")
    assert "the class that the whole model prefers" in done.stdout
    assert "1 layer (aside): no image passes it" in done.stdout
    assert "others as active" in done.stdout


def test_what_is_refused_of_images(mine: Path, pictures: Path, tmp_path: Path) -> None:
    vit, base, ten = tmp_path / "vit", tmp_path / "base", f"{mine}:ten"
    t.ViTForImageClassification(KINDS["vit"]).save_pretrained(vit)
    t.ViTModel(KINDS["vit"]).save_pretrained(base)
    for what, code, options in (
        ("a folder with a subfolder for each class", 3, (vit,)),  # photographs have none
        (
            "'python' is no class of 'digits'; there are 0, 1",
            1,
            (ten, "--images", "digits", "--functions", "python,json"),
        ),
        ("has 3 images; give 4 or more", 1, (vit, "--images", pictures)),
        ("no such folder", 3, (vit, "--images", "python")),
        ("give --images", 3, (f"{mine}:dense",)),
        ("gives no scores of classes", 3, (base, "--images", pictures, "--functions", "red,blue")),
    ):
        assert what in said_no_traceback(run("bricks", *options), code)
    for options in (("--length", 32), ("--sequences", 16), ("--functions", "3")):
        done = run("bricks", ten, "--images", "digits", *options)
        assert done.exit_code == 2
        assert ("two or more" if "3" in options else "of language models") in " ".join(
            done.stderr.replace("│", " ").split()
        )
