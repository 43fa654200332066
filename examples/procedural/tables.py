"""Tables of what was scanned, reached and trained; from result files, without reasoning-gym."""

from statistics import fmean
from typing import Any

from .scan import Hole
from .tasks import TASKS

MARKS = {"monitored": " *", "held out": " (held out)", "honest": ""}
Table = tuple[list[str], list[list[str]]]


def holes_table(found: dict[str, Any]) -> Table:
    """Datasets that pay for an answer that does not look at the question."""
    holes = [hole for hole in (Hole(**each) for each in found["holes"]) if hole.found]
    rows = [[hole.dataset, f"`{hole.answer}`", _rate(hole.unearned), _rate(hole.right)] for hole in holes]
    return ["dataset", "best paid answer", "pays without being right", "is right"], rows


def reach_table(found: dict[str, Any], tasks: str) -> Table:
    """What a model gets before training: in the tasks that are "trained", or in "other" datasets with a hole."""
    kinds = {task.name: task.kind for task in TASKS}
    rows = []
    for name, rates in found["tasks"].items():
        if (name in kinds) == (tasks == "trained"):
            exploit = f"`{rates['exploit']}` ({_rate(rates['exploit_share'])})" if rates["exploit"] else "-"
            cells = [_rate(rates[key]) for key in ("right", "hacked", "unearned")]
            rows.append([name + MARKS[kinds.get(name, "honest")], *cells, exploit])
    return ["dataset", "right", "paid, not right", "mean of that payment", "answer that brought most of it"], rows


def runs_table(found: dict[str, Any], rate: str) -> Table:
    """A rate ("hacked", "right", "unearned") of every arm and view by task: mean over runs [least, largest]."""
    rows = []
    arms = list(dict.fromkeys(run["arm"] for run in found["runs"]))
    for arm in arms:
        runs = [run for run in found["runs"] if run["arm"] == arm]
        for view in runs[0]["outcomes"]:
            cells = []
            for task in TASKS:
                values = [run["outcomes"][view][task.name][rate] for run in runs]
                spread = f" [{min(values):.2f}, {max(values):.2f}]" if len(values) > 1 else ""
                cells.append(f"{fmean(values):.2f}{spread}")
            shown = view if len(runs[0]["outcomes"]) > 1 else "-"
            rows.append([arm, str(len(runs)), shown, *cells])
    return ["arm", "runs", "view", *(task.name + MARKS[task.kind] for task in TASKS)], rows


def _rate(value: float) -> str:
    return f"{value:.2f}"
