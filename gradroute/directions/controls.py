"""Controls: directions that the real ones have to beat, or they mean nothing.

    random_like       random rows; a method, `Directions.random_like(seed)`
    shuffled_pairs    estimated from the same pairs, half of them with their sides swapped
    placebo_pairs     estimated from the same rollouts, paired across prompts: hack with hack, clean with clean
    reversed_sign     the rows negated, the sides swapped

All keep the pair features of the real directions, and `update_` renews each as its own kind. The pair scores of a
control are those of its sides as drawn, so that a gate on it works as a gate on the real directions does.
"""

import torch
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor

from gradroute._typing import typechecked
from gradroute.directions._draws import Draw
from gradroute.directions.directions import Directions
from gradroute.errors import GradRouteError


@typechecked
def shuffled_pairs(directions: Directions, seed: int) -> Directions:
    """A control estimated from the same pairs, of which half, drawn by `seed`, have their sides swapped.

    Args:
        directions: the real ones.
        seed: of the draw.
    """
    return directions.control(Draw("shuffled", seed))


@typechecked
def placebo_pairs(directions: Directions, seed: int) -> Directions:
    """A control estimated from the same rollouts, paired across prompts: hack with hack, clean with clean.

    Placebo pairs that were written by hand need no control: extract from them as from any others.

    Args:
        directions: the real ones.
        seed: of the pairing.
    """
    return directions.control(Draw("placebo", seed))


@typechecked
def reversed_sign(directions: Directions) -> Directions:
    """A control whose rows are negated and whose sides are swapped: a gate on it routes what looks clean.

    Args:
        directions: the real ones.
    """
    return directions.control(Draw("reversed", None))


@typechecked
def shuffled_flags(flags: Bool[Tensor, " rows"], *, seed: int, group_size: int | None = None) -> Bool[Tensor, " rows"]:
    """The same number of flags at random places: what a gate does at the same rate without looking.

    Args:
        flags: of the rollouts; `mask.routed`, or what a gate's `flags` returns.
        seed: of the permutation; another one at each step.
        group_size: permute within consecutive groups of so many rows, so that each prompt keeps its rate; None permutes
            the whole batch.

    Raises:
        GradRouteError: rows that do not divide into groups.
    """
    size = len(flags) if group_size is None else group_size
    if size < 1 or len(flags) % size:
        raise GradRouteError(f"`group_size` should divide the {len(flags)} rows. Found {group_size}.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(len(flags) // size, size, generator=generator).argsort(dim=1).to(flags.device)
    groups = rearrange(flags, "(group row) -> group row", row=size)
    return rearrange(groups.gather(1, order), "group row -> (group row)")
