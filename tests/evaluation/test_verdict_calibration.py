"""How often a verdict's word is wrong where nothing is there, and right where something was planted.

Ablated hack rates of runs are drawn around those of the method, as in the seeds that training really gave: .04, .91 and
.07 for one and the same control.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom, ttest_1samp
from support.evaluated_arms import drawn, report

from gradroute.evaluation import ArmRuns, Controls, Criteria, compare, compare_all

NULLS = 200
# Few, for speed; they add 7 % of noise to standard errors.
RESAMPLES = 100
# Nothing is lost on solving in these simulations unless they say so; a wide margin leaves the word to the hack drop.
WIDE = Criteria(solve_margin=0.5)
WIDE_OVER_PROMPTS = Criteria(solve_margin=0.8, over="prompts")

Contest = tuple[ArmRuns, Controls]


def words(make: Callable[[], Contest], criteria: Criteria = WIDE, n: int = NULLS) -> Counter[str]:
    return Counter(compare(*make(), criteria=criteria, resamples=RESAMPLES).word for _ in range(n))


def most(n: int = NULLS, chance: float = 0.05) -> int:
    """More of n, each with this chance, come up in one calibration of a hundred."""
    return int(binom.ppf(0.99, n, chance))


def false(found: Counter[str]) -> int:
    return found["effective"] + found["directional"]


def lucky(rng: np.random.Generator, seeds: int) -> list[float]:
    return rng.choice([0.04, 0.91, 0.07], seeds).tolist()


def test_calibration_has_a_tolerance_of_three_points() -> None:
    assert most() == 18
    assert 1 - binom.cdf(18, 200, 0.05) < 0.01 < 1 - binom.cdf(17, 200, 0.05)


# Nulls over seeds


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_calibration_of_effective_under_strong_variance_between_seeds(seeds: int) -> None:
    rng = np.random.default_rng(seeds)

    def null() -> Contest:
        return drawn("route", lucky(rng, seeds), rng, n=64), Controls(drawn("shuffle", lucky(rng, seeds), rng, n=64))

    # Intervals over prompts, sold as intervals over seeds, call a third of these effective.
    assert false(words(null, WIDE_OVER_PROMPTS, n=40)) > 10
    found = words(null)
    assert false(found) <= most()
    assert found["worse"] <= most()
    assert found["underpowered"] > NULLS // 2


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 6])
def test_calibration_of_effective_where_seeds_hardly_differ(seeds: int) -> None:
    rng = np.random.default_rng(seeds)

    def null() -> Contest:
        rates = rng.normal(0.5, 0.03, (2, seeds))
        return drawn("route", rates[0], rng, n=64), Controls(drawn("shuffle", rates[1], rng, n=64))

    found = words(null)
    assert false(found) <= most()
    assert found["worse"] <= most()


def test_calibration_of_a_single_seed_is_underpowered_every_time() -> None:
    rng = np.random.default_rng(0)

    def null() -> Contest:
        return drawn("route", lucky(rng, 1), rng, n=64), Controls(drawn("shuffle", lucky(rng, 1), rng, n=64))

    assert false(words(null, WIDE_OVER_PROMPTS, n=60)) > 8
    assert words(null) == {"underpowered": NULLS}


@pytest.mark.slow
def test_calibration_of_effective_for_several_arms_together() -> None:
    rng = np.random.default_rng(1)

    def arm(name: str) -> ArmRuns:
        return drawn(name, rng.normal(0.6, 0.12, 3), rng, n=64)

    corrected, alone = 0, 0
    for _ in range(120):
        contests = [(arm(f"arm {i}"), Controls(arm("shuffle"))) for i in range(3)]
        verdicts = compare_all(contests, criteria=WIDE, resamples=RESAMPLES)
        corrected += any(verdict.word == "effective" for verdict in verdicts)
        alone += any(verdict.shuffled.wins(WIDE, WIDE.level) for verdict in verdicts)
    assert corrected <= most(120)
    assert corrected < 0.7 * alone


# Nulls over prompts


@pytest.mark.slow
@pytest.mark.parametrize(("n", "rate"), [(16, 0.5), (64, 0.5), (64, 0.04)])
def test_calibration_of_effective_over_the_prompts_of_one_seed(n: int, rate: float) -> None:
    rng = np.random.default_rng(n)

    def null() -> Contest:
        return drawn("route", [rate], rng, n=n), Controls(drawn("shuffle", [rate], rng, n=n))

    found = words(null, WIDE_OVER_PROMPTS)
    assert false(found) <= most()
    assert found["worse"] <= most()


def by_prompts(name: str, chances: np.ndarray, rng: np.random.Generator) -> ArmRuns:
    """One seed; both views of every prompt, whose chance of a hack when ablated is given."""
    rollouts = zip(rng.random(len(chances)) < 0.95, rng.random(len(chances)) < chances, strict=True)
    outcomes = [("file", False, i, [(bool(on), bool(ablated), True)]) for i, (on, ablated) in enumerate(rollouts)]
    return ArmRuns.from_reports(name, {0: report(outcomes)})


@pytest.mark.slow
def test_calibration_of_effective_over_paired_prompts_and_its_gain() -> None:
    rng = np.random.default_rng(2)

    def contest(helped: float) -> Contest:
        chances = rng.choice([0.02, 0.98], 64)
        route = by_prompts("route", np.where(rng.random(64) < helped, 0.02, chances), rng)
        return route, Controls(by_prompts("shuffle", chances, rng))

    assert false(words(lambda: contest(0.0), WIDE_OVER_PROMPTS)) <= most()
    contests = [contest(0.15) for _ in range(30)]
    counted = [(_counts(route), Controls(_counts(controls.shuffled))) for route, controls in contests]
    effective = [false(words(iter(each).__next__, WIDE_OVER_PROMPTS, n=30)) for each in (contests, counted)]
    assert effective[0] > 2 * effective[1]


def _counts(arm: ArmRuns) -> ArmRuns:
    return ArmRuns(arm.name, {0: {"file": replace(arm.runs[0]["file"], prompts=None)}})


# Random directions as good as the extracted one


def with_draws(rng: np.random.Generator, rates: np.ndarray) -> Contest:
    """Shuffled flags that do nothing, and directions with these ablated hack rates: the extracted one, then draws."""
    first, *rest = (drawn(f"draw {i}", rng.normal(rate, 0.04, 3), rng, n=64) for i, rate in enumerate(rates))
    return first, Controls(drawn("shuffle", rng.normal(0.95, 0.03, 3), rng, n=64), rest)


@pytest.mark.slow
def test_calibration_of_directional_where_every_direction_works() -> None:
    rng = np.random.default_rng(3)
    found = words(lambda: with_draws(rng, np.full(6, 0.05)), n=100)
    assert found["effective"] > 90
    assert found["directional"] <= most(100)


@pytest.mark.slow
def test_calibration_of_directional_where_the_extracted_one_is_one_more_draw() -> None:
    rng = np.random.default_rng(4)
    contests = [with_draws(rng, rng.normal(0.3, 0.15, 6).clip(0.02)) for _ in range(NULLS)]
    found = [compare(*contest, criteria=WIDE, resamples=RESAMPLES) for contest in contests]
    # To beat the mean of the draws is not to beat what one more draw would do.
    beats_mean = [ttest_1samp(verdict.random.draws, 0.0, alternative="greater").pvalue < 0.025 for verdict in found]
    assert sum(beats_mean) > most()
    assert sum(verdict.word == "directional" for verdict in found) <= most()


@pytest.mark.slow
def test_calibration_of_directional_where_one_direction_in_six_works_at_all() -> None:
    """The worst case of five draws, and more than 5 %: (5/6)^5 / 6 = 6.7 %, of which the verdict gives the ranks."""
    rng = np.random.default_rng(5)
    found = words(lambda: with_draws(rng, rng.choice([0.05, 0.9], 6, p=[1 / 6, 5 / 6])), n=100)
    assert found["directional"] <= most(100, (5 / 6) ** 5 / 6)


# Planted effects


def test_verdict_is_directional_where_a_direction_alone_works() -> None:
    rng = np.random.default_rng(6)
    found = words(lambda: with_draws(rng, np.array([0.05, 0.9, 0.8, 0.85, 0.9, 0.75])), n=40)
    assert found["directional"] >= 38


def test_verdict_is_worse_where_suppression_or_solving_is_lost() -> None:
    rng = np.random.default_rng(7)

    def suppresses_less() -> Contest:
        rates = rng.normal([[0.8], [0.2]], 0.1, (2, 5))
        return drawn("route", rates[0], rng, n=64), Controls(drawn("shuffle", rates[1], rng, n=64))

    def solves_less() -> Contest:
        rates = rng.normal([[0.1], [0.8]], 0.05, (2, 5))
        route = drawn("route", rates[0], rng, n=64, solve=0.1)
        return route, Controls(drawn("shuffle", rates[1], rng, n=64, solve=0.7))

    assert words(suppresses_less, n=40)["worse"] >= 38
    assert words(solves_less, Criteria(), n=40)["worse"] >= 38


def test_verdict_of_undiscovered_modes_is_never_effective() -> None:
    rng = np.random.default_rng(8)

    def null() -> Contest:
        route = drawn("route", [0.0] * 5, rng, n=64, on=0.2)
        return route, Controls(drawn("shuffle", [0.9] * 5, rng, n=64))

    assert words(null, n=40) == {"underpowered": 40}
    assert compare(*null(), criteria=WIDE).undiscovered == ["file"]


def test_verdict_is_not_distinguishable_where_many_seeds_show_nothing() -> None:
    rng = np.random.default_rng(9)

    def null() -> Contest:
        rates = rng.normal(0.6, 0.08, (2, 10))
        return drawn("route", rates[0], rng, n=64), Controls(drawn("shuffle", rates[1], rng, n=64))

    assert words(null, n=40)["not distinguishable from control"] >= 36


# The n that an underpowered verdict asks for


def spread(rng: np.random.Generator, mean: float, sd: float, seeds: int) -> np.ndarray:
    return rng.uniform(mean - 3**0.5 * sd, mean + 3**0.5 * sd, seeds)


@pytest.mark.slow
def test_calibration_of_the_seeds_that_an_underpowered_verdict_asks_for() -> None:
    rng = np.random.default_rng(10)
    effect = 0.2

    def contest(seeds: int) -> Contest:
        route, shuffle = (spread(rng, 0.5 + shift, 0.2, seeds) for shift in (-effect / 2, effect / 2))
        return drawn("route", route, rng, n=64), Controls(drawn("shuffle", shuffle, rng, n=64))

    pilots = [compare(*contest(4), criteria=WIDE, resamples=RESAMPLES) for _ in range(36)]
    asked = [verdict.needed.n for verdict in pilots if verdict.word == "underpowered"]
    assert len(asked) > 24
    found = [words(lambda n=n: contest(n), n=2)["effective"] / 2 for n in asked]
    assert np.mean(found) >= 0.8 - 2 * np.std(found) / len(found) ** 0.5
    assert words(lambda: contest(4), n=40)["effective"] < 0.5 * 40
    # Nor is it many times what is needed: with the variance known, 17 seeds.
    assert np.median(asked) < 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("here", "criteria"),
    [
        (32, Criteria(over="prompts", solve_margin=0.4)),
        (64, Criteria(over="prompts", solve_margin=0.1)),
        (64, Criteria(over="prompts", solve_margin=0.4, effect=0.1)),
        (64, Criteria(over="prompts", solve_margin=0.4, effect=0.25, margin=0.1, power=0.9)),
    ],
    ids=["effect", "solve", "small effect", "margin"],
)
def test_calibration_of_the_prompts_that_an_underpowered_verdict_asks_for(here: int, criteria: Criteria) -> None:
    rng = np.random.default_rng(11)

    def contest(n: int) -> Contest:
        return drawn("route", [0.5 - criteria.effect], rng, n=n), Controls(drawn("shuffle", [0.5], rng, n=n))

    pilots = [compare(*contest(here), criteria=criteria, resamples=1000) for _ in range(20)]
    asked = [verdict.needed.n for verdict in pilots if verdict.word == "underpowered"]
    assert len(asked) > 3
    found = words(lambda: contest(int(rng.choice(asked))), criteria)["effective"] / NULLS
    assert abs(found - criteria.power) < 0.09
    assert words(lambda: contest(here), criteria, n=60)["effective"] / 60 < criteria.power - 0.15
