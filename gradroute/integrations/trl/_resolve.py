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
from typing import Any

from gradroute._logging import warn
from gradroute._restore import left_as_found
from gradroute.adapters.views import ablate_quarantine
from gradroute.directions.directions import Directions
from gradroute.errors import GradRouteError
from gradroute.filters.base import GradientFilter
from gradroute.gates.band import BandGate
from gradroute.gates.base import Below, Gate
from gradroute.gates.label import LabelGate
from gradroute.gates.log_ratio import LogRatioGate
from gradroute.gates.threshold import ThresholdGate
from gradroute.integrations.trl.grpo_config import Options, group_share
from gradroute.integrations.trl.routing import Routing, reads_given_scores
from gradroute.refresh.refresher import Refresher

LEAST_RECALL = 0.9


def resolve(trainer: Any, options: Options) -> Routing:
    """Make what is given as functions, fill in what follows from the rest, and refuse what contradicts itself.

    Args:
        trainer: whose model has its blocks.
        options: of which `directions` is no file.

    Raises:
        GradRouteError: nothing to route by, something that nothing would read, or arguments that do not fit.
    """
    model, detector, refresher = trainer.model, options.detector, options.refresher
    extract, directions = None, options.directions
    if is_function(directions):
        extract = _extractor(trainer, directions)
        with left_as_found(model), ablate_quarantine(model):
            directions = extract()
        if not isinstance(directions, Directions):
            raise GradRouteError(
                f"`directions` should be a function that returns Directions. Found one that returned {directions!r}."
            )
    for given in (refresher, options.gate):
        if directions is None and isinstance(given, Refresher | Gate):
            directions = given.directions
    grad_filter = _made(options.grad_filter, "grad_filter", GradientFilter, directions)
    gate = _made(options.gate, "gate", Gate, directions)
    if gate is None and directions is not None and grad_filter is None:
        gate = BandGate(directions)
    elif gate is None and detector is not None:
        gate = LabelGate()
    log_ratio_gate = _made_log_ratio_gate(options.log_ratio_gate, gate)
    _check_gate(gate, detector, directions)
    if isinstance(refresher, int):
        if extract is None:
            raise GradRouteError(
                f"`refresher={refresher}` extracts again what `directions` makes. Found no function to do so. Fix: "
                "directions=lambda model: extract_activation_directions(model, pairs), or a Refresher."
            )
        refresher = Refresher(directions, extract, model=model, every=refresher)
    routing = Routing(
        gate=gate,
        directions=directions,
        refresher=refresher,
        filter=grad_filter,
        detector=detector,
        detector_recall=options.detector_recall,
        log_ratio_gate=log_ratio_gate,
        score_view=options.score_view or "ablated",
        clean_baseline=False,
        ablated_per_group=group_share(options.ablated_fraction, trainer.num_generations),
    )
    if options.score_view is not None and not routing.reads_features:
        raise GradRouteError(
            f"`score_view={options.score_view!r}` is of a gate that scores rollouts by directions. Found none: gate "
            f"{gate!r}. Fix: directions=, or leave `score_view` out."
        )
    routing.clean_baseline = _clean_baseline(routing, options.clean_baseline)
    _check_something_routes(routing)
    if refresher is not None:
        for reader in (gate, grad_filter):
            if reader is not None and getattr(reader, "directions", None) is refresher.directions:
                refresher.watch(reader)
    _check_recall(routing)
    return routing


def is_function(given: Any, kind: type = Directions) -> bool:
    """Whether `given` makes a `kind`. Gates are called themselves: one that is made already makes none."""
    return callable(given) and not isinstance(given, kind)


def _extractor(trainer: Any, directions: Callable[..., Directions]) -> Callable[[], Directions]:
    model, autocast = trainer.model, trainer.accelerator.autocast

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


