"""The drawing as SVG: pure text, no program needed, the same bytes every time."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from html import escape

from neuropil.interpret.diagrams.core import Diagram
from neuropil.interpret.diagrams.fold import folded
from neuropil.interpret.diagrams.layout import draw
from neuropil.interpret.diagrams.shapes import Dot, Drawing, Group, Label, Path, Rect, Shape

# ink, paper, faint, box, box of a block, learned, fence, opaque; then the colours of axes.
PALETTES = {
    "light": ("#1f2430", "#ffffff", "#7b8496", "#f4f5f8", "#e9eef7", "#fff3d6", "#aab3c5", "#f7dede"),
    "dark": ("#e7eaf2", "#14171f", "#9aa3b5", "#232836", "#26324a", "#4a3c17", "#5b667d", "#562b2b"),
    "print": ("#000000", "#ffffff", "#555555", "#ffffff", "#ffffff", "#ffffff", "#777777", "#dddddd"),
}
WIRES = {
    "light": ("#2563a8", "#b4531f", "#2f7d4f", "#7a4bb0", "#a1355f", "#0f7c86", "#8a6d12", "#55606e"),
    "dark": ("#7cb3f2", "#f0a272", "#7fd3a0", "#c4a2f0", "#f094b8", "#67d0da", "#e0c35a", "#aab4c2"),
    "print": ("#000000",),
}


def svg(
    diagram: Diagram,
    *,
    depth: int = 1,
    opened: Container[str] = (),
    fold: bool = True,
    palette: str = "light",
    width: float = 1100.0,
    title: str = "",
    href: Callable[[str], str | None] | None = None,
) -> str:
    """The diagram as SVG.

    Parameters
    ----------
    depth: how many levels of blocks show their inside; deeper ones are closed boxes.
    opened: dotted names of blocks to open besides, with the blocks around them.
    fold: draw a run of equal blocks once, with its number.
    palette: "light", "dark", "print" (black on white), or "auto", which follows the reader's setting.
    width: of a row in pixels; a longer diagram goes on in the next row.
    href: the link of a block, from its dotted name; None for no link. Each block is a group with its name as
        `data-module`.
    """
    if palette not in (*PALETTES, "auto"):
        raise ValueError(f"palette {palette!r}; expected one of {', '.join(PALETTES)}, auto")
    shown = folded(diagram) if fold else diagram
    names = set(opened) if isinstance(opened, Iterable) else opened

    def is_open(module: str, level: int) -> bool:
        return level < depth or module in names or any(n.startswith(f"{module}.") for n in _listed(names))

    from neuropil.interpret.diagrams.exports import describe

    drawing = draw(shown, is_open, width)
    return render(drawing, palette, title or str(diagram), describe(diagram, depth=depth), href)


def _listed(names: object) -> list[str]:
    return sorted(names) if isinstance(names, set) else []


def render(
    drawing: Drawing, palette: str, title: str, description: str, href: Callable[[str], str | None] | None = None
) -> str:
    """A drawing as SVG text."""
    wide, high = _number(drawing.width), _number(drawing.height)
    colour = {name: f"a{n % len(WIRES['light'])}" for n, name in enumerate(drawing.axes)}
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" '
        f'role="img" aria-labelledby="np-title np-desc" class="np-diagram">',
        f'<title id="np-title">{escape(title)}</title>',
        f'<desc id="np-desc">{escape(description)}</desc>',
        f"<style>{_css(palette)}</style>",
        f'<rect class="np-paper" width="{wide}" height="{high}"/>',
    ]
    for shape in drawing.shapes:
        _write(shape, colour, href, out)
    return "\n".join([*out, "</svg>", ""])


def _css(palette: str) -> str:
    if palette != "auto":
        return _rules(palette)
    return f"{_rules('light')}@media (prefers-color-scheme: dark){{{_rules('dark')}}}"


def _rules(palette: str) -> str:
    ink, paper, faint, plain, block, learned, frame, opaque = PALETTES[palette]
    colours = WIRES[palette]
    rules = [
        f".np-paper{{fill:{paper}}}",
        ".np-diagram text{font-family:ui-sans-serif,system-ui,'Segoe UI','DejaVu Sans',Arial,sans-serif}",
        f".np-title{{font-size:12px;fill:{ink}}}",
        f".np-small{{font-size:9.5px;fill:{faint}}}",
        f".np-axis{{font-size:10.5px;font-style:italic;fill:{ink}}}",
        f".np-size{{font-style:normal;font-size:9px;fill:{faint}}}",
        f".np-wire{{fill:none;stroke-width:1.5;stroke:{ink}}}",
        f".np-unit{{fill:none;stroke-width:1.2;stroke-dasharray:1.5 3;stroke:{faint}}}",
        f".np-separator{{fill:none;stroke-width:1;stroke-dasharray:5 4;stroke:{frame}}}",
        f".np-dot{{fill:{ink}}}",
        f".np-box,.np-pill{{fill:{plain};stroke:{ink};stroke-width:1.1}}",
        f".np-learned{{fill:{learned};stroke:{ink};stroke-width:2.2}}",
        f".np-block{{fill:{block};stroke:{ink};stroke-width:1.1}}",
        f".np-opaque{{fill:{opaque};stroke:{ink};stroke-width:1.1;stroke-dasharray:3 2}}",
        f".np-fence{{fill:{ink};fill-opacity:0.025;stroke:{faint};stroke-width:1;stroke-dasharray:6 4}}",
        "a:hover rect{stroke-width:2.6}",
    ]
    rules += [f".np-wire.a{n}{{stroke:{colours[n % len(colours)]}}}" for n in range(len(WIRES["light"]))]
    return "".join(rules)


RADIUS = {"pill": 11.0, "box": 3.0, "learned": 3.0, "block": 5.0, "fence": 6.0, "opaque": 3.0}


def _write(shape: Shape, colour: dict[str, str], href: Callable[[str], str | None] | None, out: list[str]) -> None:
    if isinstance(shape, Group):
        _write_group(shape, colour, href, out)
    elif isinstance(shape, Path):
        kind = f"np-{shape.style}" + (f" {colour[shape.axis]}" if shape.axis in colour else "")
        out.append(f'<path class="{kind}" d="{_data(shape)}"/>')
    elif isinstance(shape, Rect):
        x, y, w, h = (_number(v) for v in (shape.x, shape.y, shape.width, shape.height))
        radius = _number(min(RADIUS[shape.style], shape.height / 2))
        out.append(f'<rect class="np-{shape.style}" x="{x}" y="{y}" width="{w}" height="{h}" rx="{radius}"/>')
    elif isinstance(shape, Dot):
        out.append(
            f'<circle class="np-dot" cx="{_number(shape.x)}" cy="{_number(shape.y)}" r="{_number(shape.radius)}"/>'
        )
    else:
        out.append(_text(shape))


def _write_group(
    shape: Group, colour: dict[str, str], href: Callable[[str], str | None] | None, out: list[str]
) -> None:
    module = f' data-module="{escape(shape.module)}"' if shape.module else ""
    out.append(f'<g class="np-step"{module}><title>{escape(shape.title)}</title>')
    link = href(shape.module) if href and shape.module else None
    if link:
        out.append(f'<a href="{escape(link)}">')
    for child in shape.children:
        _write(child, colour, href, out)
    out.append("</a></g>" if link else "</g>")


def _text(label: Label) -> str:
    more = f'<tspan class="np-size" dx="3">{escape(label.more)}</tspan>' if label.more else ""
    return (
        f'<text class="np-{label.style}" x="{_number(label.x)}" y="{_number(label.y)}" '
        f'text-anchor="{label.anchor}">{escape(label.text)}{more}</text>'
    )


def _data(path: Path) -> str:
    (x, y), rest = path.points[0], path.points[1:]
    out = [f"M{_number(x)} {_number(y)}"]
    for number, (to_x, to_y) in enumerate(rest):
        if not path.curved:
            out.append(f"L{_number(to_x)} {_number(to_y)}")
        else:
            out.append(_bend(path, number, x, y, to_x, to_y))
        x, y = to_x, to_y
    return "".join(out)


def _bend(path: Path, number: int, x: float, y: float, to_x: float, to_y: float) -> str:
    """A curve that leaves and arrives flat, or, at the tip of an inner product, upright."""
    if len(path.points) == 5 and number in (1, 2):  # there and back: a quarter of an ellipse each
        first, second = ((to_x, y), (to_x, y)) if number == 1 else ((x, to_y), (x, to_y))
    else:
        middle = (x + to_x) / 2
        first, second = (middle, y), (middle, to_y)
    return "C" + " ".join(_number(value) for value in (*first, *second, to_x, to_y))


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
