"""`neuropil diagram`: the circuit diagram of any model, as a drawing, a text or a program for one."""

from __future__ import annotations

import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuropil.cli import output
from neuropil.cli.app import ANY_MODEL, MODEL, AsJson, command

if TYPE_CHECKING:
    from torch import Tensor

    from neuropil.interpret.diagrams import Circuit

SUFFIXES = (".svg", ".tex", ".mmd", ".json", ".txt")


class Palette(StrEnum):
    """Colours of the drawing."""

    light = "light"
    dark = "dark"
    print = "print"
    auto = "auto"


@command(
    "diagram",
    "Models",
    "neuropil diagram smollm2 --out smollm2.svg                            its layers, folded",
    "neuropil diagram smollm2 --depth 4 --out smollm2.svg                  what is inside them",
    "neuropil diagram net.py:Net --input 1,3,32,32 --out net.svg           a class of your own",
    "neuropil diagram net.py:Net --input int:1,8 --names 'batch word'      in sentences",
)
def diagram(
    model: Annotated[str, typer.Argument(metavar=MODEL, help=ANY_MODEL)] = "smollm2",
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write: .svg, .tex (TikZ), .mmd (Mermaid), .json or .txt. Without it, sentences.",
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="SHAPE",
            help="The shape of an input, as 1,3,32,32 or int:1,8; once for each.",
            show_default=False,
        ),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(help="Names for the axes of an input, as 'batch seq'; once for each.", show_default=False),
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="How many levels of modules show their inside.")] = 2,
    opened: Annotated[
        list[str] | None,
        typer.Option("--open", metavar="MODULE", help="A module to open besides.", show_default=False),
    ] = None,
    fold: Annotated[bool, typer.Option(help="Draw a run of equal layers once.")] = True,
    hide: Annotated[list[str] | None, typer.Option(help="An axis to leave out.", show_default="batch")] = None,
    palette: Annotated[Palette, typer.Option(help="auto follows the reader's setting.")] = Palette.light,
    width: Annotated[int, typer.Option(min=200, help="Of the drawing, in pixels; it goes on in the next row.")] = 1100,
    as_json: AsJson = False,
) -> None:
    """Draw the circuit diagram of a model: axes are wires, and modules are boxes that can be opened.

    The model is run once through torch.export; a module that cannot be exported is drawn as one opaque box.
    """
    if out is not None and out.suffix not in SUFFIXES:
        raise typer.BadParameter(f"{out}; expected a name that ends in {', '.join(SUFFIXES)}.", param_hint="--out")
    inputs = tuple(_tensor(text) for text in shape or [])
    from neuropil.interpret.diagrams import circuit_diagram

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        circuit = circuit_diagram(model, inputs or None, names=names)
    for message in dict.fromkeys(str(one.message) for one in said if "opaque box" in str(one.message)):
        output.note(message, style="yellow")
    options: dict[str, Any] = {"depth": depth, "fold": fold}
    hidden = ["batch"] if hide is None else hide
    if out is not None:
        text = _written(circuit, out.suffix, options, hidden, set(opened or []), palette.value, float(width))
        out.write_text(text, encoding="utf-8")
    if as_json:
        return output.as_json(_facts(circuit, out))
    if out is None:
        output.say(output.clean(circuit.describe(**options), newlines=True))
    else:
        output.say(f"wrote {out}")
    output.say(str(circuit.cost()))


def _tensor(text: str) -> Tensor:
    """Zeros of a shape; "int:" before it makes them indices."""
    import torch

    kind, colon, sizes = text.partition(":")
    try:
        shape = [int(part) for part in (sizes if colon else text).split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1 or (colon and kind not in ("int", "float")):
        raise typer.BadParameter(f"{text!r}; expected sizes such as 1,3,32,32 or int:1,8.", param_hint="--input")
    return torch.zeros(shape, dtype=torch.long if kind == "int" and colon else torch.float32)


def _written(
    circuit: Circuit,
    suffix: str,
    options: dict[str, Any],
    hide: list[str],
    opened: set[str],
    palette: str,
    width: float,
) -> str:
    if suffix == ".svg":
        return circuit.svg(hide=hide, opened=opened, palette=palette, width=width, **options)
    if suffix == ".tex":
        return circuit.tikz(hide=hide, opened=opened, width=width, **options)
    if suffix == ".mmd":
        return circuit.mermaid(hide=hide, **options) + "\n"
    if suffix == ".json":
        return circuit.diagram.to_json() + "\n"
    return circuit.describe(**options) + "\n"


def _facts(circuit: Circuit, out: Path | None) -> dict[str, Any]:
    cost = circuit.cost()
    return {
        "model": circuit.name,
        "signature": str(circuit.diagram),
        "operations": cost.flops,
        "operations_in_products": cost.matmul,
        "parameters": cost.parameters,
        "peak_memory": cost.peak,
        "modules": len(circuit.modules),
        "opaque": dict(circuit.opaque),
        "written": None if out is None else str(out),
    }
