"""`neuropil bricks`: which groups of neurons serve which function, and what is lost without them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuropil.cli import output
from neuropil.cli.app import ANY_MODEL, MODEL, AsJson, command, interruptible, told
from neuropil.cli.atlas import load_model
from neuropil.cli.output import Column

if TYPE_CHECKING:
    from neuropil.interpret.bricks import Functionality, Partition, PruningMatrix
    from neuropil.interpret.bricks.ablation import Loss
    from neuropil.interpret.bricks.testing import BrickTest
    from neuropil.models import Model

BATCHES = 1  # of eight windows each, for measuring what pruning costs
WINDOWS, TOKENS = 32, 64
WIDE = 8  # functions: of more, a table of each against each is not read


@dataclass(frozen=True)
class Functions:
    """What functions are learned from and tested on, and how.

    `layers` None: all of the model's. `top` is the share of a layer's neurons whose bricks are tested for chance, None
    that which is pruned: of the few dozen filters of a layer a hundredth is one neuron, of which no brick can have more
    than by chance.
    """

    train: dict[str, Any]
    mixed: Iterable[Any]
    test: dict[str, Any]
    loss: Loss
    unit: str
    target: str
    settings: dict[str, Any]
    layers: list[int] | None = None
    left: dict[str, str] = field(default_factory=dict)
    top: float | None = None


@command(
    "bricks",
    "Models",
    "neuropil bricks smollm2                                          the functions that are at hand",
    "neuropil bricks smollm2 --functions python,json,bible --share 0.1",
    "neuropil bricks smollm2 --functions python,mail.txt --atlas atlases/smollm2",
    "neuropil bricks examples/fashion.py:network --atlas atlases/fashion    a vision model: classes of images",
    "neuropil bricks efficientnet-lite0 --images ./pictures           a folder with a subfolder for each class",
)
def bricks(
    model: Annotated[str, typer.Argument(metavar=MODEL, help=ANY_MODEL)],
    functions: Annotated[
        str | None,
        typer.Option(
            help="Kinds of text, separated by commas: arithmetic, json, numerals, python, bible, a genre of the Brown "
            "corpus, or a text file. Of a vision model: classes of the images.",
            show_default="those at hand",
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="SET",
            help="What a vision model is shown: fashion-mnist, digits, or a folder with a subfolder for each class. "
            "Half of each class is learned from, the other half tests.",
            show_default="fashion-mnist for grey images",
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("--bricks", min=1, help="Bricks a layer.", show_default="16, of fewer neurons one each"),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", "-m", help="parameters, coactivation, correlation, random or blocks.")
    ] = "parameters",
    sequences: Annotated[int, typer.Option(min=8, help="Windows of each kind of text to learn from.")] = WINDOWS,
    length: Annotated[int, typer.Option(min=4, help="Tokens in a window.")] = TOKENS,
    share: Annotated[float, typer.Option(help="Share of each layer's neurons that is pruned.")] = 0.05,
    how: Annotated[str, typer.Option(help="Pruned neurons are held at zero or at their mean.")] = "mean",
    atlas: Annotated[
        Path | None, typer.Option(metavar="ATLAS", help="Add each neuron's brick and predictivity to this atlas.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Deal MODEL's neurons into bricks, and see what each function loses without its own.

    The functions of a language model are kinds of text, those of a vision model classes of images.

    Prunes the neurons that tell each function best, and as many others as active, and prints by how much the loss rises
    on each function: minus the log-probability of the next token, or of the image's class (of the one that the model
    prefers, where it has not as many classes as the images). The model is never changed.
    """
    from neuropil.interpret.bricks.columns import column_names
    from neuropil.interpret.bricks.partition import METHODS

    if method not in METHODS:
        raise typer.BadParameter(f"got {method!r}; there are {', '.join(METHODS)}.", param_hint="--method")
    if how not in ("zero", "mean"):
        raise typer.BadParameter(f"got {how!r}; give zero or mean.", param_hint="--how")
    if not 0 < share < 0.5:
        raise typer.BadParameter(f"got {share}; give a share between 0 and 0.5.", param_hint="--share")
    if atlas is not None:
        from neuropil.atlas import Atlas

        Atlas.open(atlas).close()  # it must be there, which is asked before the work
    names = None if functions is None else _names(functions)
    loaded = load_model(model)
    sees = _sees(loaded, images, sequences, length)
    try:
        with interruptible(lambda: "Stopped; nothing was written."):
            data = _images(loaded, images, names) if sees else _texts(loaded, names, sequences, length, seed)
            if atlas is not None:
                column_names(data.train)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", UserWarning)
                found, parts, tested = _found(loaded, data, count, method, data.top or share, seed)
            for message in dict.fromkeys(str(one.message) for one in said if one.category is UserWarning):
                output.note(message, style="yellow")
            matrix, control = _pruned(loaded, found, data, share, how, seed)
    except ValueError as error:
        raise told(error) from error
    settings = {"functions": list(data.train), "bricks": max(parts.counts.values()), "method": parts.method,
                **data.settings, "top": data.top or share, "seed": seed}  # fmt: skip
    columns = None if atlas is None else _add(atlas, loaded, parts, found, tested, settings)
    facts = _facts(parts, tested, matrix, control)
    facts |= {"loss_of": data.target, "settings": settings, "share": share, "how": how}
    if columns is not None:
        facts["columns"] = columns
    output.as_json(facts) if as_json else _show(facts, matrix, control, data.unit)


