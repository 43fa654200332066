"""Does somebody call `Refresher.step()` after each optimizer step? Counting both is the only way to know."""

from collections.abc import Callable

from torch.optim import Optimizer

from gradroute._step_hooks import StepHooks
from gradroute.errors import RefreshError


class StepCount(StepHooks):
    """The steps of one optimizer, from `start` on; `check` is called before each of them."""

    def __init__(self, optimizer: Optimizer, check: Callable[[], None], *, start: int) -> None:
        self.steps = start
        self._check = check
        super().__init__(optimizer)

    def restart(self, steps: int) -> None:
        """Go on from `steps`."""
        self.steps = steps

    def compare(self, refresher_steps: int) -> None:
        """Raise unless the refresher counts as many steps."""
        if self.steps != refresher_steps:
            raise RefreshError(
                "Refresher.step() should be called once after each optimizer step. Found "
                f"{self.steps} optimizer steps and {refresher_steps} of the refresher: its directions grow old unseen. "
                "Fix: call it after each optimizer.step(), and where none was taken (a skipped step) not at all."
            )

    def _before_step(self) -> None:
        self._check()

    def _after_step(self) -> None:
        self.steps += 1
