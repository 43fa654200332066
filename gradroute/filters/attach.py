"""A filter that runs by itself: `attach_filter(optimizer, f, model=model)` applies it before every optimizer step.

The hook sits on the innermost torch optimizer, so that it runs when a step is really taken (accelerate accumulates
gradients around it, GradScaler skips overflowing ones). If the filter cannot run, the step raises and is not taken.

How is a clipped gradient recognised? Clipping multiplies it in place, which counts up the tensor's version. Versions
are noted at the end of every backward, after DDP's reduction; a gradient of another version at the step has been
changed in between. GradScaler's unscaling does not count. Scaling all gradients by one factor leaves what a
`ProjectionFilter` does unchanged but for that factor, hence `allow_clipped`.
"""

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from gradroute._protocol import check_module, routed_layers
from gradroute.errors import GradRouteError
from gradroute.filters.apply import apply_filter
from gradroute.filters.base import GradientFilter
from gradroute.filters.stats import FilterStats

_ATTACHED: WeakKeyDictionary[Optimizer, "AttachedFilter"] = WeakKeyDictionary()


class AttachedFilter:
    """Handle of a filter that runs before each step of an optimizer: `stats` of the latest step, `close()` ends it."""

    def __init__(
        self, optimizer: Optimizer, f: GradientFilter, *, model: nn.Module, scaler: Any, allow_clipped: bool
    ) -> None:
        self.filter, self.model, self.scaler, self.allow_clipped = f, model, scaler, allow_clipped
        self.steps = 0
        self._stats: FilterStats | None = None
        self._seen: Any = WeakTensorKeyDictionary()
        self._watched_backward: int | None = None
        self._handles: list[RemovableHandle] = [optimizer.register_step_pre_hook(self._before_step)]
        for _, parameter in _filtered_parameters(model, f):
            watched: Any = parameter
            self._handles.append(watched.register_post_accumulate_grad_hook(self._after_accumulation))

    @property
    def stats(self) -> FilterStats:
        """Figures of the latest step.

        Raises:
            GradRouteError: no step has been taken yet.
        """
        if self._stats is None:
            raise GradRouteError("The optimizer has taken no step since the filter was attached.")
        return self._stats

    def close(self) -> None:
        """Take the filter off its optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for optimizer in [optimizer for optimizer, handle in _ATTACHED.items() if handle is self]:
            del _ATTACHED[optimizer]

    def __repr__(self) -> str:
        done = f"{self.steps} steps" if self._handles else f"removed after {self.steps} steps"
        return f"AttachedFilter({self.filter!r}, {done})"

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(callable(given) for given in (*args, *kwargs.values())):
            raise GradRouteError(
                "A filter cannot run in `optimizer.step(closure)`, whose gradients come after it. "
                "Fix: call backward before step()."
            )
        _check_held(optimizer, self.model, self.filter)
        if getattr(optimizer, "grad_scale", None) is not None or self._is_scaled(optimizer):
            raise GradRouteError(
                "The gradients are still multiplied by the scale of GradScaler. Fix: scaler.unscale_(optimizer) before "
                "the step; with a fused optimizer as well."
            )
        if not self.allow_clipped:
            self._check_unchanged()
        self._stats = apply_filter(self.model, self.filter)
        self.steps += 1

    def _is_scaled(self, optimizer: Optimizer) -> bool:
        if self.scaler is None or not self.scaler.is_enabled():
            return False
        state = self.scaler._per_optimizer_states.get(id(optimizer), {}).get("stage")
        return state is None or state.name == "READY"

    def _check_unchanged(self) -> None:
        for name, parameter in _filtered_parameters(self.model, self.filter):
            gradient: Any = parameter.grad
            if gradient is not None and self._seen.get(gradient) != gradient._version:
                raise GradRouteError(
                    f"The gradient of `{name}` has been changed since the backward that this filter saw: clipped, say, "
                    "by a norm that the quarantine takes part in. Fix: attach before backward, and clip after the "
                    "filter (apply_filter, clip, step) or pass allow_clipped=True."
                )

    def _after_accumulation(self, _: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task == self._watched_backward:
            return
        self._watched_backward = task
        engine: Any = torch.autograd.Variable._execution_engine
        queue: Callable[[Callable[[], None]], None] = engine.queue_callback
        # Queued twice: DDP queues its own end of backward in between, and writes the reduced gradients there.
        queue(lambda: queue(self._after_backward))

    def _after_backward(self) -> None:
        self._watched_backward = None
        for _, parameter in _filtered_parameters(self.model, self.filter):
            if parameter.grad is not None:
                self._seen[parameter.grad] = parameter.grad._version


def attach_filter(
    optimizer: Any, f: GradientFilter, *, model: nn.Module, scaler: Any = None, allow_clipped: bool = False
) -> AttachedFilter:
    """p.grad <- f(p.grad) before each `optimizer.step()`, exactly once per step.

    Args:
        optimizer: a torch optimizer that holds all deployed parameters, or accelerate's around one.
        f: a `ProjectionFilter` or `RolloutFilter`.
        model: the model whose gradients are filtered.
        scaler: the GradScaler, if gradients are scaled; accelerate's is found. Without it, a step on scaled gradients
            is recognised for fused optimizers only.
        allow_clipped: accept gradients that were changed after their backward. A `RolloutFilter` never does.

    Returns:
        A handle with `.stats` of the latest step, `.steps` and `.close()`.

    Raises:
        GradRouteError: an optimizer of DeepSpeed or Megatron, one that does not hold the deployed parameters (in route
            mode, the quarantine's too), or one that has a filter already; `f` is attached elsewhere. From `step()`:
            whatever keeps the filter from running, and the step is not taken.
    """
    if not isinstance(f, GradientFilter):
        raise GradRouteError(f"`f` should be a ProjectionFilter or a RolloutFilter. Found {type(f).__name__}.")
    check_module(model)
    innermost: object = optimizer
    for layer_of_wrapping in _unwrapped(optimizer):
        found = getattr(layer_of_wrapping, "scaler", None)
        scaler = found if scaler is None else scaler
        innermost = layer_of_wrapping
    if not isinstance(innermost, Optimizer):
        raise GradRouteError(f"`optimizer` should be a torch optimizer. Found {type(optimizer).__name__}.")
    for module in model.modules():
        if _is_of(module, "deepspeed") or _is_of(module, "megatron"):
            raise GradRouteError(_CONSUMED.format(what="model", found=type(module).__name__))
    _check_held(innermost, model, f)
    if innermost in _ATTACHED or any(handle.filter is f for handle in _ATTACHED.values()):
        raise GradRouteError(
            "This optimizer has a filter already, or this filter an optimizer: twice would filter twice. "
            "Fix: handle.close() first."
        )
    handle = AttachedFilter(innermost, f, model=model, scaler=scaler, allow_clipped=allow_clipped)
    _ATTACHED[innermost] = handle
    return handle


def _unwrapped(optimizer: Any) -> Iterator[Any]:
    """The optimizer and what it wraps, from the outside in."""
    while optimizer is not None:
        for engine in ("deepspeed", "megatron"):
            if _is_of(optimizer, engine):
                raise GradRouteError(_CONSUMED.format(what="optimizer", found=type(optimizer).__name__))
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def _is_of(thing: object, engine: str) -> bool:
    """By its own package, or by accelerate's wrapper for it."""
    kinds = type(thing).__mro__
    return any(kind.__module__.split(".")[0] == engine or kind.__name__.lower().startswith(engine) for kind in kinds)


def _filtered_parameters(model: nn.Module, f: GradientFilter) -> Iterator[tuple[str, nn.Parameter]]:
    for name, layer in routed_layers(model).items():
        for block in f.writes_blocks:
            for parameter in layer.block_parameters(block):
                yield name, parameter


def _check_held(optimizer: Optimizer, model: nn.Module, f: GradientFilter) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in _filtered_parameters(model, f) if id(parameter) not in held]
    if missing:
        raise GradRouteError(
            f"`optimizer` should hold every parameter that the filter changes. It lacks those of {missing[:5]}"
            f"{' ...' if len(missing) > 5 else ''}. Fix: build it from deployed_parameters(model) and "
            "quarantine_parameters(model), after wrapping or moving the model."
        )


_CONSUMED = (
    "`{what}` is a {found}, which consumes gradients inside backward: a filter before step() would find none, and "
    "change nothing. Fix: train with DDP, fully_shard (FSDP2) or a plain optimizer."
)
