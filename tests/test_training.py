"""Training: resumed to the bit, interrupted between two steps, never unpickled."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from neuropil.data import digits
from neuropil.errors import ModelError
from neuropil.training import Run, fit, supervised

LOSS = supervised(nn.functional.cross_entropy)


def parts(seed: int = 3, lr: float = 0.01) -> tuple[nn.Module, torch.optim.Optimizer, object]:
    """A net with dropout and running statistics, an optimizer with momentum, and a schedule."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10)
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    return net, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    images = digits()
    return images.train_x[:500], images.train_y[:500]


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("stop", [1, 7, 16, 20])
def test_resumed_training_is_bit_identical(data: tuple[Tensor, Tensor], tmp_path: Path, stop: int) -> None:
    # 500 examples in batches of 32 make 16 batches: stopped within an epoch, at its end, and in the second.
    net, optimizer, scheduler = parts()
    straight = fit(net, data, LOSS, optimizer, scheduler=scheduler, steps=40, progress=False)
    first, first_optimizer, first_scheduler = parts()
    fit(
        first, data, LOSS, first_optimizer, scheduler=first_scheduler, steps=40, progress=False,
        checkpoint=tmp_path / "a.ckpt", callbacks=[lambda run: run.step == stop],
    )  # fmt: skip
    assert not same(net, first)
    second, second_optimizer, second_scheduler = parts(seed=99)  # its own weights must not matter
    resumed = fit(
        second, data, LOSS, second_optimizer, scheduler=second_scheduler, steps=40, progress=False,
        checkpoint=tmp_path / "a.ckpt",
    )  # fmt: skip
    assert same(net, second)
    assert resumed.losses == straight.losses
    assert resumed.step == 40
    assert resumed.epoch == 2
    assert second_scheduler.get_last_lr() == scheduler.get_last_lr()
    old, new = optimizer.state_dict()["state"], second_optimizer.state_dict()["state"]
    assert all(torch.equal(old[k]["exp_avg_sq"], new[k]["exp_avg_sq"]) for k in old)


