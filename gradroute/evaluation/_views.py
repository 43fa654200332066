"""One view of a model to evaluate, with the same start as every other view.

    on   y = W x + s_d B_d A_d x + scale * s_q B_q A_q x,  scale 1        ablated   the same with scale 0

Eval mode, no route, and the same random numbers of Python, numpy and torch. Every routed layer has to run: one that a
fused kernel computes in its place reads no scale, and shows the on view in both.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gradroute._protocol import routed_layers
from gradroute._restore import left_as_found
from gradroute.adapters.views import ablate_quarantine
from gradroute.errors import GradRouteError, RouteError


def check_on_view(model: nn.Module) -> None:
    """Raise unless `model` is in its on view and under no route.

    Raises:
        GradRouteError: another view, or no routed layers.
        RouteError: an open route.
    """
    layers = routed_layers(model)
    views = sorted({layer.view for layer in layers.values()} - {"on"})
    if views:
        raise GradRouteError(
            f"`model` should be in its on view. Found {views[0]!r}. "
            "Fix: leave ablate_quarantine / disable_adapters first."
        )
    routed = [name for name, layer in layers.items() if layer.has_open_route]
    if routed:
        raise RouteError(
            f"`model` should be evaluated without a route. Found one open in {len(routed)} of {len(layers)} layers, as "
            f"in `{routed[0]}`: its mask is for other rows. Fix: evaluate after the `with route(...)` block, or after "
            "clear_route(model)."
        )


@contextmanager
def in_view(model: nn.Module, scale: float) -> Iterator[None]:
    """The quarantine scaled by `scale`, in eval mode; the model and all random numbers are left as found.

    Raises:
        RouteError: some routed layers ran and others did not.
    """
    with left_as_found(model), ablate_quarantine(model, scale=scale):
        yield
