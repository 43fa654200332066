"""The step that the optimizer really took, per block.

    ratio = |p_after - p_before| / |p.grad|          cout = |relu(-V D)| / |D|,   D = p_after - p_before, deployed

AdamW does not step along the gradient it is given, nor in proportion to it: a residual of 1e-6, left over by routing,
is normalised to a step of full size. It shows as a ratio far above that of the other block.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradroute._optimized import block_parameters, check_held
from gradroute._sharding import check_layout, whole, wide
from gradroute._step_hooks import StepHooks
from gradroute._transfers import read_together
from gradroute.adapters.attach import deployed_parameters, quarantine_parameters
from gradroute.directions.directions import Directions
from gradroute.errors import GradRouteError
from gradroute.optim._deployed_rows import DeployedRows


@dataclass(frozen=True)
class BlockUpdate:
    """Gradient and update of one block in one step.

    Args:
        gradient_norm: of the gradient that the optimizer saw; 0 where it had none.
        update_norm: of the change of the parameters.
    """

    gradient_norm: float
    update_norm: float

    @property
    def ratio(self) -> float:
        """|update| / |gradient|; infinite for a block that moved without a gradient, 0 for one that did not move."""
        if not self.update_norm:
            return 0.0
        return self.update_norm / self.gradient_norm if self.gradient_norm else math.inf

    def __repr__(self) -> str:
        return f"gradient {self.gradient_norm:.2e}, update {self.update_norm:.2e}, ratio {self.ratio:.2e}"


@dataclass(frozen=True)
class UpdateAudit:
    """Audit of one optimizer step.

    Args:
        step: steps seen so far, this one included.
        deployed, quarantine: gradient and update of each block.
        cout: hack-ward share of the deployed update, in [0, 1]; None without directions. A random direction has
            sqrt(k / 2d) in the mean, for k rows of width d.
    """

    step: int
    deployed: BlockUpdate
    quarantine: BlockUpdate
    cout: float | None

    def __repr__(self) -> str:
        cout = "" if self.cout is None else f", cout {self.cout:.3f}"
        return f"UpdateAudit(step {self.step}; deployed: {self.deployed!r}{cout}; quarantine: {self.quarantine!r})"


def audit_updates(
    model: nn.Module, optimizer: Optimizer, directions: Directions | None = None, *, others: Sequence[Optimizer] = ()
) -> "UpdateAudits":
    """Record what each step of `optimizer` does to the blocks of `model`, until `close()` or the end of a `with`.

    Args:
        model: with routed layers; a copy of their parameters is kept from the start of a step to its end.
        optimizer: any torch optimizer, or accelerate's around one.
        directions: for `cout`; see `project_updates`.
        others: further optimizers that hold parameters of the blocks, if one does not hold all; not audited.

    Returns:
        A handle: `read()` gives the `UpdateAudit` of the step since it was last read. The audit ends with the handle.

    Raises:
        GradRouteError: a trainable parameter of a block that no optimizer holds, so that it would never move;
            directions that do not fit the deployed parameters. At the end of a `with` in which no step
            was taken, and in `read()` without a new one: an optimizer that is audited and not stepped is another one.
    """
    return UpdateAudits(model, optimizer, directions, others)


class UpdateAudits(StepHooks):
    """The handle that `audit_updates` returns. Errors are listed there."""

    _kept_by_optimizer = False  # nobody could read it

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, directions: Directions | None, others: Sequence[Optimizer]
    ) -> None:
        self._rows = None if directions is None else DeployedRows(model, directions, "one")
        self._blocks = [dict(deployed_parameters(model)), dict(quarantine_parameters(model))]
        for block in self._blocks:
            for name, parameter in block.items():
                check_layout(name, parameter)
        check_held([optimizer, *others], block_parameters(model))
        self._before: list[dict[str, Tensor]] = []
        self._rows_before: dict[str, Tensor] = {}
        self._unread: UpdateAudit | None = None
        self._seen = 0
        super().__init__(optimizer)

    def read(self) -> UpdateAudit:
        """The audit of the latest step; raises if that has been read, or if there was none."""
        latest, self._unread = self._unread, None
        if latest is None:
            raise GradRouteError(
                f"A step should have been taken since the last read(). Found {self._seen} steps in all. "
                "Fix: audit the optimizer that is stepped, and read once per step."
            )
        return latest

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        if exception[0] is None and not self._seen:
            raise GradRouteError("No step of the audited optimizer was seen. Fix: audit the one that is stepped.")

    def __repr__(self) -> str:
        return f"UpdateAudits({self._seen} steps)"

    @torch.no_grad()
    def _before_step(self) -> None:
        if self._rows is not None:
            self._rows.read()
            self._rows_before = self._rows.joined()
        self._before = [{name: p.detach().clone() for name, p in block.items()} for block in self._blocks]
        # Corrections by other handles, whenever they were made, are part of the update.
        self._move_behind()

    @torch.no_grad()
    def _after_step(self) -> None:
        changes = []
        for block, before in zip(self._blocks, self._before, strict=True):
            changes.append([whole(p.grad, name) for name, p in block.items() if p.grad is not None])
            changes.append([whole(wide(p) - wide(before[name]), name) for name, p in block.items()])
        if self._rows is not None:
            updates = {name: after - self._rows_before[name] for name, after in self._rows.joined().items()}
            changes.append([self._rows.hackward(name, update) for name, update in updates.items()])
            changes.append(list(updates.values()))
        norms = _norms(changes)
        cout = None if self._rows is None else norms[4] / norms[5] if norms[4] else 0.0
        self._seen += 1
        self._unread = UpdateAudit(self._seen, BlockUpdate(*norms[:2]), BlockUpdate(*norms[2:4]), cout)
        self._before, self._rows_before = [], {}


def _norms(groups: Sequence[Sequence[Tensor]]) -> list[float]:
    """The norm over all tensors of each group; the host reads once."""
    squares = iter(read_together(wide(tensor).square().sum() for group in groups for tensor in group))
    return [math.sqrt(sum(next(squares) for _ in group)) for group in groups]
