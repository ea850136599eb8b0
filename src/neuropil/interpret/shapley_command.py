"""The workflow from CSV files to a page.

python -m neuropil.interpret.shapley_command train.csv --target dx --external aibl.csv --external oasis.csv
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def shapley_workflow(
    train: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Training table, CSV.")],
    target: Annotated[str, typer.Option(help="Column with what is to be predicted.")],
    external: Annotated[list[Path] | None, typer.Option(exists=True, help="A cohort to test on; repeatable.")] = None,
    groups: Annotated[str | None, typer.Option(help="Column that names the subject of a row.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="A column to leave out; repeatable.")] = None,
    task: Annotated[str, typer.Option(help="classification or regression.")] = "classification",
    models: Annotated[str, typer.Option(help="'all', or names separated by commas.")] = "all",
    selector_model: Annotated[str | None, typer.Option(help="One model that selects columns for all.")] = None,
    prescreen: Annotated[int | None, typer.Option(help="Columns that stand for selection.")] = None,
    search: Annotated[int, typer.Option(min=0, help="Random draws of each model's settings.")] = 10,
    cv: Annotated[int, typer.Option(min=2, help="Outer folds.")] = 10,
    h: Annotated[float, typer.Option(help="Columns correlated so much are one aspect.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the report.")] = Path("shapley-report"),
) -> None:
    """Select, train, test on foreign cohorts, explain, merge correlated columns, check; write a page."""
    from neuropil.errors import NeuropilError
    from neuropil.interpret._shapley_report import read_csv
    from neuropil.interpret.shapley import ShapleyWorkflow

    try:
        X, y = read_csv(train, target)
        subjects = X.pop(groups).to_numpy() if groups else None
        X = X.drop(columns=drop or [])
        workflow = ShapleyWorkflow(
            models if models == "all" else models.split(","),
            task=task,
            selector_model=selector_model,
            prescreen=prescreen,
            search=search,
            cv=cv,
            h=h,
            random_state=seed,
        )
        workflow.fit(X, y, subjects)
        if external:
            workflow.evaluate({path.stem: read_csv(path, target) for path in external})
        page = workflow.explain().report(out)
    except (NeuropilError, ValueError, KeyError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(getattr(error, "exit_code", 1)) from None
    typer.echo(f"best: {workflow.best_}; report: {page}")


if __name__ == "__main__":
    typer.run(shapley_workflow)
