r"""Draw a network so that every axis, every broadcast and every cost can be read off the page, and run the drawing.

A tensor is a bundle of wires, one an axis; a tuple of tensors stands one below another with dashed lines between; a
box is a function; and a wire that runs past a box means that the function is applied for every index of it. A
diagram is typed: boxes that do not fit are refused by the names and sizes of the axes. One diagram gives the
picture (`svg`, `tikz`, `mermaid`, `describe`), the module (`torch`), its cost as a polynomial (`cost`) and its
gradient (`backward`).

>>> attention = build(
...     "y k h, x k h, x k h",
...     lambda q, k, v: einsum("y x h, x k h -> y k h")(
...         softmax("x")(scale("1/sqrt(k)")(einsum("y k h, x k h -> y x h")(q, k))), v
...     ),
... )
>>> print(attention)
y k h, x k h, x k h -> y k h
>>> attention.svg()[:4]
'<svg'
"""

from neuropil.interpret.diagrams.axes import Array, Axis, DiagramError, array, axis
from neuropil.interpret.diagrams.core import (
    Builder,
    Diagram,
    Op,
    Polymorphic,
    Step,
    Wire,
    block,
    build,
    identity,
    wiring,
)
from neuropil.interpret.diagrams.library import (
    add,
    batch_norm,
    box,
    concat,
    constant,
    div,
    einsum,
    elementwise,
    embedding,
    exp,
    gelu,
    layer_norm,
    learned_scale,
    learned_shift,
    linear,
    log,
    maximum,
    mean,
    merge,
    mul,
    outer,
    pick,
    reindex,
    relu,
    rename,
    rsqrt,
    scale,
    scatter,
    shift,
    sigmoid,
    silu,
    softmax,
    split,
    square,
    sub,
    tanh,
    total,
    transpose,
    weight,
)
from neuropil.interpret.diagrams.spatial import Window, conv, conv_transpose, max_pool, mean_pool, unfold
from neuropil.interpret.diagrams.trace import Circuit, circuit_diagram

__all__ = [
    "Array",
    "Axis",
    "Builder",
    "Circuit",
    "Diagram",
    "DiagramError",
    "Op",
    "Polymorphic",
    "Step",
    "Window",
    "Wire",
    "add",
    "array",
    "axis",
    "batch_norm",
    "block",
    "box",
    "build",
    "circuit_diagram",
    "concat",
    "constant",
    "conv",
    "conv_transpose",
    "div",
    "einsum",
    "elementwise",
    "embedding",
    "exp",
    "gelu",
    "identity",
    "layer_norm",
    "learned_scale",
    "learned_shift",
    "linear",
    "log",
    "max_pool",
    "maximum",
    "mean",
    "mean_pool",
    "merge",
    "mul",
    "outer",
    "pick",
    "reindex",
    "relu",
    "rename",
    "rsqrt",
    "scale",
    "scatter",
    "shift",
    "sigmoid",
    "silu",
    "softmax",
    "split",
    "square",
    "sub",
    "tanh",
    "total",
    "transpose",
    "unfold",
    "weight",
    "wiring",
]
