"""The verdict of the DIMAP reproduction as a function of rows, its baselines' masks, its figure, and a run in small."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from matplotlib.figure import Figure

from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import dimap


def rows(
    gain: float, lost: float = 0.1, lost5: float = 0.0, noise: float = 0.02, low: tuple[int, ...] = ()
) -> list[Row]:
    """Three seeds: DIMAP exceeds LAMP, the best baseline, by `gain`; at the sparsities `low` it is far below."""
    jitter = (-noise, 0.0, noise)
    out = []
    for s in dimap.SPARSITIES:
        levels = {dimap.UNIFORM: 70.0, dimap.GLOBAL: 75.0, dimap.LAMP: 80.0}
        out += [Row.of(name, dimap.shot(s), [level] * 3) for name, level in levels.items()]
        out.append(Row.of(dimap.OURS, dimap.shot(s), [(60 if s in low else 80 + gain) + j for j in jitter]))
    for top, less in ((1, lost), (5, lost5)):
        out.append(Row.of(dimap.DENSE, dimap.after(50, top), [90.0] * 3))
        out.append(Row.of(dimap.OURS, dimap.after(50, top), [90.0 - less + j for j in jitter]))
    return out


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (rows(1.0), "holds"),
        (rows(0.01), "partly"),  # within the noise
        (rows(-0.5), "partly"),
        (rows(1.0, lost=0.7), "does not hold"),
        (rows(1.0, lost5=0.3), "does not hold"),
        (rows(1.0, low=(50,)), "holds"),
        (rows(1.0, low=(50, 85)), "does not hold"),
        (rows(math.nan), "partly"),
    ],
)
def test_the_rule(given: list[Row], expected: str) -> None:
    assert dimap.verdict(given) == expected


def test_the_best_baseline_is_the_one_beaten() -> None:
    best, mean, error = dimap.advantage(rows(2.0))
    assert best == dimap.LAMP
    assert mean == pytest.approx(2.0)
    assert error == pytest.approx(0.02 / math.sqrt(3))
    one = [Row.of(r.name, r.metric, r.values[:1]) for r in rows(2.0)]
    assert dimap.verdict(one) == "partly"


def test_every_method_prunes_the_same_layers_as_much() -> None:
    model = dimap.swin(dimap.SETTINGS["smoke"])
    whole = dimap.made_masks(dimap.OURS, model, 0.7, 0)
    total = sum(mask.numel() for mask in whole.values())
    for name in dimap.METHODS:
        masks = dimap.made_masks(name, model, 0.7, 0)
        assert masks.keys() == whole.keys()
        kept = sum(int(mask.sum()) for mask in masks.values())
        assert abs(kept - 0.3 * total) <= len(masks)
        if name in (dimap.UNIFORM, dimap.RANDOM):
            assert all(abs(float(mask.float().mean()) - 0.3) < 1 / mask.numel() for mask in masks.values())
        pruned = dimap.pruned(model, masks)
        assert all(not bool(module_weight(pruned, n)[~mask].any()) for n, mask in masks.items())


def module_weight(model: torch.nn.Module, name: str) -> torch.Tensor:
    weight = model.get_submodule(name.removesuffix(".weight")).weight
    assert isinstance(weight, torch.Tensor)
    return weight


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    settings = dimap.SETTINGS["smoke"]
    measured = measured_by(dimap)
    values = {(m.name, m.metric): m.value for m in measured}
    assert measured[0].metric == dimap.shot(50)
    assert values[dimap.DENSE, "top-1, as trained"] > 60
    assert values[dimap.OURS, dimap.shot(90)] < values[dimap.OURS, dimap.shot(50)] + 5
    assert values[dimap.OURS, dimap.after(50, 5)] > values[dimap.OURS, dimap.after(50)] > 50
    assert 30 < values[dimap.OURS, "multiply-adds saved, 50 % pruned"] < 60
    found = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    verdict = dimap.verdict(found)
    said = Report("dimap", "t", dimap.CLAIM, dimap.RULE, verdict, tuple(found), (), (0,), "smoke", settings)
    assert isinstance(dimap.figure(said), Figure)
