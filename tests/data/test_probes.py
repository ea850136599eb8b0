"""Probes: always the same images, brought to a model's size, kept in an atlas."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from neuropil.data import Probe, probe
from neuropil.data.probes import CROPS, kept, natural, photographs, stored, stored_digest
from neuropil.errors import AtlasError, MissingAsset, ModelError
from neuropil.models import assets


def test_photos_are_the_same_every_time_and_cover_every_photograph() -> None:
    one, two = probe("photos", 3, (24, 24)), probe("photos", 3, (24, 24))
    assert one.digest == two.digest
    assert {name.split()[0] for name in one.names} == {path.name for path in photographs()}
    assert len(set(one.names)) == len(one) > 100
    for path in photographs():  # a crop at every edge, at every scale
        with Image.open(path) as picture:
            wide, high = picture.size
        for share in CROPS:
            side = round(share * min(wide, high))
            own = [name.split()[1] for name in one.names if name.startswith(path.name)]
            boxes = [list(map(int, name.replace("x", "+").split("+"))) for name in own if name.startswith(f"{side}x")]
            assert max(left + side for _, _, left, _ in boxes) == wide
            assert max(top + side for _, _, _, top in boxes) == high
            assert min(left for _, _, left, _ in boxes) == min(top for _, _, _, top in boxes) == 0


def test_a_crop_is_that_part_of_the_photograph() -> None:
    found = probe("photos", 3, (427, 427), limit=1)
    path = next(path for path in photographs() if path.name == "china.jpg")
    with Image.open(path) as picture:
        whole = torch.from_numpy(np.asarray(picture).copy()).movedim(-1, 0)
    assert found.names == ("china.jpg 427x427+0+0",)
    assert torch.equal(found.pixels[0], whole[:, :427, :427])
    assert probe("photos", 1, (16, 16), limit=5).pixels.shape[1:] == (1, 16, 16)


def test_halves_share_no_image_and_no_photograph() -> None:
    whole = probe("photos", 3, (8, 8))
    halves = whole.halves()
    assert sum(map(len, halves)) == len(whole)
    one, other = ({name.split()[0] for name in half.names} for half in halves)
    assert not one & other
    assert one | other == {path.name for path in photographs()}
    whole = probe("digits", 1, (8, 8), limit=50)
    one, other = whole.halves()
    assert one.names == whole.names[::2]
    assert other.labels is not None
    assert whole.labels is not None
    assert torch.equal(other.labels, whole.labels[1::2])
    assert torch.equal(other.pixels, whole.pixels[1::2])
    with pytest.raises(ValueError, match="two at least"):
        whole.part([3]).halves()
    noise = Probe("noise", torch.zeros(4, 1, 2, 2, dtype=torch.uint8), ("noise",) * 4)
    assert [len(half) for half in noise.halves()] == [2, 2], "images of one name are images of their own"


def test_no_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuropil.data.probes.package_dir", lambda _: None)
    with pytest.raises(MissingAsset, match="pip install scikit-learn scikit-image"):
        photographs()
    assert assets.package_dir("sklearn") is not None


def test_a_named_set_gives_as_many_of_each_class() -> None:
    found = probe("digits", 1, (8, 8), limit=50)
    assert found.labels is not None
    assert torch.bincount(found.labels).tolist() == [5] * 10
    assert found.classes == tuple("0123456789")
    assert natural("digits") == (8, 8)
    colour = probe("digits", 3, (16, 16), limit=50)
    assert colour.pixels.shape == (50, 3, 16, 16)
    assert torch.equal(colour.pixels[:, 0], colour.pixels[:, 2])
    assert colour.digest != found.digest


def picture(path: Path, size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_a_folder_has_a_class_for_each_subfolder(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / "red" / f"{i}.png", (30, 20), (255, 0, 0))
        picture(tmp_path / "blue" / "deep" / f"{i}.jpg", (20, 30), (0, 0, 255))
    (tmp_path / "notes.txt").write_text("no image")
    found = probe(tmp_path, 3, (8, 8))
    assert found.classes == ("blue", "red")
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.names[0] == "blue/deep/0.jpg"
    assert found.pixels[5, :, 0, 0].tolist() == [255, 0, 0]
    assert len(probe(tmp_path, 3, (8, 8), limit=2)) == 2
    picture(tmp_path / "alone.png", (9, 9), (1, 2, 3))  # in no subfolder: then nothing is a class
    assert probe(tmp_path, 1, (8, 8)).labels is None


def test_what_makes_no_probe(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder of images"):
        probe(tmp_path / "nothing", 3, (8, 8))
    with pytest.raises(ModelError, match="holds no images"):
        probe(tmp_path, 3, (8, 8))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(ModelError, match=r"broken\.png cannot be read as an image"):
        probe(tmp_path, 3, (8, 8))
    with pytest.raises(ValueError, match="4 channels"):
        probe("photos", 4, (8, 8))


def test_images_kept_in_an_atlas(tmp_path: Path) -> None:
    assert stored(tmp_path) is None
    pixels = torch.randint(0, 256, (3, 3, 10, 200), dtype=torch.uint8)
    own = Probe("own", pixels, ("a", "b", "c"), torch.tensor([1, 0, 1]), ("x", "y"))
    own.save(tmp_path)
    table = stored(tmp_path)
    assert table is not None
    assert table.column("class").to_pylist() == ["y", "x", "y"]
    assert stored_digest(tmp_path) == own.digest
    with Image.open(io.BytesIO(table.column("png")[0].as_py())) as shown:
        assert shown.size == (128, 6)
    Probe("small", pixels[:, :1, :, :12], ("a", "b", "c")).save(tmp_path)
    table = stored(tmp_path)
    assert table is not None
    assert table.column("class").to_pylist() == [None] * 3
    with Image.open(io.BytesIO(table.column("png")[2].as_py())) as shown:  # small ones as they are
        assert torch.equal(torch.from_numpy(np.asarray(shown).copy()), pixels[2, 0, :, :12])
    file = tmp_path / "probe.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(AtlasError, match="damaged"):
        stored(tmp_path)
    assert stored_digest(tmp_path) == ""


def test_the_images_of_an_atlas_are_had_again(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="holds no images"):
        kept(tmp_path, (8, 8))
    for channels, size in ((1, (12, 10)), (3, (9, 9))):  # small: as they were
        own = Probe("own", torch.randint(0, 256, (3, channels, *size), dtype=torch.uint8), ("a", "b", "c"))
        own.save(tmp_path)
        again, same = kept(tmp_path, size)
        assert same
        assert (again.digest, again.names, again.name) == (own.digest, own.names, "own")
    size = (150, 140)  # larger than an atlas keeps: of a named set made again, others enlarged
    for photos in (probe("photos", 3, size, limit=4), probe("digits", 1, size, limit=20)):
        photos.save(tmp_path)
        again, same = kept(tmp_path, size)
        assert same
        assert torch.equal(again.pixels, photos.pixels)
    smooth = torch.linspace(0, 255, 140).expand(2, 3, 150, 140).to(torch.uint8)
    Probe("mine", smooth, ("a", "b")).save(tmp_path)
    again, same = kept(tmp_path, size)
    assert not same
    assert (again.pixels.float() - smooth.float()).abs().max() < 4
