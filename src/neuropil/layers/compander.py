r"""Keep every weight of a network within a bound and push it away from zero, by training a free variable behind it.

>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
>>> x, y = torch.randn(50, 8), torch.randint(3, (50,))
>>> before = model(x).detach()
>>> print(compand(model, bound_std=4.0))  # in place; what the model computes stays
changed 2 modules
>>> torch.allclose(model(x), before, atol=1e-5)
True
>>> optimizer = torch.optim.SGD(parameter_groups(model), lr=0.1, momentum=0.9)  # and train as ever
>>> nn.functional.cross_entropy(model(x), y).backward()
>>> optimizer.step()
>>> fold(model), isinstance(model[0].weight, nn.Parameter)  # the plain network again, at no cost
(('0.weight', '2.weight'), True)

Each weight is a function of a variable v that the optimizer trains,

$$w = \Psi(v) = a\, f(v / b), \qquad f \in \{\arctan,\ \tanh,\ x / (1 + |x|)\},$$

odd, increasing, bounded, steeper than 1 at 0 (the *slope*, a / b) and flatter further out. By the chain rule one step
of gradient descent moves w by $-\eta\, \Psi'(v)^2\, \partial L / \partial w$: small weights leave zero faster and
large ones stall. `kind="mu-law"`, $a\,\mathrm{sgn}(v) \ln(1 + \mu |v| / b) / \ln(1 + \mu)$, is the compander of
telephony; it has no bound, and a is only where the weight stands at v = b.

a and b stand for one tensor, for one output channel (`per="channel"`) or for all of a model (`per="global"`, in
`compand`), fixed or learned with the weights (`learnable=True`).

* Ordinary weight decay now acts on v. `decay_weights` is the one that acts on w; `parameter_groups` keeps decay off a
  and b and can give them a learning rate of their own: unconstrained at the full rate they made networks overconfident.
* `WeightCompander` composes like any `torch.nn.utils.parametrize` parametrisation (after `weight_norm`, say). For
  masks, prune the variable, `prune.l1_unstructured(layer.parametrizations.weight, "original", 0.5)`: within one a and b
  the order of magnitudes is that of the weights, and $\Psi(0) = 0$.
* `load_state_dict` takes a plain checkpoint too: its weights set a and b anew, unless those were given or are global.

Only the abstract of the paper could be read. It fixes the idea (one bounded odd function for every weight, both
effects, a fixed and a learned version, on top of other regularisers). The rest is chosen here and may differ from the
paper: arctan, one pair (a, b) a tensor, a bound of 3 standard deviations and a slope of 1.5 at the beginning, Linear
and Conv weights only, and a beginning at $v = \Psi^{-1}(w)$. The deviation is taken about zero, where the function
has its centre, so that one weight alone has one.

Source: Rinor Cakaj, Jens Mehnert, Bin Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization",
2023, arXiv:2306.16993.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuropil.changes import Changes
from neuropil.layers._compander import WeightCompander

__all__ = [
    "WeightCompander",
    "WeightSpread",
    "compand",
    "companders",
    "decay_weights",
    "fold",
    "parameter_groups",
    "weight_report",
]

KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NEAR_ZERO = 0.1  # standard deviations: what `weight_report` counts as near zero

Skip = Callable[[str, nn.Module], bool]
Owner = tuple[str, nn.Module, str]  # a module's name, the module, and the name of one of its weights


# --- on a model ----------------------------------------------------------------------------------


def compand(
    model: nn.Module,
    include: tuple[type[nn.Module], ...] = KINDS,
    skip: Skip | None = None,
    *,
    per: str = "layer",
    **settings: Any,
) -> Changes:
    """Put a `WeightCompander` on the weights of a model, in place; the parameters become the variables behind them.

    include   types of modules; of recurrent ones (`nn.LSTM`, say) all weight matrices are taken
    skip      `skip(name, module)` leaves a module out
    per       "layer", "channel", or "global": one a and b for the whole model
    settings  of `WeightCompander`

    A weight shared by several modules has one variable; it is left as it was where not all of them are included (an
    output layer tied to an embedding). `Changes.left` says which modules were left and why. How many weights lay
    beyond the bound is in `weight_report`. An optimizer made before keeps the parameters, but not a and b.

    Raises ValueError for settings out of range and for modules that are companded already.
    """
    shared = per == "global"
    settings = {**settings, "per": "layer" if shared else per}
    whole = WeightCompander(**settings)  # refuses bad settings whatever the model holds
    groups, left = _chosen(model, include, skip, whole)
    if shared and groups:
        whole.calibrate(torch.cat([getattr(m, t).detach().flatten() for (_, m, t), *_ in groups]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said once, above
        for (name, module, tensor), *_ in groups:  # a trial, so that nothing is changed where one of them refuses
            try:
                _made(settings, whole if shared else None).right_inverse(getattr(module, tensor).detach())
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        for group in groups:
            _register(group, _made(settings, whole if shared else None))
    return Changes(model, tuple(dict.fromkeys(name for group in groups for name, *_ in group)), left)


def fold(model: nn.Module) -> tuple[str, ...]:
    """Replace the variables by the weights they stand for, in place; gives the names of the weights.

    The network computes the same, to the bit, has its plain parameters again and costs nothing more. Other
    parametrisations of the same weight are baked in with it.
    """
    done: set[int] = set()
    names = []
    for name, module, tensor, _ in list(companders(model)):
        original: Any = getattr(_chain(module, tensor), "original", None)
        # Of a shared variable the first owner makes the weights; the others find them made.
        parametrize.remove_parametrizations(
            module, tensor, leave_parametrized=original is None or id(original) not in done
        )
        done |= {id(original)} - {id(None)}
        names.append(name)
    return tuple(names)


def companders(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, WeightCompander]]:
    """Of each companded weight: its name, its module, its name there, and the `WeightCompander`."""
    for name, module in model.named_modules():
        for tensor in getattr(module, "parametrizations", ()):
            for step in _chain(module, tensor):
                if isinstance(step, WeightCompander):
                    yield f"{name}.{tensor}".lstrip("."), module, tensor, step


def parameter_groups(
    model: nn.Module, *, weight_decay: float = 0.0, hyper_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameters for an optimizer: all but a and b with `weight_decay`; a and b without, at `hyper_lr` if given."""
    hyper = {id(p): p for *_, step in companders(model) for p in step.parameters()}
    rest = [p for p in model.parameters() if id(p) not in hyper]
    groups: list[dict[str, Any]] = [{"params": rest, "weight_decay": weight_decay}]
    if hyper:
        own = {} if hyper_lr is None else {"lr": hyper_lr}
        groups.append({"params": list(hyper.values()), "weight_decay": 0.0, **own})
    return groups


