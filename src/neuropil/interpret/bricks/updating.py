r"""Update one brick and nothing else, or grow a new one.

`updating` makes the rows and columns of some bricks the only parameters that there are: all others are frozen, and the
entries outside the bricks are no parameters at all, so that neither a gradient nor weight decay can reach them.

`edit_brick` changes what a layer writes for one input, by locate-and-edit inside a brick: with k the activations of the
brick's neurons there, v the wished output and C = E[k kᵀ] on other inputs,

    W' = W + (v - y) (C⁻¹ k)ᵀ / (kᵀ C⁻¹ k)        on the brick's columns of W, y being what the layer writes now

so that the layer then writes v exactly, and other inputs change as little as C allows. The edit is a `LoraBrick` of
rank one, which can be attached, detached and merged.

`grow` appends neurons that read at random and write nothing: the model answers as before, until they are trained.

Source of the edit: K. Meng et al. 2022, "Locating and Editing Factual Associations in GPT", arXiv:2202.05262.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuropil.changes import Changes
from neuropil.interpret.bricks.custom import LoraBrick, fingerprint
from neuropil.interpret.bricks.partition import Partition
from neuropil.interpret.bricks.slots import keep_neurons, slot_of, wanted_slots
from neuropil.slots import SIZES, owners, places


class Rows(nn.Module):
    """A frozen tensor, some of whose rows along an axis are the parameter."""

    def __init__(self, base: Tensor, index: Int[Tensor, " rows"], axis: int) -> None:
        super().__init__()
        self.base, self.index, self.axis = base.detach().clone(), index.to(base.device), axis

    def forward(self, rows: Tensor) -> Tensor:
        return self.base.to(rows).index_copy(self.axis, self.index, rows)

    def right_inverse(self, whole: Tensor) -> Tensor:
        return whole.index_select(self.axis, self.index).contiguous()


@contextmanager
def updating(
    model: nn.Module, parts: Partition, bricks: Mapping[str, Sequence[int] | Tensor]
) -> Iterator[list[nn.Parameter]]:
    """Within the block, the weights of these bricks (and their reading biases) are the model's only trained parameters.

    They are handed out for an optimizer, and are part of the model's own weights again afterwards; all other entries
    are then what they were, to the bit. Raises ValueError for a site that cannot be taken apart.

    >>> from neuropil.interpret.bricks import partition_bricks
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> with updating(net, partition_bricks(net, 3), {"0": [1]}) as parameters:
    ...     sorted(tuple(p.shape) for p in parameters)
    [(2,), (2, 2), (2, 4)]
    """
    wanted = parts.neurons(bricks)
    held: list[tuple[Any, str]] = []
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    slots = [slot_of(model, name) for name in wanted]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        for slot in slots:
            neurons = wanted[slot.site.name]
            for module, weights in slot.readers:
                index = places(weights, neurons).sort().values
                _open(module, "weight", index, weights[0].axis, held)
                if getattr(module, "bias", None) is not None:
                    _open(module, "bias", index, 0, held)
            _open(slot.write, "weight", neurons, slot.write_weight.axis, held)
        trained = [module.parametrizations[name].original for module, name in held]
        for parameter in trained:
            parameter.requires_grad_(True)
        yield trained
    finally:
        for module, name in reversed(held):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def _open(module: Any, name: str, index: Tensor, axis: int, held: list[tuple[Any, str]]) -> None:
    if parametrize.is_parametrized(module, name):
        raise ValueError(
            "one of these layers reads the weight by which another writes; update them one after the other"
        )
    rows = Rows(getattr(module, name), index, axis)
    parametrize.register_parametrization(module, name, rows, unsafe=True)
    held.append((module, name))


# --- one fact ----------------------------------------------------------------------------------------------------


def edit_brick(
    model: nn.Module,
    parts: Partition,
    site: str,
    brick: int,
    activation: Float[Tensor, " width"],
    wanted: Float[Tensor, " out"],
    *,
    others: Float[Tensor, "tokens width"] | None = None,
    name: str = "edit",
    **facts: Any,
) -> LoraBrick:
    """A brick of rank one after which the site writes `wanted` where its neurons have this `activation`.

    Only columns of the brick's neurons change. `others` are activations of the site on inputs that should stay as they
    are (`neuropil.neurons.capture`); without them C is the identity. Raises ValueError where all of the brick's neurons
    are silent there: then nothing inside it can change what is written.
    """
    slot = slot_of(model, site)
    neurons = parts.neurons({site: [brick]})[site]
    module: Any = slot.write
    columns = slot.write_weight.rows(module.weight.detach(), slot.site.width)
    key = activation[neurons].double()
    if not bool(key.abs().sum() > 0):
        raise ValueError(f"brick {brick} of {site!r} is silent for this input; edit another brick")
    covariance = torch.eye(len(key), dtype=torch.float64)
    if others is not None:
        k = others[:, neurons].double()
        second = k.T @ k / len(k)
        covariance = second + 1e-3 * second.diagonal().mean().clamp_min(1e-12) * covariance
    direction = torch.linalg.solve(covariance, key)
    now = (activation @ columns) + (module.bias.detach() if module.bias is not None else 0)
    down = torch.zeros(1, slot.site.width)
    down[0, neurons] = (direction / (key @ direction)).float()
    target = slot.write_weight.name.rpartition(".")[0]
    tensors = {target: {"down": down, "up": (wanted - now)[:, None].float()}}
    return LoraBrick(name, tensors, **{"base": fingerprint(model), **facts})


# --- new neurons ----------------------------------------------------------------------------------------------------


def grow(model: nn.Module, neurons: Mapping[str, int], *, seed: int = 0) -> Changes:
    """A copy whose named sites have so many neurons more, after the others; it answers as the model does.

    The new ones read by random weights as large as the others' and write nothing. Train them, and nothing else, with
    `updating(made, parts.grown(site, n), {site: [new brick]})`. Raises ValueError for a site that cannot be taken
    apart, a fused one, or fewer than one neuron.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> grow(net, {"0": 2}).model[0]
    Linear(in_features=4, out_features=8, bias=True)
    """
    if wrong := {name: n for name, n in neurons.items() if n < 1}:
        raise ValueError(f"grow(neurons={wrong}): expected one neuron or more")
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    slots = [slot_of(made, name) for name in neurons]
    _, left = wanted_slots(made, neurons)
    for slot in slots:
        if any(len(weights) > 1 for _, weights in slot.readers):
            raise ValueError(f"site {slot.site.name!r}: its reading weights share one parameter, which cannot be grown")
        count = neurons[slot.site.name]
        for module, weights in slot.readers:
            _append(module, weights[0].axis, count, generator, reads=True)
        _append(slot.write, slot.write_weight.axis, count, None, reads=False)
    return Changes(made, tuple(dict.fromkeys(n for slot in slots for n in owners(slot.site))), left)


@torch.no_grad()
def _append(module: Any, axis: int, count: int, generator: torch.Generator | None, reads: bool) -> None:
    """Rows (or, without a generator, zero columns) more, in place."""
    old = module.weight
    shape = list(old.shape)
    shape[axis] = count
    new = torch.zeros(shape)
    if generator is not None:
        new = torch.randn(shape, generator=generator) * old.float().std().cpu()
    module.weight = nn.Parameter(torch.cat([old, new.to(old)], axis), old.requires_grad)
    if reads and getattr(module, "bias", None) is not None:
        module.bias = nn.Parameter(torch.cat([module.bias, module.bias.new_zeros(count)]), module.bias.requires_grad)
    attribute = SIZES[type(module).__name__][0 if reads else 1]
    setattr(module, attribute, getattr(module, attribute) + count)


def shrink(model: nn.Module, widths: Mapping[str, int]) -> Changes:
    """A copy whose named sites have their first so many neurons alone: undoes `grow`."""
    return keep_neurons(model, {name: torch.arange(width) for name, width in widths.items()})
