"""Sums of signs: the errors of the sheet, optimality of scales, packing."""

import itertools

import pytest
import torch
from torch import Tensor

from neuropil.compress.quantize import BinaryCodes, QuantizationError, Quantizer
from neuropil.compress.quantize.codes import METHODS, alternating_codes, greedy_codes
from neuropil.compress.quantize.signs import binary
from neuropil.packed import Residual


def laplace(count: int) -> Tensor:
    u = torch.rand(count, generator=torch.Generator().manual_seed(0)) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


def normal(count: int = 400_000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def relative(rounded: Tensor, w: Tensor) -> float:
    return float((rounded - w).square().mean() / w.square().mean())


def test_greedy_codes_of_a_normal() -> None:
    """The sheet: 0.363, 0.131, 0.059, 0.033 with 1 to 4 residual codes."""
    w = normal()
    for bases, error in ((1, 0.363), (2, 0.131), (3, 0.059), (4, 0.033)):
        assert relative(BinaryCodes(bases, "greedy", "tensor")(w), w) == pytest.approx(error, abs=0.001)


def test_binary_and_ternary_errors() -> None:
    """The sheet: binary 1 - 2/pi and 1/2, ternary 0.192 at 42% zeros and 0.282 at 50%."""
    for w, two, three, zeros in ((normal(), 0.3634, 0.192, 0.42), (laplace(400_000), 0.5, 0.282, 0.50)):
        assert relative(Quantizer(1)(w), w) == pytest.approx(two, rel=0.01)
        ternary = Quantizer(2, "ternary")(w)
        assert relative(ternary, w) == pytest.approx(three, rel=0.01)
        assert float((ternary == 0).float().mean()) == pytest.approx(zeros, abs=0.01)


def test_the_mean_magnitude_is_the_best_scale() -> None:
    """Invariant 7."""
    w = torch.randn(1, 1, 1000, generator=torch.Generator().manual_seed(0))
    alpha = float(binary(w).scale)
    assert alpha == pytest.approx(float(w.abs().mean()), rel=1e-6)
    scales = torch.linspace(0.5, 1.5, 101) * alpha
    errors = torch.stack([(w - s * w.sign()).square().mean() for s in scales])
    assert int(errors.argmin()) == 50
    assert float(errors[50]) == pytest.approx(float(w.square().mean() - w.abs().mean() ** 2), rel=1e-4)


def test_ternary_is_its_formula() -> None:
    w = torch.randn(5, 40)
    delta = 0.7 * w.abs().mean(1, keepdim=True)
    large = w.abs() > delta
    alpha = (w.abs() * large).sum(1, keepdim=True) / large.sum(1, keepdim=True)
    torch.testing.assert_close(Quantizer(2, "ternary", "channel")(w), alpha * w.sign() * large)


@pytest.mark.parametrize("bases", [1, 2, 3, 4])
def test_alternating_is_never_worse_and_ends_at_an_optimum(bases: int) -> None:
    w = torch.randn(4, 1, 200, generator=torch.Generator().manual_seed(bases)) ** 3
    errors = []
    for rounds in (0, 1, 2, 5, 30):
        alpha, signs = alternating_codes(w, bases, rounds)
        errors.append((w - (alpha[..., None] * signs).sum(-2)).square().sum(-1))
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * (1 + 1e-4)).all())
    if bases > 1:
        assert errors[-1].sum() < errors[0].sum()
    greedy = greedy_codes(w, bases)
    assert torch.equal(errors[0], (w - (greedy[0][..., None] * greedy[1]).sum(-2)).square().sum(-1))


def test_least_squares_scales() -> None:
    """The normal equations hold for the bases of ABC-Net."""
    w = torch.randn(3, 1, 500)
    alpha, signs = METHODS["abc"](w, 3)
    left = w - (alpha[..., None] * signs).sum(-2)
    assert (signs.float() @ left[..., None]).abs().max() < 1e-2
    shifts = [float((w[0, 0] - w[0, 0].mean())[signs[0, 0, i] > 0].min()) for i in range(3)]
    spread = float(w[0, 0].std(correction=0))
    for found, u in zip(shifts, (1, 0, -1), strict=True):
        assert found == pytest.approx(u * spread, abs=0.1 * spread)


@pytest.mark.parametrize("method", list(METHODS))
def test_planes_are_packed_as_they_are_simulated(method: str) -> None:
    w = torch.randn(6, 20)
    q = BinaryCodes(3, method)
    packing = q.pack(w)
    assert isinstance(packing, Residual)
    torch.testing.assert_close(packing.dense(), q(w), rtol=1e-6, atol=1e-6)
    w.requires_grad_()
    q(w).sum().backward()
    assert bool((w.grad == 1).all())
    zero = torch.zeros(2, 8)
    assert not q(zero).any()


def test_bad_codes() -> None:
    with pytest.raises(QuantizationError, match="method"):
        BinaryCodes(2, "best")
    with pytest.raises(QuantizationError, match="bits"):
        BinaryCodes(0)
