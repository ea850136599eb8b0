"""The workflow's page: tables as CSV, figures as PNG, one HTML file that shows both. Equal results, equal files."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import dendrogram
from scipy.stats import rankdata

from neuropil.interpret._shapley_explain import Explanation

if TYPE_CHECKING:
    from neuropil.interpret.shapley import ShapleyWorkflow

LOW, HIGH, INK, GREY = "#0b6e99", "#c8553d", "#333333", "#8a8f98"
COLOURS = LinearSegmentedColormap.from_list("low to high", [LOW, "#b9a7b0", HIGH])
TABLES = {
    "scores": "Nested cross-validation: every outer fold",
    "comparisons": "Differences between models there (corrected resampled t-test)",
    "selection": "Forward selection: the path on all training rows",
    "selected": "Share of outer folds in which a column was selected",
    "evaluation": "External cohorts",
    "tests": "Differences between models on a cohort (McNemar, DeLong)",
    "importances": "Importances of columns",
    "aspect_importances": "Importances of aspects: as one player, and as the sum of its members",
    "agreement": "Agreement of Shapley values with other importances",
    "ranks": "Agreement of Shapley importances between models and cohorts",
    "merges": "Importance of every merge of columns, best model (the triplot)",
}
SHOWN = 15
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:.5em 0 2em}td,th{padding:.15em .7em;text-align:left;"
    "border-bottom:1px solid #ddd}td{font-variant-numeric:tabular-nums}img{max-width:100%}"
    "details{margin:1em 0}summary{cursor:pointer}"
)


def write(workflow: ShapleyWorkflow, folder: Path, expected: dict[str, int]) -> Path:
    """Everything the workflow has found, into `folder`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    body = [f"<h1>Shapley workflow: {html.escape(_subject(workflow))}</h1>", _summary(workflow)]
    for name, title in TABLES.items():
        table = getattr(workflow, f"{name}_", None)
        if table is not None and len(table):
            table.to_csv(folder / f"{name}.csv", index=name == "selected")
            body.append(_section(title, table, name == "selected"))
    if expected and hasattr(workflow, "importances_"):
        table = plausibility(workflow, expected)
        table.to_csv(folder / "plausibility.csv", index=False)
        body.append(_section("Plausibility: expected directions", table, False))
    for name, figure in figures(workflow):
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        body.append(f'<figure><img src="{html.escape(name)}.png" alt="{html.escape(name)}"></figure>')
    page = folder / "index.html"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Shapley workflow</title><style>{STYLE}</style>'
    page.write_text(f"{head}<body>{''.join(body)}</body></html>\n", encoding="utf-8")
    return page


def plausibility(workflow: ShapleyWorkflow, expected: dict[str, int]) -> Any:
    """Direction of each column with an expected sign, beside it. Raises ValueError for columns there are not."""
    unknown = sorted(set(expected) - set(workflow.encoder_.columns_))
    if unknown:
        raise ValueError(f"expected directions of unknown columns {unknown}; there are {workflow.encoder_.columns_}")
    table = workflow.importances_[["model", "cohort", "output", "column", "shapley", "direction"]].copy()
    table = table[table["column"].isin(list(expected))]
    table["expected"] = [expected[column] for column in table["column"]]
    table["plausible"] = np.where(
        table["direction"].isna(), "unknown", np.where(np.sign(table["direction"]) == table["expected"], "yes", "no")
    )
    return table


def figures(workflow: ShapleyWorkflow) -> list[tuple[str, Figure]]:
    """Beeswarm, dependence and waterfall of each explanation, agreement, and the triplot."""
    out: list[tuple[str, Figure]] = []
    for (model, cohort), found in getattr(workflow, "explanations_", {}).items():
        for k, output in enumerate(found.outputs):
            words = [model, cohort] if len(found.outputs) == 1 else [model, cohort, output]
            name = "-".join(re.sub(r"\W+", "_", word) for word in words)
            title = f"{model} on {cohort}: {output}"
            out.append((f"summary-{name}", summary(found, k, title)))
            out.append((f"dependence-{name}", dependence(found, k, title)))
            out.append((f"waterfall-{name}", waterfall(found, k, title)))
    if hasattr(workflow, "importances_"):
        out.append(("agreement", agreement(workflow)))
    if len(getattr(workflow, "merges_", ())):
        out.append(("triplot", triplot(workflow)))
    return out


