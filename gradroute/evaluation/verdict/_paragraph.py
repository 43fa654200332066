"""Parts of the paragraphs that a verdict prints: rates of an arm, a difference with its interval, a level."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

from gradroute.evaluation.rates import Rate
from gradroute.evaluation.verdict._difference import Difference
from gradroute.evaluation.verdict.arms import ArmRuns
from gradroute.evaluation.verdict.criteria import Criteria

Counted = Mapping[str, Sequence[Hashable]]
"""Mode -> the seeds in which it counts."""

Which = Literal["hack_on", "hack_ablated", "solve_ablated"]


def pooled(arm: ArmRuns, counted: Counted, which: Which) -> Rate:
    """The rate over all rollouts of these modes and seeds."""
    rates: list[Rate] = [getattr(arm.runs[s][mode], which) for mode, seeds in counted.items() for s in seeds]
    return Rate(sum(rate.k for rate in rates), sum(rate.n for rate in rates))


def per_seed(arm: ArmRuns, counted: Counted, which: Which) -> str:
    """The arm's name, and its rate in each seed."""
    seeds = dict.fromkeys(seed for found in counted.values() for seed in found)
    rates = [pooled(arm, {mode: [s] for mode, found in counted.items() if s in found}, which) for s in seeds]
    return " ".join([arm.name, *(f"{rate.value:.2f}" for rate in rates)])


def stated_interval(difference: Difference, level: float, seeds: int) -> str:
    """The estimate, its interval, and what that is over."""
    low, high = difference.interval(level)
    over = f"{seeds} seeds" if difference.over == "seeds" else "the prompts of these models"
    return f"{difference.estimate:+.2f}, {100 * (1 - level):.4g} % interval [{low:+.2f}, {high:+.2f}] over {over}"


def stated_level(level: float, criteria: Criteria, arms: int) -> str:
    """The level of the intervals, and how it was corrected for several arms."""
    corrected = f", {criteria.level:g} corrected for {arms} arms (Holm)" if arms > 1 else ""
    return f"Level {level:.3g}{corrected}."
