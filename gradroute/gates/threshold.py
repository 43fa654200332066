"""From scores on a fixed scale, such as a classifier's, to a mask: s >= threshold -> route, else `below`."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from gradroute._checks import finite_number, one_of
from gradroute._state_dict import State
from gradroute.adapters.mask import RouteMask
from gradroute.gates.base import BELOW, Below, Gate, Marked, Reads, below_mask, below_sentence, finite_scores


class ThresholdGate(Gate):
    """s >= threshold -> route, else `below`; for scores on a fixed scale, such as a classifier's.

    A refresh changes the scale of scores of `Directions`: use `BandGate` or `QuantileGate` there.

    Args:
        threshold: the lowest score that is routed.
        below: zone of the other rows.
        window, strict: see `LabelGate`.

    Raises:
        GradRouteError: a threshold or scores that are not finite.
    """

    reads: ClassVar[Reads] = "scores"

    def __init__(self, threshold: float, *, below: Below = "absorb", window: int = 50, strict: bool = False) -> None:
        self.threshold, self.below = finite_number("threshold", threshold), one_of("below", below, BELOW)
        super().__init__(window=window, strict=strict)

    def __call__(self, scores: Float[Tensor, "*rows"]) -> RouteMask:
        self._before_call()
        routed = finite_scores(scores) >= self.threshold
        return self._counted(below_mask(routed, self.below), routed)

    def describe(self) -> str:
        return below_sentence(self.below)

    def settings(self) -> State:
        return {"threshold": self.threshold, "below": self.below}

    def _marked(self, scores: Float[Tensor, " rows"]) -> Marked:
        return Marked(scores, "score", [(self.threshold, "threshold")], scores >= self.threshold)

    def __repr__(self) -> str:
        return f"ThresholdGate({self.threshold:g}, below={self.below!r})"
