"""What happens when in a run: a slow start of the deployed block, rollouts sampled ablated, refreshes after steps.

    optimizer steps 0 to slow_start_steps - 1     lr_d = slow_start_fraction lr,     lr_q = lr
    rollouts made from step `ablated_from` on     `ablated_fraction` of each group is sampled without the quarantine

A rollout that was sampled ablated trains the deployed block alone, a missed hack too. So the quarantine gets a lead.
"""

from typing import Any

from transformers import TrainerCallback

from gradroute._state_dict import State
from gradroute.errors import GradRouteError
from gradroute.integrations.trl._logs import append_metrics
from gradroute.integrations.trl.grpo_config import Options
from gradroute.optim.slow_start import SlowStart, slow_start
from gradroute.refresh.watch import Watch, check_comes_due

FRACTION = 0.25


class Schedule(TrainerCallback):
    """The trainer's options of a schedule, the slow start of the run in progress, and the watch of its refresher.

    Raises:
        GradRouteError: an argument that nothing would read; an optimizer of the user's with both blocks in one group.
    """

    def __init__(self, trainer: Any, options: Options) -> None:
        self._trainer, self._ablates = trainer, options.ablated_fraction > 0
        self.steps, self.ablated_from = options.slow_start_steps, options.ablated_from
        fraction = options.slow_start_fraction
        if fraction is not None and not self.steps:
            raise GradRouteError(
                f"`slow_start_fraction` is read with `slow_start_steps`. Found {fraction!r} and no steps. "
                "Fix: slow_start_steps=75, say."
            )
        self._fraction = FRACTION if fraction is None else fraction
        if self.ablated_from is not None and not self._ablates:
            raise GradRouteError(
                f"`ablated_from` is read with `ablated_fraction`. Found {self.ablated_from!r}, and no rollout that is "
                "sampled ablated. Fix: ablated_fraction=0.25, say, or leave `ablated_from` out."
            )
        self._slow_start: SlowStart | None = None
        self._watch: Watch | None = None
        self._saved: State | None = None
        if self.steps and trainer.optimizer is not None:
            self._started().close()  # only to see now, and not after hours in a queue, that it can start slowly

    @property
    def samples_ablated(self) -> bool:
        """Whether rollouts that are made now are sampled ablated, those that are to be."""
        if self.ablated_from is not None:
            return bool(self._trainer.state.global_step >= self.ablated_from)
        return not self.steps or (self._slow_start is not None and self._slow_start.over)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Begin the slow start, and have a step of the optimizer that the refresher does not see raise from now on.

        Raises:
            GradRouteError: something that was asked for would not happen in a run of so few steps.
            FileFormatError: the checkpoint is of another slow start.
            RefreshError: by its schedule, no refresh would come due in this run.
        """
        trainer = self._trainer
        refresher = trainer._resolve_routing().refresher
        self.on_train_end()  # of a run that ended in an exception
        self._check_length(trainer.state.max_steps)
        if self.steps:
            self._slow_start = self._started()
            if self._saved is not None:
                self._slow_start.load_state_dict(self._saved)
        self._saved = None
        if refresher is None:
            return
        check_comes_due(refresher, trainer.state.max_steps - trainer.state.global_step)
        # DeepSpeed steps inside backward, on its own optimizer.
        if not type(trainer.optimizer).__name__.startswith("DeepSpeed"):
            self._watch = refresher.watch(trainer.optimizer)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Later steps of the optimizer are not the trainer's."""
        for open_handle in (self._slow_start, self._watch):
            if open_handle is not None:
                open_handle.close()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Log whether the step is a slow one."""
        if self._slow_start is not None:
            self._trainer._metrics["train"]["routing/slow_start"].append(float(not self._slow_start.over))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Refresh if it is due: the optimizer has stepped, and the gradients are gone."""
        refresher = self._trainer.routing.refresher
        if refresher is None or self._trainer.accelerator.optimizer_step_was_skipped:
            return
        report = refresher.step()
        figures = {"routing/directions_age": float(refresher.age)}
        if report is not None:
            figures |= {
                "routing/directions_overlap": report.overlap,
                "routing/directions_angle": report.largest_angle,
            }
        append_metrics(self._trainer, figures)

    def state_dict(self) -> State | None:
        """Of the slow start; None without one."""
        return None if self._slow_start is None else self._slow_start.state_dict()

    def load_state_dict(self, state: State | None) -> None:
        """For the run that begins next."""
        self._saved = state

    def _started(self) -> SlowStart:
        return slow_start(self._trainer.model, self._trainer.optimizer, steps=self.steps, fraction=self._fraction)

    def _check_length(self, max_steps: int) -> None:
        if self.steps > max_steps:
            raise GradRouteError(
                f"`slow_start_steps` should be at most the optimizer steps of the run. Found {self.steps} and "
                f"{max_steps} steps. Fix: half of the run, say."
            )
        first = self.steps if self.ablated_from is None else self.ablated_from
        last = last_generation(self._trainer.args, self._trainer.num_iterations, max_steps)
        if self._ablates and first > last:
            raise GradRouteError(
                f"`ablated_fraction` should apply to some rollouts of the run. Found that the last ones of its "
                f"{max_steps} optimizer steps are made at step {last}, and that none is sampled ablated before step "
                f"{first}. Fix: a longer run, a smaller `ablated_from` or `slow_start_steps`, or ablated_fraction=0."
            )


def last_generation(args: Any, num_iterations: int, max_steps: int) -> int:
    """How many optimizer steps have been taken when the last rollouts of a run are made."""
    every, accumulated = args.steps_per_generation * num_iterations, args.gradient_accumulation_steps
    return int((max_steps * accumulated - 1) // every * every // accumulated)
