"""Hack and solve rates of the rollouts that a run was trained on, as sampled on and ablated."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from .store import ARMS, Job

WINDOW = 5
"""Steps that a point is of: in a single one, few ablated rollouts are of a kind, or none."""
PANELS = {
    "hack, monitored": "hack_{}_monitored",
    "hack, held out": "hack_{}_held_out",
    "solve, no note": "solve_{}_no_note",
}
COLOURS = dict(zip(ARMS[1:], colormaps["tab20"].colors, strict=True))


def write_curves(path: Path, results: Mapping[Job, Mapping[str, Any]]) -> None:
    """A row of panels per variant; solid: ablated rollouts, dotted: on; sums over seeds."""
    variants = list(dict.fromkeys(job.variant for job in sorted(results)))
    figure = Figure(figsize=(11, 3 * len(variants)), layout="constrained")
    for row, variant in zip(figure.subplots(len(variants), len(PANELS), squeeze=False), variants, strict=True):
        for panel, (title, name) in zip(row, PANELS.items(), strict=True):
            for arm in ARMS[1:]:
                entries = [entry for job, entry in sorted(results.items()) if (job.variant, job.arm) == (variant, arm)]
                for view, style in (("ablated", "-"), ("on", ":")):
                    points = _points(entries, name.format(view))
                    label = arm if view == "ablated" else None
                    if points:
                        panel.plot(*zip(*points, strict=True), style, color=COLOURS[arm], lw=1.3, label=label)
            panel.set_title(f"{variant}: {title}", fontsize=9)
            panel.set_ylim(-0.03, 1.03)
            panel.set_xlabel("step", fontsize=8)
        row[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def windows(curve: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Counts of consecutive steps added up, AUROCs and quantiles averaged; `step` is the last of them."""
    found = []
    for first in range(0, len(curve), WINDOW):
        points = curve[first : first + WINDOW]
        merged: dict[str, Any] = {"step": points[-1]["step"]}
        for name in dict.fromkeys(name for point in points for name in point if name != "step"):
            values = [point[name] for point in points if name in point]
            if name.startswith(("auroc", "overlap")):
                merged[name] = round(fmean(values), 4)
            elif name == "log_ratios":
                merged[name] = [round(fmean(quantile), 3) for quantile in zip(*values, strict=True)]
            else:
                merged[name] = [sum(counts) for counts in zip(*values, strict=True)]
        found.append(merged)
    return found


def _points(entries: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, rate) over all runs."""
    counts: dict[int, list[int]] = {}
    for entry in entries:
        for point in entry["curve"]:
            before = counts.get(point["step"], [0, 0])
            counts[point["step"]] = [a + b for a, b in zip(before, point[name], strict=True)]
    return [(step, hits / rows) for step, (hits, rows) in sorted(counts.items()) if rows]
