"""Whole models for `neuropil.compress.ofq`: prepared for training, annealed at its end, packed after it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuropil.changes import Changes
from neuropil.compress.ofq import LsqActivation, StatsQuantizer
from neuropil.compress.ofq_attention import Parts, QKRAttention, QueryKey, parts_of
from neuropil.compress.quantize.learned import LSQ
from neuropil.compress.quantize.models import bake, layers, qat_prepare, round_inputs, run_batches
from neuropil.compress.quantize.quantizer import FakeQuantizer
from neuropil.compress.quantize.tiles import QuantizationError

ENDS = ("first", "last", "*classifier", "*head", "*head_dist")
AFTER_GELU = ("*fc2", "*linear2")


def ofq_quantize(
    model: nn.Module,
    w_bits: int = 2,
    a_bits: int = 2,
    *,
    weights: FakeQuantizer | None = None,
    qkr: bool = True,
    end_bits: int = 8,
    ends: Sequence[str] = ENDS,
    unsigned: Sequence[str] = AFTER_GELU,
    tokens: int = 0,
    skip: Sequence[str] = (),
    calibration: Iterable[Any] | None = None,
) -> Changes:
    """A copy whose weights and activations are rounded, ready to be trained from the weights that it has.

    Parameters
    ----------
    w_bits, a_bits: of weights and activations; 32 leaves them as they are.
    weights: another quantizer of weights, for comparison; `StatsQuantizer(w_bits)` by default. Without it, QKR is used.
    qkr: whether attention is replaced by `QKRAttention` where that applies; where not, `left` says why.
    end_bits, ends: bits of weights (LSQ, a step for each channel) and inputs of the layers at the ends: names,
        patterns, and the words "first" and "last".
    unsigned: layers that read what is not negative, nearly (the outputs of GELU).
    tokens: how many tokens the model reads, for steps of activations of their own; by default they share one.
    skip: names or patterns of layers to leave.
    calibration: batches that set the first steps of the activations; else the first batch of the training does.

    Embeddings stay, and so do inputs of layers in an `nn.MultiheadAttention` that is not replaced. Raises
    QuantizationError for bits out of range, NaN weights (named), an empty calibration and a packed model.
    """
    made, replaced, why = _attention(model, w_bits, a_bits, tokens, skip, qkr and weights is None)
    inside = tuple(f"{name}.*" for name in replaced)
    found, _ = layers(made, [*skip, *inside])
    embeddings = {n for n, m in found.items() if isinstance(m, nn.Embedding)}
    names = [n for n in found if n not in embeddings]
    outer = _expanded(ends, names)
    recipe: dict[str, FakeQuantizer] = {}
    if end_bits < 32:
        recipe |= {n: LSQ(end_bits, granularity="channel") for n in outer}
    if w_bits < 32:
        recipe |= {n: weights or StatsQuantizer(w_bits) for n in names if n not in outer}
    changes = qat_prepare(made, recipe, skip=[*skip, *inside, *embeddings])
    for name in changes.changed:
        module = changes.model.get_submodule(name)
        if isinstance(changes.model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            continue  # it does not call its layers
        if name in outer:
            round_inputs(changes.model, LsqActivation(end_bits), [name])
        elif isinstance(module, nn.Linear):
            signed = not any(fnmatchcase(name, pattern) for pattern in unsigned)
            one = tokens if _reads_tokens(name) else 0
            round_inputs(changes.model, LsqActivation(a_bits, signed, module.in_features, one), [name])
        else:
            round_inputs(changes.model, LsqActivation(a_bits), [name])
    if calibration is not None:
        run_batches(changes.model, calibration)
    before = {n for n, _ in model.named_modules(remove_duplicate=False)}
    left = {n: r for n, r in changes.left.items() if n in before}
    left |= dict.fromkeys(embeddings, "an embedding is read by token")
    old = [n for name in replaced for n in _inner(model, name)]
    return Changes(changes.model, (*changes.changed, *old), {**left, **why})


def _reads_tokens(name: str) -> bool:
    """Whether a layer reads all tokens: poolers and the like read one."""
    return "pooler" not in name


def _inner(model: nn.Module, name: str) -> list[str]:
    """A module of attention that was replaced, and the names of its linear layers."""
    inside = (f"{name}.{n}" for n, m in model.get_submodule(name).named_modules() if isinstance(m, nn.Linear))
    return [name, *inside]


def _expanded(ends: Sequence[str], names: list[str]) -> set[str]:
    words = {"first": names[:1], "last": names[-1:]}
    patterns = [name for word in ends for name in words.get(word, [word])]
    return {n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)}


def _attention(
    model: nn.Module, w_bits: int, a_bits: int, tokens: int, skip: Sequence[str], replace: bool
) -> tuple[nn.Module, list[str], dict[str, str]]:
    """A copy with attention replaced; the names, and why other attention is not."""
    made = copy.deepcopy(model)
    replaced: list[str] = []
    why: dict[str, str] = {}
    if not replace:
        return made, replaced, why
    layers(model)  # refuses packed models and NaN
    for name, module in list(made.named_modules()):
        parts = parts_of(module)
        if parts is None or any(fnmatchcase(name, pattern) for pattern in skip):
            continue
        if isinstance(parts, Parts) and name:
            parent, _, leaf = name.rpartition(".")
            setattr(made.get_submodule(parent), leaf, QKRAttention.of(module, w_bits, a_bits, tokens))
            replaced.append(name)
        else:
            why[name] = parts if isinstance(parts, str) else "the model is itself the attention: use QKRAttention.of"
    return made, replaced, why


def merge_query_keys(model: nn.Module) -> nn.Module:
    """A copy in which the products of queries and keys are linear layers: the form that `load_packed` fills."""
    made = copy.deepcopy(model)
    for module in list(made.modules()):
        if isinstance(module, QKRAttention) and isinstance(module.query_key, QueryKey):
            module.query_key = module.query_key.merged()
    return made


def ofq_bake(model: nn.Module) -> Changes:
    """A copy of a trained model with packed weights and the same outputs; products of queries and keys as well."""
    return bake(merge_query_keys(model))


def latents(model: nn.Module) -> Iterator[tuple[str, FakeQuantizer, nn.Parameter | QueryKey]]:
    """What is rounded: name, quantizer, and the float weight or the pair whose product it is. Tied ones once."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, QueryKey):
            yield name, module.quantizer, module
        elif parametrize.is_parametrized(module, "weight"):
            chain: Any = module.parametrizations
            step, original = chain["weight"][0], chain["weight"].original
            if isinstance(step, FakeQuantizer) and id(original) not in seen:
                seen.add(id(original))
                yield name, step, original


