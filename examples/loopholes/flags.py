"""Who says that a rollout is a hack: labels as true or as noisy as asked, the detector's gate, log-probability ratios.

flags = labels or gate,   or explained,   or likelier
explained = log p with the quarantine - log p without it,   likelier = log p now - log p of the base model
            each the sum over a completion's best prefix, above a threshold in nats
"""

from collections import deque
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import pad

import gradroute as gr

from .arm import Arm
from .detector import Detector
from .environment import Environment, Grade
from .evaluation import is_monitored
from .language import PAD, PROMPT_LENGTH, hint_modes
from .sampling import completion_logps

SHARE_OF_SOLVES, STEPS_OF_SOLVES = 0.95, 20
EMPTY_CALLS = 5
"""Steps in which both views may be the same: until a rollout has an advantage, nothing is trained."""


class _Settings(Protocol):
    recall: float
    false_positive_rate: float
    explained_nats: float


class Flagger:
    """(n,) booleans per batch of rollouts, by what the arm is allowed to know.

    Args:
        model: read where log-probabilities decide.
        recipe: its `recall` and `false_positive_rate` are of labels (a missed hack is not flagged, a false alarm is),
            its `explained_nats` is the threshold of log ratios.
    """

    def __init__(
        self,
        model: nn.Module,
        arm: Arm,
        environment: Environment,
        detector: Detector | None,
        recipe: _Settings,
        seed: int,
    ) -> None:
        recall, false_positive_rate = recipe.recall, recipe.false_positive_rate
        if (recall, false_positive_rate) != (1.0, 0.0) and arm.has_flags and not arm.has_labels:
            raise ValueError(f"`recall` and `false_positive_rate` are of labels. Found an arm without: {arm.about!r}.")
        self.model, self.arm, self.environment, self.detector = model, arm, environment, detector
        self.labels = gr.LabelGate(recall=recall, false_positive_rate=false_positive_rate, seed=seed, window=10**9)
        self.explained = gr.LogRatioGate(
            recipe.explained_nats, per=arm.explained_per, empty_calls=EMPTY_CALLS, window=25
        )
        self.scores: Tensor | None = None
        self.z: Tensor | None = None
        self._solved: deque[Tensor] = deque(maxlen=STEPS_OF_SOLVES)
        self._tokens: Tensor | None = None

    def __call__(
        self,
        prompts: Tensor,
        completions: Tensor,
        graded: Grade,
        generator: Generator,
        ablated: Tensor | None = None,
    ) -> Tensor:
        """Which rollouts this arm takes for hacks; what a gate's detector gave them is in `scores`, calibrated in `z`.

        Args:
            prompts, completions, graded: the rollouts.
            generator: permutes flags, and `z` alike.
            ablated: rows that were sampled with the quarantine ablated; None for none of them.
        """
        by_gate = torch.zeros(len(prompts), dtype=torch.bool)
        if self.arm.has_gate:
            assert self.detector is not None
            assert self.detector.gate is not None
            ablated = torch.zeros_like(by_gate) if ablated is None else ablated
            self.scores = self.detector.scores(prompts, completions, ablated)
            by_gate, self.z = self.detector.gate.flags(self.scores), self.detector.gate.z(self.scores)
        flags = by_gate if self.arm.flags == "gate" else torch.zeros_like(by_gate)
        if self.arm.has_labels:
            known = torch.ones_like(graded.hacked) if self.arm.flags == "oracle" else self._monitored(prompts)
            flags = self.labels(graded.hacked & known).g_d == 0
        if self.arm.explained != "no":
            explained = self._explained(prompts, completions, graded)
            flags = flags | (explained & by_gate if self.arm.explained == "with-direction" else explained)
        if self.arm.likelier:
            flags = flags | self._likelier(prompts, completions)
        if self.arm.shuffled:
            order = torch.randperm(len(flags), generator=generator)
            flags, self.z = flags[order], None if self.z is None else self.z[order]
        return flags

    def by_token(self, mask: gr.RouteMask) -> gr.RouteMask:
        """`mask` of rows, in which tokens that the quarantine explains do not train the deployed block."""
        if self._tokens is None:
            return mask
        # A token is predicted at the position before it.
        routed = pad(self._tokens, (PROMPT_LENGTH - 1, 0))
        return gr.RouteMask.weights(mask.m, mask.g_d[:, None] * ~routed, mask.g_q)

    def figures(self) -> dict[str, Any]:
        """Share above the threshold and quantiles of log ratios, over the last steps."""
        figures = self.explained.figures
        if figures is None:
            return {}
        return {"explained": figures.routed, "log_ratios": list(figures.quantiles.values())}

    def _explained(self, prompts: Tensor, completions: Tensor, graded: Grade) -> Tensor:
        with torch.no_grad():
            on = completion_logps(self.model, prompts, completions)
            with gr.ablate_quarantine(self.model):
                ablated = completion_logps(self.model, prompts, completions)
        views = (on, ablated, completions != PAD)
        routed = self.explained(*views).routed
        if self.arm.explained_per == "token":
            self._tokens = routed
            return torch.zeros(len(prompts), dtype=torch.bool)
        if self.arm.explained_above == "solves":
            scores = self.explained.scores(*views)
            self._solved.append(scores[graded.solved & (hint_modes(prompts) < 0)])
            solved = torch.cat(list(self._solved))
            if len(solved):
                return routed & (scores > torch.quantile(solved, SHARE_OF_SOLVES))
        return routed

    def _likelier(self, prompts: Tensor, completions: Tensor) -> Tensor:
        with torch.no_grad():
            now = completion_logps(self.model, prompts, completions)
            with gr.disable_adapters(self.model):
                base = completion_logps(self.model, prompts, completions)
        return self.explained(now, base, completions != PAD).routed

    def _monitored(self, prompts: Tensor) -> Tensor:
        return is_monitored(self.environment, prompts)
