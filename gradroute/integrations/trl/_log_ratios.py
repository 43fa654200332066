"""Which rollouts the quarantine explains: log-probabilities of both views, and the gate on their ratio.

    sampled     log p(t), each row in the state in which it was sampled     TRL's old log-probabilities, if it has them
    other       log p(t), each row in the other state                       one forward more
    on, ablated = sampled, other     rows sampled with the quarantine
                  other, sampled     rows sampled ablated                   LogRatioGate(on, ablated) -> mask

While the quarantine holds nothing both views are one model. Then nothing is run, every rollout scores 0, and the gate
is not asked. Rollouts without a token of their own have no score; they absorb.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gradroute._logging import logger
from gradroute._protocol import routed_layers
from gradroute._sharding import reshard, wide
from gradroute._state_dict import State
from gradroute.adapters.mask import RouteMask
from gradroute.errors import GradRouteError
from gradroute.gates.log_ratio import QUANTILES, LogRatioGate
from gradroute.integrations.trl._scoring import is_random, logps_of_state, loss_mask


@dataclass(frozen=True)
class Explained:
    """What the quarantine says of a batch of rollouts.

    Args:
        mask: from the gate on log ratios.
        scores: best prefix, in nats; NaN for rows without a token.
        sampled: log-probabilities in the state in which each row was sampled, where they had to be computed and the
            loss may use them.
        figures: for the log.
    """

    mask: RouteMask
    scores: Float[Tensor, " rows"]
    sampled: Float[Tensor, "rows tokens"] | None
    figures: dict[str, float]


class LogRatios:
    """Asks the gate for the mask of each batch of rollouts, and counts batches in which the quarantine was empty."""

    def __init__(self, trainer: Any, gate: LogRatioGate) -> None:
        self._trainer, self._gate = trainer, gate
        self._empty = 0

    def __call__(self, rollouts: Mapping[str, Any], ablated: Bool[Tensor, " rows"]) -> Explained:
        """The mask of these rollouts.

        Args:
            rollouts: as TRL made them.
            ablated: which of them were sampled without the quarantine.

        Raises:
            GradRouteError: the quarantine was empty in as many batches as the gate's window has calls.
        """
        known = loss_mask(rollouts).bool()
        rows = known.any(1).nonzero().squeeze(1)
        scores = torch.full((len(known),), torch.nan, dtype=torch.float32, device=known.device)
        zones = torch.ones(len(known), dtype=torch.long, device=known.device)
        sampled, empty = None, is_empty(self._trainer.model)
        if empty:
            self._count_empty()
            scores[rows] = 0.0
            zones[rows] = 0 if self._gate.below == "keep" else 1
        else:
            self._empty = 0
            on, off, sampled = self._both_views(rollouts, ablated)
            if len(rows):
                given = on[rows], off[rows], known[rows]
                scores[rows] = self._gate.scores(*given).to(scores)
                mask = self._gate(*given)
                zones[rows] = torch.where(mask.routed, 2, mask.m.long())
        return Explained(RouteMask.zones(zones), scores, sampled, self._figures(scores, zones == 2, empty=empty))

    def state_dict(self) -> State:
        """How many batches in a row found the quarantine empty."""
        return {"empty": self._empty}

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        self._empty = state["empty"]

    def _both_views(
        self, rollouts: Mapping[str, Any], ablated: Bool[Tensor, " rows"]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(on, ablated, log-probabilities that the loss may use)."""
        trainer = self._trainer
        # TRL's were taken in training mode: with dropout they are no log-probabilities of either view, but noise.
        exact = not is_random(trainer.model)
        old = rollouts.get("old_per_token_logps") if exact else None
        sampled = logps_of_state(trainer, rollouts, ablated) if old is None else old
        other = logps_of_state(trainer, rollouts, ~ablated)
        off = ablated[:, None]
        handed = sampled if old is None and exact else None
        return torch.where(off, other, sampled), torch.where(off, sampled, other), handed

    def _count_empty(self) -> None:
        self._empty += 1
        if self._empty > self._gate.window:
            raise GradRouteError(
                f"The quarantine should hold something by now. Found a net delta of zero in every layer in "
                f"{self._empty} batches of rollouts, more than the window of {self._gate!r}: nothing trains it. Fix: a "
                "learning rate above 0, and rollouts that absorb or are routed while their advantages are not zero."
            )
        if self._empty == 1 and self._trainer.accelerator.is_main_process:
            logger.info("%r: the quarantine holds nothing yet; all scores are 0 and nothing is routed.", self._gate)

    def _figures(self, scores: Tensor, routed: Bool[Tensor, " rows"], *, empty: bool) -> dict[str, float]:
        gather = self._trainer.accelerator.gather
        every, flagged = gather(scores), gather(routed)
        known = ~every.isnan()
        figures = {"routing/log_ratio_empty": float(empty)}
        if known.any():
            figures["routing/log_ratio_flagged"] = float(flagged[known].float().mean())
            found = torch.quantile(every[known].cpu().double(), torch.tensor(QUANTILES, dtype=torch.float64))
            figures |= {f"routing/log_ratio_p{round(100 * q)}": float(s) for q, s in zip(QUANTILES, found, strict=True)}
        return figures


def is_empty(model: nn.Module) -> bool:
    """Whether no layer's quarantine has a net delta: tr(B^T B A A^T) = |B A|^2 is zero, as it is before the first step.

    Blocks that start oriented have B A = 0 with neither zero. The host reads one number.
    """
    reshard(model)
    sizes = []
    for name, layer in routed_layers(model).items():
        A, B = (wide(factor) for factor in layer.quarantine.whole(name)[:2])
        sizes.append(((B.T @ B) * (A @ A.T)).abs().sum() * abs(layer.quarantine.scaling))
    return not bool(torch.stack([size.to(sizes[0]) for size in sizes]).any())
