"""Result files of single runs: written whole or not at all, and read with suspicion.

<folder>/<variant>/<arm>-s<seed>-d<draw>.json = {version, job, recipe, entry}
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopholes.arms import ARMS as LOOPHOLE_ARMS
from loopholes.store import ResultError

from .environment import VARIANTS
from .evaluation import MODES, NO_NOTE

VERSION = 1
ARMS = ("base", "vanilla", "clean", "oracle", "weak", "route", "random-oriented", "shuffle", "absorb")
ABOUT = {"base": "the warmed-up model, not trained"} | {arm: LOOPHOLE_ARMS[arm].about for arm in ARMS[1:]}
FIELDS = ("outcomes", "curve", "refreshes", "train_s", "evaluation_s")
KINDS = ("hack_on", "hack_ablated", "solve_on", "solve_ablated")


@dataclass(frozen=True, order=True)
class Job:
    """One run; `draw` is of the random direction's rows, 0 in arms without one."""

    variant: str
    arm: str
    seed: int
    draw: int = 0

    def path(self, folder: Path) -> Path:
        """Where its result lies."""
        return folder / self.variant / f"{self.arm}-s{self.seed}-d{self.draw}.json"


def stored_jobs(folder: Path) -> list[Job]:
    """The runs whose results lie in `folder`, by their files' names.

    Raises:
        ResultError: a JSON file there is not named like a result.
    """
    jobs = []
    for path in sorted(folder.glob("*/*.json")):
        found = re.fullmatch(r"(.+)-s(\d+)-d(\d+)", path.stem)
        if found is None or found[1] not in ARMS or path.parent.name not in VARIANTS:
            raise ResultError(f"{path}: should be named <variant>/<arm>-s<seed>-d<draw>.json. Fix: move it elsewhere.")
        jobs.append(Job(path.parent.name, found[1], int(found[2]), int(found[3])))
    return jobs


def write_result(path: Path, job: Job, recipe: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    """A reader sees the whole file or none: it is renamed when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    result = {"version": VERSION, "job": vars(job), "recipe": recipe, "entry": entry}
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
    for name, wanted in expected.items():
        found = result.get(name)
        parts = [(name, wanted, found)]
        if isinstance(wanted, dict) and isinstance(found, dict):
            keys = sorted(wanted.keys() | found.keys())
            parts = [(f"{name}.{key}", wanted.get(key), found.get(key)) for key in keys]
        for field, right, wrong in parts:
            if right != wrong:
                raise ResultError(
                    f"{path}: `{field}` should be {right!r}. Found {wrong!r}. "
                    "Fix: another --out, or delete the file, and it is run again."
                )
    entry = result.get("entry")
    for field in FIELDS:
        if not isinstance(entry, dict) or field not in entry:
            raise ResultError(f"{path}: `entry.{field}` is missing. Fix: delete the file, and it is run again.")
    for mode in MODES:
        size = recipe["n_no_note" if mode == NO_NOTE else "n_per_marker"]
        for kind in KINDS:
            digits = entry["outcomes"].get(mode, {}).get(kind)
            if not isinstance(digits, str) or len(digits) != size or set(digits) - {"0", "1"}:
                raise ResultError(f"{path}: `entry.outcomes.{mode}.{kind}` should be {size} digits. Found {digits!r}.")
    return dict(entry)
