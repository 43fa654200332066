"""Temporary views of a model: the quarantine ablated (in full, in part, for some rows), or all adapters off.

    ablated:   y = W x + s_d B_d A_d x + (scale * m) s_q B_q A_q x
    disabled:  y = W x

A view is a number read in the forward. Parameters, `requires_grad` and gradients are untouched; views nest, multiply,
and end with their block, also on an exception.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from gradroute.adapters._state import ForwardState, combine_scales
from gradroute.adapters.layer import RoutedLinear, routed_linears
from gradroute.errors import RouteError


def ablate_quarantine(
    model: nn.Module, scale: float = 0.0, rows: Bool[Tensor, "*batch"] | None = None
) -> AbstractContextManager[nn.Module]:
    """m <- scale * m, for all rows or for those where `rows` is True.

    Args:
        model: a model with routed layers.
        scale: 0 removes the quarantine, 1 leaves it; values between give dose curves.
        rows: boolean (batch,) or (batch, seq); the other rows keep their quarantine.

    Raises:
        RouteError: `scale` outside [0, 1], or `rows` not boolean.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or not 0 <= scale <= 1:
        raise RouteError(f"`scale` should be a number in [0, 1]. Found {scale!r}.")
    factor: float | Tensor = float(scale)
    if rows is not None:
        if not isinstance(rows, Tensor) or rows.dtype != torch.bool or rows.ndim not in (1, 2):
            raise RouteError(f"`rows` should be a boolean tensor of shape (batch,) or (batch, seq). Found {rows!r}.")
        factor = torch.where(rows, float(scale), 1.0)
    return _viewed(
        model, routed_linears(model), lambda s: ForwardState(s.route, combine_scales(s.scale, factor), s.disabled)
    )


def disable_adapters(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """y <- W x: both blocks off, as for the reference pass of a KL penalty; also what PEFT trains besides them.

    A routed layer that runs in this view does not count as having run under an open route. Unlike PEFT's
    `model.disable_adapter()` it leaves every `requires_grad` alone.

    Args:
        model: with routed layers.

    Raises:
        GradRouteError: `model` has no routed layers.
    """
    return _disabled(model, routed_linears(model))


@contextmanager
def _disabled(model: nn.Module, layers: Mapping[str, RoutedLinear]) -> Iterator[nn.Module]:
    # PEFT's wrappers of `modules_to_save` and of other adapters read this flag in their forward.
    flag = "_disable_adapters"
    before = {m: m.__dict__[flag] for m in model.modules() if flag in m.__dict__ and not isinstance(m, RoutedLinear)}
    try:
        for wrapper in before:
            setattr(wrapper, flag, True)
        with changed_state(layers, lambda state: ForwardState(state.route, state.scale, disabled=True)):
            yield model
    finally:
        for wrapper, disabled in before.items():
            setattr(wrapper, flag, disabled)


def without_route(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Suspend an open route, so that a batch of other rows can run in between."""
    return _viewed(model, routed_linears(model), lambda state: ForwardState(None, state.scale, state.disabled))


@contextmanager
def _viewed(
    model: nn.Module, layers: Mapping[str, RoutedLinear], change: Callable[[ForwardState], ForwardState]
) -> Iterator[nn.Module]:
    with changed_state(layers, change):
        yield model


def set_states(layers: Mapping[str, RoutedLinear], change: Callable[[ForwardState], ForwardState]) -> None:
    """Give every layer its changed state; layers that shared a state share the new one."""
    changed: dict[ForwardState, ForwardState] = {}
    for layer in layers.values():
        if layer.state not in changed:
            changed[layer.state] = change(layer.state)
        layer.state = changed[layer.state]


@contextmanager
def changed_state(layers: Mapping[str, RoutedLinear], change: Callable[[ForwardState], ForwardState]) -> Iterator[None]:
    """Change the state of `layers` for the duration of the block.

    Raises `RouteError` at the end if the layers are not in the state that the block gave them: then blocks were left in
    another order than entered, and putting the old state back would undo somebody else's.
    """
    before = {name: layer.state for name, layer in layers.items()}
    try:
        set_states(layers, change)
        inside = {name: layer.state for name, layer in layers.items()}
        yield
        moved = [name for name, layer in layers.items() if layer.state is not inside[name]]
        if moved:
            raise RouteError(
                f"The route or ablation of `{moved[0]}` was changed from outside of its block: blocks were left in "
                "another order than entered. Fix: nest `with` blocks, and do not leave one open in a generator."
            )
    finally:
        for name, layer in layers.items():
            layer.state = before[name]
