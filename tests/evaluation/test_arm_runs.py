"""`ArmRuns`: the data of a comparison, from reports or from counts, and arms that cannot be compared."""

import math
from dataclasses import replace

import pytest
from support.evaluated_arms import exact, report
from support.language_models import routed_mixer

import gradroute as gr
from gradroute.evaluation import ArmRuns, Controls, ModeOutcomes, Rate, ViewRates, compare

REFUSED = (gr.GradRouteError, TypeError)
# Hacked on, hacked ablated, solved ablated.
HACK, FIXED, NEITHER = (True, True, False), (True, False, True), (False, False, False)


def one_run() -> ArmRuns:
    outcomes = [("file", False, 0, [HACK]), ("file", False, 1, [FIXED]), ("file", False, 2, [FIXED])]
    return ArmRuns.from_reports("route", {7: report([*outcomes, ("none", None, 0, [NEITHER])])})


def test_reports_are_counted_by_mode() -> None:
    run = one_run().runs[7]
    assert list(run) == ["file", "none"]
    assert (run["file"].hack_on, run["file"].hack_ablated, run["file"].solve_ablated) == (
        Rate(3, 3), Rate(1, 3), Rate(2, 3),
    )  # fmt: skip
    assert run["file"].drop == pytest.approx(2 / 3)
    assert run["file"].prompts == {0: (1, 1, 0), 1: (1, 0, 1), 2: (1, 0, 1)}
    assert one_run().monitored == {"file": False, "none": None}


def test_several_rollouts_of_a_prompt_are_one_prompt() -> None:
    arm = ArmRuns.from_reports("route", {0: report([("file", True, "p", [HACK, FIXED, NEITHER, NEITHER])])})
    outcomes = arm.runs[0]["file"]
    assert (outcomes.hack_on, outcomes.hack_ablated, outcomes.n_prompts) == (Rate(2, 4), Rate(1, 4), 1)
    assert outcomes.prompts == {"p": (0.5, 0.25, 0.25)}


def test_real_reports_are_taken() -> None:
    records = [gr.EvalRecord("file", False, i, hacked=i < 2, solved=i > 2) for i in range(5)]
    arm = ArmRuns.from_reports("route", {0: gr.evaluate_on_off(routed_mixer(), lambda model: records)})
    assert arm.runs[0]["file"].hack_ablated == arm.runs[0]["file"].solve_ablated == Rate(2, 5)
    assert repr(arm) == "ArmRuns(route, 1 seeds, modes file)"


def test_a_report_of_rates_alone_raises() -> None:
    with pytest.raises(gr.GradRouteError, match="seed 3 of route should hold its records.*Fix"):
        ArmRuns.from_reports("route", {3: gr.evaluation.OnOffReport(ViewRates({}, {}), ViewRates({}, {}))})


def test_a_mode_on_both_sides_raises() -> None:
    with pytest.raises(gr.GradRouteError, match="'file' should agree on `monitored`"):
        ArmRuns.from_reports("route", {0: report([("file", False, 0, [HACK]), ("file", True, 1, [HACK])])})


def test_runs_that_are_no_outcomes_raise() -> None:
    with pytest.raises(REFUSED, match="(?s)from_reports|runs"):
        ArmRuns("route", {0: report([("file", False, 0, [HACK])])})
    with pytest.raises(gr.GradRouteError, match="`runs` of route should map seeds"):
        ArmRuns("route", {})
    with pytest.raises(gr.GradRouteError, match="`name`"):
        ArmRuns("", one_run().runs)


def test_runs_of_other_modes_raise() -> None:
    runs = dict(exact("route", [0.0, 0.0]).runs)
    runs[1] = {mode: outcomes for mode, outcomes in runs[1].items() if mode != "file"}
    with pytest.raises(gr.GradRouteError, match="route should have the same modes.*seed 1"):
        ArmRuns("route", runs)
    runs[1] = {**runs[0], "file": replace(runs[0]["file"], monitored=True)}
    with pytest.raises(gr.GradRouteError, match="route should have the same modes.*seed 1"):
        ArmRuns("route", runs)


def test_runs_without_an_exploit_mode_raise() -> None:
    with pytest.raises(gr.GradRouteError, match="exploit mode. Found no loophole"):
        ArmRuns("route", {0: {"no loophole": exact("route", [0.0]).runs[0]["no loophole"]}})
    with pytest.raises(gr.GradRouteError, match="exploit mode. Found no modes"):
        ArmRuns("route", {0: {}})


@pytest.mark.parametrize("rates", [(Rate(0, 0),) * 3, (Rate(1, 2), Rate(1, 3), Rate(1, 2)), (1.0, 0.0, 0.5)])
def test_rates_of_nothing_or_of_other_rollouts_raise(rates: tuple) -> None:
    with pytest.raises(REFUSED, match="rollouts|Rate"):
        ModeOutcomes(True, *rates)


