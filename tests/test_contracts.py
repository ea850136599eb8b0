"""Every implemented method of the catalog keeps the contract of its kind; a wrong specimen of each kind is caught."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import contracts
import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuropil.changes import Changes
from neuropil.papers import Kind, Paper, catalog

HERE = Path(__file__).parent
IMPLEMENTED = [entry for entry in catalog() if entry.implemented]


def the_tests_of(entry: Paper) -> ModuleType:
    """The method's own test module, where its specimen stands."""
    path = HERE / entry.family / f"test_{entry.module}.py"
    assert path.is_file(), f"{entry.slug} has no tests: expected {path}"
    spec = importlib.util.spec_from_file_location(f"specimens.{entry.family}.{entry.module}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert hasattr(module, "specimen"), f"{path} defines no specimen(seed); see tests/contracts.py, {entry.kind}"
    return module


@pytest.mark.parametrize("entry", IMPLEMENTED, ids=lambda entry: entry.slug)
def test_the_method_keeps_the_contract_of_its_kind(entry: Paper) -> None:
    contracts.KINDS[entry.kind](the_tests_of(entry))


def test_every_kind_has_a_contract() -> None:
    assert set(contracts.KINDS) == set(get_args(Kind))
    assert set(WRONG) == set(get_args(Kind))


# ------------------------------------------------------------------------------------- wrong, each in one way


class Batchwise(nn.Module):
    """A layer that looks across the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.flatten(0, -2).mean(0)


class Hidden(nn.Module):
    """A layer with a constant that state_dict does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.rand(()).item() + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Single(nn.Module):
    """A layer that computes in single precision whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.linear.weight.float())


class Detached(nn.Module):
    """A layer whose gradient is not that of what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.detach()


def a_layer(kind: type[nn.Module]) -> Any:
    def specimen(seed: int) -> Any:
        torch.manual_seed(seed)
        return kind(), (torch.randn(4, 3, generator=torch.Generator().manual_seed(7)),)

    return specimen


class Crooked(nn.Module):
    """A parametrisation whose inverse is none."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, w: Tensor) -> Tensor:
        return w


def a_parametrization(seed: int) -> Any:
    torch.manual_seed(seed)
    return nn.Linear(3, 2), lambda m: parametrize.register_parametrization(m, "weight", Crooked()), (torch.ones(4, 3),)


class Forgetful:
    """A schedule whose count of steps is not in its state."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0

    def step(self) -> None:
        self.count += 1
        self.optimizer.param_groups[0]["lr"] = 0.1 / self.count

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def a_schedule(seed: int) -> Any:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()

    return model, optimizer, Forgetful(optimizer), step


def silent(model: nn.Module) -> Changes:
    """A transform that leaves a layer and does not say so."""
    return Changes(model, changed=("0",))


def rough(model: nn.Module) -> Changes:
    """A transform that changes the model it was given, and gives back another."""
    with torch.no_grad():
        model.get_submodule("0").weight.zero_()
    return Changes(nn.Sequential(*model), changed=("0", "1"))


def a_transform(act: Any) -> Any:
    return lambda seed: (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), act, (torch.ones(4, 3),))


class Careless:
    """A rule whose momentum is not in its state."""

    def __init__(self, seed: int) -> None:
        self.weight, self.speed = torch.randn(3, generator=torch.Generator().manual_seed(seed)), torch.zeros(3)

    def step(self, batch: Tensor) -> None:
        self.speed = 0.9 * self.speed - 0.1 * (self.weight - batch)
        self.weight = self.weight + self.speed

    def state_dict(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.weight = state["weight"]


class Meddling(RegressorMixin, BaseEstimator):
    """An estimator that changes its settings and checks nothing."""

    def __init__(self, rate: float = 0.1) -> None:
        self.rate = rate

    def fit(self, x: Any, y: Any) -> Meddling:
        self.rate = 2 * self.rate
        self.mean_ = float(np.mean(y))
        return self

    def predict(self, x: Any) -> Any:
        return np.full(len(x), self.mean_)


def relative(model: Any, data: Tensor, batch_size: int) -> Tensor:
    """A score that depends on which examples share a batch."""
    return torch.cat([part.sum(1) - part.sum(1).mean() for part in data.split(batch_size)])


class Bold(RegressorMixin, BaseEstimator):
    """A law that answers anywhere."""

    def fit(self, x: Any, y: Any) -> Bold:
        self.line_ = np.polyfit(np.asarray(x)[:, 0], y, 1)
        return self

    def predict(self, x: Any, return_std: bool = False) -> Any:
        found = np.polyval(self.line_, np.asarray(x)[:, 0])
        return (found, np.full(len(found), 0.1)) if return_std else found


@dataclass
class Restless:
    """A study whose simulation ignores its seed."""

    theory: Any
    simulated: Any


X = np.linspace(0, 1, 30)[:, None]
WRONG: dict[str, list[Any]] = {
    "layer": [SimpleNamespace(specimen=a_layer(kind)) for kind in (Batchwise, Hidden, Single, Detached)],
    "parametrization": [SimpleNamespace(specimen=a_parametrization)],
    "schedule": [SimpleNamespace(specimen=a_schedule)],
    "transform": [SimpleNamespace(specimen=a_transform(act)) for act in (silent, rough)],
    "rule": [SimpleNamespace(specimen=lambda seed: (Careless(seed), torch.ones(3)))],
    "estimator": [SimpleNamespace(specimen=lambda seed: (Meddling(), X, X[:, 0]))],
    "score": [SimpleNamespace(specimen=lambda seed: (relative, None, torch.randn(10, 3)))],
    "law": [SimpleNamespace(specimen=lambda seed: (Bold(), X, 2 * X[:, 0] + 1), outside=lambda x: x + 9)],
    "study": [
        SimpleNamespace(specimen=lambda seed: lambda seed: Restless(np.ones(3), np.random.default_rng().normal(size=3)))
    ],
}


@pytest.mark.parametrize(("kind", "number"), [(kind, n) for kind, wrong in WRONG.items() for n in range(len(wrong))])
def test_a_wrong_specimen_is_rejected(kind: str, number: int) -> None:
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        contracts.KINDS[kind](WRONG[kind][number])
    assert str(caught.value), "the contract says what is wrong"


class Right(nn.Module):
    """A layer with nothing wrong: the contract can be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


def test_plain_things_keep_the_contracts() -> None:
    from sklearn.tree import DecisionTreeRegressor

    contracts.layer(SimpleNamespace(specimen=a_layer(Right)))
    contracts.estimator(SimpleNamespace(specimen=lambda seed: (DecisionTreeRegressor(random_state=0), X, X[:, 0])))
    contracts.score(
        SimpleNamespace(specimen=lambda seed: (lambda m, data, batch_size: data.sum(1), None, torch.randn(10, 3)))
    )
