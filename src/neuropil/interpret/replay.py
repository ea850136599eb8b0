"""Run a model again from one block upwards, many times, each time with another neuron set.

A clamp at the last position of a prompt leaves three things as they were: the keys and values of all
positions before it, the blocks below the clamped one, and the clamped block up to its activation. `Replay`
records them once and computes the rest alone. Row `i` of a batch is the same prompt with neuron `n_i` at
value `v_i`:

    y_i = y + (v_i - h[n_i]) W_down[:, n_i]        what the clamped MLP writes; h and y are the clean run's

The blocks above then run on a batch of `[rows, 1, d]` against prefix keys and values that all rows share.
The vocabulary is never computed: what is returned is the input of the output head.

Three ways are kept, from fast to plain, and each site takes the first one that agrees with the plain one:

- `replay`  as above; needs blocks in one ModuleList, each run once and in order, and a linear
  down-projection;
- `rows`    the last position through all blocks on the cached prefix, each row with its own clamp; what
  experts need;
- `plain`   the whole prompt through the whole model, with `neurons.clamp`; no cache needed. (For an expert:
  the last position alone, one row at a time, on a fresh copy of the model's own cache.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuropil._taps import tapped
from neuropil.errors import ModelError
from neuropil.interpret.prefix import SharedPrefixAttention, prefix_cache
from neuropil.neurons import Site, capture, clamp

__all__ = ["WAYS", "Replay", "choose_way", "one_thread", "run_to_head"]

WAYS = ("replay", "rows", "plain")
TOLERANCE = 1e-4  # of the largest entry of the final hidden state


class _Seen(Exception):  # noqa: N818 - no error: it ends a forward pass once the head's input is known
    """Carries the input of the output head out of a forward pass."""


@dataclass(frozen=True)
class _Blocks:
    """The list of blocks that all sites lie in, and the number of the block of each."""

    modules: nn.ModuleList
    of_site: dict[str, int]

    @classmethod
    def find(cls, module: nn.Module, sites: Sequence[Site]) -> _Blocks | None:
        lists = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.ModuleList)]
        for name, modules in lists:  # named_modules goes from outer to inner
            prefix = name + "."
            if all(site.name.startswith(prefix) for site in sites):
                numbers = {s.name: int(s.name[len(prefix) :].split(".")[0]) for s in sites}
                return cls(modules, numbers)
        return None


@contextmanager
def _forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module` compute `forward` for a while; afterwards it is as before."""
    had = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if had is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = had


