"""Corrections to the step that an optimizer takes with a routed gradient, and to its moments.

    realised update     D = p_after - p_before,   removed = relu(-V D) (-V)   (two-sided: V^T V D),   p <- p - removed
    momentum            e <- e - relu(V e) V                                  (two-sided: e - V^T V e)
    decay to the start  p <- p - lr wd (p - p_0)

V (k x d) are the orthonormal rows of a module's directions in the space of its deployed parameters, and point as the
gradient of a loss that makes hacking likelier: an update *against* V is hack-ward, and so is a momentum *along* V.
Rows are read at each step, so that a refresh is seen. Sources: grpo_proj2 (projection), vGROUT (decay), both wassname.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from gradroute._checks import positive_number
from gradroute._optimized import check_held, held_blocks
from gradroute._sharding import as_blocks, as_row, overwrite, whole
from gradroute._state_dict import State, check_state, format_of
from gradroute._step_hooks import StepHooks, torch_optimizer
from gradroute._transfers import read_together
from gradroute.adapters.attach import deployed_parameters, quarantine_parameters
from gradroute.directions.directions import Directions
from gradroute.errors import FileFormatError, GradRouteError
from gradroute.optim._deployed_rows import DeployedRows, Side

_MOMENTS = ("exp_avg", "momentum_buffer")


def project_updates(
    model: nn.Module, optimizer: Optimizer, directions: Directions, *, side: Side = "one"
) -> "UpdateProjection":
    """From now on, p <- p - relu(-V D) (-V) after each step, D = p_after - p_before; two-sided: p <- p - V^T V D.

    An erased gradient does not make an erased update: AdamW's normalisation, its moments and weight decay all turn it.

    Args:
        model: with routed layers; their deployed blocks are corrected.
        optimizer: any torch optimizer, or accelerate's around one, over those blocks.
        directions: rows for every routed layer, as wide as its deployed parameters together; see `ProjectionFilter`.
        side: "one" takes out hack-ward updates, "two" any update along V.

    Returns:
        A handle with `removed_share` (|removed| / |D| of the last step), `close()`, and usable in `with`.

    Raises:
        GradRouteError: rows missing, of another width, standardised, dependent, or oblique with `side="one"`; deployed
            parameters that `optimizer` does not hold.
    """
    return UpdateProjection(model, optimizer, directions, side)


class UpdateProjection(StepHooks):
    """The handle that `project_updates` returns. Errors are listed there."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, directions: Directions, side: Side) -> None:
        self.removed_share: float | None = None
        self._blocks = DeployedRows(model, directions, side)
        check_held([optimizer], ((name, p) for name, ps in self._blocks.parameters.items() for p in ps))
        self._before: dict[str, Tensor] = {}
        super().__init__(optimizer)

    def __repr__(self) -> str:
        last = "no step yet" if self.removed_share is None else f"removed {self.removed_share:.3f} of the last update"
        return f"UpdateProjection({len(self._blocks.parameters)} modules, {self._blocks.side}-sided, {last})"

    @torch.no_grad()
    def _before_step(self) -> None:
        self._blocks.read()
        self._before = self._blocks.joined()

    @torch.no_grad()
    def _after_step(self) -> None:
        squares: list[Tensor] = []
        for name, after in self._blocks.joined().items():
            update = after - self._before[name]
            removed = self._blocks.hackward(name, update)
            _write_row(self._blocks.parameters[name], after - removed)
            squares += [removed.square().sum(), update.square().sum()]
        self._before = {}
        self.removed_share = _removed_share(squares)


@torch.no_grad()
def purge_moments(model: nn.Module, optimizer: Optimizer, directions: Directions, *, side: Side = "one") -> float:
    """e <- e - relu(V e) V for the first moments e of the deployed blocks; two-sided: e <- e - V^T V e.

    What was banked before a projection began, or before a refresh turned V, would go on moving the policy for tens of
    steps. Second moments stay: they have no direction.

    Args:
        model, optimizer, directions, side: see `project_updates`.

    Returns:
        |removed| / |e|, over all modules.

    Raises:
        GradRouteError: see `project_updates`; or a deployed parameter without a first moment (no step was taken, or the
            optimizer keeps none).
    """
    blocks = DeployedRows(model, directions, side)
    state = torch_optimizer(optimizer).state
    moments = {}
    for name, parameters in blocks.parameters.items():
        found = [next((state[p][key] for key in _MOMENTS if key in state.get(p, {})), None) for p in parameters]
        moments[name] = [moment for moment in found if isinstance(moment, Tensor)]
        if len(moments[name]) < len(parameters):
            raise GradRouteError(
                f"`optimizer` should have a first moment ({' or '.join(_MOMENTS)}) for the deployed parameters of "
                f"`{name}`. Found none. Fix: purge after the first step, of an optimizer with momentum."
            )
    squares: list[Tensor] = []
    for name, tensors in moments.items():
        moment = as_row([whole(tensor, name) for tensor in tensors])
        removed = -blocks.hackward(name, -moment)
        _write_row(tensors, moment - removed)
        squares += [removed.square().sum(), moment.square().sum()]
    return _removed_share(squares)


