"""Re-extracting directions as the policy moves, and making sure that it happened.

    due at step t  <=>  t >= warm_up  and  (age >= every  or  overlap < min_overlap),      age = t - last extraction

A refresh: quarantine ablated, eval mode, no route; extract; put the result into the same `Directions` object; leave
modes, gradients and random numbers as found. A refresh that changes nothing although the deployed blocks moved raises:
this library exists because one such refresh went unnoticed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradroute._hashing import deployed_fingerprint
from gradroute._logging import logger
from gradroute._restore import left_as_found
from gradroute._state_dict import State, check_state, directions_in_force, format_of
from gradroute.adapters.views import ablate_quarantine, without_route
from gradroute.directions.directions import Directions
from gradroute.errors import RefreshError
from gradroute.gates.base import Gate
from gradroute.refresh._step_count import StepCount

Extract = Callable[[], Directions]


@dataclass(frozen=True)
class RefreshReport:
    """What one refresh did.

    Args:
        step: optimizer steps taken when it ran.
        age: optimizer steps since the extraction that it replaced.
        overlap: with the directions it replaced; 1 = the same, 0 = unrelated, -1 = reversed.
        moved: whether deployed parameters changed since that extraction.
        version: of the directions afterwards.
        angles: module name -> the principal angles to the predecessor, in degrees, 0 to 90, smallest first. Unlike
            `overlap` they do not see signs, nor how rows are arranged within their span.
    """

    step: int
    age: int
    overlap: float
    moved: bool
    version: int
    angles: Mapping[str, list[float]]

    @property
    def largest_angle(self) -> float:
        """Over all modules, in degrees; 90 where no module has rows both before and after."""
        return max((max(angles) for angles in self.angles.values()), default=90.0)

    def __repr__(self) -> str:
        unmoved = "" if self.moved else ", deployed blocks unmoved"
        return (
            f"RefreshReport(step {self.step}, age {self.age}, overlap {self.overlap:.3f}, "
            f"angles up to {self.largest_angle:.1f} degrees, version {self.version}{unmoved})"
        )


class Refresher:
    """Call `step()` once after each optimizer step; it re-extracts when the directions are `every` steps old.

    Args:
        directions: updated in place, so that gates which hold them see the change. A random control keeps its rows and
            takes new pair features.
        extract: makes fresh `Directions` from the same pairs and settings; runs with the quarantine ablated.
        model: the model that is trained.
        every: optimizer steps between refreshes; None leaves it to `min_overlap`.
        warm_up: no refresh is due in the first so many steps, in which the policy has hardly moved.
        min_overlap: with a probe, a refresh is due when the probe's overlap with itself at the last refresh falls below
            this; without one, after each step for as long as the last refresh found an overlap below this.
        probe: a cheaper `extract`, of few pairs for instance; runs after each step that is not due by its age.

    Raises:
        RefreshError: bad arguments, or a schedule by which no refresh would ever be due; a due refresh that extracted
            nothing, other pairs, or the same features as before although the deployed parameters moved.
    """

    def __init__(
        self,
        directions: Directions,
        extract: Extract,
        *,
        model: nn.Module,
        every: int | None = 5,
        warm_up: int = 0,
        min_overlap: float | None = None,
        probe: Extract | None = None,
    ) -> None:
        if not isinstance(directions, Directions):
            raise RefreshError(f"`directions` should be Directions to refresh. Found {type(directions).__name__}.")
        for argument, measure in (("extract", extract), ("probe", extract if probe is None else probe)):
            if not callable(measure):
                raise RefreshError(f"`{argument}` should be a function that returns Directions. Found {measure!r}.")
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise RefreshError(f"`every` should be a positive integer. Found {every!r}. To freeze, use none.")
        if isinstance(warm_up, bool) or not isinstance(warm_up, int) or warm_up < 0:
            raise RefreshError(f"`warm_up` should be a number of steps. Found {warm_up!r}.")
        _check_overlap_schedule(directions, every, min_overlap, probe)
        self.directions, self.extract, self.model, self.every = directions, extract, model, every
        self.warm_up, self.min_overlap, self.probe = warm_up, min_overlap, probe
        self.steps = directions.step
        self.reports: list[RefreshReport] = []
        self._extracted_at = directions.step
        self._version = directions.version
        self._fingerprint = deployed_fingerprint(model)
        self._probed = None if probe is None else dict(self._measured("probe", probe).rows)
        self._counts: list[StepCount] = []
        self._gates: list[Gate] = []

    @property
    def age(self) -> int:
        """Optimizer steps since the directions were extracted."""
        return self.steps - self._extracted_at

    def watch(self, *watched: Optimizer | Gate) -> "Refresher":
        """Make sure that `step()` is called once per step of these optimizers, and that these gates see the refreshes.

        A step too many or too few raises in `step()` and `refresh()`, before the next step of the optimizer, and at
        the next call of a watched gate.

        Raises:
            RefreshError: a gate that reads no directions, or others than those that are refreshed.
        """
        for each in watched:
            if isinstance(each, Gate):
                self._check_gate(each)
                self._gates.append(each)
                each.check_before_calls(self._check)
            elif isinstance(each, Optimizer):
                self._counts.append(StepCount(each, self._check, start=self.steps))
            else:
                raise RefreshError(f"`watched` should be optimizers or gates. Found {type(each).__name__}.")
        return self

    def step(self) -> RefreshReport | None:
        """Count one optimizer step; refresh if it is due and return the report, else None."""
        self.steps += 1
        self._check()
        return self.refresh() if self._is_due() else None

    def refresh(self) -> RefreshReport:
        """Re-extract now, whatever the schedule says."""
        self._check()
        before = self.directions.version
        if before != self._version:
            raise RefreshError(
                f"`directions` should be updated by this refresher alone. Found version {before} instead of "
                f"{self._version}. Fix: one Refresher per Directions."
            )
        fresh = self._measured("extract", self.extract)
        fingerprint = deployed_fingerprint(self.model)
        moved = fingerprint != self._fingerprint
        if moved and _equal(fresh.hack, self.directions.hack) and _equal(fresh.clean, self.directions.clean):
            raise RefreshError(
                "The deployed parameters moved since the last extraction and the fresh pair features are bitwise the "
                "same, so this refresh did nothing. Fix: extract from the model that is trained, not from a copy or a "
                "cache, and with features that depend on the trained blocks."
            )
        # Before the update: a probe that fails must leave the directions as they were.
        probed = None if self.probe is None else dict(self._measured("probe", self.probe).rows)
        previous = copy(self.directions)
        self.directions.update_(fresh, step=self.steps)
        if self.directions.version == before:
            raise RefreshError("The directions were not updated although a refresh was due.")
        now = self.directions
        angles = {name: each.rad2deg().tolist() for name, each in now.principal_angles(previous).items()}
        report = RefreshReport(self.steps, self.age, now.overlap(previous), moved, now.version, angles)
        self._extracted_at, self._fingerprint, self._version = self.steps, fingerprint, self.directions.version
        self._probed = probed
        self.reports.append(report)
        logger.info("%r", report)
        return report

    def state_dict(self) -> State:
        """Everything that a resumed run needs besides the directions, which are saved with `Directions.save`."""
        return {
            "format": format_of(self),
            "settings": {
                "every": self.every,
                "warm_up": self.warm_up,
                "min_overlap": self.min_overlap,
                "probe": self.probe is not None,
            },
            "directions": directions_in_force(self.directions),
            "steps": self.steps,
            "extracted_at": self._extracted_at,
            "fingerprint": list(self._fingerprint),
            "reports": [asdict(report) for report in self.reports],
            "probed": None if self._probed is None else dict(self._probed),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on where `state` was saved; `directions` must be those that were saved with it.

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
        self._fingerprint, self._probed = list(state["fingerprint"]), state["probed"]
        self.reports = [RefreshReport(**report) for report in state["reports"]]
        self._version = self.directions.version
        for count in self._counts:
            count.restart(self.steps)

    def __repr__(self) -> str:
        schedule, following = [], ""
        if self.every is not None:
            schedule.append(f"every {self.every} steps")
            following = f", next in {max(self.every - self.age, self.warm_up - self.steps)}"
        if self.min_overlap is not None:
            schedule.append(f"below an overlap of {self.min_overlap:g}")
        return f"Refresher({' or '.join(schedule)}, {len(self.reports)} done, age {self.age}{following})"

    def _is_due(self) -> bool:
        if self.steps < self.warm_up:
            return False
        if self.every is not None and self.age >= self.every:
            return True
        if self.min_overlap is None:
            return False
        if self.probe is None:
            return bool(self.reports) and self.reports[-1].overlap < self.min_overlap
        return self._probe_overlap(self.probe) < self.min_overlap

    def _probe_overlap(self, probe: Extract) -> float:
        now = self._measured("probe", probe)
        assert self._probed is not None
        if deployed_fingerprint(self.model) != self._fingerprint and _equal(now.rows, self._probed):
            raise RefreshError(
                "The deployed parameters moved since the last extraction and `probe` returned bitwise the same rows, "
                "so no refresh would ever be due. Fix: probe the model that is trained, not a copy or a cache."
            )
        return now.overlap(dataclasses.replace(now, rows=self._probed, centre=None, scale=None))

    def _measured(self, argument: str, measure: Extract) -> Directions:
        with without_route(self.model), ablate_quarantine(self.model), left_as_found(self.model):
            fresh = measure()
        if not isinstance(fresh, Directions):
            raise RefreshError(f"`{argument}` should return Directions. Found {type(fresh).__name__}.")
        if fresh.provenance.view != "ablated":
            raise RefreshError(
                f"`{argument}` should measure `model` with its quarantine ablated. Found {fresh.provenance.view!r}. "
                f"Fix: {argument} from the model that was given to the Refresher, and leave its views alone."
            )
        return fresh

    def _check(self) -> None:
        for gate in self._gates:
            self._check_gate(gate)
        for count in self._counts:
            count.compare(self.steps)

    def _check_gate(self, gate: Gate) -> None:
        if gate.directions is not self.directions:
            held = "no directions" if gate.directions is None else f"others: {gate.directions!r}"
            raise RefreshError(
                f"A watched gate should hold the directions that are refreshed. Found {held} in a "
                f"{type(gate).__name__}, so no refresh reaches it. Fix: build gate and Refresher on one object."
            )


def _check_overlap_schedule(
    directions: Directions, every: int | None, min_overlap: float | None, probe: Extract | None
) -> None:
    if min_overlap is None:
        if probe is not None:
            raise RefreshError("`probe` needs a `min_overlap` to compare with. Found None: it would never be read.")
        if every is None:
            raise RefreshError("`every` or `min_overlap` should be given. Found neither. To freeze, use no Refresher.")
        return
    if isinstance(min_overlap, bool) or not isinstance(min_overlap, int | float) or not -1 < min_overlap <= 1:
        raise RefreshError(f"`min_overlap` should be a cosine in (-1, 1]. Found {min_overlap!r}.")
    if probe is None and every is None:
        raise RefreshError("`min_overlap` without `probe` starts from a refresh by age. Fix: give `every`, or a probe.")
    if probe is None and directions.provenance.control is not None:
        raise RefreshError(
            f"The overlap of a {directions.provenance.control} control with itself is not that of the directions it "
            "controls (random rows stay), and neither would its schedule be. Fix: give `probe`, or no `min_overlap`."
        )


def _equal(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> bool:
    if now.keys() != before.keys():
        return False
    return all(torch.equal(rows, before[name].to(rows.device)) for name, rows in now.items())