def _names(functions: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in functions.split(",") if name.strip()))
    if len(names) < 2:
        raise typer.BadParameter("give two or more: each function is told from the others.", param_hint="--functions")
    return names


def _sees(loaded: Model, images: str | None, sequences: int, length: int) -> bool:
    """Whether the functions are classes of images; options that do not fit are refused."""
    sees = loaded.image_input is not None or (images is not None and loaded.takes_images is not None)
    if images is not None and not sees:
        raise typer.BadParameter(
            f"{loaded.name} takes no images; its functions are kinds of text (--functions).", param_hint="--images"
        )
    if sees and (sequences, length) != (WINDOWS, TOKENS):
        raise typer.BadParameter(f"{loaded.name} takes images: --sequences and --length are of language models.")
    return sees


def _images(loaded: Model, images: str | None, names: list[str] | None) -> Functions:
    from neuropil.build import probe_for
    from neuropil.interpret.bricks.images import image_functions

    shown = probe_for(loaded, images)
    made = image_functions(loaded, shown, names)
    return Functions(
        made.train, made.mixed, made.test, made.loss, "nats an image", made.target, shown.settings, made.layers,
        made.left,
    )  # fmt: skip


def _texts(loaded: Model, names: list[str] | None, sequences: int, length: int, seed: int) -> Functions:
    from neuropil.errors import ModelError
    from neuropil.interpret.bricks import language_loss
    from neuropil.interpret.bricks.functionality import TOP
    from neuropil.interpret.bricks.texts import installed, text_windows

    if loaded.tokenizer is None:
        raise ModelError(
            f"{loaded.name} comes without a tokenizer, so it reads no text; if its inputs are images, give --images, "
            "else use functionality() in Python"
        )
    train, test = {}, {}
    for name in installed() if names is None else names:
        learn, judge = text_windows(name, loaded.tokenizer, max(sequences, 8 * BATCHES), length, seed=seed)
        key = Path(name).stem if Path(name).is_file() else name
        train[key], test[key] = learn[: -(-sequences // 8)], judge[:BATCHES]
    mixed = [batch for each in zip(*train.values(), strict=True) for batch in each]
    settings = {"sequences": sequences, "length": length}
    return Functions(train, mixed, test, language_loss, "nats a token", "the next token", settings, top=TOP)


def _found(
    loaded: Model, data: Functions, count: int | None, method: str, top: float, seed: int
) -> tuple[Functionality, Partition, BrickTest]:
    from neuropil.interpret.bricks import functional_bricks, functionality, partition_bricks

    output.note(f"reading {len(data.train)} functions …")
    found = functionality(loaded.module(), data.train, layers=data.layers)
    output.note(f"dealing neurons into bricks by {method} …")
    parts = partition_bricks(loaded, count, method=method, data=data.mixed, layers=data.layers, seed=seed)
    parts = replace(parts, left=parts.left | data.left)
    return found, parts, functional_bricks(found, parts, share=top, seed=seed)


def _pruned(
    loaded: Model, found: Functionality, data: Functions, share: float, how: str, seed: int
) -> tuple[PruningMatrix, PruningMatrix]:
    """What each function's neurons cost, and as many others as active."""
    from neuropil.interpret.bricks import matched_control, neurons_of, pruning_matrix

    net, test = loaded.module(), data.test
    output.note("pruning each function's neurons …")
    sets = {name: neurons_of(found, name, share) for name in test}
    matrix = pruning_matrix(net, sets, test, how=how, values=found.mean, loss=data.loss)
    output.note("pruning others as active …")
    others = {name: matched_control(found, neurons, seed) for name, neurons in sets.items()}
    control = pruning_matrix(net, others, test, how=how, values=found.mean, loss=data.loss, base=matrix.base)
    return matrix, control


def _add(
    path: Path, loaded: Model, parts: Partition, found: Functionality, tested: BrickTest, settings: dict[str, Any]
) -> list[str]:
    from neuropil.atlas import Atlas
    from neuropil.interpret.bricks.columns import TYPES, brick_columns, column_name

    with Atlas.create(path, loaded) as atlas:
        atlas.add(
            "bricks", brick_columns(parts, found, tested), settings=settings, method="interpret.bricks", types=TYPES,
            overwrite=True,
        )  # fmt: skip
    return [*TYPES, *(column_name(name) for name in found.names)]


def _facts(parts: Partition, tested: BrickTest, matrix: PruningMatrix, control: PruningMatrix) -> dict[str, Any]:
    import torch

    rejected = torch.stack(list(tested.rejected.values())).mean(0).tolist()
    chance = torch.stack(list(tested.control.values())).mean(0).tolist()
    return {
        "functional_bricks": dict(zip(tested.names, rejected, strict=True)),
        "functional_bricks_at_random": dict(zip(tested.names, chance, strict=True)),
        "loss": dict(zip(matrix.columns, matrix.base.tolist(), strict=True)),
        "rise": {
            name: dict(zip(matrix.columns, row, strict=True))
            for name, row in zip(matrix.rows, matrix.increase.tolist(), strict=True)
        },
        "rise_of_others_as_active": {
            name: dict(zip(control.columns, row, strict=True))
            for name, row in zip(control.rows, control.increase.tolist(), strict=True)
        },
        "specificity": matrix.specificity,
        "specificity_of_others_as_active": control.specificity,
        "left": dict(parts.left),
    }


def _show(facts: dict[str, Any], matrix: PruningMatrix, control: PruningMatrix, unit: str) -> None:
    output.say(f"Rise of the loss ({unit}) on each function, without {facts['share']:.0%} of the neurons", "bold")
    output.listing(*(_each if len(matrix.columns) > WIDE else _square)(facts, matrix, control))
    output.say()
    shares = facts["functional_bricks"]
    told = [f"{name} {value:.1%}" for name, value in shares.items()]
    if len(told) > WIDE:
        told = [f"{sum(shares.values()) / len(shares):.1%} on average"]
    lines = {
        "loss": f"minus the log-probability of {facts['loss_of']}",
        "specificity": f"{output.number(facts['specificity'])} nats more on the own function than on others "
        f"({output.number(facts['specificity_of_others_as_active'])} for others as active)",
        "functional bricks": ", ".join(told)
        + f" (at random {max(facts['functional_bricks_at_random'].values()):.2%} at most)",
    }
    if facts["left"]:
        lines["without bricks"] = _left(facts["left"])
    if "columns" in facts:
        lines["columns"] = ", ".join(facts["columns"])
    output.pairs(lines)


def _square(facts: dict[str, Any], matrix: PruningMatrix, control: PruningMatrix) -> tuple[list[Column], list[Any]]:
    """Every function's loss without every function's neurons."""
    columns = [Column("without the neurons of"), *(Column(name, "right") for name in matrix.columns)]
    lines = dict(zip(matrix.rows, matrix.increase, strict=True))
    lines |= {"others as active": control.increase.mean(0), "(loss with all)": matrix.base}
    return columns, [[name, *map(output.number, values.tolist())] for name, values in lines.items()]


def _each(facts: dict[str, Any], matrix: PruningMatrix, control: PruningMatrix) -> tuple[list[Column], list[Any]]:
    """A line a function: its own loss and the mean of the others' without its neurons, and its own without others."""
    import torch

    heads = ("own", "of others", "others as active", "(loss with all)", "functional bricks")
    numbers = torch.stack([matrix.own, matrix.others, control.own, matrix.base], 1).tolist()
    shares = facts["functional_bricks"].values()
    rows = [
        [name, *map(output.number, row), f"{share:.1%}"]
        for name, row, share in zip(matrix.rows, numbers, shares, strict=True)
    ]
    return [Column("without the neurons of"), *(Column(head, "right") for head in heads)], rows


def _left(left: dict[str, str]) -> str:
    """Which layers could not be dealt into bricks, and why."""
    reasons = output.by_reason(left).items()
    return "; ".join(f"{output.plural(len(names), 'layer')} ({output.first(names)}): {why}" for why, names in reasons)
