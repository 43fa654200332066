"""Everything that is read from private names of torch, in one file, so that a new version breaks in one place."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def backward_task() -> int:
    """The number of the backward that runs in this thread; -1 outside of any."""
    task: int = torch._C._current_graph_task_id()
    return task


def in_backward() -> bool:
    """Whether this thread is inside a backward, as in a recomputation of a checkpoint."""
    return backward_task() != -1


def call_after_backward(callback: Callable[[], None]) -> None:
    """Call `callback` at the end of the backward that runs in this thread, after DDP has written its gradients.

    It is queued twice: DDP queues its own end of backward in between.
    """
    queue: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback
    queue(lambda: queue(callback))


def is_still_scaled(scaler: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Whether gradients for `optimizer` carry the scale of a GradScaler, which may be None."""
    if scaler is None or not scaler.is_enabled():
        return False
    stage = scaler._per_optimizer_states.get(id(optimizer), {}).get("stage")
    return stage is None or stage.name == "READY"


def times_written(tensors: Iterable[Tensor]) -> int:
    """How often these tensors were written in place, as torch counts. No value is read, so no device is waited for."""
    return sum(tensor._version for tensor in tensors)
