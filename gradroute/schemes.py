"""Published routing schemes as masks: what each one does to a row, in (m, g_d, g_q).

| scheme                | clean / retain                  | flagged / forget                | source               |
|-----------------------|---------------------------------|---------------------------------|----------------------|
| GRAFT, classic        | (1, 1, 1)                       | (1, 1 - l, 1 + l (kappa_q - 1)) | shawnghu/small-rl    |
| GRAFT, exclusive      | (1, 1 + l (kappa_d - 1), 1 - l) | (1, 1 - l, 1 + l (kappa_q - 1)) | the same             |
| SGTM                  | (0, 1, 0)                       | (1, 0, 1)                       | arXiv:2512.05648     |
| expand, route, ablate | (1, 1, 1)                       | (1, old rate, 1)                | arXiv:2410.04332     |
| detach mix            | (1, m_d, m_q)                   | (1, m_d, m_q)                   | arXiv:2410.04332     |
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradroute._checks import finite_number, one_of
from gradroute.adapters.mask import RouteMask
from gradroute.errors import GradRouteError


def graft_mask(
    flagged: Bool[Tensor, "*rows"],
    *,
    strength: float = 1.0,
    sizes: tuple[float, float] = (1.0, 1.0),
    cap: float = 4.0,
    scheme: Literal["classic", "exclusive"] = "classic",
) -> RouteMask:
    """g_d, g_q = 1 - l, 1 + l (kappa_q - 1) on flagged rows;  1, 1 or 1 + l (kappa_d - 1), 1 - l on the others.

    kappa = (n_d + n_q) / n, at most `cap`: the block that learns alone steps as far as both together would.

    Args:
        flagged: True where a row looks like a hack.
        strength: l (lambda); 0 trains both blocks on everything, above 1 (over-routing) pushes the other block back.
        sizes: (n_d, n_q), ranks or numbers of parameters of the deployed and the quarantine block.
        cap: of both kappas; without one a small quarantine would take steps without bound.
        scheme: "classic" (the others train both blocks) or "exclusive" (at l = 1, the deployed block only).

    The quarantine stays in the forward of all rows, as in the published runs. A weight that is negative, or above 1,
    needs a loss of plain log-probabilities: a clipped ratio would not see it.

    Raises:
        GradRouteError: flags that are not boolean, or a number out of range.

    Give each block the advantages of its weights, so that `strength` acts on both:

    >>> rewards, flagged = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([True, False, False, False])
    >>> mask = graft_mask(flagged, strength=0.5, sizes=(16, 16))
    >>> mask.g_d.tolist(), mask.g_q.tolist()
    ([0.5, 1.0, 1.0, 1.0], [1.5, 1.0, 1.0, 1.0])
    >>> deployed = weighted_baseline_advantages(rewards, mask.g_d, group_size=4)
    >>> quarantine = weighted_baseline_advantages(rewards, mask.g_q, group_size=4)
    >>> RouteMask.weights(mask.m, mask.g_d * deployed, mask.g_q * quarantine)
    RouteMask((4,), rows: 0 keep, 0 absorb, 0 route, 4 weighted)
    """
    one_of("scheme", scheme, ("classic", "exclusive"))
    if not 0 <= strength < float("inf"):
        raise GradRouteError(f"`strength` should be a number >= 0. Found {strength!r}.")
    if len(sizes) != 2 or not all(0 < size < float("inf") for size in sizes):
        raise GradRouteError(f"`sizes` should be two positive numbers. Found {sizes!r}.")
    if not 1 <= cap < float("inf"):
        raise GradRouteError(f"`cap` should be a number >= 1. Found {cap!r}.")
    _flags("flagged", flagged)
    kappa_d, kappa_q = (min(sum(sizes) / size, cap) for size in sizes)
    less, more_d, more_q = 1 - strength, 1 + strength * (kappa_d - 1), 1 + strength * (kappa_q - 1)
    if scheme == "classic":
        return RouteMask.weights(1.0, torch.where(flagged, less, 1.0), torch.where(flagged, more_q, 1.0))
    return RouteMask.weights(1.0, torch.where(flagged, less, more_d), torch.where(flagged, more_q, less))


def sgtm_mask(forget: Bool[Tensor, "*rows"], unlabelled: Bool[Tensor, "*rows"] | None = None) -> RouteMask:
    """forget -> route (no gradient to retain), retain -> keep (forget activations zero), unlabelled -> absorb.

    Args:
        forget: True where a row is forget data.
        unlabelled: True where it is not known; None if all of it is.

    Raises:
        GradRouteError: flags that are not boolean, or a row with both.

    >>> sgtm_mask(torch.tensor([True, False, False]), unlabelled=torch.tensor([False, False, True]))
    RouteMask((3,), rows: 1 keep, 1 absorb, 1 route)
    """
    zones = 2 * _flags("forget", forget).long()
    if unlabelled is None:
        return RouteMask.zones(zones)
    if _flags("unlabelled", unlabelled).shape != forget.shape:
        raise GradRouteError(
            f"`unlabelled` should have the shape of `forget`, {tuple(forget.shape)}. Found {tuple(unlabelled.shape)}."
        )
    if (forget & unlabelled).any():
        raise GradRouteError("`forget` and `unlabelled` should exclude each other. Found a row with both.")
    return RouteMask.zones(zones + unlabelled.long())


def expand_route_ablate_mask(forget: Bool[Tensor, "*rows"], *, old_rate: float = 0.0) -> RouteMask:
    """g_d = old_rate on forget rows, else 1; m = g_q = 1: on forget data the added dimensions learn.

    Args:
        forget: True where a row is to be learnt by the quarantine (the added dimensions) only.
        old_rate: learning rate of the deployed block there, relative to its own; published with 0 and -0.75.

    Raises:
        GradRouteError: flags that are not boolean.

    >>> expand_route_ablate_mask(torch.tensor([True, False]), old_rate=-0.75).g_d.tolist()
    [-0.75, 1.0]
    """
    old_rate = finite_number("old_rate", old_rate)
    return RouteMask.weights(1.0, torch.where(_flags("forget", forget), old_rate, 1.0), 1.0)


def detach_mix_mask(deployed: Float[Tensor, "*rows"], quarantine: Float[Tensor, "*rows"]) -> RouteMask:
    """y = m a + (1 - m) stopgrad(a) at each block's output, with `deployed` and `quarantine` as the two m.

    For layers made with `stop_gradient="branch"`: detaching cuts the gradient to lower layers as well.

    Args:
        deployed, quarantine: m of each block, per row or token.

    Raises:
        RouteError: weights that are not finite, or of other shapes.

    >>> detach_mix_mask(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))
    RouteMask((2,), rows: 0 keep, 1 absorb, 1 route)
    """
    return RouteMask.weights(1.0, deployed, quarantine)


def _flags(argument: str, flags: Bool[Tensor, "*rows"]) -> Bool[Tensor, "*rows"]:
    if not isinstance(flags, Tensor) or flags.dtype != torch.bool:
        found = flags.dtype if isinstance(flags, Tensor) else type(flags).__name__
        raise GradRouteError(f"`{argument}` should be a boolean tensor. Found {found}. Fix: pass flags.bool().")
    return flags
