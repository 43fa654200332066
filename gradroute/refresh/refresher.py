"""Extract directions again as the policy moves, and make sure that it happened.

    due at step t  <=>  t >= warm_up  and  age >= every,      age = t - last extraction

A refresh: quarantine ablated, eval mode, no route; extract; put the result into the same `Directions` object; leave
modes, gradients and random numbers as found. A refresh that changes nothing although the deployed blocks moved raises:
this library exists because one such refresh went unnoticed.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import copy
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor, nn
from torch.optim import Optimizer

from gradroute._before_use import check_before_use
from gradroute._checks import instance_of, integer_from_zero, positive_integer
from gradroute._hashing import block_fingerprint, writes_to
from gradroute._logging import logger
from gradroute._optimized import check_optimized
from gradroute._protocol import routed_layers
from gradroute._restore import left_as_found
from gradroute._sharding import reshard
from gradroute._state_dict import State, check_state, format_of
from gradroute._step_hooks import torch_optimizer
from gradroute._transfers import read_together
from gradroute.adapters.views import ablate_quarantine, without_route
from gradroute.directions.directions import Directions
from gradroute.errors import RefreshError
from gradroute.filters.base import GradientFilter
from gradroute.gates.base import Gate, directions_in_force
from gradroute.refresh.watch import StepCount, Watch


@dataclass(frozen=True)
class RefreshReport:
    """Report of one refresh.

    Args:
        step: optimizer steps taken when it ran.
        age: optimizer steps since the extraction that it replaced.
        overlap: with the directions it replaced; 1 = the same, 0 = unrelated, -1 = reversed.
        moved: whether deployed parameters changed since that extraction.
        version: of the directions afterwards.
        largest_angle: over all modules, in degrees; 90 where no module has rows both before and after.
        angles: module name -> the principal angles to the predecessor, in degrees, 0 to 90, smallest first. Unlike
            `overlap` they do not see signs, nor how rows are arranged within their span. `Refresher.reports` keeps
            them for the latest refresh only.
    """

    step: int
    age: int
    overlap: float
    moved: bool
    version: int
    largest_angle: float
    angles: Mapping[str, list[float]] = field(compare=False, default_factory=dict)

    def __repr__(self) -> str:
        unmoved = "" if self.moved else ", deployed blocks unmoved"
        return (
            f"RefreshReport(step {self.step}, age {self.age}, overlap {self.overlap:.3f}, "
            f"angles up to {self.largest_angle:.1f} degrees, version {self.version}{unmoved})"
        )


class Refresher:
    """Call `step()` once after each optimizer step; it re-extracts when the directions are `every` steps old.

    `watch(optimizer, gate)` makes sure of that. Without it, gates and filters on these directions still raise once the
    deployed blocks have changed more than `every` times and `step()` was not called.

    Args:
        directions: updated in place, so that gates which hold them see the change. A random control keeps its rows and
            takes new pair features.
        extract: makes fresh `Directions` from the same pairs and settings; runs with the quarantine ablated.
        model: the model that is trained.
        every: optimizer steps between refreshes.
        warm_up: no refresh is due in the first so many steps, in which the policy has hardly moved.

    Raises:
        RefreshError: bad arguments; a due refresh that extracted nothing, other pairs, or the same features as before
            although the deployed parameters moved.
    """

    def __init__(
        self,
        directions: Directions,
        extract: Callable[[], Directions],
        *,
        model: nn.Module,
        every: int = 5,
        warm_up: int = 0,
    ) -> None:
        self.directions = instance_of("directions", directions, Directions, error=RefreshError)
        if not callable(extract):
            raise RefreshError(f"`extract` should be a function that returns Directions. Found {extract!r}.")
        self.extract, self.model = extract, model
        self.every = positive_integer("every", every, RefreshError)
        self.warm_up = integer_from_zero("warm_up", warm_up, RefreshError)
        self.steps = directions.step
        self.reports: list[RefreshReport] = []
        self._extracted_at = directions.step
        self._version = directions.version
        self._fingerprint = block_fingerprint(model, "deployed")
        self._counts: list[StepCount] = []
        self._readers: list[Gate | GradientFilter] = []
        self._layers = list(routed_layers(model).values())
        self._deployed = self._deployed_now()
        self._written, self._changes = writes_to(self._deployed), 0
        check_before_use(directions, self._check_heard)

    @property
    def age(self) -> int:
        """Optimizer steps since the directions were extracted."""
        return self.steps - self._extracted_at

    def watch(self, *watched: Optimizer | Gate | GradientFilter) -> Watch:
        """Make sure that `step()` is called once per step of each optimizer, and that gates and filters see refreshes.

        A step too many or too few raises in `step()` and `refresh()`, before the next step of the optimizer, and at
        the next use of a watched gate or filter. So does a watched gate or filter whose refresher was deleted.

        Returns:
            A handle: `close()`, or the end of a `with`, ends the watch.

        Raises:
            RefreshError: a gate or filter that reads no directions, or others than those that are refreshed; a
                parameter of the blocks that no watched optimizer holds, as when it was made before `attach`.
        """
        optimizers = [torch_optimizer(each) for each in watched if isinstance(each, Optimizer)]
        readers = [each for each in watched if isinstance(each, Gate | GradientFilter)]
        if not watched or len(optimizers) + len(readers) < len(watched):
            found = ", ".join(type(each).__name__ for each in watched) or "nothing"
            raise RefreshError(f"`watched` should be optimizers, gates or filters. Found {found}.")
        for reader in readers:
            self._check_reader(reader)
        if optimizers:
            check_optimized(self.model, optimizers, RefreshError)
        ends = ExitStack()
        for reader in readers:
            ends.callback(check_before_use(reader, self._check))
            self._readers.append(reader)
            ends.callback(self._readers.remove, reader)
        for optimizer in optimizers:
            count = StepCount(optimizer, self._check, start=self.steps)
            ends.callback(count.close)
            self._counts.append(count)
            ends.callback(self._counts.remove, count)
        return Watch(self, ends, len(watched))

    def step(self) -> RefreshReport | None:
        """Count one optimizer step; refresh if it is due and return the report, else None."""
        self.steps += 1
        self._check()
        self._deployed = self._deployed_now()
        self._written, self._changes = writes_to(self._deployed), 0
        return self.refresh() if self.steps >= self.warm_up and self.age >= self.every else None

    def refresh(self) -> RefreshReport:
        """Extract now, whatever the schedule says."""
        self._check()
        if self.directions.version != self._version:
            raise RefreshError(
                f"`directions` should be updated by this refresher alone. Found version {self.directions.version} "
                f"instead of {self._version}. Fix: one Refresher per Directions."
            )
        fresh = self._extracted()
        fingerprint = block_fingerprint(self.model, "deployed")
        moved = fingerprint != self._fingerprint
        if moved and _equal(fresh.hack, self.directions.hack) and _equal(fresh.clean, self.directions.clean):
            raise RefreshError(
                "The deployed parameters moved since the last extraction and the fresh pair features are bitwise the "
                "same, so this refresh did nothing. Fix: extract from the model that is trained, not from a copy or a "
                "cache, and with features that depend on the trained blocks."
            )
        previous = copy(self.directions)
        self.directions.update_(fresh, step=self.steps)
        if self.directions.version == self._version:
            raise RefreshError("The directions were not updated although a refresh was due.")
        report = self._reported(previous, moved)
        self._extracted_at, self._fingerprint, self._version = self.steps, fingerprint, self.directions.version
        # Angles of every module are kept for the latest refresh only: they would grow in every checkpoint.
        self.reports[-1:] = [*(replace(each, angles={}) for each in self.reports[-1:]), report]
        logger.info("%r", report)
        return report

    def state_dict(self) -> State:
        """Everything that a resumed run needs, except for the directions, which `Directions.save` writes."""
        return {
            "format": format_of(self),
            "settings": {"every": self.every, "warm_up": self.warm_up},
            "directions": directions_in_force(self.directions),
            "steps": self.steps,
            "extracted_at": self._extracted_at,
            "fingerprint": list(self._fingerprint),
            "reports": [asdict(report) for report in self.reports],
        }

    def load_state_dict(self, state: State) -> None:
        """Continue where `state` was saved; `directions` must be those that were saved with it.

        Raises:
            FileFormatError: a state of another class, format or settings, or of other directions.
            RefreshError: a state of another model.
        """
        state = check_state(self, state, self.state_dict())
        if len(state["fingerprint"]) != len(self._fingerprint):
            raise RefreshError(
                f"`state` should be of a model with {len(self._fingerprint)} deployed parameters. Found "
                f"{len(state['fingerprint'])}. Fix: resume with the blocks that were trained."
            )
        self.steps, self._extracted_at = state["steps"], state["extracted_at"]
        self._fingerprint, self._version = list(state["fingerprint"]), self.directions.version
        self.reports = [RefreshReport(**report) for report in state["reports"]]
        for count in self._counts:
            count.steps = self.steps

    def __repr__(self) -> str:
        due = max(self.every - self.age, self.warm_up - self.steps)
        return f"Refresher(every {self.every} steps, {len(self.reports)} done, age {self.age}, next in {due})"

    def _extracted(self) -> Directions:
        with without_route(self.model), ablate_quarantine(self.model), left_as_found(self.model):
            fresh = self.extract()
        if not isinstance(fresh, Directions):
            raise RefreshError(f"`extract` should return Directions. Found {type(fresh).__name__}.")
        if fresh.provenance.view != "ablated":
            raise RefreshError(
                f"`extract` should measure `model` with its quarantine ablated. Found {fresh.provenance.view!r}. "
                "Fix: extract from the model that was given to the Refresher, and leave its views alone."
            )
        return fresh

    def _deployed_now(self) -> list[nn.Parameter]:
        reshard(self.model)
        return [p for layer in self._layers for p in layer.block_parameters("deployed")]

    def _reported(self, previous: Directions, moved: bool) -> RefreshReport:
        now = self.directions
        angles = {name: each.rad2deg().tolist() for name, each in now.principal_angles(previous).items()}
        largest = max((max(each) for each in angles.values()), default=90.0)
        return RefreshReport(self.steps, self.age, now.overlap(previous), moved, now.version, largest, angles)

    def _check(self, stepping: StepCount | None = None) -> None:
        for reader in self._readers:
            self._check_reader(reader)
        # Before a step of one of several optimizers, the others may have taken this step already.
        for count in self._counts if stepping is None else [stepping]:
            count.compare(self.steps)

    def _check_heard(self) -> None:
        """Raise if the deployed blocks keep changing while `step()` is not called; only `watch` counts exactly."""
        if self._counts:
            return
        deployed = self._deployed_now()
        if any(now is not before for now, before in zip(deployed, self._deployed, strict=True)):  # sharded since
            self._deployed, self._written = deployed, writes_to(deployed)
        written = writes_to(self._deployed)
        self._changes += written != self._written
        self._written = written
        if self._changes > max(self.every, self.warm_up - self.steps):
            raise RefreshError(
                "Refresher.step() should be called once after each optimizer step. Found that the deployed blocks "
                f"changed {self._changes} times since it was last called: the directions grow old unseen. Fix: call "
                "it after each optimizer.step(), and watch(optimizer, gate); or delete the Refresher."
            )

    def _check_reader(self, reader: Gate | GradientFilter) -> None:
        directions = getattr(reader, "directions", None)
        if directions is not self.directions:
            held = "no directions" if directions is None else f"others: {directions!r}"
            raise RefreshError(
                f"A watched {type(reader).__name__} should hold the directions that are refreshed. Found {held}: no "
                "refresh reaches it. Fix: build it and the Refresher on one object."
            )


def _equal(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> bool:
    # Other modules are other features; `update_` refuses them with the reason.
    if now.keys() != before.keys() or any(now[name].shape != before[name].shape for name in now):
        return False
    names = list(now)
    # The first module alone says no where something moved.
    return all(
        all(read_together((now[name] == before[name].to(now[name].device)).all() for name in some))
        for some in (names[:1], names[1:])
    )
