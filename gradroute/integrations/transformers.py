"""transformers' `Trainer`: routed micro-batches, filters before clipping, and refreshes on its optimizer steps.

    class RoutedTrainer(RoutedTrainerMixin, Trainer): ...

    route(model, mask_fn(inputs)):  forward, backward         for each micro-batch
    p.grad <- f(p.grad);  clip;  optimizer.step()             once per optimizer step
    refresher.step()                                          after it

`Trainer` clips before it steps the optimizer (with `max_grad_norm=0` to infinity, for the norm that it logs). So a
filter in the optimizer's hook would see clipped gradients, which it refuses, and no callback comes between backward and
clipping. The mixin filters at the end of `training_step`, after the last backward and DDP's reduction.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from gradroute._checks import instance_of
from gradroute._optimized import check_optimized
from gradroute._step_hooks import StepHooks
from gradroute.adapters.mask import RouteMask
from gradroute.adapters.route import route
from gradroute.errors import GradRouteError, RefreshError
from gradroute.filters import apply_filter
from gradroute.filters.base import GradientFilter
from gradroute.filters.rollout import RolloutFilter
from gradroute.filters.stats import FilterStats
from gradroute.gates.base import Gate
from gradroute.refresh.refresher import Refresher
from gradroute.refresh.watch import check_comes_due

MaskFn = Callable[[dict[str, Any]], RouteMask]

_FOLDER = "gradroute"
_FIGURES = ("cin", "cout", "null", "fired")


class RefreshCallback(TrainerCallback):
    """`refresher.step()` after each optimizer step that the Trainer takes; saved and resumed with its checkpoints.

    `trainer.train()` raises if a refresh was due and changed nothing, or if none would come due by the schedule.
    Figures of the refreshes go into the Trainer's log: `gradroute/age`, `refreshes`, and of the latest one `overlap`
    and `largest_angle`. (Reporters that were registered earlier have been called by then: with `RoutedTrainerMixin`
    they see these figures as well.)

    Args:
        refresher: on the model that is trained.
        gates: that hold its directions; checked before each refresh, and saved along.
    """

    def __init__(self, refresher: Refresher, *, gates: Sequence[Gate] = ()) -> None:
        self.refresher = instance_of("refresher", refresher, Refresher, error=RefreshError)
        self.gates = list(gates)
        if self.gates:
            refresher.watch(*self.gates)
        self._loaded_at: int | None = None
        self._counted = refresher.steps
        self._taken: _StepsTaken | None = None

    def figures(self) -> dict[str, float]:
        """The figures of the refreshes for the log."""
        reports = self.refresher.reports
        found = {"gradroute/age": float(self.refresher.age), "gradroute/refreshes": float(len(reports))}
        if reports:
            found["gradroute/overlap"] = reports[-1].overlap
            found["gradroute/largest_angle"] = reports[-1].largest_angle
        return found

    def load(self, checkpoint: str | Path) -> None:
        """Load what was saved in a checkpoint folder of the Trainer; call it before `resume_from_checkpoint`.

        `Directions.load(checkpoint + "/gradroute/directions.safetensors")` comes first: gates and refresher are built
        on it.

        Raises:
            RefreshError: the folder was saved without this callback, or with another number of gates.
            FileFormatError: saved with other settings or directions.
        """
        file = Path(checkpoint) / _FOLDER / "state.pt"
        if not file.is_file():
            raise RefreshError(f"`checkpoint` should hold {_FOLDER}/state.pt, saved by this callback. Found none.")
        state = torch.load(file, weights_only=True)
        if len(state["gates"]) != len(self.gates):
            raise RefreshError(f"`gates` should be {len(state['gates'])}, as saved. Found {len(self.gates)}.")
        self.refresher.load_state_dict(state["refresher"])
        for gate, saved in zip(self.gates, state["gates"], strict=True):
            gate.load_state_dict(saved)
        self._loaded_at = state["global_step"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step != (self._loaded_at or 0):
            raise RefreshError(
                f"The Trainer starts at step {state.global_step}, this callback at {self._loaded_at or 0}. "
                "Fix: callback.load(checkpoint) before train(resume_from_checkpoint=checkpoint), and not without it."
            )
        self._loaded_at = None
        check_comes_due(self.refresher, state.max_steps - state.global_step)
        self._counted = self.refresher.steps
        self._end()
        # DeepSpeed steps inside backward, on its own optimizer: what its wrapper says of a step has to be believed.
        if not type(kwargs["optimizer"]).__name__.startswith("DeepSpeed"):
            check_optimized(self.refresher.model, [kwargs["optimizer"]], RefreshError)
            self._taken = _StepsTaken(kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        skipped = bool(getattr(kwargs["optimizer"], "step_was_skipped", False))
        if self._taken is not None and self._taken.read() != (0 if skipped else 1):
            raise RefreshError(
                f"The Trainer has ended step {state.global_step}, but its optimizer has not taken exactly one: when a "
                "refresh is due cannot be told. Fix: leave optimizer.step() to the Trainer."
            )
        if self.refresher.steps != self._counted:
            raise RefreshError("Refresher.step() is called by this callback. Found other calls. Fix: remove them.")
        if not skipped:
            self.refresher.step()
            self._counted += 1

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if not any(name.startswith("eval_") for name in kwargs["logs"]):
            kwargs["logs"].update(self.figures())
            state.log_history[-1].update(self.figures())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not checkpoint.is_dir():
            raise RefreshError(
                f"The Trainer should have saved `{checkpoint}`. Found none, so nothing can be saved there."
            )
        folder = checkpoint / _FOLDER
        folder.mkdir(exist_ok=True)
        self.refresher.directions.save(folder / "directions.safetensors")
        saved = {"refresher": self.refresher.state_dict(), "gates": [gate.state_dict() for gate in self.gates]}
        torch.save({**saved, "global_step": state.global_step}, folder / "state.pt")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._end()

    def _end(self) -> None:
        if self._taken is not None:
            self._taken.close()
            self._taken = None


class _StepsTaken(StepHooks):
    """Count the steps that an optimizer has taken since the last `read`."""

    def __init__(self, optimizer: Any) -> None:
        self._steps = 0
        super().__init__(optimizer)

    def read(self) -> int:
        taken, self._steps = self._steps, 0
        return taken

    def _after_step(self) -> None:
        self._steps += 1


class RoutedTrainerMixin:
    """Goes before `Trainer`: each micro-batch under its own mask, a filter before clipping, figures in every log.

        class RoutedTrainer(RoutedTrainerMixin, Trainer): ...
        RoutedTrainer(..., mask_fn=lambda inputs: gate(inputs.pop("scores")), grad_filter=None)

    Args:
        mask_fn: returns the `RouteMask` for the inputs of a micro-batch, and takes out of them what the model does not
            take; the columns that it reads need `remove_unused_columns=False`.
        grad_filter: a `ProjectionFilter` or `RolloutFilter`, applied once per optimizer step, whatever `max_grad_norm`.

    Raises:
        GradRouteError: neither of them; under DeepSpeed, whose backward consumes gradients, and under fp16, where
            gradients are scaled until they are clipped, with a filter. While training: a step whose gradients were not
            filtered, or what `route`, `record` and `apply_filter` raise.
    """

    model: nn.Module
    accelerator: Any
    state: Any
    callback_handler: Any
    filtered: int
    """Optimizer steps whose gradients were filtered."""
    filter_stats: FilterStats | None
    """Figures of the filter in the latest step."""

    def __init__(
        self, *args: Any, mask_fn: MaskFn | None = None, grad_filter: GradientFilter | None = None, **kwargs: Any
    ) -> None:
        if mask_fn is None and grad_filter is None:
            raise GradRouteError("A routed Trainer should have a `mask_fn` or a `grad_filter`. Found neither.")
        if mask_fn is not None and not callable(mask_fn):
            raise GradRouteError(f"`mask_fn` should be a function of the inputs. Found {mask_fn!r}.")
        if grad_filter is not None:
            fix = "a ProjectionFilter or a RolloutFilter."
            instance_of("grad_filter", grad_filter, GradientFilter, fix)  # type: ignore[type-abstract]
        self.mask_fn, self.grad_filter = mask_fn, grad_filter
        self.filtered, self.filter_stats = 0, None
        # Four numbers a step: figures of every module, kept until the next log, would add up.
        self._unlogged: list[dict[str, float]] = []
        super().__init__(*args, **kwargs)
        if grad_filter is not None:
            self.callback_handler.add_callback(_FilteredEachStep(self))
            if str(self.accelerator.distributed_type).endswith("DEEPSPEED"):
                raise GradRouteError(
                    "`grad_filter` under DeepSpeed, whose backward consumes the gradients, would find none. "
                    "Fix: train with DDP or FSDP2; `mask_fn` works under DeepSpeed too."
                )
            scaler = getattr(self.accelerator, "scaler", None)
            if scaler is not None and scaler.is_enabled():
                raise GradRouteError(
                    "`grad_filter` under fp16 would see gradients times the scale of GradScaler. Fix: bf16=True, or "
                    "attach_filter(optimizer, f, model=model, allow_clipped=True)."
                )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a micro-batch under its mask; after the last one of a step, the filter."""
        f = self.grad_filter
        routed: AbstractContextManager[Any] = nullcontext()
        if self.mask_fn is not None:
            routed = route(self.model, self.mask_fn(inputs))
        recorded = f.record(self.model) if isinstance(f, RolloutFilter) else nullcontext()
        with routed, recorded:
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if f is not None and self.accelerator.sync_gradients:
            stats = apply_filter(self.model, f)
            self.filtered, self.filter_stats = self.filtered + 1, stats
            self._unlogged.append({figure: getattr(stats, figure) for figure in _FIGURES})
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log, with means of the filter's figures since the last one, and the refreshes'."""
        if not any(name.startswith("eval_") for name in logs):
            if self._unlogged:
                for figure in _FIGURES:
                    logs[f"gradroute/{figure}"] = fmean(each[figure] for each in self._unlogged)
                self._unlogged = []
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, RefreshCallback):
                    logs.update(callback.figures())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class _FilteredEachStep(TrainerCallback):
    """Raises before an optimizer step whose gradients were not filtered, and so keeps it from being taken."""

    def __init__(self, trainer: RoutedTrainerMixin) -> None:
        self.trainer, self._steps = trainer, 0

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._steps += 1
        if self.trainer.filtered != self._steps:
            raise GradRouteError(
                f"`grad_filter` should run once per optimizer step. Found {self.trainer.filtered} runs before step "
                f"{self._steps}. Fix: let every subclass's training_step call super().training_step."
            )
