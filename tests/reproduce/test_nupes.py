"""The verdict of the NUPES reproduction as a function of rows, its figure, and its measurements in small."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from matplotlib.figure import Figure

from neuropil.report import Measurement, Report, Row
from neuropil.reproduce import nupes


def rows(tensor: float, channel: float, three: float, two: float, noise: float = 0.02) -> list[Row]:
    """Three seeds; the numbers are the differences of the rule."""
    jitter = (-noise, 0.0, noise)

    def of(name: str, metric: str, mean: float, own: float = 0.0) -> Row:
        return Row.of(name, metric, [mean + own * j for j in jitter])

    out = []
    for per, gain in (("tensor", tensor), ("channel", channel)):
        metric = nupes.surprise(4, per)
        out += [of(nupes.UNIFORM, metric, 9.0), of(nupes.CLIPPED, metric, 5.0), of(nupes.GLOBAL, metric, 5.0 - gain, 1)]
    for bits, gain in ((3, three), (2, two)):
        metric = nupes.accurate(bits, None)
        out += [of(nupes.ADAROUND, metric, 80.0), of(nupes.BOTH, metric, 80.0 + gain, 1.0)]
    return out


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ((1.0, 0.2, 0.5, 0.5), "holds"),
        ((1.0, 0.2, 0.01, 0.5), "partly"),  # within the noise
        ((1.0, 0.2, -0.5, 0.5), "partly"),
        ((1.0, 0.2, -0.5, -0.5), "does not hold"),
        ((-1.0, 0.2, 0.5, 0.5), "does not hold"),
        ((1.0, -0.2, 0.5, 0.5), "does not hold"),
        ((1.0, 0.01, 0.5, 0.5), "partly"),
        ((math.nan, 0.2, 0.5, 0.5), "does not hold"),
        ((1.0, 0.2, math.nan, math.nan), "does not hold"),
    ],
)
def test_the_rule(differences: tuple[float, float, float, float], expected: str) -> None:
    assert nupes.verdict(rows(*differences)) == expected


def test_the_better_uniform_grid_is_the_one_to_beat() -> None:
    found = [r for r in rows(-0.5, 0.2, 0.5, 0.5) if r.name != nupes.CLIPPED]
    found += [Row.of(nupes.CLIPPED, nupes.surprise(4, per), [9.5] * 3) for per in nupes.PER]
    assert nupes.differences(found)[0][0] == pytest.approx(3.5)


def test_one_seed_never_holds() -> None:
    one = [Row.of(r.name, r.metric, r.values[:1]) for r in rows(1.0, 1.0, 1.0, 1.0)]
    assert nupes.verdict(one) == "partly"


def test_seeds_read_texts_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nupes, "rounded", lambda *_: ((0.0, 1.0, 2.0, 3.0, 4.0, 5.0), 0.5))
    settings = {"windows": 6, "parts": 3}
    assert [nupes.language(settings, seed, 4, "tensor", nupes.GLOBAL) for seed in range(3)] == [
        (1.5, 0.5),
        (2.5, 0.5),
        (3.5, 0.5),
    ]


def test_every_method_keeps_the_ends_in_eight_bits() -> None:
    torch.manual_seed(0)
    model, data = nupes.network(8).eval(), [torch.rand(64, 1, 8, 8)]
    for name in nupes.LEARNERS:
        made = nupes.learned(name, model, data, 2, 4, 3, 0)
        packings = [m.packing for m in made.modules() if hasattr(m, "packing")]
        distinct = [len(p.integers().unique()) for p in packings]
        assert distinct[0] > 20
        assert max(distinct[1:-1]) <= 3
        assert distinct[-1] > 20
        inputs = [m.input_quantizer.bits for m in made.modules() if hasattr(m, "input_quantizer")]
        assert inputs == [8, 4, 4, 4, 4, 8]


def test_smoke(measured_by: Callable[[ModuleType], list[Measurement]]) -> None:
    measured = measured_by(nupes)
    found = [Row.of(m.name, m.metric, [m.value], m.unit, m.higher_is_better, m.baseline) for m in measured]
    assert {r.name for r in found if r.metric == nupes.accurate(2, None)} == set(nupes.LEARNERS)
    assert next(r for r in found if (r.name, r.metric) == (nupes.FULL, "accuracy")).mean > 85
    settings = nupes.SETTINGS["smoke"]
    said = Report(
        "nupes", "t", nupes.CLAIM, nupes.RULE, nupes.verdict(found), tuple(found), (), (0,), "smoke", settings
    )
    assert isinstance(nupes.figure(said), Figure)
