"""Neurons taken out of a model: its matrices become really smaller, and it answers faster on any hardware.

`remove_neurons` takes out the neurons that you name; `prune_neurons` those with the lowest scores, by default

    s_i = ‖w_i^down‖ · sqrt(E h_i²)        and without data        s_i = ‖w_i^down‖ · Π_role ‖w_i^role‖

the size of what neuron i adds to the output, h_i its activation on the data, or the product of the norms of the
weights by which it reads and writes. Neither changes when scale is moved between the two. Language models need the
data: in them a few neurons of small weights fire so strongly that the model falls apart without them. The removal
itself, through batch norms and whatever else is tied to a neuron, is done by the library `torch-pruning`.

>>> import torch
>>> from torch import nn
>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
>>> changes = prune_neurons(model, 0.5, torch.randn(1, 8))
>>> changes.model[0], changes.model[2]
(Linear(in_features=8, out_features=16, bias=True), Linear(in_features=16, out_features=4, bias=True))
>>> print(changes)
changed 2 modules

Source of the library: G. Fang, X. Ma, M. Song, M. B. Mi and X. Wang, "DepGraph: Towards Any Structural Pruning",
CVPR 2023, arXiv:2301.12900.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.changes import Changes
from neuropil.compress.reconstruction import run
from neuropil.errors import MissingExtra
from neuropil.evaluate import evaluating
from neuropil.models import load
from neuropil.neurons import Site, capture, find_sites
from neuropil.packed import is_packed

Example = Tensor | tuple[Tensor, ...] | Mapping[str, Any]


def neuron_scores(model: nn.Module, data: Iterable[Example] | None = None) -> dict[str, Float[Tensor, " width"]]:
    """Site name -> the score s_i of each neuron (see above); `data` are inputs that the model takes, one at a time."""
    weights = load(model)
    fires = None if data is None else _root_mean_square(model, data)
    found = {}
    for site in weights.sites:
        score = torch.ones(site.width) if fires is None else fires[site.name]
        roles = (*(site.reads if fires is None else ()), *(("down",) if site.write is not None else ()))
        for role in roles:
            score = score * weights.rows(site, role).norm(dim=1)
        found[site.name] = score
    return found


@torch.no_grad()
def _root_mean_square(model: nn.Module, data: Iterable[Example]) -> dict[str, Tensor]:
    """sqrt(E h²) of every neuron, over all places and inputs."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    axes = {site.name: site.tap.axis for site in find_sites(model)}
    with evaluating(model):
        for example in data:
            with capture(model) as seen:
                run(model, example)
            for name, h in seen.items():
                flat = h.movedim(axes[name], -1).flatten(0, -2).double()
                sums[name] = sums.get(name, 0.0) + flat.square().sum(0)
                counts[name] = counts.get(name, 0) + len(flat)
    if not sums:
        raise ValueError("neuron_scores(data=...): the data is empty; give at least one input")
    return {name: (total / counts[name]).sqrt().float() for name, total in sums.items()}


def prune_neurons(
    model: nn.Module,
    share: float,
    example: Example,
    *,
    scores: Mapping[str, Float[Tensor, " width"]] | None = None,
    data: Iterable[Example] | None = None,
    skip: Sequence[str] = (),
) -> Changes:
    """A copy without the given share of every site's neurons, those with the lowest scores (see `remove_neurons`).

    `scores` has one number a neuron by site name; a site that it does not name, or that `skip` names, is left. Without,
    they are `neuron_scores(model, data)`.
    Raises ValueError for a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"prune_neurons(share={share}): expected a share of the neurons in [0, 1)")
    scores = neuron_scores(model, data) if scores is None else scores
    gone: dict[str, list[int]] = {}
    for site in find_sites(model):
        if site.name in scores and site.name not in skip:
            order = scores[site.name].argsort(stable=True)
            gone[site.name] = sorted(order[: int(share * site.width)].tolist())
    return remove_neurons(model, gone, example)


def remove_neurons(model: nn.Module, gone: Mapping[str, Sequence[int]], example: Example) -> Changes:
    """A copy of the model without these neurons: site name -> indices.

    `example` is one input that the model accepts (a tensor, a tuple of arguments, or a mapping of them), with which
    the library follows how its layers hang together. Sites whose neurons cannot be taken out alone (fused
    parameters, experts) are named in `left`, as is every layer that keeps its size.

    Raises MissingExtra without torch-pruning, ValueError where a site would lose all its neurons, KeyError for an
    unknown site.
    """
    sites = {site.name: site for site in find_sites(model)}
    for name, indices in gone.items():
        if name not in sites:
            raise KeyError(f"no site is called {name!r}; there are {', '.join(list(sites)[:5])} …")
        if len(set(indices)) >= sites[name].width or any(not 0 <= i < sites[name].width for i in indices):
            raise ValueError(f"site {name!r} has neurons 0 to {sites[name].width - 1}: some must stay, none is beyond")
    if any(is_packed(module) for module in model.modules()):
        raise ValueError("the model's weights are packed; take neurons out first and pack afterwards")
    made = copy.deepcopy(model)
    before = _sizes(made)
    left = _remove(made, {sites[name]: sorted(set(indices)) for name, indices in gone.items() if len(indices)}, example)
    changed = tuple(name for name, size in _sizes(made).items() if size != before[name])
    left |= {name: "none of its neurons was to go" for name in before if name not in changed and name not in left}
    return Changes(made, changed, {name: left[name] for name in before if name in left and name not in changed})


def _sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 1
    }


def _remove(model: nn.Module, gone: Mapping[Site, list[int]], example: Example) -> dict[str, str]:
    """Take them out in place; why each layer of a site that cannot lose any was left."""
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingExtra("taking neurons out needs torch-pruning: pip install 'neuropil[prune]'") from error
    if not gone:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters outside modules, which no neuron of a site touches
        graph = torch_pruning.DependencyGraph().build_dependency(model, example, forward_fn=_logits)
    left: dict[str, str] = {}
    done: set[nn.Module] = set()
    for site, indices in gone.items():
        weight = next(iter(site.reads.values()))
        owner = weight.name.rpartition(".")[0]
        layer = model.get_submodule(owner)
        if layer in done:  # a residual connection ties its neurons to those of an earlier site, which are gone
            continue
        if weight.start or weight.step != 1 or weight.expert is not None or weight.axis != 0:
            left[owner] = "its neurons share one parameter with others (fused or experts)"
            continue
        group = graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, indices)
        if not graph.check_pruning_group(group):
            left[owner] = "torch-pruning finds that a layer would be left empty"
            continue
        done |= {each.dep.target.module for each in group if graph.is_out_channel_pruning_fn(each.dep.handler)}
        group.prune()
    for parameter in model.parameters():
        parameter.grad = None
    return left


def _logits(model: Any, example: Any) -> Any:
    out = run(model, example)
    return getattr(out, "logits", out)
