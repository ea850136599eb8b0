"""The reproduction of layer normalization: the rule as code, equal starts, the baselines, and the smoke run."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from neuropil.report import Measurement, Report, aggregate
from neuropil.reproduce import layer_normalization as module
from neuropil.reproduce._layer_normalization_networks import RecurrentBatchNorm, dense, network
from neuropil.reproduce.layer_normalization import SHARE, Trained, feed_forward, verdict


def judged(share: tuple[float, ...], small: tuple[float, ...], large: tuple[float, ...]) -> str:
    """The verdict for these shares of LN-LSTM, and these losses of layer norm where the baseline has 0.5."""
    seeds = [
        [
            Measurement("LN-LSTM", SHARE, s),
            Measurement("layer norm", "test loss, 4 images a batch", a),
            Measurement("batch norm", "test loss, 4 images a batch", 0.5),
            Measurement("layer norm", "test loss, 128 images a batch", b),
            Measurement("no norm", "test loss, 128 images a batch", 0.5),
        ]
        for s, a, b in zip(share, small, large, strict=True)
    ]
    return verdict(aggregate(seeds))


@pytest.mark.parametrize(
    ("share", "small", "large", "expected"),
    [
        ((60.0, 70.0), (0.4, 0.4), (0.4, 0.4), "holds"),
        ((85.0, 90.0), (0.4, 0.4), (0.4, 0.4), "partly"),  # faster, but not by a fifth
        ((30.0, 101.0), (0.4, 0.4), (0.4, 0.4), "partly"),  # slower in one seed
        ((60.0, 70.0), (0.3, 0.6), (0.4, 0.4), "partly"),  # worse than batch norm in one seed
        ((60.0, 70.0), (0.4, 0.4), (0.4, 0.6), "partly"),  # worse than no norm in one seed
        ((100.0, 100.0), (0.4, 0.4), (0.4, 0.4), "does not hold"),
        ((60.0, math.inf), (0.4, 0.4), (0.4, 0.4), "does not hold"),  # never reached
        ((60.0, 70.0), (0.6, 0.6), (0.4, 0.4), "does not hold"),
        ((60.0, 70.0), (0.4, math.nan), (0.4, 0.4), "does not hold"),
    ],
)
def test_the_rule(share: tuple[float, ...], small: tuple[float, ...], large: tuple[float, ...], expected: str) -> None:
    assert judged(share, small, large) == expected


def test_updates_are_counted_to_the_level() -> None:
    run = Trained(0.1, nn.Identity(), [10, 20, 30], [3.0, 2.0, 2.5])
    assert run.best == 2.0
    assert [run.reaches(level) for level in (3.5, 2.5, 2.0, 1.0)] == [10, 20, 20, math.inf]


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_networks_of_a_seed_begin_alike(kind: str) -> None:
    names = [kind, f"LN-{kind}"] + (["BN-LSTM"] if kind == "LSTM" else [])
    states = [dict(network(name, 8, 5, seed=3).named_parameters()) for name in names]

    def weights(state: dict[str, Tensor], part: str) -> Tensor:
        return next(v for k, v in state.items() if part in k)

    for part in ("weight_ih", "weight_hh", "embedding.weight", "out.weight"):
        assert all(torch.equal(weights(state, part), weights(states[0], part)) for state in states)
    plain = network(kind, 8, 5, seed=3)
    assert all(float(v.detach().abs().max()) == 0 for k, v in plain.layer.named_parameters() if "bias" in k)


def test_recurrent_batch_norm_keeps_statistics_of_each_time() -> None:
    norm = RecurrentBatchNorm(3, times=2)
    first, second = torch.randn(50, 3) + 5, torch.randn(50, 3) - 5
    for _ in range(100):
        norm(first, 0)
        norm(second, 1)
    torch.testing.assert_close(norm.mean, torch.stack([first.mean(0), second.mean(0)]), rtol=1e-3, atol=1e-3)
    norm.eval()
    assert float(norm(first, 0).mean().detach().abs()) < 1e-2
    assert torch.equal(norm(second, 7), norm(second, 1))  # beyond the last time


def test_batch_norm_cannot_train_on_one_image() -> None:
    found = feed_forward({"width": 8, "updates": {128: 1, 4: 4}, "rates": (1e-3,)}, 0, module.Meter())
    one = {m.name: m.value for m in found if m.metric == "test loss, 1 image a batch"}
    assert math.isnan(one["batch norm"])
    assert math.isfinite(one["layer norm"])
    with pytest.raises(ValueError, match="more than 1 value"):
        dense("batch norm", 8, 1, 0)(torch.randn(1, 784))


def test_smoke(smoke: Callable[[ModuleType], Report]) -> None:
    report = smoke(module)
    assert report.verdict in ("holds", "partly", "does not hold")
    assert report.row("LSTM", SHARE).mean == 100
    assert report.row("batch norm", "test loss, 1 image a batch").failed == 1
    assert all(row.failed == 0 for row in report.rows if row.metric in (module.LOSS, module.BEYOND, module.WITHIN))
    assert len(module.figure(report).axes) == 3
