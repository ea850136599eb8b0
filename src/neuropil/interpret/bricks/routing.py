r"""Retrieve and route: compute only the bricks that an input needs.

The score of brick e for a token is what its neurons do, $s_e(x) = \sum_{i \in e} a_i(x)$ (`activity.strength`); the k
bricks of highest score are computed, the others left out. Who gives the score is the *selector*:

    Oracle        the score itself, for which all neurons that read are computed: the bound
    Cosine        the cosine of x and the brick's mean weight row (of its rows scaled to unit length)
    MLPSelector   Linear(d, E) - tanh - Linear(E, E), which begins as the cosine and is trained on data

and *level* says who shares a set: each "token" has its own; a "sequence" has the one of its mean scores over its tokens
in this pass; an "instruction" is read once, and its set is frozen. (The paper has gated layers in view nowhere; their
brick is looked up by the rows of the gate.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from neuropil.evaluate import evaluating
from neuropil.interpret.bricks.activity import Example, call, strength, tensors
from neuropil.interpret.bricks.partition import Partition
from neuropil.interpret.bricks.slots import wanted_slots
from neuropil.models import load
from neuropil.neurons import Site, activation, capture_inputs
from neuropil.slots import Slot, named_tensor, places

LEVELS = ("token", "sequence", "instruction")


@runtime_checkable
class Selector(Protocol):
    """Scores of the bricks of a site for what it reads."""

    def __call__(self, site: Site, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens bricks"]: ...


class Oracle:
    """What the bricks' neurons really do. It computes all reading weights, and so bounds the others, not the cost."""

    def __init__(self, model: nn.Module, parts: Partition) -> None:
        self.model, self.parts = model, parts

    @torch.no_grad()
    def __call__(self, site: Site, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens bricks"]:
        h = activation(site, dict.fromkeys(site.reads, x), partial(named_tensor, self.model))
        return strength(site, h) @ self.parts.members(site.name).T.to(h)


def centres(model: nn.Module, parts: Partition) -> dict[str, Float[Tensor, "bricks d"]]:
    """By site, the mean of each brick's weight rows, each scaled to unit length: of the gate's in gated layers."""
    loaded, found = load(model), {}
    for site in loaded.sites:
        if site.name in parts.labels:
            rows = nn.functional.normalize(loaded.rows(site, "gate" if "gate" in site.reads else "up"), dim=1)
            found[site.name] = parts.members(site.name).float() @ rows / parts.sizes(site.name)[:, None]
    return found


class Cosine:
    """Cosine of what is read and the brick's centre: no training, and a d x E product a token."""

    def __init__(self, model: nn.Module, parts: Partition) -> None:
        self.centres = {name: nn.functional.normalize(c, dim=1) for name, c in centres(model, parts).items()}

    def __call__(self, site: Site, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens bricks"]:
        return nn.functional.normalize(x, dim=1) @ self.centres[site.name].T.to(x)


class MLPSelector(nn.Module):
    """A small network a site that learns to foresee the scores; before training it picks the same brick as `Cosine`.

    (The first layer begins with centres of unit length, as the inputs have; neither layer has a bias.)
    """

    def __init__(self, model: nn.Module, parts: Partition) -> None:
        super().__init__()
        self.sites = {name: number for number, name in enumerate(parts.labels)}
        found = centres(model, parts)
        self.nets: Any = nn.ModuleList(
            _selector_net(nn.functional.normalize(found[name], dim=1)) for name in self.sites
        )

    def forward(self, site: Site, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens bricks"]:
        return self.nets[self.sites[site.name]](nn.functional.normalize(x.float(), dim=1)).to(x)

    def fit(
        self,
        inputs: Mapping[str, Float[Tensor, "tokens d"]],
        scores: Mapping[str, Float[Tensor, "tokens bricks"]],
        keep: float = 0.2,
        *,
        epochs: int = 30,
        batch_size: int = 512,
        lr: float = 0.01,
        seed: int = 0,
    ) -> dict[str, float]:
        """Train on what `collect` gives; by site, the share of activity that the chosen bricks hold on held-out tokens.

        As the authors do: Adam, the loss is the binary cross-entropy of the logits and score / greatest score of the
        batch, nine tenths of the tokens to train, and the epoch that holds most of the activity of the rest is kept.
        """
        return {
            name: _fit(
                self.nets[number], inputs[name].float(), scores[name].float(), keep, epochs, batch_size, lr, seed
            )
            for name, number in self.sites.items()
        }

    @torch.no_grad()
    def grow(self, site: str, centre: Float[Tensor, " d"]) -> None:
        """A row more for a new brick: its centre, and a unit of its own in the second layer."""
        old: Any = self.nets[self.sites[site]]
        first = torch.cat([old[0].weight, nn.functional.normalize(centre, dim=0)[None]])
        self.nets[self.sites[site]] = net = _selector_net(first)
        net[2].weight[:-1, :-1] = old[2].weight


def _selector_net(first: Float[Tensor, "bricks d"]) -> Any:
    bricks, d = first.shape
    net: Any = nn.Sequential(nn.Linear(d, bricks, bias=False), nn.Tanh(), nn.Linear(bricks, bricks, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(first)
        net[2].weight.copy_(torch.eye(bricks))
    return net


def _fit(
    net: nn.Module, x: Tensor, scores: Tensor, keep: float, epochs: int, batch_size: int, lr: float, seed: int
) -> float:
    generator = torch.Generator().manual_seed(seed)
    x = nn.functional.normalize(x, dim=1)
    order = torch.randperm(len(x), generator=generator)
    held, train = order[: max(1, len(x) // 10)], order[max(1, len(x) // 10) :]
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    best, kept = -1.0, {}
    for epoch in range(epochs + 1):
        with torch.no_grad():
            share = float(captured(scores[held], top_bricks(net(x[held]), keep)))
        if share > best:
            best, kept = share, {name: value.clone() for name, value in net.state_dict().items()}
        for batch in train[torch.randperm(len(train), generator=generator)].split(batch_size) if epoch < epochs else ():
            optimizer.zero_grad()
            target = scores[batch] / scores[batch].max().clamp_min(1e-12)
            nn.functional.binary_cross_entropy_with_logits(net(x[batch]), target).backward()
            optimizer.step()
    net.load_state_dict(kept)
    return best


def kept_bricks(keep: float, bricks: int) -> int:
    """How many bricks a share is, to the nearest; at least one unless the share is 0. ValueError outside [0, 1]."""
    if not 0 <= keep <= 1:
        raise ValueError(f"keep={keep}: expected a share of the bricks in [0, 1]")
    return max(1, round(keep * bricks)) if keep else 0


def top_bricks(scores: Float[Tensor, "tokens bricks"], keep: float) -> Bool[Tensor, "tokens bricks"]:
    """The share of bricks with the highest scores of each row."""
    count = kept_bricks(keep, scores.shape[1])
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(count, dim=1).indices, True)


def captured(scores: Float[Tensor, "tokens bricks"], chosen: Bool[Tensor, "tokens bricks"]) -> Float[Tensor, ""]:
    """The share of activity that lies in the chosen bricks, averaged over tokens (1 where a token has none)."""
    total = scores.sum(1)
    share = torch.where(total > 0, (scores * chosen).sum(1) / total.clamp_min(1e-30), 1.0)
    return share.mean()


@torch.no_grad()
def collect(
    model: nn.Module, parts: Partition, data: Iterable[Example], tokens: int = 8192
) -> tuple[dict[str, Float[Tensor, "tokens d"]], dict[str, Float[Tensor, "tokens bricks"]]]:
    """What each site reads at the first `tokens` places of the data, and the true scores of its bricks there."""
    slots, _ = wanted_slots(model, parts.labels)
    oracle = Oracle(model, parts)
    inputs: dict[str, list[Tensor]] = {slot.site.name: [] for slot in slots}
    counted = 0
    with evaluating(model), capture_inputs(model, [slot.site for slot in slots]) as read:
        for example in data:
            if counted < tokens:
                call(model, example)
                for name, parts_of in inputs.items():
                    x = next(iter(read[name].values()))
                    parts_of.append(x.flatten(0, -2))
                counted += len(next(iter(inputs.values()))[-1])
    if not counted:
        raise ValueError("collect(data=...): there is no batch; give at least one")
    found = {name: torch.cat(xs)[:tokens] for name, xs in inputs.items()}
    return found, {slot.site.name: oracle(slot.site, found[slot.site.name]) for slot in slots}


def choose(
    model: nn.Module, parts: Partition, prompt: Example, keep: float, selector: Selector | None = None
) -> dict[str, list[int]]:
    """The bricks of each site with the highest mean score over a prompt: a set for `extract` or `route`.

    By what they really do (`Oracle`) unless a selector is given.
    """
    selector = selector or Oracle(model, parts)
    slots, _ = wanted_slots(model, parts.labels)
    inputs, scores = collect(model, parts, [prompt], tokens=10**9)
    found = {}
    for slot in slots:
        name = slot.site.name
        score = scores[name] if isinstance(selector, Oracle) else selector(slot.site, inputs[name]).detach()
        found[name] = top_bricks(score.mean(0, keepdim=True), keep)[0].nonzero()[:, 0].tolist()
    return found


# --- computing the chosen bricks alone ------------------------------------------------------------------------------


@dataclass
class Routing:
    """What `route` did: by site, how many brick computations were made, and how many the dense model would make."""

    made: dict[str, int] = field(default_factory=dict)
    dense: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share of brick computations that were made."""
        return sum(self.made.values()) / max(1, sum(self.dense.values()))


@contextmanager
def route(
    model: nn.Module,
    parts: Partition,
    keep: float = 0.2,
    *,
    level: str = "token",
    selector: Selector | None = None,
    prompt: Example | None = None,
    bricks: Mapping[str, list[int]] | None = None,
) -> Iterator[Routing]:
    """Within the block every pass computes only the chosen share of bricks of each partitioned layer.

    `level` "token", "sequence" or "instruction"; the last takes its set from a `prompt` or as `bricks` by site. The
    selector is `Oracle` unless one is given. The rows and columns of other bricks are not multiplied. The model is as
    before afterwards. Raises ValueError for another level, a share outside [0, 1], or an instruction without its set.

    >>> from neuropil.interpret.bricks import partition_bricks
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.randn(5, 4)
    >>> with route(net, partition_bricks(net, 4), keep=0.5) as routing:
    ...     out = net(x)
    >>> routing.share
    0.5
    """
    if level not in LEVELS:
        raise ValueError(f"level={level!r}: expected one of {', '.join(LEVELS)}")
    kept_bricks(keep, 1)
    if level == "instruction" and bricks is None:
        if prompt is None:
            raise ValueError("level='instruction' takes its set from prompt=..., or as bricks=...")
        bricks = choose(model, parts, prompt, keep, selector)
    selector = selector or Oracle(model, parts)
    slots, left = wanted_slots(model, parts.labels)
    routing, rows = Routing(left=left), [1]
    writers: dict[int, _Slot] = {}

    def count_rows(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows[0] = tensors({str(i): x for i, x in enumerate([*args, *kwargs.values()])})[0].shape[0]

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(count_rows, with_kwargs=True).remove)
        for slot in slots:
            fixed = bricks.get(slot.site.name) if bricks is not None else None
            if level == "instruction" and fixed is None:
                continue
            choice = _choice(slot.site, parts, keep, level, selector, rows, fixed)
            _Slot(slot, parts, choice, routing, stack, writers)
        yield routing


def _choice(
    site: Site, parts: Partition, keep: float, level: str, selector: Selector, rows: list[int], fixed: Any
) -> Callable[[Tensor], Tensor]:
    """From what is read to which bricks are computed: one row a token, or a single row for all."""
    if fixed is not None:
        return lambda x: torch.isin(torch.arange(parts.counts[site.name]), torch.tensor(fixed, dtype=torch.long))[None]
    if level == "token":
        return lambda x: top_bricks(selector(site, x), keep)

    def by_sequence(x: Tensor) -> Tensor:
        scores = selector(site, x).unflatten(0, (rows[0], -1)).mean(1)
        chosen = top_bricks(scores, keep)
        return chosen if rows[0] == 1 else chosen.repeat_interleave(len(x) // rows[0], 0)

    return by_sequence


class _Slot:
    """Puts its own forward into the modules of a site while the stack is open."""

    def __init__(
        self, slot: Slot, parts: Partition, choice: Callable[[Tensor], Tensor], routing: Routing, stack: ExitStack,
        writers: dict[int, _Slot],
    ) -> None:  # fmt: skip
        self.slot, self.choice, self.routing, self.stack = slot, choice, routing, stack
        self.neurons = [mask.nonzero()[:, 0] for mask in parts.members(slot.site.name)]
        self.active: Tensor | None = None
        self.weights: dict[Any, tuple[Tensor, Tensor, Tensor | None]] = {}  # what was gathered, for the next pass
        for module, weights in slot.readers:
            self._replace(module, partial(self.read, module, weights, writers.get(id(module))))
        writers[id(slot.write)] = self
        self._replace(slot.write, partial(self.write, slot.write))

    def _replace(self, module: Any, forward: Callable[[Tensor], Tensor]) -> None:
        before = module.__dict__.get("forward")
        module.forward = forward
        undo = partial(module.__dict__.pop, "forward", None) if before is None else partial(
            module.__dict__.__setitem__, "forward", before)  # fmt: skip
        self.stack.callback(undo)

    def read(self, module: Any, weights: list[Any], writer: _Slot | None, x: Tensor) -> Tensor:
        """The chosen neurons' outputs, zero elsewhere; `writer` is the site that writes by this very matrix, if any."""
        flat = x.flatten(0, -2) if writer is None else writer.masked(x.flatten(0, -2))
        if self.active is None:
            self.active = self.choice(flat)
            dense = len(flat) * self.active.shape[1]
            made = int(self.active.sum()) * (len(flat) if len(self.active) == 1 else 1)
            name = self.slot.site.name
            self.routing.made[name] = self.routing.made.get(name, 0) + made
            self.routing.dense[name] = self.routing.dense.get(name, 0) + dense
        out = flat.new_zeros(len(flat), module.weight.shape[weights[0].axis])
        for tokens, key in self._groups():
            where, weight, bias = self._gathered(module, weights, key)
            found = nn.functional.linear(flat if tokens is None else flat[tokens], weight, bias)
            if tokens is None:
                out[:, where] = found
            else:
                out[tokens[:, None], where] = found
        return out.unflatten(0, x.shape[:-1])

    def write(self, module: Any, h: Tensor) -> Tensor:
        """The sum of what the chosen bricks write, and the bias."""
        flat = h.flatten(0, -2)
        width = module.weight.shape[1 - self.slot.write_weight.axis]
        out = flat.new_zeros(len(flat), width) if module.bias is None else module.bias.expand(len(flat), -1).clone()
        for tokens, key in self._groups():
            where, weight, _ = self._gathered(module, [self.slot.write_weight], key)
            found = nn.functional.linear((flat if tokens is None else flat[tokens])[:, where], weight.T)
            out = out + found if tokens is None else out.index_add(0, tokens, found)
        self.active = None
        return out.unflatten(0, h.shape[:-1])

    def masked(self, flat: Tensor) -> Tensor:
        """The activations with those of bricks that were left out at zero."""
        assert self.active is not None, "a layer wrote before it read"
        mask = torch.zeros(len(self.active), flat.shape[1], dtype=torch.bool)
        for brick, neurons in enumerate(self.neurons):
            mask[:, neurons] = self.active[:, brick : brick + 1]
        self.active = None
        return flat * mask

    def _groups(self) -> Iterator[tuple[Tensor | None, tuple[int, ...]]]:
        """Which tokens (None: all) take which bricks: one brick at a time, or one set where all tokens share it."""
        assert self.active is not None, "a layer wrote before it read"
        if len(self.active) == 1:
            yield None, tuple(self.active[0].nonzero()[:, 0].tolist())
            return
        for brick in range(self.active.shape[1]):
            tokens = self.active[:, brick].nonzero()[:, 0]
            if len(tokens):
                yield tokens, (brick,)

    def _gathered(
        self, module: Any, weights: list[Any], bricks: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of a module, the places of some bricks' neurons, their weights one row each, and their biases."""
        key = (id(module), bricks)
        if key not in self.weights or torch.is_grad_enabled():
            if len(bricks) != 1:
                self.weights = {k: v for k, v in self.weights.items() if k[0] != id(module) or len(k[1]) == 1}
            own = [self.neurons[b] for b in bricks]
            neurons = torch.cat(own) if own else torch.zeros(0, dtype=torch.long)
            where = places(weights, neurons)
            bias = getattr(module, "bias", None)
            reads = module is not self.slot.write
            rows = module.weight.movedim(weights[0].axis, 0)[where].contiguous()
            self.weights[key] = where, rows, bias[where] if reads and bias is not None else None
        return self.weights[key]
