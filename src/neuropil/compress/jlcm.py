r"""Weights in two or three bits each, as indices into codebooks that suit each group of neurons.

A layer's neurons are grouped by how their weights are distributed and put in an order in which each group is in one
piece; then every group has a codebook $C_g$ of its own (or a scale, with one codebook for all), and which one a weight
uses costs no bits: it follows from the neuron's place.

$$ \hat w_{ij} = C_{g(i)}[I_{ij}] \qquad \text{bits} = b \cdot \text{weights} + 16\, G\, 2^b + G \lceil \log_2
\text{rows} \rceil $$

Given a few unlabelled batches, codebooks and indices are then learned together, so that each layer answers what it
answered, $\min_{C, I} \lVert f(x; W) - f(\hat x; \hat W) \rVert^2$. Indices move by a gradient that favours near
codewords (`gradient="proximal"`) and the codebooks end as the exact solution of a small linear system.

>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
>>> data = [torch.randn(256, 8) @ torch.randn(8, 32)]
>>> small = learn_codebooks(model, bits=2, groups=4).model
>>> learned = learn_codebooks(model, bits=2, groups=4, calibration=data, steps=200).model
>>> error = lambda net: (net(data[0]) - model(data[0])).square().mean().item()
>>> error(learned) < error(small) / 3
True
>>> print(size_report(learned))
2560 weights in 2.23 bits each (712 bytes), 14.4 times smaller than they were

Where neurons can change places is found by `torch.fx` (chains of layers, norms and nonlinearities) or, in models that
it cannot follow, by `neuropil.neurons` (MLPs) and the names of attention layers (values, within a head). Elsewhere
rows stay where they are and each keeps the number of its group, ceil(log2 G) bits a row: that says all that the paper's
stored permutation says, in fewer bits. Queries and keys are among these: rotary embeddings give every pair of rows a
frequency by its place, so they cannot be permuted.

Left open by what could be read of the paper, and chosen here: rows are grouped by k-means on the quantiles of
their weights; levels begin as optimal one-dimensional k-means; phi(d) = 1 / (d + 0.1); forward passes use the indices
(`soft=True` takes the softmax mean); Adam with one second moment for all scores of a weight (see `SharedAdam`), with a
rate that falls linearly. What is learned is kept only if the layer's error on the calibration is lower.

Source: Yvinec, Dapogny and Bailly, "Network Memory Footprint Compression Through Jointly Learnable Codebooks and
Mappings", ICLR 2024, arXiv:2309.17361.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuropil.changes import Changes
from neuropil.compress import _jlcm_kmeans as kmeans
from neuropil.compress._jlcm_learn import How, learn_layers, tune
from neuropil.compress._jlcm_mapping import PHI, CodebookWeight, nearest
from neuropil.compress._jlcm_order import Run, reorder, runs
from neuropil.compress._jlcm_size import SizeReport, codebook_bits, partial_sums, size_report
from neuropil.compress._jlcm_solve import by_weights
from neuropil.compress.quantize.models import bake, layers, weight_of
from neuropil.compress.quantize.tiles import QuantizationError, working
from neuropil.compress.reconstruction import first, run
from neuropil.evaluate import evaluating

__all__ = ["SizeReport", "codebook_bits", "learn_codebooks", "partial_sums", "size_report"]

Per = int | Mapping[str, int]


def learn_codebooks(
    model: nn.Module,
    bits: Per = 2,
    groups: Per = 8,
    *,
    mode: str = "codebooks",
    calibration: Iterable[Any] | None = None,
    gradient: str = "proximal",
    phi: str = "inverse",
    form: str = "auto",
    learn: str = "both",
    soft: bool = False,
    start: str = "distance",
    sharpness: float = 1.0,
    blocks: Sequence[str] = (),
    loss: Callable[[Any], Tensor] | None = None,
    loss_steps: int = 100,
    steps: int = 1000,
    batch: int = 32,
    lr: float = 1e-2,
    book_lr: float = 1e-2,
    feature: str = "quantiles",
    balanced: bool = False,
    partners: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
    skip: Sequence[str] = (),
    seed: int = 0,
) -> Changes:
    """A copy of the model whose weights are packed as codebooks and indices (`neuropil.packed.Lookup`).

    Parameters
    ----------
    bits, groups: of every layer, or by name: `{"head": 4, "*": 2}` (with * and ?; the first pattern that fits
        counts, a layer that none fits is left). Layers with fewer different weights get smaller codebooks.
    mode: "codebooks", one for each group, or "scales", one for the layer and a scale for each group.
    calibration: batches without labels: tensors, tuples of arguments or dicts of them. Without them nothing is
        learned: groups and k-means alone.
    gradient, phi: "proximal" with phi "inverse", "exponential" or "neighbours", or "plain", that of a softmax.
    form: of the mapping: "scores", one for each weight and codeword, "latent", one number a weight that takes the
        nearest codeword (straight-through; proximal by nature), or "auto": scores up to 16 million of them.
    learn: "both", or "codebooks" with the indices of k-means.
    soft: train with the mean over codewords under the softmax of the scores.
    start, sharpness: scores begin as minus the distance from weight to codeword, times the sharpness, or ("index")
        as the sharpness for the codeword of k-means and 0 for all others.
    blocks: modules whose outputs are kept instead of those of the layers in them.
    loss, loss_steps: of the model's answer; the codebooks of all layers are tuned on it at the end.
    steps, batch, lr, book_lr: of each layer or block; rates in units of the distance between codewords.
    feature, balanced: what rows are grouped by ("quantiles", "std", "max"); whether groups are of one size.
    partners: layers whose rows can be permuted, and the layer that alone reads them; in addition to those found.
    dtype: of codebooks and scales as they are stored.

    Embeddings, tied layers and layers that the first batch does not reach are not learned, only fitted. For
    transposed convolutions and transformers' Conv1D the rows that are grouped are inputs.
    Raises QuantizationError (a ValueError) for bits outside 1 to 8, more groups than rows, weights with NaN, unknown
    settings and a model that is packed; ReconstructionError for an empty calibration. Warns where re-ordering changes
    what the model answers to the first batch, and keeps every row where it was.
    """
    _check(mode=mode, gradient=gradient, phi=phi, form=form, learn=learn, start=start, feature=feature)
    batches = None if calibration is None else list(calibration)
    plain = copy.deepcopy(model)
    plan, left = _plan(plain, bits, groups, skip)
    owners = _grouped(plain, plan, model, batches, partners, feature, balanced, seed)
    work = copy.deepcopy(plain)
    made = _fitted(work, plan, owners, mode, dtype)
    if batches is not None:
        how = How(
            gradient=gradient if gradient == "plain" else phi, form=form, learn=learn, soft=soft, start=start,
            sharpness=sharpness, steps=steps, batch=batch, lr=lr, book_lr=book_lr, seed=seed,
        )  # fmt: skip
        learn_layers(plain, work, made, batches, blocks, how)
        if loss is not None:
            tune(work, made, batches, loss, loss_steps, book_lr)
    baked = bake(work)
    return Changes(baked.model, tuple(plan), left)


_CHOICES = {
    "mode": ("codebooks", "scales"),
    "gradient": ("proximal", "plain"),
    "phi": PHI,
    "form": ("auto", "scores", "latent"),
    "learn": ("both", "codebooks"),
    "start": ("distance", "index"),
    "feature": kmeans.FEATURES,
}


def _check(**given: str) -> None:
    for name, value in given.items():
        if value not in _CHOICES[name]:
            raise QuantizationError(f"{name}={value!r}: expected one of {', '.join(_CHOICES[name])}")
    if given["gradient"] == "plain" and given["form"] == "latent":
        raise QuantizationError('form="latent" is proximal by nature: gradient="plain" needs form="scores"')


def _plan(
    model: nn.Module, bits: Per, groups: Per, skip: Sequence[str]
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Bits and groups of each layer, checked; why each other was left."""
    found, left = layers(model, skip)
    plan = {}
    for name, module in found.items():
        b, g, rows = _of(bits, name), _of(groups, name), weight_of(module).shape[0]
        if b is None or g is None:
            left[name] = "no pattern names it"
            continue
        if not 1 <= b <= 8:
            raise QuantizationError(f"{name}: bits={b}, expected 1 to 8")
        if not 1 <= g <= rows:
            raise QuantizationError(
                f"{name}: groups={g} for {rows} rows of weights; expected 1 to {rows}. Give layers their own, as "
                f'groups={{"{name}": {rows}, "*": {g}}}, or skip it'
            )
        plan[name] = (b, g)
    if not plan:
        raise QuantizationError(f"{type(model).__name__} has no layer that can be compressed ({left})")
    return plan, left


