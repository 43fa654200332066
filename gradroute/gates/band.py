"""From scores of directions to a mask, on a scale that the contrastive pairs set.

    z = (s - lo) / (hi - lo),     lo, hi = mean score of the clean and of the hack pairs
    hard        z >= threshold -> route, else `below`
    soft        f = clamp(z, 0, 1):  m = 1, g_d = 1 - f, g_q = f

Rollouts lie on this scale only as far as the pairs are like rollouts; `validate` tells, from labelled ones.
"""

import math
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradroute._checks import finite_number, instance_of, one_of
from gradroute._logging import warn
from gradroute._state_dict import State
from gradroute.adapters.mask import RouteMask
from gradroute.directions.directions import Directions
from gradroute.errors import GradRouteError
from gradroute.gates.base import BELOW, Below, Gate, Marked, Reads, below_mask, below_sentence, finite_scores


class BandGate(Gate):
    """Route on where a score lies between the pairs: z = 0 at the clean mean, z = 1 at the hack mean.

    The ends are read again from the `Directions` whenever its version has changed, so score and gate must use the same
    version: score after a refresh, not before.

    Args:
        directions: the directions whose scores are gated.
        threshold: z at and above which a row is routed (hard gate).
        soft: linear ramp instead of a threshold; `threshold` and `below` are then not read and must be left alone.
        below: zone of the rows under the threshold.
        window, strict: see `LabelGate`; only calls of the gate count, not `z` and `flags`.

    Raises:
        GradRouteError: equal ends, so that no scale exists; scores that are not finite.

    Where a direction scores clean pairs above hack pairs, z turns it around: `reversed` is True, and a
    `GradRouteWarning` says so unless the directions are a random control, whose sign is arbitrary.
    """

    reads: ClassVar[Reads] = "scores"
    directions: Directions

    def __init__(
        self,
        directions: Directions,
        *,
        threshold: float | None = None,
        soft: bool = False,
        below: Below | None = None,
        window: int = 50,
        strict: bool = False,
    ) -> None:
        self.directions = instance_of("directions", directions, Directions)
        if soft and (threshold is not None or below is not None):
            raise GradRouteError("A soft gate has no `threshold` and no `below`. Fix: leave them out, or soft=False.")
        self.threshold = finite_number("threshold", 0.5 if threshold is None else threshold)
        self.soft = soft
        self.below: Below = one_of("below", "absorb" if below is None else below, BELOW)
        self._version: int | None = None
        super().__init__(window=window, strict=strict)
        self._read_ends()

    @property
    def ends(self) -> tuple[float, float]:
        """(lo, hi): the scores at z = 0 and z = 1."""
        self._read_ends()
        return self._lo, self._hi

    @property
    def reversed(self) -> bool:
        """Whether hack pairs score below clean pairs, so that low scores are routed."""
        lo, hi = self.ends
        return hi < lo

    def z(self, scores: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        """(s - lo) / (hi - lo)."""
        self._before_call()
        return self._z(scores)

    def flags(self, scores: Float[Tensor, "*rows"]) -> Bool[Tensor, "*rows"]:
        """z >= threshold; what the hard gate routes."""
        if self.soft:
            raise GradRouteError("A soft gate flags nothing. Fix: use z(scores), or a gate with soft=False.")
        return self.z(scores) >= self.threshold

    def __call__(self, scores: Float[Tensor, "*rows"]) -> RouteMask:
        if not self.soft:
            flags = self.flags(scores)
            return self._counted(below_mask(flags, self.below), flags)
        f = self.z(scores).clamp(0, 1)
        return self._counted(RouteMask.weights(m=1.0, g_d=1 - f, g_q=f), f)

    def describe(self) -> str:
        if self.soft:
            return "soft: m = 1, g_d = 1 - f, g_q = f, with f = z clamped to [0, 1]"
        return below_sentence(self.below)

    def settings(self) -> State:
        return {"threshold": self.threshold, "soft": self.soft, "below": self.below}

    def __repr__(self) -> str:
        lo, hi = self.ends
        kind = "soft" if self.soft else f"threshold={self.threshold:g}, below={self.below!r}"
        turned = ", reversed" if self.reversed else ""
        return f"BandGate(z=0 at {lo:.4g}, z=1 at {hi:.4g}{turned}, {kind}, version {self._version})"

    def _marked(self, scores: Float[Tensor, " rows"]) -> Marked:
        z, ends = self._z(scores), [(0.0, "clean pairs"), (1.0, "hack pairs")]
        if self.soft:
            return Marked(z, "z", ends, None)
        return Marked(z, "z", [(self.threshold, "threshold"), *ends], z >= self.threshold)

    def _z(self, scores: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        lo, hi = self.ends
        return (finite_scores(scores) - lo) / (hi - lo)

    def _read_ends(self) -> None:
        if self._version == self.directions.version:
            return
        hack, clean = self.directions.pair_scores()
        lo, hi = clean.mean().item(), hack.mean().item()
        size = torch.cat([hack, clean]).abs().max().item()
        if abs(hi - lo) <= 1e-6 * size or not (math.isfinite(lo) and math.isfinite(hi)):
            raise GradRouteError(
                f"The clean and hack pairs should have different mean scores. Found {lo:.6g} and {hi:.6g}: "
                "this direction does not see them apart. Fix: use other pairs or features."
            )
        if hi < lo and self.directions.provenance.estimator != "random":
            warn(f"The hack pairs score below the clean ones ({hi:.4g} < {lo:.4g}); the gate routes low scores.")
        self._lo, self._hi, self._version = lo, hi, self.directions.version