def _write_row(tensors: Sequence[Tensor], row: Float[Tensor, " d"]) -> None:
    for tensor, part in zip(tensors, as_blocks(row, tensors), strict=True):
        overwrite(tensor, part)


def _removed_share(squares: Sequence[Tensor]) -> float:
    """|removed| / |all|, of their squares by module in turn; the host reads once."""
    found = read_together(squares)
    removed, whole_square = sum(found[::2]), sum(found[1::2])
    return math.sqrt(removed / whole_square) if whole_square else 0.0


def decay_toward_start(
    model: nn.Module, optimizer: Optimizer, weight_decay: float, *, others: Sequence[Optimizer] = ()
) -> "DecayTowardStart":
    """From now on, p <- p - lr wd (p - p_0) after each step, for both blocks; p_0 = the values they have now.

    Weight decay toward zero would pull an oriented start apart; this pulls the net delta to zero. A parameter without a
    gradient is not decayed, as in torch, and neither is a block that `skip_idle_blocks` leaves out.

    Args:
        model: with routed layers, at its initialisation, or resumed: then load this handle's state as well.
        optimizer: any torch optimizer, or accelerate's around one, with weight_decay=0 for the blocks.
        weight_decay: wd > 0; lr is that of each parameter's group at the step.
        others: further optimizers that hold parameters of the blocks, if one does not hold all. Each needs a handle.

    Returns:
        A handle with `state_dict()`, `load_state_dict(state)`, `close()`, and usable in `with`.

    Raises:
        GradRouteError: a weight decay that is not positive; a trainable parameter of a block that no optimizer holds;
            an optimizer without parameters of the blocks, or with a weight decay on them already.
    """
    return DecayTowardStart(model, optimizer, weight_decay, others)


class DecayTowardStart(StepHooks):
    """The handle that `decay_toward_start` returns. Errors are listed there."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, weight_decay: float, others: Sequence[Optimizer]
    ) -> None:
        self.weight_decay = positive_number("weight_decay", weight_decay)
        held_blocks(model, optimizer, others)
        self._start: dict[str, Tensor] = {}
        self._names = {id(p): name for name, p in (*deployed_parameters(model), *quarantine_parameters(model))}
        for group in torch_optimizer(optimizer).param_groups:
            for p in group["params"]:
                if id(p) in self._names:
                    self._start[self._names[id(p)]] = p.detach().clone()
                    if group.get("weight_decay"):
                        raise GradRouteError(
                            f"`optimizer` should have weight_decay=0 for `{self._names[id(p)]}`. Found "
                            f"{group['weight_decay']}: it would pull toward zero at the same time."
                        )
        super().__init__(optimizer)

    def __repr__(self) -> str:
        return f"DecayTowardStart({self.weight_decay:g}, {len(self._start)} parameters)"

    def state_dict(self) -> State:
        """p_0 of every parameter, whole; without it a resumed run would decay toward where it was resumed."""
        start = {name: whole(value, name).clone() for name, value in self._start.items()}
        return {"format": format_of(self), "settings": {"weight_decay": self.weight_decay}, "start": start}

    def load_state_dict(self, state: State) -> None:
        """Decay toward the p_0 of `state`.

        Raises:
            FileFormatError: a state of another class or settings, or of parameters of other names or shapes.
        """
        start = check_state(self, state, self.state_dict())["start"]
        shapes = [{name: tuple(value.shape) for name, value in values.items()} for values in (start, self._start)]
        if shapes[0] != shapes[1]:
            different = sorted(n for n in shapes[0].keys() | shapes[1].keys() if shapes[0].get(n) != shapes[1].get(n))
            raise FileFormatError(f"`state` should be of the same parameters and shapes. Different: {different[:5]}.")
        with torch.no_grad():
            for name, mine in self._start.items():
                overwrite(mine, start[name].to(mine.device, mine.dtype))

    @torch.no_grad()
    def _after_step(self) -> None:
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                name = self._names.get(id(p))
                if name is not None and p.grad is not None:
                    p.sub_((p - self._start[name]) * (group["lr"] * self.weight_decay))
