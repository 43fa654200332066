"""The scorer's payment as TRL's reward, and what an arm makes of the monitored tasks' hacks.

flagged = hacked, in a monitored task
dropped: reward = mean of the group's other rewards where flagged: its advantage is 0, and it is in no baseline
penalised: reward = payment - PENALTY where flagged
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from datasets import Dataset
from einops import rearrange

from .measure import figures
from .tasks import Drawn, Graded

Flagged = Literal["kept", "dropped", "penalised"]
PENALTY = 2.0


def rows(questions: Sequence[Drawn]) -> Dataset:
    """TRL's columns: the prompt, and which question it is."""
    return Dataset.from_list([{"prompt": question.prompt, "question": i} for i, question in enumerate(questions)])


class Reward:
    """A reward function of TRL, and a detector of the monitored tasks' hacks.

    Args:
        questions: those of `rows`.
        group_size: completions of one prompt, which TRL passes one after the other.
        flagged: what becomes of the reward of flagged completions.
    """

    def __init__(self, questions: Sequence[Drawn], group_size: int, flagged: Flagged = "kept") -> None:
        self.questions, self.group_size, self.flagged = questions, group_size, flagged
        self.curve: list[dict[str, Any]] = []
        self.__name__ = "payment"  # TRL logs a reward under its name

    def graded(self, completions: Sequence[str], question: Sequence[int]) -> list[Graded]:
        """What each completion gets."""
        return [self.questions[i].graded(text) for i, text in zip(question, completions, strict=True)]

    def monitored_hacks(self, completions: Sequence[str], question: Sequence[int], **_: Any) -> list[bool]:
        """What a monitor of two of the tasks reports."""
        graded = self.graded(completions, question)
        return [
            each.hacked and self.questions[i].task.kind == "monitored" for each, i in zip(graded, question, strict=True)
        ]

    def __call__(self, completions: Sequence[str], question: Sequence[int], **_: Any) -> list[float]:
        """The rewards; figures of this batch are added to `curve`."""
        graded = self.graded(completions, question)
        by_kind: dict[str, list[Graded]] = {}
        for each, i in zip(graded, question, strict=True):
            by_kind.setdefault(self.questions[i].task.kind, []).append(each)
        self.curve.append({kind: figures(found) for kind, found in by_kind.items()})
        paid = torch.tensor([each.paid for each in graded])
        if self.flagged == "kept":
            return paid.tolist()
        flags = torch.tensor(self.monitored_hacks(completions, question))
        if self.flagged == "penalised":
            return (paid - PENALTY * flags).tolist()
        return dropped(paid, flags, self.group_size).tolist()


def dropped(paid: torch.Tensor, flags: torch.Tensor, group_size: int) -> torch.Tensor:
    """`paid`, with the mean of the group's unflagged rewards where flagged; 0 in a group that is flagged as a whole."""
    groups, flagged = (rearrange(each, "(p g) -> p g", g=group_size) for each in (paid, flags))
    kept = (groups * ~flagged).sum(1, keepdim=True) / (~flagged).sum(1, keepdim=True).clamp(min=1)
    return rearrange(torch.where(flagged, kept, groups), "p g -> (p g)")
