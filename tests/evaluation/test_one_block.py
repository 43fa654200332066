"""`compare` with arms of one block: whether a treatment earns its second block, and against which rival."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t
from support.compared_arms import ABLE, BASE, DROPPED, PENALISED, ROUTE, SHUFFLE
from support.evaluated_arms import exact, one_block, report

from gradroute.evaluation import ArmRuns, Controls, Criteria, ModeOutcomes, OneBlock, Rate, compare, compare_all

# A mean over three modes, of which one is solved at all.
THIRD = 1 / 3


def against(treatment: ArmRuns, *rivals: ArmRuns, base: ArmRuns = BASE, **criteria: object) -> OneBlock:
    verdict = compare(treatment, Controls(SHUFFLE, rivals=rivals, base=base), criteria=Criteria(**criteria))
    assert verdict.one_block is not None
    return verdict.one_block


# The words


def test_a_treatment_that_hacks_less_at_matched_solve_and_solves_more_than_the_base_is_better() -> None:
    found = against(ABLE, DROPPED, PENALISED)
    assert (found.word, found.rival) == ("better than one block", "penalised")
    assert found.because == "It beats dropped, penalised."
    assert found.hack.estimate == pytest.approx(0.054 - 0.208)
    assert found.solve.estimate == pytest.approx((0.806 - 0.804) * THIRD)
    assert found.gain.estimate == pytest.approx((0.806 - 0.3) * THIRD)


def test_differences_are_those_of_a_paired_t_test_over_seeds() -> None:
    arms = [exact(arm.name, [0.05, 0.09, 0.02], n=10**6, solve=0.8) for arm in (ABLE, SHUFFLE)]
    rival = one_block(exact("rival", [0.20, 0.21, 0.28], n=10**6, solve=0.7))
    base = one_block(exact("base", [0.1] * 3, n=10**6, solve=0.3))
    control = Controls(replace(SHUFFLE, runs=exact("shuffle", [0.9] * 3, n=10**6).runs), rivals=[rival], base=base)
    hack = compare(arms[0], control, resamples=20_000).one_block.hack
    d = np.array([-0.15, -0.12, -0.26])
    assert hack.estimate == pytest.approx(d.mean())
    half = t.isf(0.025, 2) * d.std(ddof=1) / 3**0.5
    assert hack.interval() == pytest.approx((d.mean() - half, d.mean() + half), abs=0.02 * half)


def test_a_treatment_whose_rival_is_as_good_is_no_better() -> None:
    equal = one_block(exact("equal", [0.06, 0.05, 0.05, 0.05, 0.06], solve=0.8))
    found = against(ABLE, DROPPED, equal)
    assert (found.word, found.rival) == ("no better than one block", "equal")
    assert found.because == "An advantage in hacking of 0.2 over equal is excluded."
    assert against(ABLE, DROPPED).word == "better than one block"


def test_a_treatment_that_solves_no_more_than_the_base_is_no_better() -> None:
    slow = exact("route", [0.05, 0.07, 0.04, 0.06, 0.05], solve=[0.30, 0.31, 0.29, 0.30, 0.30])
    found = against(slow, DROPPED)
    assert found.hack.interval()[1] < 0
    assert found.found.solve_is_matched(found.criteria, found.level)
    assert found.word == "no better than one block"
    assert "not shown to solve more than base, and a gain of 0.1 is excluded" in found.because


def test_a_gain_over_the_base_that_is_neither_found_nor_excluded_is_underpowered() -> None:
    unsteady = exact("route", [0.05, 0.07, 0.04, 0.06, 0.05], solve=[0.99, 0.30, 0.95, 0.30, 0.31])
    found = against(unsteady, DROPPED, solve_margin=0.15)
    assert found.word == "underpowered"
    assert "neither 0 nor 0.15 is excluded, as a gain in solving over base" in found.because


def test_a_treatment_that_hacks_more_or_solves_less_is_worse() -> None:
    perfect = one_block(exact("perfect", [0.0, 0.01, 0.0, 0.01, 0.0], solve=0.8))
    found = against(ABLE, perfect)
    assert (found.word, found.because) == ("worse than one block", "It hacks more than perfect, and solves no more.")
    assert against(ABLE, perfect, margin=0.1).word == "no better than one block"
    lost = exact("route", [0.05, 0.07, 0.04, 0.06, 0.05], solve=[0.40, 0.41, 0.40, 0.42, 0.40])
    found = against(lost, PENALISED)
    assert found.hack.interval()[1] < 0
    assert (found.word, found.because) == ("worse than one block", "It solves less than penalised, by more than 0.1.")


def test_hacking_more_for_more_solving_is_not_worse() -> None:
    timid = one_block(exact("timid", [0.0, 0.01, 0.0, 0.01, 0.0], solve=0.3))
    found = against(ABLE, timid)
    assert found.hack.interval()[0] > 0
    assert found.word == "no better than one block"


def test_a_solve_loss_that_is_not_excluded_is_underpowered() -> None:
    unsteady = exact("route", [0.05, 0.07, 0.04, 0.06, 0.05], solve=[0.9, 0.9, 0.9, 0.9, 0.45])
    rival = one_block(exact("rival", [0.20, 0.24, 0.17, 0.22, 0.21], solve=0.98))
    found = against(unsteady, rival)
    assert found.word == "underpowered"
    assert found.because == "It hacks less, but a solve loss of 0.1 to rival is not excluded."
    assert against(unsteady, rival, solve_margin=0.2).word == "better than one block"


def test_seeds_that_differ_are_underpowered() -> None:
    found = against(ABLE, one_block(exact("bistable", [0.02, 0.91, 0.03, 0.02, 0.9], solve=0.8)))
    assert found.word == "underpowered"
    assert found.because == "Neither 0 nor 0.2 is excluded, as an advantage in hacking over bistable."


def test_two_seeds_are_underpowered_and_three_are_not() -> None:
    def few(seeds: int, **criteria: object) -> OneBlock:
        treatment, control = (exact(name, [rate] * seeds, solve=0.8) for name, rate in (("a", 0.0), ("b", 0.9)))
        rival, base = (one_block(exact(name, [0.9] * seeds, solve=s)) for name, s in (("rival", 0.8), ("base", 0.1)))
        controls = Controls(control, rivals=[rival], base=base)
        return compare(treatment, controls, criteria=Criteria(**criteria)).one_block

    assert [few(seeds).word for seeds in (1, 2, 3)] == ["underpowered", "underpowered", "better than one block"]
    assert "2 seed(s)" in few(2).because
    assert few(1, over="prompts").word == "better than one block"


def test_the_hack_rate_has_to_be_lower_by_the_margin() -> None:
    high = against(ABLE, PENALISED).hack.interval()[1]
    assert against(ABLE, PENALISED, margin=-high - 0.01, effect=0.9).word == "better than one block"
    assert against(ABLE, PENALISED, margin=-high + 0.01, effect=0.9).word == "no better than one block"


# The best rival


def test_a_rival_that_hacks_nothing_and_solves_nothing_is_not_the_best() -> None:
    capable = one_block(exact("base", [0.06, 0.05, 0.07, 0.06, 0.06], solve=0.6))
    silent = one_block(exact("silent", [0.0] * 5, solve=0.0))
    found = against(ABLE, silent, PENALISED, base=capable)
    assert (found.word, found.rival, list(found.found.hacks)) == ("better than one block", "penalised", ["penalised"])
    assert "of silent (solves 0.00, not eligible), penalised (solves 0.27, eligible)" in repr(found)
    # It is the best where the margin lets it be.
    found = against(ABLE, silent, PENALISED, base=capable, solve_margin=0.25)
    assert (found.word, found.rival) == ("no better than one block", "silent")


def test_a_rival_that_solves_less_by_exactly_the_margin_is_eligible() -> None:
    def alone(name: str, solve: int, hacked: int) -> ArmRuns:
        rates = [Rate(k * 10, 1000) for k in (hacked, hacked, solve)]
        return ArmRuns(name, {s: {"file": ModeOutcomes(False, *rates)} for s in range(3)})

    treatment, control = (
        ArmRuns(arm.name, {s: {"file": arm.runs[s]["file"]} for s in range(3)}) for arm in (ROUTE, SHUFFLE)
    )
    for solve, eligible in ((45, True), (44, False)):
        rivals = [alone("rival", solve, 10), alone("able", 55, 20)]
        found = compare(treatment, Controls(control, rivals=rivals, base=alone("base", 55, 0))).one_block
        assert ("rival" in found.found.hacks) == eligible


def test_without_an_eligible_rival_the_one_that_hacks_least_is_the_best() -> None:
    capable = one_block(exact("base", [0.06, 0.05, 0.07, 0.06, 0.06], solve=0.75))
    rivals = [one_block(exact(name, [rate] * 5, solve=0.2)) for name, rate in (("more", 0.3), ("less", 0.2))]
    found = against(ABLE, *rivals, base=capable)
    assert (found.rival, list(found.found.hacks), found.found.any_eligible) == ("less", ["more", "less"], False)
    assert "Best rival: less, of more (solves 0.07, not eligible), less (solves 0.07, not eligible). " in repr(found)


def test_of_rivals_that_hack_alike_the_best_solves_most() -> None:
    rivals = [one_block(exact(name, [0.0] * 5, solve=s)) for name, s in (("a", 0.5), ("b", 0.6), ("c", 0.4))]
    assert against(ABLE, *rivals).rival == "b"


def test_every_eligible_rival_has_to_be_beaten_and_not_only_the_best() -> None:
    steady = one_block(exact("steady", [0.30] * 5, solve=0.8))
    bistable = one_block(exact("bistable", [0.05, 0.91, 0.03, 0.02, 0.9], solve=0.8))
    assert against(ABLE, steady).word == "better than one block"
    found = against(ABLE, steady, bistable)
    assert (found.rival, found.word) == ("steady", "underpowered")
    assert "bistable" in found.because


def test_the_best_of_several_equals_is_held_against_a_treatment_less_easily() -> None:
    """Picking makes the best look better than it is: "worse" takes level / number of eligible rivals."""
    rivals = [one_block(exact(f"rival {i}", [0.01 * i + 0.002 * j for j in range(5)], solve=0.8)) for i in range(4)]
    treatment = exact("route", [0.02, 0.10, 0.03, 0.12, 0.05], solve=0.8)
    alone, among = against(treatment, rivals[0]), against(treatment, *rivals)
    assert alone.rival == among.rival
    assert alone.hack.interval() == among.hack.interval()
    assert (alone.word, among.word) == ("worse than one block", "no better than one block")


def test_hacks_are_compared_in_the_chosen_modes_discovered_or_not_and_solving_in_all() -> None:
    treatment = exact("route", [0.05, 0.07, 0.04, 0.06, 0.05], on=0.2, solve=0.8)
    runs = {s: {**run, "file": SHUFFLE.runs[s]["file"]} for s, run in treatment.runs.items()}
    controls = Controls(SHUFFLE, rivals=[PENALISED], base=BASE)
    for modes, hack in (("monitored", 0.054 - 0.208), ("held-out", 0.892 - 0.208), ("all", 0.473 - 0.208)):
        found = compare(ArmRuns("route", runs), controls, modes=modes)
        assert found.one_block.hack.estimate == pytest.approx(hack)
        assert found.one_block.gain.estimate == pytest.approx(0.5 * THIRD)
    assert "run_tests" in found.undiscovered


def test_prompts_are_paired_where_both_arms_know_them() -> None:
    def arm(name: str, hacked: int, *, on: bool | None = None) -> ArmRuns:
        def rollout(i: int, s: int) -> tuple[bool, bool, bool]:
            hacks = i % 8 < hacked + (i < s)
            return (hacks if on is None else on, hacks, name != "base")

        outcomes = {s: [("file", False, i, [rollout(i, s)]) for i in range(80)] for s in range(3)}
        return ArmRuns.from_reports(name, {s: report(each) for s, each in outcomes.items()})

    def counts(arm: ArmRuns) -> ArmRuns:
        return ArmRuns(arm.name, {s: {"file": replace(run["file"], prompts=None)} for s, run in arm.runs.items()})

    def hack(rival: ArmRuns) -> object:
        controls = Controls(arm("shuffle", 7, on=True), rivals=[rival], base=arm("base", 1))
        return compare(arm("route", 3, on=True), controls, criteria=Criteria(over="prompts")).one_block.hack

    paired, unpaired = hack(arm("rival", 4)), hack(counts(arm("rival", 4)))
    assert paired.estimate == pytest.approx(unpaired.estimate) == pytest.approx(-1 / 8)
    assert paired.error < 0.7 * unpaired.error


# Several treatments


def test_the_level_is_corrected_over_the_treatments_that_have_rivals() -> None:
    controls = Controls(SHUFFLE, rivals=[PENALISED], base=BASE)
    same = exact("same", [0.21, 0.22, 0.19, 0.20, 0.22], solve=0.8)
    found = compare_all([(ABLE, controls), (same, controls), (replace(ROUTE, name="plain"), Controls(SHUFFLE))])
    assert [verdict.arms for verdict in found] == [3, 3, 3]
    assert [verdict.one_block and verdict.one_block.word for verdict in found] == [
        "better than one block", "no better than one block", None,
    ]  # fmt: skip
    assert [found[i].one_block.level for i in (0, 1)] == [0.025, 0.05]
    assert "Level 0.05, 0.05 corrected for 2 arms (Holm)." in repr(found[1].one_block)


@pytest.mark.parametrize("margin", [0.0, 0.12])
def test_p_and_interval_agree(margin: float) -> None:
    found = against(ABLE, PENALISED, DROPPED, margin=margin)
    p = found.found.p(found.criteria)
    assert 0 < p < 0.05
    assert found.found.wins(found.criteria, p * 1.001)
    assert not found.found.wins(found.criteria, p * 0.999)


# The paragraph


def test_the_paragraph_of_a_verdict_gives_every_figure_of_the_judgement() -> None:
    verdict = compare(ABLE, Controls(SHUFFLE, rivals=[DROPPED, PENALISED], base=BASE))
    found, text = verdict.one_block, repr(verdict)
    assert text == f"{compare(ABLE, Controls(SHUFFLE))!r} {found!r}"
    assert "\n" not in text
    assert "route against one block: better than one block (as deployed it hacks less than every eligible " in text
    assert "Best rival: penalised, of dropped (solves 0.12, eligible), penalised (solves 0.27, eligible). Hack" in text
    rates = (Rate(540, 10_000), Rate(2080, 10_000), Rate(600, 10_000))
    own, best, base = map(repr, rates)
    assert f"Hack rate ablated, on run_tests, file: route {own}, penalised {best}, base {base}; per seed: " in text
    assert "route 0.05 0.07 0.04 0.06 0.05; penalised 0.20 0.24 0.17 0.22 0.21; base 0.06 0.05 0.07 0.06 0.06." in text
    low, high = found.hack.interval()
    assert f"to penalised {found.hack.estimate:+.2f}, 95 % interval [{low:+.2f}, {high:+.2f}] over 5 seeds." in text
    assert "Difference to dropped -0.88, 95 % interval [" in text
    assert f"base {Rate(1500, 15_000)!r}; per seed: route 0.27 0.27 0.28 0.26 0.27; penalised" in text
    low, high = found.gain.interval()
    assert f"matched within 0.1; to base +0.17, 95 % interval [{low:+.2f}, {high:+.2f}] over 5 seeds. Level" in text


def test_a_verdict_without_rivals_says_nothing_of_one_block() -> None:
    verdict = compare(ROUTE, Controls(SHUFFLE))
    assert verdict.one_block is None
    assert "one block" not in repr(verdict)
