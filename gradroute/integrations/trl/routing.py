"""The keywords of the trainer, resolved into objects: what flags rollouts, what filters gradients, what is refreshed.

    directions given, nothing that reads them     ->  gate = BandGate(directions)
    detector given, no gate                       ->  gate = LabelGate()
    both a detector and a gate on directions      ->  a rollout is routed if either says so
    a gate on log ratios beside any of these      ->  a rollout is routed if either says so

A function stands for what can be made once the model has its blocks: `directions(model)`, `gate(directions)`,
`grad_filter(directions)`; `refresher=5` makes a `Refresher` out of such a function. So do a file of pairs for
`directions`, and a threshold for a `log_ratio_gate`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradroute._restore import left_as_found
from gradroute.adapters.views import ablate_quarantine
from gradroute.directions.directions import Directions
from gradroute.errors import GradRouteError
from gradroute.filters.base import GradientFilter
from gradroute.filters.rollout import RolloutFilter
from gradroute.gates.band import BandGate
from gradroute.gates.base import Gate
from gradroute.gates.label import LabelGate
from gradroute.gates.log_ratio import LogRatioGate
from gradroute.integrations.trl._log_ratios import made_log_ratio_gate
from gradroute.refresh.refresher import Refresher

Detector = Callable[..., Any]


@dataclass
class Routing:
    """`trainer.routing`: what the run routes by, resolved from the trainer's keywords and checked against each other.

    Args:
        gate: decides over rollouts before their backward; None with a filter, or a gate on log ratios, alone.
        directions: what rollouts are scored with, or the filter reads.
        refresher: keeps the directions fresh; None where they stay as they were extracted.
        filter: of the gradients, once per optimizer step.
        detector: called like a reward function; returns flags or scores.
        detector_recall: share of hacks that it flags; None where that is not known.
        log_ratio_gate: routes, beside the gate or alone, rollouts that the quarantine explains.
        score_view: the state in which rollouts are scored by directions: "sampled" or "ablated".
        clean_baseline: whether the deployed block's advantages are relative to unflagged rollouts.
        ablated_per_group: how many rollouts of a group are sampled without the quarantine.
    """

    gate: Gate | None
    directions: Directions | None
    refresher: Refresher | None
    filter: GradientFilter | None
    detector: Detector | None
    detector_recall: float | None
    log_ratio_gate: LogRatioGate | None
    score_view: str
    clean_baseline: bool
    ablated_per_group: int

    @property
    def detector_scores(self) -> bool:
        """Whether the detector returns scores and not flags: for a gate that reads scores and holds no directions."""
        return self.detector is not None and self.gate is not None and reads_given_scores(self.gate)

    @property
    def detector_decides(self) -> bool:
        """Whether the gate is called with the detector's answers."""
        return self.detector_scores or (self.gate is not None and self.gate.reads == "flags")

    @property
    def reads_features(self) -> bool:
        """Whether the gate is called with features of rollouts, or with their scores by directions."""
        return self.gate is not None and not self.detector_decides

    @property
    def flags_before_backward(self) -> bool:
        """Whether some gate decides over rollouts before their backward."""
        return self.gate is not None or self.log_ratio_gate is not None

    @property
    def by_rollout(self) -> RolloutFilter | None:
        """The filter, if it decides on whole rollouts and has to see their backward."""
        return self.filter if isinstance(self.filter, RolloutFilter) else None

    @property
    def all_directions(self) -> list[Directions]:
        """Each `Directions` that a checkpoint has to carry, once."""
        held = [self.directions, *(getattr(each, "directions", None) for each in (self.gate, self.filter))]
        return list({id(each): each for each in held if each is not None}.values())


def reads_given_scores(gate: Gate) -> bool:
    """Whether `gate` takes scores of whatever origin: a `ThresholdGate`, and not a gate that holds directions."""
    return gate.reads == "scores" and gate.directions is None


def resolve(
    model: nn.Module,
    *,
    gate: Any,
    directions: Any,
    refresher: Any,
    grad_filter: Any,
    detector: Any,
    detector_recall: float | None,
    log_ratio_gate: Any,
    score_view: str | None,
    clean_baseline: bool | None,
    ablated_per_group: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Routing:
    """Make what is given as functions, fill in what follows from the rest, and refuse what contradicts itself.

    Raises:
        GradRouteError: nothing to route by, something that nothing would read, or arguments that do not fit.
    """
    extract = _extractor(model, directions, autocast) if is_function(directions) else None
    if extract is not None:
        with left_as_found(model), ablate_quarantine(model):
            directions = extract()
    for given in (refresher, gate):
        if directions is None and isinstance(given, Refresher | Gate):
            directions = given.directions
    if directions is not None and not isinstance(directions, Directions):
        raise GradRouteError(f"`directions` should be a function that returns Directions. Found one of {directions!r}.")
    grad_filter = _made(grad_filter, "grad_filter", GradientFilter, directions)
    gate = _made(gate, "gate", Gate, directions)
    if gate is None and directions is not None and grad_filter is None:
        gate = BandGate(directions)
    elif gate is None and detector is not None:
        gate = LabelGate()
    log_ratio_gate = made_log_ratio_gate(log_ratio_gate, gate)
    _check_gate(gate, detector, directions)
    refresher = _refresher(refresher, directions, extract, model)
    routing = Routing(
        gate=gate,
        directions=directions,
        refresher=refresher,
        filter=grad_filter,
        detector=detector,
        detector_recall=detector_recall,
        log_ratio_gate=log_ratio_gate,
        score_view=score_view or "ablated",
        clean_baseline=False,
        ablated_per_group=ablated_per_group,
    )
    if score_view is not None and not routing.reads_features:
        raise GradRouteError(
            f"`score_view={score_view!r}` is of a gate that scores rollouts by directions. Found none: gate {gate!r}. "
            "Fix: directions=, or leave `score_view` out."
        )
    routing.clean_baseline = _clean_baseline(routing, clean_baseline)
    _check_something_routes(routing)
    if refresher is not None:
        for reader in (gate, grad_filter):
            if reader is not None and getattr(reader, "directions", None) is refresher.directions:
                refresher.watch(reader)
    return routing


def is_function(given: Any, kind: type = Directions) -> bool:
    """Whether `given` makes a `kind`. Gates are called themselves: one that is made already makes none."""
    return callable(given) and not isinstance(given, kind)


def _extractor(
    model: nn.Module, directions: Callable[[nn.Module], Directions], autocast: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], Directions]:
    def extract() -> Directions:
        # In the precision in which rollouts are scored.
        with autocast():
            return directions(model)

    return extract


