"""Handles on an optimizer: something before and after each of its steps, until `close()` or the end of a `with`."""

from typing import Any, TypeVar

from torch.optim import Optimizer

from gradroute.errors import GradRouteError

# beartype checks `typing.Self` only where it decorates the whole class.
Hooks = TypeVar("Hooks", bound="StepHooks")


def torch_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that takes the steps: hooks on a wrapper (accelerate's, DeepSpeed's) would never run."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise GradRouteError(
            f"`optimizer` should be a torch optimizer, or accelerate's around one. Found {type(optimizer).__name__}."
        )
    return optimizer


class StepHooks:
    """Registers `_before_step` and `_after_step` on the optimizer that takes the steps."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = torch_optimizer(optimizer)
        self._has_closure = False
        self._handles: list[Any] = [self._optimizer.register_step_pre_hook(self._step_begins)]
        self._after = self._optimizer.register_step_post_hook(lambda *_: self._after_step())

    def close(self) -> None:
        """Leave the optimizer's steps alone from now on."""
        for handle in (*self._handles, self._after):
            handle.remove()

    def __enter__(self: Hooks) -> Hooks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _before_step(self) -> None:
        """Called before each step."""

    def _after_step(self) -> None:
        """Called after each step that did not raise."""

    def _step_begins(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._has_closure = kwargs.get("closure") is not None or any(arg is not None for arg in args[1:])
        self._before_step()

    def _move_behind(self) -> None:
        """Have `_after_step` run after those of every other handle, this step."""
        self._after.remove()
        self._after = self._optimizer.register_step_post_hook(lambda *_: self._after_step())
