"""`neuropil describe`: what is written, said and refused; and the table and page of descriptions."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from test_cli import run

from neuropil.atlas import Atlas
from neuropil.build import kept_probe
from neuropil.errors import NeuropilError
from neuropil.explorer import create_app
from neuropil.interpret.milan import exemplars, scene_captioner
from neuropil.interpret.milan.scenes import scenes
from neuropil.interpret.milan.sheet import Pictures, Shown
from neuropil.models import ImageInput, load
from neuropil.vision import prepared


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random ViT, as `save_pretrained` leaves it."""
    from transformers import ViTConfig, ViTForImageClassification

    path = tmp_path_factory.mktemp("models") / "vit"
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=10, image_size=32, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.5], "size": {"height": 32, "width": 32}})
    )
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "below").mkdir()
    for number, picture in enumerate(scenes(20, seed=5).images):
        array = (picture * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / ("below" if number % 2 else ".") / f"{number:02d}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioner") / "small"
    scene_captioner(folder, count=200, sets=60, epochs=1, captioner_epochs=2)
    return folder


def test_a_table_a_page_and_columns(net: Path, photos: Path, captioner: Path, tmp_path: Path) -> None:
    atlas, out = tmp_path / "atlas", tmp_path / "units.csv"
    model = load(net)
    mapped = SimpleNamespace(
        name=model.name, fingerprint=model.fingerprint, architecture=model.architecture, sites=model.sites,
        tokens=lambda: [],
    )  # fmt: skip
    Atlas.create(atlas, mapped).close()
    done = run(
        "describe",
        net,
        photos,
        "-k",
        4,
        "--beam",
        5,
        "--captioner",
        captioner,
        "--out",
        out,
        "--atlas",
        atlas,
        "--json",
    )
    assert done.exit_code == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    assert facts["pictures"] == 20
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["unit"]) for line in lines] == [*range(10)] * 2
    assert [line["description"] for line in lines] == [unit["description"] for unit in facts["units"]]
    assert all(len(line["images"].split(";")) == 4 for line in lines)
    assert (photos / lines[0]["images"].split(";")[0]).is_file()
    page = out.with_suffix(".html").read_text()
    assert len(re.findall("<figure>", page)) == 20
    assert page.count("data:image/jpeg;base64,") == 20
    with Atlas.open(atlas) as made:
        table = made.query("SELECT description, dead FROM neurons ORDER BY site, index")
    assert table["description"].to_pylist() == [line["description"] for line in lines]


def test_one_layer_by_number_by_name_and_said_in_a_terminal(net: Path, photos: Path, captioner: Path) -> None:
    site = load(net).sites[1]
    for layer in ("1", site.name):
        done = run("describe", net, photos, "-l", layer, "-k", 3, "--beam", 3, "--captioner", captioner, "--json")
        assert {unit["layer"] for unit in json.loads(done.stdout)["units"]} == {site.name}
    said = run("describe", net, photos, "-l", "0", "-k", 3, "--beam", 3, "--captioner", captioner)
    assert said.exit_code == 0
    assert "10 described from 20 pictures" in said.stdout


def test_into_an_atlas_layer_by_layer(cnn: Path, captioner: Path, tmp_path: Path) -> None:
    atlas = tmp_path / "atlas"
    assert run("atlas", cnn, "--images", "digits", "--no-causal", "--out", atlas).exit_code == 0
    command = ["describe", cnn, "--atlas", atlas, "-k", 3, "--captioner", captioner, "--json"]
    first = json.loads(run(*command, "--beam", 2, "-l", 0).stdout)["units"]
    assert {unit["layer"] for unit in first} == {load(cnn).sites[0].name}
    part = atlas / "parts" / "milan" / "00000.parquet"
    written = part.stat().st_mtime_ns
    again = run(*command, "--beam", 2)
    assert part.stat().st_mtime_ns == written  # what is there is not described again
    whole = json.loads(again.stdout)["units"]
    assert whole[: len(first)] == first
    assert len(whole) == sum(site.width for site in load(cnn).sites)
    other = run(*command, "--beam", 3)
    assert other.exit_code != 0
    assert "--overwrite" in other.stderr
    assert part.stat().st_mtime_ns == written
    assert run(*command, "--beam", 3, "--overwrite", "-l", 0).exit_code == 0
    with Atlas.open(atlas) as made:
        assert made.query("SELECT DISTINCT site FROM milan")["site"].to_pylist() == [0]


