r"""Codebooks in closed form: the levels with the least squared error, of the weights or of a layer's outputs.

A layer is linear in its codewords, $y = y_0 + \sum_a T_a z_a$, where $z_a$ is what it answers with a weight that is 1
where codeword a is used and 0 elsewhere. So the best codewords solve $\langle z_a, z_b \rangle T = \langle z_a, y -
y_0 \rangle$, one small system for each group of rows.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.func import functional_call

from neuropil.compress import _jlcm_kmeans as kmeans
from neuropil.compress._jlcm_mapping import CodebookWeight, nearest
from neuropil.compress.quantize.tiles import channels_of
from neuropil.compress.reconstruction import Call, Seen, first

DAMP = 1e-6
ROUNDS = 20


def by_weights(
    w: Float[Tensor, "rows fan"], owner: Integer[Tensor, " rows"], count: int, mode: str
) -> tuple[Tensor, Tensor | None]:
    """Codebooks for the least squared error of the weights: `(book, scale)`, the latter None for "codebooks".

    A codebook for each group, of optimal levels; or one for all and a scale for each group, by turns from two
    beginnings (all scales 1, and the root mean square of each group), so never worse than one codebook without.
    """
    if mode == "codebooks":
        return _books([w[owner == g] for g in range(int(owner.max()) + 1)], count, w), None
    square = torch.zeros(int(owner.max()) + 1, dtype=w.dtype, device=w.device)
    square.index_add_(0, owner, w.square().mean(1))
    size = (square / owner.bincount().clamp_min(1)).sqrt()
    tried = [_turns(w, owner, count, start) for start in (torch.ones_like(size), torch.where(size > 0, size, 1))]
    return min(tried, key=lambda found: _weight_error(w, owner, *found))


def _books(parts: list[Tensor], count: int, like: Tensor) -> Tensor:
    """Optimal levels for each part, as many columns as the one with most needs; the last level is repeated."""
    found = [kmeans.levels(part.detach().cpu().double().numpy(), count) for part in parts]
    wide = max(len(level) for level in found)
    rows = [np.concatenate([level, np.repeat(level[-1:], wide - len(level))]) for level in found]
    return torch.from_numpy(np.stack(rows)).to(like)


def _turns(w: Tensor, owner: Tensor, count: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    book = _books([w / scale[owner][:, None]], count, w)[0]
    for _ in range(ROUNDS):
        own = scale[owner][:, None]
        codes = nearest(scale[:, None] * book, w, owner)
        over = torch.zeros_like(book).index_add_(0, codes.flatten(), (own * w).flatten())
        under = torch.zeros_like(book).index_add_(0, codes.flatten(), (own**2).expand_as(w).flatten())
        book = torch.where(under > 0, over / under.clamp_min(1e-30), book)
        level = book[codes]
        over = torch.zeros_like(scale).index_add_(0, owner, (level * w).sum(1))
        under = torch.zeros_like(scale).index_add_(0, owner, level.square().sum(1))
        scale = torch.where(under > 0, over / under.clamp_min(1e-30), scale)
    return book[None], scale[:, None]


def _weight_error(w: Tensor, owner: Tensor, book: Tensor, scale: Tensor) -> float:
    table = scale * book
    return float((table[owner[:, None], nearest(table, w, owner)] - w).square().sum())


# --------------------------------------------------------------------------------------------- a layer's outputs


@torch.no_grad()
def by_outputs(layer: nn.Module, made: CodebookWeight, seen: Seen) -> None:
    """Give a settled weight the codewords for the least squared error of the layer's outputs, in place.

    `layer` is the plain layer. Codewords that the outputs say little of stay near where they were.
    """
    a, b = _system(layer, made, seen)
    table = made.table.detach().double()
    if made.scale is None:
        made.book.copy_(_least(a, b, table.flatten()).reshape(table.shape))
    else:
        book, scale = made.book[0].double(), made.scale[:, 0].double()
        each, of_each = a.reshape(*table.shape, *table.shape), b.reshape(table.shape)
        for _ in range(ROUNDS):
            book = _least(torch.einsum("g,gkhl,h->kl", scale, each, scale), scale @ of_each, book)
            scale = _least(torch.einsum("k,gkhl,l->gh", book, each, book), of_each @ book, scale)
        made.book.copy_(book[None])
        made.scale.copy_(scale[:, None])
    made.settle()


def _least(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """The solution of `a x = b` that stays near `start` where `a` leaves it open."""
    damp = DAMP * a.diagonal().mean() + 1e-30
    return torch.linalg.solve(a + damp * torch.eye(len(a), dtype=a.dtype, device=a.device), b + damp * start)


def _system(layer: nn.Module, made: CodebookWeight, seen: Seen) -> tuple[Tensor, Tensor]:
    """The normal equations of all codewords, `[G K, G K]` and `[G K]`, summed over the calls.

    Where the weight's rows are the layer's outputs, groups do not meet and one pass for each of K codewords does.
    """
    groups, count = made.table.shape
    rows_are_outputs = channels_of(layer)[0] == 0
    use = made.codes if rows_are_outputs else made.owner[:, None] * count + made.codes
    owner = made.owner if rows_are_outputs else None
    size = groups * count
    a = torch.zeros(size, size, dtype=torch.float64, device=use.device)
    b = torch.zeros(size, dtype=torch.float64, device=use.device)
    for call in seen.calls:
        parts = [_answer(layer, call, use == k) for k in range(count if rows_are_outputs else size)]
        z = torch.stack(parts).flatten(1, -2)  # [probes, n, outputs]
        y = (_outputs_last(layer, call.output) - _offset(layer, call)).flatten(0, -2).double()
        for g in range(groups if owner is not None else 1):
            mine = slice(None) if owner is None else owner == g
            at = slice(g * count, (g + 1) * count) if owner is not None else slice(None)
            own = z[..., mine].flatten(1).double()
            a[at, at] += own @ own.T
            b[at] += own @ y[:, mine].flatten()
    return a, b


def _answer(layer: nn.Module, call: Call, mask: Tensor) -> Tensor:
    """What the layer answers with the weight that is 1 where `mask` is, without bias; outputs along the last axis."""
    return _with(layer, call, mask) - _offset(layer, call)


def _offset(layer: nn.Module, call: Call) -> Tensor:
    bias = getattr(layer, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else call.output.new_zeros(())


def _with(layer: nn.Module, call: Call, mask: Tensor) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    new = mask.reshape(weight.shape).to(weight)
    return _outputs_last(layer, first(functional_call(layer, {"weight": new}, call.args, call.kwargs)))


def _outputs_last(layer: nn.Module, out: Tensor) -> Tensor:
    spatial = len(getattr(layer, "kernel_size", ()))
    return out.movedim(-1 - spatial, -1)
