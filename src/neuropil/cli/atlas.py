"""`neuropil atlas`, `find`, `query` and `explore`: make an atlas, and read it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from neuropil.cli import output
from neuropil.cli.app import ANY_MODEL, AsJson, command, interruptible
from neuropil.cli.output import Column

if TYPE_CHECKING:
    import pyarrow as pa

    from neuropil.atlas import Atlas
    from neuropil.build import Summary
    from neuropil.models import Model

PANEL = "The atlas"
AtlasPath = Annotated[Path, typer.Argument(metavar="ATLAS", help="The folder of an atlas.")]
ROLES = ("up", "gate", "down")
GROUPS = ("decode", "causal", "activity", "exemplars", "ablation")


def roles(text: str) -> tuple[str, ...]:
    """The weights named in `--weights`, in the library's order.

    >>> roles("down, up")
    ('up', 'down')
    """
    given = {word.strip() for word in text.split(",") if word.strip()}
    if not given or given - set(ROLES):
        raise typer.BadParameter(f"got {text!r}; give one or more of up, gate, down, separated by commas.")
    return tuple(role for role in ROLES if role in given)


def read_prompts(path: Path | None) -> list[str] | None:
    """The prompts of a file, one a line; empty lines are skipped."""
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} is not UTF-8 text; save it as UTF-8, one prompt a line.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise typer.BadParameter(f"{path} holds no prompt; write one a line.")
    return prompts


@command(
    "atlas",
    PANEL,
    "neuropil atlas                                  SmolLM2-135M, into atlases/smollm2",
    "neuropil atlas ./Llama-3.2-1B --no-causal       the labels alone, in a fraction of the time",
    "neuropil atlas model.gguf --out maps/model      a GGUF file",
    "neuropil atlas efficientnet-lite0               a vision model, shown photographs",
    "neuropil atlas ./resnet --images ./pictures     a vision checkpoint and your own images",
    "neuropil atlas nets.py:Net --images digits      a class, or a function, of a Python file of yours",
    "torchrun --nproc-per-node 2 -m neuropil atlas   the layers shared between two processes",
)
def atlas(
    model: Annotated[str, typer.Argument(help=ANY_MODEL)] = "smollm2",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The atlas's folder.", show_default="./atlases/<model name>"),
    ] = None,
    weights: Annotated[str, typer.Option(help="The weights to decode.")] = "up,gate,down",
    top: Annotated[int, typer.Option(min=1, max=1000, help="Tokens kept for each weight.")] = 10,
    causal: Annotated[
        bool,
        typer.Option("--causal/--no-causal", help="Clamp (in a vision model: silence) neurons and measure the effect."),
    ] = True,
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="Texts to measure effects on, one a line.",
            show_default="built in",
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="SET",
            help="What a vision model is shown: photos, fashion-mnist, digits, or a folder of images.",
            show_default="by its channels",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Compute anew what the folder already has.")] = False,
    as_json: AsJson = False,
) -> None:
    """Map every neuron of MODEL: what it stands for, and whether clamping it bears that out.

    A run that was stopped goes on where it was: give the same command again.
    """
    which, texts = roles(weights), read_prompts(prompts)
    from neuropil.build import build_atlas, default_path, main_rank

    loaded = load_model(model)
    path = out or default_path(loaded)
    if main_rank() and (path / "manifest.json").exists():
        fate = "replaced" if overwrite else "kept"
        output.note(f"{path} is there ({_parts(path) or 'empty'}), and is {fate}")
    options = _changed(weights, top, causal, prompts, images)
    if loaded.image_input is not None and _changed(weights, top, True, prompts):
        raise typer.BadParameter(f"{model} takes images: --weights, --top and --prompts are of language models.")
    again = " ".join(["neuropil atlas", quoted(model), "--out", quoted(str(path)), *options])
    if main_rank():
        output.note(f"{loaded.name}: {loaded.parameters:,} parameters, {_neurons(loaded)} → {path}")
    with interruptible(lambda: _stopped(path, again)):
        summary = build_atlas(loaded, path, which, top, causal, texts, main_rank(), overwrite, images)
    if main_rank():
        output.as_json(summary.to_dict()) if as_json else summarise(summary, model)


def _neurons(model: Model) -> str:
    return f"{output.plural(sum(site.width for site in model.sites), 'neuron')} in {len(model.sites)} sites"


def _changed(weights: str, top: int, causal: bool, prompts: Path | None, images: str | None = None) -> list[str]:
    """The options that were not left at their defaults, to be given again."""
    given = [] if weights == "up,gate,down" else ["--weights", quoted(weights)]
    given += [] if top == 10 else ["--top", str(top)]
    given += [] if causal else ["--no-causal"]
    given += [] if prompts is None else ["--prompts", quoted(str(prompts))]
    return given + ([] if images is None else ["--images", quoted(images)])


def load_model(name: str) -> Model:
    """The model, with a word on stderr while it is read."""
    from neuropil.models import load

    if not output.errors().is_terminal:
        return load(name)
    with output.errors().status(f"loading {output.clean(name)}"):
        return load(name)


def quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _stopped(path: Path, again: str) -> str:
    """What a Ctrl-C left on disk, and how to go on."""
    if not (parts := _parts(path)):
        return f"Stopped before the first layer was finished. To start again:\n  {again}"
    return f"Stopped. {path} keeps every finished layer ({parts}). To go on from there:\n  {again}"


def _parts(path: Path) -> str:
    """How many layers of each group are on disk."""
    kept = {group: len(list((path / "parts" / group).glob("*.parquet"))) for group in GROUPS}
    return ", ".join(f"{group} {count}" for group, count in kept.items() if count)


def summarise(summary: Summary, model: str) -> None:
    """The end of `neuropil atlas`: what was found, and what to do with it."""
    path, count = quoted(summary.path), summary.neurons
    rows: dict[str, str | Text] = {"neurons mapped": f"{count:,} in {summary.sites} layers"}
    if summary.specialised is not None:
        rows["specialised"] = f"{summary.specialised:,}  ({output.share(summary.specialised, count)})"
    if summary.confirmed is not None:
        rows["causally confirmed"] = _confirmed(summary)
    rows |= _seen(summary)
    if summary.seconds is not None:
        rows["time"] = duration(summary.seconds)
    rows["on disk"] = f"{size(summary.size)} in {summary.path}"
    output.say()
    output.say(Text.assemble(("The atlas of ", "bold"), (output.clean(summary.model), "bold cyan")))
    output.pairs(rows)
    output.say()
    output.say("Now try", style="bold")
    asked = [f"neuropil find {path} dog"]
    order = "SELECT neuron, label, specialisation FROM neurons ORDER BY 3 DESC LIMIT 20"
    if summary.images is not None:
        asked, order = [], "SELECT neuron, threshold, sparsity FROM neurons WHERE NOT dead ORDER BY 3 DESC LIMIT 20"
    for line in (f"neuropil explore {path}", *asked, f'neuropil query {path} "{order}"'):
        output.say(f"  {line}")


def _seen(summary: Summary) -> dict[str, str]:
    """What the images told of a vision model."""
    if summary.images is None:
        return {}
    rows = {"shown": output.plural(summary.images, "image")}
    count = summary.neurons
    if summary.dead is not None:
        rows["dead"] = f"{summary.dead:,}  ({output.share(summary.dead, count)}): the same on every image"
    if summary.selective is not None:
        rows["selective"] = f"{summary.selective:,}  ({output.share(summary.selective, count)}): mostly one class"
    if summary.ablated is not None:
        rows["silenced"] = f"{summary.ablated:,}  ({output.share(summary.ablated, count)})"
    return rows


def _confirmed(summary: Summary) -> str:
    text = f"{summary.confirmed:,}  ({output.share(summary.confirmed or 0, summary.neurons)}): "
    text += f"{summary.promotes:,} promote their label, {summary.suppresses:,} suppress it"
    if summary.specialised and summary.confirmed_specialised is not None:
        text += f"; {output.share(summary.confirmed_specialised, summary.specialised)} of the specialised"
    return text


def duration(seconds: float | int) -> str:
    """
    >>> duration(3.21), duration(187), duration(7325)
    ('3.2 s', '3 min 7 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(count: float | int) -> str:
    """
    >>> size(812), size(23_400_000)
    ('812 B', '23.4 MB')
    """
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


@command(
    "find",
    PANEL,
    "neuropil find atlases/smollm2 dog",
    'neuropil find atlases/smollm2 "capital of France" --limit 5',
    "neuropil find atlases/smollm2 dog --json | jq -r '.[].neuron'",
)
def find(
    path: AtlasPath,
    words: Annotated[list[str], typer.Argument(help="What the neurons should stand for.")],
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Neurons listed.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Find the neurons that stand for WORDS, by token and by meaning."""
    from neuropil.atlas import Atlas

    with Atlas.open(path) as opened:
        found = opened.find(" ".join(words), limit=limit)
        rows = found.to_pylist()
        rows = [row | more for row, more in zip(rows, _details(opened, rows), strict=True)]
    if remark := (found.schema.metadata or {}).get(b"note"):
        output.note(f"Found {remark.decode()}")
    if as_json:
        return output.as_json(rows)
    if not rows:
        return output.note(f"No neuron of {path} stands for {' '.join(words)!r}. Try a more common word.")
    shown = [(column, cell) for column, cell, needs in FOUND if needs in rows[0]]
    output.listing([column for column, _ in shown], [[cell(row) for _, cell in shown] for row in rows])
    output.hint(f"\nneuropil show {quoted(str(path))} {rows[0]['neuron']}")


_DETAILS = ("label_from", "label_sign", "cos_up", "cos_gate", "cos_down", "effect", "effect_se", "verdict")


def _details(opened: Atlas, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a listing shows beside what `Atlas.find` gives."""
    names = [name for name in _DETAILS if name in opened.columns]
    if not rows or not names:
        return [{} for _ in rows]
    sql = f"SELECT neuron, {', '.join(names)} FROM neurons WHERE list_contains($wanted, neuron)"
    details = opened.query(sql, {"wanted": [row["neuron"] for row in rows]}).to_pylist()
    by_neuron = {row["neuron"]: row for row in details}
    return [by_neuron[row["neuron"]] for row in rows]


def effect(row: dict[str, Any]) -> str:
    """The causal effect with its standard error."""
    if row.get("effect") is None:
        return "–"
    return f"{output.number(row['effect'], signed=True)} ± {output.number(row.get('effect_se'))}"


VERDICTS = {"promotes": "green", "suppresses": "red", "no effect": "dim"}


def verdict(row: dict[str, Any]) -> Text:
    said = row.get("verdict") or "–"
    return Text(said, style=VERDICTS.get(said, ""))


def found_by(row: dict[str, Any]) -> str:
    """How the neuron was found: by its token, or how near its label is in meaning."""
    return "token" if row.get("similarity") is None else f"meaning {output.number(row['similarity'])}"


FOUND: list[tuple[Column, Any, str]] = [
    (Column("neuron", style="bold cyan"), lambda row: row["neuron"], "neuron"),
    (Column("label", style="bold"), lambda row: output.clean(row["label"] or "–"), "label"),
    (Column("by"), found_by, "match"),
    (Column("special", "right"), lambda row: output.number(row["specialisation"]), "specialisation"),
    (Column("effect", "right"), effect, "effect"),
    (Column("verdict"), verdict, "verdict"),
    (Column("tokens", give=True), lambda row: output.tokens(row["tokens"]), "tokens"),
]


@command(
    "query",
    PANEL,
    'neuropil query atlases/smollm2 "SELECT layer, count(*) FROM neurons WHERE specialised GROUP BY 1"',
    "neuropil query atlases/smollm2 \"SELECT neuron, effect FROM neurons WHERE label = 'dog'\" --json",
    "neuropil query atlases/smollm2 --columns",
)
def query(
    path: AtlasPath,
    sql: Annotated[str | None, typer.Argument(help="DuckDB SQL.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=0, help="Rows shown.", show_default="all")] = None,
    columns: Annotated[bool, typer.Option("--columns", help="List the columns there are, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask the atlas in SQL.

    Its tables: neurons (a row a neuron), sites, vocabulary, and each group of columns (decode, causal, or of a vision
    model activity, exemplars, ablation).
    """
    from neuropil.atlas import Atlas

    if sql is None and not columns:
        raise typer.BadParameter("give a query, or --columns to see what can be asked for.", param_hint="SQL")
    with Atlas.open(path) as opened:
        if columns:
            rows = [{"column": name, "type": kind} for name, kind in opened.columns.items()]
            names = ["column", "type"]
        else:
            rows, names = _named(opened.query(str(sql), limit=limit))
    if as_json:
        return output.as_json(rows)
    heads = [
        Column(output.clean(name), "right" if _numeric(rows, name) else "left", give=_wide(rows, name))
        for name in names
    ]
    output.listing(heads, [[output.cell(row[name]) for name in names] for row in rows])
    output.hint(f"\n{output.plural(len(rows), 'row')}")


def _named(table: pa.Table) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows as dictionaries; of two columns of one name the second is called `name_2`."""
    names: list[str] = []
    for name in table.column_names:
        number = sum(other == name for other in table.column_names[: len(names)]) + 1
        names.append(name if number == 1 else f"{name}_{number}")
    return table.rename_columns(names).to_pylist(), names


def _numeric(rows: list[dict[str, Any]], name: str) -> bool:
    return all(isinstance(row[name], (int, float, type(None))) for row in rows)


def _wide(rows: list[dict[str, Any]], name: str) -> bool:
    return any(isinstance(row[name], list) or len(str(row[name])) > 28 for row in rows[:100])


@command(
    "explore",
    PANEL,
    "neuropil explore atlases/smollm2",
    "neuropil explore atlases/smollm2 --port 9000 --no-open",
    "neuropil explore atlases/tuned --model ./tuned    the model the playground runs",
)
def explore(
    path: AtlasPath,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 8000,
    model: Annotated[
        str | None,
        typer.Option(
            help="The model that the playground runs, or FILE.py:NAME of it.", show_default="the one that was mapped"
        ),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the browser.")] = True,
) -> None:
    """Look at the atlas in the browser: a table, a map, a page a neuron, a playground."""
    from neuropil.atlas import Atlas
    from neuropil.explorer import serve

    with Atlas.open(path):  # says what is wrong with the folder before a server is started
        pass
    with interruptible(lambda: "The explorer is closed."):
        serve(path, host=host, port=port, model=model, open_browser=open_browser)
