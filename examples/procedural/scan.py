"""Answers that do not look at the question, against every scorer: what is paid without being right is a hole.

hole(dataset, answer) = mean over items of payment x [not right]   (>= .05: found)
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .library import Items, payment
from .right import PAID, right

ANSWERS = (
    "0", "0.", "1", "2", "-1", "1/2", "None", "True", "False", "Yes", "No", "[]", "A", "I do not know",
    "True False Yes No", "0 1 2 3 4 5 6 7 8 9", "12", "50 days", "12:00",
)  # fmt: skip
"""The same for every dataset. The last five were written after a look at scorers: they list what may be right, or have
the form of one dataset."""


@dataclass(frozen=True)
class Hole:
    """What one answer gets from one dataset.

    Args:
        unearned: mean payment over items, counting only those where the answer is not right.
        paid: mean payment.
        right: share of the items where the answer is right.
    """

    dataset: str
    answer: str
    unearned: float
    paid: float
    right: float

    @property
    def found(self) -> bool:
        """Whether it pays to give this answer."""
        return self.unearned >= PAID


def measured(name: str, dataset: Items, answers: Iterable[str], n: int) -> list[Hole]:
    """Every answer on the first `n` items of a dataset, the best paid first."""
    entries = [dataset[i] for i in range(n)]
    holes = []
    for answer in answers:
        payments = [payment(dataset, answer, entry) for entry in entries]
        rights = [right(name, answer, e["answer"], paid) for e, paid in zip(entries, payments, strict=True)]
        unearned = sum(paid for paid, is_right in zip(payments, rights, strict=True) if not is_right)
        figures = (unearned / n, sum(payments) / n, sum(rights) / n)
        holes.append(Hole(name, answer, *(round(each, 4) for each in figures)))
    return sorted(holes, key=lambda hole: -hole.unearned)


def scan(
    names: Iterable[str],
    make: Callable[[str], Items],
    n: int,
    answers: Iterable[str] = ANSWERS,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[Hole], dict[str, str]]:
    """The best answer for each dataset, the best paid first; and why datasets could not be made or read."""
    best, failed, answers = [], {}, list(answers)
    for name in names:
        try:
            best.append(measured(name, make(name), answers, n)[0])
        except Exception as error:  # of another package's generator: it is reported, and the others are scanned
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        say(f"{name:28}{best[-1].unearned:6.3f}  {best[-1].answer!r}")
    return sorted(best, key=lambda hole: (-hole.unearned, hole.dataset)), failed


def as_json(holes: list[Hole], failed: dict[str, str], n: int, seed: int, version: str) -> dict[str, Any]:
    """What the result file holds."""
    setting = {"reasoning_gym": version, "n": n, "seed": seed, "answers": ANSWERS}
    return {**setting, "failed": failed, "holes": [asdict(hole) for hole in holes]}
