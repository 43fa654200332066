"""Who is in the contest: each intervention at each quality of labels, with its control, and which are run often.

none       no labels, no pairs                 pairs    contrastive pairs of two of the four kinds of hacks
two kinds  true labels of these two kinds      half     labels of all kinds, each missed half of the time
all        true labels of all kinds
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from loopholes.arms import ARMS
from loopholes.grpo import Recipe

Labels = Literal["none", "pairs", "two kinds", "half", "all"]
LABELS = get_args(Labels)
SEEDS, BASE_SEEDS = (0, 1, 2, 3, 4), (0, 1)
FEW_SEEDS, FEW_BASE_SEEDS = (0, 1, 2), (0,)
TUNING_SEEDS, TUNING_BASE_SEED = (10,), 0


@dataclass(frozen=True)
class Entry:
    """An arm under labels of one quality.

    Args:
        arm: one of `loopholes.arms.ARMS`.
        labels: what it is given.
        control: the arm in which what it reads is replaced by chance, under the same labels.
        often: run on all seeds and bases, and not on the few.
    """

    arm: str
    labels: Labels
    control: str | None = None
    often: bool = False

    @property
    def is_control(self) -> bool:
        return ARMS[self.arm].is_control

    def recipe(self, recipe: Recipe, dose: float | None = None) -> Recipe:
        """`recipe` with labels as good as this entry's, at `dose`, or else at the dose that was chosen for it."""
        dose = OWN_DOSES.get((self.arm, self.labels)) if dose is None else dose
        changes: dict[str, float] = {"recall": 0.5} if self.labels == "half" else {}
        if dose is not None:
            field = ARMS[self.arm].dose
            assert field is not None
            changes[field] = dose
        return replace(recipe, **changes)


def _entries(labels: Labels, arms: dict[str, str | None], often: tuple[str, ...] = ()) -> list[Entry]:
    """An entry for each arm, given with its control, and one for each control that is not an arm of these itself."""
    named = [Entry(arm, labels, control, arm in often) for arm, control in arms.items()]
    controls = dict.fromkeys(control for control in arms.values() if control is not None and control not in arms)
    return named + [Entry(control, labels, often=control in often) for control in controls]


ENTRIES = [
    *_entries(
        "none",
        {
            "base": None, "vanilla": None, "clean": None, "post-hoc": "post-hoc-random", "likelier-alone": None,
            "explained": "explained-shuffle",
        },
        often=("base", "vanilla"),
    ),
    *_entries(
        "pairs",
        {
            "filter": "filter-shuffle", "penalty": "penalty-shuffle", "likelier": "likelier-shuffle",
            "graded": "graded-random", "graded-frozen": "graded-random", "graded-shuffle": None,
            "erase": "erase-random", "keep": "keep-random", "prompted": "prompted-random",
            "recontextualised": "recontextualised-random", "steered": "steered-random", "caft": "caft-random",
            "inoculated": "inoculated-clean", "route": "random-oriented", "shuffle": None, "route-explained": "shuffle",
        },
        often=("filter", "penalty", "graded", "graded-random", "route", "random-oriented", "shuffle"),
    ),
    *_entries(
        "two kinds",
        {
            "weak-filter": "weak-filter-shuffle", "weak-penalty": "weak-penalty-shuffle",
            "weak-likelier": "weak-likelier-shuffle", "weak": "weak-shuffle", "weak-graft": "weak-graft-shuffle",
            "weak-explained": "weak-explained-shuffle",
        },
        often=("weak-filter", "weak-penalty", "weak-likelier", "weak-explained", "weak-explained-shuffle"),
    ),
    *_entries(
        "half",
        {
            "oracle-filter": "oracle-filter-shuffle", "oracle-penalty": "oracle-penalty-shuffle",
            "oracle-likelier": "oracle-likelier-shuffle", "oracle": "oracle-shuffle", "oracle-graft": "oracle-shuffle",
            "oracle-explained": "oracle-explained-shuffle",
        },
    ),
    *_entries("all", dict.fromkeys(("oracle-filter", "oracle-penalty", "oracle", "oracle-graft"))),
]  # fmt: skip

DOSES: dict[tuple[str, Labels], tuple[float, ...]] = {
    ("post-hoc", "none"): (1, 2, 3),
    ("graded", "pairs"): (0.3, 1.0, 3.0),
    ("route", "pairs"): (0.25, 0.5, 0.75),
    ("keep", "pairs"): (2, 4, 12),
    ("prompted", "pairs"): (40, 160, 640),
    ("recontextualised", "pairs"): (40, 160, 640),
    ("steered", "pairs"): (0.5, 1.0, 2.0),
    ("caft", "pairs"): (1, 2, 8),
    ("inoculated", "pairs"): (20, 40, 160),
    ("weak-penalty", "two kinds"): (1.0, 3.0, 9.0),
    ("weak-likelier", "two kinds"): (0.5, 1.0, 2.0),
    ("weak-explained", "two kinds"): (0.5, 1.0, 2.0),
    ("weak-graft", "two kinds"): (1.0, 1.5, 2.0),
    ("oracle-graft", "half"): (1.0, 1.5, 2.0),
    ("oracle-graft", "all"): (1.0, 1.5, 2.0),
}
"""(arm, labels) -> the doses that were tried, on tuning seeds. The chosen one is the default of the recipe's field,

or stands in `OWN_DOSES`."""
OWN_DOSES: dict[tuple[str, Labels], float] = {("oracle-graft", "all"): 1.0}


def entry_of(arm: str, labels: Labels) -> Entry:
    """The entry of this arm under these labels."""
    return next(entry for entry in ENTRIES if (entry.arm, entry.labels) == (arm, labels))
