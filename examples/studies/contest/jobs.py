"""The runs of a contest, most telling first: every entry on the few seeds, then those that are run often on the rest.

A result is a file, <out>/<labels>/<environment>/<arm>-b<base seed>-s<seed>.json; doses: <out>/<labels>/doses/<dose>/...
"""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from suite import identity

from loopholes.arms import ARMS
from loopholes.base_model import load_base
from loopholes.environment import ENVIRONMENTS
from loopholes.grpo import Recipe, train
from reporting.store import Job, read_result, write_result

from .entries import (
    BASE_SEEDS,
    DOSES,
    ENTRIES,
    FEW_BASE_SEEDS,
    FEW_SEEDS,
    SEEDS,
    TUNING_BASE_SEED,
    TUNING_SEEDS,
    Entry,
    entry_of,
)

SPECIFIC = (
    "grade", "over_routing", "kept_directions", "prompt_steps", "steering", "ablated_directions", "removed_components",
    "inoculation_steps",
)  # fmt: skip
"""Fields of the recipe that one intervention reads: results of other arms do not depend on them."""


class Run(NamedTuple):
    """One run, what it is trained with, and the folder of its result."""

    job: Job
    recipe: Recipe
    folder: Path
    entry: Entry

    @property
    def path(self) -> Path:
        return self.job.path(self.folder)

    @property
    def identity(self) -> dict[str, Any]:
        """What its result file has to agree with."""
        own = ARMS[self.job.arm].dose
        return {k: v for k, v in identity(self.recipe, None).items() if k not in SPECIFIC or k == own}

    def read(self) -> dict[str, Any]:
        """The entry of its result file; raises `ResultError` where that is of another recipe."""
        return read_result(self.path, self.job, self.identity)

    def train(self) -> None:
        """In a worker process: train, and write the result file."""
        environment = ENVIRONMENTS[self.job.env]
        model = load_base(environment, self.job.base_seed)
        # What a gate has to say about its precision is not in the report.
        with warnings.catch_warnings(action="ignore"):
            entry = train(model, environment, self.job.arm, self.job.seed, self.recipe)
        write_result(self.path, self.job, self.identity, entry)


def contest(recipe: Recipe, envs: Sequence[str], labels: Iterable[str], out: Path, *, quick: bool) -> list[Run]:
    """Every entry on the few seeds, and if not `quick`, those that are run often on all of them."""

    def runs(entries: list[Entry], pairs: list[tuple[int, int]]) -> list[Run]:
        return [
            Run(Job(env, entry.arm, base, seed), entry.recipe(recipe), out / entry.labels.replace(" ", "-"), entry)
            for base, seed in pairs
            for env in envs
            for entry in entries
        ]

    chosen = [entry for entry in ENTRIES if entry.labels in labels]
    few = [(base, seed) for base in FEW_BASE_SEEDS for seed in FEW_SEEDS]
    if quick:
        return runs(chosen, few[:1])
    rest = [(base, seed) for base in BASE_SEEDS for seed in SEEDS if (base, seed) not in few]
    return runs(chosen, few) + runs([entry for entry in chosen if entry.often], rest)


def tuning(recipe: Recipe, envs: Sequence[str], out: Path) -> list[Run]:
    """Three doses of every arm that has one, on tuning seeds."""
    runs = []
    for seed in TUNING_SEEDS:
        for env in envs:
            for (arm, labels), doses in DOSES.items():
                entry = entry_of(arm, labels)
                for dose in doses:
                    folder = out / labels.replace(" ", "-") / "doses" / f"{dose:g}"
                    job = Job(env, arm, TUNING_BASE_SEED, seed)
                    runs.append(Run(job, entry.recipe(recipe, dose), folder, entry))
    return runs
