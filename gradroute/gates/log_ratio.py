"""Route what the quarantine explains: rollouts that the quarantine, and not the deployed block, has made likelier.

    r_t = log p_on(t) - log p_ablated(t)                 of each completion token, in nats
    s   = max over t of (r_1 + ... + r_t)                of a rollout: its best prefix
    s > threshold -> route, else `below`                 (per token: r_t > threshold)

A detector that knows some hacks teaches them to the quarantine. The quarantine then makes relatives likelier too, which
the detector misses. A quarantine may also learn never to stop: it makes the end of a short hack unlikely, and the sum
over the whole rollout is negative, while that of the best prefix is not. The gate does not know what a hack is. It
routes whatever the quarantine learns faster than the deployed block, a skill included.
"""

from collections import deque
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from gradroute._checks import described, integer_from_zero, one_of, positive_number
from gradroute._logging import logger
from gradroute._sharding import wide
from gradroute._state_dict import State
from gradroute.adapters.mask import RouteMask
from gradroute.errors import GradRouteError
from gradroute.gates.base import BELOW, Below, Gate, Marked, Reads, below_mask, below_sentence

Per = Literal["rollout", "token"]
PER: tuple[Per, ...] = ("rollout", "token")
QUANTILES = (0.1, 0.5, 0.9, 0.99)


class ScoreFigures(NamedTuple):
    """What a gate saw in its last calls.

    Args:
        rows: number of scores.
        routed: share of them above the threshold.
        quantiles: of the scores, at .1, .5, .9 and .99.
    """

    rows: int
    routed: float
    quantiles: dict[float, float]


class LogRatioGate(Gate):
    """s > threshold -> route, else `below`; s = max over prefixes of the sum of log p_on - log p_ablated, in nats.

    Call it with what the policy gives to its own completion tokens in both views, and which columns are such tokens:
    `gate(on, ablated, mask)`, (rows, tokens) each. Every row is scored, those that were sampled ablated included.

    Args:
        threshold: in nats, above 0. One nat was tried on completions of at most nine tokens. Over T tokens whose r_t
            scatter by d without any drift, chance alone gives a best prefix of about d sqrt(2 T / pi); the threshold
            has to be well above that.
        per: "rollout" gives one zone per row. "token" gives one per column, from r_t alone; a route needs a column per
            position of the model's input, so pad there, with `mask` False.
        below: zone of what is not routed; columns outside `mask` are in it as well.
        empty_calls: number of calls, at the start, in which both views may agree exactly because the quarantine still
            holds nothing (B = 0): those before the first optimizer step. All rows then score 0 and none is routed,
            which the log says.
        window, strict: see `LabelGate`; `figures` is of the last `window` calls.

    Raises:
        GradRouteError: a threshold that is not positive; log-probabilities of other shapes, not finite or above 0; a
            row without a token; views that agree exactly after `empty_calls`: then both were computed in one view, or
            the quarantine is not trained.
    """

    reads: ClassVar[Reads] = "log_ratios"

    def __init__(
        self,
        threshold: float = 1.0,
        *,
        per: Per = "rollout",
        below: Below = "absorb",
        empty_calls: int = 1,
        window: int = 50,
        strict: bool = False,
    ) -> None:
        self.threshold = positive_number("threshold", threshold)
        self.per: Per = one_of("per", per, PER)
        self.below: Below = one_of("below", below, BELOW)
        self.empty_calls = integer_from_zero("empty_calls", empty_calls)
        super().__init__(window=window, strict=strict)
        self._seen = 0
        self._recent: deque[Tensor] = deque(maxlen=self.window)

    def __call__(
        self,
        on: Float[Tensor, "rows tokens"],
        ablated: Float[Tensor, "rows tokens"],
        mask: Shaped[Tensor, "rows tokens"],
    ) -> RouteMask:
        self._before_call()
        ratios, known = log_ratios(on, ablated, mask)
        self._check_views_differ(ratios, known)
        scores = best_prefix(ratios, known) if self.per == "rollout" else ratios
        routed = scores > self.threshold
        self._seen += 1
        self._recent.append((scores if self.per == "rollout" else scores[known]).float().cpu())
        return self._counted(below_mask(routed, self.below), routed)

    def scores(
        self,
        on: Float[Tensor, "rows tokens"],
        ablated: Float[Tensor, "rows tokens"],
        mask: Shaped[Tensor, "rows tokens"],
    ) -> Float[Tensor, "rows *tokens"]:
        """s of each row, or r_t of each column; not counted as a call."""
        ratios, known = log_ratios(on, ablated, mask)
        return best_prefix(ratios, known) if self.per == "rollout" else ratios

    @property
    def figures(self) -> ScoreFigures | None:
        """Share routed and quantiles of scores over the last `window` calls; None before the first.

        A share that grows while no more rollouts are hacks says that the gate has begun to route the skill.
        """
        if not self._recent:
            return None
        scores = torch.cat(list(self._recent)).double()
        # torch.quantile takes 2^24 numbers at most; a window of tokens has more.
        found = np.quantile(scores.numpy(), QUANTILES).tolist()
        quantiles = dict(zip(QUANTILES, found, strict=True))
        return ScoreFigures(len(scores), float((scores > self.threshold).double().mean()), quantiles)

    def describe(self) -> str:
        what = "rollouts by their best prefix" if self.per == "rollout" else "tokens by themselves"
        return (
            f"routed is what the quarantine makes more than {self.threshold:g} nat likelier ({what}); "
            f"{below_sentence(self.below)}"
        )

    def settings(self) -> State:
        return {
            "threshold": self.threshold,
            "per": self.per,
            "below": self.below,
            "empty_calls": self.empty_calls,
        }

    def state_dict(self) -> State:
        return {**super().state_dict(), "seen": self._seen, "recent": [scores.clone() for scores in self._recent]}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self._seen = state["seen"]
        # A state may have been loaded onto the device of the model.
        self._recent = deque((scores.cpu().clone() for scores in state["recent"]), maxlen=self.window)

    def __repr__(self) -> str:
        return f"LogRatioGate({self.threshold:g} nat, per {self.per}, below={self.below!r})"

    def _marked(self, scores: Float[Tensor, " rows"]) -> Marked:
        return Marked(scores, "log ratio, nats", [(self.threshold, "threshold")], scores > self.threshold)

    def _check_views_differ(self, ratios: Float[Tensor, "rows tokens"], known: Bool[Tensor, "rows tokens"]) -> None:
        if (ratios[known] != 0).any():
            return
        if self._seen >= self.empty_calls:
            raise GradRouteError(
                "`on` and `ablated` should be log-probabilities of two views. Found the same numbers in both, in call "
                f"{self._seen + 1}. Fix: compute `ablated` under ablate_quarantine(model), and train the quarantine; "
                f"or, if no optimizer step has come before this call, empty_calls={self._seen + 1} or more."
            )
        logger.info("%r: the quarantine holds nothing yet; all scores are 0 and nothing is routed.", self)


