r"""Which training examples matter? Scores from a few short trainings say which to keep, to drop or to distrust.

For a classifier with logits $f(w, x)$, $p = softmax(f)$ and one-hot label y, the paper's two scores of an
example are means over networks that were initialised and trained apart, for a small part of training:
$$EL2N = E_w \lVert p(w, x) - y \rVert_2, \qquad GraNd = E_w \lVert \nabla_w \ell(p(w, x), y) \rVert_2,$$
GraNd over all trainable parameters. The norm is taken of each network, then the mean.

>>> import torch
>>> from torch import nn
>>> from neuropil.data import digits
>>> images = digits(); data = (images.train_x, images.train_y)
>>> def small():
...     return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
>>> scores = train_and_score(small, data, n_runs=2, epochs=2)      # in the paper: 10 runs, up to 20 epochs
>>> kept = keep(scores.mean, 0.7)                                  # the hardest 70 %, for torch's Subset
>>> len(kept)
1006
>>> el2n_scores([small(), small()], data).shape                    # of networks that are trained already
torch.Size([1437])
>>> suspects(scores.mean, 20).shape                                # the hardest first: look at their labels
torch.Size([20])

`kind` names the score: "el2n"; "grand"; "grand_last", of the last linear layer alone, which is
$\lVert p - y\rVert\sqrt{\lVert h\rVert^2 + 1}$ and costs no more than EL2N; "el1n"; "max_margin",
$\max_{k \ne y} p_k - p_y$; "sum_margin", $\sum_{k \ne y} (p_k - p_y)$; "centred", the norm of
$\nabla_w \sum_k f_k$ less its class-balanced mean; "loss"; and, of `train_and_score` alone, "forgetting"
(`neuropil.measure.forgetting`). Large is hard in all of them.

What to expect. Dropping easy examples pays where data are plentiful for the network; where they are scarce, keeping
the hardest can be no better than chance, or worse. Wrong labels gather among the highest scores, so drop the highest
few per cent (`keep(..., offset=...)`) where labels are noisy; to find wrong labels, the mean "loss" of the same
networks serves no worse (see the reproduction). *GraNd at initialisation*, which the paper found useful, did not hold
up: a later re-run (arXiv:2303.14753) found it to follow the norm of the input; `train_and_score` warns.

*Order.* Examples are read, and networks trained, in an order derived from a hash of each example. Scores
therefore belong to the example: permuting the data set permutes them, to the bit, trained networks included, and
equal examples score alike. The batch size changes them within rounding.

Models are scored in evaluation mode, on any device, and left as they were. An input is a tensor, or a dict of
tensors passed as keyword arguments; outputs with `.logits` are understood. Beyond the paper: float labels
[n, classes] stand for several labels an example, with a sigmoid in place of the softmax ("el2n", "el1n", "loss",
"grand", "grand_last"). Not handled, and refused: labels of single tokens, modules that mix the examples of a batch,
and, for "grand" and "centred", models that torch.func cannot vectorise.

The paper leaves open, or differs: (1) networks differ in initialisation and in minibatch order, from seeds `seed`,
`seed + 1`, ... (the released code: 42 + 424242 r); (2) the last, smaller minibatch of an epoch is trained on, not
dropped, so that every example is seen; (3) the class-balanced mean of "centred" weighs all examples of a class
alike, where the release draws a random subset; (4) a mean over runs of forgetting scores is infinite where one run
never learned the example: the table of single runs is kept too; (5) training on a subset, best for as many steps
as on the full set, is left to the user.

Source: Mansheej Paul, Surya Ganguli and Gintare Karolina Dziugaite, "Deep learning on a data diet: finding
important examples early in training", NeurIPS 2021, arXiv:2107.07075. The loss surface and the kernel of easy and
hard examples are in `neuropil.measure.data_diet_landscape`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.utils.data import DataLoader

from neuropil.evaluate import evaluating
from neuropil.measure._data_diet_examples import (
    Data,
    Examples,
    Function,
    Inputs,
    Labels,
    check,
    check_classes,
    logits_of,
    networks,
)
from neuropil.measure._data_diet_gradients import (
    centred_norms,
    error_vectors,
    gradient_norms,
    last_layer_norms,
    losses,
)
from neuropil.measure.data_diet_selection import keep, permute_labels, suspects
from neuropil.measure.forgetting import Forgetting
from neuropil.report import write_atomically
from neuropil.training import fit

__all__ = [
    "KINDS",
    "Scores",
    "el2n_scores",
    "example_scores",
    "grand_scores",
    "keep",
    "paper_optimizer",
    "permute_labels",
    "suspects",
    "train_and_score",
]

KINDS = ("el2n", "el1n", "max_margin", "sum_margin", "loss", "grand", "grand_last", "centred")
GRADIENTS = ("grand", "centred")
FORMAT = b"neuropil.data_diet"


def el2n_scores(models: nn.Module | Sequence[nn.Module], data: Data, *, batch_size: int = 256) -> Float64[Tensor, " n"]:
    """EL2N of every example, the mean over the models, in the order of the data: 0 to sqrt(2).

    data   (inputs, labels), or a map-style data set of such pairs that gives an example the same each time

    Raises ValueError for labels out of range or a data set that shuffles or augments, ModelError for logits that
    are not finite or depend on the other examples of the batch.
    """
    return example_scores(models, data, "el2n", batch_size=batch_size).mean(0)


def grand_scores(
    models: nn.Module | Sequence[nn.Module], data: Data, *, last_layer: bool = False, batch_size: int = 32
) -> Float64[Tensor, " n"]:
    """GraNd of every example, the mean over the models, in the order of the data.

    Exact, over all parameters that require gradients, by torch.func; memory: batch_size gradients. `last_layer`
    takes the last linear layer alone, from one forward pass. Raises what `el2n_scores` raises, and ModelError
    where there is no such layer, nothing to train, or torch.func cannot vectorise the model.
    """
    return example_scores(models, data, "grand_last" if last_layer else "grand", batch_size=batch_size).mean(0)


def example_scores(
    models: nn.Module | Sequence[nn.Module], data: Data, kind: str = "el2n", *, batch_size: int | None = None
) -> Float64[Tensor, "runs n"]:
    """The score of every example by every model; `kind` is one of `KINDS`. Default batch: 32 for gradients, else 256.

    Raises what `el2n_scores` and `grand_scores` raise.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}; expected one of {', '.join(KINDS)}")
    examples = Examples(data)
    return torch.stack([_score(model, examples, kind, batch_size) for model in networks(models)])


