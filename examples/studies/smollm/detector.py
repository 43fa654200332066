"""Directions from pairs of the monitored markers, the gate on them, and their scores of rollouts."""

import copy
from dataclasses import replace
from random import Random
from typing import Any

from torch import Tensor
from transformers import LlamaForCausalLM

import gradroute as gr
from loopholes.arm import Arm
from loopholes.detector import ScoreView
from loopholes.measurements import auroc

from .environment import Environment
from .rollouts import Prefixes, Rollouts, captured, computing
from .text import Codec, prompt_ids, reply_ids


def token_pairs(environment: Environment, codec: Codec, per_marker: int, seed: int) -> list[gr.ContrastivePair]:
    """The environment's pairs as token ids; both replies with their end, as rollouts have it."""
    return [
        gr.ContrastivePair(
            prompt_ids(codec, hacked.text),
            reply_ids(codec, hack),
            reply_ids(codec, clean),
            clean_prompt=prompt_ids(codec, solved.text),
        )
        for hacked, hack, solved, clean in environment.pairs(Random(seed), per_marker)
    ]


def modules_read(model: LlamaForCausalLM, environment: Environment) -> list[str]:
    """The routed layers that directions are read from."""
    routed = [name for name, module in model.named_modules() if isinstance(module, gr.QuarantineLoRA)]
    return [name for name in routed if name.endswith(environment.modules)]


def extract(model: LlamaForCausalLM, pairs: list[gr.ContrastivePair], environment: Environment) -> gr.Directions:
    """Mean differences, with the quarantine ablated; without the head, which is not read."""

    def body(_: Any, input_ids: Tensor, attention_mask: Tensor) -> Any:
        with computing(model):
            return model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    modules = modules_read(model, environment)
    with gr.ablate_quarantine(model):
        return gr.extract_activation_directions(
            model, pairs, features=environment.features, modules=modules, forward_fn=body
        )


class Detector:
    """What an arm with a gate has instead of labels.

    Args:
        seed: of the pairs.
        draw: of a random direction's rows, in arms that have one.
        threshold: of the gate; z = 0 is where clean pairs lie, z = 1 where hack pairs lie.
        every: optimizer steps between refreshes.
        score_view: rollouts are scored as the model would be deployed, or each in the view that it was sampled in.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        pairs: list[gr.ContrastivePair],
        environment: Environment,
        arm: Arm,
        draw: int,
        *,
        threshold: float,
        every: int,
        score_view: ScoreView,
    ) -> None:
        self.model, self.environment, self.directions = model, environment, extract(model, pairs, environment)
        self.score_view = score_view
        if arm.random_direction != "no":
            self.directions = self.directions.random_like(draw, oriented=arm.random_direction == "oriented")
        self.gate = gr.BandGate(self.directions, threshold=threshold)
        self.first, self.every, self.refresher = copy.deepcopy(self.directions), every, None
        self.extract = lambda: extract(model, pairs, environment)
        if arm.refreshed:
            self.refresher = gr.Refresher(self.directions, self.extract, model=model, every=every)
        self.drifts = arm.random_direction == "no"

    def scores(self, prefixes: Prefixes, rollouts: Rollouts) -> Tensor:
        """Score of each rollout; `prefixes` are of prompts as they are, then ablated, and `rollouts` of either."""
        return self.directions.score(self._features(prefixes, rollouts))

    def drift(self, step: int, prefixes: Prefixes, rollouts: Rollouts, hacked: Tensor) -> dict[str, float]:
        """Every `every` steps: overlap of fresh directions with the first ones, and AUROC of `hacked` by both.

        Empty in other steps, and of random rows, which are not extracted.
        """
        if not self.drifts or step % self.every:
            return {}
        fresh, features = self.extract(), self._features(prefixes, rollouts)
        found = {"overlap_first": round(self.first.overlap(fresh), 4)}
        if hacked.any() and not hacked.all():
            found |= {
                f"auroc_{name}": round(auroc(by.score(features), hacked), 4)
                for name, by in (("first", self.first), ("fresh", fresh))
            }
        return found

    def _features(self, prefixes: Prefixes, rollouts: Rollouts) -> dict[str, Tensor]:
        modules, read = modules_read(self.model, self.environment), self.environment.features
        prompts = len(prefixes.last) // 2
        if self.score_view == "sampled":
            return captured(self.model, prefixes, rollouts, read, modules, ablated=rollouts.prefix >= prompts)
        with gr.ablate_quarantine(self.model):
            deployed = replace(rollouts, prefix=rollouts.prefix % prompts + prompts)
            return captured(self.model, prefixes, deployed, read, modules, ablated=None)
