r"""Exact maximum-inner-product search: a low-precision screen, a proven bound, a certificate.

For a row $u \in R^d$ and keys $w_t \in R^d$ (the rows of an unembedding, say), `InnerProductIndex`
finds the $k$ largest and the $k$ smallest of $s_t = a_t \langle u, w_t \rangle$, the same as float64
arithmetic finds up to ties, at about the price of one low-precision matrix product:

1. *Screen.* $\hat s = \hat u \hat W^T$ in bfloat16, int8 or float32, whichever is fastest on this
   machine. Every $|\hat s_t - s_t| \le E(u)$, by the Cauchy-Schwarz inequality on the rounding errors,
   $$E(u) = \lVert u - \hat u\rVert \max_t \lVert w_t\rVert
            + \lVert \hat u\rVert \max_t \lVert w_t - \hat w_t\rVert
            + \gamma_d \lVert \hat u\rVert \max_t \lVert\hat w_t\rVert + r,$$
   where $\gamma_d$ bounds float32 accumulation and $r$ the rounding of the output. Rounding is monotone, so only
   the score at the edge of the candidates needs an $r$.
2. *Re-score.* The $c > k$ best of the screen are computed again in float64.
3. *Certify.* If the $k$-th re-scored value is at least $\hat s_{(c+1)} + E(u)$, no token outside the
   candidates can be among the best $k$. Rows that fail are tried with more candidates, and in the
   end by a full float64 product.

The screen's scores are held for a block of rows at a time, so memory does not grow with the number
of rows, and the block shrinks as the vocabulary grows (`memory`, in bytes).

    >>> import torch
    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> keys, rows = torch.randn(500, 16), torch.randn(3, 16)
    >>> found = InnerProductIndex(keys).search(rows, k=4)
    >>> torch.equal(found.tokens, (rows.double() @ keys.double().T).topk(4).indices)
    True
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuropil.errors import ModelError

BLOCK = 16  # tokens whose screened scores share one maximum
RESCORE_BYTES = 2**20  # candidates gathered at a time: stays in the cache


@dataclass(frozen=True)
class TopK:
    """The best keys of every row, best first; `negative_*` are the most negative, most negative first."""

    scores: Float[Tensor, "rows k"]
    tokens: Int[Tensor, "rows k"]
    negative_scores: Float[Tensor, "rows k"] | None
    negative_tokens: Int[Tensor, "rows k"] | None
    fallbacks: int  # rows that needed the full float64 product


@dataclass(frozen=True)
class _Screen:
    """A low-precision product and what it may be wrong by."""

    name: str
    product: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    # rows, room for [r, V] raw scores
    #     -> (raw scores [r, V], row scale [r, 1] to real scores, error bound in real scores [r, 1])
    candidates: Callable[[int], int]
    dtype: torch.dtype
    rounding: float = 0.0  # raw scores are rounded by at most this part of themselves, beside the error bound


class InnerProductIndex:
    """Keys prepared once for many searches.

    Parameters
    ----------
    keys: `[V, d]`, float32 (other floating dtypes are converted).
    scale: optional `[V]`; scores become `scale[t] * <row, key_t>` (1/norm gives the cosine up to the
        row's own norm).
    screen: "auto" times the screens on the first rows of the first search and keeps the fastest;
        or "float32", "bfloat16", "int8".
    memory: bytes that the screen's scores may take at a time.

    Raises `ModelError` if the keys are not all finite.
    """

    def __init__(
        self,
        keys: Float[Tensor, "V d"],
        scale: Float[Tensor, " V"] | None = None,
        *,
        screen: str = "auto",
        memory: int = 192 * 2**20,
    ) -> None:
        if screen not in ("auto", *SCREENS):
            raise ValueError(f"screen is {screen!r}; expected 'auto' or one of {', '.join(SCREENS)}")
        self.keys = keys.detach().float().contiguous()
        if not torch.isfinite(self.keys).all():
            raise ModelError("the keys (token embeddings) hold NaN or infinite numbers; check the checkpoint")
        self.scale = None if scale is None else scale.detach().double()
        self.memory = memory
        self._scaled = self.keys if self.scale is None else (self.keys.double() * self.scale[:, None]).float()
        self._screen: _Screen | None = None if screen == "auto" else SCREENS[screen](self._scaled)
        self._rooms = _Rooms()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def screen(self) -> str:
        """The screen in use ("auto" until the first search has timed them)."""
        return "auto" if self._screen is None else self._screen.name

    def search(self, rows: Float[Tensor, "n d"], k: int, *, both: bool = False) -> TopK:
        """The `k` best keys of every row; with `both`, the `k` most negative too.

        The choice of screen, block size and the number of threads never change which keys are found.
        """
        if rows.shape[-1] != self.keys.shape[-1]:
            raise ValueError(f"rows have {rows.shape[-1]} dimensions, the keys {self.keys.shape[-1]}")
        rows = rows.detach().float()
        if not torch.isfinite(rows).all():
            raise ModelError("the rows hold NaN or infinite numbers; check the checkpoint")
        k = min(k, len(self))
        if self._screen is None and len(rows):
            self._screen = self._fastest(rows[:128], k)
        parts = [self._block(block, k, both) for block in self._blocks(rows)] or [self._empty(k, both)]
        return TopK(
            torch.cat([p.scores for p in parts]),
            torch.cat([p.tokens for p in parts]),
            torch.cat([p.negative_scores for p in parts if p.negative_scores is not None]) if both else None,
            torch.cat([p.negative_tokens for p in parts if p.negative_tokens is not None]) if both else None,
            sum(p.fallbacks for p in parts),
        )

    def count_above(self, rows: Float[Tensor, "n d"], threshold: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
        """How many keys score above each row's threshold (float32 arithmetic)."""
        return self._reduce(rows, lambda s, t: (s > t[:, None]).sum(1), threshold)

    def logsumexp(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """`log sum_t exp(score_t)` of every row (float32 arithmetic)."""
        return self._reduce(rows, lambda s, _: s.logsumexp(1), torch.zeros(len(rows)))

    def largest_softmax(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """`max_t softmax(<row, key>)_t` of every row, unscaled keys (float32 arithmetic)."""
        return self._reduce(rows, lambda s, _: (s.amax(1) - s.logsumexp(1)).exp(), torch.zeros(len(rows)), self.keys)

    def _reduce(
        self,
        rows: Tensor,
        reduce: Callable[[Tensor, Tensor], Tensor],
        extra: Tensor,
        keys: Tensor | None = None,
    ) -> Tensor:
        keys = self._scaled if keys is None else keys
        step = max(1, self.memory // (4 * len(self)))
        pairs = zip(rows.float().split(step), extra.split(step), strict=True)
        parts = [reduce(r @ keys.T, e) for r, e in pairs]
        return torch.cat(parts) if parts else extra

    # --- one block of rows ---------------------------------------------------------------------

    def _blocks(self, rows: Tensor) -> Iterator[Tensor]:
        assert self._screen is not None or not len(rows)
        itemsize = self._screen.dtype.itemsize if self._screen else 4
        step = max(1, min(1536, self.memory // (itemsize * len(self))))
        return iter(rows.split(step)) if len(rows) else iter(())

    def _empty(self, k: int, both: bool) -> TopK:
        scores, tokens = torch.zeros(0, k, dtype=torch.float64), torch.zeros(0, k, dtype=torch.int64)
        return TopK(scores, tokens, scores if both else None, tokens if both else None, 0)

    def _block(self, rows: Tensor, k: int, both: bool) -> TopK:
        assert self._screen is not None
        raw, scale, error = self._screen.product(
            rows, self._rooms.get("raw", (len(rows), len(self)), self._screen.dtype)
        )
        count = min(self._screen.candidates(k), len(self))
        up = self._side(rows, raw, scale, error, k, count, 1)
        if not both:
            return TopK(*up[:2], None, None, up[2])
        down = self._side(rows, raw, scale, error, k, count, -1)
        return TopK(*up[:2], *down[:2], up[2] + down[2])

    def _side(
        self, rows: Tensor, raw: Tensor, scale: Tensor, error: Tensor, k: int, count: int, sign: int
    ) -> tuple[Tensor, Tensor, int]:
        assert self._screen is not None
        limit, candidates = screened_best(raw, count, sign)
        if raw.dtype == torch.int8:  # a saturated score may stand for any larger one
            limit = torch.where(limit.abs() >= 127, sign * float("inf"), limit)
        scores, tokens = self._rescore(rows, candidates, k, sign)
        # The best score that anything outside the candidates may have.
        edge = (sign * limit + self._screen.rounding * limit.abs()).double()
        outside = edge * scale.double().squeeze(1) + error.double().squeeze(1)
        failed = (sign * scores[:, -1] < outside).nonzero().flatten()
        fallbacks = 0
        if len(failed):
            more = min(8 * count, len(self))
            if count < 1024 and more < len(self) // 4:
                again = self._side(rows[failed], raw[failed], scale[failed], error[failed], k, more, sign)
            else:
                again = (*self._full(rows[failed], k, sign), len(failed))
            scores[failed], tokens[failed], fallbacks = again
        return scores, tokens, fallbacks

    def _rescore(self, rows: Tensor, candidates: Tensor, k: int, sign: int) -> tuple[Tensor, Tensor]:
        """Candidates in float64, best `k` of them, in order."""
        width, d = candidates.shape[1], rows.shape[1]
        step = max(1, RESCORE_BYTES // (8 * width * d))
        near, exact = (self._rooms.get("near", (step * width, d), t) for t in (torch.float32, torch.float64))
        scores = torch.empty(candidates.shape, dtype=torch.float64)
        for start in range(0, len(rows), step):
            some = candidates[start : start + step].flatten()
            torch.index_select(self.keys, 0, some, out=near[: len(some)])
            close = exact[: len(some)].copy_(near[: len(some)]).unflatten(0, (-1, width))
            own = rows[start : start + step, :, None].double()
            torch.bmm(close, own, out=scores[start : start + step].unsqueeze(-1))
        if self.scale is not None:
            scores *= self.scale[candidates]
        best, order = (sign * scores).topk(k, dim=1)
        return sign * best, candidates.gather(1, order)

    def _full(self, rows: Tensor, k: int, sign: int) -> tuple[Tensor, Tensor]:
        """The fall-back: every key in float64, a tile of keys at a time."""
        best = [torch.empty(len(rows), 0, dtype=torch.float64), torch.empty(len(rows), 0, dtype=torch.int64)]
        tile = max(1, self.memory // (8 * max(len(rows), self.keys.shape[1])))
        for start in range(0, len(self), tile):
            scores = rows.double() @ self.keys[start : start + tile].double().T
            if self.scale is not None:
                scores *= self.scale[start : start + tile]
            tokens = torch.arange(start, start + scores.shape[1]).expand_as(scores)
            best = [torch.cat([best[0], sign * scores], 1), torch.cat([best[1], tokens], 1)]
            values, order = best[0].topk(min(k, best[0].shape[1]), dim=1)
            best = [values, best[1].gather(1, order)]
        return sign * best[0], best[1]

    def _fastest(self, rows: Tensor, k: int) -> _Screen:
        """Time the screens that this CPU may be fast at, whole, on the same rows; keep the fastest."""
        names = promising(self._scaled, rows)
        timed: list[tuple[float, _Screen]] = []
        for name in names:
            self._screen = SCREENS[name](self._scaled)
            if len(names) == 1:
                break
            self._block(rows[:8], k, both=True)  # warm-up: packing, thread pools
            timed.append((min(_seconds(lambda: self._block(rows, k, both=True)) for _ in range(2)), self._screen))
        return min(timed, key=lambda t: t[0])[1] if timed else SCREENS["float32"](self._scaled)


def promising(keys: Tensor, rows: Tensor) -> list[str]:
    """Screens whose bare product is much faster than float32's here, tried on a few keys; and float32.

    Low precision must earn its wider bound: int8's grows with the dimension, and most CPUs without
    VNNI or bfloat16 units are slower in those types.
    """
    few, names = keys[:4096], ["float32"]
    least = _trial("float32", few, rows)
    if (small := _trial("bfloat16", few, rows)) < 0.7 * least:
        names.append("bfloat16")
    if keys.shape[1] <= 1024 and _trial("int8", few, rows) < 0.4 * min(least, small):
        names.append("int8")
    return names


def _trial(name: str, keys: Tensor, rows: Tensor) -> float:
    try:
        screen = SCREENS[name](keys)
        room = torch.empty(len(rows), len(keys), dtype=screen.dtype)
        screen.product(rows, room)
        return min(_seconds(lambda: screen.product(rows, room)) for _ in range(2))
    except (RuntimeError, NotImplementedError):  # this CPU, or this torch, has not got it
        return float("inf")


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class _Rooms(threading.local):
    """Memory that is used again: fresh pages cost as much as the product that fills them. One set a thread."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A matrix of this shape, its contents whatever was last there."""
        size = shape[0] * shape[1]
        held = self._held.get((name, dtype))
        if held is None or held.numel() < size:
            held = self._held[name, dtype] = torch.empty(size, dtype=dtype)
        return held[:size].view(shape)


def screened_best(raw: Tensor, count: int, sign: int) -> tuple[Tensor, Tensor]:
    """The `count` largest (sign 1) or smallest (sign -1) entries of every row, and the next one's value.

    The best `count` entries lie in the `count` blocks with the best maxima, so only those blocks are
    looked into: a block is a strided set of `BLOCK` tokens, whose maxima vectorise.
    """
    n, size = raw.shape
    whole = size - size % BLOCK
    if count + 1 >= size // BLOCK or whole < size - BLOCK:
        values, tokens = raw.topk(min(count + 1, size), dim=1, largest=sign > 0)
    else:
        blocks = raw[:, :whole].unflatten(1, (BLOCK, whole // BLOCK))
        peaks = blocks.amax(1) if sign > 0 else blocks.amin(1)
        best = peaks.topk(count + 1, dim=1, largest=sign > 0, sorted=False).indices
        inside = (best[:, :, None] + torch.arange(BLOCK) * (whole // BLOCK)).flatten(1)
        if whole < size:
            rest = torch.arange(whole, size).expand(n, -1)
            inside = torch.cat([inside, rest], 1)
        values, order = raw.gather(1, inside).topk(count + 1, dim=1, largest=sign > 0)
        tokens = inside.gather(1, order)
    if values.shape[1] <= count:  # every key is a candidate: nothing is left outside
        return torch.full((n,), -sign * float("inf")), tokens
    return values[:, count].float(), tokens[:, :count]


# --- the screens ---------------------------------------------------------------------------------


def _gamma(d: int) -> float:
    """Bound on the relative error of a float32 sum of d products, in any order (unit roundoff 2^-24).

    The factor two covers accumulators that round products and sums separately and flush subnormals.
    """
    return 2 * (d + 2) * 2.0**-24


def _float32(keys: Tensor) -> _Screen:
    # Keys may have been rounded once to float32 after scaling: one more unit roundoff.
    bound = (_gamma(keys.shape[1]) + 2.0**-23) * _longest(keys)

    def product(rows: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        error = bound * rows.double().norm(dim=1, keepdim=True)
        return torch.mm(rows, keys.T, out=room), torch.ones(len(rows), 1), error

    return _Screen("float32", product, lambda k: k + 4, torch.float32)


def _bfloat16(keys: Tensor) -> _Screen:
    small = keys.bfloat16()
    longest, lost = _longest(keys), _longest(keys - small.float())

    def product(rows: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low = rows.bfloat16()
        norm = rows.double().norm(dim=1, keepdim=True)
        off = (rows - low.float()).double().norm(dim=1, keepdim=True)
        gamma = _gamma(keys.shape[1]) + 2.0**-23
        error = off * longest + (norm + off) * (lost + gamma * (longest + lost))
        return torch.mm(low, small.T, out=room), torch.ones(len(rows), 1), error

    # The output is rounded to bfloat16, by at most 2^-9 of itself.
    return _Screen("bfloat16", product, lambda k: 2 * k + 12, torch.bfloat16, 2.0**-8)


def _int8(keys: Tensor) -> _Screen:
    """8-bit keys, 7-bit rows (without VNNI, x86 adds two 8-bit products in 16 bits: 127 * 63 * 2 fits)."""
    levels = 63
    step = (keys.abs().amax(1) / 127).clamp_min(1e-30)
    whole = (keys / step[:, None]).round().clamp(-127, 127)
    longest, lost = _longest(keys), _longest(keys - whole * step[:, None])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that these types will move to torchao
        packed = torch.ops.quantized.linear_prepack(
            torch.quantize_per_channel(
                whole * step[:, None], step.double(), torch.zeros(len(step)).long(), 0, torch.qint8
            ),
            None,
        )
    reach = longest + lost

    def product(rows: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        unit = (rows.abs().amax(1, keepdim=True) / levels).clamp_min(1e-30)
        low = (rows / unit).round().clamp(-levels, levels)
        off = (rows - low * unit).double().norm(dim=1, keepdim=True)
        norm = (low * unit).double().norm(dim=1, keepdim=True)
        # Scores are almost always within 8/sqrt(d) of the longest possible; beyond, they saturate, which
        # is sound: a saturated token is a candidate.
        out = float((norm / unit).max()) * reach * min(1.0, 8 / rows.shape[1] ** 0.5) / 127 or 1e-30
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole_rows = torch.quantize_per_tensor(low, 1.0, levels + 1, torch.quint8)
            raw = torch.ops.quantized.linear(whole_rows, packed, out, 128).int_repr()
        raw = torch.sub(raw, 128, out=room.view(torch.uint8)).view(torch.int8)  # modulo 256: the two's complement
        error = off * longest + norm * lost + 0.51 * out * unit.double()
        return raw, unit * out, error + norm * reach * 2.0**-20

    return _Screen("int8", product, lambda k: 12 * k + 24, torch.int8)


def _longest(keys: Tensor) -> float:
    """Norm of the longest row, in float64 a tile at a time, rounded up."""
    return max((float(t.double().norm(dim=1).max()) for t in keys.split(8192)), default=0.0) * (1 + 1e-12)


SCREENS: dict[str, Callable[[Tensor], _Screen]] = {
    "float32": _float32,
    "bfloat16": _bfloat16,
    "int8": _int8,
}
