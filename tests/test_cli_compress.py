"""`neuropil compress` and `neuropil compare`: what is written, said and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_cli import run, save
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, SwinConfig, SwinForImageClassification

from neuropil.atlas import Atlas
from neuropil.build import build_atlas, probe_for
from neuropil.compare import ARMS
from neuropil.compress.recipes import RECIPES, compress
from neuropil.errors import MissingAsset, ModelError
from neuropil.models import about_packed, load, load_packed
from neuropil.packed import nbytes, packed_modules


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny", layers=2)


def test_methods_are_listed() -> None:
    listed = json.loads(run("compress", "--json").stdout)
    assert [entry["method"] for entry in listed] == list(RECIPES)
    said = run("compress").stdout
    assert all(name in said for name in RECIPES)


def test_what_is_written_is_as_small_as_it_says_and_loads(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    done = run("compress", net, "--bits", 4, "--group", 8, "--out", out, "--no-evaluate", "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    model: Any = load(out).module()
    assert facts["bytes"] == nbytes(model)
    assert facts["left"] == {}
    assert about_packed(out)["method"] == "uniform"
    again: Any = load(out)
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids).logits, again.module()(ids).logits)
    assert again.tokenizer("dog cat")["input_ids"] == load(net).tokenizer("dog cat")["input_ids"]


def test_the_original_is_as_it_was(net: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in net.iterdir()}
    assert run("compress", net, "--bits", 2, "--no-evaluate", "--out", tmp_path / "two").exit_code == 0
    assert {path.name: path.read_bytes() for path in net.iterdir()} == before


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("neurons", "core", "adaround")])
def test_every_method_adds_its_columns(net: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "atlas"
    build_atlas(load(net), path, causal=False, progress=False)
    done = run("compress", net, "-m", name, "--no-evaluate", "--atlas", path, "--json")
    assert done.exit_code == 0, done.stderr
    columns = json.loads(done.stdout)["columns"]
    assert columns == [f"{name}_error", f"{name}_kept"]
    with Atlas.open(path) as atlas:
        table = atlas.query(f"SELECT {', '.join(columns)} FROM neurons")
    assert table.num_rows == 48
    assert all(0 <= value <= 1 for value in table[f"{name}_kept"].to_pylist())


def test_neurons_are_taken_out_and_marked(net: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "atlas", tmp_path / "few"
    build_atlas(load(net), path, causal=False, progress=False)
    done = run("compress", net, "-m", "neurons", "--sparsity", 0.25, "--no-evaluate", "--atlas", path, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert [site.width for site in load(out).sites] == [18, 18]
    with Atlas.open(path) as atlas:
        removed = atlas.query("SELECT count(*) AS n FROM neurons WHERE neurons025_removed")["n"].to_pylist()
    assert removed == [12]


def test_core_neurons_are_counted(net: Path, tmp_path: Path) -> None:
    path = tmp_path / "atlas"
    build_atlas(load(net), path, causal=False, progress=False)
    done = run("compress", net, "-m", "core", "--sparsity", 0.25, "--no-evaluate", "--atlas", path, "--json")
    assert done.exit_code == 0, done.stderr
    with Atlas.open(path) as atlas:
        shares = atlas.query("SELECT core025_share AS s FROM neurons")["s"].to_pylist()
    assert all(0 <= share <= 1 for share in shares)
    assert 0 < sum(shares) <= 2 * 18  # of two layers at most three quarters of 24 neurons each


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "magic"], "there are uniform"),
        (["--bits", "77"], "bits"),
        (["--bits", "4", "--group", "7"], "group"),
        (["--sparsity", "0.5"], "takes no sparsity"),
        (["-m", "magnitude", "--sparsity", "1.5"], "sparsity"),
        (["--atlas", "nowhere"], "nowhere"),
    ],
)
def test_wrong_calls_say_how_to_mend_them(net: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    out = tmp_path / "none"
    done = run("compress", net, "--no-evaluate", *arguments, *(["--out", out] if "--atlas" not in arguments else []))
    assert done.exit_code not in (0, 1) or "error" in done.stderr
    assert done.exit_code != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists(), "nothing is half written"


def test_a_folder_with_something_in_it_is_refused(net: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = run("compress", net, "--no-evaluate", "--out", tmp_path)
    assert done.exit_code == 2
    assert "not empty" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_what_is_compressed_already_is_refused(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert run("compress", net, "--no-evaluate", "--out", out).exit_code == 0
    done = run("compress", out, "--no-evaluate", "--out", tmp_path / "smaller")
    assert done.exit_code != 0
    assert "already" in done.stderr


def test_compare_refuses_what_it_does_not_know() -> None:
    done = run("compare", "compress", "--arm", "magic")
    assert done.exit_code == 2
    assert ARMS[0].name in done.stderr
    assert run("compare", "compress", "--model", "bert").exit_code == 2


def test_a_language_model_is_tested_on_text(net: Path) -> None:
    done = run("compress", net, "--bits", 8, "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["perplexity_after"] == pytest.approx(facts["perplexity_before"], rel=0.05)
    assert facts["test_tokens"] > 1000
    assert facts["tokens_per_second_before"] > 0 < facts["tokens_per_second_after"]
    assert "test_images" not in facts


# ------------------------------------------------------------------------------------------------ vision models


@pytest.fixture(scope="module")
def swin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=2
    )
    path = tmp_path_factory.mktemp("models") / "swin"
    SwinForImageClassification(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic", num_labels=3)
    path = tmp_path_factory.mktemp("models") / "resnet"
    ResNetForImageClassification(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten noisy pictures of each of two classes."""
    path = tmp_path_factory.mktemp("pictures")
    made = torch.Generator().manual_seed(0)
    for i in range(20):
        file = path / ("even", "odd")[i % 2] / f"{i:02}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=made).numpy()).save(file)
    return path


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuropil.compress.recipes.STEPS", 10)


