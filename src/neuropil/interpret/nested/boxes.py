"""Boxes that are often wanted: delays, integrators, linear systems of scipy, environments of gymnasium.

>>> delay(Real(), 0.0, steps=2).run(torch.tensor([1.0, 2.0, 3.0, 4.0])).outputs
tensor([0., 0., 1., 2.])
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuropil.interpret.nested.machines import Machine
from neuropil.interpret.nested.spaces import UNIT, Finite, Interface, Product, Real, Space, TypeMismatch


def delay(space: Space, initial: Any, steps: int = 1, name: str = "delay") -> Machine:
    """Shows what it was given `steps` steps ago, and `initial` until then."""
    if steps < 1:
        raise ValueError(f"steps={steps}; expected 1 or more: every machine takes at least one step")
    value = torch.as_tensor(initial) if isinstance(space, Real) else initial
    if steps == 1:
        return Machine(Interface(space, space), value, lambda s: s, lambda s, d: d, name)
    return Machine(Interface(space, space), (value,) * steps, lambda s: s[0], lambda s, d: (*s[1:], d), name)


def constant(space: Space, value: Any, name: str = "constant") -> Machine:
    """Shows `value`, takes nothing."""
    return Machine(Interface(space), value, lambda s: s, lambda s, d: s, name)


def integrator(
    space: Real, initial: Any = 0.0, dt: float = 1.0, leak: float = 0.0, name: str = "integrator"
) -> Machine:
    """s <- s + dt (input - leak s), s shown. `leak` per unit of time."""
    start = torch.as_tensor(initial)
    return Machine(
        Interface(space, space),
        start.expand(*space.shape) if start.ndim < len(space.shape) else start,
        lambda s: s,
        lambda s, d: s + dt * (d - leak * s),
        name,
    )


def lti(
    system: Any,
    dt: float | None = None,
    *,
    initial: Any = None,
    delayed: bool = False,
    dtype: Any = None,
    name: str = "lti",
) -> Machine:
    """A linear system of `scipy.signal` (or its matrices (A, B, C, D)) as a machine with ports "u" and "y".

    Continuous systems are discretised at `dt` with the input held (zero-order hold). A system with a direct path
    (D not 0) shows its input within the same step, which no machine does: `delayed=True` shows its output a step
    later instead. Ports are vectors, or numbers where there is one input or output. `initial`: the state, zero if
    None. `dtype`: torch.float64 if None.

    Raises ValueError for a continuous system without `dt`, and for a direct path unless `delayed`.
    """
    from scipy import signal

    if isinstance(system, tuple):
        system = signal.StateSpace(*system, dt=dt) if dt is not None else signal.StateSpace(*system, dt=True)
    space = system.to_ss()
    if space.dt is None:
        if dt is None:
            raise ValueError("a continuous linear system needs dt, the length of a step")
        space = signal.StateSpace(*signal.cont2discrete((space.A, space.B, space.C, space.D), dt)[:4], dt=dt)
    A, B, C, D = (torch.as_tensor(np.array(m)).to(dtype or torch.float64) for m in (space.A, space.B, space.C, space.D))
    if bool(D.any()) and not delayed:
        raise ValueError(
            f"the direct path D = {D.tolist()} shows the input within the same step, and a machine shows something "
            "before it is given anything: give delayed=True for its output a step later, or make D a Function box"
        )
    one_in, one_out = B.shape[1] == 1, C.shape[0] == 1
    start = torch.zeros(len(A), dtype=A.dtype) if initial is None else torch.as_tensor(initial).to(A.dtype)

    def vector(given: Any) -> Tensor:
        u = torch.as_tensor(given["u"]).to(A.dtype)
        return u.unsqueeze(-1) if one_in else u

    def port(y: Tensor) -> dict[str, Tensor]:
        return {"y": y.squeeze(-1) if one_out else y}

    face = Interface({"y": Real() if one_out else Real(len(C))}, {"u": Real() if one_in else Real(B.shape[1])})
    if not delayed:
        return Machine(face, start, lambda x: port(x @ C.T), lambda x, d: x @ A.T + vector(d) @ B.T, name)

    def update(state: Any, given: Any) -> Any:
        x, u = state[0], vector(given)
        return x @ A.T + u @ B.T, x @ C.T + u @ D.T

    return Machine(face, (start, torch.zeros(len(C), dtype=A.dtype)), lambda s: port(s[1]), update, name)


def stream(values: Iterable[Any], space: Space, asked: Space = UNIT, name: str = "stream") -> Machine:
    """Shows one value after another, from the first again after the last; what it is given (`asked`) it ignores."""
    kept = list(values)
    if not kept:
        raise ValueError("a stream of no values; give one at least")
    return Machine(Interface(space, asked), 0, lambda n: kept[n], lambda n, d: (n + 1) % len(kept), name)


def environment(env: Any, seed: int | None = None, name: str = "environment") -> Machine:
    """A gymnasium environment (`reset`, `step`, spaces `Box` or `Discrete`) with the port "action", and with the ports
    "observation", "reward" and "done" (0 or 1).

    It is copied at every step, so that a run can be repeated; after its end it is reset. Raises `TypeMismatch` for
    other spaces.
    """
    seen, acted = _of_gym(env.observation_space), _of_gym(env.action_space)
    face = Interface({"observation": seen, "reward": Real(), "done": Finite(2)}, {"action": acted})
    first = copy.deepcopy(env)
    start = (first, {"observation": _value(first.reset(seed=seed)[0], seen), "reward": 0.0, "done": 0})

    def update(state: Any, given: Any) -> Any:
        now = copy.deepcopy(state[0])
        if state[1]["done"]:
            return now, {"observation": _value(now.reset()[0], seen), "reward": 0.0, "done": 0}
        action = given["action"]
        action = action.detach().cpu().numpy() if isinstance(action, Tensor) else action
        observation, reward, terminated, truncated, _ = now.step(action)
        over = int(bool(terminated or truncated))
        return now, {"observation": _value(observation, seen), "reward": float(reward), "done": over}

    return Machine(face, start, lambda s: s[1], update, name)


def _of_gym(space: Any) -> Space:
    if hasattr(space, "n"):
        return Finite(int(space.n))
    if hasattr(space, "low") and hasattr(space, "shape"):
        return Real(*space.shape)
    if hasattr(space, "spaces"):
        parts = space.spaces
        return Product(
            {k: _of_gym(v) for k, v in parts.items()} if isinstance(parts, dict) else tuple(map(_of_gym, parts))
        )
    raise TypeMismatch(f"a gymnasium space {space!r}; expected Box, Discrete, or a Dict or Tuple of them")


def _value(found: Any, space: Space) -> Any:
    if isinstance(space, Finite):
        return int(found)
    if isinstance(space, Product):
        keys = list(space.parts)
        values = [_value(found[key], part) for key, part in space.parts.items()]
        return dict(zip(keys, values, strict=True)) if space.named else tuple(values)
    return torch.as_tensor(np.array(found, dtype=np.float32))
