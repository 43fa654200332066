"""How many seeds or prompts another experiment needs, given the noise found in this one.

    expected power(n) = P(T < sqrt(n) gap / s),   T noncentral t(df of s, noncentrality t(1 - level/2, df of n)),
    s^2 = n_here SE^2

It averages over what s may have been by chance, which after three seeds is a factor of several; with s taken at its
word, half of all experiments would be too small (Julious & Owen 2006, Statistics in Medicine 25:1087). Two conditions
at once: failures add up to 1 - power at most.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

from gradroute.evaluation.verdict._arm_differences import ArmDifferences
from gradroute.evaluation.verdict._difference import Difference
from gradroute.evaluation.verdict.criteria import LEAST_SEEDS, Criteria

_MOST = 100_000


@dataclass(frozen=True)
class Needed:
    """The size of the experiment that an underpowered verdict asks for.

    Args:
        n: how many in all, not how many more.
        of: what.
        power: of finding the effect with them; None where they are but the fewest from which noise can be told.
    """

    n: int
    of: Literal["seeds", "prompts per mode"]
    power: float | None

    def __repr__(self) -> str:
        if self.power is None:
            return f"at least {self.n} {self.of}, from whose spread the number needed follows"
        count = f"more than {_MOST}" if self.n > _MOST else str(self.n)
        return f"{count} {self.of} for a power of {self.power:.2f}"


def expected_power(difference: Difference, growth: float, gap: float, level: float) -> float:
    """Power of an experiment with `growth` times the seeds or prompts, to tell a difference `gap` from none.

    Args:
        difference: of this experiment; its error and their degrees of freedom are used, not its estimate.
        growth: n / n_here.
        gap: true difference minus the value to exclude.
        level: two-sided.
    """
    from scipy.special import nctdtr, stdtrit  # noqa: PLC0415  (slow to load)

    df = (difference.df + 1) * growth - 1
    return float(nctdtr(difference.df, stdtrit(df, 1 - level / 2), gap * growth**0.5 / difference.error))


def needed(found: ArmDifferences, criteria: Criteria, level: float) -> Needed | None:
    """More seeds or prompts, so that an advantage of `effect` at equal solve is found with the power of the criteria.

    None where no mode counts or nothing is solved: more of the same would not help.
    """
    if found.hack is None or not found.solves(criteria):
        return None
    seeds = criteria.over == "seeds"
    here = len(found.seeds) if seeds else found.prompts_per_mode
    if seeds and found.hack.over == "prompts":
        return Needed(LEAST_SEEDS, "seeds", power=None)
    hack, gap = found.hack, criteria.effect - criteria.margin

    def power(n: int) -> float:
        growth = n / here
        failures = 2 - expected_power(hack, growth, gap, level)
        return 1 - (failures - expected_power(found.solve, growth, criteria.solve_margin, level))

    sizes = range(max(here + 1, LEAST_SEEDS) if seeds else here + 1, _MOST + 1)
    n = sizes.start + bisect_left(sizes, criteria.power, key=power)
    return Needed(n, "seeds" if seeds else "prompts per mode", criteria.power)
