"""`neuropil law`: the loss that a learning-rate schedule will end at, from one or two training curves."""

from __future__ import annotations

import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuropil.cli import output
from neuropil.cli.app import AsJson, command
from neuropil.cli.output import Column

if TYPE_CHECKING:
    from neuropil.measure.annealing_law import AnnealingLaw, Curve


class Action(StrEnum):
    """Look at the fitted law, or predict with it."""

    fit = "fit"
    predict = "predict"


@command(
    "law",
    "Training",
    "neuropil law fit cosine.csv constant.csv                       the fitted law, and how well it fits",
    "neuropil law predict cosine.csv --schedule wsd:decay=0.1       the loss that it will end at",
    "neuropil law predict cosine.csv --schedule cosine --schedule wsd --schedule linear:total_steps=60000",
    "neuropil law predict cosine.csv --schedule plan.csv --points 20 --json",
)
def law(
    action: Annotated[
        Action, typer.Argument(metavar="ACTION", help="fit: show the law. predict: compare schedules by it.")
    ],
    curves: Annotated[
        list[Path],
        typer.Argument(
            metavar="CURVES...",
            exists=True,
            dir_okay=False,
            help="CSV files of training runs, with columns step, lr and loss. Two that anneal differently are best.",
        ),
    ],
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            help="A schedule to predict: a CSV file with step and lr, or constant, linear, cosine, wsd, multistep, "
            "cyclic, rewarmup with options, as wsd:decay=0.1,shape=1-sqrt. total_steps, max_lr and warmup_steps are "
            "those of the first curve unless given.",
            show_default=False,
        ),
    ] = None,
    trained_with: Annotated[
        list[str] | None,
        typer.Option(
            help="The schedule of a curve whose file has no column lr, with all its options; once for each such file.",
            show_default=False,
        ),
    ] = None,
    lambda_: Annotated[
        str,
        typer.Option(
            "--lambda", help="How long a drop of the rate pays off, 1 / (1 - lambda) steps; of several, the best fit."
        ),
    ] = "0.999",
    points: Annotated[int, typer.Option(min=1, help="Steps of each curve that are predicted, up to the last.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Fit the annealing law to training curves, and predict the loss under other learning-rate schedules.

    Schedules are listed best first. The spread is the standard deviation of a measured loss, if the law is right.
    """
    if (action is Action.predict) != bool(schedule):
        said = "predict needs a --schedule" if action is Action.predict else "fit takes no --schedule; predict does"
        raise typer.BadParameter(said + ".", param_hint="--schedule")
    from neuropil.measure.annealing_law import choose_lambda

    read = _curves(curves, trained_with or [])
    lambdas = _lambdas(lambda_)
    asked = [(text, _schedule(text, read[0], "--schedule")) for text in schedule or []]
    with warnings.catch_warnings(record=True) as said_of_fit:
        warnings.simplefilter("always")
        try:
            fitted = choose_lambda(read, lambdas)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="CURVES") from None
    _warned(said_of_fit)
    if action is Action.fit:
        return _fit(fitted, read, as_json)
    _predict(fitted, asked, points, as_json)


def _lambdas(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= value <= 1 for value in found):
        raise typer.BadParameter(f"{text!r}; expected numbers from 0 to 1, separated by commas.", param_hint="--lambda")
    return found


def _curves(paths: list[Path], trained_with: list[str]) -> list[Curve]:
    """The curves, those without rates under the schedules of `trained_with`, in their order."""
    from neuropil.measure.loss_curves import has_rates, read_curve

    bare = [path for path in paths if not has_rates(path)]
    if len(bare) != len(trained_with):
        names = ", ".join(str(path) for path in bare) or "no file"
        raise typer.BadParameter(
            f"{names} without a column lr, and {output.plural(len(trained_with), 'schedule')}; give one for each.",
            param_hint="--trained-with",
        )
    given = iter([_schedule(text, None, "--trained-with") for text in trained_with])
    return [read_curve(path, next(given) if path in bare else None) for path in paths]


def _schedule(text: str, like: Curve | None, option: str) -> Any:
    """The rates that a text names: a file, or a shape whose missing options are those of the curve `like`."""
    from neuropil.measure.loss_curves import read_rates
    from neuropil.measure.lr_schedules import parse

    path = Path(text)
    if path.is_file():
        return read_rates(path)
    given: dict[str, Any] = {}
    if like is not None:
        given = {
            "total_steps": len(like.schedule) - 1,
            "max_lr": like.max_lr,
            "warmup_steps": like.warmup_steps,
        }
    try:
        return parse(text, **given)
    except ValueError as error:
        said = f"there is no file {text}" if path.suffix.lower() == ".csv" else str(error)
        raise typer.BadParameter(f"{said}.", param_hint=option) from None


def _warned(said: list[warnings.WarningMessage], about: str = "") -> None:
    """Warnings as notes on stderr, each once."""
    for message in dict.fromkeys(str(one.message) for one in said):
        output.note(f"{about}{message}", style="yellow")


def _fit(fitted: AnnealingLaw, read: list[Curve], as_json: bool) -> None:
    X, y = fitted.points(read)
    errors = abs(fitted.predict(X) / y - 1)
    facts: dict[str, Any] = {
        "lambda": fitted.lambda_,
        "points": len(y),
        "coefficients": fitted.coefficients_,
        "standard_deviations": fitted.coefficients_std_,
        "r2": float(fitted.score(X, y)),
        "mean_relative_error": float(errors.mean()),
        "max_relative_error": float(errors.max()),
    }
    if as_json:
        return output.as_json(facts)
    output.say(str(fitted), style="bold")
    output.say()
    output.listing(
        [Column("number"), Column("fitted", "right"), Column("spread", "right")],
        [
            [name, output.number(found, 4), output.number(fitted.coefficients_std_[name], 4)]
            for name, found in fitted.coefficients_.items()
        ],
    )
    output.say()
    output.say(
        f"{output.plural(len(y), 'point')}, lambda {fitted.lambda_:g}: R² {facts['r2']:.4f}, error "
        f"{100 * facts['mean_relative_error']:.2f}% on average, {100 * facts['max_relative_error']:.2f}% at most"
    )


def _predict(fitted: AnnealingLaw, asked: list[tuple[str, Any]], points: int, as_json: bool) -> None:
    rows = sorted((_row(fitted, text, rates, points) for text, rates in asked), key=lambda row: row["final_loss"])
    if as_json:
        return output.as_json(rows)
    columns = [Column("schedule", style="bold cyan", give=True), Column("step", "right"), Column("lr", "right")]
    output.listing(
        [*columns, Column("loss", "right"), Column("spread", "right"), Column("beyond the fit")],
        [
            [
                output.clean(row["schedule"]),
                f"{point['step']:,}",
                f"{point['lr']:.4g}",
                output.number(point["loss"], 4),
                output.number(point["std"], 4),
                "yes" if row["extrapolates"] else "no",
            ]
            for row in rows
            for point in row["curve"]
        ],
    )


def _row(fitted: AnnealingLaw, text: str, rates: Any, points: int) -> dict[str, Any]:
    """What the law says of one schedule."""
    import numpy as np

    from neuropil.errors import Extrapolation

    last = len(rates) - 1
    steps = np.unique(np.linspace(0, last, points + 1).round().astype(int)[1:])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            losses, spread = fitted.predict_curve(rates, steps, return_std=True)
        except ValueError as error:
            raise typer.BadParameter(f"{text}: {error}.", param_hint="--schedule") from None
    _warned(said, f"{text}: ")
    named = zip(steps.tolist(), rates[steps].tolist(), losses.tolist(), spread.tolist(), strict=True)
    curve = [dict(zip(("step", "lr", "loss", "std"), point, strict=True)) for point in named]
    return {
        "schedule": text,
        "total_steps": last,
        "final_loss": float(losses[-1]),
        "std": float(spread[-1]),
        "extrapolates": any(issubclass(one.category, Extrapolation) for one in said),
        "curve": curve,
    }
