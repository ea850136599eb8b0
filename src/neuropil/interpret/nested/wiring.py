"""Wiring patterns from a list of edges: a lens from the boxes inside to the system outside.

>>> from neuropil.interpret.nested import Real
>>> y = Interface({"y": Real()}, {"u": Real()})
>>> loop = wiring({"plant": y, "filter": y}, [("plant.y", "filter.u"), ("filter.y", "out.y"), ("in.u", "plant.u")])
>>> loop.target
(y: R) y^(u: R)

`in` and `out` stand for the outside; its ports have the types of what they are wired to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from neuropil.errors import NeuropilError
from neuropil.interpret.nested.lenses import Lens
from neuropil.interpret.nested.machines import Machine
from neuropil.interpret.nested.spaces import (
    UNIT,
    Dependent,
    Interface,
    Product,
    Space,
    TypeMismatch,
    as_space,
    side_by_side,
)

End = tuple[str, Any]  # box and port; the port is None for a box that has but one, without a name


class WiringError(NeuropilError, ValueError):
    """A port that does not exist, is not connected, or is driven twice."""


class InstantaneousLoop(WiringError):  # noqa: N818 - reads as the sentence it is
    """Functions that wait for one another within one step."""


class Function:
    """A function without state, computed within the step as part of the wiring: `Function(f, inputs, outputs)`.

    With named inputs it is called with them as keywords; with named outputs it returns a dictionary.
    """

    def __init__(self, act: Callable[..., Any], inputs: Any, outputs: Any, name: str | None = None) -> None:
        self.act = act
        self.inputs, self.outputs = as_space(inputs), as_space(outputs)
        self.name = name or str(getattr(act, "__name__", "function"))

    def __call__(self, given: Any) -> Any:
        return self.act(**given) if isinstance(given, Mapping) else self.act(given)

    def machine(self, initial: Any) -> Machine:
        """The function as a Moore machine: it shows a step later what it made of its input, `initial` at first."""
        return Machine(
            Interface(self.outputs, self.inputs), initial, lambda s: s, lambda s, given: self(given), self.name
        )

    def __repr__(self) -> str:
        return f"{self.name}: {self.inputs} -> {self.outputs}"


def ports(space: Space) -> dict[Any, Space]:
    """The named ports of a space, or the whole under None."""
    if isinstance(space, Product) and space.named:
        return dict(space.parts)
    return {None: space}


def told(end: End) -> str:
    """An end of a wire as the user writes it."""
    return end[0] if end[1] is None else f"{end[0]}.{end[1]}"


@dataclass(frozen=True)
class Plan:
    """Boxes and wires, checked: each target with its one source, and what the outside looks like."""

    boxes: dict[str, Interface]
    functions: dict[str, Function]
    wires: dict[End, End]
    outer: Interface


def wiring(boxes: Mapping[str, Any], wires: Any, name: str = "wiring") -> Wiring:
    """The lens of constant wires between boxes (interfaces, or `Function`s), as `System` takes them.

    wires: pairs (source, target), or a dictionary target -> source. An end is written "box.port", or "box" where the
        interface is a single space without ports; "in.port" and "out.port" (or "in" and "out") are the outside.

    Raises `WiringError` for ports that do not exist, are driven twice or not at all, `TypeMismatch` for ends of
    different types, `InstantaneousLoop` where an output would depend on an input of the same step.
    """
    return Wiring(plan(boxes, wires), name)


class Wiring(Lens):
    """Constant wires, with functions among them."""

    def __init__(self, plan: Plan, name: str = "wiring") -> None:
        self.plan = plan
        self._shown = [(end[1], source) for end, source in plan.wires.items() if end[0] == "out"]
        self._passed = {box: list(ports(face.in_)) for box, face in plan.boxes.items()}
        super().__init__(
            side_by_side(plan.boxes),
            plan.outer,
            lambda inside: self._flow(inside)[0],
            lambda inside, outside: self._flow(inside)[1](outside),
            name,
            self._flow,
        )

    def _flow(self, inside: Any) -> tuple[Any, Callable[[Any], Any]]:
        made: dict[str, Any] = {}  # by functions that do not look outside
        out = {port: self._read(source, inside, None, made) for port, source in self._shown}

        def back(outside: Any) -> Any:
            further = dict(made)
            return {box: self._gather(box, wanted, inside, outside, further) for box, wanted in self._passed.items()}

        return out.get(None, out), back

    def _read(self, end: End, inside: Any, outside: Any, made: dict[str, Any]) -> Any:
        box, port = end
        if box == "in":
            value = outside
        elif box in self.plan.functions:
            if box not in made:
                act = self.plan.functions[box]
                made[box] = act(self._gather(box, list(ports(act.inputs)), inside, outside, made))
            value = made[box]
        else:
            value = inside[box]
        return value if port is None else value[port]

    def _gather(self, box: str, wanted: list[Any], inside: Any, outside: Any, made: dict[str, Any]) -> Any:
        found = {port: self._read(self.plan.wires[box, port], inside, outside, made) for port in wanted}
        return found.get(None, found)


# --- checking ----------------------------------------------------------------------------------------


def plan(boxes: Mapping[str, Any], wires: Any) -> Plan:
    """Read and check boxes and wires; see `wiring` for what is raised."""
    faces, functions = sort_boxes(boxes)
    sources = {(box, port): space for box, face in faces.items() for port, space in ports(face.out).items()}
    targets = {(box, port): space for box, face in faces.items() for port, space in ports(face.in_).items()}
    sources |= {(box, port): space for box, f in functions.items() for port, space in ports(f.outputs).items()}
    targets |= {(box, port): space for box, f in functions.items() for port, space in ports(f.inputs).items()}
    found: dict[End, End] = {}
    for source, target in pairs(wires):
        start, end = known(source, sources, "in", "an output"), known(target, targets, "out", "an input")
        if end in found:
            raise WiringError(
                f"{told(end)} is driven twice, by {told(found[end])} and by {told(start)}: join them in a Function box "
                "(a sum, say), or use a plastic organisation, which adds up what arrives"
            )
        found[end] = start
    outer = _outer(found, sources, targets)
    missing = [told(end) for end in targets if end not in found]
    if missing:
        raise WiringError(
            f"not connected: {', '.join(missing)}. Every input takes one wire, from an output or from the outside, "
            f"such as ('in.{missing[0].rpartition('.')[2]}', '{missing[0]}')"
        )
    _check_loops(functions, found)
    return Plan(faces, functions, found, outer)


def sort_boxes(boxes: Mapping[str, Any]) -> tuple[dict[str, Interface], dict[str, Function]]:
    """The interfaces of what has a state, and the functions."""
    faces: dict[str, Interface] = {}
    functions: dict[str, Function] = {}
    for name, box in boxes.items():
        if name in ("in", "out"):
            raise WiringError(f"a box is called {name!r}, which stands for the outside: give it another name")
        if isinstance(box, Function):
            functions[name] = box
        elif hasattr(box, "wiring"):
            raise TypeMismatch(
                f"box {name!r} has type {box.interface}: it puts out a wiring between other systems, which is what a "
                "synapse does, and this slot is for a system with inputs and outputs of its own, as a nerve cell is. "
                f"Put systems of type {box.source} inside it (boxes >> {name}), and use that as the box"
            )
        elif isinstance(box, Interface | Machine):
            faces[name] = box if isinstance(box, Interface) else box.interface
        else:
            hint = "wrap it as Function(f, inputs, outputs)" if callable(box) else "expected a Machine"
            raise TypeMismatch(f"box {name!r} is {type(box).__name__}, whose ports are not known: {hint}")
        if name in faces and isinstance(faces[name].in_, Dependent):
            raise TypeMismatch(f"box {name!r} has inputs that depend on its output ({faces[name]}); wires need ports")
    return faces, functions


def pairs(wires: Any) -> list[tuple[str, str]]:
    """Wires as pairs (source, target)."""
    if isinstance(wires, Mapping):
        return [(source, target) for target, source in wires.items()]
    if not isinstance(wires, Iterable):
        raise WiringError(f"wires are {wires!r}; expected pairs (source, target), or a dictionary target -> source")
    found = [tuple(wire) for wire in wires]
    odd = [wire for wire in found if len(wire) != 2]
    if odd:
        raise WiringError(f"a wire {odd[0]!r}; expected a pair (source, target)")
    return found


def known(text: str, ends: Mapping[End, Any], outside: str, what: str) -> End:
    """An end of a wire. Raises `WiringError` if there is none of this name."""
    box, dot, port = text.rpartition(".")
    if (text, None) in ends or text == outside:
        return text, None
    end = (box, port) if dot else (text, None)
    if end in ends or box == outside:
        return end
    there = ", ".join(told(e) for e in ends) or "none"
    raise WiringError(f"{text!r} is not {what}; there are {there}, and '{outside}.NAME' for the outside")


def _outer(wires: dict[End, End], sources: dict[End, Space], targets: dict[End, Space]) -> Interface:
    inputs: dict[Any, Space] = {}
    outputs: dict[Any, Space] = {}
    for end, start in wires.items():
        if start[0] == "in" and end[0] == "out":
            raise InstantaneousLoop(
                f"{told(end)} would show {told(start)} within the same step, and a system shows something before it is "
                "given anything: put a delay box between them"
            )
        if start[0] == "in":
            taken = inputs.setdefault(start[1], targets[end])
            _same(start, taken, end, targets[end])
        elif end[0] == "out":
            outputs[end[1]] = sources[start]
        else:
            _same(start, sources[start], end, targets[end])
    return Interface(_whole(outputs, "out"), _whole(inputs, "in"))


def _whole(found: dict[Any, Space], side: str) -> Space:
    if None not in found:
        return Product(found) if found else UNIT
    if len(found) > 1:
        raise WiringError(f"{side!r} and '{side}.NAME' are both used: the outside has one port, or several with names")
    return found[None]


def _same(start: End, given: Space, end: End, wanted: Space) -> None:
    if given != wanted:
        raise TypeMismatch(f"{told(start)} carries {given}, and {told(end)} takes {wanted}")


def _check_loops(functions: dict[str, Function], wires: dict[End, End]) -> None:
    """No function may wait for itself, and nothing shown outside may wait for the outside."""
    needs = {name: [wires[name, port][0] for port in ports(f.inputs)] for name, f in functions.items()}
    for name in functions:
        _follow(name, [name], needs)
    for end, start in wires.items():
        if end[0] == "out" and start[0] in functions:
            path = _to_outside(start[0], needs)
            if path:
                raise InstantaneousLoop(
                    f"{told(end)} would depend on the outside within the same step, through {' <- '.join(path)}: put a "
                    "delay box in between"
                )


def _follow(name: str, path: list[str], needs: dict[str, list[str]]) -> None:
    for source in needs[name]:
        if source in path:
            loop = [*path[path.index(source) :], source]
            raise InstantaneousLoop(
                f"functions wait for one another within one step: {' <- '.join(loop)}. Put a delay box on one of these "
                "wires"
            )
        if source in needs:
            _follow(source, [*path, source], needs)


def _to_outside(name: str, needs: dict[str, list[str]]) -> list[str]:
    for source in needs[name]:
        if source == "in":
            return [name, "in"]
        if source in needs and (rest := _to_outside(source, needs)):
            return [name, *rest]
    return []
