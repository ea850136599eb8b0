"""Reading labelled examples in an order that is theirs, and asking models about them in evaluation mode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, default_collate

from neuropil.errors import ModelError
from neuropil.evaluate import evaluating

Inputs = Tensor | Mapping[str, Tensor]
Labels = Int[Tensor, " n"] | Float[Tensor, "n classes"]
Data = tuple[Any, Any] | Dataset | DataLoader
Function = Callable[[Inputs, Tensor], Tensor]

MIXES = (
    "it mixes the examples of a batch even in evaluation mode, so an example has no score of its own. Give BatchNorm "
    "running statistics (track_running_stats=True), or use LayerNorm or GroupNorm"
)
READ = 1024  # examples looked at together when the order is found


class Examples(Dataset):
    """A labelled data set in an order that depends on nothing but the examples themselves.

    Batches read from it, and networks trained on it, are the same to the bit however the user's set is
    ordered. The order is that of a hash of every example, which also tells whether a set gives the same
    example twice the same: one that augments does not.
    """

    def __init__(self, data: Data) -> None:
        self.data, self.size = data, _size(data)
        self.keys: list[bytes] = []
        labels = []
        for rows in torch.arange(self.size).split(READ):
            inputs, y = self._read(rows)
            self.keys += _digests(inputs, y)
            labels.append(y.cpu())
        self.labels: Tensor = torch.cat(labels)
        places = sorted(range(self.size), key=self.keys.__getitem__)
        self.order = torch.tensor(places)
        first: dict[bytes, int] = {}
        for place in places:
            first.setdefault(self.keys[place], place)
        number = {key: i for i, key in enumerate(first)}
        self.distinct = torch.tensor(list(first.values()))  # the place of one of each set of equal examples
        self.which = torch.tensor([number[key] for key in self.keys])

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, rows: list[int]) -> tuple[Inputs, Tensor, Tensor]:
        """A training batch: inputs, labels, and the examples' places in the user's set."""
        places = self.order[rows]
        return *self._checked(places), places

    def batches(self, batch_size: int) -> Iterator[tuple[Inputs, Tensor]]:
        """The distinct examples, in their own order."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
        for places in self.distinct.split(batch_size):
            yield self._checked(places)

    def map(self, function: Function, batch_size: int) -> Float[Tensor, " n"]:
        """`function(inputs, labels) -> [b]` of every example, in the order of the user's set."""
        parts = [function(inputs, y).cpu().double() for inputs, y in self.batches(batch_size)]
        return torch.cat(parts)[self.which]

    def alike(self, scores: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Give equal examples the mean of their scores, so that which of them stands first does not matter."""
        sums = torch.zeros(len(self.distinct), dtype=scores.dtype).index_add(0, self.which, scores)
        return (sums / self.which.bincount())[self.which]

    def _read(self, places: Tensor) -> tuple[Inputs, Tensor]:
        if isinstance(self.data, tuple):
            inputs, labels = self.data
            if isinstance(inputs, Mapping):
                return {name: values[places] for name, values in inputs.items()}, labels[places]
            return inputs[places], labels[places]
        pairs = [self.data[place] for place in places.tolist()]  # type: ignore[index]
        batch = default_collate(pairs)
        if not isinstance(batch, list | tuple) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            raise ValueError("the data set does not give pairs (input, label); wrap it in one that does")
        return batch[0], batch[1]

    def _checked(self, places: Tensor) -> tuple[Inputs, Tensor]:
        inputs, y = self._read(places)
        if not isinstance(self.data, tuple):
            for place, key in zip(places.tolist(), _digests(inputs, y), strict=True):
                if key != self.keys[place]:
                    raise ValueError(
                        f"example {place} was read twice and was not the same: the data set augments or shuffles. "
                        "Score it without augmentation (for training, see `augment`)"
                    )
        return inputs, y


def _size(data: Data) -> int:
    if isinstance(data, DataLoader):
        raise ValueError("a DataLoader was given; scores have the order of a data set: pass the loader's `.dataset`")
    if not isinstance(data, tuple):
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ValueError(f"{type(data).__name__} has no length or no indices; expected a map-style data set")
        if len(data) == 0:
            raise ValueError("the data set is empty")
        return len(data)
    inputs, labels = data if len(data) == 2 else (None, None)
    tensors = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    if not isinstance(labels, Tensor) or not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise ValueError("expected (inputs, labels): a tensor or a dict of tensors, and a tensor of labels")
    sizes = {len(t) for t in (*tensors, labels)}
    if len(sizes) > 1 or not len(labels):
        raise ValueError(f"inputs and labels have {sorted(sizes)} examples; expected one number above 0")
    return len(labels)


def _digests(inputs: Inputs, y: Tensor) -> list[bytes]:
    """A hash of the bytes of each example."""
    tensors = [inputs[name] for name in sorted(inputs)] if isinstance(inputs, Mapping) else [inputs]
    flat = [t.detach().cpu().reshape(len(y), -1).contiguous().view(torch.uint8) for t in (*tensors, y)]
    rows = torch.cat(flat, 1).numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


def networks(models: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """The models as a list; a ModuleList is a list of models, any other module is one."""
    one = isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList)
    found: list[nn.Module] = [models] if one else list(models)  # type: ignore[list-item,arg-type]
    if not found:
        raise ValueError("no model was given; expected one or more")
    return found


def device_of(model: nn.Module) -> torch.device:
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    if isinstance(inputs, Mapping):
        return {name: values.to(device) for name, values in inputs.items()}
    return inputs.to(device)


def logits_of(model: nn.Module, inputs: Inputs, state: dict[str, Tensor] | None = None) -> Float[Tensor, "b classes"]:
    """The model's logits, with its own weights or those of `state`. A dict is passed as keyword arguments."""
    inputs = moved(inputs, device_of(model))
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
    out = model(*args, **kwargs) if state is None else functional_call(model, state, args, kwargs)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        given = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"the model gives {given}; expected logits [examples, classes] of a classifier")
    return logits


