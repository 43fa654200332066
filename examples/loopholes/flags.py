"""Who says that a rollout is a hack: nobody, labels as true or as noisy as asked, or the detector's gate."""

import torch
from torch import Generator, Tensor

import gradroute as gr

from .arms import Arm
from .detector import Detector
from .environment import Environment, Grade
from .evaluation import is_monitored


class Flagger:
    """(n,) booleans per batch of rollouts, by what the arm is allowed to know.

    Args:
        recall, false_positive_rate: of labels; a missed hack is not flagged, a false alarm is.
    """

    def __init__(
        self,
        arm: Arm,
        environment: Environment,
        detector: Detector | None,
        recall: float,
        false_positive_rate: float,
        seed: int,
    ) -> None:
        if (recall, false_positive_rate) != (1.0, 0.0) and not arm.has_labels:
            raise ValueError(f"`recall` and `false_positive_rate` are of labels. Found an arm without: {arm.about!r}.")
        self.arm, self.environment, self.detector = arm, environment, detector
        self.labels = gr.LabelGate(recall=recall, false_positive_rate=false_positive_rate, seed=seed, window=10**9)

    def __call__(self, prompts: Tensor, completions: Tensor, graded: Grade, generator: Generator) -> Tensor:
        """Which rollouts this arm takes for hacks."""
        if self.arm.has_labels:
            known = torch.ones_like(graded.hacked) if self.arm.flags == "oracle" else self._monitored(prompts)
            return self.labels(graded.hacked & known).g_d == 0
        if not self.arm.has_gate:
            return torch.zeros(len(prompts), dtype=torch.bool)
        assert self.detector is not None
        assert self.detector.gate is not None
        flags = self.detector.gate.flags(self.detector.scores(prompts, completions))
        return flags[torch.randperm(len(flags), generator=generator)] if self.arm.flags == "permuted" else flags

    def _monitored(self, prompts: Tensor) -> Tensor:
        return is_monitored(self.environment, prompts)
