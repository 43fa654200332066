"""Drawings of rates: one mark per rate and view, with 95 % Wilson intervals over rollouts.

Marks differ in shape, filling and line style, not in colour: filled is on, open is ablated; circles are hacks, squares
are solves. Intervals say nothing about other seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gradroute._plot import new_axes
from gradroute.evaluation.rates import Rate, ViewRates

Axes = Any
"""matplotlib's, which is imported on use."""

STYLES = {
    ("hack", "on"): {"marker": "o", "markerfacecolor": "0", "linestyle": "-"},
    ("hack", "ablated"): {"marker": "o", "markerfacecolor": "1", "linestyle": "--"},
    ("solve", "on"): {"marker": "s", "markerfacecolor": "0.55", "linestyle": "-."},
    ("solve", "ablated"): {"marker": "s", "markerfacecolor": "1", "linestyle": ":"},
}
"""By (rate, view)."""


def draw_views(on: ViewRates, ablated: ViewRates, ax: Axes = None) -> tuple[Any, Axes]:
    """Rates of every group with prompts, one row per group; groups of modes first, then each mode."""
    groups, views = on.groups(), {"on": on, "ablated": ablated}
    fig, ax = new_axes(ax, (7.0, 1.1 + 0.62 * len(groups)))
    for i, (rate, view) in enumerate(STYLES):
        rates = [getattr(views[view], rate)[group] for group in groups]
        places = [row - 0.27 + 0.18 * i for row in range(len(groups))]
        style = {**STYLES[rate, view], "linestyle": "none"}
        ax.errorbar(
            [each.value for each in rates], places, xerr=_bars(rates), label=f"{rate}, {view}",
            color="0.25", ms=5.5, capsize=2.5, lw=1, **style,
        )  # fmt: skip
    for row in range(1, len(groups)):
        ax.axhline(row - 0.5, color="0.9", lw=0.8)
    ax.set_yticks(range(len(groups)), [f"{group}\nn = {on.hack[group].n}" for group in groups], fontsize=8)
    ax.set(xlim=(-0.02, 1.02), ylim=(len(groups) - 0.5, -0.5), xlabel="rate, 95 % interval over rollouts")
    ax.tick_params(axis="y", length=0)
    ax.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, columnspacing=1.2)
    return fig, ax


def draw_curves(
    ax: Axes,
    x: Sequence[float],
    curves: Mapping[tuple[str, str], Sequence[Rate]],
    *,
    labels: Sequence[str] | None = None,
) -> None:
    """A line with intervals for each (rate, view); lines are shifted a little so that bars do not cover each other."""
    labels = [f"{rate}, {view}" for rate, view in curves] if labels is None else labels
    width = (max(x) - min(x)) or 1.0
    for i, ((rate, view), rates) in enumerate(curves.items()):
        places = [at + width * 0.006 * (i - 1.5) for at in x]
        ax.errorbar(
            places, [each.value for each in rates], yerr=_bars(rates), label=labels[i],
            color="0.25", ms=5, capsize=2, lw=1.2, elinewidth=0.7, **STYLES[rate, view],
        )  # fmt: skip
    ax.set(ylim=(-0.08, 1.03), ylabel="rate, 95 % interval over rollouts")


def _bars(rates: Sequence[Rate]) -> list[list[float]]:
    """Lengths of the error bars below and above."""
    ends = [(rate.value, *rate.interval) for rate in rates]
    # Rounding can put an end of the interval of 0 or 1 a hair inside of it.
    return [[max(0.0, p - low) for p, low, _ in ends], [max(0.0, high - p) for p, _, high in ends]]
