r"""Vector quantization: one code for several neighbouring weights, an entry of a codebook of short vectors.

>>> from neuropil.compress.quantize import quantize_model
>>> from neuropil.packed import nbytes
>>> model = nn.Sequential(nn.Linear(512, 256))
>>> made = quantize_model(model, ProductQuantizer(dim=8, centroids=64)).model
>>> nbytes(made) / nbytes(model) < 1 / 30  # 6 bits for 8 weights, and the codebook
True

`product_quantize` weighs the error by what the layer reads: for a block $j$ of inputs with second moment
$G_j = E[x_j x_j^\top]$ it minimises $\sum (v - c)^\top G_j (v - c)$, so that outputs, not weights, stay near.
`finetune_codebooks` then trains the entries by gradient: each has the sum of the gradients of the weights that
it stands for.

Left open by the survey: an entry that no vector chooses is moved to the vector that is served worst; where there are
no more different vectors than entries, they are the entries and nothing is lost. Of layers whose outputs lie along
dimension 1, of 3-d and of grouped convolutions the inputs are not gathered: there the error of the weights counts.

Sources: Gong, Liu, Yang and Bourdev 2014, arXiv:1412.6115; Stock et al. 2020, arXiv:1907.05686 ("And the bit goes
down").
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from neuropil.changes import Changes
from neuropil.compress.quantize.models import layers, pack_layers, run_batches, weight_of
from neuropil.compress.quantize.quantizer import FakeQuantizer, straight_through
from neuropil.compress.quantize.tiles import QuantizationError, check_finite, working
from neuropil.packed import Lookup, Packing, packed_modules, unpack

CHUNK = 1 << 22  # scores computed at a time


class ProductQuantizer(FakeQuantizer):
    """k-means over vectors of `dim` neighbouring weights of a row, with `centroids` entries.

    codebook: one for the whole "layer" (the entries share the work), or one for each "block" of dim columns.
    rounds: of k-means; fewer where nothing changes. seed: of the first entries, which are vectors drawn evenly.
    """

    def __init__(
        self, dim: int = 4, centroids: int = 256, codebook: str = "layer", rounds: int = 25, seed: int = 0
    ) -> None:
        super().__init__()
        if codebook not in ("layer", "block"):
            raise QuantizationError(f'codebook={codebook!r}: expected "layer" or "block"')
        if dim < 1 or not 2 <= centroids <= 1 << 16:
            raise QuantizationError(f"dim={dim}, centroids={centroids}: expected 1 or more, and 2 to 65536")
        self.dim, self.centroids, self.codebook, self.rounds, self.seed = dim, centroids, codebook, rounds, seed

    def settings(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("dim", "centroids", "codebook", "rounds", "seed")}

    def vectors(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "blocks rows dim"]:
        """The sub-vectors of a weight, by the block of columns they stand in."""
        fan = w.shape[1:].numel()
        if fan % self.dim:
            raise QuantizationError(
                f"vectors of {self.dim} do not divide the {fan} weights a row of a weight of shape {list(w.shape)}"
            )
        return w.reshape(len(w), fan // self.dim, self.dim).transpose(0, 1)

    def pack(self, w: Float[Tensor, "*shape"], moment: Float[Tensor, "blocks dim dim"] | None = None) -> Packing:
        """The weight as codes into a codebook; `moment` is the second moment of the inputs of each block."""
        check_finite(w, "the weight")
        vectors = self.vectors(working(w))
        blocks, rows, _ = vectors.shape
        shared = self.codebook == "layer"
        if moment is None and shared:
            codes, table = kmeans_vectors(
                vectors.reshape(1, -1, self.dim), self.centroids, None, self.rounds, self.seed
            )
            codes = codes.reshape(blocks, rows)
        else:
            codes, table = kmeans_vectors(vectors, self.centroids, moment, self.rounds, self.seed, shared)
        return Lookup.of(codes.T, table[None], w.shape)

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return straight_through(w, self.pack(w).dense().to(w.dtype))

    def extra_repr(self) -> str:
        return f"{self.centroids} vectors of {self.dim}, one codebook a {self.codebook}"


def kmeans_vectors(
    vectors: Float[Tensor, "blocks rows dim"],
    count: int,
    moment: Float[Tensor, "blocks dim dim"] | None = None,
    rounds: int = 25,
    seed: int = 0,
    shared: bool = False,
) -> tuple[Integer[Tensor, "blocks rows"], Float[Tensor, "books K dim"]]:
    """Codes and codebooks of least (weighted) squared error: one codebook a block, or one for all if `shared`."""
    blocks, _, dim = vectors.shape
    weigh = moment if moment is not None else torch.eye(dim).to(vectors).expand(blocks, dim, dim)
    pools = vectors.reshape(1, -1, dim) if shared else vectors
    cheap = pools.shape[1] <= count or pools[..., 0].numel() <= 1 << 20  # sorting vectors takes its time
    few = [pool.unique(dim=0) for pool in pools] if cheap else []
    if few and max(len(pool) for pool in few) <= count:
        size = max(2, max(len(pool) for pool in few))
        table = torch.stack([pool[torch.arange(size).clamp(max=len(pool) - 1)] for pool in few])
        return _assign(vectors, table, torch.eye(dim).to(vectors).expand(blocks, dim, dim))[0], table
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randperm(pools.shape[1], generator=generator)[:count] for _ in pools]).to(vectors.device)
    table = torch.stack([pool[at] for pool, at in zip(pools, drawn, strict=True)])
    codes, errors = _assign(vectors, table, weigh)
    for _ in range(rounds):
        table = _update(vectors, codes, table, weigh, errors)
        new, errors = _assign(vectors, table, weigh)
        if torch.equal(new, codes):
            break
        codes = new
    return codes, table


def _assign(vectors: Tensor, table: Tensor, weigh: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest entry of each vector, `[blocks, rows]`, and the error that it leaves."""
    towards = table.expand(len(vectors), -1, -1) @ weigh  # [blocks, K, dim]
    half = (towards * table).sum(-1) / 2
    own = ((vectors @ weigh) * vectors).sum(-1)
    step = max(1, CHUNK // max(1, half.numel()))
    codes, errors = [], []
    for part, size in zip(vectors.split(step, dim=1), own.split(step, dim=1), strict=True):
        best, code = (part @ towards.mT - half[:, None]).max(-1)
        codes.append(code)
        errors.append(size - 2 * best)
    return torch.cat(codes, 1), torch.cat(errors, 1)


def _update(vectors: Tensor, codes: Tensor, table: Tensor, weigh: Tensor, errors: Tensor) -> Tensor:
    """Entries at the weighted mean of their vectors; those of none go to the vectors with the greatest errors."""
    blocks, _, dim = vectors.shape
    books, count, _ = table.shape
    n = vectors.new_zeros(blocks, count).scatter_add_(1, codes, torch.ones_like(codes, dtype=vectors.dtype))
    s = vectors.new_zeros(blocks, count, dim).scatter_add_(1, codes[..., None].expand(-1, -1, dim), vectors)
    if books == blocks:  # all vectors of a codebook are weighed alike: the plain mean is best
        made = s / n.clamp_min(1)[..., None]
    else:
        a = torch.einsum("jk,jde->kde", n, weigh).double()
        b = torch.einsum("jde,jke->kd", weigh, s).double()
        ridge = 1e-9 * weigh.diagonal(dim1=-2, dim2=-1).mean().double() * n.sum(0).clamp_min(1)
        made = torch.linalg.solve(a + ridge[:, None, None] * torch.eye(dim).to(a), b)[None].to(table.dtype)
    used = n.sum(0, keepdim=True) if books != blocks else n
    pools, worst = (vectors, errors) if books == blocks else (vectors.reshape(1, -1, dim), errors.reshape(1, -1))
    for book in range(books):
        empty = (used[book] == 0).nonzero().flatten()
        made[book, empty] = pools[book][worst[book].topk(len(empty)).indices]
    return made


# ------------------------------------------------------------------------------------------- what layers read


def _columns(module: nn.Module, x: Tensor) -> Tensor | None:
    """`[positions, fan]`: what each row of the layer's weight is multiplied by; None where that is not gathered."""
    if isinstance(module, nn.Linear):
        return x.flatten(0, -2)
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or module.groups > 1 or isinstance(module.padding, str):
        return None
    if module.padding_mode != "zeros":
        return None
    spatial = [module.kernel_size, module.dilation, module.padding, module.stride]
    if isinstance(module, nn.Conv1d):
        x = x[..., None, :]
        spatial = [(1, *spatial[0]), (1, *spatial[1]), (0, *spatial[2]), (1, *spatial[3])]
    kernel, dilation, padding, stride = (tuple(int(n) for n in pair) for pair in spatial)
    return functional.unfold(x, kernel, dilation, padding, stride).mT.flatten(0, 1)


def input_moments(
    model: nn.Module, data: Iterable[Any], dim: int, skip: Iterable[str] = ()
) -> dict[str, Float[Tensor, "blocks dim dim"]]:
    """E[x x^T] of each block of `dim` neighbouring inputs of each layer, by the layer's name.

    Raises QuantizationError where there is no batch.
    """
    found, _ = layers(model, skip)
    sums: dict[str, Tensor] = {}
    seen: dict[str, int] = {}

    def gather(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        columns = _columns(module, args[0].detach())
        if columns is None or columns.shape[-1] % dim:
            return
        blocks = working(columns).reshape(len(columns), -1, dim)
        total = torch.einsum("nbi,nbj->bij", blocks, blocks)
        sums[name] = sums[name] + total if name in sums else total
        seen[name] = seen.get(name, 0) + len(columns)

    hooks = [module.register_forward_pre_hook(partial(gather, name)) for name, module in found.items()]
    try:
        run_batches(model, data)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / seen[name] for name, total in sums.items()}


def product_quantize(
    model: nn.Module,
    quantizer: ProductQuantizer | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    skip: Iterable[str] = (),
) -> Changes:
    """A copy of the model with codebooks in the place of its weights, weighed by what its layers read.

    Without `calibration` the error of the weights is what counts. Raises QuantizationError where the calibration is
    empty and where vectors do not divide a layer (named).
    """
    quantizer = quantizer or ProductQuantizer()
    skip = tuple(skip)
    moments = input_moments(model, calibration, quantizer.dim, skip) if calibration is not None else {}

    def make(name: str, module: nn.Module) -> Packing:
        try:
            return quantizer.pack(weight_of(module), moments.get(name))
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from error

    return pack_layers(model, make, skip)


# ------------------------------------------------------------------------------------------------- fine-tuning


class Codebook(FakeQuantizer):
    """A parametrization whose weight is made of a trainable table and fixed codes. Entries of exactly 0 stay 0."""

    codes: Tensor
    scale: Tensor

    def __init__(self, packing: Lookup) -> None:
        super().__init__()
        self.shape = packing.shape
        self.table = nn.Parameter(packing.table.detach().clone())
        self.register_buffer("codes", packing.codes)
        self.register_buffer("scale", packing.scale)

    def settings(self) -> dict[str, Any]:
        return {"packing": self._packing(self.table.detach())}

    def for_layer(self, module: nn.Module) -> Codebook:
        raise QuantizationError("a codebook belongs to one weight: use finetune_codebooks")

    def _packing(self, table: Tensor) -> Lookup:
        made = Lookup(self.shape, levels=table.shape[2])
        for name, value in (("codes", self.codes), ("table", table), ("scale", self.scale)):
            made.register_buffer(name, value)
        return made

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self._packing(self.table * (self.table.detach() != 0)).dense().to(w.dtype)

    def pack(self, w: Tensor) -> Packing:
        return copy.deepcopy(self._packing(self.table.detach()))


def finetune_codebooks(model: nn.Module) -> Changes:
    """A copy of a packed model whose codebooks are parameters, to be trained with any optimizer; `bake` packs it again.

    Packed weights that are not of levels or vectors are named in `left`; they stay packed.
    """
    made = copy.deepcopy(model)
    found: dict[str, Codebook] = {}
    left: dict[str, str] = {}
    shared: dict[int, Codebook] = {}
    for name, _, packing in list(packed_modules(made)):
        if isinstance(packing, Lookup):
            found[name] = shared.setdefault(id(packing), Codebook(packing))
        else:
            left[name] = f"its weight is {type(packing).__name__}, which has no codebook"
    kept = {name: made.get_submodule(name) for name in left}
    unpack(made)
    for name, module in kept.items():
        parent, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(parent), leaf, module)
    for name, codebook in found.items():
        module = made.get_submodule(name)
        plain = module._parameters["weight"]
        assert plain is not None
        plain.requires_grad_(False)
        parametrize.register_parametrization(module, "weight", codebook)
    return Changes(made, tuple(found), left)
