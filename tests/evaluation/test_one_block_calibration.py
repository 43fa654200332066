"""How often "better than one block" is said where a rival is as good, and where an advantage was planted.

As in `test_verdict_calibration`: rates of runs are drawn around those of the method.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy.stats import binom
from support.evaluated_arms import drawn, one_block

from gradroute.evaluation import ArmRuns, Controls, Criteria, compare, compare_all

NULLS = 100
RESAMPLES = 100
# Over both modes, of which one is solved at all: a wide margin leaves the word to the hack rate.
WIDE = Criteria(solve_margin=0.45)
BETTER, WORSE = "better than one block", "worse than one block"

Contest = tuple[ArmRuns, Controls]


def contest(
    rng: np.random.Generator, own: Sequence[float], *rivals: Sequence[float], solve: float = 0.8, base: float = 0.1
) -> Contest:
    """A treatment with these ablated hack rates, and rivals with those; all solve alike, and the base less."""
    seeds = len(own)
    one = [one_block(drawn(f"rival {i}", rates, rng, n=64, solve=solve)) for i, rates in enumerate(rivals)]
    untrained = one_block(drawn("base", [0.05] * seeds, rng, n=64, solve=base))
    shuffled = drawn("shuffle", [0.9] * seeds, rng, n=64)
    return drawn("route", own, rng, n=64, solve=solve), Controls(shuffled, rivals=one, base=untrained)


def words(make: Callable[[], Contest], criteria: Criteria = WIDE, n: int = NULLS) -> Counter[str]:
    found = (compare(*make(), criteria=criteria, resamples=RESAMPLES).one_block for _ in range(n))
    return Counter(one.word for one in found if one is not None)


def most(n: int = NULLS, chance: float = 0.05) -> int:
    """More of n, each with this chance, come up in one calibration of a hundred."""
    return int(binom.ppf(0.99, n, chance))


@pytest.mark.parametrize("seeds", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_calibration_of_better_where_the_rival_is_as_good(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    found = words(lambda: contest(rng, *rng.normal(0.3, 0.15, (2, seeds))))
    assert found.total() == NULLS
    assert found[BETTER] <= most()
    assert found[WORSE] <= most()


@pytest.mark.slow
def test_calibration_where_one_rival_of_three_is_as_good() -> None:
    rng = np.random.default_rng(1)
    means = np.array([0.3, 0.3, 0.4, 0.9])[:, None]
    found = words(lambda: contest(rng, *rng.normal(means, 0.1, (4, 4))))
    assert found[BETTER] <= most()


@pytest.mark.slow
def test_calibration_of_worse_where_the_best_of_several_equal_rivals_is_picked() -> None:
    rng = np.random.default_rng(2)

    def null() -> Contest:
        # The treatment hardly varies, so that all the luck is the rivals'.
        return contest(rng, [0.5] * 6, *rng.normal(0.5, 0.12, (10, 6)))

    found = [compare(*null(), criteria=WIDE, resamples=RESAMPLES).one_block for _ in range(100)]
    # At the whole level, the luck of the pick would be taken for an advantage of the rival.
    assert sum(one.hack.interval()[0] > 0 for one in found) > most(100)
    assert sum(one.word == WORSE for one in found) <= most(100)


@pytest.mark.slow
def test_calibration_of_better_where_nothing_more_is_solved_than_by_the_base() -> None:
    rng = np.random.default_rng(3)
    found = words(lambda: contest(rng, [0.05] * 4, [0.9] * 4, solve=0.3, base=0.3))
    assert found[BETTER] <= most()
    assert words(lambda: contest(rng, [0.05] * 4, [0.9] * 4, solve=0.8, base=0.3), n=40)[BETTER] >= 38


@pytest.mark.slow
def test_calibration_of_better_for_several_treatments_together() -> None:
    rng = np.random.default_rng(4)
    corrected, alone = 0, 0
    for _ in range(120):
        contests = [contest(rng, *rng.normal(0.5, 0.12, (2, 3))) for _ in range(3)]
        named = [(ArmRuns(f"arm {i}", arm.runs), controls) for i, (arm, controls) in enumerate(contests)]
        found = [verdict.one_block for verdict in compare_all(named, criteria=WIDE, resamples=RESAMPLES)]
        corrected += any(one.word == BETTER for one in found)
        alone += any(one.found.wins(WIDE, WIDE.level) for one in found)
    assert corrected <= most(120)
    assert corrected < alone


def test_a_planted_advantage_over_three_rivals_is_found() -> None:
    rng = np.random.default_rng(5)
    means = np.array([0.05, 0.4, 0.5, 0.9])[:, None]
    assert words(lambda: contest(rng, *rng.normal(means, 0.05, (4, 5))), n=40)[BETTER] >= 38