class CGA:
    """Confidence-guided annealing: from now on, an optimizer's steps move only weights near to a threshold.

    Weights farther than `boundary` from every threshold, in steps between levels, have no gradient, and neither
    momentum nor decay moves them. Which these are is found anew for every step, by the weights alone. The entries of
    products of queries and keys have no gradient either where they are confident; their factors move for the others.
    The paper trains on for 30 epochs at the last learning rate (1e-5); a boundary of 0.005 or 0.007 was the best.

    >>> layer = nn.Linear(64, 64)
    >>> _ = parametrize.register_parametrization(layer, "weight", StatsQuantizer(2))
    >>> optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    >>> before = layer.parametrizations.weight.original.detach().clone()
    >>> with CGA(layer, optimizer, boundary=0.005) as annealing:
    ...     layer(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    >>> moved = (layer.parametrizations.weight.original != before).float().mean().item()
    >>> 0 < moved < 0.03
    True

    Raises QuantizationError where no weight of the model is rounded by a `StatsQuantizer`.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, boundary: float = 0.005) -> None:
        found = [(q, w) for _, q, w in latents(model) if isinstance(q, StatsQuantizer) and q.bits != 32]
        if not found:
            raise QuantizationError("no weight is rounded by a StatsQuantizer: prepare the model by ofq_quantize first")
        self.boundary = boundary
        self._quantizers = [q for q, _ in found]
        self._weights = [(q, w) for q, w in found if isinstance(w, nn.Parameter)]
        self._kept: list[tuple[Tensor, Tensor]] = []
        for quantizer in self._quantizers:
            quantizer.boundary = boundary
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    @torch.no_grad()
    def frozen(self) -> float:
        """The share of weights (not of products) that the next step leaves."""
        masks = [~q.near(w, self.boundary) for q, w in self._weights]
        return sum(int(m.sum()) for m in masks) / max(1, sum(m.numel() for m in masks))

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        self._kept = []
        for quantizer, w in self._weights:
            confident = ~quantizer.near(w, self.boundary)
            if w.grad is not None:
                w.grad.masked_fill_(confident, 0)
            self._kept.append((confident, w.detach().clone()))

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        for (_quantizer, w), (confident, value) in zip(self._weights, self._kept, strict=True):
            w.copy_(torch.where(confident, value, w))
        self._kept = []

    def remove(self) -> None:
        """Let all weights move again."""
        for hook in self._hooks:
            hook.remove()
        for quantizer in self._quantizers:
            quantizer.boundary = None

    def __enter__(self) -> CGA:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()
