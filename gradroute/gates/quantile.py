"""Route the tails of what the policy does now.

    w_i = 0.5 ^ (age_i / half_life),     age_i = rollouts of later calls
    t_lo = min {s_i : sum of w_j over s_j <= s_i  >=  q_lo W},     W = sum of all w
    t_hi = max {s_i : sum of w_j over s_j >= s_i  >=  (1 - q_hi) W}
    s <= t_lo -> keep,     s >= t_hi -> route,     both or neither -> absorb

over a buffer of the last `capacity` rollouts, the present ones included. The buffer holds features and not scores, so
that a refresh of the directions re-scores what came before it. Source: vGROUT (wassname), with 8192, 96, 10 % and 90 %.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from gradroute._checks import instance_of, positive_integer, positive_number
from gradroute._state_dict import State
from gradroute.adapters.mask import RouteMask
from gradroute.directions import Capture
from gradroute.directions.directions import Directions
from gradroute.errors import GradRouteError
from gradroute.gates.base import Gate, Marked, Reads, finite_scores


class QuantileGate(Gate):
    """keep / absorb / route by the recency-weighted quantiles of the scores of past rollouts; `gate(capture)`.

    Memory is capacity x (sum of feature widths). Each call sorts at most `capacity` numbers, and scores the buffer
    again if the version of `directions` has changed. Call it once per rollout: every call fills the buffer.

    Args:
        directions: the features are scored with them.
        tails: (q_lo, q_hi).
        half_life: rollouts after which a rollout counts half.
        capacity: rollouts in the buffer; the oldest make room.
        warm_up: as long as the buffer holds fewer rollouts, all rows absorb. Such calls do not count for `window`.
        window, strict: a gate that routed nothing, or everything, in `window` calls warns, or raises if strict.

    Raises:
        GradRouteError: sizes out of range, more rollouts in a call than the buffer holds, scores that are not finite,
            or features that `directions.score` refuses. The buffer is then as before.
    """

    reads: ClassVar[Reads] = "features"
    directions: Directions

    def __init__(
        self,
        directions: Directions,
        *,
        tails: tuple[float, float] = (0.1, 0.9),
        half_life: float = 96.0,
        capacity: int = 8192,
        warm_up: int = 32,
        window: int = 50,
        strict: bool = False,
    ) -> None:
        self.directions = instance_of("directions", directions, Directions)
        if len(tails) != 2 or not 0 < tails[0] < tails[1] < 1:
            raise GradRouteError(f"`tails` should be two quantiles 0 < q_lo < q_hi < 1. Found {tails!r}.")
        self.tails, self.half_life = (float(tails[0]), float(tails[1])), positive_number("half_life", half_life)
        self.capacity, self.warm_up = positive_integer("capacity", capacity), positive_integer("warm_up", warm_up)
        if warm_up > capacity:
            raise GradRouteError(
                f"`warm_up` should be at most `capacity`. Found {warm_up} > {capacity}: all rows would absorb."
            )
        super().__init__(window=window, strict=strict)
        # Allocated by the first call, which shows how wide and of which type features are.
        self._buffer = _empty(0, like=torch.empty(0, 0))
        self._seen, self._filled, self._next = 0, 0, 0
        self._scored_version = directions.version

    def __len__(self) -> int:
        return self._filled

    @property
    def thresholds(self) -> tuple[float, float] | None:
        """(t_lo, t_hi) as of the last call, under the present directions; None while warming up."""
        if self._filled < self.warm_up:
            return None
        self._rescore()
        held = self._held
        weights = 0.5 ** ((self._seen - held["arrived"]).double() / self.half_life)
        return weighted_tails(held["scores"].double(), weights, *self.tails)

    def __call__(self, features: Mapping[str, Float[Tensor, "_ _"]]) -> RouteMask:
        self._before_call()
        if not isinstance(features, Mapping):
            raise GradRouteError(
                f"`features` should be a Capture, or a mapping of module names to features. Found "
                f"{type(features).__name__}. Fix: gate(capture), not gate(scores): old rollouts are scored again."
            )
        if isinstance(features, Capture) and features.directions is not None:
            raise GradRouteError(
                "`features` should be features. Found a capture of inner products with directions, which could not be "
                "scored again after a refresh. Fix: another feature, or BandGate."
            )
        scores = finite_scores(self.directions.score(features))
        if not 0 < len(scores) <= self.capacity:
            raise GradRouteError(f"`features` should have 1 to {self.capacity} (`capacity`) rows. Found {len(scores)}.")
        flat = torch.cat([self._feature(features, name).to(scores) for name in self.directions.hack], dim=1).cpu()
        self._rescore()
        self._store(flat, scores.cpu())
        thresholds = self.thresholds
        if thresholds is None:
            return RouteMask.zones(torch.ones(len(scores), dtype=torch.long, device=scores.device))
        # In the type of the buffer: a score of these rows that is a threshold must equal it.
        scores = scores.to(self._buffer["scores"].dtype)
        kept, routed = scores <= thresholds[0], scores >= thresholds[1]
        zones = 1 - kept.long() + routed.long()
        return self._counted(RouteMask.zones(zones), zones == 2)

    def describe(self) -> str:
        return "keep, absorb and route: the lower tail trains the deployed block only, the upper the quarantine only"

    def settings(self) -> State:
        return {
            "tails": list(self.tails),
            "half_life": self.half_life,
            "capacity": self.capacity,
            "warm_up": self.warm_up,
        }

    def state_dict(self) -> State:
        rollouts = {name: values.clone() for name, values in self._held.items()}
        place = {"seen": self._seen, "next": self._next, "scored_version": self._scored_version}
        return {**super().state_dict(), "buffer": {**rollouts, **place}}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        buffer = state["buffer"]
        self._seen, self._next, self._filled = buffer["seen"], buffer["next"], len(buffer["scores"])
        self._scored_version = buffer["scored_version"]
        self._buffer = _empty(self.capacity, like=buffer["features"])
        for name, values in self._held.items():
            values.copy_(buffer[name])

    def __repr__(self) -> str:
        ends = f"{len(self)} of {self.warm_up} rollouts to warm up"
        if self._filled >= self.warm_up:
            ends = "keep up to {:.4g}, route from {:.4g}, {} rollouts".format(*self.thresholds or (), len(self))
        return f"QuantileGate(tails {self.tails[0]:g} and {self.tails[1]:g}: {ends}, version {self.directions.version})"

    def _marked(self, scores: Float[Tensor, " rows"]) -> Marked:
        if self.thresholds is None:
            return Marked(scores, "score", [], None)
        low, high = self.thresholds
        routed = scores.to(self._buffer["scores"]) >= high
        return Marked(scores, "score", [(high, "route from"), (low, "keep up to")], routed)

    def _feature(self, features: Mapping[str, Float[Tensor, "_ _"]], name: str) -> Float[Tensor, "_ _"]:
        # Modules without rows included: a refresh may give them rows, and then old rollouts are scored on them.
        width = self.directions.hack[name].shape[-1]
        if name not in features or features[name].shape[-1] != width:
            raise GradRouteError(f"`features` should hold the module `{name}`, {width} wide, like the pairs.")
        return features[name].detach()

    @property
    def _held(self) -> dict[str, Tensor]:
        """The part of the buffer that is filled."""
        return {name: values[: self._filled] for name, values in self._buffer.items()}

    def _store(self, flat: Float[Tensor, "rows width"], scores: Float[Tensor, " rows"]) -> None:
        if self._seen == 0:
            self._buffer = _empty(self.capacity, like=flat)
        rows = len(flat)
        places = (self._next + torch.arange(rows)) % self.capacity
        self._seen += rows
        # All rows of a call have the same age: the order within a batch means nothing.
        arrived = torch.full((rows,), self._seen)
        for name, values in (("features", flat), ("scores", scores), ("arrived", arrived)):
            self._buffer[name][places] = values.to(self._buffer[name])
        self._next = (self._next + rows) % self.capacity
        self._filled = min(self._filled + rows, self.capacity)

    def _rescore(self) -> None:
        if self._scored_version == self.directions.version:
            return
        if self._filled:
            widths = [pairs.shape[-1] for pairs in self.directions.hack.values()]
            parts = torch.split(self._held["features"], widths, dim=1)
            scores = self.directions.score(dict(zip(self.directions.hack, parts, strict=True)))
            self._held["scores"].copy_(finite_scores(scores))
        self._scored_version = self.directions.version


def _empty(capacity: int, *, like: Float[Tensor, "rows width"]) -> dict[str, Tensor]:
    # On the CPU: quantiles of some thousand numbers need no accelerator, and its memory is for the policy.
    features, scores = like.new_empty(capacity, like.shape[1]), like.new_empty(capacity)
    return {"features": features, "scores": scores, "arrived": torch.empty(capacity, dtype=torch.long)}


def weighted_tails(
    scores: Float[Tensor, " rows"], weights: Float[Tensor, " rows"], lower: float, upper: float
) -> tuple[float, float]:
    """(t_lo, t_hi) of the formulas above: at least q_lo of the weight is at or below t_lo, 1 - q_hi at or above t_hi.

    Reversing the sign of the scores, and the quantiles, exchanges the two.
    """
    order = scores.argsort(stable=True)
    ordered, w = scores[order], weights[order]
    # A hair less than the share: sums of weights that should equal it may fall short by rounding.
    total = w.sum() * (1 - 1e-9)
    at_lower = torch.searchsorted(w.cumsum(0), lower * total)
    at_upper = torch.searchsorted(w.flip(0).cumsum(0), (1 - upper) * total)
    return ordered[at_lower].item(), ordered.flip(0)[at_upper].item()
