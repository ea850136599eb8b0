"""The figure of the reproduction of bandlimited random networks."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from neuropil.report import Report
from neuropil.reproduce.bandlimited_random_networks import (
    ACTIVATIONS,
    BEST,
    BOUND,
    KERNEL,
    RELATIVE,
    RMSE,
    TOLD,
    TUNED,
    ZERO,
    Table,
    network,
    networks,
)

COLOURS = ("#0b6e99", "#3b9b6c", "#d9822b", "#a23b72")


def draw(report: Report) -> Figure:
    """Errors over ranges, best against told range, peers, tables."""
    out = Figure(figsize=(13, 9.5), layout="constrained")
    panels = out.subplots(2, 2)
    table = {(row.name, row.metric): np.array(row.values) for row in report.rows}
    _draw_ranges(panels[0, 0], table)
    _draw_told(panels[0, 1], table)
    _draw_peers(panels[1, 0], report)
    _draw_tables(panels[1, 1], table)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    out.suptitle(f"bandlimited-random-networks: {report.verdict}", fontsize="medium")
    return out


def _draw_ranges(panel: Any, table: Table) -> None:
    ks, (few, many), lams, found = networks(table, "sigmoid")
    for k, colour in zip(ks, COLOURS, strict=False):
        panel.plot(lams, [found[k, many, lam] for lam in lams], "o-", color=colour, label=f"k = {k}")
        panel.plot(lams, [found[k, few, lam] for lam in lams], "o--", color=colour, alpha=0.55, ms=3)
        proven = [
            (lam, np.median(table[key])) for lam in lams if (key := (network("sigmoid", k, many, lam), BOUND)) in table
        ]
        shown = [(lam, bound) for lam, bound in proven if bound > 0]
        told = (
            float(table[f"sigmoid, k={k}", TOLD][0]),
            float(np.median(table[network("sigmoid", k, many, "told"), RMSE])),
        )
        panel.plot(*told, "D", ms=9, mfc="none", color=colour)
        if shown:
            panel.plot(*zip(*shown, strict=True), color=colour, lw=7, alpha=0.25, solid_capstyle="butt")
    panel.axhline(float(np.median(table[f"k={ks[-1]}", ZERO])), color="#8a8f98", lw=1, label="the target's RMS")
    panel.plot([], [], "k-", label=f"{many} neurons")
    panel.plot([], [], "k--", alpha=0.55, label=f"{few} neurons")
    panel.plot([], [], "kD", ms=9, mfc="none", label=f"{many}, range told from the spectrum")
    panel.plot([], [], "k", lw=7, alpha=0.25, label=f"proven for the sum of |weights| of {many}")
    panel.set(xscale="log", yscale="log", xlabel="range of weights and biases", ylabel="test RMSE (median over seeds)")
    panel.set_title("sin(2πkx), sigmoid neurons")
    panel.legend(frameon=False, fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _draw_told(panel: Any, table: Table) -> None:
    for act, colour, shift in zip(ACTIVATIONS, COLOURS, (0.97, 1.03), strict=False):
        ks = networks(table, act)[0]
        x = [shift * float(table[f"{act}, k={k}", TOLD][0]) for k in ks]
        values = [table[f"{act}, k={k}", BEST] for k in ks]
        panel.plot(x, [np.median(v) for v in values], "o-", color=colour, label=f"{act} neurons")
        for at, v in zip(x, values, strict=True):
            panel.plot([at] * len(v), v, ".", color=colour, alpha=0.4)
    ends = np.array(panel.get_xlim()).clip(5)
    panel.plot(ends, ends, ":", color="#8a8f98", label="equal")
    panel.set(xscale="log", yscale="log", xlabel="range told from the ridgelet spectrum (10 % outside)")
    panel.set(
        ylabel="best range (dots: seeds)",
        title=f"Best range of {networks(table, 'sigmoid')[1][0]} neurons, k grows to the right",
    )
    panel.legend(frameon=False, fontsize="small")


def _draw_peers(panel: Any, report: Report) -> None:
    rows = [row for row in report.rows if row.metric == TUNED]
    names = list(dict.fromkeys(row.name.rpartition(", ")[0] for row in rows))
    ks = list(dict.fromkeys(row.name.rpartition("k=")[2] for row in rows))
    for shift, (k, colour) in enumerate(zip(ks, COLOURS, strict=False)):
        for height, name in enumerate(reversed(names)):
            values = report.row(f"{name}, k={k}", TUNED).values
            at = height + 0.18 * ((len(ks) - 1) / 2 - shift)
            panel.plot(values, [at] * len(values), ".", color=colour, alpha=0.4)
            panel.plot(np.median(values), at, "o", color=colour, label=f"k = {k}" if not height else None)
    panel.set_yticks(range(len(names)), list(reversed(names)), fontsize="small")
    panel.set(
        xscale="log",
        xlabel="test RMSE, each tuned on held-out points (dots: seeds)",
        title="Networks of fewer neurons, and peers",
    )
    panel.grid(axis="x", alpha=0.3)
    panel.legend(frameon=False, fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _draw_tables(panel: Any, table: Table) -> None:
    means = {name: values for (name, metric), values in table.items() if metric == RELATIVE}
    names = list(dict.fromkeys(name.split(", ")[0] for name in means))
    for name, colour in zip(names, COLOURS, strict=False):
        curve = {float(key.split()[-1]): v for key, v in means.items() if key.startswith(f"{name}, range ")}
        panel.plot(list(curve), [np.median(v) for v in curve.values()], "o-", ms=4, color=colour, label=name)
        for lam, values in curve.items():
            panel.plot([lam] * len(values), values, ".", ms=3, color=colour, alpha=0.4)
        panel.axhline(np.median(means[f"{name}, {KERNEL}"]), color=colour, ls=":", lw=1)
    panel.plot([], [], "k:", lw=1, label="kernel ridge, tuned")
    panel.axhline(1, color="#8a8f98", lw=1)
    panel.text(0.011, 1.005, "the mean", color="#8a8f98", fontsize="small", va="bottom")
    panel.set(
        xscale="log",
        xlabel="range of weights and biases (inputs standardised)",
        ylabel="test RMSE over the mean's (dots: seeds)",
    )
    panel.set(title="Real tables, 200 sigmoid neurons, ridge tuned", ylim=(0, 1.15))
    panel.legend(frameon=False, fontsize="small")
