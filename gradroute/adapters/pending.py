"""A mask whose gates are decided after the forward: whether a row is absorbed or routed is the backward's business.

    forward    y = base + s_d B_d A_d x + m s_q B_q A_q x           m is given
    decide     g_d, g_q                                             from features of that forward, its loss, a grader
    backward   the gradients of a mask (m, g_d, g_q) given beforehand, bit for bit

Rows in the zones absorb and route have the same forward, m = 1. So scores can be taken in the forward of the loss, and
need no separate pass.
"""

from jaxtyping import Float
from torch import Tensor

from gradroute._checks import instance_of, positive_integer
from gradroute.adapters.mask import RouteMask
from gradroute.errors import RouteError


class PendingMask:
    """For `route`: m is known, g_d and g_q are what `decide` gets between forward and backward.

        with gr.route(model, PendingMask.on(8)) as pending, gr.capture_activations(model, pool=completion) as features:
            loss = grpo_loss(model, rollouts)
            pending.decide(gate(directions.score(features, view="on")))
            loss.backward()

    Args:
        m: weight of the quarantine in the forward: `(batch,)`, `(batch, seq)` or `(1, tokens)`.

    Serves one route, and is decided once. Exact where a mask given beforehand is, except for compiled forwards, which
    refuse it: with accumulation, activation checkpointing, DDP and FSDP2.

    Raises:
        RouteError: weights that are not finite floats; a backward, or the end of the route, before `decide`; a second
            route.
    """

    def __init__(self, m: Float[Tensor, "*rows"]) -> None:
        self._known = RouteMask(m, m, m)  # for its checks, and its copy
        self._decided: RouteMask | None = None
        self._opened = False

    @classmethod
    def on(cls, rows: int) -> "PendingMask":
        """All rows with their quarantine on, m = 1: each is to be absorbed or routed.

        Args:
            rows: sequences of the batch.
        """
        return cls(RouteMask.zones(["absorb"] * positive_integer("rows", rows, RouteError)).m)

    @property
    def m(self) -> Float[Tensor, "*rows"]:
        """The weight of the quarantine in the forward."""
        return self._known.m

    @property
    def is_binary(self) -> bool:
        """Whether every m is 0 or 1."""
        return self._known.is_binary

    @property
    def is_decided(self) -> bool:
        """Whether `decide` was called."""
        return self._decided is not None

    @property
    def decided(self) -> RouteMask:
        """What was decided.

        Raises:
            RouteError: nothing has been.
        """
        if self._decided is None:
            raise RouteError(
                "A pending mask should be decided between forward and backward. Found that it was not. Fix: "
                "pending.decide(mask) before loss.backward(), inside the route."
            )
        return self._decided

    def decide(self, mask: RouteMask) -> None:
        """Take g_d and g_q from `mask`, whose m has to be that of the forward.

        Args:
            mask: of the same shape.

        Raises:
            RouteError: another m or shape, or a mask that has been decided before.
        """
        instance_of("mask", mask, RouteMask, "RouteMask.classic(flags) or .zones(...).", RouteError)
        if self._decided is not None:
            raise RouteError("A pending mask is decided once. Found a second mask. Fix: a PendingMask per route.")
        if mask.shape != self.m.shape:
            raise RouteError(
                f"`mask` should have the shape {tuple(self.m.shape)} of the pending mask. Found {tuple(mask.shape)}."
            )
        other = mask.m.to(self.m) != self.m
        if other.any():
            where = tuple(other.nonzero()[0].tolist())
            raise RouteError(
                f"`mask` should have the m of the forward that ran. Found {int(other.sum())} other weights, the first "
                f"{mask.m[where].item():g} instead of {self.m[where].item():g} at index {where}. Fix: a gate that "
                "absorbs what it does not route (keep has m = 0), or PendingMask(m) with the m that it will decide."
            )
        self._decided = mask

    def open(self) -> None:
        """Called by the route that the mask is given to.

        Raises:
            RouteError: another route had it.
        """
        if self._opened:
            raise RouteError("A pending mask serves one route. Found a second one. Fix: a PendingMask per route.")
        self._opened = True

    def __repr__(self) -> str:
        state = "undecided" if self._decided is None else repr(self._decided)
        return f"PendingMask({tuple(self.m.shape)}, {state})"
