r"""A weight that is read from codebooks, and the gradients by which its codewords and its mapping are learned together.

Each weight has a score for every codeword of its group and takes the codeword with the highest. Descent on a softmax
of the scores has the gradient $\partial L / \partial \hat w_i \cdot p_{ik} (C_k - \hat w_i)$, which is largest for the
codewords that lie farthest away. The proximal gradient keeps its sign and lets its size fall with that distance:

    g_ik = dL/dw_i · sign(C_k - C_I) · phi(|C_k - C_I|)

>>> table = torch.tensor([[-4.0, -1.0, 0.0, 1.0, 4.0]])
>>> scores = torch.tensor([[[0.0, 0.0, 1e-6, 0.0, 0.0]]], requires_grad=True)
>>> owner = torch.zeros(1, dtype=torch.long)
>>> for gradient in ("plain", "inverse"):
...     w = chosen(table, scores, owner, gradient)
...     (g,) = torch.autograd.grad(-w.sum(), scores)  # to be larger
...     print(gradient, [round(x, 1) for x in (-g).flatten().tolist()])
plain [-0.8, -0.2, 0.0, 0.2, 0.8]
inverse [-0.5, -1.7, 0.0, 1.7, 0.5]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from neuropil.compress.quantize.quantizer import FakeQuantizer
from neuropil.packed import Lookup

PHI = ("inverse", "exponential", "neighbours")
EPSILON, TAU = 0.1, 0.5  # of phi, in mean distances between codewords that are next to one another


def spacing(table: Float[Tensor, "G K"]) -> Float[Tensor, "G 1"]:
    """The mean distance between neighbouring codewords of each group; 1 where there is only one."""
    width = (table.amax(1, keepdim=True) - table.amin(1, keepdim=True)) / max(1, table.shape[1] - 1)
    return torch.where(width > 0, width, torch.ones_like(width))


def closeness(table: Float[Tensor, "G K"], phi: str) -> Float[Tensor, "G K K"]:
    """`sign(C_k - C_i) phi(|C_k - C_i|)` for all pairs of codewords `[i, k]` of a group."""
    difference = table[:, None, :] - table[:, :, None]
    distance = difference.abs() / spacing(table)[..., None]
    if phi == "neighbours":
        place = table.argsort(dim=1, stable=True).argsort(1)
        size = ((place[:, None, :] - place[:, :, None]).abs() == 1).to(table)
    else:
        size = 1 / (distance + EPSILON) if phi == "inverse" else (-distance / TAU).exp()
    return difference.sign() * size


class _Chosen(torch.autograd.Function):
    """`table[owner, argmax scores]` with one of the gradients above for the scores, and a sum for the codewords."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, scores: Tensor, owner: Tensor, gradient: str, soft: bool) -> Tensor:
        codes = scores.argmax(-1)
        ctx.save_for_backward(table, scores, owner, codes)
        ctx.gradient, ctx.soft = gradient, soft
        if soft:
            return torch.einsum("rfk,rk->rf", scores.softmax(-1), table[owner])
        return table[owner[:, None], codes]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (incoming,) = gradients
        table, scores, owner, codes = ctx.saved_tensors
        own = table[owner]
        p = scores.softmax(-1) if ctx.soft or ctx.gradient == "plain" else None
        if ctx.gradient == "plain":
            assert p is not None
            mean = torch.einsum("rfk,rk->rf", p, own)
            slope = p * (own[:, None, :] - mean[..., None])
        else:
            slope = closeness(table, ctx.gradient)[owner[:, None], codes]
        for_table = torch.zeros_like(table)
        if ctx.soft:
            assert p is not None
            for_table.index_add_(0, owner, torch.einsum("rf,rfk->rk", incoming, p))
        else:
            place = owner[:, None] * table.shape[1] + codes
            for_table.view(-1).index_add_(0, place.flatten(), incoming.flatten())
        return for_table, incoming[..., None] * slope, None, None, None


def chosen(
    table: Float[Tensor, "G K"],
    scores: Float[Tensor, "rows fan K"],
    owner: Integer[Tensor, " rows"],
    gradient: str = "inverse",
    soft: bool = False,
) -> Float[Tensor, "rows fan"]:
    """The weights that scores choose from the codebooks of their rows' groups.

    `gradient` is "plain", or the phi of the proximal one: "inverse" 1 / (d + 0.1), "exponential" exp(-2 d),
    "neighbours" (1 for the codewords next to the chosen one, 0 beyond), with distances d in units of the mean distance
    between neighbours. `soft` takes the mean under the softmax of the scores instead of the best one.
    """
    found: Tensor = _Chosen.apply(table, scores, owner, gradient, soft)
    return found


def nearest(table: Float[Tensor, "G K"], w: Float[Tensor, "rows fan"], owner: Integer[Tensor, " rows"]) -> Tensor:
    """The index of the codeword nearest to each weight, `[rows, fan]`."""
    order = table.argsort(dim=1, stable=True)
    ordered = table.gather(1, order)
    threshold = ((ordered[:, 1:] + ordered[:, :-1]) / 2)[owner].contiguous()
    return order[owner].gather(1, torch.searchsorted(threshold, w.contiguous()))


class SharedAdam(torch.optim.Optimizer):
    """Adam whose rate falls linearly to zero, and whose second moment is one for all scores of a weight.

    Adam as it is divides each number's gradient by its own size, which takes away what tells near codewords from far
    ones. Groups of parameters with `shared=True` are divided by the root mean square over their last dimension.
    """

    def __init__(self, params: Any, lr: float, steps: int, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "shared": False, "steps": steps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                size = p.grad.square()
                size = size.mean(-1, keepdim=True) if group["shared"] else size
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "mean": torch.zeros_like(p), "size": torch.zeros_like(size)}
                state["step"] += 1
                t = state["step"]
                state["mean"].lerp_(p.grad, 1 - first)
                state["size"].lerp_(size, 1 - second)
                below = (state["size"] / (1 - second**t)).sqrt_().add_(1e-12)
                rate = group["lr"] * max(0.0, 1 - (t - 1) / group["steps"]) / (1 - first**t)
                p.sub_(rate * state["mean"] / below)