@torch.no_grad()
def decay_weights(model: nn.Module, rate: float) -> None:
    """Add the gradient of rate / 2 times the squared norm of the companded weights to that of their variables.

    Call it after `backward` with the optimizer's own decay at 0: the decay is that of w and no longer of v. a and b
    are left alone. Raises ValueError for weights that carry another parametrisation too, whose variable is not v.
    """
    seen: set[int] = set()
    for name, module, tensor, step in companders(model):
        chain = _chain(module, tensor)
        if len(chain) > 1:
            raise ValueError(f"{name} carries {len(chain)} parametrisations; decay the weights in the loss instead")
        v: Any = chain.original
        if id(v) not in seen and v.grad is not None:
            v.grad += rate * step(v) * step.derivative(v)
        seen.add(id(v))


@dataclass(frozen=True)
class WeightSpread:
    """How the weights of one tensor are spread; `slope`, `bound` and `clamped` where it is companded."""

    name: str
    near_zero: float  # share of |w| below a tenth of the standard deviation; 0.080 for a normal distribution
    kurtosis: float  # 3 for a normal distribution, less for short tails
    peak: float  # max |w|, in standard deviations
    slope: float | None = None  # mean over channels, as is the bound
    bound: float | None = None
    clamped: int = 0


@torch.no_grad()
def weight_report(model: nn.Module, include: tuple[type[nn.Module], ...] = KINDS) -> list[WeightSpread]:
    """The spread of each weight of these modules, and of every companded one: before and after, with and without."""
    steps = {(id(module), tensor): step for _, module, tensor, step in companders(model)}
    out = []
    for name, module in model.named_modules():
        plain = [t for t in _tensors(module) if isinstance(module, include) and _holds(module, t)]
        for tensor in dict.fromkeys([*plain, *(t for m, t in steps if m == id(module))]):
            step = steps.get((id(module), tensor))
            own = (float(step.slope.mean()), float(step.bound.mean()), step.clamped) if step else (None, None, 0)
            out.append(WeightSpread(f"{name}.{tensor}".lstrip("."), *_spread(getattr(module, tensor)), *own))
    return out


# --- inside ----------------------------------------------------------------------------------------


def _spread(weight: Tensor) -> tuple[float, float, float]:
    w = weight.double().flatten()
    std = w.std(correction=0)
    standard = (w - w.mean()) / std
    return float((w.abs() < NEAR_ZERO * std).double().mean()), float(standard.pow(4).mean()), float(w.abs().max() / std)


def _chain(module: nn.Module, tensor: str) -> parametrize.ParametrizationList:
    chains: Any = module.parametrizations
    return chains[tensor]


