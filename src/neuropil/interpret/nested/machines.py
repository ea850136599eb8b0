"""Moore machines: a state, what it shows (`readout`) and how an input changes it (`update`).

A machine shows something before it is given anything, so its output never depends on the input of the same step. That
is why machines can be wired in any way, loops included.

>>> count = Machine(Interface(Real(), Real()), torch.tensor(0.0), lambda s: s, lambda s, d: s + d, "count")
>>> count.run(torch.ones(3)).outputs
tensor([0., 1., 2.])
>>> (count @ count).run((torch.ones(3), -torch.ones(3))).outputs
(tensor([0., 1., 2.]), tensor([ 0., -1., -2.]))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from neuropil.interpret.nested.lenses import Lens
from neuropil.interpret.nested.spaces import UNIT, Hom, Interface, Product, Real, TypeMismatch, each, side_by_side

Close = Callable[[Any], Any]


@dataclass(frozen=True)
class Run:
    """What a machine showed, step by step (stacked where it is tensors, else a list), and its state afterwards."""

    outputs: Any
    state: Any


class Machine:
    """A dynamical system with an interface: a lens from (state, state) to it.

    `state` is where it starts: tensors, numbers, or tuples and dictionaries of them. `readout(state)` is what it shows,
    `update(state, input)` its next state; neither may change the state in place. The machine itself holds no
    current state: `run` starts from a copy of `state`, always.

    `m @ n` puts two side by side; `m >> w` wraps a wiring `w` (a lens, or an organisation that changes) around m.

    Raises `TypeMismatch` if what it shows at first is not of its interface.
    """

    def __init__(
        self,
        interface: Interface,
        state: Any,
        readout: Callable[[Any], Any],
        update: Callable[[Any, Any], Any],
        name: str = "machine",
    ) -> None:
        self.interface, self.state, self.readout, self.update, self.name = interface, state, readout, update, name
        self.parts: dict[str, Machine | Lens] = {}  # what it was composed of
        interface.out.check(readout(state), f"what {name} shows at first")

    def open(self, state: Any) -> tuple[Any, Close]:
        """What is shown in this state, and what then takes an input to the next state."""
        return self.readout(state), lambda given: self.update(state, given)

    def run(self, inputs: Any = 1, state: Any = None) -> Run:
        """Take these inputs one after another: tensors with time first (in dictionaries or tuples, as the interface has
        them), any iterable of single inputs, or, for a closed system, the number of steps.

        Raises `TypeMismatch` for an input that is not of the interface.
        """
        state = duplicate(self.state if state is None else state)
        shown = []
        for number, given in enumerate(steps(inputs, self.interface)):
            out, close = self.open(state)
            self.interface.directions(out).check(given, f"input {number} of {self.name}")
            state = close(given)
            shown.append(out)
        return Run(stack(shown), state)

    def weights(self, state: Any) -> Any:
        """The state with True where it is a weight of wires and False where it is the state of a box."""
        return tree_map(lambda leaf: False, state)

    def __rshift__(self, other: Any) -> Machine:
        if not isinstance(other, Lens) and not hasattr(other, "wiring"):
            raise TypeMismatch(
                f"{self.name} >> {getattr(other, 'name', other)}: around a machine goes a wiring (a Lens or an "
                "Organisation). To connect the outputs of one machine to the inputs of another use System(boxes, wires)"
            )
        return Wrapped(self, other)

    def __matmul__(self, other: Any) -> Machine:
        if not isinstance(other, Machine):
            return NotImplemented
        return Beside((self, other))

    def __repr__(self) -> str:
        return f"{self.name}: {self.interface}"


class Beside(Machine):
    """Machines side by side, in a tuple or a dictionary; so are their states."""

    def __init__(self, parts: Any) -> None:
        self.boxes = parts
        named = parts if isinstance(parts, Mapping) else {str(i): part for i, part in enumerate(parts)}
        super().__init__(
            side_by_side(each(lambda m: m.interface, parts)),
            each(lambda m: m.state, parts),
            lambda state: each(lambda m, s: m.readout(s), parts, state),
            lambda state, given: each(lambda m, s, d: m.update(s, d), parts, state, given),
            " @ ".join(part.name for part in named.values()),
        )
        self.parts = dict(named)

    def open(self, state: Any) -> tuple[Any, Close]:
        opened = each(lambda m, s: m.open(s), self.boxes, state)
        return each(lambda o: o[0], opened), lambda given: each(lambda o, d: o[1](d), opened, given)

    def weights(self, state: Any) -> Any:
        return each(lambda m, s: m.weights(s), self.boxes, state)


class Wrapped(Machine):
    """A machine inside a wiring. The state is the machine's, or, if the wiring has one too, the pair of them."""

    def __init__(self, inside: Machine, around: Any) -> None:
        fit(inside, around.source, f"the slot inside {around.name}")
        self.inside, self.around = inside, around
        self.dynamic = isinstance(around, Machine)
        super().__init__(
            around.target,
            (inside.state, around.state) if isinstance(around, Machine) else inside.state,
            lambda state: self.open(state)[0],
            lambda state, given: self.open(state)[1](given),
            f"({inside.name} >> {around.name})",
        )
        self.parts = {"inside": inside, "around": around}

    def open(self, state: Any) -> tuple[Any, Close]:
        if not self.dynamic:
            shown, close = self.inside.open(state)
            out, back = self.around.forward(shown)
            return out, lambda given: close(back(given))
        shown, close = self.inside.open(state[0])
        out, back = self.around.forward(state[1], shown)

        def both(given: Any) -> Any:
            wires, passed = back(given)
            return close(passed), wires

        return out, both

    def weights(self, state: Any) -> Any:
        if not self.dynamic:
            return self.inside.weights(state)
        return self.inside.weights(state[0]), self.around.weights(state[1])


