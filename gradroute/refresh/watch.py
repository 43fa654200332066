"""Checks that `Refresher.step()` is called after each optimizer step, by counting both, and that it will come due."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from weakref import WeakMethod

from torch.optim import Optimizer

from gradroute._step_hooks import StepHooks
from gradroute.errors import RefreshError


def check_comes_due(refresher: Any, steps_left: int) -> None:
    """Refuse a run in which directions that were never refreshed would stay so, although a `Refresher` was given.

    Raises:
        RefreshError: the first refresh lies behind the last of `steps_left` optimizer steps.
    """
    due = max(refresher.every - refresher.age, refresher.warm_up - refresher.steps)
    if not refresher.reports and due > steps_left:
        raise RefreshError(
            f"`refresher` should come due in the {steps_left} optimizer steps of this run. Found the first refresh "
            f"after {due}. Fix: refresh more often, or leave the refresher out for frozen directions."
        )


class Watch:
    """The handle that `Refresher.watch` returns; `close()`, or the end of a `with`, ends the watch."""

    def __init__(self, refresher: Any, ends: ExitStack, watched: int) -> None:
        # Optimizers and gates know the refresher by weak reference only: it lives as long as this handle does.
        self._refresher, self._ends, self._watched = refresher, ends, watched

    def close(self) -> None:
        """Leave optimizers, gates and filters alone from now on."""
        self._ends.close()
        self._watched = 0

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Watch({self._refresher!r}, {f'{self._watched} watched' if self._watched else 'closed'})"


class StepCount(StepHooks):
    """Counts the steps of one optimizer; calls `check` before each of them, while the owner of `check` is there.

    Args:
        optimizer: whose steps are counted.
        check: a bound method that takes this count, and raises where the step should not be taken.
        start: steps before the first.
    """

    _kept_by_optimizer = False  # but by its refresher, and they end together

    def __init__(self, optimizer: Optimizer, check: "Callable[[StepCount], None]", *, start: int) -> None:
        self.steps = start
        self._check = WeakMethod(check)
        super().__init__(optimizer)

    def compare(self, refresher_steps: int) -> None:
        """Raise unless the refresher counts as many steps."""
        if self.steps != refresher_steps:
            raise RefreshError(
                "Refresher.step() should be called once after each optimizer step. Found "
                f"{self.steps} optimizer steps and {refresher_steps} of the refresher: its directions grow old unseen. "
                "Fix: call it after each optimizer.step(), and where none was taken (a skipped step) not at all; if "
                "this refresher is no longer used, close() what its watch() returned."
            )

    def _before_step(self) -> None:
        check = self._check()
        if check is not None:
            check(self)

    def _after_step(self) -> None:
        self.steps += 1
