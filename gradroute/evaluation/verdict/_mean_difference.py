"""The difference of one outcome between a treatment and its controls, with its error over seeds and prompts.

d_sm = outcome of the treatment - mean over controls of it      in mode m of seed s
d    = mean over controls, over seeds, over modes of d_sm
"""

from collections.abc import Hashable
from statistics import fmean

import numpy as np

from gradroute.evaluation.verdict._bootstrap import Over, SeedDifference, standard_error
from gradroute.evaluation.verdict._cells import Outcome, rate_of, stratum_of
from gradroute.evaluation.verdict._difference import Difference
from gradroute.evaluation.verdict.arms import ArmRuns

Cells = dict[Hashable, dict[str, list[ArmRuns]]]
"""Seed -> mode -> the controls with which the treatment is compared there."""


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
