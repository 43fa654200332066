"""Gradient checkpointing: a recomputed forward runs in the state of its first forward, or raises.

Checkpointing runs a layer's forward a second time, inside backward. If the route or ablation has changed by then, the
gradients are wrong by 60 to 90 % and nothing shows it. So the first forward leaves its state with the checkpoint it
runs in, and the recomputation takes it from there. A route closed in between raises: it has to enclose backward.

Where the checkpoint cannot be found (other saved-tensor hooks lie over it), `ForwardRecord.check_backward` compares the
state that was saved with the activations with the forward's own, and raises when they differ.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from gradroute._torch_private import (
    backward_task,
    in_function_forward,
    non_reentrant_checkpoint,
    reentrant_checkpoints,
    will_have_backward,
)
from gradroute.adapters._state import ForwardState, StatefulLayer
from gradroute.errors import RouteError


class ForwardRecord(NamedTuple):
    """One eager forward of one layer.

    Args:
        layer: which runs.
        state: the forward runs in.
        has_backward: whether gradients will come back to it.
        recomputing: whether it runs inside backward.
        unverified: whether it runs inside backward and its first forward is not known.
    """

    layer: StatefulLayer
    state: ForwardState
    has_backward: bool = True
    recomputing: bool = False
    unverified: bool = False

    def check_backward(self, saved_id: Int[Tensor, ""]) -> None:
        """Raise if this backward runs in another state than its forward, or in a route that its forward lacked.

        Args:
            saved_id: of a state, saved with the activations: under non-reentrant checkpointing it comes back from the
                recomputation.
        """
        # In one memory they are one number, which then need not be read.
        own = self.state.id
        if saved_id.data_ptr() != own.data_ptr() and saved_id.item() != own.item():
            raise RouteError(_CHANGED.format(layer=self.layer.name))
        if self.unverified:
            raise RouteError(
                f"`{self.layer.name}` ran forward inside backward, in a checkpoint that is not torch.utils.checkpoint. "
                "Whether its route is that of its first forward cannot be known. Fix: use torch.utils.checkpoint."
            )
        if self.state.route is None and self.layer.has_open_route:
            raise RouteError(
                f"The forward of `{self.layer.name}` ran without a route and its backward runs inside one: the mask "
                "was asked for and not applied. Fix: run the forward inside `route(...)` too, or this backward outside."
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


def record_forward(layer: StatefulLayer, state: ForwardState) -> ForwardRecord:
    """The record of a forward that is about to run: in `state`, or in that of the first forward if it is recomputed.

    Args:
        layer: about to run.
        state: the state in force now.

    Raises:
        RouteError: a recomputation whose route has been closed.
    """
    task = backward_task()
    recomputing = task != -1
    has_backward = torch.is_grad_enabled()
    first, source = non_reentrant_checkpoint()
    enclosing = [] if first is None else [first]
    compared_in_backward = source is not None
    # Decoding comes here for every token and layer: only a forward that may run in a checkpoint looks for it.
    if recomputing or not (has_backward or torch.is_inference_mode_enabled() or not in_function_forward()):
        forwards, reentrant_source = reentrant_checkpoints()
        has_backward = has_backward or any(will_have_backward(checkpoint) for checkpoint in forwards)
        enclosing += forwards
        source = source or reentrant_source
    if recomputing and source is not None:
        replayed = _forwards(source).get(id(layer), _FirstForwards()).next_in(task)
        if replayed is None and not compared_in_backward:
            raise RouteError(f"`{layer.name}` ran more often in a checkpoint's recomputation than in its forward.")
        state = replayed or state
        if state.route is not None and state.route.closed:
            raise RouteError(_CHANGED.format(layer=layer.name))
    for checkpoint in enclosing:
        _forwards(checkpoint).setdefault(id(layer), _FirstForwards()).states.append(state)
    return ForwardRecord(layer, state, has_backward, recomputing, recomputing and source is None)


def _forwards(checkpoint: Any) -> dict[int, _FirstForwards]:
    forwards: dict[int, _FirstForwards] = checkpoint.__dict__.setdefault("gradroute_forwards", {})
    return forwards


_CHANGED = (
    "Gradient checkpointing recomputed `{layer}` after its route was closed, or under another ablation, so its "
    "gradients would be wrong. Fix: let `route(...)`, or the ablation, enclose both forward and backward."
)
