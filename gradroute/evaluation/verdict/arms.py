"""The arms of a comparison: what the trained models of each did, seed by seed and mode by mode.

    drop of one run in one mode = hack rate on - hack rate ablated

A run is one trained model, evaluated on and ablated on the same prompts.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from gradroute._typing import typechecked
from gradroute.errors import GradRouteError
from gradroute.evaluation.on_off import OnOffReport, Records
from gradroute.evaluation.rates import Rate
from gradroute.evaluation.records import EvalRecord

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
        wrong = [(p, shares) for p, shares in self.prompts.items() if len(shares) != 3 or not _are_shares(shares)]
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


def _are_shares(shares: tuple[float, ...]) -> bool:
    return all(0 <= share <= 1 for share in shares)


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
            if isinstance(several, ArmRuns):
                raise GradRouteError(
                    f"`controls.{name}` should be a list of ArmRuns. Found {several.name} alone. Fix: put it in a list."
                )
            if not isinstance(several, Sequence):
                # Arms are gone through several times.
                raise GradRouteError(
                    f"`controls.{name}` should be a list of ArmRuns. Found {type(several).__name__}. Fix: put the arms "
                    "in a list."
                )
        for arm in (self.shuffled, *self.random, *self.rivals, *([] if self.base is None else [self.base])):
            if not isinstance(arm, ArmRuns):
                raise GradRouteError(f"`controls` should be ArmRuns. Found {type(arm).__name__}.")
        if self.rivals and self.base is None:
            raise GradRouteError(
                "`rivals` should come with `base`, the model before training. Found none: a rival that solves nothing "
                "would count. Fix: evaluate that model on the prompts of each seed."
            )
        if self.base is not None and not self.rivals:
            raise GradRouteError(
                f"`base` should come with `rivals`, which are held against it. Found {self.base.name} alone. Fix: give "
                "arms with one block, or leave `base` out."
            )


def _by_mode(records: Records) -> dict[str, ModeOutcomes]:
    found: dict[str, list[tuple[int, EvalRecord]]] = {}
    for view, rollouts in enumerate((records.on, records.ablated)):
        for rollout in rollouts:
            found.setdefault(rollout.mode, []).append((view, rollout))
    return {mode: _outcomes(mode, rollouts) for mode, rollouts in found.items()}


def _outcomes(mode: str, rollouts: list[tuple[int, EvalRecord]]) -> ModeOutcomes:
    monitored = {rollout.monitored for _, rollout in rollouts}
    if len(monitored) > 1:
        raise GradRouteError(f"All records of the mode {mode!r} should agree on `monitored`. Found {monitored}.")
    # Per prompt: rollouts, hacked on, hacked ablated, solved ablated.
    counts: dict[int | str, list[int]] = {}
    for view, rollout in rollouts:
        count = counts.setdefault(rollout.prompt_id, [0, 0, 0, 0])
        count[0] += view == 0
        count[1 + view] += bool(rollout.hacked)
        count[3] += view == 1 and bool(rollout.solved)
    n, *ks = (sum(each) for each in zip(*counts.values(), strict=True))
    hack_on, hack_ablated, solve_ablated = (Rate(k, n) for k in ks)
    prompts = {prompt: (on / m, ablated / m, solved / m) for prompt, (m, on, ablated, solved) in counts.items()}
    return ModeOutcomes(monitored.pop(), hack_on, hack_ablated, solve_ablated, prompts)
