"""Learning-rate schedules as arrays: the rate at every step from 0 to the last, ready to compare before training.

>>> cosine(4, max_lr=1.0).round(3)
array([1.   , 0.854, 0.5  , 0.146, 0.   ])
>>> wsd(10, max_lr=1.0, warmup_steps=2, decay=0.5).round(2)
array([0. , 0.5, 1. , 1. , 1. , 1. , 0.8, 0.6, 0.4, 0.2, 0. ])

Every schedule has `total_steps` + 1 entries, for steps 0 to `total_steps` inclusive. The first `warmup_steps` rise
linearly from 0; the shape begins at `max_lr` at step `warmup_steps` and, where it decays, is at `min_lr` at the last
step. Shares (`decay`, `at`) are of `total_steps`.

`rates` reads a schedule from an array, a function of the step, or a torch scheduler (run dry, and put back), and
`parse` from text such as ``wsd:decay=0.1,shape=1-sqrt``.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Rates = Float[np.ndarray, " _steps"]  # any number of them: schedules side by side differ in length


def constant(total_steps: int, max_lr: float, warmup_steps: int = 0) -> Rates:
    """`max_lr` after the warm-up."""
    return _shaped(total_steps, max_lr, max_lr, warmup_steps, np.ones_like)


def linear(total_steps: int, max_lr: float, min_lr: float = 0.0, warmup_steps: int = 0) -> Rates:
    """A straight line from `max_lr` to `min_lr`."""
    return _shaped(total_steps, max_lr, min_lr, warmup_steps, lambda p: 1 - p)


def cosine(total_steps: int, max_lr: float, min_lr: float = 0.0, warmup_steps: int = 0) -> Rates:
    """Half a cosine from `max_lr` to `min_lr`."""
    return _shaped(total_steps, max_lr, min_lr, warmup_steps, _half_cosine)


def wsd(
    total_steps: int,
    max_lr: float,
    min_lr: float = 0.0,
    warmup_steps: int = 0,
    decay: float = 0.2,
    shape: str = "linear",
) -> Rates:
    """Warm-up, stable, decay: `max_lr` until the last share `decay` of the steps, then down to `min_lr`.

    shape: "linear", "1-sqrt" (steep at first), "exponential" (geometric; needs `min_lr` above 0).
    """
    if shape not in ("linear", "1-sqrt", "exponential"):
        raise ValueError(f"shape is {shape!r}; expected linear, 1-sqrt or exponential")
    if shape == "exponential" and not min_lr > 0:
        raise ValueError(f"an exponential decay never reaches {min_lr}; give a min_lr above 0, such as max_lr / 10")
    start = total_steps - _steps(decay, total_steps, "decay")
    if start < warmup_steps:
        raise ValueError(f"warm-up ({warmup_steps} steps) and decay ({decay:g} of {total_steps}) overlap; shorten one")
    out = constant(total_steps, max_lr, warmup_steps)
    p = np.linspace(0.0, 1.0, total_steps - start + 1)
    if shape == "exponential":
        out[start:] = max_lr * (min_lr / max_lr) ** p
    else:
        out[start:] = min_lr + (max_lr - min_lr) * (1 - (p if shape == "linear" else np.sqrt(p)))
    return out


def multistep(
    total_steps: int,
    max_lr: float,
    warmup_steps: int = 0,
    at: Sequence[float] = (0.8, 0.9),
    factor: float = 10**-0.5,
) -> Rates:
    """Constant, and multiplied by `factor` at each share `at` of the steps (by default to a tenth in two drops)."""
    out = constant(total_steps, max_lr, warmup_steps)
    for share in at:
        out[_steps(share, total_steps, "at") :] *= factor
    return out


def cyclic(total_steps: int, max_lr: float, min_lr: float = 0.0, warmup_steps: int = 0, cycles: float = 2.5) -> Rates:
    """Straight down to `min_lr` and up again, `cycles` times; with half a cycle more it ends at `min_lr`."""
    if not cycles > 0:
        raise ValueError(f"cycles is {cycles}; expected more than 0")
    return _shaped(total_steps, max_lr, min_lr, warmup_steps, lambda p: np.abs(1 - (2 * cycles * p) % 2))


def rewarmup(
    total_steps: int,
    max_lr: float,
    min_lr: float = 0.0,
    warmup_steps: int = 0,
    at: float = 0.5,
    rise: float = 0.05,
) -> Rates:
    """A cosine to `min_lr` until the share `at`, a linear rise over the share `rise`, and a second cosine."""
    low = _steps(at, total_steps, "at")
    high = low + _steps(rise, total_steps, "rise")
    if not warmup_steps < low < high < total_steps:
        raise ValueError(f"warm-up {warmup_steps}, low at {low} and high at {high} must follow one another")
    first = cosine(low, max_lr, min_lr, warmup_steps)
    up = np.linspace(min_lr, max_lr, high - low + 1)[1:-1]
    return np.concatenate([first, up, cosine(total_steps - high, max_lr, min_lr)])


SCHEDULES: dict[str, Callable[..., Rates]] = {
    made.__name__: made for made in (constant, linear, cosine, wsd, multistep, cyclic, rewarmup)
}


def parse(text: str, **given: Any) -> Rates:
    """The schedule that a text names: ``NAME`` or ``NAME:option=value,...``; what it leaves out is taken from `given`.

    >>> parse("linear:min_lr=0.5", total_steps=2, max_lr=1.0)
    array([1.  , 0.75, 0.5 ])

    Several shares are joined by ``+`` (``multistep:at=0.5+0.8``). Raises ValueError with the names there are.
    """
    name, _, rest = text.partition(":")
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r}; expected one of {', '.join(SCHEDULES)}")
    known = inspect.signature(SCHEDULES[name]).parameters
    options = {key: value for key, value in given.items() if key in known}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, _, value = item.partition("=")
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}; expected {', '.join(known)}")
        options[key] = _value(key, value)
    missing = [key for key, one in known.items() if one.default is one.empty and key not in options]
    if missing:
        raise ValueError(f"schedule {text!r} lacks {', '.join(missing)}; write {name}:{missing[0]}=...")
    return SCHEDULES[name](**options)


def rates(schedule: Any, total_steps: int | None = None) -> Rates:
    """The rate at every step of a schedule given as an array, a function `step -> rate`, or a torch `LRScheduler`.

    An array is one rate a step, from step 0 on. The other two need `total_steps`; a scheduler is stepped so many times
    and put back to where it was, as are its optimizer's rates (the first parameter group's rate is what is read).
    Raises ValueError for a rate that is negative or not finite, naming its step; TypeError for `ReduceLROnPlateau`,
    whose rates depend on the losses.
    """
    if endless(schedule):
        if total_steps is None:
            raise ValueError("a function or a torch scheduler has no end of its own; give total_steps")
        if isinstance(schedule, LRScheduler):
            schedule = _run_dry(schedule, total_steps)
        else:
            schedule = [schedule(step) for step in range(total_steps + 1)]
    out = np.array(schedule, dtype=np.float64)
    if out.ndim != 1 or len(out) < 2:
        raise ValueError(f"a schedule of shape {out.shape}; expected a one-dimensional array, a rate for every step")
    if total_steps is not None and len(out) != total_steps + 1:
        raise ValueError(f"a schedule of {len(out)} rates; steps 0 to {total_steps} need {total_steps + 1}")
    bad = np.flatnonzero(~(np.isfinite(out) & (out >= 0)))
    if len(bad):
        raise ValueError(f"the learning rate at step {bad[0]} is {out[bad[0]]}; expected 0 or more")
    return out


def endless(schedule: Any) -> bool:
    """Whether a schedule is a function or a torch scheduler, which have no last step of their own."""
    return isinstance(schedule, LRScheduler) or callable(schedule)


def _run_dry(scheduler: LRScheduler, total_steps: int) -> list[float]:
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError("the rates of ReduceLROnPlateau depend on the losses, and are not known before training")
    groups = scheduler.optimizer.param_groups
    state = copy.deepcopy(scheduler.state_dict())
    before = [{key: copy.deepcopy(value) for key, value in group.items() if key != "params"} for group in groups]
    out = [float(groups[0]["lr"])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer was not stepped, which is the point
        for _ in range(total_steps):
            scheduler.step()
            out.append(float(groups[0]["lr"]))
    scheduler.load_state_dict(state)
    for group, kept in zip(groups, before, strict=True):
        group.update(kept)
    return out


def _shaped(
    total_steps: int,
    max_lr: float,
    min_lr: float,
    warmup_steps: int,
    shape: Callable[[np.ndarray], np.ndarray],
) -> Rates:
    """The warm-up, then `shape` of the progress 0 to 1, stretched between the two rates."""
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"{warmup_steps} warm-up steps of {total_steps}; expected 0 or more, and fewer than all")
    if not (np.isfinite(max_lr) and 0 <= min_lr <= max_lr and max_lr > 0):
        raise ValueError(f"rates from {max_lr} to {min_lr}; expected max_lr above 0 and min_lr between 0 and max_lr")
    rise = max_lr * np.arange(warmup_steps) / max(warmup_steps, 1)
    progress = np.linspace(0.0, 1.0, total_steps - warmup_steps + 1)
    return np.concatenate([rise, min_lr + (max_lr - min_lr) * shape(progress)])


def _half_cosine(progress: np.ndarray) -> np.ndarray:
    return (1 + np.cos(np.pi * progress)) / 2


def _steps(share: float, total_steps: int, name: str) -> int:
    if not 0 < share < 1:
        raise ValueError(f"{name} is {share:g}; expected a share of the steps, between 0 and 1")
    return round(share * total_steps)


def _value(key: str, text: str) -> Any:
    if key == "shape":
        return text
    try:
        if key == "at" and "+" in text:
            return [float(part) for part in text.split("+")]
        if key.endswith("_steps"):
            return int(float(text))
        return float(text)
    except ValueError:
        raise ValueError(f"{key}={text!r}; expected a number") from None
