"""The advantage of each block: `full` (a) trains the quarantine, `clean` (b) the deployed block.

    one loss of advantage u, and weights on the gradients:   g_d <- g_d b / u,   g_q <- g_q a / u

The loss of a row scales with the size of u and clips by the sign of u. So one u serves both blocks exactly where the
policy term is the whole loss and either a b >= 0, or the ratio to the old log-probabilities is 1. The other rows
(`split`) go through the forward twice: see `_micro_batch`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from gradroute.adapters.mask import RouteMask
from gradroute.advantages import clean_baseline_advantages
from gradroute.errors import GradRouteError

# Types of TRL's loss whose policy term scales with the size of the advantage.
LOSS_TYPES = ("grpo", "dr_grpo", "luspo", "sapo", "bnpo", "dapo", "cispo", "vespo")


def clean_advantages(
    rewards: Float[Tensor, " rows"], flagged: Bool[Tensor, " rows"], full: Float[Tensor, " rows"], group_size: int
) -> Float[Tensor, " rows"]:
    """b of `clean_baseline_advantages`, times the factor per group by which TRL's `full` differs from r - mean(r).

    Args:
        rewards: NaN where no reward function scored the rollout; both advantages are then 0, as in TRL.
        flagged: rollouts that the deployed block does not learn from.
        full: TRL's advantages.
        group_size: rollouts per prompt.

    Raises:
        GradRouteError: TRL's advantages are no multiple of r - mean(r) in some group, so no such factor exists.
    """
    centred, clean = clean_baseline_advantages(rewards, flagged, group_size, no_reward=rewards.isnan())
    centred, clean, full = (
        rearrange(each, "(group member) -> group member", member=group_size) for each in (centred, clean, full)
    )
    spread = centred.abs().sum(1, keepdim=True)
    factor = torch.where(spread > 0, full.abs().sum(1, keepdim=True) / spread.clamp(min=1e-30), 1.0)
    if not torch.allclose(factor * centred, full, rtol=1e-3, atol=1e-4):
        raise GradRouteError(
            "`clean_baseline` needs advantages that are rewards minus the mean of their group, scaled. Found other "
            "advantages: they are aggregated or normalised in another way. Fix: "
            "multi_objective_aggregation='sum_then_normalize', or clean_baseline=False."
        )
    return rearrange(factor * clean, "group member -> (group member)")


@dataclass(frozen=True)
class TwoAdvantages:
    """The advantage of the loss, the mask that goes with it, and which rows go through the forward twice."""

    advantages: Float[Tensor, " rows"]
    mask: RouteMask
    split: Bool[Tensor, " rows"]


def two_advantages(
    mask: RouteMask, full: Float[Tensor, " rows"], clean: Float[Tensor, " rows"], *, one_term: bool, ratio_is_one: bool
) -> TwoAdvantages:
    """Train the quarantine with `full` and the deployed block with `clean`; see the module's formulas.

    Args:
        mask: of the rows.
        full, clean: a and b.
        one_term: the policy term is the whole loss, so that weights on gradients may carry advantages.
        ratio_is_one: old log-probabilities are those of the loss's own forward.
    """
    trains_d, trains_q = mask.g_d != 0, (mask.m != 0) & (mask.g_q != 0)
    differ = trains_d & trains_q & (full != clean)
    exact = (ratio_is_one | (full * clean >= 0)) if one_term else torch.zeros_like(differ)
    scaled, split = differ & exact, differ & ~exact
    size = torch.maximum(full.abs(), clean.abs())
    shared = torch.where(full != 0, full.sign(), clean.sign()) * size
    u = torch.where(scaled, shared, torch.where(trains_d & ~trains_q, clean, full))
    divisor = torch.where(scaled, u, 1.0)
    g_d = torch.where(scaled, mask.g_d * clean / divisor, mask.g_d)
    g_q = torch.where(scaled, mask.g_q * full / divisor, mask.g_q)
    return TwoAdvantages(u, RouteMask.weights(mask.m, g_d, g_q), split)


def check_two_advantages(trainer: Any) -> None:
    """Refuse losses that cannot be taken apart by block.

    Raises:
        GradRouteError: an entropy bonus, an auxiliary loss, or an unknown type of loss.
    """
    refused = {
        "an entropy bonus": getattr(trainer, "_entropy_bonus_enabled", False),
        "a router's auxiliary loss": getattr(trainer, "aux_loss_enabled", False),
        f"loss_type={trainer.loss_type!r}": trainer.loss_type not in LOSS_TYPES,
    }
    found = [name for name, is_on in refused.items() if is_on]
    if found:
        raise GradRouteError(
            "`clean_baseline` trains the two blocks on two advantages, which is not worked out for "
            f"{', '.join(found)}. Fix: leave that out, or clean_baseline=False."
        )