@pytest.mark.parametrize("shares", [(math.nan, 0.0, 0.0), (0.0, 1.5, 0.0), (0.0, 0.0, -0.1), (0.0, 0.0)])
def test_shares_that_are_none_raise(shares: tuple[float, ...]) -> None:
    with pytest.raises(REFUSED, match="prompts"):
        ModeOutcomes(True, Rate(1, 1), Rate(1, 1), Rate(1, 1), {0: shares})


def test_no_prompts_raise() -> None:
    with pytest.raises(gr.GradRouteError, match="prompt ids, one or more.*Found none"):
        ModeOutcomes(True, Rate(1, 1), Rate(1, 1), Rate(1, 1), {})


# Arms that cannot be compared


def by_prompts(name: str, ids: range, seed: int = 0) -> ArmRuns:
    return ArmRuns.from_reports(name, {seed: report([("file", False, i, [FIXED if i % 3 else HACK]) for i in ids])})


ROUTE = exact("route", [0.1, 0.2, 0.1])
SHUFFLE = exact("shuffle", [0.9, 0.8, 0.9])


def test_what_the_refusals_below_change_is_accepted() -> None:
    compare(ROUTE, Controls(SHUFFLE, [exact(f"draw {i}", [0.3 + i / 10] * 3) for i in range(5)]))
    unchanged = ArmRuns.from_reports("shuffle", {0: report([("file", False, i, [HACK]) for i in range(12)])})
    compare(by_prompts("route", range(12)), Controls(unchanged))


def test_the_treatment_as_its_own_control_raises() -> None:
    with pytest.raises(gr.GradRouteError, match="own name. Found 'route' twice"):
        compare(ROUTE, Controls(ROUTE))
    for copy in (ArmRuns("copy", ROUTE.runs), ArmRuns("copy", {s: dict(run) for s, run in ROUTE.runs.items()})):
        with pytest.raises(gr.GradRouteError, match="its own runs. Found the same evaluations in copy and route.*Fix"):
            compare(ROUTE, Controls(copy))
    with pytest.raises(gr.GradRouteError, match="its own runs"):
        compare(by_prompts("route", range(12)), Controls(by_prompts("copy", range(12))))


def test_one_draw_counted_twice_raises() -> None:
    draws = [exact(f"draw {i}", [0.5, 0.55, 0.45 + max(i, 1) / 100]) for i in range(5)]
    with pytest.raises(gr.GradRouteError, match="same evaluations in draw 1 and draw 0"):
        compare(ROUTE, Controls(SHUFFLE, draws))


def test_saturated_arms_may_be_equal() -> None:
    saturated = [exact(name, [0.0] * 3, solve=1.0) for name in "abcdefg"]
    assert compare(saturated[0], Controls(saturated[1], saturated[2:])).word == "not distinguishable from control"


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_fewer_than_five_draws_raise(n: int) -> None:
    draws = [exact(f"draw {i}", [0.5 + i / 10] * 3) for i in range(n)]
    with pytest.raises(gr.GradRouteError, match=f"5 or more draws, or none. Found {n}.*Fix"):
        compare(ROUTE, Controls(SHUFFLE, draws))


def test_other_modes_raise() -> None:
    fewer = ArmRuns("shuffle", {s: {m: o for m, o in run.items() if m != "file"} for s, run in SHUFFLE.runs.items()})
    with pytest.raises(gr.GradRouteError, match="shuffle should be evaluated on the modes of route"):
        compare(ROUTE, Controls(fewer))


@pytest.mark.parametrize("seeds", [(0, 1), (0, 1, 2, 3), (0, 1, 5)])
def test_seeds_without_a_partner_raise(seeds: tuple[int, ...]) -> None:
    with pytest.raises(gr.GradRouteError, match="shuffle should have the seeds of route, 0, 1, 2. Found 0, 1.*Fix"):
        compare(ROUTE, Controls(exact("shuffle", dict.fromkeys(seeds, 0.9))))


def test_draws_of_seeds_that_the_treatment_lacks_raise() -> None:
    draws = [exact(f"draw {i}", {0: 0.5 + i / 10, 8: 0.5}) for i in range(5)]
    with pytest.raises(gr.GradRouteError, match="draw 0 should have seeds of route, 0, 1, 2. Found 8.*Fix"):
        compare(ROUTE, Controls(SHUFFLE, draws))


def test_other_prompts_raise() -> None:
    with pytest.raises(gr.GradRouteError, match="other prompt ids in the mode 'file'.*Fix"):
        compare(by_prompts("route", range(12)), Controls(by_prompts("shuffle", range(1, 13))))


def test_controls_that_are_no_arms_raise() -> None:
    with pytest.raises(REFUSED, match="controls|ArmRuns"):
        Controls(SHUFFLE.runs)
    with pytest.raises(REFUSED, match="controls|ArmRuns"):
        compare(ROUTE, SHUFFLE)
