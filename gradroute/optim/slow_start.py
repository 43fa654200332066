"""A slow start of the deployed block, so that the quarantine is the first to learn what is learnt fast.

    lr_d(t) = fraction lr(t)   for the first `steps` optimizer steps,      lr(t) afterwards;      lr_q(t) = lr(t)

lr(t) is whatever the optimizer's groups and schedulers say. A gate that routes what the quarantine explains
(`LogRatioGate`) needs the quarantine to be ahead: without a slow start both blocks learn a missed hack together.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradroute._checks import integer_from_zero, positive_integer, share
from gradroute._optimized import check_held
from gradroute._protocol import BLOCKS, BlockName, routed_layers
from gradroute._state_dict import State, check_state, format_of
from gradroute._step_hooks import StepHooks, torch_optimizer
from gradroute.errors import FileFormatError, GradRouteError


def block_groups(model: nn.Module, groups: Iterable[Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer with one block in each, so that each block may have its own learning rate.

        torch.optim.AdamW(gr.optim.block_groups(model), lr=1e-4)

    Args:
        model: with routed layers.
        groups: parameter groups to split, each a dict with "params", such as `optimizer.param_groups` before the first
            step. What belongs to no block stays in a group of its own, and other settings are kept. None: the trainable
            parameters of both blocks and nothing else.

    Returns:
        Groups with the further entry "block": "deployed", "quarantine" or None.

    Raises:
        GradRouteError: no routed layer, or nothing that can be trained.
    """
    block_of: dict[int, BlockName] = {}
    parameters: dict[BlockName, list[nn.Parameter]] = {block: [] for block in BLOCKS}
    for layer in routed_layers(model).values():
        for block in BLOCKS:
            parameters[block] += layer.block_parameters(block)
            block_of |= {id(parameter): block for parameter in layer.block_parameters(block)}
    if groups is None:
        groups = [{"params": [p for block in BLOCKS for p in parameters[block] if p.requires_grad]}]
    found = []
    for group in groups:
        for named in (*BLOCKS, None):
            own = [p for p in group["params"] if block_of.get(id(p)) == named]
            if own:
                found.append({**group, "params": own, "block": named})
    if not any(group["block"] for group in found):
        raise GradRouteError(
            "The groups should hold trainable parameters of the blocks of `model`. Found none. Fix: attach() first, "
            "and leave the blocks' requires_grad on."
        )
    return found


def slow_start(model: nn.Module, optimizer: Optimizer, *, steps: int, fraction: float = 0.25) -> "SlowStart":
    """From now on, the deployed block's learning rate is lr_d = fraction lr, for `steps` optimizer steps.

    Args:
        model: with routed layers.
        optimizer: any torch optimizer, or accelerate's around one, whose groups hold one block each: `block_groups`.
        steps: optimizer steps; a step that a gradient scaler leaves out does not count.
        fraction: of the rate that schedulers give, in [0, 1). They see that rate, not the fraction.

    Returns:
        A handle with `done` (steps so far), `over`, `state_dict()`, `load_state_dict(state)`, `close()`, and usable in
        `with`. Sample rollouts ablated once it is `over`: they teach missed hacks to the deployed block alone.

    Raises:
        GradRouteError: a fraction or steps out of range, a trainable deployed parameter that `optimizer` does not hold,
            or a group that holds others beside deployed ones.
    """
    return SlowStart(model, optimizer, steps, fraction)


class SlowStart(StepHooks):
    """The handle that `slow_start` returns. Errors are listed there."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, steps: int, fraction: float) -> None:
        self.steps, self.fraction = positive_integer("steps", steps), share("fraction", fraction)
        if fraction == 1:
            raise GradRouteError("`fraction` should be in [0, 1). Found 1: nothing would start slowly.")
        layers = routed_layers(model)
        deployed = [(name, p) for name, layer in layers.items() for p in layer.block_parameters("deployed")]
        check_held([optimizer], deployed)
        self._deployed = {id(p) for _, p in deployed}
        self._slowed(torch_optimizer(optimizer).param_groups)
        self.done = 0
        self._rates: list[tuple[dict[str, Any], float | Tensor]] = []
        super().__init__(optimizer)

    @property
    def over(self) -> bool:
        """Whether the slow steps are done."""
        return self.done >= self.steps

    def __repr__(self) -> str:
        return f"SlowStart(deployed block at {self.fraction:g} of the rate, step {self.done} of {self.steps})"

    def state_dict(self) -> State:
        """How many steps are done."""
        settings = {"steps": self.steps, "fraction": self.fraction}
        return {"format": format_of(self), "settings": settings, "done": self.done}

    def load_state_dict(self, state: State) -> None:
        """Go on from where `state` was saved.

        Raises:
            FileFormatError: a state of another class or settings.
        """
        done = check_state(self, state, self.state_dict())["done"]
        self.done = integer_from_zero("done", done, FileFormatError)

    def close(self) -> None:
        """End the slow start; the rates are those of the schedulers again."""
        self._restore()
        super().close()

    def _before_step(self) -> None:
        self._restore()  # after a step that raised
        if self.over:
            return
        for group in self._slowed(self._optimizer.param_groups):
            self._rates.append((group, group["lr"]))
            group["lr"] = group["lr"] * self.fraction

    def _after_step(self) -> None:
        self._restore()
        self.done += 1

    def _restore(self) -> None:
        while self._rates:
            group, rate = self._rates.pop()
            group["lr"] = rate

    def _slowed(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups of the deployed block."""
        slowed = [group for group in groups if any(id(p) in self._deployed for p in group["params"])]
        for group in slowed:
            others = sum(id(p) not in self._deployed for p in group["params"])
            if others:
                raise GradRouteError(
                    f"`optimizer` should have groups that hold one block each. Found one of {len(group['params'])} "
                    f"parameters, {others} of which are not of the deployed block: they would start slowly too. Fix: "
                    "make it of gradroute.optim.block_groups(model)."
                )
        return slowed
