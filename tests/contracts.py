"""The contract of each kind of method, as a function of the test module that holds the method's `specimen`.

A contract raises AssertionError where it is broken. What a specimen gives is said with each contract.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jaxtyping
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuropil.changes import Changes
from neuropil.errors import Extrapolation

Specimen = Callable[..., Any]
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def first(out: Any) -> Tensor:
    """A module's answer: the first of several."""
    return out[0] if isinstance(out, tuple) else out


def floating(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def equal(a: Any, b: Any) -> bool:
    """Whether two state dictionaries, of whatever nesting, are the same to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    return bool(a == b)


def on_disk(state: Any) -> Any:
    """What comes back after a trip through a file that holds no code."""
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---------------------------------------------------------------------------------------------- the nine kinds


def layer(tests: ModuleType) -> None:
    """`specimen(seed) -> (module, inputs)`; `CORE`: trailing dimensions of the first input that are the layer's."""
    specimen, core = tests.specimen, getattr(tests, "CORE", 1)
    module, inputs = specimen(0)
    out = first(module(*inputs))
    assert torch.isfinite(out).all()
    assert torch.equal(out, first(specimen(0)[0](*inputs))), "two layers of one seed differ"

    other, _ = specimen(1)
    other.load_state_dict(on_disk(module.state_dict()))
    assert torch.equal(first(other(*inputs)), out), "state_dict does not hold all that the layer computes with"

    double = copy.deepcopy(module).double()
    exact = first(double(*floating(inputs, torch.float64)))
    assert exact.dtype == torch.float64, "a layer in double precision answers in single"
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-4)

    if len(inputs) == 1:
        _any_leading_dimensions(module, inputs[0], out, core)
    moved = copy.deepcopy(module).to("meta")
    assert first(moved(*(x.to("meta") for x in inputs))).shape == out.shape

    small = tuple(x[:2] for x in floating(inputs, torch.float64))
    leaves = [x.requires_grad_() for x in small if x.is_floating_point()] + list(double.parameters())
    torch.autograd.gradcheck(lambda *_: first(double(*small)), leaves, fast_mode=True, check_undefined_grad=False)

    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    checking = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)  # the compiler cannot follow the checks of shapes
    try:
        torch.testing.assert_close(first(compiled(*inputs)), out, rtol=1e-4, atol=1e-5)
    finally:
        jaxtyping.config.update("jaxtyping_disable", checking)


def _any_leading_dimensions(module: nn.Module, x: Tensor, out: Tensor, core: int) -> None:
    assert x.dim() > core, "the specimen's input has no leading dimension"
    other = x.flip(0) + 0.5 if x.is_floating_point() else x.flip(0)
    found = first(module(torch.stack([x, other])))  # one leading dimension more
    wanted = torch.stack([out, first(module(other))])
    assert found.shape == wanted.shape, "a leading dimension more changes the shape of the answer"
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def parametrization(tests: ModuleType) -> None:
    """`specimen(seed) -> (model, apply, inputs)`; `apply(model)` registers it in place."""
    model, apply, inputs = tests.specimen(0)
    apply(model)
    made = list(_parametrized(model))
    assert made, "nothing was parametrised"
    out = first(model(*inputs))
    assert torch.isfinite(out).all()
    out.square().mean().backward()
    felt = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters() if p.requires_grad]
    assert any(felt), "no gradient reaches the originals"

    other, apply_other, _ = tests.specimen(1)
    apply_other(other)
    other.load_state_dict(on_disk(model.state_dict()))
    assert torch.equal(first(other(*inputs)), out), "state_dict does not hold all of the parametrisation"

    for module, name in made:
        chain = module.parametrizations[name]
        if all(hasattr(step, "right_inverse") for step in chain):
            wanted = getattr(module, name).detach().clone()
            setattr(module, name, wanted)
            torch.testing.assert_close(getattr(module, name), wanted, rtol=1e-4, atol=1e-5)
    before = first(model(*inputs)).detach()
    for module, name in made:
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    torch.testing.assert_close(first(model(*inputs)), before, rtol=0, atol=0)


