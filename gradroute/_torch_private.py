"""Everything that is read from private names of torch, in one file, so that a new version breaks in one place."""

from collections.abc import Iterable

import torch
from torch import Tensor


def backward_task() -> int:
    """The number of the backward that runs in this thread; -1 outside of any."""
    task: int = torch._C._current_graph_task_id()
    return task


def in_backward() -> bool:
    """Whether this thread is inside a backward, as in a recomputation of a checkpoint."""
    return backward_task() != -1


def times_written(tensors: Iterable[Tensor]) -> int:
    """How often these tensors were written in place, as torch counts. No value is read, so no device is waited for."""
    return sum(tensor._version for tensor in tensors)
