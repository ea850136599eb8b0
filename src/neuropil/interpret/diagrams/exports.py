"""The diagram in other hands: sentences, Mermaid, TikZ."""

from __future__ import annotations

from collections.abc import Container

from neuropil.interpret.diagrams.axes import Array, written
from neuropil.interpret.diagrams.core import Diagram, Step
from neuropil.interpret.diagrams.fold import folded
from neuropil.interpret.diagrams.items import titles
from neuropil.interpret.diagrams.layout import draw, shows
from neuropil.interpret.diagrams.shapes import Dot, Group, Label, Path, Rect, Shape


def describe(diagram: Diagram, *, depth: int = 1, fold: bool = True) -> str:
    """A sentence for each box, in the order in which they run; blocks below `depth` are one sentence.

    >>> from neuropil.interpret.diagrams import einsum, softmax
    >>> print(describe(einsum("y k, x k -> y x") >> softmax("x")))
    From y k, x k to y x.
    1. inner product: from y k, x k to y x.
    2. softmax (x), over y: from y x to y x.
    """
    lines = [f"From {written(diagram.dom)} to {written(diagram.cod)}."]
    _describe(folded(diagram) if fold else diagram, depth, "", lines)
    return "\n".join(lines)


def _describe(diagram: Diagram, depth: int, prefix: str, lines: list[str]) -> None:
    sources = _weights(diagram)
    shown = [s for s in diagram.steps if s.op.kind != "weight"]
    for number, step in enumerate(shown, 1):
        place = f"{prefix}{number}."
        lines.append(f"{place} {_sentence(diagram, step, sources)}")
        if step.op.body is not None and depth > 1 and shows(step.op):
            _describe(step.op.body, depth - 1, place, lines)


def _weights(diagram: Diagram) -> dict[int, Step]:
    return {s.outs[0]: s for s in diagram.steps if s.op.kind == "weight"}


def _sentence(diagram: Diagram, step: Step, sources: dict[int, Step]) -> str:
    op = step.op
    weights = [sources[i].op for i in step.ins if i in sources]
    dom = [diagram.wires[i] for i in step.ins if i not in sources]
    title, small = titles(op, weights)
    if op.kind == "einsum" and not weights:
        title = _linear(dom, op.cod[0])
    said = f"learned {title}" if any(w.option("trainable", True) for w in weights) else title
    if small:
        said += f" ({small})"
    if op.option("repeat"):
        said += f", {op.option('repeat')} times"
    over = [n for n in op.over if op.kind != "elementwise"]
    if over:
        said += f", over {' '.join(over)}"
    return f"{said}: from {written(dom)} to {written(op.cod)}."


def _linear(dom: list[Array], cod: Array) -> str:
    """What an einsum does, in the words of linear algebra."""
    summed = {n for a in dom for n in a.names} - set(cod.names)
    shared = [n for n in cod.names if sum(n in a.names for a in dom) > 1]
    if len(dom) == 1:
        return "sum" if summed else "transpose"
    if summed:
        return "inner product"
    return "product along a diagonal" if shared else "outer product"


def mermaid(diagram: Diagram, *, depth: int = 1, fold: bool = True) -> str:
    """A Mermaid flowchart: a node a box, an edge a wire with its array; opened blocks are subgraphs.

    >>> from neuropil.interpret.diagrams import relu
    >>> print(mermaid(relu.on("y m")))
    flowchart LR
      in0([in])
      n1["relu"]
      in0 -- "y m" --> n1
      out0([out])
      n1 -- "y m" --> out0
    """
    out = ["flowchart LR"]
    names: dict[int, str] = {}
    for i in range(len(diagram.inputs)):
        names[i] = f"in{i}"
        out.append(f"  in{i}([in])")
    shown = folded(diagram) if fold else diagram
    ends = _mermaid(shown, names, depth, "n", "  ", out)
    for number, (wire, end) in enumerate(zip(shown.outputs, ends, strict=True)):
        out.append(f"  out{number}([out])")
        out.append(f'  {end} -- "{shown.wires[wire]}" --> out{number}')
    return "\n".join(out)


