"""Re-extracting directions as the policy moves, and making sure that it happened.

Every `every` optimizer steps: quarantine ablated, eval mode, no route; extract; put the result into the same
`Directions` object; leave modes, gradients and random numbers as found. A refresh that changes nothing although the
deployed blocks moved raises: this library exists because one such refresh went unnoticed.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import torch
from torch import nn

from gradroute.adapters.attach import deployed_parameters
from gradroute.adapters.modes import ablate_quarantine, without_route
from gradroute.directions.container import Directions
from gradroute.errors import RefreshError
from gradroute.preserve import left_as_found


@dataclass(frozen=True)
class RefreshReport:
    """What one refresh did.

    Args:
        step: optimizer steps taken when it ran.
        age: optimizer steps since the extraction that it replaced.
        overlap: with the directions it replaced; 1 = the same, 0 = unrelated, -1 = reversed.
        moved: whether deployed parameters changed since that extraction.
        version: of the directions afterwards.
    """

    step: int
    age: int
    overlap: float
    moved: bool
    version: int

    def __repr__(self) -> str:
        unmoved = "" if self.moved else ", deployed blocks unmoved"
        return (
            f"RefreshReport(step {self.step}, age {self.age}, overlap {self.overlap:.3f}, "
            f"version {self.version}{unmoved})"
        )


class Refresher:
    """Call `step()` once after each optimizer step; it re-extracts when the directions are `every` steps old.

    Args:
        directions: updated in place, so that gates which hold them see the change. A random control keeps its rows and
            takes new pair features.
        extract: makes fresh `Directions` from the same pairs and settings; runs with the quarantine ablated.
        model: the model that is trained.
        every: optimizer steps between refreshes.

    Raises:
        RefreshError: bad arguments, or a due refresh that extracted nothing, or the same features as before although
            the deployed parameters moved.
    """

    def __init__(
        self, directions: Directions, extract: Callable[[], Directions], *, model: nn.Module, every: int = 5
    ) -> None:
        if not isinstance(directions, Directions):
            raise RefreshError(f"`directions` should be Directions to refresh. Found {type(directions).__name__}.")
        if not callable(extract):
            raise RefreshError(f"`extract` should be a function that returns Directions. Found {extract!r}.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise RefreshError(f"`every` should be a positive integer. Found {every!r}. To freeze, use none.")
        self.directions, self.extract, self.model, self.every = directions, extract, model, every
        self.steps = directions.step
        self.reports: list[RefreshReport] = []
        self._extracted_at = directions.step
        self._version = directions.version
        self._fingerprint = _fingerprint(model)

    @property
    def age(self) -> int:
        """Optimizer steps since the directions were extracted."""
        return self.steps - self._extracted_at

    def step(self) -> RefreshReport | None:
        """Count one optimizer step; refresh if it is due and return the report, else None."""
        self.steps += 1
        return self.refresh() if self.age >= self.every else None

    def refresh(self) -> RefreshReport:
        """Re-extract now, whatever the schedule says."""
        before = self.directions.version
        if before != self._version:
            raise RefreshError(
                f"`directions` should be updated by this refresher alone. Found version {before} instead of "
                f"{self._version}. Fix: one Refresher per Directions."
            )
        with without_route(self.model), ablate_quarantine(self.model), left_as_found(self.model):
            fresh = self.extract()
        if not isinstance(fresh, Directions):
            raise RefreshError(f"`extract` should return Directions. Found {type(fresh).__name__}.")
        if fresh.provenance.view != "ablated":
            raise RefreshError(
                f"`extract` should measure `model` with its quarantine ablated. Found {fresh.provenance.view!r}. "
                "Fix: extract from the model that was given to the Refresher, and leave its views alone."
            )
        fingerprint = _fingerprint(self.model)
        moved = fingerprint != self._fingerprint
        if moved and self._same_features(fresh):
            raise RefreshError(
                "The deployed parameters moved since the last extraction and the fresh pair features are bitwise the "
                "same, so this refresh did nothing. Fix: extract from the model that is trained, not from a copy or a "
                "cache, and with features that depend on the trained blocks."
            )
        previous = copy(self.directions)
        self.directions.update_(fresh, step=self.steps)
        if self.directions.version == before:
            raise RefreshError("The directions were not updated although a refresh was due.")
        report = RefreshReport(self.steps, self.age, self.directions.overlap(previous), moved, self.directions.version)
        self._extracted_at, self._fingerprint, self._version = self.steps, fingerprint, self.directions.version
        self.reports.append(report)
        return report

    def _same_features(self, fresh: Directions) -> bool:
        return all(
            torch.equal(now[name], before[name].to(now[name].device))
            for now, before in ((fresh.hack, self.directions.hack), (fresh.clean, self.directions.clean))
            for name in now.keys() & before.keys()
        )

    def __repr__(self) -> str:
        due = self.every - self.age
        return f"Refresher(every {self.every} steps, {len(self.reports)} done, age {self.age}, next in {due})"


def _fingerprint(model: nn.Module) -> list[int]:
    """A checksum over the bits of each deployed parameter: any change shows, and no copy is kept."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = [p.detach().reshape(-1).view(sizes[p.element_size()]).long() for _, p in deployed_parameters(model)]
    # Weighted by position, so that values which change places show too; int64 wraps around.
    return [int((b * torch.arange(1, 2 * b.numel(), 2, device=b.device)).sum()) for b in bits]
