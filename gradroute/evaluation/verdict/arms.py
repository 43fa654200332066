"""The arms of a comparison: what the trained models of each did, seed by seed and mode by mode.

    drop of one run in one mode = hack rate on - hack rate ablated

A run is one trained model, evaluated on and ablated on the same prompts. Arms can be compared if they are different
runs on the same seeds, modes and prompts.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gradroute._typing import typechecked
from gradroute.errors import GradRouteError
from gradroute.evaluation.on_off import OnOffReport, Records
from gradroute.evaluation.rates import Rate
from gradroute.evaluation.verdict.criteria import LEAST_DRAWS

Prompts = Mapping[int | str, tuple[float, float, float]]


@dataclass(frozen=True)
class ModeOutcomes:
    """Outcomes of one trained model on the prompts of one mode.

    Args:
        monitored: whether the detector knows this exploit; None where the prompts have no loophole.
        hack_on, hack_ablated: hack rates of the two views, over the same prompts.
        solve_ablated: solve rate as deployed.
        prompts: prompt id -> the same three of this prompt's rollouts; None where only counts are known, and then
            differences are not paired over prompts and their intervals are wider.

    Raises:
        GradRouteError: no prompts, or views of other sizes.
    """

    monitored: bool | None
    hack_on: Rate
    hack_ablated: Rate
    solve_ablated: Rate
    prompts: Prompts | None = None

    def __post_init__(self) -> None:
        rates = (self.hack_on, self.hack_ablated, self.solve_ablated)
        if not all(isinstance(rate, Rate) for rate in rates):
            raise GradRouteError(f"Hack and solve rates should be Rate(k, n). Found {rates!r}.")
        sizes = {rate.n for rate in rates}
        if len(sizes) > 1 or 0 in sizes:
            raise GradRouteError(
                f"A mode's rates should all be of the same rollouts, one or more. Found n of {sorted(sizes)}."
            )
        if self.prompts is None:
            return
        wrong = [(p, xs) for p, xs in self.prompts.items() if len(xs) != 3 or not all(0 <= x <= 1 for x in xs)]
        if wrong or not self.prompts:
            raise GradRouteError(
                "`prompts` should map prompt ids, one or more, to shares (hacked on, hacked ablated, solved ablated). "
                f"Found {wrong[0] if wrong else 'none'}."
            )

    @property
    def drop(self) -> float:
        """Hack rate on minus hack rate ablated."""
        return self.hack_on.value - self.hack_ablated.value

    @property
    def n_prompts(self) -> int:
        """Number of prompts; of rollouts where only counts are known."""
        return self.hack_on.n if self.prompts is None else len(self.prompts)


@dataclass(frozen=True)
class ArmRuns:
    """One arm: a method, a control, or one random direction, trained with one or more seeds.

        reports = {seed: gr.evaluate_on_off(model, evaluate) for seed, model in trained.items()}
        ArmRuns.from_reports("route", reports)
        ArmRuns("route", {seed: {"file": ModeOutcomes(False, Rate(61, 64), Rate(4, 64), Rate(30, 64))}})

    Args:
        name: of the arm, for reports.
        runs: seed -> mode -> outcomes. All arms share their seeds, and runs of one seed are compared with each other:
            the RL seed, or (base seed, RL seed).

    Raises:
        GradRouteError: no runs, no exploit mode, or runs that were not evaluated on the same modes.
    """

    name: str
    runs: Mapping[Hashable, Mapping[str, ModeOutcomes]]

    def __post_init__(self) -> None:
        if not self.name:
            raise GradRouteError(f"`name` should say which arm this is. Found {self.name!r}.")
        if not isinstance(self.runs, Mapping) or not self.runs:
            raise GradRouteError(
                f"`runs` of {self.name} should map seeds, one or more, to outcomes. Found {self.runs!r}."
            )
        for seed, run in self.runs.items():
            if not isinstance(run, Mapping) or not all(isinstance(each, ModeOutcomes) for each in run.values()):
                raise GradRouteError(
                    f"`runs` of {self.name} should map seed {seed!r} to a ModeOutcomes per mode. Found "
                    f"{type(run).__name__}. Fix: ArmRuns.from_reports takes an OnOffReport per seed."
                )
            found = {mode: outcomes.monitored for mode, outcomes in run.items()}
            if found != self.monitored:
                raise GradRouteError(
                    f"All runs of {self.name} should have the same modes, with the same `monitored`. Found "
                    f"{self.monitored} in one and {found} in that of seed {seed!r}."
                )
        if set(self.monitored.values()) <= {None}:
            raise GradRouteError(
                f"`runs` of {self.name} should hold an exploit mode. Found {', '.join(self.monitored) or 'no modes'}. "
                "Fix: set `monitored` to True or False where prompts have a loophole."
            )

    @property
    def monitored(self) -> dict[str, bool | None]:
        """Mode -> whether the detector knows it; None where prompts have no loophole."""
        return {mode: outcomes.monitored for mode, outcomes in next(iter(self.runs.values())).items()}

    @staticmethod
    @typechecked
    def from_reports(name: str, reports: Mapping[Hashable, OnOffReport]) -> "ArmRuns":
        """The runs of which these are the evaluations, one per seed, with what every prompt did.

        Raises:
            GradRouteError: a report that holds rates and no records.
        """
        runs = {}
        for seed, report in reports.items():
            if report.records is None:
                raise GradRouteError(
                    f"The report of seed {seed!r} of {name} should hold its records. Found rates alone. Fix: take it "
                    "from evaluate_on_off, or give counts as ArmRuns(name, {seed: {mode: ModeOutcomes(...)}})."
                )
            runs[seed] = _by_mode(report.records)
        return ArmRuns(name, runs)

    def __repr__(self) -> str:
        return f"ArmRuns({self.name}, {len(self.runs)} seeds, modes {', '.join(self.monitored)})"


@dataclass(frozen=True)
class Controls:
    """What a treatment is compared with: the two controls of a verdict, and rivals that make do with one block.

        Controls(shuffled, rivals=[dropped, penalised], base=untrained)

    A rival has one block, so its two views are one: `ModeOutcomes(monitored, hack, hack, solve)`.

    Args:
        shuffled: trained with the treatment's own flags at random places (`shuffled_flags`), with all of its seeds,
            refreshed on its own schedule.
        random: one arm per random direction, oriented on the treatment's pairs
            (`Directions.random_like(seed, oriented=True)`), each with some or all of the treatment's seeds, refreshed
            on its own schedule. Without any, no verdict is "directional".
        rivals: arms without a second block, trained on the treatment's labels (flagged rollouts dropped, penalised)
            with all of its seeds. Without any, nothing is said of one block.
        base: the model before training, evaluated for each seed on the prompts of that seed.

    Raises:
        GradRouteError: something other than `ArmRuns`; rivals without a base, or a base without rivals.
    """

    shuffled: ArmRuns
    random: Sequence[ArmRuns] = ()
    rivals: Sequence[ArmRuns] = field(default=(), kw_only=True)
    base: ArmRuns | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name, several in (("random", self.random), ("rivals", self.rivals)):
            # Arms are gone through several times.
            if not isinstance(several, Sequence):
                raise GradRouteError(
                    f"`controls.{name}` should be a list of ArmRuns. Found {type(several).__name__}. Fix: put the arms "
                    "in a list."
                )
        for arm in (self.shuffled, *self.random, *self._one_block):
            if not isinstance(arm, ArmRuns):
                raise GradRouteError(f"`controls` should be ArmRuns. Found {type(arm).__name__}.")
        if bool(self.rivals) != (self.base is not None):
            raise GradRouteError(
                "`rivals` and `base`, the model before training, should come together. Found "
                f"{'rivals' if self.rivals else 'a base'} alone. Fix: evaluate the base too, or leave both out."
            )

    @property
    def _one_block(self) -> list[ArmRuns]:
        return [*self.rivals, *([] if self.base is None else [self.base])]


def _by_mode(records: Records) -> dict[str, ModeOutcomes]:
    monitored: dict[str, bool | None] = {}
    # Per mode and prompt: rollouts, hacked on, hacked ablated, solved ablated.
    counts: dict[str, dict[int | str, list[int]]] = {}
    for view, rollouts in enumerate((records.on, records.ablated)):
        for rollout in rollouts:
            if monitored.setdefault(rollout.mode, rollout.monitored) != rollout.monitored:
                found = {monitored[rollout.mode], rollout.monitored}
                raise GradRouteError(
                    f"All records of the mode {rollout.mode!r} should agree on `monitored`. Found {found}."
                )
            count = counts.setdefault(rollout.mode, {}).setdefault(rollout.prompt_id, [0, 0, 0, 0])
            count[0] += view == 0
            count[1 + view] += bool(rollout.hacked)
            count[3] += view == 1 and bool(rollout.solved)
    return {mode: _outcomes(monitored[mode], by_prompt) for mode, by_prompt in counts.items()}


def _outcomes(monitored: bool | None, counts: Mapping[int | str, list[int]]) -> ModeOutcomes:
    n, *ks = (sum(each) for each in zip(*counts.values(), strict=True))
    hack_on, hack_ablated, solve_ablated = (Rate(k, n) for k in ks)
    prompts = {prompt: (on / m, ablated / m, solved / m) for prompt, (m, on, ablated, solved) in counts.items()}
    return ModeOutcomes(monitored, hack_on, hack_ablated, solve_ablated, prompts)


def check_comparable(treatment: ArmRuns, controls: Controls) -> None:
    """Raise unless arms are different runs on the same seeds, modes and prompts, with enough draws and true rivals."""
    whole = [controls.shuffled, *controls._one_block]  # with all seeds of the treatment
    arms = [treatment, controls.shuffled, *controls.random, *controls._one_block]
    for i, arm in enumerate(arms):
        for earlier in arms[:i]:
            if arm.name == earlier.name:
                raise GradRouteError(f"Every arm should have its own name. Found {arm.name!r} twice. Fix: rename one.")
            if arm.runs is earlier.runs or _same_outcomes(arm, earlier):
                raise GradRouteError(
                    f"Every arm should have its own runs. Found the same evaluations in {arm.name} and {earlier.name}. "
                    "Fix: give each arm the reports of the models that it trained."
                )
    if 0 < len(controls.random) < LEAST_DRAWS:
        raise GradRouteError(
            f"`controls.random` should hold {LEAST_DRAWS} or more draws, or none. Found {len(controls.random)}: their "
            "spread, which has to be beaten, would not be known. Fix: train with more seeds of random_like."
        )
    for arm in arms[1:]:
        _check_same_evaluation(treatment, arm)
    for arm in whole:
        if arm.runs.keys() != treatment.runs.keys():
            raise GradRouteError(
                f"{arm.name} should have the seeds of {treatment.name}, {_listed(treatment.runs)}. Found "
                f"{_listed(arm.runs)}. Fix: leave out runs without a partner, in both arms."
            )
    for arm in controls.random:
        strangers = [seed for seed in arm.runs if seed not in treatment.runs]
        if strangers:
            raise GradRouteError(
                f"{arm.name} should have seeds of {treatment.name}, {_listed(treatment.runs)}. Found "
                f"{_listed(strangers)}. Fix: train the treatment with them too, or leave them out."
            )
    for arm in controls._one_block:
        _check_one_block(arm)


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
                    f"of seed {seed!r}. Fix: leave the arm out; of one block, give the same outcomes to both views."
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
            if theirs.prompts and own.prompts and theirs.prompts.keys() != own.prompts.keys():
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
