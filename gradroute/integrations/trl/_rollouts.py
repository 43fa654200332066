"""A row per rollout: how it was sampled, which block it trains, and with which advantage.

    sampled ablated        m = 0, g_q = 0: it trains the deployed block, or, if flagged, nothing
    advantages a (full) and b (clean) in one loss of advantage u:   g_d <- g_d b / u,   g_q <- g_q a / u

The loss of a row scales with the size of u, and clips by its sign. So that u carries both advantages exactly where the
policy term is all there is and either a b >= 0, or the ratio to the old log-probabilities is 1. Rows of which that is
not true (`split`) are run twice: once for the quarantine with a, once for the deployed block with b.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradroute.adapters.mask import RouteMask
from gradroute.advantages import clean_baseline_advantages
from gradroute.errors import GradRouteError, RouteError

M, G_D, G_Q = "route_m", "route_g_d", "route_g_q"
CLEAN, SPLIT, SCORE = "route_clean_advantages", "route_split", "route_score"
_OURS = (M, G_D, G_Q, CLEAN, SPLIT, SCORE)

# What the loss of a part of a micro-batch has to be multiplied with, by TRL's loss types: how they average.
_MEAN_OF_ROWS = ("grpo", "dr_grpo", "luspo", "sapo")
_MEAN_OF_TOKENS = ("bnpo",)
_OF_ALL_ROLLOUTS = ("dapo", "cispo", "vespo")
LOSS_TYPES = _MEAN_OF_ROWS + _MEAN_OF_TOKENS + _OF_ALL_ROLLOUTS


def sampled_ablated(rows: int, first: int, group_size: int, share: int) -> Bool[Tensor, " rows"]:
    """The first `share` rollouts of each group; `first` is the place of this process's first row among all rows."""
    return (first + torch.arange(rows)) % group_size < share


def as_sampled(mask: RouteMask, ablated: Bool[Tensor, " rows"]) -> RouteMask:
    """`mask`, in which rows that were sampled without the quarantine stay without it, and do not train it."""
    off = ablated.to(mask.m.device)
    return RouteMask.weights(mask.m.masked_fill(off, 0.0), mask.g_d, mask.g_q.masked_fill(off, 0.0))


def with_flags(mask: RouteMask, flags: Bool[Tensor, " rows"]) -> RouteMask:
    """`mask`, with flagged rows in the route zone whatever they were in."""
    on = flags.to(mask.m.device)
    return RouteMask.weights(mask.m.masked_fill(on, 1.0), mask.g_d.masked_fill(on, 0.0), mask.g_q.masked_fill(on, 1.0))


def clean_advantages(
    rewards: Float[Tensor, " rows"], flagged: Bool[Tensor, " rows"], full: Float[Tensor, " rows"], group_size: int
) -> Float[Tensor, " rows"]:
    """b of `clean_baseline_advantages`, with the factor per group by which TRL's `full` differs from r - mean(r).

    Raises:
        GradRouteError: TRL's advantages are no multiple of r - mean(r) in some group, so no such factor exists.
    """
    centred, clean = clean_baseline_advantages(rewards, flagged, group_size)
    centred, clean, full = (each.view(-1, group_size) for each in (centred, clean, full))
    spread = centred.abs().sum(1, keepdim=True)
    factor = torch.where(spread > 0, full.abs().sum(1, keepdim=True) / spread.clamp(min=1e-30), 1.0)
    if not torch.allclose(factor * centred, full, rtol=1e-3, atol=1e-4):
        raise GradRouteError(
            "`clean_baseline` needs advantages that are rewards minus the mean of their group, scaled. Found others: "
            "they are aggregated or normalised in another way. Fix: multi_objective_aggregation='sum_then_normalize', "
            "or clean_baseline=False."
        )
    return (factor * clean).reshape(-1)


@dataclass(frozen=True)
class TwoAdvantages:
    """The advantage of the loss, the mask that goes with it, and which rows are run a second time."""

    advantages: Float[Tensor, " rows"]
    mask: RouteMask
    split: Bool[Tensor, " rows"]


