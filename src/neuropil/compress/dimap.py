r"""Prune a transformer in one shot, without data: each weight is judged by its share of the energy of its module.

>>> import torch
>>> from transformers import SwinConfig, SwinForImageClassification
>>> from neuropil.compress import count_operations
>>> _ = torch.manual_seed(0)
>>> config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
>>> model = SwinForImageClassification(config)
>>> changes = dimap_prune(model, 0.5)
>>> pruned = changes.model
>>> count_operations(pruned, torch.randn(1, 3, 32, 32)).saved > 0.4
True

Layers of one function form a *module*: queries, keys and values (qkv), attention outputs (proj), the layers of the
perceptrons (mlp), and the rest, which is patch embedding, patch merging and head (aux). With the weights of a module
sorted by magnitude, $|W_1| \ge |W_2| \ge \dots$, each scores

$$\mathrm{Imp}(W_j) = \frac{W_j^2}{\sum_{i \le j} W_i^2},$$

the relative distortion of the module (in Frobenius norm, which bounds that of its output) when $W_j$ goes and all
smaller ones have gone before. The largest weight of each module scores 1, zeros score 0; scores of all modules are
ranked together and the lowest go, $\lfloor \text{ratio} \cdot N \rfloor$ exactly. Within a module that is
magnitude pruning; between modules it does not see their scale. No data and no forward pass are used.

Fine-tune with the masks kept: `dimap_prune(model, 0.5, hold=True)`, train, `bake_masks(changes.model)`. The masks
alone come from `dimap_masks`, for `torch.nn.utils.prune.custom_from_mask` or whatever else takes masks. What was
pruned is stored small by `pack_sparse`, and `dimap_prune_neurons` takes out whole neurons by their summed scores,
which makes the model faster on any hardware.

Chosen where the paper, of which only the abstract and summaries could be read, leaves something open:

* `granularity="kind"` pools each function over the whole network, so that attention weights of different stages are
  compared as one module. "stage" and "block" pool within those, "layer" (each layer on its own) is LAMP (Lee et al.,
  2021, arXiv:2010.07611). Whichever it is, aux is one module of the network (but for "layer").
* The score's denominator sums over the weights at least as large; the other order would give the smallest weight 1.
* Among weights of equal score the earlier one in the model's order stays.
* Normalisations, biases, embeddings and whatever makes relative position biases are not pruned.

Source: He and Zhou, "Data-independent Module-aware Pruning for Hierarchical Vision Transformers", ICLR 2024,
arXiv:2404.13648.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from neuropil.changes import Changes
from neuropil.compress._dimap_modules import Modules, ModulesError, energy_shares, find_weights, names_of, pools
from neuropil.compress.masks import hold_masks
from neuropil.compress.structured import Example, remove_neurons
from neuropil.neurons import Site, find_sites


def dimap_scores(
    model: nn.Module, *, modules: Modules = "auto", granularity: str = "kind", skip: Sequence[str] = ()
) -> dict[str, Float[Tensor, "*_"]]:
    r"""Parameter name -> the importance of each of its weights, 0 to 1, in double precision.

    Parameters
    ----------
    modules: "transformer" (ViT, DeiT, Swin, BERT, Llama and others, by the names that transformers, timm, torchvision
        and torch give to their layers), "resnet" (each stage a module), "auto" (whichever fits); or your own: a
        mapping from regular expressions to module names, of which the first that is found in a parameter's name
        counts (`{r"layer(\d)": r"stage \1", ".*": "rest"}`), or a function from a parameter's name to a module's.
    granularity: "kind", "stage", "block" or "layer": what is one module (see the top). With modules of your own only
        "kind", which they are, and "layer".
    skip: names of layers not to prune, or patterns with * and ?.

    Raises ModulesError (a ValueError) for weights that belong to no module, modules without weights and weights that
    are not numbers; ValueError for unknown settings and packed models.
    """
    weights, _ = find_weights(model, skip)
    return _scores(weights, modules, granularity)


def dimap_masks(
    model: nn.Module,
    ratio: float = 0.5,
    *,
    modules: Modules = "auto",
    granularity: str = "kind",
    skip: Sequence[str] = (),
) -> dict[str, Bool[Tensor, "*_"]]:
    """Parameter name -> True where a weight stays when this share of all weights goes; settings as `dimap_scores`."""
    _check_share("ratio", ratio)
    weights, _ = find_weights(model, skip)
    return _lowest(_scores(weights, modules, granularity), ratio)


def dimap_prune(
    model: nn.Module,
    ratio: float = 0.5,
    *,
    modules: Modules = "auto",
    granularity: str = "kind",
    skip: Sequence[str] = (),
    hold: bool = False,
) -> Changes:
    """A copy of the model in which this share of its weights, the least important, is zero.

    With `hold` the zeros stay zero while the copy is trained (see `neuropil.compress.masks`), until `bake_masks`. The
    other settings and what is raised are as for `dimap_scores`; a ratio outside [0, 1) is a ValueError. Zeros that
    are there already are the first to go.
    """
    _check_share("ratio", ratio)
    weights, left = find_weights(model, skip)
    masks = _lowest(_scores(weights, modules, granularity), ratio)
    made = copy.deepcopy(model)
    changed = names_of(made, list(masks))
    if hold:
        hold_masks(made, masks)
    else:
        with torch.no_grad():
            for name, mask in masks.items():
                weight = made.get_parameter(name)
                weight.mul_(mask.to(weight.device))
    return Changes(made, changed, {name: why for name, why in left.items() if name not in changed})


def dimap_neuron_scores(
    model: nn.Module, *, modules: Modules = "auto", granularity: str = "kind", skip: Sequence[str] = ()
) -> dict[str, Float[Tensor, " width"]]:
    """Site name -> the summed importance of each neuron's reading and writing weights (see `find_sites`).

    Sites with a weight that is not scored (an expert's, a skipped layer's) are left out.
    """
    scores = dimap_scores(model, modules=modules, granularity=granularity, skip=skip)
    found: dict[str, Tensor] = {}
    for site in find_sites(model):
        weights = [site.weight(role) for role in site.roles]
        if all(weight.name in scores for weight in weights):
            found[site.name] = torch.stack([w.rows(scores[w.name], site.width).sum(1) for w in weights]).sum(0)
    return found


def dimap_prune_neurons(
    model: nn.Module,
    share: float,
    example: Example,
    *,
    modules: Modules = "auto",
    granularity: str = "kind",
    skip: Sequence[str] = (),
) -> Changes:
    """A copy without this share of the model's neurons, those of least summed importance over all layers together.

    Its matrices are really smaller; each layer keeps at least its best neuron. `example` is an input of the model,
    see `remove_neurons`; the other settings are as for `dimap_scores`. Raises ValueError for a share outside [0, 1).
    """
    _check_share("share", share)
    scores = dimap_neuron_scores(model, modules=modules, granularity=granularity, skip=skip)
    sites = [site for site in find_sites(model) if site.name in scores]
    return remove_neurons(model, _lowest_neurons(scores, sites, share), example)


def _scores(weights: Mapping[str, Tensor], modules: Modules, granularity: str) -> dict[str, Tensor]:
    if not weights:
        raise ModulesError("there is nothing to prune: no linear map or convolution was found, or all are skipped")
    scores: dict[str, Tensor] = {}
    for names in pools(list(weights), modules, granularity).values():
        scores |= zip(names, energy_shares([weights[name] for name in names]), strict=True)
    return {name: scores[name] for name in weights}


def _lowest(scores: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """False for this share of the lowest scores, the last ones where scores are equal; True elsewhere."""
    pool = torch.cat([score.flatten() for score in scores.values()])
    gone = math.floor(ratio * len(pool) + 1e-6)  # 0.29 * 100 is a little less than 29
    keep = torch.ones(len(pool), dtype=torch.bool)
    if gone:
        limit = pool.kthvalue(gone).values
        keep = pool > limit
        ties = (pool == limit).nonzero().flatten()
        keep[ties[: len(pool) - gone - int(keep.sum())]] = True
    parts = keep.split([score.numel() for score in scores.values()])
    return {name: part.reshape(score.shape) for part, (name, score) in zip(parts, scores.items(), strict=True)}


def _lowest_neurons(scores: Mapping[str, Tensor], sites: Sequence[Site], share: float) -> dict[str, list[int]]:
    """The neurons that go, by site: the lowest of all, but never a site's best."""
    if not sites:
        return {}
    guarded = {site.name: scores[site.name].clone() for site in sites}
    for score in guarded.values():
        score[score.argmax()] = math.inf
    total = sum(site.width for site in sites)
    count = min(math.floor(share * total + 1e-6), total - len(sites))
    order = torch.cat(list(guarded.values())).argsort(stable=True)[:count]
    gone = torch.zeros(total, dtype=torch.bool)
    gone[order] = True
    parts = gone.split([site.width for site in sites])
    return {site.name: part.nonzero().flatten().tolist() for site, part in zip(sites, parts, strict=True)}


def _check_share(name: str, given: float) -> None:
    if not 0 <= given < 1:
        raise ValueError(f"{name}={given}: expected a share in [0, 1)")
