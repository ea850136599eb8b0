"""Pruned weights kept as the values that are left and a bit a weight: what a mask saves on disk.

    bits a weight = 1 + (1 - sparsity) · bits of a value

so single-precision weights become smaller from 1/32 sparsity on. The products stay dense: for speed take whole
neurons out (`prune_neurons`).

>>> from torch import nn
>>> import torch
>>> from neuropil.packed import nbytes
>>> model = nn.Sequential(nn.Linear(64, 64, bias=False))
>>> pruned = prune_magnitude(model, 0.75).model
>>> nbytes(model), nbytes(pack_sparse(pruned).model)
(16384, 4608)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from neuropil.changes import Changes
from neuropil.packed import Packing, Sparse, is_packed, pack

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def prunable(model: nn.Module, skip: Sequence[str] = ()) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Linear maps and convolutions, by name, and why each other module with a matrix is none.

    Output heads tied to an embedding are left: their rows are read by token, not as a matrix. `skip` holds names or
    patterns with * and ?. Raises ValueError for a packed model and for weights that are NaN or infinite (named).
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and not is_packed(m)}
    found: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if is_packed(module):
            raise ValueError(f"{name or 'the model'} is compressed already; give the model as it was before")
        if parametrize.is_parametrized(module, "weight"):
            left[name] = "its weight is parametrized; bake that in first (torch.nn.utils.parametrize)"
        elif weight is None or weight.dim() < 2:
            continue
        elif not isinstance(module, LAYERS) and type(module).__name__ != "Conv1D":
            left[name] = f"{type(module).__name__} is neither a linear map nor a convolution"
        elif id(weight) in embeddings:
            left[name] = "its weight is an embedding's"
        elif any(fnmatchcase(name, pattern) for pattern in skip):
            left[name] = "skipped as asked"
        elif not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}.weight holds NaN or infinity; mend the model before it is pruned")
        else:
            found[name] = module
    return found, left


def prune_magnitude(model: nn.Module, sparsity: float, *, per: str = "model", skip: Sequence[str] = ()) -> Changes:
    """A copy without the smallest weights: the baseline of every pruner, by `torch.nn.utils.prune`.

    `per="model"` ranks the weights of all layers together, `per="layer"` takes the same share of each.
    Raises ValueError for a sparsity outside [0, 1) and an unknown `per`.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"prune_magnitude(sparsity={sparsity}): expected a share of the weights in [0, 1)")
    if per not in ("model", "layer"):
        raise ValueError(f"prune_magnitude(per={per!r}): expected 'model' or 'layer'")
    made = copy.deepcopy(model)
    found, left = prunable(made, skip)
    if per == "model" and found:
        everything = [(module, "weight") for module in found.values()]
        prune.global_unstructured(everything, pruning_method=prune.L1Unstructured, amount=float(sparsity))
    for module in found.values():
        if per == "layer":
            prune.l1_unstructured(module, "weight", amount=float(sparsity))
        prune.remove(module, "weight")
    return Changes(made, tuple(found), left)


def pack_sparse(model: nn.Module, dtype: torch.dtype | None = None) -> Changes:
    """A copy in which each weight that is smaller so is kept as `Sparse`; `dtype` rounds the values that are left."""
    made = copy.deepcopy(model)
    found, left = prunable(made)
    packings: dict[str, Packing] = {}
    for name, module in found.items():
        assert isinstance(module.weight, Tensor)
        packing = Sparse.of(module.weight, dtype)
        if packing.bits < 8 * module.weight.element_size():
            packings[name] = packing
        else:
            left[name] = "too few of its weights are zero: a map of them would take more room than it saves"
    pack(made, packings)
    return Changes(made, tuple(packings), left)
