"""Rollouts sampled ablated and missed hacks can meet: what a run knows of the share of hacks that it flags.

    recall = max(detector_recall * LabelGate.recall,  share of the hack pairs that a gate on directions flags)
    rollouts sampled ablated, no gate on log ratios, and recall < 0.9 or not known   ->   `GradRouteWarning`

A missed hack that was sampled ablated trains the deployed block alone, so that the quarantine cannot absorb it.
"""

from gradroute._logging import warn
from gradroute.errors import GradRouteError
from gradroute.gates.band import BandGate
from gradroute.gates.label import LabelGate
from gradroute.gates.threshold import ThresholdGate
from gradroute.integrations.trl.routing import Routing

LEAST = 0.9


def check_recall(routing: Routing) -> None:
    """Warn of the second line above, once, when the trainer is made.

    Raises:
        GradRouteError: a `detector_recall` without a detector.
    """
    if routing.detector_recall is not None and routing.detector is None:
        raise GradRouteError(
            f"`detector_recall` is of a `detector`. Found {routing.detector_recall!r} and no detector."
        )
    if not routing.ablated_per_group or routing.gate is None or routing.log_ratio_gate is not None:
        return
    recall = known_recall(routing)
    if recall is not None and recall >= LEAST:
        return
    found = "how many hacks are flagged is not known" if recall is None else f"{recall:.2g} of hacks are flagged"
    warn(
        f"Rollouts are sampled ablated, and missed hacks may be among them: {found} by {routing.gate!r}. A missed hack "
        "that was sampled ablated trains the deployed block alone, and so teaches it the hack. Fix: "
        "log_ratio_gate=LogRatioGate(), with slow_start_steps= and so a later ablated_from=; or ablated_fraction=0; or "
        f"detector_recall=, if the detector is known to flag {LEAST:g} of all hacks or more."
    )


def known_recall(routing: Routing) -> float | None:
    """The first line above; None where nothing is known."""
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
