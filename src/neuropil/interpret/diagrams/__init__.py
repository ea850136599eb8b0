r"""Draw a network so that every axis, every broadcast and every cost can be read off the page, and run the drawing.

For a model that is there, one call:

    from neuropil.interpret import circuit_diagram
    circuit = circuit_diagram("smollm2")                   # or any module, with an example of its input
    open("smollm2.svg", "w").write(circuit.svg(depth=3))   # the inside of modules, three levels down

For one that is to be: a tensor is a bundle of wires, one an axis; the tensors of a tuple stand one below another with
dashed lines between; a box is a function; and a wire that runs past a box means that the function is applied for every
index of it, $(G_c X)[:, j] = G(X[:, j])$. A diagram is typed: boxes that do not fit are refused by the names and sizes
of their axes. It gives the picture (`svg`, `tikz`, `mermaid`, `describe`), the module (`torch`), its cost as a
polynomial in the sizes (`cost`), its gradient as a diagram (`backward`) and a cheaper one (`simplified`).

>>> attention = build(
...     "y k h, x k h, x k h",
...     lambda q, k, v: einsum("y x h, x k h -> y k h")(
...         softmax("x")(scale("1/sqrt(k)")(einsum("y k h, x k h -> y x h")(q, k))), v
...     ),
... )
>>> print(attention)
y k h, x k h, x k h -> y k h
>>> attention.cost().matmul
4*h*k*x*y
>>> einsum("y k h, x k h -> y x h") >> softmax("z")
Traceback (most recent call last):
    ...
neuropil.interpret.diagrams.axes.DiagramError: softmax needs axis 'z'; the array has 'y x h'
>>> attention.svg()[:4]
'<svg'

In a drawing, bold boxes are learned, wires that end together are an inner product, a dot is an index that is used
twice, dashed frames are modules, and "×12" is a run of equal modules drawn once.

Chosen where the paper leaves something open: the glyphs are our own where its text does not fix them. An axis has one
name and one size throughout a diagram, so attention of a sequence to itself names its keys' axis anew. A diagram is
kept in one normal form, in which what nothing reads is not there. The tangent of a box without a rule (an operation of
PyTorch in a traced model) is its vector-Jacobian product by autograd. Traced models name by its size each axis that
is not joined to a named axis of the input.

Source: Vincent Abbott, "Neural Circuit Diagrams: Robust Diagrams for the Communication, Implementation, and Analysis of
Deep Learning Architectures", TMLR 2024, arXiv:2402.05424.
"""

from neuropil.interpret.diagrams.axes import Array, Axis, DiagramError, array, axis
from neuropil.interpret.diagrams.construct import Polymorphic, block, build, identity, wiring
from neuropil.interpret.diagrams.core import Builder, Diagram, Op, Step, Wire
from neuropil.interpret.diagrams.learned import (
    batch_norm,
    embedding,
    layer_norm,
    learned_scale,
    learned_shift,
    linear,
    weight,
)
from neuropil.interpret.diagrams.library import (
    add,
    box,
    concat,
    constant,
    div,
    einsum,
    elementwise,
    exp,
    gelu,
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
