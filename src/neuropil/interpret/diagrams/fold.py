"""Repeats folded: a run of blocks that differ in nothing but their names and weights is one block, times n."""

from __future__ import annotations

import dataclasses

from neuropil.interpret.diagrams.core import Builder, Diagram, Op, Step, Wire


def folded(diagram: Diagram) -> Diagram:
    """The diagram with each run of equal blocks in sequence as one, whose option `repeat` says how many."""
    steps = [_inside(step) for step in diagram.steps]
    readers: dict[int, set[int]] = {}
    for number, step in enumerate(steps):
        for wire in step.ins:
            readers.setdefault(wire, set()).add(number)
    for wire in diagram.outputs:
        readers.setdefault(wire, set()).add(-1)
    after = {n: follow for n, step in enumerate(steps) if (follow := _next(steps, readers, n)) is not None}
    begun = set(after) - set(after.values())
    runs: dict[int, list[int]] = {}
    for start in begun:
        run = [start]
        while run[-1] in after and _like(steps[start], steps[after[run[-1]]]):
            run.append(after[run[-1]])
        runs[start] = run
    gone = {n for run in runs.values() for n in run[1:]}
    builder = Builder(diagram.inputs)
    wires: dict[int, Wire] = dict(enumerate(builder.inputs))
    for number, step in enumerate(steps):
        if number in gone:
            continue
        run = runs.get(number, [number])
        op = step.op if len(run) == 1 else _times(step.op, steps[run[-1]].op.name, len(run))
        made = builder.add(op, [wires[i] for i in step.ins])
        wires |= dict(zip(steps[run[-1]].outs, made, strict=True))
    return builder.finish([wires[i] for i in diagram.outputs])


def _inside(step: Step) -> Step:
    body = step.op.body
    return step if body is None else dataclasses.replace(step, op=dataclasses.replace(step.op, body=folded(body)))


def _times(op: Op, last: str, count: int) -> Op:
    return dataclasses.replace(op, options=(*op.options, ("repeat", count), ("last", last)))


def _next(steps: list[Step], readers: dict[int, set[int]], number: int) -> int | None:
    """The one step like this one that reads all of its outputs, and reads else only what it reads too."""
    step = steps[number]
    if step.op.body is None:
        return None
    found = {reader for wire in step.outs for reader in readers.get(wire, set())}
    if len(found) != 1 or -1 in found:
        return None
    follow = steps[found.pop()]
    if not _like(step, follow):
        return None
    fresh = [i for i in follow.ins if i in step.outs]
    same = all(a == b or b in step.outs for a, b in zip(step.ins, follow.ins, strict=True))
    return steps.index(follow) if same and len(fresh) == len(step.outs) else None


def _like(a: Step, b: Step) -> bool:
    nameless = [tuple(o for o in s.op.options if o[0] != "name") for s in (a, b)]
    return a.op.dom == b.op.dom and a.op.cod == b.op.cod and nameless[0] == nameless[1] and a.op.body == b.op.body
