r"""Wires with gains that learn: an organisation around any boxes, stateful or not.

All ends of wires together carry vectors: x at the sources (outputs of boxes, inputs from outside), y = W x at the
targets (inputs of boxes, outputs to outside), with W zero where there is no wire. Unlike constant wires, several may
lead to one target, which gets the sum.

>>> from neuropil.interpret.nested import oja
>>> cell = Interface({"y": Real()}, {"u": Real()})
>>> wires = [("a.y", "b.u", 0.5), ("in.u", "b.u"), ("in.v", "a.u"), ("b.y", "out.y")]
>>> synapses = plastic({"a": cell, "b": cell}, wires, oja(0.01))
>>> synapses.target
(y: R) y^(u: R, v: R)
>>> gains(synapses, synapses.state)[("a.y", "b.u")]
tensor([[0.5000]])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuropil.interpret.nested.organisations import Computed, Learn
from neuropil.interpret.nested.rules import Flow, Rule
from neuropil.interpret.nested.spaces import UNIT, Interface, Product, Real, Space, TypeMismatch, side_by_side
from neuropil.interpret.nested.wiring import (
    End,
    InstantaneousLoop,
    WiringError,
    known,
    ports,
    sort_boxes,
    told,
)


@dataclass(frozen=True)
class Layout:
    """Where each end of a wire lies in the vectors of sources and of targets."""

    sources: dict[End, tuple[Space, slice]]
    targets: dict[End, tuple[Space, slice]]
    inside: int  # how much of the sources is outputs of boxes; the rest comes from outside
    within: int  # how much of the targets is inputs of boxes; the rest goes outside


def plastic(
    boxes: Mapping[str, Any],
    wires: Any,
    rule: Rule,
    *,
    learning: Sequence[tuple[str, str]] | None = None,
    teachers: Mapping[str, str] | None = None,
    reward: str | None = None,
    dtype: torch.dtype | None = None,
) -> Plastic:
    """The organisation of these wires around boxes (interfaces or machines), their gains changed by `rule`.

    wires: (source, target) with the gain 1, or (source, target, gain): a number, or a matrix [of target, of source].
    learning: the (source, target) of the wires that change; all by default.
    teachers: target -> the end (an output of a box, or "in.port") that carries what the target should have been.
    reward: the end that carries the reward, a number.
    dtype: of the gains; torch's default if None.

    Raises what `wiring` raises (but for targets driven twice); ValueError where the rule lacks its teachers or reward.
    """
    return Plastic(boxes, wires, rule, learning, teachers or {}, reward, dtype or torch.get_default_dtype())


class Plastic(Computed):
    """See `plastic`. The state: {"gain": W, "rule": what the rule keeps}."""

    def __init__(
        self,
        boxes: Mapping[str, Any],
        wires: Any,
        rule: Rule,
        learning: Sequence[tuple[str, str]] | None,
        teachers: Mapping[str, str],
        reward: str | None,
        dtype: torch.dtype,
    ) -> None:
        faces, functions = sort_boxes(boxes)
        if functions:
            raise TypeMismatch(
                f"{', '.join(functions)}: a function has no place among wires that learn; give it a step of its own "
                "(Function.machine), or put it into a System of its own"
            )
        if (rule.needs == "teachers" and not teachers) or (rule.needs == "reward" and not (reward or teachers)):
            raise ValueError(f"the rule {rule.name} needs {rule.needs}: give {rule.needs}=...")
        self.rule, self.faces = rule, faces
        read = _Reader(faces, wires, teachers, reward)
        self.layout, self.edges, self._reward = read.layout(), read.edges, read.reward
        self._teachers = read.teachers
        gain, mask = _matrices(self.layout, self.edges, dtype)
        chosen = None if learning is None else {read.ends(*pair) for pair in learning}
        learns = _learning(self.layout, self.edges, chosen)
        self.mask, self._learns = mask, learns
        self._shaken = learns.any(1)
        outer = Interface(_outside(self.layout.targets, "out"), _outside(self.layout.sources, "in"))
        super().__init__(side_by_side(faces), outer, {"gain": gain, "rule": rule.begin(gain)}, f"{rule.name} wiring")

    def forward(self, state: Any, inside: Any) -> tuple[Any, Learn]:
        gain, within = state["gain"], self.layout.within
        here = self._vector(inside, None)
        shown = here @ gain[within:, : self.layout.inside].T
        noise = self._noise(state)
        out = self._split(shown if noise is None else shown + noise[within:], outside=True)

        def learn(outside: Any) -> tuple[Any, Any]:
            pre = torch.cat(_alike([here, self._vector(None, outside)]), -1)
            post = pre @ gain.T if noise is None else pre @ gain.T + noise
            flow = Flow(pre, post, self._learns, self._wanted(post, pre), self._value(self._reward, pre))
            change, kept = self.rule.change(gain, state["rule"], flow)
            new = {"gain": gain + change * self._learns.to(gain.device), "rule": kept}
            return new, self._split(post[..., :within], outside=False)

        return out, learn

    def weights(self, state: Any) -> Any:
        return {"gain": True, "rule": torch.utils._pytree.tree_map(lambda leaf: False, state["rule"])}

    def _noise(self, state: Any) -> Tensor | None:
        noise = state["rule"].get("noise")
        return None if noise is None else noise * self._shaken.to(noise.device)

    def _vector(self, inside: Any, outside: Any) -> Tensor:
        """The outputs of the boxes, or what comes from outside, in one vector."""
        wanted = [
            (end, space) for end, (space, _) in self.layout.sources.items() if (end[0] == "in") == (inside is None)
        ]
        values = []
        for (box, port), space in wanted:
            value = outside if box == "in" else inside[box]
            value = torch.as_tensor(value if port is None else value[port])
            values.append(value.reshape(*space.batch(value), -1))  # type: ignore[attr-defined]
        return torch.cat(_alike(values), -1) if values else self.state["gain"].new_zeros(0)

    def _split(self, vector: Tensor, outside: bool) -> Any:
        """Values of the targets from their vector."""
        start = self.layout.within if outside else 0
        found: dict[str, dict[Any, Any]] = {"out": {}} if outside else {box: {} for box in self.faces}
        for (box, port), (space, where) in self.layout.targets.items():
            if (box == "out") == outside:
                part = vector[..., where.start - start : where.stop - start]
                found[box][port] = part.reshape((*part.shape[:-1], *space.shape))  # type: ignore[attr-defined]
        values = {box: parts.get(None, parts) for box, parts in found.items()}
        return values["out"] if outside else values

    def _wanted(self, post: Tensor, pre: Tensor) -> Tensor | None:
        if not self._teachers:
            return None
        wanted = post.clone()
        for target, teacher in self._teachers.items():
            wanted[..., self.layout.targets[target][1]] = pre[..., self.layout.sources[teacher][1]]
        return wanted

    def _value(self, end: End | None, pre: Tensor) -> Tensor | None:
        return None if end is None else pre[..., self.layout.sources[end][1]].squeeze(-1)


def gains(organisation: Plastic, state: Any) -> dict[tuple[str, str], Tensor]:
    """The gain of each wire in this state, as a matrix [of target, of source]."""
    places = organisation.layout
    return {
        (told(start), told(end)): state["gain"][places.targets[end][1], places.sources[start][1]]
        for start, end, _ in organisation.edges
    }


# --- reading wires -----------------------------------------------------------------------------------


class _Reader:
    """Wires, teachers and reward with the spaces of their ends."""

    def __init__(
        self, faces: dict[str, Interface], wires: Any, teachers: Mapping[str, str], reward: str | None
    ) -> None:
        self.sources = {(box, port): space for box, face in faces.items() for port, space in ports(face.out).items()}
        self.targets = {(box, port): space for box, face in faces.items() for port, space in ports(face.in_).items()}
        self.boxes = (dict(self.sources), dict(self.targets))
        self.edges = [self._edge(*wire) for wire in wires]
        for start, end, gain in self.edges:
            self._spaces(start, end, gain)
        self.teachers = {}
        for target, teacher in teachers.items():
            end = self.ends(teacher, target)[1]
            if end not in self.targets:
                raise WiringError(f"the target {target!r} of a teacher has no wire")
            self.teachers[end] = self._signal(teacher, self.targets[end])
        self.reward = None if reward is None else self._signal(reward, Real())
        missing = [told(end) for end in self.boxes[1] if all(end != edge[1] for edge in self.edges)]
        if missing:
            raise WiringError(f"not connected: {', '.join(missing)}. Every input takes at least one wire")
        self._check_real()

    def ends(self, source: str, target: str) -> tuple[End, End]:
        return known(source, self.boxes[0], "in", "an output"), known(target, self.boxes[1], "out", "an input")

    def _edge(self, source: str, target: str, gain: Any = None) -> tuple[End, End, Any]:
        start, end = self.ends(source, target)
        if start[0] == "in" and end[0] == "out":
            raise InstantaneousLoop(
                f"{target} would show {source} within the same step, and a system shows something before it is given "
                "anything: put a delay box between them"
            )
        return start, end, gain

    def _spaces(self, start: End, end: End, gain: Any) -> None:
        """The spaces of ends outside, from the other end or from the shape of the gain."""
        matrix = gain if isinstance(gain, Tensor) and gain.ndim == 2 else None
        rows, columns = (None, None) if matrix is None else (Real(len(matrix)), Real(matrix.shape[1]))
        if start not in self.sources:
            self.sources[start] = columns or self.targets[end]
        if end not in self.targets:
            self.targets[end] = rows or self.sources[start]

    def _signal(self, text: str, space: Space) -> End:
        end = known(text, self.boxes[0], "in", "an output")
        if self.sources.setdefault(end, space) != space:
            raise TypeMismatch(f"{text} carries {self.sources[end]}, and {space} is wanted of it")
        return end

    def _check_real(self) -> None:
        for end, space in [*self.sources.items(), *self.targets.items()]:
            if not isinstance(space, Real):
                raise TypeMismatch(f"{told(end)} is of {space}: gains are for real numbers. Use constant wires for it")

    def layout(self) -> Layout:
        inner = {e: s for e, s in self.sources.items() if e[0] != "in"}
        within = {e: s for e, s in self.targets.items() if e[0] != "out"}
        return Layout(
            _slices({**inner, **{e: s for e, s in self.sources.items() if e[0] == "in"}}),
            _slices({**within, **{e: s for e, s in self.targets.items() if e[0] == "out"}}),
            sum(map(_width, inner.values())),
            sum(map(_width, within.values())),
        )


def _width(space: Space) -> int:
    assert isinstance(space, Real)
    return torch.Size(space.shape).numel()


def _slices(ends: dict[End, Space]) -> dict[End, tuple[Space, slice]]:
    found, start = {}, 0
    for end, space in ends.items():
        found[end] = (space, slice(start, start + _width(space)))
        start += _width(space)
    return found


def _matrices(layout: Layout, edges: list[tuple[End, End, Any]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size = sum(_width(s) for s, _ in layout.targets.values()), sum(_width(s) for s, _ in layout.sources.values())
    gain, mask = torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=torch.bool)
    for start, end, given in edges:
        rows, columns = layout.targets[end][1], layout.sources[start][1]
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        if bool(mask[rows, columns].any()):
            raise WiringError(
                f"there are two wires from {told(start)} to {told(end)}: give one, with the sum of the gains"
            )
        mask[rows, columns] = True
        if isinstance(given, Tensor) and given.ndim == 2:
            if given.shape != shape:
                raise TypeMismatch(
                    f"the gain from {told(start)} to {told(end)} has shape {tuple(given.shape)}; expected {shape}, "
                    f"from {layout.sources[start][0]} to {layout.targets[end][0]}"
                )
            gain[rows, columns] = given.detach().to(dtype)
        elif shape[0] == shape[1]:
            gain[rows, columns] = torch.eye(shape[0], dtype=dtype) * (1.0 if given is None else float(given))
        else:
            raise TypeMismatch(
                f"{told(start)} carries {layout.sources[start][0]}, and {told(end)} takes {layout.targets[end][0]}: "
                f"give the wire a gain, a matrix of shape {shape}"
            )
    return gain, mask


def _learning(layout: Layout, edges: list[tuple[End, End, Any]], chosen: set[tuple[End, End]] | None) -> Tensor:
    size = sum(_width(s) for s, _ in layout.targets.values()), sum(_width(s) for s, _ in layout.sources.values())
    learns = torch.zeros(size, dtype=torch.bool)
    there = {(start, end) for start, end, _ in edges}
    for start, end in there if chosen is None else chosen:
        if (start, end) not in there:
            raise WiringError(f"there is no wire from {told(start)} to {told(end)} that could learn")
        learns[layout.targets[end][1], layout.sources[start][1]] = True
    return learns


def _outside(ends: dict[End, tuple[Space, slice]], side: str) -> Space:
    found = {port: space for (box, port), (space, _) in ends.items() if box == side}
    if None in found and len(found) > 1:
        raise WiringError(f"{side!r} and '{side}.NAME' are both used: the outside has one port, or several with names")
    return found[None] if None in found else Product(found) if found else UNIT


def _alike(parts: list[Tensor]) -> list[Tensor]:
    """The parts with one batch, and of one type."""
    lead = max((part.shape[:-1] for part in parts), key=len)
    return [part.expand(*lead, part.shape[-1]) if part.shape[:-1] != lead else part for part in parts]