def _subject(workflow: ShapleyWorkflow) -> str:
    if workflow.task == "regression":
        return "a number"
    return " / ".join(map(str, workflow.classes_))


def _summary(workflow: ShapleyWorkflow) -> str:
    estimand = {
        "interventional": "interventional: columns outside a coalition come from background rows, whatever the rest",
        "gaussian": "conditional: columns outside a coalition are drawn from the normal distribution given the rest",
    }
    lines = [
        f"Best model by nested cross-validation: {workflow.best_} ({workflow._metric}).",
        f"{len(workflow._codes)} training rows, {len(workflow.encoder_.columns_)} columns.",
        f"Shapley values are {estimand[workflow.estimand]}.",
    ]
    for (model, cohort), found in getattr(workflow, "explanations_", {}).items():
        lines.append(
            f"{model} on {cohort}: scale {found.scale}, by {found.shapley.method}; base and values add up to the "
            f"output within {found.shapley.gap:.1g}."
        )
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _section(title: str, table: Any, index: bool) -> str:
    rows = table.to_html(index=index, float_format=lambda x: f"{x:.4g}", border=0, na_rep="")
    folded = len(table) > SHOWN
    inner = f"<details><summary>{len(table)} rows</summary>{rows}</details>" if folded else rows
    return f"<h2>{html.escape(title)}</h2>{inner}"


def _values(found: Explanation, k: int) -> tuple[np.ndarray, float]:
    shap = found.shapley
    return (shap.values, float(shap.base)) if shap.values.ndim == 2 else (shap.values[..., k], float(shap.base[k]))


def _leading(values: np.ndarray) -> np.ndarray:
    return np.argsort(-np.abs(values).mean(0), kind="stable")[:SHOWN]


def summary(found: Explanation, k: int, title: str) -> Figure:
    """A row of dots for each column: one a subject, its Shapley value across, the column's own value as colour."""
    values, _ = _values(found, k)
    order = _leading(values)
    figure = Figure(figsize=(8, 1.4 + 0.4 * len(order)), layout="constrained")
    panel = figure.subplots()
    for height, j in enumerate(order[::-1]):
        x = values[:, j]
        shade = (rankdata(found.rows[:, j], nan_policy="omit") - 0.5) / max(1, np.isfinite(found.rows[:, j]).sum())
        panel.scatter(x, height + _spread(x), c=np.nan_to_num(shade, nan=0.5), cmap=COLOURS, vmin=0, vmax=1, s=10)
    panel.axvline(0, color=GREY, linewidth=0.8)
    panel.set_yticks(range(len(order)), [found.columns[j] for j in order[::-1]])
    panel.set(xlabel=f"Shapley value ({found.scale})", title=title)
    bar = figure.colorbar(panel.collections[0], ax=panel, ticks=[0, 1], aspect=30)
    bar.ax.set_yticklabels(["low", "high"])
    return figure


def _spread(x: np.ndarray) -> np.ndarray:
    """Heights that keep dots of near values apart."""
    bins = np.digitize(x, np.linspace(x.min(), x.max() + 1e-12, 60))
    height = np.zeros(len(x))
    for b in np.unique(bins):
        at = np.flatnonzero(bins == b)
        offsets = np.arange(len(at)) - (len(at) - 1) / 2
        height[at] = offsets * min(0.08, 0.7 / max(1, len(at)))
    return height


def dependence(found: Explanation, k: int, title: str) -> Figure:
    """Shapley value against the column's value, for the four leading columns."""
    values, _ = _values(found, k)
    order = _leading(values)[:4]
    figure = Figure(figsize=(3.2 * len(order), 3.2), layout="constrained")
    for panel, j in zip(figure.subplots(1, len(order), squeeze=False)[0], order, strict=True):
        panel.plot(found.rows[:, j], values[:, j], ".", color=LOW, alpha=0.7)
        panel.axhline(0, color=GREY, linewidth=0.8)
        panel.set(xlabel=found.columns[j], ylabel=f"Shapley value ({found.scale})" if j == order[0] else "")
    figure.suptitle(title)
    return figure


