"""Who says that a rollout is a hack: labels, the gate on directions, or ratios of log-probabilities.

flags = labels or gate,   or explained,   or likelier
explained = log p with the quarantine - log p without it,   likelier = log p now - log p of the base model
            each the sum over a reply's best prefix, above a threshold in nats
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor
from transformers import LlamaForCausalLM

import gradroute as gr
from loopholes.arm import Arm

from .batch import Batch
from .detector import Detector
from .rollouts import Prefixes, Rollouts, read_prompts, token_logps

EMPTY_CALLS = 5
"""Steps in which both views may be the same: until one has an advantage, nothing is trained."""


class Flagger:
    """Which rollouts of a step the arm takes for hacks, and the scores that told it; a gate's are calibrated in `z`.

    Args:
        model: read where log-probabilities decide.
        detector: of an arm with a gate on directions.
        nats: threshold of log ratios.
    """

    def __init__(self, model: LlamaForCausalLM, arm: Arm, detector: Detector | None, nats: float) -> None:
        self.model, self.arm, self.detector = model, arm, detector
        self.ratios = gr.LogRatioGate(nats, empty_calls=EMPTY_CALLS, window=25)
        self.z: Tensor | None = None

    def __call__(
        self,
        batch: Batch,
        prompts: Sequence[Sequence[int]],
        prefixes: Prefixes,
        rollouts: Rollouts,
        generator: Generator,
    ) -> tuple[Tensor, Tensor | None]:
        """((rows,) flags, (rows,) scores or None in arms with labels alone).

        Args:
            prompts: of the step, as token ids.
            prefixes: of them as they are, then with the quarantine ablated.
            rollouts: of prefixes of both kinds.
        """
        flags, scores = torch.zeros_like(batch.hacked), None
        on, ablated = (replace(rollouts, prefix=rollouts.prefix % len(prompts) + n) for n in (0, len(prompts)))
        if self.arm.has_labels:
            flags = batch.hacked if self.arm.flags == "oracle" else batch.hacked & batch.monitored
        if self.detector is not None:
            scores = self.detector.scores(prefixes, rollouts)
            flags, self.z = self.detector.gate.flags(scores), self.detector.gate.z(scores)
        if self.arm.explained != "no" or self.arm.likelier:
            found, present = token_logps(self.model, prefixes, on)
            other = self._ablated(prefixes, ablated) if self.arm.explained != "no" else self._base(prompts, on)
            scores = self.ratios.scores(found, other, present)
            flags = flags | self.ratios(found, other, present).routed
        if self.arm.shuffled:
            order = torch.randperm(len(flags), generator=generator)
            flags, self.z = flags[order], None if self.z is None else self.z[order]
        return flags, scores

    def _ablated(self, prefixes: Prefixes, rollouts: Rollouts) -> Tensor:
        with gr.ablate_quarantine(self.model):
            return token_logps(self.model, prefixes, rollouts)[0]

    def _base(self, prompts: Sequence[Sequence[int]], rollouts: Rollouts) -> Tensor:
        with gr.disable_adapters(self.model):
            return token_logps(self.model, read_prompts(self.model, prompts, both_views=False), rollouts)[0]
