"""Rollouts as a gate takes them: the features that its directions score, and masks where some rows are not known.

mask = gate(the known rows);  a row that nothing is known of absorbs
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from gradroute.adapters.mask import RouteMask
from gradroute.directions import Capture, capture_activations
from gradroute.directions.directions import Directions


def captured_for(directions: Directions, model: nn.Module, pool: Any) -> AbstractContextManager[Capture]:
    """`capture_activations` of what `directions` read, as they were extracted."""
    made_by: Any = directions.provenance
    return capture_activations(
        model, pool=pool, features=made_by.feature, reduction=made_by.reduction, modules=list(directions.hack)
    )


def gated_rows(rows: int, known: Int[Tensor, " known"], gate: Callable[[], RouteMask]) -> RouteMask:
    """The gate's mask on the known rows; the other rows absorb, and where nothing is known the gate is not asked."""
    if not len(known):
        return RouteMask.zones(torch.ones(rows, dtype=torch.long))
    mask = gate()
    if len(known) == rows:
        return mask
    spread = [
        torch.ones(rows, dtype=part.dtype, device=part.device).index_copy(0, known.to(part.device), part)
        for part in (mask.m, mask.g_d, mask.g_q)
    ]
    return RouteMask(*spread)
