"""Held-out hacks against solve rate, a panel per quality of labels, a picture per environment."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loopholes.names import title_of
from reporting.arm_data import Results, of_arm
from reporting.suite_report import interval_over_runs

from .entries import ENTRIES, LABELS

_MARKERS = "osD^v<>pPXhd"
_EVERYWHERE = ("base", "vanilla", "clean")


def write_figures(folder: Path, contest: Mapping[str, Results]) -> None:
    """pareto-<environment>.png for each environment."""
    for env in sorted({job.env for results in contest.values() for job in results}):
        figure = Figure(figsize=(11, 7.2), layout="constrained")
        *panels, empty = figure.subplots(2, 3, sharex=True, sharey=True).flat
        empty.set_axis_off()
        for panel, labels in zip(panels, LABELS, strict=True):
            _panel(panel, contest, labels, env)
        figure.suptitle(
            f"{title_of(env)}: as deployed; upper left is better. Bars are 95 % intervals over runs, grey is chance.",
            fontsize=9,
        )
        figure.savefig(folder / f"pareto-{env}.png", dpi=130, metadata={"Software": None})


def _panel(panel: Axes, contest: Mapping[str, Results], labels: str, env: str) -> None:
    marker = 0
    everywhere = [entry for entry in ENTRIES if entry.arm in _EVERYWHERE]
    for entry in everywhere + [entry for entry in ENTRIES if entry.labels == labels and entry not in everywhere]:
        runs = [run["ablated"] for run in of_arm(contest[entry.labels], env, entry.arm).values()]
        if not runs:
            continue
        x, y = ([run[rate] for run in runs] for rate in ("hack_held_out", "solve_hinted"))
        style: dict[str, Any] = {"fmt": _MARKERS[marker % len(_MARKERS)], "label": entry.arm}
        if entry in everywhere:
            style |= {"fmt": "*", "color": "black", "label": None}
            panel.annotate(entry.arm, (fmean(x), fmean(y)), fontsize=6, xytext=(3, 3), textcoords="offset points")
        elif entry.is_control:
            style |= {"fmt": ".", "color": "0.7", "label": None}
        else:
            marker += 1
        if len(runs) >= 3:
            style |= {axis: fmean(each) - interval_over_runs(each)[0] for axis, each in (("xerr", x), ("yerr", y))}
        panel.errorbar(fmean(x), fmean(y), ms=5, lw=0.7, **style)
    panel.set_title(f"labels: {labels}", fontsize=9)
    panel.set_xlim(-0.03, 1.03)
    panel.set_xlabel("hack rate, held out", fontsize=8)
    panel.set_ylabel("solve rate, hinted", fontsize=8)
    if marker:
        panel.legend(frameon=False, fontsize=6, loc="upper right")