def _made_log_ratio_gate(given: LogRatioGate | float | None, gate: Gate | None) -> LogRatioGate | None:
    """A gate on log ratios, made of its threshold if given as one; beside `gate`, their masks are combined by |."""
    if gate is not None and gate.reads == "log_ratios":
        raise GradRouteError(
            f"`gate` should read flags, scores or features. Found a {type(gate).__name__}, which reads log ratios. "
            "Fix: log_ratio_gate=, alone or beside another gate."
        )
    if given is None:
        return None
    # `keep | absorb` is absorb, so that both have to say the same of what neither routes. A gate without `below` sets
    # both zones: beside it, a gate on log ratios has to keep what it does not route, or no row would be kept.
    below: Below = "absorb" if gate is None else getattr(gate, "below", "keep")
    if isinstance(given, int | float):
        given = LogRatioGate(given, below=below)
    if given.per != "rollout":
        raise GradRouteError(
            f"`log_ratio_gate` should decide per rollout: TRL's rollouts carry a zone per row. Found {given!r}. Fix: "
            'per="rollout".'
        )
    if gate is None and given.below == "keep":
        raise GradRouteError(
            f"Something should train the quarantine before {given!r} can find what it explains. Found that it keeps "
            'all other rows and that nothing else routes any. Fix: below="absorb", or detector= or gate= too.'
        )
    if getattr(gate, "soft", False):
        raise GradRouteError(
            "`log_ratio_gate` is combined with a gate of zones: a row is routed if either says so. Found a soft gate, "
            f"{gate!r}, which weighs rows. Fix: soft=False."
        )
    if given.below != below:
        raise GradRouteError(
            f"The zone of rows that neither gate routes should be one. Found {gate!r} and {given!r}; of keep and "
            f'absorb, absorb would always win. Fix: LogRatioGate(below="{below}").'
        )
    return given


def _clean_baseline(routing: Routing, asked: bool | None) -> bool:
    flags = routing.flags_before_backward
    can = flags and routing.by_rollout is None
    if asked and not can:
        found = "a RolloutFilter, which decides after backward" if flags else "nothing that flags before backward"
        raise GradRouteError(
            f"`clean_baseline=True` is the mean over rollouts that are unflagged before their backward. Found {found}. "
            "Fix: gate=, directions=, detector= or log_ratio_gate=, without a RolloutFilter; or clean_baseline=False."
        )
    return can if asked is None else asked


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


def _check_recall(routing: Routing) -> None:
    """Rollouts sampled ablated, no gate on log ratios, and a recall that is too small or not known: warn, once."""
    if routing.detector_recall is not None and routing.detector is None:
        raise GradRouteError(
            f"`detector_recall` is of a `detector`. Found {routing.detector_recall!r} and no detector."
        )
    if not routing.ablated_per_group or routing.gate is None or routing.log_ratio_gate is not None:
        return
    recall = known_recall(routing)
    if recall is not None and recall >= LEAST_RECALL:
        return
    found = "how many hacks are flagged is not known" if recall is None else f"{recall:.2g} of hacks are flagged"
    warn(
        f"Rollouts are sampled ablated, and missed hacks may be among them: {found} by {routing.gate!r}. A missed hack "
        "that was sampled ablated trains the deployed block alone, and so teaches it the hack. Fix: "
        "log_ratio_gate=LogRatioGate(), with slow_start_steps= and so a later ablated_from=; or ablated_fraction=0; or "
        f"detector_recall=, if the detector is known to flag {LEAST_RECALL:g} of all hacks or more."
    )


def known_recall(routing: Routing) -> float | None:
    """The share of hacks that a run flags, as far as it is known; None where nothing is.

    max(detector_recall * LabelGate.recall,  share of the hack pairs that a gate on directions flags)
    """
    gate, known = routing.gate, []
    if routing.detector_recall is not None:
        known.append(routing.detector_recall * (gate.recall if isinstance(gate, LabelGate) else 1.0))
    directions = None if gate is None or routing.detector_decides else gate.directions or routing.directions
    if directions is not None:
        hack, _ = directions.pair_scores()
        if isinstance(gate, BandGate) and not gate.soft:
            known.append(float(gate.flags(hack).float().mean()))
        elif isinstance(gate, ThresholdGate):
            known.append(float((hack >= gate.threshold).float().mean()))
    return max(known, default=None)