@contextmanager
def one_thread() -> Iterator[None]:
    """Products of one or few rows are split over threads in ways that round differently; on one they do not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Replay:
    """One prompt of a causal language model, ready to be run again with neurons of its last position set.

    `ids` are the prompt's token ids (at least two). `clean` is the input of the output head at the last
    position, `activations` maps each site to its neurons' values there (an expert that the token is not
    routed to has none). The module's weights are never changed.

    Raises ModelError where the module has no output head or cannot run on token ids alone.
    """

    clean: Float[Tensor, " d"]

    def __init__(self, module: nn.Module, sites: Sequence[Site], ids: Sequence[int]) -> None:
        self.module, self.sites = module, list(sites)
        self.ids = torch.tensor([list(ids)], device=next(module.parameters()).device)
        self.blocks = _Blocks.find(module, sites)
        self.cache: Any = None
        self.outputs: list[Any] = []
        self._writes: dict[str, Tensor] = {}
        with one_thread():
            self.clean, self.activations = self._record_plain()
            self._record_cached()

    def run(
        self, site: Site, neurons: Int[Tensor, " rows"], values: Float[Tensor, " rows"], way: str = "replay"
    ) -> Float[Tensor, "rows d"]:
        """The input of the head at the last position; row `i` has `neurons[i]` of `site` held at `values[i]`.

        `way` is "replay", "rows" or "plain". Raises ModelError where the way does not fit the model.
        """
        with torch.inference_mode():
            return {"replay": self._replay, "rows": self._rows, "plain": self._plain}[way](site, neurons, values)

    def all_up(self, site: Site, value: float) -> Float[Tensor, " width"]:
        """What each neuron's activation would be, were the output of its up-projection `value`."""
        held = {f"{site.number}:{n}": value for n in range(site.width)}
        with (
            torch.inference_mode(),
            clamp(self.module, held, where="up"),
            capture(self.module, [site]) as seen,
        ):
            self._last() if self.cache is not None else self._whole()
        if site.name not in seen:
            return torch.zeros(site.width)
        return seen[site.name].reshape(-1, site.width)[-1].clone()

    # -- the three ways ---------------------------------------------------------------------------------

    def _replay(self, site: Site, neurons: Tensor, values: Tensor) -> Tensor:
        if not self.outputs or self.blocks is None or not _written_linearly(self.module, site):
            raise ModelError(f"site {site.name} of {type(self.module).__name__} cannot be replayed from its block")
        first = self.blocks.of_site[site.name]
        change = (values - self.activations[site.name][neurons])[:, None] * self._write(site)[neurons]

        threads = torch.get_num_threads()

        def write(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            torch.set_num_threads(threads)
            return out + change[:, None, :]

        with ExitStack() as stack:
            stack.enter_context(one_thread())  # until the batch begins
            for block, output in zip(self.blocks.modules[:first], self.outputs, strict=False):
                stack.enter_context(_forward_as(block, lambda *_, output=output, **__: output))
            down = self.module.get_submodule(site.tap.module)
            stack.callback(down.register_forward_hook(write).remove)
            stack.enter_context(SharedPrefixAttention(self.cache))
            return self._last()

    def _rows(self, site: Site, neurons: Tensor, values: Tensor) -> Tensor:
        if self.cache is None:
            raise ModelError(f"{type(self.module).__name__} takes no key-value cache")
        if site.name not in self.activations:  # an expert the token is not routed to writes nothing
            return self.clean.expand(len(neurons), -1)
        index = torch.arange(len(neurons))

        def hold(h: Tensor) -> Tensor:
            h = h.clone()
            own = h.movedim(site.tap.axis, -1)
            if own.dim() == 2:  # experts, and models that flatten [rows, positions], see [rows, width]
                own[index, neurons] = values
            else:
                own[index, -1, neurons] = values
            return h

        with tapped(self.module, [(site.tap, site.width, hold)]):
            return self._last(len(neurons))

    def _plain(self, site: Site, neurons: Tensor, values: Tensor) -> Tensor:
        if site.kind == "expert":
            return self._single(site, neurons, values)
        with capture(self.module, [site]) as seen:
            self._whole()
        h = seen[site.name]
        clean, rows = h.reshape(-1, site.width), len(neurons)
        held: dict[str, Tensor] = {}
        for row, (n, value) in enumerate(zip(neurons.tolist(), values.tolist(), strict=True)):
            held.setdefault(f"{site.number}:{n}", clean[:, n].repeat(rows, 1))[row, -1] = value
        if h.dim() == 2:  # the model flattens [rows, positions] before its MLPs
            held = {address: value.flatten() for address, value in held.items()}
        with clamp(self.module, held):
            return self._whole(rows)

    def _single(self, site: Site, neurons: Tensor, values: Tensor) -> Tensor:
        """One row at a time on a fresh copy of the model's own cache: nothing is shared between rows."""
        before = self.module(input_ids=self.ids[:, :-1], use_cache=True).past_key_values
        found = []
        for n, value in zip(neurons.tolist(), values.tolist(), strict=True):
            with clamp(self.module, {f"{site.number}:{n}": value}):
                found.append(
                    self._final(input_ids=self.ids[:, -1:], past_key_values=copy.deepcopy(before), use_cache=True)
                )
        return torch.cat(found)

    # -- the clean run ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def _record_plain(self) -> tuple[Tensor, dict[str, Tensor]]:
        with capture(self.module, self.sites) as seen:
            clean = self._whole()[0]
        sites = [s for s in self.sites if s.kind != "expert" and s.name in seen]
        return clean, {s.name: seen[s.name].reshape(-1, s.width)[-1].clone() for s in sites}

    @torch.inference_mode()
    def _record_cached(self) -> None:
        """Fill the prefix's cache and note what each block gives for the last position.

        Both stay empty if the model has no such cache or gives another answer with it.
        """
        outputs: dict[int, Any] = {}
        try:
            self.cache = prefix_cache(self.module.config)
            self.module(input_ids=self.ids[:, :-1], past_key_values=self.cache, use_cache=True)
            self.cache.frozen = True
            with ExitStack() as stack, capture(self.module, self.sites) as seen:
                for number, block in enumerate(self.blocks.modules if self.blocks else []):

                    def note(_: nn.Module, __: Any, out: Any, number: int = number) -> None:
                        outputs[number] = out

                    stack.callback(block.register_forward_hook(note).remove)
                last = self._last()[0]
        except (
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ):
            # Each family of models fails in its own way when handed a cache it does not know.
            self.cache = None
            return
        if not _close(last, self.clean):
            self.cache = None
            return
        self.clean = last
        for site in self.sites:
            if site.name in seen:
                self.activations[site.name] = seen[site.name].reshape(-1, site.width)[-1].clone()
        if self.blocks and len(outputs) == len(self.blocks.modules):
            self.outputs = [outputs[number] for number in range(len(outputs))]

    def _write(self, site: Site) -> Float[Tensor, "width d"]:
        assert site.write is not None
        weight = self.module.get_parameter(site.write.name)
        return site.write.rows(weight.detach(), site.width)

    def _last(self, rows: int = 1) -> Tensor:
        ids = self.ids[:, -1:].expand(rows, 1)
        return self._final(input_ids=ids, past_key_values=self.cache, use_cache=True)

    def _whole(self, rows: int = 1) -> Tensor:
        return self._final(input_ids=self.ids.expand(rows, -1))

    def _final(self, **inputs: Any) -> Float[Tensor, "rows d"]:
        hidden = run_to_head(self.module, **inputs)
        return hidden.reshape(-1, hidden.shape[-2], hidden.shape[-1])[:, -1].float()

    def likeness(self, site: Site) -> str:
        """Equal for sites that lie at the same place in blocks of the same class."""
        if self.blocks is None:
            return site.name
        block = type(self.blocks.modules[self.blocks.of_site[site.name]]).__name__
        return f"{site.kind} {block} {site.activation} {site.name.rpartition('.')[2]}"


def run_to_head(module: nn.Module, **inputs: Any) -> Float[Tensor, "*rows positions d"]:
    """Run a model up to its output head, which is not computed, and return the head's input.

    Raises ModelError where the module has no output head or does not use it.
    """
    find: Any = getattr(module, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None:
        raise ModelError(f"{type(module).__name__} has no output head; load a model with a language-model head")

    def stop(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        raise _Seen(hidden)

    with _forward_as(head, stop):
        try:
            module(**inputs)
        except _Seen as seen:
            return seen.args[0]
    raise ModelError(f"{type(module).__name__} ran without using its output head")


def choose_way(replay: Replay, site: Site, neurons: Int[Tensor, " rows"], values: Float[Tensor, " rows"]) -> str:
    """The fastest way that gives for these rows what the plain way gives, to 1e-4 of the largest entry."""
    plain = replay.run(site, neurons, values, "plain")
    for way in WAYS[:-1]:
        try:
            found = replay.run(site, neurons, values, way)
        except (AttributeError, IndexError, KeyError, ModelError, RuntimeError, TypeError, ValueError):
            continue
        if _close(found, plain):
            return way
    return "plain"


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


def _written_linearly(module: nn.Module, site: Site) -> bool:
    """Whether the activation is the whole input of the module that holds the site's write weight."""
    if site.write is None or site.kind == "expert" or site.tap.side != "input":
        return False
    if site.write.name.rpartition(".")[0] != site.tap.module or site.write.block != 1:
        return False
    return module.get_parameter(site.write.name).dim() == 2
