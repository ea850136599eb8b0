"""The one training loop, on Lightning Fabric: seeded, resumable to the bit, on any device that Fabric drives.

>>> import torch
>>> from torch import nn
>>> torch.manual_seed(0) and None
>>> x = torch.randn(64, 3); y = x.sum(1, keepdim=True)
>>> net = nn.Linear(3, 1)
>>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
>>> run = fit(net, (x, y), supervised(nn.functional.mse_loss), optimizer, epochs=20, progress=False)
>>> run.step, run.losses[-1] < 0.01 < run.losses[0]
(40, True)
"""

from __future__ import annotations

import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset

from neuropil.errors import ModelError

Loss = Callable[[nn.Module, Any], Tensor]
Data = Dataset | DataLoader | tuple[Tensor, ...]


@dataclass
class Run:
    """Where training stands: what callbacks are given after every step, and what `fit` returns."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # whole passes over the data done
    step: int = 0  # optimizer steps done
    losses: list[float] = field(default_factory=list)  # of every step
    batch: Any = None  # the last one


Callback = Callable[[Run], Any]


def supervised(criterion: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """The loss of batches `(x, y)`: `criterion(model(x), y)`."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return criterion(model(x), y)

    return loss


def fit(
    model: nn.Module,
    data: Data,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    scheduler: Any = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 32,
    callbacks: Sequence[Callback] = (),
    clip: float | None = None,
    seed: int = 0,
    precision: Any = "32-true",
    accelerator: str = "cpu",
    devices: int | list[int] | str = 1,
    strategy: Any = "auto",
    progress: bool = True,
    checkpoint: str | Path | None = None,
    save_every: int | None = None,
) -> Run:
    """Train `model` in place for so many `epochs` or optimizer `steps`, and return what happened.

    data        a tuple of tensors (first axis: examples), a Dataset, or a DataLoader over one. The order of
                examples is drawn anew for each epoch from `seed` and the epoch's number; a DataLoader gives
                its batch size, collate function and workers, and is gone through in order if it does not
                shuffle.
    loss        `loss(model, batch) -> scalar`; for pairs (x, y) see `supervised`
    scheduler   stepped after every optimizer step
    callbacks   functions of a `Run`, called after every step; one that returns True ends the training
    clip        greatest norm of the gradient
    checkpoint  a file from which training goes on if it exists. It is written at the end, every `save_every`
                steps (by default after each epoch) and on Ctrl-C, whole or not at all. Training that was
                stopped and resumed gives the same weights, to the bit, as training that was not, on the same
                machine and devices.

    The caller's random state is as before afterwards. Raises ValueError for contradictory arguments or a
    checkpoint of another training, ModelError where the loss is not finite, KeyboardInterrupt (after saving)
    on Ctrl-C.
    """
    from lightning_fabric import Fabric

    if (epochs is None) == (steps is None):
        raise ValueError(f"fit(epochs={epochs}, steps={steps}): give one of them")
    fabric = Fabric(accelerator=accelerator, devices=devices, strategy=strategy, precision=precision)
    fabric.launch()
    training = [module for module in model.modules() if module.training]
    with _own_randomness(seed):
        wrapped, stepper = fabric.setup(model, optimizer)
        wrapped.train()
        loop = _Loop(fabric, wrapped, stepper, scheduler, _Order(data, batch_size, seed, fabric), Run(model, optimizer))
        if checkpoint is not None:
            loop.open(Path(checkpoint), save_every)
        total = steps if steps is not None else (epochs or 0) * loop.order.batches
        try:
            with _shown(progress and fabric.is_global_zero, loop.run, total) as tick:
                loop.go(total, loss, clip, [*callbacks, tick])
        finally:
            model.eval()
            for module in training:
                module.training = True
    return loop.run


