"""The verdict of the CoreInfer reproduction as a function of rows, its arms, and its measurements in small."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from matplotlib.figure import Figure
from tiny_models import llama
from torch import Tensor

from neuropil.neurons import capture, find_sites
from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import coreinfer as claim


def rows(own: float, random: float, static: float, other: float, rate: float = 1.4, noise: float = 0.01) -> list[Row]:
    jitter = (-noise, 0.0, noise)

    def of(name: str, mean: float) -> Row:
        return Row.of(name, claim.rise(0.4), [mean + (name == claim.OWN) * j for j in jitter])

    return [
        of(claim.OWN, own),
        of(claim.RANDOM, random),
        of(claim.STATIC, static),
        of(claim.OTHER, other),
        Row.of(claim.OWN, claim.RATE.format(0.4), [rate] * 3),
    ]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (rows(0.05, 1.0, 0.2, 0.2), "holds"),
        (rows(0.5, 1.0, 0.6, 0.6), "partly"),  # better, and not lossless
        (rows(0.05, 1.0, 0.2, 0.2, rate=1.1), "partly"),
        (rows(0.05, 1.0, 0.051, 0.2), "partly"),  # within the noise
        (rows(0.05, 1.0, 0.2, 0.04), "partly"),
        (rows(0.05, 1.0, 0.04, 0.2), "does not hold"),
        (rows(0.05, 0.04, 0.2, 0.2), "does not hold"),
        (rows(math.nan, 1.0, 0.2, 0.2), "does not hold"),
    ],
)
def test_the_rule(found: list[Row], expected: str) -> None:
    assert claim.verdict(found) == expected


def test_one_seed_never_holds() -> None:
    one = [Row.of(r.name, r.metric, r.values[:1]) for r in rows(0.05, 1.0, 0.2, 0.2)]
    assert claim.verdict(one) == "partly"


def test_the_bound_keeps_each_tokens_largest() -> None:
    net = llama()
    seen: list[Tensor] = []
    [first, _] = find_sites(net)
    with capture(net, [first]) as h, claim.per_token(net, [first], 0.25):
        net.get_submodule(first.tap.module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        net(torch.arange(5)[None])
    assert (seen[0] != 0).sum(-1).tolist() == [[12] * 5]
    kept = seen[0][0] != 0
    size = h[first.name][0].abs()
    for token, which in zip(size, kept, strict=True):
        assert token[which].min() >= token[~which].max()


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    measured = measured_by(claim)
    found = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    assert {row.name for row in found if row.metric == claim.rise(0.4)} == set(claim.ARMS)
    value = {row.name: row.mean for row in found if row.metric == claim.rise(0.4)}
    assert value[claim.ORACLE] < value[claim.OWN] < value[claim.RANDOM]
    settings = claim.SETTINGS["smoke"]
    said = Report(
        "coreinfer", "t", claim.CLAIM, claim.RULE, claim.verdict(found), tuple(found), (), (0,), "smoke", settings
    )
    assert isinstance(claim.figure(said), Figure)
