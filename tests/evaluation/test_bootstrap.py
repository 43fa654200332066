"""Standard errors and intervals of differences, against loops over single prompts and against hand-worked numbers."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t
from support.evaluated_arms import exact, report

from gradroute.evaluation import ArmRuns, Criteria, ModeOutcomes
from gradroute.evaluation.verdict._arm_differences import arm_differences
from gradroute.evaluation.verdict._bootstrap import SeedDifference, Stratum, standard_error
from gradroute.evaluation.verdict._difference import Difference, stratum_of

# The error of a standard error from so many resamples is 0.35 %; the tests allow five of them.
RESAMPLES, TOLERANCE = 40_000, 0.018


def error(seeds: list[SeedDifference], over: str) -> float:
    return standard_error(seeds, over, resamples=RESAMPLES, rng=np.random.default_rng(0))


def counted(*samples: tuple[int, int, float]) -> Stratum:
    """A stratum of samples (k, n, weight)."""
    return Stratum.counted(*(np.array(each) for each in zip(*samples, strict=True)))


def enumerated(values: list[float], n: int) -> float:
    """Standard deviation of the mean of n draws from values, over all sequences of draws."""
    means = [math.fsum(drawn) / n for drawn in itertools.product(values, repeat=n)]
    centre = math.fsum(means) / len(means)
    return math.sqrt(math.fsum((mean - centre) ** 2 for mean in means) / len(means))


# Over prompts


def test_prompts_are_drawn_with_one_imagined_each_way() -> None:
    # 3 of 4 with 1 of 2 imagined: p = 4/6, variance p (1 - p) / 4 = 1/18.
    sample = counted((3, 4, 1.0))
    assert sample.variance == pytest.approx(1 / 18)
    assert error([SeedDifference(0.75, [sample])], "prompts") == pytest.approx((1 / 18) ** 0.5, rel=TOLERANCE)
    assert enumerated([1, 1, 1, 0, 1, 0], 4) == pytest.approx((1 / 18) ** 0.5)


def test_paired_differences_are_drawn_with_one_imagined_each_way() -> None:
    sample = Stratum.paired(np.array([1.0, 0.0, 1.0, 2.0]))
    slow = enumerated([1, 0, 1, 2, -1, 1], 4)
    assert sample.variance**0.5 == pytest.approx(slow)
    assert error([SeedDifference(1.0, [sample])], "prompts") == pytest.approx(slow, rel=TOLERANCE)


@pytest.mark.parametrize("sample", [counted((64, 64, 1.0)), Stratum.paired(np.ones(64)), Stratum.paired(np.zeros(64))])
def test_unanimous_prompts_are_no_certainty(sample: Stratum) -> None:
    assert 0.01 < error([SeedDifference(1.0, [sample])], "prompts") < 0.04


def test_modes_and_samples_of_a_seed_are_independent_strata() -> None:
    strata = [counted((3, 4, 1.0), (1, 4, -0.5)), counted((9, 10, 1.0))]
    variances = [[1 / 18, 0.25 * (1 / 3 * 2 / 3) / 4], [10 / 12 * 2 / 12 / 10]]
    expected = math.sqrt(sum(map(sum, variances))) / 2
    seeds = [SeedDifference(0.5, strata)]
    assert seeds[0].variance == pytest.approx(expected**2)
    assert error(seeds, "prompts") == pytest.approx(expected, rel=TOLERANCE)
    assert error(seeds * 4, "prompts") == pytest.approx(expected / 2, rel=TOLERANCE)


def test_pairing_prompts_takes_out_what_arms_have_in_common() -> None:
    """Both arms hack on prompts 0 to 29 of 60 on, and ablated on all but one of them: hardly any difference."""

    def arm(name: str, kept: int) -> ArmRuns:
        return ArmRuns.from_reports(
            name, {0: report([("file", False, i, [(i < 30, i < 30 and i != kept, False)]) for i in range(60)])}
        )

    paired = [arm("a", 3).runs[0]["file"], arm("b", 4).runs[0]["file"]]
    counted = [type(each)(each.monitored, each.hack_on, each.hack_ablated, each.solve_ablated) for each in paired]
    errors = [error([SeedDifference(0.0, [stratum_of(a, [b], "drop")])], "prompts") for a, b in (paired, counted)]
    assert errors[0] == pytest.approx(math.sqrt((4 / 62) / 60), rel=TOLERANCE)
    assert errors[1] == pytest.approx(math.sqrt((31 * 31 + 30 * 32) * 2 / 62**2 / 60), rel=TOLERANCE)
    assert errors[0] < 0.4 * errors[1]


@pytest.mark.parametrize("paired", [True, False])
def test_samples_of_several_rivals_add_up_to_the_difference_to_their_mean(paired: bool) -> None:
    n = 4000  # so many that imagined prompts hardly weigh
    rates = [(0.9, 0.1, 0.7), (0.8, 0.5, 0.2), (0.6, 0.4, 0.6)]

    def outcomes(hack_on: float, hack_ablated: float, solved: float) -> ModeOutcomes:
        rollouts = [(i < hack_on * n, i < hack_ablated * n, i < solved * n) for i in range(n)]
        run = ArmRuns.from_reports("arm", {0: report([("file", False, i, [each]) for i, each in enumerate(rollouts)])})
        return run.runs[0]["file"] if paired else replace(run.runs[0]["file"], prompts=None)

    own, *rivals = (outcomes(*each) for each in rates)
    for outcome, difference in (("drop", 0.8 - (0.3 + 0.2) / 2), ("solve", 0.7 - (0.2 + 0.6) / 2)):
        stratum = stratum_of(own, rivals, outcome)
        assert float((stratum.probabilities * stratum.values).sum()) == pytest.approx(difference, abs=0.002)
        assert len(stratum.n) == (1 if paired else 3 if outcome == "solve" else 6)


# Over seeds


def slow_hierarchical(values: list[float], prompts: list[list[float]], resamples: int) -> float:
    """The docstring's formula, one prompt at a time: `prompts` are those drawn from, two of them imagined."""
    rng = np.random.default_rng(1)
    S = len(values)
    d = math.fsum(values) / S
    s2 = math.fsum((value - d) ** 2 for value in values) / (S - 1)
    centres = [math.fsum(each) / len(each) for each in prompts]
    w2 = (
        math.fsum(
            math.fsum((x - centre) ** 2 for x in each) / len(each) / (len(each) - 2)
            for each, centre in zip(prompts, centres, strict=True)
        )
        / S
    )
    c = math.sqrt(max(0.0, 1 - w2 / s2) * S / (S - 1))
    found = []
    for _ in range(resamples):
        total = 0.0
        for s in rng.integers(S, size=S):
            drawn = [prompts[s][i] for i in rng.integers(len(prompts[s]), size=len(prompts[s]) - 2)]
            total += d + c * (values[s] - d) + math.fsum(drawn) / len(drawn) - centres[s]
        found.append(total / S)
    return float(np.std(found, ddof=1))


