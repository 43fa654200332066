"""Put a mask in force: `route()` around forward and backward, or `set_route()` / `clear_route()`.

The mask is read when a routed layer runs forward, and saved with its activations. So closing a route before backward
is exact, except under gradient checkpointing, where the forward runs again inside backward: there it raises.
Without a route every row is absorbed: m = g_d = g_q = 1.
Of a `PendingMask` the forward reads m, and backward the gates that were decided in between.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from torch import nn

from gradroute._checks import instance_of, listed
from gradroute.adapters._gates import ActiveRoute
from gradroute.adapters._state import INITIAL, ForwardState, Layers, changed_state, marks_of, set_states
from gradroute.adapters.layer import routed_linears
from gradroute.adapters.mask import RouteMask
from gradroute.adapters.pending import PendingMask
from gradroute.errors import RouteError

Mask = TypeVar("Mask", bound=RouteMask | PendingMask)


def route(model: nn.Module, mask: Mask) -> AbstractContextManager[Mask]:
    """Forwards inside use `mask`; enclose both forward and backward.

    Nests: an inner route replaces the outer one for its duration. On leaving without an exception, raises `RouteError`
    if a routed layer of `model` made no forward with gradients inside: its mask would have been asked for and not
    applied. A reference pass under `no_grad` does not count, unless the route itself was opened under `no_grad`.

    Args:
        model: with routed layers.
        mask: a row per sequence of the batches that run inside, or an entry per token. A `PendingMask` has to be
            decided before backward.

    Raises:
        RouteError: `mask` is no mask; its rows do not fit a batch; rows that train the quarantine are ablated; a routed
            layer did not run; a backward inside belongs to a forward that ran without a route; a pending mask was not
            decided.
    """
    return _routed(routed_linears(model), _checked(mask))


@contextmanager
def _routed(layers: Layers, mask: Mask) -> Iterator[Mask]:
    active = ActiveRoute(mask, sticky=False)
    try:
        with (
            marks_of(layers, "ran_under_route", count_outside=False),
            changed_state(layers, lambda state: _with_route(state, active)),
        ):
            yield mask
            _check_used(active, {name: layer.ran_under_route for name, layer in layers.items()})
    finally:
        active.closed = True


def set_route(model: nn.Module, mask: RouteMask | PendingMask) -> None:
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


def _with_route(state: ForwardState, active: ActiveRoute) -> ForwardState:
    return ForwardState(active, state.scale, state.disabled)


def _close_sticky(layers: Layers, caller: str) -> None:
    if any(layer.view != "on" for layer in layers.values()):
        raise RouteError(f"{caller}(model) inside ablate_quarantine or disable_adapters. Fix: leave that block first.")
    routes = {name: layer.state.route for name, layer in layers.items() if layer.state.route is not None}
    if any(not active.sticky for active in routes.values()):
        raise RouteError(f"{caller}(model) inside a `with route(...)` block. Fix: leave the block first.")
    ran = {name: layer.ran_under_route for name, layer in layers.items()}
    set_states(layers, lambda _: INITIAL)
    for layer in layers.values():
        layer.ran_under_route = False
    for active in dict.fromkeys(routes.values()):
        active.closed = True
        _check_used(active, {name: ran[name] for name, of_layer in routes.items() if of_layer is active})


def _checked(mask: Mask) -> Mask:
    if not isinstance(mask, PendingMask):
        instance_of("mask", mask, RouteMask, "RouteMask.classic(flags) or .zones(...).", RouteError)
    return mask


def _check_used(active: ActiveRoute, ran: Mapping[str, bool]) -> None:
    idle = [name for name, did in ran.items() if not did]
    if idle:
        raise RouteError(
            f"{len(idle)} of {len(ran)} routed layers did not run inside the route with gradients: {listed(idle)}. "
            "Their mask was asked for and not applied. Fix: run the forward of the loss inside `route(...)`, or "
            "exclude these modules when attaching."
        )
    if isinstance(active.mask, PendingMask):
        _ = active.mask.decided