class _Order:
    """The batches of every epoch, from any position on."""

    def __init__(self, data: Data, batch_size: int, seed: int, fabric: Any) -> None:
        loader = data if isinstance(data, DataLoader) else None
        if loader is not None:
            if not isinstance(loader.sampler, RandomSampler | SequentialSampler) or loader.batch_size is None:
                raise ValueError(
                    f"a DataLoader with a {type(loader.sampler).__name__} cannot be resumed at a position; "
                    "pass its dataset, or a loader with shuffle=True or shuffle=False"
                )
            batch_size = loader.batch_size
        self.dataset: Any = loader.dataset if loader is not None else data
        if isinstance(self.dataset, tuple):
            self.dataset = TensorDataset(*self.dataset)
        self.shuffle = loader is None or isinstance(loader.sampler, RandomSampler)
        self.options: dict[str, Any] = {}
        if loader is not None:
            self.options = {"collate_fn": loader.collate_fn, "num_workers": loader.num_workers}
        self.size, self.seed, self.fabric = len(self.dataset), seed, fabric
        self.rank, self.world = fabric.global_rank, fabric.world_size
        # Every rank gets the same number of batches; a last, smaller one is kept only where there is one rank.
        share = self.size // self.world
        whole = (loader is not None and loader.drop_last) or self.world > 1
        self.batches = share // batch_size if whole else -(-share // batch_size)
        self.batch_size = batch_size
        if self.batches == 0:
            raise ValueError(f"{self.size} examples make no batch of {batch_size} on each of {self.world} devices")

    def identity(self) -> dict[str, int]:
        """What must be the same for a training to be resumed."""
        return {
            "examples": self.size,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "devices": self.world,
        }

    def batches_from(self, epoch: int, position: int) -> Iterator[Any]:
        """The batches of an epoch, without the first `position`, on this rank's device."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
        own = order[self.rank :: self.world].split(self.batch_size)[position : self.batches]
        # Workers' seeds are drawn from this generator too, so that the global one is the model's alone.
        loader = DataLoader(self.dataset, batch_sampler=[b.tolist() for b in own], generator=generator, **self.options)
        for batch in loader:
            yield self.fabric.to_device(batch)


@dataclass
class _Loop:
    fabric: Any
    model: Any
    optimizer: Any
    scheduler: Any
    order: _Order
    run: Run
    checkpoint: Path | None = None
    save_every: int = 0
    whole: bool = True  # False while a step is half done

    def go(self, total: int, loss: Loss, clip: float | None, callbacks: Sequence[Callback]) -> None:
        with _patient() as interrupted:
            try:
                while self.run.step < total:
                    self._epoch(total, loss, clip, callbacks, interrupted)
            except StopIteration:
                pass
            except KeyboardInterrupt:
                if self.whole:
                    self.save()
                raise
        self.save()

    def _epoch(
        self,
        total: int,
        loss: Loss,
        clip: float | None,
        callbacks: Sequence[Callback],
        interrupted: threading.Event,
    ) -> None:
        run, batches = self.run, self.order.batches
        for batch in self.order.batches_from(run.epoch, run.step - run.epoch * batches):
            self.whole = False
            run.batch = batch
            run.losses.append(self._step(batch, loss, clip))
            run.step += 1
            run.epoch = run.step // batches
            self.whole = True
            wishes = [callback(run) for callback in callbacks]  # all of them, whatever the first says
            if interrupted.is_set():
                raise KeyboardInterrupt
            if any(wish is True for wish in wishes):
                raise StopIteration
            if self.checkpoint is not None and run.step % self.save_every == 0:
                self.save()
            if run.step >= total:
                return

    def _step(self, batch: Any, loss: Loss, clip: float | None) -> float:
        self.optimizer.zero_grad()
        value = loss(self.model, batch)
        if not bool(torch.isfinite(value.detach()).all()):
            raise ModelError(
                f"the loss is {value.item()} at step {self.run.step}; lower the learning rate, set "
                "clip=1.0, or look "
                "for NaN in the data (the checkpoint, if any, is from before)"
            )
        self.fabric.backward(value)
        if clip is not None:
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=clip)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return float(value.detach())

    def open(self, path: Path, save_every: int | None) -> None:
        """Write checkpoints to `path`; go on from it if it is there."""
        self.checkpoint, self.save_every = path, save_every or self.order.batches
        if not path.exists():
            return
        state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        try:
            rest = self.fabric.load(path, state, weights_only=True)
        except (RuntimeError, KeyError, EOFError, OSError, ValueError) as error:
            raise ValueError(
                f"{path} is no checkpoint of this model and optimizer ({error}); delete it or name another"
            ) from (error)
        if rest["order"] != self.order.identity():
            raise ValueError(
                f"{path} is of another training: it has {rest['order']}, this one {self.order.identity()}; "
                "delete it or name another file"
            )
        self.run.step, self.run.epoch, self.run.losses = rest["step"], rest["epoch"], list(rest["losses"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(rest["scheduler"])
        self.fabric.strategy.precision.load_state_dict(rest["precision"])
        _set_randomness(rest["randomness"][self.fabric.global_rank])

    def save(self) -> None:
        """Write the checkpoint under a temporary name and rename it."""
        if self.checkpoint is None:
            return
        mine = _randomness()
        everyone: list[Any] = [mine]
        if self.fabric.world_size > 1:
            everyone = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(everyone, mine)
        state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "precision": self.fabric.strategy.precision.state_dict(),
            "randomness": everyone,
            "order": self.order.identity(),
            "step": self.run.step,
            "epoch": self.run.epoch,
            "losses": self.run.losses,
        }
        target = self.checkpoint
        writing = target.with_name(f".{target.name}.writing")
        target.parent.mkdir(parents=True, exist_ok=True)
        self.fabric.save(writing, state)
        if self.fabric.is_global_zero:
            if target.is_dir():  # sharded strategies write a folder
                shutil.rmtree(target)
            writing.replace(target)
        self.fabric.barrier()
        _set_randomness(mine)  # whatever writing drew, training draws the same with and without checkpoints


@contextmanager
def _patient() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a step is never left half done; a second one interrupts at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _shown(show: bool, run: Run, total: int) -> Iterator[Callback]:
    """A progress bar with the loss; a callback that moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4g}"), disable=not show, transient=True) as bar:
        task = bar.add_task("training", total=total, completed=run.step, loss=float("nan"))

        def tick(run: Run) -> None:
            bar.update(task, completed=run.step, loss=run.losses[-1])

        yield tick


def _randomness() -> dict[str, Any]:
    """The state of every generator that training may draw from, as plain values and tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global state is what is kept
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def _set_randomness(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Seed every generator, and put the caller's states back afterwards."""
    before = _randomness()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        _set_randomness(before)