def test_what_is_wrong_is_said(net: Path, photos: Path, captioner: Path, tmp_path: Path) -> None:
    def refused(*arguments: Any) -> str:
        done = run("describe", *arguments)
        assert done.exit_code not in (0, 1) or "fault" not in done.stderr
        assert done.exit_code != 0
        return done.stderr

    assert "near names" in refused(net, photos, "-l", "layer9", "--captioner", captioner)
    assert "no picture" in refused(net, tmp_path, "--captioner", captioner)
    assert "no captioner" in refused(net, photos, "--captioner", tmp_path, "--encoder", net)
    assert "--encoder" in refused(net, photos, "--captioner", tmp_path)
    assert "atlas" in refused(net, photos, "--captioner", captioner, "--atlas", tmp_path / "none")


def test_pictures_are_cut_and_shown_as_the_model_takes_them(photos: Path, tmp_path: Path) -> None:
    plain = Pictures(photos, (32, 32))
    wanted = ImageInput(3, (32, 32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.5))
    probe = Shown(plain, plain.names, wanted)
    assert len(probe) == len(plain) == 20
    given = torch.stack([probe[i] for i in range(3)])
    raw = torch.stack([plain[i] for i in range(3)]) / 255
    torch.testing.assert_close(
        given, (raw - torch.tensor(wanted.mean)[:, None, None]) / torch.tensor(wanted.std)[:, None, None]
    )
    torch.testing.assert_close(probe.show(given), raw, rtol=0, atol=1e-5)
    (tmp_path / "bad.png").write_text("no")
    with pytest.raises(NeuropilError, match="can be read"):
        Pictures(tmp_path, (8, 8))[0]


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ResNet for grey pictures that settles no size, as `save_pretrained` leaves it."""
    from transformers import ResNetConfig, ResNetForImageClassification

    path = tmp_path_factory.mktemp("models") / "cnn"
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=10
    )
    ResNetForImageClassification(config).eval().save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.3, 0.3, 0.3], "image_std": [0.4, 0.4, 0.4]})
    )
    return path


def test_from_a_checkpoint_to_neurons_found_by_words(cnn: Path, captioner: Path, tmp_path: Path) -> None:
    """The whole way of a vision model: atlas, descriptions of the atlas's own images, query, find and page."""
    path = tmp_path / "atlas"
    done = run("atlas", cnn, "--images", "digits", "--no-causal", "--out", path, "--json")
    assert done.exit_code == 0, done.stderr
    done = run("describe", cnn, "--atlas", path, "--beam", 3, "--captioner", captioner, "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    model = load(cnn)
    assert (facts["images"], facts["pictures"]) == ("digits", 360)
    assert facts["columns"] == ["description", "description_score", "milan_dead"]
    assert [(u["layer"], u["unit"]) for u in facts["units"]] == [
        (s.name, i) for s in model.sites for i in range(s.width)
    ]

    sql = "SELECT neuron, description, threshold, exemplar_images FROM neurons ORDER BY site, index"
    rows = json.loads(run("query", path, sql, "--json").stdout)
    assert [row["description"] for row in rows] == [u["description"] for u in facts["units"]]
    told = next(row for row in rows if row["description"])
    word = max(told["description"].split(), key=len)
    found = json.loads(run("find", path, word, "--json", "--limit", 200).stdout)
    assert told["neuron"] in {row["neuron"] for row in found if row["match"] == "token"}

    # The described regions are those the atlas shows: the same images, normalised alike.
    probe, same = kept_probe(path, model)
    assert same
    assert probe.pixels.shape == (360, 1, 8, 8)
    again = exemplars(
        model.module(), Shown(probe.pixels, probe.names, prepared(model, probe)), model.sites[0], keep=False
    )
    own = rows[: model.sites[0].width]
    torch.testing.assert_close(again.threshold, torch.tensor([row["threshold"] for row in own]))
    lists = [ids for ids, row in zip(again.image_ids.tolist(), own, strict=True) if row["exemplar_images"]]
    assert lists == [row["exemplar_images"] for row in own if row["exemplar_images"]]

    client = TestClient(create_app(path), base_url="http://127.0.0.1:8000")
    assert f'<p class="described">{told["description"]}</p>' in client.get(f"/neuron/{told['neuron']}").text


def test_images_by_name_and_what_is_missing(cnn: Path, net: Path, captioner: Path, tmp_path: Path) -> None:
    common = ("-l", "0", "-k", 3, "--beam", 2, "--captioner", captioner, "--json")
    done = run("describe", cnn, "digits", *common)
    assert json.loads(done.stdout)["pictures"] == 360
    none = run("describe", cnn)
    assert none.exit_code == 2
    assert "--atlas" in none.stderr
    assert "no folder" in run("describe", cnn, "nowhere").stderr
    model, path = load(net), tmp_path / "bare"
    Atlas.create(path, model).close()
    assert "holds no images" in run("describe", net, "--atlas", path, *common).stderr
    assert "is the atlas of" in run("describe", cnn, "digits", "--atlas", path, *common).stderr
