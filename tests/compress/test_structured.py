"""Neurons taken out: the smaller model is the old one with those neurons silenced."""

from typing import Any

import pytest
import torch
from torch import nn

from neuropil import data, evaluate, models
from neuropil.compress import prune_neurons, remove_neurons
from neuropil.compress.structured import neuron_scores
from neuropil.neurons import clamp, find_sites
from neuropil.packed import Sparse, pack

pytest.importorskip("torch_pruning")


def perceptron() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def test_what_is_left_is_the_model_with_those_neurons_silenced() -> None:
    model, x = perceptron(), torch.randn(5, 8)
    first, second = find_sites(model)
    gone = {first.name: [0, 3, 31], second.name: [5]}
    with clamp(model, {f"{site.number}:{i}": 0.0 for site in (first, second) for i in gone[site.name]}):
        wanted = model(x)
    changes = remove_neurons(model, gone, x)
    torch.testing.assert_close(changes.model(x), wanted)
    assert changes.changed == ("0", "2", "4")
    assert next(tuple(p.shape) for p in model.parameters()) == (32, 8), "the model that was given is as it was"
    assert changes.model[0].weight.shape == (29, 8)  # type: ignore[index,union-attr]


def test_a_convolutional_net_with_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 3),
    ).eval()
    x = torch.randn(4, 1, 8, 8)
    changes = prune_neurons(model, 0.25, x)
    shapes = {name: tuple(p.shape) for name, p in changes.model.named_parameters() if p.dim() > 1}
    assert shapes == {"0.weight": (6, 1, 3, 3), "3.weight": (6, 6, 3, 3), "7.weight": (3, 96)}
    h = model[:3](x)
    wanted = h.square().mean((0, 2, 3)).sqrt() * model[3].weight.transpose(0, 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(next(iter(neuron_scores(model, [x]).values())), wanted.detach())
    kept = {n: sorted(neuron_scores(model)[n].argsort()[2:].tolist()) for n in neuron_scores(model)}
    first = next(iter(kept.values()))
    assert torch.equal(changes.model.get_parameter("0.weight"), model.get_parameter("0.weight")[first])
    assert changes.model(x).shape == (4, 3)


def test_a_language_model() -> None:
    model = models.load("smollm2").module()
    ids = torch.arange(6)[None]
    changes = prune_neurons(model, 0.5, {"input_ids": ids, "use_cache": False})
    assert all(site.width == 768 for site in find_sites(changes.model))
    assert "model.embed_tokens" in changes.left
    assert changes.model(ids).logits.shape == model(ids).logits.shape
    assert find_sites(model)[0].width == 1536


def test_sites_that_a_residual_connection_ties_lose_the_same_neurons() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic", "num_channels": 1}
    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, **sizes)).eval()
    x = torch.randn(2, 1, 28, 28)
    changes = prune_neurons(model, 0.5, x)
    assert changes.model(x).logits.shape == model(x).logits.shape
    assert [site.width for site in find_sites(changes.model)] == [site.width // 2 for site in find_sites(model)]


def test_scores_do_not_see_scale_moved_between_reading_and_writing() -> None:
    model = perceptron()
    before = neuron_scores(model)
    with torch.no_grad():
        model[0].weight[3] *= 8
        model[0].bias[3] *= 8
        model[2].weight[:, 3] /= 8
    after = neuron_scores(model)
    name = next(iter(before))
    torch.testing.assert_close(after[name], before[name])


def test_scores_on_data_are_the_size_of_what_is_added() -> None:
    model, x = perceptron(), torch.randn(50, 8)
    first = find_sites(model)[0]
    h = model[1](model[0](x))
    wanted = h.square().mean(0).sqrt() * model[2].weight.norm(dim=0)
    torch.testing.assert_close(neuron_scores(model, x.split(20))[first.name], wanted.detach())
    with pytest.raises(ValueError, match="empty"):
        neuron_scores(model, [])


def test_a_language_model_needs_the_data() -> None:
    """Neurons of small weights that fire strongly hold the model together."""
    loaded = models.load("smollm2")
    model, texts = loaded.module(), data.text("brown")
    test = evaluate.windows(texts.test, loaded.tokenizer, 128, limit=2)
    calibration = evaluate.windows(texts.train, loaded.tokenizer, 128, limit=2)
    example = {"input_ids": test[0][:, :6], "use_cache": False}
    blind, seen = (prune_neurons(model, 0.1, example, data=d).model for d in (None, calibration))
    dense, without, with_data = (evaluate.perplexity(net, test).value for net in (model, blind, seen))
    assert with_data < 2 * dense
    assert without > 10 * with_data


def test_bad_input() -> None:
    model, x = perceptron(), torch.randn(1, 8)
    with pytest.raises(ValueError, match="share"):
        prune_neurons(model, 1.0, x)
    with pytest.raises(KeyError, match="no site"):
        remove_neurons(model, {"nowhere": [1]}, x)
    with pytest.raises(ValueError, match="some must stay"):
        remove_neurons(model, {find_sites(model)[0].name: range(32)}, x)
    with pytest.raises(ValueError, match="none is beyond"):
        remove_neurons(model, {find_sites(model)[0].name: [32]}, x)
    assert not prune_neurons(model, 0.0, x).changed
    pack(model, {"0": Sparse.of(model[0].weight)})
    with pytest.raises(ValueError, match="packed"):
        prune_neurons(model, 0.5, x)
