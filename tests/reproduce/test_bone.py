"""The reproduction of Bone: its verdict over rows made by hand, its ladder, and that the arms are alike in size."""

import math

import pytest
from tiny_models import llama

from neuropil.report import Row
from neuropil.reproduce import bone
from neuropil.reproduce.bone import ARMS, BONE, LORA, PISSA, TEST


def rows(ours: list[float], lora: list[float], pissa: list[float]) -> list[Row]:
    made = {BONE: ours, LORA: lora, PISSA: pissa}
    return [Row.of(name, TEST, values, "nats a token", False, name != BONE) for name, values in made.items()]


@pytest.mark.parametrize(
    ("ours", "lora", "pissa", "expected"),
    [
        ([3.0, 3.1], [3.2, 3.2], [3.1, 3.3], "holds"),
        ([3.0, 3.25], [3.2, 3.2], [3.3, 3.3], "partly"),  # lower in the mean, not in every seed
        ([3.0, 3.1], [3.2, 3.2], [2.9, 2.9], "partly"),  # lower than LoRA, not than PiSSA
        ([3.2, 3.2], [3.2, 3.2], [3.3, 3.3], "does not hold"),
        ([3.3, 3.1], [3.1, 3.2], [3.3, 3.3], "does not hold"),
        ([3.0, math.nan], [3.2, 3.2], [3.3, 3.3], "partly"),
        ([math.nan, math.nan], [3.2, 3.2], [3.3, 3.3], "does not hold"),
    ],
)
def test_verdict(ours: list[float], lora: list[float], pissa: list[float], expected: str) -> None:
    assert bone.verdict(rows(ours, lora, pissa)) == expected


def test_the_ladder_goes_on_until_the_best_rung_is_enclosed() -> None:
    for lowest in (-3, 0, 2):
        losses = {rung: abs(rung - lowest) + 0.0 for rung in (-1, 0, 1)}
        while (rung := bone.beyond(losses)) is not None:
            losses[rung] = abs(rung - lowest) + 0.0
        assert bone.best(losses) == lowest
        assert {lowest - 1, lowest + 1} <= set(losses)
    assert bone.best({0: math.nan, 1: 2.0}) == 1
    edge = {rung: -float(rung) for rung in range(-1, bone.LIMIT + 1)}
    assert bone.beyond(edge) is None


def test_the_baselines_have_no_fewer_parameters_and_hardly_more() -> None:
    net = llama()
    size = {}
    for arm in ARMS:
        made = bone.adapted(arm, net, r=8)
        size[arm] = sum(p.numel() for p in made.parameters() if p.requires_grad)
    rank = bone.lora_rank(net, 8)
    assert size[BONE] == size[bone.MISS]
    assert size[bone.ROW] == pytest.approx(size[BONE], rel=0.1)  # by the inputs instead of the outputs
    assert size[BONE] <= size[LORA] == size[PISSA] < size[BONE] * (1 + 1 / (rank - 1))
