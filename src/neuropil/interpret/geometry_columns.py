r"""The activations of any layer of any model, and what each of its neurons has to do with the labels.

`representation` gives a layer's activations for `geometry_report` and the metrics. `geometry_columns` gives an atlas
what geometry says of single neurons. The target alignment of a layer is a sum over its neurons,

    A(Kz, Ky) = sum_j ||Y^T z_j||^2 / (||Kz|| ||Ky||)        (z_j and Y centred, over the condition means)

so each neuron has a share of it, and an alignment that it would have alone, ||Y^T z_j||^2 / (||z_j||^2 ||Ky||).

>>> net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
>>> representation(net, 0, torch.randn(32, 4)).shape
torch.Size([32, 6])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.errors import NoNeurons, UnknownNeuron
from neuropil.interpret.geometry_metrics import centred
from neuropil.neurons import Site, capture, find_sites

Columns = Callable[[Site], dict[str, Float[Tensor, " width"]]]
POOLS = ("flatten", "mean", "last")


def representation(
    model: nn.Module, place: Any, data: Any, *, batch_size: int = 64, pool: str = "flatten"
) -> Float[Tensor, "n features"]:
    """Activations of one layer for every example of `data`, in its order.

    place   a `Site`, its number or its name (its neurons' activations, after the nonlinearity); or the dotted name
            of any module (its output)
    data    a tensor of examples, or a mapping of tensors (`input_ids`, `attention_mask`, ...) for models that take
            their inputs by name
    pool    what becomes of positions: "flatten" keeps all as features, "mean" averages them, "last" takes the last.
            Positions are all axes but the first and the neurons'; an `attention_mask` is heeded

    The model runs in evaluation mode without gradients, and is as before afterwards. Raises UnknownNeuron for a place
    that is not there, ValueError for another pool, or for a layer that has not one row for each example.
    """
    if pool not in POOLS:
        raise ValueError(f"pool {pool!r}; expected one of {', '.join(POOLS)}")
    site = place if isinstance(place, Site) else _site(model, place)
    axis = -1 if site is None else site.tap.axis
    training = [module for module in model.modules() if module.training]
    out = []
    model.eval()
    try:
        with torch.no_grad(), _watched(model, site, place) as seen:
            for part in _parts(data, batch_size):
                named = isinstance(part, Mapping)
                count = len(next(iter(part.values())) if named else part)
                model(**part) if named else model(part)
                h = seen()
                if len(h) != count:
                    raise ValueError(f"{place!r} has {len(h)} rows for {count} examples; expected one for each")
                out.append(_pooled(h, axis, pool, part.get("attention_mask") if named else None))
    finally:
        for module in training:
            module.training = True
    return torch.cat(out)


def _site(model: nn.Module, place: int | str) -> Site | None:
    """The site of this number or name; None where it is the name of a module."""
    try:
        sites = find_sites(model)
    except NoNeurons:
        sites = []
    for name in (lambda s: s.name, lambda s: s.number, lambda s: str(s.number)):
        for site in sites:
            if name(site) == place:
                return site
    if isinstance(place, str) and place in dict(model.named_modules()):
        return None
    names = ", ".join(f"{s.number} ({s.name!r})" for s in sites) or "none"
    raise UnknownNeuron(f"no layer {place!r}; expected the name of a module, or one of the sites: {names}")


@contextmanager
def _watched(model: nn.Module, site: Site | None, place: Any) -> Iterator[Callable[[], Tensor]]:
    """While it is open, a function that gives the activations of the last forward pass."""
    if site is not None:
        with capture(model, [site]) as seen:
            yield lambda: seen[site.name]
        return
    found: list[Tensor] = []

    def look(_: nn.Module, __: Any, output: Any) -> None:
        found[:] = [(output[0] if isinstance(output, tuple) else output).detach()]

    handle = model.get_submodule(place).register_forward_hook(look)
    try:
        yield lambda: found[0]
    finally:
        handle.remove()


def _parts(data: Any, size: int) -> Iterator[Any]:
    if isinstance(data, Mapping):
        for start in range(0, len(next(iter(data.values()))), size):
            yield {name: values[start : start + size] for name, values in data.items()}
    else:
        yield from data.split(size)


def _pooled(h: Tensor, axis: int, pool: str, mask: Tensor | None) -> Float[Tensor, "n features"]:
    """One row an example, from `[n, ..., neurons]` or, by `axis`, `[n, neurons, ...]`."""
    if h.dim() <= 2 or pool == "flatten":
        return h.flatten(1)
    h = h.movedim(axis, -1).flatten(1, -2)
    keep = torch.ones(h.shape[:2], device=h.device) if mask is None else mask.to(h.device)
    if keep.shape != h.shape[:2]:
        raise ValueError(f"an attention_mask of {tuple(keep.shape)} for activations of {tuple(h.shape)}")
    if pool == "last":
        last = keep.shape[1] - 1 - keep.flip(1).long().argmax(1)
        return h[torch.arange(len(h)), last]
    weight = keep.to(h.dtype)[:, :, None]
    return (h * weight).sum(1) / weight.sum(1)


def geometry_columns(
    model: nn.Module,
    data: Any,
    conditions: Any,
    labels: Any,
    prefix: str = "geometry",
    *,
    batch_size: int = 64,
) -> Columns:
    """For `Atlas.add`: site -> columns that say what each neuron has to do with the labels.

    data        as in `representation`, positions averaged
    conditions  [n] the condition of each example (numbers or words; sorted, they are numbered from 0)
    labels      [n] or [n, k] labels of the examples, the same for all of a condition: two values, or numbers

    `{prefix}_target`       the neuron's part of the layer's target alignment; the parts add up to it
    `{prefix}_alone`        the target alignment of the neuron alone, 0 to 1 (NaN if it never changes)
    `{prefix}_condition`    the condition that it responds to most
    `{prefix}_selectivity`  1 where it responds to that one only, 0 where to all alike (NaN if it never changes): the
                            lifetime sparseness (Treves and Rolls) of its condition means above the least of them

    Raises ValueError for labels or conditions of another length, or labels that differ within a condition.
    """
    names, number = np.unique(np.asarray(conditions), return_inverse=True)
    y = np.asarray(labels, dtype=np.float64).reshape(len(labels), -1)
    if len(number) != len(y):
        raise ValueError(f"{len(number)} conditions and {len(y)} labels; expected one of each for every example")
    first = np.unique(number, return_index=True)[1]
    if not np.array_equal(y, y[first][number]):
        raise ValueError("labels differ between examples of one condition; expected the same for all")
    target = y[first] - y[first].mean(0)
    size = float(np.linalg.norm(target @ target.T))
    if size == 0:
        raise ValueError("all conditions have the same labels; expected some that differ")

    def columns(site: Site) -> dict[str, Any]:
        h = representation(model, site, data, batch_size=batch_size, pool="mean").double().numpy()
        if len(h) != len(number):
            raise ValueError(f"{len(h)} examples and {len(number)} conditions; expected one for each")
        means = np.stack([h[number == c].mean(0) for c in range(len(names))])
        z = means - means.mean(0)
        with_labels = ((target.T @ z) ** 2).sum(0)
        own = (z**2).sum(0)
        still = own <= 1e-20 * np.maximum((means**2).sum(0), 1e-300)
        whole = float(np.linalg.norm(centred(z @ z.T)))
        above = means - means.min(0)
        n = len(names)
        with np.errstate(divide="ignore", invalid="ignore"):
            sparse = (1 - above.mean(0) ** 2 / (above**2).mean(0)) * n / (n - 1)
            found = {
                f"{prefix}_target": with_labels / (whole * size),
                f"{prefix}_alone": np.where(still, np.nan, with_labels / (own * size)),
                f"{prefix}_selectivity": np.where(still, np.nan, sparse),
            }
        found[f"{prefix}_condition"] = means.argmax(0)
        return {name: torch.from_numpy(np.asarray(values)) for name, values in found.items()}

    return columns
