"""A block that no row was to train is not stepped at all.

    eligible(deployed)   = some row of some forward since the last step has g_d != 0
    eligible(quarantine) = some row of some forward since the last step has m g_q != 0
    not eligible on any rank  ->  p.grad = None for the step: no moment, no decay, no step count

With AdamW a gradient of zero still moves a weight, by what its moments remember and by weight decay. Fifty batches
without a flagged row would wear the quarantine down although nothing was to train it. Source: shawnghu/small-rl.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import Optimizer

from gradroute._optimized import held_blocks
from gradroute._protocol import BLOCKS, BlockName
from gradroute._step_hooks import StepHooks, WeakHook
from gradroute._transfers import read_together
from gradroute.adapters.layer import RoutedLinear, routed_linears
from gradroute.adapters.pending import PendingMask
from gradroute.errors import GradRouteError


def skip_idle_blocks(model: nn.Module, optimizer: Optimizer, *, others: Sequence[Optimizer] = ()) -> "IdleBlockSkip":
    """From now on, `optimizer` leaves a block out of each step for which no row was eligible.

    Which rows were is read from the routes under which routed layers run forward with gradients on (no route: all
    rows train both blocks), over all forwards since the last step, so that gradients may be accumulated. Where
    torch.distributed is initialised the ranks agree: a block is left out if it was eligible on none of them.

    Args:
        model: with routed layers.
        optimizer: any torch optimizer, or accelerate's around one, over the blocks. Attach filters first: they ask for
            the gradient that is set aside here.
        others: further optimizers that hold parameters of the blocks, if one does not hold all. Each needs a handle.

    Returns:
        A handle with `skipped` (steps left out, per block) and `close()`, usable as `with skip_idle_blocks(...):`.

    Raises:
        GradRouteError: a trainable parameter of a block that no optimizer holds, or none of them in this one. At a
            step: no routed layer ran forward since the last one, a pending mask was not decided, a closure, or a
            gradient that is not zero in a block that no row was to train.
    """
    return IdleBlockSkip(model, optimizer, others)


class IdleBlockSkip(StepHooks):
    """The handle that `skip_idle_blocks` returns. Errors are listed there."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, others: Sequence[Optimizer]) -> None:
        layers = routed_linears(model)
        held = held_blocks(model, optimizer, others)
        self._parameters = {
            block: [p for layer in layers.values() for p in layer.block_parameters(block) if id(p) in held]
            for block in BLOCKS
        }
        self.skipped: dict[BlockName, int] = dict.fromkeys(BLOCKS, 0)
        # Whether some row trains the deployed block, and the quarantine; None: not read yet.
        self._trained: Tensor | None = None
        self._undecided: list[tuple[PendingMask, Any]] = []  # masks and gates of forwards that are not decided yet
        self._ran = False
        self._state: object = None
        self._set_aside: list[tuple[nn.Parameter, Tensor]] = []
        super().__init__(optimizer)
        before = WeakHook(self, "_before_forward")
        self._handles += [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers.values()]

    def __repr__(self) -> str:
        counts = ", ".join(f"{block} {count} times" for block, count in self.skipped.items())
        return f"IdleBlockSkip({counts})"

    def _before_forward(self, layer: RoutedLinear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A no_grad forward trains nothing. Under reentrant checkpointing the first forward is one too; its
        # recomputation, inside backward and under the same route, is not.
        if not torch.is_grad_enabled():
            return
        self._ran = True
        if layer.state is self._state:
            return  # the layers of a model share their state: each mask is looked at once per forward
        self._state = layer.state
        if layer.state.disabled:
            return
        gates = layer.state.gates(args[0] if args else next(iter(kwargs.values())), layer.name)
        self._take_decided()
        route = layer.state.route
        if route is not None and isinstance(route.mask, PendingMask):
            self._undecided.append((route.mask, gates))
        else:
            self._take(gates.trained)

    def _before_step(self) -> None:
        if self._has_closure:
            raise GradRouteError("step(closure) runs its forward inside the step. Fix: backward first, then step().")
        self._take_decided()
        for mask, _ in self._undecided:
            _ = mask.decided  # raises
        trained = [False, False] if self._trained is None else self._trained.tolist()
        ran, *eligible = self._agreed([self._ran, *trained])
        if not ran:
            raise GradRouteError(
                "Some routed layer should have run forward with gradients on since the last step. Found none, so which "
                "rows train which block is unknown. Fix: skip_idle_blocks on the model and optimizer that are trained."
            )
        idle = [block for block, trains in zip(BLOCKS, eligible, strict=True) if not trains]
        for block in idle:
            if any(read_together(p.grad.any() for p in self._parameters[block] if p.grad is not None)):
                raise GradRouteError(
                    f"No row was to train the {block} block since the last step, and its gradient is not zero. Fix: "
                    "zero_grad() after each step, and let the loss depend on the blocks through routed forwards alone."
                )
        self._set_aside.clear()  # of a step that raised: gradients of that time, all zero
        for block in idle:
            self.skipped[block] += 1
            for parameter in self._parameters[block]:
                if parameter.grad is not None:
                    self._set_aside.append((parameter, parameter.grad))
                    parameter.grad = None
        # Other handles may ask after the step which parameters had a gradient.
        self._move_behind()

    def _after_step(self) -> None:
        for parameter, gradient in self._set_aside:
            parameter.grad = gradient
        self._set_aside.clear()
        self._trained, self._undecided, self._ran, self._state = None, [], False, None

    def _take(self, trained: Bool[Tensor, "2"]) -> None:
        # On the device: a forward waits for no read, and nothing grows with the number of forwards in a step.
        self._trained = trained if self._trained is None else self._trained | trained.to(self._trained.device)

    def _take_decided(self) -> None:
        waiting = []
        for mask, gates in self._undecided:
            if mask.is_decided:
                self._take(gates.known.trained)
            else:
                waiting.append((mask, gates))
        self._undecided = waiting

    def _agreed(self, flags: list[bool]) -> list[bool]:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return flags
        device = next(p.device for parameters in self._parameters.values() for p in parameters)
        on_ranks = torch.tensor(flags, dtype=torch.int32, device=device)
        torch.distributed.all_reduce(on_ranks, op=torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in on_ranks.tolist()]
