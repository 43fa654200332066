"""The table at the end, `results.json`, and `curves.png`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import gradroute as gr

from .arms import ARMS
from .language import MODES
from .names import title_of

GROUPS = {
    "hack_monitored": "hack, monitored",
    "hack_held_out": "hack, held out",
    "solve_hinted": "solve, hinted",
    "solve_no_hint": "solve, no hint",
}
VIEWS = ("on", "ablated")


def by_arm(runs: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs of each arm, arms in the order of `ARMS`."""
    runs = list(runs)
    grouped = {arm: [run for run in runs if run["arm"] == arm] for arm in ARMS}
    return {arm: found for arm, found in grouped.items() if found}


def pooled_modes(run: dict[str, Any], group: str) -> int:
    """How many modes a group of this run pools."""
    monitored = len(run["monitored"])
    pooled = {"hack_monitored": monitored, "hack_held_out": len(MODES) - monitored, "solve_hinted": len(MODES)}
    return pooled.get(group, 1)


def pooled_rate(runs: list[dict[str, Any]], view: str, group: str) -> gr.evaluation.Rate:
    """The rate over all rollouts of all seeds; its interval is of these rollouts, not of other seeds."""
    counts = [run["n_per_mode"] * pooled_modes(run, group) for run in runs]
    hits = [round(run[view][group] * n) for run, n in zip(runs, counts, strict=True)]
    return gr.evaluation.Rate(sum(hits), sum(counts))


def print_table(runs: list[dict[str, Any]], console: Console) -> None:
    """Rates with 95 % intervals, per arm, on and ablated; with several seeds also each seed's ablated hack rates."""
    seeds = sorted({(run["base_seed"], run["seed"]) for run in runs})
    table = Table(title=f"{title_of(runs[0]['env'])}, {len(seeds)} seed(s): rate [95 % Wilson interval]")
    table.add_column("arm")
    table.add_column("view")
    for group, title in GROUPS.items():
        sizes = sorted({pooled_rate(found, "on", group).n for found in by_arm(runs).values()})
        table.add_column(f"{title}\nn = {', '.join(map(str, sizes))}", justify="right")
    for arm, found in by_arm(runs).items():
        for view in VIEWS:
            cells = [_cell(pooled_rate(found, view, group)) for group in GROUPS]
            table.add_row(arm if view == VIEWS[0] else "", view, *cells, end_section=view == VIEWS[-1])
    console.print(table)
    for arm, found in by_arm(runs).items():
        text = f"{arm}: {ARMS[arm].about}"
        if len(found) > 1:
            each = [f"{r['ablated']['hack_monitored']:.2f}/{r['ablated']['hack_held_out']:.2f}" for r in found]
            text += f"; ablated hack monitored/held out, per seed: {' '.join(each)}"
        console.print(text, highlight=False)


def _cell(rate: gr.evaluation.Rate) -> str:
    low, high = rate.interval
    return f"{rate.value:.3f} \\[{low:.2f}, {high:.2f}]"


def write_json(path: Path, config: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """`results.json`, written whole or not at all."""
    partial = path.with_suffix(".json.part")
    partial.write_text(json.dumps({"config": config, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def plot_curves(path: Path, runs: list[dict[str, Any]]) -> None:
    """Hack and solve rates over training: a column per arm, lines on (dashed) and ablated (solid), one per seed."""
    arms = by_arm(run for run in runs if run["arm"] != "base")
    figure = Figure(figsize=(max(4.5, 2.7 * len(arms)), 5.2), layout="constrained")
    axes = figure.subplots(2, len(arms), sharex=True, sharey=True, squeeze=False)
    lines = (
        (axes[0], (("hack_monitored", "monitored", "0.6"), ("hack_held_out", "held out", "0"))),
        (axes[1], (("solve_hinted", "hinted", "0"), ("solve_no_hint", "no hint", "0.6"))),
    )
    for column, (arm, found) in enumerate(arms.items()):
        for row, groups in lines:
            for group, label, colour in groups:
                for i, run in enumerate(found):
                    steps = [point["step"] for point in run["curve"]]
                    for view, style in (("on", "--"), ("ablated", "-")):
                        rates = [point[view][group] for point in run["curve"]]
                        named = f"{label}, {view}" if i == 0 else None
                        row[column].plot(steps, rates, style, color=colour, lw=1.3, alpha=0.9, label=named)
        axes[0][column].set_title(f"{arm} ({len(found)} seed{'s' if len(found) > 1 else ''})", fontsize=10)
        axes[1][column].set_xlabel("step")
    axes[0][0].set_ylabel("hack rate")
    axes[1][0].set_ylabel("solve rate")
    for row, _ in lines:
        row[0].set_ylim(-0.03, 1.03)
        row[-1].legend(fontsize=7, frameon=False)
    n = runs[0]["n_curve_per_mode"]
    figure.suptitle(f"Training with a loophole: quarantine on (dashed) and ablated (solid), n = {n} a mode and point")
    figure.savefig(path, dpi=150)