def _score(model: nn.Module, examples: Examples, kind: str, batch_size: int | None) -> Tensor:
    size = batch_size if batch_size is not None else (32 if kind in GRADIENTS else 256)
    with evaluating(model), torch.no_grad():
        check(model, next(examples.batches(size))[0], examples.labels)
        found = examples.map(_function(kind, model, examples, size), size)
    if not bool(found.isfinite().all()):
        place = int((~found.isfinite()).nonzero()[0])
        raise ValueError(f"example {place} has score {found[place]}; look for NaN or infinity in its input")
    return found


def _function(kind: str, model: nn.Module, examples: Examples, batch_size: int) -> Function:
    """What gives a batch's scores."""
    if kind == "grand":
        return gradient_norms(model)
    if kind == "grand_last":
        return last_layer_norms(model)
    if kind == "centred":
        return centred_norms(model, examples, batch_size)
    return lambda inputs, y: _of_logits(kind, logits_of(model, inputs), y)


def _of_logits(kind: str, logits: Tensor, y: Tensor) -> Tensor:
    if kind == "loss":
        return losses(logits.cpu().double(), y)
    error = error_vectors(logits, y)
    if kind in ("el2n", "el1n"):
        return torch.linalg.vector_norm(error, ord=2 if kind == "el2n" else 1, dim=1)
    if y.ndim != 1:
        raise ValueError(f"{kind!r} needs one integer label an example; for several, take 'el2n' or 'el1n'")
    own = nn.functional.one_hot(y.cpu().long(), logits.shape[1]).bool()
    right = error[own] + 1  # p_y
    margins = error.masked_fill(own, -torch.inf) - right[:, None]
    return margins.amax(1) if kind == "max_margin" else margins.masked_fill(own, 0).sum(1)


