"""Handles on an optimizer: they act before and after each of its steps, until `close()` or the end of a `with`.

A hook knows its handle by weak reference, and a handle its optimizer. So the hooks end when the handle is closed or its
optimizer is gone, hooks on the model included, and a copied or pickled model or optimizer has none. A handle that
changes steps is kept by its optimizer, since nothing else has to hold it.
"""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, NoReturn, TypeVar

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradroute.errors import GradRouteError

# beartype checks `typing.Self` only where it decorates the whole class.
Hooks = TypeVar("Hooks", bound="StepHooks")


def unwrapped(optimizer: Any) -> Iterator[Any]:
    """The optimizer and what it wraps, from the outside in: accelerate's around torch's, say."""
    while optimizer is not None:
        yield optimizer
        inner = getattr(optimizer, "optimizer", None)
        optimizer = inner if hasattr(inner, "param_groups") else None


def torch_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer that takes the steps; hooks on a wrapper would never run."""
    innermost = list(unwrapped(optimizer))[-1:]
    if not innermost or not isinstance(innermost[0], Optimizer):
        raise GradRouteError(
            f"`optimizer` should be a torch optimizer, or accelerate's around one. Found {type(optimizer).__name__}."
        )
    return innermost[0]


class _Uncopied:
    """A hook whose copy, as in a copied or pickled model, does nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_ended,)


class LocalHook(_Uncopied):
    """Calls `function`, which is about the model that it was registered on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class WeakHook(_Uncopied):
    """Calls a method of `owner` while that lives.

    Args:
        owner: the object that the method belongs to.
        method: its name.
        keep: the hook keeps `owner` alive.
    """

    def __init__(self, owner: object, method: str, *, keep: bool = False) -> None:
        self._owner, self._method = weakref.ref(owner), method
        self._kept = owner if keep else None

    def __call__(self, *args: Any) -> Any:
        owner = self._owner()
        return None if owner is None else getattr(owner, self._method)(*args)


class StepHooks:
    """Registers `_before_step` and `_after_step` on the optimizer that takes the steps.

    Hooks on anything else go into `_handles`, as a `WeakHook`.
    """

    _kept_by_optimizer: ClassVar[bool] = True

    def __init__(self, optimizer: Any) -> None:
        innermost = torch_optimizer(optimizer)
        self._optimizer_ref = weakref.ref(innermost)
        self._has_closure = False
        before = WeakHook(self, "_step_begins", keep=self._kept_by_optimizer)
        self._handles: list[RemovableHandle] = [innermost.register_step_pre_hook(before)]
        self._move_behind()
        for owner in (innermost, self):
            weakref.finalize(owner, _remove, self._handles).atexit = False

    @property
    def is_open(self) -> bool:
        """Whether the hooks are in place: neither closed nor left by their optimizer."""
        return bool(self._handles)

    def close(self) -> None:
        """Leave the optimizer's steps alone from now on."""
        _remove(self._handles)

    def __enter__(self: Hooks) -> Hooks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise GradRouteError(
            f"A {type(self).__name__} belongs to one optimizer and cannot be copied or pickled. Fix: leave it out, and "
            "make one for the copy."
        )

    @property
    def _optimizer(self) -> Optimizer:
        optimizer = self._optimizer_ref()
        assert optimizer is not None, "the hooks end with their optimizer"
        return optimizer

    def _before_step(self) -> None:
        """Called before each step."""

    def _after_step(self) -> None:
        """Called after each step that did not raise."""

    def _step_begins(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._has_closure = kwargs.get("closure") is not None or any(arg is not None for arg in args[1:])
        self._before_step()

    def _step_ends(self, *_: Any) -> None:
        self._after_step()

    def _move_behind(self) -> None:
        """Have `_after_step` run after those of every other handle."""
        for handle in self._handles[1:2]:
            handle.remove()
        self._handles[1:2] = [self._optimizer.register_step_post_hook(WeakHook(self, "_step_ends"))]


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _ended(*_: Any) -> None:
    """The hook of a handle that is not there."""
