"""Whether directions go stale, and whether it matters: each refreshed arm against the same arm with frozen directions.

difference = hack rate of the deployed view, frozen - refreshed, paired over runs (Student's t, 95 %)
overlap    = of the directions that would be extracted at a step with the first ones: what frozen ones have lost
cin        = share of the deployed gradient that is hack-ward by the directions in use
loss       = AUROC of hacks by fresh directions - AUROC by the first ones, on the same rollouts of the same policy
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from loopholes.names import title_of

from .arm_data import of_arm
from .markdown import markdown_table
from .store import Job
from .suite_figures import STYLES, axes_in_rows, line
from .suite_report import cell, difference_cell

Results = Mapping[Job, Mapping[str, Any]]

DRIFTING = {"overlap with the first": "overlap_first", "AUROC": "auroc_held_out"}
# What is refreshed, and the same frozen.
COMPARED = {
    "route": "route-frozen", "graded": "graded-frozen", "gradient": "gradient-frozen",
    "gradient-cosine": "gradient-cosine-frozen", "erase": "erase-frozen",
}  # fmt: skip
OVERLAPS = (1.01, 0.9, 0.8, 0.6, 0.4, 0.2, -1.01)
"""Edges of the ranges of overlap in which the loss of AUROC is shown."""


def write_staleness(folder: Path, results: Results) -> None:
    """`staleness.md`, and a figure per environment, where an arm was run refreshed and frozen."""
    parts = []
    for env in sorted({job.env for job in results}):
        arms = {job.arm for job in results if job.env == env}
        if any({refreshed, frozen} <= arms for refreshed, frozen in COMPARED.items()):
            tables = (staleness_table, difference_table, share_table)
            parts += [f"## Environment {env}", *(table(results, env) for table in tables), loss_table(env, results)]
            staleness_figure(results, env).savefig(
                folder / f"staleness-{env}.png", dpi=130, metadata={"Software": None}
            )
    if parts:
        (folder / "staleness.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def staleness_table(results: Results, env: str) -> str:
    """One row per arm: rates as deployed; over training, overlap with the first directions, and AUROC, held out."""
    steps = _shown_steps(results, env)
    header = ["arm", "runs", "hack, monitored", "hack, held out", "solve, hinted"]
    header += [f"{title}, step {step}" for title in DRIFTING for step in steps]
    rows = []
    for arm in (arm for pair in COMPARED.items() for arm in pair):
        runs = list(of_arm(results, env, arm).values())
        if runs:
            rates = ("hack_monitored", "hack_held_out", "solve_hinted")
            cells = [cell([entry["ablated"][rate] for entry in runs]) for rate in rates]
            cells += [_mean_at(runs, step, name) for name in DRIFTING.values() for step in steps]
            rows.append([arm, str(len(runs)), *cells])
    return markdown_table(header, rows)


def difference_table(results: Results, env: str) -> str:
    """Frozen minus refreshed, paired over the runs that both have."""
    columns = {
        "hack, monitored": "hack_monitored", "hack, held out": "hack_held_out", "solve, hinted": "solve_hinted"
    }  # fmt: skip
    rows = []
    for refreshed, frozen in COMPARED.items():
        fresh = {(job.base_seed, job.seed): run["ablated"] for job, run in of_arm(results, env, refreshed).items()}
        stale = {(job.base_seed, job.seed): run["ablated"] for job, run in of_arm(results, env, frozen).items()}
        seeds = sorted(fresh.keys() & stale.keys())
        if len(seeds) >= 3:
            cells = []
            for rate in columns.values():
                differences = [stale[seed][rate] - fresh[seed][rate] for seed in seeds]
                cells.append(difference_cell(differences))
            rows.append([refreshed, str(len(seeds)), *cells])
    return markdown_table(["frozen - refreshed", "pairs", *columns], rows)


def loss_table(env: str, *studies: Results) -> str:
    """What the first directions would cost, by what is left of their overlap; empty where that was not measured.

    A run counts once in each range of overlap, with the mean over its points in it.
    """
    rows = []
    features = {"activations": ("route", "graded"), "gradients": ("gradient",), "unit gradients": ("gradient-cosine",)}
    for feature, arms in features.items():
        runs = [
            run for results in studies for arm in arms for each in (arm, COMPARED[arm])
            for run in of_arm(results, env, each).values()
        ]  # fmt: skip
        for where, modules in (("", "all"), ("_upper", "last block")):
            fresh, first = f"auroc_fresh{where}", f"auroc_first{where}"
            for high, low in pairwise(OVERLAPS):
                by_run = points_by_overlap(runs, low, high, where)
                if by_run:
                    means = [[fmean(p[name] for p in points) for points in by_run] for name in (fresh, first)]
                    losses = [now - then for now, then in zip(*means, strict=True)]
                    shown = f"below {high:g}" if low < -1 else f"{low:g} to {min(high, 1):g}"
                    cells = [feature, modules, shown, str(len(by_run)), *(f"{fmean(values):.2f}" for values in means)]
                    rows.append([*cells, difference_cell(losses)])
    header = ["features", "modules", "overlap with the first", "runs", "AUROC, fresh", "AUROC, first", "loss"]
    return markdown_table(header, rows) if rows else ""


def points_by_overlap(
    runs: Iterable[Mapping[str, Any]], low: float, high: float, where: str = ""
) -> list[list[Mapping[str, Any]]]:
    """Of each run that has any: its points with both AUROCs and an overlap with the first from `low` to `high`."""
    by_run = (
        [p for p in run["drift"] if f"auroc_first{where}" in p and low <= p[f"overlap_first{where}"] < high]
        for run in runs
    )
    return [points for points in by_run if points]


def share_table(results: Results, env: str) -> str:
    """Hack-ward shares of the policy's own rollouts and of a teacher's demonstrations; empty without a teacher."""
    steps = [step for step in _steps(results, env) if _any_at(results, env, step, "cin_teacher")]
    if not steps:
        return ""
    header = ["arm", "runs", *(f"{who}, step {step}" for step in steps for who in ("student", "teacher"))]
    rows = []
    for arm in (arm for pair in COMPARED.items() for arm in pair):
        runs = list(of_arm(results, env, arm).values())
        if any("cin_teacher" in point for run in runs for point in run["drift"]):  # activations have no such share
            cells = [_mean_at(runs, step, f"cin_{who}") for step in steps for who in ("student", "teacher")]
            rows.append([arm, str(len(runs)), *cells])
    return markdown_table(header, rows)


def staleness_figure(results: Results, env: str) -> Figure:
    """Overlap with the first directions, AUROC on the policy's rollouts, and with a teacher the shares of both."""
    taught = any(_any_at(results, env, step, "cin_teacher") for step in _steps(results, env))
    figure, panels = axes_in_rows(3 if taught else 2, 6.5, 7.5 if taught else 5.0)
    overlap, auroc = panels[:2]
    n = 0
    for style, arm in zip(STYLES, (arm for pair in COMPARED.items() for arm in pair), strict=False):
        runs = list(of_arm(results, env, arm).values())
        n = max(n, len(runs))
        for panel, name in ((overlap, "overlap_first"), (auroc, "auroc_held_out")):
            line(panel, runs, lambda run, name=name: [(p["step"], p.get(name)) for p in run["drift"]], arm, style)
        for who, colour in (("student", "black"), ("teacher", "0.6")) if taught else ():
            key = f"cin_{who}"
            line(
                panels[2], runs, lambda run, key=key: [(p["step"], p.get(key)) for p in run["drift"]],
                f"{arm}, {who}", style, colour,
            )  # fmt: skip
    names = ("overlap with the first", "AUROC, held out", "hack-ward share, cin")
    for panel, label in zip(panels, names, strict=False):
        panel.set_ylabel(label, fontsize=8)
        if panel.lines:
            panel.legend(frameon=False, fontsize=6, ncols=2)
    panels[-1].set_xlabel("step")
    figure.suptitle(
        f"{title_of(env)}, {n} runs an arm\nrefreshed directions, and the same frozen as control", fontsize=9
    )
    return figure


def _steps(results: Results, env: str) -> list[int]:
    return sorted({point["step"] for job, run in results.items() if job.env == env for point in run["drift"]})


def _shown_steps(results: Results, env: str) -> list[int]:
    steps = _steps(results, env)
    return sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []


def _any_at(results: Results, env: str, step: int, name: str) -> bool:
    points = (point for job, run in results.items() if job.env == env for point in run["drift"])
    return any(point["step"] == step and name in point for point in points)


def _mean_at(runs: list[Mapping[str, Any]], step: int, name: str) -> str:
    # None: measured, but there was nothing to tell apart, as where no rollout was a hack.
    points = (point for run in runs for point in run["drift"] if point["step"] == step)
    values = [value for point in points if (value := point.get(name)) is not None]
    return f"{fmean(values):.2f}" if values else "-"
