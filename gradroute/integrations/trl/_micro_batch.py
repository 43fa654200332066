"""The advantage of each block, and micro-batches of rollouts under their masks.

    `full` (a) trains the quarantine, `clean` (b) the deployed block:
    one loss of advantage u, and weights on the gradients:   g_d <- g_d b / u,   g_q <- g_q a / u

The loss of a row scales with the size of u and clips by the sign of u. So one u serves both blocks exactly where the
policy term is the whole loss and either a b >= 0, or the ratio to the old log-probabilities is 1. The other rows
(`split`) run twice in one forward:

    forward   n rows (split rows: g_d = 0), then k copies of rows (g_q = 0, and g_d = 0 where the row is not split)
    loss      L(a; log p of the n rows) + L(b; log p of the copies of split rows, the other rows constant)

Both terms are TRL's own loss of all n rows: they divide, clip and choose tokens alike, whatever the type of loss, and
copies change none of it. k is the same on every rank, so that all ranks run forwards of one shape and join the same
gathers; a copy of a row that is not split is in neither loss.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradroute.adapters.mask import RouteMask
from gradroute.advantages import clean_baseline_advantages
from gradroute.errors import GradRouteError, RouteError

# Types of TRL's loss whose policy term scales with the size of the advantage.
LOSS_TYPES = ("grpo", "dr_grpo", "luspo", "sapo", "bnpo", "dapo", "cispo", "vespo")
# What rides in TRL's dictionary of rollouts, whose tensors are shuffled and split together.
M, G_D, G_Q = "route_m", "route_g_d", "route_g_q"
CLEAN, SPLIT, SCORE = "route_clean_advantages", "route_split", "route_score"
LOG_RATIO = "route_log_ratio"
_ROUTE = (M, G_D, G_Q, CLEAN, SPLIT, SCORE, LOG_RATIO)


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


def put_route(rollouts: dict[str, Any], mask: RouteMask, scores: Tensor | None) -> None:
    """Write a row's mask and score into TRL's dictionary."""
    rollouts |= {M: mask.m, G_D: mask.g_d, G_Q: mask.g_q}
    if scores is not None:
        rollouts[SCORE] = scores


class RowsTwice:
    """Copies of rows in the forward of the rows themselves, and which log-probabilities each of the two losses sees.

    Args:
        rows: the row of each copy.
        split: whether that row is split; if not, the copy only keeps this rank in step with the others.
    """

    def __init__(self, rows: Int[Tensor, " copies"], split: Bool[Tensor, " copies"]) -> None:
        self.rows, self.split = rows, split
        self._found: tuple[Any, ...] | None = None
        self._tokens: Tensor | None = None
        self._size = 0

    def forward(self, run: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """For the first loss, `run` on rows and copies, and what it found of the rows; for the second, of the copies.

        Args:
            run: TRL's log-probabilities and entropies.
            model, args, kwargs: its arguments, of n rows.
        """
        if self._found is None:
            self._size = len(args[0] if args else kwargs["input_ids"])
            again = {key: self._with_copies(value) for key, value in kwargs.items()}
            self._found = tuple(run(model, *map(self._with_copies, args), **again))
            return tuple(each[: self._size] if self._is_per_row(each) else each for each in self._found)
        return tuple(self._of_copies(each) for each in self._found)

    def tokens(self, choose: Callable[[], Tensor]) -> Tensor:
        """The tokens that the loss counts: chosen for the first loss, the same ones for the second."""
        if self._tokens is None:
            self._tokens = choose()
        return self._tokens

    def _with_copies(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape[:1] == (self._size,):
            return torch.cat([value, value[self.rows]])
        return value

    def _is_per_row(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape[:1] == (self._size + len(self.rows),)

    def _of_copies(self, value: Any) -> Any:
        if not self._is_per_row(value):
            return value
        constant = value[: self._size].detach()
        split = self.split.view(-1, *[1] * (value.ndim - 1))
        return constant.index_copy(0, self.rows, torch.where(split, value[self._size :], constant[self.rows]))


@dataclass(frozen=True)
class MicroBatch:
    """The inputs and the mask of one micro-batch.

    Args:
        inputs: TRL's own entries.
        mask: of its rows, then of their copies.
        twice: the copies; None where no row runs twice.
        clean: TRL's own entries for the second loss.
    """

    inputs: dict[str, Any]
    mask: RouteMask
    twice: RowsTwice | None = None
    clean: dict[str, Any] | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Any], copies: int = 0) -> "MicroBatch":
        """Take the route out of a micro-batch of rollouts.

        Args:
            inputs: what TRL gives to `compute_loss`.
            copies: how many rows run twice, the most that any rank has to; split rows first.

        Raises:
            RouteError: the rollouts carry no route.
        """
        if any(key not in inputs for key in (M, G_D, G_Q)):
            raise RouteError(
                "A micro-batch of rollouts should carry its route. Found none: it was not made by this trainer's "
                "_generate_and_score_completions. Fix: override that method by calling super()."
            )
        own = {key: value for key, value in inputs.items() if key not in _ROUTE}
        mask = RouteMask.weights(inputs[M], inputs[G_D], inputs[G_Q])
        if not copies:
            return cls(own, mask)
        split = inputs[SPLIT]
        rows = split.long().argsort(descending=True, stable=True)[:copies]
        twice = RowsTwice(rows, split[rows])
        mask = RouteMask.weights(
            torch.cat([mask.m, mask.m[rows]]),
            torch.cat([mask.g_d.masked_fill(split, 0.0), mask.g_d[rows].masked_fill(~twice.split, 0.0)]),
            torch.cat([mask.g_q, torch.zeros_like(mask.g_q[rows])]),
        )
        return cls(own, mask, twice, {**own, "advantages": inputs[CLEAN]})