def _mermaid(diagram: Diagram, names: dict[int, str], depth: int, prefix: str, pad: str, out: list[str]) -> list[str]:
    sources = _weights(diagram)
    number = 0
    for step in diagram.steps:
        if step.op.kind == "weight" and any(step.outs[0] in s.ins for s in diagram.steps):
            continue
        number += 1
        node = f"{prefix}{number}"
        weights = [sources[i].op for i in step.ins if i in sources]
        title, small = titles(step.op, weights)
        repeat = f" ×{step.op.option('repeat')}" if step.op.option("repeat") else ""
        text = (title + (f" {small}" if small else "") + repeat).replace('"', "'")
        if step.op.body is not None and depth > 1 and shows(step.op):
            out.append(f'{pad}subgraph {node}["{text}"]')
            inside = {i: names[w] for i, w in enumerate(step.ins) if w in names}
            ends = _mermaid(step.op.body, inside, depth - 1, f"{node}_", pad + "  ", out)
            out.append(f"{pad}end")
            names |= dict(zip(step.outs, ends, strict=True))
            continue
        out.append(f'{pad}{node}[["{text}"]]' if weights else f'{pad}{node}["{text}"]')
        read = [wire for wire in step.ins if wire not in sources]
        out += [f'{pad}{names[wire]} -- "{diagram.wires[wire]}" --> {node}' for wire in read]
        names |= dict.fromkeys(step.outs, node)
    return [names[w] for w in diagram.outputs]


TIKZ_RECT = {
    "box": "draw",
    "pill": "draw, rounded corners=6pt",
    "learned": "draw, line width=1.6pt",
    "block": "draw, rounded corners=2pt",
    "fence": "draw=gray, dashed",
    "opaque": "draw, densely dotted",
}
TIKZ_PATH = {"wire": "", "unit": "dotted, gray", "separator": "dashed, gray"}
ANCHOR = {"start": "west", "middle": "center", "end": "east"}


def tikz(
    diagram: Diagram, *, depth: int = 1, opened: Container[str] = (), fold: bool = True, width: float = 620.0
) -> str:
    """The drawing as a `tikzpicture`, for papers (needs the package tikz alone)."""
    shown = folded(diagram) if fold else diagram
    drawing = draw(shown, lambda module, level: level < depth or module in opened, width)
    out = [r"\begin{tikzpicture}[x=0.75pt, y=-0.75pt, line width=0.6pt]"]
    out += ["  " + _tikz(shape) for shape in drawing.walk() if not isinstance(shape, Group)]
    return "\n".join([*out, r"\end{tikzpicture}", ""])


def _tikz(shape: Shape) -> str:
    if isinstance(shape, Path):
        style = TIKZ_PATH[shape.style]
        joint = " to[out=0, in=180] " if shape.curved and len(shape.points) == 2 else " -- "
        points = joint.join(f"({x:.1f},{y:.1f})" for x, y in shape.points)
        return rf"\draw[{style}] {points};" if style else rf"\draw {points};"
    if isinstance(shape, Rect):
        corner = f"({shape.x + shape.width:.1f},{shape.y + shape.height:.1f})"
        return rf"\path[fill=white, {TIKZ_RECT[shape.style]}] ({shape.x:.1f},{shape.y:.1f}) rectangle {corner};"
    if isinstance(shape, Dot):
        return rf"\fill ({shape.x:.1f},{shape.y:.1f}) circle[radius={0.75 * shape.radius:.1f}pt];"
    assert isinstance(shape, Label)
    size = r"\small" if shape.style == "title" else r"\scriptsize"
    text = _escaped(shape.text) + (rf"\,\color{{gray}}{_escaped(shape.more)}" if shape.more else "")
    shown = rf"\textit{{{text}}}" if shape.style == "axis" else text
    where = f"({shape.x:.1f},{shape.y - 0.35 * shape.height:.1f})"
    return rf"\node[anchor={ANCHOR[shape.anchor]}, inner sep=0pt, font={size}] at {where} {{{shown}}};"


SIGNS = {
    "×": r"$\times$",
    "·": r"$\cdot$",
    "÷": r"$\div$",
    "−": "$-$",
    "²": "$^2$",
    "…": r"\dots{}",
    "›": r"$\rangle$",
    "√": r"$\surd$",
}


def _escaped(text: str) -> str:
    special = {c: rf"\{c}" for c in "#$%&_{}"} | {"^": r"\^{}", "~": r"\~{}", "\\": r"\textbackslash{}"} | SIGNS
    return "".join(special.get(c, c) for c in text)
