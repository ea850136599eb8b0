"""What a neuron is: where it lies in a model's weights, and where it can be seen and set.

A *site* is one layer of neurons. A neuron reads its input through a row of one or two weight matrices, applies a
nonlinearity, and writes through a column of another:

    dense   h = f(W_up x + b)                   y = W_down h
    gated   h = f(W_gate x) * (W_up x)          y = W_down h
    expert  one of these, for the tokens that a router sends to it
    conv    h = f(W_up * x), one feature map a neuron (a filter)

`find_sites` finds them in any architecture, `capture` sees `h`, `clamp` sets it.

>>> import torch
>>> from torch import nn
>>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
>>> [site] = find_sites(net)
>>> site.kind, site.width, site.activation
('dense', 5, 'relu')
>>> with capture(net) as seen, clamp(net, {"0:4": 7.0}):
...     out = net(torch.ones(1, 3))
>>> with clamp(net, {"0:4": 7.0}), capture(net) as seen:
...     out = net(torch.ones(1, 3))
>>> seen[site.name][0, 4].item()
7.0
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.errors import NoNeurons, UnknownNeuron

__all__ = ["Neuron", "Site", "Tap", "Weight", "capture", "clamp", "find_sites"]


@dataclass(frozen=True)
class Weight:
    """Where one vector of every neuron of a site lies inside a parameter.

    Neuron `i` owns entries `start + step * i` of `axis` of the parameter (after choosing `expert` on a leading
    axis, if there is one). In a fused parameter several roles share one tensor and differ by `start` and `step`.

    >>> fused = torch.arange(12.0).reshape(4, 3)
    >>> Weight("gate_up", axis=0, start=2).rows(fused, width=2)
    tensor([[ 6.,  7.,  8.],
            [ 9., 10., 11.]])
    >>> Weight("down", axis=1).rows(fused, width=3).shape
    torch.Size([3, 4])
    """

    name: str
    axis: int
    start: int = 0
    step: int = 1
    expert: int | None = None
    bias: str | None = None
    block: int = 1

    def rows(self, tensor: Tensor, width: int) -> Float[Tensor, "width fan"]:
        """One row a neuron: `[width, fan]`, a view where possible. For filters, `fan = in * kh * kw`.

        `tensor` is the whole parameter. `block` is above 1 where a neuron owns that many entries in a run (the
        columns of a Linear that reads flattened feature maps); they are then put one after another in its row.
        """
        if self.expert is not None:
            tensor = tensor[self.expert]
        tensor = tensor.movedim(self.axis, 0)
        if self.block > 1:
            tensor = tensor[self.start : self.start + width * self.block]
            return tensor.unflatten(0, (width, self.block)).flatten(1)
        return self._own(tensor, width).flatten(1)

    def offsets(self, bias: Tensor, width: int) -> Float[Tensor, " width"]:
        """The neurons' entries of the bias that belongs to this weight."""
        return self._own(bias if self.expert is None or bias.dim() == 1 else bias[self.expert], width)

    def _own(self, tensor: Tensor, width: int) -> Tensor:
        return tensor[self.start : self.start + self.step * (width - 1) + 1 : self.step]


@dataclass(frozen=True)
class Tap:
    """Where a tensor of activations passes: the input or the output of a module, neurons along `axis`.

    `start` and `step` pick the site's neurons where the tensor is a fused one.
    """

    module: str
    side: str = "input"  # "input" | "output"
    axis: int = -1
    start: int = 0
    step: int = 1
    expert: int | None = None