WITHOUT = {("resnet", "core"): "only dense and gated layers"}


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_every_method_on_vision_models(
    kind: str, name: str, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    net, out, atlas = request.getfixturevalue(kind), tmp_path / "small", tmp_path / "atlas"
    build_atlas(load(net), atlas, causal=False, progress=False, images=pictures)
    arguments = ["-m", name, "--images", pictures, "--json", "--out", out, "--atlas", atlas]
    done = run("compress", net, *arguments)
    if (kind, name) in WITHOUT:
        assert done.exit_code != 0
        assert WITHOUT[kind, name] in done.stderr
        return
    assert done.exit_code == 0, done.stderr
    assert done.stderr.startswith(f"images of {pictures.name}: ")
    facts = json.loads(done.stdout)
    assert facts["test_images"] == 10
    assert facts.get("calibration_images") == (10 if RECIPES[name].data != "none" else None)
    assert 0 <= facts["agreement"] <= 1
    assert facts["kl"] >= 0
    assert ("accuracy_before" in facts) == (kind == "swin"), "two classes of images, and two or three of the model"
    assert facts["images_per_second_before"] > 0 < facts["images_per_second_after"]
    assert nbytes(load(out).module()) == facts["bytes"]
    with Atlas.open(atlas) as opened:
        told = opened.query(f"SELECT {', '.join(facts['columns'])} FROM neurons")
    assert all(told[column].null_count < told.num_rows for column in facts["columns"])


def test_measures_of_a_vision_model_are_those_of_the_library(swin: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "three"
    facts = json.loads(run("compress", swin, "--bits", 3, "--images", pictures, "--out", out, "--json").stdout)
    model = load(swin)
    calibration, test = probe_for(model, pictures).halves()
    assert set(calibration.names).isdisjoint(test.names)
    wanted, labels = model.image_input, test.labels
    assert wanted is not None
    assert labels is not None
    with torch.no_grad():
        before, after = (load(path).module()(wanted(test.pixels)).logits for path in (swin, out))
    p, q = before.log_softmax(1), after.log_softmax(1)
    assert facts["agreement"] == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert facts["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3, abs=1e-7)
    assert facts["accuracy_before"] == pytest.approx(float((p.argmax(1) == labels).double().mean()))
    assert facts["accuracy_after"] == pytest.approx(float((q.argmax(1) == labels).double().mean()))


def test_eight_bits_keep_the_classes_and_it_is_said(resnet: Path, pictures: Path) -> None:
    done = run("compress", resnet, "--bits", 8, "--images", pictures)
    assert done.exit_code == 0, done.stderr
    assert f"100.0% of 10 images of {pictures.name}" in done.stdout
    assert "images a second" in done.stdout
    assert "perplexity" not in done.stdout


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A module of one's own that classifies clothes, as the command would load it."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=3), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(12 * 9, 24), nn.ReLU(), nn.Linear(24, 10),
    ).eval()  # fmt: skip
    monkeypatch.setattr("neuropil.cli.compress.load_model", lambda name: load(net))
    return net


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_method_on_a_module_of_ones_own(name: str, plain: nn.Module, tmp_path: Path) -> None:
    out, atlas = tmp_path / "small", tmp_path / "atlas"
    build_atlas(load(plain), atlas, causal=False, progress=False)
    done = run("compress", "mine", "-m", name, "--out", out, "--atlas", atlas, "--json")
    if name == "dimap":
        assert done.exit_code != 0
        assert "magnitude pruning needs no modules" in done.stderr
        return
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["images"] == "fashion-mnist"
    assert facts["test_images"] == 500
    assert 0 <= facts["accuracy_before"] <= 1
    with Atlas.open(atlas) as opened:
        assert set(facts["columns"]) <= set(opened.columns)
        if name == "core":  # convolutions cannot leave neurons out; their place in the column is empty
            told = opened.query("SELECT core_share AS s FROM neurons")["s"].to_pylist()
            assert told[:20] == [None] * 20
            assert 0 < sum(told[20:]) <= 12
    again = load_packed(out, into=nn.Sequential(*(type(m)(*_made(m)) for m in plain)))
    assert nbytes(again) == facts["bytes"]


def _made(module: Any) -> tuple[Any, ...]:
    """What a layer of `plain` was made with."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels, module.kernel_size, module.stride
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else ()


def test_without_a_config_it_is_said_how_to_load(plain: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "small"
    done = run("compress", "mine", "--no-evaluate", "--out", out)
    assert f"load_packed({str(out)!r}, into=neuropil.models.load('Sequential').module())" in done.stdout
    with pytest.raises(ModelError, match=r"load_packed\(.*a module as Sequential is"):
        load(out)


def test_efficientnet_is_loaded_as_the_hint_says(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    out = tmp_path / "small"
    done = run("compress", "efficientnet-lite0", "-m", "neurons", "--sparsity", 0.25, "--no-evaluate", "--out", out)
    assert done.exit_code == 0, done.stderr
    said = done.stdout.split("written")[1].strip()
    path, _, code = said.partition(": ")
    assert path == str(out)
    import neuropil.models

    again = eval(code, {"neuropil": neuropil})  # the line that a user is told to write
    assert sum(p.numel() for p in again.parameters()) < 0.9 * load("efficientnet-lite0").parameters
    with torch.no_grad():
        assert again(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_groups_of_convolutions_are_whole_kernels(plain: nn.Module) -> None:
    changes = compress(plain, "uniform", bits=4, group=12, skip=("7",))
    shapes = {name: tuple(packing.scale.shape) for name, _, packing in packed_modules(changes.model)}
    assert shapes == {"0": (8, 1), "2": (12, 8), "5": (24, 9)}


def test_images_that_are_missing_are_noted(resnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise MissingAsset("no photographs are installed")

    monkeypatch.setattr("neuropil.data.probes.photographs", none)
    done = run("compress", resnet, "--json")
    assert done.exit_code == 0, done.stderr
    assert "no images to measure on: no photographs are installed" in done.stderr
    assert "agreement" not in json.loads(done.stdout)
    done = run("compress", resnet, "-m", "adaround")
    assert done.exit_code != 0
    assert "needs calibration data" in done.stderr


def test_wrong_images_are_refused(net: Path, resnet: Path, pictures: Path, tmp_path: Path) -> None:
    done = run("compress", net, "--images", "photos")
    assert done.exit_code == 2
    assert "takes no images" in done.stderr
    done = run("compress", resnet, "--images", tmp_path / "nowhere")
    assert done.exit_code == 3
    assert "no such folder of images" in done.stderr
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "1.png").write_bytes(next(pictures.rglob("*.png")).read_bytes())
    done = run("compress", resnet, "--images", tmp_path / "one")
    assert done.exit_code == 1
    assert "give two at least" in done.stderr


def test_features_are_compared_by_their_error(resnet: Path, pictures: Path, tmp_path: Path) -> None:
    body = load(resnet).module().resnet
    body.save_pretrained(tmp_path / "body")
    done = run("compress", tmp_path / "body", "--bits", 4, "--images", pictures, "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert 0 < facts["output_error"] < 1
    assert 0.5 < facts["output_cosine"] < 1
    assert "agreement" not in facts
    assert "off, cosine" in run("compress", tmp_path / "body", "--images", pictures).stdout
