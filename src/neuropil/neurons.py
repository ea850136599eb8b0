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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from neuropil._formula import Formula
from neuropil._taps import tapped
from neuropil.errors import NoNeurons, UnknownNeuron
from neuropil.packed import packed_modules, plain_twin

__all__ = ["Neuron", "Site", "Tap", "Weight", "activation", "capture", "capture_inputs", "clamp", "find_sites"]


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

    def rows(self, tensor: Tensor, width: int) -> Shaped[Tensor, "width fan"]:
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

    def offsets(self, bias: Tensor, width: int) -> Shaped[Tensor, " width"]:
        """The neurons' entries of the bias that belongs to this weight."""
        return self._own(bias if self.expert is None or bias.dim() == 1 else bias[self.expert], width)

    def _own(self, tensor: Tensor, width: int) -> Tensor:
        return tensor[self.start : self.start + self.step * (width - 1) + 1 : self.step]


@dataclass(frozen=True)
class Tap:
    """Where a tensor of activations passes, neurons along `axis`.

    It is the "input" or "output" of `module`, or the "argument" or "result" of the matrix product with `parameter`
    where no module holds that product alone (experts fused in one parameter): then `expert` and `offset` (the
    first entry of the expert's matrix in the parameter) tell which product. `start` and `step` pick the site's
    neurons where the tensor is a fused one. `bias` names the bias that is still to be added where the tensor passes.
    """

    module: str
    side: str = "input"
    axis: int = -1
    start: int = 0
    step: int = 1
    expert: int | None = None
    parameter: str = ""
    offset: int = 0
    bias: str = ""


