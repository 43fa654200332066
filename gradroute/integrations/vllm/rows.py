"""Which rows an engine has to sample ablated: those that are ablated in the view that the model is in now."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gradroute.adapters.layer import routed_linears
from gradroute.errors import GradRouteError


def ablated_rows(model: nn.Module, rows: int) -> list[bool]:
    """Whether each of `rows` rows is ablated in the view that the model is in now.

    Args:
        model: with routed layers.
        rows: that are sampled.

    Raises:
        GradRouteError: a view that is neither on nor ablated in each row, or of another number of rows.
    """
    return rows_in_view(list(routed_linears(model).values()), rows)


def rows_in_view(layers: Sequence[Any], rows: int) -> list[bool]:
    """As `ablated_rows`, of layers that were found before."""
    states = {layer.state for layer in layers}
    if len(states) != 1:
        raise GradRouteError(
            f"All routed layers should be in one view: an engine shows a view of the whole model. Found {len(states)}. "
            "Fix: ablate the model, not a part of it."
        )
    (state,) = states
    scale = state.scale
    if isinstance(scale, Tensor) and tuple(scale.shape) != (rows,):
        raise GradRouteError(
            f"The model's view should be of the {rows} rows that are sampled. Found one of shape {tuple(scale.shape)}."
        )
    scales = scale.tolist() if isinstance(scale, Tensor) else [scale] * rows
    # PEFT's own `disable_adapter` leaves the state as it is, but not the view.
    views = {layer.view for layer in layers}
    if "disabled" in views or state.route is not None or not all(each in (0.0, 1.0) for each in scales):
        found = "an open route" if state.route is not None else f"the view {min(views)!r}"
        raise GradRouteError(
            f"An engine shows each row on or ablated. Found {found}. Fix: sample outside of routes and of other views."
        )
    return [each == 0.0 for each in scales]
