r"""Layer by layer through a model: what each layer reads and should answer, and parameters that make it answer so.

Methods that compress after training choose their parameters so that each layer (or block) keeps its output on a few
calibration batches, $\min \sum_x \lVert f(x) - g(\hat x) \rVert^2$ with the plain layer $f$ and the compressed $g$.
`walk` gives $\hat x$ and $f(x)$ for one layer at a time, `minimise` finds the parameters.

>>> from copy import deepcopy
>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
>>> smaller, batches = deepcopy(model), [torch.randn(64, 8) for _ in range(4)]
>>> for seen in walk(model, ["0", "2"], batches, inputs_from=smaller):
...     layer = smaller.get_submodule(seen.name)
...     layer.weight.data = layer.weight.data.half().float()  # round it, then mend what can be
...     losses = minimise(layer, [layer.bias], seen, steps=20)
...     print(seen.name, len(seen.calls), seen.calls[0].output.shape)
0 4 torch.Size([64, 16])
2 4 torch.Size([64, 4])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.errors import ModelError
from neuropil.evaluate import evaluating


class ReconstructionError(ModelError, ValueError):
    """A layer that is not there or never runs, an empty calibration, parameters that went astray."""


@dataclass
class Call:
    """One call of a layer: its arguments and what the plain layer answers (of several, the first)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def rows(self) -> int:
        """How many examples: the output's first dimension."""
        return self.output.shape[0]

    def part(self, rows: Tensor) -> Call:
        """Some of the examples. Tensors of two dimensions or more with one row an example are cut, others kept."""

        def cut(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x[rows] if x.ndim > 1 and x.shape[0] == self.rows else x
            return type(x)(cut(each) for each in x) if type(x) in (tuple, list) else x

        return Call(cut(self.args), {key: cut(value) for key, value in self.kwargs.items()}, self.output[rows])


@dataclass
class Seen:
    """All calls of the layer called `name` over the calibration batches."""

    name: str
    calls: list[Call] = field(default_factory=list)

    def sample(self, batch: int, generator: torch.Generator) -> Call:
        """At most `batch` examples of one call, drawn evenly over all examples."""
        sizes = torch.tensor([float(call.rows) for call in self.calls])
        call = self.calls[int(torch.multinomial(sizes, 1, generator=generator))]
        if batch >= call.rows:
            return call
        rows = torch.randperm(call.rows, generator=generator)[:batch]
        return call.part(rows.to(call.output.device))


def walk(
    model: nn.Module, names: Iterable[str], batches: Iterable[Any], *, inputs_from: nn.Module | None = None
) -> Iterator[Seen]:
    """For each named layer or block, in the order in which they first run: its inputs and the plain model's outputs.

    Parameters
    ----------
    model: the plain model, whose outputs are aimed at.
    batches: tensors, tuples of arguments, or mappings of keyword arguments.
    inputs_from: a model with modules of the same names whose inputs are taken instead, as they are at that moment:
        a copy that the caller compresses while walking (what comes before is then compressed already).

    Only what one layer reads and answers is in memory. For each, the batches run again from the start, up to it.
    Both models run in eval mode without gradients, and are left as they were.
    Raises ReconstructionError where there is no batch, or a name is no module or never runs.
    """
    batches = list(batches)
    if not batches:
        raise ReconstructionError("the calibration is empty: give at least one batch")
    for name, calls in run_order(model, names, batches[0]):
        seen = Seen(name)
        for batch in batches:
            wanted = _captured(model, name, calls, batch)
            inputs = wanted if inputs_from is None else _captured(inputs_from, name, calls, batch)
            for mine, plain in zip(inputs, wanted, strict=True):
                seen.calls.append(Call(mine.args, mine.kwargs, plain.output))
        yield seen


def run_order(model: nn.Module, names: Iterable[str], batch: Any) -> list[tuple[str, int]]:
    """The names in the order in which the modules first run on a batch, each with how often it runs."""
    modules: dict[str, nn.Module] = {}
    for name in names:
        try:
            modules[name] = model.get_submodule(name)
        except AttributeError as error:
            raise ReconstructionError(f"the model has no module {name!r}; see model.named_modules()") from error
    counts: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[name] = counts.get(name, 0) + 1

        return hook

    handles = [module.register_forward_pre_hook(count(name)) for name, module in modules.items()]
    try:
        with _quiet(model):
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if silent := [name for name in modules if name not in counts]:
        raise ReconstructionError(f"{', '.join(silent)} did not run on the first batch; leave it out")
    return list(counts.items())


def run(model: nn.Module, batch: Any) -> Any:
    """The model's answer to a tensor, a tuple or list of arguments, or a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch) if isinstance(batch, Tensor) else model(*batch)


def reached(model: nn.Module, names: Sequence[str], batches: Sequence[Any]) -> set[str]:
    """The names of the modules that run on the first batch; all of them if there is none (which `walk` refuses)."""
    found: set[str] = set()
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: found.add(name)) for name in names
    ]
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches[:1]:
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found if batches else set(names)


def first(out: Any) -> Tensor:
    """The tensor that a module answers with: the first of several."""
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    return out


class _Enough(Exception):  # noqa: N818 - no error: the layer has run
    pass


def _captured(model: nn.Module, name: str, calls: int, batch: Any) -> list[Call]:
    """Arguments and answers of one module on one batch; what comes after its last call is not run."""
    read: list[tuple[Any, Any]] = []
    found: list[Call] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        read.append((_kept(args), _kept(kwargs)))  # now: the layer may work in place

    def after(module: nn.Module, args: Any, out: Any) -> None:
        found.append(Call(*read[len(found)], _kept(first(out))))
        if len(found) == calls:
            raise _Enough

    module = model.get_submodule(name)
    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        with _quiet(model):
            run(model, batch)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def _kept(x: Any) -> Any:
    """Copied, so that a later layer that works in place cannot change it."""
    if isinstance(x, Tensor):
        return x.detach().clone()
    if type(x) in (tuple, list):
        return type(x)(_kept(each) for each in x)
    return {key: _kept(value) for key, value in x.items()} if type(x) is dict else x


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and no cache of keys and values that a second call would lengthen."""
    config = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    if caches:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        if caches:
            config.use_cache = caches  # type: ignore[union-attr]


def mean_error(made: Float[Tensor, "*shape"], wanted: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Squared error summed over features (the last dimension, or channels of images), mean over all else."""
    features = 1 if made.ndim > 2 and made.ndim != 3 else -1
    return (made - wanted).square().sum(features).mean()


def minimise(
    layer: Callable[..., Any],
    parameters: Sequence[Tensor] | Sequence[dict[str, Any]],
    seen: Seen,
    *,
    steps: int = 1000,
    batch: int = 32,
    lr: float = 1e-3,
    loss: Callable[[Tensor, Tensor], Tensor] = mean_error,
    penalty: Callable[[int], Tensor] | None = None,
    after: Callable[[], Any] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    seed: int = 0,
) -> list[float]:
    """Adam on the error between `layer(*args, **kwargs)` and the plain outputs; the loss of each step.

    `parameters` are what is learned, or groups of it with learning rates of their own, as optimizers take them;
    `optimizer(parameters, lr=lr)` makes another optimizer than Adam. No gradient is left in anything else.
    `penalty(step)` is added to the loss; `after()` runs after each step (to project parameters, say). Draws nothing
    from the global generator.
    Raises ReconstructionError where the loss is not finite.
    """
    stepper = optimizer(parameters, lr=lr)
    learned = [p for group in stepper.param_groups for p in group["params"]]
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        call = seen.sample(batch, generator)
        value = loss(first(layer(*call.args, **call.kwargs)), call.output)
        losses.append(float(value.detach()))
        if penalty is not None:
            value = value + penalty(step)
        if not bool(torch.isfinite(value.detach())):
            raise ReconstructionError(f"{seen.name}: the loss is {value.item()} at step {step}; lower the lr")
        for p, gradient in zip(learned, torch.autograd.grad(value, learned, allow_unused=True), strict=True):
            p.grad = gradient
        stepper.step()
        if after is not None:
            after()
    for p in learned:
        p.grad = None
    return losses


@torch.no_grad()
def output_error(layer: Callable[..., Any], seen: Seen, loss: Callable[[Tensor, Tensor], Tensor] = mean_error) -> float:
    """The error over all calls, each weighted by its examples."""
    total = sum(float(loss(first(layer(*c.args, **c.kwargs)), c.output)) * c.rows for c in seen.calls)
    return total / sum(c.rows for c in seen.calls)