def _tensors(module: nn.Module) -> list[str]:
    """The names of a module's weight matrices."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return [name for name in module._parameters if name.startswith("weight")]
    return ["weight"]


def _holds(module: nn.Module, tensor: str) -> bool:
    return isinstance(module._parameters.get(tensor), nn.Parameter) or parametrize.is_parametrized(module, tensor)


def _chosen(
    model: nn.Module, include: tuple[type[nn.Module], ...], skip: Skip | None, step: WeightCompander
) -> tuple[list[list[Owner]], dict[str, str]]:
    """The weights to compand, each with all its owners, and why the modules that remain are left."""
    twice = [name for name, *_ in companders(model)]
    owners: dict[int, list[Owner]] = {}
    for name, module in model.named_modules():
        for tensor, weight in module._parameters.items():
            if weight is not None:
                owners.setdefault(id(weight), []).append((name, module, tensor))
    left: dict[str, str] = {}
    found: dict[int, list[Owner]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, include):
            continue
        if skip is not None and skip(name, module):
            left[name] = "skipped"
            continue
        for tensor in _tensors(module):
            reason = _unfit(module, tensor, step)
            if not reason and f"{name}.{tensor}".lstrip(".") in twice:
                raise ValueError(f"{', '.join(twice)} companded already; fold(model) first, or skip them")
            if reason:
                left[name] = reason
            else:
                found.setdefault(id(module._parameters.get(tensor, module)), []).append((name, module, tensor))
    for key, group in list(found.items()):
        others = {name for name, *_ in owners.get(key, [])} - {name for name, *_ in group}
        if others:
            left |= {name: f"its weight is shared with {', '.join(sorted(others))}" for name, *_ in group}
            del found[key]
    return list(found.values()), left


def _unfit(module: nn.Module, tensor: str, step: WeightCompander) -> str:
    """Why this weight cannot be companded; empty if it can."""
    if not _holds(module, tensor):
        return f"its {tensor} is no parameter"
    if isinstance(module._parameters.get(tensor), nn.UninitializedParameter):
        return f"its {tensor} is not initialised yet"
    weight = getattr(module, tensor).detach()
    if not weight.is_floating_point():
        return f"its {tensor} is of {weight.dtype}"
    parts = weight.flatten(1) if step.per == "channel" else weight.flatten().unsqueeze(0)
    if step.given[0] is None and not bool(parts.any(1).all()):
        which = "has channels that are" if step.per == "channel" else "is"
        return f"its {tensor} {which} all 0 and sets no bound; give a and b"
    if parametrize.is_parametrized(module, tensor) and not all(
        hasattr(other, "right_inverse") for other in _chain(module, tensor)
    ):
        return f"its {tensor} has a parametrisation without an inverse"
    return ""


def _made(settings: dict[str, Any], whole: WeightCompander | None) -> WeightCompander:
    """A compander for one tensor, with the scales of `whole` if there is one."""
    step = WeightCompander(**settings)
    if whole is not None:
        step.log_a, step.log_b, step.calibrated, step.shared = whole.log_a, whole.log_b, True, True
    return step


def _register(group: list[Owner], step: WeightCompander) -> None:
    (_, module, tensor), *others = group
    weight = getattr(module, tensor).detach().clone()
    outer = parametrize.is_parametrized(module, tensor)
    if outer:  # torch does not invert the chain that is there; the weights it makes are put through it below
        weight = step(step.right_inverse(weight)).detach()
    parametrize.register_parametrization(module, tensor, step)
    if outer:
        setattr(module, tensor, weight)
    module.register_load_state_dict_pre_hook(_take_plain)
    variable: Any = getattr(_chain(module, tensor), "original", None)
    for _, other, name in others:
        setattr(other, name, nn.Parameter(weight.clone(), variable.requires_grad))  # so that v is not inverted again
        parametrize.register_parametrization(other, name, step)
        setattr(_chain(other, name), "original", variable)  # noqa: B010 - a parameter, by nn.Module's own way
        other.register_load_state_dict_pre_hook(_take_plain)


def _take_plain(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: turn a plain weight of the state dict into variable and scales."""
    for tensor in getattr(module, "parametrizations", ()):
        chain, place = _chain(module, tensor), f"{prefix}parametrizations.{tensor}."
        step, weight = chain[0], state.get(prefix + tensor)
        if weight is None or len(chain) > 1 or not isinstance(step, WeightCompander):
            continue
        if weight.shape != chain.original.shape:
            continue  # torch says what does not fit
        log_a, log_b = (step.log_a.detach(), step.log_b.detach()) if step.shared else step._scales(weight.detach())
        state[place + "original"] = step.inverse(state.pop(prefix + tensor), log_a, log_b, step.limit)
        state[place + "0.log_a"], state[place + "0.log_b"] = log_a, log_b
