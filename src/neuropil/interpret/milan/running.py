"""The best images and a high quantile of every unit of a layer, kept while a probe of any length streams past.

Memory is that of `k` activation maps and one sketch a unit, whatever the number of images.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

CAPACITY, BINS = 16_384, 4_096


class RunningQuantile:
    """A quantile of every row of a stream of values `[rows, *]`.

    Exact while at most `capacity` values a row have come. After that the values are counts in `bins` bins of equal
    width a row, whose width doubles (neighbours join) whenever a value falls outside. No count is ever lost, so the
    rank of every bin's edge stays exact and the quantile lies in the bin it is found in: `error()` gives that bin's
    width, an upper bound of the error. It is at most 4/bins of the row's range.

    >>> stream = RunningQuantile(1, capacity=100, bins=512)
    >>> values = torch.rand(1, 50_000, generator=torch.Generator().manual_seed(0))
    >>> for part in values.split(1000, dim=1):
    ...     stream.add(part)
    >>> gap = (stream.quantile(0.99) - torch.quantile(values, 0.99)).abs()
    >>> bool(gap <= stream.error(0.99)), bool(stream.error(0.99) <= 4 / 512)
    (True, True)
    """

    def __init__(self, rows: int, capacity: int = CAPACITY, bins: int = BINS) -> None:
        if rows < 1 or capacity < 1 or bins < 2 or bins % 2:
            raise ValueError(f"rows={rows}, capacity={capacity}, bins={bins}: expected 1 or more, and an even bins")
        self.rows, self.capacity, self.bins, self.count = rows, capacity, bins, 0
        self.low = torch.full((rows,), torch.inf, dtype=torch.float64)
        self.high = -self.low
        self.buffer: list[Tensor] = []
        self.start = self.width = torch.zeros(0, dtype=torch.float64)
        self.counts = torch.zeros(0, 0, dtype=torch.int64)

    @property
    def exact(self) -> bool:
        return not self.counts.numel()

    def add(self, values: Float[Tensor, "rows n"]) -> None:
        if values.shape[1] == 0:
            return
        self.count += values.shape[1]
        self.low = torch.minimum(self.low, values.amin(1).double())
        self.high = torch.maximum(self.high, values.amax(1).double())
        if self.exact:
            self.buffer.append(values.detach().float().clone())
            if self.count <= self.capacity:
                return
            held, self.buffer = self.buffer, []
            self._open()
            for part in held:
                self._count(part)
        else:
            self._count(values)

    def _open(self) -> None:
        self.start = self.low.clone()
        least = self.low.abs().clamp_min(1e-6) * 1e-6  # a constant row has no range yet
        self.width = torch.maximum(self.high - self.low, least) * (1 + 1e-9) / self.bins
        self.counts = torch.zeros(self.rows, self.bins, dtype=torch.int64)

    def _count(self, values: Tensor) -> None:
        self._widen()
        place = (values.double() - self.start[:, None]) / self.width[:, None]
        place = place.long().clamp_(0, self.bins - 1)
        self.counts.scatter_add_(1, place, torch.ones_like(place))

    def _widen(self) -> None:
        """Double the bins of the rows whose range has outgrown them, to the side where it did."""
        while True:
            span = self.width * self.bins
            below = self.low < self.start
            outside = below | (self.high >= self.start + span)
            if not outside.any():
                return
            joined = self.counts[outside].unflatten(1, (-1, 2)).sum(2)
            empty = torch.zeros_like(joined)
            left = below[outside][:, None]
            self.counts[outside] = torch.where(left, torch.cat([empty, joined], 1), torch.cat([joined, empty], 1))
            self.start = torch.where(below, self.start - span, self.start)
            self.width = torch.where(outside, 2 * self.width, self.width)

    def quantile(self, q: float) -> Float[Tensor, " rows"]:
        """As `torch.quantile` (linear between ranks); within a bin the values are taken to lie evenly."""
        if not self.count:
            raise ValueError("no value has come yet: add some before asking for a quantile")
        rank = q * (self.count - 1)
        if self.exact:
            values = torch.cat(self.buffer, 1)
            below = values.kthvalue(int(rank) + 1, dim=1).values
            above = values.kthvalue(min(int(rank) + 2, self.count), dim=1).values
            return torch.lerp(below, above, rank - int(rank))
        bin_, before = self._bin(rank)
        inside = self.counts.gather(1, bin_[:, None])[:, 0]
        share = ((rank - before + 0.5) / inside).clamp(0, 1)
        found = self.start + (bin_ + share) * self.width
        return torch.minimum(torch.maximum(found, self.low), self.high).float()

    def error(self, q: float) -> Float[Tensor, " rows"]:
        """The most by which `quantile(q)` can be off: zero while exact, else from the ends of its rank's bins."""
        if self.exact:
            return torch.zeros(self.rows)
        rank = q * (self.count - 1)
        first, _ = self._bin(float(int(rank)))
        last, _ = self._bin(float(min(int(rank) + 1, self.count - 1)))
        return ((last - first + 1) * self.width).float()

    def _bin(self, rank: float) -> tuple[Tensor, Tensor]:
        total = self.counts.cumsum(1)
        bin_ = (total > rank).int().argmax(1)
        before = total.gather(1, bin_[:, None])[:, 0] - self.counts.gather(1, bin_[:, None])[:, 0]
        return bin_, before

    def state_dict(self) -> dict[str, Any]:
        held = torch.cat(self.buffer, 1) if self.buffer else torch.zeros(self.rows, 0)
        return {
            "count": self.count, "low": self.low, "high": self.high, "buffer": held,
            "start": self.start, "width": self.width, "counts": self.counts,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.low, self.high = state["count"], state["low"], state["high"]
        self.buffer = [state["buffer"]] if state["buffer"].numel() else []
        self.start, self.width, self.counts = state["start"], state["width"], state["counts"]


class RunningTopK:
    """The `k` images on which every unit's map peaks highest, with these maps; of equals the earlier image.

    `values`, `ids` and `maps` have min(k, images so far) entries a unit, best first.
    """

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"k is {k}; expected 1 exemplar a unit or more")
        self.k, self.seen = k, 0
        self.values = torch.zeros(0, 0)
        self.ids = torch.zeros(0, 0, dtype=torch.int64)
        self.maps = torch.zeros(0, 0, 0, 0)

    def add(self, maps: Float[Tensor, "batch units h w"]) -> None:
        peaks = maps.amax((2, 3)).T  # [units, batch]
        ids = torch.arange(self.seen, self.seen + len(maps)).expand(len(peaks), -1)
        if self.seen:
            peaks, ids = torch.cat([self.values, peaks], 1), torch.cat([self.ids, ids], 1)
        # Stable, and the batches come in order: of equal peaks the earlier image stays.
        order = peaks.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        self.maps = self._kept(maps, order)
        self.values, self.ids = peaks.gather(1, order), ids.gather(1, order)
        self.seen += len(maps)

    def _kept(self, maps: Tensor, order: Int[Tensor, "units k"]) -> Tensor:
        held = self.values.shape[1]
        unit = torch.arange(len(order))[:, None].expand_as(order)
        kept = maps.new_empty(*order.shape, *maps.shape[2:])
        old = order < held
        if held:
            kept[old] = self.maps[unit[old], order[old]]
        kept[~old] = maps[order[~old] - held, unit[~old]]
        return kept

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "values": self.values, "ids": self.ids, "maps": self.maps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.values, self.ids, self.maps = (state[name] for name in ("seen", "values", "ids", "maps"))
