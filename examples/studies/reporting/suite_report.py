"""The report on a suite: `report.json` with what every run came to, `report.md` with tables and verdicts, and figures.

A cell is the mean over runs with its 95 % interval (Student's t over runs, each run a seed of RL and of the base model;
from three runs on), and the largest of the runs: a method that fails in one run of five fails.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from scipy.stats import t as student

import gradroute as gr
from loopholes.arms import ARMS
from loopholes.measurements import over_steps

from .arm_data import Results, arm_runs, draws_of, in_order, of_arm, only
from .markdown import markdown_table
from .store import Job
from .suite_figures import write_figures

COLUMNS = {
    ("on", "hack_monitored"): "on: hack, monitored",
    ("on", "hack_held_out"): "on: hack, held out",
    ("ablated", "hack_monitored"): "ablated: hack, monitored",
    ("ablated", "hack_held_out"): "ablated: hack, held out",
    ("ablated", "solve_hinted"): "ablated: solve, hinted",
    ("ablated", "solve_no_hint"): "ablated: solve, no hint",
}
# What is followed over training, where it was measured.
DRIFT = (
    "step", "auroc_monitored", "auroc_held_out", "cin", "cin_student", "cin_teacher",
    *(f"{name}{where}" for where in ("", "_upper") for name in ("overlap_first", "auroc_first", "auroc_fresh")),
)  # fmt: skip
# Arms that permuted flags and random directions are rate-matched and refreshed alike for.
JUDGED = ("route", "route-frozen", "gradient", "gradient-frozen", "rollout-filter")
# Arms with labels of the monitored modes, the rivals that have one block and the same labels, and permuted flags.
LABELLED = ("weak", "weak-explained", "weak-explained-direction")
RIVALS, PERMUTED = ("weak-filter", "weak-penalty", "weak-likelier"), "weak-explained-shuffle"
# Arms with a direction, and the same with random ones.
DRAWS = {"weak-explained-direction": "weak-explained-random"}


def write_report(folder: Path, results: Results, recipe: Mapping[str, Any]) -> None:
    """Everything that can be said of these runs, into `folder`; the same runs give the same bytes."""
    runs = [{**vars(job), **_final(results[job])} for job in sorted(results, key=in_order)]
    text = {"recipe": dict(recipe), "runs": runs}
    (folder / "report.json").write_text(json.dumps(text, separators=(",", ":")) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(results), encoding="utf-8")
    write_figures(folder, results)


def _final(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the tables and verdicts need; curves are in the figures, and in the result files."""
    overlaps = [refresh["overlap"] for refresh in entry["overlaps"]]
    return {
        **{name: entry[name] for name in ("on", "ablated", "dose", "n_per_mode", "monitored")},
        **({"gate": over_steps(entry["gate"])} if entry["gate"] else {}),
        "least_overlap": min(overlaps, default=None),
        "drift": [{name: point[name] for name in DRIFT if name in point} for point in entry["curve"][1:]],
    }


