"""Result files of single runs.

<folder>/<variant>/<arm>-s<seed>-d<draw>.json = {version, job, recipe, entry}
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopholes.arms import ARMS as LOOPHOLE_ARMS
from reporting.result_file import ResultError, read_entry, write_file

from .environment import VARIANTS
from .evaluation import MODES, NO_NOTE
from .recipe import Recipe

VERSION = 1
ARMS = (
    "base", "vanilla", "clean", "oracle",
    "weak", "weak-filter", "weak-penalty", "weak-likelier", "weak-explained", "weak-explained-shuffle", "explained",
    "route", "route-frozen", "random-oriented", "shuffle",
    "graded", "graded-frozen", "graded-random", "graded-shuffle", "post-hoc", "absorb",
)  # fmt: skip
ABOUT = {arm: LOOPHOLE_ARMS[arm].about.replace("--penalty", f"{Recipe.penalty:g}") for arm in ARMS}
ABOUT["base"] = "the warmed-up model, not trained"
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
    """The file of a run."""
    write_file(path, VERSION, vars(job), recipe, entry)


def read_result(path: Path, job: Job, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a result file.

    Raises:
        ResultError: not JSON, of another version, another job or another recipe, or with fields missing or misshapen.
    """
    entry = read_entry(path, VERSION, vars(job), recipe, FIELDS)
    for mode in MODES:
        size = recipe["n_no_note" if mode == NO_NOTE else "n_per_marker"]
        for kind in KINDS:
            digits = entry["outcomes"].get(mode, {}).get(kind)
            if not isinstance(digits, str) or len(digits) != size or set(digits) - {"0", "1"}:
                raise ResultError(f"{path}: `entry.outcomes.{mode}.{kind}` should be {size} digits. Found {digits!r}.")
    return entry
