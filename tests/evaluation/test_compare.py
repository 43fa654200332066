"""`compare`: which word, and why; several arms, and what is needed."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import nct, t
from support.compared_arms import POOR, ROUTE, SHUFFLE, one_seed, word
from support.evaluated_arms import exact

import gradroute as gr
from gradroute.evaluation import ArmRuns, Controls, Criteria, ModeOutcomes, Rate, compare, compare_all
from gradroute.evaluation.verdict._difference import Difference
from gradroute.evaluation.verdict._power import expected_power
from gradroute.evaluation.verdict.compare import holm_levels

REFUSED = (gr.GradRouteError, TypeError)

GOOD = [
    exact(f"draw {i}", [rate, rate + 0.02, rate - 0.03, rate, rate])
    for i, rate in enumerate((0.04, 0.06, 0.05, 0.07, 0.08))
]


# The five words


def test_a_verdict_is_effective_if_the_drop_beats_shuffled_flags_at_matched_solve() -> None:
    verdict = compare(ROUTE, Controls(SHUFFLE))
    assert verdict.word == "effective"
    assert verdict.shuffled.hack.estimate == pytest.approx(0.892 - 0.054)
    assert verdict.shuffled.ablated == pytest.approx(0.054 - 0.892)
    assert "no random draws" in verdict.because
    assert verdict.needed is None


def test_a_verdict_is_directional_only_if_random_directions_do_less() -> None:
    assert compare(ROUTE, Controls(SHUFFLE, POOR)).word == "directional"
    verdict = compare(ROUTE, Controls(SHUFFLE, GOOD))
    assert verdict.word == "effective"
    assert "random direction may do as well" in verdict.because


def test_one_good_draw_in_five_keeps_a_verdict_from_being_directional() -> None:
    """The mean of the draws is beaten, with its error; a sixth draw might do as well."""
    draws = [*POOR[:4], exact("draw 4", [0.05, 0.06, 0.04, 0.05, 0.06])]
    found = compare(ROUTE, Controls(SHUFFLE, draws)).random
    mean, error = np.mean(found.draws), np.std(found.draws, ddof=1) / 5**0.5
    assert mean - t.isf(0.025, 4) * error > 0
    assert word(ROUTE, SHUFFLE, draws) == "effective"


def test_a_verdict_is_not_distinguishable_from_control_if_an_advantage_is_excluded() -> None:
    same = exact("route", [0.89, 0.86, 0.92, 0.87, 0.92])
    verdict = compare(same, Controls(SHUFFLE))
    assert verdict.word == "not distinguishable from control"
    assert verdict.shuffled.hack.interval()[0] < 0 < verdict.shuffled.hack.interval()[1] < 0.2
    assert word(same, effect=0.011) == "underpowered"


def test_a_verdict_is_worse_if_the_drop_is_smaller_or_solving_is_lost() -> None:
    verdict = compare(replace(SHUFFLE, name="route"), Controls(replace(ROUTE, name="shuffle")))
    assert (verdict.word, verdict.because) == ("worse", "Its hack drop is smaller.")
    collapsed = exact("route", [0.05, 0.07, 0.04, 0.06, 0.05], solve=[0.0, 0.1, 0.05, 0.1, 0.0])
    verdict = compare(collapsed, Controls(SHUFFLE))
    assert (verdict.word, verdict.because) == ("worse", "It solves less, by more than 0.1.")
    assert word(collapsed, solve_margin=0.6, least_solve=0.0) == "effective"
    less = exact("route", [0.05, 0.07, 0.04, 0.06, 0.05], solve=[0.35, 0.34, 0.36, 0.35, 0.35])
    assert word(less) == "worse"
    assert word(less, solve_margin=0.2) == "effective"


def test_a_treatment_that_solves_nothing_is_not_effective_next_to_a_control_that_does_not_either() -> None:
    ablated, solves = [0.05, 0.07, 0.04, 0.06, 0.05], [0.01, 0.0, 0.02, 0.0, 0.01]
    broken = exact("route", ablated, solve=solves)
    hacking = exact("shuffle", [0.90, 0.85, 0.92, 0.88, 0.91], solve=solves)
    verdict = compare(broken, Controls(hacking))
    assert verdict.word == "underpowered"
    assert verdict.because.startswith("Its hack drop is larger, but it solves no more than 0.1 itself")
    assert verdict.needed is None
    assert verdict.shuffled.p(Criteria()) == 1.0
    assert word(broken, hacking, least_solve=0.0) == "effective"
    able = exact("route", ablated, solve=0.125)
    assert word(able, hacking) == "effective"
    assert word(able, hacking, least_solve=0.125) == "underpowered"


def test_eight_points_at_64_prompts_are_underpowered() -> None:
    def arm(name: str, on: int, ablated: int) -> ArmRuns:
        return ArmRuns(name, {0: {"file": ModeOutcomes(False, Rate(on, 64), Rate(ablated, 64), Rate(28, 64))}})

    verdict = compare(arm("route", 38, 33), Controls(arm("shuffle", 38, 38)), criteria=Criteria(over="prompts"))
    assert verdict.word == "underpowered"
    assert verdict.shuffled.hack.estimate == pytest.approx(5 / 64)
    assert verdict.needed.of == "prompts per mode"
    assert verdict.needed.n > 300
    assert "Neither 0 nor 0.2 is excluded" in verdict.because


def test_a_single_seed_is_underpowered_however_large_the_difference() -> None:
    verdict = compare(one_seed("route", 0.0), Controls(one_seed("shuffle", 1.0)))
    assert verdict.word == "underpowered"
    assert "1 seed(s)" in verdict.because
    assert (verdict.needed.n, verdict.needed.of, verdict.needed.power) == (3, "seeds", None)
    assert verdict.shuffled.hack.over == "prompts"
    assert "over the prompts of these models" in repr(verdict)


def test_two_seeds_are_underpowered_and_three_are_not() -> None:
    two, three = (
        compare(exact("route", [0.05] * seeds, n=10**5), Controls(exact("shuffle", [0.9] * seeds, n=10**5)))
        for seeds in (2, 3)
    )
    assert (two.word, three.word) == ("underpowered", "effective")
    assert two.shuffled.wins(two.criteria, two.level)
    assert "2 seed(s)" in two.because
    assert two.needed.n >= 3


def test_over_prompts_a_single_seed_is_judged_and_claims_no_others() -> None:
    over_prompts = Criteria(over="prompts")
    verdict = compare(one_seed("route", 0.0), Controls(one_seed("shuffle", 1.0)), criteria=over_prompts)
    assert verdict.word == "effective"
    assert "about these trained models: no other seeds are claimed" in repr(verdict)


def test_seeds_that_differ_make_underpowered_what_prompts_would_call_effective() -> None:
    control = exact("shuffle", [0.04, 0.91, 0.07, 0.9, 0.9])
    assert word(ROUTE, control, over="prompts") == "effective"
    verdict = compare(ROUTE, Controls(control))
    assert verdict.word == "underpowered"
    assert verdict.needed.n > 5


def test_a_larger_drop_at_an_unsettled_solve_rate_is_underpowered() -> None:
    unsteady = exact("route", [0.05, 0.07, 0.04, 0.06, 0.05], solve=[0.5, 0.5, 0.5, 0.5, 0.1])
    verdict = compare(unsteady, Controls(SHUFFLE))
    assert verdict.word == "underpowered"
    assert "solve loss of 0.1 is not excluded" in verdict.because
    assert word(unsteady, solve_margin=0.4) == "effective"


def test_the_drop_has_to_be_larger_by_the_margin() -> None:
    found = compare(ROUTE, Controls(SHUFFLE)).shuffled.hack
    low = found.interval()[0]
    assert word(ROUTE, margin=low - 0.01, effect=0.95) == "effective"
    assert word(ROUTE, margin=low + 0.01, effect=0.95) != "effective"


def test_a_drop_that_is_smaller_by_less_than_the_margin_is_not_worse() -> None:
    less = exact("route", [0.93, 0.88, 0.95, 0.91, 0.94])
    assert word(less) == "worse"
    assert word(less, margin=0.1) == "not distinguishable from control"


def test_a_drop_from_a_higher_start_to_no_lower_rate_is_not_effective() -> None:
    route = exact("route", [0.30, 0.31, 0.30, 0.32, 0.30], on=1.0)
    control = exact("shuffle", [0.29, 0.30, 0.28, 0.30, 0.29], on=0.5)
    verdict = compare(route, Controls(control))
    assert verdict.shuffled.hack.interval()[0] > 0.4
    assert verdict.word == "not distinguishable from control"
    assert "its on view hacks more" in verdict.because


# Several arms


def test_levels_are_holms() -> None:
    assert holm_levels([0.01, 0.04, 0.03, 0.005], 0.05) == pytest.approx([0.05 / 3, 0.025, 0.025, 0.0125])
    assert holm_levels([0.04, 0.01], 0.05) == pytest.approx([0.05, 0.025])
    assert holm_levels([0.03, 0.04], 0.05) == pytest.approx([0.025, 0.025])


def between() -> ArmRuns:
    """Effective on its own with p between .025 and .05."""
    return exact("between", [0.90 - 0.10, 0.85 - 0.01, 0.92 - 0.16, 0.88 - 0.03, 0.91 - 0.07])


def test_several_arms_are_corrected() -> None:
    alone = compare(between(), Controls(SHUFFLE))
    assert alone.word == "effective"
    assert 0.025 < alone.shuffled.p(Criteria()) < 0.05
    same = exact("same", [0.89, 0.86, 0.92, 0.87, 0.92])
    corrected = compare_all([(between(), Controls(SHUFFLE)), (same, Controls(SHUFFLE))])
    assert corrected[0].word != "effective"
    assert [verdict.level for verdict in corrected] == [0.025, 0.025]
    assert "0.05 corrected for 2 arms (Holm)" in repr(corrected[0])
    # Holm: an arm that is beyond doubt leaves the whole level to the other.
    found = compare_all([(between(), Controls(SHUFFLE)), (ROUTE, Controls(SHUFFLE))])
    assert [verdict.word for verdict in found] == ["effective", "effective"]
    assert [verdict.level for verdict in found] == [0.05, 0.025]


def test_an_arm_of_too_few_seeds_leaves_no_level_to_the_others() -> None:
    one = compare(one_seed("one", 0.0), Controls(one_seed("shuffle", 1.0)))
    assert one.shuffled.wins(one.criteria, 0.01)
    assert one.shuffled.p(one.criteria) == 1
    found = compare_all([(between(), Controls(SHUFFLE)), (one.treatment, one.controls)])
    assert [verdict.level for verdict in found] == [0.025, 0.025]
    assert [verdict.word == "effective" for verdict in found] == [False, False]


def test_one_arm_is_judged_as_by_compare() -> None:
    assert compare_all([(ROUTE, Controls(SHUFFLE, POOR))]) == [compare(ROUTE, Controls(SHUFFLE, POOR))]


# Power


def test_expected_power_is_that_of_a_noncentral_t() -> None:
    found = Difference(0.1, 0.15, 3, "seeds")
    with np.errstate(divide="ignore"):  # scipy 1.11 divides by zero on its way
        expected = nct.cdf(0.2 * 5**0.5 / 0.15, 3, t.isf(0.025, 19))
    assert expected_power(found, 5, 0.2, 0.05) == pytest.approx(expected)
    # With the error known it is the textbook's: P(Z > 1.96 - 2.8) = .80.
    assert expected_power(Difference(0.0, 1 / 2.8, 10**6, "prompts"), 1, 1.0, 0.05) == pytest.approx(0.80, abs=0.001)


def test_more_is_needed_for_a_smaller_effect_a_higher_power_and_a_margin() -> None:
    def needed(**criteria: float) -> int:
        arms = [exact(name, [rate], n=64) for name, rate in (("route", 0.5), ("shuffle", 0.55))]
        verdict = compare(arms[0], Controls(arms[1]), criteria=Criteria(over="prompts", solve_margin=0.5, **criteria))
        assert verdict.word == "underpowered"
        return verdict.needed.n

    usual = needed(effect=0.1)
    assert needed(effect=0.05) == pytest.approx(4 * usual, rel=0.05)
    assert needed(effect=0.1, power=0.9) == pytest.approx(usual * (1.96 + 1.2816) ** 2 / (1.96 + 0.8416) ** 2, rel=0.03)
    assert needed(effect=0.1, margin=0.05) == pytest.approx(4 * usual, rel=0.05)


def test_what_cannot_be_reached_is_said_so() -> None:
    arms = [exact(name, [rate], n=64) for name, rate in (("route", 0.5), ("shuffle", 0.55))]
    criteria = Criteria(over="prompts", effect=0.001)
    assert "more than 100000 prompts per mode" in repr(compare(arms[0], Controls(arms[1]), criteria=criteria))


# What is refused


@pytest.mark.parametrize(
    "wrong",
    [
        {"margin": -0.1}, {"margin": math.nan}, {"margin": 0.3}, {"solve_margin": 0.0}, {"solve_margin": math.nan},
        {"effect": 0.0}, {"effect": 1.5}, {"effect": math.nan}, {"level": 0.0}, {"level": 0.5}, {"power": 1.0},
        {"power": 0.01}, {"discovered": 0.0}, {"discovered": 1.1}, {"over": "models"}, {"level": "0.05"},
        {"margin": True}, {"least_solve": 1.0}, {"least_solve": -0.1},
    ],
    ids=str,
)  # fmt: skip
def test_criteria_that_are_none_raise(wrong: dict[str, object]) -> None:
    with pytest.raises(REFUSED, match=f"{next(iter(wrong))}|effect"):
        Criteria(**wrong)


def test_modes_that_no_arm_has_raise() -> None:
    arms = [ArmRuns(a.name, {s: {"file": run["file"]} for s, run in a.runs.items()}) for a in (ROUTE, SHUFFLE)]
    with pytest.raises(gr.GradRouteError, match="`modes` should name modes.*'monitored', of which it has none"):
        compare(arms[0], Controls(arms[1]), modes="monitored")
    with pytest.raises(REFUSED, match="modes"):
        compare(ROUTE, Controls(SHUFFLE), modes="held out")


@pytest.mark.parametrize("contests", [[], [(ROUTE, Controls(SHUFFLE))] * 2], ids=["none", "one twice"])
def test_no_treatment_or_one_twice_raises(contests: list) -> None:
    with pytest.raises(gr.GradRouteError, match="different treatments"):
        compare_all(contests)


def test_few_resamples_raise() -> None:
    with pytest.raises(gr.GradRouteError, match="`resamples` should be 100 or more. Found 99"):
        compare(ROUTE, Controls(SHUFFLE), resamples=99)
