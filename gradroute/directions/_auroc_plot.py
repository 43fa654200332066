"""The picture of `Directions.plot`: AUROC of every module, the pooled one, and what no direction would have."""

from collections.abc import Sequence
from typing import Any

from gradroute._plot import new_axes
from gradroute.directions.diagnostics import DirectionsSummary


def plot_summary(summary: DirectionsSummary, ax: Any = None) -> tuple[Any, Any]:
    """(figure, axes) with a marker per module; told apart by shape and line style, not by colour."""
    fig, ax = new_axes(ax, (8.5, 4.6))
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
    shared = _shared_prefix(names)
    ax.set_xticks(list(places)[::step], [name.removeprefix(shared) for name in names[::step]], rotation=90, fontsize=8)
    ax.set_ylim(-0.03, 1.03)
    ax.set_ylabel(f"AUROC on {summary.measured_on}", fontsize=9)
    ax.set_xlabel(f"module of {shared.rstrip('.')}" if shared else "module", fontsize=9)
    ax.set_title(summary.title, fontsize=8)
    ax.legend(fontsize=8, loc="lower right")
    return fig, ax


def _shared_prefix(names: Sequence[str]) -> str:
    """What all names begin with, up to a dot: it would be written many times and told nothing."""
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(each) > shared and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    return "".join(f"{part}." for part in parts[0][:shared])