def _made(given: Any, argument: str, kind: type, directions: Directions | None) -> Any:
    if is_function(given, kind):
        if directions is None:
            raise GradRouteError(f"`{argument}` is a function of directions. Found no `directions`. Fix: give some.")
        given = given(directions)
    if given is not None and not isinstance(given, kind):
        raise GradRouteError(
            f"`{argument}` should be a {kind.__name__}, or a function that makes one of directions. Found {given!r}."
        )
    return given


def _check_gate(gate: Gate | None, detector: Any, directions: Directions | None) -> None:
    """Everything that the gate reads has to be there, in the form in which rollouts have it."""
    if detector is not None and not callable(detector):
        raise GradRouteError(f"`detector` should be a function like a reward function. Found {detector!r}.")
    if gate is None:
        return
    name = type(gate).__name__
    if gate.reads == "flags" and detector is None:
        raise GradRouteError(f"A {name} needs labels. Found no `detector`. Fix: detector=..., or another gate.")
    by_detector = detector is not None and reads_given_scores(gate)
    if gate.reads == "flags" or by_detector:
        return
    read = gate.directions or directions
    if read is None:
        raise GradRouteError(f"A {name} needs scores. Found neither `detector` nor `directions`.")
    if read.provenance.source != "activation":
        raise GradRouteError(
            "A gate scores rollouts by activations, before their backward. Found directions of gradients. Fix: "
            "grad_filter=RolloutFilter(directions), which scores them in the backward that trains."
        )
    if read.provenance.view != "ablated":
        raise GradRouteError(
            "`directions` should be extracted with the quarantine ablated, since rollouts are scored that way. Found "
            f"directions of the view {read.provenance.view!r}. Fix: with gradroute.ablate_quarantine(model): extract; "
            "or directions=lambda model: extract_activation_directions(model, pairs), which the trainer calls ablated."
        )


def _refresher(
    given: Refresher | int | None,
    directions: Directions | None,
    extract: Callable[[], Directions] | None,
    model: nn.Module,
) -> Refresher | None:
    if isinstance(given, int):
        if extract is None or directions is None:
            raise GradRouteError(
                f"`refresher={given}` extracts again what `directions` makes. Found no function to do so. Fix: "
                "directions=lambda model: extract_activation_directions(model, pairs), or a Refresher."
            )
        return Refresher(directions, extract, model=model, every=given)
    return given


def _clean_baseline(routing: Routing, asked: bool | None) -> bool:
    flags = routing.flags_before_backward
    if asked and not flags:
        raise GradRouteError(
            "`clean_baseline=True` is the mean over unflagged rollouts. Found nothing that flags before backward. "
            "Fix: gate=, directions=, detector= or log_ratio_gate=, or leave it out."
        )
    if asked and routing.by_rollout is not None:
        raise GradRouteError(
            "`clean_baseline=True` with a RolloutFilter, which decides after backward over which rollouts a baseline "
            "would be taken. Fix: clean_baseline=False."
        )
    return asked if asked is not None else flags and routing.by_rollout is None


def _check_something_routes(routing: Routing) -> None:
    if not routing.flags_before_backward and routing.filter is None and not routing.ablated_per_group:
        raise GradRouteError(
            "Found nothing to route by: the quarantine would learn whatever the deployed block learns. Fix: "
            "directions=, gate=, detector=, log_ratio_gate= or grad_filter=; or TRL's own trainer."
        )
    if routing.gate is not None and reads_given_scores(routing.gate) and not routing.detector_scores:
        return  # the gate gets scores of the directions
    readers = [getattr(each, "directions", None) for each in (routing.gate, routing.filter)]
    refreshed = routing.refresher and routing.refresher.directions
    for argument, given in (("directions", routing.directions), ("refresher", refreshed)):
        if given is not None and given not in readers:
            raise GradRouteError(
                f"`{argument}` should be of directions that a gate or a filter reads. Found none that holds them: "
                f"gate {routing.gate!r}, grad_filter {routing.filter!r}."
            )
