"""Group advantages for two blocks.

    a_i = r_i - mean over the group of r                          (for the quarantine)
    b_i = r_i - mean over the group's unflagged rows of r          (for the deployed block; 0 where flagged)

Without the second baseline the unflagged rows of a group with hacks are all below average, and the deployed block is
pushed away from whatever they do: at 8 hacks of 16, by one whole reward.
"""

from typing import NamedTuple

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, where

from gradroute._typing import typechecked
from gradroute.errors import GradRouteError


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
    std_normalize: bool = False,
) -> GroupAdvantages:
    """a = r - mean(r), and b = r - mean(r over unflagged) on unflagged rows, 0 on flagged ones, per group.

    Args:
        rewards: groups of `group_size` consecutive rollouts of one prompt.
        flagged: True where a rollout looks like a hack.
        group_size: rollouts per prompt.
        std_normalize: divide both by the group's standard deviation over all rows (unbiased); groups without spread
            stay 0.

    Returns:
        `GroupAdvantages(full=a, clean=b)`. A group with all rows flagged, or with a single unflagged row, has b = 0; a
        group whose rewards are all equal has a = b = 0.

    Raises:
        GradRouteError: rewards that are not whole groups, or not finite.

    Source: the "balanced" advantages of GRPO with two adapters (GRAFT, in shawnghu/small-rl).
    """
    if group_size < 2:
        raise GradRouteError(f"`group_size` should be at least 2. Found {group_size}.")
    if rewards.shape[0] == 0 or rewards.shape[0] % group_size:
        raise GradRouteError(f"`rewards` should hold whole groups of {group_size}. Found {rewards.shape[0]} rewards.")
    if not rewards.isfinite().all():
        raise GradRouteError(f"`rewards` should be finite. Found {rewards[~rewards.isfinite()][0].item()}.")
    r = rearrange(rewards, "(group member) -> group member", member=group_size)
    unflagged = ~rearrange(flagged, "(group member) -> group member", member=group_size)
    full = r - r.mean(1, keepdim=True)
    baseline = (r * unflagged).sum(1, keepdim=True) / unflagged.sum(1, keepdim=True).clamp(min=1)
    clean = where(unflagged, r - baseline, 0.0)
    # A mean of equal numbers is off by rounding; dividing that by a tiny spread would make it an advantage of one.
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    if std_normalize:
        spread = where(equal, 1.0, r.std(1, keepdim=True))
        full, clean = full / spread, clean / spread
    # The same for the unflagged rows among themselves, which includes a single one and none.
    inf = float("inf")
    kept_equal = where(unflagged, r, -inf).amax(1, keepdim=True) <= where(unflagged, r, inf).amin(1, keepdim=True)
    full, clean = where(equal, 0.0, full), where(equal | kept_equal, 0.0, clean)
    return GroupAdvantages(*(rearrange(each, "group member -> (group member)") for each in (full, clean)))
