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

    def recipe(self, recipe: Recipe) -> Recipe:
        """`recipe` with labels as good as this entry's."""
        return replace(recipe, recall=0.5) if self.labels == "half" else recipe


def _entries(labels: Labels, few: dict[str, str | None], often: dict[str, str | None]) -> list[Entry]:
    both = {**{arm: (control, True) for arm, control in often.items()}, **{a: (c, False) for a, c in few.items()}}
    named = [Entry(arm, labels, control, many) for arm, (control, many) in both.items()]
    controls = {entry.control: entry.often for entry in named if entry.control not in (None, *both)}
    return named + [Entry(arm, labels, often=many) for arm, many in controls.items() if arm]


ENTRIES = [
    *_entries(
        "none",
        few={"clean": None, "post-hoc": "post-hoc-random", "likelier-alone": None, "explained": "explained-shuffle"},
        often={"base": None, "vanilla": None},
    ),
    *_entries(
        "pairs",
        few={
            "likelier": None, "erase": "erase-random", "keep": "keep-random", "prompted": "prompted-random",
            "recontextualised": "recontextualised-random", "steered": "steered-random", "caft": "caft-random",
            "inoculated": "inoculated-clean", "route-explained": "shuffle", "graded": "graded-random",
            "graded-frozen": "graded-random",
        },
        often={"filter": "filter-shuffle", "penalty": None, "route": "random-oriented", "shuffle": None},
    ),
    Entry("graded-shuffle", "pairs"),
    *_entries(
        "two kinds",
        few={"weak": "weak-shuffle", "weak-graft": "weak-graft-shuffle"},
        often={
            "weak-filter": None, "weak-penalty": None, "weak-likelier": None,
            "weak-explained": "weak-explained-shuffle",
        },
    ),
    *_entries(
        "half",
        few={
            "oracle-filter": None, "oracle-penalty": None, "oracle-likelier": None, "oracle": "oracle-shuffle",
            "oracle-graft": "oracle-shuffle", "oracle-explained": "oracle-explained-shuffle",
        },
        often={},
    ),
    *_entries("all", few=dict.fromkeys(("oracle-filter", "oracle-penalty", "oracle", "oracle-graft")), often={}),
]  # fmt: skip

DOSES: dict[str, tuple[float, ...]] = {
    "graded": (0.3, 1.0, 3.0),
    "weak-penalty": (1.0, 3.0, 9.0),
    "weak-likelier": (0.5, 1.0, 2.0),
    "weak-explained": (0.5, 1.0, 2.0),
    "weak-graft": (1.0, 1.5, 2.0),
    "route": (0.25, 0.5, 0.75),
    "keep": (2, 4, 12),
    "prompted": (40, 160, 640),
    "recontextualised": (40, 160, 640),
    "steered": (0.5, 1.0, 2.0),
    "caft": (1, 2, 8),
    "inoculated": (20, 40, 160),
    "post-hoc": (1, 2, 3),
}
"""Arm -> the doses that it was tried with, on tuning seeds. What was chosen is the default of the recipe's field."""


def dosed(recipe: Recipe, arm: str, dose: float) -> Recipe:
    """`recipe` with this dose of the arm's intervention."""
    field = ARMS[arm].dose
    assert field is not None
    return replace(recipe, **{field: dose})
