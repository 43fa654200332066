"""Everything that is read from private names of torch, in one file, so that a new version breaks in one place.

`tests/test_torch_private.py` has a test for each.
"""

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils.checkpoint import CheckpointFunction

_FORWARD, _BACKWARD = CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__

unsafe_view = torch.ops.aten._unsafe_view
"""A tensor in another shape over the same memory, which autograd does not take for a view: it can be written to."""


backward_task: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward that runs in this thread; -1 outside of any. Not wrapped: every forward asks."""


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
    """The number of in-place writes to these tensors, as torch counts. Reads no value, so it waits for no device."""
    return sum(tensor._version for tensor in tensors)


def in_function_forward() -> bool:
    """Whether an autograd function may run its forward now, as a reentrant checkpoint does: torch sets a flag in one.

    `no_grad` does not set it.
    """
    enabled: Callable[[], bool] | None = getattr(torch._C, "_is_fwd_grad_enabled", None)
    return enabled is None or not enabled()


def reentrant_checkpoints() -> tuple[list[Any], Any]:
    """The contexts of the reentrant checkpoints that run a first forward now, and of the one that recomputes it.

    The graph of a recomputation is built inside backward and knows nothing of the first forward, but torch's context is
    the same object in both; it has to be found on the stack.
    """
    forwards = []
    forward, backward = _FORWARD, _BACKWARD  # decoding walks the stack once per layer and token
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is forward:
            forwards.append(frame.f_locals["ctx"])
        elif code is backward:
            return forwards, frame.f_locals["ctx"]
        frame = frame.f_back
    return forwards, None


def will_have_backward(context: Any) -> bool:
    """Whether an autograd function that runs its forward now will be differentiated.

    Gradients are off inside of every such forward. But the node is linked to those of its inputs only if they were on
    outside of it.
    """
    return bool(context.next_functions)


def non_reentrant_checkpoint() -> tuple[Any, Any]:
    """The frame of the non-reentrant checkpoint on top of the hooks: (in its first forward, in its recomputation)."""
    top: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = None if top is None else top(True)
    pack: Any = None if hooks is None else getattr(hooks[0], "__wrapped__", hooks[0])
    if getattr(pack, "__module__", None) != "torch.utils.checkpoint":
        return None, None
    cells = dict(zip(pack.__code__.co_freevars, (cell.cell_contents for cell in pack.__closure__ or ()), strict=True))
    target = cells.get("target_frame_ref")
    return cells.get("frame"), None if target is None else target()


def forward_is_watched(module: nn.Module) -> bool:
    """Whether a call of `module` does more than its class's forward: hooks, an instance's own forward, compiled."""
    return bool(
        "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )


def fsdp_groups() -> list[Any]:
    """FSDP2's groups of parameters in all models of this process; whole copies of theirs lie beside the shards."""
    states = sys.modules.get("torch.distributed._composable_state")
    if states is None:
        return []
    found: list[Any] = []
    for each in list(states._module_state_mapping.values()):
        state = each()
        several = getattr(state, "_fsdp_param_groups", None)
        one = getattr(state, "_fsdp_param_group", None) if several is None else None
        found += several or ([] if one is None else [one])
    return found


def gathered_by_fsdp() -> set[int]:
    """The `id` of each whole parameter that FSDP2 has made of a shard, whether it is in its module now or not."""
    parameters = (parameter for group in fsdp_groups() for parameter in group.fsdp_params)
    return {id(p._unsharded_param) for p in parameters if hasattr(p, "_unsharded_param")}


def default_store() -> Any:
    """The key-value store by which the processes of the default group found each other."""
    return torch.distributed.distributed_c10d._get_default_store()
