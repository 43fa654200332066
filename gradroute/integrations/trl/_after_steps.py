"""What happens around the optimizer's steps, which TRL leaves to the Trainer: callbacks."""

from typing import Any

from transformers import TrainerCallback

from gradroute._step_hooks import torch_optimizer
from gradroute.integrations._schedule import check_comes_due


class AfterSteps(TrainerCallback):
    """Has the trainer refresh after each optimizer step, and the refresher count the optimizer's steps itself."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._watched: set[int] = set()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """A step of the optimizer that the refresher does not see raises from now on.

        Raises:
            RefreshError: by its schedule, no refresh would come due in this run.
        """
        refresher = self._trainer.routing.refresher
        if refresher is None:
            return
        check_comes_due(refresher, self._trainer.state.max_steps - self._trainer.state.global_step)
        # DeepSpeed steps inside backward, on an optimizer of its own.
        if not type(self._trainer.optimizer).__name__.startswith("DeepSpeed"):
            optimizer = torch_optimizer(self._trainer.optimizer)
            if id(optimizer) not in self._watched:
                refresher.watch(optimizer)
                self._watched.add(id(optimizer))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimizer has stepped, and the gradients are gone."""
        self._trainer.after_optimizer_step()
