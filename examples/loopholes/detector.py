"""What a run has instead of labels: directions from pairs of the monitored modes, and the gate or filter on them."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

import gradroute as gr

from .arms import Arm
from .environment import MONITORED, Environment
from .sampling import captured, captured_gradients


class Detector:
    """Directions of what `arm` reads, kept fresh if it says so, with the gate that flags or the filter that removes.

    Args:
        threshold: of the gate or the filter of rollouts; z = 0 is where clean pairs lie, z = 1 where hack pairs lie.
        refresh_every: optimizer steps between refreshes.
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
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        triples = environment.contrastive_pairs(MONITORED, pairs_per_mode, generator)
        pairs = [gr.ContrastivePair(*triple) for triple in triples]

        def extract() -> gr.Directions:
            if arm.directions == "activation":
                return gr.extract_activation_directions(model, pairs)
            # The bottleneck gradient of LoRA is zero while B is; that of a gain is not.
            features = "parameter" if arm.parametrization == "lora" else "bottleneck"
            return gr.extract_gradient_directions(model, pairs, features=features)

        self.model, self.arm, self.directions = model, arm, extract()
        if arm.random_direction:
            self.directions = self.directions.random_like(seed)
        self.refresher = None
        if arm.refreshed:
            self.refresher = gr.Refresher(self.directions, extract, model=model, every=refresh_every)
        self.gate = self.filter = None
        if arm.flags in ("gate", "permuted"):
            self.gate = gr.BandGate.calibrate(self.directions, threshold=threshold)
        elif arm.gradient_filter == "rollouts":
            self.filter = rollouts = gr.RolloutFilter(
                self.directions, lambda scores: beyond(threshold, scores, rollouts)
            )
        else:
            assert arm.gradient_filter != "none"
            self.filter = gr.ProjectionFilter(self.directions, mode=arm.gradient_filter)

    def flags(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """Which rollouts look like hacks; none where a filter decides."""
        if self.gate is None:
            return torch.zeros(len(prompts), dtype=torch.bool)
        if self.arm.directions == "activation":
            capture = captured(self.model, prompts, completions)
        else:
            capture = captured_gradients(self.model, prompts, completions, self.directions)
        return self.gate.flags(self.directions.score(capture))

    def recording(self) -> AbstractContextManager[object]:
        """To be entered around forward and backward."""
        return self.filter.record(self.model) if isinstance(self.filter, gr.RolloutFilter) else nullcontext()

    def filtered(self) -> gr.FilterStats | None:
        """Filter the gradients; None where a gate has decided already."""
        return None if self.filter is None else gr.apply_filter(self.model, self.filter)


def beyond(threshold: float, scores: Tensor, rollouts: gr.RolloutFilter) -> Tensor:
    """Which scores have z above the threshold; where the pairs lie is read anew, for they move with each refresh."""
    hack, clean = (pairs.mean() for pairs in rollouts.pair_scores())
    return (scores - clean) / (hack - clean) > threshold
