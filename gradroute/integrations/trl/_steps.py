"""After an optimizer step, before the first, and where metrics go: what no method of a trainer decides alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback

from gradroute.errors import RefreshError


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
        refresher, optimizer = self._trainer.routing.refresher, innermost(self._trainer.optimizer)
        if refresher is None:
            return
        state = self._trainer.state
        if not refresher.reports:
            due = max(refresher.every - refresher.age, refresher.warm_up - refresher.steps)
            left = state.max_steps - state.global_step
            if due > left:
                raise RefreshError(
                    f"`refresher` should come due in the {left} optimizer steps of this run. Found the first refresh "
                    f"after {due}. Fix: refresh more often, or leave it out for frozen directions."
                )
        if isinstance(optimizer, Optimizer) and id(optimizer) not in self._watched:
            refresher.watch(optimizer)
            self._watched.add(id(optimizer))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimizer has stepped, and the gradients are gone."""
        self._trainer.after_optimizer_step()


def innermost(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


class Nowhere(dict[str, list[float]]):
    """Metrics that are not kept."""

    def __missing__(self, _: str) -> list[float]:
        return []


@contextmanager
def own_table(trainer: Any, name: str) -> Iterator[None]:
    """The table of completions that TRL writes inside gets `name` into its file name.

    TRL names tables by step alone: that of an evaluation would replace that of training, and one view's the other's.
    """
    table = Path(trainer.args.output_dir) / "completions" / f"completions_{trainer.state.global_step:05d}.parquet"
    aside = table.with_suffix(".aside")
    had_one = table.is_file()
    if had_one:
        table.replace(aside)
    try:
        yield
        if table.is_file():
            table.replace(table.with_stem(f"{table.stem}_{name}"))
    finally:
        if had_one:
            aside.replace(table)