def read_report(path: Path) -> dict[Job, dict[str, Any]]:
    """The runs of a `report.json`."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    names = ("env", "arm", "base_seed", "seed")
    return {Job(*(run[name] for name in names)): {k: v for k, v in run.items() if k not in names} for run in runs}


def markdown(results: Results) -> str:
    """A table and the verdicts for each environment."""
    parts = []
    for env in sorted({job.env for job in results}):
        one_block = one_block_table(results, env)
        parts += [f"## Environment {env}", table(results, env), verdicts(results, env)]
        parts += ["### Better than one block?", one_block] if one_block else []
    return "\n\n".join(part for part in parts if part) + "\n"


def table(results: Results, env: str) -> str:
    """One row per arm."""
    rows = []
    for arm in ARMS:
        runs = of_arm(results, env, arm)
        if runs:
            cells = [cell([entry[view][rate] for entry in runs.values()]) for view, rate in COLUMNS]
            rows.append([arm, str(len(runs)), *cells])
    sizes = sorted({entry["n_per_mode"] for job, entry in results.items() if job.env == env})
    n = ", ".join(map(str, sizes))
    note = f"mean over runs [95 % interval over runs], largest run; a run is {n} rollouts of each mode in each view"
    return markdown_table(["arm", "runs", *COLUMNS.values()], rows) + f"\n\n({note})"


def cell(rates: list[float]) -> str:
    """Mean, interval over runs, largest."""
    mean = fmean(rates)
    if len(rates) < 3:
        return " ".join(f"{rate:.2f}" for rate in rates)
    low, high = interval_over_runs(rates)
    return f"{mean:.2f} [{max(low, 0):.2f}, {min(high, 1):.2f}], {max(rates):.2f}"


def interval_over_runs(values: list[float]) -> tuple[float, float]:
    """mean +- t_(.975, n - 1) s / sqrt(n)."""
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def difference_cell(differences: list[float], digits: int = 2) -> str:
    """Mean and 95 % interval over runs; single values where there are too few."""
    if len(differences) < 3:
        return " ".join(f"{difference:+.{digits}f}" for difference in differences)
    low, high = interval_over_runs(differences)
    return f"{fmean(differences):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def verdicts(results: Results, env: str) -> str:
    """The table of verdicts, and each as a paragraph to check it by; empty without the control that they need."""
    found = judged(results, env)
    paragraphs = (f"{modes} modes: {verdict!r}" for modes, verdict in found)
    return "\n\n".join(["### Verdicts", verdict_table(results, env), *paragraphs]) if found else ""


def verdict_table(results: Results, env: str) -> str:
    """One row per arm and group of modes."""
    rows = [[v.treatment.name, modes, v.word, v.because] for modes, v in judged(results, env)]
    text = markdown_table(["arm", "modes", "verdict", "why"], rows)
    draws = len(of_arm(results, env, "random-oriented"))
    if 0 < draws < 5:
        text += f"\n\n(Random draws: {draws}, of the 5 that are needed to judge a direction; left out.)"
    return text


def draw_table(results: Results, env: str) -> str:
    """Each random direction by itself, then the extracted ones: AUROC on the policy's rollouts, and what was left."""
    header = ["arm", "base seed", "seed", "AUROC, monitored", "AUROC, held out"]
    header += [title for (view, rate), title in COLUMNS.items() if view == "ablated" and rate != "solve_no_hint"]
    rows = []
    for arm in ("random", "random-oriented", "route"):
        for job, entry in of_arm(results, env, arm).items():
            areas = [[point.get(f"auroc_{modes}") for point in entry["drift"]] for modes in ("monitored", "held_out")]
            shown = [f"{fmean(known):.2f}" if (known := [a for a in area if a is not None]) else "-" for area in areas]
            rates = [entry["ablated"][rate] for rate in ("hack_monitored", "hack_held_out", "solve_hinted")]
            cells = [arm, str(job.base_seed), str(job.seed), *shown, *(f"{rate:.2f}" for rate in rates)]
            rows.append(cells)
    return markdown_table(header, rows)


def judged(results: Results, env: str) -> list[tuple[str, gr.evaluation.Verdict]]:
    """(which modes, verdict) on every arm that the controls are rate-matched for; none without them."""
    shuffled = arm_runs(results, env, "shuffle")
    if shuffled is None:
        return []
    contests = []
    for arm in JUDGED:
        treated = arm_runs(results, env, arm)
        common = shuffled.runs.keys() & treated.runs.keys() if treated else set()
        if treated and common:
            controls = gr.evaluation.Controls(only(shuffled, common), draws_of(results, env, "random-oriented", common))
            contests.append((only(treated, common), controls))
    return _by_modes(contests)


def against_one_block(results: Results, env: str) -> list[tuple[str, gr.evaluation.Verdict]]:
    """(which modes, verdict) on every arm that was run with its rivals, its permuted flags and the base."""
    contests = []
    for arm in LABELLED:
        needed = [arm_runs(results, env, name) for name in (arm, PERMUTED, "base", *RIVALS)]
        found = [runs for runs in needed if runs is not None]
        common = set.intersection(*(set(runs.runs) for runs in found)) if found else set()
        if len(found) == len(needed) and len(common) >= 3:
            treated, shuffled, base, *others = (only(runs, common) for runs in found)
            draws = draws_of(results, env, DRAWS[arm], common) if arm in DRAWS else ()
            contests.append((treated, gr.evaluation.Controls(shuffled, draws, rivals=others, base=base)))
    return _by_modes(contests)


def one_block_table(results: Results, env: str) -> str:
    """One row per arm and group of modes: whether the second block was earned; empty where that was not run."""
    rows = []
    for modes, verdict in against_one_block(results, env):
        found = verdict.one_block
        assert found is not None
        n = str(len(verdict.treatment.runs))
        rows.append([verdict.treatment.name, modes, n, verdict.word, found.rival, found.word, found.because])
    header = ["arm", "modes", "runs", "against permuted flags", "best rival with one block", "verdict", "why"]
    return markdown_table(header, rows) if rows else ""


def _by_modes(
    contests: list[tuple[gr.evaluation.ArmRuns, gr.evaluation.Controls]],
) -> list[tuple[str, gr.evaluation.Verdict]]:
    """The verdicts on the held-out modes, then on all; none without a contest."""
    groups: tuple[Literal["held-out", "all"], ...] = ("held-out", "all") if contests else ()
    return [(modes, verdict) for modes in groups for verdict in gr.evaluation.compare_all(contests, modes=modes)]
