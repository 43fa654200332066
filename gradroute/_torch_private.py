"""Everything that is read from private names of torch, in one file, so that a new version breaks in one place."""

import torch


def backward_task() -> int:
    """The number of the backward that runs in this thread; -1 outside of any."""
    task: int = torch._C._current_graph_task_id()
    return task


def in_backward() -> bool:
    """Whether this thread is inside a backward, as in a recomputation of a checkpoint."""
    return backward_task() != -1
