"""Figures that reproductions share. They are drawn without pyplot, so nothing global is touched."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neuropil.report import Report, Row

OURS, BASELINE = "#0b6e99", "#8a8f98"


def dots(report: Report) -> Figure:
    """One panel a metric: a dot for each variant at its mean, a bar of one standard deviation over seeds."""
    metrics = report.metrics
    longest = max(len([row for row in report.rows if row.metric == metric]) for metric in metrics)
    figure = Figure(figsize=(7.0, len(metrics) * (0.9 + 0.32 * longest)), layout="constrained")
    panels = figure.subplots(len(metrics), 1, squeeze=False)[:, 0]
    for panel, metric in zip(panels, metrics, strict=True):
        _panel(panel, [row for row in report.rows if row.metric == metric])
    figure.suptitle(f"{report.slug}: {report.verdict}", fontsize="medium")
    return figure


def _panel(panel: Axes, rows: list[Row]) -> None:
    for height, row in enumerate(reversed(rows)):
        colour = BASELINE if row.baseline else OURS
        panel.errorbar(row.mean, height, xerr=row.spread or 0.0, fmt="o", color=colour, capsize=3)
        panel.plot(row.values, [height] * len(row.values), ".", color=colour, alpha=0.35)
    panel.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    panel.set_ylim(-0.6, len(rows) - 0.4)
    unit = f" ({rows[0].unit})" if rows[0].unit else ""
    panel.set_xlabel(rows[0].metric + unit)
    panel.grid(axis="x", alpha=0.3)
