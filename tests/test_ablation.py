"""The ablation of a vision model's neurons: against clamping, a derivative and its bound."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_vision import noise, small
from torch import nn

from neuropil.ablation import Ablation, logits
from neuropil.atlas import Atlas
from neuropil.build import build_atlas
from neuropil.data import Probe
from neuropil.errors import ModelError
from neuropil.models import load
from neuropil.neurons import capture, clamp
from neuropil.vision import Activity


def test_ablation_is_the_loss_with_the_neuron_clamped_to_zero() -> None:
    net, images = small(), noise()
    model = load(net)
    told = Ablation(model, images)
    x = images.pixels[told.chosen].float() / 255
    assert images.labels is not None
    targets = images.labels[told.chosen].unsqueeze(1)
    with torch.no_grad():
        before = net(x).log_softmax(1).gather(1, targets)[:, 0]
        for site in model.sites:
            columns = told.columns(site)
            for index, measured in enumerate(columns["ablation"].to_pylist()):
                with clamp(net, {f"{site.number}:{index}": 0.0}):
                    lost = before - net(x).log_softmax(1).gather(1, targets)[:, 0]
                assert measured == pytest.approx(float(lost.mean()), abs=1e-5)
                assert columns["ablation_se"][index].as_py() == pytest.approx(
                    float(lost.std() / len(lost) ** 0.5), abs=1e-5
                )


def test_the_estimate_is_the_derivative_of_the_loss() -> None:
    net, images = small(1), noise()
    model = load(net)
    told = Ablation(model, images)
    x = images.pixels[told.chosen].float() / 255
    assert images.labels is not None
    targets = images.labels[told.chosen].unsqueeze(1)
    estimates = {site.name: told.columns(site)["ablation_estimate"] for site in model.sites}
    step = 1e-3
    net.double()
    with torch.no_grad():
        before = net(x.double()).log_softmax(1).gather(1, targets).mean()
        for site in model.sites:
            estimate = estimates[site.name]
            with capture(net, [site]) as seen:
                net(x.double())
            for index in range(0, site.width, 2):
                h = seen[site.name].select(site.tap.axis, index)
                with clamp(net, {f"{site.number}:{index}": h * (1 - step)}):
                    lost = before - net(x.double()).log_softmax(1).gather(1, targets).mean()
                assert float(estimate[index]) == pytest.approx(float(lost) / step, abs=2e-4)


def test_silencing_is_bounded_and_takes_the_neurons_that_matter_most_by_the_estimate() -> None:
    net, images = small(), noise()
    model = load(net)
    whole = Ablation(model, images)
    part = Ablation(model, images, budget=whole.settings["budget"] / 1e9)
    assert part.most < max(site.width for site in model.sites)
    assert part.settings["ablated_on"] == 16 < whole.settings["ablated_on"] == 48
    for site in model.sites:
        columns = part.columns(site)
        known = [i for i, v in enumerate(columns["ablation"].to_pylist()) if v is not None]
        order = columns["ablation_estimate"].abs().argsort(descending=True, stable=True)[: part.most]
        assert known == sorted(order.tolist())


def test_without_classes_the_model_is_asked_for_its_own_preference() -> None:
    net, images = small(), noise()
    own = Probe("own", images.pixels, images.names)
    told = Ablation(load(net), own)
    with torch.no_grad():
        assert torch.equal(told._targets()[0], net(own.pixels[told.chosen].float() / 255).argmax(1))
    assert "preferred_class" not in Activity(load(net), own).columns(load(net).sites[0])


def test_a_model_without_scores_of_classes_has_no_ablation(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    with pytest.raises(ModelError, match="no scores of classes"):
        logits(net(torch.zeros(1, 1, 8, 8)))
    build_atlas(load(net), tmp_path / "atlas", progress=False, images=noise())
    with Atlas.open(tmp_path / "atlas") as atlas:
        assert atlas.groups == ["activity", "exemplars"]
