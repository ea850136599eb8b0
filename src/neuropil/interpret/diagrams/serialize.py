"""A diagram as JSON, and back; sizes that are expressions as texts, infinities too."""

from __future__ import annotations

import json
from typing import Any

import sympy

from neuropil.interpret.diagrams.axes import Array, Axis, DiagramError, expression, plain
from neuropil.interpret.diagrams.core import Builder, Diagram, Op


def to_json(diagram: Diagram) -> str:
    """Raises DiagramError for a box with a function of Python's own."""
    return json.dumps(_encoded(diagram), sort_keys=True)


def from_json(text: str) -> Diagram:
    return _decoded(json.loads(text))


def _encoded(value: Any) -> Any:
    if isinstance(value, Diagram):
        steps = [[_encoded(s.op), list(s.ins)] for s in value.steps]
        return {"inputs": [_encoded(a) for a in value.inputs], "steps": steps, "outputs": list(value.outputs)}
    if isinstance(value, Op):
        return {
            "kind": value.kind,
            "dom": [_encoded(a) for a in value.dom],
            "cod": [_encoded(a) for a in value.cod],
            "over": list(value.over),
            "options": {key: _encoded(v) for key, v in value.options},
            "order": [key for key, _ in value.options],
            "body": None if value.body is None else _encoded(value.body),
        }
    if isinstance(value, Array):
        return {"dtype": value.dtype, "axes": [[a.name, _encoded(a.size)] for a in value.axes]}
    if isinstance(value, sympy.Expr):
        return {"expression": str(value)}
    if isinstance(value, tuple):
        return [_encoded(v) for v in value]
    if isinstance(value, float) and value != value + 0 * value:  # an infinity or no number
        return {"float": str(value)}
    if value is None or isinstance(value, str | int | float):
        return value
    raise DiagramError(f"{value!r} cannot be written to JSON; a box with a function of Python's own cannot")


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "expression" in value:
        return plain(expression(value["expression"]))
    if "float" in value:
        return float(value["float"])
    if "axes" in value:
        return Array(tuple(Axis(name, _decoded(size)) for name, size in value["axes"]), value["dtype"])
    if "steps" in value:
        builder = Builder([_decoded(a) for a in value["inputs"]])
        wires = list(builder.inputs)
        for op, ins in value["steps"]:
            wires += builder.add(_decoded(op), [wires[i] for i in ins])
        return builder.finish([wires[i] for i in value["outputs"]])
    options = tuple((key, _decoded(value["options"][key])) for key in value["order"])
    body = None if value["body"] is None else _decoded(value["body"])
    return Op(value["kind"], _decoded(value["dom"]), _decoded(value["cod"]), tuple(value["over"]), options, body)
