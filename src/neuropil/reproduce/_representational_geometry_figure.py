"""The figure of the reproduction of representational geometry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neuropil.report import Report
from neuropil.reproduce.figures import BASELINE, OURS
from neuropil.reproduce.representational_geometry import (
    ALL,
    BOTH,
    EPS,
    INPUT,
    MAIN,
    ONE_SIDED,
    SHARE,
    SYMMETRIC,
    TARGET,
    THEORY,
    Table,
    sampled,
)

COLOURS = {"tanh": OURS, "relu": "#d1495b"}


def draw(report: Report) -> Figure:
    """Alignment over separability; over the alignment of inputs; by nonlinearity; theory of the first gradient."""
    table = Table(report.rows)
    drawing = Figure(figsize=(11.5, 8.0), layout="constrained")
    (a, b), (c, d) = drawing.subplots(2, 2)
    _over_eps(a, table)
    _over_tasks(b, table)
    _by_nonlinearity(c, table)
    _theory(d, table)
    drawing.suptitle(f"Representational geometry: {report.verdict}", fontsize="medium")
    return drawing


def _line(axes: Axes, x: Sequence[float], values: list[np.ndarray], label: str, **style: Any) -> None:
    means = [float(np.nanmean(v)) for v in values]
    spread = [float(np.nanstd(v, ddof=1)) if len(v) > 1 else 0.0 for v in values]
    axes.errorbar(x, means, yerr=spread, label=label, capsize=3, marker="o", ms=4, **style)


def _over_eps(axes: Axes, table: Table) -> None:
    names = [f"eps {eps:g}, noise 0.1" for eps in EPS]
    for f in BOTH:
        for metric, style in ((TARGET, "-"), (INPUT, ":")):
            label = f"{f}, {metric.split()[0]}"
            _line(axes, EPS, [table.of(n, f, metric) for n in names], label, color=COLOURS[f], ls=style)
    axes.set(xlabel="separability of the label, eps (0: XOR, 1: unstructured)", ylabel="alignment", ylim=(-0.05, 1.08))
    axes.set_title("hidden layer at equal loss", fontsize="medium")
    axes.legend(frameon=False, fontsize="small", loc="lower right")


def _over_tasks(axes: Axes, table: Table) -> None:
    for k, style in zip(table.labels(), ("-", "--"), strict=True):
        n = 8 if max(table.labels()) == 3 else 2 ** max(table.labels())
        x = np.linspace(0, math.sqrt(k / (n - 1)), 6)
        for f in BOTH:
            values = [table.of(sampled(k, j), f, TARGET) for j in range(6)]
            label = f"{f}, {k} label{'s' if k > 1 else ''}"
            _line(axes, x.tolist(), values, label, color=COLOURS[f], ls=style)
    end = axes.get_xlim()[1]
    axes.plot([0, end], [0, end], color=BASELINE, lw=1, label="as in the inputs")
    axes.set(xlabel="alignment of inputs with labels", ylabel="target alignment", ylim=(-0.05, 1.08))
    axes.set_title("tasks of chosen alignment", fontsize="medium")
    axes.legend(frameon=False, fontsize="small", loc="lower right")


def _colour(f: str) -> str:
    if f in SYMMETRIC:
        return OURS
    return COLOURS["relu"] if f in ONE_SIDED else BASELINE


def _by_nonlinearity(axes: Axes, table: Table) -> None:
    order = sorted(ALL, key=lambda f: float(np.nanmean(table.of(MAIN, f, TARGET))))
    for height, f in enumerate(order):
        values = table.of(MAIN, f, TARGET)
        spread = float(np.nanstd(values, ddof=1)) if len(values) > 1 else 0.0
        axes.errorbar(float(np.nanmean(values)), height, xerr=spread, fmt="o", color=_colour(f), capsize=3)
    axes.set_yticks(range(len(order)), order, fontsize="small")
    before = float(np.mean([table.of(f"{MAIN}, untrained", f, TARGET).mean() for f in BOTH]))
    axes.axvline(before, color=BASELINE, ls=":", lw=1.2)
    axes.text(before, len(order) - 0.4, " untrained", color=BASELINE, fontsize="small", va="top")
    axes.set(xlabel=f"target alignment ({MAIN})", ylim=(-0.6, len(order) - 0.3))
    axes.set_title("blue: flat on both sides; red: on one", fontsize="medium")


# Where the names of a few stand beside their dots, in points.
PLACES = {
    "tanh": (-8, 4),
    "softplus 1": (-8, -10),
    "leaky relu 0.1": (8, -4),
    "relu": (8, -4),
    "relu shift -0.3": (8, -4),
}


def _theory(axes: Axes, table: Table) -> None:
    for f in ALL:
        x, y = (float(table.of(MAIN, f, metric).mean()) for metric in (THEORY, SHARE))
        axes.plot(x, y, "o", color=_colour(f))
        if f in PLACES:
            side = "right" if PLACES[f][0] < 0 else "left"
            axes.annotate(f, (x, y), xytext=PLACES[f], textcoords="offset points", fontsize="small", ha=side)
    ends = [min(axes.get_xlim()[0], axes.get_ylim()[0]), 1.02]
    axes.plot(ends, ends, color=BASELINE, lw=1, zorder=0)
    axes.set(xlabel="closed form", ylabel="measured by backpropagation")
    axes.set_title("share of the first gradient along the label", fontsize="medium")
