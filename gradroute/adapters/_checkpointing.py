"""Gradient checkpointing: a recomputed forward runs in the state of its first forward, or raises.

Checkpointing runs a layer's forward a second time, inside backward. If the route or ablation has changed by then, the
gradients are wrong by 60 to 90 % and nothing shows it. So the first forward leaves its state with the checkpoint it
runs in, and the recomputation takes it from there. A route closed in between raises: it is to enclose backward.

Where the checkpoint cannot be found (other saved-tensor hooks lie over it), `ForwardRecord.check_backward` compares the
state that was saved with the activations with the forward's own, and raises when they differ.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from gradroute.adapters._state import ForwardState
from gradroute.errors import RouteError

_FORWARD, _BACKWARD = CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__


class ForwardRecord(NamedTuple):
    """One eager forward of one layer: the state it runs in, and whether it runs inside backward."""

    layer: str
    state: ForwardState
    recomputing: bool = False
    unverified: bool = False

    @property
    def state_id(self) -> Int[Tensor, ""]:
        """Saved with the activations: under non-reentrant checkpointing it comes back from the recomputation."""
        return self.state.id

    def check_backward(self, saved_id: Int[Tensor, ""]) -> None:
        """Raise if the activations of this backward were computed in another state than the forward's."""
        if saved_id.item() != self.state.id.item():
            raise RouteError(_CHANGED.format(layer=self.layer))
        if self.unverified:
            raise RouteError(
                f"`{self.layer}` ran forward inside backward, in a checkpoint that is not torch.utils.checkpoint. "
                "Whether its route is that of its first forward cannot be known. Fix: use torch.utils.checkpoint."
            )


@dataclass
class _FirstForwards:
    """The states of a layer's forwards inside one checkpoint, and how many of them each backward has recomputed."""

    states: list[ForwardState] = field(default_factory=list)
    recomputed: dict[int, int] = field(default_factory=dict)

    def next_in(self, backward: int) -> ForwardState | None:
        """The state of the forward that `backward` recomputes next."""
        place = self.recomputed.get(backward, 0)
        self.recomputed[backward] = place + 1
        return self.states[place] if place < len(self.states) else None


def record_forward(layer: str, key: int, state: ForwardState) -> ForwardRecord:
    """The record of a forward that is about to run: in `state`, or in that of the first forward if it is recomputed.

    Args:
        layer: the layer's name, for errors.
        key: its identity.
        state: the state in force now.

    Raises:
        RouteError: a recomputation whose route has been closed.
    """
    task = torch._C._current_graph_task_id()
    recomputing = task != -1
    first, source = _non_reentrant_checkpoint()
    enclosing = [] if first is None else [first]
    compared_in_backward = source is not None
    if recomputing or not (torch.is_grad_enabled() or torch.is_inference_mode_enabled() or _outside_functions()):
        forwards, reentrant_source = _reentrant_checkpoints()
        enclosing += forwards
        source = source or reentrant_source
    if recomputing and source is not None:
        replayed = _forwards(source).get(key, _FirstForwards()).next_in(task)
        if replayed is None and not compared_in_backward:
            raise RouteError(f"`{layer}` ran more often in a checkpoint's recomputation than in its forward.")
        state = replayed or state
        if state.route is not None and state.route.closed:
            raise RouteError(_CHANGED.format(layer=layer))
    for checkpoint in enclosing:
        _forwards(checkpoint).setdefault(key, _FirstForwards()).states.append(state)
    return ForwardRecord(layer, state, recomputing, recomputing and source is None)


def _outside_functions() -> bool:
    """Whether no autograd function runs its forward now, as a reentrant checkpoint does: torch turns this off in one.

    `no_grad` leaves it on. So decoding, which comes here for every token and layer, need not walk the stack.
    """
    enabled: Callable[[], bool] | None = getattr(torch._C, "_is_fwd_grad_enabled", None)
    return enabled is not None and enabled()


def _forwards(checkpoint: Any) -> dict[int, _FirstForwards]:
    forwards: dict[int, _FirstForwards] = checkpoint.__dict__.setdefault("gradroute_forwards", {})
    return forwards


def _reentrant_checkpoints() -> tuple[list[Any], Any]:
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


def _non_reentrant_checkpoint() -> tuple[Any, Any]:
    """The frame of the non-reentrant checkpoint on top of the hooks: (in its first forward, in its recomputation)."""
    top: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = None if top is None else top(True)
    pack: Any = None if hooks is None else getattr(hooks[0], "__wrapped__", hooks[0])
    if getattr(pack, "__module__", None) != "torch.utils.checkpoint":
        return None, None
    cells = dict(zip(pack.__code__.co_freevars, (cell.cell_contents for cell in pack.__closure__ or ()), strict=True))
    target = cells.get("target_frame_ref")
    return cells.get("frame"), None if target is None else target()


_CHANGED = (
    "Gradient checkpointing recomputed `{layer}` after its route was closed, or under another ablation, so its "
    "gradients would be wrong. Fix: let `route(...)`, or the ablation, enclose both forward and backward."
)