def log_ratios(
    on: Float[Tensor, "rows tokens"], ablated: Float[Tensor, "rows tokens"], mask: Shaped[Tensor, "rows tokens"]
) -> tuple[Float[Tensor, "rows tokens"], Bool[Tensor, "rows tokens"]]:
    """(r_t, 0 outside the mask, in float32 or wider; the mask as booleans).

    Raises:
        GradRouteError: see `LogRatioGate`.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not ((mask == 0) | (mask == 1)).all():
        raise GradRouteError(
            "`mask` should be booleans, or 0 and 1, of shape (rows, tokens): True for the policy's own tokens. Found "
            f"{described(mask)}."
        )
    known = mask.bool()
    for name, values in (("on", on), ("ablated", ablated)):
        if not isinstance(values, Tensor) or not values.is_floating_point() or values.shape != mask.shape:
            raise GradRouteError(
                f"`{name}` should be log-probabilities of the shape of `mask`, {tuple(mask.shape)}. Found "
                f"{described(values)}."
            )
        own = values.detach()[known]
        if not torch.isfinite(own).all() or (own > 1e-3).any():
            worst = own[~torch.isfinite(own)][:1].tolist() or [own.max().item()]
            raise GradRouteError(f"`{name}` should be log-probabilities, finite and <= 0. Found {worst[0]:.4g}.")
    empty = (~known.any(dim=1)).nonzero()
    if not mask.numel() or len(empty):
        which = f"row {int(empty[0])}" if len(empty) else f"the shape {tuple(mask.shape)}"
        raise GradRouteError(
            f"`mask` should have a token in each row, or there is nothing to score. Found none in {which}. Fix: leave "
            "such rows out; they train nothing."
        )
    # Padding may hold anything, nan as well.
    return torch.where(known, wide(on.detach()) - wide(ablated.detach()), 0.0), known


def best_prefix(ratios: Float[Tensor, "rows tokens"], known: Bool[Tensor, "rows tokens"]) -> Float[Tensor, " rows"]:
    """max over t of r_1 + ... + r_t; the empty prefix does not count, so that a score may be negative."""
    return ratios.cumsum(dim=1).masked_fill(~known, -torch.inf).amax(dim=1)
