"""Per-rollout features of the forwards (or backwards) made inside a block, pooled over tokens in the hook.

Activations, a row per rollout, with pooling weights w over the tokens of the completion:

    bottleneck   A_d (sum_t w_t x_t)         input   sum_t w_t x_t         output, residual   sum_t w_t y_t

Gradients of the loss L that is back-propagated inside the block, delta = dL/dy:

    bottleneck   sum_t h_t * (delta_t @ gain_readout),  h = A_d x   (a diagonal gain on h; readout s_d B_d)
    input        sum_t dL/dx_t through this module alone            output, residual   sum_t delta_t
    parameter    dL/d(A_d, B_d), flattened; or its inner product with given directions, without forming it

Nothing of size batch x seq x d_in is kept: a row of the feature's width per rollout, and at most 2 r numbers per token
until backward. Only `parameter` without directions holds on to inputs, and forms r d_in + d_out r numbers per rollout.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gradroute._checks import one_of
from gradroute._per_rollout import FromDelta, gain_gradient, ghost_product, parameter_gradient, sum_over_tokens
from gradroute._protocol import RoutedLayer
from gradroute._sharding import whole, wide
from gradroute._torch_private import in_backward
from gradroute.directions._reading import (
    Feature,
    Forwards,
    Pool,
    Reduction,
    TokenPooling,
    first_input,
    hidden_states,
    read_modules,
    without_autocast,
)
from gradroute.directions.directions import Directions
from gradroute.directions.features import Capture
from gradroute.directions.made_once import weights_on
from gradroute.errors import GradRouteError


@contextmanager
def capture_activations(
    model: nn.Module,
    *,
    pool: Pool,
    features: Feature = "bottleneck",
    reduction: Reduction = "mean",
    modules: Sequence[str] | None = None,
) -> Iterator[Capture]:
    """Pooled activations of every forward made inside the block; see the module's formulas.

    Args:
        model: with routed layers (needed for "bottleneck", and for `modules=None`).
        pool: (batch, seq), non-zero at the positions whose *input* token belongs to the completion; the same shape as
            the forward's input; of a packed batch (1, tokens) a row per rollout, (rollouts, tokens). A callable gets
            the module's input and returns it. None only for inputs (batch, d_in).
        features: "bottleneck" (r wide), "input" or "output" of each module; "residual": outputs of transformer blocks.
        reduction: "mean" (sum of w x over sum of w), "sum", or "last" (last non-zero position).
        modules: names; None means all routed layers, for "residual" the blocks that hold them.

    Raises:
        GradRouteError: a pool of another shape, a rollout without a pooled token, or on leaving: a module that did
            not run, features that are not finite, or a function's pool without a token in some row.
    """
    layers = read_modules(model, modules, features)
    if features == "parameter":
        raise GradRouteError('`features="parameter"` is a gradient. Fix: capture_gradients, or another feature.')
    one_of("reduction", reduction, get_args(Reduction))
    capture = Capture(model, ("activation", features, reduction), list(layers))
    forwards = Forwards(model, layers)
    pooled = TokenPooling(pool, reduction)

    def read(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if in_backward():
            return  # a checkpoint recomputation: this forward was captured when it first ran
        x = first_input(args, kwargs)
        hidden = hidden_states(name, output) if features in ("output", "residual") else x
        slot = capture.open_slot(name, forwards.view(name), forwards.number)
        with torch.no_grad(), without_autocast(hidden.device):
            rows = pooled(name, hidden, x)
            if features == "bottleneck":
                assert isinstance(module, RoutedLayer)
                rows = rows @ whole(module.deployed.A, name).to(rows.dtype).T
            capture.fill(name, slot, rows)

    with forwards.hooked(read):
        yield capture
        pooled.check()
        capture.finish()


@contextmanager
def capture_gradients(
    model: nn.Module,
    *,
    features: Feature = "bottleneck",
    modules: Sequence[str] | None = None,
    directions: Directions | None = None,
) -> Iterator[Capture]:
    """Per-rollout gradient features of the backward made inside the block; see the module's formulas.

    Args:
        model: with routed layers.
        features, modules: see `capture_activations`. "parameter" is the gradient of the deployed A and B.
        directions: with "parameter", capture each rollout's inner product with these directions, (rows, 1) per module,
            instead of its gradient. The capture can be scored by these directions alone, and until their next refresh.

    Sums run over all tokens of a row: padding and other rows have no gradient where each row's loss depends on that
    row alone. Gradients of parameters are formed as usual. A route does not gate features; dropout is not in them.

    Raises:
        GradRouteError: gradients are off, or on leaving: a module without a backward, or features not finite.
    """
    if directions is not None and (features != "parameter" or modules is not None):
        raise GradRouteError(f'`directions` needs features="parameter", all modules. Found {features}, {modules}.')
    layers = read_modules(model, modules if directions is None else list(directions.rows), features)
    homes = {name: layer.deployed.A.device for name, layer in layers.items() if isinstance(layer, RoutedLayer)}
    V = None if directions is None else weights_on(directions, homes)
    capture = Capture(model, ("gradient", features, "sum"), list(layers), directions)
    forwards = Forwards(model, layers)

    def reader(name: str, module: nn.Module, x: Tensor) -> FromDelta:
        if features in ("input", "output", "residual"):
            return sum_over_tokens
        assert isinstance(module, RoutedLayer)
        if module.view == "disabled":
            raise GradRouteError(f"`{name}` ran with adapters disabled: its {features} has no gradient there.")
        with torch.no_grad(), without_autocast(x.device):
            if features == "bottleneck":
                return gain_gradient(module, x)
            return parameter_gradient(name, module, x) if V is None else ghost_product(name, module, x, V[name])

    def keep(name: str, module: nn.Module, x: Tensor, tapped: Tensor) -> None:
        if in_backward():
            return  # a checkpoint recomputation builds the same graph, and is captured already
        if not torch.is_grad_enabled():
            raise GradRouteError(
                f"capture_gradients: `{name}` ran with gradients off, so there is nothing to capture. Fix: leave "
                "no_grad; under reentrant checkpointing use use_reentrant=False."
            )
        read = reader(name, module, x)
        slot = capture.open_slot(name, forwards.view(name), forwards.number)

        def fill(gradient: Tensor) -> None:
            with without_autocast(gradient.device):
                capture.fill(name, slot, read(wide(gradient.detach())))

        tapped.register_hook(fill)  # type: ignore[no-untyped-call]

    def tap_output(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = hidden_states(name, output)
        # With frozen parameters the lowest layers have no gradient: the graph starts at this tap.
        tapped = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        keep(name, module, first_input(args, kwargs), tapped)
        return (tapped, *output[1:]) if isinstance(output, tuple) else tapped

    def tap_input(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_input(args, kwargs)
        # Where q, k and v share one input, each needs an alias of it to see its own part of the gradient.
        alias = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        keep(name, module, x, alias)
        return ((alias, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): alias})

    before = features == "input"
    with forwards.hooked(tap_input if before else tap_output, before=before):
        yield capture
        capture.finish()
