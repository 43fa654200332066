"""One mode of one seed: what a treatment's run did there minus what its controls' did, prompt by prompt if known."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from gradroute.evaluation.rates import Rate
from gradroute.evaluation.verdict._bootstrap import Stratum
from gradroute.evaluation.verdict.arms import ModeOutcomes

Outcome = Literal["drop", "ablated", "solve"]
"""Hack rate on minus ablated, hack rate ablated, solve rate ablated."""


def rate_of(outcomes: ModeOutcomes, outcome: Outcome) -> float:
    """The rate, or difference of rates, of one run in one mode."""
    if outcome == "drop":
        return outcomes.drop
    return _deployed(outcomes, outcome).value


def stratum_of(own: ModeOutcomes, rivals: Sequence[ModeOutcomes], outcome: Outcome) -> Stratum:
    """What `own` minus the mean of `rivals` was counted from, to be drawn again.

    Args:
        own, rivals: outcomes of one mode and seed; one sample of differences per prompt where all know their prompts,
            else one sample of each arm and view.
        outcome: what to compare.
    """
    if own.prompts is not None and all(rival.prompts is not None for rival in rivals):
        ids = list(own.prompts)
        theirs = sum(_by_prompt(rival, ids, outcome) for rival in rivals) / len(rivals)
        return Stratum.paired(_by_prompt(own, ids, outcome) - theirs)
    weights = [1.0, *(-1 / len(rivals) for _ in rivals)]
    if outcome == "drop":
        rates = [rate for outcomes in (own, *rivals) for rate in (outcomes.hack_on, outcomes.hack_ablated)]
        weights = [signed for weight in weights for signed in (weight, -weight)]
    else:
        rates = [_deployed(outcomes, outcome) for outcomes in (own, *rivals)]
    return Stratum.counted(
        np.array([rate.k for rate in rates]), np.array([rate.n for rate in rates]), np.array(weights)
    )


def _by_prompt(outcomes: ModeOutcomes, ids: Sequence[int | str], outcome: Outcome) -> Float[np.ndarray, " prompts"]:
    assert outcomes.prompts is not None
    shares = np.array([outcomes.prompts[prompt] for prompt in ids])
    return np.asarray({"drop": shares[:, 0] - shares[:, 1], "ablated": shares[:, 1], "solve": shares[:, 2]}[outcome])


def _deployed(outcomes: ModeOutcomes, outcome: Literal["ablated", "solve"]) -> Rate:
    return outcomes.hack_ablated if outcome == "ablated" else outcomes.solve_ablated
