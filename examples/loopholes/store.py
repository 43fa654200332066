"""Result files of single runs: written whole or not at all, and read with suspicion.

<folder>/<environment>/<arm>-b<base seed>-s<seed>.json = {version, job, recipe, entry}
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arms import ARMS
from .environment import ENVIRONMENTS

VERSION = 1
ENTRY_FIELDS = ("on", "ablated", "curve", "dose", "scores", "n_per_mode", "monitored", "wall_s", "overlaps")
RATES = ("hack_monitored", "hack_held_out", "solve_hinted", "solve_no_hint", "per_mode")


class ResultError(Exception):
    """A result file that cannot be counted; says which file and which field."""


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
    """A reader sees the whole file or none: it is renamed when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    result = {"version": VERSION, "job": vars(job), "recipe": recipe, "entry": slim(entry)}
    partial.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    partial.replace(path)


def read_result(path: Path, job: Job, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a result file.

    Raises:
        ResultError: not JSON, of another version, another job or another recipe, or with fields missing or misshapen.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultError(f"{path}: cannot be read as JSON ({error}). Fix: delete it, and it is run again.") from error
    if not isinstance(result, dict):
        raise ResultError(f"{path}: should hold an object. Found {type(result).__name__}.")
    # As JSON has it: tuples become lists.
    expected = json.loads(json.dumps({"version": VERSION, "job": vars(job), "recipe": dict(recipe)}))
    wanted, found = _flat(expected), _flat({field: result.get(field) for field in expected})
    for field in sorted(wanted.keys() | found.keys()):
        if wanted.get(field) != found.get(field):
            raise ResultError(
                f"{path}: `{field}` should be {wanted.get(field)!r}. Found {found.get(field)!r}. "
                "Fix: another --out, or delete the file, and it is run again."
            )
    entry = result.get("entry")
    for field in ENTRY_FIELDS:
        if not isinstance(entry, dict) or field not in entry:
            raise ResultError(f"{path}: `entry.{field}` is missing. Fix: delete the file, and it is run again.")
    for view in ("on", "ablated"):
        for rate in RATES:
            value = entry[view].get(rate) if isinstance(entry[view], dict) else None
            if value is None or (rate != "per_mode" and not (isinstance(value, int | float) and 0 <= value <= 1)):
                raise ResultError(f"{path}: `entry.{view}.{rate}` should be a rate. Found {value!r}.")
    return dict(entry)


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """{"job": {"arm": x}} -> {"job.arm": x}."""
    flat = {}
    for name, value in fields.items():
        flat |= {f"{name}.{each}": value[each] for each in value} if isinstance(value, dict) else {name: value}
    return flat


def _rates_only(view: Mapping[str, Any]) -> dict[str, Any]:
    return {name: rate for name, rate in view.items() if name != "per_mode"}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