def check_classes(model: nn.Module, examples: Examples) -> None:
    """Raise where the labels and the model's logits do not go together."""
    with evaluating(model), torch.no_grad():
        check_labels(examples.labels, logits_of(model, next(examples.batches(2))[0]).shape[1])


def check(model: nn.Module, inputs: Inputs, labels: Tensor) -> None:
    """Raise where logits and labels do not go together, or where an example's logits depend on its batch.

    `inputs` is one batch, `labels` are those of all the data.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ModelError(f"{name or 'the model'} is a BatchNorm without running statistics, {MIXES}")
    with torch.no_grad():
        logits = logits_of(model, inputs)
        check_labels(labels, logits.shape[1])
        if not bool(logits.isfinite().all()):
            raise ModelError("the model gives logits that are not finite; look for NaN in its weights or in the data")
        alone = logits_of(model, first(inputs))
    bound = 1e-2 if logits.dtype in (torch.float16, torch.bfloat16) else 1e-3
    if float((alone[0] - logits[0]).abs().max()) > bound * (1 + float(logits[0].abs().max())):
        raise ModelError(f"the model gives other logits for an example alone than in a batch, or is random: {MIXES}")


def first(inputs: Inputs) -> Inputs:
    if isinstance(inputs, Mapping):
        return {name: values[:1] for name, values in inputs.items()}
    return inputs[:1]


def check_labels(y: Shaped[Tensor, ...], classes: int) -> None:
    """Integer labels below `classes`, or, for several labels an example, floats in 0..1 for each class."""
    if y.ndim == 2 and y.is_floating_point():
        if y.shape[1] != classes or float(y.min()) < 0 or float(y.max()) > 1:
            raise ValueError(f"labels {list(y.shape)} for {classes} logits; expected [n, {classes}] within 0..1")
        return
    if y.ndim != 1 or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(
            f"labels of shape {list(y.shape)} and type {y.dtype}; expected integers [n], or floats [n, classes] "
            "where an example has several labels"
        )
    if classes < 2:
        raise ValueError("the model gives one logit; expected one a class, or float labels [n, 1] for a sigmoid")
    wrong = (y < 0) | (y >= classes)
    if bool(wrong.any()):
        raise ValueError(
            f"label {int(y[wrong][0])}; expected 0 to {classes - 1} for {classes} logits. Leave examples without "
            "a label (-100, say) out of the data set"
        )
