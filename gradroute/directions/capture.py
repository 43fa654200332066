"""Per-rollout features of the forwards (or backwards) made inside a block, pooled over tokens in the hook.

Activations, a row per rollout, with pooling weights w over the tokens of the completion:

    bottleneck   A_d (sum_t w_t x_t)         input   sum_t w_t x_t         output   sum_t w_t y_t

Gradients of the loss L that is back-propagated inside the block, delta = dL/dy:

    bottleneck   sum_t h_t * dL/dh_t,  h = A_d x,  dL/dh = s_d B_d^T delta   (a diagonal gain on h, at one)
    input        sum_t dL/dx_t through this module alone          output   sum_t delta_t

Nothing of size batch x seq x d_in is kept: a row of the feature's width per rollout, and h (width r) until backward.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from gradroute.errors import GradRouteError
from gradroute.protocol import RoutedLayer, routed_layers

Feature = Literal["bottleneck", "input", "output"]
Reduction = Literal["mean", "sum", "last"]
Source = Literal["activation", "gradient"]
Pool = Shaped[Tensor, "batch seq"] | Callable[[Tensor], Tensor] | None


class Capture(Mapping[str, Tensor]):
    """Features by module name, each (rows, d_feature) in float32 or wider; several forwards concatenate in order."""

    def __init__(self, source: Source, feature: Feature, reduction: Reduction, modules: Sequence[str]) -> None:
        self.source, self.feature, self.reduction = source, feature, reduction
        self._forwards: dict[str, list[Tensor | None]] = {name: [] for name in modules}
        self._joined: dict[str, Tensor] | None = None

    def __getitem__(self, module: str) -> Float[Tensor, "rows d_feature"]:
        if self._joined is None:
            self._joined = self._join()
        return self._joined[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._forwards)

    def __len__(self) -> int:
        return len(self._forwards)

    def __repr__(self) -> str:
        forwards = max((len(slots) for slots in self._forwards.values()), default=0)
        return f"Capture({self.source}, {self.feature}, {len(self)} modules, {forwards} forwards)"

    def open_slot(self, module: str) -> int:
        """Reserve the next place in the order of forwards."""
        self._joined = None
        self._forwards[module].append(None)
        return len(self._forwards[module]) - 1

    def fill(self, module: str, slot: int, rows: Tensor) -> None:
        """Put the rows of one forward in their place; a second backward through it adds to them."""
        self._joined = None
        before = self._forwards[module][slot]
        self._forwards[module][slot] = rows if before is None else before + rows

    def finish(self) -> None:
        """Join the forwards now, so that what is missing raises at the end of the block and not at a later use."""
        self._joined = self._join()

    def _join(self) -> dict[str, Tensor]:
        verb = "run forward" if self.source == "activation" else "run forward and backward"
        idle = [name for name, slots in self._forwards.items() if not slots or any(rows is None for rows in slots)]
        if idle:
            shown = ", ".join(f"`{name}`" for name in idle[:5]) + (" ..." if len(idle) > 5 else "")
            raise GradRouteError(f"Every captured module should have {verb} inside the block. Not so: {shown}.")
        joined = {name: torch.cat([r for r in slots if r is not None]) for name, slots in self._forwards.items()}
        counts = {name: rows.shape[0] for name, rows in joined.items()}
        if len(set(counts.values())) > 1:
            raise GradRouteError(f"Every captured module should see the same rollouts. Found rows per module {counts}.")
        for name, rows in joined.items():
            if not torch.isfinite(rows).all():
                row = (~torch.isfinite(rows)).any(1).nonzero()[0].item()
                raise GradRouteError(f"The {self.source} features of `{name}` are not finite in row {row}.")
        return joined


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
            the forward's input. A callable gets the module's input and returns it. None only for inputs (batch, d_in).
        features: "bottleneck" (r wide), "input" or "output" of each module.
        reduction: "mean" (sum of w x over sum of w), "sum", or "last" (last non-zero position).
        modules: names; None means all routed layers.

    Raises:
        GradRouteError: a pool of another shape, a rollout without a pooled token, or on leaving: a module that did
            not run, or features that are not finite.
    """
    layers = _modules(model, modules, features)
    _one_of("reduction", reduction, Reduction)
    capture = Capture("activation", features, reduction, list(layers))
    weigh = _pooling(pool, reduction)

    def hook(name: str) -> Callable[..., None]:
        def pooled(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if torch._C._current_graph_task_id() != -1:
                return  # a checkpoint recomputation: this forward was captured when it first ran
            with torch.no_grad():
                rows = weigh(name, output if features == "output" else _input(args, kwargs), _input(args, kwargs))
                if features == "bottleneck":
                    rows = rows @ _routed(module).deployed.A.to(rows.dtype).T
                capture.fill(name, capture.open_slot(name), rows)

        return pooled

    with _hooked(layers, hook, lambda _: None):
        yield capture
        capture.finish()


@contextmanager
def capture_gradients(
    model: nn.Module, *, features: Feature = "bottleneck", modules: Sequence[str] | None = None
) -> Iterator[Capture]:
    """Per-rollout gradient features of the backward made inside the block; see the module's formulas.

    Sums run over all tokens of a row: padding and other rows have no gradient where each row's loss depends on that
    row alone. Gradients of parameters are formed as usual.

    Raises:
        GradRouteError: gradients are off, or on leaving: a module without a backward, or features not finite.
    """
    layers = _modules(model, modules, features)
    capture = Capture("gradient", features, "sum", list(layers))

    def keep(name: str, tapped: Tensor, bottleneck: Tensor | None, module: nn.Module) -> None:
        slot = capture.open_slot(name)

        def on_gradient(gradient: Tensor) -> None:
            gradient = _wide(gradient)
            if bottleneck is not None:
                _, B, scaling = _routed(module).deployed
                gradient = bottleneck * (scaling * (gradient @ B.detach().to(gradient.dtype)))
            capture.fill(name, slot, gradient.flatten(1, -2).sum(1) if gradient.ndim > 2 else gradient)

        tapped.register_hook(on_gradient)  # type: ignore[no-untyped-call]

    def output_hook(name: str) -> Callable[..., Tensor | None]:
        def tap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if features == "input":
                return None
            # With frozen parameters the lowest layers have no gradient of their own: the graph starts at this tap.
            tapped = output if output.requires_grad else output.detach().requires_grad_()
            if torch._C._current_graph_task_id() != -1:
                return tapped  # a checkpoint recomputation builds the same graph, and is captured already
            _check_grad_enabled(name)
            if features == "bottleneck" and _routed(module).view == "disabled":
                raise GradRouteError(f"`{name}` ran with adapters disabled: its bottleneck has no gradient there.")
            bottleneck = None
            if features == "bottleneck":
                with torch.no_grad():
                    x = _wide(_input(args, kwargs))
                    bottleneck = x @ _routed(module).deployed.A.to(x.dtype).T
            keep(name, tapped, bottleneck, module)
            return tapped

        return tap

    def input_hook(name: str) -> Callable[..., Any]:
        def tap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = _input(args, kwargs)
            # An alias of its own: where q, k and v share one input, each sees its own part of the gradient.
            alias = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            if torch._C._current_graph_task_id() == -1:
                _check_grad_enabled(name)
                keep(name, alias, None, module)
            return ((alias, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): alias})

        return tap

    with _hooked(layers, output_hook, input_hook if features == "input" else lambda _: None):
        yield capture
        capture.finish()


