"""`neuropil show`: all that an atlas knows of one neuron."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from neuropil.cli import output
from neuropil.cli.app import AsJson, command
from neuropil.cli.atlas import PANEL, ROLES, AtlasPath, effect, quoted, verdict
from neuropil.cli.output import Column

# What the page shows in its own place; every other column is listed below it by name.
_PLACED = {"neuron", "site", "index", "layer", "module", "label", "label_sign", "label_from", "specialised"}
_PLACED |= {"specialisation", "hub", "coherence", "label_token", "label_tokens", "null_percentile"}
_PLACED |= {"exemplar_masks"}  # a picture of each, which the explorer draws
_PLACED |= {"effect", "effect_se", "control", "control_se", "verdict", "confirmed", "prompts", "clamp_value"}


@command(
    "show",
    PANEL,
    "neuropil show atlases/smollm2 29:808",
    "neuropil show atlases/smollm2 model.layers.29.mlp:808 --json",
)
def show(
    path: AtlasPath,
    neuron: Annotated[str, typer.Argument(help="Its address, as 29:808 or model.layers.29.mlp:808.")],
    top: Annotated[int, typer.Option(min=1, help="Tokens shown for each weight.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Show all that the atlas knows of one NEURON."""
    from neuropil.atlas import Atlas

    with Atlas.open(path) as opened:
        row = opened.neuron(neuron)
        model = opened.manifest.get("model", {}).get("name", "")
    if as_json:
        return output.as_json(row)
    where = " · ".join(str(part) for part in (row.get("module"), model) if part)
    output.say(Text.assemble((row["neuron"], "bold cyan"), (f"  {output.clean(where)}", "dim")))
    if "label" in row:
        output.say(_label(row))
    if "effect" in row:
        output.say(_causal(row))
    output.say()
    _weights(row, top)
    _others(row)
    which = "" if model in ("", "smollm2") else f"{quoted(model)} "
    if "exemplar_images" not in row:
        output.hint(f"\nneuropil clamp {which}{row['neuron']}=30 --prompt '...'")
    output.hint(f"neuropil explore {quoted(str(path))}")


def _label(row: dict[str, Any]) -> Text:
    """The sentence on what the neuron stands for."""
    if not row["label"]:
        return Text("stands for no word", style="dim")
    said = Text.assemble("stands for ", (output.clean(row["label"]), "bold"))
    ways = {1: "points towards it", -1: "points away from it"}
    said.append(f"; its {row.get('label_from') or 'up'} vector {ways.get(row.get('label_sign') or 1)}")
    if row.get("specialisation") is not None:
        times = output.number(row["specialisation"])
        yes = "specialised" if row.get("specialised") else "not specialised"
        said.append(f"; {yes}, {times} × what chance reaches")
    if row.get("hub"):
        said.append("; a hub: aligned with hundreds of rare tokens, mind its label", style="yellow")
    return said


def _causal(row: dict[str, Any]) -> Text:
    """The sentence on what clamping the neuron did."""
    said = Text.assemble("clamped: ", verdict(row), f", {effect(row)} on its label's logit")
    if row.get("control") is not None:
        se = output.number(row.get("control_se"))
        said.append(f" (other tokens {output.number(row['control'], signed=True)} ± {se})")
    if row.get("prompts"):
        said.append(f", over {output.plural(row['prompts'], 'prompt')}")
    return said


def _weights(row: dict[str, Any], top: int) -> None:
    """A line for each side of each decoded weight."""
    lines: list[list[str | Text]] = []
    for role in ROLES:
        for sign, name in (("+", f"{role}_"), ("−", f"{role}_neg_")):
            if row.get(f"{name}tokens"):
                best = output.number((row.get(f"{name}scores") or [None])[0], signed=True)
                cosine = output.number(row.get(f"cos_{role}"), signed=True) if sign == "+" else ""
                head = Text(role if sign == "+" else "", style="bold")
                lines.append([head, cosine, Text(sign, "green" if sign == "+" else "red"), best])
                lines[-1].append(output.tokens(row[f"{name}tokens"], top))
    if lines:
        heads = [Column("weight"), Column("to label", "right"), Column(""), Column("best", "right")]
        output.listing([*heads, Column("tokens", give=True)], lines)


def _others(row: dict[str, Any]) -> None:
    """The columns that other methods wrote, by name."""
    known = tuple(f"{role}_" for role in ROLES)
    rest = {
        name: output.cell(value)
        for name, value in row.items()
        if name not in _PLACED and not name.startswith(known) and not name.startswith(("cos_", "effect_"))
    }
    if rest:
        output.say()
        output.pairs({output.clean(name): value for name, value in rest.items()})
