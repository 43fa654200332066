"""In which view a gate should score rollouts: the same runs with either, measure by measure.

difference = rollouts scored as sampled - rollouts scored ablated, paired over runs (Student's t, 95 %)
"""

from collections.abc import Hashable, Mapping
from statistics import fmean
from typing import Any, TypeVar

from .markdown import markdown_table
from .store import Job
from .suite_report import difference_cell

Run = TypeVar("Run", bound=Hashable)
Measures = Mapping[str, float | None]

GATE = {
    "gate: AUROC, monitored": "auroc_monitored", "gate: AUROC, held out": "auroc_held_out",
    "gate: recall, monitored": "recall_monitored", "gate: recall, held out": "recall_held_out",
    "gate: false positives": "false_positive_rate",
}  # fmt: skip
RATES = {
    "hack, monitored": "hack_monitored", "hack, held out": "hack_held_out", "solve, hinted": "solve_hinted",
    "solve, no hint": "solve_no_hint",
}  # fmt: skip


def measures(entry: Mapping[str, Any]) -> Measures:
    """Of a run of the loophole example: its gate over all of training, and both views of the trained model."""
    rates = {f"{view}: {title}": entry[view][rate] for view in ("ablated", "on") for title, rate in RATES.items()}
    return {title: entry["gate"][name] for title, name in GATE.items()} | rates


def score_view_table(
    ablated: Mapping[Job, Mapping[str, Any]], sampled: Mapping[Job, Mapping[str, Any]], env: str, arm: str
) -> str:
    """One row per measure, of the runs of `arm` that both reports have."""
    pair = [
        {job: measures(entry) for job, entry in each.items() if (job.env, job.arm) == (env, arm)}
        for each in (ablated, sampled)
    ]
    return paired_table(*pair)


def paired_table(ablated: Mapping[Run, Measures], sampled: Mapping[Run, Measures]) -> str:
    """One row per measure: mean over runs [least, largest] with either view, and the mean of differences."""
    shared = [run for run in ablated if run in sampled]
    rows = []
    for name in ablated[shared[0]]:
        pairs = [(ablated[run][name], sampled[run][name]) for run in shared]
        known = [(a, s) for a, s in pairs if a is not None and s is not None]
        if known:
            differences = [s - a for a, s in known]
            cells = [_cell([pair[i] for pair in known]) for i in (0, 1)]
            rows.append([name, str(len(known)), *cells, difference_cell(differences, digits=3)])
    return markdown_table(["measure", "runs", "scored ablated", "scored as sampled", "sampled - ablated"], rows)


def _cell(values: list[float]) -> str:
    return f"{fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"
