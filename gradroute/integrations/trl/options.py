"""The keywords of the trainer, resolved into objects: what flags rollouts, what filters gradients, what is refreshed.

    directions given, nothing that reads them     ->  gate = BandGate(directions)
    detector given, no gate                       ->  gate = LabelGate()
    both a detector and a gate on directions      ->  a rollout is routed if either says so

A function stands for what can be made once the model has its blocks: `directions(model)`, `gate(directions)`,
`grad_filter(directions)`; `refresher=5` makes a `Refresher` out of such a function.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gradroute._restore import left_as_found
from gradroute.adapters.views import ablate_quarantine
from gradroute.directions.directions import Directions
from gradroute.directions.extract import extract_activation_directions
from gradroute.directions.pairs import load_pairs
from gradroute.errors import GradRouteError
from gradroute.filters.base import GradientFilter
from gradroute.filters.rollout import RolloutFilter
from gradroute.gates.band import BandGate
from gradroute.gates.base import Gate
from gradroute.gates.label import LabelGate
from gradroute.gates.threshold import ThresholdGate
from gradroute.refresh.refresher import Refresher

Detector = Callable[..., Any]


def directions_from(pairs: str | Path, tokenizer: Any, **options: Any) -> Callable[[nn.Module], Directions]:
    """For `directions=`: model -> `extract_activation_directions(model, load_pairs(pairs), tokenizer=..., ...)`.

    Args:
        pairs: a file that `load_pairs` reads; it is read now.
        tokenizer, options: as the extractor takes them.
    """
    loaded = load_pairs(pairs)
    return lambda model: extract_activation_directions(model, loaded, tokenizer=tokenizer, **options)


@dataclass
class RoutingOptions:
    """What the trainer was given, resolved and checked against each other."""

    gate: Gate | None
    directions: Directions | None
    refresher: Refresher | None
    grad_filter: GradientFilter | None
    detector: Detector | None
    clean_baseline: bool
    ablated_per_group: int

    @property
    def detector_scores(self) -> bool:
        """Whether the detector returns scores, for a threshold, and not flags."""
        return isinstance(self.gate, ThresholdGate) and self.detector is not None

    @property
    def by_rollout(self) -> RolloutFilter | None:
        """The filter, if it decides on whole rollouts and has to see their backward."""
        return self.grad_filter if isinstance(self.grad_filter, RolloutFilter) else None

    @property
    def all_directions(self) -> list[Directions]:
        """Each `Directions` that a checkpoint has to carry, once."""
        held = [self.directions, *(getattr(each, "directions", None) for each in (self.gate, self.grad_filter))]
        return list({id(each): each for each in held if each is not None}.values())


def resolve(
    model: nn.Module,
    *,
    gate: Any,
    directions: Any,
    refresher: Any,
    grad_filter: Any,
    detector: Any,
    clean_baseline: bool | None,
    ablated_per_group: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> RoutingOptions:
    """Make what is given as functions, fill in what follows from the rest, and refuse what contradicts itself.

    Raises:
        GradRouteError: nothing to route by, something that nothing would read, or arguments that do not fit.
    """
    extract = _extractor(model, directions, autocast) if _is_function(directions, Directions) else None
    if extract is not None:
        with left_as_found(model), ablate_quarantine(model):
            directions = extract()
    for given in (refresher, gate):
        if directions is None and isinstance(given, Refresher | Gate):
            directions = given.directions
    if directions is not None and not isinstance(directions, Directions):
        raise GradRouteError(f"`directions` should be Directions, or a function of the model. Found {directions!r}.")
    grad_filter = _made(grad_filter, "grad_filter", GradientFilter, directions)
    gate = _made(gate, "gate", Gate, directions)
    if gate is None and directions is not None and grad_filter is None:
        gate = BandGate(directions)
    elif gate is None and detector is not None:
        gate = LabelGate()
    _check_detector(gate, detector, directions)
    refresher = _refresher(refresher, directions, extract, model)
    options = RoutingOptions(gate, directions, refresher, grad_filter, detector, False, ablated_per_group)
    options.clean_baseline = _clean_baseline(options, clean_baseline)
    _check_something_routes(options)
    if refresher is not None and gate is not None and gate.directions is refresher.directions:
        refresher.watch(gate)
    return options


def _is_function(given: Any, kind: type) -> bool:
    # Gates are called themselves: what is already made is not a function that makes it.
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
    if _is_function(given, kind):
        if directions is None:
            raise GradRouteError(f"`{argument}` is a function of directions. Found no `directions`. Fix: give some.")
        given = given(directions)
    if given is not None and not isinstance(given, kind):
        raise GradRouteError(
            f"`{argument}` should be a {kind.__name__}, or a function that makes one of directions. Found {given!r}."
        )
    return given


def _check_detector(gate: Gate | None, detector: Any, directions: Directions | None) -> None:
    if detector is not None and (not callable(detector) or inspect.iscoroutinefunction(detector)):
        raise GradRouteError(f"`detector` should be a function like a reward function, not async. Found {detector!r}.")
    if gate is not None and gate.reads == "flags" and detector is None:
        raise GradRouteError(
            f"A {type(gate).__name__} needs labels. Found no `detector`. Fix: detector=..., or another gate."
        )
    if isinstance(gate, ThresholdGate) and detector is None and directions is None:
        raise GradRouteError("A ThresholdGate needs scores. Found neither `detector` nor `directions`.")
    read = gate.directions if gate is not None else None
    read = directions if isinstance(gate, ThresholdGate) and detector is None else read
    if read is not None and read.provenance.source != "activation":
        raise GradRouteError(
            "A gate scores rollouts by activations, before their backward. Found directions of gradients. Fix: "
            "grad_filter=RolloutFilter(directions), which scores them in the backward that trains."
        )


def _refresher(
    given: Any, directions: Directions | None, extract: Callable[[], Directions] | None, model: nn.Module
) -> Refresher | None:
    if isinstance(given, int) and not isinstance(given, bool):
        if extract is None or directions is None:
            raise GradRouteError(
                f"`refresher={given}` extracts again what `directions` makes. Found no function to do so. Fix: "
                "directions=lambda model: extract_activation_directions(model, pairs), or a Refresher."
            )
        return Refresher(directions, extract, model=model, every=given)
    if given is None or isinstance(given, Refresher):
        return given
    raise GradRouteError(f"`refresher` should be a Refresher, or a number of optimizer steps. Found {given!r}.")


def _clean_baseline(options: RoutingOptions, asked: bool | None) -> bool:
    flags = options.gate is not None
    if asked and not flags:
        raise GradRouteError(
            "`clean_baseline=True` is the mean over unflagged rollouts. Found nothing that flags before backward. "
            "Fix: gate=, directions= or detector=, or leave it out."
        )
    if asked and options.by_rollout is not None:
        raise GradRouteError(
            "`clean_baseline=True` with a RolloutFilter, which decides after backward over which rollouts a baseline "
            "would be taken. Fix: clean_baseline=False."
        )
    return asked if asked is not None else flags and options.by_rollout is None


def _check_something_routes(options: RoutingOptions) -> None:
    if options.gate is None and options.grad_filter is None and not options.ablated_per_group:
        raise GradRouteError(
            "Found nothing to route by: the quarantine would learn whatever the deployed block learns. Fix: "
            "directions=, gate=, detector= or grad_filter=; or TRL's own trainer."
        )
    if isinstance(options.gate, ThresholdGate) and options.detector is None:
        return  # scores of the directions
    readers = [getattr(each, "directions", None) for each in (options.gate, options.grad_filter)]
    refreshed = options.refresher and options.refresher.directions
    for argument, given in (("directions", options.directions), ("refresher", refreshed)):
        if given is not None and given not in readers:
            raise GradRouteError(
                f"`{argument}` should be of directions that a gate or a filter reads. Found none that holds them: "
                f"gate {options.gate!r}, grad_filter {options.grad_filter!r}."
            )
