"""The exact search: every screen finds what float64 finds, whatever the chunking, ties and scales."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuropil.errors import ModelError
from neuropil.topk import BLOCK, SCREENS, InnerProductIndex, _Screen, screened_best


def truth(rows: torch.Tensor, keys: torch.Tensor, k: int, scale: torch.Tensor | None = None) -> torch.Tensor:
    scores = rows.double() @ keys.double().T
    return (scores if scale is None else scores * scale.double()).topk(k, dim=1).values


def available(name: str) -> bool:
    try:
        InnerProductIndex(torch.randn(64, 8), screen=name).search(torch.randn(2, 8), 2)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize("screen", [s for s in SCREENS if available(s)])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 40),
    v=st.integers(1, 3000),
    d=st.integers(1, 96),
    k=st.integers(1, 12),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
)
def test_equals_float64_up_to_ties(screen: str, seed: int, n: int, v: int, d: int, k: int, spread: float) -> None:
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(v, d, generator=g) * torch.exp(spread * torch.randn(v, 1, generator=g))
    rows = torch.randn(n, d, generator=g) * torch.exp(spread * torch.randn(n, 1, generator=g))
    found = InnerProductIndex(keys, screen=screen).search(rows, k, both=True)
    k = min(k, v)
    exact = rows.double() @ keys.double().T
    # Scores agree to float64, hence so do the tokens wherever two scores differ at all.
    torch.testing.assert_close(found.scores, truth(rows, keys, k), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(-found.negative_scores, truth(-rows, keys, k), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exact.gather(1, found.tokens), found.scores, rtol=1e-12, atol=1e-12)
    assert all(len(set(r)) == k for r in found.tokens.tolist())


@pytest.mark.parametrize("screen", [s for s in SCREENS if available(s)])
def test_the_bound_holds_for_every_score(screen: str) -> None:
    """E(u) is a bound, not an estimate: no screened score is further than it from float64's."""
    g = torch.Generator().manual_seed(0)
    keys, rows = torch.randn(2000, 64, generator=g), torch.randn(50, 64, generator=g)
    built: _Screen = SCREENS[screen](keys)
    raw, scale, error = built.product(rows, torch.empty(50, 2000, dtype=built.dtype))
    exact = rows.double() @ keys.double().T
    inside = raw.abs() < 127 if raw.dtype == torch.int8 else torch.ones_like(raw, dtype=torch.bool)
    off = (raw.double() * scale.double() - exact).abs()
    assert (off <= error + built.rounding * raw.abs().double() * scale.double())[inside].all()
    assert (error < exact.abs().amax(1, keepdim=True)).all()  # and it is not vacuous


def test_rows_that_fail_the_certificate_fall_back() -> None:
    """Thousands of tokens closer together than bfloat16 can tell: only the full product can rank them."""
    g = torch.Generator().manual_seed(1)
    base = torch.randn(32, generator=g)
    keys = base + 1e-5 * torch.randn(4096, 32, generator=g)
    rows = base[None] + 0.1 * torch.randn(3, 32, generator=g)
    found = InnerProductIndex(keys, screen="bfloat16").search(rows, 5)
    assert found.fallbacks == 3
    assert torch.equal(found.tokens, (rows.double() @ keys.double().T).topk(5).indices)


def test_memory_limit_changes_nothing() -> None:
    g = torch.Generator().manual_seed(2)
    keys, rows = torch.randn(999, 24, generator=g), torch.randn(77, 24, generator=g)
    wide = InnerProductIndex(keys, screen="float32").search(rows, 7, both=True)
    tight = InnerProductIndex(keys, screen="float32", memory=5000).search(rows, 7, both=True)
    assert torch.equal(wide.tokens, tight.tokens)
    assert torch.equal(wide.negative_tokens, tight.negative_tokens)
    assert torch.equal(wide.scores, tight.scores)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(2, 40 * BLOCK),
    st.integers(1, 20),
    st.sampled_from([1, -1]),
)
def test_screened_best_is_topk(seed: int, n: int, size: int, count: int, sign: int) -> None:
    raw = torch.randn(n, size, generator=torch.Generator().manual_seed(seed))
    count = min(count, size)
    limit, tokens = screened_best(raw, count, sign)
    ordered = (sign * raw).sort(dim=1, descending=True).values
    assert torch.equal((sign * raw).gather(1, tokens).sort(dim=1, descending=True).values, ordered[:, :count])
    expected = sign * ordered[:, count] if count < size else torch.full((n,), -sign * float("inf"))
    assert torch.equal(limit, expected)


def test_reductions_match_the_full_product() -> None:
    g = torch.Generator().manual_seed(3)
    keys, rows = torch.randn(300, 16, generator=g), torch.randn(20, 16, generator=g)
    index = InnerProductIndex(keys, memory=4 * 300 * 3)
    scores = rows @ keys.T
    assert torch.equal(index.count_above(rows, torch.ones(20)), (scores > 1).sum(1))
    torch.testing.assert_close(index.logsumexp(rows), scores.logsumexp(1))


def test_bad_input_is_named() -> None:
    keys = torch.randn(10, 4)
    with pytest.raises(ValueError, match="expected 'auto'"):
        InnerProductIndex(keys, screen="float7")
    with pytest.raises(ValueError, match="5 dimensions"):
        InnerProductIndex(keys).search(torch.randn(2, 5), 1)
    with pytest.raises(ModelError, match="NaN"):
        InnerProductIndex(torch.full((3, 4), float("nan")))
    with pytest.raises(ModelError, match="NaN"):
        InnerProductIndex(keys).search(torch.full((1, 4), float("inf")), 1)
    assert InnerProductIndex(keys).search(torch.empty(0, 4), 3).tokens.shape == (0, 3)