def two_advantages(
    mask: RouteMask, full: Float[Tensor, " rows"], clean: Float[Tensor, " rows"], *, one_term: bool, ratio_is_one: bool
) -> TwoAdvantages:
    """Train the quarantine with `full` and the deployed block with `clean`; see the module's formulas.

    Args:
        one_term: the loss has no term besides the policy's, so that weights on gradients may carry advantages.
        ratio_is_one: old log-probabilities are those of the loss's own forward.
    """
    trains_d, trains_q = mask.g_d != 0, (mask.m != 0) & (mask.g_q != 0)
    differ = trains_d & trains_q & (full != clean)
    exact = (ratio_is_one | (full * clean >= 0)) if one_term else torch.zeros_like(differ)
    scaled, split = differ & exact, differ & ~exact
    size = torch.maximum(full.abs(), clean.abs())
    shared = torch.where(full != 0, full.sign(), clean.sign()) * size
    u = torch.where(scaled, shared, torch.where(trains_d & ~trains_q, clean, full))
    by = torch.where(scaled, u, 1.0)
    g_d = torch.where(scaled, mask.g_d * clean / by, mask.g_d)
    g_q = torch.where(scaled, mask.g_q * full / by, mask.g_q)
    return TwoAdvantages(u, RouteMask.weights(mask.m, g_d, g_q), split)


def put_route(rollouts: dict[str, Any], mask: RouteMask, scores: Tensor | None) -> None:
    """Into TRL's rollout dictionary, whose tensors are shuffled and split together."""
    rollouts |= {M: mask.m, G_D: mask.g_d, G_Q: mask.g_q}
    if scores is not None:
        rollouts[SCORE] = scores


@dataclass(frozen=True)
class MicroBatch:
    """What one micro-batch is run with: TRL's own entries, the mask, and the rows that are run again."""

    inputs: dict[str, Any]
    mask: RouteMask
    again: dict[str, Any] | None
    again_mask: RouteMask | None
    again_share: float | Tensor

    @staticmethod
    def splits(inputs: Mapping[str, Any], device: torch.device) -> Bool[Tensor, ""]:
        """Whether some row of a micro-batch has to be run twice."""
        return inputs[SPLIT].any() if SPLIT in inputs else torch.zeros((), dtype=torch.bool, device=device)

    @classmethod
    def of(cls, inputs: Mapping[str, Any], loss_type: str, *, always_again: bool) -> "MicroBatch":
        """Take the route out of a micro-batch of rollouts.

        Args:
            inputs: what TRL gives to `compute_loss`.
            loss_type: of the trainer.
            always_again: run some row again in any case (the other ranks do); it then weighs nothing.

        Raises:
            RouteError: the rollouts carry no route.
        """
        if any(key not in inputs for key in (M, G_D, G_Q)):
            raise RouteError(
                "A micro-batch of rollouts should carry its route. Found none: it was not made by this trainer's "
                "_generate_and_score_completions. Fix: override that method by calling super()."
            )
        plain = {key: value for key, value in inputs.items() if key not in _OURS}
        mask = RouteMask.weights(inputs[M], inputs[G_D], inputs[G_Q])
        split = inputs.get(SPLIT)
        if split is None or not (always_again or bool(split.any())):
            return cls(plain, mask, None, None, 0.0)
        first = RouteMask.weights(mask.m, mask.g_d.masked_fill(split, 0.0), mask.g_q)
        some = bool(split.any())
        rows = split.nonzero().squeeze(1) if some else torch.zeros(1, dtype=torch.long, device=split.device)
        size = len(split)
        again = {
            key: value[rows] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
            for key, value in plain.items()
        }
        again["advantages"] = inputs[CLEAN][rows]
        second = RouteMask.weights(mask.m[rows], mask.g_d[rows], 0.0)
        # A row that only keeps this rank in step with the others counts nothing.
        return cls(plain, first, again, second, _share(plain, again, loss_type) if some else 0.0)


def _share(whole: Mapping[str, Any], part: Mapping[str, Any], loss_type: str) -> float | Tensor:
    if loss_type in _MEAN_OF_ROWS:
        return len(part["advantages"]) / len(whole["advantages"])
    if loss_type in _MEAN_OF_TOKENS:
        tokens = [loss_mask(each).sum().clamp(min=1) for each in (part, whole)]
        return tokens[0] / tokens[1]
    return 1.0


def loss_mask(rollouts: Mapping[str, Any]) -> Tensor:
    """Completion tokens that the policy sampled: not padding, and not what a tool returned."""
    mask: Tensor = rollouts["completion_mask"]
    return mask * rollouts["tool_mask"] if rollouts.get("tool_mask") is not None else mask
