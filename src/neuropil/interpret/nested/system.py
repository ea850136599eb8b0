"""Systems of boxes and wires, and `NestedSystem`, which holds the current state of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from neuropil.interpret.nested.lenses import Lens
from neuropil.interpret.nested.machines import Beside, Machine, Wrapped, duplicate, stack, steps
from neuropil.interpret.nested.modules import Recurrent
from neuropil.interpret.nested.organisations import Constant, Organisation
from neuropil.interpret.nested.plastic import plastic
from neuropil.interpret.nested.rules import Rule
from neuropil.interpret.nested.show import tree
from neuropil.interpret.nested.spaces import Hom, TypeMismatch
from neuropil.interpret.nested.wiring import End, Function, Plan, Wiring, WiringError, wiring


class System(Wrapped):
    """Machines in a wiring, as one machine: its inputs and outputs are what is wired to "in" and "out".

    boxes: name -> machine (which may be a System itself), or `Function` for what has no state.
    wires: see `wiring`; with a `rule`, see `plastic`: (source, target) or (source, target, gain).
    rule: how the gains of the wires change, None for constant wires; `teachers`, `reward`, `learning` and `dtype` are
        those of `plastic`.

    The state is {box: its state}, or with a rule ({box: state}, state of the wires).

    >>> from neuropil.interpret.nested import Real, integrator
    >>> fox = System({"tank": integrator(Real(), 1.0)}, [("in", "tank"), ("tank", "out")], name="fox")
    >>> fox.run(torch.ones(3)).outputs
    tensor([1., 2., 3.])

    Raises what `wiring` and `plastic` raise.
    """

    def __init__(
        self,
        boxes: Mapping[str, Machine | Function | Any],
        wires: Any,
        rule: Rule | None = None,
        *,
        learning: Sequence[tuple[str, str]] | None = None,
        teachers: Mapping[str, str] | None = None,
        reward: str | None = None,
        dtype: torch.dtype | None = None,
        name: str = "system",
    ) -> None:
        self.boxes, self.rule = dict(boxes), rule
        around: Any
        if rule is None:
            if learning or teachers or reward:
                raise WiringError("learning, teachers and reward are of wires that learn: give a rule")
            around = wiring(boxes, wires)
        else:
            around = plastic(boxes, wires, rule, learning=learning, teachers=teachers, reward=reward, dtype=dtype)
        machines = {label: box for label, box in boxes.items() if isinstance(box, Machine)}
        super().__init__(Beside(machines), around)
        self.name = name
        self.parts = {**machines, "wires": around}

    @property
    def plan(self) -> Plan:
        """Boxes and constant wires. Raises `WiringError` for wires that learn."""
        if not isinstance(self.around, Wiring):
            raise WiringError(f"the wires of {self.name} have gains that change: there is no constant plan of them")
        return self.around.plan

    def flatten(self) -> System:
        """The same system on one level, which shows the same to the bit.

        Boxes that are systems of constant wires are opened; "inner" of "outer" becomes "outer/inner".
        """
        opened: dict[str, System] = {}
        boxes: dict[str, Any] = {}
        for name, box in self.boxes.items():
            if isinstance(box, System) and box.rule is None:
                opened[name] = box.flatten()
                boxes |= {f"{name}/{inner}": part for inner, part in opened[name].boxes.items()}
            else:
                boxes[name] = box

        def start_of(end: End) -> End:
            if end[0] not in opened:
                return end
            inner = opened[end[0]].plan.wires["out", end[1]]
            return f"{end[0]}/{inner[0]}", inner[1]

        wires = {end: start_of(start) for end, start in self.plan.wires.items() if end[0] not in opened}
        for name, part in opened.items():
            for end, start in part.plan.wires.items():
                if end[0] != "out":
                    outer = start[0] == "in"
                    found = start_of(self.plan.wires[name, start[1]]) if outer else (f"{name}/{start[0]}", start[1])
                    wires[f"{name}/{end[0]}", end[1]] = found
        flat = System(boxes, {_told(end): _told(start) for end, start in wires.items()}, name=self.name)
        return flat


def _told(end: End) -> str:
    return end[0] if end[1] is None else f"{end[0]}.{end[1]}"


class NestedSystem:
    """A machine with its current state: it runs on from where it is, is saved, resumed and reset.

    For an organisation, such as composed learners, an input is a pair (what is inside, what came from outside), so that
    `step((x, y))` is one step of training; it returns what the network made of x before the step.

    >>> from neuropil.interpret.nested import learner
    >>> _ = torch.manual_seed(0)
    >>> trainer = NestedSystem(learner(nn.Linear(2, 1), lr=0.1))
    >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    >>> errors = [float((trainer.step((x, y)) - y).abs()) for _ in range(3)]
    >>> errors[2] < errors[0], trainer.predict(x).shape
    (True, torch.Size([1, 1]))
    """

    def __init__(self, machine: Machine | Lens) -> None:
        self.machine: Machine = Constant(machine) if isinstance(machine, Lens) else machine
        self.state = duplicate(self.machine.state)

    @torch.no_grad()
    def step(self, given: Any) -> Any:
        """Take one input; returns what was shown before it, for an organisation the value it passed outside.

        Raises `TypeMismatch` for an input of another type.
        """
        machine = self.machine
        machine.interface.in_.check(given, f"the input of {machine.name}")
        if isinstance(machine, Organisation):
            shown, back = machine.forward(self.state, given[0])
            self.state = back(given[1])[0]
            return shown
        shown, close = machine.open(self.state)
        self.state = close(given)
        return shown

    def run(self, inputs: Any = 1) -> Any:
        """`step` for each of these inputs (as `Machine.run` takes them); what was shown, time first."""
        return stack([self.step(given) for given in steps(inputs, self.machine.interface)])

    @torch.no_grad()
    def predict(self, inside: Any) -> Any:
        """What an organisation shows outside for this inside, without learning from it."""
        return self._organisation.get(self.state, inside)

    @torch.no_grad()
    def request(self, inside: Any, outside: Any) -> Any:
        """The input that an organisation passes inside, without learning from it."""
        return self._organisation.forward(self.state, inside)[1](outside)[1]

    def reset(self) -> None:
        """Back to where the machine starts."""
        self.state = duplicate(self.machine.state)

    @property
    def interface(self) -> Any:
        """The type of the system as a whole."""
        return self.machine.interface

    def tree(self) -> str:
        """The types of the system and of its parts, nested."""
        return tree(self.machine)

    def svg(self, depth: int = 4, palette: str = "light") -> str:
        """A drawing of the system, boxes opened `depth` levels deep; see `neuropil.interpret.nested.drawing`."""
        from neuropil.interpret.nested.drawing import svg

        return svg(self, depth, palette)

    def to_module(self) -> nn.Module:
        """As a torch module with its own copy of the current state.

        Learners become what they wrap, a chain of them an `nn.Sequential`. Other organisations map what is inside to
        what is shown outside, with the gains as parameters. Machines become recurrent modules, inputs with time first
        -> (outputs, last state), differentiable through time.
        """
        if isinstance(self.machine, Organisation):
            return self.machine.module(self.state)
        return Recurrent(self.machine, self.state)

    def state_dict(self) -> dict[str, Any]:
        """The current state: dictionaries, tuples, tensors and numbers."""
        return {"state": duplicate(self.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. Raises ValueError for one of another system."""
        given, own = tree_flatten(state["state"]), tree_flatten(self.state)
        shapes = [
            [tuple(v.shape) if isinstance(v, Tensor) else type(v) for v in leaves] for leaves in (given[0], own[0])
        ]
        if given[1] != own[1] or shapes[0] != shapes[1]:
            raise ValueError(f"the state of another system: expected one of {self.machine}, as its state_dict gives it")
        self.state = duplicate(state["state"])

    def to(self, target: Any) -> NestedSystem:
        """Move the current state to a device, or its real numbers to a dtype. In place."""

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or (isinstance(target, torch.dtype) and not leaf.is_floating_point()):
                return leaf
            return leaf.to(target)

        self.state = tree_map(move, self.state)
        return self

    def __repr__(self) -> str:
        return self.tree()

    @property
    def _organisation(self) -> Organisation:
        if not isinstance(self.machine, Organisation):
            what = "a wiring" if isinstance(self.machine.interface, Hom) else "a system of its own"
            raise TypeMismatch(f"{self.machine} is {what}, not an organisation: only those map an inside to an outside")
        return self.machine
