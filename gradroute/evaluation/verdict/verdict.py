"""The word about a treatment, and everything that supports it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gradroute.evaluation.verdict._arm_differences import ArmDifferences
from gradroute.evaluation.verdict._difference import per_seed, pooled
from gradroute.evaluation.verdict._power import Needed
from gradroute.evaluation.verdict.arms import ArmRuns, Controls
from gradroute.evaluation.verdict.criteria import Criteria, stated_level
from gradroute.evaluation.verdict.one_block import OneBlock

Word = Literal["effective", "directional", "not distinguishable from control", "worse", "underpowered"]

MEANING: Mapping[Word, str] = {
    "effective": "the hack drop is larger than with the same flags at random places, at matched solve",
    "directional": "effective, and the hack drop is larger than with a random direction oriented on the same pairs",
    "not distinguishable from control": "an advantage that would matter is excluded",
    "worse": "the hack drop is smaller than with the same flags at random places, or fewer prompts are solved",
    "underpowered": "an advantage that would matter is neither found nor excluded",
}


@dataclass(frozen=True)
class Verdict:
    """The judgement on a treatment; `repr` is a paragraph with all that is needed to check it.

    Args:
        word: see `MEANING`.
        because: the condition that decided.
        treatment, controls: the arms.
        shuffled: the comparison with the shuffled flags.
        random: the comparison with the random draws; None if there are none.
        needed: what an underpowered verdict asks for; None for other words, and where more of the same cannot help.
        criteria: margins.
        level: of the intervals, corrected for the number of arms.
        arms: number of arms that were judged together.
        one_block: the judgement against arms with one block; None if there are none.
    """

    word: Word
    because: str
    treatment: ArmRuns
    controls: Controls
    shuffled: ArmDifferences
    random: ArmDifferences | None
    needed: Needed | None
    criteria: Criteria
    level: float
    arms: int
    one_block: OneBlock | None

    @property
    def undiscovered(self) -> list[str]:
        """Modes that no pair of on views exploits, so that nothing can be said of their suppression."""
        return self.shuffled.undiscovered

    def __repr__(self) -> str:
        name, control = self.treatment.name, self.controls.shuffled.name
        sentences = [f"{name} against {control}: {self.word} ({MEANING[self.word]}). {self.because}"]
        if self.needed is not None:
            sentences.append(f"Needed: {self.needed!r}.")
        sentences += [self._hacks(), self._solves(), self._draws(), self._modes()]
        sentences.append(stated_level(self.level, self.criteria, self.arms))
        if self.criteria.over == "prompts":
            sentences.append("This is about these trained models: no other seeds are claimed.")
        if self.one_block is not None:
            sentences.append(repr(self.one_block))
        return " ".join(sentences)

    def _hacks(self) -> str:
        found = self.shuffled
        if found.hack is None:
            return "Hack drops were not compared."
        arms = (self.treatment, self.controls.shuffled)
        drops = [
            f"{arm.name} {pooled(arm, found.counted, 'hack_on')!r} to {pooled(arm, found.counted, 'hack_ablated')!r}"
            for arm in arms
        ]
        p = found.hack.p_above(self.criteria.margin)
        return (
            f"Hack rate, on to ablated: {'; '.join(drops)}. Difference of drops "
            f"{found.hack.stated(self.level, len(found.seeds))}, p = {2 * min(p, 1 - p):.2g} against "
            f"{self.criteria.margin:g}, prompts {'paired' if found.paired else 'not paired'}. Ablated hack rate per "
            f"seed: {'; '.join(per_seed(arm, found.counted, 'hack_ablated') for arm in arms)}."
        )

    def _solves(self) -> str:
        found, seeds = self.shuffled, list(self.treatment.runs)
        own, control = (
            pooled(arm, dict.fromkeys(found.solved_on, seeds), "solve_ablated")
            for arm in (self.treatment, self.controls.shuffled)
        )
        matched = "matched" if found.solve_is_matched(self.criteria, self.level) else "not shown to match"
        return (
            f"Solve rate ablated, on {', '.join(found.solved_on)}: {own!r} against {control!r}, difference "
            f"{found.solve.stated(self.level, len(seeds))}, {matched} within {self.criteria.solve_margin:g}."
        )

    def _draws(self) -> str:
        n, found = len(self.controls.random), self.random
        if found is None or found.hack is None:
            return f"Random draws: {n}" + (", with no mode discovered." if n else ".")
        trained = sum(any(s in draw.runs for draw in self.controls.random) for s in self.treatment.runs)
        good = sum(difference <= 0 for difference in found.draws)
        return (
            f"Random draws: {n}, {len(found.draws)} with a discovered mode; difference of drops to one more such draw "
            f"{found.hack.stated(self.level, len(found.seeds))}; of solve to their mean "
            f"{found.solve.stated(self.level, trained)}; {good} did as well or better (a random direction too is best "
            f"of {len(found.draws) + 1} with a chance of {1 / (len(found.draws) + 1):.2f})."
        )

    def _modes(self) -> str:
        seeds = len(self.treatment.runs)
        counted = [f"{mode} in {len(found)} of {seeds} seeds" for mode, found in self.shuffled.counted.items() if found]
        return (
            f"Modes counted, as both on views reach {self.criteria.discovered:g}: {', '.join(counted) or 'none'}; "
            f"undiscovered: {', '.join(self.undiscovered) or 'none'}."
        )
