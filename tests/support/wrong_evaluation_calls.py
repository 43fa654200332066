"""Wrong calls of evaluation: views compared, plots, cards, arms and verdicts."""

import gradroute as gr
from support.call_arguments import (
    MODEL,
    OTHER,
    PLAIN,
    RANDOM,
    RECORD,
    REPORT,
    ROUTE,
    SHUFFLE,
    TRAINED,
    Calls,
    Tiny,
    empty_folder,
    entered,
    outcomes,
)

EVALUATION_CALLS: Calls = {
    "assert_ablation_reaches": [
        ("`model`", lambda: gr.evaluation.assert_ablation_reaches(PLAIN, lambda _: ["text"])),
        ("`model`", lambda: entered(
            gr.ablate_quarantine(MODEL), lambda: gr.evaluation.assert_ablation_reaches(MODEL, lambda _: ["text"]))),
        ("quarantine", lambda: gr.evaluation.assert_ablation_reaches(gr.attach(Tiny()), lambda _: ["text"])),
        ("`generate_fn`", lambda: gr.evaluation.assert_ablation_reaches(TRAINED, lambda _: ["text"])),
        ("`generate_fn`", lambda: gr.evaluation.assert_ablation_reaches(TRAINED, lambda _: "text")),
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
        ("`scales`", lambda: gr.evaluation.dose_curve(MODEL, lambda _: [RECORD], scales=(0.0, 2.0))),
        ("`scales`", lambda: gr.evaluation.dose_curve(MODEL, lambda _: [RECORD], scales=(1.0,))),
        ("`eval_fn`", lambda: gr.evaluation.dose_curve(MODEL, lambda _: [])),
        ("`model`", lambda: gr.evaluation.dose_curve(PLAIN, lambda _: [RECORD])),
        ("`model`", lambda: entered(gr.ablate_quarantine(MODEL), lambda: gr.evaluation.dose_curve(MODEL, lambda _: [RECORD]))),
    ],
    "plot_training": [
        ("`reports`", lambda: gr.evaluation.plot_training({})),
        ("`reports`", lambda: gr.evaluation.plot_training([REPORT])),
        ("`reports`", lambda: gr.evaluation.plot_training({0: 0.3})),
        ("`group`", lambda: gr.evaluation.plot_training({0: REPORT}, group="heldout")),
        ("`group`", lambda: gr.evaluation.plot_training({0: REPORT}, group="monitored")),
    ],
    "write_card": [
        ("`report`", lambda: gr.write_card(MODEL, 0.3, empty_folder(), routed_by="labels", masks="classic")),
        ("`masks`", lambda: gr.write_card(MODEL, REPORT, empty_folder(), routed_by="labels")),
        ("`routed_by`", lambda: gr.write_card(MODEL, REPORT, empty_folder(), routed_by=0.5)),
        ("`model`", lambda: gr.write_card(PLAIN, REPORT, empty_folder(), routed_by="labels", masks="classic")),
        ("`caveats`", lambda: gr.write_card(
            MODEL, REPORT, empty_folder(), routed_by="labels", masks="classic", caveats="one")),
    ],
    "Rate": [
        ("`k`", lambda: gr.evaluation.Rate(3, 2)),
        ("`k`", lambda: gr.evaluation.Rate(0.5, 2)),
        ("`value`", lambda: gr.evaluation.Rate.from_value(0.333, 10)),
    ],
    "ModeOutcomes": [
        ("Rate", lambda: gr.evaluation.ModeOutcomes(True, 0.5, 0.1, 0.3)),
        ("n of", lambda: gr.evaluation.ModeOutcomes(True, gr.evaluation.Rate(1, 2), gr.evaluation.Rate(1, 3), gr.evaluation.Rate(1, 2))),
        ("`prompts`", lambda: gr.evaluation.ModeOutcomes(True, gr.evaluation.Rate(1, 2), gr.evaluation.Rate(1, 2), gr.evaluation.Rate(1, 2), {})),
    ],
    "ArmRuns": [
        ("`runs`", lambda: gr.evaluation.ArmRuns("route", {})),
        ("`runs`", lambda: gr.evaluation.ArmRuns("route", {0: REPORT})),
        ("`name`", lambda: gr.evaluation.ArmRuns("", {0: {"file": outcomes(9)}})),
        ("report", lambda: gr.evaluation.ArmRuns.from_reports("route", {0: gr.evaluation.OnOffReport(REPORT.on, REPORT.ablated)})),
        ("modes", lambda: gr.evaluation.ArmRuns("route", {0: {"file": outcomes(9)}, 1: {"stdout": outcomes(9)}})),
    ],
    "Controls": [
        ("`controls`", lambda: gr.evaluation.Controls("shuffle")),
        ("`controls`", lambda: gr.evaluation.Controls(SHUFFLE, ["random"])),
    ],
    "Criteria": [
        ("`effect`", lambda: gr.evaluation.Criteria(effect=0.0)),
        ("`level`", lambda: gr.evaluation.Criteria(level=95)),
        ("`over`", lambda: gr.evaluation.Criteria(over="runs")),
        ("`power`", lambda: gr.evaluation.Criteria(power=0.0)),
        ("`margin`", lambda: gr.evaluation.Criteria(margin="small")),
    ],
    "compare": [
        ("modes", lambda: gr.compare(ROUTE, gr.evaluation.Controls(OTHER))),
        ("name", lambda: gr.compare(ROUTE, gr.evaluation.Controls(ROUTE))),
        ("`controls.random`", lambda: gr.compare(ROUTE, gr.evaluation.Controls(SHUFFLE, [RANDOM]))),
        ("`modes`", lambda: gr.compare(ROUTE, gr.evaluation.Controls(SHUFFLE), modes="monitored")),
        ("`resamples`", lambda: gr.compare(ROUTE, gr.evaluation.Controls(SHUFFLE), resamples=1)),
    ],
    "compare_all": [
        ("`contests`", lambda: gr.evaluation.compare_all([])),
        ("`contests`", lambda: gr.evaluation.compare_all([(ROUTE, gr.evaluation.Controls(SHUFFLE))] * 2)),
        ("`resamples`", lambda: gr.evaluation.compare_all([(ROUTE, gr.evaluation.Controls(SHUFFLE))], resamples=0)),
    ],
}  # fmt: skip