@dataclass(frozen=True)
class Site:
    """One layer of neurons of a model.

    `reads` maps a role ("up", and "gate" in gated layers) to the weight by whose rows the neurons read; `write` is the
    weight by whose columns they write, None where no single linear map reads the activation. `tap` is where the
    activation `h` passes, `up_tap` where the output of the up-projection does.
    """

    name: str
    number: int
    layer: int
    width: int
    kind: str
    reads: dict[str, Weight] = field(hash=False)
    write: Weight | None
    tap: Tap
    up_tap: Tap
    activation: str | None = None

    def weight(self, role: str) -> Weight:
        """The weight of a role: "up", "gate" or "down"; KeyError where the site has none."""
        if role == "down" and self.write is not None:
            return self.write
        if role not in self.reads:
            raise KeyError(f"site {self.name} ({self.kind}) has no {role!r} weight; it has {self.roles}")
        return self.reads[role]

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles this site has weights for, e.g. ("up", "gate", "down")."""
        return (*self.reads, *(("down",) if self.write is not None else ()))


@dataclass(frozen=True, order=True)
class Neuron:
    """One neuron: the number and name of its site, and its index there.

    >>> sites = find_sites(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))
    >>> str(Neuron.parse("0:4", sites))
    '0:4'
    >>> Neuron.parse("0:5", sites)
    Traceback (most recent call last):
    neuropil.errors.UnknownNeuron: no neuron 5 in site 0 ('0'): it has neurons 0 to 4
    """

    number: int
    index: int
    site: str = field(compare=False, default="")

    @classmethod
    def parse(cls, address: str | Neuron, sites: Sequence[Site]) -> Neuron:
        """Read "29:808" or "model.layers.29.mlp:808"; raises UnknownNeuron if there is no such neuron."""
        head, _, tail = str(address).strip().rpartition(":")
        by_name = next((s for s in sites if s.name == head), None)
        by_number = next((s for s in sites if head.isdecimal() and s.number == int(head)), None)
        # A site of a plain nn.Sequential may be named "2"; the number is the address users are shown.
        site = by_number or by_name
        if not tail.isdecimal():
            raise UnknownNeuron(
                f"{str(address)!r} is no neuron address; expected SITE:INDEX such as '29:808' "
                f"or '{sites[-1].name if sites else 'model.layers.29.mlp'}:808'"
            )
        if site is None:
            last = f"site numbers run from 0 to {sites[-1].number}" if sites else "this model has no sites"
            raise UnknownNeuron(f"no site {head!r} in this model: {last}, or give a site's name")
        if int(tail) >= site.width:
            raise UnknownNeuron(
                f"no neuron {tail} in site {site.number} ({site.name!r}): it has neurons 0 to {site.width - 1}"
            )
        return cls(site.number, int(tail), site.name)

    def __str__(self) -> str:
        return f"{self.number}:{self.index}"


_found: weakref.WeakKeyDictionary[nn.Module, tuple[Any, list[Site]]] = weakref.WeakKeyDictionary()


def find_sites(model: nn.Module) -> list[Site]:
    """Every layer of neurons of `model`, in the order in which the model holds them.

    Weights are not read, so a model on the meta device will do. The answer is kept for as long as
    the model lives with the same parameters. Raises NoNeurons where there are none.
    """
    from neuropil._recognise import recognise

    key = tuple((name, tuple(p.shape)) for name, p in model.named_parameters(remove_duplicate=False))
    if model in _found and _found[model][0] == key:
        return list(_found[model][1])
    sites = recognise(model)
    if not sites:
        raise NoNeurons(
            f"{type(model).__name__}: no layer of neurons was found; expected a linear map or convolution, "
            "a nonlinearity on its output, and a map that reads the result (an MLP or a conv block)"
        )
    _found[model] = (key, sites)
    return list(sites)


@contextmanager
def capture(model: nn.Module, sites: Iterable[Site] | None = None) -> Iterator[dict[str, Tensor]]:
    """See the activations `h` of the last forward pass: site name -> `[..., width]`.

    Feature maps keep their shape, `[batch, width, height, width]`. For an expert the rows are the tokens that were
    routed to it, and an expert that got no token in the last forward pass has no entry. Nested in a `clamp`,
    it sees the clamped values.
    """
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for site in find_sites(model) if sites is None else sites:

            def look(h: Tensor, name: str = site.name) -> Tensor | None:
                seen[name] = h.detach()
                return None

            stack.enter_context(_tapped(model, site.tap, site.width, look))
        yield seen


@contextmanager
def clamp(
    model: nn.Module, values: Mapping[Neuron | str, float | Tensor], where: str = "hidden"
) -> Iterator[nn.Module]:
    """Hold neurons at constants, at every position of every forward pass (so in generation, with its cache, too).

    `where="hidden"` sets the activation `h` that the down-projection reads; `where="up"` sets the output of the
    up-projection, so that a closed gate still closes. A value is a number, a tensor `[batch]` (one number a row of
    the batch) or a tensor of the shape of the activation without its neuron axis. The model is as before afterwards,
    also after an exception. Raises UnknownNeuron, or ValueError for another `where`.
    """
    if where not in ("hidden", "up"):
        raise ValueError(f"where={where!r}: expected 'hidden' (input of the down-projection) or 'up'")
    sites = {site.name: site for site in find_sites(model)}
    wanted: dict[str, dict[int, float | Tensor]] = {}
    for address, value in values.items():
        neuron = Neuron.parse(address, list(sites.values()))
        wanted.setdefault(neuron.site, {})[neuron.index] = value
    with ExitStack() as stack:
        for name, held in wanted.items():
            site = sites[name]
            tap = site.tap if where == "hidden" else site.up_tap

            def hold(h: Tensor, held: dict[int, float | Tensor] = held, axis: int = tap.axis) -> Tensor:
                h = h.clone()
                for index, value in held.items():
                    target = h.select(axis, index)
                    target.copy_(_spread(value, target))
                return h

            stack.enter_context(_tapped(model, tap, site.width, hold))
        yield model


def _spread(value: float | Tensor, target: Tensor) -> Tensor:
    """A clamp's value in the shape of the activations it replaces."""
    value = torch.as_tensor(value, dtype=target.dtype, device=target.device)
    if value.dim() == 1 and target.dim() > 0:
        rows = value.shape[0]
        if target.shape[0] % rows:
            raise ValueError(f"clamp value of {rows} rows does not fit a batch of {target.shape[0]}")
        # Some models flatten [batch, position] to one axis before the MLP; beams repeat a row likewise.
        value = value.repeat_interleave(target.shape[0] // rows)
        value = value.reshape(-1, *[1] * (target.dim() - 1))
    return value.expand_as(target)


@contextmanager
def _tapped(model: nn.Module, tap: Tap, width: int, act: Any) -> Iterator[None]:
    """Pass the tensor at `tap` through `act`, which returns its replacement or None to leave it."""
    module = model.get_submodule(tap.module)

    def own(whole: Tensor) -> Tensor:
        return whole.narrow(tap.axis, tap.start, tap.step * (width - 1) + 1)[
            (..., slice(None, None, tap.step)) + (slice(None),) * (-1 - tap.axis)
        ]

    def apply(whole: Tensor) -> Tensor | None:
        if tap.start == 0 and tap.step == 1 and whole.shape[tap.axis] == width:
            return act(whole)
        changed = act(own(whole))
        if changed is None:
            return None
        whole = whole.clone()
        own(whole).copy_(changed)
        return whole

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = apply(args[0])
        return None if changed is None else (changed, *args[1:])

    def after(_: nn.Module, __: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        changed = apply(first)
        return None if changed is None else ((changed, *out[1:]) if isinstance(out, tuple) else changed)

    handle: Any
    if tap.side == "input":
        handle = module.register_forward_pre_hook(before)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