@contextmanager
def _hooked(
    layers: Mapping[str, nn.Module],
    forward: Callable[[str], Callable[..., Any]],
    before: Callable[[str], Callable[..., Any] | None],
) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for name, module in layers.items():
            pre_hook = before(name)
            if pre_hook is not None:
                handles.append(module.register_forward_pre_hook(pre_hook, with_kwargs=True))
            handles.append(module.register_forward_hook(forward(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _modules(model: nn.Module, names: Sequence[str] | None, features: Feature) -> Mapping[str, nn.Module]:
    _one_of("features", features, Feature)
    if names is None:
        return routed_layers(model)
    if isinstance(names, str) or not names:
        raise GradRouteError(f"`modules` should be a list of module names. Found {names!r}.")
    known = dict(model.named_modules())
    unknown = [name for name in names if name not in known]
    if unknown:
        raise GradRouteError(f"`modules` names what `model` does not have: {unknown[:5]}. See model.named_modules().")
    if features == "bottleneck":
        plain = [name for name in names if not isinstance(known[name], RoutedLayer)]
        if plain:
            raise GradRouteError(f'`features="bottleneck"` needs routed layers. Found others: {plain[:5]}.')
    return {name: known[name] for name in names}


def _one_of(argument: str, value: object, options: Any) -> None:
    if value not in get_args(options):
        raise GradRouteError(f"`{argument}` should be one of {', '.join(get_args(options))}. Found {value!r}.")


def _routed(module: nn.Module) -> RoutedLayer:
    assert isinstance(module, RoutedLayer)
    return module


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _check_grad_enabled(name: str) -> None:
    if not torch.is_grad_enabled():
        raise GradRouteError(
            f"capture_gradients: `{name}` ran with gradients off, so there is nothing to capture. Fix: leave no_grad; "
            "under reentrant checkpointing use use_reentrant=False."
        )


def _pooling(pool: Pool, reduction: Reduction) -> Callable[[str, Tensor, Tensor], Tensor]:
    fixed = pool if pool is None or callable(pool) else _token_weights(pool, reduction)

    def pooled(name: str, x: Tensor, entered: Tensor) -> Tensor:
        weights = _token_weights(fixed(entered), reduction) if callable(fixed) else fixed
        x = _wide(x)
        if weights is None:
            if x.ndim != 2:
                raise GradRouteError(
                    f"`pool` is needed for `{name}`, whose input has shape {tuple(x.shape)}. Fix: pool=completion_mask."
                )
            return x
        if weights.shape != x.shape[:-1]:
            raise GradRouteError(
                f"`pool` should have the shape {tuple(x.shape[:-1])} of the input of `{name}`. Found "
                f"{tuple(weights.shape)}. Fix: cut the mask to the tokens that are run, one capture per forward shape."
            )
        return (weights.to(x).unsqueeze(1) @ x).squeeze(1)

    return pooled


def _token_weights(pool: Tensor, reduction: Reduction) -> Tensor:
    if not isinstance(pool, Tensor) or pool.ndim != 2:
        found = tuple(pool.shape) if isinstance(pool, Tensor) else type(pool).__name__
        raise GradRouteError(f"`pool` should be a tensor of shape (batch, seq). Found {found}.")
    # float64: these few numbers scale every feature, also those of a float64 model. (MPS has no float64.)
    weights = pool.to(torch.float32 if pool.device.type == "mps" else torch.float64)
    if not torch.isfinite(weights).all() or (weights < 0).any():
        raise GradRouteError("`pool` should hold finite weights >= 0.")
    empty = (weights == 0).all(1)
    if empty.any():
        raise GradRouteError(f"`pool` should keep a token in every row. Row {int(empty.nonzero()[0])} has none.")
    if reduction == "sum":
        return weights
    if reduction == "mean":
        return weights / weights.sum(1, keepdim=True)
    positions = torch.arange(weights.shape[1], device=weights.device)
    last = torch.where(weights != 0, positions, -1).amax(1, keepdim=True)
    return (positions == last).to(weights.dtype)
