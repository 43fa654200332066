"""Asking the detector: called like a reward function, its answers as a tensor with NaN where it is undecided."""

import asyncio
import inspect
import math
from collections.abc import Iterable, Sequence
from threading import Thread
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradroute.errors import GradRouteError


class DetectorCall:
    """Calls `detector` with what TRL gives to a reward function.

    Args:
        detector: a function, or an async one, that returns a flag or a score per completion, or None for undecided.
        scores: whether it returns scores.
    """

    def __init__(self, detector: Any, *, scores: bool) -> None:
        self._detector, self._scores = detector, scores
        self._loop: Any = None

    def __call__(
        self, trainer: Any, inputs: Sequence[Any], prompts: Any, completions: Any, completion_ids: Any
    ) -> Float[Tensor, " rows"]:
        """Flags as 1 and 0, or scores; NaN where the detector returned None."""
        columns = {key: [row[key] for row in inputs] for key in inputs[0]}
        for key in ("prompt", "completion", "completion_ids"):
            columns.pop(key, None)
        known: dict[str, Any] = {"trainer_state": trainer.state, "environments": getattr(trainer, "environments", None)}
        for name, method in (("log_extra", "_log_completion_extra"), ("log_metric", "_log_metric")):
            if hasattr(trainer, method):
                known[name] = getattr(trainer, method)
        answers = self._detector(
            prompts=prompts, completions=completions, completion_ids=completion_ids, **columns, **known
        )
        if inspect.isawaitable(answers):
            answers = asyncio.run_coroutine_threadsafe(_awaited(answers), self._event_loop(trainer)).result()
        return _as_tensor(answers, len(prompts), scores=self._scores).to(trainer.accelerator.device)

    def _event_loop(self, trainer: Any) -> Any:
        # One loop for all calls, as TRL has for reward functions: a client that a detector keeps belongs to its loop.
        loop = getattr(trainer, "async_loop", None) or self._loop
        if loop is None:
            loop = self._loop = asyncio.new_event_loop()
            Thread(target=loop.run_forever, name="gradroute-detector", daemon=True).start()
        return loop


async def _awaited(answers: Any) -> Any:
    return await answers


def _as_tensor(answers: Any, rows: int, *, scores: bool) -> Float[Tensor, " rows"]:
    if not isinstance(answers, Iterable):
        raise GradRouteError(f"`detector` should return a value per completion. Found {type(answers).__name__}.")
    values = [_as_number(each) for each in answers]
    if len(values) != rows:
        raise GradRouteError(f"`detector` should return {rows} values, one per completion. Found {len(values)}.")
    decided = [each for each in values if each is not None]
    shown = f"Found {values[:5]}."
    if scores:
        if not all(isinstance(each, int | float) and math.isfinite(each) for each in decided):
            raise GradRouteError(
                f"`detector` should return finite scores, or None for undecided, for a gate on scores. {shown}"
            )
    elif not all(isinstance(each, bool | int | float) and each in (0, 1) for each in decided):
        raise GradRouteError(
            f"`detector` should return flags: True, False, 1 or 0, or None for undecided. {shown} Fix: compare with a "
            "threshold, or gate=ThresholdGate(...)."
        )
    return torch.tensor([math.nan if each is None else float(each) for each in values])


def _as_number(answer: Any) -> Any:
    """numpy's and torch's scalars as Python's."""
    return answer.item() if hasattr(answer, "item") and getattr(answer, "ndim", 0) == 0 else answer
