"""What the rollouts of a step turned out to be, and the counts that its record keeps."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopholes.measurements import auroc

from .environment import Prompt, grade, is_monitored
from .rollouts import Rollouts
from .text import Codec


@dataclass(frozen=True)
class Batch:
    """What the rollouts of a step are, (rows,) each."""

    reward: Tensor
    hacked: Tensor
    solved: Tensor
    noted: Tensor
    monitored: Tensor

    @staticmethod
    def graded(codec: Codec, prompts: list[Prompt], prefix: Tensor, rollouts: Rollouts) -> "Batch":
        """Decode and grade."""
        own = [prompts[i] for i in prefix.tolist()]
        replies = [codec.decode(ids[:n].tolist()) for ids, n in zip(rollouts.tokens, rollouts.length, strict=True)]
        grades = [grade(prompt, reply) for prompt, reply in zip(own, replies, strict=True)]
        return Batch(
            torch.tensor([g.reward for g in grades]),
            torch.tensor([g.hacked for g in grades]),
            torch.tensor([g.solved for g in grades]),
            torch.tensor([prompt.marker is not None for prompt in own]),
            torch.tensor(is_monitored(own)),
        )

    def counts(self, ablated: Tensor, flags: Tensor | None, scores: Tensor | None) -> dict[str, Any]:
        """[hits, rows] of each rate in this step, and the AUROC of the scores where both classes occur."""
        groups = {"monitored": self.monitored, "held_out": self.noted & ~self.monitored}
        found: dict[str, Any] = {}
        for name, rows in groups.items():
            for view, chosen in (("on", ~ablated), ("ablated", ablated)):
                found[f"hack_{view}_{name}"] = _count(self.hacked, rows & chosen)
            if flags is not None:
                found[f"flagged_{name}"] = _count(flags, rows & self.hacked)
            both = rows & self.hacked | ~self.hacked
            if scores is not None and (rows & self.hacked).any() and not self.hacked.all():
                found[f"auroc_{name}"] = round(auroc(scores[both], self.hacked[both]), 4)
        for view, chosen in (("on", ~ablated), ("ablated", ablated)):
            found[f"solve_{view}_no_note"] = _count(self.solved, ~self.noted & chosen)
        if flags is not None:
            found["flagged_clean"] = _count(flags, ~self.hacked)
        return found


def _count(hits: Tensor, rows: Tensor) -> list[int]:
    return [int((hits & rows).sum()), int(rows.sum())]