class CodebookWeight(FakeQuantizer):
    """The weight of one layer as codewords: a parametrization that makes it of its codebooks and mapping alone.

    Parameters
    ----------
    book, scale: `[G, K]` codebooks, or one of `[1, K]` with a scale `[G, 1]` for each group.
    w, codes: the weight as a matrix, and where each of its numbers begins.
    owner: the group of each row; `sizes` are kept in its place where neighbouring rows have the same.
    """

    def __init__(
        self,
        book: Float[Tensor, "B K"],
        scale: Float[Tensor, "G 1"] | None,
        codes: Integer[Tensor, "rows fan"],
        owner: Integer[Tensor, " rows"],
        sizes: list[int] | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.book = nn.Parameter(book)
        self.scale = None if scale is None else nn.Parameter(scale)
        self.codes, self.owner, self.sizes, self.dtype = codes, owner, sizes, dtype
        self.scores: nn.Parameter | None = None
        self.latent: nn.Parameter | None = None
        self.gradient, self.soft, self.settled = "inverse", False, True
        self.settle()

    @property
    def table(self) -> Float[Tensor, "G K"]:
        """The codewords of each group."""
        return self.book if self.scale is None else self.scale * self.book

    def begin(
        self,
        w: Float[Tensor, "rows fan"],
        gradient: str,
        form: str = "scores",
        soft: bool = False,
        start: str = "distance",
        sharpness: float = 1.0,
    ) -> None:
        """Make the mapping something that can be learned: scores, or latent weights that take the nearest codeword."""
        gap = spacing(self.table.detach())
        self.gradient, self.soft, self.settled = gradient, soft, False
        if form == "latent":
            self._unit = gap[self.owner]
            self.latent = nn.Parameter(self._beside(w) / self._unit)
        elif start == "index":
            scores = w.new_zeros(*w.shape, self.table.shape[1])
            self.scores = nn.Parameter(scores.scatter(-1, self.codes[..., None], sharpness))
        else:
            own = self.table.detach()[self.owner]
            far = (w[..., None] - own[:, None, :]).abs() / gap[self.owner][..., None]
            best = (-sharpness * far).amax(-1, keepdim=True) + 1e-6
            self.scores = nn.Parameter((-sharpness * far).scatter(-1, self.codes[..., None], best))

    def _beside(self, w: Tensor) -> Tensor:
        """The weights, and for those whose codeword is not the nearest, that codeword."""
        table = self.table.detach()
        return torch.where(nearest(table, w, self.owner) == self.codes, w, table[self.owner[:, None], self.codes])

    def learned(self, lr: float, book_lr: float) -> list[dict[str, Any]]:
        """Groups of parameters for `SharedAdam`; the rates are in units of the distance between codewords."""
        groups: list[dict[str, Any]] = []
        books = [self.book] if self.scale is None else [self.book, self.scale]
        for p in books:
            unit = float(p.detach().abs().mean()) if p is self.scale else float(spacing(p.detach()).mean())
            groups.append({"params": [p], "lr": book_lr * unit})
        if self.scores is not None:
            groups.append({"params": [self.scores], "lr": lr, "shared": True})
        if self.latent is not None:
            groups.append({"params": [self.latent], "lr": lr})
        return groups

    def settle(self) -> None:
        """Fix the mapping as it is, and round the codebooks to what is stored."""
        with torch.no_grad():
            self.codes = self.current()
            self.scores = self.latent = None
            for p in (self.book, self.scale):
                if p is not None:
                    p.copy_(p.to(self.dtype))
        self.settled = True

    def current(self) -> Integer[Tensor, "rows fan"]:
        """The codeword of each weight."""
        if self.scores is not None:
            return self.scores.argmax(-1)
        if self.latent is not None:
            return nearest(self.table.detach(), self.latent.detach() * self._unit, self.owner)
        return self.codes

    def state(self) -> tuple[Tensor, ...]:
        """What a settled weight is, to be put back by `restore`."""
        parts = (self.codes, self.book.detach(), *(() if self.scale is None else (self.scale.detach(),)))
        return tuple(part.clone() for part in parts)

    def restore(self, state: Iterable[Tensor]) -> None:
        self.codes, book, *scale = state
        self.scores = self.latent = None
        self.settled = True
        self.book.data.copy_(book)
        if self.scale is not None:
            self.scale.data.copy_(scale[0])

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        table = self.table
        if self.scores is not None:
            made = chosen(table, self.scores, self.owner, self.gradient, self.soft)
        else:
            if self.settled and self.scale is not None:  # as the packing computes it
                exact = (self.scale.to(self.dtype) * self.book.to(self.dtype)).to(table.dtype)
                table = table + (exact - table).detach()
            made = table[self.owner[:, None], self.current()]
            if self.latent is not None:
                made = made + (self.latent - self.latent.detach()) * self._unit
        return made.reshape(w.shape).to(w.dtype)

    def pack(self, w: Float[Tensor, "*shape"]) -> Lookup:
        kept = {"sizes": self.sizes} if self.sizes is not None else {"owner": self.owner}
        if int(self.owner.max()) == 0:
            kept = {}
        scale = None if self.scale is None else self.scale.detach().to(self.dtype)
        book = self.book.detach().to(self.dtype)[:, None, :, None]
        return Lookup.of(self.codes.int(), book, tuple(w.shape), scale, **kept)
