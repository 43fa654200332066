"""Temporary views of a model: the quarantine ablated (in full, in part, for some rows), or all adapters off.

    ablated:   y = W x + s_d B_d A_d x + (scale * m) s_q B_q A_q x
    disabled:  y = W x

A view is a number read in the forward. Parameters, `requires_grad` and gradients are untouched; views nest, multiply,
and end with their block, also on an exception. A view belongs to the thread that opened it, and to threads that are
started inside and do not train.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from gradroute._checks import listed, share
from gradroute._module_tree import named_modules
from gradroute.adapters._gates import combine_scales
from gradroute.adapters._state import Change, ForwardState, Layers, changed_state, is_expert, marks_of
from gradroute.adapters.layer import RoutedLinear, routed_linears
from gradroute.errors import RouteError


def ablate_quarantine(
    model: nn.Module, scale: float = 0.0, rows: Bool[Tensor, "*batch"] | None = None
) -> AbstractContextManager[nn.Module]:
    """m <- scale * m, for all rows or for those where `rows` is True.

    On leaving without an exception, raises `RouteError` if some routed layers of `model` ran inside and others did not:
    a forward that bypasses a layer (a fused kernel, a patched `forward`) does not show it in this view. An expert may
    get no token and is not counted.

    Args:
        model: a model with routed layers.
        scale: 0 removes the quarantine, 1 leaves it; values between give dose curves.
        rows: boolean (batch,) or (batch, seq); the other rows keep their quarantine.

    Raises:
        RouteError: `scale` outside [0, 1], `rows` not boolean, or a layer was passed by.
    """
    factor: float | Tensor = share("scale", scale, RouteError)
    if rows is not None:
        if not isinstance(rows, Tensor) or rows.dtype != torch.bool or rows.ndim not in (1, 2):
            raise RouteError(f"`rows` should be a boolean tensor of shape (batch,) or (batch, seq). Found {rows!r}.")
        # In float32 where there is no wider type, never in the default one: 0.3 in bf16 is off by 0.2 %.
        wide = torch.float32 if rows.device.type == "mps" else torch.float64
        factor = torch.where(rows, torch.tensor(factor, dtype=wide, device=rows.device), 1.0)
    return _viewed(
        model, routed_linears(model), lambda s: ForwardState(s.route, combine_scales(s.scale, factor), s.disabled)
    )


def disable_adapters(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """y <- W x: both blocks off, as for the reference pass of a KL penalty; PEFT's `modules_to_save` are off as well.

    On leaving, raises as `ablate_quarantine` does if a routed layer was passed by. A routed layer that runs in this
    view does not count as having run under an open route. Unlike PEFT's `model.disable_adapter()` this leaves every
    `requires_grad` alone.

    Args:
        model: with routed layers.

    Raises:
        GradRouteError: `model` has no routed layers.
    """
    return _disabled(model, routed_linears(model))


@contextmanager
def _disabled(model: nn.Module, layers: Layers) -> Iterator[nn.Module]:
    # PEFT's wrappers of `modules_to_save` and of other adapters read this flag in their forward.
    flag = "_disable_adapters"
    wrappers = [m for m in named_modules(model).values() if flag in m.__dict__ and not isinstance(m, RoutedLinear)]
    before = {wrapper: wrapper.__dict__[flag] for wrapper in wrappers}
    try:
        for wrapper in before:
            setattr(wrapper, flag, True)
        with _viewed(model, layers, lambda state: ForwardState(state.route, state.scale, disabled=True)):
            yield model
    finally:
        for wrapper, disabled in before.items():
            setattr(wrapper, flag, disabled)


@contextmanager
def _viewed(model: nn.Module, layers: Layers, change: Change) -> Iterator[nn.Module]:
    with marks_of(layers, "ran", count_outside=True), changed_state(layers, change):
        yield model
        idle = [name for name, layer in layers.items() if not layer.ran and not is_expert(name)]
        if idle and any(layer.ran for layer in layers.values()):
            raise RouteError(
                f"Every routed layer should run in a view, or none. Found {len(idle)} of {len(layers)} that did not "
                f"run: {listed(idle)}. A forward that bypasses them may still show their quarantine. "
                "Fix: pass the module that runs, and undo patches that replace a routed layer's forward."
            )


def without_route(model: nn.Module) -> AbstractContextManager[None]:
    """Suspend an open route, so that a batch of other rows can run in between.

    Args:
        model: with routed layers.

    Raises:
        GradRouteError: `model` has no routed layers.
    """
    return changed_state(routed_linears(model), lambda state: ForwardState(None, state.scale, state.disabled))
