"""A slow start of the deployed block, so that the quarantine is the first to learn what is learnt fast.

    lr_d(t) = fraction lr(t)   for the first `steps` optimizer steps,      lr(t) afterwards;      lr_q(t) = lr(t)

lr(t) is whatever the optimizer's groups and schedulers say. A gate that routes what the quarantine explains
(`LogRatioGate`) needs the quarantine to be ahead: without a slow start both blocks learn a missed hack together.
"""

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple
from weakref import WeakSet, ref

from torch import Tensor, nn
from torch.optim import Optimizer

from gradroute._checks import integer_from_zero, positive_integer, share
from gradroute._optimized import block_parameters, check_held
from gradroute._protocol import BLOCKS, BlockName
from gradroute._state_dict import State, check_state, format_of
from gradroute._step_hooks import StepHooks, WeakHook, torch_optimizer
from gradroute.errors import FileFormatError, GradRouteError


def block_groups(model: nn.Module, groups: Iterable[Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer with one block in each, so that each block may have its own learning rate.

        torch.optim.AdamW(gr.optim.block_groups(model), lr=1e-4)

    Args:
        model: with routed layers.
        groups: parameter groups to split, each a dict with "params", such as `optimizer.param_groups` before the first
            step. Parameters may be given as an optimizer takes them. What belongs to no block stays in a group of its
            own, and other settings are kept. None: the trainable parameters of both blocks and nothing else.

    Returns:
        Groups with the further entry "block": "deployed", "quarantine" or None.

    Raises:
        GradRouteError: no routed layer, groups that are no dicts with "params", or nothing that can be trained.
    """
    parameters = [(block, p) for block in BLOCKS for _, p in block_parameters(model, [block])]
    block_of: dict[int, BlockName] = {id(p): block for block, p in parameters}
    if groups is None:
        groups = [{"params": [p for _, p in parameters if p.requires_grad]}]
    found = []
    for group in groups:
        entries = _entries(group)
        for named in (*BLOCKS, None):
            own = [(name, p) for name, p in entries if block_of.get(id(p)) == named]
            if own:
                found.append({**group, "params": [p for _, p in own], "block": named})
                if own[0][0] is not None:
                    found[-1]["param_names"] = [name for name, _ in own]
    if not any(group["block"] for group in found):
        raise GradRouteError(
            "The groups should hold trainable parameters of the blocks of `model`. Found none. Fix: attach() first, "
            "and leave the blocks' requires_grad on."
        )
    return found


def _entries(group: Any) -> list[tuple[str | None, Tensor]]:
    """The parameters of a group, with their names where the optimizer was made of `named_parameters()`."""
    if not isinstance(group, Mapping) or "params" not in group:
        found = type(group).__name__
        raise GradRouteError(f'`groups` should be dicts with "params". Found {found}. Fix: [{{"params": parameters}}].')
    given = group["params"]
    given = [given] if isinstance(given, Tensor) else list(given)
    if group.get("param_names") is not None:
        return list(zip(group["param_names"], given, strict=True))
    return [each if isinstance(each, tuple) else (None, each) for each in given]


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
            a group that holds others beside deployed ones or has no learning rate, or a second slow start before the
            first is over. From `step()`: the same of blocks or groups that were changed since; or a rate that was
            written while a step ran, such as by a scheduler in a hook.
    """
    return SlowStart(model, optimizer, steps, fraction)


class _Rate(NamedTuple):
    """What a group had, and what it has during a slow step; a tensor's version tells of writes in place."""

    group: dict[str, Any]
    whole: float | Tensor
    slow: float | Tensor
    version: int | None

    @property
    def was_written(self) -> bool:
        return self.group["lr"] is not self.slow or getattr(self.slow, "_version", None) != self.version


class SlowStart(StepHooks):
    """The handle that `slow_start` returns. Errors are listed there."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, steps: int, fraction: float) -> None:
        self.steps, self.fraction = positive_integer("steps", steps), share("fraction", fraction)
        if fraction == 1:
            raise GradRouteError("`fraction` should be in [0, 1). Found 1: nothing would start slowly.")
        self._model = ref(model)
        self._deployed = list(block_parameters(model, ["deployed"]))
        innermost = torch_optimizer(optimizer)
        self._slowed(innermost)
        mine = {id(p) for _, p in self._deployed}
        for other in _STARTED:
            shared = any(id(p) in mine for _, p in other._deployed)
            if other.is_open and not other.over and other._optimizer is innermost and shared:
                raise GradRouteError(
                    f"The deployed block should have one slow start at a time. Found that {other!r} is open: the "
                    "fractions would be multiplied. Fix: close() it first."
                )
        self.done = 0
        self._rates: list[_Rate] = []
        super().__init__(optimizer)
        # What is saved after a step that raised has the schedulers' rates.
        self._handles.append(innermost.register_state_dict_pre_hook(WeakHook(self, "_restore")))
        _STARTED.add(self)

    @property
    def over(self) -> bool:
        """Whether the slow steps are done."""
        return self.done >= self.steps

    def __repr__(self) -> str:
        done = f"step {self.done} of {self.steps}" if self.done < self.steps else f"over after {self.steps} steps"
        return f"SlowStart(deployed block at {self.fraction:g} of the rate, {done})"

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
        self._check_unwritten("after a step that raised")
        if self.over:
            return
        model = self._model()
        if model is not None:
            self._deployed = list(block_parameters(model, ["deployed"]))
        for group in self._slowed(self._optimizer):
            slow = group["lr"] * self.fraction
            self._rates.append(_Rate(group, group["lr"], slow, getattr(slow, "_version", None)))
            group["lr"] = slow
        # Other handles read the rate of the step after it.
        self._move_behind()

    def _after_step(self) -> None:
        self._check_unwritten("in the step")
        # A fused optimizer is called all the same where a scaler leaves the step out.
        overflow = getattr(self._optimizer, "found_inf", None)
        if overflow is None or not bool(overflow):
            self.done += 1

    def _check_unwritten(self, when: str) -> None:
        """Put the rates back, and raise if somebody read a slow one as the schedule's."""
        written = any(rate.was_written for rate in self._rates)
        self._restore()
        if written:
            raise GradRouteError(
                f"The deployed block's learning rate should be left alone while it is slow. Found it written {when}: a "
                "scheduler would go on from the fraction, or undo it. "
                "Fix: step schedulers after optimizer.step(), and not in a hook or where the step raised."
            )

    def _restore(self, *_: Any) -> None:
        while self._rates:
            rate = self._rates.pop()
            rate.group["lr"] = rate.whole

    def _slowed(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The groups of the deployed block."""
        check_held([optimizer], self._deployed)
        deployed = {id(p) for _, p in self._deployed}
        slowed = [group for group in optimizer.param_groups if any(id(p) in deployed for p in group["params"])]
        for group in slowed:
            others = sum(id(p) not in deployed for p in group["params"])
            if others:
                raise GradRouteError(
                    f"`optimizer` should have groups that hold one block each. Found one of {len(group['params'])} "
                    f"parameters, {others} of them not deployed. Fix: make it of gradroute.optim.block_groups(model)."
                )
            if not isinstance(group.get("lr"), Real | Tensor):
                raise GradRouteError(
                    f"`optimizer` should have a learning rate of the deployed block to take a fraction of. Found "
                    f"lr={group.get('lr')!r}. Fix: one that is given, and not made by the optimizer."
                )
        return slowed


_STARTED: "WeakSet[SlowStart]" = WeakSet()