@dataclass(frozen=True)
class Site:
    """One layer of neurons of a model.

    `reads` maps a role ("up", and "gate" in gated layers) to the weight by whose rows the neurons read; `write` is the
    weight by whose columns they write, None where no single linear map reads the activation. `tap` is where the
    activation `h` passes, `taps[role]` where the output of a reading weight does. `number` is the site's place among
    the model's sites, `layer` that of the block it sits in; they are equal in a plain decoder.
    """

    name: str
    number: int
    layer: int
    width: int
    kind: str
    reads: dict[str, Weight] = field(hash=False)
    write: Weight | None
    tap: Tap
    taps: dict[str, Tap] = field(hash=False)
    activation: str | None = None
    formula: Formula | None = field(default=None, hash=False, compare=False, repr=False)

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
    packed = any(True for _ in packed_modules(model))
    sites = recognise(plain_twin(model) if packed else model)
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
    routed to it (in the order of the experts' implementation), and an expert that got no token in the last forward
    pass has no entry. Entered inside a `clamp`, it sees the clamped values.

    >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> with capture(net) as seen:
    ...     out = net(torch.ones(4, 3))
    >>> {name: tuple(h.shape) for name, h in seen.items()}
    {'0': (4, 5)}
    """
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Callable[[Tensor], None]:
        return lambda h: seen.__setitem__(name, h.detach())

    chosen = find_sites(model) if sites is None else list(sites)
    fresh = model.register_forward_pre_hook(lambda *_: seen.clear())
    try:
        with tapped(model, [(s.tap, s.width, look(s.name)) for s in chosen]):
            yield seen
    finally:
        fresh.remove()


@contextmanager
def clamp(model: nn.Module, values: Mapping[Any, float | Tensor], where: str = "hidden") -> Iterator[nn.Module]:
    """Hold neurons at constants, at every position of every forward pass (so in generation, with its cache, too).

    `values` maps neurons or their addresses to what they are held at: a number, a tensor `[batch]` (one number a row
    of the batch), or a tensor of the shape of the activation without its neuron axis (NaN in it leaves an activation
    as it is). `where="hidden"` sets the
    activation `h` that the down-projection reads; `where="up"` sets the output of the up-projection, so that a closed
    gate still closes. For an expert it applies to the tokens that are routed to it, by one number. The model is as
    before afterwards, also after an exception. Raises UnknownNeuron, or ValueError for another `where`.

    >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> x = torch.ones(4, 3)
    >>> with clamp(net, {"0:1": 0.0}):
    ...     silenced = net(x)
    >>> with torch.no_grad():
    ...     _ = net[2].weight[:, 1].zero_()
    >>> torch.allclose(silenced, net(x))
    True
    """
    if where not in ("hidden", "up"):
        raise ValueError(f"where={where!r}: expected 'hidden' (input of the down-projection) or 'up'")
    sites = find_sites(model)
    held: dict[int, dict[int, float | Tensor]] = {}
    for address, value in values.items():
        neuron = Neuron.parse(address, sites)
        held.setdefault(neuron.number, {})[neuron.index] = value

    def hold(site: Site, tap: Tap) -> tuple[Tap, int, Callable[[Tensor], Tensor]]:
        def act(h: Tensor) -> Tensor:
            h = h.clone()
            for index, value in held[site.number].items():
                target = h.select(tap.axis, index)
                held_at = _spread(value, target, site)
                if tap.bias:
                    held_at = held_at - _bias(model, tap)[tap.start + tap.step * index]
                target.copy_(torch.where(held_at.isnan(), target, held_at))
            return h

        return tap, site.width, act

    chosen = [sites[number] for number in held]
    with tapped(model, [hold(s, s.tap if where == "hidden" else s.taps["up"]) for s in chosen]):
        yield model


def _bias(model: nn.Module, tap: Tap) -> Tensor:
    """The bias that is added after the tap."""
    bias = model.get_parameter(tap.bias).detach()
    return bias if bias.dim() == 1 or tap.expert is None else bias[tap.expert]


def activation(site: Site, inputs: Mapping[str, Tensor], tensor: Callable[[str], Tensor]) -> Tensor:
    """The activation `h` of a site, recomputed from the weights the site says its neurons read.

    `inputs` maps each reading role to what its weight was multiplied with, `[..., fan]` (`capture_inputs` sees it), and
    `tensor` gives a parameter or buffer by name. With `capture` this checks that a site reads what it claims. Where
    `site.formula.scaled`, `h` is a multiple of this, token by token (the model applies routing weights before the
    down-projection).

    >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> [site] = find_sites(net)
    >>> x = torch.ones(4, 3)
    >>> torch.equal(activation(site, {"up": x}, net.state_dict().__getitem__), net[:2](x))
    True
    """
    if site.formula is None or not site.formula.complete:
        raise NoNeurons(f"site {site.name}: how its activation follows from its projections is not known")
    projections = {}
    for role, weight in site.reads.items():
        x = inputs[role]
        computed = site.formula.weight(role, tensor)
        whole = tensor(weight.name)
        if computed is not None:
            whole = computed if computed.shape == whole.shape else computed.t()
        rows = weight.rows(whole, site.width)
        bias = weight.offsets(tensor(weight.bias), site.width) if weight.bias else None
        settings = site.formula.convolutions.get(role)
        if settings is None:
            projections[role] = torch.nn.functional.linear(x, rows, bias)
        else:
            kernel = rows.unflatten(1, tensor(weight.name).shape[1:])
            x = torch.constant_pad_nd(x, list(site.formula.paddings.get(role, ())))
            projections[role] = torch.convolution(x, kernel, bias, *settings[:6])
    h = site.formula(projections, tensor)
    # Feature maps that are read as tokens: neurons come last there.
    return h.movedim(1, -1) if site.kind == "conv" and site.tap.axis == -1 else h


@contextmanager
def capture_inputs(model: nn.Module, sites: Iterable[Site] | None = None) -> Iterator[dict[str, dict[str, Tensor]]]:
    """See what the neurons of each site read in the last forward pass: site name -> role -> input.

    >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> with capture_inputs(net) as read:
    ...     out = net(torch.ones(4, 3))
    >>> read["0"]["up"].shape
    torch.Size([4, 3])
    """
    read: dict[str, dict[str, Tensor]] = {}

    def look(name: str, role: str) -> Callable[[Tensor], None]:
        return lambda x: read.setdefault(name, {}).__setitem__(role, x.detach())

    taps = []
    for site in find_sites(model) if sites is None else sites:
        for role, tap in site.taps.items():
            side = "argument" if tap.parameter else "input"
            # Whole input of the product, whatever the site's own part of its output is.
            taps.append((replace(tap, side=side, start=0, step=1), 0, look(site.name, role)))
    fresh = model.register_forward_pre_hook(lambda *_: read.clear())
    try:
        with tapped(model, taps):
            yield read
    finally:
        fresh.remove()


def _spread(value: float | Tensor, target: Tensor, site: Site) -> Tensor:
    """A clamp's value in the shape of the activations it replaces."""
    value = torch.as_tensor(value, dtype=target.dtype, device=target.device)
    if value.dim() == 1 and value.shape[0] > 1 and site.kind == "expert":
        raise ValueError(
            f"a clamp of one value a row does not fit the expert {site.name}: it sees tokens, not rows; give one number"
        )
    if value.dim() == 1 and target.dim() > 0:
        rows = value.shape[0]
        if target.shape[0] % rows:
            raise ValueError(f"clamp value of {rows} rows does not fit a batch of {target.shape[0]}")
        # Some models flatten [batch, position] to one axis before the MLP; beams repeat a row likewise.
        value = value.repeat_interleave(target.shape[0] // rows)
        value = value.reshape(-1, *[1] * (target.dim() - 1))
    return value.expand_as(target)
