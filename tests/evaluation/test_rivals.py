"""Rivals and a base that cannot be compared with a treatment."""

from dataclasses import replace

import pytest
from support.compared_arms import ABLE, BASE, DROPPED, PENALISED, POOR, SHUFFLE
from support.evaluated_arms import exact, one_block, report

import gradroute as gr
from gradroute.evaluation import ArmRuns, Controls, Rate, compare

REFUSED = (gr.GradRouteError, TypeError)


def test_what_the_refusals_below_change_is_accepted() -> None:
    compare(ABLE, Controls(SHUFFLE, POOR, rivals=[PENALISED, DROPPED], base=BASE))


def test_rivals_without_a_base_and_a_base_without_rivals_raise() -> None:
    with pytest.raises(gr.GradRouteError, match="`rivals` and `base`.*together.*Found rivals alone.*Fix"):
        Controls(SHUFFLE, rivals=[PENALISED])
    with pytest.raises(gr.GradRouteError, match="`rivals` and `base`.*together.*Found a base alone.*Fix"):
        Controls(SHUFFLE, base=BASE)


def test_rivals_and_draws_that_are_not_lists_of_arms_raise() -> None:
    for wrong in ({"rivals": PENALISED, "base": BASE}, {"random": PENALISED}):
        with pytest.raises(REFUSED, match=f"(?s){next(iter(wrong))}"):
            Controls(SHUFFLE, **wrong)
    for wrong in ({"rivals": ["penalised"], "base": BASE}, {"rivals": [PENALISED], "base": BASE.runs}):
        with pytest.raises(REFUSED, match="(?s)controls|rivals|base"):
            Controls(SHUFFLE, **wrong)


def test_arms_that_can_be_gone_through_once_only_raise() -> None:
    """A generator was used up by the first check, and then there were no rivals."""
    for name, given in (("rivals", {"base": BASE}), ("random", {})):
        for wrong in ((arm for arm in [PENALISED]), None, {"penalised": PENALISED}):
            with pytest.raises(REFUSED, match=f"(?s){name}"):
                Controls(SHUFFLE, **{name: wrong}, **given)


def test_a_rival_with_a_second_block_raises() -> None:
    two = exact("two", [0.2, 0.24, 0.17, 0.22, 0.21])
    with pytest.raises(
        gr.GradRouteError,
        match="two should be of one block.*rates of 1.00 on and 0.20 ablated in the mode 'run_tests' of seed 0. Fix",
    ):
        compare(ABLE, Controls(SHUFFLE, rivals=[PENALISED, two], base=BASE))
    runs = dict(PENALISED.runs)
    runs[4] = {**runs[4], "file": replace(runs[4]["file"], hack_on=Rate(211, 1000))}
    with pytest.raises(gr.GradRouteError, match="penalised should be of one block.*'file' of seed 4"):
        compare(ABLE, Controls(SHUFFLE, rivals=[ArmRuns("penalised", runs)], base=BASE))


def test_a_base_with_a_second_block_raises() -> None:
    with pytest.raises(gr.GradRouteError, match="base should be of one block"):
        compare(ABLE, Controls(SHUFFLE, rivals=[PENALISED], base=exact("base", [0.2] * 5)))


def test_a_rival_whose_views_hack_at_the_same_rate_on_other_prompts_raises() -> None:
    def arm(name: str, on: int, ablated: int) -> ArmRuns:
        rollouts = [("file", False, i, [(i % 4 == on, i % 4 == ablated, True)]) for i in range(40)]
        return ArmRuns.from_reports(name, {0: report(rollouts)})

    treatment, control, base = arm("route", 0, 9), arm("shuffle", 0, 1), arm("base", 9, 9)
    compare(treatment, Controls(control, rivals=[arm("rival", 1, 1)], base=base))
    with pytest.raises(gr.GradRouteError, match="rival should be of one block.*other prompts hacked on than ablated"):
        compare(treatment, Controls(control, rivals=[arm("rival", 1, 2)], base=base))


def test_a_treatment_among_its_own_rivals_raises() -> None:
    with pytest.raises(gr.GradRouteError, match="Found 'route' twice"):
        compare(ABLE, Controls(SHUFFLE, rivals=[ABLE], base=BASE))
    with pytest.raises(gr.GradRouteError, match="same evaluations in copy and route"):
        compare(ABLE, Controls(SHUFFLE, rivals=[ArmRuns("copy", ABLE.runs)], base=BASE))


def test_a_name_or_runs_twice_raise() -> None:
    for rivals, base in (
        ([PENALISED, PENALISED], BASE),
        ([replace(PENALISED, name="shuffle")], BASE),
        ([PENALISED], replace(BASE, name="penalised")),
    ):
        with pytest.raises(gr.GradRouteError, match="its own name. Found '(penalised|shuffle)' twice"):
            compare(ABLE, Controls(SHUFFLE, rivals=rivals, base=base))
    with pytest.raises(gr.GradRouteError, match="same evaluations in base and penalised"):
        compare(ABLE, Controls(SHUFFLE, rivals=[PENALISED], base=replace(PENALISED, name="base")))


@pytest.mark.parametrize("which", ["rivals", "base"])
@pytest.mark.parametrize("seeds", [range(4), range(6)], ids=["fewer", "more"])
def test_other_seeds_raise(which: str, seeds: range) -> None:
    other = one_block(exact("other", {s: 0.3 + s / 100 for s in seeds}))
    arms = {"rivals": [PENALISED], "base": BASE, which: [other] if which == "rivals" else other}
    with pytest.raises(gr.GradRouteError, match="other should have the seeds of route, 0, 1, 2, 3, 4. Found 0.*Fix"):
        compare(ABLE, Controls(SHUFFLE, **arms))


@pytest.mark.parametrize("which", ["rivals", "base"])
def test_other_modes_or_prompts_raise(which: str) -> None:
    def fewer(arm: ArmRuns) -> ArmRuns:
        return ArmRuns(arm.name, {s: {m: o for m, o in run.items() if m != "file"} for s, run in arm.runs.items()})

    arms = {"rivals": [PENALISED], "base": BASE}
    wrong = fewer(BASE) if which == "base" else [fewer(PENALISED)]
    with pytest.raises(gr.GradRouteError, match="should be evaluated on the modes of route"):
        compare(ABLE, Controls(SHUFFLE, **{**arms, which: wrong}))

    def by_prompts(name: str, on: bool, ids: range = range(2)) -> ArmRuns:
        return ArmRuns.from_reports(name, {0: report([("file", False, i, [(on, False, True)]) for i in ids])})

    treatment, control = by_prompts("route", True), by_prompts("shuffle", True)
    known = {"rivals": [by_prompts("rival", False)], "base": by_prompts("base", False)}
    compare(treatment, Controls(control, **known))
    strange = by_prompts("strange", False, range(1, 3))
    with pytest.raises(gr.GradRouteError, match="other prompt ids in the mode 'file'"):
        compare(treatment, Controls(control, **{**known, which: strange if which == "base" else [strange]}))
