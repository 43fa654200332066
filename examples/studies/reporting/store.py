"""Result files of single runs.

<folder>/<environment>/<arm>-b<base seed>-s<seed>.json = {version, job, recipe, entry}
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopholes.arms import ARMS
from loopholes.environment import ENVIRONMENTS

from .result_file import ResultError, read_entry, write_file

VERSION = 1
ENTRY_FIELDS = (
    "on",
    "ablated",
    "curve",
    "dose",
    "gate",
    "scores",
    "n_per_mode",
    "monitored",
    "wall_s",
    "overlaps",
    "cost",
)
RATES = ("hack_monitored", "hack_held_out", "solve_hinted", "solve_no_hint", "per_mode")


@dataclass(frozen=True)
class Job:
    """One run."""

    env: str
    arm: str
    base_seed: int
    seed: int

    def path(self, folder: Path) -> Path:
        """Where its result lies."""
        return folder / self.env / f"{self.arm}-b{self.base_seed}-s{self.seed}.json"


def stored_jobs(folder: Path) -> list[Job]:
    """The runs whose results lie in `folder`, by their files' names.

    Raises:
        ResultError: a JSON file there is not named like a result of a known arm and environment.
    """
    jobs = []
    for path in sorted(folder.glob("*/*.json")):
        found = re.fullmatch(r"(.+)-b(\d+)-s(\d+)", path.stem)
        if found is None or found[1] not in ARMS or path.parent.name not in ENVIRONMENTS:
            raise ResultError(
                f"{path}: should be named <environment>/<arm>-b<base seed>-s<seed>.json. Fix: move it elsewhere."
            )
        jobs.append(Job(path.parent.name, found[1], int(found[2]), int(found[3])))
    return jobs


def slim(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `train` without what no report shows, numbers rounded."""
    kept = {name: entry[name] for name in ENTRY_FIELDS if name != "overlaps"}
    views = ("on", "ablated")
    kept["curve"] = [{**point, **{view: _rates_only(point[view]) for view in views}} for point in entry["curve"]]
    kept["overlaps"] = [{"step": report["step"], "overlap": report["overlap"]} for report in entry["refreshes"]]
    return _rounded(kept)


def write_result(path: Path, job: Job, recipe: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    """Without what no report shows."""
    write_file(path, VERSION, vars(job), recipe, slim(entry))


def read_result(path: Path, job: Job, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a result file.

    Raises:
        ResultError: not JSON, of another version, another job or another recipe, or with fields missing or misshapen.
    """
    entry = read_entry(path, VERSION, vars(job), recipe, ENTRY_FIELDS)
    for view in ("on", "ablated"):
        for rate in RATES:
            value = entry[view].get(rate) if isinstance(entry[view], dict) else None
            if value is None or (rate != "per_mode" and not (isinstance(value, int | float) and 0 <= value <= 1)):
                raise ResultError(f"{path}: `entry.{view}.{rate}` should be a rate. Found {value!r}.")
    return entry


def _rates_only(view: Mapping[str, Any]) -> dict[str, Any]:
    return {name: rate for name, rate in view.items() if name != "per_mode"}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
