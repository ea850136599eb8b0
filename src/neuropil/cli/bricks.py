"""`neuropil bricks`: which groups of neurons serve which function, and what is lost without them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuropil.cli import output
from neuropil.cli.app import ANY_MODEL, MODEL, AsJson, command, interruptible
from neuropil.cli.atlas import load_model
from neuropil.cli.output import Column

if TYPE_CHECKING:
    from neuropil.interpret.bricks import Functionality, Partition, PruningMatrix
    from neuropil.interpret.bricks.testing import BrickTest
    from neuropil.models import Model

BATCHES = 1  # of eight windows each, for measuring what pruning costs


@command(
    "bricks",
    "Models",
    "neuropil bricks smollm2                                          the functions that are at hand",
    "neuropil bricks smollm2 --functions python,json,bible --share 0.1",
    "neuropil bricks smollm2 --functions python,mail.txt --atlas atlases/smollm2",
)
def bricks(
    model: Annotated[str, typer.Argument(metavar=MODEL, help=ANY_MODEL)],
    functions: Annotated[
        str | None,
        typer.Option(
            help="Kinds of text, separated by commas: arithmetic, json, numerals, python, bible, a genre of the Brown "
            "corpus, or a text file.",
            show_default="those at hand",
        ),
    ] = None,
    count: Annotated[int, typer.Option("--bricks", min=1, help="Bricks a layer.")] = 16,
    method: Annotated[
        str, typer.Option("--method", "-m", help="parameters, coactivation, correlation, random or blocks.")
    ] = "parameters",
    sequences: Annotated[int, typer.Option(min=8, help="Windows of each function to learn from.")] = 32,
    length: Annotated[int, typer.Option(min=4, help="Tokens in a window.")] = 64,
    share: Annotated[float, typer.Option(help="Share of each layer's neurons that is pruned.")] = 0.05,
    how: Annotated[str, typer.Option(help="Pruned neurons are held at zero or at their mean.")] = "mean",
    atlas: Annotated[
        Path | None, typer.Option(metavar="ATLAS", help="Add each neuron's brick and predictivity to this atlas.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Deal MODEL's neurons into bricks, and see what each function loses without its own.

    Prunes the neurons that tell each function best, and as many others as active, and prints by how much the loss rises
    on each function. The model is never changed.
    """
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
    names = _names(functions)
    loaded = load_model(model)
    try:
        with interruptible(lambda: "Stopped; nothing was written."):
            train, test = _texts(loaded, names, sequences, length, seed)
            found, parts, tested = _found(loaded, train, count, method, seed)
            matrix, control = _pruned(loaded, found, test, share, how, seed)
    except ValueError as error:
        raise _said(error) from error
    settings = {"functions": names, "bricks": count, "method": parts.method, "sequences": sequences, "length": length,
                "seed": seed}  # fmt: skip
    columns = None if atlas is None else _add(atlas, loaded, parts, found, tested, settings)
    facts = _facts(parts, tested, matrix, control) | {"settings": settings, "share": share, "how": how}
    if columns is not None:
        facts["columns"] = columns
    output.as_json(facts) if as_json else _show(facts, matrix, control)


def _said(error: ValueError) -> Exception:
    from neuropil.errors import NeuropilError

    return error if isinstance(error, NeuropilError) else NeuropilError(str(error))


def _names(functions: str | None) -> list[str]:
    from neuropil.interpret.bricks.texts import installed

    if functions is None:
        return installed()
    names = list(dict.fromkeys(name.strip() for name in functions.split(",") if name.strip()))
    if len(names) < 2:
        raise typer.BadParameter("give two or more: each function is told from the others.", param_hint="--functions")
    return names


def _texts(loaded: Model, names: list[str], sequences: int, length: int, seed: int) -> tuple[Any, Any]:
    from neuropil.errors import ModelError
    from neuropil.interpret.bricks.texts import text_windows

    if loaded.tokenizer is None:
        raise ModelError(f"{loaded.name} comes without a tokenizer, so it reads no text; use functionality() in Python")
    train, test = {}, {}
    for name in names:
        learn, judge = text_windows(name, loaded.tokenizer, max(sequences, 8 * BATCHES), length, seed=seed)
        key = Path(name).stem if Path(name).is_file() else name
        train[key], test[key] = learn[: -(-sequences // 8)], judge[:BATCHES]
    return train, test


def _found(
    loaded: Model, train: dict[str, Any], count: int, method: str, seed: int
) -> tuple[Functionality, Partition, BrickTest]:
    from neuropil.interpret.bricks import functional_bricks, functionality, partition_bricks

    net = loaded.module()
    output.note(f"reading {len(train)} functions …")
    found = functionality(net, train)
    output.note(f"dealing neurons into bricks by {method} …")
    batches = [batch for each in zip(*train.values(), strict=True) for batch in each]
    parts = partition_bricks(loaded, count, method=method, data=batches, seed=seed)
    return found, parts, functional_bricks(found, parts, seed=seed)


def _pruned(
    loaded: Model, found: Functionality, test: dict[str, Any], share: float, how: str, seed: int
) -> tuple[PruningMatrix, PruningMatrix]:
    """What each function's neurons cost, and as many others as active."""
    from neuropil.interpret.bricks import matched_control, neurons_of, pruning_matrix

    net = loaded.module()
    output.note("pruning each function's neurons …")
    sets = {name: neurons_of(found, name, share) for name in test}
    matrix = pruning_matrix(net, sets, test, how=how, values=found.mean)
    output.note("pruning others as active …")
    others = {name: matched_control(found, neurons, seed) for name, neurons in sets.items()}
    return matrix, pruning_matrix(net, others, test, how=how, values=found.mean, base=matrix.base)


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


def _show(facts: dict[str, Any], matrix: PruningMatrix, control: PruningMatrix) -> None:
    output.say(f"Rise of the loss (nats a token) on each function, without {facts['share']:.0%} of the neurons", "bold")
    columns = [Column("without the neurons of"), *(Column(name, "right") for name in matrix.columns)]
    rows = [[name, *(output.number(value) for value in row)] for name, row in zip(matrix.rows, matrix.increase.tolist(),
            strict=True)]  # fmt: skip
    mean = control.increase.mean(0).tolist()
    rows.append(["others as active", *(output.number(value) for value in mean)])
    rows.append(["(loss with all)", *(output.number(value) for value in matrix.base.tolist())])
    output.listing(columns, rows)
    output.say()
    shares = facts["functional_bricks"]
    lines = {
        "specificity": f"{output.number(facts['specificity'])} nats more on the own function than on others "
        f"({output.number(facts['specificity_of_others_as_active'])} for others as active)",
        "functional bricks": ", ".join(f"{name} {value:.1%}" for name, value in shares.items())
        + f" (at random {max(facts['functional_bricks_at_random'].values()):.2%} at most)",
    }
    if "columns" in facts:
        lines["columns"] = ", ".join(facts["columns"])
    output.pairs(lines)
