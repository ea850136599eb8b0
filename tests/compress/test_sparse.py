"""Masks by magnitude, and pruned weights as a bit map and values."""

from typing import Any

import pytest
import torch
from torch import nn

from neuropil.compress import pack_sparse, prune_magnitude
from neuropil.packed import nbytes


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()


def test_the_smallest_go() -> None:
    model = network()
    weights = torch.cat([model[0].weight.flatten(), model[4].weight.flatten()]).abs()
    limit = weights.kthvalue(round(0.7 * len(weights))).values
    made: Any = prune_magnitude(model, 0.7).model
    for number in (0, 4):
        assert torch.equal(made[number].weight != 0, model[number].weight.abs() > limit)
        assert not hasattr(made[number], "weight_mask")
    each: Any = prune_magnitude(model, 0.5, per="layer").model
    assert [int((each[n].weight == 0).sum()) for n in (0, 4)] == [18, 720]
    assert bool((model[4].weight != 0).all()), "the model that was given is as it was"


def test_packing_is_exact_and_as_small_as_it_says() -> None:
    pruned, x = prune_magnitude(network(), 0.8).model, torch.randn(2, 1, 8, 8)
    changes = pack_sparse(pruned)
    assert torch.equal(changes.model(x), pruned(x))
    kept = sum(int((p != 0).sum()) for p in pruned.parameters() if p.dim() > 1)
    plain = sum(
        t.numel() * t.element_size() for n, t in pruned.state_dict().items() if n not in ("0.weight", "4.weight")
    )
    assert nbytes(changes.model) == plain + 4 * kept + (36 + 7) // 8 + 1440 // 8
    assert changes.changed == ("0", "4")


def test_dense_and_tied_weights_are_left_and_said() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False), "up": nn.Linear(4, 4)})
    model["head"].weight = model["embed"].weight
    changes = pack_sparse(model)
    assert not changes.changed
    assert set(changes.left) == {"embed", "head", "up"}
    assert "more room" in changes.left["up"]
    assert prune_magnitude(model, 0.5, skip=["u*"]).changed == ()


def test_bad_input() -> None:
    model = network()
    for sparsity in (1.0, -0.1):
        with pytest.raises(ValueError, match="sparsity"):
            prune_magnitude(model, sparsity)
    with pytest.raises(ValueError, match="per="):
        prune_magnitude(model, 0.5, per="row")
    packed = pack_sparse(prune_magnitude(model, 0.9).model).model
    with pytest.raises(ValueError, match="compressed already"):
        prune_magnitude(packed, 0.5)
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight holds NaN"):
        prune_magnitude(model, 0.5)
