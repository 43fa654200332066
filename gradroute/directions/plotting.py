"""The picture of `Directions.plot`: AUROC of every module, the pooled one, and what no direction would have."""

from importlib import import_module
from typing import Any

from gradroute.directions.diagnostics import DirectionsSummary


def plot_summary(summary: DirectionsSummary, ax: Any = None) -> tuple[Any, Any]:
    """(figure, axes) with a marker per module; told apart by shape and line style, not by colour."""
    pyplot = import_module("matplotlib.pyplot")

    fig, ax = pyplot.subplots(figsize=(8, 3.5), layout="constrained") if ax is None else (ax.figure, ax)
    names, places = list(summary.modules), range(len(summary.modules))
    low, high = summary.interval
    ax.axhspan(low, high, color="0.88", label=f"pooled, 95 % interval [{low:.2f}, {high:.2f}]")
    ax.axhline(summary.auroc, color="0.3", label=f"pooled AUROC {summary.auroc:.2f}")
    ax.axhline(0.5, color="0", linestyle=":", label="chance")
    beyond = [m.share > m.random for m in summary.modules.values()]
    for marker, kind, label in (("o", True, "share above 95 % of random rows"), ("x", False, "share not above")):
        chosen = [i for i in places if beyond[i] is kind]
        if chosen:
            values = [summary.modules[names[i]].auroc for i in chosen]
            ax.plot(chosen, values, marker, color="0", label=label)
    step = max(1, len(names) // 24)
    ax.set_xticks(list(places)[::step], names[::step], rotation=90, fontsize=7)
    ax.set(ylim=(-0.03, 1.03), ylabel=f"AUROC on {summary.measured_on}")
    ax.set_title(summary.title, fontsize=7)
    ax.legend(fontsize=7, loc="lower right")
    return fig, ax
