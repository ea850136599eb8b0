"""The comparison of compression: what is measured, summed up and drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from neuropil.compare import ARMS, Outcome, Subject, lines, load_outcomes, write
from neuropil.compare.arms import size
from neuropil.compare.page import markdown
from neuropil.compare.run import _Kept, measure
from neuropil.compare.subjects import SCALES, vision_model
from neuropil.errors import NeuropilError


def outcome(arm: str, quality: float, bytes_: int, seed: int = 0, subject: str = "resnet") -> Outcome:
    return Outcome(subject, arm, seed, quality, bytes_, 1.5, None, 0.1, 1)


def some() -> list[Outcome]:
    return [
        outcome("float32", 90.0, 1000),
        outcome("float32", 92.0, 1000, seed=1),
        outcome("uniform 8", 91.0, 260),
        outcome("uniform 8", 91.0, 260, seed=1),
        outcome("uniform 4", 80.0, 150),
        outcome("uniform 3", 70.0, 160),
        outcome("uniform 2", math.nan, 100),
        outcome("float32", 30.0, 5000, subject="smollm2"),
        outcome("uniform 4", 45.0, 700, subject="smollm2"),
        outcome("magnitude 0.5", 50.0, 2500, subject="smollm2"),
    ]


def test_the_front_holds_what_nothing_beats() -> None:
    found = {(line.subject, line.arm): line for line in lines(some())}
    front = {key for key, line in found.items() if line.pareto}
    assert front == {("resnet", "uniform 8"), ("resnet", "uniform 4"), ("smollm2", "float32"), ("smollm2", "uniform 4")}
    original = found[("resnet", "float32")]
    assert (original.quality, original.seeds, original.share) == (91.0, 2, 1.0)
    assert original.spread == pytest.approx(math.sqrt(2))
    assert found[("smollm2", "magnitude 0.5")].share == 0.5


def test_the_page_is_made_from_the_kept_outcomes(tmp_path: Path) -> None:
    write(some(), "smoke", tmp_path)
    kept, scale = load_outcomes(tmp_path / "results" / "compare-compress.json")
    assert [repr(o) for o in kept] == [repr(o) for o in some()]
    page = (tmp_path / "compare-compress.md").read_text()
    assert page == markdown(lines(kept), scale)
    assert "| uniform 8 ★ | 91.00 ± 0.00 |" in page
    assert (tmp_path / "results" / "compare-compress.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(NeuropilError, match="no comparison"):
        load_outcomes(tmp_path / "other.json")


def test_a_stopped_run_keeps_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    kept = _Kept(path, fresh=False)
    kept.add(outcome("float32", 90.0, 1000))
    path.write_text(path.read_text() + '{"subject": "resnet", "arm": "uni')
    assert list(_Kept(path, fresh=False).found) == [("resnet", "float32", 0)]
    assert not _Kept(path, fresh=True).found


@pytest.fixture(scope="module", params=["resnet", "swin"])
def vision(request: Any) -> Subject:
    torch.manual_seed(0)
    model, images = vision_model(request.param).eval(), torch.randn(64, 1, 28, 28)
    labels = torch.arange(64) % 10
    scale = SCALES["smoke"]
    return Subject(request.param, model, scale, 0, [images[:8]], images[:1], (images, labels), (images, labels))


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.on != ("smollm2",)], ids=lambda arm: arm.name)
def test_every_arm_makes_a_model_that_answers_and_leaves_the_original(vision: Subject, arm: Any) -> None:
    if arm.peer:
        pytest.importorskip("optimum.quanto")
    if vision.name not in arm.on:
        pytest.skip("the method is not for this model")
    before = {name: value.clone() for name, value in vision.model.state_dict().items()}
    found = measure(arm, vision)
    assert 0 <= found.quality <= 100
    assert found.speed > 0
    assert all(torch.equal(value, before[name]) for name, value in vision.model.state_dict().items())
    if arm.kind in ("bits", "neurons") and not arm.peer:
        assert found.bytes < size(vision.model)


def test_the_committed_page_is_that_of_the_committed_outcomes() -> None:
    docs = Path(__file__).parents[2] / "docs"
    kept, scale = load_outcomes(docs / "results" / "compare-compress.json")
    assert scale == "default"
    assert {outcome.subject for outcome in kept} == {"resnet", "swin", "smollm2"}
    assert (docs / "compare-compress.md").read_text() == markdown(lines(kept), scale)
