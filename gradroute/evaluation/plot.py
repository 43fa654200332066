"""Rates over training, on and ablated, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from gradroute._plot import legend_aside, new_axes
from gradroute.errors import GradRouteError
from gradroute.evaluation._marks import STYLES, Axes, draw_curves
from gradroute.evaluation.on_off import OnOffReport


def plot_training(
    reports: Mapping[int, OnOffReport], *, group: str = "held-out", refreshed_at: Sequence[int] = (), ax: Axes = None
) -> tuple[Any, Axes]:
    """Draw hack and solve rates of one group over training, on and ablated; returns (figure, axes).

    Args:
        reports: optimizer step -> `evaluate_on_off` at that step.
        group: a mode, or "monitored", "held-out", "no loophole".
        refreshed_at: steps of refreshes, marked at the bottom: `[r.step for r in refresher.reports]`.
        ax: matplotlib axes to draw on; None makes a figure.

    Raises:
        GradRouteError: no reports, or a group without prompts.
    """
    if not isinstance(reports, Mapping) or not reports:
        raise GradRouteError(f"`reports` should map steps, one or more, to an OnOffReport. Found {reports!r}.")
    for step, report in reports.items():
        if not isinstance(report, OnOffReport):
            raise GradRouteError(f"`reports` should hold OnOffReports. Found {type(report).__name__} at step {step!r}.")
        report.on.check_group(group, f" at step {step}")
    steps = sorted(reports)
    fig, ax = new_axes(ax, (7.0, 3.6))
    draw_curves(ax, steps, {
        (rate, view): [getattr(getattr(reports[step], view), rate)[group] for step in steps] for rate, view in STYLES
    })  # fmt: skip
    if refreshed_at:
        ax.plot(list(refreshed_at), [-0.05] * len(refreshed_at), "|", color="0.3", ms=7, label="refresh", clip_on=False)
    sizes = sorted({report.on.hack[group].n for report in reports.values()})
    n = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    ax.set(xlabel="optimizer step", title=f"{group}, n = {n}")
    legend_aside(ax)
    return fig, ax
