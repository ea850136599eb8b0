"""Pictures drawn from what an atlas keeps, and the routes that serve them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from neuropil.explorer import create_app
from neuropil.explorer.pictures import DIMMED, GAP, OUTLINE, SMALL, exemplars, lit, region, strip


def png(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=float)


def half() -> str:
    """The left half of an image."""
    return ("f" * 7 + "0" * 7) * 14


def test_outside_the_region_the_picture_is_dimmed_and_inside_it_is_not() -> None:
    white = png(np.full((28, 28), 200))
    shown = opened(lit(white, half()))
    assert shown.shape == (168, 168, 3)
    assert (shown[:, :60] == 200).all()
    np.testing.assert_allclose(shown[:, -60:], 200 * DIMMED, atol=1)
    rim = (shown == np.array(OUTLINE)).all(-1)
    assert rim.any(1).all()  # in every row, where the region ends
    assert 70 < np.nonzero(rim)[1].mean() < 98


def test_small_ones_stand_side_by_side() -> None:
    white, wide = png(np.full((28, 28), 200)), png(np.full((40, 120), 100))
    made = Image.open(io.BytesIO(strip([(white, half()), (wide, "f" * 196)])))
    assert made.size == (2 * SMALL + GAP, SMALL)
    shown = np.asarray(made.convert("RGBA"), dtype=float)
    assert (shown[:, 5:25, :3] == 200).all()
    assert (shown[:, SMALL - 20 : SMALL - 5, :3] < 110).all()
    assert (shown[:, SMALL : SMALL + GAP, 3] == 0).all()  # nothing between them
    assert (shown[SMALL // 2, -40:-30, :3] == 100).all()
    assert (shown[0, -40:-30, 3] == 0).all()  # the wide one is as wide as its place, not as high


def test_without_a_region_nothing_is_dimmed() -> None:
    photo = png(np.random.default_rng(0).integers(0, 256, (200, 200, 3)))
    assert (opened(lit(photo, "0" * 196)) == opened(photo)).all()
    assert (opened(lit(photo, "f" * 196)) == opened(photo)).all()


def test_exemplars_are_told_with_name_class_peak_and_share() -> None:
    known: dict[int, dict[str, Any]] = {7: {"name": "a.png", "class": "dog"}, 9: {"name": "b.png", "class": None}}
    row = {
        "exemplar_images": [7, 8, 9],
        "exemplar_values": [3.0, 2.0, 1.0],
        "exemplar_masks": [half(), half(), "0" * 196],
    }
    told = exemplars(row, known)  # image 8 is not there
    assert [(e.place, e.image, e.kind, e.value, e.share) for e in told] == [
        (0, 7, "dog", 3.0, 0.5),
        (2, 9, "", 1.0, 0.0),
    ]
    assert exemplars({"exemplar_images": None}, known) == []
    assert region(half()).shape == (14, 14)


def test_pictures_are_served_and_what_is_none_is_not(seen_path: Path) -> None:
    client = TestClient(create_app(seen_path, model="/nowhere"), base_url="http://localhost")
    answer = client.get("/image/3.png")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == (28, 28) or Image.open(io.BytesIO(answer.content)).size == (
        8,
        8,
    )
    assert client.get("/neuron/1:2/exemplar/0.png").status_code == 200
    strip_of = Image.open(io.BytesIO(client.get("/neuron/1:2/exemplars.png").content))
    assert strip_of.size == (4 * SMALL + 3 * GAP, SMALL)
    assert client.get("/neuron/1:5/exemplars.png").status_code == 404  # a dead one
    for path in (
        "/image/99999.png",
        "/neuron/1:2/exemplar/15.png",
        "/neuron/1:5/exemplar/0.png",
        "/neuron/1:99/exemplar/0.png",
    ):
        assert client.get(path).status_code == 404, path
    assert client.get("/image/x.png").status_code == 422
    assert "img-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_vision_atlas_is_downloaded(seen_path: Path, kind: str) -> None:
    client = TestClient(create_app(seen_path, model="/nowhere"), base_url="http://localhost")
    answer = client.get(f"/download/{kind}?cols=description,exemplar_images,exemplar_masks&site=1")
    assert answer.status_code == 200
    assert len(answer.content) > 500
