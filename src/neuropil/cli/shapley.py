"""`neuropil shapley`: models of a table compared, judged on other cohorts and explained, as a page."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuropil.cli import output
from neuropil.cli.app import AsJson, command, interruptible
from neuropil.cli.output import Column
from neuropil.errors import NeuropilError

if TYPE_CHECKING:
    from neuropil.interpret.shapley import ShapleyWorkflow

FILE = {"exists": True, "dir_okay": False}
MODELS = {
    "classification": ("xgboost", "forest", "svm", "tree", "logistic"),
    "regression": ("xgboost", "forest", "svm", "tree", "ridge"),
}


class Task(StrEnum):
    """Whether classes or numbers are predicted."""

    classification = "classification"
    regression = "regression"


@command(
    "shapley",
    "Training",
    "neuropil shapley train.csv --target dx                                 five models, compared and explained",
    "neuropil shapley train.csv --target dx --external aibl.csv --external oasis.csv",
    "neuropil shapley visits.csv --target dx --groups subject --drop visit  visits of one subject stay together",
    "neuropil shapley train.csv --target dx --models forest,logistic --selector-model logistic --prescreen 20",
    "neuropil shapley houses.csv --target price --task regression",
)
def shapley(
    train: Annotated[
        Path, typer.Argument(metavar="TABLE", help="A CSV file with a header and a line for each row.", **FILE)
    ],
    target: Annotated[str, typer.Option("--target", "-t", help="The column to be predicted.")],
    external: Annotated[
        list[Path] | None,
        typer.Option(
            help="A CSV file of another cohort to judge the models on; once for each.", show_default=False, **FILE
        ),
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="A column that names the subject of a row.", show_default="rows are independent")
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="A column to leave out; once for each.", show_default=False)
    ] = None,
    task: Annotated[Task, typer.Option(help="Whether classes or numbers are predicted.")] = Task.classification,
    models: Annotated[
        str, typer.Option(help="Separated by commas: xgboost, forest, svm, tree, logistic (ridge for numbers).")
    ] = "all",
    selector_model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="One that selects columns for all.", show_default="each for itself"),
    ] = None,
    prescreen: Annotated[
        int | None, typer.Option(min=1, help="Columns that stand for selection.", show_default="all")
    ] = None,
    search: Annotated[int, typer.Option(min=0, help="Random draws of each model's settings.")] = 10,
    cv: Annotated[int, typer.Option(min=2, help="Outer folds.")] = 10,
    h: Annotated[
        float, typer.Option("--correlated", min=0, max=1, help="Columns correlated so much are one aspect.")
    ] = 0.7,
    any_units: Annotated[
        bool, typer.Option("--any-units", help="Take a cohort whose columns seem to be in other units.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Columns and aspects that are listed.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of everything drawn at random.")] = 0,
    out: Annotated[
        Path, typer.Option("--out", "-o", file_okay=False, help="The folder of the page, its tables and figures.")
    ] = Path("shapley-report"),
    as_json: AsJson = False,
) -> None:
    """Compare models of a table, judge them on other cohorts, and explain each by Shapley values.

    Columns are selected and models tuned within each fold alone. The explanation is checked against the models' own
    importances and against shuffled columns; correlated columns are merged into aspects.
    """
    chosen = _models(models, selector_model, task)
    X, y = _table(train, target, "--target")
    subjects = X.pop(_known(groups, X, train, "--groups")).to_numpy() if groups else None
    X = X.drop(columns=[_known(name, X, train, "--drop") for name in drop or []])
    _fits(y, train, target, task)
    cohorts = _cohorts(external or [], target, X, y, task, any_units)
    from neuropil.interpret.shapley import ShapleyWorkflow

    workflow = ShapleyWorkflow(
        chosen, task=task.value, selector_model=selector_model, prescreen=prescreen, search=search, cv=cv, h=h,
        random_state=seed,
    )  # fmt: skip
    try:
        with interruptible(lambda: "Stopped; nothing was written."), _bars() as tell:
            workflow.fit(X, y, subjects, progress=tell)
            if cohorts:
                workflow.evaluate(cohorts, check_units=not any_units)
            workflow.explain(progress=tell)
    except ValueError as error:
        raise error if isinstance(error, NeuropilError) else NeuropilError(f"{train}: {error}") from None
    output.note("the page …")
    with interruptible(lambda: f"Stopped; what is in {out} is not whole."):
        page = workflow.report(out)
    facts = _facts(workflow, page)
    output.as_json(facts) if as_json else _show(facts, top)


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage at a terminal, else a word when it begins."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, tasks = output.errors(), {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def tell(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
                if not console.is_terminal:
                    output.note(f"{what} …")
            bars.update(tasks[what], completed=done)

        yield tell


# ------------------------------------------------------------------------------------------------ what is given


def _models(text: str, selector: str | None, task: Task) -> Any:
    """The names, once those that are missing on this machine are said."""
    from neuropil.interpret._shapley_functions import require

    known = MODELS[task.value]
    names = list(known) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    for option, given in (("--models", names), ("--selector-model", [selector] if selector else [])):
        if odd := [name for name in given if name not in known]:
            raise typer.BadParameter(f"got {odd[0]!r}; there are {', '.join(known)}.", param_hint=option)
    if not names:
        raise typer.BadParameter(f"give one or more of {', '.join(known)}.", param_hint="--models")
    wanted = (
        {"pandas"}
        | ({"xgboost"} & {*names, selector})
        | ({"shap"} if {*names} & {"xgboost", "forest", "tree"} else set())
    )
    for library in sorted(wanted):
        require(library)
    return names


def _table(path: Path, target: str, option: str) -> tuple[Any, Any]:
    """The file's columns without the target, and the target."""
    import pandas

    try:
        frame = pandas.read_csv(path, encoding="utf-8-sig")
    except (ValueError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} is no CSV file ({str(error).strip()}).", param_hint=_hint(option)) from None
    _known(target, frame, path, option)
    if not len(frame):
        raise typer.BadParameter(f"{path} has no rows below its header.", param_hint=_hint(option))
    if missing := int(frame[target].isna().sum()):
        raise typer.BadParameter(
            f"{output.plural(missing, 'row')} of {path} without a value of {target}; leave them out.",
            param_hint=_hint(option),
        )
    return frame.drop(columns=target), frame[target].to_numpy()


