"""Check that arms can be compared: different runs on the same seeds, modes and prompts, enough draws, true rivals."""

from collections.abc import Hashable, Iterable

from gradroute.errors import GradRouteError
from gradroute.evaluation.verdict.arms import ArmRuns, Controls


def check_comparable(treatment: ArmRuns, controls: Controls, least_draws: int) -> None:
    """Raise unless arms are different runs on the same seeds, modes and prompts, with enough draws and true rivals."""
    one_block = [*controls.rivals, *([] if controls.base is None else [controls.base])]
    arms = (treatment, controls.shuffled, *controls.random, *one_block)
    for i, arm in enumerate(arms):
        for earlier in arms[:i]:
            if arm.name == earlier.name:
                raise GradRouteError(f"Every arm should have its own name. Found {arm.name!r} twice. Fix: rename one.")
            if arm.runs is earlier.runs or _same_outcomes(arm, earlier):
                raise GradRouteError(
                    f"Every arm should have its own runs. Found the same evaluations in {arm.name} and {earlier.name}. "
                    "Fix: give each arm the reports of the models that it trained."
                )
    if 0 < len(controls.random) < least_draws:
        raise GradRouteError(
            f"`controls.random` should hold {least_draws} or more draws, or none. Found {len(controls.random)}: their "
            "spread, which has to be beaten, would not be known. Fix: train with more seeds of random_like."
        )
    for arm in arms[1:]:
        _check_same_evaluation(treatment, arm)
    for arm in (controls.shuffled, *one_block):
        _check_same_seeds(treatment, arm)
    for arm in controls.random:
        strangers = [seed for seed in arm.runs if seed not in treatment.runs]
        if strangers:
            raise GradRouteError(
                f"{arm.name} should have seeds of {treatment.name}, {_listed(treatment.runs)}. Found "
                f"{_listed(strangers)}. Fix: train the treatment with them too, or leave them out."
            )
    for arm in one_block:
        _check_one_block(arm)


def _check_same_seeds(treatment: ArmRuns, control: ArmRuns) -> None:
    if control.runs.keys() != treatment.runs.keys():
        raise GradRouteError(
            f"{control.name} should have the seeds of {treatment.name}, {_listed(treatment.runs)}. Found "
            f"{_listed(control.runs)}. Fix: leave out runs without a partner, in both arms."
        )


def _check_one_block(arm: ArmRuns) -> None:
    for seed, run in arm.runs.items():
        for mode, outcomes in run.items():
            found = None
            if outcomes.hack_on != outcomes.hack_ablated:
                found = f"hack rates of {outcomes.hack_on.value:.2f} on and {outcomes.hack_ablated.value:.2f} ablated"
            elif any(on != ablated for on, ablated, _ in (outcomes.prompts or {}).values()):
                found = "other prompts hacked on than ablated"
            if found is not None:
                raise GradRouteError(
                    f"{arm.name} should be of one block, whose two views are one. Found {found} in the mode {mode!r} "
                    f"of seed {seed!r}. Fix: leave out arms with a second block; evaluate one block once, and give its "
                    "outcomes to both views."
                )


def _check_same_evaluation(treatment: ArmRuns, control: ArmRuns) -> None:
    if control.monitored != treatment.monitored:
        raise GradRouteError(
            f"{control.name} should be evaluated on the modes of {treatment.name}, {treatment.monitored}. Found "
            f"{control.monitored}."
        )
    for seed in control.runs.keys() & treatment.runs.keys():
        for mode, theirs in control.runs[seed].items():
            own = treatment.runs[seed][mode]
            if theirs.prompts is None or own.prompts is None:
                continue
            if theirs.prompts.keys() != own.prompts.keys():
                raise GradRouteError(
                    f"Seed {seed!r} of {control.name} should be evaluated on the prompts of {treatment.name}. Found "
                    f"other prompt ids in the mode {mode!r}. Fix: draw prompts from a generator with the same seed."
                )


def _same_outcomes(arm: ArmRuns, other: ArmRuns) -> bool:
    """Whether the outcomes are equal and this cannot be chance, as it can where rates are 0 or 1, or few."""
    if arm.runs != other.runs:
        return False
    varied = sum(
        0 < rate.k < rate.n and (1 if outcomes.prompts is None else rate.n)
        for run in arm.runs.values()
        for outcomes in run.values()
        for rate in (outcomes.hack_on, outcomes.hack_ablated, outcomes.solve_ablated)
    )
    return varied >= 6


def _listed(seeds: Iterable[Hashable]) -> str:
    return ", ".join(map(repr, seeds))
