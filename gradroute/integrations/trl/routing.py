"""What a run routes by: `Routing`, made of the trainer's keywords; and directions that are extracted from pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gradroute.directions.directions import Directions
from gradroute.directions.extract import extract_activation_directions
from gradroute.directions.load import holds_messages, load_pairs
from gradroute.directions.pairs import ContrastivePair
from gradroute.filters.base import GradientFilter
from gradroute.filters.rollout import RolloutFilter
from gradroute.gates.base import Gate
from gradroute.gates.log_ratio import LogRatioGate
from gradroute.refresh.refresher import Refresher

Detector = Callable[..., Any]


@dataclass
class Routing:
    """`trainer.routing`: what the run routes by, resolved from the trainer's keywords and checked against each other.

    Args:
        gate: decides over rollouts before their backward; None with a filter, or a gate on log ratios, alone.
        directions: what rollouts are scored with, or the filter reads.
        refresher: keeps the directions fresh; None where they stay as they were extracted.
        filter: of the gradients, once per optimizer step.
        detector: called like a reward function; returns flags or scores.
        detector_recall: share of hacks that it flags; None where that is not known.
        log_ratio_gate: routes, beside the gate or alone, rollouts that the quarantine explains.
        score_view: the state in which rollouts are scored by directions: "sampled" or "ablated".
        clean_baseline: whether the deployed block's advantages are relative to unflagged rollouts.
        ablated_per_group: how many rollouts of a group are sampled without the quarantine.
    """

    gate: Gate | None
    directions: Directions | None
    refresher: Refresher | None
    filter: GradientFilter | None
    detector: Detector | None
    detector_recall: float | None
    log_ratio_gate: LogRatioGate | None
    score_view: str
    clean_baseline: bool
    ablated_per_group: int

    @property
    def detector_scores(self) -> bool:
        """Whether the detector returns scores and not flags: for a gate that reads scores and holds no directions."""
        return self.detector is not None and self.gate is not None and reads_given_scores(self.gate)

    @property
    def detector_decides(self) -> bool:
        """Whether the gate is called with the detector's answers."""
        return self.detector_scores or (self.gate is not None and self.gate.reads == "flags")

    @property
    def reads_features(self) -> bool:
        """Whether the gate is called with features of rollouts, or with their scores by directions."""
        return self.gate is not None and not self.detector_decides

    @property
    def flags_before_backward(self) -> bool:
        """Whether some gate decides over rollouts before their backward."""
        return self.gate is not None or self.log_ratio_gate is not None

    @property
    def by_rollout(self) -> RolloutFilter | None:
        """The filter, if it decides on whole rollouts and has to see their backward."""
        return self.filter if isinstance(self.filter, RolloutFilter) else None

    @property
    def all_directions(self) -> list[Directions]:
        """Each `Directions` that a checkpoint has to carry, once."""
        held = [self.directions, *(getattr(each, "directions", None) for each in (self.gate, self.filter))]
        return list({id(each): each for each in held if each is not None}.values())


def reads_given_scores(gate: Gate) -> bool:
    """Whether `gate` takes scores of whatever origin: a `ThresholdGate`, and not a gate that holds directions."""
    return gate.reads == "scores" and gate.directions is None


def directions_from(
    pairs: str | Path | Sequence[ContrastivePair], tokenizer: Any, **options: Any
) -> Callable[[nn.Module], Directions]:
    """For `directions=`: model -> `extract_activation_directions(model, load_pairs(pairs), tokenizer=..., ...)`.

    Args:
        pairs: a file of texts, token ids or chat messages, which is read now; or pairs, such as those that
            `load_pairs` makes of chat messages with `chat_template_kwargs`.
        tokenizer, options: as the extractor takes them. Messages become token ids by the tokenizer's chat template.

    The trainer calls the function with the quarantine ablated, which is the view that it scores rollouts in.
    """
    loaded = pairs_in(pairs, tokenizer) if isinstance(pairs, str | Path) else pairs
    return lambda model: extract_activation_directions(model, loaded, tokenizer=tokenizer, **options)


def pairs_in(file: str | Path, tokenizer: Any, **options: Any) -> list[ContrastivePair]:
    """The pairs of a file, whose chat messages, if it has some, become token ids."""
    return load_pairs(file, tokenizer=tokenizer, **options) if holds_messages(Path(file)) else load_pairs(file)