def _parametrized(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        if parametrize.is_parametrized(module):
            yield from ((module, name) for name in list(module.parametrizations))


def schedule(tests: ModuleType) -> None:
    """`specimen(seed) -> (model, optimizer, schedule, step)`; `step()` ends with the optimizer's step."""

    def run(parts: tuple[Any, ...], steps: int) -> list[Any]:
        *stateful, step = parts
        for _ in range(steps):
            step()
            stateful[2].step()
        return [part.state_dict() for part in stateful]

    whole = copy.deepcopy(run(tests.specimen(0), 12))
    half = on_disk(run(tests.specimen(0), 5))
    resumed = tests.specimen(1)
    for part, state in zip(resumed[:3], half, strict=True):
        part.load_state_dict(state)
    assert equal(run(resumed, 7), whole), "a resumed run differs from one that was not stopped"


def transform(tests: ModuleType) -> None:
    """`specimen(seed) -> (model, transform, inputs)`; `transform(model) -> Changes`."""
    model, act, inputs = tests.specimen(0)
    names = {name for name, module in model.named_modules() if isinstance(module, WEIGHTED)}
    before, out = parameters(model), first(model(*inputs)).detach()
    changes = act(model)
    assert isinstance(changes, Changes), f"a transform says what it did in a Changes, not {type(changes).__name__}"
    assert changes.changed, "nothing was changed"
    told = set(changes.changed) | set(changes.left)
    assert names <= told, f"kept in silence: {sorted(names - told)}"
    assert not set(changes.changed) & set(changes.left)
    assert all(changes.left.values()), "a layer was left without a reason"
    assert torch.isfinite(first(changes.model(*inputs))).all()
    if changes.model is not model:
        assert same(parameters(model), before), "the model that was given has been changed"
        assert torch.equal(first(model(*inputs)), out), "the model that was given answers otherwise"


def rule(tests: ModuleType) -> None:
    """`specimen(seed) -> (trainer, batch)`; `trainer.step(batch)`."""

    def run(trainer: Any, batch: Any, steps: int) -> Any:
        for _ in range(steps):
            trainer.step(batch)
        return trainer.state_dict()

    trainer, batch = tests.specimen(0)
    start = copy.deepcopy(trainer.state_dict())
    whole = copy.deepcopy(run(trainer, batch, 6))
    assert not equal(start, whole), "six steps changed nothing"
    half = on_disk(run(tests.specimen(0)[0], batch, 3))
    resumed = tests.specimen(1)[0]
    resumed.load_state_dict(half)
    assert equal(run(resumed, batch, 3), whole), "a resumed run differs from one that was not stopped"


def estimator(tests: ModuleType) -> None:
    """`specimen(seed) -> (estimator, X, y)`; `EXPECTED_FAILURES`: check of scikit-learn -> why it cannot apply."""
    from sklearn.base import clone
    from sklearn.utils.estimator_checks import check_estimator

    made, x, y = tests.specimen(0)
    settings = made.get_params(deep=False)
    fresh = clone(made)
    assert fresh.get_params(deep=False).keys() == settings.keys()
    assert fresh.fit(x, y) is fresh, "fit returns the estimator"
    found = np.asarray(fresh.predict(x))
    assert len(found) == len(x)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, np.asarray(clone(made).fit(x, y).predict(x)), "a second fit differs")
    np.testing.assert_array_equal(found, np.asarray(pickle.loads(pickle.dumps(fresh)).predict(x)))
    assert not [name for name in vars(made) if name.endswith("_")], "fitted before fit"

    excused = getattr(tests, "EXPECTED_FAILURES", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(clone(made), expected_failed_checks=excused, on_fail=None, on_skip=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert not failed, f"scikit-learn's checks fail: {failed}"
    excess = set(excused) - {r["check_name"] for r in results if r["status"] == "xfail"}
    assert not excess, f"excused, and pass: {sorted(excess)}"


def score(tests: ModuleType) -> None:
    """`specimen(seed) -> (score, model, data)`; `score(model, data, batch_size=...) -> [n]`."""
    act, model, data = tests.specimen(0)
    nets = [m for m in (model if isinstance(model, list | tuple) else [model]) if isinstance(m, nn.Module)]
    before = [
        (parameters(net), [m.training for m in net.modules()], [p.grad for p in net.parameters()]) for net in nets
    ]
    length = len(data[0]) if isinstance(data, tuple) else len(data)
    whole = act(model, data, batch_size=length)
    assert whole.shape == (length,), f"{length} things, and scores of shape {tuple(whole.shape)}"
    assert torch.isfinite(whole).all()
    for size in (1, 3, length + 7):
        torch.testing.assert_close(act(model, data, batch_size=size), whole, rtol=1e-4, atol=1e-5)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    mixed = tuple(part[order] for part in data) if isinstance(data, tuple) else data[order]
    torch.testing.assert_close(act(model, mixed, batch_size=length), whole[order], rtol=1e-4, atol=1e-5)
    for net, (state, modes, gradients) in zip(nets, before, strict=True):
        assert same(parameters(net), state), "scoring changed the model"
        assert [m.training for m in net.modules()] == modes, "scoring left the model in another mode"
        assert [p.grad for p in net.parameters()] == gradients, "scoring left gradients behind"


def law(tests: ModuleType) -> None:
    """`specimen(seed) -> (law, X, y)`; `predict(X, return_std=True)`; `outside(X)` gives places beyond the data."""
    from sklearn.base import clone

    made, x, y = tests.specimen(0)
    fitted = clone(made).fit(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Extrapolation)
        found, spread = fitted.predict(x, return_std=True)
    assert np.shape(found) == np.shape(spread) == np.shape(y)
    assert np.isfinite(found).all()
    assert (np.asarray(spread) >= 0).all()
    assert np.asarray(spread).any(), "a law without any uncertainty"
    assert fitted.score(x, y) > 0, "worse than the mean on its own data"
    np.testing.assert_array_equal(found, clone(made).fit(x, y).predict(x))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fitted.predict(tests.outside(x))
    assert any(issubclass(w.category, Extrapolation) for w in said), "it extrapolates in silence"


def study(tests: ModuleType) -> None:
    """`specimen(seed) -> run`; `run(seed)` gives a dataclass with `theory` beside `simulated`."""
    run = tests.specimen(0)
    found = run(0)
    assert dataclasses.is_dataclass(found)
    theory, simulated = np.asarray(found.theory), np.asarray(found.simulated)
    assert theory.shape == simulated.shape
    assert theory.size > 0
    assert np.isfinite(theory).all()
    assert np.isfinite(simulated).all()
    again = run(0)
    np.testing.assert_array_equal(np.asarray(again.simulated), simulated, "one seed, two simulations")
    np.testing.assert_array_equal(np.asarray(again.theory), theory)


KINDS = {
    check.__name__: check for check in (layer, parametrization, schedule, transform, rule, estimator, score, law, study)
}