# --- training the networks that score --------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Scores of n examples by a number of networks, in the order of the data set."""

    per_run: Float64[Tensor, "runs n"]
    labels: Labels
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> Float64[Tensor, " n"]:
        """The score: the mean over runs."""
        return self.per_run.mean(0)

    def save(self, path: Path | str) -> Path:
        """Write a Parquet table, under a temporary name that is renamed when it is whole.

        A row an example, in the order of the data set: `index`, `label`, `score` (the mean) and `run_0`, `run_1`, ...
        """
        columns = {"index": torch.arange(self.per_run.shape[1]).numpy(), "label": self.labels.tolist()}
        runs = {f"run_{number}": run.numpy() for number, run in enumerate(self.per_run)}
        table = pa.table({**columns, "score": self.mean.numpy(), **runs})
        table = table.replace_schema_metadata({FORMAT: json.dumps(self.settings)})
        stream = pa.BufferOutputStream()
        pq.write_table(table, stream)
        return write_atomically(Path(path), stream.getvalue().to_pybytes())

    @classmethod
    def load(cls, path: Path | str) -> Scores:
        """Read what `save` wrote. Raises ValueError for another or a damaged file, FileNotFoundError for none."""
        try:
            table = pq.read_table(Path(path), memory_map=False)
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{path} is no readable Parquet file ({error}); score the examples again") from error
        settings = (table.schema.metadata or {}).get(FORMAT)
        if settings is None:
            raise ValueError(f"{path} holds no scores of this library; expected a file written by Scores.save")
        runs = [name for name in table.column_names if name.startswith("run_")]
        per_run = torch.stack([torch.tensor(table[name].to_numpy()) for name in runs])
        return cls(per_run, torch.tensor(table["label"].to_pylist()), json.loads(settings))


def paper_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The paper's: SGD, learning rate 0.1 (constant in the early epochs), Nesterov momentum 0.9, weight decay 5e-4."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def train_and_score(
    factory: Callable[[], nn.Module],
    data: Data,
    kind: str = "el2n",
    *,
    n_runs: int = 10,
    epochs: int = 20,
    seed: int = 0,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = paper_optimizer,
    augment: Callable[[Inputs], Inputs] | None = None,
    train_batch_size: int = 128,
    batch_size: int | None = None,
    accelerator: str = "cpu",
    progress: bool = False,
) -> Scores:
    """Train `n_runs` networks for `epochs` on all of the data, and score every example by each of them.

    factory   makes a fresh network; called under seed + r for run r, with which minibatches are drawn too
    kind      one of `KINDS`, or "forgetting", counted while training: for that one, train to the end
    augment   changes the inputs of training minibatches (crops, flips); scores are of the examples as they are

    The caller's random state is left as it was. Raises ValueError for a factory that gives the same network
    twice and what `example_scores` raises; ModelError where training diverges; warns of GraNd at initialisation.
    """
    if kind not in (*KINDS, "forgetting"):
        raise ValueError(f"kind {kind!r}; expected one of {', '.join((*KINDS, 'forgetting'))}")
    if n_runs < 1 or epochs < (kind == "forgetting"):
        raise ValueError(f"n_runs={n_runs}, epochs={epochs}; expected one run or more, and epochs to count forgetting")
    if epochs == 0 and kind in ("grand", "grand_last"):
        warnings.warn(
            "GraNd at initialisation was not useful when the paper was re-run (arXiv:2303.14753): it follows the norm "
            "of the input. Train for an epoch or more.",
            stacklevel=2,
        )
    examples = Examples(data)
    runs: list[Tensor] = []
    last = None
    for number in range(n_runs):
        with _seeded(seed + number):
            model = factory()
        if model is last:
            raise ValueError("the factory gave the same network twice, so runs would share weights; build one in it")
        last = model
        check_classes(model, examples)
        tracker = Forgetting(len(examples)) if kind == "forgetting" else None
        train = {"epochs": epochs, "seed": seed + number, "accelerator": accelerator, "progress": progress}
        _train(model, examples, optimizer, augment, tracker, train_batch_size, train)
        runs.append(_score(model, examples, kind, batch_size) if tracker is None else examples.alike(tracker.scores()))
    settings = {"kind": kind, "epochs": epochs, "seeds": [seed + r for r in range(n_runs)]}
    return Scores(torch.stack(runs), examples.labels, settings)


def _train(
    model: nn.Module,
    examples: Examples,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    augment: Callable[[Inputs], Inputs] | None,
    tracker: Forgetting | None,
    batch_size: int,
    options: dict[str, Any],
) -> None:
    def loss(network: nn.Module, batch: tuple[Inputs, Tensor, Tensor]) -> Tensor:
        inputs, y, places = batch
        logits = logits_of(network, inputs if augment is None else augment(inputs))
        if tracker is not None:
            tracker.update(places, logits, y)
        return losses(logits, y).mean()

    loader = DataLoader(examples, batch_size, shuffle=True, collate_fn=lambda batch: batch)
    model.train()
    fit(model, loader, loss, optimizer(model.parameters()), **options)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