def test_augmentation_by_numpy_resumes_too(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    # Python's own generator is kept too, but cannot be compared here: the tests' type checks draw from it.
    def noisy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        noise = torch.from_numpy(np.random.randn(*x.shape).astype(np.float32))  # noqa: NPY002
        return nn.functional.cross_entropy(model(x + noise), y)

    def trained(path: Path | None, stop: int) -> nn.Module:
        net, optimizer, _ = parts()
        callbacks = [lambda run: run.step == stop]
        fit(net, data, noisy, optimizer, epochs=2, progress=False, checkpoint=path, callbacks=callbacks)
        return net

    trained(tmp_path / "b.ckpt", 5)
    assert same(trained(None, -1), trained(tmp_path / "b.ckpt", -1))


def test_ctrl_c_saves_a_whole_step_and_resumes(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    net, optimizer, _ = parts()
    fit(net, data, LOSS, optimizer, steps=12, progress=False)
    path = tmp_path / "c.ckpt"
    before = signal.getsignal(signal.SIGINT)

    def interrupting(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if interrupting.calls == 4:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step
        interrupting.calls += 1  # type: ignore[attr-defined]
        return LOSS(model, batch)

    interrupting.calls = 0  # type: ignore[attr-defined]
    cut, cut_optimizer, _ = parts()
    with pytest.raises(KeyboardInterrupt):
        fit(cut, data, interrupting, cut_optimizer, steps=12, progress=False, checkpoint=path)
    assert signal.getsignal(signal.SIGINT) is before
    again, again_optimizer, _ = parts(seed=8)
    run = fit(again, data, LOSS, again_optimizer, steps=12, progress=False, checkpoint=path)
    assert run.step == 12
    assert same(net, again)
    assert [file.name for file in tmp_path.iterdir()] == ["c.ckpt"]


def test_a_finished_run_is_not_trained_again(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    net, optimizer, _ = parts()
    fit(net, data, LOSS, optimizer, epochs=1, progress=False, checkpoint=tmp_path / "d.ckpt")
    kept = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    calls: list[int] = []
    run = fit(
        net, data, LOSS, optimizer, epochs=1, progress=False, checkpoint=tmp_path / "d.ckpt",
        callbacks=[lambda run: calls.append(run.step)],
    )  # fmt: skip
    assert run.step == 16
    assert calls == []
    assert all(torch.equal(kept[name], tensor) for name, tensor in net.state_dict().items())


def test_checkpoint_holds_tensors_and_plain_values_only(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    net, optimizer, scheduler = parts()
    fit(
        net,
        data,
        LOSS,
        optimizer,
        scheduler=scheduler,
        steps=3,
        progress=False,
        checkpoint=tmp_path / "e.ckpt",
    )
    state = torch.load(tmp_path / "e.ckpt", weights_only=True)
    assert state["step"] == 3
    assert torch.equal(state["model"]["1.weight"], net.state_dict()["1.weight"])


def test_checkpoint_of_another_training_is_refused(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    net, optimizer, _ = parts()
    path = tmp_path / "f.ckpt"
    fit(net, data, LOSS, optimizer, steps=3, progress=False, checkpoint=path)
    with pytest.raises(ValueError, match="another training"):
        fit(net, data, LOSS, optimizer, steps=5, seed=1, progress=False, checkpoint=path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="no checkpoint of this model"):
        fit(net, data, LOSS, optimizer, steps=5, progress=False, checkpoint=path)


def test_callers_random_state_and_modes_are_kept(data: tuple[Tensor, Tensor]) -> None:
    net, optimizer, _ = parts()
    net[2].eval()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fit(net, data, LOSS, optimizer, steps=2, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert net.training
    assert not net[2].training


def test_it_learns_digits() -> None:
    images = digits()
    net, optimizer, _ = parts()
    fit(net, (images.train_x, images.train_y), LOSS, optimizer, epochs=8, progress=False)
    accuracy = (net.eval()(images.test_x).argmax(1) == images.test_y).float().mean()
    assert accuracy > 0.95


def test_loaders_give_their_batches_in_their_order(data: tuple[Tensor, Tensor]) -> None:
    seen: list[Tensor] = []

    def look(run: Run) -> None:
        seen.append(run.batch[1])

    net, optimizer, _ = parts()
    loader = DataLoader(TensorDataset(*data), batch_size=100, shuffle=False)
    fit(net, loader, LOSS, optimizer, epochs=1, progress=False, callbacks=[look])
    assert torch.equal(torch.cat(seen), data[1])
    shuffled = DataLoader(TensorDataset(*data), batch_size=150, shuffle=True, drop_last=True)
    seen.clear()
    fit(net, shuffled, LOSS, optimizer, epochs=2, progress=False, callbacks=[look])
    assert [len(labels) for labels in seen] == [150] * 6
    assert not torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:]))


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_bad_arguments_say_what_to_do(data: tuple[Tensor, Tensor]) -> None:
    net, optimizer, _ = parts()
    with pytest.raises(ValueError, match="give one of them"):
        fit(net, data, LOSS, optimizer)
    weighted = DataLoader(TensorDataset(*data), sampler=WeightedRandomSampler([1.0] * 500, 500))
    with pytest.raises(ValueError, match="cannot be resumed"):
        fit(net, weighted, LOSS, optimizer, epochs=1)
    with pytest.raises(ValueError, match="cannot be resumed"):
        fit(net, DataLoader(Endless()), LOSS, optimizer, epochs=1)


def test_a_loss_that_is_not_finite_is_an_error(data: tuple[Tensor, Tensor]) -> None:
    net, optimizer, _ = parts(lr=1e30)
    with pytest.raises(ModelError, match=r"loss is .* at step"):
        fit(net, data, LOSS, optimizer, epochs=5, progress=False)
