"""Wrong calls of evaluation: views compared, plots, cards, arms and verdicts."""

import gradroute as gr
from gradroute.evaluation import (
    ArmRuns,
    Controls,
    Criteria,
    ModeOutcomes,
    OnOffReport,
    Rate,
    assert_ablation_reaches,
    assert_engine_follows,
    compare_all,
    dose_curve,
    plot_training,
)
from support.call_arguments import (
    BASE,
    FEWER,
    MODEL,
    OTHER,
    PLAIN,
    RANDOM,
    RECORD,
    REPORT,
    RIVAL,
    ROUTE,
    SHUFFLE,
    TRAINED,
    Calls,
    Tiny,
    empty_folder,
    entered,
    outcomes,
)


def dosed(*, monitored: bool = True) -> gr.evaluation.DoseCurve:
    """A curve on which every rollout hacks."""
    return dose_curve(MODEL, lambda _: [gr.EvalRecord("file", monitored, 0, True, False)])


EVALUATION_CALLS: Calls = {
    "assert_ablation_reaches": [
        ("`model`", lambda: assert_ablation_reaches(PLAIN, lambda _: ["text"])),
        ("`model`", lambda: entered(
            gr.ablate_quarantine(MODEL), lambda: assert_ablation_reaches(MODEL, lambda _: ["text"]))),
        ("quarantine", lambda: assert_ablation_reaches(gr.attach(Tiny()), lambda _: ["text"])),
        ("`generate_fn`", lambda: assert_ablation_reaches(TRAINED, lambda _: ["text"])),
        ("`generate_fn`", lambda: assert_ablation_reaches(TRAINED, lambda _: "text")),
    ],
    "assert_engine_follows": [
        ("`model`", lambda: assert_engine_follows(PLAIN, lambda _: ([[1]], [[-1.0]]))),
        ("`model`", lambda: entered(
            gr.ablate_quarantine(MODEL), lambda: assert_engine_follows(MODEL, lambda _: ([[1]], [[-1.0]])))),
        ("`prompts`", lambda: assert_engine_follows(TRAINED, lambda _: ([[1]], [[-1.0]]))),
        ("`generate`", lambda: assert_engine_follows(TRAINED, lambda _: ["text", "text"], prompts=[[1, 2], [3, 4]])),
        ("`prompts`", lambda: assert_engine_follows(TRAINED, lambda _: ([], []), prompts=[])),
        ("`prompts`", lambda: assert_engine_follows(TRAINED, lambda _: ([[1]], [[-1.0]]), prompts=0)),
        ("`tolerance`", lambda: assert_engine_follows(TRAINED, lambda _: ([[1]], [[-1.0]]), tolerance=0.0)),
        ("`temperature`", lambda: assert_engine_follows(TRAINED, lambda _: ([[1]], [[-1.0]]), temperature=-1.0)),
    ],
    "evaluate_on_off": [
        ("`eval_fn`", lambda: gr.evaluate_on_off(MODEL, lambda _: [])),
        ("`eval_fn`", lambda: gr.evaluate_on_off(MODEL, lambda _: 0.3)),
        ("`eval_fn`", lambda: gr.evaluate_on_off(MODEL, lambda _: [{"hacked": True}])),
        ("`model`", lambda: gr.evaluate_on_off(PLAIN, lambda _: [RECORD])),
        ("`model`",
         lambda: entered(gr.ablate_quarantine(MODEL), lambda: gr.evaluate_on_off(MODEL, lambda _: [RECORD]))),
    ],
    "dose_curve": [
        ("`scales`", lambda: dose_curve(MODEL, lambda _: [RECORD], scales=(0.0, 2.0))),
        ("`scales`", lambda: dose_curve(MODEL, lambda _: [RECORD], scales=(1.0,))),
        ("`eval_fn`", lambda: dose_curve(MODEL, lambda _: [])),
        ("`model`", lambda: dose_curve(PLAIN, lambda _: [RECORD])),
        ("`model`", lambda: entered(gr.ablate_quarantine(MODEL), lambda: dose_curve(MODEL, lambda _: [RECORD]))),
    ],
    "DoseCurve": [
        ("`monitored_below`", lambda: dosed().pick(monitored_below=0.5)),
        ("`monitored_below`", lambda: dosed().pick(monitored_below=5)),
        ("`monitored_below`", lambda: dosed().pick(monitored_below=Rate(1, 2))),
        ("monitored", lambda: dosed(monitored=False).pick(monitored_below=0.5)),
    ],
    "plot_training": [
        ("`reports`", lambda: plot_training({})),
        ("`reports`", lambda: plot_training([REPORT])),
        ("`reports`", lambda: plot_training({0: 0.3})),
        ("`group`", lambda: plot_training({0: REPORT}, group="heldout")),
        ("`group`", lambda: plot_training({0: REPORT}, group="monitored")),
    ],
    "write_card": [
        ("`scale`", lambda: gr.write_card(MODEL, REPORT, empty_folder(), routed_by="a", masks="b", scale=-1)),
        ("`dose`", lambda: gr.write_card(MODEL, REPORT, empty_folder(), routed_by="a", masks="b", scale=0.3)),
        ("`dose`", lambda: gr.write_card(
            MODEL, REPORT, empty_folder(), routed_by="a", masks="b", scale=0.3, dose=dosed())),
        ("`report`", lambda: gr.write_card(MODEL, 0.3, empty_folder(), routed_by="labels", masks="classic")),
        ("`masks`", lambda: gr.write_card(MODEL, REPORT, empty_folder(), routed_by="labels")),
        ("`routed_by`", lambda: gr.write_card(MODEL, REPORT, empty_folder(), routed_by=0.5)),
        ("`model`", lambda: gr.write_card(PLAIN, REPORT, empty_folder(), routed_by="labels", masks="classic")),
        ("`caveats`", lambda: gr.write_card(
            MODEL, REPORT, empty_folder(), routed_by="labels", masks="classic", caveats="one")),
    ],
    "Rate": [
        ("`k`", lambda: Rate(3, 2)),
        ("`k`", lambda: Rate(0.5, 2)),
    ],
    "ModeOutcomes": [
        ("Rate", lambda: ModeOutcomes(True, 0.5, 0.1, 0.3)),
        ("n of", lambda: ModeOutcomes(True, Rate(1, 2), Rate(1, 3), Rate(1, 2))),
        ("`prompts`", lambda: ModeOutcomes(True, Rate(1, 2), Rate(1, 2), Rate(1, 2), {})),
    ],
    "ArmRuns": [
        ("`runs`", lambda: ArmRuns("route", {})),
        ("`runs`", lambda: ArmRuns("route", {0: REPORT})),
        ("`name`", lambda: ArmRuns("", {0: {"file": outcomes(9)}})),
        ("report", lambda: ArmRuns.from_reports("route", {0: OnOffReport(REPORT.on, REPORT.ablated)})),
        ("modes", lambda: ArmRuns("route", {0: {"file": outcomes(9)}, 1: {"stdout": outcomes(9)}})),
    ],
    "Controls": [
        ("`controls`", lambda: Controls("shuffle")),
        ("`controls`", lambda: Controls(SHUFFLE, ["random"])),
        ("`controls.random`", lambda: Controls(SHUFFLE, RANDOM)),
        ("`controls.rivals`", lambda: Controls(SHUFFLE, rivals=RIVAL, base=BASE)),
        ("`base`", lambda: Controls(SHUFFLE, rivals=[RIVAL])),
        ("`rivals`", lambda: Controls(SHUFFLE, base=BASE)),
    ],
    "Criteria": [
        ("`effect`", lambda: Criteria(effect=0.0)),
        ("`level`", lambda: Criteria(level=95)),
        ("`over`", lambda: Criteria(over="runs")),
        ("`power`", lambda: Criteria(power=0.0)),
        ("`margin`", lambda: Criteria(margin="small")),
    ],
    "compare": [
        ("modes", lambda: gr.compare(ROUTE, Controls(OTHER))),
        ("name", lambda: gr.compare(ROUTE, Controls(ROUTE))),
        ("`controls.random`", lambda: gr.compare(ROUTE, Controls(SHUFFLE, [RANDOM]))),
        ("one block", lambda: gr.compare(ROUTE, Controls(SHUFFLE, rivals=[RANDOM], base=BASE))),
        ("one block", lambda: gr.compare(ROUTE, Controls(SHUFFLE, rivals=[RIVAL], base=RANDOM))),
        ("name", lambda: gr.compare(ROUTE, Controls(SHUFFLE, rivals=[ROUTE], base=BASE))),
        ("seeds", lambda: gr.compare(ROUTE, Controls(SHUFFLE, rivals=[FEWER], base=BASE))),
        ("`modes`", lambda: gr.compare(ROUTE, Controls(SHUFFLE), modes="monitored")),
        ("`resamples`", lambda: gr.compare(ROUTE, Controls(SHUFFLE), resamples=1)),
    ],
    "compare_all": [
        ("`contests`", lambda: compare_all([])),
        ("`contests`", lambda: compare_all([(ROUTE, Controls(SHUFFLE))] * 2)),
        ("`resamples`", lambda: compare_all([(ROUTE, Controls(SHUFFLE))], resamples=0)),
    ],
}  # fmt: skip
