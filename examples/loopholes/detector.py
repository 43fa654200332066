"""What a run has instead of labels: directions from pairs of the monitored modes, and the gate or filter on them."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

import gradroute as gr

from .arm import Arm
from .environment import Environment
from .pairs import monitored_pairs
from .sampling import captured, captured_gradients
from .trusted import CleanSubspace

ScoreView = Literal["ablated", "sampled"]
SCORE_VIEWS = get_args(ScoreView)
"""Rollouts are scored as the model would be deployed, or each in the view that it was sampled in."""


class Detector:
    """Directions of what `arm` reads, kept fresh if it says so, with the gate that flags or the filter that removes.

    Args:
        threshold: of the gate or the filter of rollouts; z = 0 is where clean pairs lie, z = 1 where hack pairs lie.
        refresh_every: optimizer steps between refreshes.
        score_view: of activations; directions are of the deployed view in both, and so are scores of gradients.
        kept_directions: rows per module of a filter that keeps a subspace.
    """

    def __init__(
        self,
        model: nn.Module,
        environment: Environment,
        arm: Arm,
        seed: int,
        *,
        pairs_per_mode: int,
        threshold: float,
        refresh_every: int,
        score_view: ScoreView = "ablated",
        kept_directions: int = 1,
    ) -> None:
        pairs = monitored_pairs(environment, pairs_per_mode, seed)

        def extract() -> gr.Directions:
            with gr.ablate_quarantine(model):
                if arm.directions == "activation":
                    return gr.extract_activation_directions(model, pairs)
                # The bottleneck gradient of LoRA is zero while B is; that of a gain is not.
                features = "parameter" if arm.parametrization == "lora" else "bottleneck"
                trusted = CleanSubspace(k=kept_directions)
                estimator = trusted if arm.gradient_filter == "keep" else gr.directions.estimators.MeanDifference()
                found = gr.extract_gradient_directions(model, pairs, features=features, estimator=estimator)
            return of_unit_length(found) if arm.cosine else found

        self.model, self.arm, self.directions, self.extract = model, arm, extract(), extract
        self._score_view = score_view
        if arm.random_direction != "no":
            self.directions = self.directions.random_like(seed, oriented=arm.random_direction == "oriented")
        self.refresher = None
        if arm.refreshed:
            self.refresher = gr.Refresher(self.directions, extract, model=model, every=refresh_every)
        self.gate = self.filter = None
        if arm.has_gate:
            self.gate = gr.BandGate(self.directions, threshold=threshold)
        elif arm.gradient_filter == "rollouts":
            self.filter = rollouts = gr.RolloutFilter(
                self.directions, lambda scores: beyond(threshold, scores, rollouts)
            )
        else:
            side = "two" if arm.gradient_filter == "keep" else "one"
            self.filter = gr.ProjectionFilter(self.directions, mode=arm.gradient_filter, side=side)
        self.first = copy.deepcopy(self.directions)

    def scores(
        self, prompts: Tensor, completions: Tensor, ablated: Tensor, *, by: gr.Directions | None = None
    ) -> Tensor:
        """Score of each rollout by the directions in use, or by others alike; `ablated` rollouts were sampled so."""
        by = self.directions if by is None else by
        if self.arm.directions == "activation":
            if self._score_view == "ablated":
                return by.score(captured(self.model, prompts, completions))
            capture = captured(self.model, prompts, completions, ablated)
            return by.score(capture, view=capture.view)
        if self.arm.cosine:
            return by.score(unit_length(captured_gradients(self.model, prompts, completions, None)))
        return by.score(captured_gradients(self.model, prompts, completions, by))

    @contextmanager
    def filtering(self, sources: Sequence[str] | None) -> Iterator[list[gr.filters.FilterStats]]:
        """Around forward and backward: filters the gradients at the end; what was done is in the list.

        With `sources`, a label per rollout, hack-ward shares are told apart by them; only measured, where the filter
        does not see rollouts or a gate has decided already. Directions of activations have no such share.
        """
        stats: list[gr.filters.FilterStats] = []
        by_rollout = self.filter if isinstance(self.filter, gr.RolloutFilter) else None
        if by_rollout is None and sources is not None and self.directions.provenance.source == "gradient":
            by_rollout = gr.RolloutFilter(self.directions, math.inf)
        if by_rollout is None:
            yield stats
        else:
            with by_rollout.record(self.model, sources=sources):
                yield stats
            stats.append(gr.apply_filter(self.model, by_rollout))
        if self.filter is not None and self.filter is not by_rollout:
            stats.append(gr.apply_filter(self.model, self.filter))


def unit_length(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """f / |f|, with the length of a row over all modules."""
    length = torch.stack([f.square().sum(1) for f in features.values()]).sum(0).sqrt()[:, None]
    return {name: f / length.clamp(min=torch.finfo(f.dtype).tiny) for name, f in features.items()}


def of_unit_length(found: gr.Directions) -> gr.Directions:
    """The mean difference of the same pairs, each side divided by its length: scores are cosines, up to scale."""
    hack, clean = unit_length(found.hack), unit_length(found.clean)
    rows = gr.directions.estimators.MeanDifference()(hack, clean).rows
    return gr.Directions(rows, hack, clean, found.provenance)


def beyond(threshold: float, scores: Tensor, rollouts: gr.RolloutFilter) -> Tensor:
    """Which scores have z above the threshold. The pairs are scored again each time: each refresh moves them."""
    hack, clean = (pairs.mean() for pairs in rollouts.pair_scores())
    return (scores - clean) / (hack - clean) > threshold