SEEDS = [[1, 1, 1, 1, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0]]


def test_seeds_and_prompts_are_resampled_as_in_a_slow_loop() -> None:
    values = [sum(each) / 8 for each in SEEDS]
    fast = [SeedDifference(v, [Stratum.paired(np.array(each, float))]) for v, each in zip(values, SEEDS, strict=True)]
    slow = slow_hierarchical(values, [[*each, -1, 1] for each in SEEDS], 10_000)
    assert error(fast, "seeds") == pytest.approx(slow, rel=0.04)
    assert error(fast, "prompts") < 0.75 * slow


def test_the_variance_is_that_of_the_seeds_means() -> None:
    seeds = [SeedDifference(v, [counted((500, 1000, 1.0))]) for v in (0.1, 0.9, 0.3, 0.5, 0.2)]
    s2 = float(np.var([0.1, 0.9, 0.3, 0.5, 0.2], ddof=1))
    assert error(seeds, "seeds") == pytest.approx(math.sqrt(s2 / 5), rel=TOLERANCE)
    assert error(seeds, "prompts") < 0.1 * math.sqrt(s2 / 5)


@pytest.mark.parametrize("values", [(0.5, 0.5, 0.5), (0.49, 0.5, 0.51)])
def test_seeds_that_agree_by_chance_keep_the_noise_of_their_prompts(values: tuple[float, ...]) -> None:
    sample = counted((10, 20, 1.0))
    seeds = [SeedDifference(v, [sample]) for v in values]
    assert error(seeds, "seeds") == pytest.approx(math.sqrt(0.25 / 20 / 3), rel=TOLERANCE)


def test_the_error_follows_the_seed_and_leaves_random_numbers_as_found() -> None:
    arms = exact("route", [0.1, 0.3, 0.2]), [exact("shuffle", [0.9, 0.7, 0.6])]
    before = str(np.random.get_state())
    found = [arm_differences(*arms, ["file"], Criteria(), resamples=200, seed=seed).hack for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert str(np.random.get_state()) == before


def test_four_seeds_are_covered_by_t_and_not_by_percentiles() -> None:
    rng = np.random.default_rng(0)
    covered, by_percentiles = 0, 0
    for _ in range(400):
        values = rng.normal(0.0, 0.2, 4)
        seeds = [SeedDifference(v, [counted((500, 1000, 1.0))]) for v in values.tolist()]
        low, high = Difference(
            values.mean(), standard_error(seeds, "seeds", resamples=200, rng=rng), 3, "seeds"
        ).interval()
        covered += low < 0 < high
        percentiles = np.percentile(rng.choice(values, (200, 4)).mean(1), [2.5, 97.5])
        by_percentiles += percentiles[0] < 0 < percentiles[1]
    assert 0.925 < covered / 400 < 0.975
    assert by_percentiles / 400 < 0.85


# Differences


def test_interval_and_p_agree() -> None:
    difference = Difference(0.3, 0.1, 4, "seeds")
    low, high = difference.interval(0.05)
    assert (low, high) == pytest.approx((0.3 - 0.277645, 0.3 + 0.277645), abs=1e-6)
    assert difference.p_above(low) == pytest.approx(0.025)
    assert difference.p_above(high) == pytest.approx(0.975)
    assert difference.p_above(0.0) == pytest.approx(t.sf(3.0, 4))
    assert difference.interval(0.01)[0] < low


def test_an_added_error_adds_in_squares_with_satterthwaites_degrees_of_freedom() -> None:
    found = Difference(0.3, 0.3, 4, "seeds").with_added(0.16, df=2)
    assert found.error == pytest.approx(0.5)
    assert found.df == pytest.approx(0.25**2 / (0.09**2 / 4 + 0.16**2 / 2))
    assert Difference(0.3, 0.3, 4, "seeds").with_added(0.0, df=2) == Difference(0.3, 0.3, 4, "seeds")
