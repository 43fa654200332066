"""Each block's advantages as mask weights, by what an arm does with flags and scores.

    a = r - mean of the group          b = r - mean of the group's unflagged rollouts, 0 where flagged
    routed      g_q = a, g_d = b                      penalised   g_d = a of  r - penalty flag
    dropped     g_d = b                               graded      g_d = a - grade z          (z: 0 clean, 1 hack pairs)
    graft       g_d, g_q = (1 - l, 1 + l) A where flagged, (1, 1) A elsewhere,   A = r - mean of the unflagged

In `graft` l is the over-routing: above 1 the deployed block is pushed away from flagged rollouts, in each step at most
as hard as all others together push it. Sources: Advantage Modification (arXiv:2604.01476); GRAFT (shawnghu/small-rl),
classic masks, balanced advantages without the division by their spread.
"""

import torch
from torch import Tensor

import gradroute as gr

from .arm import Arm


def route_mask(
    arm: Arm,
    ablated: Tensor,
    reward: Tensor,
    flags: Tensor,
    group_size: int,
    penalty: float = 1.0,
    *,
    z: Tensor | None = None,
    grade: float = 1.0,
    over_routing: float = 1.0,
) -> gr.RouteMask:
    """The mask of a batch of whole groups.

    Args:
        ablated: rows that were sampled with the quarantine ablated.
        penalty, grade, over_routing: doses; each is read by the arms that are named after it.
        z: calibrated scores; of graded arms.
    """
    if arm.flagged == "graft":
        return _graft(reward, flags, group_size, over_routing)
    if arm.flagged == "penalised":
        reward, flags = reward - penalty * flags.float(), torch.zeros_like(flags)
    if arm.flagged == "graded":
        flags = torch.zeros_like(flags)
    a, b = gr.clean_baseline_advantages(reward, flags, group_size)
    if arm.flagged == "graded":
        assert z is not None
        b = a - grade * z
    if not arm.routed:
        return gr.RouteMask.weights(m=0.0, g_d=b, g_q=0.0)
    # A filter that routes gives the quarantine what it takes from the deployed block, and nothing else does. A
    # quarantine that was trained first is frozen.
    is_still = arm.gradient_filter == "route" or arm.is_inoculated
    g_q = torch.zeros_like(a) if is_still else a * ~ablated
    # Over which rollouts a baseline should be taken, a filter of rollouts decides after backward only.
    g_d = reward if arm.gradient_filter == "rollouts" else b
    return gr.RouteMask.weights(m=(~ablated).float(), g_d=g_d, g_q=g_q)


def _graft(reward: Tensor, flags: Tensor, group_size: int, over_routing: float) -> gr.RouteMask:
    mask = gr.schemes.graft_mask(flags, strength=over_routing, sizes=(1.0, 1.0))
    balanced = gr.advantages.weighted_baseline_advantages(reward, (~flags).float(), group_size)
    g_d, g_q = mask.g_d * balanced, mask.g_q * balanced
    pushed, rest = g_d[flags].abs().sum(), g_d[~flags].abs().sum()
    bounded = torch.where(flags, g_d * (rest / pushed).clamp(max=1.0), g_d) if pushed > 0 else g_d
    return gr.RouteMask.weights(m=mask.m, g_d=bounded, g_q=g_q)
