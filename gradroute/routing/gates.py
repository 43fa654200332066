"""From scores or labels to a `RouteMask`, row by row: `(batch,)`, or `(batch, seq)` for tokens.

label       flagged -> route, else `below`              threshold   s >= threshold -> route, else `below`

band        z = (s - lo) / (hi - lo),     lo, hi = mean score of the clean and of the hack pairs
hard        z >= threshold -> route, else `below`
soft        f = clamp(z, 0, 1):  m = 1, g_d = 1 - f, g_q = f
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradroute.adapters.mask import RouteMask
from gradroute.directions.container import Directions
from gradroute.errors import GradRouteError
from gradroute.logs import warn
from gradroute.routing.gate_window import Below, Gate, below_mask, checked_below, finite_scores
from gradroute.routing.plotting import Marked
from gradroute.routing.state import State
from gradroute.typing import typechecked


class LabelGate(Gate):
    """flagged -> route, else `below`; for labels from a monitor or an oracle.

    With `recall` or `false_positive_rate` the flags are taken as the truth, and the gate simulates a worse monitor:

        P(routed | flagged) = recall,     P(routed | not flagged) = false_positive_rate,     independently per row

    Args:
        below: zone of the rows that are not routed: "absorb" trains both blocks, "keep" the deployed block only.
        recall, false_positive_rate: of the simulated monitor, in [0, 1].
        seed: of the simulation; the global generator is not used.
        window, strict: a gate that routed nothing, or everything, in `window` calls warns, or raises if strict; so does
            a simulated monitor with more false alarms than hits.

    Warns at once about a false-positive rate of 10 % or more: published runs collapsed the deployed side at 10 %,
    while a recall of 20 % still routed (GRAFT, in shawnghu/small-rl).
    """

    def __init__(
        self,
        *,
        below: Below = "absorb",
        recall: float = 1.0,
        false_positive_rate: float = 0.0,
        seed: int = 0,
        window: int = 50,
        strict: bool = False,
    ) -> None:
        self.below = checked_below(below)
        self.recall, self.false_positive_rate = (
            _rate("recall", recall),
            _rate("false_positive_rate", false_positive_rate),
        )
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        super().__init__(window=window, strict=strict)
        if self.false_positive_rate >= 0.1:
            warn(
                f"`false_positive_rate` is {self.false_positive_rate:g}: routing a tenth of the clean rollouts has "
                "collapsed the deployed block in published runs. Recall matters less: prefer a stricter monitor.",
                stacklevel=2,
            )

    def __call__(self, flags: Bool[Tensor, "*rows"]) -> RouteMask:
        self._before_call()
        if not isinstance(flags, Tensor) or flags.dtype != torch.bool:
            found = flags.dtype if isinstance(flags, Tensor) else type(flags).__name__
            raise GradRouteError(f"`flags` should be a boolean tensor, True where a row is a hack. Found {found}.")
        routed = flags
        if self._simulates:
            chance = torch.rand(flags.shape, generator=self._generator, dtype=torch.float64)
            routed = (chance < torch.where(flags.cpu(), self.recall, self.false_positive_rate)).to(flags.device)
        mask = below_mask(routed, self.below)
        self._hits += int((routed & flags).sum())
        self._false_alarms += int((routed & ~flags).sum())
        return self._counted(mask, routed)

    def settings(self) -> State:
        return {
            "below": self.below,
            "recall": self.recall,
            "false_positive_rate": self.false_positive_rate,
            "seed": self.seed,
        }

    def state_dict(self) -> State:
        simulation = {
            "generator": self._generator.get_state(),
            "hits": self._hits,
            "false_alarms": self._false_alarms,
        }
        return {**super().state_dict(), "simulation": simulation}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        simulation = state["simulation"]
        self._generator.set_state(simulation["generator"])
        self._hits, self._false_alarms = simulation["hits"], simulation["false_alarms"]

    def __repr__(self) -> str:
        simulated = f", recall={self.recall:g}, false_positive_rate={self.false_positive_rate:g}, seed={self.seed}"
        return f"LabelGate(below={self.below!r}{simulated if self._simulates else ''})"

    @property
    def _simulates(self) -> bool:
        return (self.recall, self.false_positive_rate) != (1.0, 0.0)

    def _open_window(self) -> None:
        super()._open_window()
        self._hits, self._false_alarms = 0, 0

    def _complaints(self) -> list[str]:
        complaints = super()._complaints()
        if self._false_alarms > self._hits:
            share = self._hits / (self._hits + self._false_alarms)
            complaints.append(
                f"{self!r} routed more clean rows than hacks in {self.window} calls: its precision was {share:.2f}. "
                "The deployed block loses what those rows would have taught it. Fix: fewer false positives."
            )
        return complaints


class ThresholdGate(Gate):
    """s >= threshold -> route, else `below`; for scores with a scale of their own, such as a classifier's.

    A threshold on scores of `Directions` is off as soon as those are refreshed: use `BandGate` or `QuantileGate` there.

    Args:
        threshold: the lowest score that is routed.
        below: zone of the other rows.
        window, strict: see `LabelGate`.

    Raises:
        GradRouteError: a threshold or scores that are not finite.
    """

    def __init__(self, threshold: float, *, below: Below = "absorb", window: int = 50, strict: bool = False) -> None:
        self.threshold, self.below = _finite(threshold), checked_below(below)
        super().__init__(window=window, strict=strict)

    def __call__(self, scores: Float[Tensor, "*rows"]) -> RouteMask:
        self._before_call()
        routed = finite_scores(scores) >= self.threshold
        return self._counted(below_mask(routed, self.below), routed)

    def settings(self) -> State:
        return {"threshold": self.threshold, "below": self.below}

    def _marked(self, scores: Float[Tensor, " rows"]) -> Marked:
        return Marked(scores, "score", [(self.threshold, "threshold")], scores >= self.threshold)

    def __repr__(self) -> str:
        return f"ThresholdGate({self.threshold:g}, below={self.below!r})"


class BandGate(Gate):
    """Route on where a score lies between the pairs: z = 0 at the clean mean, z = 1 at the hack mean.

    The ends are read again from the `Directions` whenever its version has changed, so score and gate must use the same
    version: score after a refresh, not before. Build it with `BandGate.calibrate(directions)`.

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
        if not isinstance(directions, Directions):
            raise GradRouteError(f"`directions` should be Directions. Found {type(directions).__name__}.")
        if soft and (threshold is not None or below is not None):
            raise GradRouteError("A soft gate has no `threshold` and no `below`. Fix: leave them out, or soft=False.")
        self.directions = directions
        self.threshold = _finite(0.5 if threshold is None else threshold)
        self.soft = soft
        self.below: Below = checked_below("absorb" if below is None else below)
        self._version: int | None = None
        super().__init__(window=window, strict=strict)
        self._read_ends()

    @classmethod
    @typechecked
    def calibrate(
        cls,
        directions: Directions,
        *,
        threshold: float | None = None,
        soft: bool = False,
        below: Below | None = None,
        window: int = 50,
        strict: bool = False,
    ) -> "BandGate":
        """The gate whose ends are the mean scores of the pairs that `directions` carries; threshold 0.5 if hard."""
        return cls(directions, threshold=threshold, soft=soft, below=below, window=window, strict=strict)

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
        lo, hi = self.ends
        return (finite_scores(scores) - lo) / (hi - lo)

    def flags(self, scores: Float[Tensor, "*rows"]) -> Bool[Tensor, "*rows"]:
        """z >= threshold; what the hard gate routes."""
        if self.soft:
            raise GradRouteError("A soft gate flags nothing. Fix: use z(scores), or a gate with soft=False.")
        return self.z(scores) >= self.threshold

    def __call__(self, scores: Float[Tensor, "*rows"]) -> RouteMask:
        self._before_call()
        if not self.soft:
            flags = self.flags(scores)
            return self._counted(below_mask(flags, self.below), flags)
        f = self.z(scores).clamp(0, 1)
        return self._counted(RouteMask.weights(m=1.0, g_d=1 - f, g_q=f), f)

    def settings(self) -> State:
        return {"threshold": self.threshold, "soft": self.soft, "below": self.below}

    def __repr__(self) -> str:
        lo, hi = self.ends
        kind = "soft" if self.soft else f"threshold={self.threshold:g}, below={self.below!r}"
        turned = ", reversed" if self.reversed else ""
        return f"BandGate(z=0 at {lo:.4g}, z=1 at {hi:.4g}{turned}, {kind}, version {self._version})"

    def _marked(self, scores: Float[Tensor, " rows"]) -> Marked:
        z, ends = self.z(scores), [(0.0, "clean pairs"), (1.0, "hack pairs")]
        if self.soft:
            return Marked(z, "z", ends, None)
        return Marked(z, "z", [(self.threshold, "threshold"), *ends], z >= self.threshold)

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
            warn(
                f"The hack pairs score below the clean ones ({hi:.4g} < {lo:.4g}); the gate routes low scores.",
                stacklevel=3,
            )
        self._lo, self._hi, self._version = lo, hi, self.directions.version


def _rate(argument: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise GradRouteError(f"`{argument}` should be a share in [0, 1]. Found {value!r}.")
    return float(value)


def _finite(threshold: float) -> float:
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
        raise GradRouteError(f"`threshold` should be finite. Found {threshold!r}.")
    return float(threshold)
