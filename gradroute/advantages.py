"""Group advantages for two blocks.

    A_i(w) = r_i - sum_j w_j r_j / sum_j w_j          over the rows of a group; for a block with gradient weights w
    full  = A(1)                                      for the quarantine
    clean = A(unflagged), and 0 on flagged rows       for the deployed block

Identity: sum_i w_i A_i(w) = 0. With the plain baseline the unflagged rows of a group with hacks are all below average,
and the deployed block is pushed away from whatever they do: at 8 hacks of 16, by one whole reward.
A row without a reward has an advantage of 0 and takes no part in the group's means and spread.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, where

from gradroute._checks import positive_integer
from gradroute._typing import typechecked
from gradroute.errors import GradRouteError

_LEAST_SPREAD = 1e-4
"""Of a group, relative to its largest reward: the same rewards summed in another order differ by less."""


class GroupAdvantages(NamedTuple):
    """Two advantages per rollout, in the order of the rewards."""

    full: Float[Tensor, " batch"]
    clean: Float[Tensor, " batch"]


@typechecked
def clean_baseline_advantages(
    rewards: Float[Tensor, " batch"],
    flagged: Bool[Tensor, " batch"],
    group_size: int,
    *,
    no_reward: Bool[Tensor, " batch"] | None = None,
    std_normalize: bool = False,
) -> GroupAdvantages:
    """a = r - mean(r), and b = r - mean(r over unflagged) on unflagged rows, 0 on flagged ones, per group.

    Args:
        rewards: groups of `group_size` consecutive rollouts of one prompt.
        flagged: True where a rollout looks like a hack.
        group_size: rollouts per prompt.
        no_reward: True where a rollout was not judged: `rewards` is not read there (it may be NaN), a = b = 0, and the
            means are over the other rows. A group in which no rollout was judged is all 0.
        std_normalize: divide both by the standard deviation (unbiased) of all judged rows of the group, or by 1e-4 of
            the group's largest reward if that is more (in half precision by 16 roundings of it): what is smaller is
            rounding.

    Returns:
        `GroupAdvantages(full=a, clean=b)`. A group with all rows flagged, or with a single unflagged row, has b = 0; a
        group whose rewards are all equal has a = b = 0.

    Raises:
        GradRouteError: rewards that are not whole groups, or not finite where `no_reward` is False.

    Source of b: the baseline of "retain renormalization" in shawnghu/small-rl, which divides by the spread of the
    unflagged rows. Its "balanced" advantages are one vector for both adapters; see `weighted_baseline_advantages`.
    """
    judged, r = _judged_groups(rewards, group_size, no_reward)
    unflagged = judged & ~_grouped(flagged, group_size)
    full = where(judged, r - _baseline(r, judged.to(r)), 0.0)
    clean = where(unflagged, r - _baseline(r, unflagged.to(r)), 0.0)
    if std_normalize:
        spread = _spread(r, full, judged)
        full, clean = full / spread, clean / spread
    return GroupAdvantages(_ungrouped(full), _ungrouped(clean))


@typechecked
def weighted_baseline_advantages(
    rewards: Float[Tensor, " batch"],
    weights: Float[Tensor, " batch"],
    group_size: int,
    *,
    no_reward: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """A(w) = r - sum(w r) / sum(w) per group: advantages for the block that has the gradient weights w.

    With 0 and 1 as weights the rows of weight 1 have the `clean` of `clean_baseline_advantages`. Rows of other weights
    have an advantage too: multiplied with the weight, it is what such a row contributes.

    Args:
        rewards, group_size, no_reward: see `clean_baseline_advantages`.
        weights: `g_d` or `g_q` of a mask. A negative weight (over-routing) counts as 0 in the baseline.

    Returns:
        A per rollout; 0 in a group without a positive weight.

    Raises:
        GradRouteError: see `clean_baseline_advantages`; or weights that are not finite.

    The "balanced" advantages of shawnghu/small-rl, one vector for both blocks, are those of the weights 1 on unflagged
    and 0 on flagged rows.
    """
    judged, r = _judged_groups(rewards, group_size, no_reward)
    if not weights.isfinite().all():
        raise GradRouteError(f"`weights` should be finite. Found {weights[~weights.isfinite()][0].item()}.")
    w = where(judged, _grouped(weights, group_size).to(r).clamp(min=0), 0.0)
    counted = judged & (w > 0).any(1, keepdim=True)
    return _ungrouped(where(counted, r - _baseline(r, w), 0.0))


def _judged_groups(
    rewards: Float[Tensor, " batch"], group_size: int, no_reward: Bool[Tensor, " batch"] | None
) -> tuple[Bool[Tensor, "group member"], Float[Tensor, "group member"]]:
    """(which rows have a reward, the rewards, 0 where there is none), a row per group."""
    if positive_integer("group_size", group_size) < 2:
        raise GradRouteError(f"`group_size` should be at least 2. Found {group_size}.")
    if rewards.shape[0] == 0 or rewards.shape[0] % group_size:
        raise GradRouteError(f"`rewards` should hold whole groups of {group_size}. Found {rewards.shape[0]} rewards.")
    judged = torch.ones_like(rewards, dtype=torch.bool) if no_reward is None else ~no_reward
    r = where(judged, rewards, 0.0)
    if not r.isfinite().all():
        raise GradRouteError(
            f"`rewards` should be finite. Found {r[~r.isfinite()][0].item()}. Fix: mark rollouts that were not judged, "
            "as no_reward=rewards.isnan()."
        )
    return _grouped(judged, group_size), _grouped(r, group_size)


def _baseline(r: Float[Tensor, "group member"], w: Float[Tensor, "group member"]) -> Float[Tensor, "group 1"]:
    total = w.sum(1, keepdim=True)
    mean = (r * w).sum(1, keepdim=True) / where(total > 0, total, 1.0)
    # A mean of equal numbers is off by rounding, which Adam would turn into a step of full size.
    highest = where(w > 0, r, -torch.inf).amax(1, keepdim=True)
    lowest = where(w > 0, r, torch.inf).amin(1, keepdim=True)
    return where(highest == lowest, highest, mean)


def _spread(
    r: Float[Tensor, "group member"], deviation: Float[Tensor, "group member"], judged: Bool[Tensor, "group member"]
) -> Float[Tensor, "group 1"]:
    """Unbiased standard deviation, not below the floor; 1 where all rewards are zero."""
    size = r.abs().amax(1, keepdim=True)
    size = where(size > 0, size, 1.0)
    # Relative to the size, so that no square overflows or vanishes.
    squares = (deviation / size).square().sum(1, keepdim=True)
    relative = (squares / (judged.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()
    return size * relative.clamp(min=max(_LEAST_SPREAD, 16 * torch.finfo(r.dtype).eps))


def _grouped(rows: Tensor, group_size: int) -> Tensor:
    return rearrange(rows, "(group member) -> group member", member=group_size)


def _ungrouped(groups: Tensor) -> Tensor:
    return rearrange(groups, "group member -> (group member)")
