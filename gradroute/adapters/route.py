"""Putting a mask in force: `route()` around forward and backward, or `set_route()` / `clear_route()`.

The mask is read when a routed layer runs forward, and saved with its activations. So closing a route before backward
is exact, except under gradient checkpointing, where the forward runs again inside backward: there it raises.
Without a route every row is absorbed: m = g_d = g_q = 1.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from gradroute.adapters._state import ActiveRoute, ForwardState
from gradroute.adapters.layer import RoutedLinear, routed_linears
from gradroute.adapters.mask import RouteMask
from gradroute.adapters.views import changed_state, set_states
from gradroute.errors import RouteError


def route(model: nn.Module, mask: RouteMask) -> AbstractContextManager[RouteMask]:
    """Forwards inside use `mask`; enclose both forward and backward.

    Nests: an inner route replaces the outer one for its duration. On leaving without an exception, raises `RouteError`
    if a routed layer of `model` did not run: its mask would have been asked for and not applied.

    Args:
        model: with routed layers.
        mask: a row per sequence of the batches that run inside, or an entry per token.

    Raises:
        RouteError: `mask` is no `RouteMask`, its rows do not fit a batch, or a routed layer did not run.
    """
    return _routed(routed_linears(model), ActiveRoute(_checked(mask), sticky=False))


@contextmanager
def _routed(layers: dict[str, RoutedLinear], active: ActiveRoute) -> Iterator[RouteMask]:
    outer = {name: layer.ran_under for name, layer in layers.items()}
    try:
        with changed_state(layers, lambda state: _with_route(state, active)):
            yield active.mask
            _check_all_ran(layers, active)
    finally:
        active.closed = True
        for name, layer in layers.items():
            layer.ran_under = outer[name]


def set_route(model: nn.Module, mask: RouteMask) -> None:
    """Put `mask` in force until `clear_route(model)` or the next `set_route`; for loops that own no `with` block.

    Args:
        model, mask: as for `route`.

    Raises:
        RouteError: a `route()` block is open, or the mask set before was never used by some layer.
    """
    layers = routed_linears(model)
    active = ActiveRoute(_checked(mask), sticky=True)
    _close_sticky(layers, "set_route")
    set_states(layers, lambda state: _with_route(state, active))


def clear_route(model: nn.Module) -> None:
    """End the route of `set_route`.

    Args:
        model: that was given to `set_route`.

    Raises:
        RouteError: no sticky route is set, a `route()` block is open, or some layer never ran under the mask. The
            route is cleared also in the last case.
    """
    layers = routed_linears(model)
    if all(layer.state.route is None for layer in layers.values()):
        raise RouteError("clear_route(model) found no route to clear. Fix: call it once for each set_route sequence.")
    _close_sticky(layers, "clear_route")


def _with_route(state: ForwardState, active: ActiveRoute | None) -> ForwardState:
    return ForwardState(route=active, scale=state.scale, disabled=state.disabled)


def _close_sticky(layers: dict[str, RoutedLinear], caller: str) -> None:
    if any(layer.view != "on" for layer in layers.values()):
        raise RouteError(f"{caller}(model) inside ablate_quarantine or disable_adapters. Fix: leave that block first.")
    routes = {name: layer.state.route for name, layer in layers.items() if layer.state.route is not None}
    if any(not active.sticky for active in routes.values()):
        raise RouteError(f"{caller}(model) inside a `with route(...)` block. Fix: leave the block first.")
    set_states(layers, lambda state: _with_route(state, None))
    for active in {id(active): active for active in routes.values()}.values():
        active.closed = True
        _check_all_ran({name: layers[name] for name in routes if routes[name] is active}, active)


def _checked(mask: RouteMask) -> RouteMask:
    if not isinstance(mask, RouteMask):
        raise RouteError(
            f"`mask` should be a RouteMask. Found {type(mask).__name__}. Fix: RouteMask.classic(flags) or .zones(...)."
        )
    return mask


def _check_all_ran(layers: dict[str, RoutedLinear], active: ActiveRoute) -> None:
    idle = [name for name, layer in layers.items() if layer.ran_under is not active]
    if idle:
        shown = ", ".join(f"`{name}`" for name in idle[:5]) + (" ..." if len(idle) > 5 else "")
        raise RouteError(
            f"{len(idle)} of {len(layers)} routed layers did not run inside the route: {shown}. Their mask was asked "
            "for and not applied. Fix: run the forward inside `route(...)`, or exclude these modules when attaching."
        )