def _hint(option: str) -> str:
    return "TABLE" if option == "--target" else option


def _known(name: str, frame: Any, path: Path, option: str) -> str:
    if name not in frame.columns:
        there = ", ".join(map(str, frame.columns[:30])) + (", …" if frame.shape[1] > 30 else "")
        raise typer.BadParameter(f"{path} has no column {name!r}; it has {there}.", param_hint=option)
    return name


def _fits(y: Any, path: Path, target: str, task: Task) -> None:
    """Whether the target is of the kind that the task predicts."""
    from sklearn.utils.multiclass import type_of_target

    numbers = y.dtype.kind in "iuf"
    if task is Task.regression:
        if not numbers:
            raise typer.BadParameter(
                f"{target} of {path} holds {y[0]!r}, which is no number; --task classification predicts it.",
                param_hint="--task",
            )
        return
    alone = [value for value, count in Counter(y.tolist()).items() if count < 2]
    if type_of_target(y) == "continuous" or (numbers and alone):
        raise typer.BadParameter(
            f"{target} of {path} looks like a number, not a class: {alone[0] if alone else y[0]} is one of its values; "
            "--task regression predicts it.",
            param_hint="--task",
        )
    if alone:
        raise typer.BadParameter(
            f"{target} of {path} is {alone[0]!r} in one row alone; a class needs two or more.", param_hint="--target"
        )


def _cohorts(paths: list[Path], target: str, X: Any, y: Any, task: Task, any_units: bool) -> dict[str, Any]:
    """The tables to judge on, by the names of their files; asked before the work whether the models can read them."""
    from neuropil.interpret._shapley_table import TableEncoder, as_frame, other_units

    found: dict[str, Any] = {}
    if not paths:
        return found
    X = as_frame(X)
    encoder = TableEncoder().fit(X)
    stems = Counter(path.stem for path in paths)
    for path in paths:
        frame, values = _table(path, target, "--external")
        frame = as_frame(frame)
        for name in encoder.columns_:
            _known(name, frame, path, "--external")
        try:
            codes = encoder.transform(frame)
        except ValueError as error:
            raise typer.BadParameter(f"{path}: {error}.", param_hint="--external") from None
        odd = [] if any_units else other_units(encoder.columns_, encoder.transform(X), codes)
        if odd:
            raise typer.BadParameter(
                f"{path} seems to be in other units: {', '.join(odd)}; convert it, or give --any-units.",
                param_hint="--external",
            )
        unknown = sorted(set(values.tolist()) - set(y.tolist()), key=str)
        if unknown and task is Task.classification:
            raise typer.BadParameter(
                f"{path} has {target} {unknown[0]!r}, which the training table has not.", param_hint="--external"
            )
        found[path.stem if stems[path.stem] == 1 else str(path)] = (frame, values)
    return found


