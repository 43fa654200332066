"""The difference of one outcome between a treatment and its controls, with its error over seeds and prompts.

    d_sm = outcome of the treatment - mean over controls of it      in mode m of seed s
    d    = mean over controls, over seeds, over modes of d_sm
    interval = d +- t(1 - level/2, df) SE,      p(d > c) = P(T_df > (d - c) / SE)

Interval and p-value are from one t distribution, so that they never disagree.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np
from jaxtyping import Float

from gradroute.evaluation.rates import Rate
from gradroute.evaluation.verdict._bootstrap import Over, SeedDifference, Stratum, standard_error
from gradroute.evaluation.verdict.arms import ArmRuns, ModeOutcomes

Outcome = Literal["drop", "ablated", "solve"]
"""Hack rate on minus ablated, hack rate ablated, solve rate ablated."""
Cells = dict[Hashable, dict[str, list[ArmRuns]]]
"""Seed -> mode -> the controls with which the treatment is compared there."""
Which = Literal["hack_on", "hack_ablated", "solve_ablated"]
Counted = Mapping[str, Sequence[Hashable]]
"""Mode -> the seeds in which it counts."""


@dataclass(frozen=True)
class Difference:
    """Treatment minus control.

    Args:
        estimate: the mean over seeds, of the mean over modes.
        error: its standard error.
        df: degrees of freedom of that error.
        over: whether the error is that of other seeds, or of other prompts put to the same models.
    """

    estimate: float
    error: float
    df: float
    over: Over

    def interval(self, level: float = 0.05) -> tuple[float, float]:
        """The interval that covers 1 - level."""
        from scipy.stats import t  # noqa: PLC0415  (slow to load)

        half = float(t.isf(level / 2, self.df)) * self.error
        return (self.estimate - half, self.estimate + half)

    def p_above(self, value: float) -> float:
        """p of so large an estimate if the true difference were `value`, one-sided."""
        from scipy.stats import t  # noqa: PLC0415

        return float(t.sf((self.estimate - value) / self.error, self.df))

    def p_below(self, value: float) -> float:
        """p of so small an estimate if the true difference were `value`, one-sided."""
        from scipy.stats import t  # noqa: PLC0415

        return float(t.cdf((self.estimate - value) / self.error, self.df))

    def with_added(self, variance: float, df: float) -> "Difference":
        """With another, independent error added; degrees of freedom after Satterthwaite 1946."""
        own = self.error**2
        total = own + variance
        return Difference(self.estimate, total**0.5, total**2 / (own**2 / self.df + variance**2 / df), self.over)

    def stated(self, level: float, seeds: int) -> str:
        """The estimate, its interval, and what that is over."""
        low, high = self.interval(level)
        over = f"{seeds} seeds" if self.over == "seeds" else "the prompts of these models"
        return f"{self.estimate:+.2f}, {100 * (1 - level):.4g} % interval [{low:+.2f}, {high:+.2f}] over {over}"


def mean_difference(
    treatment: ArmRuns, cells: Cells, outcome: Outcome, *, over: Over, resamples: int, seed: int
) -> tuple[Difference, list[float]]:
    """The mean difference to the controls, with its error over seeds and prompts; and that to each control."""
    differences, by_seed = by_control(treatment, cells, outcome)
    seeds, prompts = [], 0
    for d_s, (s, modes) in zip(by_seed, cells.items(), strict=True):
        run = treatment.runs[s]
        strata = [
            stratum_of(run[mode], [arm.runs[s][mode] for arm in rivals], outcome) for mode, rivals in modes.items()
        ]
        seeds.append(SeedDifference(d_s, strata))
        prompts += sum(run[mode].n_prompts - 1 for mode in modes)
    # One seed says nothing of others; what is left is the interval over its prompts.
    over = over if len(cells) > 1 else "prompts"
    error = standard_error(seeds, over, resamples=resamples, rng=np.random.default_rng(seed))
    df = len(cells) - 1 if over == "seeds" else max(prompts, 1)
    return Difference(fmean(differences), error, df, over), differences


def by_control(treatment: ArmRuns, cells: Cells, outcome: Outcome) -> tuple[list[float], list[float]]:
    """The difference to each control, over the seeds and modes in which it is compared; and d_s of each seed."""
    by_name: dict[str, list[float]] = {}
    by_seed = []
    for s, modes in cells.items():
        here: dict[str, list[float]] = {}
        for mode, rivals in modes.items():
            own = rate_of(treatment.runs[s][mode], outcome)
            for arm in rivals:
                here.setdefault(arm.name, []).append(own - rate_of(arm.runs[s][mode], outcome))
        means = {name: fmean(differences) for name, differences in here.items()}
        for name, mean in means.items():
            by_name.setdefault(name, []).append(mean)
        by_seed.append(fmean(means.values()))
    return [fmean(differences) for differences in by_name.values()], by_seed


def rate_of(outcomes: ModeOutcomes, outcome: Outcome) -> float:
    """The rate, or difference of rates, of one run in one mode."""
    return sum(sign * rate.value for sign, rate in _signed_rates(outcomes, outcome))


def pooled(arm: ArmRuns, counted: Counted, which: Which) -> Rate:
    """The rate over all rollouts of these modes and seeds."""
    rates: list[Rate] = [getattr(arm.runs[s][mode], which) for mode, seeds in counted.items() for s in seeds]
    return Rate(sum(rate.k for rate in rates), sum(rate.n for rate in rates))


def per_seed(arm: ArmRuns, counted: Counted, which: Which) -> str:
    """The arm's name, and its rate in each seed."""
    seeds = dict.fromkeys(seed for found in counted.values() for seed in found)
    rates = [pooled(arm, {mode: [s] for mode, found in counted.items() if s in found}, which) for s in seeds]
    return " ".join([arm.name, *(f"{rate.value:.2f}" for rate in rates)])


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
    weighted = [(1.0, own), *((-1 / len(rivals), rival) for rival in rivals)]
    samples = [
        (rate.k, rate.n, weight * sign)
        for weight, outcomes in weighted
        for sign, rate in _signed_rates(outcomes, outcome)
    ]
    k, n, weights = (np.array(each) for each in zip(*samples, strict=True))
    return Stratum.counted(k, n, weights)


def _signed_rates(outcomes: ModeOutcomes, outcome: Outcome) -> list[tuple[int, Rate]]:
    if outcome == "drop":
        return [(1, outcomes.hack_on), (-1, outcomes.hack_ablated)]
    return [(1, outcomes.hack_ablated if outcome == "ablated" else outcomes.solve_ablated)]


def _by_prompt(outcomes: ModeOutcomes, ids: Sequence[int | str], outcome: Outcome) -> Float[np.ndarray, " prompts"]:
    assert outcomes.prompts is not None
    shares = np.array([outcomes.prompts[prompt] for prompt in ids])
    return np.asarray({"drop": shares[:, 0] - shares[:, 1], "ablated": shares[:, 1], "solve": shares[:, 2]}[outcome])
