"""Callbacks around the optimizer's steps, which TRL leaves to the Trainer."""

from typing import Any

from transformers import TrainerCallback

from gradroute.integrations.trl._logs import append_metrics
from gradroute.refresh.watch import Watch, check_comes_due


class AfterSteps(TrainerCallback):
    """Begins and ends the schedule of a run, and refreshes after its optimizer steps, which a watch counts too."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._watch: Watch | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Begin the schedule, and have a step of the optimizer that the refresher does not see raise from now on.

        Raises:
            GradRouteError: something that was asked for would not happen in a run of so few steps.
            RefreshError: by its schedule, no refresh would come due in this run.
        """
        self._trainer._routing.resolve()
        self._trainer._schedule.begin()
        refresher, optimizer = self._trainer.routing.refresher, self._trainer.optimizer
        self._end_watch()  # of a run that ended in an exception
        if refresher is None:
            return
        check_comes_due(refresher, self._trainer.state.max_steps - self._trainer.state.global_step)
        # DeepSpeed steps inside backward, on its own optimizer.
        if not type(optimizer).__name__.startswith("DeepSpeed"):
            self._watch = refresher.watch(optimizer)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """End the count: later steps of the optimizer are not the trainer's."""
        self._end_watch()
        self._trainer._schedule.end()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Log what the schedule says of the step."""
        self._trainer._schedule.log()

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Refresh if it is due: the optimizer has stepped, and the gradients are gone."""
        trainer = self._trainer
        refresher = trainer.routing.refresher
        if refresher is None or trainer.accelerator.optimizer_step_was_skipped:
            return
        report = refresher.step()
        figures = {"routing/directions_age": float(refresher.age)}
        if report is not None:
            figures |= {
                "routing/directions_overlap": report.overlap,
                "routing/directions_angle": report.largest_angle,
            }
        append_metrics(trainer, figures)