def parallel(parts: Any) -> Any:
    """Side by side: a dictionary or tuple of interfaces, of lenses, of organisations (with lenses among them), or of
    machines.

    >>> parallel({"a": Interface(2, 3), "b": Interface(Real(), Real())})
    (a: 2, b: R) y^(a: 3, b: R)
    """
    from neuropil.interpret.nested.lenses import lenses_side_by_side
    from neuropil.interpret.nested.organisations import organisations_side_by_side

    parts = tuple(parts) if isinstance(parts, list) else parts
    values = list(parts.values() if isinstance(parts, Mapping) else parts)
    if all(isinstance(part, Interface) for part in values):
        return side_by_side(parts)
    if all(isinstance(part, Lens) for part in values):
        return lenses_side_by_side(parts)
    if all(isinstance(part, Lens) or hasattr(part, "wiring") for part in values):
        return organisations_side_by_side(parts)
    if all(isinstance(part, Machine) for part in values):
        return Beside(parts)
    raise TypeMismatch(f"side by side: {', '.join(type(v).__name__ for v in values)}; expected all of one sort")


def fit(machine: Machine, slot: Interface, where: str = "the slot") -> None:
    """Check that `machine` may stand where a machine of interface `slot` is wanted.

    Raises `TypeMismatch`, which names both types.
    """
    if machine.interface == slot:
        return
    message = f"{machine.name} has type {machine.interface}, and {where} has type {slot}."
    if isinstance(machine.interface, Hom) and not isinstance(slot, Hom):
        message += (
            f" What {machine.name} puts out is a wiring between other systems: that is the part of a synapse, not of a "
            f"nerve cell. Put systems of type {machine.interface.source} inside it (boxes >> it) instead."
        )
    elif isinstance(slot, Hom) and not isinstance(machine.interface, Hom):
        message += (
            f" A machine on {slot} puts out a wiring; {machine.name} is what is wired. For wires that never change "
            "use Organisation.constant(lens)."
        )
    raise TypeMismatch(message)


