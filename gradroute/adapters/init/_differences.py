"""Paired input differences by module, as `Directions.differences()` gives them."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradroute._protocol import routed_layers
from gradroute.errors import GradRouteError

Differences = Mapping[str, Float[Tensor, "_ _"]]
"""Module name -> (pairs, d_in): input of the hack minus input of the clean side of each pair."""


def paired(D: Tensor, W: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "pairs d_in"]:
    if D.ndim != 2 or D.shape[1] != W.shape[1]:
        raise GradRouteError(
            f"`differences` should be {W.shape[1]} wide, like its input. Found {tuple(D.shape)}. "
            'Fix: extract with features="input" and give Directions.differences().'
        )
    if len(D) < 1 or not torch.isfinite(D).all():
        bad = int((~torch.isfinite(D)).sum())
        raise GradRouteError(
            f"`differences` should be finite, of one pair or more. Found {len(D)} pairs, {bad} bad values."
        )
    return D.detach().to(W)


def check_names(model: nn.Module, differences: Differences) -> None:
    layers = routed_layers(model)
    missing, unknown = [n for n in layers if n not in differences], [n for n in differences if n not in layers]
    if missing or unknown:
        raise GradRouteError(
            f"`differences` should name every routed module and no other. Missing: {missing[:5]}; unknown: "
            f"{unknown[:5]}. Fix: extract the directions from this model."
        )