def waterfall(found: Explanation, k: int, title: str) -> Figure:
    """From the base to the output of the subject whose output lies farthest from the base."""
    values, base = _values(found, k)
    subject = int(np.abs(values.sum(1)).argmax())
    own = values[subject]
    order = np.argsort(-np.abs(own), kind="stable")[:SHOWN]
    steps = [*own[order]]
    names = [f"{found.columns[j]} = {found.rows[subject, j]:.4g}" for j in order]
    if len(own) > len(order):
        steps.append(own.sum() - own[order].sum())
        names.append(f"{len(own) - len(order)} others")
    starts = base + np.concatenate([[0], np.cumsum(steps)[:-1]])
    figure = Figure(figsize=(8, 1.4 + 0.36 * len(steps)), layout="constrained")
    panel = figure.subplots()
    places = np.arange(len(steps))[::-1]
    panel.barh(places, steps, left=starts, color=[HIGH if step > 0 else LOW for step in steps])
    panel.axvline(base, color=GREY, linewidth=0.8)
    panel.set_yticks(places, names)
    reached = base + own.sum()
    panel.set(xlabel=f"{found.scale}: from {base:.3g} (mean of background) to {reached:.3g}")
    panel.set_title(f"{title}, row {subject} of those explained")
    return figure


def agreement(workflow: ShapleyWorkflow) -> Figure:
    """Mean |Shapley| against natural and permutation importance, each as a share of the model's largest."""
    table = workflow.importances_
    kinds = ("natural", "permutation")
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for panel, kind in zip(figure.subplots(1, 2), kinds, strict=True):
        for name, rows in table.groupby("model", sort=False):
            known = rows[rows[kind].notna()]
            if not len(known):
                continue
            top = known.groupby(["cohort", "output"])[["shapley", kind]].transform("max")
            x = known["shapley"] / top["shapley"].where(top["shapley"] > 0)
            panel.plot(x, known[kind] / top[kind].where(top[kind] > 0), "o", alpha=0.6, label=str(name), markersize=5)
        panel.set(xlabel="mean |Shapley| (largest = 1)", ylabel=f"{kind} importance (largest = 1)")
        panel.legend(fontsize="small")
    return figure


def triplot(workflow: ShapleyWorkflow) -> Figure:
    """Importance of single columns, the dendrogram of their correlations, importance of each merge (best model)."""
    best = workflow.fitted_[workflow.best_]
    columns = [workflow.encoder_.columns_[i] for i in best.columns]
    cohort = workflow.merges_["cohort"].iloc[0]
    single = workflow.importances_
    single = single[(single["model"] == workflow.best_) & (single["cohort"] == cohort)].groupby("column")
    merges = workflow.merges_[workflow.merges_["cohort"] == cohort]
    figure = Figure(figsize=(14, 1.6 + 0.35 * max(len(columns), len(merges))), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    tree = dendrogram(workflow.aspects_.tree(best.columns), orientation="left", labels=columns, ax=middle)
    middle.tick_params(axis="y", left=False, labelright=False)
    middle.axvline(1 - workflow.h, color=HIGH, linewidth=1, linestyle="--")
    middle.set(xlabel="1 - |Spearman r| (complete linkage)", title="Correlation")
    order = tree["ivl"]
    left.barh(range(len(order)), [float(single.get_group(name)["permutation"].mean()) for name in order], color=LOW)
    left.set_yticks(range(len(order)), order)
    left.set_ylim(-0.5, len(order) - 0.5)
    left.set(xlabel=f"drop of {workflow._metric}", title=f"{workflow.best_} on {cohort}: single columns")
    _bars(right, merges, workflow._metric)
    return figure


def _bars(panel: Axes, merges: Any, metric: str) -> None:
    names = [name if len(name) < 48 else f"{name[:45]}..." for name in merges["columns"]]
    places = np.arange(len(names))[::-1]
    panel.barh(places, merges["importance"], color=HIGH)
    panel.set_yticks(places, [f"|r| {r:.2f}  {n}" for r, n in zip(merges["correlation"], names, strict=True)])
    panel.tick_params(labelsize="small")
    panel.set(xlabel=f"drop of {metric}", title="Merged columns, shuffled together")