# ------------------------------------------------------------------------------------------------ what is found


def _facts(workflow: ShapleyWorkflow, page: Path) -> dict[str, Any]:
    best, metric = workflow.best_, workflow._metric
    cohort = next(iter(workflow.cohorts_), "training")  # the importances that are listed are of one

    def own(table: Any) -> Any:
        return table[(table["model"] == best) & (table["cohort"] == cohort)].drop(columns=["model", "cohort"])

    columns = own(workflow.importances_).groupby("column", sort=False).mean(numeric_only=True)  # over the classes
    merged = own(workflow.aspect_importances_).groupby("aspect", sort=False).mean(numeric_only=True)
    return {
        "task": workflow.task,
        "classes": workflow.classes_.tolist() if workflow.task == "classification" else None,
        "rows": len(workflow._codes),
        "columns": list(workflow.encoder_.columns_),
        "score": metric,
        "best": best,
        "models": [_model(workflow, name) for name in workflow.fitted_],
        "comparisons": workflow.comparisons_.to_dict("records"),
        "cohorts": workflow.evaluation_.to_dict("records") if workflow.cohorts_ else [],
        "explained_on": cohort,
        "importances": columns.sort_values("shapley", ascending=False).reset_index().to_dict("records"),
        "aspects": merged.sort_values("group", ascending=False).reset_index().to_dict("records"),
        "agreement": own(workflow.agreement_).to_dict("records"),
        "written": str(page),
    }


def _model(workflow: ShapleyWorkflow, name: str) -> dict[str, Any]:
    scores = workflow.scores_[workflow.scores_["model"] == name][workflow._metric]
    columns = [workflow.encoder_.columns_[i] for i in workflow.fitted_[name].columns]
    return {"model": name, "mean": float(scores.mean()), "sd": float(scores.std()), "columns": columns}


def _show(facts: dict[str, Any], top: int) -> None:
    score, best = facts["score"].replace("_", " "), facts["best"]
    cohorts = list(dict.fromkeys(row["cohort"] for row in facts["cohorts"]))
    judged = {(row["cohort"], row["model"]): row[facts["score"]] for row in facts["cohorts"]}
    apart = {name: row["p"] for row in facts["comparisons"] for name in (row["model"], row["other"])
             if best in (row["model"], row["other"])}  # fmt: skip
    heads = [Column("model", style="bold cyan"), Column(score, "right"), Column("p to best", "right")]
    heads += [Column("columns", "right"), *(Column(output.clean(name), "right", give=True) for name in cohorts)]
    rows = []
    for row in sorted(facts["models"], key=lambda row: -row["mean"] if row["mean"] == row["mean"] else 1e9):
        name = row["model"]
        line = [name, f"{output.number(row['mean'], 3)} ± {output.number(row['sd'], 3)}"]
        line += [output.number(apart[name], 3) if name != best and name in apart else "–", str(len(row["columns"]))]
        rows.append([*line, *(output.number(judged[cohort, name], 3) for cohort in cohorts)])
    output.listing(heads, rows)
    output.say()
    output.say(f"What {best} goes by, on {output.clean(facts['explained_on'])}", style="bold")
    kinds = ("shapley", "natural", "permutation")
    _ranked("column", "column", facts["importances"][:top], {f"mean |{k}|" if k == "shapley" else k: k for k in kinds})
    if any(row["columns"] > 1 for row in facts["aspects"]):
        output.say()
        _ranked("aspect", "aspect", facts["aspects"][:top], {"as one": "group", "sum of its columns": "sum"})
    output.say()
    table = f"{output.plural(facts['rows'], 'row')} and {output.plural(len(facts['columns']), 'column')}"
    output.pairs(
        {
            "best": f"{best}, of {table}",
            "ranks of Shapley values": "; ".join(_agreed(row) for row in facts["agreement"]),
            "page": facts["written"],
        }
    )


def _ranked(title: str, key: str, rows: list[dict[str, Any]], kinds: dict[str, str]) -> None:
    heads = [Column(title, style="bold cyan", give=True), *(Column(name, "right") for name in kinds)]
    output.listing(
        heads, [[output.clean(row[key]), *(output.number(row[k], 4) for k in kinds.values())] for row in rows]
    )


def _agreed(row: dict[str, Any]) -> str:
    if row["spearman"] != row["spearman"]:
        return f"{row['against']} – (too few columns, or none of its own)"
    return f"{row['against']} r = {output.number(row['spearman'])} ({row['strength']})"