def _of(per: Per, name: str) -> int | None:
    if isinstance(per, int):
        return per
    return next((value for pattern, value in per.items() if fnmatchcase(name, pattern)), None)


# ------------------------------------------------------------------------------------------------ groups of rows


@dataclass(frozen=True)
class _Groups:
    """The group of each row, and the sizes of groups where rows are in their order."""

    owner: Tensor
    sizes: list[int] | None = None


def _grouped(
    plain: nn.Module,
    plan: Mapping[str, tuple[int, int]],
    model: nn.Module,
    batches: Sequence[Any] | None,
    partners: Mapping[str, str] | None,
    feature: str,
    balanced: bool,
    seed: int,
) -> dict[str, _Groups]:
    """Groups of rows for all layers; where rows can change places, `plain` is re-ordered."""
    rows = {name: working(weight_of(plain.get_submodule(name))).flatten(1) for name in plan}
    found: dict[str, _Groups] = {}
    for each in runs(plain, partners):
        if all(name in plan and plan[name][1] == plan[each.layers[0]][1] for name in each.layers):
            found |= _in_order(plain, each, rows, plan[each.layers[0]][1], feature, balanced, seed)
    if found and batches and not _same_answer(plain, model, batches[0]):
        warnings.warn(
            f"putting neurons of {type(model).__name__} in another order changes its answers: every row stays where it "
            "is and keeps the number of its group; say which layers read which with partners=",
            stacklevel=3,
        )
        plain.load_state_dict(model.state_dict())
        found = {}
    for name in plan:
        if name not in found:
            features = kmeans.describe(rows[name], feature)
            found[name] = _Groups(kmeans.group(features, plan[name][1], balanced=balanced, seed=seed))
    return found


