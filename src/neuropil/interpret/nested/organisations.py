"""Organisations: wirings that change by what flows through them. A learner is one, and so is a synapse.

An organisation around boxes of interface p, seen from outside as q, is a machine of interface [p, q]: it shows a lens
p -> q (how the boxes are wired now), and is given what passed (an output of p, an input of q). Composed, `o1 >> o2`
changes o1 by the input that the wiring of o2 computed for it. With p = A y^A and gradient descent, this composition is
backpropagation.

>>> wire = Interface(Real(), Real())
>>> def wiring(gain):
...     return Lens(wire, wire, lambda a: gain * a, lambda a, d: d)
>>> hebb = Organisation(wire, wire, torch.tensor(1.0), wiring, lambda gain, passed: gain + 0.1 * gain * passed[0] ** 2)
>>> hebb
organisation: [R y^R, R y^R]
>>> two = hebb >> hebb
>>> run = two.run([(torch.tensor(1.0), torch.tensor(0.0))])
>>> run.state
(tensor(1.1000), tensor(1.1000))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from neuropil.interpret.nested.lenses import Lens
from neuropil.interpret.nested.machines import Machine, fit, many, repeated, replicate_machine, to_back, to_front
from neuropil.interpret.nested.spaces import Hom, Interface, Real, TypeMismatch, each, hom, side_by_side

Learn = Callable[[Any], tuple[Any, Any]]


class Organisation(Machine):
    """A machine on [source, target]: `wiring(state)` is a lens, `update(state, (output inside, input outside))` learns.

    Subclasses that compute value, request and update in one go override `forward` (and `get`) instead.
    """

    def __init__(
        self,
        source: Interface,
        target: Interface,
        state: Any,
        wiring: Callable[[Any], Lens],
        update: Callable[[Any, tuple[Any, Any]], Any],
        name: str = "organisation",
    ) -> None:
        self.source, self.target, self.wiring = source, target, wiring
        super().__init__(hom(source, target), state, wiring, update, name)

    @classmethod
    def constant(cls, lens: Lens) -> Organisation:
        """A wiring that never changes, as an organisation with one state."""
        return Constant(lens)

    @classmethod
    def of(cls, machine: Machine) -> Organisation:
        """A machine whose interface is some [p, q]. Raises `TypeMismatch` for another."""
        if isinstance(machine, Organisation):
            return machine
        if not isinstance(machine.interface, Hom):
            fit(machine, hom(machine.interface, machine.interface), "an organisation")
        space: Any = machine.interface
        return cls(space.source, space.target, machine.state, machine.readout, machine.update, machine.name)

    def forward(self, state: Any, inside: Any) -> tuple[Any, Learn]:
        """What is shown outside, and what then takes the input from outside to (next state, input inside)."""
        outside, back = self.wiring(state).forward(inside)
        return outside, lambda given: (self.update(state, (inside, given)), back(given))

    def get(self, state: Any, inside: Any) -> Any:
        """What is shown outside."""
        return self.wiring(state).get(inside)

    def module(self, state: Any) -> nn.Module:
        """`get` as a torch module with its own copy of the weights."""
        from neuropil.interpret.nested.modules import Implement

        return Implement(self, state)

    def weights(self, state: Any) -> Any:
        return tree_map(lambda leaf: isinstance(leaf, Tensor) and leaf.is_floating_point(), state)

    def __rshift__(self, other: Any) -> Machine:
        if isinstance(other, Lens):
            if other.source == self.interface:
                return super().__rshift__(other)
            other = Constant(other)
        if not isinstance(other, Organisation) or other.source == self.interface:
            return super().__rshift__(other)
        return Chain([self, other])

    def __rrshift__(self, other: Any) -> Machine:
        return Constant(other) >> self if isinstance(other, Lens) else NotImplemented

    def __matmul__(self, other: Any) -> Machine:
        if isinstance(other, Lens | Organisation):
            return organisations_side_by_side((self, other))
        return super().__matmul__(other)

    def __rmatmul__(self, other: Any) -> Machine:
        return organisations_side_by_side((other, self)) if isinstance(other, Lens) else NotImplemented


class Computed(Organisation):
    """An organisation given by `forward` and `get`; its lens and its update follow from them."""

    def __init__(self, source: Interface, target: Interface, state: Any, name: str) -> None:
        super().__init__(source, target, state, self._wiring, self._update, name)

    def _wiring(self, state: Any) -> Lens:
        def both(inside: Any) -> tuple[Any, Callable[[Any], Any]]:
            out, back = self.forward(state, inside)
            return out, lambda given: back(given)[1]

        def put(inside: Any, given: Any) -> Any:
            return both(inside)[1](given)

        return Lens(self.source, self.target, lambda inside: self.get(state, inside), put, self.name, both)

    def _update(self, state: Any, passed: tuple[Any, Any]) -> Any:
        return self.forward(state, passed[0])[1](passed[1])[0]

    def forward(self, state: Any, inside: Any) -> tuple[Any, Learn]:
        raise NotImplementedError

    def get(self, state: Any, inside: Any) -> Any:
        return self.forward(state, inside)[0]


class Constant(Computed):
    """A lens as an organisation: one state, nothing to learn."""

    def __init__(self, lens: Lens) -> None:
        self.lens = lens
        super().__init__(lens.source, lens.target, (), lens.name)

    def forward(self, state: Any, inside: Any) -> tuple[Any, Learn]:
        out, back = self.lens.forward(inside)
        return out, lambda given: ((), back(given))

    def get(self, state: Any, inside: Any) -> Any:
        return self.lens.get(inside)


class Chain(Computed):
    """Organisations one around the other, innermost first; the states in a tuple.

    Values go forward once and inputs back once, however many there are.
    """

    links: list[Organisation]

    def __init__(self, links: list[Organisation]) -> None:
        flat: list[Organisation] = [
            link for part in links for link in (part.links if isinstance(part, Chain) else [part])
        ]
        for inner, outer in pairwise(flat):
            if inner.target != outer.source:
                raise TypeMismatch(
                    f"{inner.name}, of type {inner.interface}, shows {inner.target}; {outer.name}, of type "
                    f"{outer.interface}, goes around {outer.source}"
                )
        self.links = flat
        super().__init__(
            flat[0].source, flat[-1].target, tuple(link.state for link in flat), " >> ".join(link.name for link in flat)
        )
        self.parts = {str(number): link for number, link in enumerate(flat)}

    def forward(self, state: Any, inside: Any) -> tuple[Any, Learn]:
        backs = []
        for link, own in zip(self.links, state, strict=True):
            inside, back = link.forward(own, inside)
            backs.append(back)

        def learn(given: Any) -> tuple[Any, Any]:
            states = []
            for back in reversed(backs):
                own, given = back(given)
                states.append(own)
            return tuple(reversed(states)), given

        return inside, learn

    def get(self, state: Any, inside: Any) -> Any:
        for link, own in zip(self.links, state, strict=True):
            inside = link.get(own, inside)
        return inside

    def module(self, state: Any) -> nn.Module:
        return nn.Sequential(*(link.module(own) for link, own in zip(self.links, state, strict=True)))

    def weights(self, state: Any) -> Any:
        return tuple(link.weights(own) for link, own in zip(self.links, state, strict=True))


class Tensored(Computed):
    """Organisations side by side: [p1, q1] and [p2, q2] give [p1 @ p2, q1 @ q2]."""

    def __init__(self, parts: Any) -> None:
        self.boxes = each(lambda part: Constant(part) if isinstance(part, Lens) else part, parts)
        named = self.boxes if isinstance(parts, Mapping) else {str(i): part for i, part in enumerate(self.boxes)}
        super().__init__(
            side_by_side(each(lambda o: o.source, self.boxes)),
            side_by_side(each(lambda o: o.target, self.boxes)),
            each(lambda o: o.state, self.boxes),
            " @ ".join(part.name for part in named.values()),
        )
        self.parts = dict(named)

    def forward(self, state: Any, inside: Any) -> tuple[Any, Learn]:
        opened = each(lambda o, s, i: o.forward(s, i), self.boxes, state, inside)

        def learn(given: Any) -> tuple[Any, Any]:
            done = each(lambda o, d: o[1](d), opened, given)
            return each(lambda d: d[0], done), each(lambda d: d[1], done)

        return each(lambda o: o[0], opened), learn

    def get(self, state: Any, inside: Any) -> Any:
        return each(lambda o, s, i: o.get(s, i), self.boxes, state, inside)

    def weights(self, state: Any) -> Any:
        return each(lambda o, s: o.weights(s), self.boxes, state)


def organisations_side_by_side(parts: Any) -> Organisation:
    """The parallel product of organisations (or lenses) in a tuple or dictionary."""
    return Tensored(parts)


class Tied(Computed):
    """`n` uses of one organisation, side by side, with one state: what each would change of it is added up."""

    def __init__(self, shared: Organisation, n: int) -> None:
        self.shared, self.n = shared, n
        super().__init__(
            side_by_side((shared.source,) * n),
            side_by_side((shared.target,) * n),
            shared.state,
            f"{n} tied {shared.name}",
        )
        self.parts = {"shared": shared}

    def forward(self, state: Any, inside: Any) -> tuple[Any, Learn]:
        opened = [self.shared.forward(state, i) for i in inside]

        def learn(given: Any) -> tuple[Any, Any]:
            done = [back(d) for (_, back), d in zip(opened, given, strict=True)]
            return tree_map(_added, state, *(own for own, _ in done)), tuple(passed for _, passed in done)

        return tuple(out for out, _ in opened), learn

    def get(self, state: Any, inside: Any) -> Any:
        return tuple(self.shared.get(state, i) for i in inside)

    def weights(self, state: Any) -> Any:
        return self.shared.weights(state)


def _added(old: Any, *new: Any) -> Any:
    return old + sum(value - old for value in new)


def tie(shared: Organisation, n: int) -> Organisation:
    """One organisation at work in `n` places at once, as a convolution's filter is: its changes add up.

    >>> wire = Interface(Real(), Real())
    >>> still = Lens(wire, wire, lambda a: a, lambda a, d: d)
    >>> count = Organisation(wire, wire, torch.tensor(0.0), lambda s: still, lambda s, passed: s + passed[0], "count")
    >>> tie(count, 2).run([((torch.tensor(1.0), torch.tensor(2.0)), (torch.tensor(0.0),) * 2)]).state
    tensor(3.)
    """
    return Tied(shared, n)


class Replicated(Computed):
    """`n` organisations alike, each with its own state, computed all at once.

    A function returned by each cannot leave `vmap`, so learning computes the values of the way forward a second time.
    """

    def __init__(self, one: Organisation, n: int, state: Any = None) -> None:
        self.one, self.n = one, n
        super().__init__(
            Interface(many(one.source.out, n), many(one.source.in_, n)),
            Interface(many(one.target.out, n), many(one.target.in_, n)),
            repeated(one.state, n, one.name) if state is None else state,
            f"{n} x {one.name}",
        )
        self.parts = {"each": one}

    def forward(self, state: Any, inside: Any) -> tuple[Any, Learn]:
        within = to_front(self.one.source.out, inside)

        def fused(own: Any, a: Any, d: Any) -> tuple[Any, Any]:
            result: tuple[Any, Any] = self.one.forward(own, a)[1](d)
            return result

        def learn(given: Any) -> tuple[Any, Any]:
            states, passed = torch.func.vmap(fused)(state, within, to_front(self.one.target.in_, given))
            return states, to_back(self.one.source.in_, passed)

        return self.get(state, inside), learn

    def get(self, state: Any, inside: Any) -> Any:
        within = to_front(self.one.source.out, inside)
        return to_back(self.one.target.out, torch.func.vmap(self.one.get)(state, within))

    def weights(self, state: Any) -> Any:
        return self.one.weights(state)


def replicate(one: Machine, n: int) -> Any:
    """`n` machines (or organisations) alike as one, each with its own state, by `torch.func.vmap`: no loop over them.

    Every space R^s becomes R^(n x s). The states are copies of the machine's at first. `readout` and `update` must be
    made of operations on tensors.

    >>> leaky = Machine(Interface(Real(), Real()), torch.zeros(()), lambda s: s, lambda s, d: 0.5 * s + d, "leaky")
    >>> replicate(leaky, 3).run(torch.tensor([[1.0, 2.0, 4.0]] * 3)).outputs[-1]
    tensor([1.5000, 3.0000, 6.0000])
    """
    return Replicated(one, n) if isinstance(one, Organisation) else replicate_machine(one, n)


def fan_out(space: Real, n: int) -> Lens:
    """One value to `n` readers, as R^(n x s). What they ask for goes back as the sum of their wishes for change.

    >>> lens = fan_out(Real(), 3)
    >>> lens.get(torch.tensor(1.0)), lens.put(torch.tensor(1.0), torch.tensor([1.0, 3.0, 1.5]))
    (tensor([1., 1., 1.]), tensor(3.5000))
    """
    at = -1 - len(space.shape)

    def get(a: Tensor) -> Tensor:
        return a.unsqueeze(at).expand(*space.batch(a), n, *space.shape)

    def put(a: Tensor, asked: Tensor) -> Tensor:
        return a + (asked - a.unsqueeze(at)).sum(at)

    return Lens(
        Interface(space, space), Interface(Real(n, *space.shape), Real(n, *space.shape)), get, put, f"copy to {n}"
    )


def unstack(space: Real, n: int) -> Lens:
    """R^(n x s) as n ports R^s, in a tuple."""
    at, whole = -1 - len(space.shape), Interface(Real(n, *space.shape), Real(n, *space.shape))
    apart = side_by_side((Interface(space, space),) * n)
    return Lens(whole, apart, lambda a: a.unbind(at), lambda a, d: torch.stack(d, at), "unstack")


def restack(space: Real, n: int) -> Lens:
    """The inverse of `unstack`."""
    at, whole = -1 - len(space.shape), Interface(Real(n, *space.shape), Real(n, *space.shape))
    apart = side_by_side((Interface(space, space),) * n)
    return Lens(apart, whole, lambda a: torch.stack(a, at), lambda a, d: d.unbind(at), "stack")