def replicate_machine(machine: Machine, n: int) -> Machine:
    """See `replicate`."""
    out, in_ = machine.interface.out, machine.interface.in_

    def readout(state: Any) -> Any:
        return to_back(out, torch.func.vmap(machine.readout)(state))

    def update(state: Any, given: Any) -> Any:
        return torch.func.vmap(machine.update)(state, to_front(in_, given))

    interface = Interface(many(out, n), many(in_, n))
    return Machine(interface, repeated(machine.state, n, machine.name), readout, update, f"{n} x {machine.name}")


# --- many at once ------------------------------------------------------------------------------------


def many(space: Any, n: int) -> Any:
    """n values of this space in one tensor. Raises `TypeMismatch` if it is not made of real ones."""
    if isinstance(space, Real):
        return Real(n, *space.shape)
    if isinstance(space, Product):
        parts = each(lambda part: many(part, n), space.parts)
        return Product(parts if space.named else tuple(parts.values()))
    raise TypeMismatch(f"machines are computed at once only over real tensors, and {space} is none: use `parallel`")


def to_front(space: Any, value: Any) -> Any:
    """Values of `many(space, n)`, the dimension of n first."""
    if isinstance(space, Real):
        return value.movedim(-1 - len(space.shape), 0)
    return each(to_front, space.parts if space.named else tuple(space.parts.values()), value)


def to_back(space: Any, value: Any) -> Any:
    """The inverse of `to_front`."""
    if isinstance(space, Real):
        return value.movedim(0, -1 - len(space.shape))
    return each(to_back, space.parts if space.named else tuple(space.parts.values()), value)


def repeated(state: Any, n: int, name: str) -> Any:
    """The state n times, stacked. Raises `TypeMismatch` where it holds anything but tensors."""
    odd = [leaf for leaf in tree_leaves(state) if not isinstance(leaf, Tensor)]
    if odd:
        raise TypeMismatch(f"the state of {name} holds {odd[0]!r}; many at once need a state of tensors only")
    return tree_map(lambda leaf: leaf.expand(n, *leaf.shape).clone(), state)


# --- states, inputs and outputs ----------------------------------------------------------------------


def duplicate(state: Any) -> Any:
    """A copy that shares nothing with `state`. Tensors keep their graph, so a run can be differentiated."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf), state)


def steps(inputs: Any, interface: Interface) -> Iterator[Any]:
    """The single inputs of a run, one a step."""
    if isinstance(inputs, int):
        if interface.in_ != UNIT:
            raise TypeMismatch(f"{inputs} steps without input, but the interface {interface} takes {interface.in_}")
        return iter([{}] * inputs)
    if isinstance(inputs, Tensor | Mapping | tuple):
        leaves, spec = tree_flatten(inputs)
        lengths = {len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in leaves}
        if len(lengths) != 1 or None in lengths:
            raise TypeMismatch(
                "inputs over time are tensors of one length, time first, in dictionaries or tuples as the interface "
                f"{interface} has them; found lengths {sorted(map(str, lengths))}. Give a list of inputs otherwise"
            )
        unbound = [leaf.unbind(0) for leaf in leaves]
        return (torch.utils._pytree.tree_unflatten(list(now), spec) for now in zip(*unbound, strict=True))
    if not isinstance(inputs, Iterable):
        raise TypeMismatch(
            f"inputs are {inputs!r}; expected tensors with time first, an iterable, or a number of steps"
        )
    return iter(inputs)


def stack(shown: list[Any]) -> Any:
    """A list of outputs as tensors with time first, if they are tensors or numbers; the list otherwise."""
    leaves = tree_leaves(shown)
    if not leaves or not all(isinstance(leaf, Tensor | int | float) for leaf in leaves):
        return shown
    return tree_map(lambda *now: torch.stack([torch.as_tensor(v) for v in now]), *shown)