def _in_order(
    plain: nn.Module, each: Run, rows: Mapping[str, Tensor], count: int, feature: str, balanced: bool, seed: int
) -> dict[str, _Groups]:
    """Group the rows of a run's layers together, and put them in the order of the groups."""
    features = torch.cat([kmeans.describe(rows[name], feature) for name in each.layers], dim=1)
    owner = kmeans.group(features, count, balanced=balanced, head=each.head, seed=seed)
    key = owner if not each.head else owner + torch.arange(each.rows) // each.head * count
    order = key.argsort(stable=True)
    reorder(plain, each, order)
    owner = owner[order]
    return dict.fromkeys(each.layers, _Groups(owner, owner[: each.head or each.rows].bincount().tolist()))


@torch.no_grad()
def _same_answer(a: nn.Module, b: nn.Module, batch: Any) -> bool:
    with evaluating(a), evaluating(b):
        one, two = first(run(a, batch)), first(run(b, batch))
    near = 1000 * torch.finfo(two.dtype).eps * float(two.abs().mean())
    return bool(((one - two).abs() <= near + 1000 * torch.finfo(two.dtype).eps * two.abs()).all())


def _fitted(
    work: nn.Module, plan: Mapping[str, tuple[int, int]], owners: Mapping[str, _Groups], mode: str, dtype: torch.dtype
) -> dict[str, CodebookWeight]:
    """Put k-means codebooks in the place of weights, in place; the weight of each layer. Tied layers share theirs."""
    made: dict[str, CodebookWeight] = {}
    tied: dict[int, str] = {}
    originals = {name: work.get_submodule(name)._parameters["weight"] for name in plan}
    for name in plan:
        module = work.get_submodule(name)
        if parametrize.is_parametrized(module):  # one module of two names
            continue
        source = tied.setdefault(id(originals[name]), name)
        if source == name:
            w, owner = working(weight_of(module)).flatten(1), owners[name].owner.to(weight_of(module).device)
            book, scale = by_weights(w, owner, 2 ** plan[name][0], mode)
            if max(float(p.abs().max()) for p in (book, scale) if p is not None) > torch.finfo(dtype).max:
                raise QuantizationError(
                    f"{name}: its weights are too large for codebooks in {dtype}; give another dtype"
                )
            codes = nearest(book if scale is None else scale * book, w, owner)
            made[name] = CodebookWeight(book, scale, codes, owner, owners[name].sizes, dtype)
        parametrize.register_parametrization(module, "weight", made[source])
    return made
