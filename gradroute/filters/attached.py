"""A filter that runs by itself: `attach_filter(optimizer, f, model=model)` applies it before every optimizer step.

The hook sits on the innermost torch optimizer, so that it runs when a step is really taken (accelerate accumulates
gradients around it, GradScaler skips overflowing ones). If the filter cannot run, the step raises and is not taken.

How is a clipped gradient recognised? Clipping multiplies it in place, which counts up the tensor's version. Versions
are noted at the end of every backward, after DDP's reduction; a gradient of another version at the step has been
changed in between. GradScaler's unscaling does not count. Scaling all gradients by one factor leaves what a
`ProjectionFilter` does unchanged but for that factor, hence `allow_clipped`.
"""

from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from gradroute._checks import instance_of
from gradroute._optimized import block_parameters, check_held
from gradroute._protocol import check_module
from gradroute._step_hooks import StepHooks, WeakHook, torch_optimizer, unwrapped
from gradroute._torch_private import backward_task, call_after_backward, is_still_scaled
from gradroute.errors import GradRouteError
from gradroute.filters.apply import apply_filter
from gradroute.filters.base import GradientFilter
from gradroute.filters.stats import FilterStats

_ATTACHED: "WeakSet[AttachedFilter]" = WeakSet()


def attach_filter(
    optimizer: Any, f: GradientFilter, *, model: nn.Module, scaler: Any = None, allow_clipped: bool = False
) -> "AttachedFilter":
    """p.grad <- f(p.grad) before each `optimizer.step()`, exactly once per step.

    Args:
        optimizer: a torch optimizer that holds all deployed parameters, or accelerate's around one.
        f: a `ProjectionFilter` or `RolloutFilter`.
        model: the model whose gradients are filtered.
        scaler: the GradScaler, if gradients are scaled; accelerate's is found. Without it, a step on scaled gradients
            is recognised for fused optimizers only.
        allow_clipped: accept gradients that were changed after their backward. A `RolloutFilter` never does.

    Returns:
        A handle with `.stats` of the latest step, `.steps` and `.close()`, usable in `with`.

    Raises:
        GradRouteError: an optimizer of DeepSpeed or Megatron, one that does not hold the deployed parameters (in route
            mode, the quarantine's too), or one that has a filter already; `f` is attached elsewhere. From `step()`:
            the reason why the filter cannot run, and the step is not taken.
    """
    instance_of("f", f, GradientFilter, "pass a ProjectionFilter or a RolloutFilter.")  # type: ignore[type-abstract]
    check_module(model)
    wrappers = list(unwrapped(optimizer))
    for what, thing in (*(("optimizer", each) for each in wrappers), *(("model", each) for each in model.modules())):
        if _is_of_engine(thing):
            raise GradRouteError(
                f"`{what}` is a {type(thing).__name__}, which consumes gradients inside backward: a filter before "
                "step() would find none, and change nothing. Fix: train with DDP, fully_shard (FSDP2) or a plain "
                "optimizer."
            )
    innermost = torch_optimizer(optimizer)
    for each in wrappers:
        scaler = getattr(each, "scaler", None) if scaler is None else scaler
    check_held([innermost], block_parameters(model, f.writes_blocks))
    if any(each.is_open and (each.filter is f or each.runs_on(innermost)) for each in _ATTACHED):
        raise GradRouteError(
            "An optimizer should have one filter, and a filter one optimizer. Found one that is attached already: its "
            "gradients would be filtered twice. Fix: handle.close() first."
        )
    handle = AttachedFilter(innermost, f, model=model, scaler=scaler, allow_clipped=allow_clipped)
    _ATTACHED.add(handle)
    return handle


class AttachedFilter(StepHooks):
    """The handle that `attach_filter` returns. Errors are listed there."""

    def __init__(
        self, optimizer: Optimizer, f: GradientFilter, *, model: nn.Module, scaler: Any, allow_clipped: bool
    ) -> None:
        self.filter, self.model, self.scaler, self.allow_clipped = f, model, scaler, allow_clipped
        self.steps = 0
        self._stats: FilterStats | None = None
        self._seen: Any = WeakTensorKeyDictionary()
        self._watched_backward: int | None = None
        super().__init__(optimizer)
        accumulated = WeakHook(self, "_after_accumulation")
        for _, parameter in block_parameters(model, f.writes_blocks):
            watched: Any = parameter
            self._handles.append(watched.register_post_accumulate_grad_hook(accumulated))

    @property
    def stats(self) -> FilterStats:
        """Figures of the latest step.

        Raises:
            GradRouteError: no step has been taken yet.
        """
        if self._stats is None:
            raise GradRouteError("The optimizer has taken no step since the filter was attached.")
        return self._stats

    def runs_on(self, optimizer: Optimizer) -> bool:
        """Whether this torch optimizer is the one whose gradients are filtered."""
        return self._optimizer_ref() is optimizer

    def __repr__(self) -> str:
        done = f"{self.steps} steps" if self.is_open else f"closed after {self.steps} steps"
        return f"AttachedFilter({self.filter!r}, {done})"

    def _before_step(self) -> None:
        optimizer = self._optimizer
        if self._has_closure:
            raise GradRouteError(
                "A filter cannot run in `optimizer.step(closure)`, whose gradients come after it. "
                "Fix: call backward before step()."
            )
        check_held([optimizer], block_parameters(self.model, self.filter.writes_blocks))
        if getattr(optimizer, "grad_scale", None) is not None or is_still_scaled(self.scaler, optimizer):
            raise GradRouteError(
                "The gradients are still multiplied by the scale of GradScaler. Fix: scaler.unscale_(optimizer) before "
                "the step; with a fused optimizer as well."
            )
        if not self.allow_clipped:
            self._check_unchanged()
        self._stats = apply_filter(self.model, self.filter)
        self.steps += 1

    def _check_unchanged(self) -> None:
        for name, parameter in block_parameters(self.model, self.filter.writes_blocks):
            gradient: Any = parameter.grad
            if gradient is not None and self._seen.get(gradient) != gradient._version:
                raise GradRouteError(
                    f"The gradient of `{name}` has been changed since the backward that this filter saw: clipped, say. "
                    "Fix: attach before backward, and do not clip; or, unattached, apply_filter, clip and step; or "
                    "pass allow_clipped=True."
                )

    def _after_accumulation(self, _: Tensor) -> None:
        if self._watched_backward != backward_task():
            self._watched_backward = backward_task()
            call_after_backward(self._after_backward)

    def _after_backward(self) -> None:
        self._watched_backward = None
        for _, parameter in block_parameters(self.model, self.filter.writes_blocks):
            if parameter.grad is not None:
                self._seen[parameter.grad] = parameter.grad._version


def _is_of_engine(thing: object) -> bool:
    """Whether it is DeepSpeed's or Megatron's, by its package or as accelerate's wrapper for it."""
    return any(
        kind.__module__.split(".")[0] == engine or kind.__name__.lower().startswith(engine)
        for kind in type(thing).__mro__
        for engine in ("deepspeed", "megatron")
    )
